"""Small quantised checkpoints in this project's own layout, and transformers' model with the numbers that they mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from conftest import random_model
from qwen15 import naming
from qwen15.checkpoint.quantised import MIDDLE, ORDER, SCALE, ZERO, dequantise, pack
from qwen15.config.hf_config import dims_from_hf_config

SIZES = {"vocab_size": 200, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}
"""Columns are multiples of 32 on two ranks too, where groups of 64 are cut in the middle (w2: 96 columns a rank)."""


class Kind(NamedTuple):
    """How a matrix is to be quantised: 4 or 8 bits, inputs of a group (0: whole rows), what it stores besides."""

    bits: int
    group: int
    zero: bool = False
    order: bool = False
    scale_dtype: str = "F16"


def quantise(matrix: np.ndarray, kind: Kind, random: np.random.Generator) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """suffix -> tensor ('' for the integers) of a matrix [O, I], rounded to nearest, and the matrix it means."""
    outputs, inputs = matrix.shape
    order = random.permutation(inputs).astype(np.int32) if kind.order else None
    columns = matrix if order is None else np.ascontiguousarray(matrix[:, order])
    groups = columns.reshape(outputs, -1, kind.group or inputs)
    levels = 2 ** kind.bits - 1
    low, high = groups.min(2), groups.max(2)
    scale = (high - low) / levels if kind.zero else 2 * np.maximum(np.abs(low), np.abs(high)) / levels
    scale = scale.astype({"F16": np.float16, "F32": np.float32}.get(kind.scale_dtype, np.float32))
    if kind.scale_dtype == "BF16":
        scale = (scale.view(np.uint32) >> 16).astype(np.uint16)
        wide = (scale.astype(np.uint32) << 16).view(np.float32)
    else:
        wide = scale.astype(np.float32)
    first = 0 if kind.bits == 4 else -128
    zero = np.full(low.shape, MIDDLE[kind.bits])
    if kind.zero:
        zero = np.clip(np.rint(first - low / wide), first, first + levels)
    q = np.clip(np.rint(groups / wide[:, :, None]) + zero[:, :, None], first, first + levels).reshape(outputs, inputs)
    integers = np.int8 if kind.bits == 8 else np.uint8
    made = {"": q.astype(np.int8) if kind.bits == 8 else pack(q.astype(np.uint8)), SCALE: scale}
    if kind.zero:
        made[ZERO] = zero.astype(integers)
    if order is not None:
        made[ORDER] = order
    return made, dequantise(made[""], scale, kind.scale_dtype, made.get(ZERO), order)


def quantised_model(folder: Path, linear: Kind, vocabulary: Kind | None = None, seed: int = 0, rest: str = "F32",
                    **sizes: Any):
    """Write a checkpoint whose layers' matrices are `linear`, table and head `vocabulary` (None: as the rest).

    Args:
        rest: dtype of what is not quantised; transformers' model has float32 numbers of that precision.

    Returns:
        transformers' model in float32 with the numbers that the checkpoint means.
    """
    import torch
    from qwen15.checkpoint.casting import from_float32
    from qwen15.checkpoint.format_safetensors import steps
    from qwen15.checkpoint.tensors import LONG_NAMES, NUMPY_DTYPES, TensorInfo

    model = random_model(folder, seed=seed, dtype=LONG_NAMES[rest], **{**SIZES, **sizes})
    random = np.random.default_rng(seed)
    tensors: dict[str, tuple[str, np.ndarray]] = {}
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for weight in naming.weights(dims_from_hf_config(folder).dims):
            values = parameters[weight.hf].numpy()
            kind = vocabulary if weight.cut == naming.VOCAB else linear
            if values.ndim == 1 or kind is None:
                tensors[weight.ms] = rest, from_float32(values, rest)
                continue
            made, meant = quantise(values, kind, random)
            parameters[weight.hf].copy_(torch.from_numpy(meant))
            for suffix, array in made.items():
                integers = {np.dtype(np.int8): "I8", np.dtype(np.uint8): "U8", np.dtype(np.int32): "I32"}
                tensors[weight.ms + suffix] = integers.get(array.dtype, kind.scale_dtype), array
    (folder / "model.safetensors").unlink()
    infos = [TensorInfo.of(name, dtype, array.shape) for name, (dtype, array) in tensors.items()]
    with open(folder / "model.safetensors", "wb") as file:
        for step in steps(infos, {}):
            file.write(step if isinstance(step, bytes) else
                       np.ascontiguousarray(tensors[step.name][1], NUMPY_DTYPES[tensors[step.name][0]]).tobytes())
    assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen2"
    return model
