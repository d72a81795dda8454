"""One checked configuration from defaults, the checkpoint's own config.json, a YAML file and the command line."""

from __future__ import annotations

import argparse
import os
from typing import Any, Dict, Mapping, Optional, Sequence, Tuple

from .. import device
from ..errors import UserError
from ..hub.resolve import resolve
from ..naming import Dims, indivisible
from . import speculation, yaml_lines
from .checkpoint_files import CheckpointFiles, read_beside
from .final import Final
from .flags import Flag, flags_from
from .given import Given, odd_error
from .keys import KEYS, MODEL, TOKENIZER, USED, size_bytes
from .model import model_config
from .sampling_rules import SAMPLING, implied, shaping
from .schema import Config, GenerationConfig, ModelConfig, ParallelConfig, TokenizerConfig


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
    document = yaml_lines.Document(speculation.NO_YAML, (), {}) if yaml_path is None else \
        yaml_lines.read(os.path.expanduser(yaml_path))
    given = Given(document)
    given.take_command_line(flags, options)
    return _config(Final(given), os.environ if environ is None else environ)


def config_of(args: argparse.Namespace) -> Config:
    """The configuration that a command line with `flags.add_flags` asks for.

    Raises:
        UserError: neither --config nor --load_checkpoint is given, or as `load_config`.
    """
    flags = flags_from(args)
    if not args.config and not any(flag.key == "load_checkpoint" for flag in flags):
        raise UserError("no configuration is given", "--config",
                        "Pass one of the predict_qwen1_5_*.yaml, or --load_checkpoint with a config.json in it.")
    return load_config(args.config, flags, args.options)


def _config(final: Final, environ: Mapping[str, str]) -> Config:
    run_mode = final.pick("run_mode")
    if run_mode != "predict":
        raise UserError(f"run_mode {run_mode!r}: this module predicts only", final.sources["run_mode"],
                        "Set run_mode to predict (--run_mode predict).")
    checkpoint = _checkpoint(final)
    files = read_beside(checkpoint)
    device_id = _device_id(final, environ)
    device_target, device_note = _device(final, environ, device_id)
    parallel = parallel_config(final, environ)
    model = model_config(final, files, device_target)
    _check_division(final, model.dims, parallel)
    generation = generation_config(final, files, model)
    tokenizer = tokenizer_config(final, files)
    threads = final.pick("context.runtime_num_threads")
    memory = final.pick("context.max_device_memory")
    auto_trans = final.pick("auto_trans_ckpt")
    guesses = speculation.read(final, model, device_target, _draft)
    _note_inert(final, device_target)
    effective = final.nested()
    return Config(model=model, generation=generation, parallel=parallel, tokenizer=tokenizer,
                  device_target=device_target, device_note=device_note, device_id=device_id, threads=threads,
                  load_checkpoint=checkpoint, auto_trans_ckpt=auto_trans, run_mode=run_mode,
                  context=effective.get("context", {}),
                  max_device_memory_bytes=None if memory is None else size_bytes(memory), effective=effective,
                  sources=dict(final.sources), notes=tuple(final.notes), speculation=guesses)


def _draft(flags: Sequence[Flag]) -> Config:
    """The configuration of a draft model, which the launcher's variables are not about."""
    return load_config(None, flags, environ={})


def _checkpoint(final: Final) -> Optional[str]:
    key = "load_checkpoint"
    given = final.given.entries.get(key)
    place = final.given.places.get(key, "default")
    if not given:
        final.put(key, "", place)
        return None
    path = os.path.expanduser(resolve(given, final.pick("hub")))
    if not os.path.exists(path):
        error = f"load_checkpoint {given!r} does not exist"
        raise odd_error(error, final.given.odd.get(key)) or UserError(
            error, place, "Give the converted checkpoint's file or folder, or a model's name on a hub: OWNER/NAME.")
    final.put(key, path, place)
    return path


def _device(final: Final, environ: Mapping[str, str], card: Optional[int]) -> Tuple[str, str]:
    """(device_target, why it is that one)."""
    name = "context.device_target"
    target = final.pick(name)
    resolved, note = device.resolve(target, environ, card=card)
    asked = "" if resolved == target else f"{target}: "
    final.put(name, resolved, f"{asked}{final.sources[name]}")
    if target == device.AUTO and resolved == device.CPU:
        found = device.find_ascend(environ)
        if found.cards or found.cann:  # somebody who has a card expects it to be used
            final.notes.append(note)
    return resolved, note


def parallel_config(final: Final, environ: Mapping[str, str]) -> ParallelConfig:
    """How the model is spread over workers.

    Raises:
        UserError: another kind of parallelism than model_parallel, or not as many workers as were started.
    """
    use = final.pick("use_parallel")
    names = ("data_parallel", "model_parallel", "pipeline_stage")
    data, model, stages = (final.pick(f"parallel_config.{name}") for name in names)
    whole = final.pick("parallel_config.vocab_emb_dp")
    workers, variable = _workers(environ)
    if use and (data > 1 or stages > 1):
        name = "data_parallel" if data > 1 else "pipeline_stage"
        raise UserError(f"data_parallel {data} x model_parallel {model} x pipeline_stage {stages} = "
                        f"{data * model * stages} workers, but prediction runs over model_parallel only",
                        final.sources[f"parallel_config.{name}"], f"Set {name} to 1.")
    if use and workers is not None and workers != model:
        raise UserError(f"model_parallel {model} needs {model} worker(s), but {workers} were started "
                        f"({variable}={workers})", final.sources["parallel_config.model_parallel"],
                        f"Start {model}, or set --options parallel_config.model_parallel={workers}")
    if not use and workers is not None and workers > 1:
        raise UserError(f"use_parallel is False, but {workers} workers were started ({variable}={workers}); each "
                        "would run the whole model", final.sources["use_parallel"],
                        "Set --use_parallel True, or start one worker.")
    return ParallelConfig(use, model if use else 1, whole)


def _workers(environ: Mapping[str, str]) -> Tuple[Optional[int], str]:
    """(workers that a launcher has started, the variable that says so)."""
    for variable in ("MS_WORKER_NUM", "RANK_SIZE"):
        text = environ.get(variable, "")
        if text.strip().isdigit():
            return int(text), variable
    return None, ""


def _check_division(final: Final, dims: Dims, parallel: ParallelConfig) -> None:
    why = indivisible(dims, parallel.model_parallel)
    if why:
        fits = [parts for parts in range(1, dims.num_kv_heads + 1) if indivisible(dims, parts) is None]
        raise UserError(why, final.sources["parallel_config.model_parallel"],
                        f"model_parallel can be {', '.join(map(str, fits))}.")


def generation_config(final: Final, files: CheckpointFiles, model: ModelConfig) -> GenerationConfig:
    """How tokens are chosen and when generation ends.

    Raises:
        UserError: a limit that the network cannot reach.
    """
    max_length = final.model("max_decode_length", (model.seq_length, "default (= seq_length)"))
    if MODEL + "max_new_tokens" in final.given.commanded and MODEL + "max_decode_length" not in final.given.commanded:
        # An explicit --max_new_tokens wins over the YAML's limit on the total length.
        place = final.given.places[MODEL + "max_new_tokens"]
        max_length = final.put(MODEL + "max_decode_length", model.seq_length, f"= seq_length, for {place}")
    if max_length > model.seq_length:
        raise UserError(f"{final.place('max_decode_length')}, the total length, is over {final.place('seq_length')}",
                        fix=f"Set --predict_length {model.seq_length}, or raise --seq_length")
    max_new = final.model("max_new_tokens")
    if max_new is not None and max_new >= max_length:
        final.notes.append(f"{final.place('max_new_tokens')} cannot be reached: {final.place('max_decode_length')} is "
                           "the total length, prompt included; raise it with --predict_length")
    return GenerationConfig(max_length=max_length, max_new_tokens=max_new, seed=_seed(final), **_sampling(final, files))


def _sampling(final: Final, files: CheckpointFiles) -> Dict[str, Any]:
    """Everything of `SAMPLING`, as given, with what that means."""
    picked = {name: final.model(name, files.from_generation(name)) for name in SAMPLING}
    commanded = {name: picked[name] for name in SAMPLING if MODEL + name in final.given.commanded}
    greedy = picked["temperature"] == 0
    try:
        # A file states all values, used or not: only temperature 0 among them implies more, greedy decoding.
        follows = implied({**commanded, "temperature": 0} if greedy else commanded)
    except ValueError as error:
        raise UserError(str(error), final.sources[MODEL + "temperature"], "Leave one of them out.") from None
    why = final.place("temperature" if greedy else next(iter(shaping(commanded)), "do_sample"))
    if follows.get("do_sample") and not picked["do_sample"]:
        final.notes.append(f"{why} means sampling, which is switched on; --do_sample False takes the likeliest token")
    for name, value in follows.items():
        if picked[name] != value:
            picked[name] = final.put(MODEL + name, value, f"for {why}")
    return picked


def _seed(final: Final) -> Optional[int]:
    """Every YAML of the original begins with `seed: 0`, which nobody has chosen: it counts as none."""
    seed: Optional[int] = final.pick("seed")
    if seed == 0 and "seed" not in final.given.commanded:
        seed = final.put("seed", None, f"{final.sources['seed']} says 0, as every YAML does: none; --seed 0 is a seed")
    return seed


def tokenizer_config(final: Final, files: CheckpointFiles) -> TokenizerConfig:
    """The tokenizer's files, by default those beside the checkpoint, and its settings.

    Raises:
        UserError: a named file does not exist.
    """
    options = {name[len(TOKENIZER):]: value for name, value in final.given.entries.items()
               if name.startswith(TOKENIZER) and KEYS[name].role == USED and KEYS[name].kind != "path"
               and value is not None}
    vocab, merges = (_tokenizer_file(final, files, name, file_name)
                     for name, file_name in (("vocab_file", "vocab.json"), ("merges_file", "merges.txt")))
    if vocab is None or merges is None:  # transformers 5 writes both into one file
        whole, source = files.find("tokenizer.json"), "beside the checkpoint"
        if vocab is not None and os.path.basename(vocab) == "tokenizer.json":
            whole, source = vocab, final.sources[TOKENIZER + "vocab_file"]
        if whole is not None and vocab in (None, whole, files.find("vocab.json")):
            vocab, merges = (final.put(TOKENIZER + name, whole, source) for name in ("vocab_file", "merges_file"))
    return TokenizerConfig(vocab, merges, options)


def _tokenizer_file(final: Final, files: CheckpointFiles, name: str, file_name: str) -> Optional[str]:
    key = TOKENIZER + name
    given = final.given.entries.get(key)
    if given and not _is_placeholder(given):
        path = os.path.expanduser(given)
        if not os.path.isfile(path):
            error = f"{name} {given!r} {'is a folder' if os.path.isdir(path) else 'does not exist'}"
            raise odd_error(error, final.given.odd.get(key)) or UserError(
                error, final.given.places[key], f"Give the {file_name} of the model's download.")
        final.put(key, path, final.given.places[key])
        return path
    beside = files.find(file_name)
    final.put(key, beside, "beside the checkpoint" if beside else "default")
    return beside


def _is_placeholder(path: str) -> bool:
    """`/path/vocab.json`, `/{path}/vocab.json`, `path/vocab.json`: what YAML files have before they are edited."""
    return path.strip("/").split("/")[0] in ("path", "{path}")


def _device_id(final: Final, environ: Mapping[str, str]) -> Optional[int]:
    """The launcher gives every worker its own card, over a card number that stands in a YAML for all of them."""
    name = "context.device_id"
    workers, _ = _workers(environ)
    own = environ.get("DEVICE_ID", "")
    from_flag = final.given.places.get(name, "").startswith("--")
    if own.isdigit() and (workers or 1) > 1 and not from_flag:
        final.put(name, int(own), "environment DEVICE_ID")
        return int(own)
    picked: Optional[int] = final.pick(name, (int(own) if own.isdigit() else None, "environment DEVICE_ID"))
    return picked


def _note_inert(final: Final, device_target: str) -> None:
    if final.given.inert:
        names = ", ".join(name[len(MODEL):] if name.startswith(MODEL) else name for name in final.given.inert)
        final.notes.append(f"accepted, no effect on prediction: {names}")
    if final.given.entries.get("only_save_strategy") and device_target == device.CPU:
        final.notes.append("only_save_strategy has no effect on CPU: nothing is compiled there")
