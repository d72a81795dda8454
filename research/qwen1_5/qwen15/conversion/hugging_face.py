"""Plan conversions between Hugging Face and MindSpore checkpoints, every weight accounted for before a byte is written."""

import os
import re
from dataclasses import dataclass
from typing import Dict, List, Mapping, Optional, Sequence

from .. import naming
from ..checkpoint.account import Account, Expected, same_contents, take_account
from ..checkpoint.casting import FLOATS
from ..checkpoint.reader import Checkpoint, format_of, open_checkpoint
from ..checkpoint.tensors import LONG_NAMES, SHORT_NAMES, TensorInfo
from ..config.hf_config import CONFIG_FILE, HfConfig, dims_from_hf_config
from ..errors import UserError
from ..naming import Dims, Weight
from .plan import OutFile, Plan, aligned, index_of, shape_files, shard_names, sidecars
from .slices import Slicing, infer_dims, open_slices
from .strategy import strategy_files
from .strips import Destination, Move, Part, region_of, whole

DEFAULT_SHARD_BYTES = 4 * 10 ** 9
_UNITS = {"": 1, "B": 1, "KB": 10 ** 3, "MB": 10 ** 6, "GB": 10 ** 9, "TB": 10 ** 12,
          "KIB": 2 ** 10, "MIB": 2 ** 20, "GIB": 2 ** 30, "TIB": 2 ** 40}


@dataclass(frozen=True)
class Options:
    """What a conversion shall make.

    Attributes:
        target: the file or folder.
        form: 'ckpt', 'safetensors', 'bin' or 'folder'; None decides by the target's extension.
        dtype: 'float32', 'float16', 'bfloat16', or 'auto' for the source's own.
        shard_bytes: most bytes of a shard of a folder.
        slicing: how to cut over ranks; None leaves the weights whole.
        prefix: start of the slices' file names, before the rank.
    """

    target: str
    form: Optional[str] = None
    dtype: str = "auto"
    shard_bytes: int = DEFAULT_SHARD_BYTES
    slicing: Optional[Slicing] = None
    prefix: str = "checkpoint_"


def parse_size(text: str) -> int:
    """Bytes of a size as people write it: '4GB', '500MB', '2GiB', '1000000'.

    Raises:
        UserError: no such size.
    """
    match = re.match(r"^\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*$", text)
    if match is None or match[2].upper() not in _UNITS or float(match[1]) == 0:
        raise UserError(f"{text!r} is not a size", "--max_shard_size", "Write 4GB, 500MB or 2GiB.")
    return int(float(match[1]) * _UNITS[match[2].upper()])


# ---- Hugging Face -> MindSpore ----

def plan_to_mindspore(source_path: str, options: Options) -> Plan:
    """Plan the conversion of a Hugging Face checkpoint.

    Args:
        source_path: folder of a model, or a weight file with config.json beside it.
        options: what to make.

    Raises:
        UserError: anything missing, surplus, misshapen or not supported; nothing is written.
    """
    folder = source_path if os.path.isdir(source_path) else os.path.dirname(os.path.abspath(source_path))
    source = open_checkpoint(source_path, ("safetensors", "bin"))
    try:
        config = dims_from_hf_config(folder)
        weights = list(naming.weights(config.dims))
        plan = Plan(options.target, False, [source], [], [], notes=list(source.notes))
        account = take_account(source, Expected(config.dims, config.where, "hf"))
        _told(source, account, config, plan)
        dtypes = _dtypes(source, account, weights, options.dtype)
        moves = [Move(weight.hf, weight.shape, source.infos[weight.hf].dtype, dtypes[weight.ms],
                      (Part(source, weight.hf, whole(weight.shape)),), ()) for weight in weights]
        if options.slicing is None:
            _whole_files(plan, options, weights, moves, dtypes, "ms")
        else:
            _sliced_files(plan, options, config.dims, weights, moves, dtypes)
        plan.small.update(sidecars(folder, _one_dtype(dtypes) if options.dtype != "auto" else None))
        return plan
    except BaseException:
        source.close()
        raise


def _told(source: Checkpoint, account: Account, config: HfConfig, plan: Plan) -> Account:
    """Put into the plan what an account has to tell; returns the account."""
    head, embedding = account.stored.get(naming.HEAD.ms), account.stored[naming.EMBEDDING.ms]
    if account.tied_head is not None:
        plan.notes.append(f"{account.tied_head} equals {embedding} and is left out: tie_word_embeddings is true")
    elif head is not None and not config.dims.tie_word_embeddings and same_contents(source, head, embedding):
        plan.notes.append(f"{head} equals {embedding} bit for bit, yet tie_word_embeddings is false: both are kept")
    plan.left_out.update(account.left_out)
    return account


def _dtypes(source: Checkpoint, account: Account, weights: Sequence[Weight], dtype: str) -> Dict[str, str]:
    """MindSpore name -> dtype of the result."""
    result = {}
    for weight in weights:
        name = account.stored[weight.ms]
        have = source.infos[name].dtype
        if have not in FLOATS:
            raise UserError(f"{name} is {have}, weights are {', '.join(FLOATS)}", source.path,
                            "Take it in bfloat16, or save it so.")
        result[weight.ms] = have if dtype == "auto" else SHORT_NAMES[dtype]
    return result


def _one_dtype(dtypes: Mapping[str, str]) -> str:
    """The dtype that most weights have, in the words of configurations."""
    names = list(dtypes.values())
    return LONG_NAMES[max(sorted(set(names)), key=names.count)]


def _metadata(side: str) -> Dict[str, str]:
    return {"format": "ms" if side == "ms" else "pt"}


def _form(options: Options, side: str) -> str:
    """What to write: as asked for, else by the extension; only forms that the side reads."""
    form = options.form or format_of(options.target) or "folder"
    other = {"ms": "bin", "hf": "ckpt"}[side]
    if form == other:
        raise UserError(f"a .{other} file is not what {'MindSpore' if side == 'ms' else 'Hugging Face'} reads", options.target,
                        f"Name a {'.ckpt' if side == 'ms' else '.bin'} or .safetensors file, or a folder.")
    return form


def _whole_files(plan: Plan, options: Options, weights: Sequence[Weight], moves: Sequence[Move], dtypes: Mapping[str, str],
                 side: str) -> None:
    """One file or a folder of shards, every weight whole; fills the plan."""
    form = _form(options, side)
    names = {getattr(weight, side): move for weight, move in zip(weights, moves)}
    infos = aligned([TensorInfo.of(getattr(weight, side), dtypes[weight.ms], weight.shape) for weight in weights])
    if form == "folder":
        shards = shape_files(infos, options.shard_bytes)
        plan.is_folder = True
        plan.files = [OutFile(name, "safetensors", tuple(shard), _metadata(side))
                      for name, shard in zip(shard_names(len(shards)), shards)]
        plan.small.update(index_of(plan.files))
    else:
        plan.files = [OutFile("", form, tuple(infos), _metadata(side) if form == "safetensors" else {})]
    for number, file in enumerate(plan.files):
        for info in file.infos:
            move = names[info.name]
            plan.moves.append(Move(move.label, move.shape, move.dtype, move.target_dtype, move.parts,
                                   (Destination(number, info.name, whole(move.shape)),)))


def _sliced_files(plan: Plan, options: Options, dims: Dims, weights: Sequence[Weight], moves: Sequence[Move],
                  dtypes: Mapping[str, str]) -> None:
    """`rank_x` folders, every weight cut on the way; fills the plan."""
    slicing = options.slicing
    slicing.check(dims)
    form = options.form or "safetensors"
    if form not in ("ckpt", "safetensors"):
        raise UserError(f"slices are .ckpt or .safetensors files, not {form}", "--format")
    plan.is_folder = True
    by_name = {weight.ms: (weight, move) for weight, move in zip(weights, moves)}
    infos = aligned([TensorInfo.of(weight.ms, dtypes[weight.ms], slicing.shape(weight)) for weight in weights])
    plan.files = [OutFile(f"rank_{rank}/{options.prefix}{rank}.{form}", form, tuple(infos),
                          _metadata("ms") if form == "safetensors" else {}) for rank in range(slicing.parts)]
    for info in infos:
        weight, move = by_name[info.name]
        axis = slicing.axis(weight)
        destinations = tuple(Destination(rank, info.name, region_of(weight.shape, axis, rank, slicing.parts))
                             for rank in range(slicing.parts))
        plan.moves.append(Move(move.label, move.shape, move.dtype, move.target_dtype, move.parts, destinations))
    plan.small.update(strategy_files({weight.ms: (weight.shape, slicing.axis(weight)) for weight in weights}, slicing.parts))


# ---- MindSpore -> Hugging Face ----

def plan_to_hugging_face(source_path: str, options: Options, config_path: Optional[str] = None,
                         vocab_emb_dp: Optional[bool] = None) -> Plan:
    """Plan the conversion of a MindSpore checkpoint.

    Args:
        source_path: a .ckpt or .safetensors file, a folder of shards, or a folder of `rank_x` slices, merged on the way.
        options: what to make; never sliced.
        config_path: the model's config.json; looked for beside the checkpoint if not given.
        vocab_emb_dp: how the slices hold embedding and head; found out if not given.

    Raises:
        UserError: anything missing, surplus, misshapen or not supported; nothing is written.
    """
    form = _form(options, "hf")
    ranks, slicing, config, folder = open_slices(source_path, config_path, vocab_emb_dp)
    try:
        check_contents(ranks)
        if config is None:
            if form == "folder":
                raise UserError(f"no {CONFIG_FILE} beside it, without which a model folder cannot be loaded", source_path,
                                "Give the model's own with --config_path.")
            config = infer_dims(ranks, slicing)
        weights = list(naming.weights(config.dims))
        plan = Plan(options.target, False, ranks, [], [], notes=[note for rank in ranks for note in rank.notes])
        if slicing.parts > 1:
            slicing.check(config.dims)
            plan.notes.append(f"{source_path}: {slicing.parts} slices with vocab_emb_dp {slicing.vocab_emb_dp} are merged")
        account = account_slices(ranks, slicing, config, plan)
        dtypes = _dtypes(ranks[0], account, weights, options.dtype)
        moves = [Move(weight.ms, weight.shape, ranks[0].infos[weight.ms].dtype, dtypes[weight.ms],
                      tuple(Part(rank, weight.ms, region_of(weight.shape, slicing.axis(weight), number, slicing.parts))
                            for number, rank in enumerate(ranks)), ()) for weight in weights]
        _whole_files(plan, options, weights, moves, dtypes, "hf")
        plan.small.update(_hf_sidecars(folder, config_path, options, dtypes))
        return plan
    except BaseException:
        for rank in ranks:
            rank.close()
        raise


def check_contents(ranks: Sequence[Checkpoint]) -> None:
    """Compare every file that carries a checksum with it: before its names and shapes are believed."""
    for rank in ranks:
        for file in rank.files:
            file.check_contents()


def _hf_sidecars(folder: str, config_path: Optional[str], options: Options, dtypes: Mapping[str, str]) -> Dict[str, bytes]:
    torch_dtype = _one_dtype(dtypes) if options.dtype != "auto" else None
    if config_path is None:
        return sidecars(folder, torch_dtype)
    found = sidecars(folder)
    given = config_path if os.path.isdir(config_path) else os.path.dirname(os.path.abspath(config_path))
    found.update(sidecars(given, torch_dtype))
    return found


def account_slices(ranks: Sequence[Checkpoint], slicing: Slicing, config: HfConfig, plan: Plan) -> Account:
    """Every rank's account; the first one's, whose notes go into the plan.

    Raises:
        UserError: a slice is not whole, or the ranks differ.
    """
    expected = Expected(config.dims, config.where, "ms", slicing.parts, slicing.vocab_emb_dp)
    first = _told(ranks[0], take_account(ranks[0], expected), config, plan)
    for rank in ranks[1:]:
        take_account(rank, expected)
        for name in first.stored:
            if rank.infos[name].dtype != ranks[0].infos[name].dtype:
                raise UserError(f"{name} is {rank.infos[name].dtype}, in {ranks[0].path} it is {ranks[0].infos[name].dtype}",
                                rank.path, "The slices are not of one checkpoint.")
    return first


def yaml_lines(plan: Plan, options: Options) -> List[str]:
    """The lines of a predict YAML that make it use the result."""
    folder = os.path.abspath(options.target if plan.is_folder else os.path.dirname(os.path.abspath(options.target)))
    parallel = options.slicing is not None and options.slicing.parts > 1
    float_dtypes = {move.label: move.target_dtype for move in plan.moves}
    lines = [f"load_checkpoint: '{os.path.abspath(options.target)}'", "auto_trans_ckpt: False"]
    if options.slicing is not None:
        lines += [f"use_parallel: {parallel}", "parallel_config:", "  data_parallel: 1",
                  f"  model_parallel: {options.slicing.parts}", "  pipeline_stage: 1",
                  f"  vocab_emb_dp: {options.slicing.vocab_emb_dp}"]
    lines += ["model:", "  model_config:", f"    param_init_type: '{_one_dtype(float_dtypes)}'"]
    tokenizer = [(key, name) for key, name in (("vocab_file", "vocab.json"), ("merges_file", "merges.txt"))
                 if name in plan.small]
    if tokenizer:
        lines += ["processor:", "  tokenizer:"]
        lines += [f"    {key}: '{os.path.join(folder, name)}'" for key, name in tokenizer]
    return lines
