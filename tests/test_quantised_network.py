"""Quantised checkpoints in our network: transformers' logits and tokens of the weights that they mean."""

from __future__ import annotations

import convert_weight
import numpy as np
import pytest
from checkpoint_fixtures import dims, model_contents, write_config, write_model
from conftest import random_model
from quantised_fixtures import DIMS, Form, entry, write_quantised
from qwen15 import naming
from qwen15.checkpoint.quantised import dequantise
from qwen15.config.load import load_config
from qwen15.errors import UserError
from qwen15.generation import memory_check
from qwen15.generation.memory import need
from qwen15.network import weights
from stored_form_fixtures import SIZES, Kind, quantised_model
from test_network import greedy, hf_greedy, open_network, operators, random_prompts
from test_weights import safetensors_of, save

torch = pytest.importorskip("torch")

KINDS = {
    "int4, groups of 64, zero points; table int8": (Kind(4, 64, zero=True), Kind(8, 32), {}),
    "int4, groups of 32, bfloat16 scales and table": (Kind(4, 32, scale_dtype="BF16"), None, {"rest": "BF16"}),
    "int4 in an order of its own": (Kind(4, 64, zero=True, order=True), None, {}),
    "int8, whole rows, float32 scales; tied": (Kind(8, 0, scale_dtype="F32"), None, {"tie_word_embeddings": True}),
    "int8, zero points; tied table int8": (Kind(8, 64, zero=True), Kind(8, 32), {"tie_word_embeddings": True}),
}


def assert_answers_as(model, config, network, prompts):
    """Greedy tokens of all prompts are those of transformers' model, and the logits of a prompt within 1e-4."""
    ours = greedy(config, network, prompts, 8)
    assert ours == [hf_greedy(model, prompt, tokens) for prompt, tokens in zip(prompts, ours)]
    ids = np.array(prompts[0] + prompts[1], np.int32)
    length = np.array([len(ids)], np.int32)
    logits = network.prefill(ids, length, length, np.arange(160, dtype=np.int32)[None],
                             np.arange(len(ids), dtype=np.int32))
    with torch.no_grad():
        expected = model(torch.from_numpy(ids[None].astype(np.int64))).logits[0, -1].numpy()
    assert np.abs(logits[0] - expected).max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_greedy_tokens_equal_transformers_on_what_the_integers_mean(kind, operators, tmp_path):
    linear, vocabulary, sizes = KINDS[kind]
    model = quantised_model(tmp_path / "q", linear, vocabulary, **sizes)
    config, network = open_network(tmp_path / "q", tmp_path, num_blocks=160)
    assert f"weights int{linear.bits} in " in network.note
    prompts = random_prompts(200, 20, longest=16)
    assert_answers_as(model, config, network, prompts)


FOREIGN = {
    "GPTQ, 4 bits, symmetric, zero biases": Form(biases=True),
    "GPTQ, 4 bits, columns in another order": Form(sym=False, desc_act=True),
    "GPTQ, 8 bits, version 2": Form(bits=8, sym=False, version=2),
    "AWQ": Form("awq", sym=False),
    "compressed-tensors, 4 bits, float32 scales": Form("compressed-tensors", sym=False, scale="F32"),
}


def sane(contents):
    """Random bits make no network: norms near 1, small biases and tables instead, all of them float16 numbers."""
    random = np.random.default_rng(3)
    return {name: entry((random.standard_normal(shape) * 0.2 + ("norm" in name)).astype(np.float16))
            if dtype == "F16" and not name.endswith(("scales", "weight_scale", "o_proj.bias", "gate_proj.bias",
                                                     "up_proj.bias", "down_proj.bias")) else (dtype, shape, data)
            for name, (dtype, shape, data) in contents.items()}


@pytest.mark.parametrize("name", FOREIGN)
def test_checkpoints_of_other_tools_answer_as_transformers_does_with_what_they_mean(name, tmp_path):
    """The way of a user, convert_weight.py first; and the folder as it is, converted nowhere."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    contents, meanings = write_quantised(tmp_path / "theirs", FOREIGN[name], change=sane)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=DIMS.vocab_size, hidden_size=DIMS.hidden_size, intermediate_size=DIMS.intermediate_size,
        num_hidden_layers=DIMS.num_layers, num_attention_heads=DIMS.num_heads, num_key_value_heads=DIMS.num_kv_heads,
        rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=False)).eval()
    floats = {key: np.frombuffer(data, np.float16).reshape(shape).astype(np.float32)
              for key, (dtype, shape, data) in contents.items() if dtype == "F16" and key in model.state_dict()}
    model.load_state_dict({key: torch.from_numpy(values) for key, values in {**floats, **meanings}.items()})
    assert convert_weight.main(["--torch_ckpt_dir", str(tmp_path / "theirs"), "--mindspore_ckpt_path",
                                str(tmp_path / "ours")]) is None
    prompts = random_prompts(DIMS.vocab_size, 20, longest=16)
    for folder in ("ours", "theirs"):
        config, network = open_network(tmp_path / folder, tmp_path, num_blocks=160)
        assert_answers_as(model, config, network, prompts)


TINY = {"num_hidden_layers": 1}


def load(folder, tmp_path, *lines, **ranks):
    yaml = tmp_path / "predict.yaml"
    said = "".join(f"    {line}\n" for line in lines)
    yaml.write_text(f"load_checkpoint: '{folder}'\nmodel:\n  model_config:\n    seq_length: 64\n"
                    f"    compute_dtype: float32\n{said}context:\n  device_target: CPU\n")
    return weights.Loader(str(folder), load_config(str(yaml), environ={}).model, **ranks)


@pytest.mark.parametrize("kind", [Kind(4, 64, zero=True), Kind(8, 0)], ids=str)
def test_two_ranks_hold_what_one_does_and_a_cut_inside_a_group_repeats_its_scale(kind, tmp_path):
    model = quantised_model(tmp_path / "q", kind, Kind(8, 32), **TINY)
    sources = [load(tmp_path / "q", tmp_path, rank=rank, ranks=2, vocab_emb_dp=False) for rank in range(2)]
    for weight in naming.weights(load(tmp_path / "q", tmp_path)._dims):
        if len(weight.shape) == 1:
            continue
        halves = []
        for source in sources:
            parts = {name[len(weight.ms):]: source(name).asnumpy() for name in source.parts(weight.ms)}
            halves.append(dequantise(parts[""], parts["_scale"], "F16", parts.get("_zero")))
        meant = dict(model.named_parameters())[weight.hf].detach().numpy()
        np.testing.assert_array_equal(np.concatenate(halves, weight.axis(2, False)), meant)
    whole, half = load(tmp_path / "q", tmp_path).nbytes(), sources[0].nbytes()
    assert half[0] * 2 == whole[0] and whole[1] / 2 < half[1] < whole[1] * 0.6  # norms whole, some scales twice


def test_columns_in_an_order_of_their_own_cannot_be_cut(tmp_path):
    quantised_model(tmp_path / "q", Kind(4, 64, order=True), **TINY)
    with pytest.raises(UserError, match="wo.weight stores its columns in another order.*Run it on one rank"):
        load(tmp_path / "q", tmp_path, ranks=2)


def test_zero_points_that_their_writer_may_have_damaged_are_told_when_loading_as_well(tmp_path):
    base = "model.layers.1.mlp.down_proj"
    sound, damaged = np.full((3, 16), 0x77777777, np.int32), np.full((3, 16), 0x77777777, np.int32)
    sound[0, 5], damaged[0, 5] = np.array([0xf7777777, 0xfffff777], np.uint32).view(np.int32)  # a 0 at the end; before
    for zeros, words in ((sound, 0), (damaged, 1)):
        write_quantised(tmp_path / "q", Form(), change=lambda c, zeros=zeros: {**c, f"{base}.qzeros": entry(zeros)})
        account = load(tmp_path / "q", tmp_path).account()
        assert account.count(f"; {words} words of zero points (first in {base}.qzeros) hold a 0") == words


def test_a_configuration_that_says_otherwise_gets_one_line_with_its_place(tmp_path):
    quantised_model(tmp_path / "q", Kind(4, 64), **TINY)
    assert load(tmp_path / "q", tmp_path, "quantization_config: {weight_dtype: int4, group_size: 64}").schemes
    for said, message in (("weight_dtype: int8", r"predict.yaml:6: .*int8, but .* is int4 in groups"),
                          ("group_size: 128", r"predict.yaml:6: .*128, but .* groups of 64"),
                          ("group_size: -1", r"predict.yaml:6: .*-1, but .* groups of 64")):
        with pytest.raises(UserError, match=message):
            load(tmp_path / "q", tmp_path, f"quantization_config: {{{said}}}")
    random_model(tmp_path / "plain", **SIZES)
    with pytest.raises(UserError, match="weight_dtype int4, but .* is not quantised"):
        load(tmp_path / "plain", tmp_path, "quantization_config: {weight_dtype: int4}")


def test_a_scale_that_is_not_finite_is_named(tmp_path):
    quantised_model(tmp_path / "q", Kind(4, 64), **TINY)
    source = load(tmp_path / "q", tmp_path)
    assert source.find_non_finite() is None
    tensors = safetensors_of(tmp_path / "q")
    tensors["model.layers.0.feed_forward.w3.weight_scale"][2, 1] = np.nan
    save(tmp_path / "q", tensors)
    assert load(tmp_path / "q", tmp_path).find_non_finite() == "model.layers.0.feed_forward.w3.weight"


def test_memory_is_counted_as_the_checkpoint_is_stored(tmp_path):
    quantised_model(tmp_path / "q", Kind(4, 64, zero=True), Kind(8, 32), **TINY)
    load(tmp_path / "q", tmp_path)
    config = load_config(str(tmp_path / "predict.yaml"), environ={})
    stored = sum(array.nbytes for array in safetensors_of(tmp_path / "q").values())
    assert memory_check.held(config).weights and sum(memory_check.held(config).weights) == stored
    assert need(config.model, config.parallel, "CPU", memory_check.held(config)).weight_bytes == stored


@pytest.mark.parametrize("method, more", [
    ("bitsandbytes", {"model.layers.0.mlp.up_proj.weight.absmax": ("F32", (2,), bytes(8))}),
    ("fp8", {"model.layers.0.mlp.up_proj.weight_scale_inv": ("F32", (1, 1), bytes(4))}),
    ("fp8", {"model.layers.0.mlp.up_proj.weight": ("F8_E4M3", (48, 32), bytes(48 * 32))}),
])
def test_a_folder_of_a_scheme_that_is_not_read_is_refused_by_its_name(method, more, tmp_path):
    sizes = dims()
    write_model(tmp_path, sizes, {**model_contents(sizes), **more})
    write_config(tmp_path, sizes, quantization_config={"quant_method": method})
    with pytest.raises(UserError, match=f"quant_method '{method}' is not supported"):
        weights.open_weights(str(tmp_path), sizes)
