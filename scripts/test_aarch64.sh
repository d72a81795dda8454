#!/usr/bin/env bash
# Cross-compiles the kernel library for aarch64 and runs the kernel tests on it in an emulator: results are compared with
# NumPy's on this machine, call by call. Twice: as a CPU with every extension, and as one without any (where the library has
# to choose plain NEON and say that the others cannot run).
#
#   bash scripts/test_aarch64.sh [pytest arguments]    needs aarch64-linux-gnu-g++ and qemu-aarch64 (installed by apt when run as
#                                                       root); see kernels_driver.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/kernels_driver.sh"

target=aarch64-linux-gnu
need "$target-g++" "g++-$target" qemu-aarch64 qemu-user
kernel_tests_python
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$root"
say "cross-compiling for $target"
build_driver "$folder" "$target-g++" --target "$target" --
say "kernel tests under qemu-aarch64, a CPU with every extension"
export QWEN15_KERNELS_DRIVER="qemu-aarch64 -cpu max -L /usr/$target $folder/driver"
QWEN15_EXPECTED_KERNELS="neon_bf16 neon_dot neon portable" \
    python -m pytest tests/test_kernels.py tests/test_kernels_quantised.py tests/test_kernels_sets.py "$@"
say "kernel tests under qemu-aarch64, the oldest CPU"
export QWEN15_KERNELS_DRIVER="qemu-aarch64 -cpu cortex-a53 -L /usr/$target $folder/driver"
QWEN15_EXPECTED_KERNELS="neon portable" python -m pytest tests/test_kernels_sets.py \
    "tests/test_kernels.py::test_project_with_and_without_residual" \
    "tests/test_kernels_quantised.py::test_project_with_and_without_residual" "$@"
