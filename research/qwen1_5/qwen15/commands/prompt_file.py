"""Files of prompts: a prompt a line, or JSON lines with settings of their own; a line that is wrong is named."""

from __future__ import annotations

from typing import Any, Dict, Iterator, Optional

from .. import strict_json
from ..errors import UserError, did_you_mean
from ..generation.session import SETTING_NAMES, Settings
from ..text_file import read_text
from .prompts import Messages, PromptEntry, conversation

_OTHER_KEYS = ("id", "prompt", "messages", "system")
_KEYS = _OTHER_KEYS + SETTING_NAMES
_MOST_BYTES = 2 ** 30


def read_file(path: str, settings: Settings, as_chat: bool = False, system: Optional[str] = None
              ) -> Iterator[PromptEntry]:
    """The prompts of a file: JSON lines when its name ends in .jsonl or its first line is an object, else one prompt a
    line.

    Args:
        path: the file, `-` for stdin.
        settings: what a line does not say.
        as_chat: texts are a conversation's question each.
        system: the system message of conversations that have none.

    Raises:
        UserError: the file cannot be read or is empty, or a line cannot be used; with its number.
    """
    name = "stdin" if path == "-" else path
    contents = read_text(path, _MOST_BYTES, "Split it.").removeprefix("\ufeff")
    lines = [(number, line) for number, line in enumerate(contents.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError("there is no prompt in it", where=name)
    as_json = path.endswith((".jsonl", ".ndjson")) or (not path.endswith(".txt") and _is_object(lines[0][1]))
    for index, (number, line) in enumerate(lines):
        where = f"{name}:{number}"
        if as_json:
            yield _entry_of_json(index, where, line, settings, as_chat, system)
        else:
            text = line.rstrip("\r")
            yield PromptEntry(index, where, conversation(text, system) if as_chat else text, settings)


def _is_object(line: str) -> bool:
    try:
        value = strict_json.loads(line)
    except ValueError:
        return False
    return isinstance(value, dict) and ("prompt" in value or "messages" in value)


def _entry_of_json(index: int, where: str, line: str, settings: Settings, as_chat: bool,
                   system: Optional[str]) -> PromptEntry:
    value = _json_object(line, where)
    for key in value:
        if key not in _KEYS:
            raise UserError(f"{key!r} is not a known key", where=where,
                            fix=did_you_mean(key, _KEYS) or f"Known are {', '.join(_KEYS)}.")
    if ("prompt" in value) == ("messages" in value):
        raise UserError("has both a prompt and messages" if "prompt" in value else "has neither a prompt nor messages",
                        where=where, fix='Example: {"prompt": "Gravity is", "max_new_tokens": 20}')
    source = _text(value, where, as_chat, system) if "prompt" in value else _messages(value, where, system)
    try:
        own = settings.changed({name: value[name] for name in SETTING_NAMES if name in value})
    except ValueError as error:
        raise UserError(str(error), where=where) from None
    return PromptEntry(index, where, source, own, value.get("id"))


def _json_object(line: str, where: str) -> Dict[str, Any]:
    try:
        value = strict_json.loads(line, once=True)
    except ValueError as error:
        raise UserError(str(error), where=where,
                        fix="Each line is one object; a file of plain texts is named .txt.") from None
    if not isinstance(value, dict):
        raise UserError(f"wants an object, not {type(value).__name__}", where=where,
                        fix='Example: {"prompt": "Gravity is"}')
    return value


def _system(value: Dict[str, Any], where: str, system: Optional[str]) -> Optional[str]:
    own = value.get("system", system)
    if "system" in value and not isinstance(own, str):
        raise UserError(f"system wants a text, not {own!r}", where=where)
    return own


def _text(value: Dict[str, Any], where: str, as_chat: bool, system: Optional[str]) -> Any:
    text, own_system = value["prompt"], _system(value, where, system)
    if not isinstance(text, str):
        raise UserError(f"prompt wants a text, not {text!r}", where=where)
    if as_chat:
        return conversation(text, own_system)
    if "system" in value:
        raise UserError("a system message needs a conversation", where=where, fix="Add --chat, or give messages.")
    return text


def _messages(value: Dict[str, Any], where: str, system: Optional[str]) -> Messages:
    messages, own_system = value["messages"], _system(value, where, system)
    if not isinstance(messages, list) or not messages:
        raise UserError("messages wants a list of role and content", where=where)
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"),
                                                           str) or not isinstance(message.get("content"), str):
            raise UserError(f"message {number} needs a role and a content that is text", where=where)
    if own_system is None:
        return messages
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": own_system}, *messages]
    if "system" in value:
        raise UserError("the system message is given twice, by system and in messages", where=where, fix="Keep one.")
    return messages
