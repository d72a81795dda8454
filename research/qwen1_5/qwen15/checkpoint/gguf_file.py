"""GGUF files (llama.cpp's) of Qwen2 and Llama models, seen as Hugging Face checkpoints.

Q8_0 (34 bytes: a float16 scale d, 32 signed bytes q, w = d q) and Q4_0 (18 bytes: d, 16 bytes whose low nibbles are
values 0 to 15 and whose high nibbles are 16 to 31, w = d (q - 8)) keep their integers, in groups of 32. All other kinds
of blocks are dequantised by the package gguf.
"""

from __future__ import annotations

from typing import Any, Callable, Optional

import numpy as np

from ..errors import UserError
from .casting import from_float32
from .gguf_header import Header, Place, read_header
from .quantised import SCALE, Scheme, pack
from .reader import TensorFile
from .tensors import LONG_NAMES, Scan, Stored, TensorInfo
from .view import Made, View, block_of

_LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight", "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight", "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.weight": "self_attn.k_proj.weight", "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.weight": "self_attn.v_proj.weight", "attn_v.bias": "self_attn.v_proj.bias",
    "attn_output.weight": "self_attn.o_proj.weight", "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight", "ffn_down.weight": "mlp.down_proj.weight"}
_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
          "output.weight": "lm_head.weight"}
_FLOATS = ("F32", "F16", "BF16")
_KEPT = {"Q8_0": 34, "Q4_0": 18}
"""Kinds whose integers are kept, and the bytes of a block of 32 values."""
_DAMAGED = "Download the file again."


def hf_name(name: str) -> Optional[str]:
    """Hugging Face's name of a GGUF tensor, None for one that such a model does not have."""
    if name in _NAMES:
        return _NAMES[name]
    parts = name.split(".", 2)
    if len(parts) == 3 and parts[0] == "blk" and parts[1].isdigit() and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}"
    return None


class GgufFile(TensorFile):
    """One file, its tensors under its own names: floats as such, blocks as uint8 [rows, bytes of a row].

    Attributes:
        kinds: tensor -> 'F32', 'Q4_0', ...
        shapes: tensor -> [O, I] or [E].
        config: what config.json would say.
        is_llama: rows of q and k are in llama.cpp's order, and the model has no q/k/v biases.
    """

    def __init__(self, path: str):
        """Open a file and read its header.

        Raises:
            UserError: no such file, damaged, of another architecture, one of several parts, or the package is missing.
        """
        try:
            import gguf  # noqa: F401
        except ImportError:
            raise UserError("reading .gguf needs the Python package gguf", path, "Run: pip install gguf") from None
        super().__init__(path, "gguf")

    def _scan(self) -> Scan:
        try:
            header = read_header(self.path)
        except (ValueError, OSError) as error:
            raise UserError(f"is not a complete GGUF file: {error}", self.path, _DAMAGED) from None
        self.config = _config(header, self.path)
        self.is_llama = bool(self.config.pop("_is_llama"))
        for name, place in header.tensors.items():
            if place.kind not in _FLOATS and len(place.shape) != 2:
                raise UserError(f"{name} is {place.kind} of shape {list(place.shape)}: only matrices are in blocks",
                                self.path, _DAMAGED)
        self.kinds = {name: place.kind for name, place in header.tensors.items()}
        self.shapes = {name: place.shape for name, place in header.tensors.items()}
        return Scan({name: Stored(_info(name, place), ((place.offset, place.nbytes),))
                     for name, place in header.tensors.items()}, {}, {})


def _info(name: str, place: Place) -> TensorInfo:
    """A tensor as it is read: blocks are bytes, a row of them for each row of values."""
    if place.kind in _FLOATS:
        return TensorInfo.of(name, place.kind, place.shape)
    rows = place.shape[0] if len(place.shape) > 1 else 1
    return TensorInfo.of(name, "U8", (rows, place.nbytes // rows))


def _config(header: Header, path: str) -> dict[str, Any]:
    """What config.json would say, from the file's metadata."""
    def value(key: str, default: Any = None) -> Any:
        found = header.fields.get(key, default)
        wanted = (str,) if isinstance(default, str) else (int,) if isinstance(default, int) else (int, float)
        if found is not None and not isinstance(found, wanted):
            kind = "text" if str in wanted else "number"
            raise UserError(f"{key} is {found!r}, which is not a {kind}", path, _DAMAGED)
        return found

    name = value("general.architecture", "")
    if name not in ("qwen2", "llama"):
        raise UserError(f"architecture {name!r} is not supported, only qwen2 and llama", path,
                        "Mixture-of-experts, vision and other models need another network.")
    if value("split.count", 1) > 1:
        raise UserError(f"is one of {value('split.count')} parts", path,
                        "Join them with llama.cpp's llama-gguf-split --merge.")
    scaling = value(f"{name}.rope.scaling.type", "none")
    if scaling != "none" or any(tensor.startswith("rope_f") for tensor in header.tensors):
        raise UserError(f"RoPE scaling {scaling!r} is not supported", path, "Use the model without context extension.")
    if value(f"{name}.expert_count"):
        raise UserError("mixture-of-experts models are not supported", path, "Use a dense model.")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise UserError("token_embd.weight is missing, or is not a matrix", path, _DAMAGED)
    keys = {"hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
            "num_hidden_layers": "block_count", "num_attention_heads": "attention.head_count",
            "num_key_value_heads": "attention.head_count_kv",
            "rms_norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base",
            "max_position_embeddings": "context_length", "head_dim": "attention.key_length"}
    found = {ours: value(f"{name}.{theirs}") for ours, theirs in keys.items()}
    config = {key: entry for key, entry in found.items() if entry is not None}
    for key in ("rms_norm_eps", "rope_theta"):
        if key in config:
            config[key] = float(f"{config[key]:.6g}")  # stored in float32: 9.99999974e-06 was written as 1e-06
    config.update(architectures=["Qwen2ForCausalLM"], model_type="qwen2", hidden_act="silu", torch_dtype="bfloat16",
                  vocab_size=embedding.shape[0], tie_word_embeddings="output.weight" not in header.tensors,
                  bos_token_id=value("tokenizer.ggml.bos_token_id"), eos_token_id=value("tokenizer.ggml.eos_token_id"))
    config["_is_llama"] = name == "llama"
    return config


def open_gguf(path: str, floats: str) -> View:
    """A GGUF file as a Hugging Face checkpoint with quantised matrices in the stored form.

    Args:
        path: the file.
        floats: what matrices become whose blocks are not kept: 'BF16', 'F16' or 'F32'.

    Raises:
        UserError: as `GgufFile`.
    """
    file = GgufFile(path)
    made: dict[str, Made] = {}
    dequantised: dict[str, int] = {}
    for name, kind in file.kinds.items():
        target = hf_name(name)
        if target is None:
            continue
        for tensor in _made(file, name, target, floats):
            made[tensor.info.name] = tensor
        if kind not in _FLOATS and kind not in _KEPT:
            dequantised[kind] = dequantised.get(kind, 0) + 1
    view = View(file, made, frozenset(name for name in file.kinds if hf_name(name) is not None))
    view.notes = [f"{path}: {count} {kind} tensors are dequantised to {LONG_NAMES[floats]}"
                  for kind, count in sorted(dequantised.items())]
    if file.is_llama:
        added = _zero_biases(file)
        view.made.update(added)
        view.infos.update({name: tensor.info for name, tensor in added.items()})
        view.notes.append(f"{path} is a Llama: it gets {len(added)} q/k/v biases of zero, which change nothing")
    return view


def _zero_biases(file: GgufFile) -> dict[str, Made]:
    """The biases that a Llama has none of."""
    made = {}
    for name, shape in file.shapes.items():
        target = hf_name(name)
        if target is not None and target.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            info = TensorInfo.of(target[:-len("weight")] + "bias", "F32", (shape[0],))
            made[info.name] = Made(info, lambda first, last: np.zeros(last - first, np.float32))
    return made


def _made(file: GgufFile, name: str, target: str, floats: str) -> list[Made]:
    """One tensor in the stored form, under Hugging Face's name."""
    kind, shape = file.kinds[name], file.shapes[name]
    heads = _permuted_heads(file, name)
    if kind in _FLOATS:
        return [Made(TensorInfo.of(target, kind, shape), _plain(file, name, heads))]
    if kind not in _KEPT:
        return [Made(TensorInfo.of(target, floats, shape), _dequantised(file, name, heads, floats))]
    in_vocabulary = name in ("token_embd.weight", "output.weight")  # rows of a table are looked up, in 8 bits
    bits = 4 if kind == "Q4_0" and not in_vocabulary else 8
    scheme = Scheme(bits, shape[1] // 32, 32, "F16")
    weight, scale = scheme.infos(target, shape)
    assert scale.name == target + SCALE
    return [Made(weight, _integers(file, name, heads, bits)), Made(scale, _scales(file, name, heads))]


def _permuted_heads(file: GgufFile, name: str) -> int:
    """Heads of a q or k matrix whose rows llama.cpp has put in another order; 0 for all others."""
    if not file.is_llama or not name.endswith(("attn_q.weight", "attn_k.weight")):
        return 0
    return int(file.config["num_attention_heads" if "attn_q" in name else "num_key_value_heads"])


def _stored_rows(file: GgufFile, name: str, heads: int, first: int, last: int) -> np.ndarray:
    """Rows first:last of a tensor in Hugging Face's order; llama.cpp's row 2i + p of a head is row p D/2 + i there."""
    info = file.infos[name]
    if not heads:
        if len(info.shape) == 1:
            return file.read(name)[first:last]
        return block_of(file, name, (first, last), (0, info.shape[1]))
    size = info.shape[0] // heads
    rows = np.arange(first, last)
    within = rows % size
    stored = rows - within + within % (size // 2) * 2 + within // (size // 2)
    begin, end = int(stored.min()), int(stored.max()) + 1
    return block_of(file, name, (begin, end), (0, info.shape[1]))[stored - begin]


def _plain(file: GgufFile, name: str, heads: int) -> Callable[[int, int], np.ndarray]:
    return lambda first, last: _stored_rows(file, name, heads, first, last)


def _dequantised(file: GgufFile, name: str, heads: int, floats: str) -> Callable[[int, int], np.ndarray]:
    def rows(first: int, last: int) -> np.ndarray:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        blocks = _stored_rows(file, name, heads, first, last)
        try:
            values = dequantize(blocks, GGMLQuantizationType[file.kinds[name]])
        except NotImplementedError:
            raise UserError(f"{name} is {file.kinds[name]}, which the package gguf cannot dequantise", file.path,
                            "Take a file of Q4_0, Q4_1, Q5, Q8_0, K-quants, F16, BF16 or F32.") from None
        return from_float32(np.ascontiguousarray(values, np.float32), floats)

    return rows


def _blocks(file: GgufFile, name: str, heads: int, first: int, last: int) -> np.ndarray:
    """uint8 [n, blocks, bytes of a block]."""
    return _stored_rows(file, name, heads, first, last).reshape(last - first, -1, _KEPT[file.kinds[name]])


def _scales(file: GgufFile, name: str, heads: int) -> Callable[[int, int], np.ndarray]:
    def rows(first: int, last: int) -> np.ndarray:
        octets = np.ascontiguousarray(_blocks(file, name, heads, first, last)[:, :, :2])
        return octets.view(np.float16)[:, :, 0]

    return rows


def _integers(file: GgufFile, name: str, heads: int, bits: int) -> Callable[[int, int], np.ndarray]:
    def rows(first: int, last: int) -> np.ndarray:
        octets = _blocks(file, name, heads, first, last)[:, :, 2:]
        if file.kinds[name] == "Q8_0":
            return np.ascontiguousarray(octets).view(np.int8).reshape(last - first, -1)
        values = np.concatenate([octets & 15, octets >> 4], axis=2).reshape(last - first, -1)
        return pack(values) if bits == 4 else values.view(np.int8) - np.int8(8)

    return rows
