"""Read a Hugging Face config.json of a Qwen1.5 or Qwen2 model; what this network cannot do is refused by name."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Dict, Mapping, Optional, Tuple, Union

from ..errors import UserError, did_you_mean
from ..json_file import read_json
from ..naming import Dims
from .keys import DTYPES, LARGEST_FLOAT, MOST_LAYERS

CONFIG_FILE = "config.json"
_LARGEST_SIZE = 2 ** 31 - 1


@dataclass(frozen=True)
class HfConfig:
    """What a config.json says about the model.

    Attributes:
        dims: the sizes that fix every weight's shape.
        rms_norm_eps: epsilon inside the square root of RMSNorm.
        rope_theta: base of the rotary angles, angle = position x theta^(-2i/D).
        torch_dtype: 'float32', 'float16' or 'bfloat16' as stored, None when the file does not say.
        max_position_embeddings: longest sequence the model was made for, in tokens; None when the file does not say.
        bos_token_id: None when the file does not say (Qwen puts nothing in front of a text).
        eos_token_ids: every id that ends a text; empty when the file does not say.
        pad_token_id: None when the file does not say.
        where: the file it was read from, for messages.
    """

    dims: Dims
    rms_norm_eps: float
    rope_theta: float
    torch_dtype: Optional[str]
    max_position_embeddings: Optional[int]
    bos_token_id: Optional[int]
    eos_token_ids: Tuple[int, ...]
    pad_token_id: Optional[int]
    where: str


def hf_config_of(dims: Dims, torch_dtype: str, max_positions: int, end: int, rms_norm_eps: float = 1e-6,
                 rope_theta: float = 1e6) -> Dict[str, Any]:
    """The config.json of a model with these sizes; `end` is the token id that ends a text."""
    return {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "torch_dtype": torch_dtype,
        "hidden_size": dims.hidden_size, "intermediate_size": dims.intermediate_size,
        "num_hidden_layers": dims.num_layers,
        "num_attention_heads": dims.num_heads, "num_key_value_heads": dims.num_kv_heads, "vocab_size": dims.vocab_size,
        "tie_word_embeddings": dims.tie_word_embeddings, "rms_norm_eps": rms_norm_eps, "rope_theta": rope_theta,
        "max_position_embeddings": max_positions, "use_sliding_window": False, "bos_token_id": end, "eos_token_id": end,
        "initializer_range": 0.02, "attention_dropout": 0.0, "use_cache": True,
    }


def dims_from_hf_config(source: Union[str, "os.PathLike[str]", Mapping[str, Any]]) -> HfConfig:
    """Read and check a Qwen1.5 / Qwen2 configuration.

    Args:
        source: config.json's path, the folder that holds it, or its contents.

    Raises:
        UserError: the file is missing or damaged, a size is missing or absurd, or the model needs something that the
            network here does not do (experts, sliding window, RoPE scaling, another architecture).
    """
    if isinstance(source, Mapping):
        return _parse(source, CONFIG_FILE)
    path = os.fspath(source)
    if os.path.isdir(path):
        path = os.path.join(path, CONFIG_FILE)
    contents = read_json(path)
    if not isinstance(contents, dict):
        raise UserError(f"holds a {type(contents).__name__}, not an object of settings", path,
                        "Download the file again.")
    return _parse(contents, path)


def _parse(config: Mapping[str, Any], where: str) -> HfConfig:
    _refuse_unsupported(config, where)
    heads = _size(config, "num_attention_heads", where)
    kv_heads = heads if _is_null(config, "num_key_value_heads") else _size(config, "num_key_value_heads", where)
    hidden = _size(config, "hidden_size", where)
    if heads % kv_heads:
        raise UserError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}", where,
                        "Is this the model's own config.json?")
    if config.get("head_dim") is not None:
        head_dim = _size(config, "head_dim", where)
    elif hidden % heads:
        raise UserError(
            f"hidden_size {hidden} is not divisible by num_attention_heads {heads} and there is no head_dim",
                        where, "Is this the model's own config.json?")
    else:
        head_dim = hidden // heads
    if head_dim % 2:
        raise UserError(f"head size {head_dim} is odd; rotary embedding turns pairs", where,
                        "Is this the model's own config.json?")
    dims = Dims(hidden_size=hidden, intermediate_size=_size(config, "intermediate_size", where),
                num_layers=_layers(config, where), num_heads=heads, num_kv_heads=kv_heads,
                head_dim=head_dim, vocab_size=_size(config, "vocab_size", where),
                tie_word_embeddings=_flag(config, "tie_word_embeddings", where))
    return HfConfig(dims=dims, rms_norm_eps=_positive(config, "rms_norm_eps", 1e-6, where),
                    rope_theta=_theta(config, where), torch_dtype=_dtype(config, where),
                    max_position_embeddings=(None if config.get("max_position_embeddings") is None
                                             else _size(config, "max_position_embeddings", where)),
                    bos_token_id=_token(config, "bos_token_id", where), eos_token_ids=_tokens(config, where),
                    pad_token_id=_token(config, "pad_token_id", where), where=where)


def _refuse_unsupported(config: Mapping[str, Any], where: str) -> None:
    model_type = config.get("model_type")
    if model_type == "llama":
        raise UserError("model_type llama: its checkpoints have no q/k/v biases, which this network adds", where,
                        "Give the checkpoint zero biases and write model_type qwen2; they are not added silently.")
    if model_type != "qwen2":
        known = did_you_mean(model_type, ["qwen2"]) if isinstance(model_type, str) else None
        raise UserError(f"model_type {model_type!r} is not supported, only qwen2 (Qwen1.5, Qwen2, Qwen2.5)", where,
                        known or "Mixture-of-experts, vision and other models need another network.")
    architectures = config.get("architectures")
    if architectures is not None and architectures != ["Qwen2ForCausalLM"]:
        raise UserError(f"architectures {architectures!r} is not supported, only Qwen2ForCausalLM", where,
                        "Reward, classification and embedding models have other weights.")
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if config.get(key):
            raise UserError(f"{key} {config[key]!r}: mixture-of-experts models are not supported", where,
                            "Use a dense Qwen1.5 checkpoint.")
    scaling = config.get("rope_scaling")
    if scaling and not _is_default_rope(scaling):
        raise UserError(f"rope_scaling {scaling!r} is not supported", where,
                        "Use the model without context extension, or remove the key to do without it.")
    if _flag(config, "use_mrope", where):
        raise UserError("use_mrope true: the three-part positions of vision models are not supported", where)
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"hidden_act {config['hidden_act']!r} is not supported, only silu", where)
    # Layers after max_window_layers use the window; a window that no layer uses does not count.
    if _flag(config, "use_sliding_window", where) and config.get("sliding_window") is not None:
        first = config.get("max_window_layers")
        layers = config.get("num_hidden_layers")
        if not (isinstance(first, int) and isinstance(layers, int) and first >= layers):
            raise UserError(f"use_sliding_window true (window {config['sliding_window']!r} from layer {first!r}): "
                            "sliding window attention is not supported", where,
                            "Set use_sliding_window false to attend to everything, which is how Qwen ships it.")
    layer_types = config.get("layer_types")
    if layer_types is not None and (not isinstance(layer_types, list)
                                    or set(map(str, layer_types)) - {"full_attention"}):
        raise UserError(f"layer_types {layer_types!r}: only full_attention is supported", where)


def _is_default_rope(scaling: Any) -> bool:
    return isinstance(scaling, Mapping) and scaling.get("rope_type", scaling.get("type")) == "default"


def _is_null(config: Mapping[str, Any], key: str) -> bool:
    return key in config and config[key] is None


def _size(config: Mapping[str, Any], key: str, where: str) -> int:
    value = config.get(key)
    if value is None:
        raise UserError(f"{key} is missing", where, "Is this the model's own config.json?")
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _LARGEST_SIZE:
        raise UserError(f"{key} {_short(value)} is not a positive whole number", where,
                        "Is this the model's own config.json?")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:20]}... ({len(text)} characters)"


def _layers(config: Mapping[str, Any], where: str) -> int:
    layers = _size(config, "num_hidden_layers", where)
    if layers > MOST_LAYERS:
        raise UserError(f"num_hidden_layers {layers} is more than {MOST_LAYERS}, the most that is supported", where,
                        "Is this the model's own config.json?")
    return layers


def _flag(config: Mapping[str, Any], key: str, where: str) -> bool:
    value = config.get(key)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise UserError(f"{key} {value!r} is not true or false", where)
    return value


def _positive(config: Mapping[str, Any], key: str, default: float, where: str) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= LARGEST_FLOAT:
        raise UserError(f"{key} {_short(value)} is not a positive number", where)
    return float(value)


def _theta(config: Mapping[str, Any], where: str) -> float:
    # transformers 5 moved theta into an object of its own, beside the kind of scaling.
    parameters = config.get("rope_parameters")
    if parameters is None:
        return _positive(config, "rope_theta", 10000.0, where)
    if not _is_default_rope(parameters):
        raise UserError(f"rope_parameters {parameters!r} is not supported, only rope_type default", where,
                        "Use the model without context extension.")
    return _positive(parameters, "rope_theta", 10000.0, where)


def _dtype(config: Mapping[str, Any], where: str) -> Optional[str]:
    value = config.get("torch_dtype", config.get("dtype"))
    if value is None or value in DTYPES:
        return value
    raise UserError(f"torch_dtype {value!r} is not supported", where, f"Known are {', '.join(DTYPES)}.")


def _token(config: Mapping[str, Any], key: str, where: str) -> Optional[int]:
    value = config.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise UserError(f"{key} {value!r} is not a token id", where)
    return value


def _tokens(config: Mapping[str, Any], where: str) -> Tuple[int, ...]:
    value = config.get("eos_token_id")
    values = value if isinstance(value, list) else [] if value is None else [value]
    for item in values:
        if isinstance(item, bool) or not isinstance(item, int) or item < 0:
            raise UserError(f"eos_token_id {value!r} is not a token id or a list of them", where)
    return tuple(values)
