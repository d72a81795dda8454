"""Find out whether this machine has Ascend cards to compute on, and how large, without importing MindSpore."""

from __future__ import annotations

import glob
import importlib.util
import os
import re
import subprocess
from dataclasses import dataclass
from typing import Mapping, Optional, Tuple

from .errors import UserError

ASCEND, CPU, AUTO = "Ascend", "CPU", "auto"
TARGETS = (AUTO, ASCEND, CPU)
_CANN_VARIABLES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME", "ASCEND_AICPU_PATH", "ASCEND_OPP_PATH")
_HBM = re.compile(r"^\|.*\b\d{4}:[0-9A-F]{2}:[0-9A-F]{2}\.\d\b.*/\s*(\d+)\s*\|\s*$", re.MULTILINE | re.IGNORECASE)
_CANN_FOLDERS = ("/usr/local/Ascend/ascend-toolkit/latest", "/usr/local/Ascend/cann", "/usr/local/Ascend/latest")


@dataclass(frozen=True)
class Ascend:
    """What was found of an Ascend 910B set-up.

    Attributes:
        cards: device nodes, `/dev/davinci0`, ...; one per card.
        cann: CANN's folder, None when there is none.
        mindspore_plugin: MindSpore's Ascend plugin, None when MindSpore or the plugin is not installed.
        missing: what keeps Ascend from being used, None when nothing does.
    """

    cards: Tuple[str, ...]
    cann: Optional[str]
    mindspore_plugin: Optional[str]
    missing: Optional[str]


def find_ascend(environ: Optional[Mapping[str, str]] = None, root: str = "/") -> Ascend:
    """Look for cards, CANN and MindSpore's Ascend plugin.

    Args:
        environ: environment variables; the process's own by default.
        root: where /dev and /usr/local are looked for.
    """
    environ = os.environ if environ is None else environ
    under = os.path.join(root, "")
    cards = tuple(sorted(glob.glob(f"{under}dev/davinci[0-9]*"), key=lambda path: (len(path), path)))
    cann = next((environ[name] for name in _CANN_VARIABLES if environ.get(name) and os.path.isdir(environ[name])), None)
    if cann is None:
        cann = next((path for path in (f"{under}{folder.lstrip('/')}" for folder in _CANN_FOLDERS)
                     if os.path.isdir(path)), None)
    plugin = _plugin()
    missing = []
    if not cards:
        missing.append("no card in /dev (davinci*)")
    if cann is None:
        missing.append("no CANN in ASCEND_HOME_PATH")
    if cards and cann and plugin is None:
        missing.append("no Ascend plugin in the installed MindSpore")
    return Ascend(cards, cann, plugin, ", ".join(missing) or None)


def _plugin() -> Optional[str]:
    spec = importlib.util.find_spec("mindspore")
    if spec is None or not spec.submodule_search_locations:
        return None
    for folder in spec.submodule_search_locations:
        found = glob.glob(os.path.join(folder, "lib", "plugin", "libmindspore_ascend.so*"))
        if found:
            return found[0]
    return None


def npu_smi() -> Tuple[Optional[str], str]:
    """What `npu-smi info` prints; None with the reason where it cannot be run."""
    try:
        done = subprocess.run(["npu-smi", "info"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=20,
                              universal_newlines=True, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"cannot be run: {error}"
    return (done.stdout, "") if done.returncode == 0 else (None, f"exit code {done.returncode}: {done.stdout.strip()}")


def card_bytes() -> Optional[int]:
    """Memory (HBM) of the smallest card that `npu-smi` shows; None when it shows none."""
    output, _ = npu_smi()
    # The line with a card's bus address ends in `used / all |`, in units of 2^20 bytes that it calls MB.
    sizes = [int(size) * 2 ** 20 for size in _HBM.findall(output or "") if int(size)]
    return min(sizes, default=None)


def resolve(target: str, environ: Optional[Mapping[str, str]] = None, root: str = "/") -> Tuple[str, str]:
    """Turn `auto`, `Ascend` or `CPU` into the device to compute on and one line on why.

    `Ascend` that was asked for by name stays Ascend even where there is none, so that graphs can be examined on any
    machine; `require` refuses to compute on it.
    """
    if target == CPU:
        return CPU, "CPU, asked for"
    ascend = find_ascend(environ, root)
    if target == ASCEND:
        found = f"but {ascend.missing}" if ascend.missing else f"{len(ascend.cards)} card(s), CANN {ascend.cann}"
        return ASCEND, f"Ascend, asked for; {found}"
    if ascend.missing is None:
        return ASCEND, f"Ascend, chosen by auto: {len(ascend.cards)} card(s), CANN {ascend.cann}"
    return CPU, f"CPU, chosen by auto: {ascend.missing}"


def require(target: str, where: Optional[str] = None, environ: Optional[Mapping[str, str]] = None,
            root: str = "/") -> None:
    """Refuse to compute on an Ascend that is not there.

    Raises:
        UserError: `target` is Ascend and this machine lacks a card, CANN or MindSpore's plugin.
    """
    if target != ASCEND:
        return
    missing = find_ascend(environ, root).missing
    if missing:
        raise UserError(f"device_target Ascend, but this machine has {missing}", where,
                        "Source CANN's set_env.sh if it is installed; otherwise use --device_target CPU (or auto).")


def env_rank() -> int:
    """This process's rank as the launcher has set it, 0 without one."""
    text = os.environ.get("RANK_ID", "")
    return int(text) if text.isdigit() else 0
