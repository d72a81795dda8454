"""One worker of `qwen15 bench parallel`, started by the launcher: loads, runs, writes what it took as JSON."""

from __future__ import annotations

import glob
import json
import os
import shutil
import sys
import time
from typing import Any, Dict, List, Optional, Sequence, Tuple

from .. import interrupts  # noqa: F401  (before NumPy, see there)
from ..errors import run_main
from . import child

PROFILED_TOKENS = 32


def measure(job: Dict[str, Any]) -> Dict[str, Any]:
    """Load as a user's run does, time prompts and answers, then the AllReduce in them under MindSpore's profiler."""
    rank = int(os.environ["RANK_ID"])
    import mindspore  # noqa: F401  (its time is nobody's load time)
    import numpy as np

    from .. import cluster, ops  # noqa: F401
    from ..generation import session  # noqa: F401
    from ..generation.engine import Engine
    from ..generation.request import Limits, Request
    from ..network import model, weights  # noqa: F401
    from ..network.build import build_network
    from .options import BenchCheckpoint
    from .ours import random_prompts

    workers, prompt_length, new_tokens = job["workers"], job["prompt"], job["new_tokens"]
    # A sequence's blocks; the cache holds two, what a run has left in it and a prompt beside it.
    blocks = -(-(prompt_length + max(new_tokens, PROFILED_TOKENS) + 1) // 32)
    shared = {"use_parallel": workers > 1, "parallel_config.model_parallel": workers,
              "parallel_config.vocab_emb_dp": job["vocab_emb_dp"], "auto_trans_ckpt": True}
    config = BenchCheckpoint(job["checkpoint"], "", job["dtype"]).config(
        shared, seq_length=blocks * 32, block_size=32, num_blocks=2 * blocks, max_decode_length=blocks * 32)
    joined_s = _time_join(cluster)
    start_s = time.perf_counter()
    network = build_network(config, weights.resolve(config.load_checkpoint, rank, workers, True), lambda line: None)
    load_s = time.perf_counter() - start_s - sum(joined_s)
    dims = config.model.dims
    engine = Engine(network, Limits(dims.vocab_size, config.model.seq_length, config.model.num_blocks, 32), None,
                    session.selection())
    prompt = tuple(random_prompts(1, prompt_length, dims.vocab_size)[0].tolist())

    def prefill() -> float:
        engine.pool.forget_all()  # the same prompt again would be found there
        begin_s = time.perf_counter()
        list(engine.generate([Request(prompt, prompt_length + 1)]))
        return time.perf_counter() - begin_s

    def decode(tokens: int) -> Tuple[float, float]:
        """Seconds of all tokens but the first, and the time of day at which they began."""
        steps = engine.generate([Request(prompt, prompt_length + tokens + 1)])
        next(steps)
        next(steps)  # a step that ends a prompt also decodes: its second token is there already
        began, begin_s = time.time(), time.perf_counter()
        count = sum(1 for _ in steps)
        assert count == tokens - 1
        return time.perf_counter() - begin_s, began

    prefill()
    prefills = [prefill() for _ in range(job["rounds"])]
    decode(new_tokens)
    decodes = [decode(new_tokens)[0] / (new_tokens - 1) for _ in range(job["rounds"])]
    # All ranks measure while all are alive, so that each shared page is divided among all that map it.
    network.agree(np.zeros(1, np.int32))
    memory = _memory()
    network.agree(np.zeros(1, np.int32))
    result = {"rank": rank, "join_s": sum(joined_s), "load_s": load_s, "prefill_s": prefills, "decode_s": decodes,
              **memory, "note": network.note, "threads": os.environ.get("QWEN15_THREADS")}
    if workers > 1:
        in_memory = network.note.endswith("in shared memory")
        result.update(_time_waits(prefill, decode) if in_memory else _profile(job["folder"], rank, prefill, decode))
    return result


def _time_join(cluster: Any) -> List[float]:
    """Have `cluster.join` note its seconds in the list given back: to wait for the other processes is not to load."""
    taken: List[float] = []
    join = cluster.join

    def timed() -> Tuple[int, int]:
        begin_s = time.perf_counter()
        try:
            return join()
        finally:
            taken.append(time.perf_counter() - begin_s)

    cluster.join = timed
    return taken


def _memory() -> Dict[str, int]:
    """Bytes resident at the peak, and now: shared pages counted whole (rss) or divided by those who share (pss)."""
    found = {}
    with open("/proc/self/smaps_rollup", encoding="ascii") as file:
        for line in file:
            key, _, rest = line.partition(":")
            if key in ("Rss", "Pss", "Pss_Anon", "Pss_File"):
                found[f"{key.lower()}_bytes"] = int(rest.split()[0]) * 1024
    return {"peak_rss_bytes": child.peak_bytes(), **found}


def _time_waits(prefill: Any, decode: Any) -> Dict[str, Any]:
    """`_profile` where the kernels add over the ranks: seconds that this rank has waited for the others."""
    from ..kernels import library

    kernels = library.load()
    before = kernels.waited
    prefill_s = prefill()
    between = kernels.waited
    decode_s, _ = decode(PROFILED_TOKENS)
    after = kernels.waited
    own_prefill_s = prefill()  # the decoding began with a prompt
    last = kernels.waited
    steps = PROFILED_TOKENS  # of one token each, behind the prompt
    waited_s = after[0] - between[0] - (last[0] - after[0])
    # Seconds and waiting of the same prompt, the faster one: with others on the machine the first may be far slower.
    prefill_s, prefill_waits_s = min((prefill_s, between[0] - before[0]), (own_prefill_s, last[0] - after[0]))
    return {"profiled_prefill_s": prefill_s, "allreduce_prefill_s": prefill_waits_s,
            "allreduces_a_prefill": between[1] - before[1], "profiled_decode_s": decode_s / (steps - 1),
            "allreduce_decode_s": max(0.0, waited_s) / steps,
            "allreduces_a_token": (after[1] - between[1] - (last[1] - after[1])) / steps}


def _profile(folder: str, rank: int, prefill: Any, decode: Any) -> Dict[str, Any]:
    """Seconds in AllReduce, of a prompt and of tokens, as MindSpore's profiler has timed it in this process."""
    import mindspore
    from mindspore.profiler import ProfilerActivity, profile

    target = os.path.join(folder, f"profile_{rank}")
    profiler = profile(activities=[ProfilerActivity.CPU],
                       on_trace_ready=mindspore.profiler.tensorboard_trace_handler(target, analyse_flag=True,
                                                                                   async_mode=False))
    profiler.start()
    prefill_began = time.time()
    prefill_s = prefill()
    decode_s, decode_began = decode(PROFILED_TOKENS)
    profiler.stop()
    trace, = glob.glob(os.path.join(target, "*", "ASCEND_PROFILER_OUTPUT", "trace_view.json"))
    with open(trace, encoding="utf-8") as file:
        events = [(float(event["ts"]) / 1e6, float(event["dur"]) / 1e6) for event in json.load(file)
                  if event.get("ph") == "X" and "AllReduce" in event["name"]]
    shutil.rmtree(target)
    in_prefill = [seconds for began, seconds in events if prefill_began <= began < prefill_began + prefill_s]
    in_decode = [seconds for began, seconds in events if decode_began <= began < decode_began + decode_s]
    tokens = PROFILED_TOKENS - 1
    return {"profiled_prefill_s": prefill_s, "allreduce_prefill_s": sum(in_prefill),
            "allreduces_a_prefill": len(in_prefill), "profiled_decode_s": decode_s / tokens,
            "allreduce_decode_s": sum(in_decode) / tokens, "allreduces_a_token": len(in_decode) / tokens}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Argument: the job, a JSON file; the result is written beside it as rank_N.json."""
    path, = sys.argv[1:] if argv is None else argv
    with open(path, encoding="utf-8") as file:
        job = json.load(file)
    result = measure(job)
    with open(os.path.join(job["folder"], f"rank_{result['rank']}.json"), "w", encoding="utf-8") as file:
        json.dump(result, file)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
