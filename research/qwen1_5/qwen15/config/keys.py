"""THE table of configuration keys: name, type, what reads it, default."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import Any, Dict, Optional, Sequence, Tuple

from ..device import TARGETS
from ..errors import did_you_mean
from ..hub.names import HUBS
from ..machine import MOST_THREADS

USED, DEVICE, FIXED, INERT = "used", "device", "fixed", "inert"
"""What a key does. USED: this module reads it. DEVICE: handed to MindSpore or MindFormers on Ascend, no effect on CPU.
FIXED: only the listed values are supported. INERT: accepted because files of the original module have it; predicting
does not read it."""

DTYPES = ("float32", "float16", "bfloat16")
_LARGEST_INT = 2 ** 31 - 1
MOST_LAYERS = 4096
"""More than any model has; what is done for each layer stays short."""
MOST_GUESSES = 32
"Guesses of a stream in one step; more have never been worth their time."
LARGEST_FLOAT = 1e30
MODEL = "model.model_config."
TOKENIZER = "processor.tokenizer."


@dataclass(frozen=True)
class Key:
    """One row of the table.

    Attributes:
        name: dotted path in the YAML.
        kind: bool, int, float, str, path, dtype, size, ids, list, any or section; see `convert`.
        role: USED, DEVICE, FIXED or INERT.
        allowed: the values supported (str and FIXED keys), empty for any.
        default: the value when nobody gives one; None when it follows from other values.
        low, high: inclusive bounds of a number; `above` an exclusive lower one.
    """

    name: str
    kind: str
    role: str = USED
    allowed: Tuple[Any, ...] = ()
    default: Any = None
    low: Optional[float] = None
    high: Optional[float] = None
    above: Optional[float] = None


def _model(name: str, kind: str, role: str = USED, **more: Any) -> Key:
    return Key(MODEL + name, kind, role, **more)


def _each(prefix: str, names: str, kind: str, role: str) -> Sequence[Key]:
    return [Key(prefix + name, kind, role) for name in names.split()]


_ROWS = [
    Key("run_mode", "str", allowed=("predict", "train", "finetune", "eval", "export"), default="predict"),
    Key("seed", "int", low=0, high=2 ** 32 - 1),
    Key("load_checkpoint", "path"),
    Key("hub", "str", allowed=HUBS, default="hf"),
    Key("auto_trans_ckpt", "bool", default=False),
    Key("speculate", "str"),
    Key("speculate_tokens", "int", low=1, high=MOST_GUESSES),
    Key("src_strategy_path_or_dir", "path", DEVICE),
    Key("transform_process_num", "int", DEVICE, low=1),
    Key("only_save_strategy", "bool", DEVICE),
    Key("output_dir", "str", DEVICE),
    Key("use_parallel", "bool", default=False),
    Key("use_past", "bool"),
    Key("use_legacy", "bool", FIXED, allowed=(True,)),

    Key("parallel_config.data_parallel", "int", default=1, low=1),
    Key("parallel_config.model_parallel", "int", default=1, low=1),
    Key("parallel_config.pipeline_stage", "int", default=1, low=1),
    Key("parallel_config.vocab_emb_dp", "bool", default=True),
    Key("parallel_config.micro_batch_num", "int", DEVICE, low=1),
    Key("parallel_config.gradient_aggregation_group", "int", DEVICE, low=1),
    Key("parallel_config.context_parallel", "int", FIXED, allowed=(1,)),
    Key("parallel_config.expert_parallel", "int", FIXED, allowed=(1,)),
    *_each("parallel_config.", "use_seq_parallel optimizer_shard seq_split_num context_parallel_algo mem_coeff "
                               "recompute ulysses_degree_in_cp", "any", INERT),

    _model("type", "str", FIXED, allowed=("LlamaConfig",)),
    Key("model.arch.type", "str", FIXED, allowed=("LlamaForCausalLM",)),
    _model("batch_size", "int", default=1, low=1),
    _model("seq_length", "int", low=1),
    _model("hidden_size", "int", low=1),
    _model("intermediate_size", "int", low=1),
    _model("num_layers", "int", low=1, high=MOST_LAYERS),
    _model("num_heads", "int", low=1),
    _model("n_kv_heads", "int", low=1),
    _model("vocab_size", "int", low=1),
    _model("tie_word_embeddings", "bool"),
    _model("qkv_has_bias", "bool", FIXED, allowed=(True,)),
    _model("qkv_concat", "bool", default=False),
    _model("rms_norm_eps", "float", above=0, high=1),
    _model("theta", "float", above=0),
    _model("param_init_type", "dtype"),
    _model("compute_dtype", "dtype"),
    _model("layernorm_compute_type", "dtype", default="float32"),
    _model("softmax_compute_type", "dtype", default="float32"),
    _model("rotary_dtype", "dtype"),
    _model("use_past", "bool", default=True),
    _model("is_dynamic", "bool", default=True),
    _model("use_flash_attention", "bool", default=True),
    _model("block_size", "int", default=32, low=1),
    _model("num_blocks", "int", low=1),
    _model("pad_token_id", "int", low=0),
    _model("bos_token_id", "int", low=0),
    _model("eos_token_id", "ids"),
    _model("do_sample", "bool", default=False),
    _model("temperature", "float", default=1.0, low=0),
    _model("top_k", "int", default=0, low=0),
    _model("top_p", "float", default=1.0, above=0, high=1),
    _model("min_p", "float", default=0.0, low=0, high=1),
    _model("repetition_penalty", "float", default=1.0, above=0),
    _model("presence_penalty", "float", default=0.0, low=-2, high=2),
    _model("frequency_penalty", "float", default=0.0, low=-2, high=2),
    _model("no_repeat_ngram_size", "int", default=0, low=0),
    _model("min_new_tokens", "int", default=0, low=0),
    _model("max_decode_length", "int", low=1),
    _model("max_new_tokens", "int", low=1),
    _model("max_position_embedding", "int", low=1),

    _model("moe_config.expert_num", "int", FIXED, allowed=(1,)),
    _model("moe_config", "section", INERT),
    _model("offset", "any", FIXED, allowed=(0,)),
    _model("extend_method", "str", FIXED, allowed=("None",)),
    _model("scaling_factor", "any", FIXED, allowed=(1, None)),
    _model("attn_proj_has_bias", "bool", FIXED, allowed=(False,)),
    _model("quant_config", "any", FIXED, allowed=(None, {})),
    # MindFormers' names. The checkpoint itself says how it is quantised; these only have to agree with it.
    _model("quantization_config.weight_dtype", "str", allowed=("int4", "int8")),
    _model("quantization_config.group_size", "int", low=-1),
    *[_model(f"quantization_config.{name}", "str", FIXED, allowed=("none", None))
      for name in ("activation_dtype", "kvcache_dtype")],
    _model("quantization_config.quant_method", "str", INERT),
    _model("quantization_config.modules_to_not_convert", "list", INERT),
    _model("checkpoint_name_or_path", "str", FIXED, allowed=("", None)),
    *_each(MODEL, "use_rope_slice fused_rms_norm residual_dtype embedding_init_type use_attn_mask_compression "
                  "rmsnorm_compute_2d init_method_std llm_backend parallel_decoding_params", "any", DEVICE),
    *_each(MODEL, "emb_dropout_prob max_position_embeddings rotary_pct rotary_emb_base kv_channels use_past_shard "
                  "use_kbk_infer compute_in_2d use_paged_attention auto_map multiple_of ffn_dim_multiplier "
                  "ignore_token_id parallel_optimizer fine_grain_interleave pp_interleave_num use_ring_attention "
                  "use_eod_attn_mask_compression input_sliced_sig calculate_per_token_loss chunk_prefill hidden_act "
                  "initializer_range hidden_dropout attention_dropout pet_config", "any", INERT),

    Key("processor.type", "str", INERT),
    Key("processor.return_tensors", "str", INERT),
    Key(TOKENIZER + "type", "str", FIXED, allowed=("Qwen2Tokenizer",)),
    Key(TOKENIZER + "vocab_file", "path"),
    Key(TOKENIZER + "merges_file", "path"),
    Key(TOKENIZER + "model_max_length", "int", low=1),
    *_each(TOKENIZER, "unk_token bos_token eos_token pad_token errors padding_side truncation_side", "str", USED),
    Key(TOKENIZER + "chat_template", "str"),
    *_each(TOKENIZER, "add_prefix_space add_bos_token add_eos_token split_special_tokens "
                                   "clean_up_tokenization_spaces", "bool", USED),
    Key(TOKENIZER + "additional_special_tokens", "list"),
    *_each(TOKENIZER, "auto_register tokenizer_class", "any", DEVICE),

    Key("context.device_target", "str", allowed=TARGETS, default="auto"),
    Key("context.device_id", "int", low=0),
    Key("context.max_device_memory", "size"),
    Key("context.runtime_num_threads", "int", low=1, high=MOST_THREADS),
    Key("context.mode", "int", DEVICE, low=0, high=1),
    Key("context.ascend_config", "section", DEVICE),
    Key("context.jit_config", "section", DEVICE),
    *_each("context.", "save_graphs save_graphs_path max_call_depth mempool_block_size memory_optimize_level "
                       "enable_graph_kernel graph_kernel_flags jit_level deterministic enable_compile_cache "
                       "compile_cache_path save_compile_cache load_compile_cache op_timeout pynative_synchronize "
                       "debug_level precompile_only inter_op_parallel_num affinity_cpu_list disable_format_transform "
                       "infer_boost variable_memory_max_size enable_reduce_precision print_file_path "
                       "env_config_path check_bprop reserve_class_name_in_scope grad_for_scalar "
                       "aoe_tune_mode auto_tune_mode dataset_broadcast_opt_level", "any", DEVICE),
    *_each("context.", "aoe_config gpu_config memory_offload", "section", DEVICE),

    *_each("parallel.", "parallel_mode full_batch search_mode gradients_mean enable_alltoall strategy_ckpt_save_file "
                        "strategy_ckpt_load_file loss_repeated_mean gradient_fp32_sync dataset_strategy device_num "
                        "global_rank auto_parallel_search_mode parameter_broadcast pipeline_stages comm_fusion "
                        "force_fp32_communication", "any", DEVICE),
    Key("parallel.strategy_ckpt_config", "section", DEVICE),
    Key("parallel.enable_parallel_optimizer", "any", INERT),
    Key("parallel.parallel_optimizer_config", "section", INERT),

    *_each("", "load_ckpt_format load_ckpt_async resume_training remote_save_url micro_batch_interleave_num do_eval "
               "eval_step_interval eval_epoch_interval ignore_data_skip data_skip_steps auto_tune filepath_prefix "
               "autotune_per_step profile profile_start_step profile_stop_step init_start_profile "
               "profile_communication profile_memory profile_rank_ids profile_pipeline profile_level mstx "
               "layer_scale layer_decay lr_scale lr_scale_factor remove_redundancy print_separate_loss save_file "
               "input_data predict_batch_size adapter_id callbacks eval_callbacks train_precision_sync "
               "infer_precision_sync postprocess_use_numpy exclude_cann_cpu balanced_load "
               "use_legacy_format", "any", INERT),
    Key("moe_config.expert_num", "int", FIXED, allowed=(1,)),
    Key("trainer.type", "str", DEVICE),  # MindFormers' Trainer needs it
    *_each("", "trainer runner_config runner_wrapper optimizer lr_schedule train_dataset train_dataset_task "
               "eval_dataset eval_dataset_task metric recompute_config swap_config monitor_config moe_config",
           "section", INERT),
]

KEYS: Dict[str, Key] = {row.name: row for row in _ROWS}
"""Every key by its dotted path. A key of kind `section` takes everything below it."""

SECTIONS = frozenset(name[:at] for name in KEYS for at, letter in enumerate(name) if letter == ".")
"""Every section that holds rows of the table: `model`, `model.model_config`, ..."""


def find(name: str) -> Optional[Key]:
    """The row that answers for `name`: its own, or that of the free section it lies in. None for an unknown key."""
    if name in KEYS:
        return KEYS[name]
    at = name.rfind(".")
    while at > 0:
        row = KEYS.get(name[:at])
        if row is not None:
            return row if row.kind in ("section", "any") else None
        at = name.rfind(".", 0, at)
    return None


def unknown_part(name: str) -> str:
    """The shortest prefix of an unknown `name` that is neither a key nor a section."""
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        prefix = ".".join(parts[:count])
        if prefix not in SECTIONS and find(prefix) is None:
            return prefix
    return name


def suggestion(name: str) -> Optional[str]:
    """What the user may have meant by the unknown key `name`, as a sentence."""
    section, _, word = name.rpartition(".")
    siblings = {known[len(section) + 1:].split(".")[0] if section else known.split(".")[0]
                for known in KEYS if not section or known.startswith(f"{section}.")}
    near = did_you_mean(word, siblings)
    if near:
        return near
    elsewhere = sorted(known for known in KEYS if known.rpartition(".")[2] == word)
    if elsewhere:
        return f"Did you mean {elsewhere[0]}?"
    return f"Keys of {section}: {', '.join(sorted(siblings)[:12])}, ..." if section and siblings else None


def convert(key: Key, value: Any, plain: bool = True) -> Any:
    """`value` as the type that `key` wants.

    Args:
        value: as YAML, argparse or a caller gave it; None means "not given" and stays None.
        plain: False when it was written in quotes, which makes a number a text.

    Raises:
        ValueError: with the rest of the sentence "`key` ...".
    """
    if value is None and not (key.role == FIXED and None in key.allowed):
        return None
    kind = key.kind
    if kind == "section" and not isinstance(value, dict):
        raise ValueError(f"is a section, not the value {value!r}")
    if kind == "bool" and not isinstance(value, bool):
        raise ValueError(f"wants True or False, not {_shown(value)}")
    if kind == "int":
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"wants a whole number, not {_shown(value)}")
    if kind == "float":
        value = _to_float(value, plain)
    if kind in ("str", "path", "dtype", "size") and not isinstance(value, str):
        raise ValueError(f"wants a text, not {_shown(value)}")
    if kind == "list" and not isinstance(value, list):
        raise ValueError(f"wants a list, not {_shown(value)}")
    if kind == "dtype" and value not in DTYPES:
        near = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}.get(value.lower())
        hint = f" (write {near})" if near else ""
        raise ValueError(f"wants one of {', '.join(DTYPES)}, not {value!r}{hint}")
    if kind == "size":
        size_bytes(value)
    if kind == "ids":
        value = _to_ids(value)
    if kind in ("int", "float"):
        _check_bounds(key, value)
    if key.allowed and not any(value == allowed and isinstance(value, bool) == isinstance(allowed, bool)
                               for allowed in key.allowed):
        if key.role == FIXED:
            shown = " or ".join(_shown(allowed) for allowed in key.allowed if allowed is not None)
            raise ValueError(f"supports only {shown}, not {_shown(value)}")
        raise ValueError(f"wants one of {', '.join(map(str, key.allowed))}, not {_shown(value)}")
    return value


def size_bytes(text: str) -> int:
    """Bytes of a memory size as MindSpore writes it: `59GB` is 59 x 2^30.

    Raises:
        ValueError: it is not a number followed by GB.
    """
    number = text.strip()[:-2] if text.strip().upper().endswith("GB") else ""
    try:
        size = float(number)
    except ValueError:
        size = -1.0
    if not 0 < size < 2 ** 20:
        raise ValueError(f"wants a size such as 59GB, not {text!r}")
    return int(size * 2 ** 30)


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return f"the text {value!r}"
    return str(value) if isinstance(value, (bool, int, float)) else f"{type(value).__name__} {reprlib.repr(value)}"


def _to_float(value: Any, plain: bool) -> float:
    # YAML 1.1 reads 1e-6 as a text, because there is no dot in it; nobody who writes it without quotes means a text.
    if isinstance(value, str) and plain:
        try:
            value = float(value)
        except ValueError:
            pass
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST_FLOAT:
        raise ValueError(f"wants a number, not {_shown(value)}")
    return float(value)


def _to_ids(value: Any) -> Tuple[int, ...]:
    values = value if isinstance(value, (list, tuple)) else [value]
    if not values or any(isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in values):
        raise ValueError(f"wants a token id or a list of them, not {_shown(value)}")
    return tuple(dict.fromkeys(values))


def _check_bounds(key: Key, value: float) -> None:
    if key.low is not None and value < key.low:
        raise ValueError(f"must be at least {key.low}, not {value}")
    if key.above is not None and value <= key.above:
        raise ValueError(f"must be above {key.above}, not {value:g}")
    high = key.high if key.high is not None or key.kind == "float" else _LARGEST_INT
    if high is not None and value > high:
        raise ValueError(f"must be at most {high}, not {value}")
