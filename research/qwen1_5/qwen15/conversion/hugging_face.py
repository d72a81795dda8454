"""Plan conversions between Hugging Face and MindSpore checkpoints, every weight accounted for first."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, replace
from typing import Dict, List, Mapping, Optional, Sequence, Tuple

from .. import naming
from ..checkpoint import origin
from ..checkpoint.account import Account, Expected, same_contents, take_account
from ..checkpoint.casting import FLOATS
from ..checkpoint.gguf_file import GgufFile
from ..checkpoint.quantised import ORDER, Scheme, companion_of
from ..checkpoint.quantised_settings import CONFIG_KEY, QuantizationConfig, settings_of
from ..checkpoint.quantised_source import read_quantised
from ..checkpoint.reader import Checkpoint, closed_on_error, folder_of, format_of, open_checkpoint
from ..checkpoint.regrouped import finer, regrouped
from ..checkpoint.source import is_gguf, open_source
from ..checkpoint.tensors import LONG_NAMES, SHORT_NAMES, TensorInfo, element_count
from ..checkpoint.view import View
from ..config.hf_config import CONFIG_FILE, HfConfig, dims_from_hf_config
from ..errors import UserError
from ..naming import Weight
from .plan import LAYOUT_FILE, OutFile, Plan, aligned, index_of, record_source, shape_files, shard_names, sidecars
from .quantise import Recipe, error_of, quantised
from .slices import Slicing, infer_dims, open_slices
from .strategy import Layout, layout_of, strategy_files
from .strips import Destination, Move, Part, whole
from .unquantise import dequantised, describe_layout, merged, original

DEFAULT_SHARD_BYTES = 4 * 10 ** 9
SMALL_MODEL_VALUES = 2 * 10 ** 9
"""Below so many weights 4 bits cost too much (see docs/numerics.md)."""
_UNITS = {"": 1, "B": 1, "KB": 10 ** 3, "MB": 10 ** 6, "GB": 10 ** 9, "TB": 10 ** 12,
          "KIB": 2 ** 10, "MIB": 2 ** 20, "GIB": 2 ** 30, "TIB": 2 ** 40}


@dataclass(frozen=True)
class Output:
    """What a conversion shall make.

    Attributes:
        target: the file or folder.
        form: 'ckpt', 'safetensors', 'bin' or 'folder'; None decides by the target's extension.
        dtype: 'float32', 'float16', 'bfloat16', or 'auto' for the source's own.
        shard_bytes: most bytes of a shard of a folder.
        slicing: how to cut over ranks; None leaves the weights whole.
        prefix: start of the slices' file names, before the rank.
        recipe: how to quantise on the way; None leaves weights as they are.
        dequantise: make floats of a quantised MindSpore checkpoint, though what it was converted from is known.
    """

    target: str
    form: Optional[str] = None
    dtype: str = "auto"
    shard_bytes: int = DEFAULT_SHARD_BYTES
    slicing: Optional[Slicing] = None
    prefix: str = "checkpoint_"
    recipe: Optional[Recipe] = None
    dequantise: bool = False


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

def plan_to_mindspore(source_path: str, output: Output) -> Plan:
    """Plan the conversion of a Hugging Face checkpoint, quantised ones (GPTQ, AWQ, compressed-tensors) among them.

    Args:
        source_path: folder of a model, a weight file with config.json beside it, or a .gguf file.
        output: what to make.

    Raises:
        UserError: anything missing, surplus, misshapen or not supported; nothing is written.
    """
    if not os.path.exists(source_path):  # before its folder is looked into, which is somebody else's then
        raise UserError("no such file or folder", source_path,
                        "Give the model's folder or weight file, or its name on a hub: OWNER/NAME.")
    folder = folder_of(source_path)
    if is_gguf(source_path):
        floats = SHORT_NAMES["bfloat16" if output.dtype == "auto" else output.dtype]
        source, settings = open_source(source_path, floats=floats), None
        assert isinstance(source, View) and isinstance(source.source, GgufFile)
        contents = source.source.config
        config = replace(dims_from_hf_config(contents), where=source_path)
    else:
        contents, config, settings = None, dims_from_hf_config(folder), settings_of(folder)
        source = open_checkpoint(source_path, ("safetensors", "bin"))
    with closed_on_error([source]):
        weights = list(naming.weights(config.dims))
        plan = Plan(output.target, False, [source], [], [], notes=list(source.notes))
        view, small = _stored_form(source, settings, weights, config, output, plan)
        account = take_account(view, Expected(config.dims, config.where, "hf"))
        _told(view, account, config, plan)
        cut, schemes = view, dict(account.schemes)
        if output.slicing is not None:
            output.slicing.check(config.dims)
            cut, schemes = cut_finer(view, weights, schemes, account.stored, output.slicing)
        tensors = _tensors(cut, account, weights, schemes, output.dtype)
        moves = [Move(tensor.name("hf"), tensor.shape, tensor.dtype, tensor.target_dtype,
                      (Part(cut, tensor.name("hf"), whole(tensor.shape)),), ()) for tensor in tensors]
        if output.slicing is None:
            _whole_files(plan, output, tensors, moves, "ms")
        else:
            _sliced_files(plan, output, tensors, moves)
        record_source(plan, origin.source_of([source]))
        changes = dict(output.recipe.changes()) if output.recipe is not None else {}
        if output.dtype != "auto":
            changes["torch_dtype"] = _one_dtype(plan)
        plan.small.update(sidecars(folder, changes) if contents is None else
                          _gguf_sidecars(folder, contents, changes, plan))
        plan.small.update(small)
        if schemes:
            plan.source_bytes = sum(info.nbytes for info in source.infos.values())
        if output.recipe is not None:
            made, recipe, chosen = dict(account.schemes), output.recipe, output.recipe.chosen
            plan.errors = lambda: (
                str(error_of(source, weight, view, weight.hf, made[weight.ms], chosen is None or weight.layer is None))
                for weight in weights if weight.ms in made)
            if chosen is not None:
                plan.notes.append(chosen.note())
                plan.prepare = lambda: chosen.make(source, config, recipe)
                plan.prepare_bytes = chosen.memory_bytes(config)
        return plan


def _stored_form(source: Checkpoint, settings: Optional[QuantizationConfig], weights: Sequence[Weight],
                 config: HfConfig, output: Output, plan: Plan) -> Tuple[Checkpoint, Dict[str, bytes]]:
    """The source with quantised matrices in the stored form, and the small files that tell how they lay."""
    if settings is not None:
        found = read_quantised(source, settings, weights)
        if output.recipe is not None:
            raise UserError(f"is quantised already ({settings.layout}, {settings.bits} bits)", source.path,
                            "Quantise the unquantised model, or convert this one without --quantize.")
        if found.linears:
            zeros = f", {len(found.zero_biases)} biases that are zero are left out" if found.zero_biases else ""
            plan.notes.append(f"{settings.layout}, {settings.bits} bits: {len(found.linears)} linear layers keep their "
                              f"integers and scales bit for bit{zeros}")
            if found.doubt:
                plan.notes.append(found.doubt)
            return found.view, {LAYOUT_FILE: describe_layout(source, settings, found)}
        plan.notes.append(f"{settings.where} says {settings.layout}, and no tensor is quantised")
    if output.recipe is None:
        return source, {}
    take_account(source, Expected(config.dims, config.where, "hf"))  # before what is missing is asked for
    if sum(element_count(weight.shape) for weight in weights) < SMALL_MODEL_VALUES and output.recipe.bits == 4:
        plan.notes.append("choose int8 below 2 billion weights: 4 bits cost a small model much of what it knows")
    return quantised(source, weights, output.recipe), {}


def _gguf_sidecars(folder: str, contents: Mapping[str, object], changes: Mapping[str, object], plan: Plan
                   ) -> Dict[str, bytes]:
    """config.json made of a GGUF file's metadata, and the tokenizer's files if they lie beside it."""
    found = {name: content for name, content in sidecars(folder, {}).items() if name not in (CONFIG_FILE, LAYOUT_FILE)}
    wanted = ("tokenizer_config.json",) if "tokenizer.json" in found else (
        "vocab.json", "merges.txt", "tokenizer_config.json")
    absent = [name for name in wanted if name not in found]
    if absent:
        plan.notes.append(f"{', '.join(absent)} {'is' if len(absent) == 1 else 'are'} not beside the .gguf file: copy "
                          "the tokenizer's files from the model's Hugging Face folder")
    found[CONFIG_FILE] = (json.dumps({**contents, **changes}, indent=2) + "\n").encode("utf-8")
    return found


@dataclass(frozen=True)
class Tensor:
    """One tensor of a result, whole: a weight, or the scales, zero points or order of a quantised one.

    Attributes:
        weight: that it is or belongs to.
        suffix: after the weight's name; empty for the weight itself.
        shape: as it is stored.
        dtype: of the source.
        target_dtype: of the result.
    """

    weight: Weight
    suffix: str
    shape: Tuple[int, ...]
    dtype: str
    target_dtype: str

    def name(self, side: str) -> str:
        """Its name on Hugging Face's ('hf') or MindSpore's ('ms') side."""
        return getattr(self.weight, side) + self.suffix

    def layout(self, slicing: Slicing) -> Layout:
        """How it is cut; every rank has the whole order of columns."""
        return layout_of(len(self.shape), None if self.suffix == ORDER else slicing.axis(self.weight), slicing.parts)


def _tensors(source: Checkpoint, account: Account, weights: Sequence[Weight], schemes: Mapping[str, Scheme], dtype: str
             ) -> List[Tensor]:
    """Every tensor of the result. `dtype` is for weights that are not quantised."""
    tensors = []
    for weight in weights:
        if weight.ms in schemes:
            tensors += [Tensor(weight, info.name[len(weight.ms):], info.shape, info.dtype, info.dtype)
                        for info in schemes[weight.ms].infos(weight.ms, weight.shape)]
            continue
        name = account.stored[weight.ms]
        have = source.infos[name].dtype
        if have not in FLOATS:
            raise UserError(f"{name} is {have}, weights are {', '.join(FLOATS)}", source.path,
                            "Take the checkpoint in bfloat16, or save it in that dtype.")
        tensors.append(Tensor(weight, "", weight.shape, have, have if dtype == "auto" else SHORT_NAMES[dtype]))
    return tensors


def cut_finer(source: Checkpoint, weights: Sequence[Weight], schemes: Mapping[str, Scheme], stored: Mapping[str, str],
              slicing: Slicing) -> Tuple[Checkpoint, Dict[str, Scheme]]:
    """The source with groups so fine that a cut between ranks falls between them, and how its matrices are stored then.

    Raises:
        UserError: a quantised matrix cannot be cut there.
    """
    changed, result = {}, dict(schemes)
    for weight in weights:
        if weight.ms in schemes and slicing.axis(weight) == 1:
            old = schemes[weight.ms]
            result[weight.ms] = finer(old, stored[weight.ms], weight.shape[1], slicing.parts, source.path)
            changed[stored[weight.ms]] = (old, result[weight.ms])
    return regrouped(source, changed), result


def _told(source: Checkpoint, account: Account, config: HfConfig, plan: Plan) -> Account:
    """Put into the plan what an account has to tell; returns the account."""
    head, embedding = account.stored.get(naming.HEAD.ms), account.stored[naming.EMBEDDING.ms]
    if account.tied_head is not None:
        plan.notes.append(f"{account.tied_head} equals {embedding} and is left out: tie_word_embeddings is true")
    elif head is not None and not config.dims.tie_word_embeddings and same_contents(source, head, embedding):
        plan.notes.append(f"{head} equals {embedding} bit for bit, yet tie_word_embeddings is false: both are kept")
    plan.left_out.update(account.left_out)
    return account


def _one_dtype(plan: Plan) -> str:
    """The dtype that most weights of the result have that are not quantised, in the words of configurations."""
    names = [move.target_dtype for move in plan.moves if move.target_dtype in FLOATS and not companion_of(move.label)]
    return LONG_NAMES[max(sorted(set(names)), key=names.count)]


def _metadata(side: str) -> Dict[str, str]:
    return {"format": "ms" if side == "ms" else "pt"}


def _form(output: Output, side: str) -> str:
    """What to write: as asked for, else by the extension; only forms that the side reads."""
    form = output.form or format_of(output.target) or "folder"
    other = {"ms": "bin", "hf": "ckpt"}[side]
    if form == other:
        reader, known = ("MindSpore", ".ckpt") if side == "ms" else ("Hugging Face", ".bin")
        raise UserError(f"a .{other} file is not what {reader} reads", output.target,
                        f"Name a {known} or .safetensors file, or a folder.")
    return form


def _whole_files(plan: Plan, output: Output, tensors: Sequence[Tensor], moves: Sequence[Move], side: str) -> None:
    """One file or a folder of shards, every weight whole; fills the plan."""
    named = [TensorInfo.of(tensor.name(side), tensor.target_dtype, tensor.shape) for tensor in tensors]
    _files_of(plan, output, named, moves, side)


def _files_of(plan: Plan, output: Output, named: Sequence[TensorInfo], moves: Sequence[Move], side: str) -> None:
    """As `_whole_files`, of tensors under the names of the result, in the order of their moves."""
    form = _form(output, side)
    by_name = {info.name: move for info, move in zip(named, moves)}
    infos = aligned(named)
    if form == "folder":
        shards = shape_files(infos, output.shard_bytes)
        plan.is_folder = True
        plan.files = [OutFile(name, "safetensors", tuple(shard), _metadata(side))
                      for name, shard in zip(shard_names(len(shards)), shards)]
        plan.small.update(index_of(plan.files))
    else:
        plan.files = [OutFile("", form, tuple(infos), _metadata(side) if form == "safetensors" else {})]
    for number, file in enumerate(plan.files):
        for info in file.infos:
            plan.moves.append(replace(by_name[info.name],
                                      destinations=(Destination(number, info.name, whole(info.shape)),)))


def _sliced_files(plan: Plan, output: Output, tensors: Sequence[Tensor], moves: Sequence[Move]) -> None:
    """`rank_x` folders, every weight cut on the way; fills the plan."""
    slicing = output.slicing
    assert slicing is not None
    form = output.form or "safetensors"
    if form not in ("ckpt", "safetensors"):
        raise UserError(f"slices are .ckpt or .safetensors files, not {form}", "--format")
    plan.is_folder = True
    by_name = {tensor.name("ms"): (tensor, move) for tensor, move in zip(tensors, moves)}
    layouts = {tensor.name("ms"): tensor.layout(slicing) for tensor in tensors}
    infos = aligned([TensorInfo.of(name, tensor.target_dtype, layouts[name].slice_shape(tensor.shape))
                     for name, (tensor, _) in by_name.items()])
    plan.files = [OutFile(f"rank_{rank}/{output.prefix}{rank}.{form}", form, tuple(infos),
                          _metadata("ms") if form == "safetensors" else {}) for rank in range(slicing.parts)]
    for info in infos:
        tensor, move = by_name[info.name]
        destinations = tuple(Destination(rank, info.name, layouts[info.name].region(tensor.shape, rank))
                             for rank in range(slicing.parts))
        plan.moves.append(replace(move, destinations=destinations))
    plan.small.update(strategy_files(layouts, slicing.parts))


# ---- MindSpore -> Hugging Face ----

def plan_to_hugging_face(source_path: str, output: Output, config_path: Optional[str] = None,
                         vocab_emb_dp: Optional[bool] = None) -> Plan:
    """Plan the conversion of a MindSpore checkpoint. Quantised ones become what they were converted from, or bfloat16.

    Args:
        source_path: a .ckpt or .safetensors file, a folder of shards, or a folder of `rank_x` slices, merged on the
        way.
        output: what to make; never sliced.
        config_path: the model's config.json; looked for beside the checkpoint if not given.
        vocab_emb_dp: how the slices hold embedding and head; found out if not given.

    Raises:
        UserError: anything missing, surplus, misshapen or not supported; nothing is written.
    """
    form = _form(output, "hf")
    ranks, slicing, config, folder = open_slices(source_path, config_path, vocab_emb_dp)
    with closed_on_error(ranks):
        check_contents(ranks)
        if config is None:
            if form == "folder":
                raise UserError(f"no {CONFIG_FILE} beside it, without which a model folder cannot be loaded",
                                source_path, "Give the model's own with --config_path.")
            config = infer_dims(ranks, slicing)
        weights = list(naming.weights(config.dims))
        plan = Plan(output.target, False, ranks, [], [], notes=[note for rank in ranks for note in rank.notes])
        if slicing.parts > 1:
            slicing.check(config.dims)
            plan.notes.append(f"{source_path}: {slicing.parts} slices with vocab_emb_dp {slicing.vocab_emb_dp} are "
                              "merged")
        account = account_slices(ranks, slicing, config, plan)
        changes: Dict[str, object] = {}
        if account.schemes:
            changes = _plan_quantised_back(plan, ranks, slicing, account, weights, folder, output)
        else:
            tensors = _tensors(ranks[0], account, weights, {}, output.dtype)
            moves = [Move(tensor.name("ms"), tensor.shape, tensor.dtype, tensor.target_dtype,
                          tuple(Part(rank, tensor.name("ms"), tensor.layout(slicing).region(tensor.shape, number))
                                for number, rank in enumerate(ranks)), ()) for tensor in tensors]
            _whole_files(plan, output, tensors, moves, "hf")
            if output.dtype != "auto":
                changes["torch_dtype"] = _one_dtype(plan)
        plan.small.update(sidecars(folder, changes, config_path))
        plan.small.pop(LAYOUT_FILE, None)
        return plan


def _plan_quantised_back(plan: Plan, ranks: Sequence[Checkpoint], slicing: Slicing, account: Account,
                         weights: Sequence[Weight], folder: str, output: Output) -> Dict[str, object]:
    """Fill the plan for a quantised checkpoint; returns the changes to config.json."""
    source, schemes = merged(ranks, slicing, account, weights)
    plan.source_bytes = sum(info.nbytes for rank in ranks for info in rank.infos.values())
    layout_path = os.path.join(folder, LAYOUT_FILE)
    if os.path.isfile(layout_path) and output.dtype == "auto" and not output.dequantise:
        view, infos = original(source, schemes, weights, layout_path)
        moves = []
        for info in infos:
            ours = naming.hf_to_ms(info.name)
            part = Part(view, info.name if info.name in view.made else str(ours), whole(info.shape))
            moves.append(Move(info.name, info.shape, info.dtype, info.dtype, (part,), ()))
        _files_of(plan, output, infos, moves, "hf")
        plan.notes.append("the original quantised tensors, bit for bit; --dequantize makes bfloat16 of them")
        return {}
    dtype = "BF16" if output.dtype == "auto" else SHORT_NAMES[output.dtype]
    view = dequantised(source, schemes, weights, dtype)
    tensors = _tensors(view, account, weights, {}, output.dtype)
    moves = [Move(tensor.name("ms"), tensor.shape, tensor.dtype, tensor.target_dtype,
                  (Part(view, tensor.name("ms"), whole(tensor.shape)),), ()) for tensor in tensors]
    _whole_files(plan, output, tensors, moves, "hf")
    plan.notes.append(f"{len(schemes)} quantised matrices are dequantised to {LONG_NAMES[dtype]}")
    return {CONFIG_KEY: None, "torch_dtype": _one_dtype(plan)}


def check_contents(ranks: Sequence[Checkpoint]) -> None:
    """Compare every file that carries a checksum with it: before its names and shapes are believed."""
    for rank in ranks:
        for file in rank.files:
            file.check_contents()


def account_slices(ranks: Sequence[Checkpoint], slicing: Slicing, config: HfConfig, plan: Plan) -> Account:
    """Every rank's account; the first one's, whose notes go into the plan.

    Raises:
        UserError: a slice is not whole, or the ranks differ.
    """
    expected = Expected(config.dims, config.where, "ms", slicing.parts, slicing.vocab_emb_dp)
    first = _told(ranks[0], take_account(ranks[0], expected), config, plan)
    for rank in ranks[1:]:
        other = take_account(rank, expected)
        if other.schemes != first.schemes:
            raise UserError(f"is quantised in another way than {ranks[0].path}", rank.path,
                            "The slices are not of one checkpoint.")
        for name in first.stored:
            if rank.infos[name].dtype != ranks[0].infos[name].dtype:
                raise UserError(f"{name} is {rank.infos[name].dtype}, in {ranks[0].path} it is "
                                f"{ranks[0].infos[name].dtype}", rank.path, "The slices are not of one checkpoint.")
    return first


def yaml_lines(plan: Plan, output: Output) -> List[str]:
    """The lines of a predict YAML that make it use the result."""
    folder = os.path.abspath(output.target if plan.is_folder else os.path.dirname(os.path.abspath(output.target)))
    slicing = output.slicing
    lines = plan.yaml_lines(*((None, None) if slicing is None else (slicing.parts, slicing.vocab_emb_dp)))
    lines += ["model:", "  model_config:", f"    param_init_type: '{_one_dtype(plan)}'"]
    tokenizer = [(key, name) for key, name in (("vocab_file", "vocab.json"), ("merges_file", "merges.txt"))
                 if name in plan.small]
    if tokenizer:
        lines += ["processor:", "  tokenizer:"]
        lines += [f"    {key}: '{os.path.join(folder, name)}'" for key, name in tokenizer]
    return lines
