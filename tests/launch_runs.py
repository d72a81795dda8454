"""Run scripts/msrun_launcher.sh as a user does, look at the processes it starts, and see that none is left."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

from conftest import ROOT
from qwen15.launch import ports

LAUNCHER = ROOT / "scripts" / "msrun_launcher.sh"
WORKER = ROOT / "tests" / "launch_worker.py"
_MARK = "QWEN15_TEST_LAUNCH"
SCHEDULER = "scheduler"


class Launch:
    """One launch.

    Args:
        arguments: of the launcher; the first is the command.
        folder: where it is started.
        prefix: words before the launcher's own command line (`ip netns exec ...`).
        environ: variables on top of this process's; None takes one away.
    """

    def __init__(self, *arguments, folder, prefix=(), stdin=subprocess.DEVNULL, **environ):
        self.folder = Path(folder)
        self._mark = f"{_MARK}={uuid.uuid4().hex}"
        name, value = self._mark.split("=")
        changed = {**os.environ, "PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"], name: value,
                   **environ}
        self._errors = self.folder / f"stderr-{value}"
        environ = {key: text for key, text in changed.items() if text is not None}
        words = [word if isinstance(word, bytes) else str(word) for word in arguments]
        with open(self._errors, "wb") as errors:
            # Tests that run under nohup would hand down that SIGHUP is ignored, which the launcher rightly respects.
            self.popen = subprocess.Popen([*prefix, "bash", str(LAUNCHER), *words], cwd=folder, stdin=stdin,
                                          env=environ,
                                          preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
                                          stdout=subprocess.PIPE, stderr=errors, start_new_session=True)
        self.out = b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid in self.processes().values():
            os.kill(pid, signal.SIGKILL)
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()
        self.popen.stdout.close()

    def wait(self, timeout_s=120):
        """Exit code; stdout is then in `out`."""
        rest, _ = self.popen.communicate(timeout=timeout_s)
        self.out += rest
        return self.popen.returncode

    @property
    def err(self):
        """What is on stderr so far."""
        return self._errors.read_text("utf-8", "replace")

    @property
    def port(self):
        """The scheduler's port, once it is said."""
        return int(re.search(r"scheduler \S+:(\d+)", self.err)[1])

    def log(self, name, folder="output/msrun_log"):
        """Text of a log."""
        path = self.folder / folder / name
        return path.read_text("utf-8", "replace") if path.exists() else ""

    def processes(self):
        """Live processes of this launch except the launcher itself: {rank, SCHEDULER or command line: pid}."""
        found = {}
        for entry in os.listdir("/proc"):
            if not entry.isdigit() or int(entry) == self.popen.pid:
                continue
            try:
                environ = Path("/proc", entry, "environ").read_bytes().split(b"\0")
                state, _, _, session = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()[:4]
                words = Path("/proc", entry, "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            except OSError:
                continue
            if self._mark.encode() not in environ or state == "Z":
                continue
            variables = dict(line.split(b"=", 1) for line in environ if b"=" in line)
            role, rank = variables.get(b"MS_ROLE"), variables.get(b"RANK_ID")
            if role and session == entry:  # each rank has a session of its own
                found[SCHEDULER if role == b"MS_SCHED" else int(rank)] = int(entry)
            else:
                found[f"{words}({entry})"] = int(entry)
        return found

    def until(self, condition, timeout_s=90):
        """Wait until `condition(self)` is true; returns its value."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            value = condition(self)
            if value:
                return value
            assert self.popen.poll() is None, f"the launcher has ended with {self.popen.returncode}: {self.err}"
            time.sleep(0.05)
        raise AssertionError(f"not within {timeout_s} s; stderr: {self.err}")

    def read_until(self, text, timeout_s=90, more=0):
        """Read stdout until `text` has come, and `more` bytes beside it."""
        deadline = time.monotonic() + timeout_s
        os.set_blocking(self.popen.stdout.fileno(), False)
        while text not in self.out or len(self.out) < len(text) + more:
            assert time.monotonic() < deadline, f"only {self.out!r} within {timeout_s} s; stderr: {self.err}"
            self.out += self.popen.stdout.read() or b""
            time.sleep(0.02)
        os.set_blocking(self.popen.stdout.fileno(), True)

    def assert_nothing_left(self, port=None, address="127.0.0.1"):
        """No process of the launch, and nobody listens on its port but another launch, which may have it now."""
        assert self.processes() == {}
        if port is not None:
            with socket.socket() as probe:
                free = probe.connect_ex((address, port)) != 0
            assert free or self._is_of_another(ports.holder_of(port)), f"somebody listens on {port}"

    def _is_of_another(self, holder):
        """Whether who listens is gone meanwhile or of another test's launch; `holder` as `ports.holder_of` says."""
        try:
            environ = Path("/proc", holder.split()[1], "environ").read_bytes() if holder else b""
        except OSError:
            return True
        return not holder or _MARK.encode() in environ and self._mark.encode() not in environ


def worker(*words):
    """The command that runs launch_worker.py with these words."""
    return " ".join(["python", str(WORKER), *words])


def free_port():
    """A port that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
