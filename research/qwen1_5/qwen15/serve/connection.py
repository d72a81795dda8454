"""A client's connection: how long it may take to say what it wants, and what it is told when that is no HTTP."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Optional

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .refusal import Refusal

HEAD_S = 15.0
"""A request's line and headers have to arrive within this time, from the beginning of the connection on. (Their length
is limited by h11, and how long a connection may be idle between two requests by uvicorn.)"""


class Connection(H11Protocol):
    """uvicorn's connection with an end to waiting."""

    _waiting: Optional[asyncio.TimerHandle] = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect()

    def connection_lost(self, exc: Optional[Exception]) -> None:
        self._stop()
        super().connection_lost(exc)

    def _expect(self) -> None:
        """Begin to wait for a request's head, or stop where it is there."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self._waiting is None:
            self._waiting = self.loop.call_later(HEAD_S, self._give_up)

    def _stop(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _give_up(self) -> None:
        self._waiting = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        body = json.dumps(Refusal(400, "This is not an HTTP request that can be read.").body).encode()
        head = h11.Response(status_code=400, headers=[(b"content-type", b"application/json"), (b"connection", b"close"),
                                                      (b"content-length", str(len(body)).encode())])
        for event in (head, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
