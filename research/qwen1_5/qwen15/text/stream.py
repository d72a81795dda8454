"""Token ids -> printable pieces of text: half characters and possible stop strings wait until they are whole."""

import codecs
from typing import Callable, FrozenSet, Sequence


class TextStream:
    """Turns one request's tokens into text as they come.

    Args:
        token_bytes: UTF-8 bytes of a token, possibly a part of a character.
        skipped: tokens that print nothing (control tokens).
        stop_strings: the text ends before the first of these.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], skipped: FrozenSet[int] = frozenset(),
                 stop_strings: Sequence[str] = ()):
        self._token_bytes = token_bytes
        self._skipped = skipped
        self._stop_strings = [s for s in stop_strings if s]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False

    def feed(self, token: int) -> str:
        """The text that is certain after this token; empty when it ends within a character or a stop string."""
        if self.stopped or token in self._skipped:
            return ""
        return self._release(self._held + self._decoder.decode(self._token_bytes(token)))

    def end(self) -> str:
        """What was held back, at the end of the tokens; bytes of an unfinished character become U+FFFD."""
        if self.stopped:
            return ""
        text = self._release(self._held + self._decoder.decode(b"", True))
        rest, self._held = self._held, ""
        return text + rest

    def _release(self, text: str) -> str:
        found = [text.find(s) for s in self._stop_strings if s in text]
        if found:
            self.stopped, self._held = True, ""
            return text[:min(found)]
        # The longest end of the text that may still become a stop string stays here.
        keep = max((n for s in self._stop_strings for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self._held = text[len(text) - keep:]
        return text[:len(text) - keep]
