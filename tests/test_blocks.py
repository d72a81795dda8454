"""Block tables and slots of the paged KV cache."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from qwen15.generation.blocks import BlockPool, BlockTable, OutOfBlocks, table_array


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
