"""A process that loads a checkpoint, runs a prompt, prints as JSON what that took; `qwen15 bench load` starts it."""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any, Callable

from .options import BenchCheckpoint


def ours() -> Callable[[BenchCheckpoint, int, int], Any]:
    """Makes our engine of a checkpoint, threads and tokens; everything it needs is imported."""
    import mindspore  # noqa: F401

    from .. import ops  # noqa: F401
    from ..network import model, weights  # noqa: F401
    from .ours import Ours

    return lambda checkpoint, threads, longest: Ours(checkpoint, threads, longest, 1)


def theirs() -> Callable[[BenchCheckpoint, int, int], Any]:
    """The same of transformers'."""
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM, GenerationMixin, Qwen2ForCausalLM  # noqa: F401

    from .hf import HuggingFace

    return lambda checkpoint, threads, longest: HuggingFace(checkpoint, threads)


def main() -> None:
    """Arguments: qwen15 or hf, the checkpoint's path, label and dtype, threads, prompt tokens, new tokens."""
    who, path, label, dtype, *counts = sys.argv[1:]
    threads, prompt, new_tokens = map(int, counts)
    start_s = time.perf_counter()
    make = {"qwen15": ours, "hf": theirs}[who]()
    from .ours import random_prompts

    imported_s = time.perf_counter()
    engine = make(BenchCheckpoint(path, label, dtype), threads, prompt + new_tokens)
    ready_s = time.perf_counter()
    prompts = random_prompts(1, prompt, engine.vocab_size)
    engine.prefill(prompts[0].tolist())
    first_s = time.perf_counter()
    engine.decode(prompts, new_tokens).run()
    # The high-water mark of resident memory, pages of mapped files included.
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"import_s": imported_s - start_s, "ready_s": ready_s - imported_s,
                      "first_token_s": first_s - ready_s, "peak_bytes": peak_bytes}))


if __name__ == "__main__":
    main()
