"""What memory and CPUs this machine has, or the container that a process runs in, and where a user's caches lie."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from typing import Collection, Dict, List, Mapping, Optional, Set, Tuple

MOST_THREADS = 256
"""The kernels' pool holds no more."""
_MANY_CORES = 12


@dataclass(frozen=True)
class Available:
    """Bytes a rank may use.

    Attributes:
        free_bytes: for this rank now; None when nothing says.
        whole_bytes: for all ranks that share the machine, used or not; None on Ascend, where each has its own card.
        what: where the numbers come from.
    """

    free_bytes: Optional[int]
    whole_bytes: Optional[int]
    what: str


def memory(proc: str = "/proc", cgroup: str = "/sys/fs/cgroup") -> Available:
    """Memory of this machine, or of the container it runs in where that allows less."""
    fields = _meminfo(os.path.join(proc, "meminfo"))
    free, whole, what = fields.get("MemAvailable"), fields.get("MemTotal"), "the machine (MemAvailable)"
    limit = _cgroup_limit(cgroup)
    if limit is not None and (whole is None or limit[0] < whole):
        whole = limit[0]
        if free is None or limit[0] - limit[1] < free:
            free, what = max(0, limit[0] - limit[1]), "the container's memory limit"
    return Available(free, whole, what)


@dataclass(frozen=True)
class Processors:
    """The CPUs that a process may run on.

    Attributes:
        cores: logical CPUs of each physical core, cores of one socket next to one another.
        nodes: logical CPUs of each NUMA node with any, by its number; of one node 0 where the system does not say.
    """

    cores: Tuple[Tuple[int, ...], ...]
    nodes: Dict[int, Tuple[int, ...]]

    @property
    def cpus(self) -> Tuple[int, ...]:
        """All logical CPUs."""
        return tuple(sorted(cpu for core in self.cores for cpu in core))


def allowed_cpus() -> Collection[int]:
    """Logical CPUs that this process may run on: its affinity, that of a container's cpuset."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


def processors(allowed: Optional[Collection[int]] = None, system: str = "/sys/devices/system") -> Processors:
    """Cores and nodes among the CPUs that this process may run on.

    Args:
        allowed: logical CPUs; `allowed_cpus()` by default.
        system: where Linux tells of CPUs and nodes.
    """
    if allowed is None:
        allowed = allowed_cpus()
    cores: Dict[Tuple[int, int], List[int]] = {}
    for cpu in sorted(allowed):
        topology = os.path.join(system, "cpu", f"cpu{cpu}", "topology")
        socket, core = (_number(os.path.join(topology, name)) for name in ("physical_package_id", "core_id"))
        cores.setdefault((-1, cpu) if socket is None or core is None else (socket, core), []).append(cpu)
    nodes = {}
    try:
        names = os.listdir(os.path.join(system, "node"))
    except OSError:
        names = []
    for number in sorted(int(name[4:]) for name in names if name.startswith("node") and name[4:].isdigit()):
        own = _cpu_list(os.path.join(system, "node", f"node{number}", "cpulist")) & set(allowed)
        if own:
            nodes[number] = tuple(sorted(own))
    return Processors(tuple(tuple(cores[key]) for key in sorted(cores)), nodes or {0: tuple(sorted(allowed))})


def default_threads(found: Optional[Processors] = None, quota: Optional[float] = None) -> Tuple[int, str]:
    """How many threads the kernels run on where nobody says, and why: one a physical core.

    From 12 cores on one is left to Python, MindSpore's pools and the system: a thread without a core holds up all
    others, and on 16 cores of a Xeon 16 threads decoded 30 tokens/s, 15 of them 43.6, 12 of them 43.3. Where cores have
    a second hyper-thread those run on it.

    Args:
        found: the CPUs; this process' own by default.
        quota: see `cpu_quota`; a thread that is stopped for want of time would hold up all others as well.
    """
    found = processors() if found is None else found
    cores = len(found.cores)
    count, why = cores, f"{cores} core{'s' * (cores != 1)}"
    if cores >= _MANY_CORES and len(found.cpus) == cores:
        count, why = cores - 1, f"{cores} cores, one is left to others"
    if quota is not None and count > max(1, int(quota)):
        count, why = max(1, int(quota)), f"a CPU quota of {quota:g}"
    if count > MOST_THREADS:
        count, why = MOST_THREADS, f"{why}; {MOST_THREADS} threads at most"
    return count, why


def cpu_fields(cpuinfo: str = "/proc/cpuinfo") -> Dict[str, str]:
    """What the system says of the first processor, by its keys; empty where it says nothing (not Linux)."""
    fields: Dict[str, str] = {}
    try:
        with open(cpuinfo, encoding="utf-8", errors="replace") as file:
            for line in file:
                key, colon, value = line.partition(":")
                if colon:
                    fields.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    return fields


def cpu_name(fields: Mapping[str, str]) -> str:
    """What a processor with these `cpu_fields` is called."""
    return fields.get("model name") or platform.processor() or platform.machine()


def cpu_model() -> str:
    """The processor's name, as the system has it, with what tells apart those of one name."""
    fields = cpu_fields()
    keys = ("cpu family", "model") if "model name" in fields else ("CPU implementer", "CPU part")
    return " ".join(filter(None, (cpu_name(fields), *map(fields.get, keys))))


def cpu_quota(proc: str = "/proc", cgroup: str = "/sys/fs/cgroup") -> Optional[float]:
    """CPUs that this process' control groups let it use at a time (1.5: one and a half); None where there is no limit.

    A container's limit (`docker run --cpus`) leaves all CPUs visible and stops every thread once the time is used up.
    """
    try:
        with open(os.path.join(proc, "self", "cgroup"), encoding="utf-8") as file:
            lines = [line.rstrip("\n").split(":", 2) for line in file]
    except OSError:
        lines = []
    limits = []
    for _, controllers, path in (line for line in lines if len(line) == 3):
        names = controllers.split(",")
        if controllers and "cpu" not in names:
            continue
        root = cgroup if not controllers else os.path.join(cgroup, "cpu")  # version 2, version 1
        folder = os.path.normpath(os.path.join(root, path.lstrip("/")))
        while folder.startswith(root):
            limits.append(_quota_at(folder))
            folder = os.path.dirname(folder)
    return min((limit for limit in limits if limit is not None), default=None)


def cache_folder(what: str) -> str:
    """The user's folder for one kind of things that can be made again: below $XDG_CACHE_HOME, or ~/.cache."""
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "qwen15", what)


def _quota_at(folder: str) -> Optional[float]:
    try:
        with open(os.path.join(folder, "cpu.max"), encoding="ascii") as file:
            quota, period = file.read().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    old, each = (_number(os.path.join(folder, f"cpu.cfs_{name}_us")) for name in ("quota", "period"))
    return old / each if old and each else None  # -1 means no limit


def _cpu_list(path: str) -> Set[int]:
    """The CPUs of a list like 0-3,8; none where it cannot be read."""
    try:
        with open(path, encoding="ascii") as file:
            parts = [part.split("-") for part in file.read().strip().split(",") if part]
        return {cpu for part in parts for cpu in range(int(part[0]), int(part[-1]) + 1)}
    except (OSError, ValueError):
        return set()


def _meminfo(path: str) -> Dict[str, int]:
    sizes = {}
    try:
        with open(path, encoding="ascii") as file:
            for line in file:
                name, _, rest = line.partition(":")
                words = rest.split()
                if len(words) == 2 and words[1] == "kB":
                    sizes[name] = int(words[0]) * 1024
    except OSError:
        pass  # not Linux, or a sandbox without /proc: nothing is known, and `check` says so
    return sizes


def _cgroup_limit(root: str) -> Optional[Tuple[int, int]]:
    """(limit, bytes in use that cannot be reclaimed) of this container; None where there is no limit."""
    for limit_name, usage_name, stat_name in (
            ("memory.max", "memory.current", "memory.stat"),
            ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat")):
        limit, usage = (_number(os.path.join(root, name)) for name in (limit_name, usage_name))
        if limit is not None and usage is not None and limit < 2 ** 60:
            return limit, max(0, usage - _reclaimable(os.path.join(root, stat_name)))
    return None


def _number(path: str) -> Optional[int]:
    try:
        with open(path, encoding="ascii") as file:
            text = file.read().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _reclaimable(path: str) -> int:
    """Cached file pages, which the kernel gives back when they are wanted."""
    try:
        with open(path, encoding="ascii") as file:
            fields = dict(line.split() for line in file if len(line.split()) == 2)
    except OSError:
        return 0
    return int(fields.get("total_inactive_file", fields.get("inactive_file", "0")))
