#!/usr/bin/env bash
# From a fresh clone to generated text: installs into .venv, makes a small real model, converts it, predicts with it.
# A second run reuses what is there. Usage: bash scripts/quickstart.sh [PROMPT]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

prompt=${1:-"Gravity is"}
models=${QWEN15_MODELS:-$root/models}
hf=$models/SmolLM2-135M-Instruct
ms=$models/SmolLM2-135M-Instruct-ms

run() {
    printf '+' >&2
    printf ' %q' "$@" >&2
    printf '\n' >&2
    "$@"
}

install quickstart
say "a small real model: SmolLM2-135M-Instruct as a Hugging Face folder"
run python "$root/scripts/get_small_model.py" "$hf" --cache "$models"
cd "$root/research/qwen1_5"
if [ ! -e "$ms/model.safetensors" ]; then
    say "Hugging Face -> MindSpore"
    run python convert_weight.py --torch_ckpt_dir "$hf" --mindspore_ckpt_path "$ms/model.safetensors"
fi
say "predict"
run python run_qwen1_5.py --config predict_qwen1_5_smollm2_135m.yaml --load_checkpoint "$ms" --run_mode predict \
    --max_new_tokens 64 --predict_data "$prompt"
