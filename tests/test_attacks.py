"""Faults at random places: processes killed, disks full, bits flipped. Each ends in the right result or one clear line.

Some cases of each run by default; the slow ones are as many as docs/reliability.md states.
"""

import functools
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from attack_worker import attack
from checkpoint_fixtures import dims, model_contents, write_model
from command_fixtures import make_random
from conftest import MODULE, require
from quantised_fixtures import Form, write_quantised
from qwen15 import naming
from qwen15.checkpoint.quantised import SCALE, dequantise
from qwen15.text.bpe import byte_alphabet

SIZES = dims(hidden=128, intermediate=384, layers=3, heads=8, kv_heads=4, head_dim=16, vocab=4000)
SEED = int(os.environ.get("QWEN15_ATTACK_SEED", "20"))


def cases(some, all_of_them):
    """So many by default, so many in the slow tests."""
    return pytest.mark.parametrize("count", [some, pytest.param(all_of_them, marks=[
        pytest.mark.slow, pytest.mark.timeout(3600)])])


@pytest.fixture(scope="module")
def worker():
    return attack


@pytest.fixture(scope="module")
def workers():
    """By kind of work: calibrating runs the layers, so MindSpore is there before the first case."""
    require("mindspore")
    calibrating = functools.partial(attack, server="attack_worker.warm_up_mindspore")
    return {kind: calibrating if kind == "calibrate" else attack for kind in WORK}


def tree(path):
    """Contents of a file or of all files of a folder, by name; None where nothing is."""
    if not path.exists():
        return None
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def one_clear_line(done, codes):
    """The message of a run that has failed as it should."""
    lines = [line for line in done["err"].splitlines() if line.startswith("error: ")]
    assert done["code"] in codes and len(lines) == 1, done
    assert "Traceback" not in done["err"] and "(unexpected;" not in lines[0], done["err"]
    assert len(lines[0]) <= 600 and not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lines[0]), lines[0]
    return lines[0]


# -- kill -9 ----------------------------------------------------------------------------------------------------------

WORK = {
    "convert to a file": ("convert_weight.py", "m.safetensors", ["--torch_ckpt_dir", "{hf}", "--mindspore_ckpt_path"]),
    "convert to .ckpt": ("convert_weight.py", "m.ckpt", ["--torch_ckpt_dir", "{hf}", "--mindspore_ckpt_path"]),
    "slice": ("convert_weight.py", "m", ["--torch_ckpt_dir", "{hf}", "--model_parallel", "2", "--mindspore_ckpt_path"]),
    "quantise": ("convert_weight.py", "m", ["--torch_ckpt_dir", "{hf}", "--quantize", "int8", "--format", "folder",
                                            "--max_shard_size", "1MB", "--mindspore_ckpt_path"]),
    "calibrate": ("convert_weight.py", "m", ["--torch_ckpt_dir", "{hf}", "--quantize", "int4", "--format", "folder",
                                             "--calibrate", "{text}", "--mindspore_ckpt_path"]),
    "reverse": ("convert_reversed.py", "m", ["--mindspore_ckpt_path", "{ms}", "--torch_ckpt_path"]),
    "cut": ("transform_ckpt.py", "m", ["--src_ckpt_dir", "{ms}", "--model_parallel", "2", "--dst_ckpt_dir"]),
    "merge": ("transform_ckpt.py", "m.safetensors", ["--src_ckpt_dir", "{slices}", "--dst_ckpt_dir"]),
}


def usual_weights():
    """Weights of a size that can be quantised, in bfloat16."""
    rng = np.random.default_rng(0)
    made = {}
    for weight in naming.weights(SIZES):
        values = rng.standard_normal(weight.shape).astype(np.float32) * 0.05 + ("norm" in weight.hf)
        made[weight.hf] = ("BF16", weight.shape, (values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    return made


@pytest.fixture(scope="module")
def models(tmp_path_factory, worker):
    """A Hugging Face folder, converted and sliced."""
    folder = tmp_path_factory.mktemp("attacks")
    write_model(folder / "hf", SIZES, usual_weights())
    write_bytes_tokenizer(folder / "hf")
    (folder / "text.txt").write_text(" ".join(f"{number * number} is the square of {number}." for number in range(70)))
    for name, more in (("ms/model.safetensors", []), ("slices", ["--model_parallel", "2"])):
        done = worker("convert_weight.py", "--torch_ckpt_dir", folder / "hf", "--mindspore_ckpt_path", folder / name,
                      *more)
        assert done["code"] == 0, done["err"]
    return {name.split(".")[0]: folder / name for name in ("hf", "ms", "slices", "text.txt")}


def write_bytes_tokenizer(folder):
    """A tokenizer whose tokens are the bytes, and one pair."""
    (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate([*byte_alphabet(), "zz"])}),
                                       encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\nz z\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer", "eos_token": null, '
                                                  '"pad_token": null, "unk_token": null}')


@pytest.fixture(scope="module")
def known(models, workers, tmp_path_factory):
    """Of each kind of work: its command for a target, its undisturbed result, and how long it takes."""
    folder = tmp_path_factory.mktemp("known")

    def one(kind):
        script, name, flags = WORK[kind]
        flags = [flag.format(**models) for flag in flags]
        target = folder / kind.replace(" ", "_") / name
        target.parent.mkdir()
        done = workers[kind](script, *flags, target)
        assert done["code"] == 0, done["err"]
        return (script, *flags), name, tree(target), done["seconds"]

    return {kind: one(kind) for kind in WORK}


@cases(1, 34)
@pytest.mark.parametrize("kind", WORK)
def test_a_killed_conversion_leaves_a_whole_result_or_none_and_the_same_command_finishes_it(kind, count, known, workers,
                                                                                              models, tmp_path):
    command, name, expected, seconds = known[kind]
    worker = workers[kind]
    rng = random.Random(f"{SEED} {kind}")
    before = tree(models["hf"].parent)
    for number in range(count):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
        done = worker(*command, folder / name, kill_after_s=rng.uniform(0, 1.1 * seconds))
        assert done["killed"] or done["code"] == 0, done
        assert tree(folder / name) in ((None, expected) if done["killed"] else (expected,)), done
        if tree(folder / name) is None:
            again = worker(*command, folder / name)
            assert again["code"] == 0 and tree(folder / name) == expected, again["err"]
        assert sorted(path.name for path in folder.iterdir() if "partial" in path.name) == []
        assert (folder / "notes.txt").read_text() == "mine"
        shutil.rmtree(folder)
    assert tree(models["hf"].parent) == before


@cases(4, 200)
def test_a_killed_save_leaves_the_old_file_the_new_one_or_none(count, worker, tmp_path):
    rng = random.Random(SEED)
    size = 4_000_000
    seconds = worker("save", tmp_path / "first.json", size)["seconds"]
    for number in range(count):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = folder / "chat.json"
        worker("save", path, size, kill_after_s=rng.uniform(0, 1.1 * seconds))
        if path.exists():
            assert json.loads(path.read_text())["messages"][0]["content"] in ("x" * size, "y" * size)
            path.unlink()
        assert worker("save", path, 5)["code"] == 0
        assert [entry.name for entry in folder.iterdir()] == ["chat.json"]
        shutil.rmtree(folder)


# -- full disks -------------------------------------------------------------------------------------------------------

@pytest.fixture
def disk(tmp_path):
    """`disk(KiB)`: a folder on a file system of that size, which grows when it is called again."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def sized(kib):
        options = f"{'remount,' if mounted else ''}size={kib}k"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip("mounting a small file system needs root")
        mounted[:] = [folder]
        return folder

    yield sized
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@cases(1, 9)
@pytest.mark.parametrize("kind", WORK)
def test_a_full_disk_is_one_line_and_with_more_room_the_same_command_finishes(kind, count, known, workers, disk):
    command, name, expected, _ = known[kind]
    worker = workers[kind]
    rng = random.Random(f"{SEED} {kind}")
    whole = disk(2 ** 20)
    assert worker(*command, whole / name)["code"] == 0
    used = subprocess.run(["du", "-sk", str(whole)], capture_output=True, text=True, check=True)
    most_kib = int(used.stdout.split()[0])
    for number in range(count):
        for path in whole.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        kib = rng.randrange(8, most_kib - 4)
        folder = disk(kib)
        done = worker(*command, folder / name, hide_full_disk=number % 2 == 0)
        line = one_clear_line(done, (1, 2))
        assert "space" in line or "room" in line or "free" in line, line
        assert tree(folder / name) is None, f"{kib} KiB: a target that is not whole"
        disk(2 ** 20)
        assert worker(*command, folder / name)["code"] == 0 and tree(folder / name) == expected


# -- flipped bits -----------------------------------------------------------------------------------------------------

FLIPPED = dims(hidden=32, intermediate=48, layers=2, heads=4, kv_heads=2, head_dim=8, vocab=60)
IN_INTEGERS = dims(hidden=64, intermediate=96, layers=1, heads=2, kv_heads=1, head_dim=32, vocab=64)
LAYOUTS = {"gptq": Form(group=32), "awq": Form("awq", sym=False, group=32),
           "compressed-tensors": Form("compressed-tensors", group=32)}
FROM_HF, TO_HF = ("convert_weight.py", "--torch_ckpt_dir", "--mindspore_ckpt_path"), ("convert_reversed.py",
                                                                                      "--mindspore_ckpt_path",
                                                                                      "--torch_ckpt_path")


@pytest.fixture(scope="module")
def sources(tmp_path_factory, worker):
    """A model in each format: (folder, weight file, what a converter is given, how it is called)."""
    folder = tmp_path_factory.mktemp("flipped")

    def convert(command, source, target, *flags):
        (folder / target).parent.mkdir()
        done = worker(command[0], command[1], folder / source, command[2], folder / target, *flags)
        return done["code"] == 0

    write_model(folder / "safetensors", FLIPPED, model_contents(FLIPPED, "F32"), torch_dtype="float32")
    made = {"safetensors": (folder / "safetensors", "model.safetensors", FROM_HF)}
    assert convert(FROM_HF, "safetensors", "ckpt/model.ckpt")
    made["ckpt"] = (folder / "ckpt", "model.ckpt", TO_HF)
    if convert(TO_HF, "ckpt/model.ckpt", "bin/pytorch_model.bin"):
        made["bin"] = (folder / "bin", "pytorch_model.bin", FROM_HF)
    for name, form in LAYOUTS.items():
        write_quantised(folder / name, form, IN_INTEGERS)
        made[name] = (folder / name, "model.safetensors", FROM_HF)
    assert convert(FROM_HF, "gptq", "own/model.safetensors")
    (folder / "own" / "source_layout.json").unlink()  # so that going back is to say what the integers mean
    made["own"] = (folder / "own", "model.safetensors", TO_HF)
    (folder / "gguf").mkdir()
    if write_gguf(folder / "gguf" / "model.gguf"):
        made["gguf"] = (folder / "gguf", "model.gguf", FROM_HF)
    return made


def write_gguf(path):
    """A file with metadata of every type, in blocks of 32; False where the package gguf is not."""
    try:
        import gguf
    except ImportError:
        return False
    writer = gguf.GGUFWriter(str(path), "qwen2")
    for name, value in {"block_count": 1, "context_length": 64, "embedding_length": 64, "feed_forward_length": 96,
                        "attention.head_count": 2, "attention.head_count_kv": 1}.items():
        writer.add_uint32(f"qwen2.{name}", value)
    writer.add_float32("qwen2.rope.freq_base", 1e6)
    writer.add_float32("qwen2.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_bool("general.odd", True)
    writer.add_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(64)])
    writer.add_array("tokenizer.ggml.token_type", [1] * 64)
    writer.add_array("tokenizer.ggml.scores", [0.5] * 64)
    rng = np.random.default_rng(0)
    for weight in naming.weights(IN_INTEGERS):
        values = rng.standard_normal(weight.shape).astype(np.float32)
        if values.ndim == 1:
            writer.add_tensor(gguf_name(weight.hf), values)
            continue
        kind = gguf.GGMLQuantizationType.Q4_0 if "mlp" in weight.hf else gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(gguf_name(weight.hf), gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return True


def gguf_name(name):
    """llama.cpp's name of a weight."""
    for theirs, ours in (("model.layers", "blk"), ("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"),
                         ("lm_head", "output"), ("input_layernorm", "attn_norm"), ("self_attn.q_proj", "attn_q"),
                         ("self_attn.k_proj", "attn_k"), ("self_attn.v_proj", "attn_v"),
                         ("self_attn.o_proj", "attn_output"), ("post_attention_layernorm", "ffn_norm"),
                         ("mlp.gate_proj", "ffn_gate"), ("mlp.up_proj", "ffn_up"), ("mlp.down_proj", "ffn_down")):
        name = name.replace(theirs, ours)
    return name


def read_by_others(kind, path):
    """Arrays by name, as the format's own library reads them."""
    if kind == "ckpt":
        mindspore = pytest.importorskip("mindspore")
        return {name: value.asnumpy() for name, value in mindspore.load_checkpoint(str(path)).items()}
    if kind == "bin":
        torch = pytest.importorskip("torch")
        return {name: tensor.numpy() for name, tensor in torch.load(path, weights_only=True).items()}
    if kind == "gguf":
        import gguf

        return {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
                for tensor in gguf.GGUFReader(path).tensors}
    from safetensors.numpy import load_file

    return load_file(path)


def same_bytes(found, expected):
    """Whether the arrays' bytes are the same, whatever their names are."""
    return sorted(array.tobytes() for array in found.values()) == sorted(array.tobytes() for array in expected.values())


def same_meaning(found, expected):
    """Whether two sets of float32 arrays say the same, names included."""
    return found.keys() == expected.keys() and all(np.array_equal(found[name], expected[name], equal_nan=True)
                                                   for name in found)


def meanings(arrays, names):
    """float32 array of every weight of a checkpoint in our stored form, under other names."""
    with np.errstate(invalid="ignore", over="ignore"):
        return {names[name]: dequantise(array, arrays[name + SCALE], scale_dtype(arrays[name + SCALE]))
                if name + SCALE in arrays else array.astype(np.float32)
                for name, array in arrays.items() if name in names}


def scale_dtype(scale):
    return {np.dtype(np.float16): "F16", np.dtype(np.float32): "F32"}[scale.dtype]


MS_TO_HF = {weight.ms: weight.hf for weight in naming.weights(IN_INTEGERS)}


def arrived(kind, result, damaged, worker, folder):
    """Whether a conversion's result says what is in the damaged file."""
    found, given = read_by_others("safetensors", result), read_by_others(kind, damaged)
    if kind == "gguf":
        return same_meaning({gguf_name(name): array for name, array in meanings(found, MS_TO_HF).items()}, given)
    if kind == "own":
        return same_meaning({name: array.astype(np.float32) for name, array in found.items()},
                            meanings(given, MS_TO_HF))
    if kind in LAYOUTS:
        back = folder / "back.safetensors"
        done = worker(TO_HF[0], TO_HF[1], result, TO_HF[2], back)
        assert done["code"] == 0, done["err"]
        found = read_by_others("safetensors", back)
        back.unlink()
    return same_bytes(found, given)


@cases(12, 1000)
@pytest.mark.parametrize("kind", ["safetensors", "ckpt", "bin", "gguf", *LAYOUTS, "own"])
def test_a_flipped_bit_is_refused_in_one_line_or_arrives_as_it_is(kind, count, sources, worker, tmp_path):
    if kind not in sources:
        pytest.skip("no torch, or no gguf: their files need them")
    folder, name, command = sources[kind]
    rng = random.Random(f"{SEED} {kind}")
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    whole = (folder / name).read_bytes()
    given = damaged if command is FROM_HF and kind != "gguf" else damaged / name
    flags = ["--dtype", "float32"] if kind == "own" else []
    headers = [found.start() for found in re.finditer(rb"model\.|PK|GGUF|qwen2\.|tokenizer\.|blk\.", whole)]
    undamaged, taken = read_by_others(kind, folder / name), 0
    for number in range(count):
        # Half of them about names and lengths, which is where a reader can be led astray.
        near = min(len(whole) - 1, max(0, rng.choice(headers) + rng.randrange(-40, 60)))
        place = near if number % 2 else rng.randrange(len(whole))
        data = bytearray(whole)
        data[place] ^= 1 << rng.randrange(8)
        (damaged / name).write_bytes(data)
        result = tmp_path / f"{number}.safetensors"
        done = worker(command[0], command[1], given, command[2], result, *flags, limit_s=20)
        if done["code"]:
            one_clear_line(done, (1, 2))
            assert not result.exists()
            continue
        taken += 1
        # A flip in what no reader needs is borne; one among the numbers arrives as it is, where nothing tells it.
        assert (same_bytes(read_by_others("safetensors", result), undamaged)
                or arrived(kind, result, damaged / name, worker, tmp_path)), f"byte {place}"
        result.unlink()
    assert 0 < taken < count


# -- many prompts -----------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_prompts_killed_twice_are_answered_once_each(small_model, tmp_path):
    pytest.importorskip("mindspore")
    config = make_random(tmp_path, small_model)
    prompts, answers = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    rng = np.random.default_rng(0)
    words = "time water light stone river north bird song".split()
    prompts.write_text("\n".join(f"{number} " + " ".join(rng.choice(words, rng.integers(1, 12)))
                                 for number in range(10_000)) + "\n")
    command = [sys.executable, "run_qwen1_5.py", "--device_target", "CPU", "--config", str(config), "--predict_file",
               str(prompts), "--output_file", str(answers), "--max_new_tokens", "1", "--max_batch", "64"]
    for lines in (100, 4000):
        process = subprocess.Popen(command, cwd=MODULE, stderr=subprocess.DEVNULL)
        while process.poll() is None and (not answers.exists() or answers.read_bytes().count(b"\n") < lines):
            try:
                process.wait(0.2)
            except subprocess.TimeoutExpired:
                pass
        process.kill()
        process.wait()
    done = subprocess.run(command, cwd=MODULE, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in answers.read_text().splitlines()]
    assert sorted(entry["index"] for entry in found) == list(range(10_000))
    asked = prompts.read_text().splitlines()
    assert all(entry["prompt"] == asked[entry["index"]] and len(entry["token_ids"]) == 1 for entry in found)
