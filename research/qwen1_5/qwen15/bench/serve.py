"""The server beside the engine alone: many clients, the first token beside a long prompt, a shared beginning."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence

import numpy as np

from ..command_line import Parser, positive
from ..errors import EXIT_FAILED, UserError
from ..generation.scheduler import PIECE_TOKENS
from ..machine import allowed_cpus
from . import child, options, report
from .report import Column, Measured, number, text

PARTS = ("throughput", "first_token", "shared")
_SHARED_TOKENS = 1000


class ClientRequest(NamedTuple):
    """One request: token ids and how many tokens to generate."""

    prompt: List[int]
    new_tokens: int


def parser() -> Parser:
    """The flags."""
    made = Parser("qwen15 bench serve", __doc__ or "",
                  ["qwen15 bench serve --checkpoint models/SmolLM2-135M-Instruct"])
    made.add_argument("--checkpoint", required=True, metavar="FOLDER", help="with its tokenizer's files")
    made.add_argument("--clients", type=positive, default=16, metavar="N", help="at once (default 16)")
    made.add_argument("--requests", type=positive, default=64, metavar="N", help="in all (default 64)")
    made.add_argument("--long", type=positive, default=4096, metavar="N",
                      help="tokens of the long prompt (default 4096)")
    made.add_argument("--dtype", choices=options.DTYPES, default="bfloat16",
                      help="of weights and KV cache (default bfloat16)")
    made.add_argument("--measure", nargs="+", choices=PARTS, default=PARTS, metavar="PART",
                      help=f"what to measure, of {', '.join(PARTS)} (default: all)")
    options.add_run(made, "serve", rounds=3, against=())
    return made


def run(args: argparse.Namespace) -> Measured:
    """Start a server on the checkpoint and measure it.

    Raises:
        UserError: arguments that cannot be, or the server did not start.
    """
    own = options.BenchCheckpoint(args.checkpoint, os.path.basename(os.path.normpath(args.checkpoint)), args.dtype)
    vocab_size = own.config().model.dims.vocab_size
    jobs = _jobs(args.requests, vocab_size)
    longest = -(-max(args.long, _SHARED_TOKENS) // 128) * 128 + 128
    with _server(args.checkpoint, args.dtype, longest, args.clients, args.threads) as port:
        measured = {
            "throughput": lambda: _throughput(own, port, jobs, args.clients, args.rounds, args.threads),
            "first_token": lambda: _first_token(port, args.long, vocab_size, args.rounds),
            "shared": lambda: _shared_beginning(port, vocab_size, args.rounds)}
        parts = [part for part in PARTS if part in args.measure]
        rows = []
        for part in parts:
            print(f"{part}: rounds {args.rounds}", file=sys.stderr)
            rows.append(measured[part]())
    return Measured({"model": own.label, "dtype": args.dtype, "rounds": args.rounds}, COLUMNS, rows,
                    _bars(own, parts, rows))


COLUMNS = (Column("what", text("what")), Column("server", number("server", ".3g")),
           Column("beside", number("beside", ".3g")),
           Column("unit", text("unit")), Column("ratio", number("ratio", ".2f")))


def _jobs(count: int, vocab_size: int) -> List[ClientRequest]:
    """Requests of mixed lengths, the same at every call: 16 to 400 tokens in, 16 to 128 out."""
    random = np.random.default_rng(7)
    return [ClientRequest(random.integers(100, vocab_size, int(random.integers(16, 400))).tolist(),
                          int(random.integers(16, 128))) for _ in range(count)]


@contextmanager
def _server(checkpoint: str, dtype: str, longest: int, batch: int, threads: Optional[int]) -> Iterator[int]:
    """A server in a process of its own; gives its port."""
    model = {"seq_length": longest, "max_decode_length": longest, "block_size": 32, "num_blocks": longest // 32 * batch,
             "param_init_type": dtype, "compute_dtype": dtype}
    command = [sys.executable, "-m", "qwen15", "serve", "--load_checkpoint", os.path.abspath(checkpoint),
               "--device_target", "CPU",
               "--port", "0", "--max_batch", str(batch), *(["--threads", str(threads)] if threads else []),
               "--options", *(f"model.model_config.{key}={value}" for key, value in model.items())]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=child.ROOT)
    try:
        said: List[str] = []
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line.rstrip())
            found = re.search(r"is served at http://[^:]+:(\d+)/", line)
            if found:
                break
        else:
            raise UserError(f"the server did not start: {said[-1] if said else 'it said nothing'}",
                            exit_code=EXIT_FAILED)
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield int(found[1])
    finally:
        process.terminate()
        process.wait()


def _ask(port: int, job: ClientRequest, stream: bool = False) -> float:
    """Run a request; seconds until it was complete, or with `stream` until its first token came."""
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    start_s = time.perf_counter()
    link.request("POST", "/v1/completions", json.dumps({
        "prompt": job.prompt, "max_tokens": job.new_tokens, "min_tokens": job.new_tokens, "temperature": 0,
        "stream": stream,
    }), {"Content-Type": "application/json"})
    answer = link.getresponse()
    if stream:
        answer.readline()
        spent_s = time.perf_counter() - start_s
        answer.read()
    else:
        made = json.loads(answer.read())
        spent_s = time.perf_counter() - start_s
        if answer.status != 200 or made["usage"]["completion_tokens"] != job.new_tokens:
            raise UserError(f"the server answered {answer.status}: {str(made)[:200]}", exit_code=EXIT_FAILED)
    link.close()
    return spent_s


def _throughput(own: options.BenchCheckpoint, port: int, jobs: Sequence[ClientRequest], clients: int, rounds: int,
                threads: Optional[int]) -> Dict[str, Any]:
    """Tokens per second of so many clients, each asking when its last answer has come; beside the engine alone on the
    same."""
    from ..generation.request import Request
    from .ours import Ours

    longest = max(len(job.prompt) + job.new_tokens for job in jobs)
    ours = Ours(own, threads or len(allowed_cpus()), longest, clients)
    ours.engine.scheduler.max_batch = clients
    made = sum(job.new_tokens for job in jobs)
    served: List[float] = []
    alone: List[float] = []
    for _ in range(rounds):
        ours.engine.pool.forget_all()
        start_s = time.perf_counter()
        for _step in ours.engine.generate([Request(tuple(job.prompt), len(job.prompt) + job.new_tokens)
                                           for job in jobs]):
            pass
        alone.append(made / (time.perf_counter() - start_s))
        # Each round's prompts start with a different token, or the server's prefix cache would hold them.
        fresh = [ClientRequest([100 + len(served), *job.prompt[1:]], job.new_tokens) for job in jobs]
        served.append(made / _closed_loop(port, fresh, clients))
    return _row(f"{clients} clients, {len(jobs)} requests; beside: the engine alone", "tokens/s", served, alone)


def _closed_loop(port: int, jobs: Sequence[ClientRequest], clients: int) -> float:
    waiting, failures = list(jobs), []
    lock = threading.Lock()

    def client() -> None:
        try:
            while True:
                with lock:
                    if not waiting:
                        return
                    job = waiting.pop(0)
                _ask(port, job)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    start_s = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return time.perf_counter() - start_s


def _first_token(port: int, long: int, vocab_size: int, rounds: int) -> Dict[str, Any]:
    """Seconds to a short prompt's first token while a long prompt is taken in; beside one piece of such a prompt
    alone."""
    random = np.random.default_rng(11)
    beside: List[float] = []
    piece: List[float] = []
    for _ in range(rounds):
        piece.append(_ask(port, ClientRequest(random.integers(100, vocab_size, PIECE_TOKENS).tolist(), 1)))
        taken_in = ClientRequest(random.integers(100, vocab_size, long).tolist(), 1)
        other = threading.Thread(target=_ask, args=(port, taken_in))
        other.start()
        time.sleep(piece[-1] * 1.5)  # the prompt is being prefilled
        beside.append(_ask(port, ClientRequest(random.integers(100, vocab_size, 8).tolist(), 2), stream=True))
        other.join()
    return _row(f"first token beside a prompt of {long} tokens; beside: {PIECE_TOKENS} tokens alone", "s", beside,
                piece)


def _shared_beginning(port: int, vocab_size: int, rounds: int) -> Dict[str, Any]:
    """Seconds to the first token where the server knows the first 1000 tokens already; beside a prompt that it does
    not."""
    random = np.random.default_rng(13)
    first: List[float] = []
    again: List[float] = []
    for _ in range(rounds):
        shared = random.integers(100, vocab_size, _SHARED_TOKENS).tolist()
        first.append(_ask(port, ClientRequest([*shared, 101, 102], 2), stream=True))
        again.append(_ask(port, ClientRequest([*shared, 103, 104], 2), stream=True))
    return _row(f"first token, {_SHARED_TOKENS} shared tokens known; beside: not known", "s", again, first)


def _row(what: str, unit: str, server: Sequence[float], beside: Sequence[float]) -> Dict[str, Any]:
    """Medians of the server and of what it is held against, which took turns."""
    return {"what": what, "unit": unit, "server": statistics.median(server), "beside": statistics.median(beside),
            "ratio": statistics.median(ours / other for ours, other in zip(server, beside)),
            "samples": {"server": server, "beside": beside}}


def _bars(own: options.BenchCheckpoint, parts: Sequence[str], rows: Sequence[Dict[str, Any]]) -> report.Bars:
    names = dict(zip(PARTS, ("clients : engine", "first token : piece", "known : unknown")))
    return report.Bars(f"Server, {own.label}, {own.dtype}", "ratio", [names[part] for part in parts],
                       {"qwen15": [row["ratio"] for row in rows]}, {})
