"""First contact with a card: what is likely to be wrong is named in one line before it happens, on faked machines."""

import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import MODULE
from qwen15 import device
from qwen15.ascend import check, contracts, installation
from qwen15.commands import doctor, dry_run
from qwen15.config.load import Flag, load_config
from qwen15.errors import UserError
from qwen15.generation import memory_check
from qwen15.installed import folder_of
from qwen15.network import mindformers
from qwen15.network.mindformers_import import import_mindformers

LATEST, CANN = "usr/local/Ascend/ascend-toolkit/latest", "usr/local/Ascend/cann"


@pytest.fixture
def card(tmp_path, monkeypatch):
    """A root folder with one card and a CANN of the given version in the given layout, and MindSpore's plugin."""
    def card(version="9.0.0", layout=CANN, driver=None, plugin="/x/libmindspore_ascend.so.2"):
        write(tmp_path / "dev" / "davinci0", "")
        info = "compiler/version.info" if layout == LATEST else "share/info/compiler/version.info"
        write(tmp_path / layout / info, f"Version={version}\nversion_dir={version}\n")
        script = tmp_path / layout / ".." / "set_env.sh" if layout == LATEST else tmp_path / layout / "set_env.sh"
        write(script, "")
        if driver:
            for part in ("driver", "firmware"):
                write(tmp_path / "usr/local/Ascend" / part / "version.info",
                      f"Version=7.8.0.5\npackage_version={driver}\n")
        monkeypatch.setattr(device, "_plugin", lambda: plugin)
        return {}, str(tmp_path)
    return card


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


WANTED = installation.Wanted("9.0.0", "26.0.RC1", ("8.5", "9.0"), "mindformers 1.9.0")


def answers(*_):
    return device.CardAnswer(None, 60 * 2 ** 30, 64 * 2 ** 30)


def installed(package):
    """Skip the test where the package is not installed; importing it would take seconds."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def by_name(findings, name):
    return [finding for finding in findings if finding.name == name]


# --- the wheel

def elf(machine):
    return b"\x7fELF\x02\x01\x01" + bytes(9) + (3).to_bytes(2, "little") + machine.to_bytes(2, "little")


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """MindSpore's libraries are x86-64 ones, and the machine is a Kunpeng host."""
    (tmp_path / "mindspore" / "lib").mkdir(parents=True)
    (tmp_path / "mindspore" / "lib" / "libmindspore_core.so").write_bytes(elf(0x3E))
    monkeypatch.setattr(device, "foreign_libraries", functools.partial(
        device.foreign_libraries, str(tmp_path / "mindspore"), "aarch64"))


def test_a_wheel_for_another_processor_is_named_before_anything_is_imported(foreign):
    with pytest.raises(UserError) as caught:
        device.resolve("CPU")
    assert str(caught.value).startswith("the installed MindSpore holds x86_64 libraries, and this machine is aarch64")
    assert f"linux_{os.uname().machine} in its name" in caught.value.fix
    with pytest.raises(UserError, match="holds x86_64 libraries"):
        check.main([])
    finding = next(check for check in doctor.check_ascend() if check.name == "wheel")
    assert finding.status == "fail" and "aarch64" in finding.detail


@pytest.mark.version
def test_the_installed_wheel_fits_this_machine():
    installed("mindspore")
    assert device.foreign_libraries() is None
    library = os.path.join(folder_of("mindspore"), "lib", "libmindspore_core.so")
    assert device.elf_machine(library) == os.uname().machine


# --- libraries and cards

def test_cann_that_was_not_sourced_makes_auto_the_cpu_and_says_which_library_is_missing(card):
    """The plug-in is the real one: it fails here as it does on a host with cards whose CANN nobody has sourced."""
    plugin = device._plugin()
    if plugin is None or "ASCEND_HOME_PATH" in os.environ:
        pytest.skip("needs MindSpore's Ascend plug-in and no CANN")
    environ, root = card(plugin=plugin)
    target, why = device.resolve("auto", environ, root)
    assert target == "CPU"
    assert re.fullmatch(r"CPU, chosen by auto: lib\w+\.so: cannot open shared object file; source "
                        rf"{re.escape(root)}/usr/local/Ascend/cann/set_env\.sh", why)
    with pytest.raises(UserError, match=r"device_target Ascend, but lib\w+\.so: cannot open shared object file; "):
        device.require("Ascend", None, environ, root)


@pytest.mark.version
def test_what_mindspore_says_of_a_library_that_does_not_load_reaches_the_user(tmp_path):
    """MindSpore itself says it, asked for a device whose plug-in cannot be loaded."""
    installed("mindspore")
    done = subprocess.run([sys.executable, "-c", "import mindspore\nmindspore.set_device('Ascend')"], cwd=tmp_path,
                          capture_output=True, text=True)
    if "Unsupported device target Ascend" not in done.stderr:
        pytest.skip("CANN is installed here")
    line = str(mindformers._not_set_up(RuntimeError(done.stderr)))
    assert re.match(r"the device cannot be set up: lib\w+\.so: cannot open shared object file: No such file or "
                    r"directory \(libmindspore_ascend\.so\.2\)", line)
    assert "set_env.sh" in line


ACL = """
#include <cstddef>
extern "C" {
int aclInit(const char *) { return 0; }
int aclFinalize() { return 0; }
int aclrtSetDevice(int card) { return card < 2 ? 0 : 107001; }
int aclrtResetDevice(int) { return 0; }
int aclrtGetMemInfo(int, std::size_t *free, std::size_t *total) { *free = 41ul << 30; *total = 64ul << 30; return 0; }
}
"""


@pytest.fixture
def runtime(tmp_path, card, monkeypatch):
    """A machine whose CANN is a library of a few lines; two cards answer."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build the library")
    (tmp_path / "acl.cpp").write_text(ACL)
    library = tmp_path / "lib" / "libascendcl.so"
    library.parent.mkdir()
    subprocess.run(["g++", "-shared", "-fPIC", str(tmp_path / "acl.cpp"), "-o", str(library)], check=True)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(library.parent))
    environ, root = card(plugin=str(library))
    return device.find_ascend(environ, root), environ, root


def test_a_card_that_answers_tells_its_free_memory(runtime):
    found, environ, root = runtime
    assert device.ask(found) == device.CardAnswer(None, 41 * 2 ** 30, 64 * 2 ** 30)
    assert device.resolve("auto", environ, root)[0] == "Ascend"
    device.require("Ascend", None, environ, root)


def test_a_card_that_does_not_answer_is_named_with_the_error(runtime, tmp_path):
    _, environ, root = runtime
    for number in range(1, 6):
        write(tmp_path / "dev" / f"davinci{number}", "")
    fault = device.ask(device.find_ascend(environ, root), 5).fault
    assert fault == "card 5 does not answer (aclrtSetDevice: error 107001)"
    target, why = device.resolve("auto", environ, root, card=5)
    assert (target, why) == ("CPU", f"CPU, chosen by auto: {fault}")


def test_the_card_that_a_run_names_is_the_one_that_is_asked(runtime, monkeypatch):
    """Whether it is there, and how much of its memory is free, before anything is loaded."""
    monkeypatch.setattr(device, "find_ascend", lambda *_: runtime[0])
    fault = "there is no card 5 (--device_id, DEVICE_ID): this machine has 1, numbered from 0"
    flags = [Flag("context.device_id", "--device_id", 5)]
    config = load_config(str(MODULE / "predict_qwen1_5_14b.yaml"), flags, ["context.device_target=auto"])
    assert config.device_note == f"CPU, chosen by auto: {fault}"
    assert config.device_note in config.notes, "a run says so: who has a card expects it to be used"
    with pytest.raises(UserError, match=re.escape(f"device_target Ascend, but {fault}")):
        mindformers.MindFormersNetwork(replace(config, device_target="Ascend"), "nowhere", print)
    monkeypatch.setattr(device, "ask", lambda found, card: device.CardAnswer(None, card << 30, 64 << 30))
    assert device.card_memory(5).free_bytes == 5 << 30
    with pytest.raises(UserError, match=r"more than the 5.00 GiB there are \(free of a card's"):
        memory_check.check(replace(config, device_target="Ascend"))


def test_a_probe_that_crashes_or_hangs_is_a_fault_and_no_crash(runtime, monkeypatch):
    found, _, _ = runtime
    monkeypatch.setattr(device, "_PROBE_S", 0.5)
    crashed = device.ask(found, 0, "import os; os.abort()").fault
    assert crashed == "asking card 0 ended with exit code -6: it said nothing"
    assert device.ask(found, 0, "import time; time.sleep(9)").fault == "card 0 has not answered within 0.5 s"


def test_cann_of_another_release_than_mindspore_is_told_by_what_it_lacks(runtime, tmp_path, monkeypatch):
    """The loader's words name a symbol in the middle of MindSpore: the user is told which CANN to install."""
    found, environ, root = runtime
    (tmp_path / "plugin.cpp").write_text("extern \"C\" int aclrtOfTheNextRelease();\nint f() { return "
                                         "aclrtOfTheNextRelease(); }\n")
    plugin = tmp_path / "libmindspore_ascend.so.2"
    subprocess.run(["g++", "-shared", "-fPIC", str(tmp_path / "plugin.cpp"), "-o", str(plugin)], check=True)
    monkeypatch.setattr(device, "_plugin", lambda: str(plugin))
    target, why = device.resolve("auto", environ, root)
    assert (target, why) == ("CPU", "CPU, chosen by auto: CANN's libraries lack aclrtOfTheNextRelease, which "
                             f"MindSpore's libmindspore_ascend.so.2 needs: this CANN ({found.cann}) is not of the "
                             "version that MindSpore is made for")
    monkeypatch.setattr(installation, "wanted", lambda: WANTED)
    finding, = installation.card(device.CardAnswer(why.partition("auto: ")[2]))
    assert (finding.status, finding.fix) == ("fail", "Install CANN 9.0.0, or source its set_env.sh.")


def test_free_memory_of_the_card_counts_not_all_of_it(runtime, monkeypatch):
    monkeypatch.setattr(device, "find_ascend", lambda *_: runtime[0])
    config = load_config(str(MODULE / "predict_qwen1_5_14b.yaml"), options=["context.device_target=Ascend"])
    line = "of 41.00 GiB (free of a card's 64.00 GiB; `npu-smi info` shows who uses the rest)"
    assert line in memory_check.check(config)
    larger = load_config(str(MODULE / "predict_qwen1_5_14b.yaml"),
                         options=["context.device_target=Ascend", "model.model_config.num_blocks=1200"])
    with pytest.raises(UserError, match=r"more than the 41.00 GiB there are \(free of a card's"):
        memory_check.check(larger)


# --- versions

@pytest.fixture
def packages(monkeypatch):
    """The MindSpore and MindFormers that are believed to be installed."""
    def packages(mindspore, mindformers="1.9.0"):
        monkeypatch.setattr(installation, "version_of", {"mindspore": mindspore, "mindformers": mindformers}.get)
    return packages


@pytest.mark.version
def test_what_is_wanted_is_read_from_the_installed_packages(packages):
    installed("mindformers")
    want = installation.wanted()
    version = installation.version_of("mindspore")
    if version in installation.PAIRS:
        assert (want.cann, want.driver) == installation.PAIRS[version][1:]
    assert ".".join(want.cann.split(".")[:2]) in want.accepted
    packages("2.7.2")
    assert installation.wanted().cann == "8.5.0"


@pytest.mark.parametrize("layout", (LATEST, CANN))
@pytest.mark.parametrize("version, status", (("9.0.0", "ok"), ("8.5.0", "warn"), ("8.0.RC2", "fail")))
def test_cann_is_compared_in_both_layouts_of_its_folder(card, packages, monkeypatch, layout, version, status):
    packages("2.9.0")
    monkeypatch.setattr(installation, "wanted", lambda: WANTED)
    environ, root = card(version, layout, driver="26.0.RC1")
    findings = installation.examine(environ, root, answers)
    cann, = by_name(findings, "cann version")
    assert (cann.status, cann.detail.split(":")[0].split(",")[0]) == (status, version)
    assert [finding.status for name in ("driver", "firmware") for finding in by_name(findings, name)] == ["ok", "ok"]
    if status != "ok":
        assert "Install CANN 9.0.0" in cann.fix


def test_a_driver_of_another_release_is_told(card, monkeypatch):
    monkeypatch.setattr(installation, "wanted", lambda: WANTED)
    _, root = card(driver="24.1.RC3")
    driver, = by_name(installation.versions(None, root), "driver")
    assert (driver.status, driver.detail) == ("warn", "24.1.RC3; mindformers 1.9.0 goes with 26.0.RC1")


def test_the_docs_name_the_pairs_that_go_together():
    for page in ("ascend.md", "ascend_en.md"):
        text = (MODULE.parent.parent / "docs" / page).read_text(encoding="utf-8")
        for mindspore, versions in installation.PAIRS.items():
            assert f"| {' | '.join((mindspore, *versions))} |" in text


def test_python_modules_that_cann_needs_are_named_with_the_command_that_installs_them():
    needs = installation.python_modules("/cann", lambda name: name not in ("sympy", "google.protobuf", "te"))
    assert [finding.status for finding in needs] == ["fail", "fail"]
    assert needs[0].detail.startswith("protobuf, sympy: not installed in")
    assert needs[0].fix == "pip install protobuf sympy"
    assert "te is not on PYTHONPATH" in needs[1].detail and "set_env.sh" in needs[1].fix
    assert [finding.status for finding in installation.python_modules("/cann", lambda name: True)] == ["ok"]


# --- the environment

def test_inherited_variables_are_named_with_what_they_change(card):
    environ, root = card()
    environ = {**environ, "RANK_TABLE_FILE": "/x/table.json", "ENFORCE_EAGER": "True", "CPU_AFFINITY": "True"}
    lines = [finding.detail for finding in by_name(installation.examine(environ, root, answers), "environment")]
    assert [line.split("=")[0] for line in lines] == ["RANK_TABLE_FILE", "ENFORCE_EAGER", "CPU_AFFINITY"]
    assert "not from the launcher" in lines[0]


@pytest.mark.version
def test_pinning_in_a_cpuset_is_told_and_switched_off(monkeypatch):
    finding, = installation.pinning({}, allowed=4, processors=192)
    assert "4 of 192 processors (cpuset)" in finding.detail
    assert installation.pinning({"CPU_AFFINITY": "False"}, 4, 192) == []
    assert installation.pinning({}, 192, 192) == []
    installed("mindformers")
    import_mindformers()
    seen = []
    monkeypatch.delenv("CPU_AFFINITY", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    monkeypatch.setattr(os, "cpu_count", lambda: 192)

    def build_context(settings):
        seen.append(os.environ["CPU_AFFINITY"])
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr("mindformers.build_context", build_context)
    with pytest.raises(UserError, match="cannot be set up"):
        mindformers.start(None)
    assert seen == ["False"]
    monkeypatch.delenv("CPU_AFFINITY")


def test_doctor_shows_a_whole_machine(card, packages, monkeypatch):
    monkeypatch.setattr(installation, "wanted", lambda: WANTED)
    monkeypatch.setattr(installation, "_can_import", lambda name: True)
    text = doctor.as_text(doctor.check_ascend(*card(driver="26.0.RC1"), answers))
    for line in (r"ok +ascend +1 card\(s\)", r"ok +card +it answers; 60.00 GiB free of 64.00 GiB",
                 r"ok +cann version +9.0.0",
                 r"ok +driver +26.0.RC1", r"ok +cann needs +its Python modules are all here",
                 r"info +device +a run computes on Ascend, chosen by auto"):
        assert re.search(line, text), line


def test_a_machine_without_cards_is_not_asked_about_cann(tmp_path):
    assert installation.examine({}, str(tmp_path), answers) == []


# --- heads and contracts

@pytest.mark.parametrize("heads, refused", ((40, False), (80, False), (64, False), (20, False), (160, True)))
def test_heads_that_the_fused_attention_does_not_take_are_refused_before_loading(heads, refused):
    config = load_config(str(MODULE / "predict_qwen1_5_14b.yaml"), options=[
        "context.device_target=Ascend",
        *(f"model.model_config.{key}={heads}" for key in ("num_heads", "n_kv_heads"))])
    head_dim = config.model.dims.head_dim
    if not refused:
        mindformers.check(config.model, "Ascend")
        return
    for refuse in (lambda: mindformers.check(config.model, "Ascend"),
                   lambda: dry_run.describe(SimpleNamespace(config=config), [])):
        with pytest.raises(UserError, match=f"heads of {head_dim} .* takes 64, 80, 96, 120, 128, 256"):
            refuse()


def test_a_contract_that_is_not_kept_names_what_the_device_does_instead(tmp_path):
    """Each other reading that is known is told apart from the contract and from every other reading of it."""
    installed("mindformers")
    from ascend_worker import Worker

    worker = Worker(tmp_path)
    try:
        judged = worker.call("ascend_cases.readings", dtype="float16", head_dim=contracts.HEAD_DIMS[0])
    finally:
        worker.close()
    assert len(judged) > 25
    for name, reading, line in judged:
        assert line.endswith(f"FAILED; it does: {reading}"), name


def test_ascend_check_refuses_a_card_that_does_not_answer(card, monkeypatch):
    environ, root = card()
    monkeypatch.setattr(device, "find_ascend", functools.partial(device.find_ascend, environ, root))
    monkeypatch.setattr(device, "ask", lambda *_: device.CardAnswer("card 0 does not answer (error 507899)"))
    with pytest.raises(UserError, match="nothing can be checked: card 0 does not answer"):
        check.main([])


def test_doctor_is_json_too(card):
    found = json.loads(doctor.as_json(doctor.check_ascend(*card(), answers)))
    assert {"ascend", "card", "cann version", "device"} <= {one["name"] for one in found["checks"]}
