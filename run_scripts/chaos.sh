#!/usr/bin/env bash
# Crash consistency of the training command, tested with ckpt-chaos (pip install ckpt-chaos): kills a small main job at
# every file event in its run folder, also with the file truncated to half, resumes it and compares the weights.
# Takes 20 minutes or more.
#   bash run_scripts/chaos.sh                          one process
#   bash run_scripts/chaos.sh --ranks 2                two processes; --crash-rank 1 kills the other one
#   bash run_scripts/chaos.sh --modes term             SIGTERM, then a kill
# Uses the interpreter PYTHON, or the active one. The exit status is 1 if a kill did any damage.
set -euo pipefail

ROOT="$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")"
PYTHON="${PYTHON:-python}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# What has to match at the end: the last and the best weights.
FINGERPRINT="import hashlib, pathlib, sys
from lavis_xformer.engine import checkpoint
for name in sys.argv[1:]:
    weights = checkpoint.read(pathlib.Path(name))['model']
    print(hashlib.sha256(b''.join(weights[key].numpy().tobytes() for key in sorted(weights))).hexdigest())"

exec "$PYTHON" -m ckpt_chaos run --max-points 1000 --timeout 300 \
  --checkpoint-glob "{out}/run/checkpoint_*_step*.pth" --step-regex 'resuming from .* step (\d+)' \
  --result-cmd "\"$PYTHON\" -c \"$FINGERPRINT\" {out}/run/checkpoint_0.pth {out}/run/checkpoint_best.pth" \
  --fail-on HARD_FAIL,SILENT_DIVERGENCE,LOST_WORK,CONTROL_FAIL "$@" -- \
  "$PYTHON" -m lavis.train --cfg-path "$ROOT/projects/xformer/pretrain.yaml" --options \
  run.output_dir={out} run.job_id=run run.resume=auto run.max_epoch=1 run.save_every_steps=2 run.keep_last=0 \
  run.batch_size_train=4 run.batch_size_eval=8 \
  datasets.xformer_scenes.splits.train.scenes=48 datasets.xformer_scenes.splits.val.scenes=16
