"""The adapter to MindFormers refuses what it cannot run before anything heavy happens, and the check says when there
is no card."""

import functools
import os
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import require
from qwen15 import device
from qwen15.ascend import check
from qwen15.config.load import load_config
from qwen15.errors import UserError
from qwen15.generation import memory_check
from qwen15.generation.engine import non_finite_error
from qwen15.network import mindformers


@pytest.fixture
def config(module_dir):
    def load(*options):
        return load_config(str(module_dir / "predict_qwen1_5_14b.yaml"),
                           options=["context.device_target=Ascend", *options])
    return load


@pytest.mark.parametrize("options, key", (
    (["model.model_config.qkv_concat=True"], "qkv_concat"), (["model.model_config.is_dynamic=False"], "is_dynamic"),
    (["model.model_config.compute_dtype=float32"], "compute_dtype"),
    (["model.model_config.rotary_dtype=float32"], "rotary_dtype")))
def test_what_ascend_cannot_do_is_named_with_its_fix(config, options, key):
    with pytest.raises(UserError) as caught:
        mindformers.check(config(*options).model, "Ascend")
    assert caught.value.where == f"model.model_config.{key}" and f"Set {key}" in caught.value.fix


def test_no_card_is_one_line(config):
    with pytest.raises(UserError, match="no card"):
        mindformers.MindFormersNetwork(config(), "nowhere", print)


def test_saving_the_strategy_is_refused(config):
    with pytest.raises(UserError, match="saves no strategy"):
        mindformers.mindformers_config(config("only_save_strategy=True"))


@pytest.mark.version
@pytest.mark.parametrize("option, key", (("parallel.parallel_mode=0", "parallel_mode"), ("context.mode=1", "mode 1")))
def test_modes_that_cannot_cut_the_weights_are_refused(config, tmp_path, monkeypatch, option, key):
    monkeypatch.setenv("LOG_MF_PATH", str(tmp_path))
    require("mindformers")
    with pytest.raises(UserError, match=key):
        mindformers.mindformers_config(config("use_parallel=True", option))


def test_a_network_with_other_parameters_is_refused(config):
    parameter = SimpleNamespace(name="model.layers.0.attention.w_qkv.weight")
    with pytest.raises(UserError, match="w_qkv"):
        mindformers.fill(SimpleNamespace(get_parameters=lambda: [parameter]), None, config(), 1, print)


def test_partly_cached_sequences_are_not_prefilled():
    network = mindformers.MindFormersNetwork.__new__(mindformers.MindFormersNetwork)
    assert not network.supports_cached_prefill
    ones = np.ones(1, np.int32)
    with pytest.raises(ValueError, match="partly in the cache"):
        network.prefill(ones, ones, ones + 1, ones[None], ones)


def test_a_full_card_is_explained():
    error = mindformers._explain(RuntimeError("Device(id:0) memory isn't enough and alloc failed, kernel name: X"))
    assert isinstance(error, UserError) and "num_blocks" in error.fix
    other = RuntimeError("something else")
    assert mindformers._explain(other) is other


def complaints(config, monkeypatch):
    """Each thing that goes wrong on the way to a card, as the user is told."""
    def fails(*arguments):
        raise RuntimeError("Device 9 is not there")

    model = config().model
    attempts = [lambda option=option: mindformers.check(config(f"model.model_config.{option}").model, "Ascend")
                for option in
                ("qkv_concat=True", "is_dynamic=False", "use_past=False", "compute_dtype=float32",
                 "rotary_dtype=float32")]
    attempts += [
        lambda: mindformers.check(replace(model, dims=replace(model.dims, head_dim=64)), "Ascend"),
        lambda: mindformers.check(replace(model, dims=replace(model.dims, head_dim=32, num_heads=160)), "Ascend"),
        lambda: device.require("Ascend"), lambda: check.main([]),
        lambda: memory_check.check(config("context.max_device_memory=20GB")),
        lambda: config("speculate=ngram"),
        lambda: mindformers.mindformers_config(config("use_parallel=True", "parallel.parallel_mode=0")),
        lambda: mindformers.mindformers_config(config("use_parallel=True", "context.mode=1"))]
    told = [str(mindformers._explain(RuntimeError("memory isn't enough"))),
            str(non_finite_error("the prompt", 3, None)), *first_contact(monkeypatch)]
    mindformers.import_mindformers()
    with monkeypatch.context() as patch:
        patch.setattr("mindformers.build_context", fails)
        attempts.append(lambda: mindformers.start(SimpleNamespace()))
        told += [_said(attempt) for attempt in attempts]
    with monkeypatch.context() as patch:
        patch.setattr(device, "require", lambda target, **_: None)
        patch.setattr(mindformers.weights, "Loader", SimpleNamespace(of=lambda *_: SimpleNamespace(schemes={})))
        for found in ((0, 2), (3, 4)):
            patch.setattr(mindformers, "start", lambda settings, found=found: found)
            told.append(_said(lambda: mindformers.MindFormersNetwork(
                config("use_parallel=True", "parallel_config.model_parallel=4"), "nowhere", print)))
    return told


def first_contact(monkeypatch):
    """What is said of a card that is there, and that something keeps from being used."""
    told = []
    with monkeypatch.context() as patch:
        patch.setattr(device, "find_ascend", lambda *_: device.Ascend(("/dev/davinci0",), "/cann", "plugin", None))
        for fault in (device._library_fault("libge_runner.so: cannot open shared object file: No such file", "/cann"),
                      device._library_fault("/lib/libmindspore_ascend.so.2: undefined symbol: aclrtX", "/cann"),
                      "card 0 does not answer (aclrtSetDevice: error 507899)", "card 0 has not answered within 60 s",
                      "there is no card 5 (--device_id, DEVICE_ID): this machine has 1, numbered from 0"):
            patch.setattr(device, "ask", lambda *_, fault=fault, **__: device.CardAnswer(fault))
            told += [_said(lambda: device.require("Ascend")), _said(lambda: check.main([]))]
        patch.setattr(device, "folder_of", lambda package: "/mindspore")
        patch.setattr(device, "foreign_libraries", functools.partial(device.foreign_libraries, machine="aarch64"))
        patch.setattr(device.glob, "glob", lambda pattern: [pattern])
        patch.setattr(device, "elf_machine", lambda path: "x86_64")
        told.append(_said(lambda: device.resolve("auto")))
    return told


def _said(attempt) -> str:
    with pytest.raises(UserError) as caught:
        attempt()
    return str(caught.value)


@pytest.mark.version
def test_the_docs_quote_what_is_said_and_leave_nothing_out(config, module_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("LOG_MF_PATH", str(tmp_path))
    require("mindformers")
    told = complaints(config, monkeypatch)
    page = (module_dir.parent.parent / "docs" / "tables" / "ascend_messages.md").read_text(encoding="utf-8")
    rows = page[page.index("| 信息 message |"):].splitlines()[2:]
    quoted = [quote for row in rows for quote in re.findall(r"`(.*?)`", row.split("|")[1])]
    patterns = [re.compile(".*".join(map(re.escape, quote.split("...")))) for quote in quoted]
    assert [pattern.pattern for pattern in patterns if not any(map(pattern.search, told))] == []
    assert [line for line in told if not any(pattern.search(line) for pattern in patterns)] == []


RANK = """
import sys
import numpy as np
import mindspore as ms
from qwen15.network.mindformers import MindFormersNetwork
ms.set_device("CPU")
ms.set_context(mode=ms.GRAPH_MODE)
ms.communication.init()
rank = ms.communication.get_rank()
network = MindFormersNetwork.__new__(MindFormersNetwork)
network.rank, network.ranks = rank, ms.communication.get_group_size()
with open(f"{sys.argv[1]}/{rank}", "w") as file:
    file.write(str(network.agree(np.asarray([7, 8, 9], np.int32) + 10 * rank).tolist()))
"""


@pytest.mark.version
def test_every_rank_learns_the_token_of_rank_0(module_dir, tmp_path):
    """In graph mode, as on Ascend, where the same call goes through HCCL."""
    require("mindspore")
    (tmp_path / "rank.py").write_text(RANK, encoding="utf-8")
    result = subprocess.run([sys.executable, "-m", "qwen15.launch",
                             f"{sys.executable} {tmp_path / 'rank.py'} {tmp_path}", "2"],
                            cwd=tmp_path, capture_output=True, text=True, timeout=120,
                            env={**os.environ, "PYTHONPATH": str(module_dir)})
    assert result.returncode == 0, result.stderr[-2000:]
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["[7, 8, 9]"] * 2


def test_check_without_a_card_says_so(module_dir):
    result = subprocess.run([sys.executable, "-m", "qwen15", "ascend-check"], cwd=module_dir, capture_output=True,
                            text=True, timeout=60)
    assert result.returncode == 2
    assert "no card" in result.stderr and "Traceback" not in result.stderr and not result.stdout
