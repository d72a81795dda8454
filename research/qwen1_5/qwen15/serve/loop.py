"""The engine's side of the desk: requests join and leave between steps, each step's news go to the web in one piece."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Dict, List, Optional, Tuple

from ..errors import UserError
from ..generation.request import CANCELLED, FAILED, LogProbs, Request, Step
from ..generation.session import Answer, Prompt, Session
from .desk import Desk, Event, Ticket
from .refusal import Refusal


class _Running:
    """One prompt of a ticket while the engine has it."""

    def __init__(self, ticket: Ticket, choice: int, answer: Answer):
        self.ticket, self.choice, self.answer = ticket, choice, answer
        self.reported = 0  # entries of answer.logprobs already sent
        self.prompt_entries: Tuple[Dict[str, Any], ...] = ()


class Loop:
    """Runs the engine for the desk until it is told to stop.

    Args:
        session: open.
        desk: where requests come from and answers go.
    """

    def __init__(self, session: Session, desk: Desk):
        assert session.engine is not None
        self._session, self._engine, self._desk = session, session.engine, desk
        self._known: Dict[int, _Running] = {}
        self._numbers: Dict[int, List[int]] = {}  # by ticket
        self._stop_by: Optional[float] = None

    def stop(self, drain_s: float) -> None:
        """Take nothing new and end when what runs has ended, in `drain_s` seconds at most. From a signal handler
        too."""
        self._stop_by = time.monotonic() + drain_s
        self._desk.closing = "shutting down"
        self._desk.wake()

    def run(self) -> None:
        """Serve. Returns after `stop`.

        Raises:
            UserError, RuntimeError: the engine can go on no more; every open request has been told.
        """
        try:
            while not self._is_over():
                self._turn()
        except BaseException:
            self._desk.closing = "ending"
            self._fail_all(Refusal(503, "The server has failed and ends.", code="server_failed"))
            raise
        self._fail_all(Refusal(503, "The server was shut down before the answer was complete.", code="server_closing"))
        self._engine.close()

    def _is_over(self) -> bool:
        return self._stop_by is not None and (not self._known or time.monotonic() >= self._stop_by)

    def _turn(self) -> None:
        idle = not self._engine.has_work
        with self._engine.shared.waiting() if idle else nullcontext():
            arrivals = self._desk.take(None if idle and self._stop_by is None else 0)
        for kind, ticket in arrivals:
            if kind == "add":
                self._desk.deliver(self._enter(ticket))
            elif kind == "cancel":
                for number in self._numbers.get(id(ticket), ()):
                    self._engine.cancel(number)
        if self._engine.has_work:
            news = [made for step in self._engine.step() for made in self._taken(step)]
            self._desk.running = len(self._engine.scheduler.running)
            self._desk.deliver(news)

    def _enter(self, ticket: Ticket) -> List[Tuple[Ticket, Event]]:
        """Give a ticket's prompts to the engine; what cannot run is news at once."""
        failed = []
        for choice, prompt in enumerate(ticket.prompts):
            if ticket.withdrawn:
                failed.append((ticket, Event(choice, finish_reason=CANCELLED)))
                continue
            try:
                number = self._engine.add(self._request(ticket, choice, prompt))
            except UserError as error:
                failed.append((ticket, Event(choice, refusal=Refusal.of(error))))
                continue
            self._known[number] = _Running(ticket, choice, Answer(self._session.tokenizer, prompt))
            self._numbers.setdefault(id(ticket), []).append(number)
        return failed

    def _request(self, ticket: Ticket, choice: int, prompt: Prompt) -> Request:
        request, = self._session.requests([prompt])
        constraint = ticket.constraints[choice]
        return request if constraint is None else replace(request, constraint=lambda: constraint)

    def _taken(self, step: Step) -> List[Tuple[Ticket, Event]]:
        running = self._known.get(step.request)
        if running is None:
            return []
        ticket, choice, answer = running.ticket, running.choice, running.answer
        if step.finish_reason == FAILED:
            self._forget(step.request)
            return [(ticket, Event(choice, refusal=Refusal(500, _sentence(step.error), code="logits_not_finite")))]
        stopped = answer.stopped
        text = answer.take(step)
        if step.token is not None and ticket.first_token_s is None:
            ticket.first_token_s = time.monotonic()
        reason = answer.finish_reason or None
        if answer.stopped and not stopped and step.finish_reason is None:
            self._engine.cancel(step.request)
        if step.finish_reason is not None:
            self._forget(step.request)
            constraint = ticket.constraints[choice]
            if constraint is not None and constraint.failure is not None:
                return [(ticket, Event(choice, refusal=Refusal(
                    500, f"The grammar cannot be followed: {constraint.failure}")))]
        running.prompt_entries += self._prompt_entries(ticket.prompts[choice], step.prompt_logprobs, answer)
        if ticket.whole:
            return [] if not reason else [(ticket, Event(choice, answer.text, tuple(answer.logprobs), reason,
                                                         answer.usage, running.prompt_entries))]
        entries = tuple(answer.logprobs[running.reported:])
        running.reported = len(answer.logprobs)
        scored, running.prompt_entries = running.prompt_entries, ()
        if not (text or entries or scored or reason or step.token is not None):
            return []
        return [(ticket, Event(choice, text, entries, reason, answer.usage, scored))]

    @staticmethod
    def _prompt_entries(prompt: Prompt, logprobs: Optional[List[LogProbs]], answer: Answer) -> Tuple[Dict[str, Any],
                                                                                                     ...]:
        """The prompt's tokens as an answer's have it; the first has no probability: nothing is before it."""
        if logprobs is None:
            return ()
        first = {**answer.entry(prompt.ids[0], LogProbs(0.0, ())), "logprob": None}
        return (first, *map(answer.entry, prompt.ids[1:], logprobs))

    def _forget(self, number: int) -> None:
        running = self._known.pop(number)
        numbers = self._numbers[id(running.ticket)]
        numbers.remove(number)
        if not numbers:
            del self._numbers[id(running.ticket)]

    def _fail_all(self, refusal: Refusal) -> None:
        """Tell every request that is open, and those that arrive meanwhile."""
        news = [(running.ticket, Event(running.choice, refusal=refusal)) for running in self._known.values()]
        self._known.clear()
        self._numbers.clear()
        for kind, ticket in self._desk.take(0):
            if kind == "add":
                news += [(ticket, Event(choice, refusal=refusal)) for choice in range(len(ticket.prompts))]
        self._desk.deliver(news)


def _sentence(error: Optional[UserError]) -> str:
    return "The logits are not finite." if error is None else Refusal.of(error).message
