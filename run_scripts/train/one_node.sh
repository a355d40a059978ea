#!/usr/bin/env bash
# Trains on all GPUs of this machine, or on as many as GPUS says:
#   GPUS=8 bash run_scripts/train/one_node.sh projects/xformer/train/pretrain_stage1.yaml \
#     --options run.accum_grad_iters=2
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../setup_env.sh"
source "$ROOT/run_scripts/train/count_gpus.sh"

exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$GPUS" -m lavis.train --cfg-path "$@"
