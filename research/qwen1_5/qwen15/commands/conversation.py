"""A conversation: its messages, what of them fits into the window, and what /save and /load keep of it."""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Sequence, Tuple

from ..config.keys import MODEL
from ..errors import UserError
from ..generation.session import Prompt, Session, Settings
from ..text import chat

_ROLES = ("system", "user", "assistant")


def window_of(session: Session, settings: Settings) -> int:
    """Tokens of a conversation, answers included: --predict_length when it is given, else all that seq_length allows.

    A YAML's max_decode_length is about one text and its continuation; a conversation may be longer.
    """
    flagged = session.config.sources.get(MODEL + "max_decode_length", "").startswith("--")
    return settings.max_length if flagged else session.limits.seq_length


class Conversation:
    """Messages, and how much of them still fits.

    Attributes:
        system: the system message, None for the template's own.
        messages: questions and answers, oldest first; all of them, also those that no longer fit.
        gone: turns, counted from the oldest, that the model no longer sees.
        settings: how answers are made.
    """

    def __init__(self, session: Session, settings: Settings, system: Optional[str] = None):
        self._session = session
        self.settings = settings
        self.system = system
        self.messages: List[Dict[str, str]] = []
        self.gone = 0

    @property
    def room(self) -> int:
        """Tokens of the longest prompt: the window without what is set aside for the answer."""
        window, wanted = self.settings.max_length, self.settings.max_new_tokens
        aside = window // 4 if wanted is None else min(wanted, window // 2)
        return window - max(aside, 1)

    def check_system(self) -> None:
        """Refuse a system message that leaves no room. Raises a UserError."""
        if self.system:
            self._fit([{"role": "user", "content": "?"}])

    def ask(self, text: str) -> Tuple[Prompt, int]:
        """Add a question; the prompt for its answer, and the number of turns that had to go to make room.

        Raises:
            UserError: the question alone is too long, or the template refuses it; the conversation is as before.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            _, grouped = chat.turns(self.messages)
            fitted, dropped = self._fit([message for turn in grouped[self.gone:] for message in turn])
            prompt = self._session.chat_prompt(fitted, self.settings)
        except UserError:
            self.messages.pop()
            raise
        self.gone += dropped
        return prompt, dropped

    def take_back(self) -> Optional[str]:
        """Forget the last question and its answer; gives the question, None when there is none."""
        for number in range(len(self.messages) - 1, -1, -1):
            if self.messages[number]["role"] == "user":
                question = self.messages[number]["content"]
                del self.messages[number:]
                self.gone = min(self.gone, len(chat.turns(self.messages)[1]))
                return question
        return None

    def answered(self, text: str) -> None:
        """Add the answer; without any text the question goes too, as if it had not been asked."""
        if text:
            self.messages.append({"role": "assistant", "content": text})
        else:
            self.messages.pop()

    def clear(self) -> None:
        """Forget questions and answers."""
        self.messages, self.gone = [], 0

    def as_json(self) -> Dict[str, Any]:
        """What /save writes."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return {"messages": system + self.messages}

    def take(self, value: Any) -> None:
        """Become the conversation that /save has written. Raises a ValueError that says what is wrong."""
        messages = value.get("messages") if isinstance(value, dict) else value
        if not isinstance(messages, list):
            raise ValueError('has no list of "messages"')
        for number, message in enumerate(messages, 1):
            if (not isinstance(message, dict) or message.get("role") not in _ROLES
                    or not isinstance(message.get("content"), str)):
                raise ValueError(f"message {number} is not a role ({', '.join(_ROLES)}) and a content that is text")
            if message["role"] == "system" and number > 1:
                raise ValueError(f"message {number} is a system message; only the first may be one")
        rest = [{"role": m["role"], "content": m["content"]} for m in messages]
        self.system = rest.pop(0)["content"] if rest and rest[0]["role"] == "system" else None
        self.messages, self.gone = rest, 0

    def _fit(self, messages: Sequence[chat.Message]) -> Tuple[List[chat.Message], int]:
        head: List[chat.Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        everything = [*head, *messages]

        def length(some):
            return len(self._session.chat_prompt(some, self.settings).ids)

        if length(everything) <= self.room:
            return everything, 0
        try:
            # Make more room than this one question needs: every turn that goes means a prefill of all that stays.
            return chat.fit_window(everything, self.room * 3 // 4, length)
        except UserError:
            return chat.fit_window(everything, self.room, length)
