"""The network's part of a configuration: sizes as the checkpoint's, lengths that fit the KV cache, token ids."""

from __future__ import annotations

import os
from typing import Any, Dict, Mapping, Optional, Tuple

from .. import device
from ..errors import UserError
from ..family import looks_like, yaml_name
from ..naming import Dims
from .checkpoint_files import CheckpointFiles
from .final import Final, plainly
from .keys import MODEL
from .schema import ModelConfig, Quantization

_LONGEST_DEFAULT = 8192
_QWEN_END = 151643
_QWEN_IM_END = 151645
_SIZES = (("hidden_size", "hidden_size"), ("num_layers", "num_layers"), ("num_heads", "num_heads"),
          ("n_kv_heads", "num_kv_heads"), ("intermediate_size", "intermediate_size"), ("vocab_size", "vocab_size"),
          ("tie_word_embeddings", "tie_word_embeddings"))
"""(key of model_config, field of `Dims`)."""
_MAY_BE_MISSING = ("n_kv_heads", "tie_word_embeddings")


def model_config(final: Final, files: CheckpointFiles, device_target: str) -> ModelConfig:
    """The network: sizes, constants, dtypes, cache.

    Raises:
        UserError: a size is missing or contradicts another or the checkpoint's own, or lengths do not fit the KV cache.
    """
    dims = _dims(final, *files.from_config("dims"), device_target)
    eps = final.model("rms_norm_eps", files.from_config("rms_norm_eps"), (1e-6, "default"))
    theta = final.model("theta", files.from_config("rope_theta"), (1e6, "default"))
    longest, where = files.from_config("max_position_embeddings")
    seq_length = final.model("seq_length", (longest and min(longest, _LONGEST_DEFAULT), where),
                             (_LONGEST_DEFAULT, "default"))
    param = final.model("param_init_type", files.from_config("torch_dtype"), ("bfloat16", "default"))
    compute = final.model("compute_dtype", (param, f"default (= param_init_type {param})"))
    rotary = final.model("rotary_dtype", (compute, f"default (= compute_dtype {compute})"))
    block_size, num_blocks, batch_size = _cache(final, seq_length, device_target)
    _note_overrides(final, files)
    eos, pad, bos = _token_ids(final, files, dims.vocab_size)
    names = ("layernorm_compute_type", "softmax_compute_type", "is_dynamic", "use_flash_attention", "qkv_concat")
    return ModelConfig(dims=dims, rms_norm_eps=eps, theta=theta, seq_length=seq_length, param_init_type=param,
                       compute_dtype=compute, rotary_dtype=rotary, use_past=_use_past(final), block_size=block_size,
                       num_blocks=num_blocks, batch_size=batch_size, pad_token_id=pad, bos_token_id=bos,
                       eos_token_id=eos, quantization=_quantization(final),
                       **{name: final.model(name) for name in names})


def _quantization(final: Final) -> Optional[Quantization]:
    said = {name: final.model(f"quantization_config.{name}") for name in ("weight_dtype", "group_size")}
    if all(value is None for value in said.values()):
        return None
    return Quantization(**said, where={name: final.sources[f"{MODEL}quantization_config.{name}"] for name in said})


def _dims(final: Final, hf: Optional[Dims], hf_path: str, device_target: str) -> Dims:
    sizes: Dict[str, Any] = {}
    for key, field in _SIZES:
        sizes[field] = final.model(key, (getattr(hf, field, None), hf_path))
    missing = [key for key, field in _SIZES if sizes[field] is None and key not in _MAY_BE_MISSING]
    if missing:
        others = f" (and {', '.join(missing[1:])})" if missing[1:] else ""
        raise UserError(f"{MODEL}{missing[0]} is missing{others}", final.given.path,
                        "Give it, or a load_checkpoint with its config.json beside it.")
    if sizes["num_kv_heads"] is None:
        sizes["num_kv_heads"] = final.model("n_kv_heads", (sizes["num_heads"], "default (= num_heads)"))
    if sizes["tie_word_embeddings"] is None:
        sizes["tie_word_embeddings"] = final.model("tie_word_embeddings", (False, "default"))
    if hf is not None:
        _compare(final, sizes, hf, hf_path)
    if sizes["num_heads"] % sizes["num_kv_heads"]:
        raise UserError(f"{final.place('num_heads')} is not a multiple of {final.place('n_kv_heads')}",
                        fix=_size_hint(sizes))
    if hf is None and sizes["hidden_size"] % sizes["num_heads"]:
        raise UserError(f"{final.place('hidden_size')} is not divisible by {final.place('num_heads')}",
                        fix=_size_hint(sizes))
    head_dim = hf.head_dim if hf is not None else sizes["hidden_size"] // sizes["num_heads"]
    if head_dim % 2:
        raise UserError(f"head size {head_dim} = {final.place('hidden_size')} / {final.place('num_heads')} is odd; "
                        "rotary embedding turns pairs", fix=_size_hint(sizes))
    width = head_dim * sizes["num_heads"]
    if device_target == device.ASCEND and width != sizes["hidden_size"]:
        raise UserError(f"head_dim {head_dim} x num_heads {sizes['num_heads']} = {width} is not hidden_size "
                        f"{sizes['hidden_size']}, as MindFormers' LlamaForCausalLM requires",
                        hf_path, "Use --device_target CPU.")
    return Dims(head_dim=head_dim, **sizes)


def _compare(final: Final, sizes: Mapping[str, Any], hf: Dims, hf_path: str) -> None:
    """Refuse sizes that contradict the checkpoint's own config.json."""
    wrong = [(key, field) for key, field in _SIZES if sizes[field] != getattr(hf, field)]
    if not wrong:
        return
    wanted = ", ".join(f"{key} {plainly(sizes[field])}" for key, field in wrong)
    has = ", ".join(f"{key} {plainly(getattr(hf, field))}" for key, field in wrong)
    ours = looks_like(sizes)
    theirs = looks_like({field: getattr(hf, field) for _, field in _SIZES})
    guess = (f"; the configuration looks like Qwen1.5-{ours}" if ours else "") + \
            (f"; the checkpoint looks like Qwen1.5-{theirs}" if theirs else "")
    if theirs and theirs != ours:
        fix = f"Use {yaml_name(theirs)} (or its _chat twin), or the checkpoint of the other size."
    else:
        fix = ("Correct the configuration, or write one for this checkpoint: qwen15 make-yaml "
               f"--checkpoint {os.path.dirname(hf_path) or '.'}")
    raise UserError(f"wants {wanted}, but the checkpoint's {hf_path} says {has}{guess}",
                    final.sources[MODEL + wrong[0][0]], fix)


def _cache(final: Final, seq_length: int, device_target: str) -> Tuple[int, int, int]:
    """(block_size, num_blocks, batch_size): the KV cache holds at least one sequence of seq_length."""
    batch_size = final.model("batch_size")
    block_size = final.model("block_size")
    needed = -(-seq_length // block_size)
    num_blocks = final.model("num_blocks", (needed * batch_size, "default (batch_size sequences of seq_length)"))
    held = block_size * num_blocks
    if seq_length > held:
        raise UserError(f"{final.place('seq_length')} is longer than the KV cache: {final.place('block_size')} x "
                        f"{final.place('num_blocks')} = {held} tokens",
                        fix=f"Set --options {MODEL}num_blocks={needed}, or --seq_length {held}")
    if device_target == device.ASCEND and seq_length % block_size:
        raise UserError(f"{final.place('seq_length')} is not a multiple of {final.place('block_size')}, which the "
                        "block tables on Ascend want", fix=f"Set --seq_length {needed * block_size}")
    table = final.model("max_position_embedding", (seq_length, "default"))
    if table < seq_length:
        raise UserError(f"{final.place('max_position_embedding')} is less than {final.place('seq_length')}",
                        fix=f"Remove max_position_embedding, or set --seq_length {table}")
    return block_size, num_blocks, batch_size


def _use_past(final: Final) -> bool:
    """The key stands in two places in the original's guide; both must agree, and the flag beats both."""
    top, name, given = "use_past", MODEL + "use_past", final.given
    flag = given.places.get(name, "").startswith("--")
    if given.has(top) and given.has(name) and not flag and given.entries[top] != given.entries[name]:
        raise UserError(f"{name} {given.entries[name]} contradicts use_past {given.entries[top]} "
                        f"({given.places[top]})", given.places[name], "Give both the same value.")
    value: bool = final.pick(name, (given.entries.get(top), given.places.get(top, "")))
    final.put(top, value, final.sources[name])
    return value


def _token_ids(final: Final, files: CheckpointFiles, vocab_size: int) -> Tuple[Tuple[int, ...], int, int]:
    """(eos, pad, bos)."""
    is_qwen = vocab_size > _QWEN_IM_END
    ends, where = files.from_config("eos_token_ids")
    eos = final.model("eos_token_id", files.from_generation("eos_token_id"), (ends or None, where),
                      ((_QWEN_IM_END, _QWEN_END) if is_qwen else (), "default"))
    end = _QWEN_END if is_qwen else eos[0] if eos else 0
    pad, bos = (final.model(name, files.from_generation(name), files.from_config(name), (end, "default"))
                for name in ("pad_token_id", "bos_token_id"))
    for name, ids in (("eos_token_id", eos), ("pad_token_id", (pad,)), ("bos_token_id", (bos,))):
        if any(token >= vocab_size for token in ids):
            raise UserError(f"{final.place(name)} is not in the vocabulary of {final.place('vocab_size')}",
                            fix="Does the configuration belong to this model?")
    if not eos:
        final.notes.append("no eos_token_id is known: every answer runs to its length limit")
    return eos, pad, bos


def _note_overrides(final: Final, files: CheckpointFiles) -> None:
    """Say where the configuration departs from the checkpoint's config.json."""
    hf = files.hf
    if hf is None:
        return
    values = final.values
    for name, theirs in (("rms_norm_eps", hf.rms_norm_eps), ("theta", hf.rope_theta)):
        if values[MODEL + name] != theirs:
            final.notes.append(f"{final.place(name)} overrides {theirs:g} of {hf.where}")
    longest = hf.max_position_embeddings
    if longest is not None and values[MODEL + "seq_length"] > longest:
        final.notes.append(f"{final.place('seq_length')} is longer than the {longest} tokens the model was made for "
                           f"({hf.where})")
    if hf.torch_dtype is not None and values[MODEL + "param_init_type"] != hf.torch_dtype:
        final.notes.append(f"{final.place('param_init_type')}: the checkpoint's {hf.torch_dtype} weights are "
                           "converted when they are loaded")


def _size_hint(sizes: Mapping[str, Any]) -> Optional[str]:
    near = looks_like(sizes)
    return f"The sizes look like Qwen1.5-{near}: compare with {yaml_name(near)}." if near else None
