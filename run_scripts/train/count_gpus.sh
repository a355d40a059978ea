# Sets GPUS to the number of this machine's GPUs unless it is given. Sourced by the scripts beside it.
GPUS="${GPUS:-$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')}"
if [ "$GPUS" = 0 ]; then
    echo "No GPU is visible here; GPUS=2 trains with two processes on the CPU, where the YAML's run.device allows it." >&2
    exit 2
fi
