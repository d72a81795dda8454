"""A process that loads a checkpoint, runs a prompt, prints as JSON what that took; `qwen15 bench load` starts it."""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Dict

from .options import BenchCheckpoint


def ours(checkpoint: BenchCheckpoint, threads: int, prompt: int, new_tokens: int) -> Dict[str, float]:
    """Our engine."""
    start_s = time.perf_counter()
    import mindspore  # noqa: F401

    from .. import ops  # noqa: F401
    from ..network import model, weights  # noqa: F401
    from .ours import Decode, Ours, random_prompts

    imported_s = time.perf_counter()
    engine = Ours(checkpoint, threads, prompt + new_tokens, 1)
    ready_s = time.perf_counter()
    prompts = random_prompts(1, prompt, engine.dims.vocab_size)
    engine.prefill(prompts[0].tolist())
    first_s = time.perf_counter()
    Decode(engine, prompts, new_tokens).run()
    return {"import_s": imported_s - start_s, "ready_s": ready_s - imported_s, "first_token_s": first_s - ready_s}


def theirs(checkpoint: BenchCheckpoint, threads: int, prompt: int, new_tokens: int) -> Dict[str, float]:
    """transformers."""
    start_s = time.perf_counter()
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM, GenerationMixin, Qwen2ForCausalLM  # noqa: F401

    from .hf import HuggingFace, HuggingFaceDecode
    from .ours import random_prompts

    imported_s = time.perf_counter()
    hf = HuggingFace(checkpoint, threads)
    ready_s = time.perf_counter()
    prompts = random_prompts(1, prompt, hf.model.config.vocab_size)
    hf.prefill(prompts[0].tolist())
    first_s = time.perf_counter()
    HuggingFaceDecode(hf, prompts, new_tokens).run()
    return {"import_s": imported_s - start_s, "ready_s": ready_s - imported_s, "first_token_s": first_s - ready_s}


def main() -> None:
    """Arguments: qwen15 or hf, the checkpoint's path, label and dtype, threads, prompt tokens, new tokens."""
    who, path, label, dtype, *counts = sys.argv[1:]
    run = {"qwen15": ours, "hf": theirs}[who]
    found = run(BenchCheckpoint(path, label, dtype), *map(int, counts))
    # The high-water mark of resident memory, pages of mapped files included.
    found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(found))


if __name__ == "__main__":
    main()
