"""Write the prediction YAML of a checkpoint from its config.json: `qwen15 make-yaml --checkpoint DIR`."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from typing import Any, List, Optional, Sequence, Tuple

from .. import device, terminal
from ..ascend import mcore_yaml
from ..command_line import Parser, positive
from ..config.checkpoint_files import read_beside
from ..config.hf_config import dims_from_hf_config
from ..config.keys import KEYS, MODEL, size_bytes
from ..config.schema import ModelConfig, ParallelConfig
from ..conversion.cli import add_hub_flag
from ..errors import UserError
from ..generation import memory
from ..hub.resolve import resolve
from ..naming import Dims, indivisible
from ..text.tokenizer_config import CONFIG_NAME, default_template, read_config, read_template, token_content
from ..whole_file import write_whole

_LONGEST = 8192
_CARD = "59GB"
_RANKS = (1, 2, 4, 8)
_END = "<|endoftext|>"
_SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")


@dataclass(frozen=True)
class PredictYaml:
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


def render(contents: PredictYaml) -> str:
    """The YAML file that says it."""
    dims = contents.dims
    eos = contents.eos_token_id[0] if len(contents.eos_token_id) == 1 else list(contents.eos_token_id)
    parallel = contents.model_parallel > 1
    unk, eos_token, pad = contents.tokens
    lines = [
        f"# {contents.title}",
        "# --print_config shows every value and where it came from. All keys: docs/configuration.md.",
        "# seed: 42                    # the same text at every run; without one every run draws anew",
        "load_checkpoint: ''            # converted checkpoint: a file, a folder, or a folder with rank_0, rank_1, ...",
        "auto_trans_ckpt: False         # True: each rank cuts its slice out of a whole checkpoint",
        "use_past: True                 # KV cache",
        f"use_parallel: {parallel}",
        "run_mode: 'predict'",
        "",
        "trainer:",
        "  type: CausalLanguageModelingTrainer     # for MindFormers' own Trainer, run_qwen1_5.py does without",
        "",
        f"# {contents.model_parallel} workers, when use_parallel is True" if parallel else "# one worker",
        "parallel_config:",
        "  data_parallel: 1",
        f"  model_parallel: {contents.model_parallel}",
        "  pipeline_stage: 1",
        "  micro_batch_num: 1",
        f"  vocab_emb_dp: {contents.vocab_emb_dp}" + ("" if contents.vocab_emb_dp else
                                                    "          # embedding and head are cut along the vocabulary"),
        "  gradient_aggregation_group: 4",
        "",
        "model:",
        "  model_config:",
        "    type: LlamaConfig",
        "    batch_size: 1",
        f"    seq_length: {contents.seq_length}",
        f"    hidden_size: {dims.hidden_size}",
        f"    num_layers: {dims.num_layers}",
        f"    num_heads: {dims.num_heads}",
        f"    n_kv_heads: {dims.num_kv_heads}",
        f"    vocab_size: {dims.vocab_size}",
        f"    intermediate_size: {dims.intermediate_size}",
        "    qkv_has_bias: True",
        f"    tie_word_embeddings: {dims.tie_word_embeddings}",
        f"    rms_norm_eps: {_number(contents.rms_norm_eps)}",
        f"    theta: {contents.theta}",
        f"    eos_token_id: {eos}",
        f"    pad_token_id: {contents.pad_token_id}",
        f"    bos_token_id: {contents.bos_token_id}",
        *_dtype_lines(contents.dtype),
        '    layernorm_compute_type: "float32"',
        '    softmax_compute_type: "float32"',
        "    use_past: True",
        "    is_dynamic: True",
        "    use_flash_attention: True",
        "    qkv_concat: False",
        f"    block_size: {contents.block_size}",
        f"    num_blocks: {contents.num_blocks}              # KV cache: block_size x num_blocks = "
        f"{contents.block_size * contents.num_blocks} tokens",
        f"    max_decode_length: {contents.max_decode_length}       # total length, prompt included",
        *(f"    {key}: {value}" for key, value in contents.sampling),
        "  arch:",
        "    type: LlamaForCausalLM",
        "",
        "processor:",
        "  tokenizer:",
        "    type: Qwen2Tokenizer",
        "    auto_register: qwen1_5_tokenizer.Qwen2Tokenizer     # where MindFormers' own Trainer finds it",
        f"    model_max_length: {contents.model_max_length}",
        '    vocab_file: "/path/vocab.json"      # left like this: the one beside the checkpoint',
        '    merges_file: "/path/merges.txt"',
        f'    unk_token: "{unk}"',
        f'    eos_token: "{eos_token}"',
        f'    pad_token: "{pad}"',
        *([f"    chat_template: {_quoted(contents.chat_template)}"] if contents.chat_template else []),
        "",
        "context:",
        "  mode: 0",
        '  device_target: "auto"          # Ascend when there is one, otherwise CPU',
        f'  max_device_memory: "{contents.max_device_memory}"      # Ascend only, like everything below',
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


def yaml_for(checkpoint: str, model_parallel: Optional[int] = None, name: Optional[str] = None) -> PredictYaml:
    """The YAML's contents for a Hugging Face folder of the Qwen2ForCausalLM architecture.

    Args:
        checkpoint: folder with config.json, and generation_config.json and tokenizer_config.json where it has them.
        model_parallel: ranks; None takes the fewest of 1, 2, 4, 8 on which a 64 GB card has room.
        name: the model's, for the first line; None for the folder's.

    Raises:
        UserError: no such folder, a model that is not supported (by name), or ranks that do not divide it.
    """
    if not os.path.isdir(checkpoint):
        raise UserError("is not a folder", checkpoint, "Give the downloaded model's folder, the one with config.json, "
                        "or the model's name on a hub: OWNER/NAME.")
    beside = read_beside(checkpoint)
    hf = beside.hf or dims_from_hf_config(checkpoint)
    generation = {name: beside.from_generation(name)[0]
                  for name in ("eos_token_id", "pad_token_id", "bos_token_id", *_SAMPLING)}
    tokenizer_path = os.path.join(checkpoint, CONFIG_NAME)
    tokenizer, template = read_config(tokenizer_path), read_template(checkpoint)
    longest = hf.max_position_embeddings or _LONGEST
    seq_length, block_size = _lengths(min(longest, _LONGEST))
    eos = generation["eos_token_id"] or hf.eos_token_ids
    end = eos[0] if eos else 0
    pad, bos = (_first(generation[name], getattr(hf, name), end) for name in ("pad_token_id", "bos_token_id"))
    if not eos:
        raise UserError("no eos_token_id in config.json or generation_config.json", checkpoint,
                        "Add it to config.json: without it answers do not end.")
    sampling = tuple((name, _first(generation[name], KEYS[MODEL + name].default)) for name in _SAMPLING)
    length = tokenizer.get("model_max_length")

    def token(role: str) -> str:
        return token_content(tokenizer.get(role), role, tokenizer_path) or _END

    sequences = 2 if hf.dims.num_kv_heads == hf.dims.num_heads else 4
    contents = PredictYaml(
        title=f"{name or _folder_name(checkpoint)}: written by qwen15 make-yaml from its config.json.",
        dims=hf.dims, rms_norm_eps=hf.rms_norm_eps, theta=hf.rope_theta, seq_length=seq_length, block_size=block_size,
        num_blocks=sequences * seq_length // block_size, dtype=hf.torch_dtype, eos_token_id=tuple(eos),
        pad_token_id=pad, bos_token_id=bos, max_decode_length=min(2048, seq_length), sampling=sampling,
        model_parallel=1, vocab_emb_dp=True, max_device_memory=_CARD,
        model_max_length=length if isinstance(length, int) and length < 2 ** 31 else longest,
        tokens=(token("unk_token"), token("eos_token"), token("pad_token")),
        chat_template=default_template(tokenizer.get("chat_template"), tokenizer_path) if template is None
        else template)
    return _spread(contents, model_parallel, checkpoint)


def _folder_name(checkpoint: str) -> str:
    return os.path.basename(os.path.abspath(checkpoint))


def _spread(contents: PredictYaml, model_parallel: Optional[int], where: str) -> PredictYaml:
    """Choose the ranks; more than one cut the vocabulary as well where it divides."""
    if model_parallel is not None:
        why = indivisible(contents.dims, model_parallel)
        if why:
            raise UserError(why, "--model_parallel")
        return replace(contents, model_parallel=model_parallel, vocab_emb_dp=model_parallel == 1)
    for ranks in _RANKS:
        spread = replace(contents, model_parallel=ranks, vocab_emb_dp=ranks == 1)
        if indivisible(contents.dims, ranks) is None and card_bytes(spread) <= size_bytes(_CARD):
            return spread
    raise UserError(f"does not fit on {_RANKS[-1]} cards of {_CARD}", where, "Give --model_parallel.")


def card_bytes(contents: PredictYaml) -> int:
    """Bytes on each Ascend card."""
    dtype = contents.dtype or "bfloat16"
    model = ModelConfig(
        dims=contents.dims, rms_norm_eps=contents.rms_norm_eps, theta=contents.theta, seq_length=contents.seq_length,
        param_init_type=dtype, compute_dtype=dtype, layernorm_compute_type="float32", softmax_compute_type="float32",
        rotary_dtype=dtype, use_past=True, is_dynamic=True, use_flash_attention=True, qkv_concat=False,
        block_size=contents.block_size, num_blocks=contents.num_blocks, batch_size=1,
        pad_token_id=contents.pad_token_id, bos_token_id=contents.bos_token_id, eos_token_id=contents.eos_token_id)
    parallel = ParallelConfig(contents.model_parallel > 1, contents.model_parallel, contents.vocab_emb_dp)
    return memory.need(model, parallel, device.ASCEND).total_bytes


def _lengths(longest: int) -> Tuple[int, int]:
    """(seq_length, block_size): the length divides into blocks, as block tables on Ascend want."""
    for block in (32, 16):
        if longest >= block:
            return longest // block * block, block
    return longest, longest


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def parser() -> Parser:
    """The flags."""
    made = Parser("qwen15 make-yaml", (
        "Write the prediction YAML of a Qwen1.5, Qwen2 or Qwen2.5 checkpoint (Qwen2ForCausalLM, dense) from its "
        "config.json."), ["qwen15 make-yaml --checkpoint models/Qwen2.5-7B-Instruct --output predict_qwen2_5_7b.yaml",
                         "qwen15 make-yaml --checkpoint Qwen/Qwen2.5-7B-Instruct"])
    made.add_argument("--checkpoint", required=True, metavar="DIR",
                      help="the downloaded model's folder, or its name on a hub, OWNER/NAME[@REVISION], which fetches "
                           "the whole model")
    add_hub_flag(made)
    made.add_argument("--output", metavar="FILE",
                        help="YAML file to write, stdout by default; one that is there is not overwritten")
    made.add_argument("--model_parallel", type=positive, metavar="N",
                        help="workers; by default the fewest of 1, 2, 4, 8 on which it fits into 59 GB cards")
    made.add_argument("--mcore", action="store_true",
                      help="write it for MindFormers' newer network (use_legacy: False), which reads the folder itself")
    return made


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Command line: writes the YAML; exit code 0.

    Raises:
        UserError: the checkpoint cannot be read or run, or the file to write is there already.
    """
    args = parser().parse_args(argv)
    folder = resolve(args.checkpoint, args.hub)
    name = _folder_name(folder) if folder == args.checkpoint else args.checkpoint
    contents = yaml_for(folder, args.model_parallel, name)
    text = _mcore(contents, folder, name) if args.mcore else render(contents)
    needs = (f"{contents.model_parallel} card(s), {memory.gib(card_bytes(contents))} on each; KV cache "
             f"{contents.block_size * contents.num_blocks} tokens")
    if args.output is None:
        print(text, end="")
    else:
        _write_new(args.output, text)
    print(terminal.line(f"{args.output or 'stdout'}: {needs}"), file=sys.stderr)
    return 0


def _mcore(contents: PredictYaml, checkpoint: str, name: str) -> str:
    """The YAML of MindFormers' newer network, which reads the folder itself."""
    return mcore_yaml.render(checkpoint, name, contents.dtype or "bfloat16", contents.seq_length, contents.block_size,
                             contents.num_blocks, contents.model_parallel, contents.max_device_memory)


def _write_new(path: str, text: str) -> None:
    try:
        write_whole(path, text.encode("utf-8"), replace=False)
    except FileExistsError:
        raise UserError("is there already", path, "Choose another --output, or move it away.") from None
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", path) from None
