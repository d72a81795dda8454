"""Messages to the ids of a prompt: the chat template, safe against forged control tokens; stop ids; window.

A chat prompt is equal, token for token, to Hugging Face's `apply_chat_template`, except where the text of a message
spells a control token (`<|im_end|>`): there it stays text. How this is kept apart:

* Before rendering, in every text of the messages the first character of each spelled control token is replaced by a
  Unicode noncharacter that occurs in none of them; so is that of an unfinished one at the end of a text, which could
  come to completion in the template. All other characters, and so the template's trimming, comparing and joining, see
  the text as it is.
* In the rendered prompt the control tokens are then the template's own. The prompt is cut at them, the noncharacters in
  the pieces between are turned back, and the pieces are encoded as ordinary text. Pieces are not cut at the borders of
  messages, because line ends there merge with the template's.
* The prompt is rendered a second time with every punctuation mark in the messages replaced by a noncharacter. If that
  gives another sequence of control tokens, the template makes them out of message text (by joining, deleting or
  exchanging parts), and the prompt is refused. Where a control token has no punctuation mark, or the template exchanges
  words, letters and digits are replaced as well, except in a message's role: a template that looks at words pays for
  that.

What a template that looks for a control token inside a message finds: nothing, once it is spelled by a user.
"""

from __future__ import annotations

import re
from typing import Any, Callable, Dict, FrozenSet, Iterable, List, Mapping, Optional, Sequence, Set, Tuple, Union

from ..errors import UserError
from .template import CHATML, render

Message = Mapping[str, Any]

_NONCHARACTERS = [chr(point) for point in range(0xFDD0, 0xFDF0)]


def prompt_ids(tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool = True,
               tools: Optional[Sequence[Any]] = None, chat_template: Optional[str] = None,
               **variables: Any) -> List[int]:
    """The prompt that asks for the next answer, as token ids; nothing in the messages can become a control token.

    Args:
        tokenizer: a Qwen2Tokenizer.
        messages: `{"role": "system" | "user" | "assistant", "content": text}`, oldest first.
        add_generation_prompt: end with the opening of the assistant's answer.
        tools: descriptions of callable functions, for templates that know them.
        chat_template: instead of the checkpoint's; without either, Qwen's ChatML.
        variables: for the template, e.g. `enable_thinking=False`.

    Raises:
        UserError: no messages; the template refuses them or makes control tokens out of their text.
    """
    _check_shape(messages)
    template = chat_template or tokenizer.chat_template or CHATML
    controls = tokenizer.all_special_tokens

    def rendered(some: Any, their_tools: Any) -> List[Union[int, str]]:
        text = render(template, some, tools=their_tools, add_generation_prompt=add_generation_prompt,
                      where=tokenizer.vocab_file, **{**tokenizer.special_tokens_map, **variables})
        return tokenizer.split_control(text)

    characters = {control[0] for control in controls}
    noncharacters = _unused(len(characters) + 1, messages, tools)
    spelled = dict(zip(sorted(characters), noncharacters[1:]))

    def masked(text: str) -> str:
        return _mask_spelled(text, controls, spelled)

    def without_marks(text: str) -> str:
        return _MARK.sub(noncharacters[0], text)

    def without_words(text: str) -> str:
        return _WORD_OR_MARK.sub(noncharacters[0], text)

    by_words = bool(_EXCHANGES.search(template)) or not all(map(_MARK.search, controls))
    parts = rendered(_mapped(messages, masked), _mapped(tools, masked))
    blind = rendered([_blinded(message, without_words if by_words else without_marks) for message in messages],
                     _mapped(tools, without_marks))
    if [part for part in parts if isinstance(part, int)] != [part for part in blind if isinstance(part, int)]:
        raise UserError("the chat template makes control tokens out of the text of these messages",
                        tokenizer.vocab_file,
                        "Change the message, or the template in chat_template.jinja or tokenizer_config.json.")
    back = str.maketrans({substitute: character for character, substitute in spelled.items()})
    ids: List[int] = []
    for part in parts:
        if isinstance(part, int):
            ids.append(part)
        else:
            ids += tokenizer.encode(part.translate(back), control_tokens=False)
    return ids


def _check_shape(messages: Any) -> None:
    """See that these are messages at all; what a template wants of them beyond that is its own business."""
    if isinstance(messages, Mapping) or not isinstance(messages, Sequence):
        raise UserError(f"a conversation is a list of messages, not {type(messages).__name__}", fix=_SHAPE)
    if not messages:
        raise UserError("there are no messages to make a prompt from")
    for number, message in enumerate(messages, 1):
        where = f"message {number}"
        if not isinstance(message, Mapping):
            raise UserError(f"it is {type(message).__name__}, not a message", where, _SHAPE)
        if not isinstance(message.get("role"), str):
            raise UserError("it has no role", where, _SHAPE)
        if not isinstance(message.get("content"), (str, list, tuple, type(None))):
            raise UserError(f"its content is {type(message['content']).__name__}, not text", where, _SHAPE)


_SHAPE = "A message is {'role': 'user', 'content': 'text'}."
_MARK, _WORD_OR_MARK = re.compile(r"[^\w\s]"), re.compile(r"\S")
_EXCHANGES = re.compile(r"\b(replace|format|translate)\b")
_ROLE = re.compile(r"system|user|assistant|tool|function|developer|ipython|observation|model")


def _blinded(message: Message, blinded: Callable[[str], str]) -> Message:
    """A message with its text replaced; its keys, and a role that is one word, are what templates decide by."""
    if not isinstance(message, Mapping):
        return _mapped(message, blinded)
    return {key: value if key == "role" and isinstance(value, str) and _ROLE.fullmatch(value)
            else _mapped(value, blinded) for key, value in message.items()}


def _mask_spelled(text: str, controls: Iterable[str], substitutes: Dict[str, str]) -> str:
    for control in controls:
        text = text.replace(control, substitutes[control[0]] + control[1:])
    for control in controls:
        # A marker that starts with a letter would match the last letter of every role and key.
        for length in range(len(control) - 1, 0, -1) if not control[0].isalnum() else ():
            if text.endswith(control[:length]):
                place = len(text) - length
                text = text[:place] + substitutes[control[0]] + text[place + 1:]
                break
    return text


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with `change` applied to every string in it, keys of dictionaries (arguments of tools) included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_mapped(key, change): _mapped(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mapped(item, change) for item in value]
    return value


def _unused(count: int, *values: Any) -> List[str]:
    """Noncharacters that are in none of the strings of `values`."""
    used: Set[str] = set()
    for value in values:
        _mapped(value, lambda text: used.update(text) or text)  # type: ignore[func-returns-value]
    free = [character for character in _NONCHARACTERS if character not in used][:count]
    if len(free) < count:
        raise UserError("the messages hold so many of Unicode's noncharacters (U+FDD0 to U+FDEF) that none is left to "
                        "keep control tokens apart", None, "Remove them: they have no meaning in a text.")
    return free


def stop_ids(tokenizer: Any, eos_token_ids: Iterable[int] = ()) -> FrozenSet[int]:
    """Ids that end an answer: the configured ones, the tokenizer's end of sequence, `<|im_end|>` and
    `<|endoftext|>`."""
    own = (tokenizer.eos_token_id, tokenizer.im_end_id, tokenizer.end_of_text_id)
    return frozenset(eos_token_ids) | frozenset(index for index in own if index is not None)


def turns(messages: Sequence[Message]) -> Tuple[List[Message], List[List[Message]]]:
    """Leading system messages, and the rest as turns: a user's message with all that follows up to the next one."""
    start = 0
    while start < len(messages) and messages[start]["role"] == "system":
        start += 1
    grouped: List[List[Message]] = []
    for message in messages[start:]:
        if message["role"] == "user" or not grouped:
            grouped.append([])
        grouped[-1].append(message)
    return list(messages[:start]), grouped


def fit_window(messages: Sequence[Message], window: int, count_tokens: Callable[[Sequence[Message]], int]
               ) -> Tuple[List[Message], int]:
    """The messages that fit, and how many of the oldest turns had to go. System messages and the last turn stay.

    Args:
        messages: oldest first.
        window: the most tokens the prompt may have.
        count_tokens: length in tokens of the prompt of some messages; longer for more turns. Called about log2(turns)
            times, and once when everything fits.

    Raises:
        UserError: the system messages and the last turn alone are longer than the window.
    """
    if count_tokens(messages) <= window:
        return list(messages), 0
    system, grouped = turns(messages)

    def kept(dropped: int) -> List[Message]:
        return system + [message for turn in grouped[dropped:] for message in turn]

    low, high = 1, max(len(grouped) - 1, 0)  # fewest turns to drop; most that may be dropped
    if high:
        length = count_tokens(kept(high))
    if not high or length > window:
        length = length if high else count_tokens(messages)
        raise UserError(f"the message is {length} tokens with its chat prompt, the window has room for {window}", None,
                        "Shorten it, or raise seq_length.")
    while low < high:
        middle = (low + high) // 2
        if count_tokens(kept(middle)) <= window:
            high = middle
        else:
            low = middle + 1
    return kept(low), low
