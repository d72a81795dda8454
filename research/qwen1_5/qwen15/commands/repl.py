"""Interactive chat: rank 0 has the terminal, every rank runs the same turns; a turn prefills only what is new."""

import json
import os
import re
import signal
import sys
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, Dict, Iterator, List, Optional, Tuple

from .. import terminal
from ..config.keys import MODEL
from ..errors import EXIT_FAILED, EXIT_OK, UserError, did_you_mean
from ..generation.engine import Engine
from ..generation.ranks import Shared
from ..generation.request import CANCELLED, LENGTH, Usage
from ..generation.session import Prompt, Session, Settings, mismatch
from ..reporting import Reporter
from ..text import chat
from ..whole_file import write_whole
from .results import printable

HELP = """\
/clear         forget the conversation (the system message stays)
/system TEXT   set the system message; /system alone shows it
/save FILE     write the conversation to a JSON file
/load FILE     continue a saved conversation
/quit, /exit   leave; so does Ctrl-D
Ctrl-C stops an answer. Three double quotes begin and end a message of several lines. //... sends a text that begins with /."""

_PROMPT, _MORE = "> ", ". "
_QUOTES = '"' * 3
_COMMAND = re.compile(r"/([A-Za-z]+)(?:\s+(.*))?", re.DOTALL)
_MOST_HISTORY_LINES = 1000
_LARGEST_FILE_BYTES = 64 * 2 ** 20
_ROLES = ("system", "user", "assistant")
# Control characters could move the cursor or rename the window: a terminal gets them as U+FFFD.
_CONTROL = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def run(session: Session, settings: Settings, system: Optional[str], report: Reporter) -> int:
    """Chat until the user leaves; returns the exit code.

    Args:
        session: prepared, not open.
        settings: how answers are made; its limits are adapted to the window, see `window_of`.
        system: the system message, None for the template's own.
        report: takes what is not the answer.
    """
    if session.tokenizer.chat_template is None and session.tokenizer.im_start_id is None:
        raise UserError("the checkpoint has neither a chat template nor Qwen's <|im_start|>", where=session.tokenizer.vocab_file,
                        fix="Pass texts to continue with --predict_data, or set processor.tokenizer.chat_template.")
    hint = mismatch(session.tokenizer, as_chat=True)
    if hint:
        report.warning(hint)
    window = window_of(session, settings)
    settings = replace(settings, max_length=window)
    first = Conversation(session, settings, system)
    first.check_system()
    session.open(report.info)
    assert session.engine is not None
    shared = Shared(session.engine.network)
    if session.rank:
        return follow(session, shared)
    terminal = Terminal(report)
    try:
        return Repl(session, first, terminal, shared, report).run()
    finally:
        terminal.close()


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
    """

    def __init__(self, session: Session, settings: Settings, system: Optional[str] = None):
        self._session = session
        self._settings = settings
        self.system = system
        self.messages: List[Dict[str, str]] = []
        self.gone = 0

    @property
    def room(self) -> int:
        """Tokens of the longest prompt: the window without what is set aside for the answer."""
        window, wanted = self._settings.max_length, self._settings.max_new_tokens
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
            prompt = self._session.chat_prompt(fitted, self._settings)
        except UserError:
            self.messages.pop()
            raise
        self.gone += dropped
        return prompt, dropped

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
            raise ValueError('holds no list of "messages"')
        for number, message in enumerate(messages, 1):
            if not isinstance(message, dict) or message.get("role") not in _ROLES or not isinstance(message.get("content"), str):
                raise ValueError(f"message {number} is not a role ({', '.join(_ROLES)}) and a content that is text")
            if message["role"] == "system" and number > 1:
                raise ValueError(f"message {number} is a system message; only the first may be one")
        rest = [{"role": m["role"], "content": m["content"]} for m in messages]
        self.system = rest.pop(0)["content"] if rest and rest[0]["role"] == "system" else None
        self.messages, self.gone = rest, 0

    def _fit(self, messages: List[Dict[str, str]]) -> Tuple[List[chat.Message], int]:
        head = [] if self.system is None else [{"role": "system", "content": self.system}]
        everything = head + messages

        def length(some):
            return len(self._session.chat_prompt(some, self._settings).ids)

        if length(everything) <= self.room:
            return everything, 0
        try:
            # Make more room than this one question needs: every turn that goes means a prefill of all that stays.
            return chat.fit_window(everything, self.room * 3 // 4, length)
        except UserError:
            return chat.fit_window(everything, self.room, length)


class Repl:
    """The loop on rank 0.

    Args:
        session: open.
        conversation: to begin with.
        terminal: where questions come from and answers go to.
        shared: the way to the other ranks.
        report: takes what is not the answer.
    """

    def __init__(self, session: Session, conversation: Conversation, terminal: "Terminal", shared: Shared, report: Reporter):
        assert session.engine is not None
        self._session, self._engine = session, session.engine
        self._conversation = conversation
        self._terminal = terminal
        self._shared = shared
        self._report = report
        self._own_files: set = set()
        self._commands = {"clear": self._clear, "system": self._system, "save": self._save, "load": self._load,
                          "help": self._help, "quit": None, "exit": None}

    def run(self) -> int:
        """Read, answer, repeat; returns the exit code."""
        if self._terminal.interactive:
            name = os.path.basename(os.path.abspath(self._session.config.load_checkpoint or ""))
            self._report.info(f"chat with {name}, {self._conversation._settings.max_length} tokens of context. /help shows the commands, "
                              "Ctrl-C stops an answer, Ctrl-D leaves.")
        while True:
            try:
                with self._shared.waiting():
                    text = self._terminal.read()
            except KeyboardInterrupt:
                self._terminal.note("Ctrl-D or /quit leaves.")
                continue
            if text is None:
                break
            if not text.strip():
                continue
            command = _COMMAND.fullmatch(text.strip())
            try:
                if command is None:
                    self._turn(text[1:] if text.startswith("//") else text)
                elif command[1] in ("quit", "exit"):
                    break
                elif command[1] not in self._commands:
                    known = [f"/{name}" for name in self._commands]
                    raise UserError(f"/{command[1]} is not a command", fix=did_you_mean(f"/{command[1]}", known) or "/help shows them.")
                else:
                    self._commands[command[1]]((command[2] or "").strip())
            except UserError as error:
                if error.exit_code == EXIT_FAILED:
                    raise
                self._terminal.note(f"error: {error}")
        self._shared.tell(b"")
        return EXIT_OK

    def _turn(self, text: str) -> None:
        prompt, dropped = self._conversation.ask(text)
        if dropped:
            turns = "turn" if dropped == 1 else f"{dropped} turns"
            self._terminal.note(f"[the window of {prompt.settings.max_length} tokens is full: the oldest {turns} went]")
        self._shared.tell(_to_json(prompt))
        answer, usage = None, None
        with interruptible(self._engine):
            for piece in self._session.run([prompt]):
                self._terminal.write(piece.text)
                answer, usage = piece.answer, piece.usage
        assert answer is not None and usage is not None
        self._terminal.end_answer()
        self._conversation.answered(answer.text)
        if answer.finish_reason == CANCELLED:
            self._terminal.note("[stopped]" if answer.text else "[stopped before the answer began: the question is taken back]")
        elif not answer.text:
            self._terminal.note("[the answer is empty: the question is taken back]")
        elif answer.finish_reason == LENGTH:
            full = len(prompt.ids) + len(answer.token_ids) >= prompt.settings.max_length
            self._terminal.note(f"[the window of {prompt.settings.max_length} tokens is full]" if full
                                else f"[--max_new_tokens {prompt.settings.max_new_tokens} reached]")
        self._report.debug(_timing(usage))

    def _clear(self, argument: str) -> None:
        if argument:
            raise UserError("/clear takes no text")
        self._conversation.clear()
        self._terminal.note("[the conversation is forgotten]")

    def _system(self, argument: str) -> None:
        if not argument:
            self._terminal.note("[no system message is set: the chat template's own is used]" if self._conversation.system is None
                                else f"[system: {self._conversation.system}]")
            return
        before = self._conversation.system
        self._conversation.system = argument
        try:
            self._conversation.check_system()
        except UserError:
            self._conversation.system = before
            raise
        self._terminal.note("[the system message is set]")

    def _save(self, argument: str) -> None:
        path = self._path(argument, "/save")
        if os.path.lexists(path) and path not in self._own_files:
            raise UserError("exists already", where=path, fix="Choose another name.")
        save(path, self._conversation.as_json(), replace_it=path in self._own_files)
        self._own_files.add(path)
        self._terminal.note(f"[{len(self._conversation.messages)} messages saved to {path}]")

    def _load(self, argument: str) -> None:
        path = self._path(argument, "/load")
        loaded = Conversation(self._session, self._conversation._settings)
        try:
            loaded.take(load(path))
        except ValueError as error:
            raise UserError(str(error), where=path, fix="Give a file that /save has written.") from None
        loaded.check_system()
        self._conversation = loaded
        self._terminal.note(f"[{len(loaded.messages)} messages loaded from {path}]")

    def _help(self, argument: str) -> None:
        self._terminal.note(HELP)

    @staticmethod
    def _path(argument: str, command: str) -> str:
        if not argument:
            raise UserError(f"{command} needs the name of a file", fix=f"Example: {command} talk.json")
        return os.path.abspath(os.path.expanduser(argument))


def follow(session: Session, shared: Shared) -> int:
    """What the other ranks do: the turns that rank 0 tells, until it says that the conversation is over."""
    assert session.engine is not None
    # A Ctrl-C reaches every process of the terminal; rank 0 tells what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        message = shared.hear()
        if not message:
            return EXIT_OK
        for _ in session.run([_from_json(message)]):
            pass


def _to_json(prompt: Prompt) -> bytes:
    return json.dumps({**asdict(prompt), "stop_ids": sorted(prompt.stop_ids)}).encode()


def _from_json(message: bytes) -> Prompt:
    value = json.loads(message)
    settings = Settings(**{**value["settings"], "stop": tuple(value["settings"]["stop"])})
    return Prompt(tuple(value["ids"]), settings, frozenset(value["stop_ids"]), value["label"], value["stream"])


@contextmanager
def interruptible(engine: Engine) -> Iterator[None]:
    """Within, Ctrl-C ends what the engine generates; the third one (the engine does not answer) leaves the program."""
    presses = 0

    def on_interrupt(number: int, frame: Any) -> None:
        nonlocal presses
        presses += 1
        if presses > 2:
            raise KeyboardInterrupt
        engine.interrupt()

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _timing(usage: Usage) -> str:
    new = usage.prompt_tokens - usage.cached_tokens
    line = f"[{new} of {usage.prompt_tokens} prompt tokens prefilled in {usage.prefill_s:.2f} s"
    if usage.generated_tokens > 1:
        line += f", {(usage.generated_tokens - 1) / max(usage.decode_s, 1e-9):.1f} tokens/s"
    return f"{line}]"


class Terminal:
    """Questions from stdin, answers to stdout, notes to stderr. On a terminal with line editing and history.

    Args:
        report: what it says from now on comes in order with notes and answers.

    Attributes:
        interactive: stdin is a terminal; otherwise its lines are the questions, and no prompt is shown.
    """

    def __init__(self, report: Reporter):
        self._notes = report.stream = terminal.come_forward()
        self.interactive = sys.stdin is not None and sys.stdin.isatty()
        self._tty_out = sys.stdout.isatty()
        self._at_line_start = True
        self._history: Optional[History] = None
        if sys.stdin is not None and hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")
        if self.interactive:
            self._history = History.open(report)

    def read(self) -> Optional[str]:
        """The next message, None when there is none any more. Raises KeyboardInterrupt."""
        text = self._line(_PROMPT)
        if text is None or not text.strip().startswith(_QUOTES):
            return text
        text = text.strip()[len(_QUOTES):]
        while not text.rstrip().endswith(_QUOTES):
            more = self._line(_MORE)
            if more is None:
                return None
            text = f"{text}\n{more}"
        return text.rstrip()[:-len(_QUOTES)].strip("\n")

    def _line(self, prompt: str) -> Optional[str]:
        try:
            if self.interactive and self._tty_out:
                return input(prompt)
            if self.interactive:
                self._notes.write(prompt)
                self._notes.flush()
            line = sys.stdin.readline() if sys.stdin is not None else ""
            return line.rstrip("\r\n") if line else None
        except EOFError:
            if self._tty_out:
                self.write("\n")
            return None

    def write(self, text: str) -> None:
        """More of an answer."""
        if text:
            sys.stdout.write(printable(text).translate(_CONTROL) if self._tty_out else printable(text))
            sys.stdout.flush()
            self._at_line_start = text.endswith("\n")

    def end_answer(self) -> None:
        """An answer has ended: the next thing begins on a line of its own."""
        if not self._at_line_start or not self._tty_out:
            self.write("\n")

    def note(self, line: str) -> None:
        """Something that is no answer."""
        if self._tty_out and not self._at_line_start:
            self.write("\n")
        print(printable(line), file=self._notes, flush=True)

    def close(self) -> None:
        """Write the history."""
        if self._history is not None:
            self._history.close()


class History:
    """The lines typed in earlier sessions, in a file of the user's state folder."""

    def __init__(self, path: str, readline: Any, report: Reporter):
        self._path, self._readline, self._report = path, readline, report
        self._before = readline.get_current_history_length()

    @classmethod
    def open(cls, report: Reporter) -> Optional["History"]:
        """Turn line editing on and read the history; None where Python has no readline."""
        try:
            import readline
        except ImportError:
            return None
        path = history_path()
        readline.set_history_length(_MOST_HISTORY_LINES)
        try:
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
            readline.read_history_file(path)
        except OSError as error:
            report.warning(f"note: the history of typed lines is not kept: {path}: {error.strerror}")
            return None
        return cls(path, readline, report)

    def close(self) -> None:
        """Append what was typed in this session."""
        new = self._readline.get_current_history_length() - self._before
        try:
            if new > 0:
                self._readline.append_history_file(new, self._path)
        except OSError as error:
            self._report.warning(f"note: the history of typed lines is not kept: {self._path}: {error.strerror}")


def history_path() -> str:
    """$XDG_STATE_HOME/qwen15/chat_history, by default below ~/.local/state."""
    base = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(base):  # the specification: a relative one is ignored
        base = os.path.join(os.path.expanduser("~"), ".local", "state")
    return os.path.join(base, "qwen15", "chat_history")


def save(path: str, value: Any, replace_it: bool = False) -> None:
    """Write JSON beside `path` and put it in place; without `replace_it` nothing that is there is replaced.

    Raises:
        UserError: it cannot be written, or something is there by now.
    """
    try:
        write_whole(path, (json.dumps(value, ensure_ascii=True, indent=1) + "\n").encode("ascii"), replace_it, private=True)
    except FileExistsError:
        raise UserError("exists already", where=path, fix="Choose another name.") from None
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=path) from None


def load(path: str) -> Any:
    """The JSON in `path`.

    Raises:
        UserError: it cannot be read.
        ValueError: it is not JSON.
    """
    try:
        if os.path.getsize(path) > _LARGEST_FILE_BYTES:
            raise UserError("is too large for a conversation", where=path)
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=path) from None
    except RecursionError:
        raise ValueError("is nested too deeply for a conversation") from None
