"""MindFormers' own LlamaForCausalLM, its Ascend operators emulated, generates what Hugging Face's Qwen2 generates."""

import json
import re

import pytest
from ascend_worker import Worker

for module in ("torch", "transformers", "mindformers"):
    pytest.importorskip(module)

LIMITS = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 3e-2}
"""Largest error of a logit, as a fraction of the largest logit. Measured: 1e-6, 1e-3, 7e-3."""


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    worker = Worker(tmp_path_factory.mktemp("worker"))
    yield worker
    worker.close()


@pytest.mark.parametrize("kv_heads, tied", ((4, False), (4, True), (2, False), (2, True), (1, True)),
                         ids=("multi_head", "multi_head_tied", "grouped", "grouped_tied", "one_kv_head_tied"))
def test_float32_generates_the_tokens_of_hugging_face(worker, tmp_path, kv_heads, tied):
    found = worker.call("ascend_cases.compare", folder=str(tmp_path), kv_heads=kv_heads, tied=tied, dtype="float32")
    assert found["same_tokens"]
    assert found["largest_error"] < LIMITS["float32"] * found["logits_scale"]
    assert found["scattered"], "the blocks were in order: nothing is shown about block tables"
    assert found["account"].startswith(f"weights: loaded {26 if tied else 27} of {26 if tied else 27}, missing 0, unexpected 0")
    assert {name: found["replaced"][name] for name in ("RmsNorm", "ApplyRotaryPosEmb", "ReshapeAndCache", "FlashAttentionScore",
                                                       "PagedAttention", "SiLU")} == {
        "RmsNorm": 5, "ApplyRotaryPosEmb": 2, "ReshapeAndCache": 2, "FlashAttentionScore": 2, "PagedAttention": 2, "SiLU": 2}


@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
def test_half_precision_stays_within_its_rounding(worker, tmp_path, dtype):
    found = worker.call("ascend_cases.compare", folder=str(tmp_path), kv_heads=2, tied=False, dtype=dtype)
    assert found["largest_error"] < LIMITS[dtype] * found["logits_scale"]


def test_a_conversation_that_keeps_its_cache_is_prefilled_whole(worker, tmp_path):
    turns = worker.call("ascend_cases.conversation", folder=str(tmp_path))
    assert len(turns) == 2 and all(ours == theirs and len(ours) == 6 for ours, theirs in turns)


@pytest.mark.parametrize("mutation", ("gate_up", "theta", "eps", "q_bias", "k_bias", "v_bias"))
def test_the_comparison_notices(worker, tmp_path, mutation):
    """Each fault moves the logits by far more than the limits, also that of bfloat16: agreement above is not an accident."""
    found = worker.call("ascend_cases.compare", folder=str(tmp_path), kv_heads=2, tied=False, dtype="float32", mutation=mutation,
                        generations=1)
    assert found["largest_error"] > 300 * LIMITS["float32"] * found["logits_scale"] or \
        found["largest_error"] > LIMITS["bfloat16"] * found["logits_scale"]
    assert not found["same_tokens"]


def test_a_checkpoint_that_lacks_a_weight_is_refused(worker, tmp_path):
    """MindFormers' own loading leaves the weight random and goes on."""
    said = worker.call("ascend_cases.refused", folder=str(tmp_path), tensor="model.layers.1.attention.wk.bias")
    assert "model.layers.1.attention.wk.bias is missing (26 of 27 weights found)" in said


def test_the_check_for_cards_passes_on_right_operators(worker, module_dir):
    code, output = worker.call("ascend_cases.report", arguments=[])
    lines = output.splitlines()
    results = [line for line in lines if " limit " in line]
    assert code == 0 and len(results) == 36 and all(line.endswith("ok") for line in results), output
    assert json.loads(lines[-1])["failures"] == []
    # The report in the docs is of this form: every line of it stands here, but for the numbers.
    page = (module_dir.parent.parent / "docs" / "ascend.md").read_text(encoding="utf-8")
    shown = re.search(r"```text\n(Ascend check of qwen15.*?)\n```", page, re.DOTALL)[1].splitlines()
    forms = {_form(line) for line in lines}
    assert [line for line in shown if line.strip() != "..." and not any(form.startswith(_form(line)) for form in forms)] == []


def _form(line: str) -> str:
    return re.sub(r"[\d.]+", "N", line.split("...")[0])


def test_the_check_for_cards_fails_on_a_wrong_operator(tmp_path):
    worker = Worker(tmp_path)
    try:
        code, output = worker.call("ascend_cases.report", arguments=["--dtype", "float16"], fault=True)
    finally:
        worker.close()
    failed = {line.split("float16")[0].strip() for line in output.splitlines() if line.endswith("FAILED")}
    assert code == 1
    assert failed == {"PagedAttention", *(f"network, 1 card(s){tied}: decode {turn}" for tied in ("", ", tied") for turn in (1, 2))}
