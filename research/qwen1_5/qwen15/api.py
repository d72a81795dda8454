"""The Python interface: `from qwen15 import load, generate, convert`.

Example, with a checkpoint that is a Hugging Face folder of Qwen2's architecture or what `convert` has made of one:

    >>> from qwen15 import convert, generate, load
    >>> made = convert(checkpoint, target)                        # Hugging Face -> MindSpore
    >>> made.tensors > 0
    True
    >>> with load(target) as model:
    ...     one = generate(model, "The capital of France is", max_new_tokens=4)
    ...     two = generate(model, ["1, 2, 3,", "a, b, c,"], max_new_tokens=3)
    ...     spoken = "".join(model.stream("Water boils at", max_new_tokens=8))
    ...     answer = model.chat([{"role": "user", "content": "Say hello."}], max_new_tokens=8)
    >>> one.text.strip(), one.finish_reason
    ('Paris.', 'length')
    >>> [len(each.token_ids) for each in two]
    [3, 3]
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Callable, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple, Type, Union, overload

from . import interrupts  # noqa: F401  (before NumPy, see there)
from .config.flags import Flag
from .config.keys import KEYS, MODEL, TOKENIZER
from .config.load import load_config
from .config.schema import Config
from .errors import UserError, did_you_mean
from .generation.request import Usage
from .generation.session import Answer, Piece, Prompt, Session, Settings, numbered
from .reporting import frameworks_quiet
from .text.chat import Message

__all__ = ["Conversion", "Generation", "Model", "UserError", "convert", "generate", "load"]

_TURN = threading.RLock()
"""MindSpore runs one graph at a time: two threads in it at once wait for each other for ever. They take turns."""
_loaded_in: List[int] = []
"""The process that has loaded a model: MindSpore's threads do not survive a fork."""
_PREFIXES = ("", MODEL, TOKENIZER, "context.", "parallel_config.")


@dataclass(frozen=True)
class Generation:
    """What a model has added to a prompt.

    Attributes:
        text: the continuation.
        token_ids: its tokens, the one that ended it included.
        finish_reason: 'stop' (an end token or a stop string) or 'length'.
        prompt_tokens: tokens of the prompt.
        prefill_s, decode_s: seconds of the calls this prompt was part of, shared with the rest of its batch.
        logprobs: when asked for, one entry per token: token_id, token, logprob (natural), the likeliest as `top`.
        cached_tokens: tokens of the prompt that an earlier one had left in the KV cache.
        prompt_logprobs: when asked for, such an entry for each token of the prompt but the first.
        answers: with `n` over 1 all of them; this one is the first.
        decode_steps: calls of the network that made its tokens after the first.
        guessed_tokens, accepted_tokens: guesses that were checked and those that were right, with `speculate`.
    """

    text: str
    token_ids: Tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    prefill_s: float
    decode_s: float
    logprobs: Tuple[Mapping[str, Any], ...] = ()
    cached_tokens: int = 0
    prompt_logprobs: Tuple[Mapping[str, Any], ...] = ()
    answers: Tuple["Generation", ...] = ()
    decode_steps: int = 0
    guessed_tokens: Optional[int] = None
    accepted_tokens: Optional[int] = None

    @classmethod
    def _of(cls, answer: Answer, usage: Usage) -> "Generation":
        return cls(answer.text, tuple(answer.token_ids), answer.finish_reason, usage.prompt_tokens, usage.prefill_s,
                   usage.decode_s, tuple(answer.logprobs), usage.cached_tokens, tuple(answer.prompt_logprobs),
                   decode_steps=usage.decode_steps, guessed_tokens=usage.guessed_tokens,
                   accepted_tokens=usage.accepted_tokens)


@dataclass(frozen=True)
class Conversion:
    """What a conversion has done: where the result is, how many tensors and bytes, and what casts lost, a line each."""

    path: str
    tensors: int
    nbytes: int
    casts: Tuple[str, ...]


class Model:
    """A loaded model; made by `load`. Close it, or use it in a `with`, to free its memory.

    Several threads may use it, and other models beside it: they take turns, token by token for `stream`, call by
    call for everything else.

    Attributes:
        config: every setting, checked.
        tokenizer: the checkpoint's Qwen2Tokenizer.
    """

    def __init__(self, session: Session):
        self._session: Optional[Session] = session
        self.config: Config = session.config
        self.tokenizer: Any = session.tokenizer

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, kind: Optional[Type[BaseException]], error: Optional[BaseException],
                 traceback: Optional[TracebackType]) -> None:
        self.close()

    def close(self) -> None:
        """Free the weights and the KV cache. A second call does nothing."""
        self._session = None

    def stream(self, prompt: Union[str, Sequence[Message]], **settings: Any) -> Iterator[str]:
        """The continuation piece by piece, as it becomes certain.

        Args:
            prompt: a text, or a conversation's messages (`{"role": ..., "content": ...}`).
            settings: as for `generate`.

        Raises:
            UserError: a prompt or setting that cannot be; before the first piece.
        """
        session = self._open()
        prompts = self._prompts([prompt], settings)
        if prompts[0].settings.n > 1:
            raise UserError("a stream gives one answer", where="n", fix="Call generate.")
        session.requests(prompts)
        return _in_turn(session.run(prompts))

    def chat(self, messages: Union[str, Sequence[Message]], **settings: Any) -> Generation:
        """The assistant's next answer.

        Args:
            messages: `{"role": "system" | "user" | "assistant", "content": text}`, oldest first; or a question as text.
            settings: as for `generate`.

        Raises:
            UserError: the chat template refuses the messages, or they are too long.
        """
        conversation = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        return self._generate([conversation], settings)[0]

    def _generate(self, prompts: Sequence[Union[str, Sequence[Message]]],
                  settings: Mapping[str, Any]) -> List[Generation]:
        session = self._open()
        checked = self._prompts(prompts, settings)
        made: List[List[Optional[Generation]]] = [[None] * prompt.settings.n for prompt in checked]
        with _TURN:
            for piece in session.run(checked):
                if piece.usage is not None:
                    made[piece.index][piece.choice] = Generation._of(piece.answer, piece.usage)
        return [_first([each for each in answers if each is not None]) for answers in made]

    def _prompts(self, prompts: Sequence[Union[str, Sequence[Message]]], settings: Mapping[str, Any]) -> List[Prompt]:
        session, values = self._open(), dict(settings)
        control_tokens = values.pop("control_tokens", True)
        for name in values:
            if name not in Settings.__dataclass_fields__:
                raise TypeError(
                    f"{name!r} is not a setting. {did_you_mean(name, Settings.__dataclass_fields__) or ''}".rstrip())
        if values.get("max_new_tokens") is not None:
            # An explicit max_new_tokens wins over the configuration's limit on the total length.
            values.setdefault("max_length", self.config.model.seq_length)
        try:
            checked = Settings.of(self.config).changed(values)
        except ValueError as error:
            raise UserError(str(error)) from None
        made = []
        for number, prompt in enumerate(prompts, 1):
            label = "the prompt" if len(prompts) == 1 else f"prompt {number}"
            made.append(session.prompt(prompt, checked, control_tokens, label) if isinstance(prompt, str)
                        else session.chat_prompt(prompt, checked, label))
        return numbered(made)

    def _open(self) -> Session:
        if self._session is None:
            raise ValueError("the model is closed")
        _refuse_after_fork()
        return self._session


def _in_turn(pieces: Iterator[Piece]) -> Iterator[str]:
    try:
        while True:
            with _TURN:
                piece = next(pieces, None)
            if piece is None:
                return
            if piece.text:
                yield piece.text
    finally:
        with _TURN:
            pieces.close()  # type: ignore[attr-defined]  # a generator: closing it frees its KV cache blocks


def _refuse_after_fork() -> None:
    """MindSpore waits for ever in a forked child.

    Raises:
        UserError: this process was forked off one that has loaded a model.
    """
    if _loaded_in and os.getpid() not in _loaded_in:
        raise UserError(f"process {os.getpid()} was forked off process {_loaded_in[0]}, which had loaded a model",
                        fix="Load after the fork, or start processes afresh: multiprocessing.get_context('spawn').")


def load(checkpoint: Union[str, "os.PathLike[str]"], config: Union[str, "os.PathLike[str]", None] = None, *,
         tell: Optional[Callable[[str], None]] = None, max_batch: Optional[int] = None, **settings: Any) -> Model:
    """Load a model.

    Args:
        checkpoint: a Hugging Face folder, or a converted file or folder.
        config: a predict_qwen1_5_*.yaml; None takes everything from the checkpoint's own config.json.
        tell: receives lines about what was loaded; None drops them.
        max_batch: most sequences that run at once; None leaves it to the KV cache.
        settings: keys of the YAML by their last name (`seq_length=2048`, `param_init_type="float32"`, `num_blocks=256`,
            `device_target="CPU"`, `speculate="ngram"`), over those of `config`.

    Raises:
        UserError: a key or value that cannot be, a checkpoint that does not fit, too little memory.
    """
    _refuse_after_fork()
    flags = [Flag("load_checkpoint", "checkpoint", os.fspath(checkpoint))]
    flags += [Flag(_key(name), name, value) for name, value in settings.items() if value is not None]
    session = Session.prepare(load_config(None if config is None else os.fspath(config), flags))
    with _TURN, frameworks_quiet():
        _loaded_in.append(os.getpid())
        session.open(tell or (lambda line: None), max_batch)
    return Model(session)


def _first(answers: List[Generation]) -> Generation:
    return answers[0] if len(answers) == 1 else replace(answers[0], answers=tuple(answers))


def _key(name: str) -> str:
    for prefix in _PREFIXES:
        if prefix + name in KEYS:
            return prefix + name
    known = [key.rpartition(".")[2] for key in KEYS]
    raise UserError(f"{name!r} is not a known key", fix=did_you_mean(name, known))


@overload
def generate(model: Model, prompt: str, **settings: Any) -> Generation: ...


@overload
def generate(model: Model, prompt: Sequence[str], **settings: Any) -> List[Generation]: ...


def generate(model: Model, prompt: Union[str, Sequence[str]], **settings: Any) -> Union[Generation, List[Generation]]:
    """Continue a text, or several at once.

    Args:
        model: from `load`.
        prompt: one text gives one `Generation`, a list of texts a list, in the same order. Several run side by side;
            with float32 weights and KV cache none depends on the others.
        settings: over the model's configuration: `max_new_tokens`, `max_length` (prompt included), `do_sample`,
            `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty`, `presence_penalty`, `frequency_penalty`,
            `no_repeat_ngram_size`, `min_new_tokens`, `logit_bias` (token id to number), `seed`, `n` (answers to
            each prompt), `stop` (a text or several), `logprobs` and `prompt_logprobs` (a number each), `speculate`
            (False: nothing is guessed for it), and `control_tokens` (False: `<|im_end|>` and the like in the text stay
            text).

    Raises:
        UserError: a prompt that is empty or too long, or a setting out of bounds; nothing is generated then.
        TypeError: a setting that does not exist.
    """
    several = isinstance(prompt, Iterable) and not isinstance(prompt, (str, Mapping))
    prompts: List[Any] = list(prompt) if several else [prompt]
    for each in prompts:
        if isinstance(each, Mapping):
            raise UserError("generate continues texts, and this is a conversation", fix="Use model.chat(messages).")
        if not isinstance(each, str):
            raise TypeError(f"a prompt is a text, not {type(each).__name__}")
    made = model._generate(prompts, settings)
    return made if several else made[0]


def convert(source: Union[str, "os.PathLike[str]"], target: Union[str, "os.PathLike[str]"], *, dtype: str = "auto",
            model_parallel: Optional[int] = None, vocab_emb_dp: bool = True, to_hugging_face: bool = False,
            verify: bool = False, overwrite: bool = False, allow_overflow: bool = False) -> Conversion:
    """Convert a checkpoint between Hugging Face and MindSpore; nothing half done is ever left at `target`.

    Args:
        source: folder or file of the checkpoint.
        target: `x.ckpt`, `x.safetensors`, or a folder.
        dtype: of the result: 'float32', 'float16', 'bfloat16', or 'auto' for the source's own.
        model_parallel: cut the result into rank_0, rank_1, ...; None leaves it whole.
        vocab_emb_dp: with model_parallel: embedding and head stay whole.
        to_hugging_face: the other direction, MindSpore -> Hugging Face.
        verify: read the result back and compare every tensor before it is put in place.
        overwrite: replace an earlier result.
        allow_overflow: let values that `dtype` cannot hold become infinite.

    Raises:
        UserError: a weight is missing, surplus or misshapen, the target is in the way, or the disk is too small.
    """
    from .conversion import hugging_face
    from .conversion.run import run
    from .conversion.slices import Slicing

    slicing = None if model_parallel is None else Slicing(model_parallel, vocab_emb_dp)
    if to_hugging_face and slicing is not None:
        raise UserError("slices are for MindSpore", where="model_parallel",
                        fix="Leave it out when converting to Hugging Face.")
    path = os.fspath(target)
    is_folder = os.path.isdir(path) or not os.path.splitext(path)[1]
    output = hugging_face.Output(target=path, form="folder" if is_folder and slicing is None else None, dtype=dtype,
                                 slicing=slicing)
    make_plan = hugging_face.plan_to_hugging_face if to_hugging_face else hugging_face.plan_to_mindspore
    plan = make_plan(os.fspath(source), output)
    try:
        result = run(plan, verify=verify, overwrite=overwrite, allow_overflow=allow_overflow)
    finally:
        plan.close()
    return Conversion(plan.target, len(plan.moves), plan.write_bytes, tuple(result.tally.lines()))
