"""The secret that the launchers of one run share: read from the environment, and proved without being sent."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from typing import Mapping, Optional

from ..errors import UserError

TEXT, FILE = "QWEN15_LAUNCH_SECRET", "QWEN15_LAUNCH_SECRET_FILE"
LEAST_CHARACTERS = 16
"""A shorter secret could be guessed from what passes over the network."""
_MOST_BYTES = 4096
_HOW = f"Write one with: openssl rand -hex 32 > launch.secret, and name the file in {FILE} on every machine."


def read(environ: Mapping[str, str]) -> Optional[bytes]:
    """The secret that `QWEN15_LAUNCH_SECRET` is or `QWEN15_LAUNCH_SECRET_FILE` names; None when neither is set.

    Raises:
        UserError: both are set, the file cannot be read or is open to other users, or the secret is too short.
    """
    text, path = environ.get(TEXT), environ.get(FILE)
    if text is not None and path is not None:
        raise UserError(f"{TEXT} and {FILE} are both set", fix="Set one of them.")
    if path is not None:
        return _checked(_from_file(path), f"{FILE} {path}")
    return None if text is None else _checked(os.fsencode(text), TEXT)


def _from_file(path: str) -> bytes:
    where = f"{FILE} {path}"
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if stat.S_ISREG(mode) and mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise UserError("other users may read or change it", where, f"Run: chmod 600 {path}")
            return file.read(_MOST_BYTES)
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where, _HOW) from None


def _checked(secret: bytes, where: str) -> bytes:
    secret = secret.strip()
    if len(secret) < LEAST_CHARACTERS:
        raise UserError(f"a secret of {len(secret)} characters; at least {LEAST_CHARACTERS} are wanted", where, _HOW)
    return secret


def challenge() -> str:
    """What the other side has to prove its knowledge on; never the same twice."""
    return secrets.token_hex(16)


def proof(secret: Optional[bytes], role: str, *said: str) -> str:
    """HMAC-SHA256 (RFC 2104) over who speaks and what both have said; empty without a secret.

    Args:
        role: `machine 0` or `member`: an answer cannot be sent back as one's own.
        said: both challenges, and what is to be believed.
    """
    if secret is None:
        return ""
    message = "\n".join((role, *said)).encode()
    return hmac.new(secret, message, hashlib.sha256).hexdigest()


def equal(one: str, other: str) -> bool:
    """Compare two proofs in a time that does not depend on where they differ."""
    return hmac.compare_digest(one.encode(), other.encode())
