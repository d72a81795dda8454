"""Write a small file that is either whole or not there: beside its place first, then renamed."""

from __future__ import annotations

import glob
import os
import tempfile


def write_whole(path: str, content: bytes, replace: bool = True, private: bool = False) -> None:
    """Write `content` to `path` in one step; whoever reads sees what was there before, or all of it.

    Args:
        path: the file; its folder exists.
        content: all of the file.
        replace: put it in the place of a file that is there.
        private: readable for its owner alone.

    Raises:
        FileExistsError: something is there and shall not be replaced.
        OSError: it cannot be written.
    """
    folder, name = os.path.split(os.path.abspath(path))
    _remove_leftovers(folder, name)
    handle, beside = tempfile.mkstemp(prefix=f".{name}.", suffix=f".{os.getpid()}.part", dir=folder)
    try:
        with open(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if not private:
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(beside, 0o666 & ~mask)  # mkstemp's files are readable by their owner only
        if replace:
            os.replace(beside, path)
        else:
            _put_where_nothing_is(beside, path)
    except BaseException:
        os.unlink(beside)
        raise


def _put_where_nothing_is(beside: str, path: str) -> None:
    """Rename, unless something is there; a process that is killed meanwhile leaves no empty file."""
    try:
        os.link(beside, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: the name is taken first
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        os.replace(beside, path)
    else:
        os.unlink(beside)


def _remove_leftovers(folder: str, name: str) -> None:
    """Take away what was written beside a file of this name by a process that was killed before it could rename it."""
    for path in glob.glob(os.path.join(glob.escape(folder), f".{glob.escape(name)}.*.part")):
        number = path.split(".")[-2]
        if number.isdigit() and not os.path.islink(path) and not _runs(int(number)):
            try:
                os.unlink(path)
            except OSError:
                pass  # another process was faster, or it is somebody else's file


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True
