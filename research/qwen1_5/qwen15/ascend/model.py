"""A small random Qwen1.5 and its plain NumPy forward pass: what the network on a card is compared with."""

from __future__ import annotations

import json
import os
from typing import Dict, Sequence, Union

import numpy as np

from .. import naming
from ..checkpoint import casting
from ..checkpoint.tensors import SHORT_NAMES
from ..config.hf_config import CONFIG_FILE, hf_config_of
from ..naming import Dims
from ..network.base import rope_tables
from . import operators as plain

RMS_NORM_EPS = 1e-6
THETA = 1e6
SEQ_LENGTH, BLOCK_SIZE, NUM_BLOCKS = 256, 16, 64


def dims(ranks: int = 1, tied: bool = False) -> Dims:
    """Sizes that `ranks` cards can share: grouped queries, heads of 128 as in the models from 7B on, two layers."""
    kv_heads = max(2, ranks)
    heads, head_dim = 2 * kv_heads, 128
    return Dims(hidden_size=heads * head_dim, intermediate_size=heads * 192, num_layers=2, num_heads=heads,
                num_kv_heads=kv_heads, head_dim=head_dim, vocab_size=1024, tie_word_embeddings=tied)


def random_weights(sizes: Dims) -> Dict[str, np.ndarray]:
    """Hugging Face name -> float32 array, the same at every call, so large that logits differ clearly; biases and norms
    not just 0 and 1."""
    random = np.random.default_rng(0)
    tensors = {}
    for weight in naming.weights(sizes):
        if weight.hf.endswith("bias"):
            array = random.normal(0.0, 0.5, weight.shape)
        elif len(weight.shape) == 1:
            array = random.uniform(0.5, 1.5, weight.shape)
        elif weight.hf == naming.EMBEDDING.hf:
            array = random.normal(0.0, 0.02, weight.shape)  # small, so that eps counts in the first norm
        else:
            array = random.normal(0.0, weight.shape[1] ** -0.5, weight.shape)
        tensors[weight.hf] = array.astype(np.float32)
    return tensors


def save(folder: str, sizes: Dims, tensors: Dict[str, np.ndarray], ranks: int = 1, vocab_emb_dp: bool = True,
         dtype: str = "bfloat16", device_target: str = "Ascend") -> str:
    """Write config.json, model.safetensors and predict.yaml to `folder`.

    Args:
        folder: where to, an existing one.
        sizes: of the model.
        tensors: Hugging Face name -> float32 array, see `random_weights`.
        ranks, vocab_emb_dp, dtype, device_target: what the YAML says.

    Returns:
        The YAML's path.
    """
    from safetensors.numpy import save_file

    save_file(tensors, os.path.join(folder, "model.safetensors"))
    with open(os.path.join(folder, CONFIG_FILE), "w", encoding="utf-8") as file:
        json.dump(hf_config_of(sizes, "float32", SEQ_LENGTH, 0, RMS_NORM_EPS, THETA), file)
    path = os.path.join(folder, "predict.yaml")
    with open(path, "w", encoding="utf-8") as file:
        file.write(f"""\
run_mode: 'predict'
load_checkpoint: '{folder}'
auto_trans_ckpt: True
use_parallel: {ranks > 1}
parallel_config:
  model_parallel: {ranks}
  vocab_emb_dp: {vocab_emb_dp}
parallel:
  parallel_mode: 1
  full_batch: True
context:
  mode: 0
  device_target: '{device_target}'
model:
  arch:
    type: LlamaForCausalLM
  model_config:
    type: LlamaConfig
    seq_length: {SEQ_LENGTH}
    block_size: {BLOCK_SIZE}
    num_blocks: {NUM_BLOCKS}
    use_past: True
    is_dynamic: True
    use_flash_attention: True
    param_init_type: '{dtype}'
    compute_dtype: '{dtype}'
    rotary_dtype: '{dtype}'
""")
    return path


def rounded(tensors: Dict[str, np.ndarray], dtype: str) -> Dict[str, np.ndarray]:
    """The weights after a round trip through `dtype`, in float32; norm weights stay as they are, as in MindFormers."""
    short = SHORT_NAMES[dtype]
    result = {}
    for name, array in tensors.items():
        keep = name.endswith("norm.weight")
        result[name] = array if keep else casting.to_float32(casting.from_float32(array, short), short)
    return result


def logits(sizes: Dims, tensors: Dict[str, np.ndarray], ids: Union[Sequence[int], np.ndarray]) -> np.ndarray:
    """Logits (T, V) float32 after every token of one sequence, without a cache."""
    cos, sin = rope_tables(len(ids), sizes.head_dim, THETA)
    lengths = np.asarray([len(ids)])
    mask = plain.causal_mask()
    x = tensors["model.embed_tokens.weight"][np.asarray(ids)]
    for layer in range(sizes.num_layers):
        def weight(name: str, prefix: str = f"model.layers.{layer}.") -> np.ndarray:
            return tensors[prefix + name]

        h = plain.rms_norm(x, weight("input_layernorm.weight"), RMS_NORM_EPS)
        q, k, v = (h @ weight(f"self_attn.{name}_proj.weight").T + weight(f"self_attn.{name}_proj.bias")
                   for name in "qkv")
        q, k = plain.apply_rotary_pos_emb(q[None], k[None], cos, sin, lengths)
        attended = plain.flash_attention(q[0], k[0], v, mask, lengths, lengths, sizes.num_heads, sizes.head_dim ** -0.5)
        x = x + attended @ weight("self_attn.o_proj.weight").T
        h = plain.rms_norm(x, weight("post_attention_layernorm.weight"), RMS_NORM_EPS)
        gated = plain.silu(h @ weight("mlp.gate_proj.weight").T) * (h @ weight("mlp.up_proj.weight").T)
        x = x + gated @ weight("mlp.down_proj.weight").T
    head = tensors["model.embed_tokens.weight" if sizes.tie_word_embeddings else "lm_head.weight"]
    return plain.rms_norm(x, tensors["model.norm.weight"], RMS_NORM_EPS) @ head.T
