"""Start the ranks of one machine, watch them, and end them all at the first failure, saying whose it was."""

import os
import re
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass, replace
from typing import List, Optional, Sequence, Set, Tuple

from .. import terminal
from ..errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, UserError, run_main
from . import machines, ports
from .messages import Report
from .rank_process import NOTICE, RankProcess, Task

_POLL_S = 0.05
_STOPPED_LIMIT_S = 30  # as long as MindSpore's scheduler waits for a heartbeat
_GRACE_S = 2.0  # between asking processes to end and ending them
_SETTLE_S = 0.3  # after the first failure: ranks that failed at the same moment
_SETTLE_COLLECTIVE_S = 4.0  # after a rank gave up waiting for another: the other waiting ones give up soon
_REPORT_WAITING_S = 30.0
_PROBE_S = 1.0  # between looks whether another machine's scheduler is still there
_LATE_S = 6.0  # by which our ranks may end later than that scheduler
_TAIL_LINES = 20
_TAIL_BYTES = 64 * 1024

_JOINED = re.compile(rb"The new node: (\d+)\(role: MS_WORKER\)")
_COMPLETE = b"Cluster is successfully initialized"
_PORT_LOST = re.compile(rb"Failed to call socket listen, url")
_LOST = re.compile(rb"The node: (\d+) is timed out")
_LOST_FIRST = re.compile(rb"worker (\d+) is the first one timed out")
_WAITED_IN_VAIN = re.compile(rb"wait receiving \[\d+,\s*\d+\]\s*failed|Launch kernel failed: \S*(All|Broadcast)"
                             rb"|rank \d+ has kept rank \d+ waiting|another rank has given up waiting")


@dataclass(frozen=True)
class Job:
    """What runs on this machine.

    Attributes:
        scheduler: None when it is on another machine.
        ranks: the ranks of this machine.
        worker_num: ranks on all machines.
        address, port: of the scheduler.
        log_dir: absolute.
        timeout_s: within which all ranks have to be there.
        hang_timeout_s: that a rank may keep the others waiting.
        link: to the launchers of the other machines; None when there are none.
    """

    scheduler: Optional[Task]
    ranks: Tuple[Task, ...]
    worker_num: int
    address: str
    port: int
    log_dir: str
    timeout_s: int
    hang_timeout_s: int
    link: Optional[machines.Link] = None

    @property
    def one_machine(self) -> bool:
        """Every rank is on this machine."""
        return len(self.ranks) == self.worker_num

    def log(self, task: Task) -> str:
        """Path of a task's log."""
        return os.path.join(self.log_dir, task.log_name)


NO_LINK = ("a machine that is lost will be noticed after 30 s, by MindSpore's heartbeat, and failures are named where "
           "they happen")


def say(line: str) -> None:
    """A line of the launcher's own, on stderr."""
    print(terminal.line(f"launcher: {line}"), file=sys.stderr, flush=True)


def run(job: Job) -> int:
    """Run in the foreground; returns 0, or 128 + n when signal n ended it.

    Raises:
        UserError: the first failure, with the exit code of the rank that failed.
    """
    return _Supervisor(job, foreground=True).run()


def run_detached(job: Job) -> int:
    """Leave the job to a process of its own, say how to watch and how to end it, and return at once."""
    report = os.path.join(job.log_dir, "launcher.log")
    sys.stdout.flush()
    sys.stderr.flush()
    watcher = os.fork()
    if watcher == 0:
        os.setsid()
        with open(os.devnull, "rb") as nothing, open(report, "wb") as log:
            os.dup2(nothing.fileno(), 0)
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        code = run_main(lambda _: _Supervisor(job, foreground=False).run())
        say(f"exit code {code}")
        os._exit(code)
    say(f"{_count(job.ranks)} started in the background; the first failure ends all")
    say(f"watch the answer:  tail -f {job.log(job.ranks[0])}")
    say(f"how it went:       cat {report}")
    say(f"end it:            kill {watcher}")
    return EXIT_OK


def _count(ranks: Sequence[Task]) -> str:
    return f"rank {ranks[0].rank}" if len(ranks) == 1 else f"ranks {ranks[0].rank} to {ranks[-1].rank}"


class PortTaken(UserError):
    """Another program has come before the scheduler on its port; rank 0 has not answered anything."""


class _Failure:
    """Who is to blame (a process of this machine, None when it is not), what is said about it, and the exit code."""

    def __init__(self, process: Optional[RankProcess], what: str, fix: Optional[str] = None, code: int = EXIT_FAILED):
        self.process = process
        self.what = what
        self.fix = fix
        self.code = code
        self.report: Optional[Report] = None  # as another machine has told it

    @classmethod
    def elsewhere(cls, report: Report) -> "_Failure":
        """A failure that another machine has told."""
        failure = cls(None, report.what, report.fix, report.code)
        failure.report = report
        return failure


class _Supervisor:
    def __init__(self, job: Job, foreground: bool):
        self._job = job
        self._link = job.link
        self._foreground = foreground
        self._scheduler: Optional[RankProcess] = None
        self._ranks: List[RankProcess] = []
        self._signal: Optional[int] = None
        self._unread = threading.Event()  # the reader of our stdout has gone
        self._terminal: Optional[terminal.Terminal] = None
        self._wants_terminal = False
        self._kills_before = _out_of_memory_kills()
        self._begin = time.monotonic()
        self._complete = False
        self._next_report = self._begin + min(_REPORT_WAITING_S, job.timeout_s)
        self._next_probe = self._begin
        self._refused = 0

    def run(self) -> int:
        """Start, watch, end; see the module's `run`."""
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        for number, handler in before.items():
            if not (number == signal.SIGHUP and handler == signal.SIG_IGN):  # nohup
                signal.signal(number, self._on_signal)
        try:
            return self._run()
        finally:
            self._end_all()
            if self._link is not None:
                self._link.close()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number, frame) -> None:
        self._signal = number

    def _run(self) -> int:
        job = self._job
        if job.scheduler is None and not self._wait_for_scheduler():
            return self._interrupted()
        self._open_link()
        self._start()
        where = "" if job.one_machine else f" of {job.worker_num}"
        say(f"{_count(job.ranks)}{where} started, scheduler {job.address}:{job.port}, logs in {job.log_dir}")
        while True:
            if self._signal is not None:
                return self._interrupted()
            if self._unread.is_set():
                self._tell(Report("the launcher", "nobody reads its output any more"))
                return EXIT_FAILED
            self._lend_terminal()
            failure = self._look()
            if failure is not None:
                self._see_whether_port_was_lost()
                self._fail(failure)
            if all(process.code == 0 for process in self._ranks):
                return self._finish()
            time.sleep(_POLL_S)

    def _start(self) -> None:
        job = self._job
        try:
            if job.scheduler is not None:
                self._scheduler = RankProcess(job.scheduler, job.log(job.scheduler), relayed=False)
            for task in job.ranks:
                first = self._foreground and task.rank == 0
                if first:
                    self._terminal = terminal.Terminal.find()
                self._ranks.append(RankProcess(task, job.log(task), first, self._terminal if first else None))
        except OSError as error:
            raise UserError(f"cannot be started ({error.strerror})", where=job.ranks[0].command[0]) from None
        for process in self._ranks:
            if self._foreground and process.task.rank == 0:
                process.relay(self._unread)

    def _interrupted(self) -> int:
        assert self._signal is not None
        name = signal.Signals(self._signal).name
        self._tell(Report("the launcher", f"ended by {name}", code=128 + self._signal))
        self._end_all()
        say(f"ended by {name}, all workers with it")
        return 128 + self._signal

    def _finish(self) -> int:
        """All ranks of this machine are through. The scheduler stays for those of other machines, else it has to go."""
        if self._scheduler is not None and not self._job.one_machine:
            while self._scheduler.poll() is None:
                if self._signal is not None:
                    return self._interrupted()
                failure = self._elsewhere()
                if failure is not None:
                    self._fail(failure)
                time.sleep(_POLL_S)
            if self._scheduler.code:
                self._fail(self._blame_scheduler())
        if self._link is not None:
            self._link.done()
        return EXIT_OK

    # -- the other machines

    def _open_link(self) -> None:
        """Get in touch with the other launchers."""
        if isinstance(self._link, machines.Member):
            if self._link.join():
                return
            if self._link.refusal:
                raise UserError(f"machine 0 does not take this one: {self._link.refusal}",
                                where=f"NODE_RANK {self._link.here.number}",
                                fix="Start the launcher with the same numbers on every machine; only NODE_RANK "
                                    "differs.")
            address = f"{self._job.address}:{self._job.port + machines.PORT_OFFSET}"
            say(f"machine 0's launcher does not answer at {address}: {NO_LINK}")
            self._link = None
        elif self._link is not None:
            self._link.start()

    def _elsewhere(self) -> Optional[_Failure]:
        """What another machine has told, or that one is lost."""
        report = self._link.failure if self._link is not None else None
        return _Failure.elsewhere(report) if report is not None else None

    def _tell(self, report: Report) -> None:
        """Tell the other machines what has failed here."""
        if self._link is not None:
            self._link.failed(replace(report, where=f"{report.where} on machine {self._link.here.number}"))

    # -- the terminal

    def _lend_terminal(self) -> None:
        """Look after a rank 0 that has our terminal as its stdin; afterwards Ctrl-C is its own, see
        `terminal.Terminal`."""
        if self._terminal is None:
            return
        process = self._ranks[0]
        if process.poll() is not None:
            if self._terminal.lent and process.code in (EXIT_INTERRUPTED, -signal.SIGINT):
                self._signal = signal.SIGINT
            self._terminal.take_back()
            return
        stopped_by = process.stop_signal()
        if stopped_by in (signal.SIGTTIN, signal.SIGTTOU):
            self._wants_terminal = True
            # What it has said before it reads comes before what it says to the terminal itself
            process.settle_relay(_GRACE_S)
        elif stopped_by == signal.SIGTSTP:
            say("Ctrl-Z: a run of several processes cannot be suspended, the others would take this one for lost")
            process.signal_group(signal.SIGCONT)
        if self._wants_terminal and self._terminal.lend(process.pid):
            self._wants_terminal = False

    # -- waiting for the scheduler of another machine

    def _wait_for_scheduler(self) -> bool:
        """True once it listens, False when a signal came. To wait here costs less than ranks that wait."""
        job, deadline = self._job, self._begin + self._job.timeout_s
        reported = False
        while self._signal is None:
            reason = _reach(job.address, job.port)
            if reason is None:
                return True
            if time.monotonic() >= deadline:
                raise UserError(f"no scheduler at {job.address}:{job.port} within {job.timeout_s} s ({reason})",
                                where="MASTER_ADDR", exit_code=EXIT_FAILED,
                                fix="Start machine 0, and check that MASTER_ADDR and MASTER_PORT are the same on all "
                                    "machines and can be reached from here.")
            if not reported:
                say(f"waiting up to {job.timeout_s} s for the scheduler at {job.address}:{job.port} ({reason})")
                reported = True
            time.sleep(0.5)
        return False

    # -- watching

    def _look(self) -> Optional[_Failure]:
        """The first failure, or None."""
        ended = [process for process in self._all() if process.poll()]
        if ended:
            return self._blame(ended)
        for process in self._all():
            failure = self._stopped(process)
            if failure is not None:
                return failure
        return self._elsewhere() or self._incomplete() or self._scheduler_gone()

    def _all(self) -> List[RankProcess]:
        return self._ranks + ([self._scheduler] if self._scheduler is not None else [])

    def _stopped(self, process: RankProcess) -> Optional[_Failure]:
        if process.code is not None or process.state() != "T":
            process.stopped_since = None
            return None
        now = time.monotonic()
        if process.stopped_since is None:
            process.stopped_since = now
        limit_s = min(_STOPPED_LIMIT_S, self._job.hang_timeout_s)
        if now - process.stopped_since < limit_s:
            return None
        if self._wants_terminal and process.task.rank == 0:
            return _Failure(process, f"waits for the terminal for {limit_s} s, and the launcher is in the background",
                            "Keep it in the foreground, or give its input in a file or a pipe.")
        return _Failure(process, f"stopped (SIGSTOP, state T) for {limit_s} s",
                        "Whatever stopped it has to let it continue sooner (SIGCONT).")

    def _incomplete(self) -> Optional[_Failure]:
        """Until the cluster is complete: say every half minute who is still missing, and when the time for it is
        over."""
        now, job = time.monotonic(), self._job
        if self._complete or self._scheduler is None or now < self._next_report:
            return None
        joined, self._complete = self._joined()
        over_s = self._begin + job.timeout_s
        self._next_report = max(now + _PROBE_S, min(self._next_report + _REPORT_WAITING_S, over_s))
        if self._complete or not joined:  # a command that does not join the cluster needs no watching
            return None
        if now >= over_s:
            return self._missing(joined)
        say(f"{_these(joined, 'has', 'have')} joined after {now - self._begin:.0f} s, "
            f"{_these(self._absent(joined), 'is', 'are')} missing; waiting up to {job.timeout_s} s")
        return None

    def _absent(self, joined: Set[int]) -> Set[int]:
        return set(range(self._job.worker_num)) - joined

    def _missing(self, joined: Set[int]) -> _Failure:
        """Ranks that are not there in time. MindSpore would find it out too, on each process by a clock of its own."""
        return _Failure(self._scheduler, f"{_these(self._absent(joined))} did not join within {self._job.timeout_s} s; "
                                         f"{_these(joined) if joined else 'nobody'} did",
                        "See the logs of the missing ranks. On several machines: start the launcher on each, with the "
                        "same address.")

    def _joined(self) -> Tuple[Set[int], bool]:
        """Ranks that the scheduler has registered, and whether the cluster is complete."""
        text = self._scheduler_log()
        joined = {int(rank) for rank in _JOINED.findall(text)}
        return joined, _COMPLETE in text or len(joined) == self._job.worker_num

    def _scheduler_gone(self) -> Optional[_Failure]:
        """On the other machines: nobody listens any more where the scheduler was. Looked at once a second."""
        now = time.monotonic()
        if self._job.scheduler is not None or now < self._next_probe:
            return None
        self._next_probe = now + _PROBE_S
        if _reach(self._job.address, self._job.port) != "connection refused":
            self._refused = 0
            return None
        # Refused, not silent: the machine is there, the scheduler is not. After a good run it ends a little before us.
        self._refused += 1
        if self._refused * _PROBE_S < _LATE_S:
            return None
        return _Failure(None, f"the scheduler at {self._job.address}:{self._job.port} has ended",
                        "See what machine 0 says: it or a rank of another machine has failed.")

    # -- finding out whose fault it is

    def _blame(self, ended: List[RankProcess]) -> _Failure:
        """Of the processes that have ended badly, and those that follow at once, the one that did so by itself."""
        deadline = time.monotonic() + (_SETTLE_COLLECTIVE_S if any(map(_gave_up_waiting, ended)) else _SETTLE_S)
        while time.monotonic() < deadline and self._signal is None and self._elsewhere() is None:
            time.sleep(_POLL_S)
            ended = ended + [process for process in self._all() if process not in ended and process.poll()]
        ranks = [process for process in ended if process is not self._scheduler]
        # MindSpore ends a rank with SIGTERM when it loses the scheduler: a victim, as is a rank that waited in vain.
        own = [process for process in ranks if process.code != -signal.SIGTERM and not _gave_up_waiting(process)]
        if own:
            return self._blame_rank(own[0])
        failure = self._elsewhere()
        if failure is not None:
            return failure
        # The scheduler ends the ranks of a lost machine before itself, so its log is read while it still runs.
        if self._scheduler is not None and (self._scheduler.code or self._lost()):
            return self._blame_scheduler()
        waited = [process for process in ranks if _gave_up_waiting(process)]
        if waited:
            return self._blame_silent(waited)
        if self._job.scheduler is None:
            address = f"{self._job.address}:{self._job.port}"
            return _Failure(ranks[0], f"ended by MindSpore, which has lost the scheduler at {address}",
                            "See what machine 0 says: it or a rank of another machine has failed.",
                            128 + signal.SIGTERM)
        return self._blame_rank(ranks[0])

    def _blame_rank(self, process: RankProcess) -> _Failure:
        code = process.code
        assert code is not None, "it has ended"
        if code > 0:
            return _Failure(process, f"ended with exit code {code}", code=code)
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        fix = self._explain_kill() if -code == signal.SIGKILL else None
        return _Failure(process, f"killed by {name}", fix, 128 - code)

    def _explain_kill(self) -> str:
        now = _out_of_memory_kills()
        if now is None or self._kills_before is None:
            return "The kernel does so when memory runs out: see dmesg."
        if now > self._kills_before:
            return ("The kernel has run out of memory and has ended a process meanwhile: take more workers, fewer KV "
                    "cache blocks or a smaller dtype.")
        return "Somebody ended it; it was not the kernel's out-of-memory killer."

    def _blame_scheduler(self) -> _Failure:
        process = self._scheduler
        assert process is not None, "without one nobody blames it"
        silence_s = process.task.environ.get("MS_NODE_TIMEOUT", "30")
        lost = self._lost()
        if lost:
            rank = min(lost)
            culprit = next((local for local in self._ranks if local.task.rank == rank), None)
            if culprit is None:
                return _Failure(process, f"no heartbeat has come from {_these(lost)}, on another machine, for "
                                         f"{silence_s} s",
                                "See what the launcher there says, and whether that machine can still be reached.")
            state = {"T": "stopped (state T), ", "D": "waiting for a disk (state D), "}.get(culprit.state(), "")
            return _Failure(culprit, f"{state}no heartbeat has come from it for {silence_s} s")
        joined, complete = self._joined()
        if (process.code or 0) > 0 and not complete and time.monotonic() - self._begin >= self._job.timeout_s:
            return self._missing(joined)
        return self._blame_rank(process)

    def _lost(self) -> Set[int]:
        """Ranks whose heartbeat the scheduler has missed."""
        text = self._scheduler_log()
        return {int(rank) for rank in _LOST.findall(text) + _LOST_FIRST.findall(text)}

    def _scheduler_log(self) -> bytes:
        return _read(self._scheduler.log_path) if self._scheduler is not None else b""

    def _blame_silent(self, waited: List[RankProcess]) -> _Failure:
        """Ranks gave up in a collective: the ones that did not are those they waited for."""
        limit_s = waited[0].task.environ["MS_NODE_TIMEOUT"]
        silent = [process for process in self._ranks if process.code is None]
        if silent:
            states = ", ".join(f"rank {process.task.rank} in state {process.state() or '?'}" for process in silent)
            return _Failure(silent[0], f"kept the other ranks waiting for {limit_s} s ({states})",
                            "If it only needs longer, set QWEN15_HANG_TIMEOUT_S to more seconds.")
        return _Failure(waited[0], f"waited {limit_s} s in vain for a rank of another machine",
                        "See what the launcher there says.", waited[0].code or EXIT_FAILED)

    def _fail(self, failure: _Failure) -> None:
        """End all, show the last lines of the culprit's log, and raise."""
        report, there = failure.report, " there"
        if report is None:
            process, there = failure.process, ""
            name, log = (process.task.name, process.log_path) if process is not None else ("", "")
            report = Report(name, failure.what, failure.fix or "", failure.code, log, _tail(log))
            self._tell(report if name else replace(report, where="the launcher"))
            self._end_all()
            # Its stderr has been relayed to ours all along
            shown = self._foreground and process is not None and process.task.rank == 0
            report = replace(report, lines=() if shown else _tail(log))  # read again: more may have been written
        else:
            self._end_all()
        if report.lines:
            sys.stderr.write(terminal.line(f"--- last lines of {report.log}{there}") + "\n")
            sys.stderr.writelines(f"{line}\n" for line in report.lines)
            sys.stderr.write("---\n")
        fixes = ([report.fix] if report.fix else []) + ([f"Its log{there}: {report.log}."] if report.log else [])
        raise UserError(report.what, where=report.where or None, fix=" ".join(fixes) or None, exit_code=report.code)

    def _see_whether_port_was_lost(self) -> None:
        scheduler = self._scheduler
        if scheduler is None or scheduler.poll() in (None, 0) or any(process.has_answered for process in self._ranks):
            return
        if _PORT_LOST.search(_read(scheduler.log_path)):
            holder = ports.holder_of(self._job.port) or "another program"
            self._tell(Report("the scheduler", f"its port was taken by {holder}"))
            raise PortTaken(f"port {self._job.port} has meanwhile been taken by {holder}", where="MASTER_PORT",
                            fix="Give another port, or end the program that listens there.", exit_code=EXIT_FAILED)

    # -- ending

    def _end_all(self) -> None:
        """No process of ours is left when this returns."""
        running = [process for process in self._all() if process.poll() is None]
        for process in running:
            process.signal_group(signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_S
        while time.monotonic() < deadline and any(process.poll() is None for process in running):
            time.sleep(_POLL_S)
        for process in self._all():
            process.signal_group(signal.SIGKILL)  # including processes that an ended rank left behind
        deadline = time.monotonic() + _GRACE_S
        while time.monotonic() < deadline and any(process.poll() is None for process in running):
            time.sleep(_POLL_S)
        for process in self._all():
            process.finish_relay(_GRACE_S)
            if process.poll() is None:
                say(f"{process.task.name} (process {process.pid}, state {process.state()}) cannot be ended")
        if self._terminal is not None:
            self._terminal.take_back()


def _these(ranks: Set[int], one: str = "", many: str = "") -> str:
    """`rank 3 has`, `ranks 0, 2 have`."""
    listed = ", ".join(map(str, sorted(ranks)))
    return f"rank {listed} {one}".rstrip() if len(ranks) == 1 else f"ranks {listed} {many}".rstrip()


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as log:
            return log.read()
    except OSError:
        return b""


def _tail(path: str) -> Tuple[str, ...]:
    """The last lines of a log without MindSpore's notices, or with them when there is nothing else."""
    lines = [line for line in _read(path)[-_TAIL_BYTES:].splitlines() if line.strip()]
    kept = [line for line in lines if not NOTICE.match(line)] or lines
    return tuple(terminal.line(line.decode("utf-8", "replace")) for line in kept[-_TAIL_LINES:])


def _gave_up_waiting(process: RankProcess) -> bool:
    """The rank failed because a collective did not get what another rank was to send."""
    return process.task.rank is not None and bool(_WAITED_IN_VAIN.search(_read(process.log_path)[-_TAIL_BYTES:]))


def _reach(address: str, port: int) -> Optional[str]:
    """None when somebody listens there, else why it cannot be reached."""
    try:
        with socket.create_connection((address, port), timeout=2.0):
            return None
    except ConnectionRefusedError:
        return "connection refused"
    except socket.timeout:
        return "no answer"
    except OSError as error:
        return (error.strerror or str(error)).lower()


def _out_of_memory_kills() -> Optional[int]:
    """Processes that the kernel has ended for want of memory since the machine started; None if unknown."""
    for line in _read("/proc/vmstat").splitlines():
        if line.startswith(b"oom_kill "):
            return int(line.split()[1])
    return None
