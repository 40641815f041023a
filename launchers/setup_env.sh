#!/bin/sh
# Build the virtual environment, or resolve constraints.txt anew. Called by the Makefile from the repository root:
#
#     setup_env.sh install VENV     check prerequisites, create VENV, install torch and then this package
#     setup_env.sh torch VENV       the same as far as torch, for a wheel to follow
#     setup_env.sh constraints      install the newest allowed versions into a passing environment and freeze them
#
# PYTHON names the interpreter; TORCH is handed to pip as it is, and is the CPU build when unset.
set -eu

TORCH_VERSION=2.13.0
PYTORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu

main() {
    case "${1:-}" in
        install) install "$2" ;;
        torch) begin "$2" ;;
        constraints) resolve_constraints ;;
        *) fail "setup_env.sh needs 'install VENV', 'torch VENV' or 'constraints'; the Makefile calls it." ;;
    esac
}

install() {
    venv=$1
    begin "$venv"
    say "Installing scbert-scale and its other dependencies."
    "$venv/bin/python" -m pip install -qq --constraint constraints.txt --editable ".[dev]"
    build_kernel "$venv"
}

begin() {
    create_venv "$1"
    install_torch "$1" --constraint constraints.txt
}

# DeepSpeed compiles its CPU communication kernel at first use; doing it here, one file at a time (1.6 GB each) unless
# MAX_JOBS says more, keeps the first training short and small.
build_kernel() {
    say "Compiling DeepSpeed's CPU communication kernel."
    # A compilation that was killed leaves its lock, for which the next would wait.
    find "${TORCH_EXTENSIONS_DIR:-$HOME/.cache/torch_extensions}" -path '*deepspeed_shm_comm/lock' -mmin +15 \
        -delete 2>/dev/null || true
    PATH=$(cd "$1/bin" && pwd):$PATH DS_ACCELERATOR=cpu MAX_JOBS="${MAX_JOBS:-1}" timeout 600 "$1/bin/python" -W ignore -c \
        'from deepspeed.comm.torch import build_shm_op; build_shm_op()' >/dev/null 2>&1 ||
        say "It was not compiled; the first training will try again and say why."
}

resolve_constraints() {
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    create_venv "$scratch/venv"
    TORCH='' install_torch "$scratch/venv"
    echo "torch==$TORCH_VERSION" > "$scratch/torch.txt"
    say "Resolving the newest allowed versions of all dependencies."
    "$scratch/venv/bin/python" -m pip install -qq --constraint "$scratch/torch.txt" --editable ".[dev]"
    {
        echo "# Every package of a fresh installation of .[dev], with the version it is tested with."
        echo "# Written by 'make constraints'; setup.cfg holds the ranges. Any build of torch (CPU, CUDA) fits its pin."
        # setuptools is a dependency of ours that freeze takes for a tool; pip, wheel and we ourselves are no pins.
        "$scratch/venv/bin/python" -m pip freeze --all --exclude pip --exclude wheel --exclude-editable |
            sed 's/^\(torch==[0-9.]*\)+.*/\1/'
    } > "$scratch/constraints.txt"
    cp "$scratch/constraints.txt" constraints.txt
    say "Wrote constraints.txt."
}

create_venv() {
    python=$(find_python)
    check_prerequisites "$python"
    # Also repairs an environment whose creation was interrupted.
    if ! "$1/bin/python" -m pip --version >/dev/null 2>&1; then
        say "Creating $1 with $("$python" --version)."
        say "The installation takes some minutes and about 2.5 GB of disk (several GB more with a CUDA build of torch)."
        "$python" -m venv --clear "$1"
    fi
}

install_torch() {
    python=$1/bin/python
    shift
    if [ -n "${TORCH:-}" ]; then
        say "Installing $TORCH."
        # Without this, pip would keep a CPU build when asked for a CUDA build of the same version.
        "$python" -m pip uninstall -qq --yes torch >/dev/null 2>&1 || true
        # shellcheck disable=SC2086  # TORCH may hold several words
        "$python" -m pip install -qq "$@" $TORCH ||
            fail "TORCH=\"$TORCH\" was not installed; give a build of torch $TORCH_VERSION, as constraints.txt asks."
        return
    fi
    if "$python" -c "import sys, torch; sys.exit(not torch.__version__.startswith('$TORCH_VERSION'))" 2>/dev/null; then
        return # a build chosen by TORCH earlier stays
    fi
    cpu_build=torch==$TORCH_VERSION+cpu
    say "Installing the CPU build of torch; for CUDA, set TORCH=\"torch==$TORCH_VERSION\"."
    "$python" -m pip install -qq "$@" "$cpu_build" 2>/dev/null ||
        "$python" -m pip install -qq --retries 2 "$@" --extra-index-url "$PYTORCH_CPU_INDEX" "$cpu_build" ||
        install_default_torch "$python" "$@"
}

install_default_torch() {
    python=$1
    shift
    say "No CPU build of torch was found, neither in pip's package index nor at $PYTORCH_CPU_INDEX."
    say "Installing the index's own build, which may be several GB larger."
    "$python" -m pip install -qq "$@" "torch==$TORCH_VERSION" ||
        fail "torch $TORCH_VERSION could not be installed; connect to a package index, or name a build with TORCH=."
}

find_python() {
    for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    [ -z "${PYTHON:-}" ] || fail "PYTHON=$PYTHON is not a Python 3.11 or 3.12; give the path of one."
    fail "Python 3.11 or 3.12 is missing: sudo apt-get install python3.11 python3.11-venv python3.11-dev" \
        "(Ubuntu 24.04: python3.12 and so on), or name one with PYTHON=/path/to/python3.11."
}

# Print one sentence for each missing prerequisite, then stop.
check_prerequisites() {
    package=$("$1" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
    missing=''
    "$1" -c 'import ensurepip, venv' 2>/dev/null ||
        missing="$missing
$1 cannot create virtual environments: sudo apt-get install $package-venv."
    # DeepSpeed compiles its CPU kernels on first use, with the compiler that torch picks: CXX, else c++.
    ${CXX:-c++} --version >/dev/null 2>&1 ||
        missing="$missing
A C++ compiler is missing, DeepSpeed needs it: sudo apt-get install g++."
    "$1" -c 'import os, sysconfig as s; os.stat(os.path.join(s.get_path("include"), "Python.h"))' 2>/dev/null ||
        missing="$missing
The header Python.h is missing, DeepSpeed needs it: sudo apt-get install $package-dev."
    [ -z "$missing" ] || fail "${missing#?}"
}

say() { echo "[setup] $*"; }

fail() {
    echo "$*" >&2
    exit 1
}

main "$@"
