"""Bytes per card for every model of the family, and one configuration compared with this machine: `qwen15 memory`."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Optional, Sequence

from .. import device, naming
from ..command_line import Parser
from ..config.describe import describe
from ..config.flags import add_flags, flags_from
from ..config.load import load_config
from ..config.schema import Config
from ..errors import UserError
from ..family import FAMILY, yaml_name
from ..generation.memory import gib, need
from ..generation.memory_check import check
from .markdown_part import update

RANKS = (1, 2, 4, 8)
NAME = "qwen15 memory"
"""What the markers around the tables in docs/tables/memory.md are called."""


def table(folder: str) -> str:
    """Bytes per card for every size on 1, 2, 4 and 8 cards, with the settings of the YAML files in `folder`."""
    lines = ["| Qwen1.5 | model_parallel | weights | KV cache | bytes a token | workspace | total "
             "| max_device_memory |", "|---|---|---|---|---|---|---|---|"]
    for size, dims in FAMILY.items():
        config = _shipped(folder, size)
        for ranks in RANKS:
            why = naming.indivisible(dims, ranks)
            if why:
                lines.append(f"| {size} | {ranks} | | | | | | {why.split(' (')[0]} |")
                continue
            parallel = replace(config.parallel, use_parallel=ranks > 1, model_parallel=ranks)
            wanted = need(config.model, parallel, device.ASCEND)
            limit = config.max_device_memory_bytes or 0
            fits = f"{wanted.total_bytes / limit:.0%} of" if wanted.total_bytes <= limit else "does not fit into"
            shipped = " *" if ranks == config.parallel.model_parallel else ""
            tokens = config.model.block_size * config.model.num_blocks
            lines.append(f"| {size} | {ranks}{shipped} | {gib(wanted.weight_bytes)} | {gib(wanted.cache_bytes)} | "
                         f"{wanted.cache_bytes // tokens} | {gib(wanted.other_bytes)} | "
                         f"{gib(wanted.total_bytes)} | {fits} {gib(limit)} |")
    return "\n".join(lines)


def cpu_table(folder: str) -> str:
    """Bytes of one CPU process for every size: weights as stored (bfloat16) or float32, with the YAML's KV cache."""
    lines = ["| Qwen1.5 | KV cache tokens | bfloat16 | float32 weights and cache |", "|---|---|---|---|"]
    for size in FAMILY:
        config = _shipped(folder, size)
        alone = replace(config.parallel, use_parallel=False, model_parallel=1)
        exact = replace(config.model, param_init_type="float32", compute_dtype="float32")
        lines.append(f"| {size} | {config.model.block_size * config.model.num_blocks} | "
                     f"{gib(need(config.model, alone, device.CPU).total_bytes)} | "
                     f"{gib(need(exact, alone, device.CPU).total_bytes)} |")
    return "\n".join(lines)


def document_part(folder: str) -> str:
    """Both tables, as they stand in docs/tables/memory.md."""
    return f"{table(folder)}\n\n{cpu_table(folder)}"


def _shipped(folder: str, size: str) -> Config:
    # The table describes the files, whatever launcher this command runs under.
    return load_config(os.path.join(folder, yaml_name(size)), environ={})


def parser() -> Parser:
    """The flags."""
    made = Parser("qwen15 memory", (
        "Memory that a run needs on each card, without loading anything: a table of the shipped YAML files, or with "
        "--config or --load_checkpoint one configuration compared with this machine."),
        ["qwen15 memory", "qwen15 memory --config predict_qwen1_5_7b.yaml --seq_length 4096",
         "qwen15 memory --load_checkpoint models/Qwen1.5-0.5B-Chat"])
    add_flags(made)
    made.add_argument("--update", metavar="FILE", help="write the table between the markers of this Markdown file")
    return made


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Command line: the table, or the need of one configuration."""
    here = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    args = parser().parse_args(argv)
    flags = flags_from(args)
    if args.config or any(flag.key == "load_checkpoint" for flag in flags):
        config = load_config(args.config, flags, args.options)
        print(describe(config) if args.print_config else check(config))
        return 0
    if flags or args.options or args.print_config:
        name = flags[0].name if flags else "--options" if args.options else "--print_config"
        raise UserError("is about one configuration, and none is given", name,
                        "Give --config or --load_checkpoint as well.")
    if args.update:
        update(args.update, NAME, document_part(here))
    else:
        print(document_part(here))
    return 0
