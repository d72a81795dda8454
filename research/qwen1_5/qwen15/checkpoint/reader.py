"""Open checkpoints for reading, one tensor at a time: .safetensors, .ckpt and .bin files, and folders of them."""

import contextlib
import json
import mmap
import os
import re
from typing import Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np

from ..errors import EXIT_FAILED, UserError
from ..json_file import read_json
from . import format_bin, format_ckpt, format_safetensors
from .pages import ask_for_huge_pages
from .tensors import NUMPY_DTYPES, Scan, Stored, TensorInfo, itemsize

FORMATS = {"safetensors": format_safetensors, "ckpt": format_ckpt, "bin": format_bin}
"""Each has `scan(fd, path)` to read headers and `steps(infos, metadata)` to write a file."""

INDEX_FILES = {"safetensors": "model.safetensors.index.json", "bin": "pytorch_model.bin.index.json"}
_SHARD = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.(?P<format>safetensors|bin|ckpt)$")
_RANK = re.compile(r"^rank_(0|[1-9][0-9]*)$")
_LFS_POINTER = b"version https://git-lfs"


def format_of(path: str) -> Optional[str]:
    """'safetensors', 'ckpt' or 'bin' by the file name's extension, None for any other."""
    extension = os.path.splitext(path)[1].lstrip(".")
    return extension if extension in FORMATS else None


def folder_of(path: str) -> str:
    """The folder in which a checkpoint's small files lie: itself, or that of its file."""
    return path if os.path.isdir(path) else os.path.dirname(os.path.abspath(path))


class Checkpoint:
    """What is common to a file and a folder: tensors by name, read whole or in part.

    Attributes:
        path: the file or folder.
        infos: name -> `TensorInfo`, every tensor there is.
        others: name -> what it is, for entries that are no tensors.
        notes: what a user should know about how the path was read.
        files: the open files.
    """

    path: str
    infos: Dict[str, TensorInfo]
    others: Dict[str, str]
    notes: List[str]
    files: List["TensorFile"]

    def file_of(self, name: str) -> "TensorFile":
        """The file that holds the tensor.

        Raises:
            KeyError: no such tensor.
        """
        raise NotImplementedError

    def read(self, name: str, axis: Optional[int] = None, start: int = 0, stop: Optional[int] = None) -> np.ndarray:
        """A tensor, or its part `start:stop` along `axis`.

        Returns:
            A read-only C-contiguous array of the tensor's dtype (BF16 as uint16 bits). The whole and parts along axis 0
            are views of the mapped file wherever the file's layout allows: one piece, aligned.

        Raises:
            KeyError: no such tensor.
        """
        return self.file_of(name).read(name, axis, start, stop)

    def read_into(self, name: str, offset: int, buffer: Union[memoryview, np.ndarray]) -> None:
        """Fill `buffer` with the tensor's bytes from byte `offset` on; maps nothing."""
        self.file_of(name).read_into(name, offset, buffer)

    def state(self) -> List[List[Union[str, int]]]:
        """Path, size and time of each file: the same as long as nobody has changed them."""
        return [[os.path.realpath(file.path), os.stat(file.path).st_size, os.stat(file.path).st_mtime_ns]
                for file in self.files]

    def close(self) -> None:
        """Close the files. Arrays that were read stay valid."""
        for file in self.files:
            file.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class TensorFile(Checkpoint):
    """One file."""

    def __init__(self, path: str, kind: Optional[str] = None):
        """Open a file and check its headers.

        Args:
            path: the file.
            kind: a key of `FORMATS`; by the extension if it is not given.

        Raises:
            UserError: no such file, an unknown kind, or a damaged one.
        """
        self.path = path
        kind = kind or format_of(path)
        if kind is None:
            raise UserError("not a kind of checkpoint this program knows", path,
                            f"Known extensions are {', '.join('.' + name for name in FORMATS)}.")
        self.kind = kind
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"cannot be opened: {error.strerror}", path) from None
        self._map: Optional[mmap.mmap] = None
        self.files = [self]
        self.notes = []
        try:
            if os.pread(self._fd, len(_LFS_POINTER), 0) == _LFS_POINTER:
                raise UserError("a Git LFS pointer, not the weights themselves", path,
                                "Run `git lfs pull` in the folder, or download the file itself.")
            scan = self._scan()
        except OSError as error:
            self.close()
            raise UserError(f"cannot be read: {error.strerror}", path) from None
        except BaseException:
            self.close()
            raise
        self.stored: Dict[str, Stored] = scan.tensors
        self.infos = {name: stored.info for name, stored in scan.tensors.items()}
        self.others = scan.others
        self.metadata = scan.metadata

    def _scan(self) -> Scan:
        return FORMATS[self.kind].scan(self._fd, self.path)

    def file_of(self, name: str) -> "TensorFile":
        if name not in self.infos:
            raise KeyError(name)
        return self

    def read(self, name: str, axis: Optional[int] = None, start: int = 0, stop: Optional[int] = None) -> np.ndarray:
        info = self.stored[name].info
        if axis is None:
            return self._bytes(name, 0, info.nbytes).view(NUMPY_DTYPES[info.dtype]).reshape(info.shape)
        start, stop, _ = slice(start, stop).indices(info.shape[axis])
        stop = max(start, stop)
        if axis == 0:
            shape = (stop - start,) + info.shape[1:]
            row = info.nbytes // info.shape[0] if info.shape[0] else 0
            return self._bytes(name, start * row, (stop - start) * row).view(NUMPY_DTYPES[info.dtype]).reshape(shape)
        part = np.ascontiguousarray(self.read(name)[(slice(None),) * axis + (slice(start, stop),)])
        part.flags.writeable = False
        return part

    def _bytes(self, name: str, begin: int, nbytes: int) -> np.ndarray:
        """A byte range of a tensor: a view of the map if it is one aligned piece, a copy if not."""
        pieces = list(self._pieces(name, begin, nbytes))
        if nbytes == 0:
            return np.empty(0, np.uint8)
        if len(pieces) == 1 and pieces[0][0] % itemsize(self.stored[name].info.dtype) == 0:
            if self._map is None:
                # A copy-on-write map: MindSpore and torch may then share the memory without being able to alter the
                # file.
                self._map = mmap.mmap(self._fd, 0, access=mmap.ACCESS_COPY)
                # Up to 15 % less for a token at batch 1, which reads all weights: fewer addresses are translated.
                ask_for_huge_pages(self._map)
            view = np.frombuffer(self._map, np.uint8, nbytes, pieces[0][0])
        else:
            view = np.empty(nbytes, np.uint8)
            self.read_into(name, begin, view)
        view.flags.writeable = False
        return view

    def _pieces(self, name: str, begin: int, nbytes: int) -> Iterator[Tuple[int, int]]:
        """(file offset, bytes) of a byte range of a tensor."""
        for offset, length in self.stored[name].segments:
            if nbytes <= 0:
                return
            if begin < length:
                here = min(length - begin, nbytes)
                yield offset + begin, here
                nbytes -= here
                begin = 0
            else:
                begin -= length

    def read_into(self, name: str, offset: int, buffer: Union[memoryview, np.ndarray]) -> None:
        view = (buffer.data if isinstance(buffer, np.ndarray) else buffer).cast("B")
        done = 0
        for at, nbytes in self._pieces(name, offset, len(view)):
            while nbytes:
                try:
                    got = os.preadv(self._fd, [view[done:done + nbytes]], at)
                except OSError as error:
                    raise UserError(f"reading {name} failed: {error.strerror}", self.path,
                                    exit_code=EXIT_FAILED) from None
                if got == 0:
                    raise UserError(f"the file ended at byte {at}, inside {name}: it became shorter while it was read",
                                    self.path, "Is it still being downloaded or written?", exit_code=EXIT_FAILED)
                done, at, nbytes = done + got, at + got, nbytes - got
        if done != len(view):
            raise ValueError(f"{name} has no bytes {offset}..{offset + len(view)}")

    def check_contents(self) -> None:
        """Compare the contents with the checksum that the file carries, if it carries one.

        Raises:
            UserError: they differ.
        """
        if self.kind == "ckpt":
            format_ckpt.check_crc(self._fd, self.path)

    def forget_cached(self) -> None:
        """Ask the system to read from the disk again, not from what it remembers of writing."""
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class TensorFolder(Checkpoint):
    """Several files that make one checkpoint, with or without an index."""

    def __init__(self, path: str, names: Sequence[str], notes: Sequence[str],
                 index: Tuple[str, Mapping[str, str]] = ("", {})):
        """Open every file of a folder.

        Args:
            path: the folder.
            names: the files in it.
            notes: passed on.
            index: the index file and its `weight_map`, which must agree with the files; empty without one.

        Raises:
            UserError: a file is missing or damaged, a tensor is in two files, or the index disagrees.
        """
        self.path = path
        self.notes = list(notes)
        self.files = []
        self.infos, self.others = {}, {}
        self._file: Dict[str, TensorFile] = {}
        try:
            for name in names:
                self._add(TensorFile(os.path.join(path, name)))
            if index[0]:
                self._check_index(*index)
        except BaseException:
            self.close()
            raise

    def _add(self, file: TensorFile) -> None:
        self.files.append(file)
        for name, info in file.infos.items():
            if name in self._file:
                raise UserError(f"{name} is in {os.path.basename(self._file[name].path)} and in "
                                f"{os.path.basename(file.path)}", self.path,
                                "Give the file that is meant, or take the other one out of the folder.")
            self._file[name] = file
            self.infos[name] = info
        self.others.update(file.others)

    def _check_index(self, where: str, weight_map: Mapping[str, str]) -> None:
        for name, shard in weight_map.items():
            if name not in self._file:
                raise UserError(f"{name} should be in {shard}, which does not hold it", where,
                                "Download index and shards again, from one revision.")
            if os.path.basename(self._file[name].path) != shard:
                raise UserError(f"{name} should be in {shard}, it is in {os.path.basename(self._file[name].path)}",
                                where, "Download index and shards again, from one revision.")
        unlisted = sorted(set(self.infos) - set(weight_map))
        if unlisted:
            raise UserError(f"{len(unlisted)} tensors are in the shards and not in the index, the first is "
                            f"{unlisted[0]}", where, "Download index and shards again, from one revision.")

    def file_of(self, name: str) -> TensorFile:
        return self._file[name]


def _weight_map(index_path: str) -> Dict[str, str]:
    index = read_json(index_path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise UserError("has no weight_map of tensor names to file names", index_path, "Download the index again.")
    for shard in weight_map.values():
        if shard != os.path.basename(shard) or format_of(shard) is None:
            raise UserError(f"names a shard {shard!r}, which is not a checkpoint file in this folder", index_path,
                            "Download the index again.")
    return weight_map


def rank_folders(path: str) -> Dict[int, str]:
    """The `rank_x` folders of a folder of slices, rank -> path, sorted; empty when there are none."""
    if not os.path.isdir(path):
        return {}
    found = {int(match[1]): os.path.join(path, name) for name in os.listdir(path)
             for match in [_RANK.match(name)] if match and os.path.isdir(os.path.join(path, name))}
    return dict(sorted(found.items()))


def open_checkpoint(path: Union[str, "os.PathLike[str]"], formats: Sequence[str] = tuple(FORMATS)) -> Checkpoint:
    """Open a checkpoint for reading.

    Args:
        path: a .safetensors, .ckpt or .bin file, or a folder of them: with an index, numbered shards, or files whose
            tensors differ. Of the two formats that hubs offer side by side, safetensors is read and .bin is not.
        formats: the formats to look for in a folder, keys of `FORMATS`.

    Raises:
        UserError: missing, damaged, ambiguous or incomplete, naming file and tensor.
    """
    path = os.fspath(path)
    if not os.path.isdir(path):
        if not os.path.exists(path):
            raise UserError("no such file or folder", path)
        return TensorFile(path)
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", path) from None
    found = {kind: [name for name in names if format_of(name) == kind and not name.startswith(".")
                    and (kind != "bin" or name.startswith("pytorch_model"))] for kind in FORMATS if kind in formats}
    for kind, index in INDEX_FILES.items():
        if index in names and kind in formats and not found[kind]:
            found[kind] = [index]
    kinds = [kind for kind, there in found.items() if there]
    notes = []
    if "safetensors" in kinds and "bin" in kinds:
        kinds.remove("bin")
        notes.append(f"{path} holds .safetensors and .bin files; the .safetensors are read")
    if not kinds:
        _nothing_found(path, names, formats)
    if len(kinds) > 1:
        raise UserError(f"holds {' and '.join(found[kind][0] for kind in kinds)}: which one is meant?", path,
                        "Give the file instead of the folder.")
    (kind,) = kinds
    index_name = INDEX_FILES.get(kind)
    if index_name is not None and index_name in names:
        index = os.path.join(path, index_name)
        weight_map = _weight_map(index)
        shards = sorted(set(weight_map.values()))
        for shard in shards:
            if shard not in names:
                raise UserError(f"{shard} is missing", index, "Download the missing shards.")
        ignored = [name for name in found[kind] if name not in shards]
        if ignored:
            notes.append(f"{path}: {', '.join(ignored)} not read, {index_name} does not name them")
        return TensorFolder(path, shards, notes, (index, weight_map))
    _check_numbers(path, found[kind])
    return TensorFolder(path, found[kind], notes)


def _nothing_found(path: str, names: Sequence[str], formats: Sequence[str]) -> None:
    ranks = rank_folders(path)
    if ranks:
        raise UserError(f"holds slices (rank_{min(ranks)} to rank_{max(ranks)}), not a whole checkpoint", path,
                        "Give one rank's folder, or merge the slices with transform_ckpt.py.")
    kinds = " or ".join(filter(None, (", ".join(f".{kind}" for kind in formats[:-1]), f".{formats[-1]}")))
    shown = f"only {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else "it is empty"
    raise UserError(f"holds no {kinds} weights, {shown}", path, "Give the folder that the weights were downloaded to.")


def _check_numbers(path: str, names: Sequence[str]) -> None:
    """Numbered shards without an index: all numbers must be there."""
    for name in names:
        match = _SHARD.match(name)
        if match:
            for number in range(1, int(match["count"]) + 1):
                wanted = f"{match['stem']}-{number:05d}-of-{match['count']}.{match['format']}"
                if wanted not in names:
                    raise UserError(f"{wanted} is missing beside {name}", path, "Download the missing shards.")


def all_ranks(path: str) -> Dict[int, str]:
    """As `rank_folders`, none of them absent.

    Raises:
        UserError: there is a gap between their numbers.
    """
    folders = rank_folders(path)
    for rank in range(max(folders, default=-1) + 1):
        if rank not in folders:
            raise UserError(f"rank_{rank} is missing, though rank_{max(folders)} is there", path,
                            f"Copy every rank's folder into it, rank_0 to rank_{max(folders)}.")
    return folders


def open_ranks(path: str) -> List[Checkpoint]:
    """Open every `rank_x` folder of a folder of slices, in rank order.

    Raises:
        UserError: no rank folders, a gap between their numbers, or one that cannot be opened.
    """
    folders = all_ranks(path)
    if not folders:
        raise UserError("has no rank_0, rank_1, ... folders", path)
    opened: List[Checkpoint] = []
    with closed_on_error(opened):
        for folder in folders.values():
            opened.append(open_checkpoint(folder, ("safetensors", "ckpt")))
    return opened


@contextlib.contextmanager
def closed_on_error(checkpoints: Sequence[Checkpoint]) -> Iterator[None]:
    """Close them all if what is done within fails; they may become more meanwhile."""
    try:
        yield
    except BaseException:
        for checkpoint in checkpoints:
            checkpoint.close()
        raise


def write_index(weight_map: Dict[str, str], total_size_bytes: int) -> bytes:
    """The contents of an index file: which shard holds which tensor."""
    index = {"metadata": {"total_size": total_size_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2) + "\n").encode("utf-8")
