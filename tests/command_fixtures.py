"""What the tests of the command line share: a random model with a real tokenizer, run_qwen1_5.py in a process, in a
terminal."""

import fcntl
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time

import warm_commands
from conftest import MODULE, random_model

CONFIG = "predict_qwen1_5_smollm2_135m.yaml"
FLOAT32 = ("--options", "model.model_config.param_init_type=float32", "model.model_config.compute_dtype=float32")
"""In bfloat16 the small model's two likeliest first words are often a rounding apart."""
YAML = """load_checkpoint: '{folder}'
model:
  model_config:
    seq_length: 256
    block_size: 16
    num_blocks: 64
    max_decode_length: 64
    param_init_type: float32
    compute_dtype: float32
"""


def make_random(folder, small_model):
    """A random float32 model of two layers with the small model's tokenizer, and its YAML; gives the YAML's path."""
    checkpoint = folder / "random"
    random_model(checkpoint, vocab_size=49152, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                 num_attention_heads=4,
                 num_key_value_heads=2, tie_word_embeddings=True, eos_token_id=2, bos_token_id=1)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(small_model / name, checkpoint)
    path = folder / "predict.yaml"
    path.write_text(YAML.format(folder=checkpoint))
    return path


def environment(**changes):
    return {**os.environ, "TERM": "dumb", **changes}


def command(*arguments):
    return [sys.executable, "run_qwen1_5.py", "--device_target", "CPU", *map(str, arguments)]


def finished(command, environ, stdin="", timeout=300):
    """Run `python SCRIPT ARGUMENT...` in research/qwen1_5 to its end, as if started by itself."""
    if warm_commands.can_run(command, environ):
        return warm_commands.run(command[1:], MODULE, environ, stdin, timeout)
    return subprocess.run(command, cwd=MODULE, input=stdin, capture_output=True, text=True, timeout=timeout,
                          env=environ)


def run(*arguments, stdin="", code=0, **changes):
    """Run to the end; gives the finished process."""
    done = finished(command(*arguments), environment(**changes), stdin)
    assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def error_line(*arguments, code=2, **options):
    """The one line of a run that is refused."""
    done = run(*arguments, code=code, **options)
    assert done.stdout == "" and "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, arguments, **changes):
        size, environ = struct.pack("HHHH", 50, 500, 0, 0), environment(**changes)  # long lines stay in one piece
        self._warm = None
        if arguments[0] == sys.executable and warm_commands.can_run(arguments, environ):
            self.fd, theirs = pty.openpty()
            fcntl.ioctl(theirs, termios.TIOCSWINSZ, size)
            self._warm = warm_commands.start(arguments[1:], MODULE, environ, [theirs])
            self.pid = self._warm.pid
            os.close(theirs)
        else:
            self.pid, self.fd = pty.fork()
            if self.pid == 0:
                fcntl.ioctl(0, termios.TIOCSWINSZ, size)
                os.chdir(MODULE)
                os.execve(arguments[0], arguments, environ)
        self.seen = ""

    def expect(self, pattern, timeout_s=120):
        """Wait until the screen shows `pattern`; gives the match, and forgets what came up to its end."""
        deadline = time.monotonic() + timeout_s
        while True:
            found = re.search(pattern, self.seen)
            if found:
                self.seen = self.seen[found.end():]
                return found
            ready, _, _ = select.select([self.fd], [], [], max(0.0, deadline - time.monotonic()))
            try:
                data = os.read(self.fd, 4096) if ready else b""
            except OSError:  # the other side is closed
                data = b""
            assert data, f"{pattern!r} did not come; the screen showed {self.seen!r}"
            self.seen += data.decode("utf-8", "replace").replace("\r\n", "\n")

    def type(self, text):
        os.write(self.fd, text.encode())

    def end(self, timeout_s=30):
        """Wait for the end; gives the exit code."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            ready, _, _ = select.select([self.fd], [], [], 0.1)
            if ready:
                try:
                    self.seen += os.read(self.fd, 4096).decode("utf-8", "replace")
                except OSError:
                    pass
            code = self._code()
            if code is not None:
                os.close(self.fd)
                return code
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError(f"it does not end; the screen showed {self.seen!r}")

    def _code(self):
        if self._warm is not None:
            return self._warm.wait(0)
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None
