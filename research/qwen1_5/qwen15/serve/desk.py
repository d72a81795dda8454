"""The desk between the web's thread and the engine's: requests in by a queue, pieces of answers out to an event loop.

The engine stays in the main thread, where Python and MindSpore want Ctrl-C to arrive.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Dict, List, NamedTuple, Optional, Set, Tuple

from ..generation.request import Usage
from ..generation.session import Prompt
from .refusal import Refusal


class Event(NamedTuple):
    """News of one prompt of a ticket.

    Attributes:
        choice: which of the ticket's prompts.
        text: what has become certain of its answer.
        entries: log probabilities of its new tokens.
        finish_reason, usage: with the last event of a prompt.
        prompt_entries: log probabilities of the prompt's tokens, with the first event, where asked for.
        refusal: instead of all others: the prompt has failed.
    """

    choice: int
    text: str = ""
    entries: Tuple[Dict[str, Any], ...] = ()
    finish_reason: Optional[str] = None
    usage: Optional[Usage] = None
    prompt_entries: Tuple[Any, ...] = ()
    refusal: Optional[Refusal] = None


@dataclass(eq=False)
class Ticket:
    """A request at the desk: its prompts run side by side.

    Attributes:
        prompts: what is continued.
        constraints: what keeps each answer to a grammar, None for free ones.
        whole: answers are wanted in one piece, so each comes as one event at its end: waking the web's thread for every
            token would cost the engine's.
        arrived_s: `time.monotonic` of its arrival.
        first_token_s: the same of its first token.
        events: what has come for the web's thread.
    """

    prompts: Tuple[Prompt, ...]
    constraints: Tuple[Any, ...]
    whole: bool = False
    events: "asyncio.Queue[Event]" = field(default_factory=asyncio.Queue)
    arrived_s: float = field(default_factory=time.monotonic)
    first_token_s: Optional[float] = None
    withdrawn: bool = False


@dataclass(frozen=True)
class DeskLimits:
    """What the desk takes.

    Attributes:
        waiting: most prompts that wait for the engine; more are told to come back.
        running: prompts that run at once.
    """

    waiting: int
    running: int


class Desk:
    """Takes requests on the web's thread and hands them to the engine's.

    Args:
        limits: how much may wait.
    """

    def __init__(self, limits: DeskLimits):
        self.limits = limits
        self._arrivals: "queue.SimpleQueue[Tuple[str, Any]]" = queue.SimpleQueue()
        self._loop: Optional[asyncio.AbstractEventLoop] = None
        self._lock = threading.Lock()
        self._count = 0
        self._open: Set[Ticket] = set()
        self.running = 0
        self.closing: Optional[str] = None

    # --- the web's thread

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Events go to this loop."""
        self._loop = loop

    @property
    def waiting(self) -> int:
        """Prompts that have not started."""
        return max(0, self._count - self.running)

    def submit(self, ticket: Ticket) -> None:
        """Queue a request.

        Raises:
            Refusal: too much is waiting, or it would always be too much, or the server is closing.
        """
        if self.closing is not None:
            raise Refusal(503, f"The server is {self.closing} and takes no new requests.", code="server_closing",
                          retry_after_s=10)
        prompts, most = ticket.prompts, self.limits.waiting + self.limits.running
        if len(prompts) > most:
            raise Refusal(400, f"The request wants {len(prompts)} answers; this server takes at most {most}.", "n")
        with self._lock:
            if self._count + len(prompts) > most:
                raise Refusal(429, f"{self.waiting} prompts are waiting already. Try again later.", code="queue_full",
                              retry_after_s=1 + self.waiting // max(1, self.limits.running))
            self._count += len(prompts)
        self._open.add(ticket)
        self._arrivals.put(("add", ticket))

    def close(self, ticket: Ticket, complete: bool) -> None:
        """The web's side is done with a ticket; unless it is complete, what still runs for it ends at the next step."""
        self._open.discard(ticket)
        if not complete:
            ticket.withdrawn = True
            self._arrivals.put(("cancel", ticket))

    def give_up(self, refusal: Refusal) -> None:
        """Tell every open ticket that nothing more comes: the engine's thread cannot do it any more."""
        self.closing = self.closing or "ending"
        for ticket in list(self._open):
            ticket.events.put_nowait(Event(0, refusal=refusal))

    # --- the engine's thread

    def wake(self) -> None:
        """Have `take` return although nothing has arrived; may be called from a signal handler."""
        self._arrivals.put(("wake", None))

    def take(self, wait_s: Optional[float]) -> List[Tuple[str, Any]]:
        """What has arrived; waits for something for at most wait_s (0: not at all, None: as long as it takes)."""
        taken = []
        try:
            taken.append(self._arrivals.get(timeout=wait_s) if wait_s != 0 else self._arrivals.get_nowait())
            for _ in itertools.count():
                taken.append(self._arrivals.get_nowait())
        except queue.Empty:
            pass
        return taken

    def deliver(self, batch: List[Tuple[Ticket, Event]]) -> None:
        """Hand events over, in one go for a whole step."""
        loop = self._loop
        if not batch or loop is None:
            return
        with self._lock:
            self._count -= sum(event.finish_reason is not None or event.refusal is not None for _, event in batch)

        def put() -> None:
            for ticket, event in batch:
                ticket.events.put_nowait(event)

        try:
            loop.call_soon_threadsafe(put)
        except RuntimeError:  # the loop has closed: there is no listener any more
            pass
