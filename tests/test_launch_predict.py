"""The README's command with 4 workers: 14B's and 72B's YAML, fewer and narrower layers, the real vocabulary; one
process's answer."""

import os
import shlex
import shutil
import subprocess
import sys

import pytest
import warm_commands
import yaml
from conftest import MODULE, random_model
from launch_runs import Launch

pytest.importorskip("mindspore")
pytest.importorskip("torch")
PROMPT = "帮助我制定一份去上海的旅游攻略"
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8,
         "num_key_value_heads": 8}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, qwen_vocabulary):
    folder = tmp_path_factory.mktemp("predict") / "model_dir"
    random_model(folder, vocab_size=152064, **SIZES)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(qwen_vocabulary / name, folder)
    return folder


def small_yaml(size, split_vocab, folder):
    """The family's YAML with this test's sizes, in float32, for 4 workers."""
    config = yaml.safe_load((MODULE / f"predict_qwen1_5_{size}.yaml").read_text("utf-8"))
    config["model"]["model_config"].update(
        hidden_size=64, intermediate_size=96, num_layers=2, num_heads=8, n_kv_heads=8, seq_length=128, num_blocks=16,
        block_size=16, param_init_type="float32", compute_dtype="float32", rotary_dtype="float32")
    config["parallel_config"].update(model_parallel=4, vocab_emb_dp=not split_vocab)
    config["context"]["device_target"] = "CPU"
    path = folder / f"predict_qwen1_5_{size}.yaml"
    path.write_text(yaml.safe_dump(config), "utf-8")
    return path


def words(config, checkpoint, parallel, whole):
    return ["run_qwen1_5.py", "--config", str(config), "--load_checkpoint", str(checkpoint), "--run_mode", "predict",
            "--use_parallel", str(parallel), "--predict_data", PROMPT, "--predict_length", "40", "--auto_trans_ckpt",
            str(whole)]


@pytest.mark.parametrize("size, split_vocab, whole", [
    ("72b", False, False), pytest.param("14b", True, True, marks=pytest.mark.slow),
    pytest.param("72b", False, True, marks=pytest.mark.slow),
    pytest.param("14b", True, False, marks=pytest.mark.slow)])
def test_four_workers_give_the_answer_of_one_process(size, split_vocab, whole, checkpoint, tmp_path):
    config = small_yaml(size, split_vocab, tmp_path)
    alone = warm_commands.run(words(config, checkpoint, False, True), MODULE, os.environ)
    assert alone.returncode == 0, alone.stderr
    source = checkpoint
    if not whole:
        source = tmp_path / "slices"
        subprocess.run([sys.executable, MODULE / "convert_weight.py", "--torch_ckpt_dir", checkpoint,
                        "--mindspore_ckpt_path", source,
                        "--model_parallel", "4", "--vocab_emb_dp", str(not split_vocab)], check=True,
                       capture_output=True)
        for name in ("vocab.json", "merges.txt"):
            if not os.path.exists(source / name):
                shutil.copy(checkpoint / name, source)
    with Launch("python " + shlex.join(words(config, source, True, whole)), 4, folder=tmp_path) as run:
        assert run.wait(200) == 0, run.err
        assert run.out == alone.stdout.encode() and run.out.startswith(PROMPT.encode())
        assert len(run.out) > len(PROMPT.encode()) + 20
        for rank in (1, 2, 3):
            assert PROMPT not in run.log(f"worker_{rank}.log")
        run.assert_nothing_left(run.port)
