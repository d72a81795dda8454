"""MindFormers' own LlamaForCausalLM, its Ascend operators emulated, generates what Hugging Face's Qwen2 generates."""

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


@pytest.mark.parametrize("dtype, tied", (("float32", False), ("bfloat16", True)))
def test_the_check_for_cards_passes_on_right_operators(worker, tmp_path, dtype, tied):
    found = worker.call("ascend_cases.check", folder=str(tmp_path), dtype=dtype, tied=tied)
    assert len(found) == 14
    assert all(error <= limit for error, limit in found.values()), found
