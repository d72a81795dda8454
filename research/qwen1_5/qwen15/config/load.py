"""One checked configuration from defaults, the checkpoint's own config.json, a YAML file and the command line."""

import os
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from .. import device
from ..errors import UserError
from ..family import looks_like, yaml_name
from ..json_file import read_json
from ..naming import Dims, indivisible
from . import yaml_lines
from .flags import Flag, add_flags, boolean, flags_from  # noqa: F401  (part of this module's interface)
from .hf_config import CONFIG_FILE, HfConfig, dims_from_hf_config
from .keys import (
    DEVICE,
    FIXED,
    INERT,
    KEYS,
    MODEL,
    TOKENIZER,
    USED,
    convert,
    find,
    size_bytes,
    suggestion,
    unknown_part,
)

_GENERATION_FILE = "generation_config.json"
_LONGEST_DEFAULT = 8192
_QWEN_END = 151643
_QWEN_IM_END = 151645


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


@dataclass(frozen=True)
class GenerationConfig:
    """How tokens are chosen and when generation ends.

    Attributes:
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens up to this total probability; 1.0 keeps all.
        repetition_penalty: 1.0 is none.
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


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is spread over workers; `model_parallel` is 1 unless `use_parallel`."""

    use_parallel: bool
    data_parallel: int
    model_parallel: int
    pipeline_stage: int
    vocab_emb_dp: bool


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer's files and its other settings (unk_token, pad_token, model_max_length, chat_template, ...)."""

    vocab_file: Optional[str]
    merges_file: Optional[str]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Config:
    """Everything a run needs to know; built by `load_config` only.

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


def checkpoint_folders(path: str) -> List[str]:
    """Folders in which a checkpoint's own config.json, vocab.json and merges.txt may lie, nearest first.

    The checkpoint is a file, a folder, a folder with rank_0, or one of those rank folders.
    """
    folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
    folders = [folder]
    if os.path.isdir(os.path.join(folder, "rank_0")):
        folders.append(os.path.join(folder, "rank_0"))
    if os.path.basename(os.path.abspath(folder)).startswith("rank_"):
        folders.append(os.path.dirname(os.path.abspath(folder)))
    return folders


def load_config(yaml_path: Optional[str], flags: Sequence[Flag] = (), options: Sequence[str] = (),
                environ: Optional[Mapping[str, str]] = None) -> Config:
    """Read and check a configuration.

    Values come from, each overriding the one before: defaults, the checkpoint's config.json and generation_config.json,
    the YAML, the command line.

    Args:
        yaml_path: the YAML file; None when the checkpoint's own config.json and the flags say it all.
        flags: flags that were given.
        options: `dotted.key=value` settings; the value is YAML.
        environ: the launcher's variables (MS_WORKER_NUM, RANK_SIZE, DEVICE_ID); by default this process's environment.

    Raises:
        UserError: an unknown key, a wrong type, a contradiction; with file and line or the flag, and what to do.
    """
    environ = os.environ if environ is None else environ
    if yaml_path is None:
        document = yaml_lines.Document("no --config", (), {})
    else:
        document = yaml_lines.read(os.path.expanduser(yaml_path))
    values = _Values(document)
    values.take_command_line(flags, options)
    return _Builder(values, environ).build()


class _Values:
    """The given values by dotted key, with where each was given."""

    def __init__(self, document: yaml_lines.Document):
        self.path = document.path
        self.entries: Dict[str, Any] = {}
        self.places: Dict[str, str] = {}
        self.inert: Dict[str, None] = {}
        for entry in document.entries:
            where_of = {**document.sections, entry.key: entry.where}
            self._take(entry.key, entry.value, entry.where, entry.plain, where_of)

    def take_command_line(self, flags: Sequence[Flag], options: Sequence[str]) -> None:
        given: Dict[str, Tuple[str, Any]] = {}
        for flag in flags:
            self._take_once(given, flag.key, flag.value, flag.name, True)
        for option in options:
            key, equals, text = option.partition("=")
            key = key.strip()
            if not equals or not key:
                raise UserError(f"{option!r} is not KEY=VALUE", "--options",
                                "Example: model.model_config.num_blocks=256")
            try:
                value, plain = yaml_lines.scalar(text)
            except ValueError as error:
                raise UserError(f"{key}: {text!r} {error}", "--options") from None
            self._take_once(given, key, value, "--options", plain)

    def _take_once(self, given: Dict[str, Tuple[str, Any]], key: str, value: Any, where: str, plain: bool) -> None:
        if key in given and given[key][1] != value:
            raise UserError(f"{key} is given twice: {given[key][1]} by {given[key][0]} and {value} by {where}",
                            "command line", "Keep one of them.")
        given[key] = (where, value)
        self._take(key, value, where, plain, {})

    def _take(self, name: str, value: Any, where: str, plain: bool, where_of: Mapping[str, str]) -> None:
        row = find(name)
        if row is None:
            if value in (None, {}) and any(known.startswith(f"{name}.") for known in KEYS):
                return  # a section of ours with nothing in it
            if any(known.startswith(f"{name}.") for known in KEYS):
                raise UserError(f"{name} is a section, not the value {value!r}", where, "Indent its keys below it.")
            part = unknown_part(name)
            parent = part.rpartition(".")[0]
            if parent in KEYS:
                raise UserError(f"{parent} wants a value, not a section", where_of.get(parent, where))
            raise UserError(f"{part} is not a known key", where_of.get(part, where), suggestion(part))
        if row.name != name and row.role == FIXED:
            raise UserError(f"{row.name} is not supported", where_of.get(row.name, where), "Remove it.")
        try:
            converted = convert(row, value, plain) if row.name == name else value
        except ValueError as error:
            raise UserError(f"{name} {error}", where) from None
        if row.role == INERT:
            self.inert[row.name] = None
        self.entries[name] = converted
        self.places[name] = where

    def given(self, name: str) -> bool:
        return self.entries.get(name) is not None


class _Builder:
    """Turns given values into a `Config`, keeping account of where each final value came from."""

    def __init__(self, values: _Values, environ: Mapping[str, str]):
        self.values = values
        self.environ = environ
        self.final: Dict[str, Any] = {}
        self.sources: Dict[str, str] = {}
        self.notes: List[str] = []
        self.checkpoint = self._checkpoint()
        self.folders = checkpoint_folders(self.checkpoint) if self.checkpoint else []
        self.hf = self._hf_config()
        self.hf_generation, self.hf_generation_path = self._generation_file()

    # --- where values come from

    def pick(self, name: str, *fallbacks: Tuple[Any, str]) -> Any:
        """The final value of a key: given, else the first fallback that is not None, else the table's default."""
        if self.values.given(name):
            value, source = self.values.entries[name], self.values.places[name]
        else:
            value, source = next((pair for pair in fallbacks if pair[0] is not None), (KEYS[name].default, "default"))
        self.final[name] = value
        self.sources[name] = source
        return value

    def model(self, name: str, *fallbacks: Tuple[Any, str]) -> Any:
        return self.pick(MODEL + name, *fallbacks)

    def place(self, name: str) -> str:
        """`seq_length 8192 (file.yaml:31)` of a model_config key, for messages about two values."""
        return f"{name} {_plainly(self.final[MODEL + name])} ({self.sources[MODEL + name]})"

    def from_hf(self, value: Any) -> Tuple[Any, str]:
        return (value, self.hf.where) if self.hf is not None else (None, "")

    def from_hf_generation(self, name: str) -> Tuple[Any, str]:
        """A setting of generation_config.json, checked like one of the YAML."""
        value = self.hf_generation.get(name)
        try:
            return convert(KEYS[MODEL + name], value), self.hf_generation_path
        except ValueError as error:
            raise UserError(f"{name} {error}", self.hf_generation_path) from None

    # --- the checkpoint's own files

    def _checkpoint(self) -> Optional[str]:
        given = self.values.entries.get("load_checkpoint")
        if not given:
            return None
        path = os.path.expanduser(given)
        if not os.path.exists(path):
            raise UserError(f"load_checkpoint {given!r} does not exist", self.values.places["load_checkpoint"],
                            "Give the converted checkpoint's file or folder.")
        return path

    def _hf_config(self) -> Optional[HfConfig]:
        for folder in self.folders:
            path = os.path.join(folder, CONFIG_FILE)
            if os.path.isfile(path):
                return dims_from_hf_config(path)
        return None

    def _generation_file(self) -> Tuple[Mapping[str, Any], str]:
        for folder in self.folders:
            path = os.path.join(folder, _GENERATION_FILE)
            if os.path.isfile(path):
                contents = read_json(path)
                if not isinstance(contents, dict):
                    raise UserError("is not an object of settings", path, "Download the file again.")
                return contents, path
        return {}, ""

    # --- building

    def build(self) -> Config:
        run_mode = self.pick("run_mode")
        if run_mode != "predict":
            raise UserError(f"run_mode {run_mode!r}: this module predicts only", self.sources["run_mode"],
                            "Set run_mode to predict (--run_mode predict).")
        target = self.pick("context.device_target")
        device_target, device_note = device.resolve(target, self.environ)
        self.final["context.device_target"] = device_target
        parallel = self._parallel()
        dims = self._dims()
        self._check_division(dims, parallel)
        model = self._model_config(dims, parallel, device_target)
        generation = self._generation(model)
        tokenizer = self._tokenizer()
        device_id = self._device_id()
        threads = self.pick("context.runtime_num_threads")
        memory = self.pick("context.max_device_memory")
        auto_trans = self.pick("auto_trans_ckpt")
        self.final["load_checkpoint"] = self.checkpoint or ""
        self.sources["load_checkpoint"] = self.values.places.get("load_checkpoint", "default")
        self._note_inert(device_target)
        effective = self._effective()
        return Config(model=model, generation=generation, parallel=parallel, tokenizer=tokenizer,
                      device_target=device_target, device_note=device_note, device_id=device_id, threads=threads,
                      load_checkpoint=self.checkpoint, auto_trans_ckpt=auto_trans, run_mode=run_mode,
                      context=effective.get("context", {}),
                      max_device_memory_bytes=None if memory is None else size_bytes(memory), effective=effective,
                      sources=dict(self.sources), notes=tuple(self.notes))

    def _parallel(self) -> ParallelConfig:
        use = self.pick("use_parallel")
        names = ("data_parallel", "model_parallel", "pipeline_stage")
        data, model, stages = (self.pick(f"parallel_config.{name}") for name in names)
        whole = self.pick("parallel_config.vocab_emb_dp")
        workers, variable = self._workers()
        if use and (data > 1 or stages > 1):
            name = "data_parallel" if data > 1 else "pipeline_stage"
            raise UserError(f"data_parallel {data} x model_parallel {model} x pipeline_stage {stages} = "
                            f"{data * model * stages} workers, but prediction runs over model_parallel only",
                            self.sources[f"parallel_config.{name}"], f"Set {name} to 1.")
        if use and workers is not None and workers != model:
            raise UserError(f"model_parallel {model} needs {model} worker(s), but {workers} were started "
                            f"({variable}={workers})", self.sources["parallel_config.model_parallel"],
                            f"Start {model}, or set --options parallel_config.model_parallel={workers}")
        if not use and workers is not None and workers > 1:
            raise UserError(f"use_parallel is False, but {workers} workers were started ({variable}={workers}); each "
                            "would run the whole model", self.sources["use_parallel"],
                            "Set --use_parallel True, or start one worker.")
        return ParallelConfig(use, data, model if use else 1, stages, whole)

    def _workers(self) -> Tuple[Optional[int], str]:
        for variable in ("MS_WORKER_NUM", "RANK_SIZE"):
            text = self.environ.get(variable, "")
            if text.strip().isdigit():
                return int(text), variable
        return None, ""

    def _dims(self) -> Dims:
        hf = self.hf.dims if self.hf is not None else None
        named = (("hidden_size", "hidden_size"), ("num_layers", "num_layers"), ("num_heads", "num_heads"),
                 ("n_kv_heads", "num_kv_heads"), ("intermediate_size", "intermediate_size"),
                 ("vocab_size", "vocab_size"), ("tie_word_embeddings", "tie_word_embeddings"))
        sizes = {}
        for key, field in named:
            sizes[field] = self.model(key, self.from_hf(getattr(hf, field, None)))
        missing = [key for key, field in named[:3] + named[4:6] if sizes[field] is None]
        if missing:
            raise UserError(f"{MODEL}{missing[0]} is missing"
                            + (f" (and {', '.join(missing[1:])})" if missing[1:] else ""), self.values.path,
                            "Give it, or a load_checkpoint with its config.json beside it.")
        if sizes["num_kv_heads"] is None:
            sizes["num_kv_heads"] = self.model("n_kv_heads", (sizes["num_heads"], "default"))
        if sizes["tie_word_embeddings"] is None:
            sizes["tie_word_embeddings"] = self.model("tie_word_embeddings", (False, "default"))
        if hf is not None:
            self._compare(named, sizes, hf)
        if sizes["num_heads"] % sizes["num_kv_heads"]:
            raise UserError(f"{self.place('num_heads')} is not a multiple of {self.place('n_kv_heads')}",
                            fix=_size_hint(sizes))
        if hf is None and sizes["hidden_size"] % sizes["num_heads"]:
            raise UserError(f"{self.place('hidden_size')} is not divisible by {self.place('num_heads')}",
                            fix=_size_hint(sizes))
        head_dim = hf.head_dim if hf is not None else sizes["hidden_size"] // sizes["num_heads"]
        if head_dim % 2:
            raise UserError(f"head size {head_dim} = {self.place('hidden_size')} / {self.place('num_heads')} is odd; "
                            "rotary embedding turns pairs", fix=_size_hint(sizes))
        width = head_dim * sizes["num_heads"]
        if self.final["context.device_target"] == device.ASCEND and width != sizes["hidden_size"]:
            raise UserError(f"head_dim {head_dim} x num_heads {sizes['num_heads']} = {width} is not hidden_size "
                            f"{sizes['hidden_size']}, as MindFormers' LlamaForCausalLM takes for granted",
                            self.hf.where, "Use --device_target CPU.")
        return Dims(head_dim=head_dim, **sizes)

    def _compare(self, named: Sequence[Tuple[str, str]], sizes: Mapping[str, Any], hf: Dims) -> None:
        """Refuse sizes that contradict the checkpoint's own config.json."""
        wrong = [(key, field) for key, field in named if sizes[field] != getattr(hf, field)]
        if not wrong:
            return
        wanted = ", ".join(f"{key} {_plainly(sizes[field])}" for key, field in wrong)
        has = ", ".join(f"{key} {_plainly(getattr(hf, field))}" for key, field in wrong)
        ours = looks_like(sizes)
        theirs = looks_like({field: getattr(hf, field) for _, field in named})
        guess = (f"; the configuration looks like Qwen1.5-{ours}" if ours else "") + \
                (f"; the checkpoint looks like Qwen1.5-{theirs}" if theirs else "")
        if theirs and theirs != ours:
            fix = f"Use {yaml_name(theirs)} (or its _chat twin), or the checkpoint of the other size."
        else:
            fix = ("Correct the configuration, or write one for this checkpoint: python -m qwen15 make-yaml "
                   f"--checkpoint {os.path.dirname(self.hf.where) or '.'}")
        raise UserError(f"wants {wanted}, but the checkpoint's {self.hf.where} says {has}{guess}",
                        self.sources[MODEL + wrong[0][0]], fix)

    def _check_division(self, dims: Dims, parallel: ParallelConfig) -> None:
        why = indivisible(dims, parallel.model_parallel)
        if why:
            fits = [parts for parts in range(1, dims.num_kv_heads + 1) if indivisible(dims, parts) is None]
            raise UserError(why, self.sources["parallel_config.model_parallel"],
                            f"model_parallel can be {', '.join(map(str, fits))}.")

    def _model_config(self, dims: Dims, parallel: ParallelConfig, device_target: str) -> ModelConfig:
        hf = self.hf
        eps = self.model("rms_norm_eps", self.from_hf(getattr(hf, "rms_norm_eps", None)), (1e-6, "default"))
        theta = self.model("theta", self.from_hf(getattr(hf, "rope_theta", None)), (1e6, "default"))
        longest = getattr(hf, "max_position_embeddings", None)
        seq_length = self.model("seq_length", self.from_hf(longest and min(longest, _LONGEST_DEFAULT)),
                                (_LONGEST_DEFAULT, "default"))
        stored = getattr(hf, "torch_dtype", None)
        param = self.model("param_init_type", self.from_hf(stored), ("bfloat16", "default"))
        compute = self.model("compute_dtype", (param, f"default (= param_init_type {param})"))
        rotary = self.model("rotary_dtype", (compute, f"default (= compute_dtype {compute})"))
        batch_size = self.model("batch_size")
        block_size = self.model("block_size")
        needed = -(-seq_length // block_size)
        num_blocks = self.model("num_blocks", (needed * batch_size, "default (batch_size sequences of seq_length)"))
        if seq_length > block_size * num_blocks:
            raise UserError(f"{self.place('seq_length')} is longer than the KV cache: {self.place('block_size')} x "
                            f"{self.place('num_blocks')} = {block_size * num_blocks} tokens",
                            fix=f"Set --options {MODEL}num_blocks={needed}, or --seq_length {block_size * num_blocks}")
        if device_target == device.ASCEND and seq_length % block_size:
            raise UserError(f"{self.place('seq_length')} is not a multiple of {self.place('block_size')}, which the "
                            "block tables on Ascend want", fix=f"Set --seq_length {needed * block_size}")
        table = self.model("max_position_embedding", (seq_length, "default"))
        if table < seq_length:
            raise UserError(f"{self.place('max_position_embedding')} is less than {self.place('seq_length')}",
                            fix=f"Remove max_position_embedding, or set --seq_length {table}")
        self._note_overrides(eps, theta, seq_length, param)
        eos, pad, bos = self._token_ids(dims.vocab_size)
        names = ("layernorm_compute_type", "softmax_compute_type", "is_dynamic", "use_flash_attention", "qkv_concat")
        return ModelConfig(dims=dims, rms_norm_eps=eps, theta=theta, seq_length=seq_length, param_init_type=param,
                           compute_dtype=compute, rotary_dtype=rotary, use_past=self._use_past(),
                           block_size=block_size, num_blocks=num_blocks, batch_size=batch_size, pad_token_id=pad,
                           bos_token_id=bos, eos_token_id=eos, **{name: self.model(name) for name in names})

    def _use_past(self) -> bool:
        """The key stands in two places in the original's guide; both must agree, and the flag beats both."""
        top, name = "use_past", MODEL + "use_past"
        flag = self.values.places.get(name, "").startswith("--")
        if self.values.given(top) and self.values.given(name) and not flag \
                and self.values.entries[top] != self.values.entries[name]:
            raise UserError(f"{name} {self.values.entries[name]} contradicts use_past {self.values.entries[top]} "
                            f"({self.values.places[top]})", self.values.places[name], "Give both the same value.")
        value = self.pick(name, (self.values.entries.get(top), self.values.places.get(top, "")))
        self.final[top], self.sources[top] = value, self.sources[name]
        return value

    def _token_ids(self, vocab_size: int) -> Tuple[Tuple[int, ...], int, int]:
        hf = self.hf
        is_qwen = vocab_size > _QWEN_IM_END
        eos = self.model("eos_token_id", self.from_hf_generation("eos_token_id"),
                         self.from_hf(getattr(hf, "eos_token_ids", None) or None),
                         ((_QWEN_IM_END, _QWEN_END) if is_qwen else (), "default"))
        end = _QWEN_END if is_qwen else eos[0] if eos else 0
        pad, bos = (self.model(name, self.from_hf_generation(name), self.from_hf(getattr(hf, name, None)),
                               (end, "default")) for name in ("pad_token_id", "bos_token_id"))
        for name, ids in (("eos_token_id", eos), ("pad_token_id", (pad,)), ("bos_token_id", (bos,))):
            if any(token >= vocab_size for token in ids):
                raise UserError(f"{self.place(name)} is not in the vocabulary of {self.place('vocab_size')}",
                                fix="Does the configuration belong to this model?")
        if not eos:
            self.notes.append("no eos_token_id is known: every answer runs to its length limit")
        return eos, pad, bos

    def _generation(self, model: ModelConfig) -> GenerationConfig:
        names = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
        picked = {name: self.model(name, self.from_hf_generation(name)) for name in names}
        max_length = self.model("max_decode_length", (model.seq_length, "default (= seq_length)"))
        if max_length > model.seq_length:
            raise UserError(f"{self.place('max_decode_length')}, the total length, is over {self.place('seq_length')}",
                            fix=f"Set --predict_length {model.seq_length}, or raise --seq_length")
        max_new = self.model("max_new_tokens")
        if max_new is not None and max_new >= max_length:
            self.notes.append(f"{self.place('max_new_tokens')} cannot be reached: {self.place('max_decode_length')} is "
                              "the total length, prompt included; raise it with --predict_length")
        return GenerationConfig(max_length=max_length, max_new_tokens=max_new, seed=self.pick("seed"), **picked)

    def _tokenizer(self) -> TokenizerConfig:
        files = {name: self._tokenizer_file(name, beside) for name, beside in
                 (("vocab_file", "vocab.json"), ("merges_file", "merges.txt"))}
        options = {name[len(TOKENIZER):]: value for name, value in self.values.entries.items()
                   if name.startswith(TOKENIZER) and KEYS[name].role == USED and KEYS[name].kind != "path"
                   and value is not None}
        return TokenizerConfig(options=options, **files)

    def _tokenizer_file(self, name: str, file_name: str) -> Optional[str]:
        key = TOKENIZER + name
        given = self.values.entries.get(key)
        if given and not _is_placeholder(given):
            path = os.path.expanduser(given)
            if not os.path.isfile(path):
                raise UserError(f"{name} {given!r} {'is a folder' if os.path.isdir(path) else 'does not exist'}",
                                self.values.places[key], f"Give the {file_name} of the model's download.")
            self.final[key], self.sources[key] = path, self.values.places[key]
            return path
        for folder in self.folders:
            path = os.path.join(folder, file_name)
            if os.path.isfile(path):
                self.final[key], self.sources[key] = path, "beside the checkpoint"
                return path
        self.final[key], self.sources[key] = None, "default"
        return None

    def _device_id(self) -> Optional[int]:
        """The launcher gives every worker its own card, over a card number that stands in a YAML for all of them."""
        name = "context.device_id"
        workers, _ = self._workers()
        own = self.environ.get("DEVICE_ID", "")
        from_flag = self.values.places.get(name, "").startswith("--")
        if own.isdigit() and (workers or 1) > 1 and not from_flag:
            self.final[name], self.sources[name] = int(own), "environment DEVICE_ID"
            return int(own)
        return self.pick(name, (int(own) if own.isdigit() else None, "environment DEVICE_ID"))

    # --- what the user is told

    def _note_overrides(self, eps: float, theta: float, seq_length: int, param: str) -> None:
        hf = self.hf
        if hf is None:
            return
        for name, mine, theirs in (("rms_norm_eps", eps, hf.rms_norm_eps), ("theta", theta, hf.rope_theta)):
            if mine != theirs:
                self.notes.append(f"{self.place(name)} overrides {theirs:g} of {hf.where}")
        if hf.max_position_embeddings is not None and seq_length > hf.max_position_embeddings:
            self.notes.append(f"{self.place('seq_length')} is longer than the {hf.max_position_embeddings} tokens the "
                              f"model was made for ({hf.where})")
        if hf.torch_dtype is not None and param != hf.torch_dtype:
            self.notes.append(f"{self.place('param_init_type')}: the checkpoint's {hf.torch_dtype} weights are "
                              "converted when they are loaded")

    def _note_inert(self, device_target: str) -> None:
        if self.values.inert:
            names = ", ".join(name[len(MODEL):] if name.startswith(MODEL) else name for name in self.values.inert)
            self.notes.append(f"accepted, no effect on prediction: {names}")
        if self.values.entries.get("only_save_strategy") and device_target == device.CPU:
            self.notes.append("only_save_strategy has no effect on CPU: nothing is compiled there")

    def _effective(self) -> Dict[str, Any]:
        """All final values, nested, in MindFormers' form; ids as one number when there is one."""
        flat = {**self.values.entries, **self.final}
        flat.setdefault(MODEL + "type", "LlamaConfig")
        flat.setdefault("model.arch.type", "LlamaForCausalLM")
        flat.setdefault(MODEL + "qkv_has_bias", True)
        for name in flat:
            if name not in self.sources:
                self.sources[name] = self.values.places.get(name, "default")
        nested: Dict[str, Any] = {}
        for name, value in flat.items():
            if value is None:
                continue
            section = nested
            *path, last = name.split(".")
            for part in path:
                section = section.setdefault(part, {})
            section[last] = _for_mindformers(value)
        return nested


def describe(config: Config) -> str:
    """Every key with its value and where it came from, one a line, for --print_config."""
    rows = []
    for name, value in sorted(_flatten(config.effective)):
        row = find(name)
        remark = ""
        if row is not None and row.role == INERT:
            remark = "  (no effect)"
        elif row is not None and row.role == DEVICE and config.device_target != device.ASCEND:
            remark = "  (Ascend only)"
        rows.append((f"{name} = {value!r}" if isinstance(value, str) else f"{name} = {value}",
                     f"{config.sources.get(name, 'default')}{remark}"))
    width = min(max(len(left) for left, _ in rows), 72)
    lines = [f"{left:<{width}}  # {right}" for left, right in rows]
    return "\n".join(lines + [f"# device: {config.device_note}"])


def _flatten(nested: Mapping[str, Any], prefix: str = "") -> List[Tuple[str, Any]]:
    flat = []
    for name, value in nested.items():
        if isinstance(value, dict) and value:
            flat.extend(_flatten(value, f"{prefix}{name}."))
        else:
            flat.append((f"{prefix}{name}", value))
    return flat


def _for_mindformers(value: Any) -> Any:
    if isinstance(value, tuple):
        return value[0] if len(value) == 1 else list(value)
    return value


def _plainly(value: Any) -> str:
    if isinstance(value, tuple):
        return str(list(value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _is_placeholder(path: str) -> bool:
    """`/path/vocab.json`, `/{path}/vocab.json`, `path/vocab.json`: what YAML files have before they are edited."""
    return path.strip("/").split("/")[0] in ("path", "{path}")


def _size_hint(sizes: Mapping[str, Any]) -> Optional[str]:
    near = looks_like(sizes)
    return f"The sizes look like Qwen1.5-{near}: compare with {yaml_name(near)}." if near else None
