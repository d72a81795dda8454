"""Check the Ascend path on a card in about a minute and print a report to send back: `qwen15 ascend-check`.

MindFormers' whole network with a small random model is compared with its plain definition: prefill of a ragged batch
and decode over scattered cache blocks, in bfloat16 and float16; then each contract of the fused operators
(contracts.py). Started by a launcher on several cards, it checks the network cut over them. Exit code: 0 all passed,
1 something failed, 2 no card.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
import time
from argparse import Namespace
from dataclasses import asdict, dataclass
from typing import Any, Callable, Dict, List, Optional, Sequence

import numpy as np

from .. import device
from ..command_line import Parser, whole
from ..config.load import load_config
from ..errors import EXIT_FAILED, EXIT_OK, UserError
from ..installed import version_of
from ..network import weights
from ..network.mindformers import MindFormersNetwork
from ..reporting import stdout_to_stderr
from . import contracts, installation, model

DTYPES = ("bfloat16", "float16")
OPERATOR_LIMIT = {"bfloat16": 2e-2, "float16": 3e-3, "float32": 1e-5}
NETWORK_LIMIT = {"bfloat16": 5e-2, "float16": 1e-2, "float32": 1e-4}
"""Largest error allowed, as a fraction of the largest value: a few units in the last place of the dtype (2^-8, 2^-11),
grown over two layers for the network. A wrong operator is wrong by tenths."""

PROMPT_TOKENS = contracts.PROMPT_TOKENS
DECODE_STEPS = 8


@dataclass(frozen=True)
class Comparison:
    """One comparison: the largest error as a fraction of the largest value, and the limit.

    Attributes:
        instead: of a contract that is not kept, what the device does instead.
    """

    name: str
    dtype: str
    error: float
    limit: float
    instead: str = ""

    @property
    def passed(self) -> bool:
        """Within the limit; NaN is not."""
        return bool(self.error <= self.limit)

    def __str__(self) -> str:
        verdict = "ok" if self.passed else f"FAILED; it does: {self.instead}" if self.instead else "FAILED"
        return f"  {self.name:<50} {self.dtype:<9} error {self.error:8.1e}  limit {self.limit:7.1e}  {verdict}"


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """max |ours - theirs| / max |theirs|; infinity where a value is not finite or the shapes differ."""
    if ours.shape != theirs.shape or not np.isfinite(ours).all():
        return float("inf")
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def check_operators(dtype: str, head_dim: int, prepare: Callable[[Any], Any] = lambda cell: None) -> List[Comparison]:
    """Try each contract of the fused operators on the device, one by one.

    Args:
        dtype: of the activations.
        head_dim: size of the heads.
        prepare: called with each cell before it runs.
    """
    return [judge(contract, dtype) for contract in contracts.contracts(dtype, head_dim, prepare)]


def judge(contract: contracts.Contract, dtype: str) -> Comparison:
    """The contract as a comparison; one that fails names the reading of it that fits what the device did."""
    error, limit = relative_error(contract.device, contract.expected), OPERATOR_LIMIT[dtype]
    instead = ""
    if not error <= limit:
        errors = {reading: relative_error(contract.device, values) for reading, values in contract.otherwise.items()}
        instead = next((reading for reading, other in errors.items() if other <= limit),
                       "something that no known reading explains")
    return Comparison(contract.name, dtype, error, limit, instead)


def check_network(folder: str, dtype: str, ranks: int = 1, vocab_emb_dp: bool = True, tied: bool = False,
                  device_target: str = device.ASCEND, options: Sequence[str] = (),
                  prepare: Callable[[Any], Any] = lambda cell: None) -> Dict[str, Any]:
    """Compare MindFormers' network with the plain forward pass: a ragged prefill, then decode, twice over one cache.

    Args:
        folder: scratch, for the random model.
        dtype: of weights, activations and KV cache.
        ranks, vocab_emb_dp, tied: what is cut and how.
        device_target, options: passed to the configuration.
        prepare: called with MindFormers' network before it runs.

    Returns:
        results: of `Comparison`.
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
        results += [Comparison(f"{name}: {phase} {turn}", dtype, error, NETWORK_LIMIT[dtype])
                    for phase, error in errors.items()]
    return {"results": results, "times": times, "weights": told[-1]}


def _generate(network, sizes, judge: Dict[str, np.ndarray], turn: int, times: Dict[str, float]) -> Dict[str, float]:
    """Largest error of the prefill and of all decode steps; later tokens are random, so both sides see the same."""
    random = np.random.default_rng(turn)
    sequences = [random.integers(0, sizes.vocab_size, length + DECODE_STEPS).astype(np.int32)
                 for length in PROMPT_TOKENS]
    expected = [model.logits(sizes, judge, ids) for ids in sequences]
    first = np.asarray(PROMPT_TOKENS, np.int32)
    block_size = model.BLOCK_SIZE
    tables, _ = contracts.scattered(first + DECODE_STEPS, block_size, model.SEQ_LENGTH // block_size)

    def slots(row: int, start: int, stop: int) -> np.ndarray:
        positions = np.arange(start, stop)
        return tables[row, positions // block_size] * block_size + positions % block_size

    start_s = time.perf_counter()
    ours = network.prefill(
        np.concatenate([ids[:length] for ids, length in zip(sequences, first)]), first, first, tables,
        np.concatenate([slots(row, 0, length) for row, length in enumerate(first)]).astype(np.int32))
    times[f"prefill_{turn}_s"] = time.perf_counter() - start_s
    last = np.stack([rows[length - 1] for rows, length in zip(expected, first)])
    errors = {"prefill": relative_error(ours, last), "decode": 0.0}
    spent = []
    for step in range(DECODE_STEPS):
        lengths = first + step + 1
        start_s = time.perf_counter()
        ours = network.decode(
            np.stack([ids[length - 1] for ids, length in zip(sequences, lengths)]), lengths, tables,
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
        found[package] = version_of(package) or "not installed"
    found["cards"] = str(len(device.find_ascend().cards))
    for finding in installation.examine():
        line = f"{finding.status}: {finding.detail}"
        found[finding.name] = f"{found[finding.name]}\n{line}" if finding.name in found else line
    output, why_not = device.npu_smi()
    found["npu-smi"] = (output or why_not).strip()
    return found


def parser() -> Parser:
    """The flags."""
    made = Parser("qwen15 ascend-check", "Check the Ascend path on a card in about a minute and print a report.",
                  ["qwen15 ascend-check", "scripts/msrun_launcher.sh \"qwen15 ascend-check\" 2"])
    made.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES),
                      help="activations and weights (default: both)")
    made.add_argument("--device_id", type=whole, metavar="N", help="the card (default: DEVICE_ID, or 0)")
    made.add_argument("--debug", action="store_true", help="show tracebacks")
    return made


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Command line: exit code 0 when every comparison passes, 1 when one fails or could not be made.

    Raises:
        UserError: there is no card, or it does not answer.
    """
    args = parser().parse_args(argv)
    device.refuse_foreign()
    found = device.find_ascend()
    if found.missing:
        raise UserError(f"nothing to check: this machine has {found.missing}", fix=device.remedy(found))
    fault = device.ask(found, args.device_id).fault
    if fault:
        raise UserError(f"nothing can be checked: {fault}", fix="`qwen15 doctor` says what is installed.")
    return _check(args)


def _check(args: Namespace) -> int:
    ranks = int(os.environ.get("MS_WORKER_NUM") or os.environ.get("RANK_SIZE") or 1)
    rank = int(os.environ.get("RANK_ID") or 0)
    if args.device_id is not None:
        os.environ["DEVICE_ID"] = str(args.device_id)
    report: Dict[str, Any] = {"environment": environment(), "ranks": ranks, "networks": [], "failures": []}
    results: List[Comparison] = []
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
            for head_dim in contracts.HEAD_DIMS:
                what = f"operators {dtype}, heads of {head_dim}"
                print(f"{what} ...", file=sys.stderr)
                with stdout_to_stderr():
                    results += _attempt(report, what, check_operators, dtype, head_dim) or []
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


def _print_report(report: Dict[str, Any], results: Sequence[Comparison]) -> None:
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
