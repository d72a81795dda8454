"""Write a YAML for MindFormers' newer network (`use_legacy: False`), which reads a Hugging Face folder as it is.

That network is built from config.json, and a Qwen config.json does not say that q, k and v have biases, because every
Qwen2 has them. Without `add_qkv_bias: True` MindFormers builds a network that has none and skips the checkpoint's
biases while loading, without an error: the model then writes nonsense.
"""

from __future__ import annotations

import json
import os


def render(checkpoint: str, name: str, dtype: str, seq_length: int, block_size: int, num_blocks: int,
           model_parallel: int, max_device_memory: str) -> str:
    """The YAML's text, for MindFormers' own `run_mindformer.py --config`.

    Args:
        checkpoint: the downloaded folder with config.json and .safetensors.
        name: the model's, for the first line.
        dtype: of weights and computation.
        seq_length: longest sequence.
        block_size, num_blocks: of the KV cache.
        model_parallel: cards.
        max_device_memory: '59GB'.
    """
    folder = os.path.abspath(checkpoint)
    return f"""\
# {name}, for MindFormers' newer network (use_legacy: False): written by qwen15 make-yaml --mcore.
# Run it with MindFormers' own run_mindformer.py; run_qwen1_5.py uses the older network. Sizes come from config.json.
seed: 0
run_mode: 'predict'
use_legacy: False
load_ckpt_format: 'safetensors'
load_checkpoint: ''
pretrained_model_dir: {json.dumps(folder, ensure_ascii=False)}     # config.json, weights and tokenizer
use_parallel: {model_parallel > 1}

trainer:
  type: CausalLanguageModelingTrainer
  model_name: 'qwen2'

parallel_config:
  data_parallel: 1
  model_parallel: {model_parallel}

model:
  model_config:
    # config.json does not say that q, k and v have biases. Without this line they are skipped without an error.
    add_qkv_bias: True
    params_dtype: '{dtype}'
    compute_dtype: '{dtype}'
    rotary_dtype: '{dtype}'
    layernorm_compute_dtype: 'float32'
    softmax_compute_dtype: 'float32'
    seq_length: {seq_length}
    block_size: {block_size}
    num_blocks: {num_blocks}

context:
  mode: 0
  max_device_memory: '{max_device_memory}'
  ascend_config:
    precision_mode: 'must_keep_origin_dtype'

parallel:
  parallel_mode: 'MANUAL_PARALLEL'
  enable_alltoall: False
"""
