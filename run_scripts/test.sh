#!/usr/bin/env bash
# Installs into .venv, then checks style, types and behaviour. Arguments go to pytest: test.sh -k fusion
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/setup_env.sh"

cd "$ROOT"
"$PYTHON" -m ruff check .
"$PYTHON" -m mypy
exec "$PYTHON" -m pytest -n 2 --dist loadfile "$@" # two processes; -n 0 for a debugger
