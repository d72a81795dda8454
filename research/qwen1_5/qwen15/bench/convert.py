"""How fast checkpoints are converted, in how much memory, beside `cp` of the same bytes; a process for each run."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, Callable, Dict, List, NamedTuple, Sequence

import numpy as np

from ..checkpoint.atomic import check_space, disk_bytes
from ..checkpoint.reader import open_checkpoint
from ..command_line import Parser, positive
from ..errors import EXIT_FAILED, UserError
from . import child, hf, options
from .report import Column, Measured, gigabytes, number, text

_SIZE, _LAYERS = "1.8b", 10  # 2.26 GB in bfloat16
_POLL_S = 0.005
_CP, _CP_SYNC, _OURS, _THEIRS = "cp", "cp; sync", "convert_weight, .ckpt", "transformers + mindspore, .ckpt"


class Contender(NamedTuple):
    """One way of making a result.

    Attributes:
        command: target -> the command that makes it.
        reports: the command prints what it took without its imports; the whole process counts if not.
        form: ending of the target's name.
    """

    command: Callable[[str], Sequence[str]]
    reports: bool
    form: str = ""


def parser() -> Parser:
    """The flags."""
    made = Parser("qwen15 bench convert", __doc__ or "", ["qwen15 bench convert --size 1.8b --against hf"])
    options.add_checkpoint(made, _SIZE, _LAYERS)
    made.add_argument("--scratch", metavar="FOLDER",
                      help="where results are written and removed again (default: beside the checkpoint)")
    made.add_argument("--parallel", type=positive, default=4, metavar="N",
                      help="ranks of the slices (default 4)")
    options.add_rounds(made)
    made.add_argument("--against", choices=("hf",),
                      help="hf: also the obvious way, transformers' from_pretrained and mindspore.save_checkpoint")
    return made


def run(args: argparse.Namespace) -> Measured:
    """Measure conversions in both directions, slicing and cutting anew.

    Raises:
        UserError: arguments that cannot be, too little disk, something is not installed, or a process failed.
    """
    if args.checkpoint is not None and args.layers == _LAYERS:
        args.layers = None  # the default is the random checkpoint's
    if args.against:
        hf.check_installed()
    checkpoint = options.find_checkpoint(args)
    nbytes = disk_bytes(checkpoint.path)
    folder = os.path.abspath(args.scratch or os.path.dirname(os.path.abspath(checkpoint.path)))
    check_space(os.path.join(folder, "x"), 3 * nbytes)
    scratch = tempfile.mkdtemp(prefix="qwen15-bench-", dir=folder)
    try:
        rows = _measure(checkpoint.path, nbytes, scratch, args)
    finally:
        shutil.rmtree(scratch)
    facts = {"model": checkpoint.label, "dtype": checkpoint.dtype, "bytes": f"{nbytes / 1e9:.2f} GB",
             "rounds": args.rounds}
    return Measured(facts, COLUMNS, rows)


def _contenders(source: str, converted: str, args: argparse.Namespace) -> Dict[str, Contender]:
    parts = str(args.parallel)

    def ours(module: str, *flags: str) -> Callable[[str], Sequence[str]]:
        return lambda target: [sys.executable, "-m", "qwen15.bench.convert_child", module,
                               *(target if flag == "TARGET" else flag for flag in flags)]

    to_ms = ("--torch_ckpt_dir", source, "--mindspore_ckpt_path", "TARGET")
    cut = ("--model_parallel", parts, "--vocab_emb_dp", "False")  # so that no weight is written twice
    made = {
        _CP: Contender(lambda target: ["cp", "-r", source, target], False),
        _CP_SYNC: Contender(lambda target: ["sh", "-c", 'cp -r "$1" "$2" && sync -f "$2"', "sh", source, target],
                            False),
        _OURS: Contender(ours("convert_weight", *to_ms), True, ".ckpt"),
        "convert_weight, folder": Contender(ours("convert_weight", *to_ms), True),
        f"convert_weight, {parts} slices": Contender(ours("convert_weight", *to_ms, *cut), True),
        f"transform_ckpt, {parts} slices": Contender(
            ours("transform_ckpt", "--src_ckpt_dir", converted, "--dst_ckpt_dir", "TARGET", *cut), True),
        "convert_reversed, folder": Contender(
            ours("convert_reversed", "--mindspore_ckpt_path", converted, "--torch_ckpt_path", "TARGET"), True),
        "convert_reversed, .bin": Contender(
            ours("convert_reversed", "--mindspore_ckpt_path", converted, "--torch_ckpt_path", "TARGET"), True, ".bin"),
    }
    if args.against:
        made[_THEIRS] = Contender(ours("theirs", source, "TARGET"), True, ".ckpt")
    return made


def _measure(source: str, nbytes: int, scratch: str, args: argparse.Namespace) -> List[Dict[str, Any]]:
    """Every contender in turn, after one round that brings the files into the page cache and does not count."""
    converted = os.path.join(scratch, "converted")
    from ..conversion.hugging_face import Output, plan_to_mindspore
    from ..conversion.run import run as carry_out

    plan = plan_to_mindspore(source, Output(converted))
    try:
        carry_out(plan)
    finally:
        plan.close()
    contenders = _contenders(source, converted, args)
    samples: Dict[str, List[Dict[str, float]]] = {name: [] for name in contenders}
    written: Dict[str, int] = {}
    for round_ in range(args.rounds + 1):
        for name, contender in contenders.items():
            folder = os.path.join(scratch, "result")
            target = os.path.join(folder, "x" + contender.form)
            # cp fills the page cache. A virtual machine's host reclaims memory that is unused for a second or two, and
            # getting it back takes longer than the copy. So cp runs twice, and finds memory the first run has used.
            for counts in (True,) if contender.reports else (False, True):
                os.mkdir(folder)
                os.sync()  # no contender pays for writes that another left pending
                sample = _run(name, contender, target)
                if counts and round_ > 0:
                    samples[name].append(sample)
                elif counts:
                    written[name] = disk_bytes(folder)
                    if name == _THEIRS:
                        _compare(converted, target)
                shutil.rmtree(folder)
    rows = []
    for name, taken in samples.items():
        row: Dict[str, Any] = {"who": name, "written_bytes": written[name], "samples": taken,
                               **{key: statistics.median(sample[key] for sample in taken) for key in taken[0]}}
        row["gb_per_s"] = nbytes / 1e9 / row["work_s"]
        for key, other in (("times_cp", _CP), ("times_cp_sync", _CP_SYNC)):
            row[key] = statistics.median(a["work_s"] / b["work_s"] for a, b in zip(taken, samples[other]))
        rows.append(row)
    return rows


def _run(name: str, contender: Contender, target: str) -> Dict[str, float]:
    start_s = time.perf_counter()
    with subprocess.Popen(contender.command(target), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True, env=child.environment()) as process:
        highest_bytes = 0
        while not contender.reports and process.poll() is None:
            highest_bytes = max(highest_bytes, child.peak_bytes(process.pid))
            time.sleep(_POLL_S)
        out, errors = process.communicate()
        whole_s = time.perf_counter() - start_s
    child.check(process.returncode, errors, "the process", name)
    if not contender.reports:
        return {"work_s": whole_s, "imports_s": 0.0, "peak_bytes": highest_bytes}
    said = json.loads(out.strip().splitlines()[-1])
    return {"work_s": said["work_s"], "imports_s": whole_s - said["work_s"], "peak_bytes": said["peak_bytes"]}


def _compare(ours: str, theirs: str) -> None:
    """The obvious way's result holds the same bits as ours: so the two did the same work.

    Raises:
        UserError: it does not.
    """
    with open_checkpoint(ours) as one, open_checkpoint(theirs) as other:
        for name, info in one.infos.items():
            found = other.infos.get(name)
            same = found is not None and (found.dtype, found.shape) == (info.dtype, info.shape) and \
                np.array_equal(one.read(name).view(np.uint8), other.read(name).view(np.uint8))
            if not same:
                raise UserError(f"{name} is another tensor there", theirs, exit_code=EXIT_FAILED)
        surplus = set(other.infos) - set(one.infos)
        if surplus:
            raise UserError(f"holds {min(surplus)} as well", theirs, exit_code=EXIT_FAILED)


COLUMNS = (
    Column("", text("who")), Column("work, s", number("work_s", ".2f")), Column("GB/s", number("gb_per_s", ".2f")),
    Column("x cp", number("times_cp", ".2f")), Column("x cp; sync", number("times_cp_sync", ".2f")),
    Column("start-up and imports, s", number("imports_s", ".2f")),
    Column("written, GB", gigabytes("written_bytes")),
    Column("peak memory, MB", lambda row: f"{row['peak_bytes'] / 1e6:.0f}"),
)
