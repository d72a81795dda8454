"""Guessed tokens over two workers: all of them run the same rows, and the answer is one process's."""

import os
import shlex

import pytest
import warm_commands
from conftest import MODULE
from launch_runs import Launch
from speculate_fixtures import make_twins

pytest.importorskip("mindspore")
pytest.importorskip("torch")
PROMPT = "a b c a b c a b"


@pytest.fixture(scope="module")
def yaml(tmp_path_factory, small_model):
    path, _ = make_twins(tmp_path_factory.mktemp("speculate"), small_model)
    path.write_text(path.read_text() + "parallel_config:\n  model_parallel: 2\ncontext:\n  device_target: CPU\n")
    return path


def words(yaml, parallel, *more):
    return ["run_qwen1_5.py", "--config", str(yaml), "--use_parallel", str(parallel), "--auto_trans_ckpt", "True",
            "--predict_data", PROMPT, "--max_new_tokens", "40", *more]


@pytest.mark.parametrize("way", [pytest.param("ngram", marks=pytest.mark.slow), "draft"])
def test_two_workers_give_the_answer_of_one_process(way, yaml, tmp_path):
    plain = warm_commands.run(words(yaml, False), MODULE, os.environ)
    assert plain.returncode == 0, plain.stderr
    # the draft runs whole on rank 0
    with_guesses = ("--speculate", "ngram" if way == "ngram" else str(yaml.parent / "draft"))
    with Launch("python " + shlex.join(words(yaml, True, *with_guesses)), 2, folder=tmp_path) as launched:
        assert launched.wait(300) == 0, launched.err
        assert launched.out == plain.stdout.encode()
        log = launched.log("worker_0.log") + launched.err
        assert "tokens a step" in log
        if way == "draft":
            assert "draft model: weights" in log and "on rank 0" in log
            assert "draft model: CPU" not in launched.log("worker_1.log")
        launched.assert_nothing_left(launched.port)
