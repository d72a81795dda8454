"""A checked configuration: what a run needs to know, as frozen dataclasses. `load.load_config` makes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, Mapping, Optional, Tuple

from ..naming import Dims


@dataclass(frozen=True)
class Quantization:
    """What the YAML says about the checkpoint's quantisation; the checkpoint has to agree.

    Attributes:
        weight_dtype: 'int4' or 'int8' of the layers' matrices, None when it is not said.
        group_size: inputs that share a scale; 0 or -1 for whole rows, None when it is not said.
        where: key -> the file and line that say so.
    """

    weight_dtype: Optional[str]
    group_size: Optional[int]
    where: Mapping[str, str]


@dataclass(frozen=True)
class ModelConfig:
    """The network: sizes, constants, dtypes, cache.

    Attributes:
        dims: the sizes that fix every weight's shape.
        rms_norm_eps, theta: epsilon of RMSNorm, base of the rotary angles.
        seq_length: rows of the rotary table = longest sequence in tokens, prompt included.
        param_init_type, compute_dtype, layernorm_compute_type, softmax_compute_type, rotary_dtype: 'float32',
            'float16' or 'bfloat16'. Weights are kept in param_init_type, the KV cache in compute_dtype.
        block_size, num_blocks: the KV cache holds num_blocks blocks of block_size tokens, shared by all sequences.
        batch_size: sequences that run together.
        eos_token_id: every id that ends a sequence; empty when none is known.
        quantization: what is said about the checkpoint's quantisation, None for nothing.
    """

    dims: Dims
    rms_norm_eps: float
    theta: float
    seq_length: int
    param_init_type: str
    compute_dtype: str
    layernorm_compute_type: str
    softmax_compute_type: str
    rotary_dtype: str
    use_past: bool
    is_dynamic: bool
    use_flash_attention: bool
    qkv_concat: bool
    block_size: int
    num_blocks: int
    batch_size: int
    pad_token_id: int
    bos_token_id: int
    eos_token_id: Tuple[int, ...]
    quantization: Optional[Quantization] = None


@dataclass(frozen=True)
class GenerationConfig:
    """How tokens are chosen and when generation ends.

    Attributes:
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens up to this total probability; 1.0 keeps all.
        repetition_penalty: 1.0 is none.
        min_p: keep tokens with this part of the likeliest one's probability; 0 keeps all.
        presence_penalty, frequency_penalty, no_repeat_ngram_size, min_new_tokens: 0 is none.
        max_length: TOTAL length in tokens, prompt included.
        max_new_tokens: continuation's length in tokens; whichever of the two limits comes first ends it.
        seed: None draws differently at every run.
    """

    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    max_length: int
    max_new_tokens: Optional[int]
    seed: Optional[int]
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    min_new_tokens: int = 0


@dataclass(frozen=True)
class SpeculationConfig:
    """How tokens are guessed.

    Attributes:
        tokens: most guesses of a sequence in one step.
        draft: the configuration of the model that guesses; None looks them up in the text itself.
    """

    tokens: int
    draft: Optional["Config"]


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is spread over workers; `model_parallel` is 1 unless `use_parallel`."""

    use_parallel: bool
    model_parallel: int
    vocab_emb_dp: bool


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer's files and its other settings (unk_token, pad_token, model_max_length, chat_template, ...)."""

    vocab_file: Optional[str]
    merges_file: Optional[str]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Config:
    """Everything a run needs to know; built by `load.load_config` only.

    Attributes:
        device_target: 'CPU' or 'Ascend', `auto` already decided; device_note says why.
        device_id: the card, None lets the launcher or MindSpore choose.
        threads: CPU threads, None lets the kernels choose.
        load_checkpoint: file or folder, None when nobody gave one.
        context: the YAML's `context` section.
        max_device_memory_bytes: what a card may use, None when the YAML does not say.
        effective: every key with its final value, nested as MindFormers wants it.
        sources: where each dotted key's value came from: `default`, `/path/config.json`, `file.yaml:31` or `--flag`.
        notes: lines a command should show on stderr: keys without effect, values that override the checkpoint's.
        speculation: None when nothing is guessed.
    """

    model: ModelConfig
    generation: GenerationConfig
    parallel: ParallelConfig
    tokenizer: TokenizerConfig
    device_target: str
    device_note: str
    device_id: Optional[int]
    threads: Optional[int]
    load_checkpoint: Optional[str]
    auto_trans_ckpt: bool
    run_mode: str
    context: Mapping[str, Any]
    max_device_memory_bytes: Optional[int]
    effective: Dict[str, Any]
    sources: Mapping[str, str]
    notes: Tuple[str, ...]
    speculation: Optional[SpeculationConfig] = None
