"""A process that converts a checkpoint once and prints as JSON what that took; `qwen15 bench convert` starts it."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import time
from typing import Callable, Sequence

from . import child


def ours(module: str, flags: Sequence[str]) -> Callable[[], None]:
    """One of our commands, everything it needs imported."""
    from ..conversion import hugging_face, reslice, run  # noqa: F401

    command = importlib.import_module(module)
    return lambda: command.main(list(flags))


def theirs(source: str, target: str) -> Callable[[], None]:
    """The obvious way: the model through transformers, its weights through NumPy into Tensors, saved at once."""
    import mindspore
    import torch
    from transformers import AutoModelForCausalLM

    from ..naming import hf_to_ms

    def work() -> None:
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
        tensors = []
        for name, value in model.named_parameters():  # a tied head once
            kind = getattr(mindspore, str(value.dtype).split(".")[1])
            numbers = value.detach().to(torch.float32).numpy()
            tensors.append({"name": hf_to_ms(name), "data": mindspore.Tensor(numbers, kind)})
        mindspore.save_checkpoint(tensors, target)

    return work


def main() -> None:
    """Arguments: one of our modules and its flags, or `theirs`, source and target."""
    what, *rest = sys.argv[1:]
    work = theirs(*rest) if what == "theirs" else ours(what, rest)
    start_s = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        work()
    work_s = time.perf_counter() - start_s
    print(json.dumps({"work_s": work_s, "peak_bytes": child.peak_bytes()}))


if __name__ == "__main__":
    main()
