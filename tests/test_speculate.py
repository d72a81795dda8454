"""Guessed tokens: what is generated never depends on them, whatever is guessed."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qwen15.errors import UserError
from qwen15.generation.draft import DraftModel
from qwen15.generation.engine import Engine
from qwen15.generation.request import CANCELLED, FAILED, LENGTH, STOP, Request
from qwen15.generation.sampling import Sampler, SamplingParams
from qwen15.generation.speculate import (
    Passages,
    PromptLookup,
    Speculation,
    SuccessRate,
    most_streams,
    step_cost,
    worth,
)
from test_engine import PROMPTS, VOCABULARY, Recalling, collect, drain, expected, limits, next_token


class Scripted(Speculation):
    """Guesses what a function of (number, ids, room) says, and keeps account of what came of it."""

    everywhere, most_streams = True, 100

    def __init__(self, script, most=5):
        self.script, self.most = script, most
        self.learned, self.known = [], set()

    def guess(self, streams, rooms):
        self.known |= {c.number for c in streams}
        return [list(self.script(c.number, list(c.ids), room))[:max(room, 0)] for c, room in zip(streams, rooms)]

    def learn(self, continuation, guesses, right):
        assert guesses and 0 <= right <= len(guesses)
        assert continuation.ids[-right - 1:-1] == list(guesses[:right])
        self.learned.append((continuation.number, len(guesses), right))

    def forget(self, continuation):
        self.known.discard(continuation.number)


def oracle(number, ids, room):
    """The right tokens of `Recalling`."""
    return expected(ids, max(room, 0))


class Looping(Recalling):
    """Its text repeats itself after a while, as a summary does: a function of the last token alone."""

    def logits(self, sequence):
        row = np.zeros(VOCABULARY, np.float32)
        row[(int(sequence[-1]) * 7 + 3) % 11] = 1
        return row


class Drawn(Recalling):
    """Every token has some probability, and which one depends on the last two alone."""

    def logits(self, sequence):
        return drawn_row(int(sequence[-1]) % 5 * 5 + (int(sequence[-2]) % 5 if len(sequence) > 1 else 0))


@lru_cache(maxsize=None)
def drawn_row(key):
    row = np.random.default_rng(key).normal(size=VOCABULARY).astype(np.float32) * 3
    row.setflags(write=False)
    return row


def test_right_guesses_are_tokens_of_the_same_step():
    network = Recalling()
    engine = Engine(network, limits(), speculation=Scripted(oracle, most=3))
    tokens, ends = collect(engine, [Request((5, 6, 7), 3 + 9)])
    assert tokens[0] == expected((5, 6, 7), 9)
    # the prompt gives the first token; then 4 + 4 tokens in two steps
    assert [len(lens) for lens, _ in network.calls] == [1, 4, 4]
    usage = ends[0].usage
    assert (usage.decode_steps, usage.guessed_tokens, usage.accepted_tokens, usage.generated_tokens) == (2, 6, 6, 9)


def test_wrong_guesses_cost_nothing_but_their_rows():
    network = Recalling()
    engine = Engine(network, limits(), speculation=Scripted(lambda number, ids, room: [100] * room, most=3))
    tokens, ends = collect(engine, [Request((5, 6, 7), 12)])
    assert tokens[0] == expected((5, 6, 7), 9)
    assert ends[0].usage.accepted_tokens == 0 and ends[0].usage.decode_steps == 8
    assert engine.pool.free_blocks == 16


def test_guesses_end_at_the_limit_and_at_a_stop_token():
    asked = []

    def script(number, ids, room):
        asked.append((len(ids), room))
        return oracle(number, ids, room)

    tokens, ends = collect(Engine(Recalling(), limits(), speculation=Scripted(script, most=9)), [Request((1,), 5)])
    assert tokens[0] == expected((1,), 4) and ends[0].finish_reason == LENGTH
    assert asked == [(2, 2)]  # the fourth token is the row's own
    continuation = expected(PROMPTS[0], 12)
    stop = continuation[6]
    network = Recalling()
    engine = Engine(network, limits(), speculation=Scripted(oracle, most=9))
    tokens, ends = collect(engine, [Request(PROMPTS[0], 30, stop_ids=frozenset({stop}))])
    first = continuation.index(stop)
    assert tokens[0] == continuation[:first + 1] and ends[0].finish_reason == STOP
    assert len(network.calls[-1][0]) <= first + 1  # nothing behind the stop token was checked
    assert engine.pool.free_blocks == 16


def test_a_stream_of_ones_own_may_do_without_while_others_are_guessed():
    engine = Engine(Recalling(32), limits(32), speculation=Scripted(oracle))
    tokens, ends = collect(engine, [Request(p, len(p) + 9, speculate=i % 2 == 0) for i, p in enumerate(PROMPTS)])
    assert tokens == [expected(p, 9) for p in PROMPTS]
    assert [ends[i].usage.guessed_tokens is None for i in range(5)] == [False, True, False, True, False]
    assert ends[0].usage.decode_steps == 2 and ends[1].usage.decode_steps == 8


def test_only_what_was_accepted_is_found_by_others():
    """Wrong guesses were in the blocks when they filled; what a later conversation finds there is the text."""
    script = {n: lambda number, ids, room: [*oracle(number, ids, min(room, 2)), 99, 98, 97][:room] for n in range(9)}
    network = Recalling(32)
    engine = Engine(network, limits(32), speculation=Scripted(lambda n, ids, room: script[n](n, ids, room), most=5))
    first, _ = collect(engine, [Request((1, 2, 3), 24)])
    assert first[0] == expected((1, 2, 3), 21)
    history = (1, 2, 3, *first[0])
    second, ends = collect(engine, [Request((*history, 50), 30)])
    assert second[0] == expected((*history, 50), 5)
    assert ends[0].usage.cached_tokens == 20  # every full block of what went through the network


def test_accepted_tokens_of_the_last_step_are_in_the_prefix_cache_too():
    engine = Engine(Recalling(32), limits(32), speculation=Scripted(oracle, most=15))
    first, _ = collect(engine, [Request((1, 2, 3), 19)])
    _, ends = collect(engine, [Request((1, 2, 3, *first[0], 50), 30)])
    assert ends[0].usage.cached_tokens == 16


def test_guesses_take_only_blocks_that_nobody_else_needs():
    """Eight blocks of four tokens: what is in the prefix cache stays there while guesses would want its room."""
    engine = Engine(Recalling(8), limits(8), speculation=Scripted(oracle, most=20))
    kept = tuple(range(60, 77))
    collect(engine, [Request(kept, 18)])  # four full blocks stay findable
    assert engine.pool.unused_blocks == 4
    collect(engine, [Request((5,), 14, stop_ids=frozenset({expected((5,), 3)[2]}))])
    _, ends = collect(engine, [Request(kept, 18)])
    assert ends[0].usage.cached_tokens == 16


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(do_sample=True, seed=1),
                                    SamplingParams(repetition_penalty=1.1)], ids=str)
def test_rows_that_are_not_finite_matter_only_when_they_are_reached(params):
    class Broken(Recalling):
        def logits(self, sequence):
            if 100 in sequence[3:]:  # behind a wrong guess
                return np.full(VOCABULARY, np.nan, np.float32)
            return super().logits(sequence) * 50

    def script(number, ids, room):
        return [*oracle(number, ids, 1), 100, 100][:room]

    engine = Engine(Broken(), limits(), speculation=Scripted(script))
    request = Request((5, 6, 7), 15, params=params)
    tokens, ends = collect(engine, [request])
    assert ends[0].finish_reason == LENGTH and tokens[0] == collect(Engine(Broken(), limits()), [request])[0][0]

    class Ending(Recalling):
        def logits(self, sequence):
            broken = len(sequence) > 9
            return np.full(VOCABULARY, np.nan, np.float32) if broken else super().logits(sequence) * 50

    engine = Engine(Ending(), limits(), speculation=Scripted(oracle))
    tokens, ends = collect(engine, [Request((5, 6, 7), 30, params=params)])
    assert tokens[0] == expected((5, 6, 7), 7) and ends[0].finish_reason == FAILED
    assert "after 7 generated tokens" in str(ends[0].error)
    assert engine.pool.free_blocks == 16
    _, ends = collect(engine, [Request((5, 6, 7, *tokens[0][:3]), 8)])
    assert ends[0].usage.cached_tokens == 0  # nobody uses what it has put into the cache


# ---- every setting of sampling ----

SETTINGS = [
    SamplingParams(),
    SamplingParams(do_sample=True, seed=7),
    SamplingParams(do_sample=True, seed=8, temperature=0.6, top_k=5),
    SamplingParams(do_sample=True, seed=9, temperature=1.5, top_p=0.8, min_p=0.02),
    SamplingParams(do_sample=True, seed=9, top_k=12, top_p=0.7),
    SamplingParams(repetition_penalty=1.3),
    SamplingParams(do_sample=True, seed=3, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.3),
    SamplingParams(no_repeat_ngram_size=2),
    SamplingParams(do_sample=True, seed=4, no_repeat_ngram_size=3),
    SamplingParams(min_new_tokens=6),
    SamplingParams(logit_bias=((3, 9.0), (5, -np.inf))),
]


def each_way(network_of, requests, speculations):
    """The steps of the requests without guesses and with each kind of them."""
    made = []
    for speculation in [None, *speculations]:
        engine = Engine(network_of(), limits(64, seq_length=200), speculation=speculation)
        steps = list(engine.generate(requests))
        assert engine.pool.free_blocks == 64
        made.append([[s for s in steps if s.request == i] for i in range(len(requests))])
    return made


@pytest.mark.parametrize("network_of", [lambda: Looping(64), lambda: Drawn(64)], ids=["looping", "drawn"])
def test_every_setting_gives_the_same_tokens_and_log_probabilities_with_and_without_guesses(network_of):
    requests = [Request((i, *PROMPTS[i % 5]), 60, params=params, logprobs=i % 3, stop_ids=frozenset({2}) if i % 2
                        else frozenset()) for i, params in enumerate(SETTINGS)]
    plain, lookup, scripted = each_way(network_of, requests, [
        PromptLookup(6), Scripted(lambda n, ids, room: [int(t) for t in np.random.default_rng(len(ids)).integers(
            0, 11, max(room, 0))])])
    for index in range(len(requests)):
        for other in (lookup, scripted):
            assert [(s.token, s.finish_reason, s.logprobs) for s in other[index]] == [
                (s.token, s.finish_reason, s.logprobs) for s in plain[index]], SETTINGS[index]
    accepted = [steps[-1].usage.accepted_tokens for steps in lookup]
    assert sum(accepted) > 20


class Even:
    """A constraint that remembers: tokens are even, and at most `most` of them."""

    def __init__(self, most=9):
        self.tokens, self.most = [], most

    def allowed(self):
        bits = np.zeros(-(-VOCABULARY // 32) * 32, np.uint8)
        if len(self.tokens) < self.most:
            bits[0:VOCABULARY:2] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)

    def accept(self, token):
        assert token % 2 == 0 and len(self.tokens) < self.most
        self.tokens.append(token)


def test_a_constraint_sees_exactly_the_tokens_of_the_text():
    masks = []

    def constraint():
        masks.append(Even())
        return masks[-1]

    requests = [Request((4, 2, 6, 4, 2), 60, constraint=constraint, params=params)
                for params in (SamplingParams(), SamplingParams(do_sample=True, seed=5, top_k=3))]
    plain, lookup, junk = each_way(lambda: Drawn(64), requests, [
        PromptLookup(4), Scripted(lambda n, ids, room: [2, 4, 5, 100][:max(room, 0)])])
    for index in range(2):
        tokens = [s.token for s in plain[index] if s.token is not None]
        assert len(tokens) == 9 and plain[index][-1].finish_reason == STOP
        for other in (lookup, junk):
            assert [s.token for s in other[index] if s.token is not None] == tokens
    assert [mask.tokens for mask in masks[0::2]] == [masks[0].tokens] * 3
    assert [mask.tokens for mask in masks[1::2]] == [masks[1].tokens] * 3


def test_a_constraint_hears_nothing_after_the_text_has_ended():
    """The stop token was guessed right: what would follow is not chosen, so the grammar is not asked for it."""
    class Once(Even):
        def accept(self, token):
            assert 8 not in self.tokens, "the text had ended"
            super().accept(token)

    class Ends(Recalling):
        def logits(self, sequence):
            row = np.zeros(VOCABULARY, np.float32)
            row[2 if len(sequence) < 6 else 8] = 1
            return row

    engine = Engine(Ends(), limits(), speculation=Scripted(lambda n, ids, room: [2, 2, 2, 8, 8, 8][len(ids) - 3:]))
    tokens, ends = collect(engine, [Request((1, 1, 1), 30, constraint=Once, stop_ids=frozenset({8}))])
    assert tokens[0] == [2, 2, 2, 8] and ends[0].finish_reason == STOP


def test_guessing_keeps_the_distribution():
    """2000 seeds, three tokens each, against the exact probabilities: guesses that are often right change nothing."""
    params = dict(do_sample=True, temperature=1.3, top_k=4)
    engine = Engine(Drawn(64), limits(64), speculation=Scripted(
        lambda n, ids, room: [int(np.argmax(Drawn().logits(ids)))][:max(room, 0)]))
    counts = Counter()
    for seed in range(0, 2000, 50):
        requests = [Request((3, 4), 5, params=SamplingParams(seed=s, **params)) for s in range(seed, seed + 50)]
        tokens, ends = collect(engine, requests)
        counts.update(tuple(t) for t in tokens)
    assert 0.2 < engine.accepted_tokens / engine.guessed_tokens < 0.95
    chi, freedom = 0.0, -1
    for text, chance in texts((3, 4), 3, SamplingParams(**params)).items():
        if chance * 2000 >= 5:
            chi += (counts[text] - 2000 * chance) ** 2 / (2000 * chance)
            freedom += 1
    assert freedom >= 10
    assert chi < freedom + 4 * np.sqrt(2 * freedom)  # four standard deviations


def texts(prompt, length, params):
    """Every continuation of `Drawn` with its probability."""
    made = {(): 1.0}
    for _ in range(length):
        longer = {}
        for text, chance in made.items():
            row = Drawn().logits((*prompt, *text))
            found = Sampler(params, prompt).candidates(row)
            weights = np.exp(found.values.astype(np.float64) / params.temperature)
            for token, weight in zip(found.ids.tolist(), weights / weights.sum()):
                longer[(*text, token)] = chance * weight
        made = longer
    return made


def test_an_imagined_sampler_foresees_what_the_real_one_will_draw():
    for params in SETTINGS:
        sampler = Sampler(params, (1, 2, 3, 1, 2), stop_ids=frozenset({4}))
        ids = [1, 2, 3, 1, 2]
        for _ in range(6):
            imagined, foreseen, text = sampler.imagined(), [], list(ids)
            for _ in range(3):
                foreseen.append(imagined.choose(Drawn().logits(text)))
                text.append(foreseen[-1])
            for token in foreseen[:2]:
                ids.append(sampler.choose(Drawn().logits(ids)))
                assert ids[-1] == token, params


# ---- any schedule, any guesses ----

@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(5, 14), st.sampled_from([None, 1, 3]),
       st.lists(st.sampled_from(["add", "add", "step", "step", "step", "cancel"]), max_size=40))
def test_whatever_is_guessed_every_token_equals_the_single_run_and_no_block_is_lost(data, num_blocks, batch, acts):
    def script(number, ids, room):
        right = data.draw(st.integers(0, 4))
        junk = data.draw(st.lists(st.integers(0, VOCABULARY - 1), max_size=3))
        return [*expected(ids, right), *junk]

    speculation = Scripted(script, most=data.draw(st.integers(1, 6)))
    engine = Engine(Recalling(num_blocks), limits(num_blocks), batch, speculation=speculation)
    sent, seen, cancelled = {}, [], set()

    def step():
        seen.extend(engine.step())
        used = {block for c in engine.scheduler.running for block in c.table.blocks}
        assert len(used) + engine.pool.free_blocks == num_blocks
        for c in engine.scheduler.running:
            assert c.cached <= len(c.ids) and len(c.table.blocks) <= engine.pool.blocks_for(len(c.ids) + 1)

    for act in acts:
        if act == "step":
            step()
        elif act == "cancel" and sent:
            number = data.draw(st.sampled_from(sorted(sent)))
            cancelled.add(number)
            engine.cancel(number)
        elif act == "add":
            prompt = tuple(data.draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=9)))
            limit = len(prompt) + data.draw(st.integers(1, 14))
            request = Request(prompt, limit, prompt_logprobs=data.draw(st.sampled_from([None, None, 1])),
                              speculate=data.draw(st.booleans()),
                              stop_ids=frozenset(data.draw(st.sets(st.integers(0, VOCABULARY - 1), max_size=10))))
            try:
                sent[engine.add(request)] = request
            except UserError:
                assert limit > num_blocks * 4
    for _ in range(1000):
        if not engine.has_work:
            break
        step()
    assert not engine.has_work and engine.pool.free_blocks == num_blocks and not speculation.known
    for number, request in sent.items():
        mine = [s for s in seen if s.request == number]
        tokens = [s.token for s in mine if s.token is not None]
        assert mine[-1].finish_reason is not None and not any(s.finish_reason for s in mine[:-1])
        whole = expected(request.prompt, request.limit - len(request.prompt))
        ended = next((i + 1 for i, token in enumerate(whole) if token in request.stop_ids), len(whole))
        if mine[-1].finish_reason == CANCELLED:
            assert number in cancelled and tokens == whole[:len(tokens)] and len(tokens) < ended
        else:
            assert tokens == whole[:ended]
        usage = mine[-1].usage
        assert (usage.guessed_tokens is None) == (not request.speculate)
        if request.speculate and mine[-1].finish_reason != CANCELLED:
            # A token more comes from each prefill, of which there is another one after it was put back.
            assert usage.generated_tokens - 1 <= usage.decode_steps + usage.accepted_tokens + engine.scheduler.put_back


# ---- a draft model ----

def drafting(draft, most=4, cost=0.05, num_blocks=64, vocab_size=VOCABULARY):
    return DraftModel(draft, num_blocks, 4, vocab_size, most, cost)


class Unsure(Recalling):
    """Says the right token at about two places of three."""

    def logits(self, sequence):
        row = super().logits(sequence)
        if next_token([*sequence, 5]) % 3 == 0:
            row[(int(np.argmax(row)) + 1) % VOCABULARY] = 2
        return row


def test_a_draft_that_knows_everything_is_always_right():
    """Its cache is in step with the text: one token out of place, and it would guess something else."""
    draft = Recalling(64)
    speculation = drafting(draft)
    engine = Engine(Recalling(64), limits(64, seq_length=120), speculation=speculation)
    tokens, ends = collect(engine, [Request(p, len(p) + 40) for p in PROMPTS[:3]])
    assert tokens == [expected(p, 40) for p in PROMPTS[:3]]
    for end in ends.values():
        assert end.usage.accepted_tokens == end.usage.guessed_tokens > 20
    assert max(len(lens) for lens, _ in draft.calls) == 3 * 2  # rows of all streams in one call
    assert engine.pool.free_blocks == speculation.pool.free_blocks == 64


def test_a_draft_that_is_wrong_now_and_then_stays_in_step():
    speculation = drafting(Unsure(64))
    engine = Engine(Recalling(64), limits(64, seq_length=200), speculation=speculation)
    tokens, ends = collect(engine, [Request((1, 2, 3), 150)])
    assert tokens[0] == expected((1, 2, 3), 147)
    usage = ends[0].usage
    assert 0.4 < usage.accepted_tokens / usage.guessed_tokens < 0.8
    assert usage.generated_tokens / usage.decode_steps > 1.8
    assert speculation.pool.free_blocks == 64


def test_a_draft_draws_what_the_model_will_draw():
    """With the model's own random numbers: where both have the same probabilities every guess is right."""
    for params in SETTINGS:
        engine = Engine(Drawn(64), limits(64), speculation=drafting(Drawn(64)))
        tokens, ends = collect(engine, [Request((3, 4, 5), 30, params=params)])
        assert tokens == collect(Engine(Drawn(64), limits(64)), [Request((3, 4, 5), 30, params=params)])[0]
        usage = ends[0].usage
        # it looks no further than the text for n-grams that must not repeat
        assert usage.accepted_tokens >= usage.guessed_tokens * (0.6 if params.no_repeat_ngram_size else 1)


def test_a_conversation_prefills_in_the_draft_only_what_is_new():
    draft = Recalling(64)
    engine = Engine(Recalling(64), limits(64), speculation=drafting(draft))
    first, _ = collect(engine, [Request((1, 2, 3), 24)])
    draft.calls.clear()
    second, ends = collect(engine, [Request((1, 2, 3, *first[0], 50, 51), 40)])
    assert second[0] == expected((1, 2, 3, *first[0], 50, 51), 14)
    assert sum(draft.calls[0][0]) < 14 and draft.calls[0][1][-1] == 27
    assert ends[0].usage.accepted_tokens == ends[0].usage.guessed_tokens > 8


def test_a_draft_knows_fewer_or_more_ids_than_the_model():
    class Few(Recalling):
        """A vocabulary of 90: its embedding has no row for the others."""
        vocab_size = 90

        def prefill(self, input_ids, *rest):
            assert max(input_ids) < 90
            return super().prefill(input_ids, *rest)[:, :90]

    class Many(Recalling):
        vocab_size = 150

        def logits(self, sequence):
            return np.concatenate([super().logits(sequence), np.full(49, 2, np.float32)])

    for draft, least in ((Few(64), 1), (Many(64), 30)):
        engine = Engine(Recalling(64), limits(64), speculation=drafting(draft))
        accepted = 0
        for prompt in [*PROMPTS, (95, 96)]:
            tokens, ends = collect(engine, [Request(prompt, len(prompt) + 20)])
            assert tokens[0] == expected(prompt, 20)
            accepted += ends[0].usage.accepted_tokens
            # what the draft has no row for it cannot guess
            assert least == 1 or ends[0].usage.accepted_tokens == ends[0].usage.guessed_tokens
        assert accepted >= least


def test_a_draft_whose_logits_are_not_finite_guesses_nothing():
    class Broken(Recalling):
        def logits(self, sequence):
            return np.full(VOCABULARY, np.nan, np.float32)

    for params in (SamplingParams(), SamplingParams(do_sample=True, seed=1), SamplingParams(repetition_penalty=1.1)):
        engine = Engine(Recalling(), limits(), speculation=drafting(Broken(64)))
        tokens, ends = collect(engine, [Request((5, 6), 20, params=params)])
        assert ends[0].finish_reason == LENGTH and ends[0].usage.guessed_tokens == 0


def test_a_draft_that_is_always_wrong_is_asked_less_and_less():
    class Wrong(Recalling):
        def logits(self, sequence):
            return np.eye(1, VOCABULARY, (next_token(sequence) + 1) % VOCABULARY, dtype=np.float32)[0]

    draft, network = Wrong(300), Recalling(300)
    engine = Engine(network, limits(300, seq_length=900),
                    speculation=drafting(draft, cost=0.1, num_blocks=300))
    _, ends = collect(engine, [Request((5, 6, 7), 800)])
    time = sum(step_cost(len(lens)) for lens, _ in network.calls[1:]) + 0.1 * len(draft.calls)
    assert time < (ends[0].usage.generated_tokens - 1) * 1.025


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(5, 12), st.integers(2, 12), st.sampled_from([None, 1, 3]),
       st.lists(st.sampled_from(["add", "add", "step", "step", "step", "cancel"]), max_size=40))
def test_whatever_the_schedule_a_draft_changes_no_token_and_keeps_no_block(data, num_blocks, draft_blocks, batch,
                                                                             acts):
    speculation = drafting(Unsure(draft_blocks), num_blocks=draft_blocks, most=data.draw(st.integers(1, 6)))
    engine = Engine(Recalling(num_blocks), limits(num_blocks), batch, speculation=speculation)
    sent, seen = {}, []

    def step():
        seen.extend(engine.step())
        held = [block for track in speculation._tracks.values() for block in set(track.table.blocks)]
        assert len(set(held)) + speculation.pool.free_blocks == draft_blocks
        assert set(speculation._tracks) <= set(engine._known)

    for act in acts:
        if act == "step":
            step()
        elif act == "cancel" and sent:
            engine.cancel(data.draw(st.sampled_from(sorted(sent))))
        elif act == "add":
            stem = data.draw(st.sampled_from([(), tuple(range(40, 44)), tuple(range(40, 49))]))
            prompt = (*stem, *data.draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=5)))
            limit = len(prompt) + data.draw(st.integers(1, 14))
            request = Request(prompt, limit, speculate=data.draw(st.booleans()))
            try:
                sent[engine.add(request)] = request
            except UserError:
                assert limit > num_blocks * 4
    for _ in range(1000):
        if not engine.has_work:
            break
        step()
    assert not engine.has_work and engine.pool.free_blocks == num_blocks
    assert speculation.pool.free_blocks == draft_blocks and not speculation._tracks
    for number, request in sent.items():
        tokens = [s.token for s in seen if s.request == number and s.token is not None]
        whole = expected(request.prompt, request.limit - len(request.prompt))
        ended = [s for s in seen if s.request == number][-1]
        assert tokens == (whole[:len(tokens)] if ended.finish_reason == CANCELLED else whole)


# ---- prompt lookup ----

def test_the_passage_that_agrees_longest_is_taken_and_the_latest_of_equal_ones():
    ids = [1, 2, 3, 50, 9, 2, 3, 60, 1, 2, 3]
    found = Passages(ids).find()
    assert found == (3, 3) and Passages(ids).following(found, 3) == [50, 9, 2]
    ids = [7, 2, 3, 50, 8, 2, 3, 60, 2, 3]
    assert Passages(ids).find() == (7, 2)
    assert Passages([5, 1, 5, 2, 5]).find() == (3, 1)  # one token alone
    assert Passages([1, 2, 3]).find() is None and Passages([1]).find() is None


def test_a_text_that_repeats_itself_is_continued_beyond_its_end():
    ids = [9, 1, 2, 1, 2, 1, 2]
    passages = Passages(ids)
    found = passages.find()
    assert passages.following(found, 6) == [1, 2, 1, 2, 1, 2]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.lists(st.integers(0, 3), max_size=30))
def test_a_growing_text_is_looked_up_as_one_that_was_there_at_once(start, more):
    growing = list(start)
    passages = Passages(growing)
    for token in more:
        passages.find()
        growing.append(token)
    found, whole = passages.find(), Passages(list(growing)).find()
    assert found == whole
    if found is not None:
        n = min(found.agreement, found.place)
        assert growing[found.place - n:found.place] == growing[len(growing) - n:]


def test_lookup_makes_more_than_one_token_a_step_where_text_repeats_itself():
    engine = Engine(Looping(32), limits(32, seq_length=120), speculation=PromptLookup())
    tokens, ends = collect(engine, [Request((5, 6, 7), 90)])
    assert tokens == collect(Engine(Looping(32), limits(32, seq_length=120)), [Request((5, 6, 7), 90)])[0]
    usage = ends[0].usage
    assert usage.generated_tokens / usage.decode_steps > 3


def test_where_nothing_repeats_hardly_any_row_is_spent():
    network = Drawn(200)
    network.logits = lambda sequence: np.eye(1, VOCABULARY, int(
        np.random.default_rng(len(sequence)).integers(0, 4)), dtype=np.float32)[0]  # few tokens, no pattern
    engine = Engine(network, limits(200, seq_length=700), speculation=PromptLookup())
    _, ends = collect(engine, [Request((5, 6, 7), 600)])
    usage = ends[0].usage
    time = sum(step_cost(len(lens)) for lens, _ in network.calls[1:])
    assert time < (usage.generated_tokens - 1) * 1.01


# ---- how many ----

def test_more_guesses_the_surer_they_are_and_the_fewer_streams_there_are():
    assert worth([0.0], [8]) == [0] and worth([0.01], [8]) == [0]
    counts = [worth([chance], [8])[0] for chance in (0.2, 0.5, 0.7, 0.9, 0.99)]
    assert counts == sorted(counts) and counts[0] >= 1 and counts[-1] == 8
    assert worth([0.9, 0.1], [8, 8])[0] > worth([0.9, 0.1], [8, 8])[1]
    assert worth([0.9], [3]) == [3] and worth([0.9, 0.9], [0, 2])[0] == 0
    assert sum(worth([0.5] * 16, [8] * 16)) == 0
    assert 2 <= most_streams(True) <= most_streams(False) <= 16
    costs = [step_cost(rows) for rows in range(1, 41)]
    assert costs[0] == 1.0 and costs == sorted(costs)


def test_a_record_follows_what_was_seen_and_comes_back_slowly():
    record = SuccessRate(0.5)
    for _ in range(60):
        record.learn(1, 0)
    assert record.chance < 0.01
    for _ in range(10):
        record.rest()
    assert 0.01 < record.chance < 0.05  # tried again in a while, not at once
    for _ in range(30):
        record.learn(4, 4)
    assert record.chance > 0.99


@pytest.mark.parametrize("everywhere", [True, False])
def test_ranks_run_the_same_rows(everywhere):
    from test_engine import two_ranks

    First, Second = two_ranks()
    requests = [Request((1, 2), 22), Request((7, 8, 9), 19, params=SamplingParams(do_sample=True, seed=3))]
    calls = []
    made = []
    for network in (First(), Second()):
        script = oracle if everywhere or network.rank == 0 else None  # only rank 0 is asked
        speculation = Scripted(lambda n, ids, room, script=script: [*script(n, ids, min(room, 2)), 9][:max(room, 0)])
        speculation.everywhere = everywhere
        tokens, _ = collect(Engine(network, limits(), speculation=speculation), requests)
        made.append(tokens)
        calls.append(network.calls)
    assert made[0] == made[1] == [expected((1, 2), 20), collect(Engine(Recalling(), limits()), requests)[0][1]]
    assert calls[0] == calls[1] and max(len(lens) for lens, _ in calls[0]) > 2


def test_requests_join_and_leave_between_steps_of_guesses():
    engine = Engine(Recalling(64), limits(64), speculation=Scripted(oracle, most=2))
    first = engine.add(Request((1,), 40))
    steps = engine.step() + engine.step()
    second = engine.add(Request((2,), 9))
    steps += engine.step()
    engine.cancel(first)
    steps += drain(engine)
    mine = [s.token for s in steps if s.request == first and s.token is not None]
    assert mine == expected((1,), len(mine)) and len(mine) == 10
    assert [s.token for s in steps if s.request == second] == expected((2,), 8)
    assert engine.pool.free_blocks == 64


def test_next_token_is_a_function_of_everything():  # what makes the fake network worth comparing with
    assert next_token([1, 2, 3]) != next_token([1, 3, 2])


def test_the_models_own_random_numbers_accept_nearly_what_rejection_sampling_would():
    """Two distributions like those of a model and its draft: the chance that one number draws the same token of both,
    beside that of rejection sampling (the sum of the smaller probabilities) and that of a draft's likeliest token."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(200):
        logits = -rng.uniform(1, 6) * np.log(rng.permutation(2000) + 1) + rng.normal(size=2000) * 0.5
        pair = []
        for noise in (0.0, 1.0):
            candidates = Sampler(SamplingParams(do_sample=True, top_k=20, top_p=0.8), ()).candidates(
                (logits + rng.normal(size=2000) * noise).astype(np.float32))
            chances = np.zeros(2000)
            weights = np.exp(candidates.values.astype(np.float64) - candidates.values.max())
            chances[candidates.ids] = weights / weights.sum()
            pair.append(chances)
        ours, theirs = pair
        ends = [np.cumsum(chances) for chances in pair]
        both = np.minimum(*ends) - np.maximum(*(np.concatenate([[0], end[:-1]]) for end in ends))
        found.append((np.minimum(ours, theirs).sum(), np.clip(both, 0, None).sum(), ours[theirs.argmax()]))
    rejection, same, greedy = np.mean(found, axis=0)
    assert 0.75 < rejection < 0.95 and greedy < same < rejection and rejection - same < 0.05
