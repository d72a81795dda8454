"""Check the Ascend path on a card in about a minute and print a report to send back: `python -m qwen15 ascend-check`.

Every fused operator of the network is run and compared with its plain definition (ascend_operators.py), then MindFormers' whole
network with a small random model: prefill of a ragged batch and decode over scattered cache blocks, in bfloat16 and float16.
Started by a launcher on several cards, it checks the network cut over them. Exit code: 0 all passed, 1 something failed, 2 no card.
"""

import json
import os
import platform
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np

from .. import device
from ..command_line import Parser, whole
from ..config.load import load_config
from ..errors import EXIT_FAILED, EXIT_OK, UserError
from ..network import weights
from ..network.base import rope_tables
from ..network.mindformers import MindFormersNetwork, stdout_to_stderr
from . import model
from . import operators as plain

DTYPES = ("bfloat16", "float16")
OPERATOR_LIMIT = {"bfloat16": 2e-2, "float16": 3e-3, "float32": 1e-5}
NETWORK_LIMIT = {"bfloat16": 5e-2, "float16": 1e-2, "float32": 1e-4}
"""Largest error allowed, as a fraction of the largest value: a few units in the last place of the dtype (2^-8, 2^-11), grown over
two layers for the network. A wrong operator is wrong by tenths."""

Pair = Tuple[str, np.ndarray, np.ndarray]

PROMPT_TOKENS = (1, 37, 16, 80)
DECODE_STEPS = 8


@dataclass(frozen=True)
class Result:
    """One comparison: the largest error as a fraction of the largest value, and the limit."""

    name: str
    dtype: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        """Within the limit; NaN is not."""
        return bool(self.error <= self.limit)

    def __str__(self) -> str:
        return f"  {self.name:<34} {self.dtype:<9} error {self.error:8.1e}  limit {self.limit:7.1e}  {'ok' if self.passed else 'FAILED'}"


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """max |ours - theirs| / max |theirs|; infinity where a value is not finite or the shapes differ."""
    if ours.shape != theirs.shape or not np.isfinite(ours).all():
        return float("inf")
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def check_operators(dtype: str, prepare: Callable[[Any], Any] = lambda cell: None) -> List[Result]:
    """Run each fused operator on the device and compare it with its plain definition.

    Args:
        dtype: of the activations.
        prepare: called with each cell before it runs.
    """
    operators = _Operators(dtype, prepare)
    pairs = (*operators.pointwise(), *operators.rotary(), *operators.flash_attention(), *operators.cache())
    return [Result(name, dtype, relative_error(ours, theirs), OPERATOR_LIMIT[dtype]) for name, ours, theirs in pairs]


class _Operators:
    """The operators as MindFormers' network calls them, on random values; methods yield (name, device's result, plain result)."""

    HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE, EPS = 4, 2, 128, 16, 1e-6

    def __init__(self, dtype: str, prepare: Callable[[Any], Any]):
        import mindspore as ms

        self._ms, self._kind, self._prepare = ms, getattr(ms, dtype), prepare
        self._random = np.random.default_rng(1)
        self._lengths = np.asarray(PROMPT_TOKENS, np.int32)
        tokens, batch = int(self._lengths.sum()), len(self._lengths)
        self._scale = self.HEAD_DIM ** -0.5
        # What MindFormers marks masked positions with, by dtype.
        self._mask = plain.causal_mask(1.0 if dtype == "bfloat16" else -10000.0)
        width, kv_width = self.HEADS * self.HEAD_DIM, self.KV_HEADS * self.HEAD_DIM
        self._q, self._k, self._v = (self._normal(1, tokens, size) for size in (width, kv_width, kv_width))
        self._new_q, self._new_k = self._normal(batch, 1, width), self._normal(batch, 1, kv_width)

    def _tensor(self, array: np.ndarray):
        return self._ms.Tensor(np.ascontiguousarray(array)).astype(self._kind)

    def _array(self, tensor) -> np.ndarray:
        return tensor.astype(self._ms.float32).asnumpy()

    def _normal(self, *shape: int) -> np.ndarray:
        """Random float32 values that the dtype holds exactly."""
        return self._array(self._tensor(self._random.normal(size=shape).astype(np.float32)))

    def _run(self, primitive, *inputs):
        """The primitive's outputs, run as a graph of its own."""
        from mindspore import nn

        class Operator(nn.Cell):
            def __init__(self):
                super().__init__()
                self.operator = primitive

            def construct(self, *inputs):
                return self.operator(*inputs)

        cell = Operator()
        self._prepare(cell)
        return cell(*inputs)

    def pointwise(self) -> Iterator[Pair]:
        """RmsNorm, which MindFormers computes in float32, and SiLU."""
        from mindspore.ops import operations as P

        x, gamma = self._q[0], self._random.uniform(0.5, 1.5, self._q.shape[-1]).astype(np.float32)
        normed, _ = self._run(P.RmsNorm(self.EPS), self._ms.Tensor(x), self._ms.Tensor(gamma))
        yield "RmsNorm", self._array(normed), plain.rms_norm(x, gamma, self.EPS)
        yield "SiLU", self._array(self._run(P._inner_ops.SiLU(), self._tensor(x))), plain.silu(x)

    def rotary(self) -> Iterator[Pair]:
        """ApplyRotaryPosEmb: prefill looks positions up in the whole table, decode is given each sequence's row."""
        from mindspore import ops

        cos, sin = (self._array(self._tensor(table)) for table in
                    rope_tables(model.SEQ_LENGTH, self.HEAD_DIM, model.THETA))
        last = self._lengths - 1
        for phase, inputs in (("prefill", (self._q, self._k, cos, sin)), ("decode", (self._new_q, self._new_k, cos[last], sin[last]))):
            turned = self._run(ops.ApplyRotaryPosEmb(2), *map(self._tensor, inputs), self._ms.Tensor(self._lengths))
            for name, ours, theirs in zip("qk", turned, plain.apply_rotary_pos_emb(*inputs, self._lengths)):
                yield f"ApplyRotaryPosEmb {phase} {name}", self._array(ours), theirs

    def flash_attention(self) -> Iterator[Pair]:
        """FlashAttentionScore over prompts of different lengths, one after another."""
        from mindspore.ops.operations.nn_ops import FlashAttentionScore

        attention = FlashAttentionScore(head_num=self.HEADS, keep_prob=1.0, scale_value=self._scale, pre_tokens=2147483647,
                                        next_tokens=0, inner_precise=0, input_layout="TH", sparse_mode=0)
        inputs, lengths = (self._q[0], self._k[0], self._v[0]), self._ms.Tensor(self._lengths)
        ours = self._run(attention, *map(self._tensor, inputs), None, None, None, self._tensor(self._mask), None, lengths, lengths)[3]
        yield "FlashAttentionScore", self._array(ours), plain.flash_attention(
            *inputs, self._mask, self._lengths, self._lengths, self.HEADS, self._scale)

    def cache(self) -> Iterator[Pair]:
        """ReshapeAndCache into scattered blocks, then PagedAttention over them."""
        from mindspore import Parameter, nn, ops

        tables, slots = _scattered(self._lengths, self.BLOCK_SIZE)
        cache = self._normal(int(tables.max()) + 2, self.BLOCK_SIZE, self.KV_HEADS, self.HEAD_DIM)

        class Caching(nn.Cell):
            def __init__(self, key_cache, value_cache):
                super().__init__()
                self.key_cache = Parameter(key_cache, name="key_cache", requires_grad=False)
                self.value_cache = Parameter(value_cache, name="value_cache", requires_grad=False)
                self.operator = ops.auto_generate.ReshapeAndCache()

            def construct(self, key, value, slots):
                return self.operator(key, value, self.key_cache, self.value_cache, slots)

        cell = Caching(self._tensor(cache), self._tensor(cache))
        self._prepare(cell)
        cell(self._tensor(self._k), self._tensor(self._v), self._ms.Tensor(slots))
        expected = [cache.copy(), cache.copy()]
        plain.reshape_and_cache(self._k, self._v, *expected, slots)
        for name, ours, theirs in zip(("key", "value"), (cell.key_cache, cell.value_cache), expected):
            yield f"ReshapeAndCache {name}", self._array(ours), theirs

        paged = ops.auto_generate.PagedAttention(self.HEADS, self._scale, self.KV_HEADS)
        ours = self._run(paged, self._tensor(self._new_q), *map(self._tensor, expected), self._ms.Tensor(tables),
                         self._ms.Tensor(self._lengths))
        yield "PagedAttention", self._array(ours), plain.paged_attention(
            self._new_q, *expected, tables, self._lengths, self.HEADS, self.KV_HEADS, self._scale)


def _scattered(lengths: np.ndarray, block_size: int):
    """Block tables (B, M) whose blocks are neither in order nor neighbours, padded with -1, and the slots of all tokens (T,)."""
    needed = [-(-int(length) // block_size) for length in lengths]
    blocks = iter(np.random.default_rng(2).permutation(2 * sum(needed)))
    tables = np.full((len(lengths), model.SEQ_LENGTH // block_size), -1, np.int32)
    slots = []
    for row, (length, count) in enumerate(zip(lengths, needed)):
        tables[row, :count] = [next(blocks) for _ in range(count)]
        positions = np.arange(length)
        slots.append(tables[row, positions // block_size] * block_size + positions % block_size)
    return tables, np.concatenate(slots).astype(np.int32)


def check_network(folder: str, dtype: str, ranks: int = 1, vocab_emb_dp: bool = True, tied: bool = False,
                  device_target: str = device.ASCEND, options: Sequence[str] = (),
                  prepare: Callable[[Any], Any] = lambda cell: None) -> Dict[str, Any]:
    """Compare MindFormers' network with the plain forward pass: prefill of a ragged batch, then decode, twice over one cache.

    Args:
        folder: scratch, for the random model.
        dtype: of weights, activations and KV cache.
        ranks, vocab_emb_dp, tied: what is cut and how.
        device_target, options: passed to the configuration.
        prepare: called with MindFormers' network before it runs.

    Returns:
        results: of `Result`.
        times: seconds of loading, first and later calls.
        weights: the account.
    """
    sizes = model.dims(ranks, tied)
    tensors = model.random_weights(sizes)
    yaml_path = model.save(folder, sizes, tensors, ranks, vocab_emb_dp, dtype, device_target)
    config = load_config(yaml_path, options=options)
    told: List[str] = []
    start_s = time.perf_counter()
    network = MindFormersNetwork(config, weights.resolve(config.load_checkpoint), told.append)
    times = {"load_s": time.perf_counter() - start_s}
    prepare(network.cell)
    judge = model.rounded(tensors, dtype)
    name = f"network, {ranks} card(s)" + (", tied" if tied else "") + ("" if vocab_emb_dp else ", vocabulary cut")
    results = []
    for turn in (1, 2):
        errors = _generate(network, sizes, judge, turn, times)
        results += [Result(f"{name}: {phase} {turn}", dtype, error, NETWORK_LIMIT[dtype]) for phase, error in errors.items()]
    return {"results": results, "times": times, "weights": told[-1]}


def _generate(network, sizes, judge: Dict[str, np.ndarray], turn: int, times: Dict[str, float]) -> Dict[str, float]:
    """Largest error of the prefill and of all decode steps; the tokens that follow are random, so both sides see the same."""
    random = np.random.default_rng(turn)
    sequences = [random.integers(0, sizes.vocab_size, length + DECODE_STEPS).astype(np.int32) for length in PROMPT_TOKENS]
    expected = [model.logits(sizes, judge, ids) for ids in sequences]
    first = np.asarray(PROMPT_TOKENS, np.int32)
    block_size = model.BLOCK_SIZE
    tables, _ = _scattered(first + DECODE_STEPS, block_size)

    def slots(row: int, start: int, stop: int) -> np.ndarray:
        positions = np.arange(start, stop)
        return tables[row, positions // block_size] * block_size + positions % block_size

    start_s = time.perf_counter()
    ours = network.prefill(np.concatenate([ids[:length] for ids, length in zip(sequences, first)]), first, first, tables,
                           np.concatenate([slots(row, 0, length) for row, length in enumerate(first)]).astype(np.int32))
    times[f"prefill_{turn}_s"] = time.perf_counter() - start_s
    errors = {"prefill": relative_error(ours, np.stack([rows[length - 1] for rows, length in zip(expected, first)])), "decode": 0.0}
    spent = []
    for step in range(DECODE_STEPS):
        lengths = first + step + 1
        start_s = time.perf_counter()
        ours = network.decode(np.stack([ids[length - 1] for ids, length in zip(sequences, lengths)]), lengths, tables,
                              np.concatenate([slots(row, length - 1, length) for row, length in enumerate(lengths)]).astype(np.int32))
        spent.append(time.perf_counter() - start_s)
        theirs = np.stack([rows[length - 1] for rows, length in zip(expected, lengths)])
        errors["decode"] = max(errors["decode"], relative_error(ours, theirs))
    if turn == 1:
        times["decode_first_s"] = spent[0]
    times[f"decode_{turn}_median_s"] = float(np.median(spent[1:]))
    return errors


def environment() -> Dict[str, str]:
    """Versions of everything below us."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in ("mindspore", "mindformers", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    ascend = device.find_ascend()
    found["cards"] = str(len(ascend.cards))
    found["cann"] = f"{ascend.cann or 'not found'} {_version_in(ascend.cann)}".strip()
    found["driver"] = _version_in("/usr/local/Ascend/driver") or "not found"
    output, why_not = device.npu_smi()
    found["npu-smi"] = (output or why_not).strip()
    return found


def _version_in(folder: Optional[str]) -> str:
    for name in ("version.info", "version.cfg", "opp/version.info", "compiler/version.info"):
        path = os.path.join(folder or "", name)
        if folder and os.path.isfile(path):
            with open(path, encoding="utf-8", errors="replace") as file:
                line = next((line for line in file if "version" in line.lower() and "=" in line), "")
            return line.strip()
    return ""


def parser() -> Parser:
    """The flags."""
    made = Parser("qwen15 ascend-check", "Check the Ascend path on a card in about a minute and print a report.",
                  ["qwen15 ascend-check", "scripts/msrun_launcher.sh \"qwen15 ascend-check\" 2"])
    made.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="activations and weights (default: both)")
    made.add_argument("--device_id", type=whole, metavar="N", help="the card (default: DEVICE_ID, or 0)")
    made.add_argument("--debug", action="store_true", help="show tracebacks")
    return made


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Command line."""
    args = parser().parse_args(argv)
    missing = device.find_ascend().missing
    if missing:
        raise UserError(f"nothing to check: this machine has {missing}", fix="Run it on a machine with an Ascend 910B card.")
    ranks = int(os.environ.get("MS_WORKER_NUM") or os.environ.get("RANK_SIZE") or 1)
    rank = int(os.environ.get("RANK_ID") or 0)
    if args.device_id is not None:
        os.environ["DEVICE_ID"] = str(args.device_id)
    report: Dict[str, Any] = {"environment": environment(), "ranks": ranks, "networks": [], "failures": []}
    results: List[Result] = []
    for dtype in args.dtype:
        for vocab_emb_dp, tied in ((True, False), (True, True)) if ranks == 1 else ((True, False), (False, False)):
            what = f"network {dtype}, vocab_emb_dp {vocab_emb_dp}, tied {tied}"
            print(f"{what} ...", file=sys.stderr)
            with tempfile.TemporaryDirectory() as folder:
                found = _attempt(report, what, check_network, folder, dtype, ranks, vocab_emb_dp, tied)
            if found:
                results += found.pop("results")
                report["networks"].append({"what": what, **found})
    if ranks == 1:  # the context is set up by now
        for dtype in args.dtype:
            print(f"operators {dtype} ...", file=sys.stderr)
            with stdout_to_stderr():
                results += _attempt(report, f"operators {dtype}", check_operators, dtype) or []
    if rank == 0:
        _print_report(report, results)
    return EXIT_OK if all(result.passed for result in results) and not report["failures"] else EXIT_FAILED


def _attempt(report: Dict[str, Any], what: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result; when it raises, None, and the error goes into the report: the other checks still run."""
    try:
        return function(*arguments)
    except Exception as error:
        text = f"{what}: {type(error).__name__}: {error}"
        report["failures"].append(text)
        print(f"error: {text}", file=sys.stderr)
        return None


def _print_report(report: Dict[str, Any], results: Sequence[Result]) -> None:
    print("Ascend check of qwen15: send everything from here on back")
    for name, value in report["environment"].items():
        print(f"  {name}: " + value.replace("\n", "\n    "))
    print("results (error = largest difference / largest value)")
    for result in results:
        print(result)
    for network in report["networks"]:
        times = ", ".join(f"{name[:-2]} {value * 1e3:.1f} ms" for name, value in network["times"].items())
        print(f"  {network['what']}: {network['weights']}; {times}")
    for failure in report["failures"]:
        print(f"  FAILED {failure}")
    passed = sum(result.passed for result in results)
    print(f"{passed} of {len(results)} comparisons passed, {len(report['failures'])} checks could not run")
    report["results"] = [asdict(result) for result in results]
    print(json.dumps(report))
