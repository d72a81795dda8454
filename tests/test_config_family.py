"""The shipped YAML files hold the official values of their models, and only keys that predicting reads."""

import glob
import os
from dataclasses import replace

import pytest
import yaml
from official_configs import QWEN1_5, QWEN1_5_CHAT
from qwen15 import device, family
from qwen15.config import keys
from qwen15.config.hf_config import dims_from_hf_config
from qwen15.config.load import load_config
from qwen15.generation import memory
from qwen15.naming import indivisible
from qwen15.text import template

MODULE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "research", "qwen1_5")

PARAMETERS_BILLION = {"0_5b": 0.464, "1_8b": 1.837, "4b": 3.950, "7b": 7.721, "14b": 14.167, "32b": 32.51, "72b": 72.29,
                      "110b": 111.2}
"""Parameters in 10^9; the models' pages show them rounded."""

CONVERSATIONS = ([{"role": "user", "content": "Hello"}],
                 [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1"},
                  {"role": "assistant", "content": "2"}, {"role": "user", "content": "3"}])


SHIPPED = sorted(glob.glob(os.path.join(MODULE, "predict_qwen1_5_*.yaml")))


def shipped(name):
    return load_config(os.path.join(MODULE, f"predict_qwen1_5_{name}.yaml"), environ={})


@pytest.mark.parametrize("suffix", ["", "_chat"])
@pytest.mark.parametrize("size", QWEN1_5)
def test_shipped_values_are_the_official_ones(size, suffix):
    config, official = shipped(size + suffix), QWEN1_5[size]
    model = config.model
    assert model.dims == dims_from_hf_config(official).dims
    assert (model.theta, model.rms_norm_eps) == (official["rope_theta"], official["rms_norm_eps"])
    assert (model.param_init_type, model.compute_dtype, model.rotary_dtype) == (official["torch_dtype"],) * 3
    assert (model.layernorm_compute_type, model.softmax_compute_type) == ("float32", "float32")
    assert (model.pad_token_id, model.bos_token_id) == (151643, 151643)
    assert model.seq_length <= official["max_position_embeddings"]
    tokenizer, generation = config.tokenizer.options, config.generation
    assert (tokenizer["unk_token"], tokenizer["pad_token"]) == ("<|endoftext|>", "<|endoftext|>")
    if suffix:
        assert model.eos_token_id == (151645, 151643)
        assert tokenizer["eos_token"] == "<|im_end|>"
        for messages in CONVERSATIONS:
            rendered = [template.render(source, messages, add_generation_prompt=True)
                        for source in (tokenizer["chat_template"], template.CHATML)]
            assert rendered[0] == rendered[1] != ""
        assert {name: getattr(generation, name) for name in QWEN1_5_CHAT[size]} == QWEN1_5_CHAT[size]
    else:
        assert model.eos_token_id == (151643,)
        assert tokenizer["eos_token"] == "<|endoftext|>" and "chat_template" not in tokenizer
        assert not generation.do_sample and generation.repetition_penalty == 1.0


@pytest.mark.parametrize("size", QWEN1_5)
def test_base_and_chat_are_the_same_network(size):
    base, chat = shipped(size), shipped(f"{size}_chat")
    assert replace(base.model, eos_token_id=()) == replace(chat.model, eos_token_id=())
    assert (base.parallel, base.max_device_memory_bytes) == (chat.parallel, chat.max_device_memory_bytes)


@pytest.mark.parametrize("path", SHIPPED, ids=os.path.basename)
def test_a_shipped_file_has_only_keys_that_predicting_reads(path):
    config = load_config(path, environ={})
    assert config.notes == ()
    with open(path, encoding="utf-8") as file:
        text = file.read()
    for key in config.sources:
        row = keys.find(key)
        assert row is not None and row.role != keys.INERT, key
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
    assert names == {size + suffix for size in QWEN1_5 for suffix in ("", "_chat")} | {"smollm2_135m"}
    assert {family.yaml_name(size) for size in family.FAMILY} == {f"predict_qwen1_5_{size}.yaml" for size in QWEN1_5}


@pytest.mark.parametrize("size", QWEN1_5)
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


@pytest.mark.parametrize("size", QWEN1_5)
def test_parameters_add_up(size):
    config = shipped(size)
    need = memory.need(config.model, config.parallel, device.ASCEND)
    one = type(config.parallel)(use_parallel=False, model_parallel=1, vocab_emb_dp=True)
    alone = memory.need(config.model, one, device.ASCEND)
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
