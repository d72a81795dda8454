"""Write a small file that is either whole or not there: beside its place first, then renamed."""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import tempfile

RENAME_EXCHANGE, _RENAME_NOREPLACE = 2, 1
_AT_FDCWD = -100


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
            rename_to_new(beside, path)
    except BaseException:
        os.unlink(beside)
        raise


def renamed(one: str, other: str, flags: int) -> int:
    """renameat2(2): 0, or the system's error code; ENOSYS where the C library has no such function."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return errno.ENOSYS
    failed = libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), flags)
    return ctypes.get_errno() if failed else 0


def rename_to_new(one: str, other: str) -> None:
    """Rename a file to a name that nothing has, in one step.

    Raises:
        FileExistsError: something has that name.
        OSError: it cannot be renamed.
    """
    code = renamed(one, other, _RENAME_NOREPLACE)
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):  # a file system that cannot ask and rename in one step
        code = errno.EEXIST if os.path.lexists(other) else 0
        if code == 0:
            os.rename(one, other)
    if code:
        raise OSError(code, os.strerror(code), other)


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
