#!/usr/bin/env bash
# Runs the Ascend tests (emulation, compilation, slicing, plug-in) on a supported pair of MindSpore and MindFormers other than 2.9 + 1.9,
# and with 2.10 the CPU's main job too.
#
#   bash scripts/test_second_stack.sh [--pair 2.10.0|2.7.2] [pytest arguments]
#                                     tests/test_ascend_*.py (and MAIN below), unless the arguments name other files
#   bash scripts/test_second_stack.sh [--pair ...] --install     installs only
#
#   QWEN15_SECOND_VENV  its virtual environment (default: .venv-2.10.0 or .venv-2.7.2 in the checkout)
#   QWEN15_PYTHON       the interpreter to make it with (Python 3.9 to 3.11; 3.10 and 3.11 for 2.10.0)
#   QWEN15_TEST_MARK    which tests by their marks (default: not slow); "version and not slow" in CI: what a version can change
#   QWEN15_TEST_JOBS    processes that run tests side by side (default: 2 when there are as many cores)
#
# Exit codes: pytest's; 1 the pair cannot be installed; 2 usage; 77 not run, the disk has no room for it (5.5 GiB the first time).
set -euo pipefail
second=${QWEN15_SECOND_VENV:-}
QWEN15_VENV=unused source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
mindspore=2.10.0
if [ "${1:-}" = --pair ]; then
    mindspore=${2:-}
    shift $(($# > 1 ? 2 : 1))
fi
case $mindspore in
    2.10.0) mindformers=2.0.0 ;;
    2.7.2) mindformers=1.8.0 ;;
    *)
        echo "usage: test_second_stack.sh [--pair 2.10.0|2.7.2] [--install] [pytest arguments]" >&2
        exit 2
        ;;
esac
MAIN=(tests/test_network.py tests/test_tensor_parallel.py tests/test_launch_predict.py)
venv=${second:-$root/.venv-$mindspore}
pair="mindspore $mindspore, mindformers $mindformers"
needed_mib=5632  # 4.1 GiB in the end; pip keeps the downloads, 1 GiB, beside while it unpacks them

have() {
    "$venv/bin/python" - <<'PYTHON' 2>/dev/null || true
from importlib.metadata import version
for module in ("pytest", "pytest_timeout", "xdist", "torch", "tiktoken", "jinja2", "transformers", "pyarrow"):
    __import__(module)
print(f"mindspore {version('mindspore')}, mindformers {version('mindformers')}", end="")
PYTHON
}

require_room() {
    local folder=$1 free_mib
    while [ ! -d "$folder" ]; do folder=$(dirname "$folder"); done
    free_mib=$(df -Pm "$folder" | awk 'NR == 2 { print $4 }')
    if [ "$free_mib" -lt "$needed_mib" ]; then
        echo "skipped: $pair needs $needed_mib MiB of disk, $folder has $free_mib MiB. Free some, or name another place:" \
            "QWEN15_SECOND_VENV=/path (and TMPDIR)" >&2
        exit 77
    fi
}

if [ "$(have)" != "$pair" ]; then
    require_room "$venv"
    require_room "${TMPDIR:-/tmp}"
    if [ ! -x "$venv/bin/pip" ]; then
        interpreter=$(find_python)
        say "virtual environment $venv ($("$interpreter" --version))"
        "$interpreter" -m venv "$venv"
    fi
    export PATH=$venv/bin:$PATH
    say "installing $pair (0.8 GB: this takes some minutes the first time)"
    tools=('safetensors>=0.5.3,<0.8' 'tiktoken>=0.7' 'jinja2>=3.1' 'huggingface_hub>=0.30' 'pytest>=7' pytest-timeout pytest-xdist 'hypothesis>=6')
    if [ "$mindspore" = 2.10.0 ]; then
        pip_install mindspore==2.10.0 -r "$root/scripts/mindformers_2_0.txt" "${tools[@]}"
        pip_install --no-deps mindformers==2.0.0
    else
        pip_install mindspore==2.7.2 mindformers==1.8.0 'numpy>=1.26,<2' "${tools[@]}"
    fi
    install_torch
    if [ "$(have)" != "$pair" ]; then
        echo "error: $venv has not become $pair with torch, transformers, pytest, xdist, tiktoken and jinja2. Remove it and try again" >&2
        exit 1
    fi
fi
export PATH=$venv/bin:$PATH QWEN15_TEST_DATA=${QWEN15_TEST_DATA:-$root/models}
[ "${1:-}" != --install ] || exit 0
python "$root/scripts/get_vocabulary.py" "$QWEN15_TEST_DATA/qwen-vocabulary"
say "$pair: tests"
cd "$root"
tests=(tests/test_ascend_*.py)
[ "$mindspore" = 2.7.2 ] || tests+=("${MAIN[@]}")
for argument in "$@"; do
    if [ -e "${argument%%::*}" ]; then tests=(); fi
done
jobs=${QWEN15_TEST_JOBS:-$(($(nproc) < 2 ? 1 : 2))}
exec python -m pytest "${tests[@]}" -m "${QWEN15_TEST_MARK:-not slow}" -n "$jobs" --dist loadfile "$@"
