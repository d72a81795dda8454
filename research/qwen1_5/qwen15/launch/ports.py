"""The scheduler's port: chosen, kept for it until it listens, and who holds it when it is taken."""

from __future__ import annotations

import errno
import os
import socket
from typing import Optional, Tuple

from ..errors import UserError
from ..terminal import shown

_LISTENING = "0A"  # state in /proc/net/tcp, see proc(5)


class Reservation:
    """A port that the scheduler can listen on. `close` gives it up.

    Some seconds pass before the scheduler listens. Meanwhile a socket that is bound and does not listen keeps the port
    from being given to others, and a name of the kernel's own (an abstract Unix socket) keeps other launchers off it;
    both go with the process. A program that shares addresses (SO_REUSEADDR, as the scheduler does) can still come
    first: then the scheduler ends.
    """

    def __init__(self, port: int, *held: socket.socket):
        self.port = port
        self._held = held

    def close(self) -> None:
        """Give the port up."""
        for kept in self._held:
            kept.close()


def reserve(address: str, port: int, given: bool) -> Reservation:
    """Reserve `port`, or any other one when it is taken and not `given`.

    Raises:
        UserError: the port that was asked for is in use.
    """
    while True:
        try:
            return _hold(address, port)
        except OSError as error:
            if error.errno == errno.EADDRINUSE and not given:
                port = 0  # any
            elif error.errno == errno.EADDRINUSE:
                raise taken(address, port) from None
            else:
                raise UserError(f"port {port} of {address} cannot be used ({error.strerror})", where="MASTER_PORT",
                                fix="Give another port.") from None


def _hold(address: str, port: int) -> Reservation:
    bound = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    name = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        # Binds as MindSpore does: ended connections do not block the port, a listening process does.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((address, port))
        port = bound.getsockname()[1]
        name.bind(f"\0qwen15-launch-{port}")
    except OSError:
        bound.close()
        name.close()
        raise
    return Reservation(port, bound, name)


def taken(address: str, port: int) -> UserError:
    """The error for a port that somebody else has, with who it is where the system tells."""
    holder = holder_of(port)
    return UserError(f"port {port} of {address} is in use by {holder or 'another program'}", where="MASTER_PORT",
                     fix="Give another port, or end the program (an earlier launch?) that listens there.")


def holder_of(port: int) -> Optional[str]:
    """`process 4242 (python serve.py)`, which listens on a TCP port of this machine; None when it is not to be seen.

    The system shows the processes of the same user, to root those of all.
    """
    inodes = _listening_inodes(port)
    for pid in (entry for entry in os.listdir("/proc") if entry.isdigit()) if inodes else ():
        folder = f"/proc/{pid}/fd"
        try:
            for descriptor in os.listdir(folder):
                if os.readlink(f"{folder}/{descriptor}") in inodes:
                    return f"process {pid} ({_command(pid)})"
        except OSError:  # ended meanwhile, or another user's
            continue
    return None


def _listening_inodes(port: int) -> Tuple[str, ...]:
    """As /proc/PID/fd shows them: `socket:[12345]`."""
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            with open(table, encoding="ascii") as lines:
                next(lines, None)
                for fields in map(str.split, lines):
                    if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                        found.append(f"socket:[{fields[9]}]")
        except (OSError, IndexError, ValueError):
            continue
    return tuple(found)


def _command(pid: str) -> str:
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        words = file.read(1000).split(b"\0")
    return shown(" ".join(word.decode("utf-8", "replace") for word in words if word), 100)
