"""Hugging Face -> MindSpore -> Hugging Face: the same bits, whatever the model, the dtypes and the way it is stored."""

import json
import os
import re
import shutil

import numpy as np
import pytest
from checkpoint_fixtures import (
    SIDECARS,
    as_array,
    dims,
    model_contents,
    random_bits,
    read_contents,
    run_script,
    under_ms_names,
    write_config,
    write_model,
    write_safetensors,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qwen15 import naming
from qwen15.checkpoint.casting import cast
from qwen15.checkpoint.reader import open_ranks
from qwen15.checkpoint.tensors import TensorInfo
from qwen15.conversion.hugging_face import Output, parse_size, plan_to_hugging_face, plan_to_mindspore
from qwen15.conversion.plan import shape_files
from qwen15.conversion.run import run
from qwen15.conversion.slices import Slicing
from qwen15.errors import UserError
from test_tensorfile import write


def to_mindspore(source, target, verify=True, **options):
    """Convert, and close what was opened."""
    plan = plan_to_mindspore(str(source), Output(str(target), **options))
    try:
        return run(plan, verify=verify)
    finally:
        plan.close()


def to_hugging_face(source, target, config_path=None, **options):
    """Convert back, and close what was opened."""
    plan = plan_to_hugging_face(str(source), Output(str(target), **options), config_path)
    try:
        return run(plan, verify=True)
    finally:
        plan.close()


@st.composite
def models(draw):
    """Sizes of a model, and how many ranks it can be cut for."""
    parts = draw(st.sampled_from([1, 2, 3, 4]))
    kv_heads = parts * draw(st.integers(1, 2))
    head_dim = 2 * draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 3))
    hidden = parts * draw(st.integers(1, 9))
    sizes = naming.Dims(hidden, parts * draw(st.integers(1, 9)), draw(st.integers(1, 3)), heads, kv_heads, head_dim,
                        draw(st.integers(1, 4)) * parts + draw(st.sampled_from([0, 0, 1])), draw(st.booleans()))
    return sizes, parts


@given(data=st.data(), model=models())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture,
                                                                 HealthCheck.too_slow])
def test_every_way_there_and_back_gives_the_same_bits(tmp_path, data, model):
    sizes, parts = model
    shutil.rmtree(tmp_path, ignore_errors=True)
    names = [weight.hf for weight in naming.weights(sizes)]
    dtypes = {name: data.draw(st.sampled_from(["F32", "F16", "BF16"]))
              for name in data.draw(st.sets(st.sampled_from(names), max_size=5))}
    contents = model_contents(sizes, data.draw(st.sampled_from(["F32", "F16", "BF16"])), data.draw(st.integers(0, 99)),
                              dtypes)
    write_model(tmp_path / "hf", sizes, contents, shards=data.draw(st.integers(1, 3)))
    form = data.draw(st.sampled_from(["ckpt", "safetensors", "folder", "ranks"]))
    shard_bytes = data.draw(st.sampled_from([1, 500, 3000, 10 ** 9]))
    if form == "ranks":
        slicing = Slicing(parts, data.draw(st.booleans()))
        to_mindspore(tmp_path / "hf", tmp_path / "ms", slicing=slicing,
                     form=data.draw(st.sampled_from(["ckpt", "safetensors"])))
        there = tmp_path / "ms"
    else:
        there = tmp_path / ("ms" if form == "folder" else f"out/ms.{form}")
        to_mindspore(tmp_path / "hf", there, shard_bytes=shard_bytes)
        assert read_contents(there) == under_ms_names(contents)
    back = tmp_path / data.draw(st.sampled_from(["back", "b/back.bin", "b/back.safetensors"]))
    to_hugging_face(there, back, shard_bytes=shard_bytes)
    assert read_contents(back) == contents
    if back.is_dir():
        assert (back / "config.json").read_bytes() == (tmp_path / "hf" / "config.json").read_bytes()


@pytest.mark.parametrize("vocab_emb_dp", [True, False])
def test_slices_are_the_rows_and_columns_that_the_network_wants(tmp_path, vocab_emb_dp):
    sizes = dims()
    contents = under_ms_names(write_model(tmp_path / "hf", sizes))
    to_mindspore(tmp_path / "hf", tmp_path / "ms", slicing=Slicing(2, vocab_emb_dp))
    ranks = open_ranks(tmp_path / "ms")
    axes = {"wq.weight": 0, "wq.bias": 0, "wk.weight": 0, "wk.bias": 0, "wv.weight": 0, "wv.bias": 0, "wo.weight": 1,
            "w1.weight": 0,
            "w3.weight": 0, "w2.weight": 1, "norm.weight": None, "norm_out.weight": None,
            "embedding_weight": None if vocab_emb_dp else 0, "lm_head.weight": None if vocab_emb_dp else 0}
    for name, entry in contents.items():
        axis = next(axis for ending, axis in axes.items() if name.endswith(ending))
        whole = as_array(entry)
        for rank, checkpoint in enumerate(ranks):
            expected = whole if axis is None else np.split(whole, 2, axis)[rank]
            assert np.array_equal(checkpoint.read(name), expected), name
    assert sorted(os.listdir(tmp_path / "ms")) == sorted(["rank_0", "rank_1", "strategy", "config.json", *SIDECARS])


def test_mindspore_loads_every_kind_of_result(tmp_path):
    mindspore = pytest.importorskip("mindspore")
    contents = under_ms_names(write_model(tmp_path / "hf", dims(), shards=2))
    for name in ("out/x.ckpt", "out/x.safetensors"):
        to_mindspore(tmp_path / "hf", tmp_path / name)
        found = mindspore.load_checkpoint(str(tmp_path / name), format=name.rsplit(".", 1)[1])
        assert set(found) == set(contents)
        for key, (_, shape, data) in contents.items():
            assert (found[key].dtype, tuple(found[key].shape)) == (mindspore.bfloat16, shape)
            assert bytes(found[key].get_bytes()) == data


def test_a_bin_checkpoint_is_a_source_like_any_other(tmp_path):
    torch = pytest.importorskip("torch")
    sizes = dims()
    contents = model_contents(sizes)
    write_config_folder(tmp_path / "hf", sizes)
    state = {name: torch.frombuffer(bytearray(data), dtype=torch.bfloat16).reshape(shape) for name,
             (_, shape, data) in contents.items()}
    names = list(state)
    torch.save({name: state[name] for name in names[:9]}, tmp_path / "hf" / "pytorch_model-00001-of-00002.bin")
    torch.save({name: state[name] for name in names[9:]}, tmp_path / "hf" / "pytorch_model-00002-of-00002.bin")
    index = {name: f"pytorch_model-0000{1 if name in names[:9] else 2}-of-00002.bin" for name in names}
    (tmp_path / "hf" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    to_mindspore(tmp_path / "hf", tmp_path / "out" / "x.ckpt")
    assert read_contents(tmp_path / "out" / "x.ckpt") == under_ms_names(contents)


def write_config_folder(folder, sizes):
    folder.mkdir()
    write_config(folder, sizes)


def test_a_single_file_with_its_configuration_beside_it_is_a_source(tmp_path):
    contents = write_model(tmp_path / "hf", dims())
    to_mindspore(tmp_path / "hf" / "model.safetensors", tmp_path / "hf" / "x.ckpt")
    assert read_contents(tmp_path / "hf" / "x.ckpt") == under_ms_names(contents)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_transformers_loads_the_way_back_without_a_word_and_says_the_same(tmp_path, tied, dtype, caplog):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from conftest import random_model

    random_model(tmp_path / "hf", dtype=dtype, max_shard_size="20KB", tie_word_embeddings=tied)
    to_mindspore(tmp_path / "hf", tmp_path / "ms" / "x.ckpt")
    to_hugging_face(tmp_path / "ms" / "x.ckpt", tmp_path / "back", shard_bytes=30000)
    to_hugging_face(tmp_path / "ms" / "x.ckpt", tmp_path / "bin" / "pytorch_model.bin")
    assert read_contents(tmp_path / "back") == read_contents(tmp_path / "hf")
    torch.set_num_threads(1)
    transformers.utils.logging.enable_propagation()
    tokens = torch.arange(6)[None]
    said = []
    for folder in ("hf", "back", "bin"):
        with caplog.at_level("WARNING"):
            caplog.clear()
            model, account = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path / folder, dtype="auto",
                                                                                output_loading_info=True)
        assert not any(account.values()) and not [r for r in caplog.records if r.levelname != "INFO"], (folder, account,
                                                                                                        caplog.text)
        assert model.dtype == getattr(torch, dtype)
        said.append(model.generate(tokens, max_new_tokens=12, do_sample=False).tolist())
    assert said[0] == said[1] == said[2]


# ---- dtypes ----

@pytest.mark.parametrize("old", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("new", ["float32", "float16", "bfloat16"])
def test_casts_are_those_of_torch(tmp_path, old, new):
    torch = pytest.importorskip("torch")
    sizes = dims()
    contents = model_contents(sizes, old)
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    write_model(tmp_path / "hf", sizes, contents)
    result = to_mindspore(tmp_path / "hf", tmp_path / "out" / "x.safetensors",
                          dtype=new) if new != "float16" or old == "F16" else \
        run_allowing_overflow(tmp_path / "hf", tmp_path / "out" / "x.safetensors", new)
    found = read_contents(tmp_path / "out" / "x.safetensors")
    zeros = overflows = 0
    for name, (_, shape, data) in under_ms_names(contents).items():
        before = torch.frombuffer(bytearray(data), dtype=kinds[old]).reshape(shape)
        after = before.to(getattr(torch, new))
        assert found[name][2] == after.view(torch.int32 if new == "float32" else torch.int16).numpy().tobytes(), name
        zeros += int(((after == 0) & (before != 0)).sum())
        overflows += int((after.isinf() & ~before.isinf()).sum())
    total = [(count.to_zero, count.overflowed) for count in result.tally.casts.values()]
    assert total == ([] if kinds[old] == getattr(torch, new) else [(zeros, overflows)])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == new


@pytest.mark.parametrize("old", ["F16", "BF16"])
@pytest.mark.parametrize("new", ["F32", "F16", "BF16"])
def test_every_number_of_16_bits_becomes_what_torch_makes_of_it(old, new):
    torch = pytest.importorskip("torch")
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    bits = np.arange(1 << 16, dtype=np.uint16)
    before = torch.from_numpy(bits.view(np.int16)).view(kinds[old])
    after = before.to(kinds[new])
    made, count = cast(bits.view(np.float16) if old == "F16" else bits, old, new)
    found = torch.from_numpy(made.view(np.int32 if new == "F32" else np.int16)).view(kinds[new])
    nan = before.isnan()
    assert torch.equal(found.isnan(), nan)
    assert torch.equal(found[~nan].view(torch.int32 if new == "F32" else torch.int16),
                       after[~nan].view(torch.int32 if new == "F32" else torch.int16))
    assert (count.values, count.to_zero, count.overflowed) == \
        (1 << 16, int(((after == 0) & (before != 0)).sum()), int((after.isinf() & ~before.isinf() & ~nan).sum()))


def run_allowing_overflow(source, target, dtype):
    plan = plan_to_mindspore(str(source), Output(str(target), dtype=dtype))
    try:
        return run(plan, verify=True, allow_overflow=True)
    finally:
        plan.close()


def test_overflow_stops_the_conversion_unless_it_is_allowed(tmp_path, module_dir):
    sizes = dims()
    contents = model_contents(sizes, "F16")
    name = "model.layers.1.mlp.up_proj.weight"
    values = np.ones(contents[name][1], np.float32)
    values[3, 5] = 70000.0
    values[4, 4] = 1e-9
    contents[name] = ("F32", values.shape, values.tobytes())
    write_model(tmp_path / "hf", sizes, contents)
    flags = ("--torch_ckpt_dir", tmp_path / "hf", "--mindspore_ckpt_path", tmp_path / "o" / "x.ckpt", "--dtype",
             "float16")
    done = run_script(module_dir, "convert_weight.py", *flags)
    assert done.returncode == 2 and name in done.stderr
    assert "1 values are too large" in done.stderr and "--allow_overflow" in done.stderr
    assert os.listdir(tmp_path / "o") == []
    done = run_script(module_dir, "convert_weight.py", *flags, "--allow_overflow")
    assert done.returncode == 0
    assert "float32 -> float16: 1 tensors, 1536 values, 1 became 0, 1 overflowed to inf" in done.stderr


def test_nan_and_infinity_are_told_and_carried_over(tmp_path, module_dir):
    sizes = dims()
    contents = model_contents(sizes, "BF16")
    for name, bits in (("model.norm.weight", [0x7FC0, 0xFF80]), ("lm_head.weight", [0xFFFF])):
        array = np.frombuffer(contents[name][2], np.uint16).copy()
        array[-len(bits):] = bits
        contents[name] = ("BF16", contents[name][1], array.tobytes())
    write_model(tmp_path / "hf", sizes, contents)
    done = run_script(module_dir, "convert_weight.py", "--torch_ckpt_dir", tmp_path / "hf", "--mindspore_ckpt_path",
                      tmp_path / "o.ckpt",
                      "--verify")
    assert done.returncode == 0
    assert "model.norm.weight holds 1 NaN and 1 infinite values" in done.stderr
    assert "lm_head.weight holds 1 NaN and 0" in done.stderr
    assert read_contents(tmp_path / "o.ckpt") == under_ms_names(contents)


# ---- what is refused before anything is written ----

def without(*names):
    return lambda contents: {name: entry for name, entry in contents.items() if name not in names}


def with_entry(name, shape=(3,)):
    return lambda contents: {**contents, name: ("BF16", shape, random_bits("BF16", shape, np.random.default_rng(0)))}


@pytest.mark.parametrize("change, config, said", [
    (without("model.norm.weight"), {}, ["model.norm.weight is missing (26 of 27"]),
    (without("lm_head.weight"), {}, ["lm_head.weight is missing", "tie_word_embeddings true"]),
    (without("model.layers.0.self_attn.q_proj.bias", "model.norm.weight"), {}, ["are missing"]),
    (with_entry("model.layers.7.mlp.up_proj.weight"), {}, ["layers.7", "config.json has 2 layers"]),
    (with_entry("model.layers.0.self_attn.q_proj.lora_A.weight"), {}, ["lora_A", "Merge adapters"]),
    (with_entry("model.layers.0.mlp.up_proj.qweight"), {}, ["qweight", "of a quantised model"]),
    (with_entry("visual.proj"), {}, ["visual.proj is no weight"]),
    (None, {"hidden_size": 40}, ["model.embed_tokens.weight has shape [60, 32], ", "makes it [60, 40]", "more)"]),
    (None, {"tie_word_embeddings": True}, ["lm_head.weight differs from model.embed_tokens.weight",
                                           "tie_word_embeddings false"]),
    (None, {"num_hidden_layers": 3}, ["model.layers.2.", "are missing"]),
    (None, {"model_type": "qwen2_moe"}, ["qwen2_moe"]),
])
def test_what_does_not_fit_is_named_and_nothing_is_written(tmp_path, module_dir, change, config, said):
    contents = model_contents(dims())
    write_model(tmp_path / "hf", dims(), contents if change is None else change(contents), **config)
    done = run_script(module_dir, "convert_weight.py", "--torch_ckpt_dir", tmp_path / "hf", "--mindspore_ckpt_path",
                      tmp_path / "out" / "x.ckpt")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert all(part in done.stderr for part in said), done.stderr
    assert not (tmp_path / "out").exists()


def test_a_head_that_equals_the_embedding_is_left_out_when_tied_and_kept_when_not(tmp_path):
    sizes = dims()
    contents = model_contents(sizes)
    contents["lm_head.weight"] = contents["model.embed_tokens.weight"]
    for tied in (True, False):
        write_model(tmp_path / f"{tied}", sizes, contents, tie_word_embeddings=tied)
        plan = plan_to_mindspore(str(tmp_path / f"{tied}"), Output(str(tmp_path / f"{tied}.ckpt")))
        run(plan, overwrite=True)
        assert ("lm_head.weight" in read_contents(tmp_path / f"{tied}.ckpt")) is not tied
        assert len(plan.notes) == 1 and "lm_head.weight equals model.embed_tokens.weight" in plan.notes[0]


def test_old_rotary_tables_are_left_out_and_named(tmp_path):
    contents = with_entry("model.layers.0.self_attn.rotary_emb.inv_freq")(model_contents(dims()))
    write_model(tmp_path / "hf", dims(), contents)
    plan = plan_to_mindspore(str(tmp_path / "hf"), Output(str(tmp_path / "x.ckpt")))
    assert plan.left_out == {"RoPE tables": ["model.layers.0.self_attn.rotary_emb.inv_freq"]}


def test_float64_and_integer_weights_are_refused(tmp_path):
    contents = model_contents(dims())
    write_model(tmp_path / "hf", dims())
    contents["model.norm.weight"] = ("I8", (32,), bytes(32))
    write(tmp_path / "hf" / "model.safetensors", contents)
    with pytest.raises(UserError, match="model.norm.weight is I8"):
        plan_to_mindspore(str(tmp_path / "hf"), Output(str(tmp_path / "x.ckpt")))


def test_ranks_that_do_not_divide_are_refused_with_the_arithmetic(tmp_path, module_dir):
    write_model(tmp_path / "hf", dims())
    done = run_script(module_dir, "convert_weight.py", "--torch_ckpt_dir", tmp_path / "hf", "--mindspore_ckpt_path",
                      tmp_path / "o",
                      "--model_parallel", 4)
    assert done.returncode == 2 and "n_kv_heads 2 is not divisible by model_parallel 4" in done.stderr
    assert "1, 2 ranks" in done.stderr


@pytest.mark.parametrize("script, source, target", [
    ("convert_weight.py", "--torch_ckpt_dir", "--mindspore_ckpt_path"),
    ("convert_reversed.py", "--mindspore_ckpt_path", "--torch_ckpt_path"),
    ("transform_ckpt.py", "--src_ckpt_dir", "--dst_ckpt_dir")])
def test_a_source_that_is_not_there_is_named_itself_and_not_its_folder(tmp_path, module_dir, script, source, target):
    write_config(tmp_path, dims())  # of another model, in the folder where the source would be
    for name in ("no", "no/where", "no.safetensors", "no.ckpt"):
        done = run_script(module_dir, script, source, tmp_path / name, target, tmp_path / "made")
        said = f"error: {re.escape(str(tmp_path / name))}: no such file or folder"
        assert done.returncode == 2 and re.match(said, done.stderr), done.stderr


def test_going_the_wrong_way_is_recognised(tmp_path):
    write_model(tmp_path / "hf", dims())
    to_mindspore(tmp_path / "hf", tmp_path / "ms")
    with pytest.raises(UserError, match="convert_reversed.py"):
        plan_to_mindspore(str(tmp_path / "ms"), Output(str(tmp_path / "x.ckpt")))
    with pytest.raises(UserError, match="convert_weight.py"):
        plan_to_hugging_face(str(tmp_path / "hf"), Output(str(tmp_path / "x.bin")))
    with pytest.raises(UserError, match="not what MindSpore reads"):
        plan_to_mindspore(str(tmp_path / "hf"), Output(str(tmp_path / "x.bin")))
    with pytest.raises(UserError, match="not what Hugging Face reads"):
        plan_to_hugging_face(str(tmp_path / "ms"), Output(str(tmp_path / "x.ckpt")))


# ---- the way back ----

def test_caches_optimizer_states_and_counters_are_left_out_and_named(tmp_path, module_dir):
    mindspore = pytest.importorskip("mindspore")
    contents = write_model(tmp_path / "hf", dims())
    to_mindspore(tmp_path / "hf", tmp_path / "ms.ckpt")
    loaded = mindspore.load_checkpoint(str(tmp_path / "ms.ckpt"))
    extra = {"model.layers.0.attention.infer_attention.paged_attention_mgr.key_cache": mindspore.Tensor(np.zeros((2, 4),
                                                                                                                 np.float16)),
             "adam_m.model.norm_out.weight": mindspore.Tensor(np.zeros(32, np.float32)),
             "global_step": mindspore.Tensor(np.zeros(1, np.int32))}
    mindspore.save_checkpoint([{"name": name, "data": value} for name, value in {**loaded, **extra}.items()],
                              str(tmp_path / "trained.ckpt"), crc_check=True,
                              append_dict={"epoch_num": 2, "remark": "text"})
    done = run_script(module_dir, "convert_reversed.py", "--mindspore_ckpt_path", tmp_path / "trained.ckpt",
                      "--torch_ckpt_path",
                      tmp_path / "back")
    assert done.returncode == 0, done.stderr
    for said in ("1 KV cache (model.layers.0.attention.infer", "1 optimizer state (adam_m", "2 training counters (",
                 "remark"):
        assert said in done.stderr
    assert read_contents(tmp_path / "back") == contents
    assert done.stdout.strip() == str(tmp_path / "back")


def test_a_damaged_byte_in_a_checkpoint_with_a_checksum_stops_the_way_back(tmp_path):
    mindspore = pytest.importorskip("mindspore")
    write_model(tmp_path / "hf", dims())
    to_mindspore(tmp_path / "hf", tmp_path / "ms.ckpt")
    loaded = mindspore.load_checkpoint(str(tmp_path / "ms.ckpt"))
    path = tmp_path / "crc.ckpt"
    mindspore.save_checkpoint([{"name": name, "data": value} for name, value in loaded.items()], str(path),
                              crc_check=True)
    os.chmod(path, 0o644)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(UserError, match="CRC-32"):
        plan_to_hugging_face(str(path), Output(str(tmp_path / "back")))


def test_without_its_configuration_a_checkpoint_still_becomes_a_file_but_no_model_folder(tmp_path):
    for tied in (False, True):
        base = tmp_path / f"{tied}"
        contents = write_model(base / "hf", dims(tied=tied))
        to_mindspore(base / "hf", base / "ms", slicing=Slicing(2, not tied))
        os.unlink(base / "ms" / "config.json")
        to_hugging_face(base / "ms", base / "o" / "x.bin")
        assert read_contents(base / "o" / "x.bin") == contents
        with pytest.raises(UserError, match="--config_path"):
            to_hugging_face(base / "ms", base / "back")
        to_hugging_face(base / "ms", base / "back", config_path=str(base / "hf"))
        assert read_contents(base / "back") == contents and (base / "back" / "merges.txt").exists()


def test_replicas_that_differ_between_ranks_are_refused(tmp_path):
    write_model(tmp_path / "hf", dims())
    to_mindspore(tmp_path / "hf", tmp_path / "ms", slicing=Slicing(2, True))
    path = tmp_path / "ms" / "rank_1" / "checkpoint_1.safetensors"
    contents = read_contents(path)
    dtype, shape, data = contents["model.norm_out.weight"]
    contents["model.norm_out.weight"] = (dtype, shape, data[:-1] + bytes([data[-1] ^ 1]))
    write_safetensors(path, contents)
    with pytest.raises(UserError, match="model.norm_out.weight: differs from"):
        to_hugging_face(tmp_path / "ms", tmp_path / "back")
    assert not (tmp_path / "back").exists()


# ---- what the commands say and where they write ----

def test_the_result_has_what_predicting_needs_and_the_yaml_lines_point_at_it(tmp_path, module_dir):
    yaml = pytest.importorskip("yaml")
    write_model(tmp_path / "hf", dims(), shards=2)
    done = run_script(module_dir, "convert_weight.py", "--torch_ckpt_dir", tmp_path / "hf", "--mindspore_ckpt_path",
                      tmp_path / "o" / "x.ckpt")
    assert done.returncode == 0 and "27 tensors" in done.stderr
    lines = yaml.safe_load(done.stdout)
    assert lines["load_checkpoint"] == str(tmp_path / "o" / "x.ckpt") and lines["auto_trans_ckpt"] is False
    assert lines["model"]["model_config"]["param_init_type"] == "bfloat16"
    assert lines["processor"]["tokenizer"] == {"vocab_file": str(tmp_path / "o" / "vocab.json"),
                                               "merges_file": str(tmp_path / "o" / "merges.txt")}
    for name, text in SIDECARS.items():
        assert (tmp_path / "o" / name).read_text() == text
    done = run_script(module_dir, "convert_weight.py", "--torch_ckpt_dir", tmp_path / "hf", "--mindspore_ckpt_path",
                      tmp_path / "r",
                      "--model_parallel", 2, "--vocab_emb_dp", "False")
    lines = yaml.safe_load(done.stdout)
    assert lines["use_parallel"] is True and lines["parallel_config"]["model_parallel"] == 2
    assert lines["parallel_config"]["vocab_emb_dp"] is False and lines["load_checkpoint"] == str(tmp_path / "r")


def test_a_dry_run_names_every_tensor_and_writes_nothing(tmp_path, module_dir):
    contents = write_model(tmp_path / "hf", dims())
    nbytes = sum(len(data) for _, _, data in contents.values())
    done = run_script(module_dir, "convert_weight.py", "--torch_ckpt_dir", tmp_path / "hf", "--mindspore_ckpt_path",
                      tmp_path / "o",
                      "--model_parallel", 2, "--dtype", "float32", "--dry_run")
    assert done.returncode == 0 and os.listdir(tmp_path) == ["hf"]
    assert ("model.layers.1.self_attn.o_proj.weight  ->  model.layers.1.attention.wo.weight  BF16 -> F32 [32, 32]  as "
            "2 x [32, 16]  "
            "2.05 kB") in done.stdout
    assert done.stdout.count("  ->  ") == 27
    assert f"27 tensors; reads {nbytes / 1000:.2f} kB, writes" in done.stdout and "of memory" in done.stdout


def test_nothing_is_overwritten_unless_asked(tmp_path, module_dir):
    write_model(tmp_path / "hf", dims())
    flags = ("--torch_ckpt_dir", tmp_path / "hf", "--mindspore_ckpt_path")
    (tmp_path / "x.ckpt").write_text("mine")
    done = run_script(module_dir, "convert_weight.py", *flags, tmp_path / "x.ckpt")
    assert done.returncode == 2 and "exists already" in done.stderr and (tmp_path / "x.ckpt").read_text() == "mine"
    assert run_script(module_dir, "convert_weight.py", *flags, tmp_path / "x.ckpt", "--overwrite").returncode == 0
    assert len(read_contents(tmp_path / "x.ckpt")) == 27


def test_a_folder_is_replaced_only_if_all_of_it_is_ours(tmp_path):
    contents = write_model(tmp_path / "hf", dims(), shards=2)
    to_mindspore(tmp_path / "hf", tmp_path / "ms", shard_bytes=10000)
    (tmp_path / "ms" / "notes.txt").write_text("mine")
    plan = plan_to_mindspore(str(tmp_path / "hf"), Output(str(tmp_path / "ms"), slicing=Slicing(2, True)))
    with pytest.raises(UserError, match="notes.txt"):
        run(plan, overwrite=True)
    (tmp_path / "ms" / "notes.txt").unlink()
    run(plan, overwrite=True)
    assert sorted(os.listdir(tmp_path / "ms")) == sorted(["rank_0", "rank_1", "strategy", "config.json", *SIDECARS])
    assert sorted(os.listdir(tmp_path)) == ["hf", "ms"]
    to_hugging_face(tmp_path / "ms", tmp_path / "back")
    assert read_contents(tmp_path / "back") == contents


def test_the_source_is_never_the_target(tmp_path):
    write_model(tmp_path / "hf", dims())
    os.symlink(tmp_path / "hf", tmp_path / "link")
    for source, target in (("hf/model.safetensors", "hf/model.safetensors"), ("hf", "hf"), ("hf", "link"),
                           ("link/model.safetensors", "hf/model.safetensors")):
        plan = plan_to_mindspore(str(tmp_path / source), Output(str(tmp_path / target)))
        with pytest.raises(UserError, match="being converted"):
            run(plan, overwrite=True)
    assert sorted(os.listdir(tmp_path / "hf")) == sorted(["model.safetensors", "config.json", *SIDECARS])


def test_another_models_configuration_beside_the_result_is_not_replaced(tmp_path):
    write_model(tmp_path / "a", dims())
    write_model(tmp_path / "b", dims(tied=True))
    to_mindspore(tmp_path / "a", tmp_path / "o" / "a.ckpt")
    with pytest.raises(UserError, match="config.json: exists already"):
        to_mindspore(tmp_path / "b", tmp_path / "o" / "b.ckpt")
    assert not (tmp_path / "o" / "b.ckpt").exists()
    to_mindspore(tmp_path / "a", tmp_path / "o" / "a2.ckpt")


@pytest.mark.parametrize("text, nbytes", [("4GB", 4 * 10 ** 9), ("2GiB", 2 ** 31), ("500 mb", 5 * 10 ** 8), ("17", 17),
                                          ("1.5kb", 1500)])
def test_sizes_are_read_as_people_write_them(text, nbytes):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1", "4 parsecs", "0"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UserError, match="is not a size"):
        parse_size(text)


@given(st.lists(st.integers(0, 100), min_size=1, max_size=20), st.integers(1, 150))
def test_shards_hold_everything_in_order_and_keep_to_the_limit(sizes, most_bytes):
    infos = [TensorInfo.of(str(i), "I8", (nbytes,)) for i, nbytes in enumerate(sizes)]
    shards = shape_files(infos, most_bytes)
    assert [info for shard in shards for info in shard] == infos
    assert all(len(shard) == 1 or sum(info.nbytes for info in shard) <= most_bytes for shard in shards)


@pytest.mark.parametrize("script", ["convert_weight.py", "convert_reversed.py", "transform_ckpt.py"])
def test_help_and_mistakes_answer_at_once_and_without_a_traceback(tmp_path, module_dir, script):
    assert run_script(module_dir, script, "--help").returncode == 0
    done = run_script(module_dir, script, "--no_such_flag", "1", cwd=tmp_path)
    assert done.returncode == 2 and "no_such_flag" in done.stderr and "Traceback" not in done.stderr
    done = run_script(module_dir, script, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
