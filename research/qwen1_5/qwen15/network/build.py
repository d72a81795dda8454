"""Which network a configuration asks for."""

from __future__ import annotations

from typing import Callable

from .. import device
from ..config.schema import Config
from .base import Network


def build_network(config: Config, checkpoint: str, tell: Callable[[str], None]) -> Network:
    """The network for `config.device_target`, its weights loaded from `checkpoint`.

    Args:
        config: the whole configuration.
        checkpoint: file or folder, as `weights.resolve` found it.
        tell: receives one line for each thing worth knowing (the account of the weights, casts).

    Raises:
        UserError: the checkpoint does not fit, or the device cannot be used.
    """
    if config.device_target == device.ASCEND:
        from .mindformers import MindFormersNetwork

        return MindFormersNetwork(config, checkpoint, tell)
    from .cpu import CpuNetwork

    return CpuNetwork(config, checkpoint, tell)
