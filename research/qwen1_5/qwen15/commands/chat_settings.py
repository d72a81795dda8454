"""/set of a conversation: every value of sampling, its present state, and how it is changed."""

from __future__ import annotations

from typing import Any

from .. import strict_json
from ..errors import UserError, did_you_mean
from ..generation.session import Settings

_WORDS = {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False, "none": None}
_MEANING = {
    "do_sample": "draw tokens at random; false takes the likeliest",
    "temperature": "above 1 more surprising, below 1 more predictable",
    "top_k": "draw from this many likeliest tokens, 0 from all",
    "top_p": "draw from the likeliest tokens that together have this probability",
    "min_p": "draw from tokens with at least this part of the likeliest one's probability, 0 from all",
    "repetition_penalty": "above 1 makes tokens that occurred less likely",
    "presence_penalty": "above 0 makes tokens that the answer has already less likely, below 0 more",
    "frequency_penalty": "the same for each time the answer has them",
    "no_repeat_ngram_size": "so many tokens in a row come only once, 0 allows repeating",
    "seed": "the same seed gives the same answers; none draws differently each time",
    "min_new_tokens": "an answer does not end before so many tokens",
    "max_new_tokens": "most tokens of an answer; none leaves it to the window",
    "stop": "an answer ends before this text; none for no such text",
}
NAMES = tuple(_MEANING)
"""The window is the conversation's own business, and log probabilities are for JSON."""


def describe(settings: Settings) -> str:
    """A line for each value, with what it means."""
    values = {name: shown(getattr(settings, name)) for name in NAMES}
    width = max(map(len, values.values()))
    names = max(map(len, NAMES))
    lines = [f"{name:<{names}} {value:<{width}}  {_MEANING[name]}"
             + (" (no effect without do_sample)" if name in settings.idle else "") for name, value in values.items()]
    return "\n".join([*lines, "/set NAME VALUE changes one."])


def shown(value: Any) -> str:
    """A value as /set takes it."""
    if isinstance(value, tuple):
        return " ".join(map(strict_json.dumps, value)) or "none"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def name_in(argument: str) -> str:
    """The name that `argument` ("top_k 5" or "top_k=5") begins with.

    Raises:
        UserError: there is no such value.
    """
    name = argument.replace("=", " ", 1).split()[0] if argument.replace("=", " ", 1).split() else argument
    if name not in NAMES:
        raise UserError(f"{name!r} is not a sampling setting", where="/set",
                        fix=did_you_mean(name, NAMES) or f"Known are {', '.join(NAMES)}.")
    return name


def changed(settings: Settings, argument: str) -> Settings:
    """`settings` with the value that `argument` ("top_k 5" or "top_k=5") names.

    Raises:
        UserError: no such name, no value, or one that is out of bounds.
    """
    name = name_in(argument)
    text = argument[len(name):].strip().removeprefix("=").strip() if argument.startswith(name) else ""
    if not text:
        raise UserError(f"/set {name} needs a value, it is {shown(getattr(settings, name))}",
                        fix=f"Example: /set {name} "
                        f"{'true' if name == 'do_sample' else 'none' if name == 'stop' else '1'}")
    try:
        value = _value(name, text)
        if value is None and name not in ("seed", "max_new_tokens"):
            raise ValueError(f"{name} needs a value")
        return settings.changed({name: value})
    except ValueError as error:
        raise UserError(str(error), where="/set") from None


def _value(name: str, text: str) -> Any:
    if name == "stop":
        return () if text.lower() == "none" else (_text(text),)
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return strict_json.loads(text)
    except ValueError:
        return text


def _text(text: str) -> str:
    """A text as it stands, or in double quotes with JSON's escapes (\"\\\\n\")."""
    if text.startswith('"'):
        try:
            value = strict_json.loads(text)
        except ValueError:
            return text
        return value if isinstance(value, str) else text
    return text
