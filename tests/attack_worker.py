"""Runs the converters and a save in forked children, to be killed, starved of disk or fed with damaged files.

    python attack_worker.py MODULE_FOLDER [MODULE]...

The parent imports them once, and the modules that are named, so that a case costs the work itself. A line of JSON on
stdin is a case, a line on stdout its end: {"argv": [script or "save", ...], "kill_after_s": number or null, "limit_s":
number, "hide_full_disk": true}.
"""

import contextlib
import importlib
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time

sys.path.insert(0, sys.argv[1])

import convert_reversed  # noqa: E402
import convert_weight  # noqa: E402
import numpy  # noqa: E402, F401
import transform_ckpt  # noqa: E402
from qwen15.commands.saved_chat import SavedChats  # noqa: E402
from qwen15.conversion import hugging_face, reslice, run  # noqa: E402, F401
from qwen15.errors import run_main  # noqa: E402

for name in sys.argv[2:]:
    importlib.import_module(name)


def save(argv):
    """/save of a conversation with so many characters: a new file, and the same once more."""
    path, size = argv
    chats = SavedChats()
    chats.save(path, {"messages": [{"role": "user", "content": "x" * int(size)}]})
    chats.save(path, {"messages": [{"role": "user", "content": "y" * int(size)}]})


MAINS = {"convert_weight.py": convert_weight.main, "convert_reversed.py": convert_reversed.main,
         "transform_ckpt.py": transform_ckpt.main, "save": save}


def child(case, out, err):
    """The case itself; never returns."""
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    os.setpgid(0, 0)
    sys.argv = case["argv"]
    if case.get("hide_full_disk"):  # as when somebody else fills the disk after the room was looked at
        plenty = shutil.disk_usage("/")._replace(free=2 ** 50)
        shutil.disk_usage = lambda path: plenty
    code = 70
    try:
        code = run_main(lambda _: MAINS[case["argv"][0]](case["argv"][1:]))
        sys.stdout.flush()
    finally:
        os._exit(code)


def carry_out(case):
    """Start the case, kill it when its time comes; gives what became of it."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        begin_s = time.monotonic()
        pid = os.fork()
        if pid == 0:
            child(case, out, err)
        killed = None
        after_s = case.get("kill_after_s")
        if not ended(pid, case["limit_s"] if after_s is None else after_s):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            killed = "limit" if after_s is None else "asked"
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
        return {"code": code, "out": texts[0], "err": texts[1], "killed": killed if code == -signal.SIGKILL else None,
                "seconds": time.monotonic() - begin_s}


def ended(pid, within_s):
    """Wait for the child's end, to a millisecond; whether it came."""
    if not hasattr(os, "pidfd_open"):
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return True
            time.sleep(0.001)
        return False
    fd = os.pidfd_open(pid)
    try:
        return bool(select.select([fd], [], [], max(0.0, within_s))[0])
    finally:
        os.close(fd)


for line in sys.stdin:
    print(json.dumps(carry_out(json.loads(line))), flush=True)
