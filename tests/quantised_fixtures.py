"""Quantised checkpoints in the layouts of GPTQ, AWQ and compressed-tensors, written from their definitions.

The packing here is one shift and one sum a word, on purpose: slower than the project's and with nothing in common.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np
from checkpoint_fixtures import model_contents, write_model
from qwen15 import naming
from qwen15.naming import Dims

DIMS = Dims(
    hidden_size=128,
    intermediate_size=192,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    vocab_size=96,
    tie_word_embeddings=False,
)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The columns of eight that AWQ's nibbles hold, lowest first."""
KINDS = {"F16": np.float16, "F32": np.float32}


@dataclass(frozen=True)
class Form:
    """One way to quantise."""

    layout: str = "gptq"
    bits: int = 4
    group: int = 64
    sym: bool = True
    version: int = 1
    desc_act: bool = False
    scale: str = "F16"
    biases: bool = False
    g_idx: bool = True
    by_gptqmodel: bool = False
    settings_file: str = "config.json"

    def settings(self) -> dict:
        """What goes into config.json or its like."""
        if self.layout == "compressed-tensors":
            weights = {
                "num_bits": self.bits,
                "type": "int",
                "symmetric": self.sym,
                "strategy": "group" if self.group > 0 else "channel",
                "group_size": self.group if self.group > 0 else None,
                "actorder": "group" if self.desc_act else None,
            }
            return {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"group_0": {"weights": weights, "targets": ["Linear"], "input_activations": None}},
            }
        if self.layout == "awq":
            return {
                "quant_method": "awq",
                "bits": 4,
                "group_size": self.group,
                "version": "GEMM",
                "zero_point": not self.sym,
            }
        made = {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group,
            "sym": self.sym,
            "desc_act": self.desc_act,
        }
        if self.by_gptqmodel:
            made["meta"] = {"quantizer": ["gptqmodel:7.7.0"]}
        return {**made, "checkpoint_format": "gptq_v2"} if self.version == 2 else made


def words(values: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """int32 words of so many values along an axis, the first in the lowest bits."""
    values = np.moveaxis(values.astype(np.uint64), axis, -1)
    per_word = 32 // bits
    values = np.concatenate([values, np.zeros((*values.shape[:-1], -values.shape[-1] % per_word), np.uint64)], axis=-1)
    grouped = values.reshape(*values.shape[:-1], -1, per_word)
    packed = sum(grouped[..., i] << np.uint64(bits * i) for i in range(per_word)).astype(np.uint32)
    return np.ascontiguousarray(np.moveaxis(packed, -1, axis)).view(np.int32)


def less_ones(packed: np.ndarray, bits: int) -> np.ndarray:
    """GPTQModel's way from zero points to zero points less one: each word as one number, less 0x11111111 or 0x01010101,
    so that a 0 borrows from its neighbour."""
    ones = sum(1 << place for place in range(0, 32, bits))
    return ((packed.view(np.uint32).astype(np.int64) - ones) % 2**32).astype(np.uint32).view(np.int32)


def awq_words(values: np.ndarray) -> np.ndarray:
    """As `words` along the second axis, in AWQ's order."""
    return words(values.reshape(len(values), -1, 8)[:, :, AWQ_ORDER].reshape(values.shape), 4, 1)


def entry(array: np.ndarray) -> tuple:
    """A tensor as `checkpoint_fixtures.Contents` has it."""
    kind = {
        np.dtype(np.int8): "I8",
        np.dtype(np.int32): "I32",
        np.dtype(np.int64): "I64",
        np.dtype(np.float16): "F16",
        np.dtype(np.float32): "F32",
    }
    return kind[array.dtype], array.shape, np.ascontiguousarray(array).tobytes()


def quantised_linear(
    base: str, outputs: int, inputs: int, form: Form, rng: np.random.Generator
) -> tuple[dict, np.ndarray]:
    """One linear of random integers, scales and zero points: its tensors, and float32 [O, I] that they mean."""
    group = form.group if form.group > 0 else inputs
    groups = inputs // group
    top = 2**form.bits
    q = rng.integers(0, top, (inputs, outputs))
    z = np.full((groups, outputs), top // 2) if form.sym else rng.integers(0, top, (groups, outputs))
    s = (rng.standard_normal((groups, outputs)) * 0.01).astype(KINDS[form.scale])
    index = np.arange(inputs) // group
    if form.desc_act:
        index = rng.permutation(index)
    meaning = (s.astype(np.float32)[index] * (q - z[index]).astype(np.float32)).T
    if form.layout == "gptq":
        stored_z = (z - 1) % top if form.version == 1 else z
        qzeros = words(stored_z, form.bits, 1)
        if form.by_gptqmodel and form.version == 1:
            qzeros = less_ones(words(z, form.bits, 1), form.bits)
        parts = {"qweight": words(q, form.bits, 0), "qzeros": qzeros, "scales": s}
        if form.g_idx or form.desc_act:
            parts["g_idx"] = index.astype(np.int32)
    elif form.layout == "awq":
        parts = {"qweight": awq_words(q), "qzeros": awq_words(z), "scales": s}
    else:
        parts = {
            "weight_packed": words(q.T, form.bits, 1),
            "weight_scale": s.T,
            "weight_shape": np.array([outputs, inputs]),
        }
        if not form.sym:
            parts["weight_zero_point"] = words(z.T, form.bits, 0)
        if form.desc_act:
            parts["weight_g_idx"] = index.astype(np.int32)
    return {f"{base}.{suffix}": entry(array) for suffix, array in parts.items()}, np.ascontiguousarray(meaning)


def write_quantised(
    folder: Path,
    form: Form,
    dims: Dims = DIMS,
    seed: int = 0,
    shards: int = 1,
    change: Optional[object] = None,
    **config: object,
) -> tuple[dict, dict]:
    """A quantised model folder.

    Args:
        change: called with the contents before they are written.
        config: further keys of config.json.

    Returns:
        The stored contents, and Hugging Face name -> float32 array of every quantised matrix.
    """
    rng = np.random.default_rng(seed)
    contents = model_contents(dims, "F16", seed)
    meanings = {}
    for weight in naming.weights(dims):
        if len(weight.shape) == 2 and weight.layer is not None:
            base = weight.hf[: -len(".weight")]
            del contents[weight.hf]
            made, meanings[weight.hf] = quantised_linear(base, *weight.shape, form, rng)
            contents.update(made)
            if form.biases and f"{base}.bias" not in contents:
                contents[f"{base}.bias"] = entry(np.zeros(weight.shape[0], np.float16))
    if change is not None:
        contents = change(contents)
    settings = form.settings()
    if form.settings_file == "config.json":
        config = {"quantization_config": settings, **config}
    write_model(folder, dims, contents, shards, **{"torch_dtype": "float16", **config})
    if form.settings_file != "config.json":
        import json

        (folder / form.settings_file).write_text(json.dumps({k: v for k, v in settings.items() if k != "quant_method"}))
    return contents, meanings


def unpack_int4(packed: np.ndarray) -> np.ndarray:
    """(I, O / 2) int8 to (I, O) int8, -8..7: column 2 c in the low nibble of byte c, column 2 c + 1 in the high."""
    low, high = (packed << 4).astype(np.int8) >> 4, packed >> 4
    return np.stack((low, high), axis=-1).reshape(len(packed), -1)
