"""Loading is strict: what is found, what is missing, what does not fit, and what is told."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from conftest import random_model
from qwen15 import naming
from qwen15.checkpoint import casting
from qwen15.config.load import load_config
from qwen15.errors import UserError
from qwen15.network import weights

pytest.importorskip("torch")


def load(folder, **sizes):
    yaml = folder.parent / "p.yaml"
    lines = "".join(f"    {k}: {v}\n" for k, v in sizes.items())
    yaml.write_text(f"load_checkpoint: '{folder}'\nmodel:\n  model_config:\n    seq_length: 64\n{lines}"
                    "context:\n  device_target: CPU\n")
    return load_config(str(yaml), environ={}).model


def safetensors_of(folder):
    from safetensors.numpy import load_file

    return load_file(str(folder / "model.safetensors"))


def save(folder, tensors):
    from safetensors.numpy import save_file

    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


@pytest.fixture
def folder(tmp_path):
    random_model(tmp_path / "hf")
    return tmp_path / "hf"


def test_every_weight_arrives_bit_for_bit(folder):
    model = load(folder)
    source = weights.Loader(str(folder), model)
    stored = safetensors_of(folder)
    for weight in naming.weights(model.dims):
        assert source(weight.ms).asnumpy().tobytes() == stored[weight.hf].tobytes()
    assert source.account() == f"weights: loaded {len(stored)} of {len(stored)}, missing 0, unexpected 0, skipped 0"


@pytest.mark.parametrize("split_vocab", [True, False])
def test_ranks_read_slices_that_join_to_the_whole(tmp_path, split_vocab):
    folder = tmp_path / "hf"
    random_model(folder, vocab_size=200)
    model = load(folder)
    sources = [weights.Loader(str(folder), model, rank, 2, not split_vocab) for rank in range(2)]
    stored = safetensors_of(folder)
    for weight in naming.weights(model.dims):
        axis = weight.axis(2, not split_vocab)
        parts = [source(weight.ms).asnumpy() for source in sources]
        whole = parts[0] if axis is None else np.concatenate(parts, axis)
        assert np.array_equal(whole, stored[weight.hf])


def test_missing_weight_stops_and_is_named(folder):
    tensors = safetensors_of(folder)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save(folder, tensors)
    with pytest.raises(UserError, match=r"model.layers.1.mlp.up_proj.weight is missing \(38 of 39 weights found\)"):
        weights.Loader(str(folder), load(folder))


def test_missing_head_suggests_tying(folder):
    tensors = safetensors_of(folder)
    del tensors["lm_head.weight"]
    save(folder, tensors)
    with pytest.raises(UserError, match="lm_head.weight is missing.*the YAML must say tie_word_embeddings true"):
        weights.Loader(str(folder), load(folder))


def test_unexpected_tensor_stops_and_is_named(folder):
    save(folder, {**safetensors_of(folder), "model.layers.0.self_attn.q_proj.lora_a": np.ones(3, np.float32)})
    with pytest.raises(UserError, match="q_proj.lora_a is no weight of this model.*Merge adapters"):
        weights.Loader(str(folder), load(folder))


def test_caches_optimizer_states_and_counters_are_skipped_and_counted(folder):
    extra = {"model.layers.0.attention.infer_attention.paged_attention_mgr.key_cache": np.zeros((2, 2), np.float32),
             "adam_m.model.norm_out.weight": np.zeros(48, np.float32), "global_step": np.zeros((), np.float32)}
    save(folder, {**safetensors_of(folder), **extra})
    source = weights.Loader(str(folder), load(folder))
    assert source.account().endswith(
        "skipped 3: 1 KV cache (model.layers.0.attention.infer_attention.paged_attention_mgr.key_cache), "
        "1 optimizer state (adam_m.model.norm_out.weight), 1 training counter (global_step)")


def test_wrong_shape_names_both_shapes(folder):
    tensors = safetensors_of(folder)
    tensors["model.layers.2.self_attn.k_proj.weight"] = np.zeros((48, 48), np.float32)
    save(folder, tensors)
    with pytest.raises(UserError, match=r"k_proj.weight has shape \[48, 48\], the YAML makes it \[16, 48\]"):
        weights.Loader(str(folder), load(folder))


def test_checkpoint_of_another_size_is_recognised(tmp_path):
    from qwen15.family import FAMILY

    header, offset = {}, 0
    for weight in naming.weights(FAMILY["4B"]):  # a header is enough: shapes are checked before anything is read
        size = int(np.prod(weight.shape)) * 2
        header[weight.ms] = {"dtype": "BF16", "shape": list(weight.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    yaml = os.path.join(os.path.dirname(weights.__file__), "..", "..", "predict_qwen1_5_14b.yaml")
    model = load_config(yaml, environ={}).model
    line = r"has shape \[151936, 2560\], the YAML makes it \[152064, 5120\].*looks like Qwen1.5-4B, not 14B"
    with pytest.raises(UserError, match=line):
        weights.Loader(str(path), model)


def test_tied_model_accepts_its_own_head_and_no_other(tmp_path):
    folder = tmp_path / "hf"
    random_model(folder, tie_word_embeddings=True)
    tensors = safetensors_of(folder)
    save(folder, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].copy()})
    assert ", tied 1" in weights.Loader(str(folder), load(folder)).account()
    save(folder, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1})
    line = "lm_head.weight differs from model.embed_tokens.weight.*Set tie_word_embeddings false in the YAML"
    with pytest.raises(UserError, match=line):
        weights.Loader(str(folder), load(folder))


def test_casts_are_counted_and_told(folder):
    tensors = safetensors_of(folder)
    tensors["model.layers.0.mlp.down_proj.weight"][0, :3] = [1e-30, 1e30, 0]
    save(folder, tensors)
    source = weights.Loader(str(folder), load(folder, param_init_type="float16"))
    for weight in naming.weights(load(folder).dims):
        source(weight.ms)
    assert source.account().endswith("; float32 -> float16: 23 tensors, 1 values became 0, 1 overflowed")


def test_weight_that_is_not_finite_is_found(folder):
    tensors = safetensors_of(folder)
    source = weights.Loader(str(folder), load(folder))
    assert source.find_non_finite() is None
    tensors["model.layers.1.self_attn.v_proj.bias"][3] = np.nan
    save(folder, tensors)
    source = weights.Loader(str(folder), load(folder))
    assert source.find_non_finite() == "model.layers.1.attention.wv.bias"


class TestResolve:
    """Which file or folder a rank reads."""

    def make(self, tmp_path, *names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"")
        return str(tmp_path)

    def test_nothing_given(self):
        with pytest.raises(UserError, match="load_checkpoint: no checkpoint is given"):
            weights.resolve("")

    def test_a_path_that_is_not_there_shows_what_is(self, tmp_path):
        self.make(tmp_path, "model_dir/x.ckpt")
        with pytest.raises(UserError, match="no such file or folder.*holds: model_dir"):
            weights.resolve(str(tmp_path / "modle_dir"))

    def test_file_folder_and_rank_0(self, tmp_path):
        folder = self.make(tmp_path, "a/x.ckpt", "b/rank_0/x.ckpt")
        assert weights.resolve(f"{folder}/a/x.ckpt") == f"{folder}/a/x.ckpt"
        assert weights.resolve(f"{folder}/a") == f"{folder}/a"
        assert weights.resolve(f"{folder}/b") == f"{folder}/b/rank_0"

    def test_slices(self, tmp_path):
        folder = self.make(tmp_path, "rank_0/x.ckpt", "rank_1/x.ckpt")
        assert weights.resolve(folder, 1, 2, whole=False) == f"{folder}/rank_1"
        for call, message in (
                (dict(), "sliced for 2 ranks and the run has one"),
                (dict(ranks=4, whole=False), "sliced for 2 ranks, model_parallel is 4"),
                (dict(ranks=2, whole=True),
                 "auto_trans_ckpt True wants a whole checkpoint.*Pass --auto_trans_ckpt False"),
        ):
            with pytest.raises(UserError, match=message):
                weights.resolve(folder, **call)

    def test_a_missing_rank_is_named(self, tmp_path):
        folder = self.make(tmp_path, "rank_0/x.ckpt", "rank_2/x.ckpt")
        with pytest.raises(UserError, match="rank_1 is missing"):
            weights.resolve(folder, 0, 3, whole=False)

    def test_whole_checkpoint_without_auto_trans(self, tmp_path):
        folder = self.make(tmp_path, "x.ckpt")
        for path in (folder, f"{folder}/x.ckpt"):
            with pytest.raises(UserError, match="auto_trans_ckpt False wants.*--auto_trans_ckpt True"):
                weights.resolve(path, 0, 2, whole=False)


def test_slices_of_another_split_are_named(tmp_path):
    from safetensors.numpy import save_file

    random_model(tmp_path / "hf", vocab_size=200, num_attention_heads=4, num_key_value_heads=4)
    model, tensors = load(tmp_path / "hf"), safetensors_of(tmp_path / "hf")
    rank = tmp_path / "rank_0"
    rank.mkdir()

    def source(cut_for, cut_with, run_for, run_with):
        first = {}
        for w in naming.weights(model.dims):
            axis = w.axis(cut_for, cut_with)
            first[w.ms] = tensors[w.hf] if axis is None else np.split(tensors[w.hf], cut_for, axis)[0].copy()
        save_file(first, str(rank / "model.safetensors"))
        return weights.Loader(str(rank), model, 0, run_for, vocab_emb_dp=run_with, whole=False)

    assert source(2, True, 2, True).read("model.layers.0.attention.wo.weight")[0].shape == (48, 24)
    with pytest.raises(UserError, match="sliced with vocab_emb_dp False, not True"):
        source(2, False, 2, True)
    with pytest.raises(UserError, match="this slice was cut for 4 ranks, not 2"):
        source(4, True, 2, True)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_casting_equals_torch(dtype):
    import torch

    random = np.random.default_rng(0)
    values = np.concatenate([
        random.standard_normal(5000).astype(np.float32) * np.exp2(random.integers(-45, 40, 5000)).astype(np.float32),
        random.integers(0, 2 ** 32, 20000, dtype=np.uint64).astype(np.uint32).view(np.float32),
        np.array([0.0, -0.0, np.inf, -np.inf, 65504, 65519.99, 65520, 1e-8, 3.4e38], np.float32)])
    made, count = casting.cast(values, "F32", dtype)
    kind = torch.bfloat16 if dtype == "BF16" else torch.float16
    expected = torch.from_numpy(values).to(kind)
    back = casting.to_float32(made, dtype)
    right = expected.float().numpy()
    nan = np.isnan(values)
    assert np.isnan(back[nan]).all()
    assert back[~nan].tobytes() == right[~nan].tobytes()
    assert count.overflowed == np.isinf(right[np.isfinite(values)]).sum()
    assert count.to_zero == ((right == 0) & (values != 0) & ~nan).sum()
