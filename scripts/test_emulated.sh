#!/usr/bin/env bash
# Runs the kernel tests on the instruction sets of x86 that this machine lacks: the same sources, compiled against headers
# that compute every intrinsic beyond AVX2 on plain vectors (tests/emulation).
#
#   bash scripts/test_emulated.sh [pytest arguments]    needs g++ and SIMDe's headers (installed by apt when run as root) and
#                                                        a CPU with AVX2; see kernels_driver.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/kernels_driver.sh"

need g++ g++
need_header simde/x86/avx512.h libsimde-dev
grep -qw avx2 /proc/cpuinfo || { echo "skipped: this CPU has no AVX2" >&2; exit 77; }
kernel_tests_python
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$root"
say "compiling with emulated instructions"
build_driver "$folder" g++ --emulation "$root/tests/emulation" --
say "kernel tests on emulated instructions"
export QWEN15_KERNELS_DRIVER=$folder/driver QWEN15_EXPECTED_KERNELS="amx avx512_bf16 avx512 portable"
python -m pytest tests/test_kernels.py tests/test_kernels_quantised.py tests/test_kernels_sets.py \
    -k '(avx512 or amx or every_set) and not lens3' "$@"  # lens3 has 1100 tokens: emulated that takes minutes
