"""Write the prediction YAML of a checkpoint from its config.json: `python -m qwen15.make_yaml --checkpoint DIR`."""

from dataclasses import dataclass
from typing import Any, List, Optional, Tuple

from .naming import Dims

CHATML = ("{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
          "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
          "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
"""Qwen's ChatML: a default system message when there is none, then each message in its own frame."""


@dataclass(frozen=True)
class Recipe:
    """What a prediction YAML says; `render` writes it out.

    Attributes:
        title: the first comment line.
        sampling: (key, value) pairs of the generation settings.
        dtype: of weights and computation, None to follow the checkpoint.
        chat_template: Jinja text, None to leave it to the checkpoint's tokenizer_config.json.
        tokens: (unk_token, eos_token, pad_token).
    """

    title: str
    dims: Dims
    rms_norm_eps: float
    theta: float
    seq_length: int
    block_size: int
    num_blocks: int
    dtype: Optional[str]
    eos_token_id: Tuple[int, ...]
    pad_token_id: int
    bos_token_id: int
    max_decode_length: int
    sampling: Tuple[Tuple[str, Any], ...]
    model_parallel: int
    vocab_emb_dp: bool
    max_device_memory: str
    model_max_length: int
    tokens: Tuple[str, str, str]
    chat_template: Optional[str]


def render(recipe: Recipe) -> str:
    """The YAML file of a recipe."""
    dims = recipe.dims
    eos = recipe.eos_token_id[0] if len(recipe.eos_token_id) == 1 else list(recipe.eos_token_id)
    parallel = recipe.model_parallel > 1
    unk, eos_token, pad = recipe.tokens
    lines = [
        f"# {recipe.title}",
        "# --print_config shows every value and where it came from. All keys: docs/configuration.md.",
        "seed: 0",
        "load_checkpoint: ''            # converted checkpoint: a file, a folder, or a folder with rank_0, rank_1, ...",
        "auto_trans_ckpt: False         # True: each rank cuts its slice out of a whole checkpoint",
        "use_past: True                 # KV cache",
        f"use_parallel: {parallel}",
        "run_mode: 'predict'",
        "",
        f"# {recipe.model_parallel} workers, when use_parallel is True" if parallel else "# one worker",
        "parallel_config:",
        "  data_parallel: 1",
        f"  model_parallel: {recipe.model_parallel}",
        "  pipeline_stage: 1",
        "  micro_batch_num: 1",
        f"  vocab_emb_dp: {recipe.vocab_emb_dp}" + ("" if recipe.vocab_emb_dp else
                                                    "          # embedding and head are cut along the vocabulary"),
        "  gradient_aggregation_group: 4",
        "",
        "model:",
        "  model_config:",
        "    type: LlamaConfig",
        "    batch_size: 1",
        f"    seq_length: {recipe.seq_length}",
        f"    hidden_size: {dims.hidden_size}",
        f"    num_layers: {dims.num_layers}",
        f"    num_heads: {dims.num_heads}",
        f"    n_kv_heads: {dims.num_kv_heads}",
        f"    vocab_size: {dims.vocab_size}",
        f"    intermediate_size: {dims.intermediate_size}",
        "    qkv_has_bias: True",
        f"    tie_word_embeddings: {dims.tie_word_embeddings}",
        f"    rms_norm_eps: {_number(recipe.rms_norm_eps)}",
        f"    theta: {recipe.theta}",
        f"    eos_token_id: {eos}",
        f"    pad_token_id: {recipe.pad_token_id}",
        f"    bos_token_id: {recipe.bos_token_id}",
        *_dtype_lines(recipe.dtype),
        '    layernorm_compute_type: "float32"',
        '    softmax_compute_type: "float32"',
        "    use_past: True",
        "    is_dynamic: True",
        "    use_flash_attention: True",
        "    qkv_concat: False",
        f"    block_size: {recipe.block_size}",
        f"    num_blocks: {recipe.num_blocks}              # KV cache: block_size x num_blocks = "
        f"{recipe.block_size * recipe.num_blocks} tokens",
        f"    max_decode_length: {recipe.max_decode_length}       # total length, prompt included",
        *(f"    {key}: {value}" for key, value in recipe.sampling),
        "  arch:",
        "    type: LlamaForCausalLM",
        "",
        "processor:",
        "  tokenizer:",
        "    type: Qwen2Tokenizer",
        f"    model_max_length: {recipe.model_max_length}",
        '    vocab_file: "/path/vocab.json"      # left like this: the one beside the checkpoint',
        '    merges_file: "/path/merges.txt"',
        f'    unk_token: "{unk}"',
        f'    eos_token: "{eos_token}"',
        f'    pad_token: "{pad}"',
        *([f"    chat_template: {_quoted(recipe.chat_template)}"] if recipe.chat_template else []),
        "",
        "context:",
        "  mode: 0",
        '  device_target: "auto"          # Ascend when there is one, otherwise CPU',
        f'  max_device_memory: "{recipe.max_device_memory}"      # Ascend only, like everything below',
        "  max_call_depth: 10000",
        "  ascend_config:",
        '    precision_mode: "must_keep_origin_dtype"',
        "",
        "parallel:",
        "  parallel_mode: 1",
        "  full_batch: True",
        '  search_mode: "sharding_propagation"',
        "  gradients_mean: False",
        "  strategy_ckpt_config:",
        '    save_file: "./ckpt_strategy.ckpt"',
    ]
    return "\n".join(lines) + "\n"


def _dtype_lines(dtype: Optional[str]) -> List[str]:
    if dtype is None:
        return ["    # param_init_type, compute_dtype, rotary_dtype: as the checkpoint's config.json says"]
    return [f'    param_init_type: "{dtype}"    # dtype of the weights; float32 is more precise and slower',
            f'    compute_dtype: "{dtype}"',
            f'    rotary_dtype: "{dtype}"']


def _number(value: float) -> str:
    """`1.0e-6`: YAML reads a number without a dot before its exponent as a text."""
    mantissa, _, exponent = f"{value:e}".partition("e")
    mantissa = mantissa.rstrip("0")
    return f"{mantissa}{'0' if mantissa.endswith('.') else ''}e{int(exponent)}"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
