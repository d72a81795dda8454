# The virtual environment that quickstart.sh and test.sh share, and how packages get in; sourced, not run.
#
#   QWEN15_PYTHON  the interpreter to make it with (3.9 to 3.12; default: the first that python3, python3.12, ... offers)
#   QWEN15_VENV    where it is (default: .venv in the checkout)
#   QWEN15_INSTALLER  uv: packages come by uv where it can be had, in a third of pip's time; it is told pip's index and folders of
#                  wheels, and where it fails pip goes on (default: pip)

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${QWEN15_VENV:-$root/.venv}

say() { printf '\033[1m== %s\033[0m\n' "$*" >&2; }

supported() { "$1" -c 'import sys; sys.exit(not (3, 9) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in ${QWEN15_PYTHON:-python3 python3.12 python3.11 python3.10 python3.9}; do
        if supported "$candidate"; then
            printf '%s' "$candidate"
            return
        fi
    done
    echo "error: no Python from 3.9 to 3.12 found (MindSpore has no package for 3.13 yet). Install one, or name it: QWEN15_PYTHON=/path/python3.12 bash $0" >&2
    exit 2
}

kernels=$root/research/qwen1_5/qwen15/kernels

# install EXTRA: the package with this extra, editable; again only when what it depends on has changed. A change of the kernels'
# sources compiles them alone (find complains where no library is, which counts as a change).
install() {
    if [ ! -x "$venv/bin/python" ]; then
        local python
        python=$(find_python)
        say "virtual environment $venv ($("$python" --version))"
        "$python" -m venv "$venv"
    fi
    local stamp=$venv/.qwen15-$1 wanted
    wanted=$(cd "$root" && cat setup.py pyproject.toml | cksum; printf '%s' "$root")
    export PATH=$venv/bin:$PATH
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        say "installing the package with its '$1' extra (MindSpore is 0.8 GB: this takes some minutes the first time)"
        pip_install --editable "$root[$1]"
        printf '%s' "$wanted" > "$stamp"
    fi
    if [ -n "$(find "$kernels" -maxdepth 1 \( -name '*.cpp' -o -name '*.h' -o -name build.py \) -newer "$kernels/_lib/libqwen15_kernels.so" \
            2>&1)" ] && command -v "${CXX:-g++}" > /dev/null; then
        say "compiling the kernels"
        (cd "$kernels/../.." && python -m qwen15.kernels.build > /dev/null)
    fi
}

# pip without its own notices; on a terminal it shows what it downloads.
pip_install() {
    local quiet=(--quiet)
    [ -t 2 ] && quiet=()
    ! uv_install "$@" || return 0
    python -m pip install "${quiet[@]}" --disable-pip-version-check --no-warn-script-location "$@" >&2
}

uv_install() {
    [ "${QWEN15_INSTALLER:-pip}" = uv ] || return 1
    python -c 'import uv' 2> /dev/null || python -m pip install --quiet --disable-pip-version-check uv >&2 || return 1
    local index
    index=$(pip_setting index-url)
    UV_DEFAULT_INDEX=${index:-https://pypi.org/simple} UV_FIND_LINKS=$(pip_setting find-links | tr ' ' ,) UV_HTTP_TIMEOUT=180 \
        python -m uv pip install --quiet --python "$(command -v python)" "$@" >&2
}

# pip_setting NAME: of the environment, else of pip's files; nothing where neither has it.
pip_setting() {
    local variable=PIP_${1^^}
    variable=${variable//-/_}
    printf '%s' "${!variable:-$(python -m pip config get "global.$1" 2> /dev/null || true)}"
}

# torch is the judge of many tests, and only a CPU build will do: the default one brings gigabytes of CUDA.
install_torch() {
    python -c 'import torch' 2>/dev/null && return
    say "torch (CPU build)"
    if python -m pip install --quiet --dry-run --no-deps --report - torch==2.13.0 2>/dev/null | grep -q '"version": "2.13.0+cpu"'; then
        pip_install torch==2.13.0+cpu
    elif ! python -m pip install --quiet --disable-pip-version-check --retries 0 --timeout 20 \
            --index-url https://download.pytorch.org/whl/cpu 'torch>=2.4,<2.14' 2>/dev/null; then
        echo "warning: no CPU build of torch could be installed; tests that compare with it are skipped by name" >&2
    fi
}
