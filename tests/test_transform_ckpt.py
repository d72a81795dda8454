"""Splitting, merging and cutting anew: the same slices as MindSpore's own tool makes, and the same bits back."""

import os
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from checkpoint_fixtures import (
    as_array,
    dims,
    model_contents,
    read_contents,
    run_script,
    under_ms_names,
    write_config,
    write_model,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qwen15 import naming
from qwen15.checkpoint import wire
from qwen15.conversion.reslice import Reslicing, plan_transform
from qwen15.conversion.run import run
from qwen15.conversion.slices import Slicing
from qwen15.conversion.strategy import Layout, layout_of, read_strategy, write_strategy
from qwen15.errors import UserError
from test_convert import models, to_mindspore
from test_tensorfile import write


def transform(source, target, **request):
    """Plan, run with verification, and close."""
    plan = plan_transform(Reslicing(source=str(source), target=str(target), **request))
    try:
        return run(plan, verify=True)
    finally:
        plan.close()


def ranks_of(folder):
    """Every rank's tensors."""
    return [read_contents(folder / f"rank_{rank}") for rank in range(len(list(folder.glob("rank_*"))))]


def whole_model(folder, sizes, form="ckpt", seed=0):
    """A whole MindSpore checkpoint with its config.json; returns its contents."""
    folder.mkdir(parents=True)
    write_config(folder, sizes)
    contents = under_ms_names(model_contents(sizes, seed=seed))
    write(folder / f"whole.{form}", contents)
    return contents


@given(data=st.data(), model=models())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture,
                                                                 HealthCheck.too_slow])
def test_any_way_of_cutting_leads_to_any_other_and_back(tmp_path, data, model):
    sizes, parts = model
    shutil.rmtree(tmp_path, ignore_errors=True)
    contents = whole_model(tmp_path / "whole", sizes, data.draw(st.sampled_from(["ckpt", "safetensors"])))
    direct = {}
    fitting = [n for n in (1, 2, 3, 4, 6, 8) if naming.indivisible(sizes, n) is None]
    steps = [Slicing(data.draw(st.sampled_from(fitting)), data.draw(st.booleans())) for _ in range(2)]
    here = tmp_path / "whole"
    for i, slicing in enumerate(steps):
        target = tmp_path / f"step{i}"
        if same_cut(here, slicing):
            shutil.copytree(here, target)  # the tool refuses to do nothing
        else:
            transform(here, target, parts=slicing.parts, vocab_emb_dp=slicing.vocab_emb_dp,
                      form=data.draw(st.sampled_from([None, "ckpt", "safetensors"])))
        for weight in naming.weights(sizes):
            axis = weight.axis(slicing.parts, slicing.vocab_emb_dp)
            direct[weight.ms] = np.split(as_array(contents[weight.ms]), slicing.parts, axis) if axis is not None else \
                [as_array(contents[weight.ms])] * slicing.parts
        for rank, found in enumerate(ranks_of(target) if (target / "rank_0").exists() else [read_contents(target)]):
            assert set(found) == set(contents)
            for name, parts_of_it in direct.items():
                assert found[name][2] == parts_of_it[rank].tobytes(), (name, rank, slicing)
        here = target


def same_cut(folder, slicing):
    """Whether a folder is cut like that already."""
    ranks = list(folder.glob("rank_*"))
    if len(ranks) <= 1 or slicing.parts != len(ranks):
        return max(1, len(ranks)) == slicing.parts
    layouts = read_strategy(str(folder / "strategy"))
    if layouts[naming.EMBEDDING.ms].cuts(0) > 1:
        return not slicing.vocab_emb_dp
    return slicing.vocab_emb_dp


# ---- the independent judge: mindspore.transform_checkpoints ----

@pytest.fixture(scope="module")
def judge():
    """MindSpore, in a version whose safetensors writes strided arrays right."""
    safetensors = pytest.importorskip("safetensors")
    if tuple(map(int, safetensors.__version__.split(".")[:2])) >= (0, 8):
        pytest.skip("safetensors 0.8 writes the base memory of strided arrays: no judge of slices along the second "
                    "axis")
    return pytest.importorskip("mindspore")


def judged(mindspore, source, target, before, after):
    """What MindSpore makes of a checkpoint by its strategy files."""
    mindspore.transform_checkpoints(str(source), str(target), "checkpoint_", before and str(before),
                                    after and str(after))
    return ranks_of(target)


@pytest.mark.parametrize("vocab_emb_dp", [True, False])
@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
@pytest.mark.parametrize("tied", [True, False])
def test_slices_are_those_that_mindspore_makes(tmp_path, judge, vocab_emb_dp, form, tied):
    sizes = dims(heads=8, kv_heads=4, hidden=64, tied=tied)
    contents = whole_model(tmp_path / "w" / "rank_0", sizes, form)
    shutil.move(str(tmp_path / "w" / "rank_0" / "config.json"), str(tmp_path / "w" / "config.json"))
    transform(tmp_path / "w", tmp_path / "four", parts=4, vocab_emb_dp=vocab_emb_dp)
    transform(tmp_path / "w", tmp_path / "two", parts=2, vocab_emb_dp=not vocab_emb_dp)
    four, two = (tmp_path / name / "strategy" / "ckpt_strategy_rank_0.ckpt" for name in ("four", "two"))
    ours = ranks_of(tmp_path / "four")
    assert judged(judge, tmp_path / "w", tmp_path / "judge4", None, four) == ours                        # whole -> 4
    assert judged(judge, tmp_path / "four", tmp_path / "judge1", four, None) == [contents]               # 4 -> whole
    theirs = judged(judge, tmp_path / "four", tmp_path / "judge2", four, two)                            # 4 -> 2
    transform(tmp_path / "four", tmp_path / "ours2", parts=2, vocab_emb_dp=not vocab_emb_dp)
    assert theirs == ranks_of(tmp_path / "ours2") == ranks_of(tmp_path / "two")
    # Ours of theirs
    transform(tmp_path / "judge4", tmp_path / "back.ckpt", config_path=str(tmp_path / "w"))
    assert read_contents(tmp_path / "back.ckpt") == contents


def test_mindspore_goes_on_from_the_strategy_files(tmp_path, judge):
    whole_model(tmp_path / "w", dims())
    transform(tmp_path / "w", tmp_path / "two", parts=2)
    strategy = tmp_path / "two" / "strategy"
    assert judge.rank_list_for_transform(0, None, str(strategy / "ckpt_strategy_rank_0.ckpt")) == [0]
    assert sorted(judge.rank_list_for_transform(0, str(strategy / "ckpt_strategy_rank_0.ckpt"), None)) == [0, 1]
    files = {rank: str(tmp_path / "two" / f"rank_{rank}" / f"checkpoint_{rank}.ckpt") for rank in range(2)}
    judge.transform_checkpoint_by_rank(0, files, str(tmp_path / "whole.ckpt"),
                                       str(strategy / "ckpt_strategy_rank_0.ckpt"), None)
    assert read_contents(tmp_path / "whole.ckpt") == read_contents(tmp_path / "w")
    judge.merge_pipeline_strategys(str(strategy), str(tmp_path / "merged.ckpt"))
    merged = read_strategy(str(tmp_path / "merged.ckpt"))
    assert merged == read_strategy(str(strategy))
    transform(tmp_path / "two", tmp_path / "one.ckpt", source_strategy=str(tmp_path / "merged.ckpt"))
    assert read_contents(tmp_path / "one.ckpt") == read_contents(tmp_path / "w")


def test_mindspore_parses_the_strategy_files_as_they_are_meant():
    pytest.importorskip("mindspore")
    from mindspore.train.node_strategy_pb2 import ParallelStrategyMap
    layouts = {"a": layout_of(2, 1, 4), "b": layout_of(1, None, 4), "c": Layout((2, 2), (1, -1))}
    message = ParallelStrategyMap()
    message.ParseFromString(write_strategy(layouts))
    assert message.current_stage == 0 and len(message.parallel_strategy_item) == 1
    assert {item.param_name: (tuple(item.parallel_layouts.dev_matrix[0].dim),
                              tuple(item.parallel_layouts.tensor_map[0].dim))
            for item in message.parallel_layout_item} == {name: (layout.devices, layout.tensor_map) for name,
                                                          layout in layouts.items()}
    assert message.SerializeToString() == write_strategy(layouts)


# ---- strategies of other jobs ----

def test_a_strategy_over_two_device_axes_is_honoured(tmp_path, judge):
    """Data and tensor parallel together, a weight cut along both axes, and the counters that no strategy names."""
    sizes = dims(heads=4, kv_heads=4, hidden=32)
    contents = whole_model(tmp_path / "w" / "rank_0", sizes)
    contents["global_step"] = ("F32", (1,), np.float32(7).tobytes())
    contents["adam_m.model.layers.0.attention.wo.weight"] = contents["model.layers.0.attention.wo.weight"]
    write(tmp_path / "w" / "rank_0" / "whole.ckpt", contents)
    layouts = {weight.ms: Layout((2, 2), tuple({0: 0, 1: -1}[axis] if axis < 1 else -1
                                               for axis in range(len(weight.shape))))
               if weight.shape[0] % 2 == 0 else Layout((2, 2), (-1,) * len(weight.shape))
               for weight in naming.weights(sizes)}
    layouts["model.layers.0.feed_forward.w2.weight"] = Layout((2, 2), (1, 0))
    layouts["model.layers.1.feed_forward.w2.weight"] = Layout((2, 2), (-1, 1))
    layouts["adam_m.model.layers.0.attention.wo.weight"] = Layout((2, 2), (0, 1))
    (tmp_path / "dst.ckpt").write_bytes(write_strategy(layouts))
    transform(tmp_path / "w", tmp_path / "ours", target_strategy=str(tmp_path / "dst.ckpt"))
    ours = ranks_of(tmp_path / "ours")
    theirs = judged(judge, tmp_path / "w", tmp_path / "theirs", None, tmp_path / "dst.ckpt")
    assert ours == theirs and "global_step" in ours[3] and len(ours) == 4
    transform(tmp_path / "ours", tmp_path / "back.ckpt", source_strategy=str(tmp_path / "ours" / "strategy"))
    assert read_contents(tmp_path / "back.ckpt") == contents


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_regions_are_those_of_mindspores_own_arithmetic(data):
    pytest.importorskip("mindspore")
    from mindspore.parallel._tensor import _get_tensor_slice_index, _get_tensor_strategy
    devices = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    free = list(range(len(devices)))
    tensor_map = []
    for _ in range(2):
        along = data.draw(st.sampled_from([-1] + free))
        tensor_map.append(along)
        free = [axis for axis in free if axis != along]
    layout = Layout(tuple(devices), tuple(tensor_map))
    strategy = _get_tensor_strategy(devices, tensor_map)
    assert list(strategy) == [layout.cuts(0), layout.cuts(1)]
    for rank in range(layout.ranks):
        index = int(_get_tensor_slice_index(devices, strategy, tensor_map, rank))
        assert divmod(index, layout.cuts(1)) == (layout.index(0, rank), layout.index(1, rank))


@given(st.binary(max_size=200))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_a_strategy_or_refused(tmp_path, content):
    (tmp_path / "s.ckpt").write_bytes(content)
    with pytest.raises(UserError, match="s.ckpt"):
        read_strategy(str(tmp_path / "s.ckpt"))


@given(st.lists(st.tuples(st.integers(0, 10 ** 6), st.integers(0, 255)), min_size=1, max_size=3))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_strategy_is_read_as_what_it_is_or_refused(tmp_path, mutations):
    content = bytearray(write_strategy({"a": layout_of(2, 1, 4), "b": layout_of(1, None, 4)}))
    for at, value in mutations:
        content[at % len(content)] = value
    (tmp_path / "s.ckpt").write_bytes(content)
    try:
        for layout in read_strategy(str(tmp_path / "s.ckpt")).values():
            assert 0 < layout.ranks <= 2 ** 16
    except UserError as error:
        assert "s.ckpt" in str(error)


@pytest.mark.parametrize("number", [5, 2 ** 40, 2 ** 63])
def test_a_number_where_a_strategy_has_a_name_is_refused(tmp_path, number):
    """Also a large one, which is not the length of a text that is to be made."""
    layout = wire.bytes_field(2, wire.bytes_field(1, wire.integer_field(1, 2)) + wire.bytes_field(2, b""))
    (tmp_path / "s.ckpt").write_bytes(wire.bytes_field(3, wire.integer_field(1, number) + layout))
    with pytest.raises(UserError, match=r"s\.ckpt: not a strategy file, or damaged: a number where a message belongs"):
        read_strategy(str(tmp_path / "s.ckpt"))


# ---- what is refused ----

@pytest.fixture
def two(tmp_path):
    """A model in two slices, made from `whole`."""
    whole_model(tmp_path / "whole", dims())
    transform(tmp_path / "whole", tmp_path / "two", parts=2)
    return tmp_path / "two"


@pytest.mark.parametrize("flags, said", [
    (("--model_parallel", 3), ["num_heads 4 is not divisible by model_parallel 3", "1, 2 ranks"]),
    (("--model_parallel", 0), ["must be at least 1, not 0"]),
    (("--model_parallel", 2), ["is cut for 2 ranks already"]),
    (("--src_vocab_emb_dp", "False"), ["vocab_emb_dp True", "not False"]),
    (("--src_ckpt_strategy", "missing.ckpt"), ["missing.ckpt"]),
    (("--prefix", "../x"), ["--prefix"]),
])
def test_what_cannot_be_is_refused_in_one_line(two, module_dir, tmp_path, flags, said):
    done = run_script(module_dir, "transform_ckpt.py", "--src_ckpt_dir", two, "--dst_ckpt_dir", tmp_path / "out",
                      *flags)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert all(part in done.stderr for part in said), done.stderr
    assert not (tmp_path / "out").exists()


def test_a_strategy_of_another_job_is_refused(two, tmp_path):
    layouts = read_strategy(str(two / "strategy"))

    def attempt(change, said):
        changed = dict(layouts)
        change(changed)
        (tmp_path / "s.ckpt").write_bytes(write_strategy(changed))
        with pytest.raises(UserError, match=said):
            plan_transform(Reslicing(str(two), str(tmp_path / "out"), source_strategy=str(tmp_path / "s.ckpt")))

    attempt(lambda s: s.update({name: Layout((4,), layout.tensor_map) for name, layout in s.items()}), "over 4 ranks")
    attempt(lambda s: s.pop("lm_head.weight"), "says nothing about lm_head.weight")
    attempt(lambda s: s.update({"model.layers.9.attention.wo.weight": layout_of(2, 1, 2)}), "names model.layers.9")
    attempt(lambda s: s.update({"model.layers.0.attention.wo.weight": layout_of(2, 0, 2)}),
            r"\[64, 16\].*makes it \[32, 32\]")


def test_pipeline_stages_are_refused_by_name(tmp_path):
    pytest.importorskip("mindspore")
    from mindspore.train.node_strategy_pb2 import ParallelStrategyMap
    message = ParallelStrategyMap()
    message.ParseFromString(write_strategy({"a": layout_of(2, 1, 4)}))
    message.parallel_strategy_item[0].parallel_strategys.stage = 1
    (tmp_path / "stage.ckpt").write_bytes(message.SerializeToString())
    (tmp_path / "merged.ckpt").write_bytes(write_strategy({"0-a": layout_of(2, 1, 4), "1-b": layout_of(2, 1, 4)}))
    (tmp_path / "optimizer.ckpt").write_bytes(write_strategy({"a": layout_of(2, 1, 4)}).replace(b"\x38\x00",
                                                                                                b"\x38\x04"))
    for name, said in (("stage", "pipeline stage 1"), ("merged", "pipeline stage 1"),
                       ("optimizer", "cut over 4 ranks")):
        with pytest.raises(UserError, match=said):
            read_strategy(str(tmp_path / f"{name}.ckpt"))


def test_slices_that_do_not_belong_together_are_refused(two, tmp_path):
    contents = read_contents(two / "rank_1" / "checkpoint_1.ckpt")
    del contents["model.layers.1.attention.wo.weight"]
    write(two / "rank_1" / "checkpoint_1.ckpt", contents)
    with pytest.raises(UserError, match="rank_1.*wo.weight is missing|wo.weight is missing"):
        plan_transform(Reslicing(str(two), str(tmp_path / "out")))
    with pytest.raises(UserError, match="wo.weight is in one of rank_0 and this rank only"):
        plan_transform(Reslicing(str(two), str(tmp_path / "out"), source_strategy=str(two / "strategy")))
    shutil.copy(two / "rank_0" / "checkpoint_0.ckpt", two / "rank_0" / "older.ckpt")
    with pytest.raises(UserError, match="is in checkpoint_0.ckpt and in older.ckpt"):
        plan_transform(Reslicing(str(two), str(tmp_path / "out")))


def test_without_a_configuration_the_sizes_are_asked_for(two, tmp_path):
    os.unlink(two / "config.json")
    with pytest.raises(UserError, match="--config_path"):
        plan_transform(Reslicing(str(two), str(tmp_path / "out")))
    transform(two, tmp_path / "one.ckpt", config_path=str(tmp_path / "whole"))
    assert read_contents(tmp_path / "one.ckpt") == read_contents(tmp_path / "whole" / "whole.ckpt")


def test_a_vocabulary_that_does_not_divide_stays_whole_and_it_is_told(tmp_path):
    sizes = dims(vocab=61)
    contents = whole_model(tmp_path / "w", sizes)
    plan = plan_transform(Reslicing(str(tmp_path / "w"), str(tmp_path / "two"), parts=2, vocab_emb_dp=False))
    assert any("vocab_size 61 is not divisible by 2" in note for note in plan.notes)
    run(plan, verify=True)
    assert all(rank["lm_head.weight"] == contents["lm_head.weight"] for rank in ranks_of(tmp_path / "two"))
    transform(tmp_path / "two", tmp_path / "one.ckpt")
    assert read_contents(tmp_path / "one.ckpt") == contents


def test_the_original_tools_flags_do_what_they_did(two, module_dir, tmp_path, judge):
    strategy = two / "strategy" / "ckpt_strategy_rank_0.ckpt"
    done = run_script(module_dir, "transform_ckpt.py", "--src_ckpt_strategy", strategy, "--dst_ckpt_strategy", "None",
                      "--src_ckpt_dir",
                      two, "--dst_ckpt_dir", tmp_path / "ours", "--prefix", "merged_")
    assert done.returncode == 0, done.stderr
    judge.transform_checkpoints(str(two), str(tmp_path / "theirs"), "merged_", str(strategy), None)
    for folder in ("ours", "theirs"):
        assert os.listdir(tmp_path / folder / "rank_0") == ["merged_0.ckpt"]
    assert ranks_of(tmp_path / "ours") == ranks_of(tmp_path / "theirs")


# ---- the guide ----

def test_the_guides_commands_run_as_they_are_written(tmp_path, module_dir):
    """Every command of the guide's blocks marked `shell`, in order, in a folder with a model called as the guide calls
    it."""
    guide = module_dir.parent.parent / "docs" / "feature_cards" / "Transform_Ckpt.md"
    write_model(tmp_path / "Qwen1.5-72B", dims(heads=8, kv_heads=8, hidden=64), shards=3)
    blocks = re.findall(r"```shell\n(.*?)```", guide.read_text(encoding="utf-8"), re.S)
    commands = [shlex.split(line, comments=True) for block in blocks
                for line in block.replace("\\\n", " ").splitlines()]
    commands = [command for command in commands if command and command[:1] == ["python"]]
    assert len(commands) >= 5
    for command in commands:
        script = Path(command[1])
        assert script.name in ("convert_weight.py", "transform_ckpt.py", "convert_reversed.py"), command
        done = run_script(module_dir, script.name, *command[2:], cwd=tmp_path)
        assert done.returncode == 0, (command, done.stderr)
    merged = read_contents(tmp_path / "merged" / "rank_0")
    assert merged == under_ms_names(read_contents(tmp_path / "Qwen1.5-72B"))
