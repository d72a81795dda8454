#!/usr/bin/env python3
"""A table of how many cycles cores need for 64 bytes of weights at few tokens, computed from the compiled kernels.

    python scripts/kernel_cycles.py [--llvm_mca llvm-mca-19] [--table docs/tables/cycles.md]

For cores that are not at hand: the kernels are compiled (aarch64-linux-gnu-g++, x86_64-linux-gnu-g++) as the library's
build does it, the inner loop of each is cut out of the assembly, and llvm-mca (16 or later, which knows these cores)
says how many cycles one turn of it takes when its data are in the first cache level. Nothing is measured: memory is
compared by arithmetic, with a core's share of the bandwidth.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Dict, List, Mapping, NamedTuple, Sequence

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "research" / "qwen1_5"))

from qwen15.kernels.build import ARM_SOURCES, FLAGS, HERE, X86_SOURCES, find_compiler  # noqa: E402

TOKENS = (1, 2, 4, 8)
WIDE = {2: "1, 8", 4: "3, 8", 8: "2, 4"}
"""Tokens -> the arguments of the tile that meets them, as matmul_wide.h chooses it."""


class Family(NamedTuple):
    """Processors of one instruction set architecture: how they are compiled for, and what their assembly looks like."""

    target: str
    sources: Mapping[str, Sequence[str]]
    jump: str  # pattern of one to a label, which is its only group
    prefetch: str


ARM = Family("aarch64-linux-gnu", ARM_SOURCES,
             r"^\s+(?:b\.?[a-z]*|cbn?z\s+\w+,|tbn?z\s+\w+,\s*#?\w+,)\s*(\.L\d+)$", "prfm")
X86 = Family("x86_64-linux-gnu", X86_SOURCES, r"^\s+j[a-z]+\s+(\.L\d+)$", "prefetch")


class Core(NamedTuple):
    """A core as llvm-mca calls it, and what those of a socket share."""

    family: Family
    name: str
    title: str
    sets: Sequence[str]
    ghz: float
    cores: int
    gigabytes: float  # a second: the socket's memory channels at their peak, a virtual machine's as measured
    most_tokens: int  # that weights meet at once where they are not quantised, see kDotTokens

    @property
    def share(self) -> float:
        """Cycles in which a core's share of the bandwidth brings 64 bytes."""
        return 64 * self.ghz * self.cores / self.gigabytes


CORES = (
    Core(ARM, "tsv110", "Kunpeng 920 (TSV110)", ("neon", "neon_dot"), 2.6, 64, 187.7, 12),
    Core(ARM, "neoverse-n1", "Neoverse N1 (Graviton2)", ("neon", "neon_dot"), 2.5, 64, 204.8, 12),
    Core(ARM, "neoverse-v1", "Neoverse V1 (Graviton3)", ("neon_bf16",), 2.6, 64, 307.2, 12),
    Core(X86, "icelake-server", "Xeon 8380 (Ice Lake)", ("avx512",), 2.3, 40, 204.8, 12),
    Core(X86, "sapphirerapids", "Xeon 8592+ (Emerald Rapids)", ("avx512_bf16",), 1.9, 64, 358.4, 12),
    Core(X86, "sapphirerapids", "Xeon, 16 cores of a virtual machine", ("avx512_bf16",), 3.0, 16, 145.0, 12),
    Core(X86, "znver3", "EPYC 7763 (Zen 3)", ("avx2",), 2.45, 64, 204.8, 6),
    Core(X86, "znver4", "EPYC 9654 (Zen 4)", ("avx512_bf16",), 2.4, 96, 460.8, 12),
)


class Kernel(NamedTuple):
    """A loop over weights: the function that holds it, by part of its demangled name, and the bytes of one turn."""

    title: str
    function: str  # with {n} for the rows of activations and {p} for the places of weights
    source: Dict[str, str]  # instruction set -> the source that has the function
    place_bytes: int  # of weights, of each place in a turn
    rows: int  # of activations for a token


def dot_places(row: str) -> str:
    return f"dot_places<qwen15::(anonymous namespace)::{row}, {{n}}, {{p}}>"


X86_SETS = {name: f"isa_{name}.cpp" for name in ("avx2", "avx512", "avx512_bf16")}
WHOLE = {"neon": "isa_neon.cpp", "neon_bf16": "isa_neon_bf16.cpp", **X86_SETS}
QUANT = {"neon_dot": "isa_neon_dot.cpp", "neon_bf16": "isa_neon_bf16.cpp", **X86_SETS}
KERNELS = (
    Kernel("bf16", dot_places("(PairRow|BF16Row)"), WHOLE, 64, 1),
    Kernel("fp16", dot_places("F16Row"), WHOLE, 64, 1),
    Kernel("int8", "quant_rows<false, 128, {n}, {p}>", QUANT, 128, 1),
    Kernel("int4", "quant_rows<true, 128, {n}, {p}>", QUANT, 64, 1),
)


def assembly(family: Family, source: str, scratch: Path) -> str:
    """A source's assembly."""
    out = scratch / f"{source}.s"
    if not out.exists():
        compiler = find_compiler(family.target)
        subprocess.run([compiler, *FLAGS, *family.sources[source], "-S", str(HERE / source), "-o", str(out)],
                       check=True)
    return out.read_text()


def body(text: str, function: str) -> List[str]:
    """Lines of the function whose demangled name matches."""
    names = re.findall(r"^(_Z[\w.]+):$", text, re.MULTILINE)
    plain = subprocess.run(["c++filt"], input="\n".join(names), stdout=subprocess.PIPE, universal_newlines=True,
                           check=True).stdout.splitlines()
    pattern = re.compile(re.escape(function).replace(r"\(PairRow\|BF16Row\)", "(?:PairRow|BF16Row)"))
    found = [name for name, demangled in zip(names, plain) if pattern.search(demangled)]
    if not found:
        raise SystemExit(f"no function is called {function}")
    lines = text.split(f"\n{found[0]}:\n", 1)[1].splitlines()
    end = next(i for i, line in enumerate(lines) if line.strip().startswith(".size"))
    return lines[:end]


def inner_loop(lines: Sequence[str], family: Family) -> List[str]:
    """Instructions of the longest loop without a loop in it that asks for memory ahead."""
    labels, loops = {}, []
    for i, line in enumerate(lines):
        label = re.match(r"^(\.L\d+):", line)
        if label:
            labels[label.group(1)] = i
        jump = re.match(family.jump, line)
        if jump and jump.group(1) in labels:
            loops.append((labels[jump.group(1)], i))
    inner = [(a, b) for a, b in loops if not any(a <= c and d < b and (c, d) != (a, b) for c, d in loops)]
    code = [[line for line in lines[a:b + 1] if re.match(r"^\s+[a-z]", line)] for a, b in inner]
    asking = [block for block in code if any(family.prefetch in line for line in block)]
    if not asking:
        raise SystemExit("no loop asks for memory ahead")
    return max(asking, key=len)


def cycles(block: Sequence[str], core: Core, mca: str) -> float:
    """Cycles of one turn of a loop, as llvm-mca expects them from 100 turns."""
    # GNU's assembler knows prefetches at offsets that LLVM's does not; they take the same time at none.
    code = "\n".join(re.sub(r"(prfm\s+\w+, \[\w+), #?-?\d+\]", r"\1]", line) for line in block) + "\n"
    done = subprocess.run([mca, "-mtriple", core.family.target, f"-mcpu={core.name}", "-iterations=100"], input=code,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, check=False)
    if done.returncode:
        raise SystemExit(f"{mca} failed: {done.stderr.splitlines()[0]}")
    return int(re.search(r"Total Cycles:\s+(\d+)", done.stdout).group(1)) / 100


class Turn(NamedTuple):
    """What meets so many tokens: a loop's function, the bytes of weights that a turn of it reads, and how often it
    reads them."""

    function: str
    weight_bytes: int
    often: int = 1


def turn_of(kernel: Kernel, tokens: int, core: Core, instructions: str) -> Turn:
    """As matmul_few.h, matmul_wide.h and matmul_quant.h choose it: two places at once, but one where integers meet more
    than four rows of activations."""
    if kernel.title.startswith("int"):
        places = 1 if tokens * kernel.rows > 4 else 2
        return Turn(kernel.function.format(n=tokens, p=places), kernel.place_bytes * places)
    if kernel.title == "bf16" and instructions == "avx512_bf16" and tokens in WIDE:
        return Turn(f"wide_tile<qwen15::(anonymous namespace)::PairTile, 8, {WIDE[tokens]}>", 8 * 64)
    often = -(-tokens // core.most_tokens)
    split = kernel.title == "bf16" and instructions == "avx2" and tokens >= 7
    function = dot_places("SplitRow") if split else kernel.function
    chains = 2 if tokens == 1 else 1
    return Turn(function.format(n=tokens // often, p=2), kernel.place_bytes * 2 * chains, often)


def rows_of(core: Core, mca: str, scratch: Path) -> List[str]:
    out = []
    for name in core.sets:
        for kernel in KERNELS:
            if name not in kernel.source:
                continue
            text, figures = assembly(core.family, kernel.source[name], scratch), []
            for tokens in TOKENS:
                turn = turn_of(kernel, tokens, core, name)
                block = inner_loop(body(text, turn.function), core.family)
                taken = turn.often * cycles(block, core, mca) * 64 / turn.weight_bytes
                figures.append(f"{taken:.1f}" if taken < core.share else f"**{taken:.1f}**")
            out.append(f"| {core.title} | {name} | {kernel.title} | {' | '.join(figures)} | {core.share:.0f} |")
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llvm_mca", default=next(filter(shutil.which, ("llvm-mca-19", "llvm-mca-18", "llvm-mca-16")),
                                                   "llvm-mca"), help="llvm-mca of LLVM 16 or later")
    parser.add_argument("--assembly", type=Path, help="a folder to keep the assembly in, and to take it from")
    parser.add_argument("--table", type=Path, help="write the table into this file, below the line that begins it")
    arguments = parser.parse_args()
    if arguments.table and not arguments.table.is_file():
        parser.error(f"argument --table: {arguments.table} is no file; the table takes the place of one that is there")
    table = ["| core | kernels | weights | " + " | ".join(f"{n} token{'s' * (n > 1)}" for n in TOKENS) + " | memory |",
             "| --- | --- | --- |" + " --- |" * (len(TOKENS) + 1)]
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.assembly or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for core in CORES:
            table += rows_of(core, arguments.llvm_mca, folder)
    text = "\n".join(table) + "\n"
    if arguments.table:
        head = arguments.table.read_text().split("| core |")[0]
        arguments.table.write_text(head + text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
