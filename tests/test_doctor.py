"""The doctor names what is missing or does not fit, what to do about it, and ends with the right exit code."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
from qwen15 import device
from qwen15.commands import doctor
from qwen15.errors import UserError
from qwen15.finding import Finding

MODULE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "research", "qwen1_5")
GOOD = {"mindspore": "2.9.0", "mindformers": "1.9.0", "numpy": "1.26.4", "pyyaml": "6.0", "safetensors": "0.7.0",
        "tokenizers": "0.22.2", "tiktoken": "0.14.0"}


def run(*arguments, **environ):
    return subprocess.run([sys.executable, "-m", "qwen15", "doctor", *arguments], capture_output=True, text=True,
                          check=False, env={**os.environ, "PYTHONPATH": MODULE, **environ})


def packages(**changes):
    versions = {**GOOD, **changes}
    return {check.name: check for check in doctor.check_packages(versions.get)}


def test_the_command_answers_quickly_and_its_exit_code_agrees_with_what_it_says():
    start = time.perf_counter()
    done = run("--json")
    taken_s = time.perf_counter() - start
    report = json.loads(done.stdout)
    assert done.stderr == ""
    assert done.returncode == (0 if report["ok"] else 1)
    assert report["ok"] == all(check["status"] != "fail" for check in report["checks"])
    names = [check["name"] for check in report["checks"]]
    assert {"python", "mindspore", "mindformers", "cpu", "kernels", "ascend", "device", "memory", "msrun",
            "port"} <= set(names)
    assert len(names) == len(set(names))
    assert taken_s < 5  # 0.2 s on an idle machine; importing MindSpore would take 3 s alone


def test_text_and_json_tell_the_same():
    checks = [Finding("a", "ok", "fine"), Finding("b", "fail", "broken", "mend it")]
    text = doctor.as_text(checks)
    assert "ok    a  fine" in text and "fail  b  broken" in text and "-> mend it" in text
    assert text.splitlines()[-1] == "1 thing(s) have to be mended; 0 warning(s)"
    report = json.loads(doctor.as_json(checks))
    assert report["ok"] is False
    assert report["checks"][1] == {"name": "b", "status": "fail", "detail": "broken", "fix": "mend it"}


def test_a_package_that_is_missing_is_a_failure():
    found = packages(mindspore=None)
    assert (found["mindspore"].status, found["mindspore"].fix) == ("fail", "pip install mindspore")
    assert all(check.status != "fail" for check in packages().values())


@pytest.mark.parametrize("changes, name, status, words", [
    ({"numpy": "2.1.0"}, "numpy", "fail", "below 2"),
    ({"safetensors": "0.8.0"}, "safetensors", "warn", "wrong bytes"),
    ({"safetensors": "0.10.1"}, "safetensors", "warn", "wrong bytes"),
    ({"mindformers": "1.8.0"}, "mindformers", "warn", "goes with mindformers 1.9"),
    ({"mindspore": "2.7.2", "mindformers": "1.8.0"}, "mindformers", "ok", "1.8.0"),
    ({"mindspore": "2.11.0", "mindformers": "2.1.0"}, "mindformers", "warn", "not tested"),
])
def test_versions_that_do_not_go_together_are_named(changes, name, status, words):
    check = packages(**changes)[name]
    assert check.status == status and words in check.detail


def test_the_cpu_is_described(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: Fast CPU 9\nflags\t\t: fpu avx2 fma avx512f avx512_bf16 zzz\n")
    detail = doctor.check_cpu(str(info)).detail
    assert "Fast CPU 9" in detail and detail.endswith("; avx2 fma avx512f avx512_bf16")
    assert f"{len(os.sched_getaffinity(0))} logical cores" in detail
    info.write_text("processor : 0\nFeatures : fp asimd bf16 sve\n")
    assert doctor.check_cpu(str(info)).detail.endswith("; asimd bf16 sve")
    assert "no known vector extensions" in doctor.check_cpu(str(tmp_path / "none")).detail


def test_kernels_that_are_not_built_are_pointed_out(tmp_path, monkeypatch):
    monkeypatch.setenv("QWEN15_KERNELS_LIBRARY", str(tmp_path / "none.so"))
    monkeypatch.delenv("QWEN15_KERNELS", raising=False)
    check = doctor.check_kernels()
    assert check.status == "warn" and "reference operators, slow" in check.detail
    assert "qwen15.kernels.build" in check.fix
    monkeypatch.setenv("QWEN15_KERNELS", "reference")
    assert "QWEN15_KERNELS=reference" in doctor.check_kernels().detail


def test_amx_that_the_system_withholds_is_pointed_out(tmp_path, monkeypatch):
    loaded = pytest.importorskip("qwen15.kernels.library").load()
    monkeypatch.delenv("QWEN15_KERNELS", raising=False)
    info = tmp_path / "cpuinfo"
    info.write_text("flags : avx2 fma f16c avx512f amx_bf16 amx_tile\n")
    monkeypatch.setattr(loaded, "can_run", lambda name: name != "amx")
    check = doctor.check_kernels(str(info))
    assert check.status == "warn" and "AMX, which is not used" in check.detail and "arch_prctl" in check.fix
    monkeypatch.setattr(loaded, "can_run", lambda name: True)
    assert doctor.check_kernels(str(info)).status == "ok"


# --- Ascend

@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A root folder with cards and CANN as told; MindSpore's plugin is there."""
    def machine(cards=0, cann=False, plugin="/x/libmindspore_ascend.so.2"):
        (tmp_path / "dev").mkdir(exist_ok=True)
        for number in range(cards):
            (tmp_path / "dev" / f"davinci{number}").touch()
        (tmp_path / "dev" / "davinci_manager").touch()
        environ = {}
        if cann:
            (tmp_path / "cann").mkdir(exist_ok=True)
            environ["ASCEND_HOME_PATH"] = str(tmp_path / "cann")
        monkeypatch.setattr(device, "_plugin", lambda: plugin)
        return environ, str(tmp_path)
    return machine


def answers(found):
    return device.CardAnswer(None)


def test_a_machine_without_ascend_is_fine(machine):
    ascend, target = doctor.check_ascend(*machine())
    assert (ascend.status, ascend.fix) == ("info", None)
    assert target.detail.startswith("a run computes on CPU, chosen by auto: no card")


def test_a_whole_ascend_machine_is_used(machine):
    ascend, *_, target = doctor.check_ascend(*machine(cards=12, cann=True), answers)
    assert ascend.status == "ok" and "12 card(s)" in ascend.detail
    assert ascend.detail.index("davinci9,") < ascend.detail.index("davinci10")
    assert target.detail.startswith("a run computes on Ascend, chosen by auto: 12 card(s)")


@pytest.mark.parametrize("parts, fix", [
    ({"cards": 1}, "set_env.sh"),
    ({"cann": True}, "--device /dev/davinci0"),
    ({"cards": 1, "cann": True, "plugin": None}, "Ascend backend"),
])
def test_half_an_ascend_machine_gets_a_warning_and_the_cpu(machine, parts, fix):
    ascend, *_, target = doctor.check_ascend(*machine(**parts), answers)
    assert ascend.status == "warn" and fix in ascend.fix
    assert target.detail.startswith("a run computes on CPU, chosen by auto: ")


def test_asking_for_ascend_where_there_is_none_is_refused_when_it_matters(machine):
    environ, root = machine()
    target, why = device.resolve("Ascend", environ, root)
    assert target == "Ascend" and "asked for; but no card" in why
    with pytest.raises(UserError) as caught:
        device.require(target, "predict.yaml:70", environ, root)
    assert str(caught.value).startswith("predict.yaml:70: device_target Ascend, but this machine has no card")
    device.require("CPU", None, environ, root)
    device.require("Ascend", None, *machine(cards=1, cann=True), answers)
    assert device.resolve("CPU", *machine(cards=1, cann=True)) == ("CPU", "CPU, asked for")


# --- launching

def test_a_port_in_use_is_named():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        assert doctor.check_port(port).status == "warn"
        assert str(port) in doctor.check_port(port).detail
    assert doctor.check_port(port).status == "ok"


def test_msrun_of_another_python_is_pointed_out(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert doctor.check_msrun(str(tmp_path)).status == "info"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "msrun").touch(mode=0o755)
    check = doctor.check_msrun(str(elsewhere))
    assert check.status == "warn" and "another Python" in check.detail
    (tmp_path / "msrun").touch(mode=0o755)
    assert doctor.check_msrun(str(elsewhere)).status == "ok"


# --- tokenizer

def test_broken_tokenizer_files_fail(tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0,')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    done = run("--vocab_file", str(tmp_path / "vocab.json"), "--merges_file", str(tmp_path / "merges.txt"))
    assert done.returncode == 1
    line = next(line for line in done.stdout.splitlines() if line.startswith("fail  tokenizer"))
    assert "vocab.json" in line
    assert "--merges_file is missing" in run("--vocab_file", str(tmp_path / "vocab.json")).stdout


def test_the_real_tokenizer_files_pass(qwen_vocabulary):
    check = doctor.check_tokenizer(str(qwen_vocabulary / "vocab.json"), str(qwen_vocabulary / "merges.txt"))
    assert check.status == "ok" and "151646 tokens" in check.detail


def test_a_wrong_port_number_is_bad_usage():
    done = run("--port", "70000")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --port: wants at most 65535, not 70000")


def test_a_package_that_another_one_does_not_want_is_pointed_out():
    """As after `pip install -U huggingface_hub` beside transformers 4.57."""
    installed = {"transformers": "4.57.1", "huggingface-hub": "2.4.0", "numpy": "1.26.4"}
    wants = {"transformers": ["huggingface-hub<1.0,>=0.34.0", "numpy>=1.17", "absent>=1",
                              "torch>=2.2; extra == 'torch'"]}
    found = doctor.check_requirements(installed.get, wants.get)
    assert (found.name, found.status) == ("versions", "warn")
    assert found.detail == "huggingface-hub is 2.4.0, transformers 4.57.1 wants <1.0,>=0.34.0"
    assert found.fix == "pip install 'huggingface-hub<1.0,>=0.34.0'"
    installed["huggingface-hub"] = "0.36.2"
    assert doctor.check_requirements(installed.get, wants.get).status == "ok"


def test_mindformers_is_missed_by_nobody_on_a_cpu():
    checks = {check.name: check for check in doctor.check_packages({**GOOD, "mindformers": None}.get)}
    assert checks["mindformers"].status == "info"
