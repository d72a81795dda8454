"""How many times faster text comes with guesses: prompt lookup on real texts, a draft model at a given acceptance."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from ..command_line import Parser, positive
from ..command_line import number as real
from ..config.speculation import DRAFT_TOKENS, NGRAM_TOKENS
from ..errors import UserError
from ..generation import session
from ..generation.draft import DraftModel, draft_cost
from ..generation.engine import Engine
from ..generation.request import Request, Step
from ..generation.sampling import SamplingParams
from ..generation.speculate import PromptLookup, Speculation
from ..text import chat
from ..text.tokenizer import Qwen2Tokenizer
from . import options, report, rounds
from .make_checkpoint import size
from .ours import Ours, random_prompts
from .probes import Probes
from .report import Column, Measured, number, text

_LETTER = """\
Dear Ms Lindqvist, thank you for the two boxes of seed potatoes that reached us on Tuesday. The first box was in\
 perfect order. In the second box about a third of the potatoes had begun to rot, and the label said Nicola \
although we had ordered Annabelle. We would be grateful if you could send us a replacement for the second box \
before the end of April, because we plant in the first week of May. Please let us know whether you need the \
spoiled potatoes back. With kind regards, Tomas Berg, Hillside Market Garden."""
_REPORT = """\
The town library of Ardal opened its new reading room on Saturday. About four hundred visitors came on the first\
 day, twice as many as on an ordinary weekend. The room has sixty seats, a long table for groups, and a corner \
for children with low shelves. The building cost 1.2 million euros, of which the town paid one half and a \
private foundation the other. The librarian, Ida Moen, said that the number of loans had fallen for ten years \
before the building began, and that she hopes the new room will bring readers back. Opening hours are now from \
nine in the morning until eight in the evening, on Sundays until four. Some residents had asked for a café, but \
the council decided against it because two cafés are across the street. A second stage, with a hall for concerts\
 and talks, is planned for next year if enough money is found."""
_CODE = """def moving_average(values, width):
    if width < 1:
        raise ValueError("width must be at least 1")
    total = 0.0
    averages = []
    for place, value in enumerate(values):
        total += value
        if place >= width:
            total -= values[place - width]
        averages.append(total / min(place + 1, width))
    return averages


def largest_drop(values):
    highest = values[0]
    drop = 0.0
    for value in values:
        highest = max(highest, value)
        drop = max(drop, highest - value)
    return drop
"""


class Workload(NamedTuple):
    """A question, and how its answer's tokens are chosen."""

    question: str
    params: SamplingParams = SamplingParams()


REPEATS_NOTHING = "text in which no two tokens come twice"
WORKLOADS: Dict[str, Workload] = {
    "summarising": Workload(f"Summarise the following text in three sentences.\n\n{_REPORT}"),
    "facts as a list": Workload(f"List the facts of the following text as short bullet points.\n\n{_REPORT}"),
    "rewriting": Workload("Rewrite this letter so that it is signed by Anna Holm instead of Tomas Berg, and keep "
                          f"everything else.\n\n{_LETTER}"),
    "correcting": Workload("Correct the spelling and write the text again, otherwise unchanged.\n\n"
                           + _LETTER.replace("perfect", "perfct").replace("replacement", "replacment")),
    "editing code": Workload(f"Add a docstring to each function and repeat the code.\n\n```python\n{_CODE}```"),
    "answering": Workload("Why is the sky blue?"),
    REPEATS_NOTHING: Workload("Write a story about a lighthouse keeper who finds a letter in a bottle.",
                              SamplingParams(do_sample=True, seed=1, no_repeat_ngram_size=2)),
}
"""What the lookup is measured on. In the last one no guess can be right: a pair of tokens that was there is not allowed
again."""


def parser() -> Parser:
    """The flags."""
    made = Parser("qwen15 bench speculate", __doc__ or "",
                  ["qwen15 bench speculate --checkpoint models/SmolLM2-135M-Instruct",
                   "qwen15 bench speculate --size 7b --dtype int4 --draft_size 0.5b --acceptance 0.7 --new_tokens 32"])
    made.add_argument("--draft_size", type=size, metavar="SIZE",
                      help="measure a draft model of this size in place of prompt lookup; its guesses are those of the "
                           "target itself, or another token, so that --acceptance of them are right")
    made.add_argument("--draft_layers", type=positive, metavar="N",
                      help="of the draft (default: the published number)")
    made.add_argument("--acceptance", type=_chances, default=(0.7,), metavar="P[,P...]",
                      help="with --draft_size: chances that a guess is right (default 0.7)")
    made.add_argument("--tokens", type=positive, metavar="N",
                      help="most guesses in a step (default: as --speculate_tokens)")
    made.add_argument("--new_tokens", type=options.at_least_two, default=128, metavar="N",
                      help="tokens of each answer (default 128)")
    made.add_argument("--task", nargs="+", choices=list(WORKLOADS), metavar="NAME", default=list(WORKLOADS),
                      help="only these texts: " + ", ".join(WORKLOADS))
    options.add_checkpoint(made)
    options.add_run(made, "speculate", rounds=3, against=())
    return made


def _chances(value: str) -> Tuple[float, ...]:
    made = tuple(real(part) for part in value.split(","))
    if not all(0 <= chance <= 1 for chance in made):
        raise argparse.ArgumentTypeError(f"wants numbers from 0 to 1, not {value}")
    return made


def run(args: argparse.Namespace) -> Measured:
    """Measure with and without guesses in turns.

    Raises:
        UserError: arguments that cannot be.
    """
    checkpoint = options.find_checkpoint(args)
    machine = Probes(args.threads)
    rows = _lookup(args, checkpoint, machine) if args.draft_size is None else _draft(args, checkpoint, machine)
    facts = machine.facts(checkpoint.label, checkpoint.dtype, args.rounds)
    if args.draft_size is not None:
        layers = f", {args.draft_layers} layers" if args.draft_layers else ""
        facts["draft"] = f"Qwen1.5-{args.draft_size.upper()}{layers}, random weights, simulated acceptance"
    return Measured(facts, COLUMNS, rows, _bars(checkpoint, rows))


# ---- prompt lookup ----

def _lookup(args: argparse.Namespace, checkpoint: options.BenchCheckpoint, machine: Probes) -> List[Dict[str, Any]]:
    config = checkpoint.config()
    if config.tokenizer.vocab_file is None or config.tokenizer.merges_file is None:
        raise UserError("prompt lookup is measured on texts, and there is no tokenizer beside the checkpoint",
                        where=f"--checkpoint {checkpoint.path}",
                        fix="Give a real model, or measure a draft model with --draft_size.")
    tokenizer = Qwen2Tokenizer.from_files(config.tokenizer.vocab_file, config.tokenizer.merges_file)
    prompts = {name: tuple(chat.prompt_ids(tokenizer, [{"role": "user", "content": WORKLOADS[name].question}]))
               for name in args.task}
    ours = Ours(checkpoint, machine.threads, max(map(len, prompts.values())) + args.new_tokens, 1)
    stop_ids = chat.stop_ids(tokenizer, config.model.eos_token_id)
    rows = []
    for name, ids in prompts.items():
        request = Request(ids, len(ids) + args.new_tokens, stop_ids=stop_ids, params=WORKLOADS[name].params)
        speculation = PromptLookup(args.tokens or NGRAM_TOKENS, ours.quantised_bytes is not None)
        rows.append(_compared(name, ours.engine, request, speculation, args.rounds))
    return rows


# ---- a draft model ----

_DECK = 20
"""Guesses of which exactly the wanted part is right, in any order."""


class Simulated(DraftModel):
    """A draft that does all its work and then says, with a given chance, what is known to come, else something else.

    In short dtypes a call of several rows and one of a single row differ by a rounding, so that now and then the same
    text goes on in another way: each way that has been seen is known.
    """

    def __init__(self, *args: Any, chance: float, **more: Any):
        super().__init__(*args, **more)
        self._chance = chance
        self._known: List[List[int]] = []
        self._random = np.random.default_rng(0)
        self._deck: List[bool] = []

    def remember(self, text: Sequence[int]) -> None:
        """A text, its prompt first, that the target has been seen to write."""
        if list(text) not in self._known:
            self._known.append(list(text))

    def _chosen(self, ready: Any) -> Any:
        going = super()._chosen(ready)
        for each in going:
            right = self._after([*each.ids, *each.made[:-1]])
            each.made[-1] = right if self._is_right() else (right + 1) % self._vocab_size
        return going

    def _is_right(self) -> bool:
        """Drawn from decks that hold their part of right guesses: with single draws a short run measures its luck."""
        if not self._deck:
            self._deck = self._random.permutation(np.arange(_DECK) < round(self._chance * _DECK)).tolist()
        return self._deck.pop()

    def _after(self, begin: List[int]) -> int:
        known = (text for text in self._known if len(text) > len(begin) and text[:len(begin)] == begin)
        return next(known, [0] * (len(begin) + 1))[len(begin)]


def _draft(args: argparse.Namespace, checkpoint: options.BenchCheckpoint, machine: Probes) -> List[Dict[str, Any]]:
    small = options.random_checkpoint(args.draft_size, args.draft_layers, args.dtype or "bfloat16", args.cache)
    prompt = random_prompts(1, 32, 1000)[0]
    longest = len(prompt) + args.new_tokens
    draft = Ours(small, machine.threads, longest, 1)
    ours = Ours(checkpoint, machine.threads, longest, 1)
    cost = draft_cost(checkpoint.config(), small.config())
    rows = []
    request = Request(tuple(prompt.tolist()), longest)
    for chance in args.acceptance:
        speculation = Simulated(draft.engine.network, draft.engine.pool.num_blocks, draft.engine.pool.block_size,
                                ours.vocab_size, args.tokens or DRAFT_TOKENS, cost,
                                session.selection(), ours.quantised_bytes is not None, chance=chance)
        rows.append(_compared(f"draft right at {chance:g}", ours.engine, request, speculation, args.rounds))
    return rows


# ---- both ----

class _Answer:
    """One request run again and again, its prompt's blocks in the cache from the first time on."""

    def __init__(self, engine: Engine, request: Request, speculation: Optional[Speculation]):
        self._engine, self._request, self._speculation = engine, request, speculation
        self.tokens: List[int] = []
        self.last: Optional[Step] = None

    def run(self) -> rounds.Timing:
        """Seconds of a token after the first."""
        engine = self._engine
        engine.speculation = self._speculation
        steps = engine.generate([self._request])
        first = next(steps)
        assert first.token is not None
        self.tokens, start_s = [first.token], time.perf_counter()
        for step in steps:
            if step.token is not None:
                self.tokens.append(step.token)
            self.last = step
        return rounds.Timing((time.perf_counter() - start_s) / max(1, len(self.tokens) - 1))


def _compared(name: str, engine: Engine, request: Request, speculation: Speculation, count: int) -> Dict[str, Any]:
    plain, guessed = _Answer(engine, request, None), _Answer(engine, request, speculation)
    if isinstance(speculation, Simulated):
        for answer in (plain, guessed):
            answer.run()
            speculation.remember([*request.prompt, *answer.tokens])
    print(f"{name} ...", file=sys.stderr, flush=True)
    samples = rounds.interleave({"plain": plain.run, "guessed": guessed.run}, count, lambda: {})
    assert guessed.last is not None and guessed.last.usage is not None
    usage = guessed.last.usage
    return {"task": name, "tokens": len(guessed.tokens), "same": _agreement(plain.tokens, guessed.tokens),
            "plain_tokens_per_s": 1 / rounds.median_seconds(samples["plain"]),
            "tokens_per_s": 1 / rounds.median_seconds(samples["guessed"]),
            "ratio": rounds.ratio(samples["guessed"], samples["plain"]),
            "tokens_per_step": (usage.generated_tokens - 1) / max(1, usage.decode_steps),
            "guessed": usage.guessed_tokens, "accepted": usage.accepted_tokens, "samples": rounds.as_json(samples)}


def _agreement(plain: Sequence[int], guessed: Sequence[int]) -> str:
    """How far two texts are the same: in short dtypes two rows of a call and one differ by a rounding."""
    if list(plain) == list(guessed):
        return "same"
    shorter = min(len(plain), len(guessed))
    return f"same up to token {next((i for i in range(shorter) if plain[i] != guessed[i]), shorter)}"


COLUMNS = (Column("text", text("task")), Column("tokens", number("tokens", "d")),
           Column("plain, tokens/s", number("plain_tokens_per_s")),
           Column("with guesses, tokens/s", number("tokens_per_s")), Column("times plain", number("ratio", ".2f")),
           Column("tokens a step", number("tokens_per_step", ".2f")),
           Column("guesses right", lambda row: f"{row['accepted']} of {row['guessed']}"),
           Column("beside the plain text", text("same")))


def _bars(checkpoint: options.BenchCheckpoint, rows: Sequence[Mapping[str, Any]]) -> report.Bars:
    return report.Bars(f"With guesses, {checkpoint.label}, {checkpoint.dtype}", "tokens per second",
                       [row["task"].replace(" ", "\n", 1) for row in rows],
                       {"plain": [row["plain_tokens_per_s"] for row in rows],
                        "with guesses": [row["tokens_per_s"] for row in rows]})
