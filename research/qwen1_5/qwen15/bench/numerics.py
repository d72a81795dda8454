"""How close our logits are to transformers' in float64, for each dtype, beside how close transformers' own are."""

from __future__ import annotations

import argparse
import os
from typing import Dict, List

import numpy as np

from ..command_line import Parser, positive
from ..network.build import build_network
from . import hf
from .options import BenchCheckpoint

DTYPES = ("float32", "bfloat16", "float16")
TEXTS = (
    "The capital of France is", "Gravity is", "def fibonacci(n):\n", "Once upon a time", "1, 2, 3, 5, 8,",
    "Water boils at",
    "Dear Sir or Madam,", "In 1969, humans", "The quick brown fox", "import numpy as np\n", "SELECT name FROM",
    "To be, or not to be",
    "A prime number is", "The largest planet", "Roses are red,", "Photosynthesis", "x = [i**2 for i in",
    "My favourite food is",
    "人工智能", "帮助我制定一份去上海的旅游攻略",
)


def parser() -> Parser:
    """The flags."""
    made = Parser("qwen15 bench numerics", __doc__ or "", ["qwen15 bench numerics FOLDER"], usage="CHECKPOINT [flags]")
    made.add_argument("checkpoint", help="a Hugging Face folder with tokenizer files")
    made.add_argument("--tokens", type=positive, default=64,
                      help="greedy tokens of each of %d prompts (default 64)" % len(TEXTS))
    return made


def run(args: argparse.Namespace) -> None:
    """Print the table. Needs torch and transformers.

    Raises:
        UserError: torch is not installed, or the folder holds no model.
    """
    hf.check_installed("qwen15 bench numerics")
    import torch
    from transformers import Qwen2ForCausalLM

    from ..text.tokenizer import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer.from_pretrained(args.checkpoint)
    prompts = [tokenizer.encode(text) for text in TEXTS]
    # The float32 weights in float64 arithmetic: a judge without rounding of its own.
    single = Qwen2ForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32).eval()
    texts = [hf.greedy(single, torch.tensor([prompt]), args.tokens)[0].tolist() for prompt in prompts]
    in_float32 = _logits(single, texts)
    expected = _logits(single.double(), texts)
    del single
    positions = sum(map(len, prompts)) + args.tokens * len(prompts)
    print(f"{len(prompts)} prompts, {args.tokens} greedy tokens each; logits at all {positions} "
          f"positions against transformers float64; standard deviation of the logits {np.std(expected[0]):.2f}\n")
    print("| weights and KV cache | operators | mean error | largest error | transformers' own mean | largest | "
          "same greedy token |")
    print("|---|---|---|---|---|---|---|")
    apart: Dict[str, float] = {}
    for dtype in DTYPES:
        own = in_float32 if dtype == "float32" else _logits(
            Qwen2ForCausalLM.from_pretrained(args.checkpoint, dtype=getattr(torch, dtype)).eval(), texts)
        for kernels in ("", "reference"):
            ours, note = _our_logits(args.checkpoint, dtype, kernels, texts)
            print(_row(dtype, note, ours, own, expected, [len(p) for p in prompts]))
            if dtype == "float32":
                apart[note] = max(float(np.abs(a - b).max()) for a, b in zip(ours, in_float32))
    print("\nfloat32, largest difference from transformers float32: " +
          ", ".join(f"{note} {value:.2g}" for note, value in apart.items()))


def _logits(model, texts: List[List[int]]) -> List[np.ndarray]:
    import torch

    with torch.no_grad():
        return [model(torch.tensor([text])).logits[0].float().numpy() for text in texts]


def _our_logits(checkpoint: str, dtype: str, kernels: str, texts: List[List[int]]):
    """Our logits at every position: one token prefilled, every other a decode step, all texts in one batch."""
    os.environ["QWEN15_KERNELS"] = kernels
    longest = max(map(len, texts))
    width = -(-longest // 32)
    path = os.path.abspath(checkpoint)
    config = BenchCheckpoint(path, checkpoint, dtype).config(block_size=32, num_blocks=len(texts) * width,
                                                             seq_length=32 * width)
    network = build_network(config, path, lambda line: None)
    tables = np.arange(len(texts) * width, dtype=np.int32).reshape(len(texts), width)
    found: List[List[np.ndarray]] = [[] for _ in texts]
    for position in range(longest):
        rows = [i for i, text in enumerate(texts) if position < len(text)]
        ids = np.array([texts[i][position] for i in rows], np.int32)
        lengths = np.full(len(rows), position + 1, np.int32)
        slots = tables[rows, position // 32] * 32 + position % 32
        logits = network.decode(ids, lengths, tables[rows], slots.astype(np.int32))
        for row, i in enumerate(rows):
            found[i].append(logits[row].copy())
    return [np.stack(rows) for rows in found], network.note.split(",")[1].strip()


def _row(dtype: str, note: str, ours, own, expected, prompt_lengths: List[int]) -> str:
    def errors(got) -> Dict[str, float]:
        differences = [np.abs(a - b) for a, b in zip(got, expected)]
        return {"mean": float(np.mean([d.mean() for d in differences])),
                "max": float(max(d.max() for d in differences))}

    def agreement(got) -> float:
        same = [(a[n - 1:-1].argmax(-1) == b[n - 1:-1].argmax(-1)).mean()
                for a, b, n in zip(got, expected, prompt_lengths)]
        return float(np.mean(same))

    mine, theirs = errors(ours), errors(own)
    return (
        f"| {dtype} | {note} | {mine['mean']:.2g} | {mine['max']:.2g} | {theirs['mean']:.2g} | {theirs['max']:.2g} | "
            f"{agreement(ours):.1%} (transformers {agreement(own):.1%}) |")
