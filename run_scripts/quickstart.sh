#!/usr/bin/env bash
# Installs into .venv, then runs the main job: stage-1 pre-training on synthetic scenes. Offline once installed.
# Arguments go to the job: bash run_scripts/quickstart.sh --options run.max_epoch=1
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/setup_env.sh"

exec "$PYTHON" -m lavis.train --cfg-path "$ROOT/projects/xformer/pretrain.yaml" "$@"
