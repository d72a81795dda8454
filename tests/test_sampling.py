"""Sampling against Hugging Face's logits processors."""

import numpy as np
import pytest
from qwen15.generation import sampling
from qwen15.generation.sampling import NonFiniteLogits, Sampler, SamplingParams


def probabilities(params: SamplingParams, logits: np.ndarray, prompt=()) -> np.ndarray:
    """The distribution that `Sampler` draws from."""
    sampler = Sampler(params, prompt)
    found = sampler.candidates(sampler.penalised(logits))
    out = np.zeros(len(logits))
    out[found.ids] = sampling._softmax(found.values, params.temperature)
    return out


def hf_probabilities(params: SamplingParams, logits: np.ndarray, prompt=()) -> np.ndarray:
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as hf

    scores = torch.tensor(logits)[None]
    ids = torch.tensor([list(prompt)], dtype=torch.long)
    chain = []
    if params.repetition_penalty != 1.0:
        chain.append(hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.temperature != 1.0:
        chain.append(hf.TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        chain.append(hf.TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        chain.append(hf.TopPLogitsWarper(params.top_p))
    for processor in chain:
        scores = processor(ids, scores)
    return torch.softmax(scores.double(), -1)[0].numpy()


CASES = [
    dict(), dict(temperature=0.7), dict(temperature=1.9, top_k=5), dict(top_p=0.8), dict(top_p=0.01), dict(top_k=20, top_p=0.8),
    dict(top_k=1), dict(top_k=5000, top_p=0.5), dict(repetition_penalty=1.3), dict(repetition_penalty=0.8, top_k=7),
    dict(repetition_penalty=1.1, temperature=0.7, top_k=20, top_p=0.8),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("spread", [0.5, 3.0, 12.0])
def test_distribution_equals_hugging_faces(case, spread):
    random = np.random.default_rng(3)
    logits = (random.standard_normal(503) * spread).astype(np.float32)
    prompt = random.integers(0, 503, 60).tolist()
    params = SamplingParams(do_sample=True, **case)
    ours, theirs = probabilities(params, logits, prompt), hf_probabilities(params, logits, prompt)
    assert np.flatnonzero(ours).tolist() == np.flatnonzero(theirs).tolist()
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-9)


def test_tokens_that_tie_with_the_kth_are_kept_as_hugging_face_does():
    logits = np.array([3, 1, 2, 2, 0], np.float32)
    ours = probabilities(SamplingParams(do_sample=True, top_k=2), logits)
    assert np.flatnonzero(ours).tolist() == [0, 2, 3]
    np.testing.assert_allclose(ours, hf_probabilities(SamplingParams(top_k=2), logits), rtol=1e-6)


def test_draws_follow_the_distribution():
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32))
    sampler = Sampler(SamplingParams(do_sample=True, seed=1), ())
    counts = np.bincount([sampler.choose(logits) for _ in range(20000)], minlength=4) / 20000
    np.testing.assert_allclose(counts, [0.5, 0.25, 0.15, 0.1], atol=0.015)


def test_the_same_seed_gives_the_same_tokens_and_another_stream_others():
    logits = np.zeros(1000, np.float32)

    def draws(seed, stream):
        sampler = Sampler(SamplingParams(do_sample=True, seed=seed, stream=stream), ())
        return [sampler.choose(logits) for _ in range(8)]

    assert draws(5, 0) == draws(5, 0)
    assert draws(5, 0) != draws(5, 1)
    assert draws(5, 0) != draws(6, 0)


def test_penalty_applies_to_the_prompt_and_to_what_was_chosen():
    sampler = Sampler(SamplingParams(repetition_penalty=2.0), [0])
    logits = np.array([4, 3, -1, 2.5], np.float32)
    assert sampler.choose(logits) == 1  # 4 / 2 < 3
    assert sampler.choose(logits) == 3  # 3 / 2 < 2.5
    np.testing.assert_allclose(sampler.penalised(logits), [2, 1.5, -1, 1.25])
    assert logits.tolist() == [4, 3, -1, 2.5]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(do_sample=True), SamplingParams(do_sample=True, top_k=3),
                                    SamplingParams(do_sample=True, top_p=0.5), SamplingParams(repetition_penalty=1.2)], ids=str)
def test_logits_that_are_not_finite_choose_nothing(bad, params):
    logits = np.linspace(0, 1, 50).astype(np.float32)
    logits[17] = bad
    with np.errstate(invalid="ignore"), pytest.raises(NonFiniteLogits):
        Sampler(params, [3]).choose(logits)


def test_argmax_prefers_the_lower_id_and_works_by_row():
    assert sampling.argmax(np.array([[1, 5, 5], [7, 0, 7]], np.float32)).tolist() == [1, 0]


def test_log_probabilities_are_those_of_the_softmax():
    logits = np.array([1.0, 2.0, 3.0], np.float32)
    ids, values = sampling.most_probable(logits, 2)
    expected = np.log(np.exp(logits.astype(float)) / np.exp(logits.astype(float)).sum())
    assert ids.tolist() == [2, 1]
    np.testing.assert_allclose(values, expected[[2, 1]], rtol=1e-12)


def test_a_rounding_error_of_the_logits_does_not_change_what_is_drawn():
    rng = np.random.default_rng(3)
    logits = rng.standard_normal(50000).astype(np.float32)
    nearly = (logits + rng.uniform(-3e-6, 3e-6, len(logits))).astype(np.float32)
    for params in (SamplingParams(do_sample=True, seed=1), SamplingParams(do_sample=True, top_p=0.8, seed=1)):
        one, other = Sampler(params, [0]), Sampler(params, [0])
        assert [one.choose(logits) for _ in range(200)] == [other.choose(nearly) for _ in range(200)]
