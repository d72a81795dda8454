"""run_qwen1_5.py as a user runs it: the answer on stdout, one clear line for each mistake, and the right exit code."""

import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from command_fixtures import command, finished
from conftest import random_model

CONFIG = "predict_qwen1_5_smollm2_135m.yaml"


@pytest.fixture
def run():
    """Runs the script in research/qwen1_5 and gives back the finished process."""
    def start(*arguments, config=CONFIG, **environment):
        return finished(command("--config", config, *arguments), {**os.environ, **environment})
    return start


def error_line(process, code=2):
    """The one line a mistake gives."""
    assert process.returncode == code, process.stderr
    assert process.stdout == "" and "Traceback" not in process.stderr
    errors = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, process.stderr
    return errors[0]


@pytest.fixture(scope="module")
def random_folder(tmp_path_factory, small_model):
    """A random model of two layers with the small model's vocabulary and tokenizer files."""
    folder = tmp_path_factory.mktemp("random") / "hf"
    random_model(folder, vocab_size=49152, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                 num_attention_heads=4,
                 num_key_value_heads=2, max_shard_size="8MB", tie_word_embeddings=True, eos_token_id=2, bos_token_id=1)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(small_model / name, folder)
    return folder


@pytest.fixture
def random_yaml(tmp_path, random_folder):
    """A YAML that leaves the sizes to the checkpoint."""
    path = tmp_path / "predict.yaml"
    path.write_text(f"load_checkpoint: '{random_folder}'\nmodel:\n  model_config:\n    seq_length: 256\n    "
                    f"block_size: 16\n"
                    "    num_blocks: 64\n    max_decode_length: 24\n")
    return path


def test_prompt_and_continuation_stream_to_stdout(run, small_model):
    done = run("--load_checkpoint", small_model, "--predict_data", "The capital of France is", "--max_new_tokens", 4)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The capital of France is Paris")
    assert "tokens/s" in done.stderr and "Paris" not in done.stderr


def test_jsonl_has_the_continuation_only_and_every_field(run, small_model):
    prompts = ["The capital of France is", "1, 2, 3, 4,"]
    done = run("--load_checkpoint", small_model, "--predict_data", *prompts, "--max_new_tokens", 3, "--output_format",
               "jsonl")
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [r["prompt"] for r in records] == prompts
    for record in records:
        assert set(record) >= {"prompt", "text", "token_ids", "prompt_tokens", "generated_tokens", "finish_reason",
                               "prefill_s", "decode_s"}
        assert record["generated_tokens"] == len(record["token_ids"]) == 3 and record["finish_reason"] == "length"
        assert record["prefill_s"] > 0 and record["decode_s"] > 0
    assert records[0]["text"].startswith(" Paris") and records[1]["text"].startswith(" 5")


def test_converted_checkpoints_give_the_same_text(run, small_model, module_dir, tmp_path):
    arguments = ("--predict_data", "Water boils at", "--max_new_tokens", 12)
    expected = run("--load_checkpoint", small_model, *arguments).stdout
    assert expected.startswith("Water boils at")
    for target in ("one.ckpt", "rank/rank_0/model.safetensors"):
        path = tmp_path / target
        path.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, module_dir / "convert_weight.py", "--torch_ckpt_dir", small_model,
                        "--mindspore_ckpt_path", path],
                       check=True, capture_output=True)
        load = path if target.endswith(".ckpt") else tmp_path / "rank"
        done = run("--load_checkpoint", load, *arguments)
        assert done.stdout == expected, done.stderr


def test_sampling_is_repeatable_and_differs_between_copies(run, random_yaml):
    arguments = ("--predict_data", "abc", "--do_sample", "True", "--temperature", 2.0, "--seed", 7, "--batch_size", 2,
                 "--output_format", "jsonl")
    one, two = (run(*arguments, config=random_yaml) for _ in range(2))
    assert one.returncode == 0, one.stderr
    ids = [json.loads(line)["token_ids"] for line in one.stdout.splitlines()]
    assert ids == [json.loads(line)["token_ids"] for line in two.stdout.splitlines()]
    assert len(ids) == 2 and ids[0] != ids[1]


def test_an_absent_flag_never_overrides_the_yaml(run, random_yaml):
    done = run("--predict_data", "abc", "--output_format", "jsonl", config=random_yaml)
    record = json.loads(done.stdout)
    assert record["prompt_tokens"] + record["generated_tokens"] == 24  # the YAML's max_decode_length


def test_total_length_flag_of_the_original(run, random_yaml):
    done = run("--predict_data", "abc", "--predict_length", 9, "--output_format", "jsonl", config=random_yaml)
    record = json.loads(done.stdout)
    assert record["prompt_tokens"] + record["generated_tokens"] == 9


def test_print_config_says_where_each_value_came_from(run, random_yaml):
    done = run("--top_k", 5, "--print_config", config=random_yaml)
    assert done.returncode == 0
    lines = {line.split(" = ")[0]: line for line in done.stdout.splitlines()}
    assert lines["model.model_config.top_k"].split("#")[1].strip() == "--top_k"
    assert lines["model.model_config.hidden_size"].endswith("config.json")
    assert lines["model.model_config.num_blocks"].split("#")[1].strip().endswith("predict.yaml:6")


class TestMistakes:
    """Ten things a new user gets wrong."""

    def test_missing_file(self, run, tmp_path):
        line = error_line(run("--load_checkpoint", tmp_path / "nothing.ckpt", "--predict_data", "a"))
        assert "nothing.ckpt" in line and "does not exist" in line

    def test_missing_yaml(self, run):
        line = error_line(run("--predict_data", "a", config="predict_qwen1_5_15b.yaml"))
        assert "predict_qwen1_5_15b.yaml" in line

    def test_wrong_folder(self, run, tmp_path, small_model):
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(small_model / name, tmp_path)
        line = error_line(run("--load_checkpoint", tmp_path, "--predict_data", "a"))
        assert str(tmp_path) in line and "weights" in line
        (tmp_path / "vocab.json").unlink()  # lacking everything, it is named for the weights still
        assert "weights" in error_line(run("--load_checkpoint", tmp_path, "--predict_data", "a"))

    def test_truncated_shard(self, run, random_folder, random_yaml, tmp_path):
        broken = shutil.copytree(random_folder, tmp_path / "broken")
        shard = sorted(broken.glob("*.safetensors"))[0]
        shard.write_bytes(shard.read_bytes()[:-100])
        line = error_line(run("--load_checkpoint", broken, "--predict_data", "a", config=random_yaml))
        assert shard.name in line

    def test_typo_in_yaml_answers_within_a_second(self, module_dir, random_yaml):
        random_yaml.write_text(random_yaml.read_text().replace("num_blocks", "num_block"))
        start_s = time.perf_counter()  # of a process by itself
        line = error_line(subprocess.run(command("--config", random_yaml, "--predict_data", "a"), cwd=module_dir,
                                         capture_output=True, text=True, timeout=300))
        assert time.perf_counter() - start_s < 3  # a loaded machine; MindSpore alone takes longer to import
        assert f"{random_yaml}:6" in line and "Did you mean num_blocks?" in line

    def test_yaml_of_another_size(self, run, small_model):
        line = error_line(run("--load_checkpoint", small_model, "--predict_data", "a",
                              config="predict_qwen1_5_14b.yaml"))
        assert "predict_qwen1_5_14b.yaml:" in line and "5120" in line and "576" in line

    def test_empty_prompt(self, run, random_yaml):
        assert "the prompt is empty" in error_line(run("--predict_data", "", config=random_yaml))

    def test_no_prompt(self, run, random_yaml):
        assert "--predict_data" in error_line(run(config=random_yaml))

    def test_too_long_prompt(self, run, random_yaml):
        line = error_line(run("--predict_data", "word " * 40, config=random_yaml))
        assert "tokens" in line and "24" in line and "--predict_length" in line
        line = error_line(run("--predict_data", "word " * 400, "--predict_length", 256, config=random_yaml))
        assert "seq_length is 256" in line

    def test_swapped_tokenizer_files(self, run, random_yaml, small_model):
        line = error_line(run("--predict_data", "a", "--vocab_file", small_model / "merges.txt", "--merges_file",
                              small_model / "vocab.json", config=random_yaml))
        assert "swap" in line.lower()

    def test_checkpoint_without_some_tensors(self, run, random_folder, random_yaml, tmp_path):
        from safetensors.numpy import load_file, save_file

        tensors = {}
        for shard in random_folder.glob("*.safetensors"):
            tensors.update(load_file(str(shard)))
        del tensors["model.layers.1.self_attn.o_proj.weight"]
        folder = tmp_path / "partial"
        folder.mkdir()
        save_file(tensors, str(folder / "model.safetensors"))
        for name in ("config.json", "vocab.json", "merges.txt", "tokenizer_config.json"):
            shutil.copy(random_folder / name, folder)
        line = error_line(run("--load_checkpoint", folder, "--predict_data", "a", config=random_yaml))
        assert "model.layers.1.self_attn.o_proj.weight" in line and "missing" in line

    def test_weights_with_nan(self, run, random_folder, random_yaml, tmp_path):
        from safetensors.numpy import load_file, save_file

        folder = shutil.copytree(random_folder, tmp_path / "nan")
        for shard in folder.glob("*.safetensors"):
            tensors = load_file(str(shard))
            if "model.layers.1.mlp.up_proj.weight" in tensors:
                tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
                save_file(tensors, str(shard), metadata={"format": "pt"})
        done = run("--load_checkpoint", folder, "--predict_data", "abc", config=random_yaml)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "model.layers.1.feed_forward.w3.weight" in done.stderr and "not finite" in done.stderr
        assert done.stdout == "abc\n"  # the error begins on a line of its own

    def test_unknown_flag_and_bad_value(self, run, random_yaml):
        assert run("--predict_date", "a", config=random_yaml).returncode == 2
        assert run("--predict_data", "a", "--top_k", "many", config=random_yaml).returncode == 2

    def test_parallel_yaml_in_one_process(self, run, random_yaml):
        line = error_line(run("--predict_data", "a", "--use_parallel", "True", "--options",
                              "parallel_config.model_parallel=2",
                              config=random_yaml))
        assert "msrun_launcher.sh" in line
