# Creates .venv with the tested packages and this plugin, or reuses it if up to date. Source it: sets ROOT and PYTHON.
set -euo pipefail

ROOT="$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")"
VENV="$ROOT/.venv"
PYTHON="$VENV/bin/python"
STAMP="$VENV/.lavis_xformer_stamp" # fingerprint of the last complete install
MAKING="$VENV/.lavis_xformer_making" # exists until this script has finished the install

# Nothing of another environment may leak into ours.
unset PYTHONPATH PYTHONHOME PYTHONSTARTUP VIRTUAL_ENV PIP_TARGET PIP_PREFIX PIP_USER LAVIS_XFORMER_AUTOREGISTER
export PYTHONNOUSERSITE=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# On a busy machine, threads that spin while they wait make a training step ten times slower.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"

# Prints "3.11" for an interpreter that runs and can create environments, otherwise nothing.
python_version() {
    "$1" -c 'import sys, venv, ensurepip; print("%d.%d" % sys.version_info[:2])' 2>/dev/null </dev/null || true
}

# Lists every interpreter worth trying, best first.
candidates() {
    local name
    for name in python3.11 python3.10 python3 python; do
        type -aP "$name" || true
    done
    ls -d "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.1[10].*/bin/python 2>/dev/null || true
}

# Prints the path of a Python 3.11 or 3.10; otherwise lists what it found instead, and fails.
find_python() {
    local path version found=""
    while IFS= read -r path; do
        version="$(python_version "$path")"
        case "$version" in
            3.10 | 3.11) echo "$path" && return ;;
            "") found="$found\n  $path: does not run, or lacks venv (on Debian and Ubuntu: apt install python3-venv)" ;;
            *) found="$found\n  $path: Python $version" ;;
        esac
    done < <(candidates)
    {
        echo "lavis_xformer needs Python 3.10 or 3.11, and found none. Found:"
        printf '%b\n' "${found:-\n  no Python at all}" | sed '1{/^$/d;}'
        echo "Python 3.12 can't work yet: LAVIS 1.0.2 needs tokenizers 0.13, which has no wheel for it."
        echo "Install one, e.g. 'pyenv install 3.11', 'uv python install 3.11' or 'apt install python3.11-venv'."
    } >&2
    return 1
}

# Fingerprint of what an environment depends on: the requirements, and the folder it was made in.
fingerprint() {
    (cd "$ROOT" && { cat setup.py pyproject.toml constraints.txt lavis_xformer.pth && pwd -P; } | cksum)
}

# Whether "pip install ." has replaced the link to this folder by a copy, which would ignore changes made here.
holds_copy() {
    compgen -G "$VENV/lib/python3*/site-packages/lavis_xformer" >/dev/null
}

make_environment() {
    local base
    if [ -e "$VENV" ] && [ ! -e "$STAMP" ] && [ ! -e "$MAKING" ]; then
        echo "$VENV exists, but this script did not create it. Move it away and start again." >&2
        return 1
    fi
    base="$(find_python)"
    echo "Creating $VENV with $base ($(python_version "$base")): about 7 GB, a few minutes, only once." >&2
    rm -rf "$VENV"
    mkdir "$VENV"
    touch "$MAKING"
    "$base" -m venv "$VENV"
}

is_ready() {
    [ ! -e "$MAKING" ] && [ "$(cat "$STAMP" 2>/dev/null)" = "$(fingerprint)" ] && "$PYTHON" -c "" 2>/dev/null &&
        ! holds_copy
}

set_up() {
    local version
    ! command -v flock >/dev/null || flock 9 # one setup at a time
    is_ready && return
    version="$(python_version "$PYTHON")"
    if [ -e "$MAKING" ] || [ ! -e "$STAMP" ] || { [ "$version" != 3.10 ] && [ "$version" != 3.11 ]; }; then
        make_environment
    fi
    touch "$MAKING"
    "$PYTHON" -m pip install -c "$ROOT/constraints.txt" -e "$ROOT[dev]"
    fingerprint >"$STAMP"
    rm "$MAKING"
}

is_ready || set_up 9>"$ROOT/.venv.lock"
