"""A configuration is right or it is refused with file, line and remedy; every value knows where it came from."""

import argparse
import json
import os
import resource
import subprocess
import sys
import time

import pytest
from qwen15 import device
from qwen15.command_line import Parser
from qwen15.config import keys
from qwen15.config.checkpoint_files import checkpoint_folders
from qwen15.config.describe import describe
from qwen15.config.flags import Flag, add_flags, flags_from
from qwen15.config.load import load_config
from qwen15.errors import UserError
from qwen15.json_file import read_json

MODULE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "research", "qwen1_5")
TINY = """\
seed: 7
use_parallel: False
parallel_config:
  model_parallel: 2
model:
  model_config:
    type: LlamaConfig
    seq_length: 128
    hidden_size: 64
    num_layers: 2
    num_heads: 4
    n_kv_heads: 2
    vocab_size: 300
    intermediate_size: 96
    block_size: 16
    num_blocks: 16
    eos_token_id: [2, 5]
    max_decode_length: 100
    param_init_type: "float32"
  arch:
    type: LlamaForCausalLM
context:
  device_target: "CPU"
"""
HF = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 96,
      "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300,
      "rms_norm_eps": 1e-5, "rope_theta": 5000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
      "max_position_embeddings": 64,
      "eos_token_id": 4, "bos_token_id": 3}


@pytest.fixture
def write(tmp_path):
    """Write a YAML file and return its path."""
    def write(text, name="model.yaml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)
    return write


@pytest.fixture
def checkpoint(tmp_path):
    """Make a folder with config.json as a downloaded or converted checkpoint has it, and return its path."""
    def checkpoint(changes=(), **files):
        folder = tmp_path / "checkpoint"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({**HF, **dict(changes)}))
        for name, contents in files.items():
            (folder / name.replace("__", ".")).write_text(json.dumps(contents))
        return str(folder)
    return checkpoint


def load(path, flags=(), options=(), environ=None):
    return load_config(path, flags, options, environ or {})


def complaint(path, *args, **more):
    """The one line that refuses a configuration; it is bad input, and it is one line."""
    with pytest.raises(UserError) as caught:
        load(path, *args, **more)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def without(key):
    return "".join(line for line in TINY.splitlines(True) if not line.strip().startswith(f"{key}:"))


def with_line(after, line):
    return TINY.replace(f"{after}\n", f"{after}\n{line}\n", 1)


# --- reading values

def test_yaml_values_arrive_with_their_types_and_lines(write):
    path = write(TINY)
    config = load(path)
    assert (config.model.dims.hidden_size, config.model.dims.num_kv_heads, config.model.dims.head_dim) == (64, 2, 16)
    assert config.model.eos_token_id == (2, 5)
    assert (config.generation.max_length, config.generation.seed) == (100, 7)
    assert config.parallel.model_parallel == 1  # use_parallel is False
    assert config.sources["model.model_config.seq_length"] == f"{path}:8"
    assert config.sources["model.model_config.top_k"] == "default"
    assert config.notes == ()


def test_a_flag_beats_the_yaml_and_an_absent_flag_does_not(write):
    path = write(TINY)
    parser = argparse.ArgumentParser()
    add_flags(parser)
    args = parser.parse_args(["--config", path, "--top_k", "3", "--do_sample", "TRUE"])
    config = load_config(args.config, flags_from(args), args.options, {})
    assert (config.generation.top_k, config.generation.do_sample) == (3, True)
    assert config.generation.max_length == 100
    assert config.sources["model.model_config.do_sample"] == "--do_sample"


def test_false_and_zero_on_the_command_line_are_values(write):
    path = write(TINY.replace("use_parallel: False", "use_parallel: True"))
    flags = [Flag("use_parallel", "--use_parallel", False), Flag("seed", "--seed", 0)]
    config = load(path, flags)
    assert config.parallel.use_parallel is False
    assert config.generation.seed == 0


@pytest.mark.parametrize("text", ["1", "yes", "True ", "wahr", ""])
def test_boolean_flags_take_true_and_false_only(text):
    parser = Parser("test", "")
    add_flags(parser)
    with pytest.raises(UserError, match="--use_past: wants True or False"):
        parser.parse_args(["--use_past", text])


def test_device_id_minus_one_leaves_the_choice_to_the_launcher(write):
    parser = argparse.ArgumentParser()
    add_flags(parser)
    assert flags_from(parser.parse_args(["--device_id", "-1"])) == []
    assert flags_from(parser.parse_args(["--device_id", "3"])) == [Flag("context.device_id", "--device_id", 3)]


def test_options_set_any_key_with_yaml_types(write):
    config = load(write(TINY), options=["model.model_config.num_blocks=32", "model.model_config.eos_token_id=[7, 9]",
                                        "model.model_config.top_p=5e-1", "context.save_graphs=False"])
    assert config.model.num_blocks == 32
    assert config.model.eos_token_id == (7, 9)
    assert config.generation.top_p == 0.5
    assert config.effective["context"]["save_graphs"] is False
    assert config.sources["model.model_config.num_blocks"] == "--options"


@pytest.mark.parametrize("option, words", [
    ("num_blocks", "not KEY=VALUE"),
    ("=3", "not KEY=VALUE"),
    ("model.model_config.num_blocks=[1", "not valid YAML"),
    ("model.model_config.num_blocks=a: 1", "section"),
    ("model.model_config.num_block=3", "Did you mean num_blocks?"),
    ("model.model_config.num_blocks='32'", "wants a whole number, not the text '32'"),
    ("model=3", "is a section"),
])
def test_a_wrong_option_is_named(write, option, words):
    line = complaint(write(TINY), options=[option])
    assert "--options" in line and words in line


def test_one_key_given_twice_on_the_command_line_must_agree(write):
    flag = Flag("seed", "--seed", 3)
    assert load(write(TINY), [flag], ["seed=3"]).generation.seed == 3
    assert "seed is given twice: 3 by --seed and 4" in complaint(write(TINY), [flag], ["seed=4"])


def test_numbers_with_an_exponent_but_no_dot_are_numbers(write):
    path = write(with_line("    num_layers: 2", "    rms_norm_eps: 1e-6\n    theta: 1e6"))
    config = load(path)
    assert (config.model.rms_norm_eps, config.model.theta) == (1e-6, 1e6)
    assert "wants a number" in complaint(write(with_line("    num_layers: 2", '    theta: "1e6"')))


def test_anchors_and_merges_of_yaml_work(write):
    merge = "    <<: &more {top_k: 4, top_p: 0.5}\n    top_p: 0.9\n"
    text = TINY.replace("  model_config:\n", f"  model_config:\n{merge}", 1)
    config = load(write(text))
    assert (config.generation.top_k, config.generation.top_p) == (4, 0.9)


def test_the_merged_configuration_is_what_mindformers_gets(write):
    effective = load(write(TINY), options=["model.model_config.eos_token_id=[2]"]).effective
    model = effective["model"]["model_config"]
    assert (model["type"], model["qkv_has_bias"], model["eos_token_id"]) == ("LlamaConfig", True, 2)
    assert effective["model"]["arch"]["type"] == "LlamaForCausalLM"
    assert "max_new_tokens" not in model
    assert effective["context"]["device_target"] == "CPU"


def test_print_config_says_where_each_value_came_from(write):
    path = write(with_line("    num_layers: 2", "    rotary_pct: 1.0"))
    text = describe(load(path, [Flag("model.model_config.top_k", "--top_k", 3)]))
    assert "model.model_config.top_k = 3" in text and "# --top_k" in text
    assert f"# {path}:8" in text
    rotary = next(line for line in text.splitlines() if "rotary_pct" in line)
    assert rotary.endswith("(no effect)")
    assert "# device: CPU, asked for" in text


# --- what is refused, with file and line

@pytest.mark.parametrize("line, words", [
    ("    rms_norm_epsilon: 1.0e-6", ["model.model_config.rms_norm_epsilon is not a known key",
                                         "Did you mean rms_norm_eps?"]),
    ("    model_parallel: 4", ["Did you mean parallel_config.model_parallel?"]),
    ("    zzz: 4", ["model.model_config.zzz is not a known key", "Keys of model.model_config:"]),
    ('    use_past: "True "', ["wants True or False, not the text 'True '"]),
    ('    batch_size: "4"', ["wants a whole number, not the text '4'"]),
    ("    batch_size: 4.0", ["wants a whole number, not 4.0"]),
    ("    batch_size: True", ["wants a whole number, not True"]),
    ("    batch_size: 0", ["must be at least 1, not 0"]),
    ("    top_p: 1.5", ["must be at most 1, not 1.5"]),
    ("    top_p: 0", ["must be above 0, not 0"]),
    ("    top_k: -1", ["must be at least 0, not -1"]),
    ("    temperature: -1", ["must be at least 0, not -1"]),
    ("    num_layers\uff1a 3", ["column 15 is a fullwidth colon (U+FF1A). Write : instead."]),
    ("    batch_size: 4\u3000", ["not the text '4\\u3000'; column 18 is an ideographic space (U+3000)"]),
    ("    batch_size:\u00a04", ["column 16 is a non-breaking space (U+00A0). Write spaces instead."]),
    ("    compute_dtype: \u201cbfloat16\u201d",
     ["column 20 is an opening typographic quote (U+201C). Write \" instead."]),
    ("    top_p: \"0.8\uff0c\"", ["column 16 is a fullwidth comma (U+FF0C). Write , instead."]),
    ("    batch\ufeff_size: 4", ["column 10 is a byte order mark (U+FEFF). Remove it."]),
    ("\tbatch_size: 4", ["column 1 is a tab (U+0009). Write spaces instead."]),
    ("    num_layers: " + "9" * 12, ["num_layers"]),
    ("    temperature: .nan", ["wants a number"]),
    ("    compute_dtype: bf16", ["wants one of float32, float16, bfloat16", "write bfloat16"]),
    ("    compute_dtype: 16", ["wants a text, not 16"]),
    ("    pad_token_id: [1]", ["wants a whole number"]),
    ("    bos_token_id: 300", ["bos_token_id 300", "not in the vocabulary of vocab_size 300"]),
    ("    qkv_has_bias: False", ["supports only True, not False"]),
    ("    extend_method: NTK", ["supports only the text 'None'", "NTK"]),
    ("    quant_config: {type: smooth_quant}", ["quant_config"]),
    ("    checkpoint_name_or_path: qwen2_7b", ["checkpoint_name_or_path", "qwen2_7b"]),
    ("    offset: 2", ["offset supports only 0"]),
    ("    num_layers: 3", ["num_layers is given twice; the first is on line 10"]),
])
def test_a_wrong_line_is_named_with_its_number(write, line, words):
    path = write(with_line("    num_layers: 2", line))
    text = complaint(path)
    assert f"{path}:11" in text
    for word in words:
        assert word in text


@pytest.mark.parametrize("old, new, line, words", [
    ("model:\n", "modle:\n", 5, ["modle is not a known key", "Did you mean model?"]),
    ("parallel_config:\n  model_parallel: 2", "parallel_config: 2", 3, ["is a section, not the value 2"]),
    ("seed: 7", "run_mode: predikt", 1, ["wants one of predict, train, finetune, eval, export, not the text 'pre"]),
    ("seed: 7", "seed: 7\nseed: 8", 2, ["seed is given twice", "line 1"]),
    ("seed: 7", "\tseed: 7", 1, ["not valid YAML", "column 1 is a tab"]),
    ("seed: 7", "seed\uff1a7", 1, ["not valid YAML: column 5 is a fullwidth colon (U+FF1A). Write : instead."]),
    ("num_layers: 2", "num_layers: 5000", 10, ["must be at most 4096, not 5000"]),
    ("seed: 7", "seed: [7", 2, ["not valid YAML"]),
    ("seed: 7", "7: seed", 1, ["the key 7 is not a word"]),
    ("parallel_config:\n  model_parallel: 2", "parallel_config:\n  model_parallel\uff1a2\n  data_parallel\uff1a1", 4,
     ["parallel_config is a section, not the value", "; column 17 is a fullwidth colon (U+FF1A). Write : instead."]),
    ("seed: 7", "load_checkpoint: \u201c/nowhere\u201d", 1,
     ["does not exist; column 18 is an opening typographic quote (U+201C). Write \" instead."]),
    ("seed: 7", "seed:\n  '\uff17'", 2, ["seed wants a whole number", "; column 4 is a fullwidth digit seven"]),
    ("type: LlamaConfig", "type: Qwen2Config", 7, ["supports only the text 'LlamaConfig'"]),
    ('device_target: "CPU"', 'device_target: "GPU"', 23, ["wants one of auto, Ascend, CPU, not the text 'GPU'"]),
    ("eos_token_id: [2, 5]", "eos_token_id: []", 17, ["wants a token id or a list of them"]),
    ("context:\n", "context:\n  max_device_memory: 59\n", 23, ["wants a text, not 59"]),
    ("context:\n", "context:\n  max_device_memory: 59MB\n", 23, ["wants a size such as 59GB, not '59MB'"]),
    ("seed: 7", "run_mode: 'finetune'", 1, ["predicts only", "--run_mode predict"]),
    ("seed: 7", "use_legacy: False", 1, ["supports only True"]),
    ("seed: 7", "moe_config: {expert_num: 60}", 1, ["moe_config.expert_num supports only 1, not 60"]),
])
def test_a_wrong_section_is_named_with_its_line(write, old, new, line, words):
    assert old in TINY
    path = write(TINY.replace(old, new, 1))
    text = complaint(path)
    assert f"{path}:{line}" in text
    for word in words:
        assert word in text


def test_a_file_that_is_not_there_or_not_yaml(write, tmp_path):
    write(TINY, "predict_tiny.yaml")
    assert "Did you mean predict_tiny.yaml?" in complaint(str(tmp_path / "predict_tny.yaml"))
    assert "is a folder" in complaint(str(tmp_path))
    assert "is empty" in complaint(write("# nothing\n", "empty.yaml"))
    assert "not a list of `key: value`" in complaint(write("- a\n", "list.yaml"))
    (tmp_path / "binary.yaml").write_bytes(b"seed: 1\na: \xff\xfe\x00")
    assert "binary.yaml:2: not UTF-8 text (byte 11, column 4)" in complaint(str(tmp_path / "binary.yaml"))
    (tmp_path / "notepad.yaml").write_text(TINY, "utf-16")
    assert "is UTF-16 text. Save it as UTF-8." in complaint(str(tmp_path / "notepad.yaml"))
    assert "too many sections" in complaint(write("trainer: &a\n  b: *a\n", "loop.yaml"))


def test_aliases_that_multiply_are_refused(write):
    lines = ["trainer:", "  a0: &a0 {x: {y: 1}}"]
    lines += [f"  a{i}: &a{i} {{p: *a{i - 1}, q: *a{i - 1}, r: *a{i - 1}}}" for i in range(1, 25)]
    assert "too many sections, more than 10000 in all" in complaint(write("\n".join(lines)))
    lists = ["trainer:", "  a0: &a0 [1]", *(f"  a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))]
    text = complaint(write("\n".join([*lists, "seed: *a59"])))
    assert "seed wants a whole number, not list [[[" in text and len(text) < 1000


@pytest.mark.parametrize("value", ["!!float x", "!!int x", "!!timestamp x", "!!binary é", "!!python/name:os.system",
                                   "=", "!!set {a, b}", "1_0:99999", "2024-13-45", "0x", "9" * 5000, "[" * 3000,
                                   "\x00"])
def test_odd_yaml_is_refused_in_one_line_like_anything_else(write, value):
    path = write(with_line("    num_layers: 2", f"    batch_size: {value}"))
    assert path in complaint(path)


def test_brackets_without_end_are_refused_at_once_whatever_limit_mindspore_has_set(write):
    path = write("trainer: " + "[" * 5000)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10_000)
    try:
        start_s = time.process_time()
        assert "brackets nested too deeply" in complaint(path)
        assert "brackets nested too deeply" in complaint(write(TINY, "fine.yaml"), options=["seed=" + "[" * 5000])
        assert time.process_time() - start_s < 5  # minutes, where PyYAML goes on to the limit
    finally:
        sys.setrecursionlimit(limit)


# --- contradictions

@pytest.mark.parametrize("old, new, words", [
    ("n_kv_heads: 2", "n_kv_heads: 3", ["num_heads 4", "is not a multiple of n_kv_heads 3", ":11)", ":12)"]),
    ("hidden_size: 64", "hidden_size: 66", ["hidden_size 66", "not divisible by num_heads 4"]),
    ("hidden_size: 64", "hidden_size: 60", ["head size 15", "is odd"]),
    ("num_blocks: 16", "num_blocks: 7", ["seq_length 128", "block_size 16", "num_blocks 7", "= 112 tokens",
                                         "model.model_config.num_blocks=8", "--seq_length 112"]),
    ("max_decode_length: 100", "max_decode_length: 129", ["max_decode_length 129", "is over seq_length 128",
                                                          "--predict_length 128"]),
    ("max_decode_length: 100", "max_position_embedding: 100",
     ["max_position_embedding 100", "less than seq_length 128"]),
    ("eos_token_id: [2, 5]", "eos_token_id: [2, 500]", ["eos_token_id [2, 500]", "vocab_size 300"]),
])
def test_values_that_contradict_each_other_are_both_named(write, old, new, words):
    path = write(TINY.replace(old, new, 1))
    text = complaint(path)
    for word in words:
        assert word in text


def test_lengths_of_the_command_line_are_checked_too(write):
    flag = Flag("model.model_config.max_decode_length", "--predict_length", 500)
    text = complaint(write(TINY), [flag])
    assert "max_decode_length 500 (--predict_length)" in text and "seq_length 128" in text


def test_a_missing_size_is_asked_for(write):
    assert "model.model_config.vocab_size is missing" in complaint(write(without("vocab_size")))


def test_use_past_in_two_places_must_agree(write):
    both = with_line("    num_layers: 2", "    use_past: False").replace("seed: 7", "use_past: True")
    assert "use_past False contradicts use_past True" in complaint(write(both))
    flag = Flag("model.model_config.use_past", "--use_past", False)
    config = load(write(both), [flag])
    assert config.model.use_past is False and config.effective["use_past"] is False
    assert load(write(TINY.replace("seed: 7", "use_past: False"))).model.use_past is False


def test_new_tokens_out_of_reach_are_pointed_out(write):
    config = load(write(with_line("    num_layers: 2", "    max_new_tokens: 100")))
    assert (config.generation.max_length, config.generation.max_new_tokens) == (100, 100)
    assert "cannot be reached: max_decode_length 100" in config.notes[0]


def flag(name, value):
    return Flag(f"model.model_config.{name}" if name != "seed" else "seed", f"--{name}", value)


def test_new_tokens_of_the_command_line_win_over_the_total_length_of_the_yaml(write):
    config = load(write(TINY), [flag("max_new_tokens", 110)])
    assert (config.generation.max_length, config.generation.max_new_tokens) == (128, 110)
    assert config.sources["model.model_config.max_decode_length"] == "= seq_length, for --max_new_tokens"
    both = [flag("max_new_tokens", 110), Flag("model.model_config.max_decode_length", "--predict_length", 50)]
    assert load(write(TINY), both).generation.max_length == 50
    assert "cannot be reached" in load(write(TINY), both).notes[0]


# --- what settings of sampling mean

GREEDY, SAMPLING = (TINY.replace("    num_layers: 2\n",
                                 f"    num_layers: 2\n    do_sample: {do_sample}\n    top_p: 0.9\n", 1)
                    for do_sample in (False, True))


@pytest.mark.parametrize("given", [("temperature", 0.7), ("temperature", 1.0), ("top_k", 5), ("top_p", 0.5)])
@pytest.mark.parametrize("yaml", [TINY, GREEDY])
def test_a_flag_of_sampling_means_sampling_and_that_is_said(write, yaml, given):
    config = load(write(yaml), [flag(*given)])
    assert config.generation.do_sample and getattr(config.generation, given[0]) == given[1]
    assert config.sources["model.model_config.do_sample"].startswith(f"for {given[0]} ")
    assert config.sources["model.model_config.do_sample"].endswith(f"(--{given[0]})")
    assert len(config.notes) == 1 and "means sampling, which is switched on; --do_sample False" in config.notes[0]


def test_do_sample_false_on_the_command_line_stays(write):
    config = load(write(SAMPLING), [flag("temperature", 0.7), flag("do_sample", False)])
    assert not config.generation.do_sample and config.notes == ()
    assert config.sources["model.model_config.do_sample"] == "--do_sample"


def test_values_that_leave_nothing_out_and_those_of_a_file_switch_nothing_on(write):
    assert not load(write(GREEDY), [flag("top_k", 0), flag("top_p", 1.0), flag("seed", 5)]).generation.do_sample
    assert not load(write(GREEDY)).generation.do_sample
    assert load(write(SAMPLING), [flag("top_k", 3)]).notes == ()


@pytest.mark.parametrize("yaml", [TINY, GREEDY, SAMPLING])
def test_temperature_0_takes_the_likeliest_token(write, yaml):
    path = write(yaml)
    for config in (load(path, [flag("temperature", 0.0)]), load(path, options=["model.model_config.temperature=0"])):
        assert (config.generation.do_sample, config.generation.temperature) == (False, 1.0)
    in_file = write(yaml.replace("    num_layers: 2\n", "    num_layers: 2\n    temperature: 0\n", 1), "zero.yaml")
    config = load(in_file)
    assert (config.generation.do_sample, config.generation.temperature) == (False, 1.0)
    assert config.sources["model.model_config.temperature"] == f"for temperature 0 ({in_file}:11)"


def test_temperature_0_and_do_sample_contradict_each_other(write):
    line = complaint(write(TINY), [flag("temperature", 0.0), flag("do_sample", True)])
    assert line == ("--temperature: do_sample True contradicts temperature 0, which takes the likeliest token always. "
                    "Leave one of them out.")


def test_the_seed_0_that_every_yaml_has_is_none_and_any_other_is_one(write):
    path = write(TINY.replace("seed: 7", "seed: 0"))
    config = load(path)
    assert config.generation.seed is None and "seed" not in config.effective
    line = next(line for line in describe(config).splitlines() if line.startswith("seed"))
    assert line.split("# ")[1] == f"{path}:1 says 0, as every YAML does: none; --seed 0 is a seed"
    assert load(path, [flag("seed", 0)]).generation.seed == 0
    assert load(path, options=["seed=0"]).generation.seed == 0
    assert load(write(TINY)).generation.seed == 7


def test_windows_line_ends_and_a_byte_order_mark_at_the_beginning_change_nothing(write, tmp_path):
    (tmp_path / "windows.yaml").write_bytes(b"\xef\xbb\xbf" + TINY.replace("\n", "\r\n").encode())
    assert load(str(tmp_path / "windows.yaml")).model == load(write(TINY)).model


def test_the_device_that_auto_chose_is_credited_to_the_line_with_auto(write):
    path = write(TINY.replace('"CPU"', '"auto"'))
    config = load(path)
    assert config.sources["context.device_target"] == f"auto: {path}:23"


# --- parallel arithmetic

PARALLEL = TINY.replace("use_parallel: False", "use_parallel: True")


def test_workers_started_must_be_model_parallel(write):
    path = write(PARALLEL)
    assert load(path, environ={"MS_WORKER_NUM": "2", "RANK_SIZE": "2"}).parallel.model_parallel == 2
    assert load(path).parallel.model_parallel == 2  # not launched: --print_config and memory still work
    text = complaint(path, environ={"MS_WORKER_NUM": "4"})
    assert f"{path}:4: model_parallel 2 needs 2 worker(s), but 4 were started (MS_WORKER_NUM=4)" in text
    assert "parallel_config.model_parallel=4" in text


def test_several_workers_without_use_parallel_are_refused(write):
    path = write(TINY)
    text = complaint(path, environ={"RANK_SIZE": "2"})
    assert f"{path}:2: use_parallel is False, but 2 workers were started" in text
    assert load(path, environ={"RANK_SIZE": "1"}).parallel.use_parallel is False


def test_model_parallel_must_divide_the_heads(write):
    text = complaint(write(PARALLEL.replace("model_parallel: 2", "model_parallel: 4")))
    assert "n_kv_heads 2 is not divisible by model_parallel 4" in text
    assert "model_parallel can be 1, 2." in text


@pytest.mark.parametrize("name", ["data_parallel", "pipeline_stage"])
def test_other_kinds_of_parallelism_are_refused_with_the_arithmetic(write, name):
    path = write(PARALLEL.replace("  model_parallel: 2", f"  model_parallel: 2\n  {name}: 3"))
    text = complaint(path)
    assert f"{path}:5" in text and "= 6 workers" in text and f"Set {name} to 1." in text


def test_each_worker_takes_its_own_card(write):
    path = write(PARALLEL.replace("context:\n", "context:\n  device_id: 0\n"))
    environ = {"MS_WORKER_NUM": "2", "DEVICE_ID": "1"}
    config = load(path, environ=environ)
    assert config.device_id == 1 and config.effective["context"]["device_id"] == 1
    assert load(path, [Flag("context.device_id", "--device_id", 6)], environ=environ).device_id == 6
    assert load(path).device_id == 0


# --- the checkpoint's own files

def test_the_checkpoint_knows_what_the_yaml_does_not_say(write, checkpoint):
    settings = {"eos_token_id": [6, 4], "temperature": 0.7, "do_sample": True, "top_k": 20}
    folder = checkpoint(generation_config__json=settings)
    path = write(f"load_checkpoint: {folder}\ncontext:\n  device_target: CPU\n")
    config = load(path)
    assert config.model.dims.tie_word_embeddings is True
    assert (config.model.rms_norm_eps, config.model.theta) == (1e-5, 5000.0)
    assert (config.model.param_init_type, config.model.compute_dtype, config.model.rotary_dtype) == ("bfloat16",) * 3
    assert (config.model.seq_length, config.model.num_blocks) == (64, 2)
    assert (config.model.eos_token_id, config.model.bos_token_id) == ((6, 4), 3)
    assert (config.generation.do_sample, config.generation.temperature, config.generation.top_k) == (True, 0.7, 20)
    assert config.sources["model.model_config.theta"] == os.path.join(folder, "config.json")
    assert config.sources["model.model_config.eos_token_id"] == os.path.join(folder, "generation_config.json")


def test_the_yaml_beats_the_checkpoint_where_both_may_be_right_and_says_so(write, checkpoint):
    path = write(with_line("    num_layers: 2", "    theta: 10000.0\n    tie_word_embeddings: True"))
    config = load(path, [Flag("load_checkpoint", "--load_checkpoint", checkpoint())])
    assert config.model.theta == 10000.0
    notes = "\n".join(config.notes)
    assert f"theta 10000 ({path}:11) overrides 5000 of" in notes
    assert "seq_length 128" in notes and "longer than the 64 tokens" in notes
    assert "param_init_type float32" in notes and "bfloat16 weights are converted" in notes


def test_shapes_that_contradict_the_checkpoint_are_refused(write, checkpoint):
    path = write(TINY.replace("num_layers: 2", "num_layers: 3\n    tie_word_embeddings: False"))
    text = complaint(path, [Flag("load_checkpoint", "--load_checkpoint", checkpoint())])
    assert text.startswith(f"{path}:10: wants num_layers 3, tie_word_embeddings False, but the checkpoint's")
    assert "says num_layers 2, tie_word_embeddings True" in text


def test_the_wrong_size_is_called_by_its_name(checkpoint):
    small = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 16,
             "num_key_value_heads": 16, "vocab_size": 151936, "tie_word_embeddings": True}
    yaml = os.path.join(MODULE, "predict_qwen1_5_14b.yaml")
    text = complaint(yaml, [Flag("load_checkpoint", "--load_checkpoint", checkpoint(small))])
    assert "looks like Qwen1.5-14B" in text and "looks like Qwen1.5-0.5B" in text
    assert "Use predict_qwen1_5_0_5b.yaml" in text


def test_a_bad_generation_config_is_named(write, checkpoint):
    folder = checkpoint(generation_config__json={"top_p": 7})
    text = complaint(write(TINY), [Flag("load_checkpoint", "--load_checkpoint", folder)])
    assert "generation_config.json: top_p must be at most 1" in text


def test_a_missing_checkpoint_is_named_with_its_line(write):
    path = write(TINY.replace("seed: 7", "load_checkpoint: /nowhere/at/all"))
    assert f"{path}:1: load_checkpoint '/nowhere/at/all' does not exist" in complaint(path)


def test_the_folders_of_a_sliced_checkpoint_are_searched(tmp_path):
    rank = tmp_path / "model" / "rank_0"
    rank.mkdir(parents=True)
    (rank / "checkpoint_0.ckpt").write_bytes(b"")
    top = str(tmp_path / "model")
    assert checkpoint_folders(top) == [top, str(rank)]
    assert checkpoint_folders(str(rank / "checkpoint_0.ckpt")) == [str(rank), top]
    assert checkpoint_folders(str(rank)) == [str(rank), top]


# --- tokenizer

def test_tokenizer_files_lie_beside_the_checkpoint_unless_named(write, checkpoint, tmp_path):
    folder = checkpoint(vocab__json={}, merges__txt="")
    (tmp_path / "own.json").write_text("{}")
    text = TINY.replace("n_kv_heads: 2", "n_kv_heads: 2\n    tie_word_embeddings: True") + (
        "processor:\n  tokenizer:\n    type: Qwen2Tokenizer\n    unk_token: <|endoftext|>\n"
        '    vocab_file: "/{path}/vocab.json"\n    merges_file: "/path/merges.txt"\n')
    flag = Flag("load_checkpoint", "--load_checkpoint", folder)
    tokenizer = load(write(text), [flag]).tokenizer
    assert tokenizer.vocab_file == os.path.join(folder, "vocab.json")
    assert tokenizer.merges_file == os.path.join(folder, "merges.txt")
    assert tokenizer.options == {"unk_token": "<|endoftext|>"}
    named = Flag("processor.tokenizer.vocab_file", "--vocab_file", str(tmp_path / "own.json"))
    assert load(write(text), [flag, named]).tokenizer.vocab_file == str(tmp_path / "own.json")
    assert load(write(text)).tokenizer.vocab_file is None  # placeholders and no checkpoint
    wrong = Flag("processor.tokenizer.vocab_file", "--vocab_file", str(tmp_path / "none.json"))
    assert complaint(write(text), [wrong]).startswith("--vocab_file: vocab_file")


# --- the table of keys

def test_every_flag_sets_a_key_of_the_table():
    from qwen15.config.flags import FLAG_FIELDS

    names = {field.name for field in FLAG_FIELDS}
    assert len(names) == len(FLAG_FIELDS)
    for field in FLAG_FIELDS:
        assert keys.find(field.key) is not None, field
    original = ("run_mode load_checkpoint auto_trans_ckpt vocab_file merges_file seq_length predict_length "
                "use_parallel device_id use_past do_sample top_k top_p batch_size train_dataset remote_save_url "
                "eval_dataset optimizer_parallel")
    assert {f"--{name}" for name in original.split()} <= names


def test_the_table_names_no_key_twice():
    assert len(keys.KEYS) == len(keys._ROWS)


# --- speed

def test_a_typo_is_answered_at_once_and_without_mindspore(write):
    path = write(with_line("    num_layers: 2", "    rms_norm_epsilon: 1.0e-6"))
    program = ("import sys\nfrom qwen15.config.load import load_config\nfrom qwen15.errors import run_main\n"
               f"code = run_main(lambda argv: load_config({path!r}) and 0, [])\n"
               "assert not {'mindspore', 'numpy', 'torch', 'mindformers'} & set(sys.modules)\nsys.exit(code)")
    start = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": MODULE})
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    taken_s = end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime  # whatever else the machine does
    assert done.returncode == 2, done.stderr
    assert done.stderr == (f"error: {path}:11: model.model_config.rms_norm_epsilon is not a known key. "
                           "Did you mean rms_norm_eps?\n")
    assert done.stdout == ""
    assert taken_s < 2.0  # 0.15 s on an idle machine
    assert device.TARGETS == ("auto", "Ascend", "CPU")


@pytest.mark.parametrize("read", [load_config, read_json], ids=["YAML", "JSON"])
def test_a_device_without_an_end_is_no_configuration(read):
    with pytest.raises(UserError, match="/dev/zero: has more than [0-9]+ bytes, too many for a configuration"):
        read("/dev/zero")
