"""Say what this machine has and what will be used: `qwen15 doctor`. Needs no MindSpore to run."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import sys
from dataclasses import asdict
from importlib import metadata
from typing import Callable, Dict, List, Mapping, Optional, Sequence, Set, Tuple

from .. import device, machine
from ..ascend import installation
from ..command_line import Parser, whole_from
from ..errors import EXIT_FAILED, EXIT_OK, UserError
from ..finding import FAIL, INFO, OK, WARN, Finding
from ..generation import memory
from ..installed import version_of
from ..launch.plan import DEFAULT_PORT

_PYTHON = ((3, 9), (3, 12))
_PAIRS = {spark.rpartition(".")[0]: formers.rpartition(".")[0] for spark, (formers, _, _) in installation.PAIRS.items()}
"""MindSpore's minor version -> the MindFormers made for it: '2.9' -> '1.9'."""

_CPU_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16",
              "avx512_vnni", "amx_tile", "amx_bf16", "asimd", "asimddp", "bf16", "sve")


def check_python() -> Finding:
    """The interpreter."""
    version = sys.version_info[:2]
    detail = f"{platform.python_version()} at {sys.executable}"
    if _PYTHON[0] <= version <= _PYTHON[1]:
        return Finding("python", OK, detail)
    return Finding("python", FAIL, detail, "MindSpore has packages for Python 3.9 to 3.12.")


def check_packages(version: Callable[[str], Optional[str]] = version_of) -> List[Finding]:
    """What has to be installed, and whether the versions belong together."""
    checks = []
    for name in ("mindspore", "numpy", "pyyaml", "safetensors", "tokenizers", "tiktoken"):
        found = version(name)
        if found is None:
            checks.append(Finding(name, FAIL, "not installed", f"pip install {name}"))
        else:
            checks.append(_judged(name, found, version))
    found = version("mindformers")
    checks.append(_judged("mindformers", found, version) if found else
                  Finding("mindformers", INFO, "not installed; only Ascend needs it", None))
    torch = version("torch")
    checks.append(Finding("torch", INFO, torch or "not installed; only .bin checkpoints need it"))
    return checks


def check_requirements(version: Callable[[str], Optional[str]] = version_of,
                       requirements: Callable[[str], Optional[List[str]]] = metadata.requires) -> Finding:
    """Whether packages are installed in the versions that those around them want (pip only warns of that)."""
    from packaging.requirements import Requirement

    details, fixes = [], []
    for name in ("qwen15-mindspore", "mindspore", "mindformers", "transformers"):
        by = version(name)
        for line in (requirements(name) or ()) if by else ():
            wanted = Requirement(line)
            found = version(wanted.name)
            if found is None or (wanted.marker is not None and not wanted.marker.evaluate({"extra": ""})):
                continue
            if not wanted.specifier.contains(found, prereleases=True):
                details.append(f"{wanted.name} is {found}, {name} {by} wants {wanted.specifier}")
                fixes.append(f"'{wanted.name}{wanted.specifier}'")
    if details:
        return Finding("versions", WARN, "; ".join(details), f"pip install {' '.join(fixes)}")
    return Finding("versions", OK, "the installed versions fit together")


def _judged(name: str, found: str, version: Callable[[str], Optional[str]]) -> Finding:
    """One installed package against what is known of its versions."""
    if name == "numpy" and _numbers(found) >= (2,):
        return Finding(name, FAIL, f"{found}: MindSpore needs numpy below 2", "pip install 'numpy<2'")
    if name == "safetensors" and _numbers(found) >= (0, 8):
        return Finding(name, WARN, f"{found} writes wrong bytes for arrays that are not contiguous; MindSpore's own "
                     "transform tools hand it such arrays", "pip install 'safetensors<0.8'")
    if name == "mindformers":
        spark = version("mindspore") or ""
        wanted = _PAIRS.get(".".join(spark.split(".")[:2]))
        if spark and wanted is None:
            pairs = ", ".join(f"mindspore {one} with mindformers {other}" for one, other in _PAIRS.items())
            return Finding(name, WARN, f"{found} with mindspore {spark}, which is not tested",
                           f"Tested pairs: {pairs}.")
        if wanted and not found.startswith(f"{wanted}."):
            later = "; 2.1 wants mindspore 2.11, which is not out yet" if found.startswith("2.1.") else ""
            return Finding(name, WARN, f"{found}, but mindspore {spark} goes with mindformers {wanted}{later}",
                           f"pip install {'--no-deps ' if wanted == '2.0' else ''}'mindformers=={wanted}.*'")
    return Finding(name, OK, found)


def _numbers(version: str) -> Tuple[int, ...]:
    numbers = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _processor(cpuinfo: str) -> Tuple[str, Set[str]]:
    """The processor's name and the flags of its first core."""
    fields = machine.cpu_fields(cpuinfo)
    flags = fields.get("flags", fields.get("Features", ""))
    return machine.cpu_name(fields), set(flags.split())


def check_cpu(cpuinfo: str = "/proc/cpuinfo") -> Finding:
    """The processor: its name, how much of it this process may use, and the instruction sets that matter here."""
    name, flags = _processor(cpuinfo)
    usable = len(machine.allowed_cpus())
    known = " ".join(flag for flag in _CPU_FLAGS if flag in flags) or "no known vector extensions"
    return Finding("cpu", OK, f"{platform.machine()}, {name}, {usable} logical cores usable; {known}")


def check_kernels(cpuinfo: str = "/proc/cpuinfo") -> Finding:
    """The kernel library and which of its paths will run."""
    from ..kernels import library
    from ..kernels.build import find_compiler

    forced = os.environ.get("QWEN15_KERNELS", "")
    if forced == "reference":
        return Finding("kernels", WARN, "reference operators, slow (QWEN15_KERNELS=reference)", "Unset QWEN15_KERNELS.")
    try:
        kernels = library.load()
    except UserError as error:
        try:
            compiler = f"the compiler {find_compiler()} is there"
        except UserError as missing:
            compiler = missing.what
        return Finding("kernels", WARN, f"reference operators, slow: {error.what}; {compiler}",
                       error.fix or "Build it with `python -m qwen15.kernels.build`.")
    if forced and not kernels.can_run(forced):
        able = ", ".join(name for name in library.KERNELS if kernels.can_run(name))
        return Finding("kernels", FAIL, f"QWEN15_KERNELS={forced}, which this CPU cannot run", f"It runs {able}.")
    threads = "QWEN15_THREADS" if os.environ.get("QWEN15_THREADS") else machine.default_threads(
        quota=machine.cpu_quota())[1]
    detail = f"{forced or kernels.kernels}, {kernels.threads} threads ({threads}), {kernels.path}"
    if not forced and {"amx_tile", "amx_bf16"} <= _processor(cpuinfo)[1] and not kernels.can_run("amx"):
        return Finding("kernels", WARN, f"{detail}; this CPU has AMX, which is not used",
                     "AMX wants Linux 5.16 or later, a container that may call arch_prctl, and a library built with "
                     "g++ 11 or later (`python -m qwen15.kernels.build`).")
    return Finding("kernels", OK, detail)


def check_reading() -> Optional[Finding]:
    """How weights are read where few tokens meet them; None without kernels."""
    from ..kernels import library, reading

    forced = os.environ.get("QWEN15_KERNELS", "")
    try:
        kernels = library.load()
        if forced:
            kernels.use_kernels(forced)
        way, whence = reading.choose(kernels)
    except ValueError:
        return None
    except UserError as error:
        return Finding("reading", FAIL, str(error), error.fix) if error.where == reading.VARIABLE else None
    return Finding("reading", OK, f"{way} (prefetch, bytes ahead, places), {whence}")


def check_nodes() -> Finding:
    """The memory nodes, and what is done about several."""
    found = machine.processors()
    if len(found.nodes) == 1:
        return Finding("nodes", OK, "1 memory node")
    each = "; ".join(f"node {number}: {len(cpus)} CPUs" for number, cpus in found.nodes.items())
    return Finding("nodes", OK, f"{len(found.nodes)} memory nodes ({each}): each thread stays on one, new memory comes "
                                "from all in turn")


def check_ascend(environ: Optional[Mapping[str, str]] = None, root: str = "/",
                 asked: Optional[Callable[[device.Ascend], device.CardAnswer]] = None) -> List[Finding]:
    """Cards, CANN, what is installed for them, and what `device_target: auto` comes to."""
    findings = installation.examine(environ, root, asked)
    found = device.find_ascend(environ, root)
    cards = f"{len(found.cards)} card(s): {', '.join(found.cards)}" if found.cards else "no card (no /dev/davinci*)"
    cann = f"CANN {found.cann}" if found.cann else "no CANN (in ASCEND_HOME_PATH or /usr/local/Ascend)"
    # A card that cannot be used is a fault; a machine without one is just a machine.
    status = OK if found.missing is None else WARN if found.cards or found.cann else INFO
    fix = device.remedy(found) if status == WARN else None
    checks = [Finding("ascend", status, f"{cards}; {cann}", fix), *findings]
    if not any(finding.name == "wheel" for finding in findings):  # then this process computes nothing itself
        _, why = device.resolve(device.AUTO, environ, root, asked)
        checks.append(Finding("device", INFO, f"a run computes on {why}"))
    return checks


def check_memory() -> Finding:
    """Memory that is free now."""
    has = machine.memory()
    if has.free_bytes is None or has.whole_bytes is None:
        return Finding("memory", INFO, "not known on this system")
    return Finding("memory", OK, f"{memory.gib(has.free_bytes)} free of {memory.gib(has.whole_bytes)} ({has.what})")


def check_msrun(path: Optional[str] = None) -> Finding:
    """MindSpore's own launcher, for those who use it; scripts/msrun_launcher.sh does without."""
    beside = os.path.join(os.path.dirname(sys.executable), "msrun")
    found = beside if os.access(beside, os.X_OK) else shutil.which("msrun", path=path)
    if found is None:
        return Finding("msrun", INFO, "not found; scripts/msrun_launcher.sh does not need it")
    if found != beside:
        return Finding("msrun", WARN, f"{found} belongs to another Python than {sys.executable}",
                       "Activate the environment that has MindSpore.")
    return Finding("msrun", OK, found)


def check_port(port: int) -> Finding:
    """Whether the scheduler's port can be listened on."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As the scheduler does: a port in TIME_WAIT counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            return Finding("port", WARN, f"{port} cannot be used ({error.strerror})",
                           "msrun_launcher.sh takes a free one unless it is given this one; msrun wants --master_port.")
    return Finding("port", OK, f"{port} is free")


def check_tokenizer(vocab_file: Optional[str], merges_file: Optional[str]) -> Finding:
    """The tokenizer files, read and tried on a sentence."""
    if vocab_file is None or merges_file is None:
        missing = "--vocab_file" if vocab_file is None else "--merges_file"
        return Finding("tokenizer", FAIL, f"{missing} is missing", "Give both files.")
    from ..text.tokenizer import Qwen2Tokenizer

    sentence = "Hello, 世界! 1234 \n\tdef f(x): return x**2"
    try:
        tokenizer = Qwen2Tokenizer.from_files(vocab_file, merges_file, {})
        ids = tokenizer.encode(sentence)
        back = tokenizer.decode(ids)
    except UserError as error:
        return Finding("tokenizer", FAIL, str(error))
    if back != sentence:
        return Finding("tokenizer", FAIL, f"{sentence!r} comes back as {back!r}",
                       "vocab.json and merges.txt are not of one model; download both again.")
    return Finding("tokenizer", OK,
                   f"{len(tokenizer)} tokens; a test sentence of {len(ids)} tokens comes back unchanged")


def check_mindspore() -> Finding:
    """Import MindSpore and let it add two numbers on the CPU."""
    try:
        import mindspore as ms

        total = (ms.Tensor([1.0], ms.float32) + ms.Tensor([2.0], ms.float32)).asnumpy()[0]
    except Exception as error:  # whatever stops MindSpore is what the user needs to read
        return Finding("mindspore runs", FAIL, " ".join(f"{type(error).__name__}: {error}".split()))
    return Finding("mindspore runs", OK if total == 3.0 else FAIL, f"1 + 2 = {total:g} on the CPU")


def examine(vocab_file: Optional[str] = None, merges_file: Optional[str] = None, port: int = DEFAULT_PORT,
            deep: bool = False) -> List[Finding]:
    """All findings, in the order in which they are read."""
    checks = [check_python(), *check_packages(), check_requirements(), check_cpu(), check_kernels(),
              *filter(None, [check_reading()]), check_nodes(), *check_ascend(), check_memory(), check_msrun(),
              check_port(port)]
    if vocab_file is not None or merges_file is not None:
        checks.append(check_tokenizer(vocab_file, merges_file))
    if deep:
        checks.append(check_mindspore())
    return checks


def as_text(checks: Sequence[Finding]) -> str:
    """One line a finding, its remedy below it, and a last line that sums up."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.status:<4}  {check.name:<{width}}  {check.detail}")
        if check.fix:
            lines.append(f"{'':<4}  {'':<{width}}  -> {check.fix}")
    counts = {status: sum(check.status == status for check in checks) for status in (FAIL, WARN)}
    verdict = "everything that is needed is here" if not counts[FAIL] else f"{counts[FAIL]} thing(s) have to be mended"
    return "\n".join([*lines, f"{verdict}; {counts[WARN]} warning(s)"])


def as_json(checks: Sequence[Finding]) -> str:
    """The findings as one JSON object."""
    report: Dict[str, object] = {"ok": not any(check.status == FAIL for check in checks),
                                 "checks": [asdict(check) for check in checks]}
    return json.dumps(report, ensure_ascii=False, indent=2)


def parser() -> Parser:
    """The flags."""
    made = Parser("qwen15 doctor", (
        "What this machine has and what a run will use: versions, CPU, kernels, Ascend, memory, msrun, port, "
        "tokenizer."), ["qwen15 doctor", "qwen15 doctor --deep --json"],
        exit_codes="exit codes: 0 nothing fails, 1 something does, 2 usage")
    made.add_argument("--json", action="store_true", help="print one JSON object")
    made.add_argument("--vocab_file", metavar="FILE", help="examine this vocab.json ...")
    made.add_argument("--merges_file", metavar="FILE", help="... with this merges.txt")
    made.add_argument("--port", type=whole_from(1, 65535), default=DEFAULT_PORT,
                      help=f"the scheduler's port (default {DEFAULT_PORT})")
    made.add_argument("--deep", action="store_true", help="also import MindSpore and run one operator (some seconds)")
    return made


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Command line: exit code 0 when nothing fails, 1 when something does."""
    args = parser().parse_args(argv)
    checks = examine(args.vocab_file, args.merges_file, args.port, args.deep)
    print(as_json(checks) if args.json else as_text(checks))
    return EXIT_FAILED if any(check.status == FAIL for check in checks) else EXIT_OK
