#!/usr/bin/env bash
# Runs the kernel tests with the library built under AddressSanitizer with UndefinedBehaviorSanitizer, then under
# ThreadSanitizer. Every call goes to a small driver process built the same way, so Python itself is not instrumented.
#
#   bash scripts/test_sanitizers.sh [pytest arguments]     needs g++ (installed by apt when run as root); see kernels_driver.sh
#
# The library has its own thread pool and no OpenMP, so ThreadSanitizer needs no suppressions.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/kernels_driver.sh"

need g++ g++
kernel_tests_python
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export ASAN_OPTIONS=strict_string_checks=1 UBSAN_OPTIONS=print_stacktrace=1
export TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1
cd "$root"
for sanitizers in address,undefined thread; do
    say "building under -fsanitize=$sanitizers"
    mkdir "$folder/$sanitizers"
    build_driver "$folder/$sanitizers" g++ --here --sanitizer "$sanitizers" -- \
        -fno-omit-frame-pointer "-fsanitize=$sanitizers" -fno-sanitize-recover=all
    say "ranks in shared memory under -fsanitize=$sanitizers"
    g++ -std=c++17 -O1 -g -Wall -Wextra -pthread "-fsanitize=$sanitizers" -fno-sanitize-recover=all \
        -I research/qwen1_5/qwen15/kernels tests/ranks_driver.cpp -o "$folder/$sanitizers/ranks"
    "$folder/$sanitizers/ranks"
    say "kernel tests under -fsanitize=$sanitizers"
    QWEN15_KERNELS_DRIVER=$folder/$sanitizers/driver python -m pytest tests/test_kernels.py tests/test_kernels_quantised.py "$@"
done
say "no report from AddressSanitizer, UndefinedBehaviorSanitizer or ThreadSanitizer"
