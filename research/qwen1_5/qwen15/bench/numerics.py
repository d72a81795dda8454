"""How close our logits are to transformers' in float64, for each dtype, beside how close transformers' own are."""

from __future__ import annotations

import os
import tempfile
from typing import Dict, List, Optional, Sequence

import numpy as np

from ..command_line import Parser, whole
from ..config.flags import Flag
from ..config.load import load_config
from ..errors import UserError
from ..network.build import build_network

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
    made.add_argument("--tokens", type=whole, default=64,
                      help="greedy tokens of each of %d prompts (default 64)" % len(TEXTS))
    return made


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Print the table. Needs torch and transformers.

    Raises:
        UserError: torch is not installed, or the folder holds no model.
    """
    args = parser().parse_args(argv)
    try:
        import torch
        from transformers import Qwen2ForCausalLM
    except ImportError as error:
        raise UserError(f"{error.name} is not installed", where="qwen15 bench numerics",
                        fix="Run: pip install torch transformers") from None
    from ..text.tokenizer import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer.from_pretrained(args.checkpoint)
    prompts = [tokenizer.encode(text) for text in TEXTS]
    # The float32 weights in float64 arithmetic: a judge without rounding of its own.
    single = Qwen2ForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32).eval()
    texts = _greedy(single, prompts, args.tokens)
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
    return 0


def _greedy(model, prompts: List[List[int]], count: int) -> List[List[int]]:
    import torch

    made = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            made.append(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count,
                                       min_new_tokens=count, do_sample=False, pad_token_id=0)[0].tolist())
    return made


def _logits(model, texts: List[List[int]]) -> List[np.ndarray]:
    import torch

    with torch.no_grad():
        return [model(torch.tensor([text])).logits[0].float().numpy() for text in texts]


def _our_logits(checkpoint: str, dtype: str, kernels: str, texts: List[List[int]]):
    """Our logits at every position: one token prefilled, every other a decode step, all texts in one batch."""
    os.environ["QWEN15_KERNELS"] = kernels
    longest = max(map(len, texts))
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as yaml:
        yaml.write("context:\n  device_target: CPU\n")
        yaml.flush()
        section = "model.model_config."
        values = {"load_checkpoint": os.path.abspath(checkpoint), section + "param_init_type": dtype,
                  section + "compute_dtype": dtype,
                  section + "block_size": 32, section + "num_blocks": len(texts) * (-(-longest // 32)),
                  section + "seq_length": 32 * (-(-longest // 32))}
        config = load_config(yaml.name, [Flag(key, "--bench", value) for key, value in values.items()])
    network = build_network(config, os.path.abspath(checkpoint), lambda line: None)
    width = -(-longest // 32)
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
