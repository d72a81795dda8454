"""`qwen15 bench parallel`: real workers, and figures that hang together."""

import json
import os
import subprocess
import sys

import pytest
from command_fixtures import make_random
from conftest import MODULE

pytest.importorskip("mindspore")
pytest.importorskip("torch")


def bench(folder, *arguments):
    return subprocess.run([sys.executable, "-m", "qwen15.bench", "parallel", "--no_plot", *map(str, arguments)],
                          cwd=folder,
                          env={**os.environ, "PYTHONPATH": str(MODULE)}, capture_output=True, text=True, timeout=280)


def test_one_and_two_workers(small_model, tmp_path):
    make_random(tmp_path, small_model)  # two layers
    done = bench(tmp_path, "--checkpoint", tmp_path / "random", "--workers", 1, 2, "--prompt", 40, "--new_tokens", 8,
                 "--rounds", 2)
    assert done.returncode == 0, done.stderr
    *table, line = done.stdout.splitlines()
    assert [row.split("|")[1].strip() for row in table if row.startswith("|")] == ["workers", "---", "1", "2"]
    one, two = json.loads(line)["rows"]
    assert "allreduce_decode_s" not in one and one["join_s"] == 0 < two["join_s"]
    assert two["allreduces_a_prefill"] == 5  # attention and MLP of each layer; logits
    assert two["allreduces_a_token"] == 6  # the largest of the logits too
    assert 0 < two["of_decode"] < 1 and 0 < two["of_prefill"] < 1
    assert all(rank["note"].endswith("ranks add in shared memory") for rank in two["ranks"])
    assert [rank["rank"] for rank in two["ranks"]] == [0, 1]
    for rank in (*one["ranks"], *two["ranks"]):
        assert 0 < rank["pss_bytes"] < rank["rss_bytes"] <= rank["peak_rss_bytes"] and len(rank["decode_s"]) == 2
    assert two["all_pss_bytes"] == sum(rank["pss_bytes"] for rank in two["ranks"])
    assert list(tmp_path.glob("qwen15_bench_*")) == []


def test_workers_with_quantised_weights_have_a_cache_of_bfloat16(tmp_path):
    done = bench(tmp_path, "--layers", 1, "--cache", tmp_path, "--dtype", "int8", "--workers", 1, "--prompt", 8,
                 "--new_tokens", 3, "--rounds", 1)
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["dtype"] == "int8" and line["rows"][0]["decode_tokens_per_s"] > 0


def test_more_workers_than_can_share_are_refused_before_any_starts(small_model, tmp_path):
    make_random(tmp_path, small_model)
    done = bench(tmp_path, "--checkpoint", tmp_path / "random", "--workers", 2, 3)
    assert done.returncode == 2 and "worker ..." not in done.stderr
    assert ("error: --workers: 3 workers cannot share this model: num_heads 4 is not divisible by model_parallel 3"
            in done.stderr)
