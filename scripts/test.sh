#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them all. Arguments go to pytest: bash scripts/test.sh -k tokenizer
#
#   bash scripts/test.sh --install    installs only
#
#   QWEN15_TEST_JOBS  processes that run tests side by side (default: 2 when there are as many cores); what measures time
#                     runs by itself afterwards
#   QWEN15_TEST_MARK  which tests (default: not slow)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

install test
install_torch
export QWEN15_TEST_DATA=${QWEN15_TEST_DATA:-$root/models}
say "the real Qwen vocabulary and the small model, for the tests"
python "$root/scripts/get_vocabulary.py" "$QWEN15_TEST_DATA/qwen-vocabulary"
python "$root/scripts/get_small_model.py" "$QWEN15_TEST_DATA/SmolLM2-135M-Instruct" --cache "$QWEN15_TEST_DATA"
[ "${1:-}" != --install ] || exit 0

mark=${QWEN15_TEST_MARK:-not slow}
jobs=${QWEN15_TEST_JOBS:-$(($(nproc) < 2 ? 1 : 2))}
cd "$root"
failed=0 ran=0

# part MARK [PYTEST ARGUMENT]...: pytest's code 5 is "no test was selected", which one of two parts may say.
part() {
    local selected=$1 code=0
    shift
    python -m pytest tests -m "$selected" "$@" || code=$?
    case $code in
        0) ran=1 ;;
        5) ;;
        *) failed=$code ran=1 ;;
    esac
}

if [ "$jobs" -gt 1 ]; then
    say "tests, $jobs at a time"
    part "($mark) and not alone" -n "$jobs" --dist loadfile "$@"
    say "tests that want the machine for themselves"
    part "($mark) and alone" "$@"
else
    say "tests"
    part "$mark" "$@"
fi
[ "$ran" = 1 ] || exit 5
exit "$failed"
