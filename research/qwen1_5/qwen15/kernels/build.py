"""Compile the kernels into one shared library: `python -m qwen15.kernels.build`. Needs only a C++17 compiler."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Dict, List, Optional, Sequence

if __package__:
    from ..errors import EXIT_FAILED, UserError, run_main
else:  # run by setup.py, before the package can be imported
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from qwen15.errors import EXIT_FAILED, UserError, run_main

HERE = Path(__file__).resolve().parent
OUTPUT_DIR = HERE / "_lib"
LIBRARY_NAME = "libqwen15_kernels.so"

AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", *AVX2, "-mprefer-vector-width=512")
AVX512_BF16 = (*AVX512, "-mavx512bf16", "-mavx512vnni")
X86_SOURCES: Dict[str, Sequence[str]] = {
    "isa_avx2.cpp": AVX2,
    "isa_avx512.cpp": AVX512,
    "isa_avx512_bf16.cpp": AVX512_BF16,
    "isa_amx.cpp": (*AVX512_BF16, "-mamx-tile", "-mamx-bf16"),
}
ARM_SOURCES: Dict[str, Sequence[str]] = {
    "isa_neon.cpp": (),
    "isa_neon_dot.cpp": ("-march=armv8.2-a+dotprod",),
    "isa_neon_bf16.cpp": ("-march=armv8.2-a+fp16+dotprod+bf16",),
}
"""Sources of one instruction set each, with the flags no other source may be compiled with."""
SOURCES: Sequence[str] = ("team.cpp", "dispatch.cpp", "layer.cpp", "operators.cpp", "ranks.cpp", "select.cpp",
                          "probe.cpp", "reading.cpp", "lost_files.cpp", "isa_portable.cpp")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-pthread", "-Wall",
         "-Wextra", "-Wno-psabi", "-Wno-ignored-attributes", "-Wno-maybe-uninitialized", "-Wno-uninitialized")
SANITIZERS = ("address", "undefined", "thread")


def is_x86(target: Optional[str]) -> bool:
    """Whether `target`, a machine triple or None for this machine, is an x86 of 64 bits."""
    machine = target.split("-")[0] if target else platform.machine()
    return machine in ("x86_64", "amd64", "AMD64")


def is_arm(target: Optional[str]) -> bool:
    """Whether `target`, a machine triple or None for this machine, is an ARM of 64 bits."""
    machine = target.split("-")[0] if target else platform.machine()
    return machine in ("aarch64", "arm64")


def find_compiler(target: Optional[str] = None) -> str:
    """The C++ compiler to use: $CXX, else <target>-g++ or g++, else clang++.

    Args:
        target: machine triple to compile for (`aarch64-linux-gnu`), None for this machine.

    Raises:
        UserError: none of them is on PATH.
    """
    wanted = [f"{target}-g++"] if target else [os.environ.get("CXX", ""), "g++", "clang++"]
    for name in filter(None, wanted):
        if shutil.which(shlex.split(name)[0]):
            return name
    names = ", ".join(filter(None, wanted))
    raise UserError(f"no C++ compiler found (looked for {names})", where="kernels",
                    fix="Install g++ (Debian: apt-get install g++); without it the slow reference operators are used.",
                    exit_code=EXIT_FAILED)


def instruction_sets(compiler: Sequence[str], target: Optional[str] = None,
                     emulation: Optional[os.PathLike] = None) -> Dict[str, Sequence[str]]:
    """Sources of instruction sets and their flags: those that this compiler knows; the others are named on stderr."""
    wanted = X86_SOURCES if is_x86(target) else ARM_SOURCES if is_arm(target) else {}
    if emulation is not None:
        return {name: (*AVX2, "-I", str(emulation)) for name in wanted if name != "isa_avx2.cpp"}
    known: Dict[str, Sequence[str]] = {}
    for name, flags in wanted.items():
        probe = [*compiler, *flags, "-fsyntax-only", "-x", "c++", os.devnull]
        if not flags or subprocess.run(probe, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0:
            known[name] = flags
        else:
            print(f"note: {compiler[0]} is too old for the {Path(name).stem[4:]} kernels; they are left out",
                  file=sys.stderr)
    return known


def build(output_dir: Optional[os.PathLike] = None, sanitizer: Optional[str] = None, target: Optional[str] = None,
          verbose: bool = False, emulation: Optional[os.PathLike] = None, here: bool = False) -> Path:
    """Compile the library and return its path.

    The library appears under its name only when it is complete; an older one is replaced.

    Args:
        output_dir: where to put it; default `qwen15/kernels/_lib`.
        sanitizer: None, or one or more of `SANITIZERS` with commas between (then -O1 with debug information).
        target: machine triple to cross-compile for, None for this machine.
        verbose: print the compiler's commands on stderr.
        emulation: for tests, a folder of headers that stand for the intrinsics beyond AVX2: every x86 instruction set
            then runs on a CPU with AVX2, and slowly.
        here: for tests, leave out the x86 instruction sets that this CPU has not.

    Raises:
        UserError: no compiler, or it failed (its message is in the error).
    """
    for name in sanitizer.split(",") if sanitizer else ():
        if name not in SANITIZERS:
            raise UserError(f"unknown sanitizer {name!r}", where="kernels", fix=f"Choose from {', '.join(SANITIZERS)}.")
    compiler = shlex.split(find_compiler(target))
    sources: Dict[str, Sequence[str]] = {name: () for name in SOURCES}
    flags: List[str] = list(FLAGS)
    sets = instruction_sets(compiler, target, emulation)
    if here:
        sets = {name: wanted for name, wanted in sets.items() if _runs_here(wanted)}
    sources.update(sets)
    present = [f"-DQWEN15_HAS_{Path(name).stem[4:].upper()}" for name in sets]
    sources["dispatch.cpp"] = (*present, "-DQWEN15_EMULATED") if emulation is not None else present
    if emulation is not None:
        flags.append("-O0")  # what is emulated is large: optimising it takes longer than the tests then save
    link: List[str] = ["-shared", "-pthread"]
    if sanitizer:
        flags += ["-O1", "-g", "-fno-omit-frame-pointer", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
        link.append(f"-fsanitize={sanitizer}")
    output_dir = Path(output_dir) if output_dir is not None else OUTPUT_DIR
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=output_dir) as scratch:
        objects = {name: os.path.join(scratch, f"{name}.o") for name in sources}

        def compile_one(name: str) -> None:
            _run([*compiler, *flags, *sources[name], "-c", str(HERE / name), "-o", objects[name]], verbose)

        with ThreadPoolExecutor(max_workers=max(1, min(8, os.cpu_count() or 1))) as pool:
            list(pool.map(compile_one, sorted(sources, reverse=True)))
        made = os.path.join(scratch, LIBRARY_NAME)
        _run([*compiler, *link, *objects.values(), "-o", made], verbose)
        os.chmod(made, 0o755)
        path = output_dir / LIBRARY_NAME
        os.replace(made, path)
    return path


def _runs_here(flags: Sequence[str]) -> bool:
    """Whether this CPU has what these flags of the compiler let it use (-mavx512bf16: avx512_bf16)."""
    told = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    has = {name.replace("_", "") for line in told.splitlines() if line.startswith("flags") for name in line.split()}
    return all("=" in flag or flag[2:].replace("-", "") in has for flag in flags)


def _run(command: Sequence[str], verbose: bool) -> None:
    if verbose:
        print(" ".join(map(shlex.quote, command)), file=sys.stderr)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
    if done.returncode != 0:
        lines = [line for line in done.stdout.splitlines() if "error" in line.lower()] or done.stdout.splitlines()
        first = lines[0] if lines else f"exit code {done.returncode}"
        raise UserError(f"{command[0]} failed: {first}", where="kernels",
                        fix="See the whole output with `python -m qwen15.kernels.build --verbose`.",
                        exit_code=EXIT_FAILED)
    if verbose and done.stdout:
        print(done.stdout, file=sys.stderr, end="")


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m qwen15.kernels.build", description=__doc__)
    parser.add_argument("--output_dir", help=f"where the library goes (default {OUTPUT_DIR})")
    parser.add_argument("--sanitizer", metavar="NAME[,NAME]",
                        help=f"compile with these, for tests: {', '.join(SANITIZERS)}")
    parser.add_argument("--target", metavar="TRIPLE", help="cross-compile, for example aarch64-linux-gnu")
    parser.add_argument("--emulation", metavar="FOLDER",
                        help="for tests: headers in place of the intrinsics beyond AVX2, so that all kernels run here")
    parser.add_argument("--here", action="store_true",
                        help="for tests: leave out the x86 instruction sets that this CPU has not")
    parser.add_argument("--verbose", action="store_true", help="show the compiler's commands and warnings")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(argv)
    print(build(arguments.output_dir, arguments.sanitizer, arguments.target, arguments.verbose,
                arguments.emulation, arguments.here))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
