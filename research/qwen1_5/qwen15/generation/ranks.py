"""What only rank 0 knows (a request, a question, a file) brought to every rank, over the network's `agree`."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Dict, Iterator, List, Optional, Sequence, Union

import numpy as np

from .. import cluster, interrupts
from ..checkpoint.origin import Likeness
from ..network.base import Network
from .request import Request
from .sampling import SamplingParams

_IDLE = -1


@dataclass(frozen=True)
class Add:
    """A request has come in."""

    number: int
    request: Request


@dataclass(frozen=True)
class Cancel:
    """A request shall end."""

    number: int


@dataclass(frozen=True)
class CancelAll:
    """Everything shall end."""


Command = Union[Add, Cancel, CancelAll]
"""What rank 0 tells the engines of the others."""


def to_json(commands: Sequence[Command]) -> bytes:
    """The commands for the wire. A constraint stays on rank 0, where tokens are chosen."""
    made: List[Dict[str, Any]] = []
    for command in commands:
        if isinstance(command, Add):
            request = asdict(replace(command.request, constraint=None))
            made.append({"add": command.number, "request": {**request, "stop_ids": sorted(command.request.stop_ids)}})
        elif isinstance(command, Cancel):
            made.append({"cancel": command.number})
        else:
            made.append({"cancel": None})
    return json.dumps(made).encode()


def from_json(message: bytes) -> List[Command]:
    """What `to_json` was given."""
    return [_command(value) for value in json.loads(message)]


def _command(value: Dict[str, Any]) -> Command:
    if "add" not in value:
        return CancelAll() if value["cancel"] is None else Cancel(value["cancel"])
    fields = value["request"]
    params = {**fields["params"], "logit_bias": tuple((token, bias) for token, bias in fields["params"]["logit_bias"])}
    return Add(value["add"],
               Request(**{**fields, "prompt": tuple(fields["prompt"]), "stop_ids": frozenset(fields["stop_ids"]),
                                        "params": SamplingParams(**params)}))


def heartbeat_s() -> float:
    """How often rank 0, while it waits for its user, says that there is nothing new: the others wait for rank 0
    meanwhile, and a collective fails that waits longer than `cluster.wait_limit_s`."""
    return min(20.0, cluster.wait_limit_s() / 3)


class Shared:
    """Messages from rank 0 to all ranks. Every rank makes one, and the calls on rank 0 have their counterpart on the
    others.

    On the wire: the message's length in bytes, (1,) int32, or -1 for a sign of life; then its bytes, padded with zeros
    to a power of two of int32s, so that few shapes occur.

    Args:
        network: the open network.
        every_s: how often rank 0 gives a sign of life while it is `waiting`.
    """

    def __init__(self, network: Network, every_s: Optional[float] = None):
        self._network = network
        self._every_s = heartbeat_s() if every_s is None else every_s
        self._sending = threading.Lock()

    def tell(self, message: bytes) -> None:
        """On rank 0: give the other ranks `message`."""
        if self._network.ranks == 1:
            return
        with self._sending, interrupts.held():
            self._network.agree(np.array([len(message)], np.int32))
            if message:
                self._network.agree(padded(message))

    def hear(self) -> bytes:
        """On the other ranks: wait for the next message."""
        while True:
            length = int(self._network.agree(np.zeros(1, np.int32))[0])
            if length > 0:
                return self._network.agree(padded(bytes(length))).tobytes()[:length]
            if length == 0:
                return b""

    def same(self, message: Optional[bytes]) -> bytes:
        """Rank 0's `message` on every rank; the others pass anything."""
        if self._network.rank:
            return self.hear()
        assert message is not None
        self.tell(message)
        return message

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """On rank 0, around a wait of any length: the other ranks are told that it is alive."""
        if self._network.ranks == 1:
            yield
            return
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(self._every_s):
                with self._sending:
                    if not ended.is_set():
                        self._network.agree(np.array([_IDLE], np.int32))

        thread = threading.Thread(target=beat, daemon=True)
        with interrupts.held():
            thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def refuse_unlike(network: Network) -> None:
    """On every rank, once the weights are loaded: compare what all have to hold alike with rank 0's.

    Raises:
        UserError: this rank's weights are of another checkpoint.
    """
    mine = network.likeness()
    if network.ranks > 1 and mine is not None:
        mine.refuse_other_than(Likeness.from_json(Shared(network).same(mine.to_json())))


def padded(message: bytes) -> np.ndarray:
    """A message as int32s, their number a power of two."""
    size = 64
    while size < len(message):
        size *= 2
    return np.frombuffer(message.ljust(size, b"\0"), np.int32)
