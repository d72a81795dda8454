#!/usr/bin/env bash
# From a fresh clone to an answer: installs into .venv, makes a small real chat model, converts it, asks it a question.
# A second run reuses what is there. Usage: bash scripts/quickstart.sh [QUESTION]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

question=${1:-"What is gravity?"}
models=${QWEN15_MODELS:-$root/models}
hf=$models/SmolLM2-135M-Instruct
ms=$models/SmolLM2-135M-Instruct-ms
needed_mib=4096  # 2.8 GB of packages, 0.7 GB of model, and what pip downloads on the way

run() {
    printf '+' >&2
    printf ' %q' "$@" >&2
    printf '\n' >&2
    "$@"
}

free_mib() {
    local folder=$1
    while [ ! -d "$folder" ]; do folder=$(dirname "$folder"); done
    df -Pm "$folder" | awk 'NR == 2 { print $4 }'
}

if [ ! -x "$venv/bin/qwen15" ]; then
    say "this takes 3.5 GB of disk in $root and 5 to 10 minutes, most of both for MindSpore; a second run takes seconds"
    if [ "$(free_mib "$venv")" -lt "$needed_mib" ]; then
        echo "error: $venv: $(free_mib "$venv") MiB of disk are free, $needed_mib MiB are needed. Free some, or name another place:" \
            "QWEN15_VENV=/path QWEN15_MODELS=/path bash $0" >&2
        exit 2
    fi
fi
install quickstart
say "a small real chat model: SmolLM2-135M-Instruct as a Hugging Face folder"
run python "$root/scripts/get_small_model.py" "$hf" --cache "$models"
cd "$root/research/qwen1_5"
if [ ! -e "$ms/model.safetensors" ]; then
    say "Hugging Face -> MindSpore"
    run python convert_weight.py --torch_ckpt_dir "$hf" --mindspore_ckpt_path "$ms/model.safetensors" --verify
fi
say "question"
run python run_qwen1_5.py --config predict_qwen1_5_smollm2_135m.yaml --load_checkpoint "$ms" --run_mode predict --chat \
    --max_new_tokens 128 --predict_data "$question"
say "next: a conversation, with this model or one of Qwen's own"
cat >&2 <<EOF
source $venv/bin/activate
qwen15 predict --load_checkpoint $hf --chat
qwen15 predict --load_checkpoint Qwen/Qwen1.5-0.5B-Chat --chat
EOF
