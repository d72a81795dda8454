"""Write files that are either whole or not there: beside the target under a name of our own, then renamed."""

import errno
import fcntl
import os
import re
import shutil
from contextlib import contextmanager, suppress
from typing import Callable, Iterator, List, Sequence, Tuple

from ..errors import EXIT_FAILED, UserError
from ..progress import human_bytes
from ..whole_file import RENAME_EXCHANGE, rename_to_new, renamed
from .file_writer import Blocks, FileWriter, told

LOCK_FILE = ".lock"

_OURS = re.compile(r"^(model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|config\.json|"
                   r"generation_config\.json|vocab\.json|merges\.txt|tokenizer_config\.json|tokenizer\.json|"
                   r"special_tokens_map\.json|added_tokens\.json|quantize_config\.json|quant_config\.json|"
                   r"source_layout\.json|chat_template\.jinja|"
                   r"rank_\d+/checkpoint_\d+\.(ckpt|safetensors)|strategy/ckpt_strategy_rank_\d+\.ckpt|\.lock)$")
"""What a folder that this program wrote can hold, unless it was given other names; only such a folder is replaced by
`--overwrite`."""

_SLICE = re.compile(r"rank_\d+/[^/]*\d\.(ckpt|safetensors)")
"""A slice under whatever prefix; enough of a sign in a folder that has our scratch name."""


def partial_path(target: str) -> str:
    """Where `target` is written before it is whole."""
    folder, name = os.path.split(os.path.abspath(target))
    return os.path.join(folder, f".{name}.qwen15-partial")


def is_ours(name: str, made: Sequence[str]) -> bool:
    """Whether a file of a folder (relative to it) is named as this program names its own.

    Args:
        name: the file.
        made: names that are about to be written; the same with other numbers are this program's too.
    """
    return bool(_OURS.match(name)) or any(re.fullmatch(re.sub(r"\d+", r"\\d+", re.escape(one)), name) for one in made)


def check_target(target: str, sources: Sequence[str], overwrite: bool, made: Sequence[str] = ()) -> None:
    """Refuse, before anything is written, a target that is in the way of something.

    Args:
        target: the file or folder to be made.
        sources: files and folders that are read for it.
        overwrite: replace what is there, if it is what this program writes.
        made: the files of a folder that is to be made, relative to it.

    Raises:
        UserError: it is a source or holds one, it exists and may not be replaced, or its parent is no folder.
    """
    real = os.path.realpath(target)
    for source in sources:
        inner = os.path.realpath(source)
        if inner == real or (os.path.isdir(real) and os.path.commonpath([inner, real]) == real):
            what = "is what is being converted" if inner == real else f"holds what is being converted: {source}"
            raise UserError(what, target, "Write somewhere else.")
    if os.path.islink(target) and os.path.isdir(target):
        raise UserError(f"is a symbolic link to {os.path.realpath(target)}", target, "Give that folder itself.")
    if not os.path.lexists(target) or (os.path.isdir(target) and not os.listdir(target)):
        return
    if not overwrite:
        raise UserError("exists already", target, "Give another path, or --overwrite to replace it.")
    if os.path.isdir(target):
        _check_replaceable(target, made)


def _check_replaceable(folder: str, made: Sequence[str]) -> None:
    """Refuse to replace a folder that holds what this program did not write."""
    foreign = next((name for name in _files_below(folder) if not is_ours(name, made)), None)
    if foreign is not None:
        raise UserError(f"holds {foreign}, which this program did not write, so the folder is not replaced", folder,
                        "Give another path, or take that file out first.")


def check_space(target: str, needed_bytes: int) -> None:
    """Refuse, before anything is written, what does not fit on the target's disk.

    Raises:
        UserError: too little room, with both numbers.
    """
    folder = os.path.dirname(os.path.abspath(target))
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        raise UserError(f"needs {human_bytes(needed_bytes)} of disk, {human_bytes(free_bytes)} are free in {folder}",
                        target, "Make room, or write to another disk.")


def disk_bytes(path: str) -> int:
    """Disk that a file takes, or a folder's files do; 0 when there is nothing."""
    names = [os.path.join(path, name) for name in _files_below(path)] if os.path.isdir(path) else [path]
    return sum(os.lstat(name).st_blocks * 512 for name in names if os.path.isfile(name))


def _files_below(folder: str) -> List[str]:
    return sorted(os.path.relpath(os.path.join(root, name), folder) for root, _, names in os.walk(folder)
                  for name in names)


def _take(path: str) -> int:
    """Open and lock a file of our own; the descriptor holds the lock."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            raise UserError("another conversion is writing this right now", path, "Wait for it, or stop it.",
                            exit_code=EXIT_FAILED) from None
        try:
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        except FileNotFoundError:
            pass
        os.close(fd)  # the other one has just finished and renamed it: this is its result, not our scratch file


def _sync_folder(path: str) -> None:
    fd = os.open(path or ".", os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError:
        pass  # some network file systems cannot; the rename itself is still atomic
    finally:
        os.close(fd)


@contextmanager
def atomic_file(target: str, replace: bool = True) -> Iterator[Tuple[int, str]]:
    """Give (descriptor, path) of a scratch file that becomes `target` when the block ends well, and is removed if not.

    A killed process leaves the scratch file, never the target; the next run takes it over.

    Args:
        target: the file.
        replace: take the place of a file that is there; without, one that has come meanwhile stays.

    Raises:
        UserError: `target` cannot be written, or is there and is not to be replaced.
    """
    partial = partial_path(target)
    fd = -1
    try:
        with told(target):
            os.makedirs(os.path.dirname(partial), exist_ok=True)
            fd = _take(partial)
        yield fd, partial
        with told(target):
            os.fsync(fd)
            if replace:
                os.rename(partial, target)
            else:
                try:
                    rename_to_new(partial, target)
                except FileExistsError:
                    raise _came_meanwhile(target) from None
            _sync_folder(os.path.dirname(partial))
    except BaseException:
        _discard(partial, fd)
        raise
    finally:
        if fd >= 0:
            os.close(fd)


def _discard(partial: str, fd: int) -> None:
    """Remove a scratch file, if it is still one and nobody else's; `fd` is -1 when Ctrl-C came while it was opened."""
    try:
        if fd >= 0:
            if os.path.samestat(os.fstat(fd), os.stat(partial)):
                os.unlink(partial)
            return
        other = os.open(partial, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(partial)
        finally:
            os.close(other)
    except OSError:
        pass  # not there, or another conversion's


def write_small(target: str, content: bytes, replace: bool = True) -> None:
    """Write a small file atomically; `replace` as for `atomic_file`."""
    with atomic_file(target, replace) as (fd, path), Blocks() as blocks:
        FileWriter(fd, path, [content], blocks).finish()


class AtomicFolder:
    """A folder that appears under its name only when it is complete.

    Its files gather in a scratch folder beside the target, each of them whole or absent, so that an interrupted run can
    be taken up again.

    Args:
        target: the folder to make.
        made: the files that it will hold, relative to it, beside those that `is_ours` knows.

    Raises:
        UserError: another run is at work, or what is in the scratch folder's place is none of this program's.
    """

    def __init__(self, target: str, made: Sequence[str] = ()):
        self.target = os.path.abspath(target)
        self.path = partial_path(target)
        self._made = made
        if os.path.islink(self.path):
            raise UserError("is a symbolic link, and the folder with unfinished files belongs here", self.path,
                            "Remove the link.")
        with told(target):
            os.makedirs(self.path, exist_ok=True)
            self._lock = _take(os.path.join(self.path, LOCK_FILE))
        try:
            self._check_own()
        except BaseException:
            os.close(self._lock)
            raise

    def _check_own(self) -> None:
        """Refuse to work in a folder with links, or with files of others."""
        for root, folders, files in os.walk(self.path):
            for name in folders + files:
                path = os.path.join(root, name)
                if os.path.islink(path):
                    raise UserError("is a symbolic link among unfinished files", path, "Remove the link.")
        foreign = next((name for name in self.existing()
                        if not is_ours(name, self._made) and not _SLICE.fullmatch(name)), None)
        if foreign is not None:
            raise UserError(f"holds {foreign}, which this program did not write, among unfinished files", self.path,
                            "Move that file away.")

    def existing(self) -> List[str]:
        """Files in the scratch folder, relative to it, the lock and halves of files left out."""
        return [name for name in _files_below(self.path) if not os.path.basename(name).startswith(".")]

    @contextmanager
    def file(self, name: str, kept: Callable[[str], bool]) -> Iterator[Tuple[int, str]]:
        """Give (descriptor, path) of a file in the scratch folder, its contents as they are.

        Args:
            name: relative to the folder.
            kept: asked when the block fails whether the file is of use to the next run; it is removed if not.
        """
        path = os.path.join(self.path, name)
        with told(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            yield fd, path
            with told(path):
                _sync_folder(os.path.dirname(path))
        except BaseException:
            if not kept(name):
                with suppress(FileNotFoundError):  # the folder was moved away
                    os.unlink(path)
            raise
        finally:
            os.close(fd)

    def clear(self) -> None:
        """Remove everything in the scratch folder but the lock."""
        for name in _files_below(self.path):
            if name != LOCK_FILE:
                os.unlink(os.path.join(self.path, name))

    def publish(self, replace: bool = True) -> None:
        """Give the folder its name.

        Args:
            replace: take the place of a folder of this program's own (see `check_target`); without, whatever has come
                meanwhile stays.

        Raises:
            UserError: what is there may not be replaced, or the disk refuses.
        """
        with told(self.target):
            for name in _files_below(self.path):
                if os.path.basename(name).startswith(".") and name != LOCK_FILE:
                    os.unlink(os.path.join(self.path, name))
            for root, _, _ in os.walk(self.path):
                _sync_folder(root)
            if replace and os.path.isdir(self.target) and os.listdir(self.target):
                _check_replaceable(self.target, self._made)
                _exchange(self.path, self.target)
                self._remove()
            else:
                try:
                    os.rename(self.path, self.target)
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                        raise
                    raise _came_meanwhile(self.target) from None
            # The lock goes last: whoever starts now finds either the scratch folder locked or no scratch folder.
            os.unlink(os.path.join(self.target, LOCK_FILE))
            _sync_folder(os.path.dirname(self.target))

    def close(self) -> None:
        """Let go of the lock; a scratch folder that holds nothing is removed."""
        os.close(self._lock)
        try:
            if os.path.isdir(self.path) and not self.existing():
                self._remove()
        except OSError:
            pass

    def _remove(self) -> None:
        """Remove what is under the scratch folder's name: our own files, and not what came into it since."""
        for name in _files_below(self.path):
            if is_ours(name, self._made) or os.path.basename(name).startswith("."):
                os.unlink(os.path.join(self.path, name))
        for root, _, _ in os.walk(self.path, topdown=False):
            if not os.listdir(root):
                os.rmdir(root)


def _came_meanwhile(target: str) -> UserError:
    return UserError("appeared while this was being written, and is left as it is", target,
                     "Give another path, or --overwrite.", exit_code=EXIT_FAILED)


def _exchange(one: str, other: str) -> None:
    """Swap two folders in one step, so that at every moment there is a whole one under either name."""
    if renamed(one, other, RENAME_EXCHANGE) != 0:
        aside = one + "-old"
        os.rename(other, aside)
        os.rename(one, other)
        os.rename(aside, one)
