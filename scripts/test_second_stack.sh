#!/usr/bin/env bash
# Runs the Ascend tests, and any others named, on the second supported pair: MindSpore 2.7.2 with MindFormers 1.8.0.
#
#   bash scripts/test_second_stack.sh [pytest arguments]     default: tests/test_ascend_*.py -m "not slow"
#
#   QWEN15_SECOND_VENV  its virtual environment (default: .venv-second in the checkout; about 5 GB)
#   QWEN15_PYTHON       the interpreter to make it with (Python 3.9 to 3.11)
set -euo pipefail
second=${QWEN15_SECOND_VENV:-}
QWEN15_VENV=unused source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
venv=${second:-$root/.venv-second}

if [ ! -x "$venv/bin/python" ]; then
    interpreter=$(find_python)
    say "virtual environment $venv ($("$interpreter" --version))"
    "$interpreter" -m venv "$venv"
fi
export PATH=$venv/bin:$PATH
wanted="mindspore 2.7.2, mindformers 1.8.0"
have() {
    python - <<'PYTHON' 2>/dev/null || true
from importlib.metadata import version
print(f"mindspore {version('mindspore')}, mindformers {version('mindformers')}", end="")
for module in ("pytest", "pytest_timeout", "hypothesis", "torch", "tiktoken", "jinja2"):
    __import__(module)
PYTHON
}
if [ "$(have)" != "$wanted" ]; then
    say "installing $wanted (0.8 GB: this takes some minutes the first time)"
    python -m pip install --quiet --disable-pip-version-check mindspore==2.7.2 mindformers==1.8.0 'numpy>=1.26,<2' \
        'safetensors>=0.5.3,<0.8' 'tiktoken>=0.7' 'jinja2>=3.1' 'hypothesis>=6' 'pytest>=7' pytest-timeout
    install_torch
fi
export QWEN15_TEST_DATA=${QWEN15_TEST_DATA:-$root/models}
python "$root/scripts/get_vocabulary.py" "$QWEN15_TEST_DATA/qwen-vocabulary"
say "$(have): tests"
cd "$root"
if [ $# -eq 0 ]; then
    set -- tests/test_ascend_*.py -m "not slow"
fi
exec python -m pytest "$@"
