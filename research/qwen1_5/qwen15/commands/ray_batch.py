"""Prompts of a file continued on a Ray cluster: workers with a model each take shares, the driver writes the results.

A share is a list of prompts. Its results come back one by one as they are finished; when a worker dies, what its share
lacks is put back and another worker does it, so every prompt is written once. A prompt's answer depends on its own seed
and number only, not on the worker.

Ray is imported inside the functions that need it: a base installation has none.
"""

from __future__ import annotations

import os
import socket
import sys
from collections import deque
from typing import IO, Any, Callable, Deque, Dict, Iterator, List, Optional, Tuple

from ..config.schema import Config
from ..errors import EXIT_FAILED, EXIT_OK, UserError
from ..generation.session import Prompt, Session
from ..ray_environment import ENVIRONMENT
from ..reporting import Reporter, quiet_frameworks, stdout_to_stderr
from .batch_progress import BatchProgress
from .options import PredictOptions
from .prompts import PromptEntry, Todo
from .result_file import ResultFile
from .results import JsonLines, write_line

SHARE_BATCHES = 4
"""A share holds at most so many batches' worth of prompts: long enough to keep a batch full, short enough to lose."""
MOST_DEATHS = 3
"""So many workers may die with the same prompt before it is the prompt that is blamed."""
_CONNECT_S = 10.0
_TELL_S = 30.0
"""After so long without any worker the user is told what is waited for."""
_OPEN, _RESULT, _FAILED = "open", "result", "failed"


class Worker:
    """A process of the cluster with a session of its own.

    Args:
        config: the whole configuration; the checkpoint is at the same place on every node.
        max_batch: most sequences at once.
        threads: CPU threads, unless the configuration says so itself.
    """

    def __init__(self, config: Config, max_batch: int, threads: int):
        self._config, self._max_batch, self._threads = config, max_batch, threads
        self._session: Optional[Session] = None

    def open(self) -> Iterator[Tuple[Any, ...]]:
        """Load the model; yields ('open', what the network is), or 'failed' as `work` does."""
        from .. import ops

        try:
            quiet_frameworks("error")
            if not self._config.threads:
                ops.use_threads(self._threads)
            session = Session.prepare(self._config)
            session.open(lambda line: None, self._max_batch)
        except UserError as error:
            yield _failed(error)
        else:
            self._session = session
            yield (_OPEN, session.note)

    def work(self, share: Todo) -> Iterator[Tuple[Any, ...]]:
        """Yields ('result', index, JSON's value) for every finished prompt, and ('failed', what, where, fix, exit code)
        when some of them cannot be done."""
        assert self._session is not None
        results: List[Tuple[Any, ...]] = []
        lines = JsonLines([entry for entry, _ in share],
                          lambda index, value: results.append((_RESULT, index, value)), in_order=False)
        try:
            for piece in self._session.run([prompt for _, prompt in share]):
                lines.take(piece)
                while results:
                    yield results.pop(0)
        except UserError as error:
            yield _failed(error)


def _failed(error: UserError) -> Tuple[Any, ...]:
    return (_FAILED, error.what, error.where, error.fix, error.exit_code)


class _Hand:
    """A worker as the driver sees it: the stream of its news, and what of its share has no result yet."""

    def __init__(self, actor: Any):
        self.actor = actor
        self.left: Dict[int, Tuple[PromptEntry, Prompt]] = {}
        self.news: Any = actor.open.remote()
        self.is_open = False

    def give(self, share: Todo) -> None:
        """The next share."""
        self.left = {entry.index: (entry, prompt) for entry, prompt in share}
        self.news = self.actor.work.remote(share)


def run(config: Config, todo: Todo, out: Optional[ResultFile], options: PredictOptions, max_batch: int,
        report: Reporter) -> int:
    """Continue the prompts on the cluster of `options.ray`; returns the exit code.

    Raises:
        UserError: no cluster is there or it has no room, a worker cannot open the model, or a prompt failed.
    """
    with stdout_to_stderr() as stdout:  # Ray prints messages of its own about nodes
        return _run(config, todo, out, options, max_batch, report, stdout)


def _run(config: Config, todo: Todo, out: Optional[ResultFile], options: PredictOptions, max_batch: int,
         report: Reporter, stdout: IO[str]) -> int:
    ray = _connected(options.ray or "auto")
    progress = BatchProgress(len(todo), sys.stderr, report.shows("info"))
    write: Callable[[int, Dict[str, Any]], None]
    write = out.write if out is not None else lambda _, value: write_line(stdout, value)
    driver = None
    try:
        count = _workers(ray, options, len(todo))
        kind = ray.remote(num_cpus=options.ray_cpus, max_restarts=0, runtime_env={"env_vars": ENVIRONMENT})(Worker)
        driver = _Driver(ray, lambda: _Hand(kind.remote(config, max_batch, options.ray_cpus)), count, todo, max_batch,
                         write, progress, report)
        report.info(f"{count} workers with {options.ray_cpus} CPUs each on a Ray cluster of "
                    f"{sum(node['Alive'] for node in ray.nodes())} nodes")
        driver.run()
    finally:
        if driver is not None:
            driver.close()
        ray.shutdown()
    report.info(progress.finish())
    return EXIT_OK


class _Driver:
    """Hands out shares until every prompt has its result.

    Args:
        ray: the module.
        hire: starts a worker.
        count: how many.
        todo: what is to be done.
        max_batch: sequences that a worker runs at once.
        write: takes a prompt's number and its result.
    """

    def __init__(self, ray: Any, hire: Callable[[], _Hand], count: int, todo: Todo, max_batch: int,
                 write: Callable[[int, Dict[str, Any]], None], progress: BatchProgress, report: Reporter):
        self._ray, self._hire, self._max_batch = ray, hire, max_batch
        self._queue: Deque[Tuple[PromptEntry, Prompt]] = deque(todo)
        self._write, self._progress, self._report = write, progress, report
        self._hands = [hire() for _ in range(count)]
        self._deaths: Dict[int, int] = {}
        self._stillborn = 0
        self._failures: List[UserError] = []

    def run(self) -> None:
        """Returns when all is written.

        Raises:
            UserError: some of it cannot be done.
        """
        while self._queue or any(hand.left for hand in self._hands):
            waiting = {hand.news: hand for hand in self._hands if hand.news is not None}
            # Workers that wait for room have no share, so the work never waits for them.
            ready, _ = self._ray.wait(list(waiting), num_returns=1, timeout=_TELL_S, fetch_local=False)
            for news in ready:
                self._take(waiting[news])
            if not ready and not any(hand.is_open for hand in self._hands):
                self._report.warning("no worker has started yet: the cluster is busy, or loading takes its time")
        if self._failures:
            raise self._failures[0]

    def close(self) -> None:
        """End the workers."""
        for hand in self._hands:
            self._ray.kill(hand.actor)

    def _take(self, hand: _Hand) -> None:
        """One more piece of news of a worker, or its end."""
        from ray.exceptions import RayActorError, RayError

        try:
            news = self._ray.get(next(hand.news))
        except StopIteration:
            if hand.is_open:
                self._next(hand)
            return
        except RayActorError as error:
            self._bury(hand, error)
            return
        except RayError as error:
            raise UserError(f"a worker failed: {_lines(error)[-1]}", where="--ray", exit_code=EXIT_FAILED) from error
        if news[0] == _OPEN:
            self._report.debug(f"a worker is ready: {news[1]}")
            hand.is_open, self._stillborn = True, 0
        elif news[0] == _RESULT:
            _, index, value = news
            if hand.left.pop(index, None) is not None:
                self._write(index, value)
                self._progress.finished(value)
        else:
            failure = UserError(*news[1:])
            if not hand.is_open:
                raise failure
            self._failures.append(failure)
            hand.left.clear()  # a session reports it after the rest of its share has ended

    def _next(self, hand: _Hand) -> None:
        """Give a worker its next share: smaller ones towards the end, so that all end together."""
        hand.news = None
        if not self._queue:
            return
        fair = -(-len(self._queue) // (2 * len(self._hands)))
        size = max(1, min(SHARE_BATCHES * self._max_batch, fair))
        hand.give([self._queue.popleft() for _ in range(min(size, len(self._queue)))])

    def _bury(self, hand: _Hand, error: Exception) -> None:
        """A worker is gone: what its share lacks goes back to the front, and another one is started where there is
        room."""
        lost = list(hand.left.values())
        self._stillborn += not hand.is_open
        for entry, _ in lost:
            self._deaths[entry.index] = self._deaths.get(entry.index, 0) + 1
        worst = max((entry for entry, _ in lost), key=lambda entry: self._deaths[entry.index], default=None)
        if self._stillborn >= MOST_DEATHS or worst is not None and self._deaths[worst.index] >= MOST_DEATHS:
            when = f"while they worked on {worst.where} and others" if worst is not None else "before they were ready"
            raise UserError(f"{MOST_DEATHS} workers have died {when} ({_lines(error)[0]})", where="--ray",
                            exit_code=EXIT_FAILED,
                            fix="The logs of the cluster's nodes (/tmp/ray) say why; it is often memory.")
        self._queue.extendleft(reversed(lost))
        self._report.warning(f"a worker is gone; of its share, {len(lost)} prompts are done again")
        self._hands[self._hands.index(hand)] = self._hire()
        for other in self._hands:
            if other.news is None:
                self._next(other)


def _connected(address: str) -> Any:
    """The module `ray`, connected.

    Raises:
        UserError: it is not installed, or no cluster answers.
    """
    try:
        import ray
    except ImportError:
        raise UserError("the package ray is not installed", where="--ray",
                        fix="pip install 'qwen15-mindspore[ray]', on every node.") from None
    address = os.environ.get("RAY_ADDRESS") or address if address == "auto" else address
    host, _, port = address.rpartition(":")
    try:
        if host and port.isdigit():  # Ray would wait a long time, then end the process
            socket.create_connection((host, int(port)), _CONNECT_S).close()
        ray.init(address=address, log_to_driver=False, logging_level="error", configure_logging=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"no Ray cluster answers at {address} ({_lines(error)[0]})", where="--ray",
                        fix="Start one: `ray start --head` here, `ray start --address HOST:6379` on the others.",
                        exit_code=EXIT_FAILED) from None
    return ray


def _workers(ray: Any, options: PredictOptions, prompts: int) -> int:
    """How many: as many as the CPUs allow, no more than there is work for."""
    each = options.ray_cpus
    room = sum(int(node["Resources"].get("CPU", 0) // each) for node in ray.nodes() if node["Alive"])
    if not room:
        raise UserError(f"no node of the cluster has {each} CPUs", where="--ray_cpus", fix="Lower it.")
    wanted = options.ray_workers or room
    if wanted > room:
        raise UserError(f"{wanted} workers of {each} CPUs do not fit, {room} do", where="--ray_workers",
                        fix="Lower it or --ray_cpus, or add nodes.")
    return min(wanted, prompts)


def _lines(error: Exception) -> List[str]:
    return [line.strip()[:200] for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
