"""Prompts continued without anybody typing: from the command line or a file, to stdout or a file."""

from __future__ import annotations

import sys
import time
from typing import List, Optional, Sequence, Tuple, Union

from ..config.schema import Config
from ..errors import EXIT_INTERRUPTED, EXIT_OK, UserError
from ..generation import memory_check
from ..generation.ranks import Shared
from ..generation.request import Usage
from ..generation.session import Session, Settings
from ..reporting import Reporter
from .batch_progress import BatchProgress
from .options import PredictOptions
from .prompt_file import read_file
from .prompts import PromptEntry, Todo, encode, from_json, of_texts, point_out, to_json
from .result_file import ResultFile, fingerprint
from .results import JsonLines, Text, summary, write_line

DEFAULT_MAX_BATCH = 16


def run(config: Config, settings: Settings, options: PredictOptions, report: Reporter) -> int:
    """Continue every prompt of --predict_data or --predict_file into stdout or --output_file; returns the exit code.

    Raises:
        UserError: a prompt that cannot be used, an output file that holds something else, or the work failed.
    """
    if options.ray is not None and config.parallel.model_parallel > 1:
        raise UserError("a worker of a Ray cluster is one process and has the whole model", where="--ray",
                        fix="Pass --use_parallel False.")
    session = Session.prepare(config, launched=not options.dry_run)
    todo: Todo = []
    out: Optional[ResultFile] = None
    if session.rank == 0:
        # Only rank 0 reads and writes files: stdin and the output exist once.
        entries = list(_entries(config, settings, options))
        prompts = encode(session, entries, options.control_tokens)
        point_out(session, entries, prompts, report)
        if options.dry_run:
            from . import dry_run

            print(dry_run.describe(session, prompts))
            return EXIT_OK
        session.requests(prompts)  # every one is refused now, not after hours of work
        todo = list(zip(entries, prompts))
        if options.output_file:
            out, todo = _continued(session, todo, options.output_file, report)
    try:
        if session.rank == 0 and not todo:
            report.info("nothing is left to do")
            if config.parallel.model_parallel == 1:
                return EXIT_OK
        if options.ray is not None:
            from . import ray_batch

            return ray_batch.run(config, todo, out, options, options.max_batch or DEFAULT_MAX_BATCH, report)
        session.open(report.info, options.max_batch or (DEFAULT_MAX_BATCH if options.many else None))
        return _work(session, todo, out, options, report)
    except KeyboardInterrupt:
        if out is not None:
            report.error(f"interrupted: {len(out.done)} of {len(out.keys)} results are in {out.path}; the same command "
                         f"continues")
            return EXIT_INTERRUPTED
        raise
    finally:
        if out is not None:
            out.close()


def _entries(config: Config, settings: Settings, options: PredictOptions) -> Sequence[PromptEntry]:
    if options.file is not None:
        return list(read_file(options.file, settings, options.chat, options.system))
    texts = list(options.texts)
    if len(texts) == 1 and not options.output_file:
        if config.model.batch_size > 1:
            memory_check.check(config)  # refused before that many prompts are built
        texts *= config.model.batch_size  # the original's --batch_size: one prompt, that many times side by side
    return list(of_texts(texts, settings, options.chat, options.system))


def _continued(session: Session, todo: Todo, path: str, report: Reporter) -> Tuple[ResultFile, Todo]:
    """The file of results, and what it lacks."""
    out = ResultFile(path, [fingerprint(session, entry, prompt) for entry, prompt in todo])
    left = [pair for pair in todo if pair[0].index not in out.done]
    if out.done:
        report.info(f"{path}: {len(out.done)} of {len(todo)} results are there, {len(left)} to go")
    return out, left


def _work(session: Session, todo: Todo, out: Optional[ResultFile], options: PredictOptions, report: Reporter) -> int:
    assert session.engine is not None
    told = Shared(session.engine.network).same(to_json([prompt for _, prompt in todo]) if session.rank == 0 else None)
    prompts = [prompt for _, prompt in todo] if session.rank == 0 else from_json(told)
    if not prompts:
        return EXIT_OK
    writer = _writer([entry for entry, _ in todo], out, options) if session.rank == 0 else None
    progress = BatchProgress(len(prompts), sys.stderr, options.many and report.shows("info"))
    usages: List[Usage] = []
    start_s = time.perf_counter()
    try:
        for piece in session.run(prompts):
            progress.take(piece)
            if piece.usage is not None:
                usages.append(piece.usage)
            if writer is not None:
                writer.take(piece)
    finally:
        if writer is not None:
            writer.close()
    report.info(progress.finish() if options.many else summary(usages, time.perf_counter() - start_s))
    return EXIT_OK


def _writer(entries: Sequence[PromptEntry], out: Optional[ResultFile], options: PredictOptions
            ) -> Union[JsonLines, Text]:
    if options.output_format == "text":
        return Text(sys.stdout, [_asked(entry) if options.echoes else "" for entry in entries],
                    [entry.settings.n for entry in entries])
    if out is not None:
        return JsonLines(entries, out.write, in_order=False)
    return JsonLines(entries, lambda _, value: write_line(sys.stdout, value), in_order=not options.many)


def _asked(entry: PromptEntry) -> str:
    return entry.source if isinstance(entry.source, str) else entry.source[-1]["content"]
