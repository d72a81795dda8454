"""What a checkpoint says about its quantisation, in config.json or beside it; what is not read is refused by name."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any, Mapping, Optional

from ..errors import UserError
from ..json_file import read_json

CONFIG_KEY = "quantization_config"
SETTINGS_FILES = ("quantize_config.json", "quant_config.json", "quantization_config.json")
OURS = "qwen15"
"""`quant_method` of checkpoints that `--quantize` made."""
_MORE_THAN_WEIGHTS = {"transform_config": "rotates activations", "rotation_config": "rotates activations",
                      "spinquant_config": "rotates activations", "rotation": "rotates activations",
                      "adapter": "adds a LoRA", "activation": "quantises activations"}
"""Keys of compressed-tensors, AutoRound and GPTQModel -> what such a model does besides multiplying by its weights."""
_AUTOROUND_BORROWS_SINCE = {"auto-round": (0, 6), "gptq": (0, 13)}
"""`quant_method` of AutoRound's GPTQ files -> its first version that takes the one off whole words. Before, it packed
as AutoGPTQ does; since 0.16 it stores a zero point of 0 as if it were 1, and nothing is borrowed."""
_FIX = "Read are GPTQ and compressed-tensors of 4 and 8 bits, and AWQ GEMM of 4; or take the unquantised model."


@dataclass(frozen=True)
class QuantizationConfig:
    """How a foreign checkpoint is quantised.

    Attributes:
        layout: 'gptq', 'awq' or 'compressed-tensors'.
        bits: 4 or 8.
        group_size: inputs of a group; 0 for whole rows.
        version: of GPTQ: 1 stores zero points less one, 2 as they are.
        where: the file that says so.
        has_order: every linear says which group each column belongs to: without that it would be read in another order.
        has_zero: every linear has zero points, in a layout that has none where they are the middle.
        borrows: of version 1: the one was taken off a whole word at once, so that a zero point of 0 has borrowed from
            the next column's.
    """

    layout: str
    bits: int
    group_size: int
    version: int
    where: str
    has_order: bool = False
    has_zero: bool = False
    borrows: bool = False


def settings_of(folder: str) -> Optional[QuantizationConfig]:
    """The settings of the model in a folder, None for one that is not quantised.

    Raises:
        UserError: damaged settings, or a scheme that is not read.
    """
    where = os.path.join(folder, "config.json")
    found: Any = None
    if os.path.isfile(where):
        config = read_json(where)
        found = config.get(CONFIG_KEY) if isinstance(config, dict) else None
    if found is None:
        for name in SETTINGS_FILES:
            if os.path.isfile(os.path.join(folder, name)):
                where = os.path.join(folder, name)
                found = read_json(where)
                if isinstance(found, dict) and "quant_method" not in found:
                    found = {**found, "quant_method": "awq" if "w_bit" in found else "gptq"}
                break
    if found is None or (isinstance(found, dict) and found.get("quant_method") == OURS):
        return None
    if not isinstance(found, dict):
        raise UserError(f"{CONFIG_KEY} is not an object", where, "Download the file again.")
    return _parse(found, where)


def group_size_of(folder: str) -> Optional[int]:
    """The group size of the quantised model in a folder, ours or foreign; 0 for whole rows, None where nothing says."""
    path = os.path.join(folder, "config.json")
    config = read_json(path) if os.path.isfile(path) else {}
    found = config.get(CONFIG_KEY) if isinstance(config, dict) else None
    if isinstance(found, dict) and found.get("quant_method") == OURS:
        return _group(found.get("group_size"), path)
    settings = settings_of(folder)
    return None if settings is None else settings.group_size


def _parse(found: Mapping[str, Any], where: str) -> QuantizationConfig:
    method = str(found.get("quant_method")).lower()
    _refuse_other_layers(found, where)
    meta = found.get("meta")
    for key, what in _MORE_THAN_WEIGHTS.items():
        if found.get(key) or (isinstance(meta, dict) and meta.get(key)):
            raise UserError(f"{key} says that the model {what} while it runs, which is not supported", where, _FIX)
    if method in ("auto-round", "intel/auto-round"):
        method, found = _auto_round(found, where)
    if method == "gptq":
        return _gptq(found, where)
    if method == "awq":
        return _awq(found, where)
    if method == "compressed-tensors":
        return _compressed(found, where)
    if found.get("quant_method") is None:
        raise UserError(f"{CONFIG_KEY} does not say how the model is quantised: quant_method is missing", where,
                        "Put it there (gptq, awq or compressed-tensors), or download the file again.")
    raise UserError(f"quant_method {found.get('quant_method')!r} is not supported", where, _FIX)


def _refuse_other_layers(found: Mapping[str, Any], where: str) -> None:
    """GPTQModel's `dynamic` and AutoRound's `extra_config` may give layers their own settings; layers that are left
    unquantised (`-:`, 16 bits) show that by their tensors."""
    for key in ("dynamic", "extra_config"):
        layers = found.get(key)
        for layer, own in layers.items() if isinstance(layers, dict) else ():
            if not isinstance(own, dict) or str(layer).startswith("-:") or own.get("bits") == 16:
                continue
            for name in ("bits", "group_size"):
                if own.get(name) is not None and own[name] != found.get(name):
                    raise UserError(f"{key} gives {layer} {name} {own[name]!r}, the other layers have "
                                    f"{found.get(name)!r}: a checkpoint with more than one is not supported", where,
                                    _FIX)


def _auto_round(found: Mapping[str, Any], where: str) -> tuple[str, Mapping[str, Any]]:
    """The method whose layout AutoRound has packed in, and the settings as that method has them."""
    if isinstance(found.get("act_bits"), int) and found["act_bits"] < 16:
        raise UserError(f"AutoRound with activations of {found['act_bits']} bits is not supported", where, _FIX)
    packing = str(found.get("packing_format") or _packing_of_backend(str(found.get("backend") or "auto")))
    if packing in ("auto_round", "auto_round:gptqmodel"):
        return "gptq", {**found, "checkpoint_format": "gptq_v2"}
    if packing in ("auto_round:auto_gptq", "auto_round:gptq", "auto"):
        return "gptq", found
    if packing in ("auto_round:auto_awq", "auto_round:awq"):
        return "awq", found
    raise UserError(f"AutoRound's packing_format {packing!r} is not supported", where, _FIX)


def _packing_of_backend(backend: str) -> str:
    """What AutoRound before 0.5 said in place of `packing_format`: 'auto_round:gptq:exllamav2', 'auto_round:triton'."""
    for name in ("awq", "gptqmodel", "gptq"):
        if name in backend:
            return f"auto_round:{name}"
    return "auto_round" if backend.startswith("auto_round") else backend


def _gptq(found: Mapping[str, Any], where: str) -> QuantizationConfig:
    form = str(found.get("checkpoint_format") or found.get("format") or "gptq").lower()
    if found.get("is_marlin_format") or "marlin" in form:
        raise UserError("GPTQ weights in marlin's layout are not supported", where, _FIX)
    if form not in ("gptq", "gptq_v2"):
        raise UserError(f"GPTQ weights in checkpoint_format {form!r} are not supported", where, _FIX)
    group = _group(found.get("group_size"), where)
    return QuantizationConfig("gptq", _bits(found.get("bits"), (4, 8), "GPTQ", where), group,
                              2 if form == "gptq_v2" else 1, where, found.get("desc_act") is True and group > 0,
                              borrows=form == "gptq" and (_is_of_gptqmodel(found) or _is_of_borrowing_autoround(found)))


def _is_of_borrowing_autoround(found: Mapping[str, Any]) -> bool:
    method = str(found.get("quant_method")).lower().rpartition("/")[2]
    since = _AUTOROUND_BORROWS_SINCE.get(method)
    if since is None or (method == "gptq" and found.get("provider") != "auto-round"):
        return False
    numbers = re.match(r"(\d+)\.(\d+)", str(found.get("autoround_version")))
    return numbers is not None and (int(numbers[1]), int(numbers[2])) >= since


def _is_of_gptqmodel(found: Mapping[str, Any]) -> bool:
    """Whether GPTQModel wrote it: `meta: {quantizer: ["gptqmodel:7.7.0"]}`, or one text in older versions."""
    meta = found.get("meta")
    written = meta.get("quantizer") if isinstance(meta, dict) else None
    return any(str(name).startswith("gptqmodel") for name in (written if isinstance(written, list) else [written]))


def _awq(found: Mapping[str, Any], where: str) -> QuantizationConfig:
    version = str(found.get("version") or found.get("checkpoint_format") or found.get("format") or "gemm").lower()
    if version != "gemm":
        raise UserError(f"AWQ weights in version {version!r} are not supported, only gemm", where, _FIX)
    bits = _bits(found.get("bits", found.get("w_bit")), (4,), "AWQ", where)
    return QuantizationConfig("awq", bits, _group(found.get("group_size", found.get("q_group_size")), where), 2, where)


def _compressed(found: Mapping[str, Any], where: str) -> QuantizationConfig:
    groups = found.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise UserError("compressed-tensors without config_groups is not supported", where, _FIX)
    sparsity = found.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format") not in (None, "dense"):
        raise UserError(f"compressed-tensors with sparsity {sparsity.get('format')!r} is not supported", where, _FIX)
    if found.get("kv_cache_scheme"):
        raise UserError("compressed-tensors with kv_cache_scheme (a quantised key-value cache) is not supported", where,
                        _FIX)
    schemes = {name: _compressed_group(found, group, where) for name, group in groups.items()}
    first, *others = schemes.items()
    for name, scheme in others:
        if scheme != first[1]:
            raise UserError(f"config_groups quantises {first[0]} and {name} differently: a checkpoint with more than "
                            "one way is not supported", where, _FIX)
    return first[1]


def _compressed_group(found: Mapping[str, Any], group: Mapping[str, Any], where: str) -> QuantizationConfig:
    form = group.get("format") or found.get("format")
    if form != "pack-quantized":
        raise UserError(f"compressed-tensors in format {form!r} is not supported, only pack-quantized", where, _FIX)
    for key in ("input_activations", "output_activations"):
        if group.get(key):
            raise UserError(f"compressed-tensors with {key} is not supported, only with quantised weights", where, _FIX)
    weights = group.get("weights")
    if not isinstance(weights, dict) or weights.get("type", "int") != "int":
        raise UserError("compressed-tensors whose weights are not integers are not supported", where, _FIX)
    strategy = str(weights.get("strategy") or "group")
    if strategy not in ("group", "channel"):
        raise UserError(f"compressed-tensors with strategy {strategy!r} is not supported", where, _FIX)
    size = -1 if strategy == "channel" else weights.get("group_size")
    bits = _bits(weights.get("num_bits"), (4, 8), "compressed-tensors", where)
    has_order = str(weights.get("actorder")).lower() in ("group", "dynamic", "true")
    return QuantizationConfig("compressed-tensors", bits, _group(size, where), 2, where, has_order,
                              weights.get("symmetric") is False)


def _bits(value: Any, known: tuple[int, ...], method: str, where: str) -> int:
    if isinstance(value, bool) or value not in known:
        raise UserError(f"{method} with {value!r} bits is not supported, only {' and '.join(map(str, known))}", where,
                        _FIX)
    return int(value)


def _group(value: Any, where: str) -> int:
    if value == -1:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0 or value % 32:
        raise UserError(f"group_size {value!r} is not supported: -1 for whole rows, or a multiple of 32", where, _FIX)
    return value
