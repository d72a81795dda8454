"""Write a random checkpoint of any Qwen1.5 size as a Hugging Face folder, for measuring and for tests."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
from typing import Callable, List, Optional

import numpy as np

from .. import family, naming
from ..checkpoint.atomic import AtomicFolder, check_space, check_target, write_small
from ..checkpoint.casting import from_float32
from ..checkpoint.file_writer import Blocks, FileWriter
from ..checkpoint.quantised import SCALE, ZERO, Scheme
from ..checkpoint.tensors import NUMPY_DTYPES, SHORT_NAMES, TensorInfo, element_count
from ..command_line import Parser, positive, whole
from ..config.hf_config import CONFIG_FILE, hf_config_of
from ..conversion.plan import OutFile, index_of, shape_files, shard_names
from ..errors import did_you_mean
from ..progress import byte_bar

DTYPES = ("bfloat16", "float16", "float32")
QUANTISED = {"int8": (8, 128, False), "int4": (4, 64, True)}
"""Bits, inputs of a group and whether there are zero points, as `qwen15 convert --quantize` makes them by default."""
_DEVIATION = {"I8": 74.0, "U8": 4.6}
"""Standard deviation of integers that are drawn evenly from -128..127 and 0..15."""
_STRIP_ELEMENTS = 4 * 2 ** 20
_SHARD_BYTES = 5 * 10 ** 8  # a shard is closed before it would grow beyond this


def size(text: str) -> str:
    """argparse type of a flag that takes a family member's name, in any case."""
    if text.upper() not in family.FAMILY:
        hint = did_you_mean(text.upper(), family.FAMILY) or f"Known are {', '.join(family.FAMILY)}."
        raise argparse.ArgumentTypeError(f"{text!r} is not a Qwen1.5 size. {hint}")
    return text.upper()


def dims_of(member: str, layers: Optional[int] = None) -> naming.Dims:
    """Sizes of a family member ('0.5b', '72B'), with another number of layers if one is given."""
    dims = family.FAMILY[member.upper()]
    return dims if layers is None else dataclasses.replace(dims, num_layers=layers)


def make_checkpoint(folder: str, dims: naming.Dims, dtype: str = "bfloat16", seed: int = 0,
                    overwrite: bool = False) -> int:
    """Write the folder: config.json and shards with their index. It appears under its name when it is complete.

    Args:
        folder: where to.
        dims: the model's sizes.
        dtype: of all tensors, one of `DTYPES`; or one of `QUANTISED`: integers drawn evenly for the layers' matrices,
            int8 in groups of 32 for table and head, bfloat16 for the rest.
        seed: start of the random numbers. Matrices and biases are normal with deviation 0.02, norms normal around 1.
        overwrite: replace a folder this project made.

    Returns:
        Bytes of all tensors.

    Raises:
        UserError: the target exists, or there is no room for it.
    """
    infos = _infos(dims, dtype)
    total = sum(info.nbytes for info in infos)
    check_target(folder, [], overwrite)
    check_space(folder, total)
    shards = shape_files(infos, _SHARD_BYTES)
    files = [OutFile(name, "safetensors", tuple(shard), {"format": "pt"})
             for name, shard in zip(shard_names(len(shards)), shards)]
    rng = np.random.default_rng(seed)
    made = AtomicFolder(folder)
    try:
        made.clear()
        with byte_bar("writing", total) as bar:
            for file in files:
                _write_shard(os.path.join(made.path, file.name), file, rng, bar.update)
        config = hf_config_of(dims, "bfloat16" if dtype in QUANTISED else dtype, max_positions=32768,
                              end=min(151643, dims.vocab_size - 1))
        for name, content in {**index_of(files), CONFIG_FILE: json.dumps(config, indent=2).encode() + b"\n"}.items():
            write_small(os.path.join(made.path, name), content)
        made.publish()
    finally:
        made.close()
    return total


def _infos(dims: naming.Dims, dtype: str) -> List[TensorInfo]:
    """Every tensor, in the network's order."""
    if dtype not in QUANTISED:
        return [TensorInfo.of(weight.hf, SHORT_NAMES[dtype], weight.shape) for weight in naming.weights(dims)]
    infos = []
    for weight in naming.weights(dims):
        if len(weight.shape) == 1:
            infos.append(TensorInfo.of(weight.hf, "BF16", weight.shape))
            continue
        bits, size, zero = (8, 32, False) if weight.cut == naming.VOCAB else QUANTISED[dtype]
        size = math.gcd(size, weight.shape[1])
        infos += Scheme(bits, weight.shape[1] // size, size, "F16", zero).infos(weight.hf, weight.shape)
    return infos


def _strip(info: TensorInfo, count: int, deviation: float, rng: np.random.Generator) -> np.ndarray:
    """The next `count` numbers of a tensor; scales bring integers of this `deviation` to that of weights, 0.02."""
    if info.name.endswith(SCALE):
        return np.full(count, 0.02 / deviation, np.float16)
    if info.name.endswith(ZERO):
        return rng.integers(7, 9, count).astype(NUMPY_DTYPES[info.dtype])
    if info.dtype in ("I8", "U8"):
        return np.frombuffer(rng.bytes(count), NUMPY_DTYPES[info.dtype])
    values = rng.standard_normal(count, np.float32) * np.float32(0.02)
    if "norm" in info.name:
        values += np.float32(1)
    return np.ascontiguousarray(from_float32(values, info.dtype)).astype(NUMPY_DTYPES[info.dtype], copy=False)


def _write_shard(path: str, file: OutFile, rng: np.random.Generator,
                 advance: Callable[[int], object]) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        with Blocks() as blocks:
            writer = FileWriter(fd, path, file.steps(), blocks)
            deviation = 1.0
            for info in file.infos:
                count = element_count(info.shape)
                deviation = _DEVIATION.get(info.dtype, deviation)
                for start in range(0, count, _STRIP_ELEMENTS):
                    strip = _strip(info, min(_STRIP_ELEMENTS, count - start), deviation, rng)
                    writer.feed(info.name, strip.view(np.uint8).data)
                    advance(strip.nbytes)
            writer.finish()
    finally:
        os.close(fd)


def parser() -> Parser:
    """The flags."""
    made = Parser("qwen15 bench make-checkpoint", __doc__ or "",
                  ["qwen15 bench make-checkpoint OUT --size 0.5b --layers 2"], usage="OUT [flags]")
    made.add_argument("folder", metavar="OUT", help="folder to make")
    made.add_argument("--size", type=size, default="0.5b", help=f"one of {', '.join(family.FAMILY)}")
    made.add_argument("--layers", type=positive, metavar="N", help="another number of layers than the published one")
    made.add_argument("--dtype", choices=(*DTYPES, *QUANTISED), default="bfloat16",
                      help="of all tensors; int8 and int4: of the matrices")
    made.add_argument("--seed", type=whole, default=0, help="start of the random numbers")
    made.add_argument("--overwrite", action="store_true", help="replace a folder this project made")
    return made


def run(args: argparse.Namespace) -> None:
    """Write the folder the arguments ask for.

    Raises:
        UserError: see `make_checkpoint`.
    """
    total = make_checkpoint(args.folder, dims_of(args.size, args.layers), args.dtype, args.seed,
                            overwrite=args.overwrite)
    print(f"{args.folder}: {total / 1e9:.2f} GB")
