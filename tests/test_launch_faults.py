"""Faults of the real program, run_qwen1_5.py with two workers: the culprit is named, the others end, nothing is
left."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from command_fixtures import make_random
from conftest import MODULE, random_model
from launch_runs import SCHEDULER, Launch

pytest.importorskip("mindspore")
pytest.importorskip("torch")
ENDS_WITHIN_S = 10
PROMPT = "Once upon a time"
PHASES = ("start", "loading", "decoding")


@pytest.fixture(scope="module")
def random_yaml(tmp_path_factory, small_model):
    return make_random(tmp_path_factory.mktemp("launch_faults"), small_model)


@pytest.fixture
def predict(random_yaml, tmp_path):
    """Starts a long answer of two workers."""
    started = []

    def start(*arguments, **environ):
        command = shlex.join(["python", "run_qwen1_5.py", "--config", str(random_yaml), "--device_target", "CPU",
                              "--use_parallel", "True",
                              "--auto_trans_ckpt", "True", "--predict_data", PROMPT, "--predict_length", "4000",
                              *arguments, "--options",
                              "parallel_config.model_parallel=2", "model.model_config.seq_length=4096",
                              "model.model_config.num_blocks=260"])
        started.append(Launch(command, 2, folder=tmp_path, **environ))
        return started[-1]

    yield start
    for run in started:
        run.__exit__()


def to_phase(run, phase):
    """Bring the launch to the start (imports), to loading (the cluster is complete, the network not ready) or to
    decoding."""
    if phase == "start":
        run.until(lambda run: {SCHEDULER, 0, 1} <= set(run.processes()))
        time.sleep(0.3)
    elif phase == "loading":
        run.until(lambda run: "Cluster is successfully initialized" in run.log("scheduler.log"))
        assert "ready in" not in run.err
    else:
        run.read_until(PROMPT.encode(), more=200)


def assert_ended(run, begin, code, name):
    assert run.wait(60) == code, run.err
    assert time.monotonic() - begin < ENDS_WITHIN_S
    run.assert_nothing_left(run.port)
    last = run.err.rstrip().splitlines()[-1]
    assert last.startswith(f"error: {name}: "), run.err
    return last


def name_of(victim):
    return "the scheduler" if victim == SCHEDULER else f"rank {victim}"


def slow_but(fast, cases):
    return [pytest.param(*case, marks=[] if case in fast else pytest.mark.slow) for case in cases]


@pytest.mark.parametrize("victim, phase", slow_but([(1, "decoding"), (SCHEDULER, "start")],
                                                   [(victim, phase) for phase in PHASES
                                                    for victim in (0, 1, SCHEDULER)]))
def test_a_killed_process(victim, phase, predict):
    run = predict()
    to_phase(run, phase)
    begin = time.monotonic()
    os.kill(run.processes()[victim], signal.SIGKILL)
    assert "killed by SIGKILL." in assert_ended(run, begin, 137, name_of(victim))


@pytest.mark.parametrize("rank, phase", slow_but([],  # tests/test_launch.py has the same with ranks that do less
                                                 [(rank, phase) for phase in PHASES for rank in (0, 1)]))
def test_an_exception_in_one_rank(rank, phase, predict, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("""import os, signal
def fail(*_):
    raise RuntimeError("a defect in one rank")
if os.environ.get("MS_ROLE") == "MS_WORKER":
    signal.signal(signal.SIGUSR1, fail)
    open(f"handler_{os.environ['RANK_ID']}", "w").close()
""")
    run = predict(PYTHONPATH=str(tmp_path))
    run.until(lambda run: (tmp_path / f"handler_{rank}").exists())
    to_phase(run, phase)
    begin = time.monotonic()
    os.kill(run.processes()[rank], signal.SIGUSR1)
    assert "ended with exit code 1." in assert_ended(run, begin, 1, f"rank {rank}")
    assert "RuntimeError: a defect in one rank" in run.err
    if rank == 1:
        assert "last lines of " in run.err and "worker_1.log" in run.err


class MemoryGroup:
    """A control group of the kernel's whose processes may use this many bytes; the kernel kills what asks for more."""

    def __init__(self, limit_bytes):
        v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
        first = (v1 / "memory.limit_in_bytes").exists()
        self.path = (v1 if first else v2) / f"qwen15-test-{uuid.uuid4().hex[:8]}"
        try:
            self.path.mkdir()
            (self.path / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(limit_bytes))
        except OSError as error:
            self.close()
            pytest.skip(f"memory control groups cannot be made here: {error}")

    def take(self, pid):
        (self.path / "cgroup.procs").write_text(str(pid))

    def close(self):
        deadline = time.monotonic() + 10
        while self.path.exists() and time.monotonic() < deadline:
            try:
                self.path.rmdir()
            except OSError:
                time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("rank, phase", [(1, "start"), (1, "loading"), (1, "decoding"), (0, "decoding")])
def test_a_rank_that_the_kernel_kills_for_want_of_memory(rank, phase, predict):
    run = predict()
    to_phase(run, phase)
    # What a process has is not counted, only what it asks for from now on.
    group = MemoryGroup(16 << 20 if phase == "start" else 64 << 10)
    try:
        begin = time.monotonic()
        group.take(run.processes()[rank])
        last = assert_ended(run, begin, 137, f"rank {rank}")
    finally:
        group.close()
    assert ("killed by SIGKILL. The kernel has run out of memory and has ended a process meanwhile: take more workers, "
            in last)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1, SCHEDULER])
def test_a_stopped_process_is_named_after_the_usual_half_minute(victim, predict):
    run = predict("--max_new_tokens", "3990")
    to_phase(run, "decoding")
    begin = time.monotonic()
    os.kill(run.processes()[victim], signal.SIGSTOP)
    if victim == SCHEDULER:  # nobody needs it meanwhile: the run may be over first
        assert run.wait(90) in (0, 1), run.err
    else:
        assert run.wait(90) == 1, run.err
        assert 25 <= time.monotonic() - begin < 30 + 5 + ENDS_WITHIN_S
        assert f"error: {name_of(victim)}: stopped (" in run.err
    run.assert_nothing_left(run.port)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["missing", "cut off"])
def test_slices_of_one_rank_that_are_missing_or_damaged(damage, random_yaml, predict, tmp_path):
    slices = tmp_path / "slices"
    source = random_yaml.parent / "random"
    subprocess.run([sys.executable, MODULE / "convert_weight.py", "--torch_ckpt_dir", source, "--mindspore_ckpt_path",
                    slices,
                    "--model_parallel", "2"], check=True, capture_output=True)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(source / name, slices)
    weights, = (slices / "rank_1").iterdir()
    if damage == "missing":
        shutil.rmtree(slices / "rank_0")
    else:
        os.truncate(weights, weights.stat().st_size // 2)
    run = predict("--auto_trans_ckpt", "False", "--load_checkpoint", str(slices))
    assert run.wait(60) == 2, run.err
    assert ("rank_0 is missing" if damage == "missing" else weights.name) in run.err and "Traceback" not in run.err
    assert re.search(r"error: rank [01]: ended with exit code 2\.", run.err)
    run.assert_nothing_left(run.port)


@pytest.mark.slow
def test_control_c_while_loading_and_while_decoding(predict):
    for phase in ("loading", "decoding"):
        run = predict()
        to_phase(run, phase)
        begin = time.monotonic()
        run.popen.send_signal(signal.SIGINT)
        assert run.wait(60) == 130 and time.monotonic() - begin < ENDS_WITHIN_S
        assert "ended by SIGINT, all workers with it" in run.err and "error" not in run.err
        run.assert_nothing_left(run.port)


def test_slices_of_two_checkpoints_end_the_run(random_yaml, predict, tmp_path):
    source = random_yaml.parent / "random"
    random_model(tmp_path / "other", seed=1, vocab_size=49152, hidden_size=64, intermediate_size=96,
                 num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    for model, slices in ((source, tmp_path / "slices"), (tmp_path / "other", tmp_path / "others")):
        subprocess.run([sys.executable, MODULE / "convert_weight.py", "--torch_ckpt_dir", model,
                        "--mindspore_ckpt_path", slices, "--model_parallel", "2"], check=True, capture_output=True)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(source / name, tmp_path / "slices")
    shutil.rmtree(tmp_path / "slices" / "rank_1")
    shutil.move(tmp_path / "others" / "rank_1", tmp_path / "slices")
    run = predict("--auto_trans_ckpt", "False", "--load_checkpoint", str(tmp_path / "slices"))
    assert run.wait(120) == 2, run.err
    assert re.search(r"error: \S*/rank_1: was made from another checkpoint than \S*/rank_0", run.err), run.err
    assert PROMPT.encode().startswith(run.out) and "Traceback" not in run.err  # rank 0 may have shown the prompt
    run.assert_nothing_left(run.port)
