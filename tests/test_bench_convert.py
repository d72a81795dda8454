"""The conversion benchmark: everybody takes part, does the same work, and nothing is left behind."""

import json
import os

import pytest
from checkpoint_fixtures import dims, model_contents, write_model
from qwen15.bench import convert
from qwen15.bench.command import main
from qwen15.errors import UserError


@pytest.mark.parametrize("against", [pytest.param([], marks=pytest.mark.slow), ["--against", "hf"]])
def test_every_way_of_converting_is_timed_beside_cp(tmp_path, capsys, against):
    if against:
        pytest.importorskip("torch")
        pytest.importorskip("transformers")
        pytest.importorskip("mindspore")
    write_model(tmp_path / "model", dims(heads=4, kv_heads=4, tied=bool(against)), shards=2)
    assert main(["convert", "--checkpoint", str(tmp_path / "model"), "--rounds", "1", *against]) == 0
    said = capsys.readouterr().out.strip().splitlines()
    found = json.loads(said[-1])
    rows = {row["who"]: row for row in found["rows"]}
    assert list(rows)[:2] == ["cp", "cp; sync"] and len(rows) == (9 if against else 8)
    assert rows["cp"]["times_cp"] == rows["cp; sync"]["times_cp_sync"] == 1
    for name, row in rows.items():
        assert row["work_s"] > 0 and row["written_bytes"] > 40_000 and len(row["samples"]) == 1
        assert row["times_cp"] == pytest.approx(row["work_s"] / rows["cp"]["work_s"], rel=1e-3)
        if not name.startswith("cp"):
            assert row["peak_bytes"] > 20e6 and row["imports_s"] > 0
    table = [line for line in said if line.startswith("| ")]
    assert [line.split(" | ")[0][2:] for line in table[2:]] == list(rows)
    assert os.listdir(tmp_path) == ["model"]


def test_a_conversion_that_did_other_work_is_not_compared(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        write_model(tmp_path / name, dims(), model_contents(dims(), seed=seed))
    convert._compare(str(tmp_path / "a"), str(tmp_path / "a" / "model.safetensors"))
    with pytest.raises(UserError, match="is another tensor there"):
        convert._compare(str(tmp_path / "a"), str(tmp_path / "b"))


def test_a_process_that_fails_is_told_and_its_results_are_removed(tmp_path, monkeypatch):
    write_model(tmp_path / "model", dims(heads=4, kv_heads=4))
    broken = convert.Contender(lambda target: ["sh", "-c", "echo no luck >&2; exit 3"], False)
    monkeypatch.setattr(convert, "_contenders", lambda *_: {"sh": broken})
    with pytest.raises(UserError, match="sh: the process failed: no luck"):
        main(["convert", "--checkpoint", str(tmp_path / "model"), "--rounds", "1"])
    assert os.listdir(tmp_path) == ["model"]
