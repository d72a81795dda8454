"""How weights are read where few tokens meet them: measured once, kept, overridden; never a bit of difference."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from kernels_cases import Quantised, Stored, call
from qwen15.commands import doctor
from qwen15.errors import UserError
from qwen15.kernels import library, reading

try:
    library.load()
except UserError:
    pytest.skip("the kernels have not been built", allow_module_level=True)


class Machine:
    """A library on which one way of reading is the fastest; counts what is measured."""

    kernels, threads = "avx2", 3

    def __init__(self, fastest=reading.DEFAULT, gain=0.5):
        self.fastest, self.gain = fastest, gain
        self.way, self.measured = None, 0

    def read_by(self, hint, ahead, places):
        self.way = reading.Way({number: name for name, number in reading.HINTS.items()}[hint], ahead, places)

    def reading_seconds(self, weights, tokens):
        self.measured += 1
        return tokens * 1e-3 * (self.gain if self.way == self.fastest else 1.0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(reading.VARIABLE, raising=False)
    yield
    library.load().read_by(reading.HINTS[reading.DEFAULT.hint], reading.DEFAULT.ahead, reading.DEFAULT.places)


@pytest.mark.parametrize("fastest", reading.WAYS)
def test_the_fastest_way_is_taken_and_kept(fastest):
    machine = Machine(fastest)
    way, whence = reading.choose(machine)
    assert way == fastest and whence == f"measured now, kept in {reading.cache_path(machine)}"
    again = Machine(fastest=None)
    assert reading.choose(again) == (fastest, f"measured before, {reading.cache_path(again)}")
    assert again.measured == 0
    reading.use(again)
    assert again.way == fastest


def test_a_gain_that_may_be_noise_changes_nothing():
    assert reading.choose(Machine(reading.WAYS[3], 0.95))[0] == reading.DEFAULT


def test_another_cpu_instruction_set_or_number_of_threads_is_measured_by_itself(monkeypatch):
    machine = Machine(reading.WAYS[2])
    reading.choose(machine)
    paths = {reading.cache_path(machine)}
    machine.threads = 4
    paths.add(reading.cache_path(machine))
    machine.kernels = "avx512"
    paths.add(reading.cache_path(machine))
    monkeypatch.setattr(reading.machine, "cpu_model", lambda: "Another (R) CPU / 3")
    paths.add(reading.cache_path(machine))
    assert len(paths) == 4 and reading.cache_path(machine).endswith("/another-r-cpu-3-avx512-4.json")
    machine.fastest = reading.WAYS[4]
    assert reading.choose(machine)[0] == reading.WAYS[4]


def said(**changed):
    return json.dumps({"format": 1, "hint": "near", "ahead": 4096, "places": 2, **changed}).encode()


@pytest.mark.parametrize("content", (
    b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"format": 1}', b"[" * 100000, said(format=2), said(hint="far"),
    said(hint=["near"]), said(ahead=-64), said(ahead=100), said(ahead=None), said(places=9)))
def test_a_damaged_file_is_measured_again_and_replaced(content):
    machine = Machine(reading.WAYS[2])
    path = reading.cache_path(machine)
    os.makedirs(os.path.dirname(path))
    with open(path, "wb") as file:
        file.write(content)
    assert reading.choose(machine)[0] == reading.WAYS[2] and machine.measured > 0
    with open(path, encoding="ascii") as file:
        assert json.load(file)["hint"] == reading.WAYS[2].hint
    assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)]


def test_where_nothing_can_be_kept_a_run_goes_on(tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    way, whence = reading.choose(Machine(reading.WAYS[1]))
    assert way == reading.WAYS[1] and whence.startswith("measured now; not kept (")


def test_without_leave_to_measure_it_is_said_that_nothing_is_known():
    machine = Machine(reading.WAYS[1])
    assert reading.choose(machine, may_measure=False) == (reading.DEFAULT, "until a run measures it")
    assert machine.measured == 0


def test_the_environment_overrides_what_is_kept(monkeypatch):
    machine = Machine(reading.WAYS[2])
    reading.choose(machine)
    monkeypatch.setenv(reading.VARIABLE, "none,0,1")
    assert reading.choose(machine) == (reading.Way("none", 0, 1), "by QWEN15_READING")


@pytest.mark.parametrize("text", ("far,4096,2", "outer", "outer,4096", "outer,4096,3", "outer,100,2", "none,64,2",
                                  "near,0,2", "outer,9999999999,2", "outer,4096,2,1", "outer,\u0664096,2"))
def test_an_override_that_cannot_be_gets_one_line(monkeypatch, text):
    monkeypatch.setenv(reading.VARIABLE, text)
    with pytest.raises(UserError) as caught:
        reading.choose(Machine())
    line = str(caught.value)
    assert "\n" not in line and "QWEN15_READING" in line and "outer,4096,2" in line
    assert doctor.check_reading().status == doctor.FAIL


def test_the_doctor_says_what_was_chosen_and_whence(monkeypatch):
    monkeypatch.setenv(reading.VARIABLE, "near,2048,1")
    found = doctor.check_reading()
    assert found.status == doctor.OK and found.detail.startswith("near,2048,1 ") and "by QWEN15_READING" in found.detail


def test_this_machine_is_measured_in_a_moment_and_ends_as_it_began():
    import time

    kernels = library.load()
    start_s = time.perf_counter()
    way = reading.measured(kernels)
    assert way in reading.WAYS and time.perf_counter() - start_s < 20  # a machine of tests is busy


@pytest.mark.parametrize("threads", (1, 2, 3))
@pytest.mark.parametrize("kind", ("bfloat16", "float16", "float32", "int8", "int4"))
def test_no_way_changes_a_bit(kind, threads):
    """Rows that are no whole blocks; for what is not quantised, columns that are no whole lines."""
    kernels, rng = library.load(), np.random.default_rng(3)
    cols = 320 if kind.startswith("int") else 333

    def matrix(rows, skipped=0):
        if kind.startswith("int"):
            return Quantised(rng, (rows, cols), int(kind[3:]), 32)
        return Stored(rng.standard_normal((rows, cols)) * 0.05, kind).among_nans(skipped)

    plain, first, second = matrix(431), matrix(267, 5), matrix(267, 9)
    norm, eps = Stored(np.ones(cols), "float32"), np.array([1e-6], np.float32)
    before = kernels.threads
    kernels.threads = threads
    try:
        for tokens in (1, 2, 3, 5, 8, 13):
            x = rng.standard_normal((tokens, cols)).astype(np.float32)

            def results(x=x, tokens=tokens):
                return (call("project", [x, plain], (tokens, 431)),
                        call("gate_up", [x, norm, first, second, eps], (tokens, 267)))

            wanted = results()
            for way in (*reading.WAYS, reading.Way("near", 64, 1), reading.Way("outer", 1 << 20, 2)):
                kernels.read_by(reading.HINTS[way.hint], way.ahead, way.places)
                for got, expected in zip(results(), wanted):
                    np.testing.assert_array_equal(got, expected, err_msg=f"{way}, {tokens} tokens")
            kernels.read_by(1, 4096, 2)
    finally:
        kernels.threads = before
