"""Files of prompts: read, checked line by line, run with continuous batching, results written as they come and resumable."""

import argparse
import fcntl
import hashlib
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from typing import IO, Any, Dict, Iterator, List, Mapping, Optional, Sequence, Set, TextIO, Tuple

from ..config.schema import Config
from ..errors import EXIT_FAILED, EXIT_INTERRUPTED, UserError, did_you_mean
from ..generation.ranks import Shared
from ..generation.request import CANCELLED, Usage
from ..generation.session import SETTING_NAMES, Piece, Prompt, Session, Settings, mismatch, numbered
from ..progress import human_time
from ..reporting import Reporter
from .results import Text, json_line, record

DEFAULT_MAX_BATCH = 16
_SYNC_S = 5.0
"""At most this much finished work is lost when the machine loses power; a killed process loses none."""
_LINE_EVERY_S = 30.0
_OTHER_KEYS = ("id", "prompt", "messages", "system")
_KEYS = _OTHER_KEYS + SETTING_NAMES
_SCHEMA = 1


@dataclass(frozen=True)
class Entry:
    """One prompt of a file.

    Attributes:
        index: number of the prompt, from 0, blank lines not counted.
        where: `prompts.jsonl:12`, for messages.
        source: the text, or a conversation's messages.
        settings: how it is continued.
        name: the file's `id` for it, handed through to the result; None without one.
    """

    index: int
    where: str
    source: Any
    settings: Settings
    name: Any = None


def run(config: Config, settings: Settings, args: argparse.Namespace, report: Reporter) -> int:
    """Continue every prompt of --predict_file (or --predict_data) into --output_file (or stdout); returns the exit code.

    Raises:
        UserError: a line of the file that cannot be used, an output file that holds something else, or the work failed.
    """
    session = Session.prepare(config, launched=not args.dry_run)
    todo: List[Tuple[Entry, Prompt]] = []
    out: Optional[ResultFile] = None
    if session.rank == 0:
        # Only rank 0 reads and writes files: stdin and the output exist once.
        entries = list(_entries(settings, args))
        prompts = encode(session, entries, args)
        _point_out(session, entries, prompts, args, report)
        if args.dry_run:
            from . import dry_run

            print(dry_run.describe(session, prompts))
            return 0
        session.requests(prompts)  # every one is refused now, not after hours of work
        todo = list(zip(entries, prompts))
        if args.output_file:
            keys = [fingerprint(session, entry, prompt) for entry, prompt in todo]
            out = ResultFile(args.output_file, keys)
            todo = [pair for pair in todo if pair[0].index not in out.done]
            if out.done:
                report.info(f"{args.output_file}: {len(out.done)} of {len(entries)} results are there, {len(todo)} to go")
    try:
        if session.rank == 0 and not todo:
            report.info("nothing is left to do")
            if config.parallel.model_parallel == 1:
                return 0
        session.open(report.info, args.max_batch or DEFAULT_MAX_BATCH)
        return _work(session, todo, out, args, report)
    except KeyboardInterrupt:
        if out is not None:
            print(f"interrupted: {len(out.done)} of {len(out.keys)} results are in {args.output_file}; the same command continues",
                  file=sys.stderr)
            return EXIT_INTERRUPTED
        raise
    finally:
        if out is not None:
            out.close()


def _work(session: Session, todo: Sequence[Tuple[Entry, Prompt]], out: Optional["ResultFile"], args: argparse.Namespace,
          report: Reporter) -> int:
    assert session.engine is not None
    told = Shared(session.engine.network).same(_to_json([prompt for _, prompt in todo]) if session.rank == 0 else None)
    prompts = [prompt for _, prompt in todo] if session.rank == 0 else _from_json(told)
    if not prompts:
        return 0
    sink = _sink(todo, out, args) if session.rank == 0 else None
    progress = Progress(len(prompts), sys.stderr, report.shows("info"))
    try:
        for piece in session.run(prompts):
            progress.take(piece)
            if sink is not None:
                sink.take(piece)
    finally:
        if sink is not None:
            sink.close()
    report.info(progress.finish())
    return 0


def _sink(todo: Sequence[Tuple[Entry, Prompt]], out: Optional["ResultFile"], args: argparse.Namespace) -> Any:
    if args.output_format == "text":
        echo = not args.chat if args.echo is None else args.echo
        return Text(sys.stdout, [entry.source if echo and isinstance(entry.source, str) else "" for entry, _ in todo])
    return Results([entry for entry, _ in todo], out, sys.stdout)


class Results:
    """Writes one JSON object per finished prompt, in the order in which they finish, each with its `index`."""

    def __init__(self, entries: Sequence[Entry], out: Optional["ResultFile"], stdout: IO[str]):
        self._entries, self._out, self._stdout = entries, out, stdout

    def take(self, piece: Piece) -> None:
        """More of an answer."""
        if piece.usage is None or piece.answer.finish_reason == CANCELLED:
            return
        entry = self._entries[piece.index]
        made: Dict[str, Any] = {"index": entry.index}
        if entry.name is not None:
            made["id"] = entry.name
        made.update(record(entry.source, piece.answer, piece.usage))
        if self._out is not None:
            self._out.write(entry.index, made)
        else:
            self._stdout.write(json_line(made) + "\n")
            self._stdout.flush()

    def close(self) -> None:
        """No more comes."""


# ---- reading ----

def _entries(settings: Settings, args: argparse.Namespace) -> Iterator[Entry]:
    if args.predict_file is None:
        for index, text in enumerate(args.predict_data):
            label = "the prompt" if len(args.predict_data) == 1 else f"prompt {index + 1}"
            yield Entry(index, label, _as_chat(text, args.system) if args.chat else text, settings)
        return
    yield from read_file(args.predict_file, settings, args.chat, args.system)


def read_file(path: str, settings: Settings, as_chat: bool = False, system: Optional[str] = None) -> Iterator[Entry]:
    """The prompts of a file: JSON lines when its name ends in .jsonl or its first line is an object, else one prompt a line.

    Args:
        path: the file, `-` for stdin.
        settings: what a line does not say.
        as_chat: texts are a conversation's question each.
        system: the system message of conversations that have none.

    Raises:
        UserError: the file cannot be read or is empty, or a line cannot be used; with its number.
    """
    name = "stdin" if path == "-" else path
    lines = [(number, line) for number, line in enumerate(_read(path).split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError("there is no prompt in it", where=name)
    as_json = path.endswith((".jsonl", ".ndjson")) or (not path.endswith(".txt") and _is_object(lines[0][1]))
    for index, (number, line) in enumerate(lines):
        where = f"{name}:{number}"
        if not as_json:
            text = line.rstrip("\r")
            yield Entry(index, where, _as_chat(text, system) if as_chat else text, settings)
            continue
        yield _entry_of_json(index, where, line, settings, as_chat, system)


def _read(path: str) -> str:
    try:
        if path == "-":
            data = sys.stdin.buffer.read()
        else:
            with open(path, "rb") as file:
                data = file.read()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=path, fix="Name a file with one prompt a line.") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError("is not UTF-8 text", where=f"{'stdin' if path == '-' else path}:{line}",
                        fix="Convert it, e.g. with iconv -f GBK -t UTF-8.") from None


def _is_object(line: str) -> bool:
    try:
        value = json.loads(line)
    except ValueError:
        return False
    return isinstance(value, dict) and ("prompt" in value or "messages" in value)


def _entry_of_json(index: int, where: str, line: str, settings: Settings, as_chat: bool, system: Optional[str]) -> Entry:
    value = _json_object(line, where)
    for key in value:
        if key not in _KEYS:
            raise UserError(f"{key!r} is not a known key", where=where,
                            fix=did_you_mean(key, _KEYS) or f"Known are {', '.join(_KEYS)}.")
    if ("prompt" in value) == ("messages" in value):
        raise UserError("has both a prompt and messages" if "prompt" in value else "has neither a prompt nor messages", where=where,
                        fix='Example: {"prompt": "Gravity is", "max_new_tokens": 20}')
    own_system = value.get("system", system)
    if "system" in value and not isinstance(own_system, str):
        raise UserError(f"system wants a text, not {own_system!r}", where=where)
    if "prompt" in value:
        source = value["prompt"]
        if not isinstance(source, str):
            raise UserError(f"prompt wants a text, not {source!r}", where=where)
        if as_chat:
            source = _as_chat(source, own_system)
        elif "system" in value:
            raise UserError("a system message needs a conversation", where=where, fix="Add --chat, or give messages.")
    else:
        source = _checked_messages(value["messages"], where)
        if own_system is not None and source[0]["role"] == "system":
            if "system" in value:
                raise UserError("the system message is given twice, by system and in messages", where=where, fix="Keep one.")
        elif own_system is not None:
            source = [{"role": "system", "content": own_system}, *source]
    try:
        own = settings.changed({name: value[name] for name in SETTING_NAMES if name in value})
    except ValueError as error:
        raise UserError(str(error), where=where) from None
    return Entry(index, where, source, own, value.get("id"))


def _json_object(line: str, where: str) -> Dict[str, Any]:
    def once(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            twice = next(key for key, _ in pairs if [k for k, _ in pairs].count(key) > 1)
            raise UserError(f"{twice!r} is given twice", where=where)
        return made

    def no_constant(text: str) -> Any:
        raise UserError(f"{text} is not JSON", where=where)

    try:
        value = json.loads(line, object_pairs_hook=once, parse_constant=no_constant)
    except json.JSONDecodeError as error:
        raise UserError(f"is not JSON: {error.msg} (column {error.colno})", where=where,
                        fix="Each line is one object; a file of plain texts is named .txt.") from None
    except RecursionError:
        raise UserError("is nested too deeply", where=where) from None
    if not isinstance(value, dict):
        raise UserError(f"wants an object, not {type(value).__name__}", where=where, fix='Example: {"prompt": "Gravity is"}')
    return value


def _checked_messages(value: Any, where: str) -> List[Dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise UserError("messages wants a list of role and content", where=where)
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise UserError(f"message {number} needs a role and a content that is text", where=where)
    return value


def _as_chat(text: str, system: Optional[str]) -> List[Dict[str, str]]:
    head = [] if system is None else [{"role": "system", "content": system}]
    return [*head, {"role": "user", "content": text}]


def encode(session: Session, entries: Sequence[Entry], args: argparse.Namespace) -> List[Prompt]:
    """The prompts of the entries, in their order; texts are encoded on all cores.

    Raises:
        UserError: a conversation that the template refuses; with its line.
    """
    texts = [entry.source for entry in entries if isinstance(entry.source, str)]
    ids = iter(session.tokenizer.encode_batch(texts, control_tokens=args.control_tokens))
    eos = frozenset(session.config.model.eos_token_id)
    made = []
    for entry in entries:
        if isinstance(entry.source, str):
            made.append(Prompt(tuple(next(ids)), entry.settings, eos, entry.where))
        else:
            try:
                made.append(session.chat_prompt(entry.source, entry.settings, entry.where))
            except UserError as error:
                raise UserError(error.what, where=entry.where, fix=error.fix) from None
    return numbered(made)


def _point_out(session: Session, entries: Sequence[Entry], prompts: Sequence[Prompt], args: argparse.Namespace,
               report: Reporter) -> None:
    raw = [prompt for entry, prompt in zip(entries, prompts) if isinstance(entry.source, str)]
    hint = mismatch(session.tokenizer, as_chat=not raw, prompts=raw)
    if hint:
        report.warning(hint)
    inherited = Settings.of(session.config).idle
    for entry in entries:
        for name in entry.settings.idle:
            if name not in inherited:
                report.warning(f"note: {entry.where}: {name} has no effect without do_sample")
                return


# ---- results ----

def fingerprint(session: Session, entry: Entry, prompt: Prompt) -> str:
    """A short name of everything that decides an answer: prompt, settings, model. A result that bears another one is foreign."""
    what = {**asdict(prompt), "label": "", "stop_ids": sorted(prompt.stop_ids), "id": entry.name, "schema": _SCHEMA,
            "model": [os.path.realpath(session.checkpoint), asdict(session.config.model)]}
    return hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=8).hexdigest()


class ResultFile:
    """A file of results that grows line by line, and continues where an earlier run ended.

    Args:
        path: the file; made when there is none. What is there stays.
        keys: the fingerprint of each prompt, by index.

    Attributes:
        done: indices whose results are in the file.

    Raises:
        UserError: the file holds something else, results of other prompts or settings, or is being written by another run.
    """

    def __init__(self, path: str, keys: Sequence[str]):
        self.path, self.keys = path, list(keys)
        self.done: Set[int] = set()
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise UserError(f"cannot be written: {error.strerror}", where=path) from None
        try:
            self._lock()
            self._resume()
        except BaseException:
            os.close(self._file)
            raise
        self._synced_s = time.monotonic()

    def write(self, index: int, value: Mapping[str, Any]) -> None:
        """Append a result as one whole line. Raises a UserError when the disk is full."""
        line = (json_line({**value, "request": self.keys[index]}) + "\n").encode("utf-8")
        try:
            # One call: a process that is killed leaves a whole line or none, but for a full disk.
            written = os.write(self._file, line)
            while written < len(line):
                written += os.write(self._file, line[written:])
            self.done.add(index)
            if time.monotonic() - self._synced_s >= _SYNC_S:
                self._sync()
        except OSError as error:
            raise UserError(f"cannot be written: {error.strerror}; {len(self.done)} of {len(self.keys)} results are there",
                            where=self.path, fix="Make room; the same command continues.", exit_code=EXIT_FAILED) from None

    def close(self) -> None:
        """Wait until the disk has everything."""
        try:
            self._sync()
        finally:
            os.close(self._file)

    def _sync(self) -> None:
        try:
            os.fsync(self._file)
        except OSError:
            pass  # a pipe or a device such as /dev/stdout, which has no disk to wait for
        self._synced_s = time.monotonic()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError("another run writes its results there", where=self.path, fix="Wait for it, or name another file.") from None
        except OSError:
            pass  # a file system without locks

    def _resume(self) -> None:
        """Take over what is there, and cut off the line in which an earlier run was interrupted."""
        if not os.path.isfile(self.path):
            return  # a pipe or a device: nothing to continue
        end, number = 0, 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    if not line.startswith(b'{"index": '):
                        raise self._foreign(number, "is not a result")
                    break
                self._take(number, line)
                end += len(line)
        if end < os.path.getsize(self.path):
            os.ftruncate(self._file, end)

    def _take(self, number: int, line: bytes) -> None:
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict) or not isinstance(value.get("index"), int) or "request" not in value:
            raise self._foreign(number, "is not a result")
        index = value["index"]
        if not 0 <= index < len(self.keys):
            raise self._foreign(number, f"is the result of prompt {index}, there are {len(self.keys)} prompts now")
        if value["request"] != self.keys[index]:
            raise self._foreign(number, f"is the result of another prompt {index}, or of other settings or another checkpoint")
        if index in self.done:
            raise self._foreign(number, f"is a second result of prompt {index}")
        self.done.add(index)

    def _foreign(self, number: int, what: str) -> UserError:
        return UserError(f"{what}; nothing is written to it", where=f"{self.path}:{number}", fix="Name another --output_file.")


def _to_json(prompts: Sequence[Prompt]) -> bytes:
    return json.dumps([{**asdict(prompt), "stop_ids": sorted(prompt.stop_ids)} for prompt in prompts]).encode()


def _from_json(message: bytes) -> List[Prompt]:
    made = []
    for value in json.loads(message):
        settings = Settings(**{**value["settings"], "stop": tuple(value["settings"]["stop"])})
        made.append(Prompt(tuple(value["ids"]), settings, frozenset(value["stop_ids"]), value["label"], value["stream"]))
    return made


# ---- progress ----

class Progress:
    """How many prompts are finished, tokens/s and the time left: one line that is rewritten on a terminal, else a line now and then.

    Args:
        total: prompts in all.
        stream: stderr.
        shown: False keeps silent.
        clock: seconds, for tests.
    """

    def __init__(self, total: int, stream: TextIO, shown: bool = True, clock: Any = time.monotonic):
        self._total, self._stream, self._clock = total, stream, clock
        self._tty = stream.isatty()
        self._shown = shown
        self._begin_s = clock()
        self._next_s = self._begin_s + (0.2 if self._tty else _LINE_EVERY_S)
        self._finished = 0
        self._running: Dict[int, Any] = {}
        self._prompt_tokens = self._new_tokens = 0
        self._width = 0

    def take(self, piece: Piece) -> None:
        """More of an answer."""
        self._running[piece.index] = piece.answer
        if piece.usage is not None:
            self._count(piece.index, piece.usage)
        now_s = self._clock()
        if self._shown and now_s >= self._next_s:
            self._next_s = now_s + (0.2 if self._tty else _LINE_EVERY_S)
            self._show(self.line(now_s - self._begin_s))

    def line(self, elapsed_s: float) -> str:
        """The line for a time since the start."""
        new = self._new_tokens + sum(len(answer.token_ids) for answer in self._running.values())
        text = f"{self._finished} of {self._total} prompts, {len(self._running)} running, {new / max(elapsed_s, 1e-9):.1f} tokens/s"
        if self._finished:
            text += f", {human_time(elapsed_s / self._finished * (self._total - self._finished))} left"
        return text

    def finish(self) -> str:
        """Take the line away; returns what is to be said at the end."""
        if self._shown and self._tty and self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._stream.flush()
        total_s = self._clock() - self._begin_s
        return (f"{self._finished} prompts, {self._prompt_tokens} prompt tokens and {self._new_tokens} new tokens in {total_s:.2f} s: "
                f"{self._new_tokens / max(total_s, 1e-9):.1f} new tokens/s")

    def _count(self, index: int, usage: Usage) -> None:
        self._running.pop(index, None)
        self._finished += 1
        self._prompt_tokens += usage.prompt_tokens
        self._new_tokens += usage.generated_tokens

    def _show(self, text: str) -> None:
        if self._tty:
            self._stream.write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            self._stream.write(text + "\n")
        self._stream.flush()
