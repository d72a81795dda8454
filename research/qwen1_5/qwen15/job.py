"""A conversion as a plan of moves into files: show it, run it, compare the result, put it in place."""

import json
import os
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from .errors import UserError
from .file_writer import Blocks, FileWriter
from .hf_config import read_json
from .output import AtomicFolder, atomic_file, check_space, check_target, disk_bytes, partial_path, write_small
from .progress import Progress, human_bytes
from .resume import RECORD_FILE, Record
from .tensorfile import FORMATS, INDEX_FILES, Checkpoint, TensorFile, write_index
from .tensors import TensorInfo, itemsize, total_bytes
from .transfer import STRIP_BYTES, Account, Move, compare, transfer

RECORD_EVERY_BYTES = 2 ** 30
"""After so many bytes an interrupted run of many files at once can be taken up; making sure of them costs some milliseconds."""
_SIDECARS = ("config.json", "generation_config.json", "vocab.json", "merges.txt", "tokenizer_config.json",
             "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
_LARGEST_SIDECAR_BYTES = 64 * 2 ** 20
_INTERPRETER_BYTES = 60 * 10 ** 6


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
    """

    target: str
    is_folder: bool
    sources: Sequence[Checkpoint]
    files: List[OutFile]
    moves: List[Move]
    small: Dict[str, bytes] = field(default_factory=dict)
    notes: List[str] = field(default_factory=list)
    left_out: Dict[str, List[str]] = field(default_factory=dict)

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
        """Memory that running the plan takes, about: Python itself, strips on their way, and blocks that are being written."""
        casting = any(move.dtype != move.target_dtype for move in self.moves)
        slicing = any(len(move.parts) > 1 or len(move.destinations) > 1 for move in self.moves)
        at_once = max(len(numbers) for numbers, _ in _groups(self))
        return _INTERPRETER_BYTES + STRIP_BYTES * (2 + (4 if casting else 0) + (2 if slicing else 0)) + Blocks(at_once).all_bytes

    def path_of(self, file: OutFile, folder: str) -> str:
        """Where a file is, in the folder or as the target."""
        return os.path.join(folder, file.name) if self.is_folder else folder

    def describe(self) -> Iterator[str]:
        """The plan for a reader: every tensor, then the sums."""
        for move in self.moves:
            for destination in move.destinations[:1]:
                name, cut = destination.name, ""
                if len(move.destinations) > 1 or destination.region.rows * destination.region.columns != move.rows * move.columns:
                    first = self.files[destination.file]
                    shape = next(info.shape for info in first.infos if info.name == name)
                    cut = f"  as {len(move.destinations)} x {list(shape)}"
                cast = "" if move.dtype == move.target_dtype else f" -> {move.target_dtype}"
                yield f"{move.label}  ->  {name}  {move.dtype}{cast} {list(move.shape)}{cut}  {human_bytes(move.nbytes)}"
        for file in self.files:
            yield f"{self.path_of(file, self.target)}: {len(file.infos)} tensors, {human_bytes(total_bytes(file.steps()))}"
        for name in sorted(self.small):
            yield f"{os.path.join(self._small_folder, name)}: {human_bytes(len(self.small[name]))}"
        yield (f"{len(self.moves)} tensors; reads {human_bytes(self.read_bytes)}, writes {human_bytes(self.write_bytes)}, "
               f"needs about {human_bytes(self.memory_bytes)} of memory")

    @property
    def _small_folder(self) -> str:
        return self.target if self.is_folder else os.path.dirname(os.path.abspath(self.target))

    def close(self) -> None:
        """Close what is read."""
        for source in self.sources:
            source.close()


@dataclass(frozen=True)
class Result:
    """What running a plan did.

    Attributes:
        account: of the tensors.
        seconds: that it took.
        resumed, resumed_bytes: whole files, and bytes of the source, that an interrupted run had done.
        compared: tensors that were read back.
    """

    account: Account
    seconds: float
    resumed: int
    resumed_bytes: int
    compared: int


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


def sidecars(folder: str, torch_dtype: Optional[str] = None) -> Dict[str, bytes]:
    """The small files that predicting needs, from the folder of the source.

    Args:
        folder: where they are looked for; those that are missing are not in the result.
        torch_dtype: what config.json shall say about the weights; None leaves the file as it is.
    """
    found: Dict[str, bytes] = {}
    for name in _SIDECARS:
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            if os.path.getsize(path) > _LARGEST_SIDECAR_BYTES:
                raise UserError(f"{human_bytes(os.path.getsize(path))} are too many for such a file", path)
            with open(path, "rb") as file:
                found[name] = file.read()
    if torch_dtype is not None and "config.json" in found:
        config = read_json(os.path.join(folder, "config.json"))
        key = "dtype" if "dtype" in config and "torch_dtype" not in config else "torch_dtype"
        if config.get(key) != torch_dtype:
            config[key] = torch_dtype
            found["config.json"] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
    return found


def run(plan: Plan, verify: bool = False, overwrite: bool = False, allow_overflow: bool = False) -> Result:
    """Carry a plan out.

    Args:
        plan: what to do.
        verify: read the result back and compare every tensor before it is put in place.
        overwrite: replace what is at the target, if it is what this program writes.
        allow_overflow: let casts make infinities.

    Raises:
        UserError: the target is in the way or the disk too small (nothing was written then), or reading, writing or comparing
            failed (nothing was put in place then).
    """
    check_plan(plan, overwrite)
    return (_run_folder if plan.is_folder else _run_file)(plan, verify, allow_overflow)


def check_plan(plan: Plan, overwrite: bool) -> None:
    """What `run` refuses before it writes anything; a dry run asks the same."""
    sources = [file.path for source in plan.sources for file in source.files]
    check_target(plan.target, sources, overwrite)
    # What an interrupted run has left is taken up, or written over: either way its room is there.
    check_space(plan.target, plan.write_bytes - disk_bytes(partial_path(plan.target)))
    if not plan.is_folder:
        for name, content in plan.small.items():
            path = os.path.join(plan._small_folder, name)
            if os.path.lexists(path) and not overwrite and _read(path) != content:
                raise UserError("exists already, and the model that is converted has another", path,
                                "Write to a folder of its own, or --overwrite to replace it.")


def kept_bytes(plan: Plan) -> int:
    """Disk taken by what an interrupted run of a plan has left for the next; 0 when there is nothing to go on from."""
    scratch = partial_path(plan.target)
    return disk_bytes(scratch) if os.path.exists(os.path.join(scratch, RECORD_FILE)) else 0


def _read(path: str) -> Optional[bytes]:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return None


def _run_file(plan: Plan, verify: bool, allow_overflow: bool) -> Result:
    (file,) = plan.files
    account = Account()
    begin = time.monotonic()
    with atomic_file(plan.target) as (fd, path):
        with Blocks() as blocks:
            writer = FileWriter(fd, path, file.steps(), blocks)
            with Progress("converting", plan.read_bytes) as progress:
                transfer(plan.moves, {0: writer}, account, allow_overflow, progress.advance)
                writer.finish()
        compared = _verify(plan, {0: path}) if verify else 0
        for name, content in plan.small.items():
            beside = os.path.join(plan._small_folder, name)
            if _read(beside) != content:
                write_small(beside, content)
    return Result(account, time.monotonic() - begin, 0, 0, compared)


def _run_folder(plan: Plan, verify: bool, allow_overflow: bool) -> Result:
    begin = time.monotonic()
    folder = AtomicFolder(plan.target)
    try:
        record = Record(plan, folder)
        resumed = len(record.done)
        with Progress("converting", plan.read_bytes) as progress:
            for numbers, moves in _groups(plan):
                if all(plan.files[number].name in record.done for number in numbers):
                    progress.skip(sum(move.nbytes for move in moves))
                else:
                    _run_group(plan, numbers, moves, folder, record, allow_overflow, progress)
        for name, content in plan.small.items():
            write_small(os.path.join(folder.path, name), content)
        paths = {number: os.path.join(folder.path, file.name) for number, file in enumerate(plan.files)}
        compared = _verify(plan, paths) if verify else 0
        folder.publish()
        return Result(record.account, time.monotonic() - begin, resumed, progress.skipped_bytes, compared)
    finally:
        folder.close()


def _groups(plan: Plan) -> Iterator[Tuple[List[int], List[Move]]]:
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


def _run_group(plan: Plan, numbers: Sequence[int], moves: Sequence[Move], folder: AtomicFolder, record: Record,
               allow_overflow: bool, progress: Progress) -> None:
    """Write some files of a folder together, from where an earlier run of the plan has come to."""
    names = [plan.files[number].name for number in numbers]
    first, sizes = record.begun(names)
    progress.skip(sum(move.nbytes for move in moves[:first]))
    with ExitStack() as stack:
        opened = {number: stack.enter_context(folder.file(plan.files[number].name, record.keeps)) for number in numbers}
        blocks = stack.enter_context(Blocks(len(numbers)))  # opened last, so that it is left before the files are closed
        writers = {number: FileWriter(fd, path, plan.files[number].steps(), blocks, sizes.get(plan.files[number].name, 0))
                   for number, (fd, path) in opened.items()}
        for last in _stops(moves, first):
            transfer(moves[first:last], writers, record.account, allow_overflow, progress.advance)
            if last < len(moves):
                record.begin(last, {plan.files[number].name: writer.sync() for number, writer in writers.items()})
            first = last
        for writer in writers.values():
            writer.finish()
        record.finish(names)


def _stops(moves: Sequence[Move], first: int) -> Iterator[int]:
    """After how many moves to write down how far it has come, the last time after all of them."""
    nbytes = 0
    for number in range(first, len(moves)):
        nbytes += moves[number].nbytes
        if nbytes >= RECORD_EVERY_BYTES or number == len(moves) - 1:
            yield number + 1
            nbytes = 0


def _verify(plan: Plan, paths: Mapping[int, str]) -> int:
    results: Dict[int, Checkpoint] = {}
    try:
        for number, path in paths.items():
            file = TensorFile(path, plan.files[number].kind)
            file.forget_cached()
            results[number] = file
            surplus = set(file.infos) - {info.name for info in plan.files[number].infos}
            if surplus or file.others:
                raise UserError(f"holds {sorted(surplus | set(file.others))[0]}, which nobody wrote", path)
        with Progress("comparing", plan.read_bytes) as progress:
            return compare(plan.moves, results, progress.advance)
    finally:
        for result in results.values():
            result.close()
