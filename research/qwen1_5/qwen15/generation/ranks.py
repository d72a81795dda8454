"""What only rank 0 knows (a typed question, a file from stdin) brought to every rank, over the network's `agree`."""

import os
import threading
from contextlib import contextmanager
from typing import Iterator, Mapping, Optional

import numpy as np

from .. import interrupts
from ..network.base import Network

_IDLE = -1


def heartbeat_s(environ: Mapping[str, str] = os.environ) -> float:
    """How often rank 0, while it waits for its user, says that there is nothing new: the others wait for rank 0 meanwhile, and a
    collective that waits for MS_NODE_TIMEOUT seconds (MindSpore: 30 unless it is set) fails."""
    limit = environ.get("MS_NODE_TIMEOUT", "")
    return min(20.0, (int(limit) if limit.isdigit() else 30) / 3)


class Shared:
    """Messages from rank 0 to all ranks. Every rank makes one, and the calls on rank 0 have their counterpart on the others.

    On the wire: the message's length in bytes, (1,) int32, or -1 for a sign of life; then its bytes, padded with zeros to
    a power of two of int32s, so that few shapes occur.

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
                self._network.agree(_padded(message))

    def hear(self) -> bytes:
        """On the other ranks: wait for the next message."""
        while True:
            length = int(self._network.agree(np.zeros(1, np.int32))[0])
            if length > 0:
                return self._network.agree(_padded(bytes(length))).tobytes()[:length]
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


def _padded(message: bytes) -> np.ndarray:
    size = 64
    while size < len(message):
        size *= 2
    return np.frombuffer(message.ljust(size, b"\0"), np.int32)
