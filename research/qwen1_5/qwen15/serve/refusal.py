"""What a client is told when a request is refused or fails: OpenAI's error object and the status that goes with it."""

from __future__ import annotations

from typing import Any, Dict, Optional

from ..errors import UserError

INVALID, RATE_LIMIT, SERVER = "invalid_request_error", "rate_limit_error", "server_error"


class Refusal(Exception):
    """A request that gets no answer.

    Args:
        status: the HTTP status.
        message: one sentence for the client: what is wrong and how to mend it.
        param: the request's field that it is about.
        code: a word that programs can test for, e.g. 'context_length_exceeded'.
        retry_after_s: when it is worth trying again, for 429 and 503.
    """

    def __init__(self, status: int, message: str, param: Optional[str] = None, code: Optional[str] = None,
                 retry_after_s: Optional[int] = None):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    @classmethod
    def of(cls, error: UserError, param: Optional[str] = None) -> Refusal:
        """A `UserError` that a request's content has caused, in a client's words: no path of the server's is told."""
        fix = f". {error.fix}" if error.fix else ""
        return cls(400, f"{error.what.rstrip('.')}{fix}", param)

    @property
    def body(self) -> Dict[str, Any]:
        """OpenAI's error object."""
        kind = RATE_LIMIT if self.status == 429 else INVALID if self.status < 500 else SERVER
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> Dict[str, str]:
        """HTTP headers of the answer."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers
