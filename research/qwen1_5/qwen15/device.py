"""Find out whether this machine has Ascend cards to compute on, and how large, without importing MindSpore."""

from __future__ import annotations

import functools
import glob
import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import Callable, Mapping, Optional, Tuple

from .errors import UserError
from .installed import folder_of

ASCEND, CPU, AUTO = "Ascend", "CPU", "auto"
TARGETS = (AUTO, ASCEND, CPU)
CANN_VARIABLES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME", "ASCEND_AICPU_PATH", "ASCEND_OPP_PATH")
CANN_FOLDERS = ("/usr/local/Ascend/ascend-toolkit/latest", "/usr/local/Ascend/cann", "/usr/local/Ascend/latest")
"""Where CANN is installed: 8.3 and before, 8.5 and later, a minimal installation."""
_HBM = re.compile(r"^\|.*\b\d{4}:[0-9A-F]{2}:[0-9A-F]{2}\.\d\b.*\b(\d+)\s*/\s*(\d+)\s*\|\s*$",
                  re.MULTILINE | re.IGNORECASE)
_ELF_MACHINES = {0x3E: "x86_64", 0xB7: "aarch64"}
_PROBE_S = 60

_PROBE = """
import ctypes, json, sys
plugin, card = sys.argv[1], int(sys.argv[2])
told = {}
try:
    ctypes.CDLL(plugin)
    acl = ctypes.CDLL("libascendcl.so")
except OSError as error:
    print(json.dumps({"fault": str(error)}))
    sys.exit()
for name, *arguments in (("aclInit", None), ("aclrtSetDevice", card)):
    code = getattr(acl, name)(*arguments)
    if code:
        print(json.dumps({"fault": "card %d does not answer (%s: error %d)" % (card, name, code)}))
        sys.exit()
free, total = ctypes.c_size_t(), ctypes.c_size_t()
HBM = 1
if acl.aclrtGetMemInfo(HBM, ctypes.byref(free), ctypes.byref(total)) == 0:
    told = {"free_bytes": free.value, "total_bytes": total.value}
print(json.dumps(told), flush=True)
acl.aclrtResetDevice(card)
acl.aclFinalize()
"""
"""Run in a process of its own: libraries that fail to load, or a card that hangs, leave this one as it is."""
LACKING = "CANN's libraries lack"
"""How a fault begins where CANN is of another release than MindSpore is made for."""
NO_SUCH_CARD = "there is no card"
"""How a fault begins where a card's number is too large."""


@dataclass(frozen=True)
class Ascend:
    """What was found of an Ascend 910B set-up.

    Attributes:
        cards: device nodes, `/dev/davinci0`, ...; one per card.
        cann: CANN's folder, None when there is none.
        mindspore_plugin: MindSpore's Ascend plugin, None when MindSpore or the plugin is not installed.
        missing: what keeps Ascend from being used, None when nothing does as far as files can tell.
    """

    cards: Tuple[str, ...]
    cann: Optional[str]
    mindspore_plugin: Optional[str]
    missing: Optional[str]


@dataclass(frozen=True)
class CardAnswer:
    """What a card said when it was asked.

    Attributes:
        fault: why it cannot be used, None when it can.
        free_bytes, total_bytes: its memory (HBM), None when it did not say.
    """

    fault: Optional[str]
    free_bytes: Optional[int] = None
    total_bytes: Optional[int] = None


def find_ascend(environ: Optional[Mapping[str, str]] = None, root: str = "/") -> Ascend:
    """Look for the files of cards, CANN and MindSpore's Ascend plugin; `ask` says whether they work.

    Args:
        environ: environment variables; the process's own by default.
        root: where /dev and /usr/local are looked for.
    """
    environ = os.environ if environ is None else environ
    under = os.path.join(root, "")
    cards = tuple(sorted(glob.glob(f"{under}dev/davinci[0-9]*"), key=lambda path: (len(path), path)))
    cann = next((environ[name] for name in CANN_VARIABLES if environ.get(name) and os.path.isdir(environ[name])), None)
    if cann is None:
        cann = next((path for path in (f"{under}{folder.lstrip('/')}" for folder in CANN_FOLDERS)
                     if os.path.isdir(path)), None)
    plugin = _plugin()
    missing = []
    if not cards:
        missing.append("no card in /dev (davinci*)")
    if cann is None:
        missing.append("no CANN in ASCEND_HOME_PATH or /usr/local/Ascend")
    if cards and cann and plugin is None:
        missing.append("no Ascend plugin in the installed MindSpore")
    return Ascend(cards, cann, plugin, ", ".join(missing) or None)


def remedy(found: Ascend) -> str:
    """What to do about what is `missing`."""
    if not found.cards:
        return "Is the driver installed, and are the cards passed into this container (--device /dev/davinci0 ...)?"
    if found.cann is None:
        return "Install CANN and source its set_env.sh."
    return "Install a MindSpore with the Ascend backend."


def _plugin() -> Optional[str]:
    folder = folder_of("mindspore")
    found = glob.glob(os.path.join(folder, "lib", "plugin", "libmindspore_ascend.so*")) if folder else []
    return found[0] if found else None


def ask(found: Ascend, card: Optional[int] = None, program: str = _PROBE) -> CardAnswer:
    """Load MindSpore's Ascend plugin and ask a card for its free memory, in a process of its own (a second or two).

    Args:
        found: what `find_ascend` found, nothing missing.
        card: its number; by default that of this rank, DEVICE_ID or RANK_ID.
        program: what the other process runs.
    """
    assert found.mindspore_plugin is not None, "find_ascend says that the plugin is missing"
    card = own_card() if card is None else card
    if card >= len(found.cards):
        return CardAnswer(f"{NO_SUCH_CARD} {card} (--device_id, DEVICE_ID): this machine has {len(found.cards)}, "
                          "numbered from 0")
    return _ask(found.mindspore_plugin, card, found.cann or "", program)


@functools.lru_cache(maxsize=None)
def _ask(plugin: str, card: int, cann: str, program: str) -> CardAnswer:
    try:
        done = subprocess.run([sys.executable, "-c", program, plugin, str(card)], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, timeout=_PROBE_S, universal_newlines=True, check=False)
    except subprocess.TimeoutExpired:
        return CardAnswer(f"card {card} has not answered within {_PROBE_S} s")
    lines = done.stdout.strip().splitlines()
    try:
        told = json.loads(lines[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return CardAnswer(f"asking card {card} ended with exit code {done.returncode}: {last}")
    return CardAnswer(_library_fault(told.get("fault"), cann), told.get("free_bytes"), told.get("total_bytes"))


def _library_fault(fault: Optional[str], cann: str) -> Optional[str]:
    """What the loader says, with what to do about it: a library that is not found, or one of another release."""
    if fault and "cannot open shared object file" in fault:
        return f"{fault.split(': No such file')[0]}; source {set_env(cann)}"
    lacking = re.search(r"([^/\s]+): undefined symbol: (\w+)", fault or "")
    if lacking:
        return (f"{LACKING} {lacking[2]}, which MindSpore's {lacking[1]} needs: this CANN ({cann}) is not "
                "of the version that MindSpore is made for")
    return fault


def own_card() -> int:
    """The number of this process's card."""
    text = os.environ.get("DEVICE_ID") or os.environ.get("RANK_ID") or "0"
    return int(text) if text.isdigit() else 0


def set_env(cann: str) -> str:
    """The script of a CANN folder that sets the environment: inside it, or beside it up to CANN 8.3."""
    for folder in (cann, os.path.dirname(cann.rstrip("/"))):
        path = os.path.join(folder, "set_env.sh")
        if os.path.isfile(path):
            return path
    return "CANN's set_env.sh"


def npu_smi() -> Tuple[Optional[str], str]:
    """What `npu-smi info` prints; None with the reason where it cannot be run, as in containers without it."""
    try:
        done = subprocess.run(["npu-smi", "info"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=20,
                              universal_newlines=True, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"cannot be run: {error}"
    return (done.stdout, "") if done.returncode == 0 else (None, f"exit code {done.returncode}: {done.stdout.strip()}")


@dataclass(frozen=True)
class CardMemory:
    """Memory (HBM) of a card in bytes: all of it, and what nobody uses now."""

    total_bytes: int
    free_bytes: int


def card_memory(card: Optional[int]) -> Optional[CardMemory]:
    """Memory of a card (see `ask`), as it says itself, otherwise as `npu-smi` shows it; None where neither does."""
    found = find_ascend()
    card = own_card() if card is None else card
    if found.missing is None:
        answer = ask(found, card)
        if answer.fault is None and answer.total_bytes and answer.free_bytes is not None:
            return CardMemory(answer.total_bytes, answer.free_bytes)
    output, _ = npu_smi()
    # The line with a card's bus address ends in `used / all |`, in units of 2^20 bytes that it calls MB.
    cards = [CardMemory(int(size) * 2 ** 20, (int(size) - int(used)) * 2 ** 20)
             for used, size in _HBM.findall(output or "") if int(size)]
    return cards[card % len(cards)] if cards else None


def foreign_libraries(folder: Optional[str] = None, machine: Optional[str] = None) -> Optional[str]:
    """What to tell a user whose MindSpore was built for another processor than this one; None when it fits.

    The wheels `mindspore-*-none-any.whl` say that they fit any machine, pip believes it, and only the import fails.

    Args:
        folder: MindSpore's; the installed one by default.
        machine: this machine's architecture, as uname names it.
    """
    folder = folder_of("mindspore") if folder is None else folder
    machine = platform.machine() if machine is None else machine
    libraries = glob.glob(os.path.join(folder, "lib", "libmindspore_core.so")) if folder else []
    built_for = elf_machine(libraries[0]) if libraries else None
    if built_for is None or built_for == machine:
        return None
    return f"the installed MindSpore holds {built_for} libraries, and this machine is {machine}"


def elf_machine(path: str) -> Optional[str]:
    """'x86_64', 'aarch64' or a number: the processor that a library is for; None when it is no ELF file."""
    with open(path, "rb") as file:
        header = file.read(20)
    if header[:4] != b"\x7fELF" or len(header) < 20:
        return None
    number = int.from_bytes(header[18:20], "little" if header[5] == 1 else "big")
    return _ELF_MACHINES.get(number, f"machine {number}")


WHEEL_FIX = (f"Install the wheel for this machine from https://www.mindspore.cn/install (linux_{platform.machine()} in "
             "its name), with Python 3.11.")


def refuse_foreign() -> None:
    """Refuse a MindSpore whose libraries are for another processor: it can compute on nothing.

    Raises:
        UserError: with the wheel to install.
    """
    foreign = foreign_libraries()
    if foreign:
        raise UserError(foreign, fix=WHEEL_FIX)


def resolve(target: str, environ: Optional[Mapping[str, str]] = None, root: str = "/",
            asked: Optional[Callable[[Ascend], CardAnswer]] = None, card: Optional[int] = None) -> Tuple[str, str]:
    """Turn `auto`, `Ascend` or `CPU` into the device to compute on and one line on why.

    `auto` is Ascend where a card answers and the libraries load, otherwise CPU, and the line says what was wrong.
    `Ascend` that was asked for by name stays Ascend even where there is none, so that graphs can be examined on any
    machine; `require` refuses to compute on it. `card` is the one to ask, see `ask`.

    Raises:
        UserError: MindSpore's libraries are for another processor: it can compute on nothing.
    """
    refuse_foreign()
    if target == CPU:
        return CPU, "CPU, asked for"
    found = find_ascend(environ, root)
    if target == ASCEND:
        there = f"but {found.missing}" if found.missing else f"{len(found.cards)} card(s), CANN {found.cann}"
        return ASCEND, f"Ascend, asked for; {there}"
    fault = found.missing or (asked or functools.partial(ask, card=card))(found).fault
    if fault is None:
        return ASCEND, f"Ascend, chosen by auto: {len(found.cards)} card(s), CANN {found.cann}"
    return CPU, f"CPU, chosen by auto: {fault}"


def require(target: str, where: Optional[str] = None, environ: Optional[Mapping[str, str]] = None, root: str = "/",
            asked: Optional[Callable[[Ascend], CardAnswer]] = None, card: Optional[int] = None) -> None:
    """Refuse to compute on an Ascend that is not there, whose libraries do not load or whose card does not answer.

    `card` is the one to ask, see `ask`.

    Raises:
        UserError: `target` is Ascend and this machine has none to compute on; with the reason.
    """
    if target != ASCEND:
        return
    found = find_ascend(environ, root)
    if found.missing:
        raise UserError(f"device_target Ascend, but this machine has {found.missing}", where,
                        f"Use --device_target CPU (or auto). To compute on Ascend: {remedy(found)}")
    fault = (asked or functools.partial(ask, card=card))(found).fault
    if fault:
        raise UserError(f"device_target Ascend, but {fault}", where,
                        "Run `qwen15 doctor` to examine it, or use --device_target CPU.")


def env_rank() -> int:
    """This process's rank as the launcher has set it, 0 without one."""
    text = os.environ.get("RANK_ID", "")
    return int(text) if text.isdigit() else 0
