"""What is installed for Ascend, whether it belongs together, and what the environment changes; MindSpore is not run."""

from __future__ import annotations

import glob
import importlib.util
import json
import os
import re
import sys
from dataclasses import dataclass
from typing import Callable, Mapping, Optional, Sequence

from .. import device, machine
from ..finding import FAIL, INFO, OK, WARN, Finding
from ..installed import folder_of, version_of

PAIRS = {"2.10.0": ("2.0.0", "9.1.0", "26.1.0"), "2.9.0": ("1.9.0", "9.0.0", "26.0.RC1"),
         "2.7.2": ("1.8.0", "8.5.0", "25.5.0")}
"""MindSpore -> the MindFormers, CANN and driver made for it, for a MindFormers that does not say so itself."""

_VERSION_FILES = ("compiler/version.info", "opp/version.info", "share/info/*/version.info",
                  "*-linux/ascend_toolkit_install.info", "version.info", "version.cfg")
"""Where a CANN folder says its version: up to 8.3, from 8.5 on, the installer's own note, and single packages."""

_PYTHON_MODULES = {"attr": "attrs", "cloudpickle": "cloudpickle", "decorator": "decorator", "jinja2": "jinja2",
                   "ml_dtypes": "ml-dtypes", "numpy": "numpy", "google.protobuf": "protobuf", "psutil": "psutil",
                   "scipy": "scipy", "sympy": "sympy", "tornado": "tornado"}
"""Modules that CANN's compiler of operators imports -> the packages that hold them."""

_INHERITED = {
    "RANK_TABLE_FILE": "MindSpore takes ranks and cards from this table, not from the launcher",
    "ENFORCE_EAGER": "MindFormers builds the network for PyNative mode where it is True",
    "CPU_AFFINITY": "MindFormers pins each rank to processors of its own where it is True, which is its default",
    "ASCEND_RT_VISIBLE_DEVICES": "cards are renumbered: card 0 is the first in this list",
    "ASCEND_LAUNCH_BLOCKING": "every operator is waited for: slow",
    "MS_ALLOC_CONF": "MindSpore's memory pool is set up by it",
    "MS_SIMULATION_LEVEL": "MindSpore computes nothing and only pretends to have cards",
    "MS_INTERNAL_DISABLE_CUSTOM_KERNEL_LIST": "operators in this list are CANN's, not MindSpore's own",
    "MS_ENABLE_INTERNAL_KERNELS": "decides whether operators are MindSpore's own or CANN's",
    "HCCL_DETERMINISTIC": "cards add in a fixed order, more slowly",
    "HCCL_BUFFSIZE": "memory of each communicator on the card, in MB, twice",
    "RANK_SIZE": "a launcher's number of ranks; without a launcher a run believes it all the same",
}


@dataclass(frozen=True)
class Wanted:
    """Versions that belong to the installed MindSpore; None where nobody says.

    Attributes:
        cann, driver: the pair that MindFormers names; firmware has the driver's version.
        accepted: CANN's versions that MindSpore runs with without a warning, `8.5`, `9.0`.
        source: who says so.
    """

    cann: Optional[str]
    driver: Optional[str]
    accepted: tuple[str, ...]
    source: str


def examine(environ: Optional[Mapping[str, str]] = None, root: str = "/",
            asked: Optional[Callable[[device.Ascend], device.CardAnswer]] = None) -> list[Finding]:
    """All that matters on a machine with cards or CANN; on others only what matters there too.

    Args:
        environ: environment variables; the process's own by default.
        root: where /dev, /usr/local and /sys are looked for.
        asked: asks a card; `device.ask` by default.
    """
    environ = os.environ if environ is None else environ
    found = device.find_ascend(environ, root)
    findings = wheel()
    if not found.cards and found.cann is None:
        return findings
    if found.missing is None:
        findings += card((asked or device.ask)(found))
    return [*findings, *versions(found.cann, root), *python_modules(found.cann), *inherited(environ), *pinning(environ)]


def wheel() -> list[Finding]:
    """MindSpore's libraries against this machine's processor; nothing where they fit."""
    foreign = device.foreign_libraries()
    return [Finding("wheel", FAIL, foreign, device.WHEEL_FIX)] if foreign else []


def card(answer: device.CardAnswer) -> list[Finding]:
    """What a card said."""
    if answer.fault:
        if "set_env" in answer.fault:
            fix = "Source CANN's set_env.sh in this shell."
        elif answer.fault.startswith(device.LACKING):
            fix = f"Install CANN {wanted().cann or 'for this MindSpore'}, or source its set_env.sh."
        elif answer.fault.startswith(device.NO_SUCH_CARD):
            fix = "Unset DEVICE_ID, or name a card that is there."
        else:
            fix = "Does `npu-smi info` show the card as healthy, and does another process hold it?"
        return [Finding("card", FAIL, answer.fault, fix)]
    if answer.total_bytes is None or answer.free_bytes is None:
        return [Finding("card", OK, "it answers")]
    free, total = (f"{size / 2 ** 30:.2f} GiB" for size in (answer.free_bytes, answer.total_bytes))
    return [Finding("card", OK, f"it answers; {free} free of {total}")]


def wanted() -> Wanted:
    """What the installed MindSpore wants, as MindFormers' and its own files say."""
    version = version_of("mindspore") or ""
    accepted = _accepted_cann()
    try:
        with open(os.path.join(folder_of("mindformers") or "", "VERSION_MAP.json"), encoding="utf-8") as file:
            told = json.load(file)
        cann = told["ms"][version]["prefer"]
        return Wanted(cann, told["cann"][cann]["prefer"], accepted, f"mindformers {version_of('mindformers')}")
    except (OSError, ValueError, KeyError, TypeError):
        _, cann, driver = PAIRS.get(version, (None, None, None))
        return Wanted(cann, driver, accepted, f"mindspore {version or 'is not installed'}")


def _accepted_cann() -> tuple[str, ...]:
    """The list that MindSpore warns by, read from its source: importing it would set up a device."""
    path = os.path.join(folder_of("mindspore") or "", "run_check", "_check_version.py")
    if not os.path.isfile(path):
        return ()
    with open(path, encoding="utf-8") as file:
        _, _, ascend = file.read().partition("class AscendEnvChecker")
    listed = re.search(r"self\.version = \[(.*?)\]", ascend)
    return tuple(re.findall(r"\d+\.\d+", listed[1])) if listed else ()


def versions(cann: Optional[str], root: str) -> list[Finding]:
    """CANN, driver and firmware against what the installed MindSpore wants."""
    want = wanted()
    findings = []
    if cann is not None:
        findings.append(_judge_cann(cann_version(cann), want))
    for part in ("driver", "firmware"):
        found = version_in(os.path.join(root, "usr", "local", "Ascend", part), ("version.info",))
        findings.append(_judge_driver(part, found, want))
    return findings


def _judge_cann(found: Optional[str], want: Wanted) -> Finding:
    if found is None:
        return Finding("cann version", WARN, "the folder does not say which version of CANN it is",
                       f"{want.source} goes with CANN {want.cann}." if want.cann else None)
    if want.cann is None:
        return Finding("cann version", WARN, f"{found}; {want.source}: it is not known which CANN it goes with")
    fix = f"Install CANN {want.cann}, which {want.source} names for this MindSpore."
    if _same_release(found, want.cann):
        return Finding("cann version", OK, found)
    if ".".join(found.split(".")[:2]) in want.accepted:
        return Finding("cann version", WARN, f"{found}: MindSpore accepts it, {want.cann} is what it is made for", fix)
    return Finding("cann version", FAIL, f"{found}, this MindSpore wants {want.cann}", fix)


def _judge_driver(part: str, found: Optional[str], want: Wanted) -> Finding:
    if found is None:
        return Finding(part, INFO, f"version unknown (no /usr/local/Ascend/{part}/version.info, as in most containers)")
    if want.driver is None or _same_release(found, want.driver):
        return Finding(part, OK, found)
    return Finding(part, WARN, f"{found}; {want.source} goes with {want.driver}",
                   f"A {part} older than CANN asks for may fail; a newer one usually works.")


def _same_release(one: str, other: str) -> bool:
    return one.lower().split(".")[:3] == other.lower().split(".")[:3]


def cann_version(cann: str) -> Optional[str]:
    """The version of a CANN folder, in either layout: `8.3.RC1` of `ascend-toolkit/latest`, `9.0.0` of `cann`."""
    named = re.search(r"(\d+\.\d+\.[A-Za-z]*\d+)$", os.path.basename(os.path.realpath(cann)))
    return version_in(cann, _VERSION_FILES) or (named[1] if named else None)


def version_in(folder: str, patterns: Sequence[str]) -> Optional[str]:
    """The first version that a folder's files state, as package_version=, Version= or version=; None without."""
    for pattern in patterns:
        for path in sorted(glob.glob(os.path.join(folder, pattern))):
            with open(path, encoding="utf-8", errors="replace") as file:
                text = file.read()
            for key in ("package_version", "version", r"\w+_running_version"):
                stated = re.search(rf"^{key}\s*=\s*\[?(?:[\d.]+:)?([\w.]*\d[\w.]*)", text, re.MULTILINE | re.IGNORECASE)
                if stated:
                    return stated[1]
    return None


def python_modules(cann: Optional[str], find: Optional[Callable[[str], bool]] = None) -> list[Finding]:
    """What CANN's compiler of operators imports, by name, and CANN's own module `te`."""
    find = find or _can_import
    absent = [package for module, package in _PYTHON_MODULES.items() if not find(module)]
    findings = []
    if absent:
        findings.append(Finding("cann needs", FAIL, f"{', '.join(absent)}: not installed in {sys.executable}",
                                f"pip install {' '.join(absent)}"))
    if cann is not None and not find("te"):
        findings.append(Finding("cann needs", FAIL, "CANN's own Python module te is not on PYTHONPATH",
                                f"source {device.set_env(cann)}"))
    return findings or [Finding("cann needs", OK, "its Python modules are all here")]


def _can_import(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def inherited(environ: Mapping[str, str]) -> list[Finding]:
    """Variables that somebody has set and that change what happens."""
    return [Finding("environment", INFO, f"{name}={environ[name]}: {meaning}", f"Unset {name} if that is not meant.")
            for name, meaning in _INHERITED.items() if environ.get(name)]


def pinning(environ: Mapping[str, str], allowed: Optional[int] = None, processors: Optional[int] = None
            ) -> list[Finding]:
    """MindFormers pins ranks by counting all the machine's processors, which fails where a process may not use all.

    Args:
        environ: environment variables.
        allowed, processors: how many processors this process may use and the machine has; asked for by default.
    """
    if allowed is None or processors is None:
        allowed, processors = len(machine.allowed_cpus()), os.cpu_count() or 1
    if allowed >= processors or environ.get("CPU_AFFINITY", "").lower() in ("0", "false"):
        return []
    return [Finding("pinning", INFO, f"this process may use {allowed} of {processors} processors (cpuset); MindFormers "
                    "would pin ranks to others, so a run sets CPU_AFFINITY=False")]
