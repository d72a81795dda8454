"""A configuration with its tokenizer, network and engine: prompts in, pieces of text out."""

import os
import time
from dataclasses import dataclass, fields, replace
from typing import Any, Callable, Dict, FrozenSet, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from .. import interrupts, ops
from ..checkpoint.reader import open_checkpoint
from ..config.keys import KEYS, MODEL, convert
from ..config.schema import Config
from ..device import env_rank
from ..errors import UserError
from ..network import weights
from ..reporting import stdout_to_stderr
from ..text import chat
from ..text.stream import TextStream
from . import memory_check, sampling
from .engine import Engine
from .request import STOP, Limits, LogProbs, Request, Step, Usage
from .sampling import SamplingParams, Selection

_KEY_OF = {"seed": "seed", "max_length": MODEL + "max_decode_length",
           **{name: MODEL + name for name in ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens")}}
_MOST_LOGPROBS = 1000


@dataclass(frozen=True)
class Settings:
    """How one prompt is continued.

    Attributes:
        do_sample, temperature, top_k, top_p, repetition_penalty: see `sampling.SamplingParams`.
        seed: None draws differently at every run.
        max_length: longest text in tokens, prompt included.
        max_new_tokens: most new tokens; whichever limit comes first ends it.
        stop: the answer ends before the first of these strings.
        logprobs: report the log probabilities of this many likeliest tokens at each step, 0 for none.
        prompt_logprobs: report those of the prompt's own tokens, with this many likeliest ones beside each; None for none.
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
    prompt_logprobs: Optional[int] = None

    @classmethod
    def of(cls, config: Config) -> "Settings":
        """What the configuration says."""
        g = config.generation
        return cls(g.do_sample, g.temperature, g.top_k, g.top_p, g.repetition_penalty, g.seed, g.max_length, g.max_new_tokens)

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
                elif name == "stop":
                    value = _stop_strings(value)
                elif name == "logprobs" or name == "prompt_logprobs" and value is not None:
                    value = _logprobs(value)
            except ValueError as error:
                raise ValueError(f"{name} {error}") from None
            checked[name] = value
        return replace(self, **checked)

    @property
    def idle(self) -> Tuple[str, ...]:
        """Settings of sampling that have no effect because do_sample is off."""
        neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        return () if self.do_sample else tuple(name for name, value in neutral.items() if getattr(self, name) != value)


SETTING_NAMES = tuple(field.name for field in fields(Settings))


def _stop_strings(value: Any) -> Tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, (list, tuple)) else None
    if strings is None or any(not isinstance(text, str) for text in strings):
        raise ValueError(f"wants a text or a list of them, not {value!r}")
    if "" in strings:
        raise ValueError("holds an empty text, which would end every answer at once")
    return strings


def _logprobs(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST_LOGPROBS:
        raise ValueError(f"wants a whole number from 0 to {_MOST_LOGPROBS}, not {value!r}")
    return value


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


class Piece(NamedTuple):
    """More of an answer: `text` is what has become certain; `usage` comes with the last piece."""

    index: int
    text: str
    answer: "Answer"
    usage: Optional[Usage]


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
            UserError: files are missing or do not belong together, or the number of workers contradicts the configuration.
        """
        if launched:
            check_launch(config)
        if config.threads:
            ops.use_threads(config.threads)
        parallel = config.parallel
        checkpoint = weights.resolve(config.load_checkpoint, env_rank() if parallel.use_parallel else 0, parallel.model_parallel,
                                     config.auto_trans_ckpt)
        if config.tokenizer.vocab_file is None or config.tokenizer.merges_file is None:
            open_checkpoint(checkpoint)  # a folder that holds no checkpoint is named as such, not for what else it lacks
        return cls(config, load_tokenizer(config), checkpoint)

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
        with interrupts.held(), stdout_to_stderr():
            from ..network.build import build_network

            network = build_network(self.config, self.checkpoint, tell)
        self.engine = Engine(network, self.limits, max_batch, selection())
        self.note = network.note
        tell(f"{network.note}; ready in {time.perf_counter() - start_s:.1f} s")

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
        """What the engine runs for `prompts`, each checked against the limits.

        Raises:
            UserError: an empty or too long prompt, with the numbers.
        """
        made = []
        for prompt in prompts:
            s = prompt.settings
            params = SamplingParams(s.do_sample, s.temperature, s.top_k, s.top_p, s.repetition_penalty,
                                    sampling.pick_seed(s.seed), prompt.stream)
            made.append(Request(prompt.ids, s.max_length, s.max_new_tokens, prompt.stop_ids, params, s.logprobs,
                                s.prompt_logprobs, label=prompt.label))
            self.limits.check(made[-1])
        return made

    def run(self, prompts: Sequence[Prompt]) -> Iterator[Piece]:
        """Generate, and yield every piece of every answer as it becomes certain; the session must be open.

        Raises:
            UserError: a request has failed (its logits were not finite); after all others have ended.
        """
        assert self.engine is not None
        answers = [Answer(self.tokenizer, prompt) for prompt in prompts]
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
                yield Piece(step.request, text, answer, step.usage)
        if failures:
            raise failures[0]


class Answer:
    """One request's continuation as it grows: text and token ids, and why it ended."""

    def __init__(self, tokenizer: Any, prompt: Prompt):
        self._tokenizer = tokenizer
        self._stream = TextStream(tokenizer.token_bytes, tokenizer.control_token_ids, prompt.settings.stop)
        self._stop_ids = prompt.stop_ids
        self.pieces: List[str] = []
        self.token_ids: List[int] = []
        self.logprobs: List[Dict[str, Any]] = []
        self.finish_reason = ""

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
        if step.token is not None and not self.stopped:
            self.token_ids.append(step.token)
            if step.token not in self._stop_ids:
                piece = self._stream.feed(step.token)
            if step.logprobs is not None:
                self.logprobs.append(self.entry(step.token, step.logprobs))
        if step.finish_reason is not None:
            piece += self._stream.end()
            self.finish_reason = STOP if self.stopped else step.finish_reason
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
        copies[prompt.ids] = stream + 1
        made.append(replace(prompt, stream=stream))
    return made


def selection() -> Selection:
    """The searches over the vocabulary: the kernel library's where it can be used, NumPy's otherwise."""
    from ..kernels import library

    if os.environ.get("QWEN15_KERNELS") == "reference":
        return sampling.PLAIN
    try:
        return sampling.accelerated(library.load())
    except UserError:  # not built; the network's note has said so
        return sampling.PLAIN


def load_tokenizer(config: Config) -> Any:
    """The tokenizer of the configuration's vocab.json and merges.txt.

    Raises:
        UserError: the files are not given, damaged, or not of this model.
    """
    files = config.tokenizer
    for name, path in (("vocab_file", files.vocab_file), ("merges_file", files.merges_file)):
        if path is None:
            raise UserError("is not set and there is no such file beside the checkpoint", where=f"processor.tokenizer.{name}",
                            fix=f"Pass --{name}, or set it in the YAML.")
    from ..text.tokenizer import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer.from_files(files.vocab_file, files.merges_file, files.options)
    if len(tokenizer) > config.model.dims.vocab_size:
        raise UserError(f"has {len(tokenizer)} tokens, the model's vocabulary only {config.model.dims.vocab_size}",
                        where=files.vocab_file, fix="Use the tokenizer files of this checkpoint.")
    return tokenizer


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
        return (f"note: this looks like a base model (its texts end with {tokenizer.eos_token}, not <|im_end|>): it continues texts "
                "and was not trained to answer")
    if not as_chat and is_chat_model(tokenizer) and any(tokenizer.im_start_id not in prompt.ids for prompt in prompts):
        return "note: this looks like a chat model, and the text goes to it as it stands; --chat asks it as a message"
    return None


def check_launch(config: Config) -> None:
    """Refuse a parallel configuration in a process that no launcher has started."""
    parallel = config.parallel
    if parallel.use_parallel and parallel.model_parallel > 1 and not os.environ.get("MS_ROLE"):
        raise UserError(f"model_parallel {parallel.model_parallel} needs {parallel.model_parallel} workers and this is one process",
                        where="use_parallel", fix=f'Start them: bash scripts/msrun_launcher.sh "python run_qwen1_5.py ..." '
                        f"{parallel.model_parallel}, or pass --use_parallel False.")
