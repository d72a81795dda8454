"""Whether a run fits into what this machine has, found out before anything is loaded."""

from __future__ import annotations

from .. import device, machine, ops
from ..config.schema import Config
from ..machine import Available
from . import memory
from .memory import Held, gib


def check(config: Config, proc: str = "/proc", cgroup: str = "/sys/fs/cgroup") -> str:
    """Compare what a run needs with what there is; returns one line that says so.

    Raises:
        UserError: it does not fit; with the numbers, the setting to change, and a value that fits.
    """
    return memory.compare(config, available(config, proc, cgroup), held(config))


def available(config: Config, proc: str = "/proc", cgroup: str = "/sys/fs/cgroup") -> Available:
    """What a rank may use: on Ascend `max_device_memory`, or less on a smaller card; on CPU what the machine has."""
    if config.device_target != device.ASCEND:
        return machine.memory(proc, cgroup)
    allowed, card = config.max_device_memory_bytes, device.card_bytes()
    if card is None or (allowed is not None and allowed <= card - memory.CARD_RESERVE_BYTES):
        return Available(allowed, None, "max_device_memory")
    return Available(max(0, card - memory.CARD_RESERVE_BYTES), None,
                     f"a card of {gib(card)} less {gib(memory.CARD_RESERVE_BYTES)} for CANN and HCCL")


def held(config: Config) -> Held:
    """How the operators of this machine hold weights and cache."""
    if config.device_target == device.CPU and ops.decide()[0] == "reference":
        return memory.REFERENCE
    return memory.AS_CONFIGURED
