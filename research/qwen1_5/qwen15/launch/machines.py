"""The launchers of a run's machines keep in touch: a lost machine is noticed in seconds, a failure named on all.

MindSpore's own heartbeat (30 s, then only the scheduler knows) stays as it is. Machine 0's launcher listens on the port
after the scheduler's. It greets whoever calls with a challenge; the caller says which machine it is and proves that it
knows the secret, and so does machine 0. From then on both sides send a line of JSON, `{}` when there is nothing to say,
once a second: `{"failed": ...}` when a rank has failed, `{"done": true}` before a good end.

Anybody can call. So a stranger has `_HELLO_S` from its first byte to its last, at most `_MOST_STRANGERS` are listened
to at once (the oldest has to go when another calls), and what they say is short.
"""

from __future__ import annotations

import selectors
import socket
import threading
import time
from dataclasses import asdict, dataclass, field
from typing import Dict, List, Optional

from . import secret
from .messages import NONSENSE, Machine, Message, Report, decode, encode, text

PORT_OFFSET = 1
SILENCE_S = 6.0
"""After this long without a line a machine counts as lost."""

_BEAT_S = 1.0
_TICK_S = 0.2
_SAY_S = 1.0  # for a message to be on its way
_PART_S = 1.0  # for the others to take what was said last
_HELLO_S = 5.0  # in which a caller has to identify itself
_CONNECT_S = 3.0  # for a launcher to be found where a scheduler listens
_MOST_STRANGERS = 64
_HELLO_BYTES = 2 ** 12  # longest message of a caller that is not known yet
_MOST_BYTES = 2 ** 18  # of one line, and of what waits to be sent


@dataclass(eq=False)
class _Peer:
    """The other end of a connection; a stranger until `machine` is known."""

    connection: socket.socket
    address: str
    since_s: float = field(default_factory=time.monotonic)
    heard_s: float = field(default_factory=time.monotonic)
    challenge: str = field(default_factory=secret.challenge)
    machine: Optional[Machine] = None
    done: bool = False
    received: bytes = b""
    unsent: bytes = b""


class Link:
    """One launcher's end. Made before `start`, which runs it in a thread of its own; every method returns at once or
    within 2 s.

    Args:
        here: this machine.
        silence_s: after which a machine is lost.
        shared: the secret of this run; None to believe whoever calls.
    """

    def __init__(self, here: Machine, silence_s: float = SILENCE_S, shared: Optional[bytes] = None):
        self.here = here
        self._silence_s = silence_s
        self._shared = shared
        self._peers: List[_Peer] = []
        self._selector = selectors.DefaultSelector()
        self._outbox: List[Message] = []
        self._changed = threading.Condition()
        self._failure: Optional[Report] = None
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
            self._thread.join()
        else:
            self._part()

    def _say(self, message: Message) -> None:
        if self._thread is None or not self._thread.is_alive():
            return
        with self._changed:
            self._outbox.append(message)
            self._changed.wait_for(lambda: not self._outbox, timeout=_SAY_S)

    # -- in the thread

    def _run(self) -> None:
        next_beat_s = time.monotonic()
        while not self._ending:
            self._attend(_TICK_S)
            self._send_outbox()
            now = time.monotonic()
            if now >= next_beat_s:
                next_beat_s = now + _BEAT_S
                self._send_all({})
            for peer in list(self._peers):
                self._check(peer)
        self._send_outbox()
        self._part()

    def _attend(self, wait_s: float) -> None:
        """See to whoever can be read from or written to."""
        for key, events in self._selector.select(wait_s):
            peer = key.data
            if peer is None:
                self._accept()
                continue
            if events & selectors.EVENT_WRITE and peer in self._peers:
                self._flush(peer)
            if events & selectors.EVENT_READ and peer in self._peers:
                self._listen(peer)

    def _send_outbox(self) -> None:
        with self._changed:
            waiting = list(self._outbox)
        for message in waiting:
            self._send_all(message)
        with self._changed:
            del self._outbox[:len(waiting)]
            self._changed.notify_all()

    def _part(self) -> None:
        """Close so that the others get what was sent last: to close with lines unread would take it back."""
        registered = self._selector.get_map()
        if registered is None:  # closed already
            return
        for server in [key.fileobj for key in registered.values() if key.data is None]:
            self._selector.unregister(server)
        for stranger in [peer for peer in self._peers if peer.machine is None]:
            self._drop(stranger)
        deadline = time.monotonic() + _PART_S
        shut = set()
        while self._peers and time.monotonic() < deadline:
            for peer in [peer for peer in self._peers if not peer.unsent and peer not in shut]:
                shut.add(peer)
                try:
                    peer.connection.shutdown(socket.SHUT_WR)
                except OSError:
                    self._drop(peer)
            for key, events in self._selector.select(_TICK_S):
                if events & selectors.EVENT_WRITE:
                    self._flush(key.data)
                if events & selectors.EVENT_READ and not _read_on(key.data.connection):
                    self._drop(key.data)
        for peer in list(self._peers):
            self._drop(peer)
        self._selector.close()

    def _accept(self) -> None:
        """Somebody calls."""
        raise NotImplementedError

    def _take(self, peer: _Peer, message: Message) -> None:
        """A line of a peer that is known."""
        if "failed" in message:
            report = Report.of(message["failed"])
            peer.done = True  # it is leaving and has said why
            self._note(report)
        elif "done" in message:
            peer.done = True

    def _join(self, peer: _Peer) -> None:
        """Listen to a peer from now on."""
        peer.connection.setblocking(False)
        self._peers.append(peer)
        self._selector.register(peer.connection, selectors.EVENT_READ, peer)

    def _listen(self, peer: _Peer) -> None:
        """Take what has come from a peer."""
        try:
            data = peer.connection.recv(65536)
        except BlockingIOError:
            return
        except OSError as error:
            self._gone(peer, f"the connection to it is broken ({(error.strerror or str(error)).lower()})")
            return
        if not data:
            self._gone(peer, "its launcher has ended")
            return
        peer.heard_s = time.monotonic()
        peer.received += data
        self._take_lines(peer)

    def _take_lines(self, peer: _Peer) -> None:
        try:
            while b"\n" in peer.received and peer in self._peers:
                line, _, peer.received = peer.received.partition(b"\n")
                if len(line) > self._limit(peer):
                    raise ValueError("a line too long")
                message = decode(line)
                if message:
                    self._take(peer, message)
            if len(peer.received) > self._limit(peer):
                raise ValueError("a line without an end")
        except NONSENSE:
            self._gone(peer, "what comes from it is not what a launcher says")

    @staticmethod
    def _limit(peer: _Peer) -> int:
        return _HELLO_BYTES if peer.machine is None else _MOST_BYTES

    def _check(self, peer: _Peer) -> None:
        """See whether a peer that says nothing is still there."""
        now = time.monotonic()
        if peer.machine is None:
            if now - peer.since_s > _HELLO_S:
                self._drop(peer)
        elif now - peer.heard_s > self._silence_s:
            self._gone(peer, f"nothing has been heard from it for {self._silence_s:g} s")

    def _gone(self, peer: _Peer, why: str) -> None:
        """A peer does not answer any more: a failure, unless it is a stranger or has said good-bye."""
        self._drop(peer)
        if peer.machine is not None and not peer.done:
            self._note(Report(f"{peer.machine.name} at {peer.address}", why,
                              "See what the launcher there says, and whether that machine can still be reached."))

    def _drop(self, peer: _Peer) -> None:
        if peer in self._peers:
            self._peers.remove(peer)
            self._selector.unregister(peer.connection)
            peer.connection.close()

    def _note(self, report: Report) -> None:
        if self._failure is None:
            self._failure = report

    def _send_all(self, message: Message) -> None:
        for peer in list(self._peers):
            if peer.machine is not None:
                self._send(peer, message)

    def _send(self, peer: _Peer, message: Message) -> None:
        """Send a line, the part that does not go at once later. Who takes nothing any more is noticed by its
        silence."""
        if len(peer.unsent) < _MOST_BYTES:
            peer.unsent += encode(message)
        self._flush(peer)

    def _flush(self, peer: _Peer) -> None:
        try:
            peer.unsent = peer.unsent[peer.connection.send(peer.unsent):]
        except BlockingIOError:
            pass
        except OSError:
            peer.unsent = b""  # what is wrong shows when listening on it
        if peer in self._peers:
            writing = selectors.EVENT_WRITE if peer.unsent else 0
            self._selector.modify(peer.connection, selectors.EVENT_READ | writing, peer)


def _read_on(connection: socket.socket) -> bool:
    """Throw away what has come; False when the other side has hung up."""
    try:
        return bool(connection.recv(65536))
    except BlockingIOError:
        return True
    except OSError:
        return False


def _set_up(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class Hub(Link):
    """Machine 0's end: listens, and passes on to all what one of them tells.

    Raises:
        OSError: the port cannot be used.
    """

    def __init__(self, here: Machine, address: str, port: int, silence_s: float = SILENCE_S,
                 shared: Optional[bytes] = None):
        super().__init__(here, silence_s, shared)
        self._server = socket.create_server((address, port),
                                            family=socket.AF_INET6 if ":" in address else socket.AF_INET)
        self._server.setblocking(False)
        self._selector.register(self._server, selectors.EVENT_READ, None)
        self._members: Dict[int, Machine] = {}

    def close(self) -> None:
        super().close()
        self._server.close()

    def _accept(self) -> None:
        strangers = [peer for peer in self._peers if peer.machine is None]
        try:
            connection, address = self._server.accept()
            _set_up(connection)
        except BlockingIOError:
            return
        except OSError:  # out of file descriptors, for example
            if strangers:
                self._drop(strangers[0])
            else:
                time.sleep(_TICK_S)
            return
        if len(strangers) >= _MOST_STRANGERS:
            self._drop(strangers[0])
        peer = _Peer(connection, address[0])
        self._join(peer)
        self._send(peer, {"challenge": peer.challenge})

    def _take(self, peer: _Peer, message: Message) -> None:
        if peer.machine is None:
            self._welcome(peer, message)
        else:
            super()._take(peer, message)

    def _note(self, report: Report) -> None:
        if self._failure is None:
            self._send_all({"failed": asdict(report)})
        super()._note(report)

    def _welcome(self, peer: _Peer, message: Message) -> None:
        machine, theirs = Machine.of(message["machine"]), text(message["challenge"])
        wanted = secret.proof(self._shared, "member", peer.challenge, theirs, machine.line)
        reason = self._doubt(text(message["proof"]), wanted) or self._objection(machine)
        if reason:
            self._send(peer, {"refused": reason})
            self._drop(peer)
            return
        self._members[machine.number] = peer.machine = machine
        own = secret.proof(self._shared, "machine 0", peer.challenge, theirs, self.here.line)
        self._send(peer, {"welcome": asdict(self.here), "proof": own})

    @staticmethod
    def _doubt(given: str, wanted: str) -> Optional[str]:
        """Why a caller is not believed."""
        if secret.equal(given, wanted):
            return None
        if not wanted:
            return f"it has a secret and machine 0 has none ({secret.TEXT} or {secret.FILE})"
        whose = "it has none" if not given else "its own is another one"
        return f"machine 0 has a secret, and {whose} ({secret.TEXT} or {secret.FILE})"

    def _objection(self, new: Machine) -> Optional[str]:
        """Why a machine cannot be one of this run."""
        if new.worker_num != self.here.worker_num:
            return f"WORKER_NUM is {new.worker_num} here and {self.here.worker_num} on machine 0"
        for other in (self.here, *self._members.values()):
            if other.number == new.number:
                return f"a launcher with NODE_RANK {new.number} has come already"
            if new.first < other.first + other.count and other.first < new.first + new.count:
                return (f"{new.name} and {other.name} hold the same ranks: LOCAL_WORKER has to be the same on every "
                        "machine")
        if not 0 < new.count <= new.worker_num - new.first:
            return f"there is no {new.name} among {new.worker_num} ranks"
        return None


class Member(Link):
    """Another machine's end.

    Args:
        here: this machine.
        address, port: of machine 0's launcher.
    """

    def __init__(self, here: Machine, address: str, port: int, silence_s: float = SILENCE_S,
                 shared: Optional[bytes] = None):
        super().__init__(here, silence_s, shared)
        self._address, self._port = address, port
        self._refusal: Optional[str] = None

    @property
    def refusal(self) -> Optional[str]:
        """Why machine 0 does not take this one, or is not believed; None when neither is so."""
        return self._refusal

    def join(self) -> bool:
        """Call machine 0's launcher, whose scheduler listens, and `start`; False when it does not answer or refuses
        (`refusal`)."""
        deadline = time.monotonic() + _CONNECT_S
        while True:
            peer = self._call(deadline)
            if peer is not None:
                self._join(peer)
                self._take_lines(peer)
                self.start()
                return True
            if self._refusal is not None or time.monotonic() + _TICK_S > deadline:
                self.close()
                return False
            time.sleep(_TICK_S)

    def _call(self, deadline: float) -> Optional[_Peer]:
        """Connect and introduce ourselves; None when nobody answers as a launcher does."""
        connection = None
        try:
            connection = socket.create_connection((self._address, self._port),
                                                  timeout=max(0.01, deadline - time.monotonic()))
            _set_up(connection)
            peer = _Peer(connection, self._address)
            if self._introduce(peer, deadline):
                return peer
        except (OSError, *NONSENSE):
            pass  # not there, or not a launcher
        if connection is not None:
            connection.close()
        return None

    def _introduce(self, peer: _Peer, deadline: float) -> bool:
        theirs = text(_read_line(peer, deadline)["challenge"])
        proof = secret.proof(self._shared, "member", theirs, peer.challenge, self.here.line)
        peer.connection.sendall(encode({"machine": asdict(self.here), "challenge": peer.challenge, "proof": proof}))
        answer = _read_line(peer, deadline)
        if "refused" in answer:
            self._refusal = text(answer["refused"])
            return False
        machine = Machine.of(answer["welcome"])
        wanted = secret.proof(self._shared, "machine 0", theirs, peer.challenge, machine.line)
        if not secret.equal(text(answer["proof"]), wanted):
            self._refusal = f"it does not prove that it knows the secret ({secret.TEXT} or {secret.FILE})"
            return False
        peer.machine = machine
        return True


def _read_line(peer: _Peer, deadline: float) -> Message:
    """The next line of a peer that is not listened to yet. Raises an OSError when none comes in time, or one of
    `NONSENSE`."""
    while b"\n" not in peer.received:
        peer.connection.settimeout(max(0.01, deadline - time.monotonic()))
        data = peer.connection.recv(_HELLO_BYTES)
        if not data or len(peer.received) > _HELLO_BYTES or time.monotonic() > deadline:
            raise ConnectionError("no answer")
        peer.received += data
    line, _, peer.received = peer.received.partition(b"\n")
    return decode(line)
