"""Runs the converters and a save in forks, to be killed, starved of disk or fed with damaged files."""

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from fork_server import Job

MODULE = Path(__file__).resolve().parent.parent / "research" / "qwen1_5"


def attack(*argv, kill_after_s=None, limit_s=60, hide_full_disk=False, server="attack_worker.warm_up"):
    """Start a case and kill it when its time comes.

    Args:
        argv: the script's name, or "save", and its arguments.
        kill_after_s: seconds, None to let it end.
        limit_s: seconds within which it has to.
        hide_full_disk: it finds plenty of room on any disk.
        server: what its process has imported: `warm_up`, or `warm_up_mindspore` for what runs the network's layers.

    Returns:
        {"code", "out", "err", "killed", "seconds"}: its exit code, a signal's number negative; whether it was killed.

    Raises:
        AssertionError: it did not end within the limit.
    """
    with open(os.devnull, "rb") as nothing, tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        begin_s = time.monotonic()
        with Job(server, "attack_worker.carry_out", [list(map(str, argv)), hide_full_disk], folder=os.getcwd(),
                 streams=[nothing.fileno(), out.fileno(), err.fileno()], environ=os.environ) as job:
            code = job.wait(limit_s if kill_after_s is None else kill_after_s)
            killed = code is None
            if killed:
                job.kill()
                code = job.wait()
            seconds = time.monotonic() - begin_s
        assert not killed or kill_after_s is not None, f"still at work after {limit_s} s: {argv}"
        out.seek(0)
        err.seek(0)
        return {"code": code, "out": out.read(), "err": err.read(), "killed": killed and code < 0, "seconds": seconds}


def warm_up():
    """Import the converters."""
    sys.path[0] = str(MODULE)
    import convert_reversed  # noqa: F401
    import convert_weight  # noqa: F401
    import numpy  # noqa: F401
    import transform_ckpt  # noqa: F401
    from qwen15.commands import saved_chat  # noqa: F401
    from qwen15.conversion import hugging_face, reslice, run  # noqa: F401


def warm_up_mindspore():
    """And MindSpore."""
    warm_up()
    import mindspore  # noqa: F401


def carry_out(argv, hide_full_disk):
    """Be the case."""
    from qwen15.errors import run_main

    sys.argv = argv
    if hide_full_disk:  # as when somebody else fills the disk after the room was looked at
        plenty = shutil.disk_usage("/")._replace(free=2 ** 50)
        shutil.disk_usage = lambda path: plenty
    main = save if argv[0] == "save" else sys.modules[argv[0][:-len(".py")]].main
    code = 70
    try:
        code = run_main(lambda _: main(argv[1:]))
        sys.stdout.flush()
    finally:
        os._exit(code)


def save(argv):
    """/save of a conversation with so many characters: a new file, and the same once more."""
    from qwen15.commands.saved_chat import SavedChats

    path, size = argv
    chats = SavedChats()
    chats.save(path, {"messages": [{"role": "user", "content": "x" * int(size)}]})
    chats.save(path, {"messages": [{"role": "user", "content": "y" * int(size)}]})
