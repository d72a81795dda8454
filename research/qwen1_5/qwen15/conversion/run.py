"""Run a plan: move, compare the result, put it in place."""

import os
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Callable, Dict, Iterator, Mapping, Optional, Sequence, Tuple

from ..checkpoint.atomic import (
    AtomicFolder,
    atomic_file,
    check_space,
    check_target,
    disk_bytes,
    partial_path,
    write_small,
)
from ..checkpoint.file_writer import Blocks, FileWriter
from ..checkpoint.reader import Checkpoint, TensorFile
from ..errors import EXIT_FAILED, UserError
from ..progress import byte_bar, skip
from .plan import Plan, groups
from .resume import RECORD_FILE, Record
from .strips import Move, Tally, compare, transfer

RECORD_EVERY_BYTES = 2 ** 30
"""After so many bytes an interrupted run of many files at once can be taken up; that costs some milliseconds."""


@dataclass(frozen=True)
class Result:
    """What running a plan did.

    Attributes:
        tally: of the tensors.
        seconds: that it took.
        resumed, resumed_bytes: whole files, and bytes of the source, that an interrupted run had done.
        compared: tensors that were read back.
        errors: what quantising cost, a line for each matrix.
    """

    tally: Tally
    seconds: float
    resumed: int
    resumed_bytes: int
    compared: int
    errors: Tuple[str, ...] = ()


def run(plan: Plan, verify: bool = False, overwrite: bool = False, allow_overflow: bool = False) -> Result:
    """Carry a plan out.

    Args:
        plan: what to do.
        verify: read the result back and compare every tensor before it is put in place.
        overwrite: replace what is at the target, if it is what this program writes.
        allow_overflow: let casts make infinities.

    Raises:
        UserError: the target is in the way or the disk too small (nothing was written then), or reading, writing or
            comparing failed (nothing was put in place then).
    """
    check_plan(plan, overwrite)
    sources = _states(plan)
    plan.prepare()
    return (_run_folder if plan.is_folder else _run_file)(plan, verify, allow_overflow, overwrite, sources)


def check_plan(plan: Plan, overwrite: bool) -> None:
    """What `run` refuses before it writes anything; a dry run asks the same.

    Raises:
        UserError: the target or a file beside it is in the way, or the disk has no room.
    """
    sources = [file.path for source in plan.sources for file in source.files]
    check_target(plan.target, sources, overwrite, [file.name for file in plan.files])
    if os.path.lexists(plan.target) and os.path.isdir(plan.target) != plan.is_folder:
        raise UserError("is a file, and a folder is to be made" if plan.is_folder else
                        "is a folder, and a file is to be made", plan.target, "Give another path, or --format.")
    # What an interrupted run left is reused or overwritten: either way its space counts as free.
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


def _states(plan: Plan) -> Dict[str, os.stat_result]:
    return {file.path: os.stat(file.path) for source in plan.sources for file in source.files}


def _check_unchanged(sources: Mapping[str, os.stat_result]) -> None:
    """Refuse a result whose source was written to meanwhile; one that was removed or replaced is still read whole."""
    for path, before in sources.items():
        try:
            now = os.stat(path)
        except OSError:
            continue
        if os.path.samestat(now, before) and (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise UserError("has been written to while it was converted, so nothing of the result was put in place",
                            path, "Give the same command again when it changes no more.", exit_code=EXIT_FAILED)


def _run_file(plan: Plan, verify: bool, allow_overflow: bool, overwrite: bool,
              sources: Mapping[str, os.stat_result]) -> Result:
    (file,) = plan.files
    tally = Tally()
    begin = time.monotonic()
    with atomic_file(plan.target, overwrite) as (fd, path):
        with Blocks() as blocks:
            writer = FileWriter(fd, path, file.steps(), blocks)
            with byte_bar("converting", plan.read_bytes) as bar:
                transfer(plan.moves, {0: writer}, tally, allow_overflow, bar.update)
                writer.finish()
        compared = _verify(plan, {0: path}) if verify else 0
        errors = tuple(plan.errors()) if verify else ()
        _check_unchanged(sources)
        for name, content in plan.small.items():
            beside = os.path.join(plan._small_folder, name)
            if _read(beside) != content:
                write_small(beside, content, overwrite)
    return Result(tally, time.monotonic() - begin, 0, 0, compared, errors)


def _run_folder(plan: Plan, verify: bool, allow_overflow: bool, overwrite: bool,
                sources: Mapping[str, os.stat_result]) -> Result:
    begin = time.monotonic()
    folder = AtomicFolder(plan.target, [file.name for file in plan.files])
    try:
        record = Record(plan, folder)
        resumed, resumed_bytes = len(record.done), 0
        with byte_bar("converting", plan.read_bytes) as bar:
            for numbers, moves in groups(plan):
                done = len(moves)
                if not all(plan.files[number].name in record.done for number in numbers):
                    done, _ = record.begun([plan.files[number].name for number in numbers])
                skipped_bytes = sum(move.nbytes for move in moves[:done])
                resumed_bytes += skipped_bytes
                skip(bar, skipped_bytes)
                if done < len(moves):
                    _run_group(plan, numbers, moves, folder, record, allow_overflow, bar.update)
        for name, content in plan.small.items():
            write_small(os.path.join(folder.path, name), content)
        paths = {number: os.path.join(folder.path, file.name) for number, file in enumerate(plan.files)}
        compared = _verify(plan, paths) if verify else 0
        errors = tuple(plan.errors()) if verify else ()
        _check_unchanged(sources)
        folder.publish(overwrite)
        return Result(record.tally, time.monotonic() - begin, resumed, resumed_bytes, compared, errors)
    finally:
        folder.close()


def _run_group(plan: Plan, numbers: Sequence[int], moves: Sequence[Move], folder: AtomicFolder, record: Record,
               allow_overflow: bool, advance: Callable[[int], object]) -> None:
    """Write some files of a folder together, from where an earlier run of the plan has come to."""
    names = [plan.files[number].name for number in numbers]
    first, sizes = record.begun(names)
    with ExitStack() as stack:
        opened = {number: stack.enter_context(folder.file(plan.files[number].name, record.keeps)) for number in numbers}
        # Entered last, so that it exits before the files are closed.
        blocks = stack.enter_context(Blocks(len(numbers)))
        writers = {number: FileWriter(fd, path, plan.files[number].steps(), blocks,
                                      sizes.get(plan.files[number].name, 0)) for number, (fd, path) in opened.items()}
        for last in _stops(moves, first):
            transfer(moves[first:last], writers, record.tally, allow_overflow, advance)
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
                raise UserError(f"holds {sorted(surplus | set(file.others))[0]}, which does not belong there", path)
        with byte_bar("comparing", plan.read_bytes) as bar:
            return compare(plan.moves, results, bar.update)
    finally:
        for result in results.values():
            result.close()
