"""What the launcher's tests start as ranks: `launch_worker.py TASK ...`, each task a few lines."""

import json
import os
import signal
import subprocess
import sys
import time

RANK = int(os.environ["RANK_ID"])


def echo(*words):
    """Write the arguments as they came, byte for byte, and what the launcher set, to rank_N.json."""
    seen = {"bytes": [os.fsencode(word).hex() for word in words], "executable": sys.executable, "folder": os.getcwd(),
            "cpus": sorted(os.sched_getaffinity(0)),
            "environ": {name: text for name, text in os.environ.items() if not name.startswith("QWEN15_TEST")}}
    with open(f"rank_{RANK}.json", "w", encoding="ascii") as file:
        json.dump(seen, file)
    print(f"rank {RANK} of {os.environ['RANK_SIZE']}")


def drip():
    """Half of a character, a pause until the file `go` is there, the other half, no newline."""
    text = "京".encode()
    os.write(1, text[:2])
    while not os.path.exists("go"):
        time.sleep(0.02)
    os.write(1, text[2:])


def copy_stdin():
    """Copy stdin to stdout."""
    sys.stdout.write(sys.stdin.read())


def fail(rank, code):
    """One rank says why and ends with a code, the others sleep."""
    if RANK == int(rank):
        print("line before\nthe reason for it", file=sys.stderr)
        sys.exit(int(code))
    time.sleep(600)


def sleep():
    """Start a process of its own and sleep."""
    subprocess.Popen(["sleep", "600"])
    print("asleep", flush=True)
    time.sleep(600)


def stubborn():
    """Take no notice of SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("asleep", flush=True)
    time.sleep(600)


def allocate(rank, mebibytes):
    """One rank may use this much memory and asks for more."""
    import resource
    if RANK == int(rank):
        resource.setrlimit(resource.RLIMIT_AS, (int(mebibytes) << 20,) * 2)
        held = [bytearray(64 << 20) for _ in range(1024)]
        print(len(held))
    time.sleep(600)


def _sum():
    """A cell that sums over all ranks."""
    import mindspore as ms
    from mindspore import nn, ops

    class Sum(nn.Cell):
        def __init__(self):
            super().__init__()
            self.sum_over_ranks = ops.AllReduce()

        def construct(self, x):
            return self.sum_over_ranks(x)

    cell = Sum()
    return lambda value: float(cell(ms.Tensor([value], ms.float32)).asnumpy()[0])


def add():
    """Join and print the sum of 1 + rank over all ranks."""
    import mindspore as ms
    from qwen15 import cluster
    ms.set_context(device_target="CPU", mode=ms.GRAPH_MODE)
    rank, ranks = cluster.join()
    print(f"rank {rank} of {ranks}: sum {_sum()(1.0 + rank):g}", flush=True)


def phases(steps, fault=""):
    """Join, be `loading` until the file `load` is there, then `steps` sums ("decoding"), one every 50 ms.

    `fault`: `raise:RANK:STEP` or `hang:RANK:STEP`.
    """
    import mindspore as ms
    from qwen15 import cluster
    ms.set_context(device_target="CPU", mode=ms.GRAPH_MODE)
    cluster.join()
    print("loading", flush=True)
    while not os.path.exists("load"):
        time.sleep(0.02)
    kind, _, where = fault.partition(":")
    add_up = _sum()
    for step in range(int(steps)):
        if where == f"{RANK}:{step}":
            if kind == "raise":
                raise RuntimeError(f"a defect in step {step}")
            time.sleep(600)
        print(f"step {step} sum {add_up(1.0):g}", flush=True)
        time.sleep(0.05)


def late(rank, seconds):
    """Join; one rank comes to the first sum this much later than the others."""
    import mindspore as ms
    from qwen15 import cluster
    ms.set_context(device_target="CPU", mode=ms.GRAPH_MODE)
    cluster.join()
    if RANK == int(rank):
        time.sleep(int(seconds))
    print(f"sum {_sum()(1.0):g}", flush=True)


def join_all_but(rank):
    """All ranks but one join."""
    if RANK == int(rank):
        time.sleep(600)
    add()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
