"""Whether a run fits into what this machine has, found out before anything is loaded."""

from __future__ import annotations

import os
from dataclasses import replace

from .. import device, machine, ops
from ..config.schema import Config
from ..machine import Available
from ..network import weights
from . import memory
from .memory import Held, gib


def check(config: Config, proc: str = "/proc", cgroup: str = "/sys/fs/cgroup") -> str:
    """Compare what a run needs with what there is; returns one line that says so.

    Raises:
        UserError: it does not fit; with the numbers, the setting to change, and a value that fits.
    """
    draft = None if config.speculation is None else config.speculation.draft
    return memory.compare(config, available(config, proc, cgroup), held(config),
                          None if draft is None else memory.draft_need(draft, held(draft)))


def available(config: Config, proc: str = "/proc", cgroup: str = "/sys/fs/cgroup") -> Available:
    """What a rank may use: on Ascend `max_device_memory`, or less if its card has less free; on CPU the machine's."""
    if config.device_target != device.ASCEND:
        return machine.memory(proc, cgroup)
    allowed, card = config.max_device_memory_bytes, device.card_memory(config.device_id)
    limits = [] if allowed is None else [Available(allowed, None, "max_device_memory")]
    if card is not None:
        room = max(0, card.total_bytes - memory.CARD_RESERVE_BYTES)
        whole, reserve = gib(card.total_bytes), gib(memory.CARD_RESERVE_BYTES)
        limits += [Available(room, None, f"a card of {whole} less {reserve} for CANN and HCCL"),
                   Available(card.free_bytes, None,
                             f"free of a card's {whole}; `npu-smi info` shows who uses the rest")]
    return min(limits, key=lambda limit: limit.free_bytes or 0, default=Available(None, None, "max_device_memory"))


def held(config: Config) -> Held:
    """How the operators of this machine hold weights and cache."""
    if config.device_target != device.CPU:
        return memory.AS_CONFIGURED
    reference = ops.decide()[0] == "reference"
    how = memory.REFERENCE if reference else memory.AS_CONFIGURED
    if config.load_checkpoint is None or not os.path.exists(config.load_checkpoint):
        return how
    path = weights.resolve_for(config)
    if not weights.is_quantised(path):
        return how
    loader = weights.Loader.of(config, path, weights.this_rank(config),
                               (lambda dtype: "float32") if reference else (lambda dtype: dtype))
    return replace(how, weights=loader.nbytes())
