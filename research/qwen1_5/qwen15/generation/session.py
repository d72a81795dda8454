"""A configuration with its tokenizer, network and engine: prompts in, pieces of text out."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Callable, Dict, FrozenSet, Iterator, List, Mapping, Optional, Sequence, Tuple

from .. import interrupts, ops
from ..checkpoint.reader import open_checkpoint
from ..config import schema as config_schema
from ..config.keys import KEYS, MODEL, convert
from ..config.sampling_rules import SAMPLING, implied, shaping
from ..config.schema import Config
from ..device import env_rank
from ..errors import UserError
from ..network import weights
from ..network.base import Network
from ..reporting import stdout_to_stderr
from ..text import chat
from ..text.stream import TextStream
from . import memory_check, ranks, sampling
from .draft import DraftModel, draft_cost
from .engine import Engine
from .request import STOP, Limits, LogProbs, Request, Step, Usage
from .sampling import SamplingParams, Selection
from .speculate import PromptLookup, Speculation, Told, most_streams

_KEY_OF = {"seed": "seed", "max_length": MODEL + "max_decode_length",
           **{name: MODEL + name for name in (*SAMPLING, "max_new_tokens")}}
_MOST_LOGPROBS = 1000
_MOST_ANSWERS = 128


@dataclass(frozen=True)
class Settings:
    """How one prompt is continued.

    Attributes:
        do_sample, temperature, top_k, top_p, repetition_penalty, min_p, presence_penalty, frequency_penalty,
            no_repeat_ngram_size, min_new_tokens, logit_bias: see `sampling.SamplingParams`.
        seed: None draws differently at every run.
        max_length: longest text in tokens, prompt included.
        max_new_tokens: most new tokens; whichever limit comes first ends it.
        stop: the answer ends before the first of these strings.
        logprobs: report the log probabilities of this many likeliest tokens at each step, 0 for none.
        prompt_logprobs: report those of the prompt's tokens, with this many likeliest ones beside each; None for none.
        n: how many answers, each drawn for itself.
        speculate: its tokens may be guessed, where the configuration says how; none of them depends on it.
    """

    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    seed: Optional[int]
    max_length: int
    max_new_tokens: Optional[int]
    stop: Tuple[str, ...] = ()
    logprobs: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    min_new_tokens: int = 0
    logit_bias: Tuple[Tuple[int, float], ...] = ()
    prompt_logprobs: Optional[int] = None
    n: int = 1
    speculate: bool = True

    @classmethod
    def of(cls, config: Config) -> "Settings":
        """What the configuration says."""
        g = config.generation
        return cls(seed=g.seed, max_length=g.max_length, max_new_tokens=g.max_new_tokens,
                   **{name: getattr(g, name) for name in SAMPLING})

    def params(self, seed: int, stream: int) -> SamplingParams:
        """How the sampler chooses tokens."""
        return SamplingParams(seed=seed, stream=stream, logit_bias=self.logit_bias,
                              **{name: getattr(self, name) for name in SAMPLING})

    def changed(self, values: Mapping[str, Any]) -> "Settings":
        """With these values in place of some; each is checked as the configuration's are.

        Raises:
            ValueError: with a sentence that begins with the name of the wrong one.
        """
        checked: Dict[str, Any] = {}
        for name, value in values.items():
            try:
                if name in _KEY_OF:
                    value = convert(KEYS[_KEY_OF[name]], value, plain=False)
                    if value is None and name not in ("seed", "max_new_tokens"):
                        continue
                elif name in _CHECKS:
                    value = _CHECKS[name](value)
            except ValueError as error:
                raise ValueError(f"{name} {error}") from None
            checked[name] = value
        return replace(self, **{**checked, **implied(checked)})

    @property
    def idle(self) -> Tuple[str, ...]:
        """Settings of sampling that have no effect because do_sample is off."""
        given = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        return () if self.do_sample else tuple(name for name in shaping(given) if given[name] != 1.0)


SETTING_NAMES = tuple(field.name for field in fields(Settings))


def _stop_strings(value: Any) -> Tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, (list, tuple)) else None
    if strings is None or any(not isinstance(text, str) for text in strings):
        raise ValueError(f"wants a text or a list of them, not {value!r}")
    if "" in strings:
        raise ValueError("holds an empty text, which would end every answer at once")
    return strings


def _yes_or_no(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"wants true or false, not {value!r}")
    return value


def _whole(low: int, high: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"wants a whole number from {low} to {high}, not {value!r}")
        return value

    return check


def _logit_bias(value: Any) -> Tuple[Tuple[int, float], ...]:
    """From a mapping of token ids, which JSON has as texts, or from pairs."""
    pairs = value.items() if isinstance(value, Mapping) else value
    made: Dict[int, float] = {}
    try:
        for token, bias in pairs:
            if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not bias < float("inf"):
                raise ValueError
            made[int(token)] = float(bias)
    except (TypeError, ValueError):
        raise ValueError(f'wants token ids with a number each, such as {{"1234": -5}}, not {value!r}') from None
    return tuple(sorted(made.items()))


_CHECKS: Dict[str, Callable[[Any], Any]] = {
    "stop": _stop_strings, "logprobs": _whole(0, _MOST_LOGPROBS), "logit_bias": _logit_bias,
    "n": _whole(1, _MOST_ANSWERS),
    "speculate": _yes_or_no,
    "prompt_logprobs": lambda value: None if value is None else _whole(0, _MOST_LOGPROBS)(value),
}
"""Settings that no key of the configuration has."""


@dataclass(frozen=True)
class Prompt:
    """A text to continue, as token ids, with everything that is particular to it.

    Attributes:
        ids: the prompt's tokens.
        settings: how it is continued.
        stop_ids: tokens that end it.
        label: what messages call it.
        stream: tells equal prompts of one run apart, so that they get different random numbers.
    """

    ids: Tuple[int, ...]
    settings: Settings
    stop_ids: FrozenSet[int]
    label: str = "the prompt"
    stream: int = 0

    def to_json(self) -> Dict[str, Any]:
        """For another rank."""
        return {**asdict(self), "stop_ids": sorted(self.stop_ids)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Prompt":
        """What `to_json` has made."""
        own = value["settings"]
        settings = Settings(**{**own, "stop": tuple(own["stop"]), "logit_bias": tuple(map(tuple, own["logit_bias"]))})
        return cls(**{**value, "ids": tuple(value["ids"]), "settings": settings,
                      "stop_ids": frozenset(value["stop_ids"])})


@dataclass(frozen=True)
class Piece:
    """More of an answer: `text` is what has become certain; `usage` comes with the last piece.

    `index` is the prompt's, `choice` counts its answers from 0.
    """

    index: int
    text: str
    answer: "Answer"
    usage: Optional[Usage]
    choice: int = 0


class Session:
    """A configuration with its tokenizer, and, once open, its network and engine.

    Attributes:
        config, tokenizer, limits: known before anything big is loaded.
        engine: None until `open`.
    """

    def __init__(self, config: Config, tokenizer: Any, checkpoint: str):
        self.config = config
        self.tokenizer = tokenizer
        self.checkpoint = checkpoint
        model = config.model
        self.limits = Limits(model.dims.vocab_size, model.seq_length, model.num_blocks, model.block_size)
        self.engine: Optional[Engine] = None
        self.note = ""

    @classmethod
    def prepare(cls, config: Config, launched: bool = True) -> "Session":
        """Find the checkpoint's files and read the tokenizer.

        Args:
            config: the whole configuration.
            launched: the session will be opened, so a parallel configuration needs to have been started by a launcher.

        Raises:
            UserError: files are missing or do not belong together, or the number of workers contradicts the
                configuration.
        """
        if launched:
            check_launch(config)
        if config.threads:
            ops.use_threads(config.threads)
        checkpoint = weights.resolve_for(config)
        if config.tokenizer.vocab_file is None or config.tokenizer.merges_file is None:
            # A folder without a checkpoint is reported as that, not for its other missing files
            open_checkpoint(checkpoint)
        tokenizer = load_tokenizer(config)
        if config.speculation is not None and config.speculation.draft is not None:
            check_draft(tokenizer, config.speculation.draft)
        return cls(config, tokenizer, checkpoint)

    @property
    def rank(self) -> int:
        """This process among the tensor-parallel ones."""
        return self.engine.network.rank if self.engine is not None else env_rank()

    def open(self, tell: Callable[[str], None], max_batch: Optional[int] = None) -> None:
        """Load the network.

        Args:
            tell: receives one line for each thing worth knowing.
            max_batch: most sequences that run at once; None leaves it to the KV cache.

        Raises:
            UserError: it does not fit in memory, or the checkpoint does not fit it.
        """
        start_s = time.perf_counter()
        tell(memory_check.check(self.config))
        guesses = self.config.speculation
        with interrupts.held(), stdout_to_stderr():
            from ..network.build import build_network

            draft = None
            if guesses is not None and guesses.draft is not None and env_rank() == 0:
                # Before the model itself: the network built last decides how exactly the kernels compute.
                draft = build_network(guesses.draft, weights.resolve_for(guesses.draft),
                                      lambda line: tell(f"draft model: {line}"))
            network = build_network(self.config, self.checkpoint, tell)
            ranks.refuse_unlike(network)
        quantised = network.quantised_bytes is not None
        self.engine = Engine(network, self.limits, max_batch, selection(),
                             speculation=None if guesses is None else self._speculation(guesses, draft, quantised))
        self.note = network.note
        if draft is not None:
            tell(f"draft model: {draft.note}")
        tell(f"{network.note}; ready in {time.perf_counter() - start_s:.1f} s")

    def _speculation(self, guesses: config_schema.SpeculationConfig, draft: Optional[Network],
                     quantised: bool) -> Speculation:
        if guesses.draft is None:
            return PromptLookup(guesses.tokens, quantised)
        if draft is None:
            return Told(guesses.tokens, most_streams(quantised))
        model = guesses.draft.model
        return DraftModel(draft, model.num_blocks, model.block_size, self.limits.vocab_size, guesses.tokens,
                          draft_cost(self.config, guesses.draft), selection(), quantised)

    def prompt(self, text: str, settings: Settings, control_tokens: bool = True, label: str = "the prompt") -> Prompt:
        """A text to be continued as it stands."""
        return Prompt(tuple(self.tokenizer.encode(text, control_tokens=control_tokens)), settings,
                      frozenset(self.config.model.eos_token_id), label)

    def chat_prompt(self, messages: Sequence[chat.Message], settings: Settings, label: str = "the message",
                    tools: Optional[Sequence[Any]] = None, variables: Optional[Mapping[str, Any]] = None) -> Prompt:
        """A conversation that asks for the assistant's next answer.

        Args:
            messages: oldest first.
            settings: how the answer is generated.
            label: what messages call it.
            tools: descriptions of callable functions, for templates that know them.
            variables: whatever else the template may use, e.g. `enable_thinking`.

        Raises:
            UserError: the chat template refuses the messages.
        """
        ids = chat.prompt_ids(self.tokenizer, messages, tools=tools, **(variables or {}))
        return Prompt(tuple(ids), settings, self.chat_stop_ids, label)

    @property
    def chat_stop_ids(self) -> FrozenSet[int]:
        """Tokens that end an answer of a conversation."""
        return chat.stop_ids(self.tokenizer, self.config.model.eos_token_id)

    def requests(self, prompts: Sequence[Prompt]) -> List[Request]:
        """What the engine runs for `prompts`, `settings.n` for each, checked against the limits.

        Raises:
            UserError: an empty or too long prompt, with the numbers.
        """
        made = []
        for prompt in prompts:
            s = prompt.settings
            if s.n > 1 and not s.do_sample:
                raise UserError(f"{prompt.label} asks for {s.n} answers, and without do_sample they would all be the "
                                "same", fix="Set do_sample, or n 1.")
            seed = sampling.pick_seed(s.seed)
            for choice in range(s.n):
                made.append(Request(prompt.ids, s.max_length, s.max_new_tokens, prompt.stop_ids,
                                    s.params(seed, prompt.stream + choice), s.logprobs,
                                    s.prompt_logprobs if choice == 0 else None, speculate=s.speculate,
                                    label=prompt.label))
                self.limits.check(made[-1])
        return made

    def run(self, prompts: Sequence[Prompt]) -> Iterator[Piece]:
        """Generate, and yield every piece of every answer as it becomes certain; the session must be open.

        Raises:
            UserError: a request has failed (its logits were not finite); after all others have ended.
        """
        assert self.engine is not None
        places = [(index, choice) for index, prompt in enumerate(prompts) for choice in range(prompt.settings.n)]
        answers = [Answer(self.tokenizer, prompts[index]) for index, _ in places]
        failures: List[UserError] = []
        run = self.engine.generate(self.requests(prompts))
        for step in run:
            if step.error is not None:
                failures.append(step.error)
                continue
            answer = answers[step.request]
            text = answer.take(step)
            if answer.stopped and step.finish_reason is None:
                run.cancel(step.request)
            if text or step.usage is not None:
                index, choice = places[step.request]
                yield Piece(index, text, answer, answer.usage, choice)
        if failures:
            raise failures[0]


class Answer:
    """One request's continuation as it grows: text and token ids, and why it ended; one of `siblings` to the same
    prompt."""

    def __init__(self, tokenizer: Any, prompt: Prompt):
        self._tokenizer = tokenizer
        self._stream = TextStream(tokenizer.token_bytes, tokenizer.control_token_ids, prompt.settings.stop)
        self._stop_ids = prompt.stop_ids
        self.siblings = prompt.settings.n
        self.pieces: List[str] = []
        self.token_ids: List[int] = []
        self.logprobs: List[Dict[str, Any]] = []
        self.prompt_logprobs: List[Dict[str, Any]] = []
        self._prompt_ids = prompt.ids
        self.finish_reason = ""
        self.usage: Optional[Usage] = None

    @property
    def stopped(self) -> bool:
        """A stop string was met."""
        return self._stream.stopped

    @property
    def text(self) -> str:
        """The continuation so far."""
        return "".join(self.pieces)

    def take(self, step: Step) -> str:
        """Add a step and return the text that has become certain."""
        piece = ""
        if step.prompt_logprobs is not None:
            self.prompt_logprobs = [self.entry(token, found)
                                    for token, found in zip(self._prompt_ids[1:], step.prompt_logprobs)]
        if step.token is not None and not self.stopped:
            self.token_ids.append(step.token)
            if step.token not in self._stop_ids:
                piece = self._stream.feed(step.token)
            if step.logprobs is not None:
                self.logprobs.append(self.entry(step.token, step.logprobs))
        if step.finish_reason is not None:
            piece += self._stream.end()
            self.finish_reason = STOP if self.stopped else step.finish_reason
        if step.usage is not None:
            # Tokens after a stop string came in the same step and do not belong to the answer.
            self.usage = step.usage._replace(generated_tokens=len(self.token_ids))
        self.pieces.append(piece)
        return piece

    def entry(self, token: int, logprobs: LogProbs) -> Dict[str, Any]:
        """A token's log probability and those of the likeliest in its place: token_id, token, logprob, top."""
        return {**self._probability(token, logprobs.chosen), "top": [self._probability(*pair) for pair in logprobs.top]}

    def _probability(self, token: int, logprob: float) -> Dict[str, Any]:
        text = self._tokenizer.token_bytes(token).decode("utf-8", "replace")
        return {"token_id": token, "token": text, "logprob": logprob}


def numbered(prompts: Sequence[Prompt]) -> List[Prompt]:
    """The prompts with a `stream` that counts equal ones: copies draw differently, and none depends on the others."""
    copies: Dict[Tuple[int, ...], int] = {}
    made = []
    for prompt in prompts:
        stream = copies.get(prompt.ids, 0)
        copies[prompt.ids] = stream + prompt.settings.n
        made.append(replace(prompt, stream=stream))
    return made


def selection() -> Selection:
    """The searches over the vocabulary: the kernel library's where it can be used, NumPy's otherwise."""
    from ..kernels import library

    if os.environ.get("QWEN15_KERNELS") == "reference":
        return sampling.PLAIN
    try:
        return sampling.accelerated(library.load())
    except UserError:  # not built; the network's note has reported it
        return sampling.PLAIN


def load_tokenizer(config: Config) -> Any:
    """The tokenizer of the configuration's vocab.json and merges.txt.

    Raises:
        UserError: the files are not given, damaged, or not of this model.
    """
    files = config.tokenizer
    if files.vocab_file is None or files.merges_file is None:
        name = "vocab_file" if files.vocab_file is None else "merges_file"
        raise UserError("is not set and there is no such file beside the checkpoint",
                        where=f"processor.tokenizer.{name}", fix=f"Pass --{name}, or set it in the YAML.")
    from ..text.tokenizer import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer.from_files(files.vocab_file, files.merges_file, files.options)
    if len(tokenizer) > config.model.dims.vocab_size:
        raise UserError(f"has {len(tokenizer)} tokens, the model's vocabulary only {config.model.dims.vocab_size}",
                        where=files.vocab_file, fix="Use the tokenizer files of this checkpoint.")
    return tokenizer


def check_draft(tokenizer: Any, draft: Config) -> None:
    """Refuse a draft model whose token ids mean something else than the model's.

    Raises:
        UserError: with the first id that differs, or its tokenizer's files are missing.
    """
    where = f"speculate {draft.load_checkpoint}"
    if draft.tokenizer.vocab_file is None or draft.tokenizer.merges_file is None:
        raise UserError("there is no vocab.json and merges.txt beside the draft model, so its tokens cannot be "
                        "compared with the model's", where=where,
                        fix="Copy the files of the draft model's own download there.")
    try:
        own = load_tokenizer(draft)
    except UserError as error:
        raise UserError(f"the draft model's tokenizer cannot be used: {error.what}", error.where, error.fix) from None
    for token in range(min(len(tokenizer), len(own))):
        theirs, ours = own.token_bytes(token), tokenizer.token_bytes(token)
        if theirs != ours:
            raise UserError(f"the draft model has another tokenizer: token {token} is "
                            f"{theirs.decode('utf-8', 'replace')!r} there and {ours.decode('utf-8', 'replace')!r} in "
                            f"{tokenizer.vocab_file}", where=where, fix="Use a smaller model of the same family.")
    weights.resolve_for(draft)


def is_chat_model(tokenizer: Any) -> bool:
    """Whether the checkpoint was trained to answer: its texts end with the token that closes a message.

    A chat template alone does not tell: Qwen1.5's base checkpoints carry one too.
    """
    return tokenizer.im_end_id is not None and tokenizer.eos_token_id == tokenizer.im_end_id


def mismatch(tokenizer: Any, as_chat: bool, prompts: Sequence[Prompt] = ()) -> Optional[str]:
    """One line when a model is used for what it was not trained for, None when it is not.

    Args:
        tokenizer: the checkpoint's.
        as_chat: it is asked as a conversation; otherwise it continues `prompts` as they stand.
    """
    if as_chat and not is_chat_model(tokenizer):
        return (f"note: this looks like a base model (its texts end with {tokenizer.eos_token}, not <|im_end|>): it "
                "continues texts and was not trained to answer")
    if not as_chat and is_chat_model(tokenizer) and any(tokenizer.im_start_id not in prompt.ids for prompt in prompts):
        return "note: this looks like a chat model, and the text goes to it as it stands; --chat asks it as a message"
    return None


def check_launch(config: Config) -> None:
    """Refuse a parallel configuration in a process that no launcher has started.

    Raises:
        UserError: with the command that starts it.
    """
    parallel = config.parallel
    if parallel.model_parallel > 1 and not os.environ.get("MS_ROLE"):
        raise UserError(f"model_parallel {parallel.model_parallel} needs {parallel.model_parallel} workers and this is "
                        f"one process",
                        where="use_parallel",
                        fix=f'Start them: bash scripts/msrun_launcher.sh "python run_qwen1_5.py ..." '
                        f"{parallel.model_parallel}, or pass --use_parallel False.")
