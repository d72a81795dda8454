"""Quantised checkpoints arrive with every integer and scale, go back bit for bit, and damage is told."""

import json

import numpy as np
import pytest
from checkpoint_fixtures import model_contents, read_contents, run_script, write_model, write_safetensors
from quantised_fixtures import DIMS, Form, entry, write_quantised
from qwen15 import naming
from qwen15.checkpoint.account import Expected, take_account
from qwen15.checkpoint.casting import to_float32
from qwen15.checkpoint.quantised import ORDER, SCALE, ZERO, dequantise
from qwen15.checkpoint.reader import open_checkpoint, open_ranks
from qwen15.conversion.hugging_face import Output, plan_to_hugging_face, plan_to_mindspore
from qwen15.conversion.quantise import Recipe
from qwen15.conversion.reslice import Reslicing, plan_transform
from qwen15.conversion.run import run
from qwen15.conversion.slices import Slicing
from qwen15.errors import UserError

FORMS = {
    "gptq-4": Form(biases=True),
    "gptq-4-asym": Form(sym=False),
    "gptq-4-rows-no-g_idx": Form(group=-1, g_idx=False),
    "gptq-4-v2-asym": Form(sym=False, version=2, group=32),
    "gptq-4-desc_act": Form(sym=False, desc_act=True),
    "gptq-8": Form(bits=8, settings_file="quantize_config.json"),
    "gptq-8-asym-v2-float32-scales": Form(bits=8, sym=False, version=2, scale="F32"),
    "gptq-4-asym-gptqmodel": Form(sym=False, by_gptqmodel=True),
    "gptq-8-asym-gptqmodel": Form(bits=8, sym=False, by_gptqmodel=True, desc_act=True),
    "awq-asym": Form("awq", sym=False),
    "awq-without-zero-points": Form("awq", group=32),
    "compressed-4": Form("compressed-tensors", scale="F32"),
    "compressed-4-asym-rows": Form("compressed-tensors", sym=False, group=-1),
    "compressed-8-asym-g_idx": Form("compressed-tensors", bits=8, sym=False, desc_act=True),
}


def convert(plan):
    result = run(plan, verify=True)
    plan.close()
    return result


def meaning(checkpoint, name, scheme):
    """float32 [O, I] of a stored matrix."""
    read = {
        suffix: checkpoint.read(name + suffix)
        for suffix in ("", SCALE, ZERO, ORDER)
        if name + suffix in checkpoint.infos
    }
    return dequantise(read[""], read[SCALE], scheme.scale_dtype, read.get(ZERO), read.get(ORDER))


def meanings(path, dims=DIMS):
    """Hugging Face name -> float32 array of every quantised matrix of a stored checkpoint."""
    with open_checkpoint(path) as checkpoint:
        account = take_account(checkpoint, Expected(dims, "the test"))
        by_ms = {weight.ms: weight.hf for weight in naming.weights(dims)}
        return {by_ms[name]: meaning(checkpoint, name, scheme) for name, scheme in account.schemes.items()}


@pytest.mark.parametrize("name", FORMS)
def test_a_quantised_checkpoint_means_the_same_here_and_goes_back_bit_for_bit(tmp_path, name):
    contents, wanted = write_quantised(tmp_path / "hf", FORMS[name], shards=2)
    for target in ("ms/x.safetensors", "ckpt/x.ckpt"):
        convert(plan_to_mindspore(str(tmp_path / "hf"), Output(str(tmp_path / target))))
        found = meanings(tmp_path / target)
        assert set(found) == set(wanted) and all(np.array_equal(found[key], wanted[key]) for key in wanted)
        back = tmp_path / f"{target[:2]}-back"
        convert(plan_to_hugging_face(str(tmp_path / target), Output(str(back))))
        assert read_contents(back) == contents
        for sidecar in ("config.json", FORMS[name].settings_file):
            assert (back / sidecar).read_bytes() == (tmp_path / "hf" / sidecar).read_bytes()
        assert not (back / "source_layout.json").exists()


INTEGER_BY_INTEGER, WORD_BY_WORD, AS_THEY_ARE = (Form(sym=False), Form(sym=False, by_gptqmodel=True),
                                                 Form(sym=False, version=2))
AUTOROUND = {
    "packing_format auto_round:auto_gptq": ({"packing_format": "auto_round:auto_gptq"}, INTEGER_BY_INTEGER),
    "... of 0.5": ({"packing_format": "auto_round:gptq", "autoround_version": "0.5.1"}, INTEGER_BY_INTEGER),
    "... of 0.6": ({"packing_format": "auto_round:gptq", "autoround_version": "0.6.0"}, WORD_BY_WORD),
    "... of 0.12": ({"packing_format": "auto_round:auto_gptq", "autoround_version": "0.12.0.dev1"}, WORD_BY_WORD),
    "packing_format auto_round:gptqmodel": ({"packing_format": "auto_round:gptqmodel", "autoround_version": "0.16.1"},
                                            AS_THEY_ARE),
    "packing_format auto_round": ({"packing_format": "auto_round"}, AS_THEY_ARE),
    "packing_format auto_round:auto_awq": ({"packing_format": "auto_round:auto_awq"}, Form("awq", sym=False)),
    "GPTQ of 0.12": ({"quant_method": "gptq", "provider": "auto-round", "autoround_version": "0.12.0"},
                     INTEGER_BY_INTEGER),
    "GPTQ of 0.14": ({"quant_method": "gptq", "provider": "auto-round", "autoround_version": "0.14.0"}, WORD_BY_WORD),
    "backend with gptq, of 0.3": ({"quant_method": "intel/auto-round", "backend": "auto_round:gptq:exllamav2"},
                                  INTEGER_BY_INTEGER),
    "backend without gptq, of 0.3": ({"quant_method": "intel/auto-round", "backend": "auto_round:exllamav2"},
                                     AS_THEY_ARE),
    "backend awq, of 0.4": ({"backend": "auto_round:awq"}, Form("awq", sym=False)),
    "neither": ({"backend": "auto"}, INTEGER_BY_INTEGER),
}


@pytest.mark.parametrize("name", AUTOROUND)
def test_what_autoround_packs_is_read_in_the_layout_that_it_names(tmp_path, name):
    own, form = AUTOROUND[name]
    settings = {"quant_method": "auto-round", "bits": 4, "group_size": form.group, "sym": False,
                "extra_config": {"lm_head": {"bits": 16}}, **own}
    contents, wanted = write_quantised(tmp_path / "hf", form, quantization_config=settings)
    convert(plan_to_mindspore(str(tmp_path / "hf"), Output(str(tmp_path / "x.safetensors"))))
    found = meanings(tmp_path / "x.safetensors")
    assert set(found) == set(wanted) and all(np.array_equal(found[key], wanted[key]) for key in wanted)
    convert(plan_to_hugging_face(str(tmp_path / "x.safetensors"), Output(str(tmp_path / "back"))))
    assert read_contents(tmp_path / "back") == contents


def test_settings_that_autoround_keeps_beside_config_json_alone_are_read(tmp_path):
    contents, wanted = write_quantised(tmp_path / "hf", AS_THEY_ARE, quantization_config=None)
    settings = {"quant_method": "auto-round", "packing_format": "auto_round:gptqmodel", "bits": 4, "group_size": 64}
    (tmp_path / "hf" / "quantization_config.json").write_text(json.dumps(settings))
    convert(plan_to_mindspore(str(tmp_path / "hf"), Output(str(tmp_path / "ms" / "x.safetensors"))))
    found = meanings(tmp_path / "ms" / "x.safetensors")
    assert set(found) == set(wanted) and all(np.array_equal(found[key], wanted[key]) for key in wanted)
    convert(plan_to_hugging_face(str(tmp_path / "ms" / "x.safetensors"), Output(str(tmp_path / "back"))))
    assert read_contents(tmp_path / "back") == contents
    assert json.loads((tmp_path / "back" / "quantization_config.json").read_text()) == settings
    convert(plan_to_hugging_face(str(tmp_path / "ms" / "x.safetensors"),
                                 Output(str(tmp_path / "floats"), dequantise=True)))
    assert not (tmp_path / "floats" / "quantization_config.json").exists()


def test_one_file_of_any_name_with_quantize_config_json_is_read(tmp_path):
    contents, wanted = write_quantised(tmp_path / "hf", Form(biases=True, settings_file="quantize_config.json"))
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "hf" / "gptq_model-4bit-64g.safetensors")
    convert(plan_to_mindspore(str(tmp_path / "hf"), Output(str(tmp_path / "x.safetensors"))))
    found = meanings(tmp_path / "x.safetensors")
    assert set(found) == set(wanted) and all(np.array_equal(found[key], wanted[key]) for key in wanted)


def overwritten(z, bits):
    """AutoGPTQ's words of zero points [G, O]: of a 0 less one all 32 bits are set, over those of what follows it."""
    made = np.zeros((len(z), z.shape[1] * bits // 32), np.uint32)
    for column in range(z.shape[1]):
        made[:, column * bits // 32] |= (z[:, column] - 1).astype(np.uint32) << np.uint32(column * bits % 32)
    return made.view(np.int32)


@pytest.mark.parametrize("bits, read", [(4, [5, 9, 0, 0, 0, 0, 0, 0, 3, 3, 3, 3, 3, 3, 3, 0]),
                                        (8, [5, 9, 0, 0, 200, 0, 0, 0])])
def test_zero_points_that_autogptq_has_overwritten_are_read_as_it_reads_them_and_told(tmp_path, bits, read):
    whole = np.array({4: [5, 9, 0, 7, 7, 7, 7, 7, 3, 3, 3, 3, 3, 3, 3, 0], 8: [5, 9, 0, 7, 200, 0, 1, 2]}[bits])
    z = np.tile(whole, (3, 128 // len(whole)))
    base = "model.layers.1.mlp.down_proj"
    contents, _ = write_quantised(tmp_path / "hf", Form(bits=bits),
                                  change=lambda c: {**c, f"{base}.qzeros": entry(overwritten(z, bits))})
    plan = plan_to_mindspore(str(tmp_path / "hf"), Output(str(tmp_path / "x.safetensors")))
    words = {4: 128 // 16, 8: 2 * 128 // 8}[bits] * 3
    assert any(f"{words} words of zero points (first in {base}.qzeros) hold a 0 before others" in note
               for note in plan.notes)
    convert(plan)
    with open_checkpoint(tmp_path / "x.safetensors") as checkpoint:
        zero = checkpoint.read("model.layers.1.feed_forward.w2.weight_zero")
    stored = zero if bits == 4 else zero.view(np.uint8) ^ 128
    assert stored.T.tolist() == [read * (128 // len(read))] * 3
    convert(plan_to_hugging_face(str(tmp_path / "x.safetensors"), Output(str(tmp_path / "back"))))
    assert read_contents(tmp_path / "back") == contents


@pytest.mark.parametrize("form", [Form(), WORD_BY_WORD, AS_THEY_ARE, Form("awq", sym=False),
                                  Form("compressed-tensors", sym=False)])
def test_zero_points_that_nobody_doubts_are_not_spoken_of(tmp_path, form):
    write_quantised(tmp_path / "hf", form)
    plan = plan_to_mindspore(str(tmp_path / "hf"), Output(str(tmp_path / "x.safetensors")))
    assert not any("words of zero points" in note for note in plan.notes)
    plan.close()


def test_compressed_tensors_in_several_groups_of_one_form_are_read(tmp_path):
    form = Form("compressed-tensors", sym=False)
    settings = form.settings()
    (group,) = settings["config_groups"].values()
    settings["config_groups"] = {"group_1": {**group, "targets": ["re:.*self_attn.*"]},
                                 "group_2": {**group, "targets": ["re:.*mlp.*"]}}
    _, wanted = write_quantised(tmp_path / "hf", form, quantization_config={
        **settings, "ignore": ["re:.*lm_head"], "kv_cache_scheme": None, "transform_config": {}})
    convert(plan_to_mindspore(str(tmp_path / "hf"), Output(str(tmp_path / "x.safetensors"))))
    found = meanings(tmp_path / "x.safetensors")
    assert set(found) == set(wanted) and all(np.array_equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("name", ["gptq-4", "gptq-8", "awq-asym", "compressed-4-asym-rows"])
@pytest.mark.parametrize("vocab_emb_dp", [True, False])
def test_slices_mean_the_same_and_merge_into_the_whole_they_came_from(tmp_path, name, vocab_emb_dp):
    contents, wanted = write_quantised(tmp_path / "hf", FORMS[name])
    convert(plan_to_mindspore(str(tmp_path / "hf"), Output(str(tmp_path / "whole" / "x.safetensors"))))
    convert(plan_to_mindspore(str(tmp_path / "hf"), Output(str(tmp_path / "ranks"), slicing=Slicing(2, vocab_emb_dp))))
    ranks = open_ranks(str(tmp_path / "ranks"))
    for weight in naming.weights(DIMS):
        if weight.hf in wanted:
            parts = []
            for rank in ranks:
                account = take_account(rank, Expected(DIMS, "the test", "ms", 2, vocab_emb_dp))
                parts.append(meaning(rank, weight.ms, account.schemes[weight.ms]))
            assert np.array_equal(np.concatenate(parts, weight.axis(2, vocab_emb_dp)), wanted[weight.hf])
    convert(plan_transform(Reslicing(str(tmp_path / "ranks"), str(tmp_path / "merged" / "x.safetensors"))))
    assert read_contents(tmp_path / "merged" / "x.safetensors") == read_contents(tmp_path / "whole" / "x.safetensors")
    convert(
        plan_transform(Reslicing(str(tmp_path / "whole" / "x.safetensors"), str(tmp_path / "again"), 2, vocab_emb_dp))
    )
    for rank in (0, 1):
        assert read_contents(tmp_path / f"again/rank_{rank}") == read_contents(tmp_path / f"ranks/rank_{rank}")
    convert(plan_to_hugging_face(str(tmp_path / "ranks"), Output(str(tmp_path / "back"))))
    assert read_contents(tmp_path / "back") == contents


def test_a_cut_inside_a_group_repeats_its_scale(tmp_path):
    write_quantised(tmp_path / "hf", Form(group=64))  # w2 has 192 inputs, 3 groups; 96 a rank
    convert(plan_to_mindspore(str(tmp_path / "hf"), Output(str(tmp_path / "ranks"), slicing=Slicing(2, True))))
    shape = {
        name: read_contents(tmp_path / "ranks/rank_0")[f"model.layers.0.{name}"][1]
        for name in ("feed_forward.w2.weight", "feed_forward.w2.weight_scale", "attention.wo.weight_scale")
    }
    assert shape == {
        "feed_forward.w2.weight": (128, 48),
        "feed_forward.w2.weight_scale": (128, 3),
        "attention.wo.weight_scale": (128, 1),
    }


def test_dequantised_weights_are_bfloat16_and_config_no_longer_says_quantised(tmp_path):
    _, wanted = write_quantised(tmp_path / "hf", FORMS["gptq-4-desc_act"])
    convert(plan_to_mindspore(str(tmp_path / "hf"), Output(str(tmp_path / "ms" / "x.ckpt"))))
    plan = plan_to_hugging_face(str(tmp_path / "ms" / "x.ckpt"), Output(str(tmp_path / "back"), dequantise=True))
    assert any("14 quantised matrices are dequantised to bfloat16" in note for note in plan.notes)
    convert(plan)
    found = read_contents(tmp_path / "back")
    for name, values in wanted.items():
        dtype, shape, data = found[name]
        made = to_float32(np.frombuffer(data, np.uint16).reshape(shape), "BF16")
        assert dtype == "BF16" and (np.abs(made - values) <= np.abs(values) / 256).all()
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())


# ---- our own ----


@pytest.mark.parametrize("bits, group, most", [(8, 128, 0.01), (4, 64, 0.12), (4, 32, 0.11)])
def test_our_own_integers_are_the_nearest_and_the_error_is_told(tmp_path, bits, group, most):
    rng = np.random.default_rng(0)
    contents = model_contents(DIMS, "F32")
    for name, (_, shape, _) in contents.items():
        contents[name] = entry((rng.standard_normal(shape) * 0.05).astype(np.float32))
    contents["model.layers.0.mlp.up_proj.weight"] = entry(np.zeros((192, 128), np.float32))
    write_model(tmp_path / "hf", DIMS, contents)
    plan = plan_to_mindspore(
        str(tmp_path / "hf"), Output(str(tmp_path / "ms" / "x.safetensors"), recipe=Recipe(bits, group))
    )
    lines = convert(plan).errors
    assert len(lines) == 16 and all("largest error" in line and "mean" in line for line in lines)
    found = meanings(tmp_path / "ms" / "x.safetensors")
    for name, made in found.items():
        wanted = np.frombuffer(contents[name][2], np.float32).reshape(made.shape)
        assert (
            np.abs(made - wanted).sum() <= (0.01 if "embed" in name or "head" in name else most) * np.abs(wanted).sum()
        )
    stored = read_contents(tmp_path / "ms" / "x.safetensors")
    assert stored["lm_head.weight"][0] == stored["model.tok_embeddings.embedding_weight"][0] == "I8"
    assert stored["lm_head.weight_scale"][1] == (96, 4)
    settings = json.loads((tmp_path / "ms" / "config.json").read_text())["quantization_config"]
    assert (settings["quant_method"], settings["bits"], settings["group_size"]) == ("qwen15", bits, group)


def test_what_our_own_int8_stores_is_rounded_as_the_definition_says(tmp_path):
    rng = np.random.default_rng(1)
    contents = {
        name: entry(rng.standard_normal(shape).astype(np.float32))
        for name, (_, shape, _) in model_contents(DIMS).items()
    }
    write_model(tmp_path / "hf", DIMS, contents)
    convert(
        plan_to_mindspore(
            str(tmp_path / "hf"), Output(str(tmp_path / "ms/x.safetensors"), recipe=Recipe(8, 128, True))
        )
    )
    stored = read_contents(tmp_path / "ms/x.safetensors")
    assert stored["lm_head.weight"][0] == "F32"
    name = "model.layers.1.feed_forward.w2.weight"
    values = np.frombuffer(contents["model.layers.1.mlp.down_proj.weight"][2], np.float32).reshape(128, 192)
    scale = np.frombuffer(stored[name + "_scale"][2], np.float16).reshape(
        128, 3
    )  # 128 does not divide 192: groups of 64
    q = np.frombuffer(stored[name][2], np.int8).reshape(128, 192)
    for row, column in ((0, 0), (5, 70), (127, 191)):
        group = values[row, column // 64 * 64 : column // 64 * 64 + 64]
        exact = np.abs(group).max() / 127
        assert exact <= scale[row, column // 64] <= exact * 1.001
        assert q[row, column] == round(float(values[row, column]) / float(scale[row, column // 64]))


def test_quantised_on_the_way_into_slices_equals_cut_afterwards(tmp_path, module_dir):
    write_model(
        tmp_path / "hf",
        DIMS,
        {
            name: entry(np.random.default_rng(2).standard_normal(shape).astype(np.float16))
            for name, (_, shape, _) in model_contents(DIMS).items()
        },
    )
    done = run_script(
        module_dir,
        "convert_weight.py",
        "--torch_ckpt_dir",
        tmp_path / "hf",
        "--mindspore_ckpt_path",
        tmp_path / "ranks",
        "--quantize",
        "int4",
        "--model_parallel",
        2,
        "--verify",
    )
    assert done.returncode == 0 and "choose int8 below 2 billion weights" in done.stderr, done.stderr
    assert "model.layers.1.mlp.down_proj.weight int4, groups of 64: largest error" in done.stderr
    convert(
        plan_to_mindspore(
            str(tmp_path / "hf"), Output(str(tmp_path / "whole" / "x.safetensors"), recipe=Recipe(4, 64))
        )
    )
    convert(plan_transform(Reslicing(str(tmp_path / "whole" / "x.safetensors"), str(tmp_path / "cut"), 2)))
    for rank in (0, 1):
        assert read_contents(tmp_path / f"ranks/rank_{rank}") == read_contents(tmp_path / f"cut/rank_{rank}")


# ---- what is refused ----


def changed(name, array):
    return lambda contents: {**contents, name: entry(array)}


def without(name):
    return lambda contents: {key: value for key, value in contents.items() if key != name}


BASE = "model.layers.1.mlp.down_proj"
INDEX = np.arange(192, dtype=np.int32) // 64
DAMAGE = {
    "scales are missing": (without(f"{BASE}.scales"), {}, f"{BASE}.scales is missing"),
    "integers are missing": (without(f"{BASE}.qweight"), {}, f"{BASE}.qweight is missing"),
    "a whole layer is missing": (
        lambda c: {k: v for k, v in c.items() if not k.startswith(BASE)},
        {},
        f"{BASE}.weight is missing",
    ),
    "packing has the wrong shape": (changed(f"{BASE}.qweight", np.zeros((24, 64), np.int32)), {}, "make it [24, 128]"),
    "bits contradict the tensor": (None, {"bits": 8}, "8 bits, groups of 64"),
    "zero points of another group size": (
        changed(f"{BASE}.qzeros", np.zeros((6, 16), np.int32)),
        {},
        "make it [3, 16]",
    ),
    "group does not divide": (None, {"group_size": 96}, "not a multiple of 96"),
    "g_idx out of range": (changed(f"{BASE}.g_idx", INDEX + 1), {}, f"{BASE}.g_idx names group 3, there are 3"),
    "g_idx uneven": (
        changed(f"{BASE}.g_idx", np.minimum(INDEX, 1)),
        {},
        "puts 128 columns into group 1, a group has 64",
    ),
    "mixed": (changed(f"{BASE}.weight", np.zeros((128, 192), np.float16)), {}, "the same weight twice"),
    "desc_act without g_idx": (
        without(f"{BASE}.g_idx"),
        {"desc_act": True},
        f"{BASE}.g_idx is missing, {BASE}.qweight is there",
    ),
    "scales are integers": (changed(f"{BASE}.scales", np.zeros((3, 128), np.int32)), {}, "is I32"),
    "a bias that is not zero": (changed(f"{BASE}.bias", np.ones(128, np.float16)), {}, f"{BASE}.bias is not zero"),
    "tensors of another layout": (
        changed(f"{BASE}.weight_packed", np.zeros((128, 24), np.int32)),
        {},
        "does not belong to gptq",
    ),
    "a table of 4 bits": (
        lambda c: {key.replace(BASE, "model.embed_tokens"): value for key, value in c.items()},
        {},
        "an embedding table of 4 bits is not supported",
    ),
    "2 bits": (None, {"bits": 2}, "GPTQ with 2 bits is not supported"),
    "marlin": (None, {"checkpoint_format": "marlin"}, "marlin's layout"),
    "bitsandbytes": (None, {"quant_method": "bitsandbytes"}, "'bitsandbytes' is not supported"),
    "FP8": (None, {"quant_method": "fp8"}, "'fp8' is not supported"),
    "AWQ GEMV": (None, {"quant_method": "awq", "version": "gemv"}, "version 'gemv' are not supported"),
    "GPTQModel's other bits for a layer": (None, {"dynamic": {"-:.*q_proj": {}, "+:.*down_proj": {"bits": 8}}},
                                           "dynamic gives +:.*down_proj bits 8, the other layers have 4"),
    "AutoRound's other groups for a layer": (None, {"extra_config": {f"{BASE}": {"group_size": 32}}},
                                             f"extra_config gives {BASE} group_size 32, the other layers have 64"),
    "AutoRound with quantised activations": (None, {"quant_method": "auto-round", "act_bits": 8},
                                             "activations of 8 bits"),
    "AutoRound with a rotation": (None, {"rotation_config": {"block_size": 32}}, "rotates activations while it runs"),
    "GPTQModel with a rotation": (None, {"rotation": "hadamard"}, "rotation says that the model rotates activations"),
    "GPTQModel with a LoRA": (None, {"meta": {"adapter": {"path": "eora"}}}, "adapter says that the model adds a LoRA"),
    "settings without a method": (None, {"quant_method": None}, "quant_method is missing"),
    "AutoRound in MX": (None, {"quant_method": "auto-round", "packing_format": "auto_round:mx"}, "'auto_round:mx'"),
}


AWQ, COMPRESSED = Form(layout="awq", sym=False), Form(layout="compressed-tensors", sym=False)
GROUPS = COMPRESSED.settings()["config_groups"]
OTHER_DAMAGE = {
    "AWQ without zero points": (AWQ, without(f"{BASE}.qzeros"), {}, f"{BASE}.qzeros is missing"),
    "AWQ packed as GPTQ is": (
        AWQ,
        changed(f"{BASE}.qweight", np.zeros((24, 128), np.int32)),
        {},
        "make it [192, 16]",
    ),
    "AWQ of 8 bits": (AWQ, None, {"bits": 8}, "AWQ with 8 bits is not supported"),
    "AWQ with float integers": (AWQ, changed(f"{BASE}.qweight", np.zeros((192, 16), np.float32)), {}, "is F32, not"),
    "compressed-tensors of another shape": (
        COMPRESSED,
        changed(f"{BASE}.weight_shape", np.array([192, 128], np.int64)),
        {},
        f"{BASE}.weight_shape says [192, 128], the model makes it [128, 192]",
    ),
    "compressed-tensors without integers": (COMPRESSED, without(f"{BASE}.weight_packed"), {}, "is missing"),
    "compressed-tensors that are asymmetric without zero points": (
        COMPRESSED,
        without(f"{BASE}.weight_zero_point"),
        {},
        f"{BASE}.weight_zero_point is missing",
    ),
    "compressed-tensors with actorder without g_idx": (
        Form(layout="compressed-tensors", desc_act=True),
        without(f"{BASE}.weight_g_idx"),
        {},
        "config.json says actorder",
    ),
    "compressed-tensors with scales of other groups": (
        COMPRESSED,
        changed(f"{BASE}.weight_scale", np.zeros((128, 6), np.float16)),
        {},
        "make it [128, 3]",
    ),
    "compressed-tensors of floats": (COMPRESSED, None, {"format": "float-quantized"}, "'float-quantized'"),
    "compressed-tensors with a quantised cache": (COMPRESSED, None, {"kv_cache_scheme": {"num_bits": 8}},
                                                  "kv_cache_scheme (a quantised key-value cache) is not supported"),
    "compressed-tensors with a rotation": (COMPRESSED, None, {"transform_config": {"config_groups": {"R1": {}}}},
                                           "transform_config says that the model rotates activations"),
    "compressed-tensors from before 0.9": (
        COMPRESSED, changed(f"{BASE}.weight_zero_point", np.zeros((128, 3), np.int8)), {},
        "weight_zero_point is I8: zero points that are not packed"),
    "compressed-tensors with two ways": (
        COMPRESSED, None, {"config_groups": {**GROUPS, "group_1": {"weights": {**GROUPS["group_0"]["weights"],
                                                                               "num_bits": 8}}}},
        "config_groups quantises group_0 and group_1 differently"),
    "GPTQ's bits as a text": (Form(), None, {"bits": "four"}, "'four' bits"),
    "GPTQ's group of nothing": (Form(), None, {"group_size": 0}, "group_size 0 is not supported"),
}


@pytest.mark.parametrize("name", OTHER_DAMAGE)
def test_damage_in_the_other_layouts_gets_one_line_too(tmp_path, name):
    form, change, settings, said = OTHER_DAMAGE[name]
    write_quantised(tmp_path / "hf", form, change=change, quantization_config={**form.settings(), **settings})
    with pytest.raises(UserError) as error:
        plan_to_mindspore(str(tmp_path / "hf"), Output(str(tmp_path / "x.ckpt")))
    assert said in str(error.value) and "\n" not in str(error.value) and error.value.exit_code == 2


def test_an_order_that_names_an_input_twice_is_refused_when_loading_and_on_the_way_back(tmp_path):
    write_quantised(tmp_path / "hf", Form(desc_act=True))
    convert(plan_to_mindspore(str(tmp_path / "hf"), Output(str(tmp_path / "ms"))))
    name = "model.layers.1.feed_forward.w2.weight_order"
    path = tmp_path / "ms" / "model.safetensors"
    contents = read_contents(path)
    order = np.frombuffer(contents[name][2], np.int32).copy()
    order[0] = order[1]
    write_safetensors(path, {key: (kind, shape, order.tobytes() if key == name else data)
                             for key, (kind, shape, data) in contents.items()})
    for floats in (False, True):
        with pytest.raises(UserError, match="w2.weight_order does not name each of the 192 inputs once"):
            convert(plan_to_hugging_face(str(tmp_path / "ms"), Output(str(tmp_path / "b"), dequantise=floats)))
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_or_foreign_quantised_checkpoint_gets_one_line(tmp_path, name):
    change, settings, said = DAMAGE[name]
    write_quantised(tmp_path / "hf", Form(), change=change, quantization_config={**Form().settings(), **settings})
    with pytest.raises(UserError) as error:
        plan_to_mindspore(str(tmp_path / "hf"), Output(str(tmp_path / "x.ckpt")))
    assert said in str(error.value) and "\n" not in str(error.value) and error.value.exit_code == 2
    assert not (tmp_path / "x.ckpt").exists()


def test_quantised_tensors_without_settings_are_told_where_those_belong(tmp_path):
    write_quantised(tmp_path / "hf", Form(), quantization_config=None)
    with pytest.raises(UserError, match="nothing beside them says which: put config.json .*quantize_config.json"):
        plan_to_mindspore(str(tmp_path / "hf"), Output(str(tmp_path / "x.ckpt")))


def test_truncated_quantised_weights_are_told_as_a_user_sees_it(tmp_path, module_dir):
    write_quantised(tmp_path / "hf", Form())
    path = tmp_path / "hf" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    done = run_script(
        module_dir,
        "convert_weight.py",
        "--torch_ckpt_dir",
        tmp_path / "hf",
        "--mindspore_ckpt_path",
        tmp_path / "x.ckpt",
    )
    assert done.returncode == 2 and "truncated" in done.stderr and done.stderr.count("\n") == 1


def test_columns_in_another_order_cannot_be_cut_along_inputs(tmp_path):
    write_quantised(tmp_path / "hf", Form(desc_act=True))
    with pytest.raises(UserError, match="desc_act.*Run it on one rank"):
        plan_to_mindspore(str(tmp_path / "hf"), Output(str(tmp_path / "ranks"), slicing=Slicing(2, True)))


def test_a_cut_inside_a_block_of_32_is_refused_with_the_numbers(tmp_path):
    dims = naming.Dims(64, 96, 1, 4, 4, 16, 96, False)
    write_quantised(tmp_path / "hf", Form(group=32), dims)
    with pytest.raises(UserError, match="96 inputs; over 2 ranks that is 48, not a multiple of 32"):
        plan_to_mindspore(str(tmp_path / "hf"), Output(str(tmp_path / "ranks"), slicing=Slicing(2, True)))


def test_a_quantised_model_is_not_quantised_again_and_nan_never(tmp_path):
    write_quantised(tmp_path / "hf", Form())
    with pytest.raises(UserError, match="is quantised already"):
        plan_to_mindspore(str(tmp_path / "hf"), Output(str(tmp_path / "x.ckpt"), recipe=Recipe(8, 128)))
    contents = model_contents(DIMS, "F32")
    contents["lm_head.weight"] = entry(np.full((96, 128), np.nan, np.float32))
    write_model(tmp_path / "nan", DIMS, contents)
    with pytest.raises(UserError, match="lm_head.weight holds NaN"):
        run(plan_to_mindspore(str(tmp_path / "nan"), Output(str(tmp_path / "x.ckpt"), recipe=Recipe(8, 128))))
    assert not (tmp_path / "x.ckpt").exists()
