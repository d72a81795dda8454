"""Prompts on their way to the engine: texts and conversations encoded, checked, and brought to every rank."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

from ..errors import UserError
from ..generation.session import Prompt, Session, Settings, mismatch, numbered
from ..reporting import Reporter

Messages = List[Dict[str, Any]]


@dataclass(frozen=True)
class PromptEntry:
    """One prompt as its user gave it.

    Attributes:
        index: its number, from 0; blank lines of a file are not counted.
        where: `prompts.jsonl:12` or `prompt 3`, for messages.
        source: the text to continue, or a conversation's messages.
        settings: how it is continued.
        name: the file's `id` for it, handed through to the result; None without one.
    """

    index: int
    where: str
    source: Union[str, Messages]
    settings: Settings
    name: Any = None


Todo = List[Tuple[PromptEntry, Prompt]]
"""Prompts without a result yet."""


def of_texts(texts: Sequence[str], settings: Settings, as_chat: bool, system: Optional[str]
             ) -> Iterator[PromptEntry]:
    """The texts of a command line; `as_chat` makes each the question of a conversation, after `system` if there is one.

    Raises:
        UserError: a question without any text.
    """
    for index, text in enumerate(texts):
        label = "the prompt" if len(texts) == 1 else f"prompt {index + 1}"
        if as_chat and not text.strip():
            raise UserError(f"{label} is empty", where="--predict_data", fix="Write a message.")
        yield PromptEntry(index, label, conversation(text, system) if as_chat else text, settings)


def conversation(text: str, system: Optional[str]) -> Messages:
    """A conversation of one question."""
    return [*([] if system is None else [{"role": "system", "content": system}]), {"role": "user", "content": text}]


def encode(session: Session, entries: Sequence[PromptEntry], control_tokens: bool = True) -> List[Prompt]:
    """The prompts of the entries, in their order; texts are encoded on all cores.

    Args:
        session: prepared; need not be open.
        entries: texts and conversations.
        control_tokens: whether `<|im_end|>` and the like in a text become control tokens; in a conversation they never
            do.

    Raises:
        UserError: a conversation that the template refuses; with its line.
    """
    texts = [entry.source for entry in entries if isinstance(entry.source, str)]
    ids = iter(session.tokenizer.encode_batch(texts, control_tokens=control_tokens))
    eos = frozenset(session.config.model.eos_token_id)
    made = []
    for entry in entries:
        if isinstance(entry.source, str):
            made.append(Prompt(tuple(next(ids)), entry.settings, eos, entry.where))
            continue
        try:
            made.append(session.chat_prompt(entry.source, entry.settings, entry.where))
        except UserError as error:
            raise UserError(error.what, where=entry.where, fix=error.fix) from None
    return numbered(made)


def point_out(session: Session, entries: Sequence[PromptEntry], prompts: Sequence[Prompt], report: Reporter) -> None:
    """Say once what the user may not have meant: a model used for what it was not trained for, settings without
    effect."""
    texts = [prompt for entry, prompt in zip(entries, prompts) if isinstance(entry.source, str)]
    hint = mismatch(session.tokenizer, as_chat=not texts, prompts=texts) if prompts else None
    if hint:
        report.warning(hint)
    inherited = Settings.of(session.config).idle
    for name in inherited:
        if session.config.sources.get(f"model.model_config.{name}", "").startswith("--"):
            report.warning(f"note: --{name} has no effect without --do_sample True")
    for entry in entries:
        own = [name for name in entry.settings.idle if name not in inherited]
        if own:
            report.warning(f"note: {entry.where}: {own[0]} has no effect without do_sample")
            return


def to_json(prompts: Sequence[Prompt]) -> bytes:
    """The prompts as rank 0 tells them to the other ranks."""
    return json.dumps([prompt.to_json() for prompt in prompts]).encode()


def from_json(message: bytes) -> List[Prompt]:
    """What `to_json` has told."""
    return [Prompt.from_json(value) for value in json.loads(message)]
