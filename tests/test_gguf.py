"""GGUF files, written by the gguf package, are converted like Hugging Face folders: same values, same names."""

import json

import numpy as np
import pytest
from checkpoint_fixtures import read_contents, run_script
from qwen15.checkpoint.account import Expected, take_account
from qwen15.checkpoint.casting import from_float32
from qwen15.checkpoint.quantised import SCALE, dequantise
from qwen15.checkpoint.reader import open_checkpoint
from qwen15.checkpoint.source import open_source
from qwen15.conversion.hugging_face import Output, plan_to_mindspore
from qwen15.conversion.run import run
from qwen15.errors import UserError
from qwen15.naming import Dims, weights

gguf = pytest.importorskip("gguf")
DIMS = Dims(hidden_size=256, intermediate_size=512, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64,
            vocab_size=96, tie_word_embeddings=False)
NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down",
         "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "model.embed_tokens": "token_embd",
         "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name):
    for ours, theirs in NAMES.items():
        if ours in name:
            kind = name.rsplit(".", 1)[1]
            return f"blk.{name.split('.')[2]}.{theirs}.{kind}" if "layers" in name else f"{theirs}.{kind}"
    raise KeyError(name)


def permuted(array, heads):
    """As llama.cpp's converter permutes q and k of a Llama: the two halves of a head's rows are interleaved."""
    return array.reshape(heads, 2, array.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(array.shape)


def write(path, kind, arch="qwen2", dims=DIMS, leave_out=(), extra=()):
    """A file whose matrices are of `kind`; Hugging Face name -> float32 array of what they mean."""
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_block_count(dims.num_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(dims.hidden_size)
    writer.add_feed_forward_length(dims.intermediate_size)
    writer.add_head_count(dims.num_heads)
    writer.add_head_count_kv(dims.num_kv_heads)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    rng, meanings = np.random.default_rng(0), {}
    for weight in weights(dims):
        if weight.hf in leave_out or (arch == "llama" and weight.hf.endswith(".bias")):
            continue
        values = (rng.standard_normal(weight.shape) * 0.05).astype(np.float32)
        name = gguf_name(weight.hf)
        stored = values
        if arch == "llama" and (".attn_q." in name or ".attn_k." in name):
            stored = permuted(values, dims.num_heads if "attn_q" in name else dims.num_kv_heads)
        if values.ndim == 1:
            writer.add_tensor(name, stored)
            meanings[weight.hf] = values
            continue
        blocks = gguf.quants.quantize(stored, kind)
        writer.add_tensor(name, blocks, raw_dtype=kind)
        back = gguf.quants.dequantize(blocks, kind)
        if stored is not values:
            heads = dims.num_heads if "attn_q" in name else dims.num_kv_heads
            back = back.reshape(heads, -1, 2, back.shape[1]).swapaxes(1, 2).reshape(back.shape)
        meanings[weight.hf] = back
    for name in extra:
        writer.add_tensor(name, np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meanings


def convert(source, target, **options):
    plan = plan_to_mindspore(str(source), Output(str(target), **options))
    run(plan, verify=True)
    plan.close()
    return plan


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("arch", ["qwen2", "llama"])
def test_blocks_of_32_keep_their_integers_and_scales(tmp_path, kind, arch):
    wanted = write(tmp_path / "m.gguf", gguf.GGMLQuantizationType[kind], arch)
    plan = convert(tmp_path / "m.gguf", tmp_path / "ms" / "x.safetensors")
    assert any("it gets 6 q/k/v biases of zero" in note for note in plan.notes) == (arch == "llama")
    with open_checkpoint(tmp_path / "ms" / "x.safetensors") as made:
        account = take_account(made, Expected(DIMS, "the test"))
        for weight in weights(DIMS):
            if len(weight.shape) == 2:
                scheme = account.schemes[weight.ms]
                assert scheme.bits == (4 if kind == "Q4_0" and weight.layer is not None else 8)
                found = dequantise(made.read(weight.ms), made.read(weight.ms + SCALE), scheme.scale_dtype)
                assert np.array_equal(found, wanted[weight.hf]), weight.hf
            elif weight.hf in wanted:
                assert np.array_equal(made.read(weight.ms), wanted[weight.hf])
            else:
                assert not made.read(weight.ms).any()


@pytest.mark.parametrize("kind, dtype", [("Q4_1", "auto"), ("Q4_1", "float32"), ("Q5_0", "auto"), ("BF16", "auto"),
                                         ("F16", "auto"), ("F32", "auto")])
def test_other_kinds_become_floats_and_it_is_said(tmp_path, kind, dtype):
    wanted = write(tmp_path / "m.gguf", gguf.GGMLQuantizationType[kind])
    plan = convert(tmp_path / "m.gguf", tmp_path / "ms" / "x.safetensors", dtype=dtype)
    blocks = kind.startswith("Q")
    stored = kind if not blocks else "BF16" if dtype == "auto" else "F32"
    assert any(f"16 {kind} tensors are dequantised to" in note for note in plan.notes) == blocks
    found = read_contents(tmp_path / "ms" / "x.safetensors")
    for weight in weights(DIMS):
        if len(weight.shape) == 2:
            expected = from_float32(np.ascontiguousarray(wanted[weight.hf], np.float32), stored)
            assert found[weight.ms] == (stored, weight.shape, expected.tobytes())


def test_config_and_tokenizer_come_along_and_what_is_absent_is_said(tmp_path, module_dir):
    (tmp_path / "vocab.json").write_text("{}")
    write(tmp_path / "m.gguf", gguf.GGMLQuantizationType.Q8_0)
    done = run_script(module_dir, "convert_weight.py", "--torch_ckpt_dir", tmp_path / "m.gguf", "--mindspore_ckpt_path",
                      tmp_path / "ms", "--model_parallel", 2, "--verify")
    assert done.returncode == 0, done.stderr
    assert "merges.txt, tokenizer_config.json are not beside the .gguf file" in done.stderr
    config = json.loads((tmp_path / "ms" / "config.json").read_text())
    assert (config["hidden_size"], config["rms_norm_eps"], config["rope_theta"]) == (256, 1e-6, 1e6)
    assert (tmp_path / "ms" / "vocab.json").exists() and (tmp_path / "ms" / "rank_1").is_dir()


def test_loading_reads_a_gguf_file_under_the_same_names(tmp_path):
    wanted = write(tmp_path / "m.gguf", gguf.GGMLQuantizationType.F16)
    with open_source(tmp_path / "m.gguf") as source:
        account = take_account(source, Expected(DIMS, "the YAML"))
        name = account.stored["model.layers.1.feed_forward.w1.weight"]
        assert np.array_equal(source.read(name).astype(np.float32), wanted["model.layers.1.mlp.gate_proj.weight"])


def test_what_is_wrong_with_a_gguf_file_is_one_line(tmp_path):
    kind = gguf.GGMLQuantizationType.Q8_0

    def refused(path):
        with pytest.raises(UserError) as error:
            plan_to_mindspore(str(path), Output(str(tmp_path / "x.ckpt")))
        assert "\n" not in str(error.value) and str(path) in str(error.value)
        return str(error.value)

    write(tmp_path / "a.gguf", kind, leave_out=("model.layers.1.mlp.up_proj.weight",))
    assert "model.layers.1.mlp.up_proj.weight is missing" in refused(tmp_path / "a.gguf")
    write(tmp_path / "b.gguf", kind, extra=("blk.0.ffn_gate_exps.weight",))
    assert "ffn_gate_exps.weight is no weight" in refused(tmp_path / "b.gguf")
    write(tmp_path / "c.gguf", kind, arch="mamba")
    assert "architecture 'mamba' is not supported" in refused(tmp_path / "c.gguf")
    write(tmp_path / "d.gguf", kind)
    whole = (tmp_path / "d.gguf").read_bytes()
    for length in (20, 300, len(whole) - 5000):
        (tmp_path / "d.gguf").write_bytes(whole[:length])
        refused(tmp_path / "d.gguf")
    (tmp_path / "e.gguf").write_bytes(b"not this at all" * 10)
    refused(tmp_path / "e.gguf")
    (tmp_path / "e.gguf").write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n")
    assert "a Git LFS pointer" in refused(tmp_path / "e.gguf")
    assert "no such file" in refused(tmp_path / "f.gguf")
