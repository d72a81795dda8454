"""Hundreds of damaged quantised checkpoints: each is refused in one line that names it, or is still whole."""

from __future__ import annotations

import copy
import json
import random
import shutil
import struct

import convert_reversed
import convert_weight
import numpy as np
import pytest
from checkpoint_fixtures import LIBRARY_DTYPES, read_contents, write_safetensors
from quantised_fixtures import Form, write_quantised
from qwen15.checkpoint.tensors import itemsize
from qwen15.errors import run_main

FORMS = {
    "gptq-4": Form(sym=False),
    "gptq-4-desc_act": Form(sym=False, desc_act=True),
    "gptq-8-v2": Form(bits=8, sym=False, version=2),
    "awq": Form("awq", sym=False),
    "compressed-4": Form("compressed-tensors", sym=False),
    "compressed-8-g_idx": Form("compressed-tensors", bits=8, desc_act=True),
    "stored": Form(sym=False, desc_act=True),
}
"""How the sources are quantised; `stored` is converted first, and its result is damaged."""
CASES = 300
HEADER_BYTES = 8


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """name -> a whole checkpoint."""
    root = tmp_path_factory.mktemp("sources")
    for name, form in FORMS.items():
        write_quantised(root / name, form)
    assert run_main(convert_weight.main, ["--torch_ckpt_dir", str(root / "stored"), "--mindspore_ckpt_path",
                                          str(root / "made")]) == 0
    shutil.rmtree(root / "stored")
    (root / "made").rename(root / "stored")
    return root


# ---- the damage: each function changes a folder, and says what a message must name; '' where it may go unnoticed ----

def parts_of(contents) -> list:
    """The tensors that make up quantised matrices."""
    ends = ("qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_zero_point",
            "weight_shape", "weight_g_idx", "_scale", "_zero", "_order")
    return sorted(name for name, (dtype, _, _) in contents.items() if name.endswith(ends) or dtype in ("I8", "U8"))


def base_of(name: str) -> str:
    """The matrix that a part belongs to."""
    return name.rpartition(".")[0]


def flip_bits(folder, rng) -> str:
    """One to eight bits anywhere in the file, half of the times in its header."""
    path = folder / "model.safetensors"
    octets = bytearray(path.read_bytes())
    header = HEADER_BYTES + struct.unpack("<Q", octets[:HEADER_BYTES])[0]
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(header if rng.random() < 0.5 else len(octets))
        octets[at] ^= 1 << rng.randrange(8)
    path.write_bytes(octets)
    return ""


def truncate(folder, rng) -> str:
    """The file ends too early."""
    path = folder / "model.safetensors"
    octets = path.read_bytes()
    path.write_bytes(octets[:rng.randrange(len(octets))])
    return "model.safetensors"


def drop(folder, rng) -> str:
    """A tensor is missing."""
    path = folder / "model.safetensors"
    contents = read_contents(path)
    name = rng.choice(parts_of(contents))
    del contents[name]
    write_safetensors(path, contents)
    ordered = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"].get("desc_act")
    # Of the stored form nothing says which matrices have an order or zero points; without desc_act g_idx says nothing.
    optional = name.endswith(("_order", "_zero", "weight_shape")) or name.endswith(".g_idx") and not ordered
    return "" if optional else base_of(name)


def reshape(folder, rng) -> str:
    """A tensor has another shape: a row more or less, or its axes in the other order."""
    path = folder / "model.safetensors"
    contents = read_contents(path)
    name = rng.choice(parts_of(contents))
    dtype, shape, data = contents[name]
    row = len(data) // shape[0]
    kind = rng.choice(("longer", "shorter", "flat"))
    if kind == "longer":
        changed = (shape[0] + 1, *shape[1:]), data + data[:row]
    elif kind == "shorter":
        changed = (shape[0] - 1, *shape[1:]), data[:-row]
    else:
        changed = (shape[0] * (shape[1] if len(shape) > 1 else 1), 1), data
    contents[name] = (dtype, *changed)
    write_safetensors(path, contents)
    return base_of(name)


def retype(folder, rng) -> str:
    """A tensor has another dtype, and the same shape."""
    path = folder / "model.safetensors"
    contents = read_contents(path)
    name = rng.choice(parts_of(contents))
    dtype, shape, _ = contents[name]
    floats = ("F16", "BF16", "F32")
    other = rng.choice([kind for kind in LIBRARY_DTYPES
                        if kind != dtype and not (kind in floats and dtype in floats)])
    contents[name] = other, shape, bytes(int(np.prod(shape)) * itemsize(other))
    write_safetensors(path, contents)
    return base_of(name)


def unset(folder, rng) -> str:
    """A setting of the quantisation is missing, or says something that makes no sense."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    where = config["quantization_config"]
    for key in ("config_groups", "group_0", "weights"):
        where = where[key] if rng.random() < 0.7 and isinstance(where.get(key), dict) else where
    key = rng.choice(sorted(where))
    absurd = [None, -1, 0, 3, 7, 10 ** 30, 0.5, "", "four", [], {}, [4], True, {"bits": 4}, "NaN"]
    if rng.random() < 0.3:
        del where[key]
    else:
        where[key] = copy.deepcopy(rng.choice(absurd))
    path.write_text(json.dumps(config), encoding="utf-8")
    return ""


def garble(folder, rng) -> str:
    """Bits of config.json."""
    path = folder / "config.json"
    octets = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 3)):
        octets[rng.randrange(len(octets))] ^= 1 << rng.randrange(8)
    path.write_bytes(octets)
    return ""


DAMAGE = (flip_bits, truncate, drop, reshape, retype, unset, garble)


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage_is_one_line_or_harmless(damage, sources, tmp_path, capsys):
    rng = random.Random(damage.__name__)
    refused, count = 0, -(-CASES // len(DAMAGE))
    for case in range(count):
        name = rng.choice(sorted(FORMS))
        folder, target = tmp_path / f"{case}", tmp_path / f"{case}-made"
        shutil.copytree(sources / name, folder)
        named = damage(folder, rng)
        main, flags = (convert_weight.main, ("--torch_ckpt_dir", "--mindspore_ckpt_path")) if name != "stored" else \
            (convert_reversed.main, ("--mindspore_ckpt_path", "--torch_ckpt_path"))
        more = ["--dequantize"] if name == "stored" and rng.random() < 0.5 else []
        code = run_main(main, [flags[0], str(folder), flags[1], str(target), *more])
        said = capsys.readouterr().err
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        story = f"{name}, case {case}: exit code {code}, {said}"
        assert "unexpected; run again" not in said and "Traceback" not in said, story
        assert (code, len(errors), target.exists()) in ((0, 0, True), (1, 1, False), (2, 1, False)), story
        assert code or not named, f"nobody noticed {named}: {story}"
        assert not code or named in errors[0], story
        refused += bool(code)
        shutil.rmtree(folder)
        shutil.rmtree(target, ignore_errors=True)
    assert refused, "no damage was noticed at all"
