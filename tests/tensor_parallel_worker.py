"""One rank of a tensor-parallel run, for test_tensor_parallel.py: `tensor_parallel_worker.py JOB.json RESULTS`."""

from __future__ import annotations

import json
import os
import resource
import sys

import numpy as np
from qwen15.config.load import load_config
from qwen15.generation.engine import Engine
from qwen15.generation.request import Limits, Request
from qwen15.generation.sampling import SamplingParams
from qwen15.network.build import build_network
from qwen15.network.weights import resolve


def run(job: dict) -> dict:
    """Tokens of every request, and the logits of each step of the first prompt when it is fed its own greedy tokens."""
    config = load_config(job["yaml"])
    model = config.model
    rank = int(os.environ.get("RANK_ID", 0)) if config.parallel.use_parallel else 0
    checkpoint = resolve(config.load_checkpoint, rank, config.parallel.model_parallel, config.auto_trans_ckpt)
    account = []
    network = build_network(config, checkpoint, account.append)
    tables = np.arange(model.num_blocks, dtype=np.int32)[None]
    prompt = np.array(job["prompts"][0], np.int32)
    length = np.array([len(prompt)], np.int32)
    logits = [np.array(network.prefill(prompt, length, length, tables, np.arange(len(prompt), dtype=np.int32)))]
    for _ in range(6):
        token = logits[-1].argmax(-1).astype(np.int32)
        slot = length.copy()
        length = length + 1
        logits.append(np.array(network.decode(token, length, tables, slot)))
    engine = Engine(network, Limits(model.dims.vocab_size, model.seq_length, model.num_blocks, model.block_size))
    requests = [Request(tuple(p), len(p) + job["count"], params=SamplingParams(do_sample=sampled, top_k=20, seed=5))
                for p in job["prompts"] for sampled in (False, True)]
    tokens = [[] for _ in requests]
    for step in engine.generate(requests):
        tokens[step.request].append(step.token)
    return {"tokens": tokens, "logits": np.concatenate(logits).tolist(), "note": network.note, "account": account,
            "peak_rss_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        result = run(json.load(file))
    with open(os.path.join(sys.argv[2], f"rank_{os.environ.get('RANK_ID', 0)}.json"), "w", encoding="utf-8") as file:
        json.dump(result, file)
