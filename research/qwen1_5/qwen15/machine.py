"""What memory and CPUs this machine has, or the container that a process runs in."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Dict, Optional, Tuple


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


def _quota_at(folder: str) -> Optional[float]:
    try:
        with open(os.path.join(folder, "cpu.max"), encoding="ascii") as file:
            quota, period = file.read().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    old, each = (_number(os.path.join(folder, f"cpu.cfs_{name}_us")) for name in ("quota", "period"))
    return old / each if old and each else None  # -1 means no limit


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
