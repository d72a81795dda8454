"""Plan the splitting, merging and cutting anew of MindSpore checkpoints over ranks, with or without strategy files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Dict, List, Optional, Sequence, Tuple

from .. import naming
from ..checkpoint import origin
from ..checkpoint.account import Account
from ..checkpoint.leftovers import kind_of
from ..checkpoint.quantised import ORDER, SCALE, ZERO, companion_of
from ..checkpoint.quantised_settings import group_size_of
from ..checkpoint.reader import Checkpoint, closed_on_error, format_of
from ..checkpoint.regrouped import coarser, finer, regrouped
from ..checkpoint.tensors import TensorInfo
from ..config.hf_config import CONFIG_FILE, HfConfig
from ..errors import UserError
from ..naming import Weight
from .hugging_face import account_slices, check_contents
from .plan import OutFile, Plan, aligned, record_source, sidecars
from .slices import Slicing, open_slices
from .strategy import Layout, layout_of, read_strategy, strategy_files
from .strips import Destination, Move, Part, whole
from .unquantise import merged


@dataclass(frozen=True)
class Reslicing:
    """What shall be made of what.

    Attributes:
        source: a .ckpt or .safetensors file, a folder of shards, or a folder of `rank_x` slices.
        target: the folder for `rank_x` slices, or a .ckpt or .safetensors file for a whole checkpoint.
        parts: how many ranks to cut for; 1 merges. Ignored with `target_strategy`.
        vocab_emb_dp: whether every rank keeps embedding and head whole. Ignored with `target_strategy`.
        source_strategy, target_strategy: strategy files, or folders of them; they decide wherever they are given.
        source_vocab_emb_dp: how the source holds embedding and head; found out if not given.
        config_path: the model's config.json; looked for beside the source if not given.
        form: 'ckpt' or 'safetensors'; the source's if not given.
        prefix: start of the slices' file names, before the rank.
    """

    source: str
    target: str
    parts: int = 1
    vocab_emb_dp: bool = True
    source_strategy: Optional[str] = None
    target_strategy: Optional[str] = None
    source_vocab_emb_dp: Optional[bool] = None
    config_path: Optional[str] = None
    form: Optional[str] = None
    prefix: str = "checkpoint_"


@dataclass(frozen=True)
class _Cut:
    """One parameter: its whole shape, how it lies before and after, and what it is read from if not from the ranks."""

    shape: Tuple[int, ...]
    before: Layout
    after: Layout
    view: Optional[Checkpoint] = None


def plan_transform(request: Reslicing) -> Plan:
    """Plan the work.

    Raises:
        UserError: anything missing, surplus or misshapen, a number of ranks that does not divide, or strategy files
            that contradict the checkpoint; nothing is written.
    """
    before = read_strategy(request.source_strategy) if request.source_strategy else None
    after = read_strategy(request.target_strategy) if request.target_strategy else None
    ranks, slicing, config, folder = open_slices(request.source, request.config_path, request.source_vocab_emb_dp,
                                                 strict=before is None)
    with closed_on_error(ranks):
        check_contents(ranks)
        plan = Plan(request.target, False, ranks, [], [], notes=[note for rank in ranks for note in rank.notes])
        if before is None and after is None:
            cuts = _cuts_by_table(request, ranks, slicing, config, folder, plan)
        else:
            cuts = _cuts_by_strategy(request, ranks, slicing, config, before, after, plan)
        _fill(plan, request, ranks, cuts)
        record_source(plan, origin.source_of(ranks))
        plan.small.update(sidecars(folder, {}, request.config_path))
        return plan


def _cuts_by_table(request: Reslicing, ranks: Sequence[Checkpoint], slicing: Slicing, config: Optional[HfConfig],
                   folder: str, plan: Plan) -> Dict[str, _Cut]:
    """Every weight of the model, cut as MindFormers' network cuts it."""
    config = _needed(config, request)
    target = Slicing(request.parts, request.vocab_emb_dp)
    slicing.check(config.dims)
    target.check(config.dims)
    same_cut = slicing.parts == target.parts and (target.parts == 1 or slicing.vocab_emb_dp == target.vocab_emb_dp)
    if same_cut and request.form in (None, _form_of(ranks[0])):
        raise UserError("is whole already" if target.parts == 1 else f"is cut for {target.parts} ranks already",
                        request.source, "Give --model_parallel to cut it for another number of ranks.")
    weights = list(naming.weights(config.dims))
    account = account_slices(ranks, slicing, config, plan)
    if target.parts > 1 and not target.vocab_emb_dp and config.dims.vocab_size % target.parts:
        plan.notes.append(f"vocab_size {config.dims.vocab_size} is not divisible by {target.parts}: embedding and head "
                          "stay whole on every rank")
    if not account.schemes:
        return {weight.ms: _Cut(weight.shape, _by_table(weight, slicing), _by_table(weight, target))
                for weight in weights}
    return _quantised_cuts(ranks, slicing, target, account, weights, folder)


def _quantised_cuts(ranks: Sequence[Checkpoint], slicing: Slicing, target: Slicing, account: Account,
                    weights: Sequence[Weight], folder: str) -> Dict[str, _Cut]:
    """As `_cuts_by_table`; scales and zero points are read through a view where their groups become others."""
    source, schemes = merged(ranks, slicing, account, weights)
    group_size = group_size_of(folder)
    cuts: Dict[str, _Cut] = {}
    changed, made = {}, []
    for weight in weights:
        scheme = schemes.get(weight.ms)
        if scheme is None:
            cuts[weight.ms] = _Cut(weight.shape, _by_table(weight, slicing), _by_table(weight, target))
            continue
        new = scheme
        if slicing.axis(weight) == 1 and group_size is not None:
            new = coarser(scheme, weight.shape[1], group_size)
        if target.axis(weight) == 1:
            new = finer(new, weight.ms, weight.shape[1], target.parts, source.path)
        if new != scheme:
            changed[weight.ms] = (scheme, new)
        for info in new.infos(weight.ms, weight.shape):
            whole_order = info.name.endswith(ORDER)
            before = layout_of(len(info.shape), None if whole_order else slicing.axis(weight), slicing.parts)
            after = layout_of(len(info.shape), None if whole_order else target.axis(weight), target.parts)
            is_made = new != scheme and info.name.endswith((SCALE, ZERO))
            made += [info.name] if is_made else []
            cuts[info.name] = _Cut(info.shape, before, after)
    view = regrouped(source, changed)
    return {name: replace(cut, view=view) if name in made else cut for name, cut in cuts.items()}


def _by_table(weight: Weight, slicing: Slicing) -> Layout:
    return layout_of(len(weight.shape), slicing.axis(weight), slicing.parts)


def _needed(config: Optional[HfConfig], request: Reslicing) -> HfConfig:
    if config is None:
        raise UserError(f"no {CONFIG_FILE} beside it, from which to know the model's sizes", request.source,
                        "Give the model's own with --config_path, or strategy files.")
    return config


def _cuts_by_strategy(request: Reslicing, ranks: Sequence[Checkpoint], slicing: Slicing, config: Optional[HfConfig],
                      before: Optional[Dict[str, Layout]], after: Optional[Dict[str, Layout]],
                      plan: Plan) -> Dict[str, _Cut]:
    """Every tensor, cut as the strategy files say; the table stands in for the file that is not given."""
    weights = {} if config is None else {weight.ms: weight for weight in naming.weights(config.dims)}
    if (before is None and slicing.parts > 1) or (after is None and request.parts > 1):
        _needed(config, request)
    target = Slicing(request.parts, request.vocab_emb_dp)
    if config is not None and after is None:
        target.check(config.dims)
    _check_ranks(before, len(ranks), request)
    packed = next((name for name, info in ranks[0].infos.items() if companion_of(name) or info.dtype in ("I8", "U8")),
                  None)
    if packed is not None:
        raise UserError(f"{packed} is of a quantised matrix, which strategy files do not cut", request.source,
                        "Leave the strategy files out; --model_parallel cuts it.")
    cuts: Dict[str, _Cut] = {}
    for name, info in ranks[0].infos.items():
        kind = kind_of(name)
        if kind == "KV caches" or (kind and before is None and after is None):
            plan.left_out.setdefault(kind, []).append(name)
            continue
        old = _choose(name, info, before, weights, slicing)
        shape = old.whole_shape(info.shape)
        new = _choose(name, TensorInfo.of(name, info.dtype, shape), after, weights, target)
        if name in weights and shape != weights[name].shape:
            raise UserError(f"{name} in slices of {list(info.shape)} is {list(shape)} whole by the strategy; "
                            f"config.json makes it {list(weights[name].shape)}",
                            request.source_strategy or request.source,
                            "Give the strategy of the job that wrote this checkpoint.")
        _divisible(name, shape, new, request)
        cuts[name] = _Cut(shape, old, new)
    _check_names(request, ranks, before, after, cuts)
    return cuts


def _choose(name: str, info: TensorInfo, strategy: Optional[Dict[str, Layout]], weights: Dict[str, Weight],
            slicing: Slicing) -> Layout:
    if strategy is not None:
        found = strategy.get(name)
        # A tensor that the strategy does not name is whole on every rank: MindSpore's own rule.
        return found if found is not None else Layout((next(iter(strategy.values())).ranks,), (-1,) * len(info.shape))
    if name in weights:
        return _by_table(weights[name], slicing)
    return layout_of(len(info.shape), None, slicing.parts)


def _check_ranks(before: Optional[Dict[str, Layout]], ranks: int, request: Reslicing) -> None:
    for name, layout in (before or {}).items():
        if layout.ranks != ranks:
            raise UserError(f"cuts {name} over {layout.ranks} ranks, {request.source} has {ranks}",
                            request.source_strategy, "Give the strategy of the job that wrote this checkpoint.")


def _divisible(name: str, shape: Tuple[int, ...], layout: Layout, request: Reslicing) -> None:
    try:
        layout.region(shape, 0)
    except ValueError as error:
        raise UserError(f"{name} cannot be cut: {error}", request.target_strategy or "--model_parallel",
                        "The strategy is of another model.") from None


def _check_names(request: Reslicing, ranks: Sequence[Checkpoint], before: Optional[Dict[str, Layout]],
                 after: Optional[Dict[str, Layout]], cuts: Dict[str, _Cut]) -> None:
    """A strategy and a checkpoint are of one model: the weights that one names, the other has."""
    for strategy, path in ((before, request.source_strategy), (after, request.target_strategy)):
        if strategy is None:
            continue
        counts = {layout.ranks for layout in strategy.values()}
        if len(counts) > 1:
            raise UserError(f"cuts some parameters over {min(counts)} ranks and some over {max(counts)}", path,
                            "Give the strategy of one job.")
        absent = [name for name in strategy if naming.ms_to_hf(name) and name not in cuts]
        if absent:
            raise UserError(f"names {absent[0]}, which {request.source} does not have", path,
                            "Checkpoint and strategy are of different models.")
        unnamed = [name for name in cuts if naming.ms_to_hf(name) and name not in strategy]
        if unnamed:
            raise UserError(f"says nothing about {unnamed[0]}, which {request.source} has", path,
                            "Checkpoint and strategy are of different models.")
    for rank in ranks[1:]:
        for name in sorted(set(rank.infos) ^ set(ranks[0].infos)):
            if kind_of(name) != "KV caches":
                raise UserError(f"{name} is in one of rank_0 and this rank only", rank.path,
                                "Collect all slices of one job.")
        for name in cuts:
            one, other = ranks[0].infos[name], rank.infos[name]
            if (one.dtype, one.shape) != (other.dtype, other.shape):
                raise UserError(f"{name} is {other.dtype} {list(other.shape)}, in rank_0 {one.dtype} {list(one.shape)}",
                                rank.path, "Collect all slices of one job.")


def _form_of(checkpoint: Checkpoint) -> str:
    return str(checkpoint.files[0].kind)


def _fill(plan: Plan, request: Reslicing, ranks: Sequence[Checkpoint], cuts: Dict[str, _Cut]) -> None:
    """Files and moves of the plan."""
    if not cuts:
        raise UserError("holds no weights", request.source)
    parts = max(cut.after.ranks for cut in cuts.values())
    single = format_of(request.target)
    form = request.form or single or _form_of(ranks[0])
    if single and (parts > 1 or single != form):
        raise UserError(f"is a file's name, {parts} ranks need a folder" if parts > 1 else f"is not a name for {form}",
                        request.target, "Give a folder as --dst_ckpt_dir.")
    infos = aligned([TensorInfo.of(name, ranks[0].infos[name].dtype, cut.after.slice_shape(cut.shape))
                     for name, cut in cuts.items()])
    metadata = {"format": "ms"} if form == "safetensors" else {}
    plan.is_folder = single is None
    plan.files = [OutFile(f"rank_{rank}/{request.prefix}{rank}.{form}" if plan.is_folder else "", form, tuple(infos),
                          metadata) for rank in range(parts)]
    for info in infos:
        cut = cuts[info.name]
        sources = ((Part(cut.view, info.name, whole(cut.shape)),) if cut.view is not None else
                   tuple(Part(rank, info.name, cut.before.region(cut.shape, number))
                         for number, rank in enumerate(ranks)))
        targets = tuple(Destination(rank, info.name, cut.after.region(cut.shape, rank)) for rank in range(parts))
        plan.moves.append(Move(info.name, cut.shape, info.dtype, info.dtype, sources, targets))
    if parts > 1:
        plan.small.update(strategy_files({name: cut.after for name, cut in cuts.items()}, parts))


def yaml_lines(plan: Plan, request: Reslicing) -> List[str]:
    """The lines of a predict YAML that make it use the result."""
    by_table = len(plan.files) > 1 and request.target_strategy is None
    return plan.yaml_lines(len(plan.files), request.vocab_emb_dp if by_table else None)
