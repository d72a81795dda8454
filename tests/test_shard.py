"""Cutting and joining are inverse, whatever the shape, the dtype and the number of ranks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from qwen15.checkpoint.shard import bounds, cut, join


@given(st.data())
def test_join_undoes_cut(data):
    parts = data.draw(st.integers(1, 6))
    axis = data.draw(st.sampled_from([None, 0, 1]))
    shape = [data.draw(st.integers(0, 5)) for _ in range(data.draw(st.integers(2, 3)))]
    if axis is not None:
        shape[axis] *= parts
    dtype = data.draw(st.sampled_from([np.float32, np.float16, np.uint16]))
    whole = np.random.default_rng(0).integers(0, 255, shape).astype(dtype)
    slices = [cut(whole, axis, rank, parts) for rank in range(parts)]
    assert all(part.flags.c_contiguous for part in slices)
    joined = join(slices, axis)
    assert joined.dtype == whole.dtype and np.array_equal(joined, whole)


def test_a_cut_along_the_first_axis_copies_nothing():
    whole = np.arange(12).reshape(6, 2)
    assert np.shares_memory(cut(whole, 0, 1, 3), whole)


def test_ranks_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="10 is not divisible by 4"):
        bounds(10, 0, 4)
    with pytest.raises(ValueError, match="no rank 4"):
        bounds(12, 4, 4)


def test_replicas_that_differ_in_one_bit_are_refused():
    zero = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match="rank 1"):
        join([zero, -zero], None)


def test_replicas_with_nan_are_equal_to_themselves():
    nan = np.full(3, np.nan, np.float16)
    assert join([nan, nan.copy()], None) is nan
