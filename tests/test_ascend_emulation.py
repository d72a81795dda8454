"""MindFormers' own LlamaForCausalLM, its Ascend operators emulated, generates what Hugging Face's Qwen2 generates."""

import functools
import json
import re

import pytest
from ascend_worker import Worker
from conftest import require

require("torch", "transformers", "mindformers")

VERSION = functools.partial(pytest.param, marks=pytest.mark.version)
rare = functools.partial(pytest.param, marks=pytest.mark.slow)

LIMITS = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 3e-2}
"""Largest error of a logit, as a fraction of the largest logit. Measured: 1e-6, 1e-3, 7e-3."""

TYPICAL = {"float16": 2.4e-4, "bfloat16": 1.75e-3}
"""The same of the root of the mean square. Measured: 2.0e-4, 1.6e-3; more where norms are not computed in float32."""


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    worker = Worker(tmp_path_factory.mktemp("worker"))
    yield worker
    worker.close()


@pytest.mark.parametrize("kv_heads, tied", ((4, False), rare(4, True), rare(2, False), VERSION(2, True), (1, True)),
                         ids=("multi_head", "multi_head_tied", "grouped", "grouped_tied", "one_kv_head_tied"))
def test_float32_generates_the_tokens_of_hugging_face(worker, tmp_path, kv_heads, tied):
    found = worker.call("ascend_cases.compare", folder=str(tmp_path), kv_heads=kv_heads, tied=tied, dtype="float32")
    assert found["same_tokens"]
    assert found["largest_error"] < LIMITS["float32"] * found["logits_scale"]
    assert found["scattered"], "the blocks were in order: nothing is shown about block tables"
    assert found["account"].startswith(f"weights: loaded {26 if tied else 27} of {26 if tied else 27}, missing 0, "
                                       f"unexpected 0")
    assert {name: found["replaced"][name] for name in ("RmsNorm", "ApplyRotaryPosEmb", "ReshapeAndCache",
                                                       "FlashAttentionScore",
                                                       "PagedAttention", "SiLU")} == {
        "RmsNorm": 5, "ApplyRotaryPosEmb": 2, "ReshapeAndCache": 2, "FlashAttentionScore": 2, "PagedAttention": 2,
                                                           "SiLU": 2}


@pytest.mark.parametrize("dtype", ("float16", VERSION("bfloat16")))
def test_half_precision_stays_within_its_rounding(worker, tmp_path, dtype):
    found = worker.call("ascend_cases.compare", folder=str(tmp_path), kv_heads=2, tied=False, dtype=dtype)
    assert found["largest_error"] < LIMITS[dtype] * found["logits_scale"]
    assert found["typical_error"] < TYPICAL[dtype] * found["logits_scale"], "are the norms computed in float32?"


INT8 = {"bits": 8, "group": 0, "zeros": False}
QUANTISED = {
    "int8": {"layers": INT8},
    "int8_zero_points": {"layers": {**INT8, "zeros": True}},
    "int8_groups_of_128_zero_points": {"layers": {"bits": 8, "group": 128, "zeros": True}},
    "int4_groups_of_64": {"layers": {"bits": 4, "group": 64, "zeros": False}},
    "int4_groups_of_128_zero_points": {"layers": {"bits": 4, "group": 128, "zeros": True}},
    "int4_whole_rows": {"layers": {"bits": 4, "group": 0, "zeros": True}},
    "int4_with_int8_table": {"layers": {"bits": 4, "group": 64, "zeros": True},
                             "table": {"bits": 8, "group": 32, "zeros": False}},
}


@pytest.mark.parametrize("scheme", [
    VERSION(scheme) if scheme in ("int8_groups_of_128_zero_points", "int4_with_int8_table") else
    scheme if scheme in ("int8", "int4_whole_rows") else rare(scheme) for scheme in QUANTISED])
def test_quantised_weights_generate_what_the_dequantised_ones_do_in_hugging_face(worker, tmp_path, scheme):
    found = worker.call("ascend_cases.compare", folder=str(tmp_path), kv_heads=2, tied=False, dtype="float32",
                        quantised=QUANTISED[scheme])
    assert found["same_tokens"]
    assert found["largest_error"] < LIMITS["float32"] * found["logits_scale"]
    assert (found["replaced"]["WeightQuantBatchMatmul"], found["replaced"]["MatMul"]) == (14, 1)
    assert found["account"].startswith("weights: loaded 27 of 27, missing 0, unexpected 0")


@pytest.mark.parametrize("dtype, tied", (("float16", False), ("bfloat16", True)))
def test_quantised_weights_in_half_precision_stay_within_its_rounding(worker, tmp_path, dtype, tied):
    found = worker.call("ascend_cases.compare", folder=str(tmp_path), kv_heads=2, tied=tied, dtype=dtype,
                        quantised=QUANTISED["int4_with_int8_table"], generations=1)
    assert found["largest_error"] < LIMITS[dtype] * found["logits_scale"]
    told = found["account"].split("; ")[1:]
    assert [line.split(":")[0] for line in told] == [
        f"embedding and head int8, groups of 32 -> {dtype}",
        *(["scale float16 -> bfloat16"] if dtype == "bfloat16" else [])]


def test_a_conversation_that_keeps_its_cache_is_prefilled_whole(worker, tmp_path):
    turns = worker.call("ascend_cases.conversation", folder=str(tmp_path))
    assert len(turns) == 2 and all(ours == theirs and len(ours) == 6 for ours, theirs in turns)


@pytest.mark.parametrize("mutation", ("gate_up", "theta", "eps", "q_bias", rare("k_bias"), rare("v_bias")))
def test_the_comparison_notices(worker, tmp_path, mutation):
    """Each fault moves the logits by far more than the limits, also that of bfloat16: agreement above is not an
    accident."""
    found = worker.call("ascend_cases.compare", folder=str(tmp_path), kv_heads=2, tied=False, dtype="float32",
                        mutation=mutation,
                        generations=1)
    assert found["largest_error"] > 300 * LIMITS["float32"] * found["logits_scale"] or \
        found["largest_error"] > LIMITS["bfloat16"] * found["logits_scale"]
    assert not found["same_tokens"]


@pytest.mark.version
def test_a_checkpoint_that_lacks_a_weight_is_refused(worker, tmp_path):
    """MindFormers' own loading leaves the weight random and goes on."""
    said = worker.call("ascend_cases.refused", folder=str(tmp_path), tensor="model.layers.1.attention.wk.bias")
    assert "model.layers.1.attention.wk.bias is missing (26 of 27 weights found)" in said


def test_the_check_for_cards_passes_on_right_operators(worker, module_dir):
    code, output = worker.call("ascend_cases.report", arguments=[])
    lines = output.splitlines()
    results = [line for line in lines if " limit " in line]
    assert code == 0 and len(results) == 66 and all(line.endswith("ok") for line in results), output
    assert json.loads(lines[-1])["failures"] == []
    # The report in the docs is of this form: every line of it stands here, but for the numbers.
    forms = {_form(line) for line in lines}
    for name in ("ascend.md", "ascend_en.md"):
        page = (module_dir.parent.parent / "docs" / name).read_text(encoding="utf-8")
        shown = re.search(r"```text\n(Ascend check of qwen15.*?)\n```", page, re.DOTALL)[1].splitlines()
        assert [line for line in shown
                if line.strip() != "..." and not any(form.startswith(_form(line)) for form in forms)] == []


def _form(line: str) -> str:
    return re.sub(r"[\d.]+", "N", line.split("...")[0])


@pytest.mark.version
def test_the_check_for_cards_fails_on_a_wrong_operator(tmp_path):
    worker = Worker(tmp_path)
    try:
        code, output = worker.call("ascend_cases.report", arguments=["--dtype", "float16"], fault=True)
    finally:
        worker.close()
    failed = {line.split(" float16")[0].strip() for line in output.splitlines() if "  FAILED" in line}
    assert code == 1
    assert failed == {"PagedAttention, heads of 64", "PagedAttention, heads of 128",
                      *(f"network, 1 card(s){tied}: decode {turn}" for tied in ("", ", tied") for turn in (1, 2))}
