"""tokenizer_config.json: what it says of control tokens and other added tokens, read and checked."""

from __future__ import annotations

import functools
import json
from typing import Any, Dict, Mapping, NamedTuple, Optional

from ..errors import UserError

CONFIG_NAME = "tokenizer_config.json"


class AddedToken(NamedTuple):
    """A token that is matched whole before any merging. A special one is a control token: decoding can leave it out."""
    content: str
    special: bool = True


def read_config(path: str) -> Dict[str, Any]:
    """The contents of a tokenizer_config.json, {} where there is none. A UserError says what is wrong with it."""
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read: {error}", path, "Fetch it again, or move it away to do without.") from None
    if not isinstance(config, dict):
        raise UserError("is not a JSON object", path, "Fetch it again, or move it away to do without.")
    return config


def token_content(token: Any, role: str, where: str) -> Optional[str]:
    """The text of a token given as str, as dict (tokenizer_config.json) or as an AddedToken of any library."""
    if isinstance(token, Mapping):
        token = token.get("content")
    content = token if token is None or isinstance(token, str) else getattr(token, "content", None)
    if content == "" or (content is None and token is not None):
        raise UserError(f"{role} is {token!r}, a token's text is wanted", where, "Correct tokenizer_config.json.")
    return content


def added_tokens(decoder: Any, where: str) -> Dict[int, AddedToken]:
    """`added_tokens_decoder` as tokenizer_config.json or a caller gives it."""
    tokens = {}
    for index, token in (decoder or {}).items():
        content = token_content(token, f"added_tokens_decoder[{index}]", where)
        get = token.get if isinstance(token, Mapping) else functools.partial(getattr, token)
        for flag in ("lstrip", "rstrip", "single_word"):
            if not isinstance(token, str) and get(flag, False):
                raise UserError(f"added token {content!r} has {flag}, which Qwen's tokens never have and which is not "
                                "supported", where, f"Remove {flag} from added_tokens_decoder.")
        tokens[int(index)] = AddedToken(content, True if isinstance(token, str) else bool(get("special", False)))
    return tokens
