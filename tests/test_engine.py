"""The engine on a network of a few lines that really reads what the block tables and slots say."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qwen15.errors import EXIT_FAILED, UserError
from qwen15.generation import scheduler as scheduler_module
from qwen15.generation.engine import Engine
from qwen15.generation.request import CANCELLED, FAILED, LENGTH, STOP, Limits, Request
from qwen15.generation.sampling import SamplingParams, log_probabilities
from qwen15.network.base import Network

VOCABULARY = 101


class Recalling(Network):
    """Keeps each token at its slot; the next token is a function of the whole sequence as the block table finds it."""

    vocab_size = VOCABULARY

    def __init__(self, num_blocks=16, block_size=4, cached_prefill=True):
        self.cache = np.full(num_blocks * block_size, -1)
        self.block_size = block_size
        self.supports_cached_prefill = cached_prefill
        self.calls = []

    def prefill(self, input_ids, query_lens, context_lens, block_tables, slot_mapping):
        assert query_lens.sum() == len(input_ids) == len(slot_mapping)
        assert all(a.dtype == np.int32 for a in (input_ids, query_lens, context_lens, block_tables, slot_mapping))
        self.calls.append((query_lens.tolist(), context_lens.tolist()))
        self.cache[slot_mapping] = input_ids
        return np.stack([self.logits(self.read(table, length)) for table, length in zip(block_tables, context_lens)])

    def decode(self, input_ids, context_lens, block_tables, slot_mapping):
        return self.prefill(input_ids, np.ones_like(context_lens), context_lens, block_tables, slot_mapping)

    def read(self, table, length):
        positions = np.arange(length)
        assert (table[positions // self.block_size] >= 0).all()
        return self.cache[table[positions // self.block_size] * self.block_size + positions % self.block_size]

    def logits(self, sequence):
        row = np.zeros(VOCABULARY, np.float32)
        row[next_token(sequence)] = 1
        return row


def next_token(sequence) -> int:
    return int((np.asarray(sequence) * (np.arange(len(sequence)) + 3)).sum() % VOCABULARY)


def expected(prompt, count):
    ids = list(prompt)
    for _ in range(count):
        ids.append(next_token(ids))
    return ids[len(prompt):]


def limits(num_blocks=16, block_size=4, seq_length=60):
    return Limits(VOCABULARY, seq_length, num_blocks, block_size)


def collect(engine, requests):
    tokens, ends = [[] for _ in requests], {}
    for step in engine.generate(requests):
        if step.token is not None:
            tokens[step.request].append(step.token)
        if step.finish_reason:
            ends[step.request] = step
    return tokens, ends


PROMPTS = [(5, 6, 7), (1,), tuple(range(20, 33)), (9, 9), (3, 1, 4, 1, 5)]


def test_batched_results_equal_single_ones_whatever_the_cache_holds():
    for num_blocks in (7, 9, 16):
        engine = Engine(Recalling(num_blocks), limits(num_blocks))
        tokens, ends = collect(engine, [Request(p, len(p) + 9) for p in PROMPTS])
        assert tokens == [expected(p, 9) for p in PROMPTS]
        assert {e.finish_reason for e in ends.values()} == {LENGTH}
        assert engine.pool.free_blocks == num_blocks


def test_blocks_of_a_finished_sequence_go_to_the_next_while_others_run():
    network = Recalling(8)
    engine = Engine(network, limits(8))
    # 8 blocks of 4: the first two prompts fill 7 of them, the third needs 2 and can start when the short one has ended
    prompts = [tuple(range(15)), tuple(range(50, 61)), (3, 1, 4, 1, 5)]
    requests = [Request(prompts[0], 24), Request(prompts[1], 12), Request(prompts[2], 8)]
    tokens, _ = collect(engine, requests)
    assert tokens == [expected(prompts[0], 9), expected(prompts[1], 1), expected(prompts[2], 3)]
    assert ([5], [5]) in network.calls  # the third's prefill came alone
    assert any(len(lens) == 2 and min(context) > 5 for lens, context in network.calls)  # and ran beside the first


def test_max_batch_bounds_what_runs_together():
    network = Recalling()
    collect(Engine(network, limits(), max_batch=2), [Request(p, len(p) + 3) for p in PROMPTS])
    assert max(len(lens) for lens, _ in network.calls) == 2


def test_long_prompts_are_prefilled_in_bounded_calls(monkeypatch):
    monkeypatch.setattr(scheduler_module, "PIECE_TOKENS", 5)
    network = Recalling()
    tokens, _ = collect(Engine(network, limits()), [Request(p, len(p) + 4) for p in PROMPTS])
    assert tokens == [expected(p, 4) for p in PROMPTS]
    assert max(sum(lens) for lens, _ in network.calls) == 5


def test_a_network_without_cached_prefill_gets_whole_prompts(monkeypatch):
    monkeypatch.setattr(scheduler_module, "WHOLE_PROMPTS_TOKENS", 5)
    network = Recalling(cached_prefill=False)
    tokens, _ = collect(Engine(network, limits()), [Request(p, len(p) + 4) for p in PROMPTS])
    assert tokens == [expected(p, 4) for p in PROMPTS]
    prefills = [call for call in network.calls if call[0] == call[1]]
    assert sorted(n for lens, _ in prefills for n in lens) == sorted(len(p) for p in PROMPTS)


def test_stop_ids_end_a_sequence_and_the_stop_token_is_reported():
    continuation = expected(PROMPTS[0], 9)
    stop = continuation[4]
    tokens, ends = collect(Engine(Recalling(), limits()), [Request(PROMPTS[0], 30, stop_ids=frozenset({stop, 200}))])
    assert tokens[0] == continuation[:continuation.index(stop) + 1]
    assert ends[0].finish_reason == STOP


def test_whichever_limit_comes_first_ends_it():
    engine = Engine(Recalling(), limits())
    tokens, _ = collect(engine, [Request((1, 2), 10, max_new_tokens=3), Request((1, 2), 4, max_new_tokens=30)])
    assert [len(t) for t in tokens] == [3, 2]


def test_cancelled_request_gives_its_blocks_back_and_the_others_go_on():
    engine = Engine(Recalling(), limits())
    seen = [[], []]
    for step in engine.generate([Request((1,), 20), Request((2,), 20)]):
        if step.token is not None:
            seen[step.request].append(step.token)
        if step.request == 0 and len(seen[0]) == 3:
            engine.cancel(0)
        if step.finish_reason == CANCELLED:
            assert step.request == 0 and step.usage.generated_tokens == 3
    assert seen == [expected((1,), 3), expected((2,), 19)]
    assert engine.pool.free_blocks == 16


def test_stopping_in_the_middle_leaves_no_block_taken():
    engine = Engine(Recalling(), limits())
    steps = engine.generate([Request(p, 30) for p in PROMPTS[:2]])
    for _ in range(5):
        next(steps)
    steps.close()
    assert engine.pool.free_blocks == 16


def test_a_conversation_prefills_only_what_is_new():
    network = Recalling()
    engine = Engine(network, limits())
    first, _ = collect(engine, [Request((1, 2, 3), 10)])
    history = (1, 2, 3, *first[0])
    network.calls.clear()
    tokens, ends = collect(engine, [Request((*history, 50, 51), 20)])
    assert tokens[0] == expected((*history, 50, 51), 8)
    # two full blocks of four were there; the last token of the answer has never gone through the network
    assert network.calls[0] == ([4], [12])
    assert ends[0].usage.cached_tokens == 8
    # an edited history reuses the blocks that still agree
    network.calls.clear()
    other = (*history[:5], 9, 9, 9, 9)
    tokens, ends = collect(engine, [Request(other, 12)])
    assert tokens[0] == expected(other, 3)
    assert ends[0].usage.cached_tokens == 4
    assert engine.pool.free_blocks == 16


@pytest.mark.parametrize("request_, message", [
    (Request((), 5), "the prompt is empty"),
    (Request((1, 200), 5), "token id 200, the model's vocabulary ends at 100"),
    (Request(tuple(range(61)), 80), "61 tokens, seq_length is 60"),
    (Request((1, 2, 3), 3), "3 tokens and the limit on prompt and answer together is 3"),
    (Request((1,), 61), "may grow to 61 tokens, seq_length is 60"),
    (Request((1,), 33), "33 tokens = 9 blocks of 4, the KV cache has 8 blocks .32 tokens.. Raise .*num_blocks to 9"),
])
def test_what_can_never_run_is_refused_before_any_work(request_, message):
    network = Recalling(8)
    with pytest.raises(UserError, match=message):
        list(Engine(network, limits(8)).generate([Request((1,), 5), request_]))
    assert network.calls == []


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(do_sample=True),
                                    SamplingParams(repetition_penalty=1.1)],
                         ids=str)
def test_logits_that_are_not_finite_end_that_request_and_name_the_weight(params):
    class Broken(Recalling):
        def logits(self, sequence):
            if sequence[0] == 77 and len(sequence) > 12:
                return np.full(VOCABULARY, np.nan, np.float32)
            return super().logits(sequence)

        def find_non_finite(self):
            return "model.layers.3.attention.wo.weight"

    engine = Engine(Broken(), limits())
    broken = Request((77, *range(9)), 20, params=params, label="prompts.txt:2")
    tokens, ends = collect(engine, [Request((1,), 20), broken, Request((2,), 20)])
    assert tokens[0] == expected((1,), 19) and tokens[2] == expected((2,), 19)
    assert [ends[i].finish_reason for i in range(3)] == [LENGTH, FAILED, LENGTH]
    assert ends[1].error.exit_code == EXIT_FAILED
    assert "prompts.txt:2" in str(ends[1].error) and "model.layers.3.attention.wo.weight" in str(ends[1].error)
    assert engine.pool.free_blocks == 16
    # and nobody reuses what it has put into the cache
    _, ends = collect(engine, [Request((77, *range(9)), 11)])
    assert ends[0].usage.cached_tokens == 0


def two_ranks():
    """Networks of rank 0 and rank 1; what rank 0 agrees on, run first, is what rank 1 is told."""
    told = []

    class First(Recalling):
        ranks = 2

        def agree(self, ids):
            told.append(ids.copy())
            return ids

    class Second(Recalling):
        rank, ranks = 1, 2

        def agree(self, ids):
            return told.pop(0)

    return First, Second


def test_other_ranks_take_rank_zeros_tokens():
    """A rank that would choose differently (here: noise in its logits) still follows rank 0."""
    First, Second = two_ranks()

    class Noisy(Second):
        def logits(self, sequence):
            return np.random.default_rng(0).standard_normal(VOCABULARY).astype(np.float32)

    requests = [Request((1, 2), 12), Request((7,), 9, params=SamplingParams(do_sample=True, seed=3))]
    first, _ = collect(Engine(First(), limits()), requests)
    second, _ = collect(Engine(Noisy(), limits()), requests)
    assert first == second


def test_seeded_sampling_does_not_depend_on_the_batch():
    class Flat(Recalling):
        def logits(self, sequence):
            return np.sin(np.arange(VOCABULARY) * (next_token(sequence) + 1)).astype(np.float32)

    def request(prompt):
        return Request(prompt, len(prompt) + 8, params=SamplingParams(do_sample=True, top_k=20, seed=11))

    alone = [collect(Engine(Flat(), limits()), [request(p)])[0][0] for p in PROMPTS]
    together, _ = collect(Engine(Flat(9), limits(9)), [request(p) for p in reversed(PROMPTS)])
    assert alone == list(reversed(together))


def test_logprobs_are_reported_for_the_chosen_token_and_the_most_probable_ones():
    steps = list(Engine(Recalling(), limits()).generate([Request((1, 2), 4, logprobs=3)]))
    for step in steps:
        assert step.logprobs.top[0] == (step.token, step.logprobs.chosen)
        assert len(step.logprobs.top) == 3
        assert step.logprobs.chosen == pytest.approx(1 - np.log(np.e + VOCABULARY - 1))


@pytest.mark.parametrize("after", [0, 3])
def test_interrupt_ends_what_runs_and_what_waits_on_every_rank(after):
    First, Second = two_ranks()
    requests = [Request((1, 2), 20), Request((3, 4, 5), 20), Request((6,), 20)]
    first = Engine(First(), limits(), max_batch=2)
    seen = []
    for step in first.generate(requests):
        seen.append(step)
        if len(seen) == after + 1:
            first.interrupt()
    assert [step.request for step in seen if step.finish_reason == CANCELLED] == [0, 1, 2]
    assert all(step.request < 2 for step in seen if step.token is not None)
    assert first.pool.free_blocks == 16
    followed = list(Engine(Second(), limits(), max_batch=2).generate(requests))
    assert [(s.request, s.token, s.finish_reason) for s in followed] == [(s.request, s.token, s.finish_reason)
                                                                         for s in seen]


def test_an_interrupted_conversation_keeps_its_cache():
    engine = Engine(Recalling(), limits())
    tokens = []
    for step in engine.generate([Request((1, 2), 40)]):
        tokens.append(step.token)
        if len(tokens) == 7:
            engine.interrupt()
    assert tokens == [*expected((1, 2), 7), None]
    tokens, ends = collect(engine, [Request((1, 2, *tokens[:7]), 12)])  # the next one runs as ever
    assert tokens[0] == expected((1, 2), 10)[7:]
    assert ends[0].usage.cached_tokens == 8


# ---- requests that come and go while it runs ----

def drain(engine, until=None):
    """Steps until nothing is left to do, or `until` says so."""
    seen = []
    while engine.has_work:
        seen += engine.step()
        if until is not None and until(seen):
            break
    return seen


def of(steps, number):
    return [step.token for step in steps if step.request == number and step.token is not None]


def test_requests_join_and_leave_between_steps():
    network = Recalling(32)
    engine = Engine(network, limits(32))
    first = engine.add(Request(PROMPTS[0], 20))
    steps = engine.step() + engine.step()
    assert of(steps, first) == expected(PROMPTS[0], 3)  # the first one out of the prompt
    second, third = engine.add(Request(PROMPTS[1], 20)), engine.add(Request(PROMPTS[3], 20))
    steps += engine.step()
    engine.cancel(first)
    steps += engine.step()
    assert steps[-1].request != first
    assert [s.finish_reason for s in steps if s.request == first][-1] == CANCELLED
    assert engine.pool.free_blocks == 32 - 2  # its blocks are free within a step
    steps += drain(engine)
    assert of(steps, first) == expected(PROMPTS[0], 4)
    assert of(steps, second) == expected(PROMPTS[1], 19) and of(steps, third) == expected(PROMPTS[3], 18)
    assert engine.pool.free_blocks == 32 and not engine.has_work


def test_a_request_cancelled_while_it_waits_never_runs():
    network = Recalling()
    engine = Engine(network, limits(), max_batch=1)
    first, second = engine.add(Request((1,), 9)), engine.add(Request((2,), 9))
    engine.step()
    engine.cancel(second)
    steps = drain(engine)
    assert [(s.token, s.finish_reason) for s in steps if s.request == second] == [(None, CANCELLED)]
    assert steps[0].request == second  # told at once, not when the first has ended
    assert all(len(lens) == 1 for lens, _ in network.calls)
    assert not engine.has_work and first != second


def test_cancelling_what_has_ended_or_never_was_does_nothing():
    engine = Engine(Recalling(), limits())
    number = engine.add(Request((1,), 3))
    drain(engine)
    engine.cancel(number)
    engine.cancel(12345)
    assert drain(engine) == []
    assert of(drain_one(engine), number + 1) == expected((1,), 2)


def drain_one(engine):
    engine.add(Request((1,), 3))
    return drain(engine)


def test_streams_go_on_while_a_long_prompt_is_prefilled(monkeypatch):
    monkeypatch.setattr(scheduler_module, "PIECE_TOKENS", 8)
    network = Recalling(64)
    engine = Engine(network, Limits(VOCABULARY, 200, 64, 4))
    stream = engine.add(Request((1,), 60))
    engine.step()
    long = tuple(range(90))
    number = engine.add(Request(long, 95))
    network.calls.clear()
    steps = []
    while not of(steps, number):
        made = engine.step()
        steps += made
        assert of(made, stream)  # every step has a token for it
    assert len(of(steps, stream)) == 12  # 90 tokens in pieces of 8
    assert max(sum(lens) for lens, _ in network.calls) <= 8
    assert of(steps, number)[0] == expected(long, 1)[0]


def test_a_short_prompt_does_not_wait_for_the_long_one_before_it(monkeypatch):
    monkeypatch.setattr(scheduler_module, "PIECE_TOKENS", 8)
    engine = Engine(Recalling(64), Limits(VOCABULARY, 200, 64, 4))
    long, short = engine.add(Request(tuple(range(90)), 95)), engine.add(Request((5, 6, 7), 9))
    assert of(engine.step(), short) == expected((5, 6, 7), 2)
    steps = drain(engine)
    assert of(steps, long) == expected(tuple(range(90)), 5)


def test_a_piece_that_is_somebodys_last_is_not_filled_up_with_the_long_prompt(monkeypatch):
    monkeypatch.setattr(scheduler_module, "PIECE_TOKENS", 8)
    network = Recalling(64)
    engine = Engine(network, Limits(VOCABULARY, 200, 64, 4))
    engine.add(Request(tuple(range(90)), 95))
    engine.step()
    engine.add(Request((5, 6), 4))
    engine.step()
    engine.step()
    prefills = [lens for lens, context in network.calls if lens != [1]]
    assert prefills == [[8], [4, 2], [8]]  # all of a piece, half of one, and all again
    other = engine.add(Request(tuple(range(50, 70)), 75))
    network.calls.clear()
    engine.step()
    assert network.calls[0][0] == [4, 4]  # neither ends: the piece is full
    engine.cancel(other)
    drain(engine)


def test_more_requests_run_than_their_longest_results_would_allow():
    """Eight requests that may each take the whole cache: their blocks come as they are needed."""
    network = Recalling(16)
    engine = Engine(network, limits(16))
    requests = [Request((n + 1,), 60, stop_ids=frozenset(range(VOCABULARY)) - set(expected((n + 1,), 3)))
                for n in range(8)]
    tokens, _ = collect(engine, requests)
    assert [t[:3] for t in tokens] == [expected((n + 1,), 3) for n in range(8)]
    assert max(len(lens) for lens, _ in network.calls) == 8


def test_when_blocks_run_out_the_youngest_goes_back_and_nothing_is_lost():
    network = Recalling(8)
    engine = Engine(network, limits(8))
    requests = [Request((n + 1,), 30, params=SamplingParams(do_sample=True, top_k=3, temperature=9.0, seed=n))
                for n in range(3)]
    tokens, ends = collect(engine, requests)
    assert engine.scheduler.put_back >= 2
    assert list(ends) == [0, 1, 2]  # the oldest ends first
    for request, made in zip(requests, tokens):
        assert made == collect(Engine(Recalling(), limits()), [request])[0][0]
    assert engine.pool.free_blocks == 8


def test_a_request_starts_only_when_those_that_run_can_have_their_next_block_too():
    """Else it would be put back a few tokens later, and its prompt computed for nothing."""
    network = Recalling(8)
    engine = Engine(network, limits(8))
    first = engine.add(Request((1,), 20))  # holds one block and may grow to five
    engine.step()
    long = engine.add(Request(tuple(range(26)), 28))  # seven blocks: all that are free
    network.calls.clear()
    steps = []
    while not any(step.request == first and step.finish_reason for step in steps):
        steps += engine.step()
    assert max(len(lens) for lens, _ in network.calls) == 1 and sum(sum(lens) for lens, _ in network.calls) == 17
    steps += drain(engine)
    assert of(steps, long) == expected(tuple(range(26)), 2) and engine.scheduler.put_back == 0
    # a block less, and it starts at once
    first = engine.add(Request((2,), 9))
    engine.step()
    short = engine.add(Request(tuple(range(60, 83)), 24))
    assert of(engine.step(), short) == expected(tuple(range(60, 83)), 1)
    drain(engine)


def test_waiting_is_first_come_first_served():
    engine = Engine(Recalling(8), limits(8), max_batch=2)
    numbers = [engine.add(Request((n,), 12)) for n in range(6)]
    steps = drain(engine)
    firsts = [next(i for i, s in enumerate(steps) if s.request == n) for n in numbers]
    assert firsts == sorted(firsts)


def test_a_prompt_that_is_put_back_while_it_is_scored_is_scored_once(monkeypatch):
    monkeypatch.setattr(scheduler_module, "SCORED_ROWS", 1)
    engine = Engine(Recalling(8), limits(8))
    engine.add(Request((1,), 25))
    engine.step()
    prompt = tuple(range(30, 50))
    scored = engine.add(Request(prompt, 22, prompt_logprobs=0))
    steps = drain(engine)
    assert engine.scheduler.put_back == 1
    told, = [step.prompt_logprobs for step in steps if step.request == scored and step.prompt_logprobs]
    assert len(told) == 19 and of(steps, scored) == expected(prompt, 2)


def test_one_that_is_put_back_waits_behind_those_that_came_before_it(monkeypatch):
    monkeypatch.setattr(scheduler_module, "PIECE_TOKENS", 2)
    engine = Engine(Recalling(11), limits(11))
    prompt = tuple(range(36))
    engine.add(Request(prompt, 40))
    engine.step()
    sharing = engine.add(Request((*prompt[:32], 99), 35))  # waits for what the first one computes
    ahead = engine.add(Request((7,), 12))
    while not engine.scheduler.put_back:
        engine.step()
    assert [c.number for c in engine.scheduler.waiting] == [sharing, ahead]
    steps = drain(engine)
    assert of(steps, sharing) == expected((*prompt[:32], 99), 2)


# ---- the prefix cache ----

SYSTEM = tuple(range(40, 61))


def test_a_common_beginning_is_computed_once_even_when_all_come_together():
    network = Recalling(32)
    engine = Engine(network, limits(32))
    requests = [Request((*SYSTEM, n), 30) for n in range(4)]
    tokens, ends = collect(engine, requests)
    assert tokens == [expected((*SYSTEM, n), 8) for n in range(4)]
    assert [ends[n].usage.cached_tokens for n in range(4)] == [0, 20, 20, 20]
    assert sum(sum(lens) for lens, context in network.calls) == 22 + 3 * 2 + 4 * 7


def test_one_that_waits_for_a_prefix_starts_when_the_other_leaves_before_it_is_there(monkeypatch):
    monkeypatch.setattr(scheduler_module, "PIECE_TOKENS", 4)
    engine = Engine(Recalling(32), limits(32))
    first = engine.add(Request((*SYSTEM, 1), 30))
    engine.step()
    second = engine.add(Request((*SYSTEM, 2), 30))
    engine.step()
    assert [c.number for c in engine.scheduler.waiting] == [second]
    engine.cancel(first)
    steps = [step for _ in range(30) for step in engine.step()]
    assert of(steps, second) == expected((*SYSTEM, 2), 8) and not engine.has_work


def test_results_are_equal_with_and_without_the_prefix_cache():
    requests = [Request((*SYSTEM[:n], n), 28) for n in (0, 3, 8, 9, 21, 8, 9)]
    with_it, without = (Engine(Recalling(12), limits(12), prefix_cache=on) for on in (True, False))
    assert collect(with_it, requests)[0] == collect(without, requests)[0]
    again, ends = collect(with_it, requests[-1:])
    assert again[0] == expected((*SYSTEM[:9], 9), 18) and ends[0].usage.cached_tokens == 8
    _, ends = collect(without, requests[-1:])
    assert ends[0].usage.cached_tokens == 0


def test_a_prompt_of_whole_blocks_that_is_cached_computes_its_last_one_for_the_logits():
    engine, prompt = Engine(Recalling(12), limits(12)), SYSTEM[:8]  # two blocks
    for cached in (0, 4):
        tokens, ends = collect(engine, [Request(prompt, 14)])
        assert tokens[0] == expected(prompt, 6) and ends[0].usage.cached_tokens == cached


def test_a_block_is_no_use_behind_other_tokens_than_it_was_computed_behind():
    engine = Engine(Recalling(12), limits(12))
    collect(engine, [Request((*SYSTEM[:8], 1), 14)])
    tokens, ends = collect(engine, [Request((*SYSTEM[4:8], 1), 14)])
    assert tokens[0] == expected((*SYSTEM[4:8], 1), 9) and ends[0].usage.cached_tokens == 0


def test_the_least_recently_used_blocks_are_given_up_first():
    engine = Engine(Recalling(8), limits(8))
    old, new = (*range(8), 99), (*range(20, 28), 99)
    for prompt in (old, new, old):  # old is used last
        collect(engine, [Request(prompt, 10)])
    collect(engine, [Request((77,) * 17, 18)])  # needs 5 of the 8 blocks
    _, ends = collect(engine, [Request(old, 10)])
    assert ends[0].usage.cached_tokens == 8
    _, ends = collect(engine, [Request(new, 10)])
    assert ends[0].usage.cached_tokens < 8


def test_a_network_that_takes_whole_prompts_shares_nothing():
    engine = Engine(Recalling(cached_prefill=False), limits())
    for _ in range(2):
        tokens, ends = collect(engine, [Request((*SYSTEM, 1), 25)])
        assert tokens[0] == expected((*SYSTEM, 1), 3) and ends[0].usage.cached_tokens == 0


# ---- log probabilities of the prompt ----

class Smooth(Recalling):
    """Every token has some probability."""

    def logits(self, sequence):
        return np.sin(np.arange(VOCABULARY) * (next_token(sequence) + 1)).astype(np.float32)


@pytest.mark.parametrize("max_new_tokens", [0, 2])
def test_prompt_log_probabilities_are_those_of_each_place(monkeypatch, max_new_tokens):
    monkeypatch.setattr(scheduler_module, "SCORED_ROWS", 5)
    network = Smooth()
    engine = Engine(network, limits())
    prompts = [tuple(range(30, 43)), (7, 8), (5,)]
    requests = [Request(p, 30, max_new_tokens=max_new_tokens, prompt_logprobs=2) for p in prompts]
    steps = list(engine.generate([*requests, Request((1, 2, 3), 12)]))
    assert max(len(lens) for lens, _ in network.calls) <= 5 + 1
    for index, prompt in enumerate(prompts):
        mine = [step for step in steps if step.request == index]
        scores = mine[0].prompt_logprobs  # an empty list for a prompt of one token
        assert len(scores) == len(prompt) - 1 and all(step.prompt_logprobs is None for step in mine[1:])
        for place, score in enumerate(scores, 1):
            row = network.logits(prompt[:place])
            assert score.chosen == pytest.approx(log_probabilities(row, [prompt[place]])[0])
            assert [token for token, _ in score.top] == np.argsort(-row, kind="stable")[:2].tolist()
        assert [s.token for s in mine if s.token is not None] == [
            s.token for s in Engine(Smooth(), limits()).generate([Request(prompt, 30, max_new_tokens=max_new_tokens)])
        ] if max_new_tokens else mine[-1].finish_reason == LENGTH and mine[-1].usage.generated_tokens == 0
    assert engine.pool.free_blocks == 16


# ---- several ranks ----

class Wire:
    """What two ranks in two threads agree on."""

    def __init__(self):
        self.barrier = threading.Barrier(2, timeout=20)
        self.value = None
        self.calls = 0

    def agree(self, rank, ids):
        if rank == 0:
            self.value = ids.copy()
            self.calls += 1
        self.barrier.wait()
        value = self.value
        self.barrier.wait()
        assert value.shape == ids.shape and value.dtype == ids.dtype
        return value.copy()


def pair(wire, **sizes):
    networks = []
    for rank in (0, 1):
        network = Recalling(**sizes)
        network.rank, network.ranks = rank, 2
        network.agree = lambda ids, rank=rank: wire.agree(rank, ids)
        networks.append(network)
    return networks


def test_starts_and_cancels_reach_every_rank_with_the_tokens():
    wire = Wire()
    networks = pair(wire, num_blocks=8)
    first, second = (Engine(network, limits(8)) for network in networks)
    failures = []

    def follow():
        try:
            second.follow()
        except BaseException as error:  # noqa: B036  (shown by the main thread)
            failures.append(error)
            wire.barrier.abort()

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        one = first.add(Request((1,), 30))
        steps = first.step()
        before = wire.calls
        steps += first.step()
        assert wire.calls == before + 1  # nothing to say: no collective but the tokens'
        two = first.add(Request((2, 3, 4, 5), 30,
                                params=SamplingParams(repetition_penalty=1.5, logit_bias=((7, -np.inf),))))
        steps += first.step() + first.step()
        first.cancel(one)
        steps += drain(first)
        three = first.add(Request((9,), 4))  # after a time without work
        steps += drain(first)
        first.close()
    finally:
        if failures:
            raise failures[0]
        thread.join(20)
    assert not failures and not thread.is_alive()
    assert steps[[s.request for s in steps].index(two)].token == expected((2, 3, 4, 5), 1)[0]
    assert of(steps, one) == expected((1,), len(of(steps, one))) and 4 <= len(of(steps, one)) <= 7
    assert of(steps, three) == expected((9,), 3)
    assert networks[0].calls == networks[1].calls
    assert np.array_equal(networks[0].cache, networks[1].cache)
    assert first.pool.free_blocks == second.pool.free_blocks == 8


# ---- any schedule ----

class Busy:
    """A random schedule against the single runs."""

    def __init__(self, data, num_blocks, cached_prefill, max_batch):
        self.engine = Engine(Recalling(num_blocks, cached_prefill=cached_prefill), limits(num_blocks), max_batch)
        self.data, self.sent, self.cancelled, self.seen = data, {}, set(), []

    def add(self):
        draw = self.data.draw
        stem = draw(st.sampled_from([(), SYSTEM[:4], SYSTEM[:9], SYSTEM[:12]]))
        prompt = (*stem, *draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=9)))
        limit = len(prompt) + draw(st.integers(1, 12))
        request = Request(prompt, limit, prompt_logprobs=draw(st.sampled_from([None, None, 1])),
                          stop_ids=frozenset(draw(st.sets(st.integers(0, VOCABULARY - 1), max_size=10))))
        try:
            self.sent[self.engine.add(request)] = request
        except UserError:
            assert limit > self.engine.limits.num_blocks * 4

    def cancel(self):
        if self.sent:
            number = self.data.draw(st.sampled_from(sorted(self.sent)))
            self.cancelled.add(number)
            self.engine.cancel(number)

    def step(self):
        self.seen += self.engine.step()
        used = {block for c in self.engine.scheduler.running for block in c.table.blocks}
        assert len(used) + self.engine.pool.free_blocks == self.engine.pool.num_blocks


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(6, 14), st.booleans(), st.sampled_from([None, 1, 3]),
       st.sampled_from([(512, 64), (5, 2)]),
       st.lists(st.sampled_from(["add", "add", "step", "step", "step", "cancel"]), max_size=40))
def test_whatever_the_schedule_every_token_equals_the_single_run_and_no_block_is_lost(data, num_blocks, cached, batch,
                                                                                      pieces, acts):
    busy = Busy(data, num_blocks, cached, batch)
    with pytest.MonkeyPatch.context() as patch:
        for name, tokens in zip(("PIECE_TOKENS", "SCORED_ROWS"), pieces):
            patch.setattr(scheduler_module, name, tokens)
        for act in acts:
            getattr(busy, act)()
        for _ in range(1000):
            if not busy.engine.has_work:
                break
            busy.step()
    assert not busy.engine.has_work and busy.engine.pool.free_blocks == num_blocks
    for number, request in busy.sent.items():
        mine = [s for s in busy.seen if s.request == number]
        tokens = [s.token for s in mine if s.token is not None]
        assert mine[-1].finish_reason is not None and not any(s.finish_reason for s in mine[:-1])
        whole = expected(request.prompt, request.limit - len(request.prompt))
        ended = next((i + 1 for i, token in enumerate(whole) if token in request.stop_ids), len(whole))
        if mine[-1].finish_reason == CANCELLED:
            assert number in busy.cancelled and tokens == whole[:len(tokens)] and len(tokens) < ended
        else:
            assert tokens == whole[:ended]
            assert len(next(s.prompt_logprobs for s in mine if s.prompt_logprobs) if request.prompt_logprobs
                       and len(request.prompt) > 1 else []) == (len(request.prompt) - 1 if request.prompt_logprobs
                                                                else 0)
