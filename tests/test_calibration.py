"""Quantising with a calibration text: errors make up for one another, layer by layer, and nothing is lost by a kill."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from checkpoint_fixtures import run_script
from conftest import random_model
from qwen15 import naming
from qwen15.calibration.gptq import Moments, compensated
from qwen15.calibration.run import Calibration, _first_ids
from qwen15.checkpoint.quantised import SCALE, ZERO, Scheme, dequantise, pack
from qwen15.checkpoint.reader import open_checkpoint
from qwen15.config.hf_config import dims_from_hf_config
from qwen15.conversion.hugging_face import Output, plan_to_mindspore
from qwen15.conversion.quantise import Recipe, inverse_of, nearest_scale, nearest_zero
from qwen15.conversion.run import run
from qwen15.text.tokenizer import Qwen2Tokenizer

SIZES = {"vocab_size": 300, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2}
TEXT = " ".join(f"{number * number} is the square of {number}." for number in range(70))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(folder, transformers' model) of a random model with a tokenizer of single bytes, beside it a text."""
    folder = tmp_path_factory.mktemp("calibration") / "hf"
    model = random_model(folder, **SIZES)
    codes = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(code) for code in codes] + [chr(256 + i) for i in range(256 - len(codes))]
    (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate([*letters, "zz"])}),
                                       encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\nz z\n")  # a file without any is refused
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer", "eos_token": null, '
                                                  '"pad_token": null, "unk_token": null}')
    (folder.parent / "text.txt").write_text(TEXT)
    return folder, model


# ---- the rounding ----

def rounded_to_nearest(weight, scheme):
    """What rounding to nearest makes of a matrix, float32 [O, I]."""
    groups = weight.reshape(len(weight), scheme.groups, scheme.group_size)
    scale = nearest_scale(groups, scheme.bits)
    inverse = inverse_of(scale)
    if scheme.bits == 8:
        values = np.clip(np.rint(groups * inverse[:, :, None]), -127, 127).astype(np.int8).reshape(weight.shape)
        return dequantise(values, scale, "F16")
    zero = nearest_zero(groups, inverse)
    values = np.clip(np.rint(groups * inverse[:, :, None]) + zero[:, :, None], 0, 15).astype(np.uint8)
    return dequantise(pack(values.reshape(weight.shape)), scale, "F16", zero)


def moments_of(x):
    made = Moments(x.shape[1])
    for part in np.array_split(x, 3):
        made.add(part)
    return made


@pytest.mark.parametrize("bits, group", [(4, 32), (4, 64), (8, 128)])
def test_products_with_inputs_like_those_of_the_text_lose_less(bits, group):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((48, 256)).astype(np.float32)
    mix = rng.standard_normal((40, 256))
    draw = lambda: (rng.standard_normal((600, 40)) @ mix + rng.standard_normal((600, 256))).astype(np.float32)  # noqa: E731
    scheme = Scheme(bits, 256 // group, group, "F16", has_zero=bits == 4)
    made = compensated(weight, moments_of(draw()).factor(), scheme)
    fresh = draw()
    lost = np.square(fresh @ (made.dense - weight).T).sum()
    assert lost < 0.5 * np.square(fresh @ (rounded_to_nearest(weight, scheme) - weight).T).sum()
    stored = made.values if bits == 8 else pack(made.values)
    assert np.array_equal(made.dense, dequantise(stored, made.scale, "F16", made.zero))


@pytest.mark.parametrize("bits", [4, 8])
def test_inputs_that_know_nothing_of_one_another_leave_rounding_to_nearest(bits):
    weight = np.random.default_rng(0).standard_normal((16, 192)).astype(np.float32)
    weight[3, 64:128] = 0
    scheme = Scheme(bits, 3, 64, "F16", has_zero=bits == 4)
    made = compensated(weight, moments_of(np.eye(192, dtype=np.float32)).factor(), scheme)
    assert np.array_equal(made.dense, rounded_to_nearest(weight, scheme))


def test_inputs_that_are_always_zero_are_rounded_to_nearest_and_too_few_tokens_are_enough_to_begin():
    weight = np.random.default_rng(0).standard_normal((16, 128)).astype(np.float32)
    x = np.random.default_rng(1).standard_normal((5, 128)).astype(np.float32)
    x[:, 7] = 0
    scheme = Scheme(4, 2, 64, "F16", has_zero=True)
    made = compensated(weight, moments_of(x).factor(), scheme)
    assert np.isfinite(made.dense).all() and np.abs(made.dense[:, 7] - weight[:, 7]).max() < 0.4
    with pytest.raises(ArithmeticError, match="not finite"):
        moments_of(np.full((4, 128), np.nan, np.float32)).factor()


# ---- what a layer is given ----

def test_each_matrix_is_calibrated_with_what_transformers_would_multiply_it_with(tiny):
    torch = pytest.importorskip("torch")
    from qwen15.calibration.layer import Steps

    folder, model = tiny
    ids = torch.arange(96).reshape(1, -1) * 3
    seen = {}

    def keep(name, args):
        seen[name] = args[0][0].numpy()  # and nothing is returned, which would take the place of what is passed

    hooks = [module.register_forward_pre_hook(lambda _, args, name=name: keep(name, args))
             for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    steps = Steps(dims_from_hf_config(folder), 96)
    x = [hidden[1][0].numpy()]
    parameters = dict(model.named_parameters())
    w = {weight.ms[len("model.layers.1."):]: parameters[weight.hf].detach().numpy()
         for weight in naming.weights(dims_from_hf_config(folder).dims) if weight.layer == 1}
    inside = {name: seen[f"model.layers.1.{name}"] for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj",
                                                                "mlp.down_proj")}
    assert np.abs(steps.normed(x[0], w["attention_norm.weight"]) - inside["self_attn.q_proj"]).max() < 1e-5
    y = steps.attend(x, w)
    assert np.abs(y[0] - inside["self_attn.o_proj"]).max() < 1e-4
    x = steps.add(y, w["attention.wo.weight"], x)
    assert np.abs(steps.normed(x[0], w["ffn_norm.weight"]) - inside["mlp.up_proj"]).max() < 1e-4
    y = steps.gate(x, w)
    assert np.abs(y[0] - inside["mlp.down_proj"]).max() < 2e-4
    assert np.abs(steps.add(y, w["feed_forward.w2.weight"], x)[0] - hidden[2][0].numpy()).max() < 5e-4


# ---- a whole model ----

def calibrated(folder, target, bits=4, group=64):
    """Convert with a calibration, as the command does."""
    chosen = Calibration(str(folder.parent / "text.txt"), str(folder), str(target))
    plan = plan_to_mindspore(str(folder), Output(str(target), recipe=Recipe(bits, group, chosen=chosen)))
    done = False
    try:
        run(plan)
        done = True
    finally:
        chosen.close(done)
        plan.close()


def logits_lost(folder, model, target):
    """How far a quantised checkpoint's logits on the text are from the model's, mean square."""
    torch = pytest.importorskip("torch")
    ids = torch.tensor(Qwen2Tokenizer.from_pretrained(str(folder)).encode(TEXT)[:256]).reshape(1, -1)
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad(), open_checkpoint(str(target)) as made:
        wanted = model(ids).logits
        for weight in naming.weights(dims_from_hf_config(folder).dims):
            if weight.ms + SCALE in made.infos and weight.layer is not None:
                zero = made.read(weight.ms + ZERO) if weight.ms + ZERO in made.infos else None
                dense = dequantise(made.read(weight.ms), made.read(weight.ms + SCALE), "F16", zero)
                dict(model.named_parameters())[weight.hf].copy_(torch.from_numpy(dense))
        found = model(ids).logits
        for name, parameter in model.named_parameters():
            parameter.copy_(kept[name])
    return float(torch.square(found - wanted).mean())


def test_a_calibrated_model_answers_closer_to_the_original_and_leaves_nothing_beside(tiny, tmp_path):
    folder, model = tiny
    calibrated(folder, tmp_path / "calibrated")
    plan = plan_to_mindspore(str(folder), Output(str(tmp_path / "nearest"), recipe=Recipe(4, 64)))
    run(plan)
    plan.close()
    assert logits_lost(folder, model, tmp_path / "calibrated") < 0.8 * logits_lost(folder, model, tmp_path / "nearest")
    said = json.loads((tmp_path / "calibrated" / "config.json").read_text())["quantization_config"]
    assert said["bits"] == 4 and said["calibration"]["tokens"] == 1536
    assert sorted(os.listdir(tmp_path)) == ["calibrated", "nearest"]


def test_layers_that_are_done_are_not_calibrated_again(tiny, tmp_path, monkeypatch):
    from qwen15.calibration import run as running

    folder, _ = tiny
    layers = []
    real = running._one_layer

    def one_layer(work, source, weights, *rest):
        layers.append(weights[0].layer)
        if layers == [0, 1]:
            raise KeyboardInterrupt
        return real(work, source, weights, *rest)

    monkeypatch.setattr(running, "_one_layer", one_layer)
    with pytest.raises(KeyboardInterrupt):
        calibrated(folder, tmp_path / "ms")
    calibrated(folder, tmp_path / "ms")
    assert layers == [0, 1, 1, 2]
    layers[:] = [None]
    chosen = Calibration(str(folder.parent / "text.txt"), str(folder), str(tmp_path / "other"))
    with open_checkpoint(str(folder)) as source:
        for bits in (4, 8):  # of another recipe nothing is taken up
            chosen.make(source, dims_from_hf_config(folder), Recipe(bits, 64, chosen=chosen))
            chosen.close(False)
    assert layers == [None, 0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("flags, said", [
    (["--calibrate", "text.txt"], "--calibrate: means nothing without --quantize"),
    (["--quantize", "int4", "--calibration_tokens", "9"], "--calibration_tokens: means nothing without --calibrate"),
    (["--quantize", "int4", "--calibrate", "nothing.txt"], "nothing.txt: cannot be read: No such file"),
    (["--quantize", "int4", "--calibrate", "short.txt", "--calibration_tokens", "-1"],
     "--calibration_tokens: -1 tokens are too few to calibrate with: it takes at least 64. 4096 are usual."),
    (["--quantize", "int4", "--calibrate", "/dev/zero"], "/dev/zero: has more than 268435456 bytes. Give a part"),
    (["--quantize", "int4", "--calibrate", "short.txt"],
     "short.txt: 5 tokens are too few to calibrate with: it takes at least 64"),
    (["--quantize", "int4", "--calibrate", "latin.txt"], "latin.txt:1: is not UTF-8 at byte 3"),
])
def test_a_mistake_with_the_text_is_one_line(tiny, tmp_path, module_dir, flags, said):
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    done = run_script(module_dir, "convert_weight.py", "--torch_ckpt_dir", tiny[0], "--mindspore_ckpt_path", "ms",
                      *flags, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert sorted(os.listdir(tmp_path)) == ["latin.txt", "short.txt"]


@pytest.mark.parametrize("text", [TEXT * 9, "z" * 9000, " " * 9000, "é" * 3000, "zz" * 40])
def test_the_first_tokens_of_a_text_are_those_of_the_whole(tiny, text):
    tokenizer = Qwen2Tokenizer.from_pretrained(tiny[0])
    for count in (64, 500, 4096):
        assert _first_ids(tokenizer, text, count) == tokenizer.encode(text)[:count]


def test_a_dry_run_says_what_calibrating_needs_and_writes_nothing(tiny, tmp_path, module_dir):
    done = run_script(module_dir, "convert_weight.py", "--torch_ckpt_dir", tiny[0], "--mindspore_ckpt_path",
                      tmp_path / "ms", "--quantize", "int4", "--calibrate", tiny[0].parent / "text.txt", "--dry_run")
    assert done.returncode == 0 and "calibrates with 1536 tokens of" in done.stderr
    assert "MB of memory" in done.stdout and not os.listdir(tmp_path)
