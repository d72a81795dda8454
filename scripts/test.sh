#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them all. Arguments go to pytest: bash scripts/test.sh -k tokenizer
#
#   bash scripts/test.sh --install    installs only
#
#   QWEN15_TEST_JOBS  processes that run tests side by side (default: 2 when there are as many cores); what measures time
#                     runs by itself afterwards
#   QWEN15_TEST_MARK  which tests (default: not slow)
#   QWEN15_TEST_PART  beside: only what runs side by side; alone: only what runs by itself (default: both)
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

# part PART [PYTEST ARGUMENT]...: see tests/conftest.py; pytest's code 5 is "no test was selected", which one of two parts may say.
part() {
    local code=0
    QWEN15_TEST_PART=$1 python -m pytest tests -m "$mark" "${@:2}" || code=$?
    case $code in
        0) ran=1 ;;
        5) ;;
        *) failed=$code ran=1 ;;
    esac
}

wanted=${QWEN15_TEST_PART:-} side_by_side=()
[ "$jobs" -lt 2 ] || side_by_side=(-n "$jobs" --dist loadfile)
if [ "$wanted" != alone ]; then
    say "tests, $jobs at a time"
    part beside "${side_by_side[@]}" "$@"
fi
if [ "$wanted" != beside ]; then
    say "tests that want the machine for themselves"
    part alone "$@"
fi
[ "$ran" = 1 ] || exit 5
exit "$failed"
