"""A configuration written out: every key with its value and where it came from, for --print_config."""

from __future__ import annotations

from typing import Any, List, Mapping, Tuple

from .. import cluster, device
from ..errors import UserError
from .keys import DEVICE, INERT, find
from .schema import Config

_WIDEST = 72


def describe(config: Config) -> str:
    """Every key with its value and where it came from, one a line."""
    rows = []
    for name, value in sorted(_flatten(config.effective)):
        row = find(name)
        remark = ""
        if row is not None and row.role == INERT:
            remark = "  (no effect)"
        elif row is not None and row.role == DEVICE and config.device_target != device.ASCEND:
            remark = "  (Ascend only)"
        rows.append((f"{name} = {value!r}" if isinstance(value, str) else f"{name} = {value}",
                     f"{config.sources.get(name, 'default')}{remark}"))
    if config.generation.seed is None:
        rows.append(("seed = None", config.sources["seed"]))
    width = min(max(len(left) for left, _ in rows), _WIDEST)
    lines = [f"{left:<{width}}  # {right}" for left, right in rows]
    lines += [f"# device: {config.device_note}", *guesses(config)]
    if config.parallel.use_parallel and config.device_target != device.ASCEND:
        lines.append(f"# ranks add {cluster.describe_sum()}")
    if config.device_target != device.ASCEND:
        lines += _reading()
    return "\n".join(lines)


def _reading() -> List[str]:
    """A line on how the kernels read weights where few tokens meet them; none without kernels."""
    from ..kernels import library, reading

    reading.forced()
    try:
        way, whence = reading.choose(library.load(), may_measure=False)
    except UserError:  # not built; another line says what runs instead
        return []
    return [f"# weights are read {way} (prefetch, bytes ahead, places), {whence}"]


def guesses(config: Config) -> List[str]:
    """A line on how tokens are guessed, where they are."""
    speculation = config.speculation
    if speculation is None:
        return []
    most = f"up to {speculation.tokens} tokens a step"
    if speculation.draft is None:
        return [f"# speculation: {most}, looked up in the text itself"]
    dims = speculation.draft.model.dims
    return [f"# speculation: {most}, guessed by {speculation.draft.load_checkpoint} ({dims.num_layers} layers, hidden "
            f"{dims.hidden_size}, vocabulary {dims.vocab_size}; weights {speculation.draft.model.param_init_type}, KV "
            f"cache {speculation.draft.model.compute_dtype})"]


def _flatten(nested: Mapping[str, Any], prefix: str = "") -> List[Tuple[str, Any]]:
    flat: List[Tuple[str, Any]] = []
    for name, value in nested.items():
        if isinstance(value, dict) and value:
            flat.extend(_flatten(value, f"{prefix}{name}."))
        else:
            flat.append((f"{prefix}{name}", value))
    return flat
