"""Slices that do not belong together are told apart, by what ranks hold alike and by the record of their source."""

import shutil

import pytest
from checkpoint_fixtures import dims, model_contents, run_script, write_model
from conftest import MODULE
from qwen15 import naming
from qwen15.checkpoint import origin
from qwen15.checkpoint.reader import open_checkpoint
from qwen15.commands.dry_run import _checkpoint_lines
from qwen15.config.load import load_config
from qwen15.conversion.hugging_face import Output, plan_to_mindspore
from qwen15.conversion.reslice import Reslicing, plan_transform
from qwen15.conversion.run import run
from qwen15.conversion.slices import Slicing
from qwen15.errors import UserError
from test_convert import to_mindspore

SIZES = dims(vocab=64)


def fine_tuned(contents):
    """The same model with other values in the matrices that adapters change, and nowhere else."""
    other = model_contents(SIZES, seed=7)
    return {name: other[name] if ".q_proj.weight" in name or ".down_proj." in name else entry
            for name, entry in contents.items()}


@pytest.fixture
def models(tmp_path):
    """Slices of a model, of another one, and of a fine-tuned one with the first one's norms and embedding."""
    contents = write_model(tmp_path / "hf", SIZES)
    write_model(tmp_path / "other", SIZES, model_contents(SIZES, seed=1))
    write_model(tmp_path / "tuned", SIZES, fine_tuned(contents))
    for form in ("safetensors", "ckpt"):
        for name in ("hf", "other", "tuned"):
            to_mindspore(tmp_path / name, tmp_path / f"{name}_{form}", slicing=Slicing(2, True), form=form)
    return tmp_path


def take_rank(folder, target, source, rank):
    shutil.rmtree(target / f"rank_{rank}")
    shutil.copytree(folder / source / f"rank_{rank}", target / f"rank_{rank}")


def dry_run(folder, slices):
    """The lines of a dry run of two ranks."""
    path = folder / "predict.yaml"
    path.write_text(f"load_checkpoint: '{slices}'\nauto_trans_ckpt: False\nuse_parallel: True\n"
                    "parallel_config:\n  model_parallel: 2\ncontext:\n  device_target: CPU\n"
                    "model:\n  model_config:\n    seq_length: 64\n", encoding="utf-8")
    return _checkpoint_lines(load_config(str(path), environ={}))


@pytest.mark.parametrize("form, source, named", [
    ("safetensors", "other", "another checkpoint"), ("safetensors", "tuned", "another checkpoint"),
    ("ckpt", "other", "differs from that in")])
def test_slices_of_two_checkpoints_are_refused(models, form, source, named):
    slices = models / f"hf_{form}"
    assert len(dry_run(models, slices)) == 2
    take_rank(models, slices, f"{source}_{form}", 1)
    with pytest.raises(UserError, match=named) as caught:
        dry_run(models, slices)
    assert "rank_1" in str(caught.value) and "copy all rank_x folders from one conversion" in str(caught.value)


def test_merging_and_reversing_refuse_slices_of_a_fine_tuned_model_among_the_others(models):
    slices = models / "hf_safetensors"
    take_rank(models, slices, "tuned_safetensors", 1)
    with pytest.raises(UserError, match="another checkpoint"):
        plan_transform(Reslicing(source=str(slices), target=str(models / "whole.safetensors")))
    done = run_script(MODULE, "convert_reversed.py", "--mindspore_ckpt_path", slices, "--torch_ckpt_path",
                      models / "back")
    assert done.returncode == 2 and "another checkpoint" in done.stderr and not (models / "back").exists()


def test_a_slice_in_the_place_of_another_is_refused(models):
    slices = models / "hf_safetensors"
    shutil.rmtree(slices / "rank_1")
    shutil.copytree(slices / "rank_0", slices / "rank_1")
    with pytest.raises(UserError, match="holds slice 0 of 2 by its own record, where slice 1 of 2 belongs"):
        dry_run(models, slices)


def test_slices_made_on_two_ways_of_one_model_belong_together(models):
    to_mindspore(models / "hf", models / "whole.safetensors")
    shutil.copy(models / "hf" / "config.json", models)
    plan = plan_transform(Reslicing(source=str(models / "whole.safetensors"), target=str(models / "cut"), parts=2))
    run(plan)
    plan.close()
    take_rank(models, models / "cut", "hf_safetensors", 1)
    assert len(dry_run(models, models / "cut")) == 2


def test_the_record_depends_on_every_tensor_and_not_on_the_place(tmp_path):
    contents = write_model(tmp_path / "hf", SIZES)
    write_model(tmp_path / "again", SIZES, contents, shards=3)

    def source(folder):
        with open_checkpoint(folder) as checkpoint:
            return origin.source_of([checkpoint])

    assert source(tmp_path / "hf") == source(tmp_path / "again")
    for weight in naming.weights(SIZES):
        changed = dict(contents)
        dtype, shape, data = changed[weight.hf]
        changed[weight.hf] = (dtype, shape, bytes([data[0] ^ 1]) + data[1:])
        write_model(tmp_path / "changed", SIZES, changed)
        assert source(tmp_path / "changed") != source(tmp_path / "hf"), weight.hf


def test_a_plan_says_its_source_in_every_file(tmp_path):
    write_model(tmp_path / "hf", SIZES)
    plan = plan_to_mindspore(str(tmp_path / "hf"), Output(str(tmp_path / "ms"), slicing=Slicing(2, True)))
    assert [file.metadata["slice"] for file in plan.files] == ["0 of 2", "1 of 2"]
    assert len({file.metadata["source"] for file in plan.files}) == 1
    plan.close()
