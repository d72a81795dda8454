"""Interactive chat: rank 0 has the terminal, every rank runs the same turns; a turn prefills only what is new."""

from __future__ import annotations

import glob
import os
import re
import signal
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional

from ..errors import EXIT_FAILED, EXIT_OK, UserError, did_you_mean
from ..generation.engine import Engine
from ..generation.ranks import Shared
from ..generation.request import CANCELLED, LENGTH, Usage
from ..generation.session import Session, Settings, mismatch
from ..reporting import Reporter
from . import chat_settings
from .conversation import Conversation, window_of
from .prompts import from_json, to_json
from .results import guesses
from .saved_chat import SavedChats
from .screen import Screen


class Command(NamedTuple):
    """A row of /help; `wants` is what follows the name."""

    wants: str
    does: str


COMMANDS = {
    "regen": Command("", "answer the last question again"),
    "edit": Command("[TEXT]", "change the last question and ask it again"),
    "set": Command("[NAME VALUE]", "change how answers are made; /set alone shows everything"),
    "clear": Command("", "forget the conversation (the system message stays)"),
    "system": Command("[TEXT]", "set the system message; /system alone shows it"),
    "save": Command("FILE", "write the conversation to a JSON file"),
    "load": Command("FILE", "continue a saved conversation"),
    "help": Command("", "show this"),
    "quit": Command("", "leave; so do /exit and Ctrl-D"),
}
_WIDTH = max(len(f"/{name} {command.wants}") for name, command in COMMANDS.items())
HELP = "\n".join(f"{f'/{name} {command.wants}':<{_WIDTH}}  {command.does}" for name, command in COMMANDS.items()) + """
Ctrl-C stops an answer. Tab completes. Three double quotes begin and end a message of several lines.
//... sends a text that begins with /."""

_COMMAND = re.compile(r"/([A-Za-z]+)(?:\s+(.*))?", re.DOTALL)


def run(session: Session, settings: Settings, system: Optional[str], report: Reporter) -> int:
    """Chat until the user leaves; returns the exit code.

    Args:
        session: prepared, not open.
        settings: how answers are made; its limits are adapted to the window, see `window_of`.
        system: the system message, None for the template's own.
        report: takes what is not the answer.

    Raises:
        UserError: the checkpoint knows no conversations, the system message does not fit, or loading fails.
    """
    if session.tokenizer.chat_template is None and session.tokenizer.im_start_id is None:
        raise UserError("the checkpoint has neither a chat template nor Qwen's <|im_start|>",
                        where=session.tokenizer.vocab_file,
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
    screen = Screen(report, complete)
    try:
        return Repl(session, first, screen, shared, report).run()
    finally:
        screen.close()


class Repl:
    """The loop on rank 0.

    Args:
        session: open.
        conversation: to begin with.
        screen: where questions come from and answers go to.
        shared: the way to the other ranks.
        report: takes what is not the answer.
    """

    def __init__(self, session: Session, conversation: Conversation, screen: Screen, shared: Shared, report: Reporter):
        assert session.engine is not None
        self._session, self._engine = session, session.engine
        self._conversation = conversation
        self._screen = screen
        self._shared = shared
        self._report = report
        self._files = SavedChats()
        self._draws = 0
        self._commands: Dict[str, Callable[[str], None]] = {
            "regen": self._regen, "edit": self._edit, "set": self._set, "clear": self._clear, "system": self._system,
            "save": self._save, "load": self._load, "help": self._help}

    def run(self) -> int:
        """Read, answer, repeat; returns the exit code."""
        if self._screen.interactive:
            name = os.path.basename(os.path.abspath(self._session.config.load_checkpoint or ""))
            self._report.info(f"chat with {name}, {self._conversation.settings.max_length} tokens of context. /help "
                              "shows the commands, Ctrl-C stops an answer, Ctrl-D leaves.")
        while True:
            try:
                with self._shared.waiting():
                    text = self._screen.read()
            except KeyboardInterrupt:
                self._screen.note("Ctrl-D or /quit leaves.")
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
                    known = [f"/{name}" for name in (*COMMANDS, "exit")]
                    raise UserError(f"/{command[1]} is not a command",
                                    fix=did_you_mean(f"/{command[1]}", known) or "/help shows them.")
                else:
                    self._commands[command[1]]((command[2] or "").strip())
            except UserError as error:
                if error.exit_code == EXIT_FAILED:
                    raise
                self._screen.note(f"error: {error}")
        self._shared.tell(b"")
        return EXIT_OK

    def _turn(self, text: str, again: int = 0) -> None:
        """Ask `text`; `again` counts how often it was answered before, so that sampling draws something else."""
        prompt, dropped = self._conversation.ask(text)
        prompt = replace(prompt, stream=again)
        if dropped:
            turns = "turn" if dropped == 1 else f"{dropped} turns"
            window = prompt.settings.max_length
            self._screen.note(f"[the window of {window} tokens is full: the oldest {turns} left it]")
        self._shared.tell(to_json([prompt]))
        answer, usage = None, None
        with interruptible(self._engine):
            for piece in self._session.run([prompt]):
                self._screen.write(piece.text)
                answer, usage = piece.answer, piece.usage
        assert answer is not None and usage is not None
        self._screen.end_answer()
        self._conversation.answered(answer.text)
        if answer.finish_reason == CANCELLED:
            self._screen.note("[stopped]" if answer.text
                              else "[stopped before the answer began: the question is taken back]")
        elif not answer.text:
            self._screen.note("[the answer is empty: the question is taken back]")
        elif answer.finish_reason == LENGTH:
            full = len(prompt.ids) + len(answer.token_ids) >= prompt.settings.max_length
            self._screen.note(f"[the window of {prompt.settings.max_length} tokens is full]" if full
                                else f"[--max_new_tokens {prompt.settings.max_new_tokens} reached]")
        self._report.debug(_timing(usage))

    def _regen(self, argument: str) -> None:
        if argument:
            raise UserError("/regen takes no text", fix="/edit TEXT asks something else.")
        question = self._question("/regen")
        if not self._conversation.settings.do_sample:
            self._screen.note("[without do_sample the answer is the same again: /set do_sample true]")
        self._draws += 1
        self._again(question)

    def _edit(self, argument: str) -> None:
        question = self._question("/edit")
        text = argument
        if not text:
            try:
                with self._shared.waiting():
                    edited = self._screen.edit(question)
            except KeyboardInterrupt:
                self._screen.note("[the question stays as it was]")
                return
            if edited is None:
                raise UserError("/edit needs the new text here", fix="Example: /edit What is the capital of Spain?")
            text = edited.strip()
        if not text:
            self._screen.note("[the question stays as it was]")
            return
        self._again(text)

    def _question(self, command: str) -> str:
        for message in reversed(self._conversation.messages):
            if message["role"] == "user":
                return message["content"]
        raise UserError(f"{command} needs a question, and none has been asked yet")

    def _again(self, text: str) -> None:
        """Ask `text` in place of the last question; when it cannot be asked, the conversation is as before."""
        before, gone = list(self._conversation.messages), self._conversation.gone
        self._conversation.take_back()
        try:
            self._turn(text, again=self._draws)
        except UserError:
            self._conversation.messages, self._conversation.gone = before, gone
            raise
        if not self._conversation.messages or self._conversation.messages[-1]["role"] != "assistant":
            self._conversation.messages, self._conversation.gone = before, gone
            self._screen.note("[the answer before it is kept]")

    def _set(self, argument: str) -> None:
        if not argument:
            self._screen.note(chat_settings.describe(self._conversation.settings))
            return
        changed = chat_settings.changed(self._conversation.settings, argument)
        name = chat_settings.name_in(argument)
        self._conversation.settings = changed
        idle = name in changed.idle
        self._screen.note(f"[{name} is {chat_settings.shown(getattr(changed, name))}"
                          + ("; it has no effect without do_sample: /set do_sample true]" if idle else "]"))

    def _clear(self, argument: str) -> None:
        if argument:
            raise UserError("/clear takes no text")
        self._conversation.clear()
        self._screen.note("[the conversation is cleared]")

    def _system(self, argument: str) -> None:
        if not argument:
            self._screen.note("[no system message is set: the chat template's own is used]"
                              if self._conversation.system is None else f"[system: {self._conversation.system}]")
            return
        before = self._conversation.system
        self._conversation.system = argument
        try:
            self._conversation.check_system()
        except UserError:
            self._conversation.system = before
            raise
        self._screen.note("[the system message is set]")

    def _save(self, argument: str) -> None:
        path = self._path(argument, "/save")
        self._files.save(path, self._conversation.as_json())
        self._screen.note(f"[{len(self._conversation.messages)} messages saved to {path}]")

    def _load(self, argument: str) -> None:
        path = self._path(argument, "/load")
        loaded = Conversation(self._session, self._conversation.settings)
        try:
            loaded.take(self._files.load(path))
        except ValueError as error:
            raise UserError(str(error), where=path, fix="Give a file that /save has written.") from None
        loaded.check_system()
        self._conversation = loaded
        self._files.loaded(path)
        self._screen.note(f"[{len(loaded.messages)} messages loaded from {path}]")

    def _help(self, argument: str) -> None:
        self._screen.note(HELP)

    @staticmethod
    def _path(argument: str, command: str) -> str:
        if not argument:
            raise UserError(f"{command} needs the name of a file", fix=f"Example: {command} talk.json")
        if "\0" in argument:
            raise UserError("is not a file's name", where=argument)
        return os.path.abspath(os.path.expanduser(argument))


def complete(line: str) -> List[str]:
    """What may stand in place of the last word of `line`, for the Tab key: commands, settings, files."""
    name, blank, rest = line.partition(" ")
    if not blank:
        return [f"/{known} " for known in COMMANDS if f"/{known}".startswith(name)] if name.startswith("/") else []
    word = rest.rpartition(" ")[2]
    if name == "/set":
        return [f"{known} " for known in chat_settings.NAMES if known.startswith(word)] if " " not in rest else []
    if name in ("/save", "/load"):
        found = glob.glob(glob.escape(os.path.expanduser(word)) + "*")
        return [path + ("/" if os.path.isdir(path) else "") for path in sorted(found)]
    return []


def follow(session: Session, shared: Shared) -> int:
    """What the other ranks do: the turns that rank 0 tells, until it says that the conversation is over."""
    assert session.engine is not None
    # A Ctrl-C reaches every process of the terminal; rank 0 tells the others what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        message = shared.hear()
        if not message:
            return EXIT_OK
        for _ in session.run(from_json(message)):
            pass


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
    return f"{line}{guesses([usage])}]"
