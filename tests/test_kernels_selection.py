"""The searches over the vocabulary in C++ equal NumPy's in sampling.py, and a library that cannot be used says why."""

import numpy as np
import pytest
from qwen15.errors import UserError
from qwen15.generation import sampling
from qwen15.generation.sampling import PLAIN, NonFiniteLogits
from qwen15.kernels import library
from qwen15.kernels.build import find_compiler

try:
    KERNELS = [name for name in library.KERNELS if library.load().can_run(name)]
except UserError as error:
    pytest.skip(str(error), allow_module_level=True)

VOCABULARY = 151936


@pytest.fixture(params=KERNELS)
def fast(request):
    loaded = library.load()
    before, threads = loaded.kernels, loaded.threads
    loaded.use_kernels(request.param)
    loaded.threads = 2  # so that the vocabulary is searched in parts
    yield sampling.accelerated(loaded)
    loaded.use_kernels(before)
    loaded.threads = threads


def rows():
    """(name, row) with distinct values, ties, -inf, and sizes around a chunk."""
    rng = np.random.default_rng(1)
    for size in (1, 5, 255, 257, 1003, VOCABULARY):
        row = (rng.standard_normal(size) * 4).astype(np.float32)
        yield f"random {size}", row
        yield f"ties {size}", np.round(row)
        banned = row.copy()
        banned[rng.random(size) < 0.7] = -np.inf
        banned[size // 2] = 1.5
        yield f"-inf {size}", banned


ROWS = dict(rows())


@pytest.mark.parametrize("name", ROWS)
def test_searches_equal_numpys(fast, name):
    row = ROWS[name]
    np.testing.assert_array_equal(fast.argmax(np.stack((row, row[::-1]))), PLAIN.argmax(np.stack((row, row[::-1]))))
    for k in (1, 2, 20, 50, 600):
        ours, theirs = fast.top_candidates(row, k), PLAIN.top_candidates(row, k)
        np.testing.assert_array_equal(ours.ids, theirs.ids)
        np.testing.assert_array_equal(ours.values, theirs.values)


@pytest.mark.parametrize("kind", ("random", "ties", "-inf"))
@pytest.mark.parametrize("size", (5, 257, VOCABULARY))
@pytest.mark.parametrize("temperature, top_p",
                         ((1.0, 0.8), (0.7, 0.5), (1.5, 0.95), (0.1, 0.01), (3.0, 0.3), (60.0, 0.9)))
def test_nucleus_equals_numpys(fast, kind, size, temperature, top_p):
    row = ROWS[f"{kind} {size}"]
    ours, theirs = fast.nucleus_candidates(row, temperature, top_p), PLAIN.nucleus_candidates(row, temperature, top_p)
    # The sums differ in their last digits, so the token that crosses top_p may be the next one.
    assert abs(len(ours.ids) - len(theirs.ids)) <= 1
    shared = min(len(ours.ids), len(theirs.ids))
    np.testing.assert_array_equal(ours.ids[:shared], theirs.ids[:shared])


@pytest.mark.parametrize("bad", (np.nan, np.inf))
@pytest.mark.parametrize("at", (0, 300, VOCABULARY - 1))
def test_argmax_refuses_what_is_not_finite(fast, bad, at):
    row = ROWS[f"random {VOCABULARY}"].copy()
    row[at] = bad
    for selection in (fast, PLAIN):
        with pytest.raises(NonFiniteLogits):
            selection.argmax(row[None])


@pytest.mark.parametrize("at", (0, 300, VOCABULARY - 1))
def test_nan_among_candidates_is_refused(fast, at):
    row = ROWS[f"random {VOCABULARY}"].copy()
    row[at] = np.nan
    with pytest.raises(NonFiniteLogits):
        fast.top_candidates(row, 50)
    with pytest.raises(NonFiniteLogits):
        fast.nucleus_candidates(row, 1.0, 0.8)


def test_library_that_is_missing_or_broken_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match="have not been built") as caught:
        library.Library(tmp_path / "none.so")
    assert "qwen15.kernels.build" in str(caught.value)
    (tmp_path / "broken.so").write_bytes(b"no library")
    with pytest.raises(UserError, match="cannot be loaded"):
        library.Library(tmp_path / "broken.so")


def test_library_of_another_version_is_refused(monkeypatch):
    path = library.library_path()
    monkeypatch.setattr(library, "ABI_VERSION", library.ABI_VERSION + 1)
    with pytest.raises(UserError, match="this package needs"):
        library.Library(path)


def test_library_that_lacks_a_function_is_refused_by_its_name(tmp_path):
    data = library.library_path().read_bytes()
    (tmp_path / "other.so").write_bytes(data.replace(b"qwen15_busy_seconds\0", b"qwen15_idle_seconds\0"))
    with pytest.raises(UserError, match="compiled from other sources .* they lack qwen15_busy_seconds. Build it with"):
        library.Library(tmp_path / "other.so")


def test_missing_compiler_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"no C\+\+ compiler found") as caught:
        find_compiler()
    assert "apt-get install g++" in str(caught.value)


def test_a_script_run_in_a_checkout_finds_the_installed_library(tmp_path, monkeypatch):
    own, installed = tmp_path / "checkout", tmp_path / "site-packages"
    monkeypatch.delenv("QWEN15_KERNELS_LIBRARY", raising=False)
    monkeypatch.setattr(library, "OUTPUT_DIR", own)
    monkeypatch.setattr("sys.path", [str(installed)])
    assert library.library_path() == own / library.LIBRARY_NAME  # nowhere: named where it would be built
    there = installed / "qwen15" / "kernels" / "_lib" / library.LIBRARY_NAME
    there.parent.mkdir(parents=True)
    there.touch()
    assert library.library_path() == there
    own.mkdir()
    (own / library.LIBRARY_NAME).touch()
    assert library.library_path() == own / library.LIBRARY_NAME
