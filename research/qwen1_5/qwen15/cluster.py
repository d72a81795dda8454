"""Join the ranks that the launcher started into MindSpore's cluster; run as a module, be that cluster's scheduler."""

from __future__ import annotations

import os
import sys
from typing import Mapping, Optional, Tuple

from .errors import UserError

SUM, MEMORY = "QWEN15_RANK_SUM", "QWEN15_RANK_MEMORY"
"""Variables: how ranks of one machine add (`shared`, `mindspore`); the file in memory that the launcher hands down."""
SHARED, MINDSPORE = "shared", "mindspore"
_MINDSPORE_WAITS_S = 30


def shared_memory(environ: Mapping[str, str] = os.environ) -> Tuple[Optional[int], str]:
    """(descriptor of the memory that the ranks of this machine share, ""), or (None, why there is none).

    Raises:
        UserError: QWEN15_RANK_SUM is neither, or asks for memory that nobody has handed down.
    """
    wanted = environ.get(SUM, "").lower()
    if wanted not in ("", SHARED, MINDSPORE):
        raise UserError(f"wants {SHARED} or {MINDSPORE}, not {wanted[:40]!r}", SUM, "Unset it to have it chosen.")
    if wanted == MINDSPORE:
        return None, f"{SUM}={MINDSPORE}"
    file, why_not = _handed_down(environ.get(MEMORY, ""))
    if file is None and wanted == SHARED:
        raise UserError(f"{SHARED} cannot be used: {why_not}", SUM,
                        "Start all ranks on one machine by scripts/msrun_launcher.sh, or unset it.")
    return file, why_not


def describe_sum(environ: Mapping[str, str] = os.environ) -> str:
    """How ranks on CPUs add, as far as can be said before they start.

    Raises:
        UserError: see `shared_memory`.
    """
    file, why_not = shared_memory(environ)
    if file is not None:
        return "in shared memory"
    if environ.get(SUM, "").lower() == MINDSPORE or environ.get("RANK_ID"):
        return f"by MindSpore's collectives ({why_not})"
    return "in shared memory where msrun_launcher.sh starts all on one machine, otherwise by MindSpore's collectives"


def _handed_down(text: str) -> Tuple[Optional[int], str]:
    """The file that `text` (descriptor:device:inode) names, if it is still that file in this process."""
    if not text:
        return None, "the launcher has handed down no memory, as over several machines"
    try:
        file, *identity = (int(number) for number in text.split(":"))
        found = os.fstat(file)
        if identity == [found.st_dev, found.st_ino]:
            return file, ""
    except (OSError, ValueError, OverflowError):
        pass
    return None, "the memory that the launcher has made did not come down to this process"


def wait_limit_s() -> int:
    """Seconds that a rank may keep the others waiting: as long as MindSpore's collectives wait."""
    text = os.environ.get("MS_NODE_TIMEOUT", "")
    return int(text) if text.isdigit() and 0 < int(text) < 10 ** 9 else _MINDSPORE_WAITS_S


def join() -> Tuple[int, int]:
    """`mindspore.communication.init()`, quickly, for a process that the launcher (or msrun) started.

    MindSpore connects to the scheduler while an event thread of its own watches the socket. When that thread runs
    before the connecting one has noted which connection it is, the attempt is lost and made again half a second later:
    tens of seconds when a rank has one core, where a thread that is woken takes the core at once. Under SCHED_BATCH it
    does not. After joining the usual policy is better: messages between ranks are handled the moment they come.

    Returns:
        rank, ranks.

    Raises:
        RuntimeError: from MindSpore, when the cluster is not complete within MS_TOPO_TIMEOUT seconds.
    """
    from mindspore import communication
    usual = os.sched_getscheduler(0) if hasattr(os, "sched_getscheduler") else -1
    patient = hasattr(os, "SCHED_OTHER") and usual == os.SCHED_OTHER
    if patient:
        _schedule_threads(os.SCHED_BATCH)
    try:
        communication.init()
    finally:
        if patient:
            _schedule_threads(usual)
    return communication.get_rank(), communication.get_group_size()


def _schedule_threads(policy: int) -> None:
    for thread in os.listdir("/proc/self/task"):
        try:
            os.sched_setscheduler(int(thread), policy, os.sched_param(0))
        except ProcessLookupError:  # ended meanwhile
            pass


def main() -> int:
    """Be the scheduler: tell ranks each other's addresses, listen to their heartbeats, return when all have left."""
    import mindspore as ms
    ms.set_context(device_target="CPU")  # it computes nothing, whatever the ranks compute on
    ms.communication.init()
    return 0


if __name__ == "__main__":
    sys.exit(main())
