"""The shipped YAML files hold the official values of their models, and only keys that predicting reads."""

import glob
import os

import pytest
import yaml

from qwen15 import config_keys, device, family, memory
from qwen15.config import load_config
from qwen15.naming import indivisible

MODULE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "research", "qwen1_5")

OFFICIAL = {
    # hidden, intermediate, layers, heads, kv heads, vocabulary, theta, tied: as in the published config.json files
    "0_5b": (1024, 2816, 24, 16, 16, 151936, 1e6, True),
    "1_8b": (2048, 5504, 24, 16, 16, 151936, 1e6, False),
    "4b": (2560, 6912, 40, 20, 20, 151936, 5e6, False),
    "7b": (4096, 11008, 32, 32, 32, 151936, 1e6, False),
    "14b": (5120, 13696, 40, 40, 40, 152064, 1e6, False),
    "32b": (5120, 27392, 64, 40, 8, 152064, 1e6, False),
    "72b": (8192, 24576, 80, 64, 64, 152064, 1e6, False),
    "110b": (8192, 49152, 80, 64, 8, 152064, 1e6, False),
}
PARAMETERS_BILLION = {"0_5b": 0.464, "1_8b": 1.837, "4b": 3.950, "7b": 7.721, "14b": 14.167, "32b": 32.51, "72b": 72.29,
                      "110b": 111.2}
"""Parameters in 10^9; the models' pages show them rounded."""


SHIPPED = sorted(glob.glob(os.path.join(MODULE, "predict_qwen1_5_*.yaml")))


def shipped(name):
    return load_config(os.path.join(MODULE, f"predict_qwen1_5_{name}.yaml"), environ={})


@pytest.mark.parametrize("suffix", ["", "_chat"])
@pytest.mark.parametrize("size", OFFICIAL)
def test_shipped_values_are_the_official_ones(size, suffix):
    config = shipped(size + suffix)
    model, dims = config.model, config.model.dims
    assert (dims.hidden_size, dims.intermediate_size, dims.num_layers, dims.num_heads, dims.num_kv_heads,
            dims.vocab_size, model.theta, dims.tie_word_embeddings) == OFFICIAL[size]
    assert model.rms_norm_eps == 1e-6
    assert (model.param_init_type, model.compute_dtype, model.rotary_dtype) == ("bfloat16",) * 3
    assert (model.layernorm_compute_type, model.softmax_compute_type) == ("float32", "float32")
    assert (model.pad_token_id, model.bos_token_id) == (151643, 151643)
    assert model.eos_token_id == ((151645, 151643) if suffix else (151643,))
    assert config.tokenizer.options["eos_token"] == ("<|im_end|>" if suffix else "<|endoftext|>")
    assert ("chat_template" in config.tokenizer.options) == bool(suffix)
    assert config.generation.do_sample == bool(suffix)
    if suffix:
        penalty = 1.1 if size in ("0_5b", "1_8b", "4b") else 1.05
        assert (config.generation.repetition_penalty, config.generation.top_p) == (penalty, 0.8)


@pytest.mark.parametrize("path", SHIPPED, ids=os.path.basename)
def test_a_shipped_file_has_only_keys_that_predicting_reads(path):
    config = load_config(path, environ={})
    assert config.notes == ()
    with open(path, encoding="utf-8") as file:
        text = file.read()
    for key in config.sources:
        row = config_keys.find(key)
        assert row is not None and row.role != config_keys.INERT, key
    assert yaml.safe_load(text)["context"]["device_target"] == "auto"
    assert max(len(line) for line in text.splitlines() if "chat_template" not in line) <= 120


@pytest.mark.parametrize("path", SHIPPED, ids=os.path.basename)
def test_every_key_the_guide_tells_to_edit_is_in_the_file(path):
    with open(path, encoding="utf-8") as file:
        contents = yaml.safe_load(file)
    assert {"load_checkpoint", "auto_trans_ckpt", "use_past", "use_parallel", "run_mode"} <= set(contents)
    assert {"use_past", "is_dynamic"} <= set(contents["model"]["model_config"])
    assert {"vocab_file", "merges_file"} <= set(contents["processor"]["tokenizer"])
    assert {"data_parallel", "model_parallel", "pipeline_stage", "micro_batch_num", "vocab_emb_dp",
            "gradient_aggregation_group"} <= set(contents["parallel_config"])


def test_the_whole_family_is_shipped_base_and_chat():
    names = {os.path.basename(path)[len("predict_qwen1_5_"):-len(".yaml")]
             for path in SHIPPED}
    assert names == {size + suffix for size in OFFICIAL for suffix in ("", "_chat")} | {"smollm2_135m"}
    assert {family.yaml_name(size) for size in family.FAMILY} == {f"predict_qwen1_5_{size}.yaml" for size in OFFICIAL}


@pytest.mark.parametrize("size", OFFICIAL)
def test_sizes_fit_the_card(size):
    for suffix in ("", "_chat"):
        config = shipped(size + suffix)
        assert indivisible(config.model.dims, config.parallel.model_parallel) is None
        need = memory.need(config.model, config.parallel, device.ASCEND)
        assert need.total_bytes < 0.9 * config.max_device_memory_bytes
        # ... and half the cards would not do, or leave less than a tenth free
        ranks = config.parallel.model_parallel
        assert config.parallel.use_parallel == (ranks > 1)
        if ranks > 1:
            assert need.total_bytes * 2 > 0.9 * config.max_device_memory_bytes


@pytest.mark.parametrize("size", OFFICIAL)
def test_parameters_add_up(size):
    config = shipped(size)
    need = memory.need(config.model, config.parallel, device.ASCEND)
    alone = memory.need(config.model, type(config.parallel)(False, 1, 1, 1, True), device.ASCEND)
    assert need.weight_bytes <= alone.weight_bytes
    # norm weights take 4 bytes, all others 2
    assert alone.weight_bytes / 2e9 == pytest.approx(PARAMETERS_BILLION[size], rel=2e-3)


def test_the_small_model_is_smollm2():
    config = shipped("smollm2_135m")
    dims = config.model.dims
    assert (dims.hidden_size, dims.intermediate_size, dims.num_layers, dims.num_heads, dims.num_kv_heads,
            dims.vocab_size, dims.tie_word_embeddings) == (576, 1536, 30, 9, 3, 49152, True)
    assert (config.model.theta, config.model.rms_norm_eps, config.model.eos_token_id) == (1e5, 1e-5, (2,))


@pytest.mark.parametrize("size", family.FAMILY)
def test_each_size_looks_like_itself(size):
    dims = family.FAMILY[size]
    everything = {name: getattr(dims, name) for name in ("hidden_size", "intermediate_size", "num_layers")}
    assert family.looks_like(everything) == size
    assert family.looks_like({**everything, "num_layers": 7}) in (size, None)
    assert family.looks_like({"hidden_size": 123, "num_layers": 7}) is None
