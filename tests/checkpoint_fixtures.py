"""Checkpoints for the converters' tests: random bits in every weight, written with the safetensors library itself."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Dict, Optional, Sequence, Tuple

import numpy as np
import safetensors
from qwen15 import naming
from qwen15.checkpoint.format_safetensors import steps
from qwen15.checkpoint.reader import open_checkpoint
from qwen15.checkpoint.tensors import TensorInfo, element_count, itemsize, total_bytes
from qwen15.naming import Dims

LIBRARY_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "I32": "int32", "I64": "int64", "I8": "int8",
                  "U8": "uint8", "F8_E4M3": "float8_e4m3fn"}
SIDECARS = {"generation_config.json": '{"max_length": 7}\n', "vocab.json": '{"a": 0}\n',
            "merges.txt": "#version: 0.2\n",
            "tokenizer_config.json": '{"tokenizer_class": "Qwen2Tokenizer"}\n'}

Contents = Dict[str, Tuple[str, Tuple[int, ...], bytes]]
"""Tensor name -> (dtype, shape, bytes)."""


def dims(hidden: int = 32, intermediate: int = 48, layers: int = 2, heads: int = 4, kv_heads: int = 2,
         head_dim: int = 8,
         vocab: int = 60, tied: bool = False) -> Dims:
    """Sizes of a toy model."""
    return Dims(hidden, intermediate, layers, heads, kv_heads, head_dim, vocab, tied)


def random_bits(dtype: str, shape: Sequence[int], rng: np.random.Generator) -> bytes:
    """Contents of a tensor: any finite bits, negative zero and subnormal numbers among them."""
    count = element_count(tuple(shape))
    if dtype == "F32":
        bits = rng.integers(0, 2 ** 32, count, dtype=np.uint32)
        bits[bits & 0x7F800000 == 0x7F800000] &= 0xBFFFFFFF
    else:
        mask = 0x7C00 if dtype == "F16" else 0x7F80
        bits = rng.integers(0, 2 ** 16, count, dtype=np.uint16)
        bits[bits & mask == mask] &= 0xBFFF
    return bits.tobytes()


def model_contents(sizes: Dims, dtype: str = "BF16", seed: int = 0,
                   dtypes: Optional[Dict[str, str]] = None) -> Contents:
    """Every weight of a model under its Hugging Face name."""
    rng = np.random.default_rng(seed)
    return {w.hf: ((dtypes or {}).get(w.hf, dtype), w.shape, random_bits((dtypes or {}).get(w.hf, dtype), w.shape, rng))
            for w in naming.weights(sizes)}


def write_safetensors(path: Path, contents: Contents) -> None:
    """One file, by the safetensors library."""
    entries = {name: {"dtype": LIBRARY_DTYPES[dtype], "shape": list(shape), "data": data}
               for name, (dtype, shape, data) in contents.items()}
    path.write_bytes(safetensors.serialize(entries, {"format": "pt"}))


def write_config(folder: Path, sizes: Dims, **more: object) -> None:
    """The model's config.json."""
    config = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": sizes.hidden_size,
              "intermediate_size": sizes.intermediate_size, "num_hidden_layers": sizes.num_layers,
              "num_attention_heads": sizes.num_heads, "num_key_value_heads": sizes.num_kv_heads,
              "head_dim": sizes.head_dim,
              "vocab_size": sizes.vocab_size, "tie_word_embeddings": sizes.tie_word_embeddings,
              "torch_dtype": "bfloat16",
              "rms_norm_eps": 1e-6, "rope_theta": 1e6, **more}
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def write_model(folder: Path, sizes: Dims, contents: Optional[Contents] = None, shards: int = 1,
                **config: object) -> Contents:
    """A Hugging Face folder: weights in so many shards, index, config.json and tokenizer files."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = model_contents(sizes) if contents is None else contents
    write_config(folder, sizes, **config)
    for name, text in SIDECARS.items():
        (folder / name).write_text(text, encoding="utf-8")
    names = list(contents)
    if shards == 1:
        write_safetensors(folder / "model.safetensors", contents)
        return contents
    weight_map = {}
    for i in range(shards):
        shard = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: contents[name] for name in names[i::shards]}
        write_safetensors(folder / shard, part)
        weight_map.update({name: shard for name in part})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return contents


def read_contents(path: Path) -> Contents:
    """Everything in a checkpoint, as `Contents`."""
    with open_checkpoint(path) as checkpoint:
        return {name: (info.dtype, info.shape, checkpoint.read(name).tobytes()) for name,
                info in checkpoint.infos.items()}


def under_ms_names(contents: Contents) -> Contents:
    """The same weights under MindSpore's names."""
    return {naming.hf_to_ms(name): entry for name, entry in contents.items()}


def as_array(entry: Tuple[str, Tuple[int, ...], bytes]) -> np.ndarray:
    """A tensor's bits."""
    dtype, shape, data = entry
    return np.frombuffer(data, np.uint32 if itemsize(dtype) == 4 else np.uint16).reshape(shape)


def run_script(module_dir: Path, script: str, *arguments: object, **options: object) -> subprocess.CompletedProcess:
    """Run one of the converters as a user does."""
    command = [sys.executable, str(module_dir / script), *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, timeout=120,
                          env={**os.environ, "QWEN15_DEBUG": "0"}, **options)


def write_sparse(folder: Path, sizes: Dims, marked: bool = False) -> None:
    """A model whose weights are holes in a file: zeros, and no disk taken, but for one number that tells embedding from
    head.

    Args:
        folder: to make.
        sizes: of the model; all tensors are bfloat16.
        marked: random bits at the start and at the end of every tensor, so that one in another's place, or moved, is
            seen.
    """
    folder.mkdir()
    write_config(folder, sizes)
    infos = [TensorInfo.of(w.hf, "BF16", w.shape) for w in naming.weights(sizes)]
    layout = steps(infos, {"format": "pt"})
    path = folder / "model.safetensors"
    path.write_bytes(layout[0])
    os.truncate(path, total_bytes(layout))
    rng = np.random.default_rng(0)
    with open(path, "r+b") as file:
        at = len(layout[0])
        file.seek(at)
        file.write(b"\x80\x3f")
        for info in infos if marked else ():
            for place in (at, at + info.nbytes - 512):
                file.seek(place)
                file.write(random_bits("BF16", (256,), rng))
            at += info.nbytes


def peak_of(module_dir: Path, script: str, *arguments: object) -> int:
    """Run one of the converters, which must succeed, and return the most bytes of memory it had resident."""
    # VmHWM, for ru_maxrss would count what we had before exec
    program = ("import runpy, sys; sys.argv = sys.argv[1:]\n"
               "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
               "finally: print('peak', *(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')))")
    done = subprocess.run([sys.executable, "-c", program, str(module_dir / script), *map(str, arguments)],
                          stdout=subprocess.PIPE,
                          universal_newlines=True)
    assert done.returncode == 0
    return int(done.stdout.split("peak ")[1]) * 1024
