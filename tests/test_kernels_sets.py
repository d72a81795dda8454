"""Which instruction sets run: all that this CPU has, the best unless told otherwise; those with dot products of bf16
meet weights that fill no tile."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from kernels_cases import BF16, F32, Stored, call, linear, relative_error, rmsnorm, silu
from kernels_remote import COMMAND, load
from qwen15.errors import UserError
from qwen15.kernels import library
from qwen15.kernels.build import find_compiler, instruction_sets
from qwen15.ops import CHOICES
from test_kernels import EPS, driver, threads, weight  # noqa: F401  (fixtures)

try:
    load()
except UserError as error:
    pytest.skip(str(error), allow_module_level=True)

AVX2 = {"avx2", "fma", "f16c"}
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
NEEDED = {"amx": AVX512 | {"avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16"},
          "avx512_bf16": AVX512 | {"avx512_bf16", "avx512_vnni"}, "avx512": AVX512, "avx2": AVX2,
          "neon_bf16": {"asimd", "asimddp", "asimdhp", "bf16"}, "neon_dot": {"asimd", "asimddp"}, "neon": {"asimd"},
          "portable": set()}
"""Instruction set -> the flags in /proc/cpuinfo that it takes."""


def expected():
    """Names of the sets that should run: what the caller says of an emulated CPU, else by this one's flags."""
    told = os.environ.get("QWEN15_EXPECTED_KERNELS")
    if told:
        return told.split()
    if os.environ.get(COMMAND) or not os.path.exists("/proc/cpuinfo"):
        pytest.skip("nobody says what the driver's CPU has")
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        flags = set(re.search(r"^(?:flags|Features)\s*:(.*)$", file.read(), re.MULTILINE).group(1).split())
    return [name for name in library.KERNELS if NEEDED[name] <= flags]


def test_every_set_that_the_cpu_has_runs():
    runs = [name for name in library.KERNELS if load().can_run(name)]
    wanted = expected()
    if "amx" in wanted and "amx" not in runs:
        wanted.remove("amx")  # the system may withhold it; `qwen15 doctor` says so
    assert runs == wanted


def test_the_environment_knows_the_same_sets():
    assert CHOICES == (*library.KERNELS, "reference")
    assert set(NEEDED) == set(library.KERNELS)


@pytest.mark.skipif(bool(os.environ.get(COMMAND)), reason="asks this machine's library")
@pytest.mark.parametrize("forced", ("", "portable"))
def test_the_best_set_is_chosen_unless_the_environment_names_one(forced):
    code = "from qwen15.kernels import library; print(library.load().kernels)"
    environment = {**os.environ, "QWEN15_KERNELS": forced, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE,
                          universal_newlines=True, check=True)
    runs = [name for name in library.KERNELS if load().can_run(name)]
    assert done.stdout.strip() == (forced or runs[0])


@pytest.mark.skipif(bool(os.environ.get(COMMAND)), reason="looks into this machine's library")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="an x86 library is looked for")
@pytest.mark.parametrize("instruction", ("tdpbf16ps", "tileloadd", "ldtilecfg", "tilerelease", "vdpbf16ps", "vpdpwssd"))
def test_the_library_holds_the_instructions_it_names(instruction):
    if shutil.which("objdump") is None:
        pytest.skip("objdump not found")
    command = ["objdump", "-d", "--no-show-raw-insn", str(library.library_path())]
    listing = subprocess.run(command, stdout=subprocess.PIPE, universal_newlines=True, check=True).stdout
    if "isa_amx.cpp" not in instruction_sets(shlex.split(find_compiler())):
        pytest.skip("the compiler is too old for AMX")
    assert instruction in listing


@pytest.fixture(params=("amx", "avx512_bf16", "neon_bf16"))
def pairs(request):
    """Kernels with dot products of bf16."""
    loaded = load()
    if not loaded.can_run(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    before = loaded.kernels
    loaded.use_kernels(request.param)
    yield loaded
    loaded.use_kernels(before)


@pytest.mark.parametrize("tokens", (8, 9, 15, 16, 17, 33, 47, 48, 64, 65, 96, 97, 540))
def test_weights_that_fill_no_tile_meet_batches_of_any_width(pairs, threads, tokens):  # noqa: F811
    rng = np.random.default_rng(tokens)
    sizes = ((32, 16), (30, 5), (1058, 33), (544, 70), (2080, 17)) if tokens < 90 else ((64, 20), (1058, 5))
    for cols, rows in sizes:
        x, w = rng.standard_normal((tokens, cols)).astype(np.float32), weight(rng, (rows, cols), BF16)
        w = w.among_nans(rows)
        residual = rng.standard_normal((tokens, rows)).astype(np.float32)
        wanted = linear(x.astype(np.float64), w)
        assert relative_error(call("project", (x, w), (tokens, rows)), wanted) < 2e-5
        assert relative_error(call("project_add", (x, w, residual), (tokens, rows)), wanted + residual) < 2e-5


@pytest.mark.parametrize("tokens", (9, 31, 64, 130))
def test_gate_and_up_of_a_batch(pairs, threads, tokens):  # noqa: F811
    rng = np.random.default_rng(tokens)
    for hidden, inner in ((96, 75), (1024, 130), (1030, 16)):
        x = rng.standard_normal((tokens, hidden)).astype(np.float32)
        norm, (w1, w3) = weight(rng, hidden, BF16, 1.0), (weight(rng, (inner, hidden), BF16) for _ in range(2))
        normed = rmsnorm(x.astype(np.float64), norm, EPS)
        got = call("gate_up", (x, norm, w1, w3, np.array([EPS], np.float32)), (tokens, inner))
        assert relative_error(got, silu(linear(normed, w1)) * linear(normed, w3)) < 3e-3


@pytest.mark.parametrize("tokens", (12, 80))
def test_a_tokens_products_do_not_depend_on_its_neighbours(pairs, tokens):
    rng = np.random.default_rng(tokens)
    x, w = rng.standard_normal((tokens, 160)).astype(np.float32), weight(rng, (40, 160), BF16)
    wanted = call("project", (x, w), (tokens, 40))
    x[1] = np.nan
    got = call("project", (x, w), (tokens, 40))
    keep = np.arange(tokens) != 1
    np.testing.assert_array_equal(got[keep], wanted[keep])
    assert np.isnan(got[1]).all()


def test_few_tokens_of_one_set_equal_those_of_a_batch(pairs):
    rng = np.random.default_rng(4)
    x, w = rng.standard_normal((64, 512)).astype(np.float32), weight(rng, (96, 512), BF16)
    whole = call("project", (x, w), (64, 96))
    one = call("project", (x[5:6], Stored(w.values, BF16)), (1, 96))
    assert relative_error(whole[5:6], one.astype(np.float64)) < 1e-5
    assert whole.dtype == np.dtype(F32)
