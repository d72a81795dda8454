"""A conversion as a plan of moves into files, which can be shown before a byte is written."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from ..checkpoint import origin
from ..checkpoint.file_writer import Blocks
from ..checkpoint.quantised_settings import CONFIG_KEY, SETTINGS_FILES
from ..checkpoint.reader import FORMATS, INDEX_FILES, Checkpoint, folder_of, write_index
from ..checkpoint.tensors import TensorInfo, itemsize, total_bytes
from ..errors import UserError
from ..json_file import read_json
from ..progress import human_bytes
from .strips import STRIP_BYTES, Move

LAYOUT_FILE = "source_layout.json"
"""Beside a checkpoint that was converted from a quantised one: what that one's tensors were, to make it again."""
_SIDECARS = ("config.json", "generation_config.json", "vocab.json", "merges.txt", "tokenizer_config.json",
             "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", *SETTINGS_FILES,
             LAYOUT_FILE)
_LARGEST_SIDECAR_BYTES = 64 * 2 ** 20
_INTERPRETER_BYTES = 60 * 10 ** 6
MADE_BYTES = 60 * 10 ** 6
"""Memory for making tensors of others, a few rows at a time: quantising, packing anew."""


@dataclass(frozen=True)
class OutFile:
    """A checkpoint file to be written.

    Attributes:
        name: relative to the target folder; empty when the target is the file itself.
        kind: a key of `FORMATS`.
        infos: its tensors, in order.
        metadata: the format's free text.
    """

    name: str
    kind: str
    infos: Tuple[TensorInfo, ...]
    metadata: Mapping[str, str]

    def steps(self) -> List[Any]:
        """How to write it."""
        return FORMATS[self.kind].steps(self.infos, self.metadata)


@dataclass
class Plan:
    """Everything that is known before the first byte is written.

    Attributes:
        target: the file or folder to make.
        is_folder: which of the two.
        sources: what is read, opened.
        files: what is written.
        moves: the tensors, in the order in which every file wants its own.
        small: name -> contents of small files beside the weights (in the folder, or beside the file).
        notes: what the user should know.
        left_out: kind -> names of entries that are not carried over.
        source_bytes: of the source's tensors, where the result is made of other tensors than those; 0 where it is not.
        errors: what quantising cost, a line for each matrix; asked with `--verify`, after the result has been compared.
        prepare: has to be done before anything is read; what it needs of the result's disk, it sees to itself.
        prepare_bytes: memory that it takes.
    """

    target: str
    is_folder: bool
    sources: Sequence[Checkpoint]
    files: List[OutFile]
    moves: List[Move]
    small: Dict[str, bytes] = field(default_factory=dict)
    notes: List[str] = field(default_factory=list)
    left_out: Dict[str, List[str]] = field(default_factory=dict)
    source_bytes: int = 0
    errors: Callable[[], Iterator[str]] = lambda: iter(())
    prepare: Callable[[], None] = lambda: None
    prepare_bytes: int = 0

    @property
    def read_bytes(self) -> int:
        """Bytes of all tensors, every one counted once."""
        return sum(move.nbytes for move in self.moves)

    @property
    def write_bytes(self) -> int:
        """Disk the result takes."""
        return sum(total_bytes(file.steps()) for file in self.files) + sum(map(len, self.small.values()))

    @property
    def memory_bytes(self) -> int:
        """Memory that running the plan takes, about: Python itself, strips on their way, blocks being written."""
        making = MADE_BYTES if self.source_bytes else 0
        casting = any(move.dtype != move.target_dtype for move in self.moves)
        slicing = any(len(move.parts) > 1 or len(move.destinations) > 1 for move in self.moves)
        at_once = max(len(numbers) for numbers, _ in groups(self))
        strips = STRIP_BYTES * (2 + (4 if casting else 0) + (2 if slicing else 0))
        return max(self.prepare_bytes, _INTERPRETER_BYTES + strips + making + Blocks(at_once).all_bytes)

    def path_of(self, file: OutFile, folder: str) -> str:
        """Where a file is, in the folder or as the target."""
        return os.path.join(folder, file.name) if self.is_folder else folder

    def describe(self) -> Iterator[str]:
        """The plan for a reader: every tensor, then the sums."""
        for move in self.moves:
            for destination in move.destinations[:1]:
                name, cut = destination.name, ""
                values = destination.region.rows * destination.region.columns
                if len(move.destinations) > 1 or values != move.rows * move.columns:
                    first = self.files[destination.file]
                    shape = next(info.shape for info in first.infos if info.name == name)
                    cut = f"  as {len(move.destinations)} x {list(shape)}"
                cast = "" if move.dtype == move.target_dtype else f" -> {move.target_dtype}"
                yield (f"{move.label}  ->  {name}  {move.dtype}{cast} {list(move.shape)}{cut}  "
                       f"{human_bytes(move.nbytes)}")
        for file in self.files:
            yield (f"{self.path_of(file, self.target)}: {len(file.infos)} tensors, "
                   f"{human_bytes(total_bytes(file.steps()))}")
        for name in sorted(self.small):
            yield f"{os.path.join(self._small_folder, name)}: {human_bytes(len(self.small[name]))}"
        yield (f"{len(self.moves)} tensors; reads {human_bytes(self.source_bytes or self.read_bytes)}, "
               f"writes {human_bytes(self.write_bytes)}, needs about {human_bytes(self.memory_bytes)} of memory")

    @property
    def _small_folder(self) -> str:
        return self.target if self.is_folder else os.path.dirname(os.path.abspath(self.target))

    def yaml_lines(self, parts: Optional[int], vocab_emb_dp: Optional[bool]) -> List[str]:
        """The lines of a predict YAML that say where the result is and, of one for `parts` ranks, how it is cut."""
        lines = [f"load_checkpoint: '{os.path.abspath(self.target)}'", "auto_trans_ckpt: False"]
        if parts is not None:
            lines += [f"use_parallel: {parts > 1}", "parallel_config:", "  data_parallel: 1",
                      f"  model_parallel: {parts}", "  pipeline_stage: 1"]
        return lines if vocab_emb_dp is None else [*lines, f"  vocab_emb_dp: {vocab_emb_dp}"]

    def close(self) -> None:
        """Close what is read."""
        for source in self.sources:
            source.close()


def record_source(plan: Plan, source: str) -> None:
    """Note in every .safetensors file of the plan what it is made from, so that slices of one source are known."""
    for number, file in enumerate(plan.files):
        if file.kind == "safetensors":
            rank = number if file.name.startswith("rank_") else None
            made = origin.record(source, rank, len(plan.files))
            plan.files[number] = replace(file, metadata={**file.metadata, **made})


def shape_files(infos: Sequence[TensorInfo], most_bytes: int) -> List[List[TensorInfo]]:
    """Fill shards in order, none above `most_bytes` unless one tensor alone is."""
    shards: List[List[TensorInfo]] = []
    filled = 0
    for info in infos:
        if not shards or (filled + info.nbytes > most_bytes and shards[-1]):
            shards.append([])
            filled = 0
        shards[-1].append(info)
        filled += info.nbytes
    return shards


def aligned(infos: Sequence[TensorInfo]) -> List[TensorInfo]:
    """Wider elements first, so that every tensor in a file is aligned; the order is kept otherwise."""
    return sorted(infos, key=lambda info: -itemsize(info.dtype))


def shard_names(count: int) -> List[str]:
    """The file names that a checkpoint in `count` shards has by convention."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def index_of(files: Sequence[OutFile]) -> Dict[str, bytes]:
    """The index beside several shards; nothing for one."""
    if len(files) == 1:
        return {}
    weight_map = {info.name: file.name for file in files for info in file.infos}
    nbytes = sum(info.nbytes for file in files for info in file.infos)
    return {INDEX_FILES["safetensors"]: write_index(weight_map, nbytes)}


def sidecars(folder: str, changes: Mapping[str, Any], config_path: Optional[str] = None) -> Dict[str, bytes]:
    """The small files that predicting needs, from the folder of the source.

    Args:
        folder: where they are looked for; those that are missing are not in the result.
        config_path: the config.json that was given instead of the folder's; its folder's files go before.
        changes: keys of config.json and what they shall be, None for those that shall go; nothing leaves the file as it
            is, byte for byte. Without a `quantization_config` the other files that tell of one go as well.

    Raises:
        UserError: one is too large to be such a file, or config.json is damaged.
    """
    if config_path is not None:
        return {**sidecars(folder, {}), **sidecars(folder_of(config_path), changes)}
    found: Dict[str, bytes] = {}
    for name in _SIDECARS:
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            if os.path.getsize(path) > _LARGEST_SIDECAR_BYTES:
                raise UserError(f"{human_bytes(os.path.getsize(path))} are too many for such a file", path)
            with open(path, "rb") as file:
                found[name] = file.read()
    if changes and "config.json" in found:
        config = read_json(os.path.join(folder, "config.json"))
        changed = {key: value for key, value in config.items() if changes.get(key, value) is not None or value is None}
        for key, value in changes.items():
            if key == "torch_dtype" and "dtype" in config and "torch_dtype" not in config:
                key = "dtype"
            if value is not None:
                changed[key] = value
        if changed != config:
            found["config.json"] = (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
    if changes.get(CONFIG_KEY, "") is None:
        found = {name: content for name, content in found.items() if name not in SETTINGS_FILES}
    return found


def groups(plan: Plan) -> Iterator[Tuple[List[int], List[Move]]]:
    """Files that must be written together, with their moves: single shards, or all ranks at once."""
    numbers: List[int] = []
    moves: List[Move] = []
    for move in plan.moves:
        here = sorted({destination.file for destination in move.destinations})
        if moves and not set(here) & set(numbers):
            yield numbers, moves
            numbers, moves = [], []
        numbers = sorted(set(numbers) | set(here))
        moves.append(move)
    if moves:
        yield numbers, moves
