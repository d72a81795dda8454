#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them all. Arguments go to pytest: bash scripts/test.sh -k tokenizer
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

install test
install_torch
export QWEN15_TEST_DATA=${QWEN15_TEST_DATA:-$root/models}
say "the real Qwen vocabulary and the small model, for the tests"
python "$root/scripts/get_vocabulary.py" "$QWEN15_TEST_DATA/qwen-vocabulary"
python "$root/scripts/get_small_model.py" "$QWEN15_TEST_DATA/SmolLM2-135M-Instruct" --cache "$QWEN15_TEST_DATA"
say "tests"
cd "$root"
exec python -m pytest tests -m "${QWEN15_TEST_MARK:-not slow}" "$@"
