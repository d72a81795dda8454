"""A server of a random float32 model in a process of its own, and ways to talk to it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional, Tuple

import warm_commands
from conftest import MODULE

TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\nTools:\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "Answer with <tool_call> JSON </tool_call>.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


class Server:
    """A started server.

    Attributes:
        url: where it is, without /v1.
        process: its process.
        said: lines of its stderr so far.
    """

    def __init__(self, process: Any):
        self.process = process
        self.said: List[str] = []
        self._up = threading.Event()
        self.url = ""
        threading.Thread(target=self._read, daemon=True).start()
        assert self._up.wait(180) and self.url, "\n".join(self.said)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line.rstrip("\n"))
            found = re.search(r"is served at (http://\S+)/v1", line)
            if found:
                self.url = found[1]
                self._up.set()
        self._up.set()

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def send(self, path: str, body: Any = None, headers: Optional[Dict[str, str]] = None, timeout_s: float = 120
             ) -> Tuple[int, Any, Dict[str, str]]:
        """A request's status, JSON (or text) and headers; `body` is JSON's value, or bytes as they are."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        made = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json", **(headers or {})})
        try:
            with urllib.request.urlopen(made, timeout=timeout_s) as answer:
                return answer.status, _value(answer.read()), dict(answer.headers)
        except urllib.error.HTTPError as error:
            return error.code, _value(error.read()), dict(error.headers)

    def connect(self, path: str, body: Any) -> socket.socket:
        """A socket on which a request was sent and nothing has been read."""
        data = json.dumps(body).encode()
        link = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        link.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
                     f"{len(data)}\r\n\r\n"
                     .encode() + data)
        return link

    def gauge(self, name: str) -> float:
        """A value of /metrics."""
        text = self.send("/metrics")[1]
        return float(re.search(rf"^qwen15_{name} (\S+)$", text, re.MULTILINE)[1])

    def wait_until_idle(self, timeout_s: float = 30) -> None:
        """Returns when nothing runs or waits."""
        deadline = time.monotonic() + timeout_s
        while (health := self.send("/health")[1]) != {"status": "ok", "running": 0, "waiting": 0}:
            assert time.monotonic() < deadline, health
            time.sleep(0.02)


def _value(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return data.decode()


class _Forked:
    """What is asked of a `subprocess.Popen` here, of a command in a fork."""

    def __init__(self, arguments: List[str], environ: Dict[str, str]):
        said, theirs = os.pipe()
        with open(os.devnull, "r+b") as nothing:
            self._job = warm_commands.start(arguments, MODULE, environ, [nothing.fileno(), nothing.fileno(), theirs])
        os.close(theirs)
        self.pid, self.stderr, self._code = self._job.pid, os.fdopen(said, encoding="utf-8"), None

    def poll(self) -> Optional[int]:
        return self._wait(0)

    def wait(self, timeout: float) -> int:
        code = self._wait(timeout)
        if code is None:
            raise subprocess.TimeoutExpired("a forked server", timeout)
        return code

    def _wait(self, timeout_s: float) -> Optional[int]:
        if self._code is None:
            self._code = self._job.wait(timeout_s)
        return self._code

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._job.kill()


@contextmanager
def serving(yaml: Any, *flags: str, command: Optional[List[str]] = None, **environ: str) -> Iterator[Server]:
    """Start a server, and end it by SIGTERM unless it has ended."""
    command = command or [sys.executable, "-m", "qwen15", "serve", "--config", str(yaml), "--device_target", "CPU",
                          "--port", "0", *flags]
    environ = {**os.environ, **environ}
    if command[0] == sys.executable and warm_commands.can_run(command, environ):
        process = _Forked(command[1:], environ)
    else:
        process = subprocess.Popen(command, cwd=MODULE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                   env=environ)
    try:
        yield Server(process)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
