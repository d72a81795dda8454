"""Tensor parallelism over real processes and MindSpore's collectives: the same tokens and logits as one process."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys

import numpy as np
import pytest
import warm_commands
from conftest import ROOT, random_model
from stored_form_fixtures import Kind, quantised_model

pytest.importorskip("torch")
WORKER = ROOT / "tests" / "tensor_parallel_worker.py"
SHAPE = dict(vocab_size=200, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8,
             num_key_value_heads=4)


def write_job(folder, checkpoint, ranks, split_vocab, dtype, whole=True):
    folder.mkdir(parents=True, exist_ok=True)
    yaml = folder / "predict.yaml"
    yaml.write_text(f"""
load_checkpoint: '{checkpoint}'
auto_trans_ckpt: {whole}
use_parallel: {ranks > 1}
parallel_config: {{model_parallel: {ranks}, vocab_emb_dp: {not split_vocab}}}
model:
  model_config: {{param_init_type: {dtype}, compute_dtype: {dtype}, seq_length: 128, block_size: 8, num_blocks: 48}}
context: {{device_target: CPU}}
""")
    random = np.random.default_rng(3)
    prompts = [random.integers(0, 200, n).tolist() for n in (9, 1, 17)]
    (folder / "job.json").write_text(json.dumps({"yaml": str(yaml), "prompts": prompts, "count": 24}))
    return folder


def run(folder, ranks, kernels):
    environment = {**os.environ, "QWEN15_KERNELS": kernels, "PYTHONPATH": str(ROOT / "research" / "qwen1_5")}
    arguments = [str(WORKER), str(folder / "job.json"), str(folder)]
    if ranks == 1:
        done = warm_commands.run(arguments, folder, environment)
    else:
        environment["PATH"] = os.path.dirname(sys.executable) + os.pathsep + environment["PATH"]
        done = subprocess.run(["bash", str(ROOT / "scripts" / "msrun_launcher.sh"), shlex.join(["python", *arguments]),
                               str(ranks)], env=environment, cwd=folder, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tp") / "hf"
    random_model(folder, **SHAPE)
    return folder


@pytest.fixture(scope="module")
def alone(checkpoint, tmp_path_factory):
    """One process's results."""
    folder = write_job(tmp_path_factory.mktemp("alone"), checkpoint, 1, False, "float32")
    return run(folder, 1, "")[0]


@pytest.mark.parametrize("ranks, split_vocab, kernels", [
    (2, False, ""), pytest.param(2, True, "reference", marks=pytest.mark.slow),
    pytest.param(4, True, "", marks=pytest.mark.slow), pytest.param(4, False, "reference", marks=pytest.mark.slow),
    pytest.param(2, True, "", marks=pytest.mark.slow), pytest.param(4, False, "", marks=pytest.mark.slow),
])
def test_float32_tokens_and_logits_equal_one_process(ranks, split_vocab, kernels, checkpoint, alone, tmp_path):
    results = run(write_job(tmp_path, checkpoint, ranks, split_vocab, "float32"), ranks, kernels)
    for result in results:
        assert result["tokens"] == alone["tokens"]
        assert np.abs(np.array(result["logits"]) - np.array(alone["logits"])).max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_rank_has_the_same_tokens_in_16_bits(dtype, checkpoint, tmp_path):
    first, *others = run(write_job(tmp_path, checkpoint, 4, True, dtype), 4, "")
    assert all(other["tokens"] == first["tokens"] for other in others)


@pytest.mark.slow
def test_slices_made_beforehand_give_the_same_as_the_whole_checkpoint(checkpoint, alone, tmp_path, module_dir):
    subprocess.run([sys.executable, module_dir / "convert_weight.py", "--torch_ckpt_dir", checkpoint,
                    "--mindspore_ckpt_path", tmp_path / "slices", "--model_parallel", "4", "--vocab_emb_dp", "False"],
                   check=True, capture_output=True)
    results = run(write_job(tmp_path / "job", tmp_path / "slices", 4, True, "float32", whole=False), 4, "")
    assert all(result["tokens"] == alone["tokens"] for result in results)


@pytest.mark.version
def test_quantised_tokens_and_logits_equal_one_process(tmp_path):
    """int4 in groups of 64 that the cut of w2 divides, zero points, int8 table and head cut along the vocabulary."""
    quantised_model(tmp_path / "q", Kind(4, 64, zero=True), Kind(8, 32))
    alone, = run(write_job(tmp_path / "alone", tmp_path / "q", 1, False, "float32"), 1, "")
    for result in run(write_job(tmp_path / "two", tmp_path / "q", 2, True, "float32"), 2, ""):
        assert "weights int4 in groups of 64, table and head int8 in groups of 32" in result["note"]
        assert result["tokens"] == alone["tokens"]
        assert np.abs(np.array(result["logits"]) - np.array(alone["logits"])).max() < 1e-4
