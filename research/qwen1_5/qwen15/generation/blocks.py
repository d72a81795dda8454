"""Which blocks of the paged KV cache belong to which sequence, and where a token's slot is. No tensors on a device."""

from typing import List, Sequence

import numpy as np


class OutOfBlocks(Exception):
    """The pool has fewer free blocks than were asked for."""


class BlockPool:
    """Free blocks of the KV cache.

    Args:
        num_blocks: blocks in the cache.
        block_size: tokens in a block.
    """

    def __init__(self, num_blocks: int, block_size: int):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def free_blocks(self) -> int:
        """Blocks that no table holds."""
        return len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that `tokens` tokens of one sequence fill or begin."""
        return -(-tokens // self.block_size)

    def take(self, count: int) -> List[int]:
        """`count` free blocks.

        Raises:
            OutOfBlocks: fewer are free; none is taken.
        """
        if count > len(self._free):
            raise OutOfBlocks(f"{count} blocks wanted, {len(self._free)} of {self.num_blocks} free")
        return [self._free.pop() for _ in range(count)]

    def give_back(self, blocks: Sequence[int]) -> None:
        """Return blocks that `take` gave out."""
        self._free.extend(reversed(blocks))


class BlockTable:
    """One sequence's blocks, in the order of its tokens.

    Args:
        pool: where the blocks come from and go back to.
    """

    def __init__(self, pool: BlockPool):
        self._pool = pool
        self.blocks: List[int] = []

    @property
    def capacity(self) -> int:
        """Tokens the table has room for."""
        return len(self.blocks) * self._pool.block_size

    def reserve(self, tokens: int) -> None:
        """Make room for a sequence of `tokens` tokens in all.

        Raises:
            OutOfBlocks: the pool has too few free blocks; the table is unchanged.
        """
        missing = self._pool.blocks_for(tokens) - len(self.blocks)
        if missing > 0:
            self.blocks.extend(self._pool.take(missing))

    def release(self) -> None:
        """Give all blocks back."""
        self._pool.give_back(self.blocks)
        self.blocks = []

    def slot(self, position: int) -> int:
        """Slot of the token at `position`."""
        return self.blocks[position // self._pool.block_size] * self._pool.block_size + position % self._pool.block_size

    def slots(self, start: int, stop: int) -> np.ndarray:
        """Slots of tokens start..stop-1, (stop - start,) int32: block * block_size + offset in the block."""
        token = np.arange(start, stop)
        block = np.asarray(self.blocks, dtype=np.int64)[token // self._pool.block_size]
        return (block * self._pool.block_size + token % self._pool.block_size).astype(np.int32)


def table_array(tables: Sequence[BlockTable], lengths: Sequence[int], block_size: int) -> np.ndarray:
    """The tables as one array (B, M) int32 padded with -1; M covers the longest of `lengths` (tokens), no more."""
    width = max(-(-length // block_size) for length in lengths)
    array = np.full((len(tables), width), -1, dtype=np.int32)
    for row, (table, length) in enumerate(zip(tables, lengths)):
        used = table.blocks[:-(-length // block_size)]
        array[row, :len(used)] = used
    return array
