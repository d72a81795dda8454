"""How fast each kernel is by itself, without MindSpore and Python, beside what the machine allows."""

from __future__ import annotations

import argparse
import itertools
import time
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence

import numpy as np

from ..command_line import Parser, positive
from ..family import FAMILY
from ..generation.memory import ITEM_BYTES
from ..kernels import library
from ..naming import Dims
from ..network.base import rope_tables
from . import hf, options, report, rounds, work
from .make_checkpoint import DTYPES, dims_of, size
from .operators import Array, Pool, prepare
from .probes import Probes
from .report import Column, Measured, number, text

BLOCK = 32
"""Tokens in a block of the KV cache."""
QUANTISED = {"int8": 8, "int4": 4}
"""Weight dtypes beyond the networks' own, and their bits."""
HEAD_GROUP = 32
_LEAST_POOL_BYTES = 2 ** 28
_LEAST_RUN_S = 0.05


class Case(NamedTuple):
    """One thing to measure.

    Attributes:
        name: the operator, and what it is part of.
        tokens: rows it works on at once (new tokens).
        context: tokens in the KV cache that each of them sees, 0 where there is no cache.
        read_bytes, flop: what it has to read from memory and to compute; 0 for what works in the caches.
        ours: one call after another, each on other weights.
        torch: the same in torch, made when it is asked for; None where there is no counterpart.
    """

    name: str
    tokens: int
    context: int
    read_bytes: float
    flop: float
    ours: Iterator[Callable[[], Any]]
    torch: Optional[Callable[[], Callable[[], Any]]] = None


class Cases:
    """The operators of one model's sizes on random weights.

    Args:
        dims: the sizes.
        dtype: of weights and KV cache; with int8 and int4 weights the cache is bfloat16.
        group: columns that share a scale where weights are quantised.
    """

    def __init__(self, dims: Dims, dtype: str, group: int):
        self.dims, self.bits, self.group = dims, QUANTISED.get(dtype), group
        self.dtype = "bfloat16" if self.bits else dtype
        self.item = ITEM_BYTES[self.dtype]
        self.weight_bytes = self.bits / 8 + 2 / group if self.bits else float(self.item)
        elements = int(work.matrix_elements(dims) * self.weight_bytes / self.item)
        self.pool = Pool(max(elements, _LEAST_POOL_BYTES // self.item), self.dtype)
        self.rng = np.random.default_rng(1)
        self.eps = Array(np.array([1e-6], np.float32))

    def floats(self, *shape: int) -> Array:
        """Activations, biases, norms."""
        return Array(self.rng.standard_normal(shape).astype(np.float32))

    def matrix(self, rows: int, cols: int) -> List[Array]:
        """The next weight (rows, cols), as the operators take it."""
        if self.bits:
            return self.pool.take_quantised(self.bits, self.group, rows, cols)
        return [self.pool.take(rows, cols)]

    def head(self) -> List[Array]:
        """The head, and table: 8 bits where the others have 4, as the converter makes them."""
        if self.bits:
            return self.pool.take_quantised(8, HEAD_GROUP, self.dims.vocab_size, self.dims.hidden_size)
        return self.matrix(self.dims.vocab_size, self.dims.hidden_size)

    def quantised_bytes(self) -> Optional[int]:
        """Bytes of all matrices where they are quantised."""
        if not self.bits:
            return None
        head = self.dims.vocab_size * self.dims.hidden_size
        others = work.matrix_elements(self.dims) - head
        return int(others * self.weight_bytes + head * (1 + 2 / HEAD_GROUP))

    def matmul(self, name: str, operator: str, tokens: int, matrices: Sequence[Sequence[int]]) -> Case:
        """A step that multiplies with matrices of these shapes (O, I)."""
        elements = sum(o * i for o, i in matrices)
        copies = max(1, min(64, int(self.pool.nbytes / (elements * self.weight_bytes))))
        calls = itertools.cycle([self._matmul(operator, tokens, matrices) for _ in range(copies)])
        return Case(name, tokens, 0, elements * self.weight_bytes, 2.0 * tokens * elements, calls,
                    lambda: self._linears(tokens, matrices))

    def _matmul(self, operator: str, tokens: int, matrices: Sequence[Sequence[int]]) -> Callable[[], Any]:
        rows, cols = matrices[0]
        x, parts = self.floats(tokens, cols), [self.matrix(*shape) for shape in matrices]
        weights = [array for matrix in parts for array in matrix]
        if operator == "project_add":
            return prepare(operator, [x, *weights, self.floats(tokens, rows)], (tokens, rows))
        if operator == "gate_up":
            return prepare(operator, [x, self.floats(cols), *weights, self.eps], (tokens, rows))
        if operator == "head":
            return prepare(operator, [x, Array(np.ones(tokens, np.int32)), self.floats(cols), *weights, self.eps],
                           (tokens, rows))
        head_dim, kv_heads = self.dims.head_dim, self.dims.num_kv_heads
        cos, sin = (Array(table) for table in rope_tables(tokens, head_dim, 1e6))
        order = Array(np.arange(tokens, dtype=np.int32))
        caches = [self.pool.take(-(-tokens // BLOCK), BLOCK, kv_heads, head_dim) for _ in range(2)]
        biased = [array for matrix in parts for array in (*matrix, self.floats(matrix[0].memory.shape[0]))]
        return prepare("qkv", [x, self.floats(cols), *biased, cos, sin, order, order, *caches, self.eps],
                       (tokens, rows))

    def _linears(self, tokens: int, matrices: Sequence[Sequence[int]]) -> Callable[[], Any]:
        import torch

        kind = getattr(torch, self.dtype)
        x = torch.randn(tokens, matrices[0][1]).to(kind)
        elements = sum(o * i for o, i in matrices)
        copies = max(1, min(64, _LEAST_POOL_BYTES // (elements * self.item)))
        sets = itertools.cycle([[torch.randn(*shape).to(kind) for shape in matrices] for _ in range(copies)])
        return lambda: [torch.nn.functional.linear(x, w) for w in next(sets)]

    def attention(self, context: int, tokens: int) -> Case:
        """`tokens` new tokens of one sequence that has `context` tokens in the end, over a scattered cache."""
        d = self.dims
        blocks = -(-context // BLOCK)
        copies = max(1, min(24, self.pool.nbytes // (2 * blocks * BLOCK * d.num_kv_heads * d.head_dim * self.item)))

        def one() -> Callable[[], Any]:
            caches = [self.pool.take(blocks, BLOCK, d.num_kv_heads, d.head_dim) for _ in range(2)]
            table = Array(self.rng.permutation(blocks).astype(np.int32)[None])
            lens = [Array(np.array([value], np.int32)) for value in (tokens, context)]
            return prepare("attention", [self.floats(tokens, d.num_heads * d.head_dim), *caches, *lens, table],
                           (tokens, d.num_heads * d.head_dim))

        seen = sum(range(context - tokens + 1, context + 1))  # keys, over all new tokens
        return Case("attention, a layer", tokens, context, 2 * context * d.num_kv_heads * d.head_dim * self.item,
                    4.0 * seen * d.num_heads * d.head_dim, itertools.cycle([one() for _ in range(copies)]),
                    lambda: self._sdpa(context, tokens))

    def _sdpa(self, context: int, tokens: int) -> Callable[[], Any]:
        import torch

        d, kind = self.dims, getattr(torch, self.dtype)
        q = torch.randn(1, d.num_heads, tokens, d.head_dim).to(kind)
        each = 2 * d.num_kv_heads * context * d.head_dim * self.item
        copies = max(1, min(24, _LEAST_POOL_BYTES // each))
        caches = itertools.cycle([[torch.randn(1, d.num_kv_heads, context, d.head_dim).to(kind) for _ in range(2)]
                                  for _ in range(copies)])
        attend = torch.nn.functional.scaled_dot_product_attention
        return lambda: attend(q, *next(caches), is_causal=tokens == context and tokens > 1,
                              enable_gqa=d.num_heads != d.num_kv_heads)

    def stack(self, tokens: int, sequences: int) -> Case:
        """The whole network: `tokens` new tokens of `sequences` sequences that begin with them."""
        d = self.dims
        each = tokens // sequences
        blocks = -(-each // BLOCK) * sequences
        q, kv, e, f = d.num_heads * d.head_dim, d.num_kv_heads * d.head_dim, d.hidden_size, d.intermediate_size
        layers: List[Array] = []
        for _ in range(d.num_layers):
            cache = [Array(np.zeros((blocks, BLOCK, d.num_kv_heads, d.head_dim), self.pool.take(1).memory.dtype),
                           self.dtype) for _ in range(2)]
            layers += [self.floats(e), *self.matrix(q, e), self.floats(q), *self.matrix(kv, e), self.floats(kv),
                       *self.matrix(kv, e), self.floats(kv), *self.matrix(e, q), self.floats(e), *self.matrix(f, e),
                       *self.matrix(f, e), *self.matrix(e, f), *cache]
        head = self.head()
        cos, sin = (Array(table) for table in rope_tables(each, d.head_dim, 1e6))
        place = np.tile(np.arange(each, dtype=np.int32), sequences)
        tables = np.arange(blocks, dtype=np.int32).reshape(sequences, -1)
        slots = np.repeat(tables[:, 0] * BLOCK, each).astype(np.int32) + place  # a sequence's blocks follow one another
        lens = Array(np.full(sequences, each, np.int32))
        ids = Array(self.rng.integers(0, d.vocab_size, tokens).astype(np.int32))
        call = prepare("decoder", [ids, Array(place), Array(slots), lens, lens, Array(tables), self.eps,
                                   Array(np.zeros(1, np.int32)), cos, sin, *head, self.floats(e), *head, *layers],
                       (sequences, d.vocab_size))
        flop = sequences * work.prefill_flop(d, each)
        read = work.decode_bytes(d, self.dtype, sequences, each, self.quantised_bytes())
        return Case("whole network", tokens, each, read, flop, itertools.repeat(call))

    def selection(self) -> List[Case]:
        """Choosing the next token from one row of logits."""
        loaded, vocab = library.load(), self.dims.vocab_size
        row = self.rng.standard_normal(vocab).astype(np.float32) * 3
        searches = {"argmax": lambda: loaded.argmax(row[None]), "50 largest": lambda: loaded.top_candidates(row, 50),
                    "nucleus of 0.8": lambda: loaded.nucleus(row, 0.7, 0.8)}
        return [Case(f"{name} of {vocab}", 1, 0, 0, 0, itertools.repeat(search)) for name, search in searches.items()]


def parser() -> Parser:
    """The flags."""
    made = Parser("qwen15 bench kernels", __doc__ or "", ["qwen15 bench kernels --size 7b --tokens 1 512"])
    made.add_argument("--size", type=size, default="0.5b",
                      help=f"whose shapes: one of {', '.join(FAMILY)} (default 0.5b)")
    made.add_argument("--layers", type=positive, metavar="N",
                      help="another number of layers than the published one")
    made.add_argument("--dtype", choices=(*DTYPES, *QUANTISED), default="bfloat16",
                      help="of weights and KV cache (default bfloat16); in int8 and int4 the cache is bfloat16, table "
                           "and head have 8 bits, and activations are those of computing in bfloat16")
    made.add_argument("--group_size", type=positive, default=128, metavar="N",
                      help="columns that share a scale in int8 and int4 (default 128)")
    made.add_argument("--tokens", type=positive, nargs="+", default=[1, 8, 16, 32, 512], metavar="T",
                      help="rows at once (default 1 8 16 32 512); those above 64 are a prompt")
    made.add_argument("--context", type=positive, nargs="+", default=[512, 4096, 16384], metavar="N",
                      help="tokens in the cache for attention in decode (default 512 4096 16384)")
    options.add_run(made, "kernels", 7)
    return made


def run(args: argparse.Namespace) -> Measured:
    """Measure every operator.

    Raises:
        UserError: arguments that cannot be, or something is not installed.
    """
    if args.against:
        hf.check_installed()
    machine = Probes(args.threads)
    dims = dims_of(args.size, args.layers)
    cases = Cases(dims, args.dtype, args.group_size)
    library.load().exact_activations = args.dtype not in QUANTISED
    rows = [_measure(case, machine, args) for case in _all(cases, args.tokens, args.context)]
    facts = {**machine.facts(f"shapes of Qwen1.5-{args.size.upper()}", args.dtype, args.rounds),
             "against": _torch_note() if args.against else None}
    return Measured(facts, COLUMNS, rows, _bars(args, rows))


def _all(cases: Cases, tokens: Sequence[int], contexts: Sequence[int]) -> Iterator[Case]:
    d = cases.dims
    q, kv, e, f = d.num_heads * d.head_dim, d.num_kv_heads * d.head_dim, d.hidden_size, d.intermediate_size
    for count in tokens:
        yield cases.matmul("qkv", "qkv", count, ((q, e), (kv, e), (kv, e)))
        yield cases.matmul("output projection", "project_add", count, ((e, q),))
        yield cases.matmul("gate and up", "gate_up", count, ((f, e), (f, e)))
        yield cases.matmul("down", "project_add", count, ((e, f),))
        if count <= 64:
            yield cases.matmul("head", "head", count, ((d.vocab_size, e),))
            yield cases.stack(count, count)
        else:
            yield cases.attention(count, count)
            yield cases.stack(count, 1)
    for context in contexts:
        yield cases.attention(context, 1)
    yield from cases.selection()


def _measure(case: Case, machine: Probes, args: argparse.Namespace) -> Dict[str, Any]:
    contenders = {"qwen15": repeated(lambda: next(case.ours)())}
    if args.against and case.torch is not None:
        import torch

        torch.set_num_threads(machine.threads)
        contenders["torch"] = repeated(case.torch())
    multiplied = "float32" if args.dtype in QUANTISED else args.dtype
    samples = rounds.interleave(contenders, args.rounds, lambda: machine.limits(multiplied))
    mine = samples["qwen15"]
    row = {"operator": case.name, "tokens": case.tokens, "context": case.context or None,
           "us": rounds.median_seconds(mine) * 1e6, "samples": rounds.as_json(samples)}
    if case.flop:
        row.update(read_bytes=case.read_bytes, flop=case.flop, **rounds.limits(mine, case.read_bytes, case.flop))
    if "torch" in samples:
        row.update(torch_us=rounds.median_seconds(samples["torch"]) * 1e6,
                   ratio_torch=rounds.ratio(mine, samples["torch"]))
    return row


def repeated(call: Callable[[], Any]) -> Callable[[], rounds.Timing]:
    """Runs of so many calls that the clock does not matter; gives seconds a call."""
    call()
    start_s = time.perf_counter()
    call()
    once_s = time.perf_counter() - start_s
    count = max(1, int(_LEAST_RUN_S / max(once_s, 1e-7)))

    def run() -> rounds.Timing:
        start_s = time.perf_counter()
        for _ in range(count):
            call()
        return rounds.Timing((time.perf_counter() - start_s) / count)

    return run


def _torch_note() -> str:
    import torch

    return f"torch {torch.__version__}"


COLUMNS = (
    Column("operator", text("operator")), Column("tokens", text("tokens")), Column("context", text("context")),
    Column("us", number("us")), *report.LIMITS,
    Column("torch, us", number("torch_us")), Column("times torch", number("ratio_torch", ".2f")),
)


def _bars(args: argparse.Namespace, rows: Sequence[Mapping[str, Any]]) -> report.Bars:
    shown = [row for row in rows if row["operator"] == "whole network" or "attention" in row["operator"]]
    labels = [f"{row['operator'].replace(', a layer', '')}\n{row['tokens']} new" + (f"\nof {row['context']}"
                                                                                    if row["context"] else "")
              for row in shown]
    return report.Bars(f"Kernels, shapes of Qwen1.5-{args.size.upper()}, {args.dtype}",
                       "part of what bandwidth and peak allow", labels, {"qwen15": [row["of_both"] for row in shown]})
