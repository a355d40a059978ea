#!/usr/bin/env bash
# Trains on all GPUs of NODES machines. Run the same line on each of them, with the name of any one as HEAD. All must
# see the same files in the current folder and the same caches (LAVIS_XFORMER_CACHE, ~/.cache): one machine downloads
# for all. If they also share this repository's folder, set it up on one of them first:
#   bash run_scripts/setup_env.sh
#   NODES=2 HEAD=node-0 bash run_scripts/train/several_nodes.sh projects/xformer/train/pretrain_stage1.yaml

: "${NODES:?how many machines}" "${HEAD:?name of one machine}"
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../setup_env.sh"
source "$ROOT/run_scripts/train/count_gpus.sh"

exec "$PYTHON" -m torch.distributed.run --nnodes="$NODES" --nproc_per_node="$GPUS" \
  --rdzv_backend=c10d --rdzv_endpoint="$HEAD:${PORT:-29500}" --rdzv_id="${RUN_ID:-xformer}" \
  -m lavis.train --cfg-path "$@"
