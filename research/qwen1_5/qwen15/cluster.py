"""Join the ranks that the launcher started into MindSpore's cluster; run as a module, be that cluster's scheduler."""

from __future__ import annotations

import os
import sys
from typing import Tuple


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
