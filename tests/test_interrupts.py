"""Ctrl-C reaches Python, and ends a run with exit code 130, although MindSpore puts its own handler in place."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from command_fixtures import MODULE, command, environment, make_random
from qwen15 import interrupts


def test_a_held_signal_arrives_afterwards_even_when_the_handler_was_replaced_meanwhile():
    got = []
    before = signal.signal(signal.SIGINT, lambda *_: got.append("ours"))
    try:
        with interrupts.held():
            # What a library does in C: the handler is another one, and Python knows nothing of it.
            ctypes.CDLL(None).signal(int(signal.SIGINT), 0)  # SIG_DFL ends the process
            signal.raise_signal(signal.SIGINT)
            assert got == []
        assert got == ["ours"]
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_handler_that_a_library_has_left_behind_is_put_back():
    got = []
    before = signal.signal(signal.SIGINT, lambda *_: got.append("ours"))
    try:
        ctypes.CDLL(None).signal(int(signal.SIGINT), 0)
        interrupts.put_back()
        signal.raise_signal(signal.SIGINT)
        assert got == ["ours"]
    finally:
        signal.signal(signal.SIGINT, before)


def test_threads_started_within_hold_it_back_too():
    masks = []
    with interrupts.held():
        thread = threading.Thread(target=lambda: masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, ())))
        thread.start()
    thread.join()
    assert signal.SIGINT in masks[0]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.mark.parametrize("into_file", [pytest.param(False, marks=pytest.mark.slow), True])
def test_an_interrupted_run_ends_with_130(tmp_path, small_model, into_file):
    yaml = make_random(tmp_path, small_model)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"prompt {number}\n" for number in range(4000)))
    arguments = ["--config", yaml, "--predict_file", prompts]
    if into_file:
        arguments += ["--output_file", tmp_path / "results.jsonl"]
    process = subprocess.Popen(command(*arguments), cwd=MODULE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True,
                               env=environment())
    if into_file:
        while not (tmp_path / "results.jsonl").exists() or not (tmp_path / "results.jsonl").stat().st_size:
            assert process.poll() is None
            time.sleep(0.05)
    else:
        assert process.stdout.readline().startswith('{"index": ')
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in told
    assert told.splitlines()[-1].startswith("interrupted")
    if into_file:
        assert "the same command continues" in told


@pytest.mark.parametrize("words", [["run_qwen1_5.py"], ["convert_weight.py"], ["convert_reversed.py"],
                                   ["transform_ckpt.py"], ["-m", "qwen15"]], ids=lambda words: words[-1])
def test_a_ctrl_c_while_a_command_imports_is_told_in_a_word(words, tmp_path):
    """It comes in the middle of importing a module that errors.py needs."""
    (tmp_path / "difflib.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = subprocess.run([sys.executable, *words, "--help"], cwd=MODULE, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": f"{tmp_path}:{MODULE}"}, timeout=60,
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
