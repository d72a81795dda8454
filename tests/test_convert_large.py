"""Checkpoints of more bytes than 32-bit lengths, and of more than the memory: minutes and gigabytes of disk each."""

import dataclasses
import os
import shutil

import numpy as np
import pytest
from checkpoint_fixtures import peak_of, run_script, write_sparse
from qwen15 import naming
from qwen15.checkpoint.reader import open_checkpoint
from qwen15.family import FAMILY

pytestmark = pytest.mark.slow


def layers_of(size, layers):
    """A family member with another number of layers."""
    return dataclasses.replace(FAMILY[size], num_layers=layers)


def bytes_of(sizes):
    """All weights in bfloat16."""
    return sum(2 * int(np.prod(weight.shape)) for weight in naming.weights(sizes))


@pytest.fixture
def room(tmp_path):
    """A folder that is emptied at once when the test has ended, well or not; skips where there is too little disk."""
    def need(nbytes):
        if shutil.disk_usage(tmp_path).free < nbytes:
            pytest.skip(f"wants {nbytes / 1e9:.0f} GB of disk")
        return tmp_path
    yield need
    shutil.rmtree(tmp_path, ignore_errors=True)


def test_mindspore_loads_a_ckpt_of_more_than_2_gb(room, module_dir):
    """A protobuf message ends at 2 GiB, and MindSpore reads a tensor of more than 512 MiB in several entries."""
    mindspore = pytest.importorskip("mindspore")
    sizes = layers_of("1.8B", 12)
    nbytes = bytes_of(sizes)
    assert nbytes > 2 ** 31
    folder = room(nbytes + 10 ** 9)
    write_sparse(folder / "hf", sizes, marked=True)
    done = run_script(module_dir, "convert_weight.py", "--torch_ckpt_dir", folder / "hf", "--mindspore_ckpt_path",
                      folder / "x.ckpt")
    assert done.returncode == 0, done.stderr
    assert os.path.getsize(folder / "x.ckpt") > 2 ** 31
    loaded = mindspore.load_checkpoint(str(folder / "x.ckpt"))
    with open_checkpoint(folder / "hf") as source:
        weights = list(naming.weights(sizes))
        assert len(loaded) == len(weights) and max(source.infos[w.hf].nbytes for w in weights) > 512 * 2 ** 20
        for weight in weights:
            found = loaded.pop(weight.ms)
            assert (found.dtype, tuple(found.shape)) == (mindspore.bfloat16, weight.shape)
            assert np.array_equal(np.frombuffer(found.get_bytes(), np.uint16),
                                  source.read(weight.hf).reshape(-1)), weight.ms


@pytest.mark.parametrize("flags", [["x.ckpt"], ["ranks", "--model_parallel", "4", "--vocab_emb_dp", "False"]],
                         ids=["ckpt", "slices"])
def test_12_gb_are_converted_in_the_memory_of_a_small_model(room, module_dir, flags):
    """Qwen1.5-7B with 24 layers. The source is a sparse file with random bits at both ends of every tensor; the result
    is real, and `--verify` compares all of it."""
    sizes = layers_of("7B", 24)
    nbytes = bytes_of(sizes)
    largest = max(2 * int(np.prod(weight.shape)) for weight in naming.weights(sizes))
    assert nbytes > 12e9
    folder = room(nbytes + 2 * 10 ** 9)
    write_sparse(folder / "hf", sizes, marked=True)
    peak = peak_of(module_dir, "convert_weight.py", "--torch_ckpt_dir", folder / "hf", "--mindspore_ckpt_path",
                   folder / flags[0], "--verify",
                   *flags[1:])
    print(f"{nbytes / 1e9:.2f} GB converted and compared, largest tensor {largest / 1e6:.0f} MB, peak memory "
          f"{peak / 1e6:.0f} MB")
    assert peak < 150e6 < 2 * largest + 300e6
