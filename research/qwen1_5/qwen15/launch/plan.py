"""Start a command on several cards or CPU processes: msrun_launcher.sh's arguments are checked and made a plan."""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import shutil
import socket
import sys
from dataclasses import dataclass
from typing import List, Mapping, Optional, Sequence, Tuple

from .. import cluster, device, machine
from ..errors import EXIT_OK, UserError
from ..terminal import shown
from . import machines, ports, secret, supervise
from .messages import Machine
from .rank_process import Task

USAGE = """usage: qwen15 launch COMMAND [WORKER_NUM]
       qwen15 launch COMMAND WORKER_NUM MASTER_PORT LOG_DIR JOIN CLUSTER_TIME_OUT
       qwen15 launch COMMAND WORKER_NUM LOCAL_WORKER MASTER_ADDR MASTER_PORT NODE_RANK LOG_DIR JOIN CLUSTER_TIME_OUT

scripts/msrun_launcher.sh takes the same.

Starts COMMAND once per worker as one MindSpore cluster and watches it: the first failure ends all.
With one or two arguments it runs in the foreground, the answer of rank 0 on stdout.

  COMMAND           one argument: "python run_qwen1_5.py --config ... --predict_data '...'", with or without python
  WORKER_NUM        workers (ranks) on all machines together; default 8
  LOCAL_WORKER      workers on this machine
  MASTER_ADDR       address of the machine with NODE_RANK 0
  MASTER_PORT       port of MindSpore's scheduler there; default 8118, or a free one
  NODE_RANK         number of this machine: 0, 1, ...
  LOG_DIR           worker_N.log and scheduler.log are written here; default output/msrun_log
  JOIN              True: stay in the foreground; False: return at once
  CLUSTER_TIME_OUT  seconds within which all workers have to be there; default 600

environment: QWEN15_HANG_TIMEOUT_S  seconds a worker may keep the others waiting (default 300)
             QWEN15_AFFINITY        off: do not give each worker cores of its own on a CPU machine
             QWEN15_RANK_SUM        mindspore: workers on CPUs add by MindSpore's collectives, not in shared memory
             QWEN15_LAUNCH_SECRET_FILE, or QWEN15_LAUNCH_SECRET
                                    a secret (a file with it, or itself) that the launchers of several machines share

examples:
  qwen15 launch "qwen15 predict --load_checkpoint models/Qwen1.5-7B-Chat --use_parallel True \\
                 --options parallel_config.model_parallel=4 --chat --predict_data Hello" 4
  qwen15 launch "qwen15 serve --config predict_qwen1_5_72b_chat.yaml --load_checkpoint /path/dir --use_parallel True" 4

exit codes: that of the worker that failed first (128 + n for signal n); 0 fine, 2 usage, 130 interrupted"""

MODULE_DIR = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
DEFAULT_PORT = 8118
DEFAULT_TIMEOUT_S = 600
DEFAULT_HANG_TIMEOUT_S = 300
LOCALHOST = "127.0.0.1"
_PORT_TRIES = 3
MOST_RANKS = 65535
MOST_SECONDS = 10 ** 8
_LOG = re.compile(r"(worker_\d+|scheduler|launcher)\.log")
_PYTHON = re.compile(r"python(3(\.\d+)?)?")


@dataclass(frozen=True)
class LaunchPlan:
    """What to start on this machine.

    Attributes:
        command: the worker's argument vector, the interpreter included.
        worker_num: ranks on all machines.
        local_worker: ranks on this machine: node_rank * local_worker and following.
        master_addr: numeric address of the scheduler.
        master_port: its port.
        port_given: the user named the port, so another one will not do.
        node_rank: number of this machine; the scheduler runs on number 0.
        log_dir: folder of the logs, absolute.
        join: stay in the foreground.
        timeout_s: for the cluster to be complete.
    """

    command: Tuple[str, ...]
    worker_num: int = 8
    local_worker: int = 8
    master_addr: str = LOCALHOST
    master_port: int = DEFAULT_PORT
    port_given: bool = False
    node_rank: int = 0
    log_dir: str = os.path.join("output", "msrun_log")
    join: bool = True
    timeout_s: int = DEFAULT_TIMEOUT_S

    @property
    def one_machine(self) -> bool:
        """Every rank is on this machine."""
        return self.worker_num == self.local_worker

    @property
    def ranks(self) -> range:
        """Ranks on this machine."""
        first = self.node_rank * self.local_worker
        return range(first, first + self.local_worker)


def parse(arguments: Sequence[str]) -> LaunchPlan:
    """The plan of 1, 2, 6 or 9 positional arguments.

    Raises:
        UserError: another number of arguments, or one that cannot be.
    """
    if len(arguments) not in (1, 2, 6, 9):
        raise UserError(f"{len(arguments)} arguments are given, 1, 2, 6 or 9 are wanted", where="msrun_launcher.sh",
                        fix='The command is one argument, in quotes; --help shows the forms.')
    command = _argument_vector(split_command(arguments[0]))
    if len(arguments) == 1:
        return LaunchPlan(command)
    worker_num = _integer("WORKER_NUM", arguments[1], 1, MOST_RANKS)
    if len(arguments) == 2:
        return LaunchPlan(command, worker_num, worker_num)
    local_worker, master_addr, node_rank = worker_num, LOCALHOST, 0
    if len(arguments) == 6:
        port, log_dir, join, timeout = arguments[2:]
    else:
        local, address, port, node, log_dir, join, timeout = arguments[2:]
        local_worker = _integer("LOCAL_WORKER", local, 1, worker_num)
        if local_worker < worker_num:  # otherwise there is one machine, and the original ignores these two
            node_rank = _integer("NODE_RANK", node, 0, MOST_RANKS)
            master_addr = _resolve(address, node_rank)
            if (node_rank + 1) * local_worker > worker_num:
                first, last = node_rank * local_worker, (node_rank + 1) * local_worker - 1
                raise UserError(f"machine {node_rank} with {local_worker} workers would hold ranks {first} to {last}, "
                                f"of {worker_num} (0 to {worker_num - 1})", where="NODE_RANK",
                                fix="Machines count from 0 and hold LOCAL_WORKER workers each.")
    if not log_dir:
        raise UserError("an empty name", where="LOG_DIR", fix="Name a folder.")
    return LaunchPlan(command, worker_num, local_worker, master_addr, _integer("MASTER_PORT", port, 1, 65535), True,
                node_rank, log_dir, _boolean("JOIN", join), _integer("CLUSTER_TIME_OUT", timeout, 1, MOST_SECONDS))


def _integer(name: str, text: str, low: int, high: int) -> int:
    digits = text.lstrip("0") or text[-1:]
    if not re.fullmatch(r"\d+", text, re.ASCII) or len(digits) > len(str(high)) or not low <= int(digits) <= high:
        raise UserError(f"'{shown(text, 40)}' is not a whole number from {low} to {high}", where=name)
    return int(digits)


def _boolean(name: str, text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise UserError(f"{text!r} is neither True nor False", where=name)
    return text.lower() == "true"


def split_command(command: str) -> List[str]:
    """The words of a command by the quoting rules of a POSIX shell; nothing is expanded and nothing is run.

    Raises:
        UserError: nothing in it, or a quote that is not closed.
    """
    try:
        words = shlex.split(_join_continued_lines(command))
    except ValueError as error:
        raise UserError(f"{str(error)[:1].lower()}{str(error)[1:]} in: {command}", where="COMMAND",
                        fix="A quote or backslash that is part of a text has to be quoted itself: \"it's\".") from None
    if not words:
        raise UserError("an empty command", where="COMMAND",
                        fix='Give it as one argument: "python run_qwen1_5.py --config ...".')
    return words


def _join_continued_lines(command: str) -> str:
    """Drop backslash-newline as a shell does, outside single quotes; shlex would keep the newline as a character."""
    kept, quote, position = [], "", 0
    while position < len(command):
        character = command[position]
        if character == "\\" and quote != "'":
            pair = command[position:position + 2]
            kept.append("" if pair == "\\\n" else pair)
            position += 2
            continue
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        kept.append(character)
        position += 1
    return "".join(kept)


def _argument_vector(words: Sequence[str]) -> Tuple[str, ...]:
    """Put the active interpreter where the command says python, or says nothing and starts with a script."""
    first = words[0]
    if _PYTHON.fullmatch(first):
        words = words[1:]
        if not words:
            raise UserError("python is given nothing to run", where="COMMAND",
                            fix='Name the script: "python run_qwen1_5.py ...".')
        return (sys.executable, *_find_script(words))
    if first == "pytest":
        return (sys.executable, "-m", *words)
    if first.endswith(".py") or first.startswith("-"):
        return (sys.executable, *_find_script(words))
    if shutil.which(first) is None:
        raise UserError(f"{first!r} is neither a Python script nor a program that can be run", where="COMMAND",
                        fix="Write the path of the script, or put it in the folder you are in.")
    return tuple(words)


def _find_script(words: Sequence[str]) -> Tuple[str, ...]:
    """The words with the script's path: in the folder we are in, else in research/qwen1_5."""
    script = words[0]
    if not script.endswith(".py") or os.path.exists(script):
        return tuple(words)
    ours = os.path.join(MODULE_DIR, script)
    if not os.path.isabs(script) and os.path.exists(ours):
        return (ours, *words[1:])
    raise UserError(f"no such file (looked in {os.getcwd()} and {MODULE_DIR})", where=script,
                    fix="Write the path of the script, or change to its folder.")


def _resolve(host: str, node_rank: int) -> str:
    """The numeric address of MASTER_ADDR; on machine 0 it has to be one of this machine."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        reason = error.strerror if isinstance(error, socket.gaierror) else "not a host name"
        raise UserError(f"{host!r} cannot be resolved ({reason})", where="MASTER_ADDR",
                        fix="Give the address of the machine with NODE_RANK 0.") from None
    family, _, _, _, place = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    address = str(place[0])
    if node_rank == 0:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind((address, 0))
            except OSError:
                raise UserError(f"{address} is not an address of this machine, and NODE_RANK is 0", where="MASTER_ADDR",
                                fix="The scheduler runs on machine 0: give an address of this machine that the others "
                                    "reach, or another NODE_RANK.") from None
    return address


def open_log_dir(path: str) -> Tuple[str, int]:
    """Make the folder and lock it; returns its absolute path and the descriptor that holds the lock.

    Raises:
        UserError: it cannot be written to, or another launch that still runs writes its logs there.
    """
    path = os.path.abspath(path)
    try:
        os.makedirs(path, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise UserError(f"logs cannot be written there ({error.strerror})", where=f"LOG_DIR {path}",
                        fix="Name another folder, or start from a folder you can write to.") from None
    for name in os.listdir(path):
        if _LOG.fullmatch(name) and os.path.islink(os.path.join(path, name)):
            os.close(descriptor)
            raise UserError("is a symbolic link, and what it leads to would be overwritten", os.path.join(path, name),
                            "Remove the link, or name another LOG_DIR.")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise UserError("another launch that still runs writes its logs there", where=f"LOG_DIR {path}",
                        fix="Wait for it, start from another folder, or name another LOG_DIR (form with 6 arguments)."
                        ) from None
    return path, descriptor


def share_cores(workers: int, cores: Sequence[Tuple[int, ...]]) -> List[Tuple[int, ...]]:
    """Logical CPUs for each of `workers` ranks: whole, neighbouring cores; empty tuples when ranks outnumber cores.

    Args:
        workers: ranks on this machine.
        cores: logical CPUs of each physical core, neighbours in order.
    """
    if len(cores) < workers:
        return [()] * workers
    bounds = [len(cores) * rank // workers for rank in range(workers + 1)]
    return [sum(cores[low:high], ()) for low, high in zip(bounds, bounds[1:])]


def make_memory(plan: LaunchPlan) -> Optional[int]:
    """A file in memory for the ranks to add in, which has no name: it goes with the last of them, however that ends.

    Returns:
        its descriptor; None where ranks are on several machines, there is one alone, or the system makes no such file.
    """
    if not plan.one_machine or plan.worker_num == 1 or not hasattr(os, "memfd_create"):
        return None
    try:
        return os.memfd_create("qwen15-ranks")
    except OSError:
        return None


def tasks(plan: LaunchPlan, port: int, environ: Mapping[str, str], memory: Optional[int] = None
          ) -> Tuple[Optional[Task], Tuple[Task, ...]]:
    """The scheduler (None unless this is machine 0) and the ranks of this machine; `memory` is handed down to these.

    They get MindSpore's documented variables for a dynamic cluster. Variables that the user has set and that are not
    about who is who (HCCL_*, GLOG_*, OMP_NUM_THREADS, MS_NODE_TIMEOUT, ...) stay as they are.
    """
    paths = [path for path in environ.get("PYTHONPATH", "").split(os.pathsep)
             if path and os.path.abspath(path) != MODULE_DIR]
    common = {name: value for name, value in environ.items() if name not in (secret.TEXT, secret.FILE, cluster.MEMORY)}
    common.update(MS_WORKER_NUM=str(plan.worker_num), RANK_SIZE=str(plan.worker_num), MS_SCHED_HOST=plan.master_addr,
                  MS_SCHED_PORT=str(port), MS_TOPO_TIMEOUT=str(plan.timeout_s), PYTHONUNBUFFERED="1",
                  PYTHONPATH=os.pathsep.join([MODULE_DIR] + paths))
    # How often a rank asks for another's address; MindSpore's 3 to 5 s would take half of a small model's start-up.
    common.setdefault("MS_RETRY_INTERVAL_LOWER", "1")
    common.setdefault("MS_RETRY_INTERVAL_UPPER", "1")
    # At this level the scheduler's log says which ranks have come, which is told to the user.
    scheduler = dict(common, MS_ROLE="MS_SCHED", RANK_ID="0", GLOG_v=min(environ.get("GLOG_v", "2"), "2"))
    cpus = _cpus_of_ranks(plan, environ)
    ranks = []
    for local, rank in enumerate(plan.ranks):
        own = dict(common, MS_ROLE="MS_WORKER", MS_NODE_ID=str(rank), RANK_ID=str(rank), DEVICE_ID=str(local))
        # For the ranks this is how long a collective waits for the others: MindSpore's 30 s are less than two ranks may
        # differ in reading a large checkpoint. The scheduler keeps the 30 s, after which a silent rank counts as lost.
        own.setdefault("MS_NODE_TIMEOUT", str(hang_timeout_s(environ)))
        if memory is not None:
            identity = os.fstat(memory)
            own[cluster.MEMORY] = f"{memory}:{identity.st_dev}:{identity.st_ino}"
        if cpus is not None:
            own.setdefault("OMP_NUM_THREADS", str(max(1, len(cpus[local]))))
            own.setdefault("QWEN15_THREADS", str(max(1, len(cpus[local]))))
        ranks.append(Task(rank, plan.command, own, cpus[local] if cpus else (), () if memory is None else (memory,)))
    scheduler_command = (sys.executable, "-m", "qwen15.cluster")
    return Task(None, scheduler_command, scheduler) if plan.node_rank == 0 else None, tuple(ranks)


def _cpus_of_ranks(plan: LaunchPlan, environ: Mapping[str, str]) -> Optional[List[Tuple[int, ...]]]:
    """Logical CPUs for each rank, or None where ranks are not to be bound: on Ascend, and when the user says so."""
    if environ.get("QWEN15_AFFINITY", "").lower() == "off" or device.find_ascend(environ).cards:
        return None
    return share_cores(plan.local_worker, machine.processors().cores)


def hang_timeout_s(environ: Mapping[str, str]) -> int:
    """Seconds that a rank may keep the others waiting.

    Raises:
        UserError: QWEN15_HANG_TIMEOUT_S is no number.
    """
    text = environ.get("QWEN15_HANG_TIMEOUT_S", str(DEFAULT_HANG_TIMEOUT_S))
    return _integer("QWEN15_HANG_TIMEOUT_S", text, 1, MOST_SECONDS)


def open_link(plan: LaunchPlan, port: int, shared: Optional[bytes]) -> Optional[machines.Link]:
    """The way to the launchers of the other machines; None where there are none, or where it cannot be had, which is
    said."""
    link_port = port + machines.PORT_OFFSET
    if plan.one_machine:
        return None
    here = Machine(plan.node_rank, plan.ranks.start, plan.local_worker, plan.worker_num)
    if plan.node_rank > 0:
        return machines.Member(here, plan.master_addr, link_port, shared=shared)
    if shared is None:
        supervise.say(f"warning: without a secret whoever reaches port {link_port} of {plan.master_addr} can join this "
                      f"run or end it; {secret.FILE} names a file with one, the same on every machine")
    try:
        return machines.Hub(here, plan.master_addr, link_port, shared=shared)
    except (OSError, OverflowError) as error:  # OverflowError: above 65535
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "there is no such port"
        supervise.say(f"port {link_port} of {plan.master_addr} cannot be used ({reason}): {supervise.NO_LINK}")
        return None


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line; returns the exit code.

    Raises:
        UserError: whatever the user can mend; a rank's failure, with the rank's exit code.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments in (["--help"], ["-h"]):
        print(USAGE)
        return EXIT_OK
    plan = parse(arguments)
    hang_timeout_s(os.environ)
    shared = secret.read(os.environ)
    log_dir, lock = open_log_dir(plan.log_dir)
    try:
        for _ in range(_PORT_TRIES - 1):
            try:
                return _start(plan, log_dir, shared)
            except supervise.PortTaken as error:
                if plan.port_given:
                    raise
                supervise.say(f"{error.what}; another one is tried")
        return _start(plan, log_dir, shared)
    finally:
        os.close(lock)


def _start(plan: LaunchPlan, log_dir: str, shared: Optional[bytes]) -> int:
    """Choose the port and run; returns the exit code."""
    port, reservation = plan.master_port, None
    if plan.node_rank == 0:
        reservation = ports.reserve(plan.master_addr, port, plan.port_given)
        port = reservation.port
        if port != plan.master_port:
            supervise.say(f"port {plan.master_port} is in use, {port} is used instead")
    memory = make_memory(plan)
    try:
        scheduler, ranks = tasks(plan, port, os.environ, memory)
        job = supervise.Job(scheduler, ranks, plan.worker_num, plan.master_addr, port, log_dir, plan.timeout_s,
                            hang_timeout_s(os.environ), open_link(plan, port, shared))
        return supervise.run(job) if plan.join else supervise.run_detached(job)
    finally:
        if memory is not None:
            os.close(memory)
        if reservation is not None:
            reservation.close()
