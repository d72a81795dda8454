"""The bench on a tiny checkpoint: all measurements run, figures follow from samples, mistakes get one line."""

import json
import os
import statistics
import subprocess
import sys

import numpy as np
import pytest
import warm_commands
from conftest import MODULE
from qwen15.bench import hf, options, report, rounds, work
from qwen15.bench.make_checkpoint import dims_of, make_checkpoint
from qwen15.errors import UserError
from qwen15.kernels import library
from qwen15.naming import Dims

try:
    library.load()
except UserError as error:
    pytest.skip(str(error), allow_module_level=True)

TINY = Dims(hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
            vocab_size=512,
            tie_word_embeddings=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "tiny"
    make_checkpoint(str(folder), TINY)
    return folder


QUICK_PROBES = """
import sys
from qwen15.bench import command, probes
from qwen15.errors import run_main
probes.PROBE_BYTES, probes._PASSES = 2 ** 20, 1
sys.exit(run_main(command.main))
"""
"""The bench with probes of a moment, whose figures are too high (caches) and enter the same arithmetic."""


def bench(*arguments, cwd, code=0, quick=False):
    """Run to the end; gives the finished process."""
    program = ["-m", "qwen15.bench"]
    if quick:
        (cwd / "quick.py").write_text(QUICK_PROBES)
        program = ["quick.py"]
    done = warm_commands.run([*program, *arguments], cwd,
                             {**os.environ, "PYTHONPATH": str(MODULE), "XDG_CACHE_HOME": str(cwd)})
    assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def measured(what, *arguments, cwd, quick=True):
    """The JSON that ends stdout, checked for what every measurement has."""
    done = bench(what, *arguments, cwd=cwd, quick=quick)
    lines = done.stdout.splitlines()
    made = json.loads(lines[-1])
    assert made["bench"] == what and made["command"].startswith(f"qwen15 bench {what}")
    assert made["machine"]["cores"] == len(os.sched_getaffinity(0)) and made["time"].endswith("+00:00")
    assert sum(line.startswith("| ") for line in lines) == len(made["rows"]) + 2  # heading and rule
    return made


def against():
    """Compare with transformers where it is installed."""
    try:
        hf.check_installed()
    except UserError:
        return ()
    return ("--against", "hf")


def check_limits(row, amount, flop="flop"):
    """Fractions follow from the raw seconds and probes in the same row."""
    mine = row["samples"]["qwen15"]
    for probe, key, name in (("bandwidth", amount, "of_bandwidth"), ("peak", flop, "of_peak")):
        wanted = statistics.median(row[key] / s / p for s, p in zip(mine["seconds"], mine[probe]))
        assert row[name] == pytest.approx(wanted, rel=1e-4)
    assert row["of_both"] >= max(row["of_bandwidth"], row["of_peak"]) * 0.999
    assert row["bandwidth_gb_per_s"] == pytest.approx(statistics.median(mine["bandwidth"]) / 1e9, rel=1e-4)


def check_ratio(row, theirs="hf"):
    pairs = zip(row["samples"]["qwen15"]["seconds"], row["samples"][theirs]["seconds"])
    assert row[f"ratio_{theirs}"] == pytest.approx(statistics.median(b / a for a, b in pairs), rel=1e-4)


def test_decode_at_several_batches_and_contexts(tiny, tmp_path):
    made = measured("decode", "--checkpoint", tiny, "--batch", 1, 3, "--context", 5, 40, "--new_tokens", 4, "--rounds",
                    2, *against(),
                    cwd=tmp_path)
    assert [(row["batch"], row["context"]) for row in made["rows"]] == [(1, 5), (3, 5), (1, 40), (3, 40)]
    assert made["dtype"] == "bfloat16" and made["model"] == "tiny" and made["rounds"] == 2
    for row in made["rows"]:
        assert row["tokens_per_s"] == pytest.approx(row["batch"] / row["step_ms"] * 1e3, rel=1e-4)
        assert row["bytes_per_step"] == pytest.approx(work.decode_bytes(TINY, "bfloat16", row["batch"],
                                                                        row["context"] + 2), rel=1e-4)
        assert len(row["samples"]["qwen15"]["seconds"]) == 2
        assert 0 < row["own_ms"] < row["step_ms"]
        check_limits(row, "bytes_per_step", "flop_per_step")
        if against():
            check_ratio(row)


@pytest.mark.parametrize("what", (("decode", "--new_tokens", 3), pytest.param(("prefill", "--tokens", 8),
                                                                                 marks=pytest.mark.slow)))
def test_another_dtype_takes_turns_with_bfloat16(tmp_path, what):
    made = measured(*what, "--dtype", "int8", "--layers", 1, "--cache", tmp_path, "--against", "bfloat16", "--rounds",
                    2, "--no_plot", cwd=tmp_path)
    row, = made["rows"]
    assert made["dtype"] == "int8"
    check_ratio(row, "bfloat16")


@pytest.mark.parametrize("dtype", ("float16", "float32"))
def test_prefill_with_other_dtypes(tiny, tmp_path, dtype):
    made = measured("prefill", "--checkpoint", tiny, "--tokens", 70, "--dtype", dtype, "--rounds", 2, "--no_plot",
                    cwd=tmp_path, quick=dtype == "float16")
    row, = made["rows"]
    assert made["dtype"] == dtype and row["tokens"] == 70
    assert row["tokens_per_s"] == pytest.approx(70 / row["ms"] * 1e3, rel=1e-4)
    check_limits(row, "read_bytes")


def test_scaling_over_threads(tiny, tmp_path):
    made = measured("scaling", "--checkpoint", tiny, "--threads", 2, 1, "--batch", 1, 3, "--prefill", 70,
                    "--new_tokens", 4, "--rounds", 2, cwd=tmp_path)
    whats = ("decode, batch 1", "decode, batch 3", "prefill, 70 tokens")
    assert [(row["what"], row["threads"]) for row in made["rows"]] == [(w, n) for w in whats for n in (1, 2)]
    for row in made["rows"]:
        tokens = {"decode, batch 1": 1, "decode, batch 3": 3}.get(row["what"], 70)
        assert row["tokens_per_s"] == pytest.approx(tokens / row["ms"] * 1e3, rel=1e-4)
        assert 1 <= row["working_threads"] <= row["threads"]
        best = max(other["tokens_per_s"] for other in made["rows"] if other["what"] == row["what"])
        assert row["of_best"] == pytest.approx(row["tokens_per_s"] / best, rel=1e-4)
        check_limits(row, "read_bytes")


@pytest.mark.parametrize("most, wanted", ((1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (15, [1, 2, 4, 8, 15]),
                                          (16, [1, 2, 4, 8, 16])))
def test_threads_to_scale_over_are_powers_of_two_and_the_most(most, wanted):
    from qwen15.bench import scaling

    assert scaling.powers(most) == wanted


def test_decoding_beside_a_busy_neighbour(tiny, tmp_path):
    made = measured("neighbour", "--checkpoint", tiny, "--batch", 1, 3, "--new_tokens", 60, "--rounds", 2, cwd=tmp_path)
    assert [row["batch"] for row in made["rows"]] == [1, 3]
    for row in made["rows"]:
        pairs = zip(row["samples"]["alone"]["seconds"], row["samples"]["beside"]["seconds"])
        assert row["loss"] == pytest.approx(statistics.median(1 - a / b for a, b in pairs), rel=1e-3, abs=1e-5)
        assert row["within"] == ("yes" if row["loss"] <= row["allowed"] else "no")
        assert row["allowed"] == pytest.approx(row["share"] + 0.1, rel=1e-4) and row["working_threads"] >= 1


def test_a_neighbour_works_only_when_let_and_ends():
    import time

    from qwen15.bench.neighbour import Neighbour

    neighbour = Neighbour(min(os.sched_getaffinity(0)))
    try:
        neighbour.work()
        deadline_s = time.monotonic() + 60
        while neighbour.cpu_seconds() < 0.1 and time.monotonic() < deadline_s:
            time.sleep(0.05)
        assert neighbour.cpu_seconds() >= 0.1
        neighbour.rest()
        time.sleep(0.1)
        had_s = neighbour.cpu_seconds()
        time.sleep(0.3)
        assert neighbour.cpu_seconds() == had_s
    finally:
        neighbour.close()
    assert not os.path.exists(f"/proc/{neighbour._process.pid}/stat")


def test_a_neighbour_ends_with_a_bench_that_is_killed():
    import subprocess
    import sys
    import time

    from conftest import MODULE

    code = ("import os, time\nfrom qwen15.bench.neighbour import Neighbour\n"
            "print(Neighbour(min(os.sched_getaffinity(0)))._process.pid, flush=True)\ntime.sleep(60)")
    bench = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=MODULE)
    pid = int(bench.stdout.readline())
    bench.kill()
    bench.communicate()
    deadline_s = time.monotonic() + 20
    while _is_running(pid) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not _is_running(pid)


def _is_running(pid):
    """Whether a process is there, one that has ended and nobody has waited for not counted."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        return False


def test_kernels_by_themselves(tmp_path):
    made = measured("kernels", "--layers", 1, "--tokens", 1, 66, "--context", 33, "--rounds", 1, "--no_plot",
                    cwd=tmp_path)
    names = [(row["operator"], row["tokens"], row["context"]) for row in made["rows"]]
    assert ("head", 1, None) in names and ("whole network", 66, 66) in names and ("attention, a layer", 1, 33) in names
    assert ("argmax of 151936", 1, None) in names
    for row in made["rows"]:
        assert row["us"] == pytest.approx(statistics.median(row["samples"]["qwen15"]["seconds"]) * 1e6, rel=1e-4)
        if "flop" in row:
            check_limits(row, "read_bytes")


def test_overhead_of_every_way_to_choose_a_token(tiny, tmp_path):
    made = measured("overhead", "--checkpoint", tiny, "--new_tokens", 4, "--rounds", 2, "--no_plot", cwd=tmp_path)
    assert [row["way"] for row in made["rows"]][:2] == ["greedy", "greedy, all parameters passed at each step"]
    for row in made["rows"]:
        assert 0 < row["own_ms"] < row["token_ms"]
        assert row["own_ms"] == pytest.approx(statistics.median(row["samples"]["own_seconds"]) * 1e3, rel=1e-4)


def test_guesses_against_plain_decoding(small_model, tmp_path):
    made = measured("speculate", "--checkpoint", small_model, "--dtype", "float32", "--task", "rewriting",
                    "--new_tokens", 12, "--rounds", 1, "--no_plot", cwd=tmp_path)
    row, = made["rows"]
    assert row["same"] == "same" and row["accepted"] <= row["guessed"] and row["tokens"] == 12
    assert row["ratio"] > 0 and row["tokens_per_step"] >= 1


@pytest.mark.slow
def test_a_draft_is_measured_at_a_given_acceptance(tmp_path):
    # The vocabulary's table is most of so small a draft: against a shorter target it would be too dear to be asked.
    made = measured("speculate", "--size", "0.5b", "--layers", 24, "--draft_size", "0.5b", "--draft_layers", 1,
                    "--acceptance", "1,0", "--new_tokens", 24, "--rounds", 1, "--no_plot", cwd=tmp_path)
    sure, never = made["rows"]
    assert sure["accepted"] == sure["guessed"] > 0 and never["accepted"] == 0
    assert sure["tokens_per_step"] > never["tokens_per_step"] == 1


def test_loading_in_processes_of_its_own(tiny, tmp_path):
    made = measured("load", "--checkpoint", tiny, "--prompt", 4, "--new_tokens", 2, "--rounds", 1, "--no_plot",
                    cwd=tmp_path)
    row, = made["rows"]
    nbytes = sum(path.stat().st_size for path in tiny.glob("*.safetensors"))
    assert row["checkpoint_bytes"] == nbytes and row["memory_goal_bytes"] == pytest.approx(1.25 * nbytes + 6e8)
    assert row["ready_s"] > 0 and row["first_token_s"] > 0
    assert 5e7 < row["peak_bytes"] < 5e9


def test_tokenizer(qwen_vocabulary, tmp_path):
    text = tmp_path / "mixed.txt"
    text.write_text("Gravity is 重力 " * 300, encoding="utf-8")
    made = measured("tokenize", qwen_vocabulary, "--text", text, "--rounds", 1, "--no_plot", *against(), cwd=tmp_path)
    assert [row["text"] for row in made["rows"]] == ["mixed.txt, one text", "mixed.txt, messages"]
    for row in made["rows"]:
        assert row["mb"] == pytest.approx(text.stat().st_size / 1e6)
        assert row["mb_per_s"] == pytest.approx(row["mb"] / row["samples"]["qwen15"]["seconds"][0], rel=1e-3)


def test_random_checkpoint_is_made_once_and_kept(tmp_path):
    arguments = ("prefill", "--layers", 1, "--tokens", 3, "--rounds", 1, "--no_plot", "--cache", tmp_path / "kept")
    first = bench(*arguments, cwd=tmp_path)
    assert f"making random weights in {tmp_path}/kept/qwen1.5-0.5b-1layers-bfloat16" in first.stderr
    assert os.listdir(tmp_path / "kept") == ["qwen1.5-0.5b-1layers-bfloat16"]
    assert "making" not in bench(*arguments, cwd=tmp_path).stderr


def test_plot_is_a_png_and_replaces_only_the_benchs_own(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    target = tmp_path / "plot.png"
    assert report.plot_target(str(target), "") == str(target)
    report.write_plot(str(target),
                      report.Bars("Decode", "tokens per second", ["a", "b"], {"ours": [1, 2], "theirs": [1, None]},
                                               {"limit": [3, 3]}))
    assert target.read_bytes().startswith(b"\x89PNG")
    assert report.plot_target(str(target), "") == str(target)
    target.write_bytes(b"somebody's")
    with pytest.raises(UserError, match="did not write"):
        report.plot_target(str(target), "")
    assert target.read_bytes() == b"somebody's"
    with pytest.raises(UserError, match="folder does not exist"):
        report.plot_target(str(tmp_path / "none" / "plot.png"), "")


def test_contenders_take_turns_between_probes():
    happened = []
    seconds = {"a": iter((9.0, 1.0, 4.0, 2.0)), "b": iter((9.0, 2.0, 2.0, 2.0))}
    speeds = iter((10.0, 30.0, 20.0, 5.0, 6.0, 7.0, 1.0))

    def contender(name):
        def run():
            happened.append(name)
            return rounds.Timing(next(seconds[name]), 0.5)
        return run

    def probe():
        happened.append("probe")
        return {"speed": next(speeds)}

    samples = rounds.interleave({"a": contender("a"), "b": contender("b")}, 3, probe)
    assert happened == ["a", "b", "probe"] + ["a", "probe", "b", "probe"] * 3
    assert [s.seconds for s in samples["a"]] == [1.0, 4.0, 2.0]  # the first round does not count
    assert [s.probe["speed"] for s in samples["a"]] == [30.0, 20.0, 7.0]  # the better of before and after
    assert [s.probe["speed"] for s in samples["b"]] == [30.0, 6.0, 7.0]
    assert rounds.median_seconds(samples["a"]) == 2.0 and rounds.median_own_seconds(samples["a"]) == 0.5
    assert rounds.ratio(samples["a"], samples["b"]) == 1.0  # 2, 0.5, 1
    assert rounds.fraction(samples["a"], 60.0, "speed") == pytest.approx(2.0)  # 60/1/30, 60/4/20, 60/2/7


def test_limits_take_the_scarcer_of_reading_and_computing():
    samples = [rounds.Sample(2.0, 0.0, {"bandwidth": 10e9, "peak": 100e9})]
    found = rounds.limits(samples, 10e9, 150e9)
    assert found["of_bandwidth"] == 0.5 and found["of_peak"] == 0.75 and found["of_both"] == 0.75


def test_work_of_the_published_half_billion():
    dims = dims_of("0.5b")
    layer = 4 * 1024 * 1024 + 3 * 1024 * 2816
    assert work.matrix_elements(dims) == 24 * layer + 151936 * 1024
    assert work.decode_bytes(dims, "bfloat16", 2, 100) == 2 * (work.matrix_elements(dims) + 2 * 24 * 1024 * 100 * 2)
    keys = sum(range(1, 8))  # each token sees itself and those before it
    assert work.prefill_flop(dims, 7) == 2 * (7 * 24 * layer + 151936 * 1024 + 24 * 2 * keys * 1024)
    assert work.prefill_flop(dims, 1) == work.decode_flop(dims, 1, 1)


def test_the_heading_leaves_out_what_is_not_there():
    line = report.heading("decode", {"model": "tiny", "threads": 2, "against": None})
    assert line.startswith("decode: tiny, 2 threads; ") and "None" not in line


def test_table_leaves_out_empty_columns():
    columns = (report.Column("a", report.text("a")), report.Column("b", report.number("b", ".1f")),
               report.Column("c", report.text("c")))
    assert report.table(columns, [{"a": "x", "b": 1.26},
                                  {"a": "y", "b": None}]) == "| a | b |\n| --- | --- |\n| x | 1.3 |\n| y |  |"


def test_operators_equal_plain_products():
    from qwen15.bench.operators import Array, Pool, prepare

    pool = Pool(1000, "bfloat16")
    w = pool.take(5, 64)
    values = (w.memory.astype(np.uint32) << 16).view(np.float32)
    x = np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)
    got = prepare("project_add", [Array(x), w, Array(np.ones((2, 5), np.float32))], (2, 5))()
    assert np.allclose(got, x @ values.T + 1, atol=2e-2)
    assert not np.array_equal(pool.take(5, 64).memory, w.memory)


@pytest.mark.parametrize("arguments, line", (
    (("decode", "--checkpoint", "nowhere"), "error: --checkpoint nowhere: no such folder"),
    (("decode", "--size", "3b"), "error: --size: '3b' is not a Qwen1.5 size"),
    (("speculate", "--draft_size", "3b"), "error: --draft_size: '3b' is not a Qwen1.5 size"),
    (("decode", "--against", "bfloat16"),
     "error: --against bfloat16: compares random weights of another dtype with bfloat16"),
    (("prefill", "--dtype", "bfloat16", "--against", "bfloat16"),
     "error: --against bfloat16: compares random weights of another dtype with bfloat16"),
    (("decode", "--checkpoint", ".", "--layers", "2"), "error: --layers: is for random checkpoints"),
    (("prefill", "--plot", "none/plot.png"), "error: --plot none/plot.png: the folder does not exist"),
    (("tokenize", ".", "--no_plot"), "error: "),
))
def test_mistakes_get_one_line(tmp_path, arguments, line):
    done = bench(*arguments, cwd=tmp_path, code=2)
    errors = [each for each in done.stderr.splitlines() if each.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith(line), done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments, line", (
    (("decode", "--batch", "0"), "--batch: wants at least 1, not 0"),
    (("decode", "--new_tokens", "1"), "--new_tokens: wants at least 2"),
    (("prefill", "--rounds", "many"), "--rounds: wants a whole number, not 'many'"),
    (("nonsense",), "WHAT: wants one of decode, "),
    (("decode", "--against", "me"), "--against: wants one of hf, bfloat16, not 'me'"),
))
def test_wrong_usage_ends_with_2(tmp_path, arguments, line):
    done = bench(*arguments, cwd=tmp_path, code=2)
    assert line in done.stderr.splitlines()[-1] and done.stdout == ""


def test_help_needs_no_heavy_import():
    code = ("import sys\nfrom qwen15.bench.command import main\n"
            "try:\n    main(['decode', '--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
            "print([m for m in ('mindspore', 'torch', 'transformers', 'matplotlib') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=MODULE, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_every_command_has_its_file():
    from qwen15.bench.command import COMMANDS

    for module, _ in COMMANDS.values():
        assert os.path.exists(MODULE / "qwen15" / "bench" / f"{module}.py"), module


def test_checkpoint_given_keeps_its_own_dtype(tiny):
    args = type("Arguments", (), {"checkpoint": str(tiny), "layers": None, "dtype": None, "size": "0.5b", "cache": ""})
    assert options.find_checkpoint(args) == options.BenchCheckpoint(str(tiny), "tiny", "bfloat16")
