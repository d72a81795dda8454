"""Blocks of the paged KV cache: which sequence holds which, what they contain, where a token's slot is."""

from __future__ import annotations

import hashlib
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

DIGEST_BYTES = 16
"""Bytes of a block's digest: two different prefixes meet in one with a chance of 2^-64 among 2^32 blocks."""


class OutOfBlocks(Exception):
    """The pool has fewer free blocks than were asked for."""


def block_digest(before: bytes, tokens: Sequence[int]) -> bytes:
    """A name for what a full block holds: its tokens and everything in front of them.

    Args:
        before: the digest of the block in front, b"" for a sequence's first.
        tokens: the block's token ids.
    """
    return hashlib.blake2b(before + np.asarray(tokens, np.int32).tobytes(), digest_size=DIGEST_BYTES).digest()


def name_blocks(digests: List[bytes], ids: Sequence[int], count: int, block_size: int) -> None:
    """Extend `digests` to the digests of the first `count` blocks of a sequence, all of them full."""
    while len(digests) < count:
        start = len(digests) * block_size
        digests.append(block_digest(digests[-1] if digests else b"", ids[start:start + block_size]))


class BlockPool:
    """The cache's blocks, counted by who holds them.

    A full block may be `publish`ed under the digest of its content. Other sequences then `find` and `hold` it too, and
    when nobody holds it any more it stays until its room is needed; the one that was let go longest ago goes first.

    Args:
        num_blocks: blocks in the cache.
        block_size: tokens in a block.
    """

    def __init__(self, num_blocks: int, block_size: int):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._holders = [0] * num_blocks
        self._digest_of: Dict[int, bytes] = {}
        self._block_of: Dict[bytes, int] = {}
        self._idle: Dict[int, None] = {}  # published, used by no request, in the order in which they were released

    @property
    def free_blocks(self) -> int:
        """Blocks that no table holds; what some of them contain may still be of use."""
        return len(self._free) + len(self._idle)

    @property
    def unused_blocks(self) -> int:
        """Of the free blocks, those whose content nobody can need."""
        return len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that `tokens` tokens of one sequence fill or begin."""
        return -(-tokens // self.block_size)

    def take(self, count: int) -> List[int]:
        """`count` free blocks, held once each. Kept contents are given up only when no other block is free.

        Raises:
            OutOfBlocks: fewer are free; none is taken.
        """
        if count > self.free_blocks:
            raise OutOfBlocks(f"{count} blocks wanted, {self.free_blocks} of {self.num_blocks} free")
        taken = []
        for _ in range(count):
            if not self._free:
                self.forget((next(iter(self._idle)),))
            taken.append(self._free.pop())
            self._holders[taken[-1]] = 1
        return taken

    def hold(self, block: int) -> None:
        """Hold a published block too."""
        self._holders[block] += 1
        self._idle.pop(block, None)

    def give_back(self, blocks: Sequence[int]) -> None:
        """Let go of blocks that `take` or `hold` gave. Later ones of a sequence are given up before those in front of
        them."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if block in self._digest_of:
                    self._idle[block] = None
                else:
                    self._free.append(block)

    def publish(self, block: int, digest: bytes) -> None:
        """Let others find a full block by its content. When another block has the same content already, nothing
        changes."""
        if digest not in self._block_of:
            self._block_of[digest] = block
            self._digest_of[block] = digest

    def find(self, digest: bytes) -> Optional[int]:
        """The published block with this content; None when there is none."""
        return self._block_of.get(digest)

    def find_all(self, digests: Sequence[bytes]) -> List[int]:
        """The published blocks of a sequence's beginning, up to the first digest that has none."""
        found: List[int] = []
        for digest in digests:
            block = self.find(digest)
            if block is None:
                break
            found.append(block)
        return found

    def is_idle(self, block: int) -> bool:
        """Whether nobody holds this published block, so that it counts as free."""
        return block in self._idle

    def forget(self, blocks: Sequence[int]) -> None:
        """Nobody shall find these blocks by their content any more."""
        for block in blocks:
            digest = self._digest_of.pop(block, None)
            if digest is not None:
                del self._block_of[digest]
            if block in self._idle:
                del self._idle[block]
                self._free.append(block)

    def forget_all(self) -> None:
        """Nobody shall find any block by its content: a cache as after the start."""
        self.forget(list(self._digest_of))


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

    def adopt(self, blocks: Sequence[int]) -> None:
        """Begin with published blocks, which others may hold as well; only for a table that is empty."""
        assert not self.blocks
        for block in blocks:
            self._pool.hold(block)
        self.blocks = list(blocks)

    def reserve(self, tokens: int) -> None:
        """Make room for a sequence of `tokens` tokens in all.

        Raises:
            OutOfBlocks: the pool has too few free blocks; the table is unchanged.
        """
        missing = self._pool.blocks_for(tokens) - len(self.blocks)
        if missing > 0:
            self.blocks.extend(self._pool.take(missing))

    def shrink(self, tokens: int) -> None:
        """Give back what a sequence of `tokens` tokens in all has no use for."""
        kept = self._pool.blocks_for(tokens)
        self._pool.give_back(self.blocks[kept:])
        del self.blocks[kept:]

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
    rows = [table.blocks[:-(-length // block_size)] for table, length in zip(tables, lengths)]
    width = max(map(len, rows))
    return np.array([row + [-1] * (width - len(row)) for row in rows], np.int32)


class Part(NamedTuple):
    """Tokens of one sequence that go through the network together, at the positions from `first` on."""

    table: BlockTable
    tokens: Sequence[int]
    first: int


def prefill_inputs(parts: Sequence[Part], block_size: int) -> Tuple[np.ndarray, ...]:
    """What `Network.prefill` takes for these parts, each of a sequence of its own."""
    stops = [part.first + len(part.tokens) for part in parts]
    return (np.concatenate([np.asarray(part.tokens, np.int32) for part in parts]),
            np.asarray([len(part.tokens) for part in parts], np.int32), np.asarray(stops, np.int32),
            table_array([part.table for part in parts], stops, block_size),
            np.concatenate([part.table.slots(part.first, stop) for part, stop in zip(parts, stops)]))


def decode_inputs(parts: Sequence[Part], block_size: int) -> Tuple[np.ndarray, ...]:
    """What `Network.decode` takes for these parts: a row for each token; rows of one part share its block table."""
    ids: List[int] = []
    lengths: List[int] = []
    slots: List[int] = []
    tables = []
    for table, tokens, first in parts:
        ids += tokens
        for position in range(first, first + len(tokens)):
            lengths.append(position + 1)
            slots.append(table.slot(position))
            tables.append(table)
    return (np.asarray(ids, np.int32), np.asarray(lengths, np.int32), table_array(tables, lengths, block_size),
            np.asarray(slots, np.int32))
