"""Block tables and slots of the paged KV cache."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from qwen15.generation.blocks import BlockPool, BlockTable, OutOfBlocks, block_digest, table_array


def test_slots_follow_the_table_across_blocks():
    pool = BlockPool(4, 3)
    first, table = BlockTable(pool), BlockTable(pool)
    first.reserve(2)
    table.reserve(7)
    assert len(table.blocks) == 3
    expected = [table.blocks[t // 3] * 3 + t % 3 for t in range(7)]
    assert table.slots(0, 7).tolist() == expected
    assert table.slots(5, 6).tolist() == expected[5:6]
    assert table.slots(0, 7).dtype == np.int32


def test_no_block_is_taken_when_too_few_are_free():
    pool = BlockPool(3, 4)
    table = BlockTable(pool)
    with pytest.raises(OutOfBlocks, match="4 blocks wanted, 3 of 3 free"):
        table.reserve(13)
    assert pool.free_blocks == 3 and table.blocks == []


def test_tables_are_padded_with_minus_one_and_trimmed_to_the_longest():
    pool = BlockPool(8, 2)
    tables = [BlockTable(pool) for _ in range(2)]
    tables[0].reserve(8)  # reserved for growth, 3 tokens long now
    tables[1].reserve(1)
    array = table_array(tables, [3, 1], 2)
    assert array.shape == (2, 2)
    assert array[0].tolist() == tables[0].blocks[:2]
    assert array[1].tolist() == [tables[1].blocks[0], -1]


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 30)), max_size=40))
def test_no_block_ever_belongs_to_two_sequences(actions):
    pool, held = BlockPool(16, 4), []
    for release, tokens in actions:
        if release and held:
            held.pop(0).release()
            continue
        table = BlockTable(pool)
        try:
            table.reserve(tokens)
        except OutOfBlocks:
            continue
        held.append(table)
        used = [block for t in held for block in t.blocks]
        assert len(used) == len(set(used)) and set(used) <= set(range(16))
        assert len(used) + pool.free_blocks == 16


def test_the_same_tokens_after_others_are_another_content():
    """What a block of the cache holds depends on everything in front of it."""
    first, second = [1, 2, 3], [4, 5, 6]
    after = block_digest(block_digest(b"", first), second)
    assert after != block_digest(b"", second) and after != block_digest(block_digest(b"", second), second)
    assert after == block_digest(block_digest(b"", np.asarray(first, np.int32)), second)


ACTIONS = st.lists(st.tuples(st.sampled_from(["take", "publish", "find", "let go", "forget"]), st.integers(0, 7)),
                   max_size=60)


@settings(max_examples=300)
@given(ACTIONS)
@example([("take", 0), ("publish", 0), ("let go", 0), ("find", 0), ("take", 2), ("take", 2)])  # kept, found, held
@example([("take", 2), ("publish", 0), ("let go", 0), ("take", 2), ("take", 0), ("find", 0)])  # kept, then given up
def test_whatever_is_found_by_its_content_has_it_still_and_no_block_is_lost(actions):
    """What each block holds is written down beside the pool: a block that is taken is written anew."""
    pool, held, content = BlockPool(6, 2), [], {}
    for action, number in actions:
        block = held[number % len(held)] if held else None
        name = bytes([number % 3])
        if action == "take":
            try:
                taken = pool.take(1 + number % 3)
            except OutOfBlocks:
                assert 1 + number % 3 > 6 - len(set(held))
                continue
            assert not set(taken) & set(held) and len(set(taken)) == 1 + number % 3
            held += taken
            content.update(dict.fromkeys(taken))
        elif action == "find":
            found = pool.find(name)
            if found is not None:
                assert content[found] == name
                pool.hold(found)
                held.append(found)
        elif block is None:
            continue
        elif action == "publish" and content[block] is None:
            content[block] = name
            pool.publish(block, name)
            assert content[pool.find(name)] == name
        elif action == "let go":
            held.remove(block)
            pool.give_back([block])
            assert pool.is_idle(block) == (block not in held and pool.find(content[block] or b"-") == block)
        elif action == "forget":
            pool.forget([block])
            assert pool.find(content[block] or b"-") != block
        assert pool.free_blocks == 6 - len(set(held)) and not any(map(pool.is_idle, held))


def test_of_a_sequence_that_is_kept_the_last_blocks_are_given_up_first():
    """A beginning without its end is of use, an end without its beginning is not."""
    pool = BlockPool(4, 2)
    table = BlockTable(pool)
    table.reserve(6)
    digests = [block_digest(b"", (n, n)) for n in range(3)]
    for block, digest in zip(table.blocks, digests):
        pool.publish(block, digest)
    kept = list(table.blocks)
    table.release()
    pool.take(2)
    assert pool.find_all(digests) == kept[:2]
    pool.take(1)
    assert pool.find_all(digests) == kept[:1]
