#!/usr/bin/env bash
# Trains on one GPU:
#   bash run_scripts/train/one_gpu.sh projects/xformer/train/from_blip2_opt2.7b.yaml --options run.max_epoch=1
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../setup_env.sh"

exec "$PYTHON" -m lavis.train --cfg-path "$@"
