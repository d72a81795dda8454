"""The launchers of one run's machines keep in touch: a machine that is lost is noticed within seconds, a failure named on all.

MindSpore's own heartbeat (30 s, then only the scheduler knows) stays as it is. Machine 0's launcher listens on the port after the
scheduler's; the others connect and say who they are. Both sides send a line of JSON, `{}` when there is nothing to say, once a
second: `{"failed": ...}` when a rank has failed, `{"done": true}` before a good end.
"""

import json
import select
import socket
import threading
import time
from dataclasses import asdict, dataclass, field
from typing import Any, Dict, List, Optional, Tuple

from ..errors import EXIT_FAILED

PORT_OFFSET = 1
SILENCE_S = 6.0
"""After this long without a line a machine counts as lost."""

_BEAT_S = 1.0
_TICK_S = 0.2
_SEND_S = 1.0
_HELLO_S = 5.0  # within which who connects has to say who it is
_CONNECT_S = 3.0  # for a launcher to be found where a scheduler listens
_MOST_BYTES = 2 ** 18  # of one line
_MOST_PEERS = 1024
_MOST_LINES, _MOST_CHARACTERS = 20, 1000  # of a log, of one text
_CONTROL = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) != "\t"}


@dataclass(frozen=True)
class Report:
    """A failure, as the machine it happened on tells it.

    Attributes:
        where: `rank 3 on machine 1`, or what else is to blame.
        what, fix: as in a `UserError`.
        code: exit code of the run.
        log: path of the culprit's log there; empty for none.
        lines: its last lines.
    """

    where: str
    what: str
    fix: str = ""
    code: int = EXIT_FAILED
    log: str = ""
    lines: Tuple[str, ...] = ()

    @classmethod
    def of(cls, value: Any) -> "Report":
        """From the wire. Raises a ValueError, TypeError or KeyError when it is none."""
        texts = {name: _clean(value[name]) for name in ("where", "what", "fix", "log")}
        lines = tuple(_clean(line) for line in value["lines"][-_MOST_LINES:])
        code = int(value["code"])
        return cls(**texts, code=code if 0 < code < 256 else EXIT_FAILED, lines=lines)


def _clean(text: Any) -> str:
    """Text of another machine, fit for a terminal."""
    if not isinstance(text, str):
        raise TypeError(f"{text!r} is no text")
    return text[:_MOST_CHARACTERS].translate(_CONTROL)


@dataclass(frozen=True)
class Machine:
    """Who a launcher is.

    Attributes:
        number: its NODE_RANK.
        first, count: its ranks.
        worker_num: ranks on all machines, as it was told.
    """

    number: int
    first: int
    count: int
    worker_num: int

    @classmethod
    def of(cls, value: Any) -> "Machine":
        """From the wire. Raises a ValueError, TypeError or KeyError when it is none."""
        return cls(**{name: int(value[name]) for name in ("number", "first", "count", "worker_num")})

    @property
    def name(self) -> str:
        """`machine 1 (ranks 2 to 3)`."""
        ranks = f"rank {self.first}" if self.count == 1 else f"ranks {self.first} to {self.first + self.count - 1}"
        return f"machine {self.number} ({ranks})"


@dataclass
class _Peer:
    """The other end of a connection."""

    connection: socket.socket
    address: str
    heard_s: float = field(default_factory=time.monotonic)
    machine: Optional[Machine] = None
    done: bool = False
    received: bytes = b""


class Link:
    """One launcher's end. Made before `start`, which runs it in a thread of its own; every method returns at once or within 2 s.

    Args:
        here: this machine.
        silence_s: after which a machine is lost.
    """

    def __init__(self, here: Machine, silence_s: float = SILENCE_S):
        self.here = here
        self._silence_s = silence_s
        self._peers: List[_Peer] = []
        self._server: Optional[socket.socket] = None
        self._outbox: List[Dict[str, Any]] = []
        self._changed = threading.Condition()
        self._failure: Optional[Report] = None
        self._refusal: Optional[str] = None
        self._ending = False
        self._thread: Optional[threading.Thread] = None

    def start(self) -> None:
        """Keep in touch from now on."""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def failure(self) -> Optional[Report]:
        """The first failure on another machine, or the loss of one; None so far."""
        return self._failure

    @property
    def refusal(self) -> Optional[str]:
        """Why machine 0 does not take this one; None when it does."""
        return self._refusal

    def failed(self, report: Report) -> None:
        """Tell the others that the run has failed here."""
        self._say({"failed": asdict(report)})

    def done(self) -> None:
        """Tell the others that all is well and this machine leaves."""
        self._say({"done": True})

    def close(self) -> None:
        """Hang up."""
        self._ending = True
        if self._thread is not None:
            self._thread.join(2 * _SEND_S)
        for peer in self._peers:
            _hang_up(peer.connection)

    def _say(self, message: Dict[str, Any]) -> None:
        if self._thread is None or not self._thread.is_alive():
            return
        with self._changed:
            self._outbox.append(message)
            self._changed.wait_for(lambda: not self._outbox, timeout=2 * _SEND_S)

    # -- in the thread

    def _run(self) -> None:
        next_beat_s = time.monotonic()
        while not self._ending:
            sockets = [peer.connection for peer in self._peers] + ([self._server] if self._server is not None else [])
            readable, _, _ = select.select(sockets, [], [], _TICK_S)
            with self._changed:
                waiting = list(self._outbox)
            for message in waiting:
                self._send_all(message)
            with self._changed:
                del self._outbox[:len(waiting)]
                self._changed.notify_all()
            now = time.monotonic()
            if now >= next_beat_s:
                next_beat_s = now + _BEAT_S
                self._send_all({})
            for peer in list(self._peers):
                if peer.connection in readable:
                    self._listen(peer)
                else:
                    self._check(peer)
            if self._server in readable:
                self._accept()

    def _accept(self) -> None:
        """Somebody calls."""
        connection, address = self._server.accept()
        _set_up(connection)
        if len(self._peers) >= _MOST_PEERS:
            connection.close()
        else:
            self._peers.append(_Peer(connection, address[0]))

    def _take(self, peer: _Peer, message: Dict[str, Any]) -> None:
        """A line of a peer."""
        raise NotImplementedError

    def _listen(self, peer: _Peer) -> None:
        """Take what has come from a peer."""
        try:
            data = peer.connection.recv(65536)
            if not data:
                self._gone(peer, "its launcher has ended")
                return
            peer.heard_s = time.monotonic()
            *lines, peer.received = (peer.received + data).split(b"\n")
            if len(peer.received) > _MOST_BYTES:
                raise ValueError("a line without an end")
            for line in lines:
                message = json.loads(line)
                if not isinstance(message, dict):
                    raise ValueError("no object")
                if message:
                    self._take(peer, message)
        except OSError as error:
            self._gone(peer, f"the connection to it is broken ({(error.strerror or str(error)).lower()})")
        except (ValueError, TypeError, KeyError, RecursionError):  # somebody who is no launcher
            self._drop(peer)

    def _check(self, peer: _Peer) -> None:
        """See whether a peer that says nothing is still there."""
        silent_s = time.monotonic() - peer.heard_s
        if peer.machine is None and silent_s > _HELLO_S:
            self._drop(peer)
        elif peer.machine is not None and silent_s > self._silence_s:
            self._gone(peer, f"nothing has been heard from it for {self._silence_s:g} s")

    def _gone(self, peer: _Peer, why: str) -> None:
        """A peer does not answer any more: a failure, unless it has said good-bye."""
        self._drop(peer)
        if peer.machine is not None and not peer.done:
            self._note(Report(f"{peer.machine.name} at {peer.address}", why,
                              "See what the launcher there says, and whether that machine can still be reached."))

    def _drop(self, peer: _Peer) -> None:
        if peer in self._peers:
            self._peers.remove(peer)
            peer.connection.close()

    def _note(self, report: Report) -> None:
        if self._failure is None:
            self._failure = report

    def _send_all(self, message: Dict[str, Any]) -> None:
        for peer in list(self._peers):
            if peer.machine is not None:
                self._send(peer, message)

    def _send(self, peer: _Peer, message: Dict[str, Any]) -> None:
        try:
            peer.connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            pass  # what is wrong shows when it is listened to


def _set_up(connection: socket.socket) -> None:
    connection.settimeout(_SEND_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _hang_up(connection: socket.socket) -> None:
    """Close so that the other side gets what was sent last: to close with lines unread would take it back."""
    deadline = time.monotonic() + _SEND_S
    with connection:
        try:
            connection.shutdown(socket.SHUT_WR)
            while time.monotonic() < deadline and connection.recv(65536):
                pass
        except OSError:
            pass


class Hub(Link):
    """Machine 0's end: listens, and passes on to all what one of them tells.

    Raises:
        OSError: the port cannot be used.
    """

    def __init__(self, here: Machine, address: str, port: int, silence_s: float = SILENCE_S):
        super().__init__(here, silence_s)
        self._server = socket.create_server((address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
        self._members: Dict[int, Machine] = {}

    def close(self) -> None:
        super().close()
        self._server.close()

    def _take(self, peer: _Peer, message: Dict[str, Any]) -> None:
        if peer.machine is None:
            self._welcome(peer, Machine.of(message["machine"]))
        elif "failed" in message:
            peer.done = True  # it leaves now, and has said why
            self._note(Report.of(message["failed"]))
        elif "done" in message:
            peer.done = True

    def _note(self, report: Report) -> None:
        if self._failure is None:
            self._send_all({"failed": asdict(report)})
        super()._note(report)

    def _welcome(self, peer: _Peer, machine: Machine) -> None:
        reason = self._objection(machine)
        if reason:
            self._send(peer, {"refused": reason})
            self._drop(peer)
            return
        self._members[machine.number] = peer.machine = machine
        self._send(peer, {"welcome": asdict(self.here)})

    def _objection(self, new: Machine) -> Optional[str]:
        """Why a machine cannot be one of this run."""
        if new.worker_num != self.here.worker_num:
            return f"WORKER_NUM is {new.worker_num} here and {self.here.worker_num} on machine 0"
        for other in (self.here, *self._members.values()):
            if other.number == new.number:
                return f"a launcher with NODE_RANK {new.number} has come already"
            if new.first < other.first + other.count and other.first < new.first + new.count:
                return f"{new.name} and {other.name} hold the same ranks: LOCAL_WORKER has to be the same on every machine"
        return None


class Member(Link):
    """Another machine's end.

    Args:
        here: this machine.
        address, port: of machine 0's launcher.
    """

    def __init__(self, here: Machine, address: str, port: int, silence_s: float = SILENCE_S):
        super().__init__(here, silence_s)
        self._address, self._port = address, port
        self._welcomed = threading.Event()

    def join(self) -> bool:
        """Call machine 0's launcher, whose scheduler listens, and `start`; False when it does not answer or refuses (`refusal`)."""
        deadline = time.monotonic() + _CONNECT_S
        while True:
            try:
                connection = socket.create_connection((self._address, self._port), timeout=_SEND_S)
                break
            except OSError:
                if time.monotonic() > deadline:
                    return False
                time.sleep(_TICK_S)
        _set_up(connection)
        peer = _Peer(connection, self._address)
        self._peers.append(peer)
        self._send(peer, {"machine": asdict(self.here)})
        self.start()
        self._welcomed.wait(_CONNECT_S)
        if peer.machine is None:
            self.close()
        return peer.machine is not None

    def _take(self, peer: _Peer, message: Dict[str, Any]) -> None:
        if "welcome" in message:
            peer.machine = Machine.of(message["welcome"])
            self._welcomed.set()
        elif "refused" in message:
            self._refusal = _clean(message["refused"])
            self._welcomed.set()
        elif peer.machine is not None and "failed" in message:
            peer.done = True
            self._note(Report.of(message["failed"]))
        elif peer.machine is not None and "done" in message:
            peer.done = True
