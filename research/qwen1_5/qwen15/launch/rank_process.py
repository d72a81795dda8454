"""One rank's process: started in a session of its own, bound to its cores, its output passed on as the bytes come."""

import ctypes
import fcntl
import os
import re
import selectors
import signal
import subprocess
import sys
import termios
import threading
import time
from dataclasses import dataclass
from typing import IO, BinaryIO, Callable, List, Mapping, Optional, Tuple

from ..errors import EXIT_FAILED
from ..terminal import VARIABLE as TERMINAL_VARIABLE
from ..terminal import Terminal

_PR_SET_PDEATHSIG = 1
_IN_ORDER_S = 0.5
"""How long stderr waits for what was written to stdout before it: no longer, as stdout's reader may be a slow one."""
NOTICE = re.compile(rb"\[(DEBUG|INFO|WARNING)\] [A-Z_]+\([0-9]+[,:]")
"""MindSpore's log lines below ERROR."""


@dataclass(frozen=True)
class Task:
    """One process to start.

    Attributes:
        rank: its number in the whole cluster; None for the scheduler.
        command: argument vector.
        environ: its whole environment.
        cpus: logical CPUs it is bound to; empty for no binding.
        files: descriptors that are handed down to it.
    """

    rank: Optional[int]
    command: Tuple[str, ...]
    environ: Mapping[str, str]
    cpus: Tuple[int, ...] = ()
    files: Tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """How it is called in messages."""
        return "the scheduler" if self.rank is None else f"rank {self.rank}"

    @property
    def log_name(self) -> str:
        """Its log in the log folder, named as msrun names it."""
        return "scheduler.log" if self.rank is None else f"worker_{self.rank}.log"


class RankProcess:
    """A started task.

    Args:
        task: what to start.
        log_path: where its output goes.
        relayed: its output is to be passed on as well; see `relay`.
        terminal: our terminal, which it may read from; it is then a process group of our session instead of one of its
            own.

    Attributes:
        code: as `subprocess` has it, negative for a signal; None while it runs.
        stopped_since: monotonic time at which it was first seen stopped; None while it is not.
    """

    def __init__(self, task: Task, log_path: str, relayed: bool, terminal: Optional[Terminal] = None):
        self.task = task
        self.log_path = log_path
        self.code: Optional[int] = None
        self.stopped_since: Optional[float] = None
        self._relays: List[_Relay] = []
        environ = dict(task.environ)
        if terminal is not None:
            environ[TERMINAL_VARIABLE] = terminal.variable
        with open(log_path, "wb") as log:
            self._popen = subprocess.Popen(
                task.command, env=environ, stdin=self._stdin(relayed, terminal),
                stdout=subprocess.PIPE if relayed else log, stderr=subprocess.PIPE if relayed else subprocess.STDOUT,
                pass_fds=task.files,
                start_new_session=terminal is None, preexec_fn=_Prepare(task.cpus, terminal is not None), bufsize=0)

    @staticmethod
    def _stdin(relayed: bool, terminal: Optional[Terminal]) -> Optional[int]:
        """Rank 0 may read what is piped to the launcher, or typed; a terminal cannot be read from another session."""
        if terminal is not None:
            return None
        return None if relayed and sys.stdin is not None and not sys.stdin.isatty() else subprocess.DEVNULL

    @property
    def pid(self) -> int:
        """Process id, also of its process group."""
        return self._popen.pid

    def relay(self, on_closed: "threading.Event") -> None:
        """Copy stdout and stderr to our own and to the log; set `on_closed` when our stdout has lost its reader."""
        log = open(self.log_path, "ab", buffering=0)
        quiet = bytes if self.task.environ.get("GLOG_v") in ("0", "1", "2") else _WithoutNotices()
        stdout, stderr = self._popen.stdout, self._popen.stderr
        assert stdout is not None and stderr is not None, "it was started with `relayed`"
        answer = _Relay(stdout, 1, log, bytes, on_closed)
        self._relays += [answer, _Relay(stderr, 2, log, quiet, None, after=answer)]
        for relay in self._relays:
            relay.start()

    @property
    def has_answered(self) -> bool:
        """Something from its stdout has been passed on."""
        return any(relay.answered for relay in self._relays)

    def settle_relay(self, timeout_s: float) -> None:
        """Wait until what the process, which is stopped, has written so far has been passed on."""
        deadline = time.monotonic() + timeout_s
        for relay in self._relays:
            relay.settle(deadline - time.monotonic())

    def finish_relay(self, timeout_s: float) -> None:
        """Wait until what the process wrote has been passed on."""
        deadline = time.monotonic() + timeout_s
        for thread in self._relays:
            thread.join(max(0.0, deadline - time.monotonic()))

    def poll(self) -> Optional[int]:
        """Look whether it has ended."""
        if self.code is None:
            self.code = self._popen.poll()
        return self.code

    def stop_signal(self) -> Optional[int]:
        """The signal that has stopped it since the last look, None when none has."""
        if self.code is not None:
            return None
        try:
            seen = os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOHANG)
        except ChildProcessError:
            return None
        return None if seen is None else seen.si_status

    def state(self) -> str:
        """The kernel's letter: R running, S sleeping, D waiting for a disk, T stopped, Z ended; empty when unknown."""
        try:
            with open(f"/proc/{self.pid}/stat", "rb") as stat:
                return stat.read().rpartition(b")")[2].split()[0].decode()
        except (OSError, IndexError):
            return ""

    def signal_group(self, number: int) -> None:
        """Send a signal to the process and to those that it started."""
        try:
            os.killpg(self.pid, number)
        except (ProcessLookupError, PermissionError):
            pass


class _Prepare:
    """Runs in the new process before the command does: dies with the launcher, stays on its cores, leads its group."""

    def __init__(self, cpus: Tuple[int, ...], in_our_session: bool):
        self._cpus = cpus
        self._in_our_session = in_our_session
        self._launcher = os.getpid()
        self._prctl = getattr(ctypes.CDLL(None), "prctl", None)  # looked up here, before the fork

    def __call__(self) -> None:
        if self._prctl is not None:
            self._prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
            if os.getppid() != self._launcher:
                os._exit(EXIT_FAILED)
        if self._cpus:
            os.sched_setaffinity(0, self._cpus)
        if self._in_our_session:
            os.setpgid(0, 0)
            signal.signal(signal.SIGTTOU, signal.SIG_DFL)  # we ignore it, and the child would inherit that


class _Relay(threading.Thread):
    """Copies bytes until the end of `source`: all to `log`, those that `chosen` gives back to `target`.

    A target that cannot be written to any more sets `closed`; the log goes on. What another relay `after` has got comes
    before what is read here.
    """

    def __init__(self, source: IO[bytes], target: int, log: BinaryIO, chosen: Callable[[bytes], bytes],
                 closed: Optional[threading.Event], after: Optional["_Relay"] = None):
        super().__init__(daemon=True)
        self._source, self._target, self._log, self._chosen, self._closed = source, target, log, chosen, closed
        self._after = after
        self._busy = threading.Lock()  # held from reading a piece until it is written
        self._writing = True
        self.answered = False

    def run(self) -> None:
        with self._source, selectors.DefaultSelector() as selector:
            selector.register(self._source, selectors.EVENT_READ)
            while True:
                selector.select()
                with self._busy:
                    data = os.read(self._source.fileno(), 65536)
                    if not data:
                        return
                    if self._after is not None:
                        self._after.settle(_IN_ORDER_S)
                    self._pass_on(data)

    def _pass_on(self, data: bytes) -> None:
        self._log.write(data)
        data = self._chosen(data)
        self.answered = self.answered or (self._target == 1 and bool(data))
        while self._writing and data:
            try:
                data = data[os.write(self._target, data):]
            except OSError:
                self._writing = False
                if self._closed is not None:
                    self._closed.set()

    def settle(self, timeout_s: float) -> None:
        """Wait until all that has been written to the source so far has been passed on."""
        deadline = time.monotonic() + timeout_s
        while not self.idle() and time.monotonic() < deadline:
            time.sleep(0.005)

    def idle(self) -> bool:
        """All that has been written to the source so far has been passed on."""
        if not self._busy.acquire(blocking=False):
            return False
        try:
            return not any(fcntl.ioctl(self._source, termios.FIONREAD, bytes(4)))
        except (OSError, ValueError):  # ended and closed
            return True
        finally:
            self._busy.release()


class _WithoutNotices:
    """Bytes without MindSpore's log lines below ERROR, some of which ignore GLOG_v. Other bytes pass at once."""

    _BEGINNINGS = (b"[DEBUG] ", b"[INFO] ", b"[WARNING] ")

    def __init__(self):
        self._held = b""  # the beginning of a line that may turn out to be a notice
        self._at_line_start = True

    def __call__(self, data: bytes) -> bytes:
        passed: List[bytes] = []
        for piece in (self._held + data).splitlines(keepends=True):
            if self._at_line_start and self._may_be_notice(piece):
                if not piece.endswith(b"\n"):
                    self._held = piece
                    return b"".join(passed)
                if NOTICE.match(piece):
                    continue
            passed.append(piece)
            self._at_line_start = piece.endswith((b"\n", b"\r"))
        self._held = b""
        return b"".join(passed)

    def _may_be_notice(self, piece: bytes) -> bool:
        return any(piece.startswith(beginning) or beginning.startswith(piece) for beginning in self._BEGINNINGS)
