"""The engine on a network of a few lines that really reads what the block tables and slots say."""

import numpy as np
import pytest
from qwen15.errors import EXIT_FAILED, UserError
from qwen15.generation import engine as engine_module
from qwen15.generation.engine import CANCELLED, LENGTH, STOP, Engine, KeptCache, Limits, Request
from qwen15.generation.sampling import SamplingParams
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
    # 8 blocks of 4: the first two fill the cache, the third can start when the short one has ended
    requests = [Request((1,), 20), Request((2,), 4), Request((3,), 12)]
    tokens, _ = collect(engine, requests)
    assert tokens == [expected((1,), 19), expected((2,), 3), expected((3,), 11)]
    assert ([1], [1]) in network.calls  # the third's prefill came alone
    assert any(len(lens) == 2 and max(context) > 4 for lens, context in network.calls)  # and ran beside the first


def test_max_batch_bounds_what_runs_together():
    network = Recalling()
    collect(Engine(network, limits(), max_batch=2), [Request(p, len(p) + 3) for p in PROMPTS])
    assert max(len(lens) for lens, _ in network.calls) == 2


def test_long_prompts_are_prefilled_in_bounded_calls(monkeypatch):
    monkeypatch.setattr(engine_module, "PREFILL_CHUNK_TOKENS", 5)
    network = Recalling()
    tokens, _ = collect(Engine(network, limits()), [Request(p, len(p) + 4) for p in PROMPTS])
    assert tokens == [expected(p, 4) for p in PROMPTS]
    assert max(sum(lens) for lens, _ in network.calls) == 5


def test_a_network_without_cached_prefill_gets_whole_prompts(monkeypatch):
    monkeypatch.setattr(engine_module, "PREFILL_CHUNK_TOKENS", 5)
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
    kept = KeptCache(engine)
    first, _ = collect(engine, [Request((1, 2, 3), 8, kept=kept)])
    history = (1, 2, 3, *first[0])
    network.calls.clear()
    tokens, ends = collect(engine, [Request((*history, 50, 51), 20, kept=kept)])
    assert tokens[0] == expected((*history, 50, 51), 10)
    # everything but the last token of the answer, which never went through the network, was there
    assert network.calls[0] == ([3], [10])
    assert ends[0].usage.cached_tokens == 7
    # an edited history reuses what still agrees
    network.calls.clear()
    other = (1, 2, 9, 9)
    tokens, ends = collect(engine, [Request(other, 8, kept=kept)])
    assert tokens[0] == expected(other, 4)
    assert ends[0].usage.cached_tokens == 2
    kept.release()
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


def test_logits_that_are_not_finite_stop_the_run_and_name_the_weight():
    class Broken(Recalling):
        def logits(self, sequence):
            return np.full(VOCABULARY, np.nan, np.float32) if len(sequence) > 4 else super().logits(sequence)

        def find_non_finite(self):
            return "model.layers.3.attention.wo.weight"

    engine = Engine(Broken(), limits())
    with pytest.raises(UserError, match="model.layers.3.attention.wo.weight") as caught:
        list(engine.generate([Request((1, 2), 20)]))
    assert caught.value.exit_code == EXIT_FAILED
    assert engine.pool.free_blocks == 16


def two_ranks():
    """Networks of rank 0 and rank 1; what rank 0 agrees on, run first, is what rank 1 is told."""
    told = []

    class First(Recalling):
        def agree(self, ids):
            told.append(ids.copy())
            return ids

    class Second(Recalling):
        rank = 1

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
    assert [step.request for step in seen if step.finish_reason == CANCELLED] == [0, 1]
    assert all(step.request < 2 for step in seen)
    assert first.pool.free_blocks == 16
    followed = list(Engine(Second(), limits(), max_batch=2).generate(requests))
    assert [(s.request, s.token, s.finish_reason) for s in followed] == [(s.request, s.token, s.finish_reason) for s in seen]


def test_an_interrupted_conversation_keeps_its_cache():
    engine = Engine(Recalling(), limits())
    kept = KeptCache(engine)
    tokens = []
    for step in engine.generate([Request((1, 2), 40, kept=kept)]):
        tokens.append(step.token)
        if len(tokens) == 4:
            engine.interrupt()
    assert kept.ids == [1, 2, *tokens[:4]][:len(kept.ids)] and len(kept.ids) >= 5
    assert list(engine.generate([Request((1,), 3)]))[-1].finish_reason == LENGTH  # the next one runs as ever
