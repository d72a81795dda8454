"""A file of results that grows line by line, and that the same command continues after an interruption."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from dataclasses import asdict
from typing import Any, Dict, Mapping, Sequence, Set

from .. import strict_json
from ..errors import EXIT_FAILED, UserError
from ..generation.session import Prompt, Session
from .prompts import PromptEntry

_SYNC_S = 5.0
"""At most this much finished work is lost when the machine loses power; a killed process loses none."""
_SCHEMA = 1


def fingerprint(session: Session, entry: PromptEntry, prompt: Prompt) -> str:
    """A short name of everything that decides an answer: prompt, settings, model. A result that bears another one is
    foreign."""
    what: Dict[str, Any] = asdict(prompt)
    del what["settings"]["speculate"]  # this sets how fast it fills
    what = {**what, "label": "", "stop_ids": sorted(prompt.stop_ids), "id": entry.name, "schema": _SCHEMA,
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
        UserError: the file holds something else, results of other prompts or settings, or is being written by another
            run.
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
        value = {key: item for key, item in value.items() if key != "index"}
        line = (strict_json.dumps({"index": index, "request": self.keys[index], **value}) + "\n").encode("utf-8")
        try:
            # One call: a killed process leaves a whole line or none, unless the disk is full.
            written = os.write(self._file, line)
            while written < len(line):
                written += os.write(self._file, line[written:])
            self.done.add(index)
            if time.monotonic() - self._synced_s >= _SYNC_S:
                self._sync()
        except OSError as error:
            raise UserError(f"cannot be written: {error.strerror}; {len(self.done)} of {len(self.keys)} results are "
                            "there", where=self.path, fix="Make room; the same command continues.",
                            exit_code=EXIT_FAILED) from None

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
            raise UserError("another run writes its results there", where=self.path,
                            fix="Wait for it, or name another file.") from None
        except OSError:
            pass  # a file system without locks

    def _resume(self) -> None:
        """Take over what is there, and cut off the line in which an earlier run was interrupted."""
        if not os.path.isfile(self.path):
            return  # a pipe or a device: nothing to continue
        end = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    if not self._is_cut_result(line):
                        raise self._foreign(number, "is not a result")
                    break
                self._take(number, line)
                end += len(line)
        if end < os.path.getsize(self.path):
            os.ftruncate(self._file, end)

    def _is_cut_result(self, line: bytes) -> bool:
        """Whether a last line without its end is the beginning of a result of this run, and not somebody else's
        text."""
        heads = [f'{{"index": {index}, "request": "{key}", '.encode() for index,
                 key in enumerate(self.keys) if index not in self.done]
        return any(line.startswith(head) or (bool(self.done) and head.startswith(line)) for head in heads)

    def _take(self, number: int, line: bytes) -> None:
        try:
            value = strict_json.loads(line.decode("utf-8"))
        except ValueError:
            value = None
        if not isinstance(value, dict) or type(value.get("index")) is not int or "request" not in value:
            raise self._foreign(number, "is not a result")
        index = value["index"]
        if not 0 <= index < len(self.keys):
            raise self._foreign(number, f"is the result of prompt {index}, there are {len(self.keys)} prompts now")
        if value["request"] != self.keys[index]:
            raise self._foreign(number, f"is the result of another prompt {index}, or of other settings or another "
                                        f"checkpoint")
        if index in self.done:
            raise self._foreign(number, f"is a second result of prompt {index}")
        self.done.add(index)

    def _foreign(self, number: int, what: str) -> UserError:
        return UserError(f"{what}; nothing is written to it", where=f"{self.path}:{number}",
                         fix="Name another --output_file.")
