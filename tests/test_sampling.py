"""Sampling against Hugging Face's logits processors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qwen15.generation import sampling
from qwen15.generation.sampling import NonFiniteLogits, NothingAllowed, Sampler, SamplingParams

STOP_IDS = (5, 11)


def probabilities(params: SamplingParams, logits: np.ndarray, prompt=(), made=()) -> np.ndarray:
    """The distribution that `Sampler` draws from."""
    sampler = Sampler(params, prompt, stop_ids=frozenset(STOP_IDS))
    for token in made:
        sampler.note(token)
    found = sampler.candidates(sampler.penalised(logits))
    out = np.zeros(len(logits))
    out[found.ids] = sampling._softmax(found.values, params.temperature)
    return out


def hf_probabilities(params: SamplingParams, logits: np.ndarray, prompt=(), made=()) -> np.ndarray:
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as hf

    scores = torch.tensor(logits)[None]
    ids = torch.tensor([[*prompt, *made]], dtype=torch.long)
    chain = []
    if params.logit_bias:
        chain.append(hf.SequenceBiasLogitsProcessor([[[token], bias] for token, bias in params.logit_bias]))
    if params.repetition_penalty != 1.0:
        chain.append(hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.no_repeat_ngram_size:
        chain.append(hf.NoRepeatNGramLogitsProcessor(params.no_repeat_ngram_size))
    if params.min_new_tokens:
        chain.append(hf.MinNewTokensLengthLogitsProcessor(len(prompt), params.min_new_tokens, list(STOP_IDS),
                                                          device="cpu"))
    if params.temperature != 1.0:
        chain.append(hf.TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        chain.append(hf.TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        chain.append(hf.TopPLogitsWarper(params.top_p))
    if params.min_p:
        chain.append(hf.MinPLogitsWarper(params.min_p))
    for processor in chain:
        scores = processor(ids, scores)
    return torch.softmax(scores.double(), -1)[0].numpy()


CASES = [
    dict(), dict(temperature=0.7), dict(temperature=1.9, top_k=5), dict(top_p=0.8), dict(top_p=0.01),
    dict(top_k=20, top_p=0.8),
    dict(top_k=1), dict(top_k=5000, top_p=0.5), dict(repetition_penalty=1.3), dict(repetition_penalty=0.8, top_k=7),
    dict(repetition_penalty=1.1, temperature=0.7, top_k=20, top_p=0.8),
    dict(min_p=0.1), dict(min_p=0.02, temperature=1.7), dict(min_p=0.3, top_k=9, top_p=0.9), dict(min_p=1.0),
    dict(no_repeat_ngram_size=1), dict(no_repeat_ngram_size=2), dict(no_repeat_ngram_size=3, top_k=10),
    dict(min_new_tokens=9), dict(min_new_tokens=3), dict(logit_bias=((3, 4.0), (17, -2.5), (40, -30.0))),
    dict(logit_bias=((3, 2.0),), repetition_penalty=1.3, no_repeat_ngram_size=2, min_new_tokens=9, temperature=0.8,
         top_k=30,
         top_p=0.95, min_p=0.01),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("spread", [0.5, 3.0, 12.0])
def test_distribution_equals_hugging_faces(case, spread):
    random = np.random.default_rng(3)
    logits = (random.standard_normal(503) * spread).astype(np.float32)
    prompt, made = random.integers(0, 40, 60).tolist(), random.integers(0, 40, 5).tolist()
    params = SamplingParams(do_sample=True, **case)
    ours, theirs = probabilities(params, logits, prompt, made), hf_probabilities(params, logits, prompt, made)
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


def test_presence_and_frequency_penalties_look_at_what_was_generated_alone():
    """As vLLM and OpenAI define them: logit - frequency_penalty * count - presence_penalty * (count > 0)."""
    sampler = Sampler(SamplingParams(presence_penalty=0.5, frequency_penalty=0.25), prompt=[0, 0, 1])
    for token in (1, 2, 2, 2):
        sampler.note(token)
    assert sampler.penalised(np.ones(5, np.float32)).tolist() == [1.0, 0.25, -0.25, 1.0, 1.0]


def test_an_answer_does_not_end_before_min_new_tokens():
    sampler = Sampler(SamplingParams(min_new_tokens=2), (), stop_ids=frozenset({4}))
    logits = np.arange(5, dtype=np.float32)
    assert [sampler.choose(logits) for _ in range(4)] == [3, 3, 4, 4]


class Only:
    """Allows the tokens of a list, then the next list's."""

    def __init__(self, *sets, size=70):
        self.sets, self.size, self.accepted = list(sets), size, []

    def allowed(self):
        if not self.sets:
            return None
        bits = np.zeros(-(-self.size // 32), np.uint32)
        for token in self.sets[0]:
            bits[token // 32] |= np.uint32(1 << token % 32)
        return bits.view(np.int32)

    def accept(self, token):
        self.accepted.append(token)
        self.sets = self.sets[1:]


@pytest.mark.parametrize("case", [dict(), dict(do_sample=True), dict(do_sample=True, top_k=5),
                                  dict(do_sample=True, top_p=0.4),
                                  dict(do_sample=True, min_p=0.9), dict(repetition_penalty=1.5)], ids=str)
def test_a_constraint_leaves_what_it_allows_and_hears_what_was_chosen(case):
    logits = np.random.default_rng(1).standard_normal(70).astype(np.float32)
    mask = Only([3, 69], [33], range(70))
    sampler = Sampler(SamplingParams(**case), (), mask=mask)
    made = [sampler.choose(logits) for _ in range(4)]
    assert made[0] in (3, 69) and made[1] == 33 and mask.accepted == made
    with pytest.raises(NothingAllowed):
        Sampler(SamplingParams(**case), (), mask=Only([])).choose(logits)


def test_a_constraint_does_not_hide_logits_that_are_not_finite():
    logits = np.zeros(70, np.float32)
    logits[9] = np.nan
    with pytest.raises(NonFiniteLogits):
        Sampler(SamplingParams(), (), mask=Only([3])).choose(logits)


ANY_PARAMS = st.builds(
    SamplingParams, do_sample=st.booleans(), temperature=st.floats(0.1, 4), top_k=st.integers(0, 60),
    top_p=st.floats(0.01, 1),
    repetition_penalty=st.floats(0.5, 2), seed=st.integers(0, 2 ** 32 - 1), min_p=st.floats(0, 1),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2), min_new_tokens=st.integers(0, 5), no_repeat_ngram_size=st.integers(0, 3),
    logit_bias=st.sampled_from([(), ((3, 100.0),), ((2, -np.inf), (3, 5.0))]))


@settings(max_examples=200, deadline=None)
@given(ANY_PARAMS, st.integers(0, 2 ** 16), st.integers(4, 60), st.lists(st.integers(0, 3), max_size=6))
def test_whatever_the_settings_a_choice_is_one_of_the_candidates_and_repeats_with_its_seed(params, seed, vocabulary,
                                                                                           prompt):
    logits = (np.random.default_rng(seed).standard_normal(vocabulary) * 3).astype(np.float32)
    one, other = (Sampler(params, prompt, stop_ids=frozenset({1})) for _ in range(2))
    for count in range(6):
        row = one.penalised(logits)
        if not row.max() > -np.inf:
            return  # every token would repeat an n-gram
        allowed = {int(i) for i, v in zip(one.candidates(row).ids, one.candidates(row).values) if v > -np.inf}
        token = one.choose(logits)
        assert token in allowed and token == other.choose(logits)
        assert not (token == 1 and count < params.min_new_tokens)
        if not params.do_sample:
            assert row[token] == row.max()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(do_sample=True),
                                    SamplingParams(do_sample=True, top_k=3),
                                    SamplingParams(do_sample=True, top_p=0.5), SamplingParams(repetition_penalty=1.2)],
                         ids=str)
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
