"""tokenizer_config.json: what it says of control tokens and other added tokens, read and checked."""

from __future__ import annotations

import codecs
import functools
import os
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Tuple

from .. import strict_json
from ..errors import UserError
from ..text_file import read_small

CONFIG_NAME, TEMPLATE_NAME = "tokenizer_config.json", "chat_template.jinja"
_FIX = "Correct tokenizer_config.json, or fetch it again."
_MOST_BYTES = 64 * 2 ** 20
_MOST_TOKENS, _LONGEST_TOKEN, _MOST_UNUSED_IDS = 200_000, 1024, 65_536
"""Of added tokens, their characters, and ids between them. Models that speak or hear add some ten thousand tokens."""


class AddedToken(NamedTuple):
    """A token that is matched whole before any merging. A special one is a control token: decoding can leave it out."""
    content: str
    special: bool = True


def _read(path: str, what: str, fix: str) -> Optional[str]:
    try:
        return read_small(path, _MOST_BYTES, what, fix).decode("utf-8")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", path, fix) from None
    except UnicodeDecodeError as error:
        raise UserError(f"is not UTF-8 text (byte {error.start})", path, fix) from None


def read_template(folder: str) -> Optional[str]:
    """The chat template that transformers 4.43 and later write into a file of its own; None where there is none.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    return _read(os.path.join(folder, TEMPLATE_NAME), "a chat template", "Fetch it again.")


def read_config(path: str) -> Dict[str, Any]:
    """The contents of a tokenizer_config.json, {} where there is none.

    Raises:
        UserError: it cannot be read, is too large or no JSON object.
    """
    fix = "Fetch it again, or move it away to do without."
    found = _read(path, "a tokenizer_config.json", fix)
    try:
        config = strict_json.loads(found) if found is not None else {}
    except ValueError as error:
        raise UserError(str(error), path, fix) from None
    if not isinstance(config, dict):
        raise UserError("is not a JSON object", path, fix)
    # Files of vocabulary are named by whoever reads the folder, never by what is in it.
    names = ("self", "vocab_file", "merges_file")
    return {key: value for key, value in config.items() if key.isidentifier() and key not in names}


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0


def _is_error_handler(value: Any) -> bool:
    try:
        return isinstance(value, str) and callable(codecs.lookup_error(value))
    except (LookupError, UnicodeEncodeError):
        return False


_CHECKS: Dict[str, Tuple[Callable[[Any], bool], str]] = {
    "model_max_length": (_is_number, "a number"),
    "padded_vocab_size": (_is_whole, "a whole number above 0"),
    "errors": (_is_error_handler, "strict, replace or another way of bytes.decode"),
    "padding_side": (lambda value: value in ("left", "right"), "left or right"),
    "truncation_side": (lambda value: value in ("left", "right"), "left or right"),
    "additional_special_tokens": (lambda value: isinstance(value, (list, tuple)), "a list of tokens"),
    "added_tokens_decoder": (lambda value: isinstance(value, Mapping), "an object of ids and tokens"),
}


def check_options(options: Mapping[str, Any], where: str) -> None:
    """Refuse values of another kind than Hugging Face's. Raises a UserError that names the key."""
    for key, (fits, wanted) in _CHECKS.items():
        value = options.get(key)
        if value is not None and not fits(value) or (key == "errors" and key in options and value is None):
            raise UserError(f"{key} is {_shown(value)}, {wanted} is wanted", where, _FIX)


def default_template(template: Any, where: str) -> Optional[str]:
    """The template to use; a checkpoint may have several by name, of which `default` is the one for chat.

    Raises:
        UserError: it is no text; `where` is the file.
    """
    if isinstance(template, (list, tuple)) and all(isinstance(item, Mapping) and "name" in item for item in template):
        template = {str(item["name"]): item.get("template") for item in template}
    found = template.get("default") if isinstance(template, Mapping) else template
    if found is not None and not isinstance(found, str):
        raise UserError(f"chat_template is {_shown(found)}, a text is wanted", where, _FIX)
    return found


def token_content(token: Any, role: str, where: str) -> Optional[str]:
    """The text of a token given as str, as dict (tokenizer_config.json) or as an AddedToken of any library.

    Args:
        token: the token, or None.
        role: what it is called in a message.
        where: the file, for messages.

    Raises:
        UserError: it has no text, too long a one, or half a character in it.
    """
    found = token.get("content") if isinstance(token, Mapping) else token
    content = found if found is None or isinstance(found, str) else getattr(found, "content", None)
    if token is None:
        return None
    if not isinstance(content, str) or not content:
        raise UserError(f"{role} is {_shown(token)}, a token's text is wanted", where, _FIX)
    if len(content) > _LONGEST_TOKEN:
        raise UserError(f"{role} has {len(content)} characters, more than {_LONGEST_TOKEN}", where, _FIX)
    if any("\ud800" <= character <= "\udfff" for character in content):
        raise UserError(f"{role} is {content!r}, which has half a character in it", where, _FIX)
    return content


def token_contents(tokens: Any, role: str, where: str) -> List[str]:
    """The texts of several tokens, as `token_content` says.

    Raises:
        UserError: as `token_content`, and where one is null.
    """
    found = [token_content(token, role, where) for token in tokens or ()]
    if None in found:
        raise UserError(f"{role} holds a null, a token's text is wanted", where, _FIX)
    return [content for content in found if content is not None]


def added_tokens(decoder: Any, where: str) -> Dict[int, AddedToken]:
    """`added_tokens_decoder` as tokenizer_config.json or a caller gives it, read from the file `where`.

    Raises:
        UserError: too many, an id that is none, or what Qwen's tokens never have.
    """
    listed = decoder or {}
    if len(listed) > _MOST_TOKENS:
        raise UserError(f"added_tokens_decoder has {len(listed)} tokens, more than {_MOST_TOKENS}", where, _FIX)
    tokens = {}
    for key, token in listed.items():
        index = _id(key, where)
        role = f"added_tokens_decoder[{index}]"
        content = token_content(token, role, where)
        if content is None:
            raise UserError(f"{role} is null, a token is wanted", where, _FIX)
        get = token.get if isinstance(token, Mapping) else functools.partial(getattr, token)
        for flag in ("lstrip", "rstrip", "single_word"):
            if not isinstance(token, str) and get(flag, False):
                raise UserError(f"added token {content!r} has {flag}, which Qwen's tokens never have and which is not "
                                "supported", where, f"Remove {flag} from added_tokens_decoder.")
        tokens[index] = AddedToken(content, True if isinstance(token, str) else bool(get("special", False)))
    return tokens


def _id(key: Any, where: str) -> int:
    text = str(key)
    if not (text.isascii() and text.isdigit() and len(text) < 20) or isinstance(key, bool):
        raise UserError(f"added_tokens_decoder has the key {_shown(key)}, a token's id is wanted", where, _FIX)
    return int(text)


def check_ids(added: Mapping[int, AddedToken], vocab_size: int, where: str) -> None:
    """Refuse added tokens far beyond the `vocab_size` ids of vocab.json: every id in between takes memory.

    Raises:
        UserError: one is.
    """
    most = max(added, default=0)
    if most >= vocab_size + len(added) + _MOST_UNUSED_IDS:
        raise UserError(f"added_tokens_decoder puts a token at id {most}, far beyond the {vocab_size} of vocab.json",
                        where, "Correct it: the ids of added tokens follow those of vocab.json.")


def _shown(value: Any) -> str:
    return repr(value)[:80]
