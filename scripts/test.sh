#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them all. Arguments go to pytest: bash scripts/test.sh -k tokenizer
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# torch is the judge of many tests, and only a CPU build will do: the default one brings gigabytes of CUDA.
install_torch() {
    python -c 'import torch' 2>/dev/null && return
    say "torch (CPU build)"
    if python -m pip install --quiet --dry-run --no-deps --report - torch==2.13.0 2>/dev/null | grep -q '"version": "2.13.0+cpu"'; then
        python -m pip install --quiet --disable-pip-version-check torch==2.13.0
    elif ! python -m pip install --quiet --disable-pip-version-check --retries 0 --timeout 20 \
            --index-url https://download.pytorch.org/whl/cpu 'torch>=2.4,<2.14' 2>/dev/null; then
        echo "warning: no CPU build of torch could be installed; tests that compare with it are skipped by name" >&2
    fi
}

install test
install_torch
export QWEN15_TEST_DATA=${QWEN15_TEST_DATA:-$root/models}
say "the real Qwen vocabulary and the small model, for the tests"
python "$root/scripts/get_vocabulary.py" "$QWEN15_TEST_DATA/qwen-vocabulary"
python "$root/scripts/get_small_model.py" "$QWEN15_TEST_DATA/SmolLM2-135M-Instruct" --cache "$QWEN15_TEST_DATA"
say "tests"
cd "$root"
exec python -m pytest tests -m "${QWEN15_TEST_MARK:-not slow}" "$@"
