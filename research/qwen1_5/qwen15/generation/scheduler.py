"""Who runs next: requests wait, start when there is room, share the pieces of prefill, and go back when blocks run out.

Nothing here depends on time or chance, so ranks that are told the same make the same plan.
"""

from __future__ import annotations

from collections import deque
from typing import Deque, List, Optional, Sequence, Set, Tuple

from .blocks import BlockPool, BlockTable, OutOfBlocks, name_blocks
from .request import LogProbs, Request
from .sampling import Sampler

PIECE_TOKENS = 512
"""Most tokens in one prefill call: bounds the activations whatever the prompts' lengths, and how long those that decode
pause and those that have just come wait. Longer calls are not faster on a CPU."""
WHOLE_PROMPTS_TOKENS = 2048
"""The same where prompts are not divided and nobody decodes; a single prompt may be longer."""
SCORED_ROWS = 64
"""Tokens of prompts whose log probabilities are wanted in one call: bounds the logits, (rows, V)."""
_LOOK_AHEAD = 32
"""How many waiting requests are looked at when the first of them wait for a prefix that another one is computing."""


class Continuation:
    """A request from its start to its end.

    Attributes:
        number: its id.
        ids: prompt and generated tokens; the first `cached` of them are in the KV cache.
        prefilling: its tokens are being brought into the cache, at the start or after it was put back.
        reused: tokens of the prompt found in the cache when it first started.
        decode_steps, guessed, accepted: see `request.Usage`.
    """

    def __init__(self, number: int, request: Request, sampler: Sampler, pool: BlockPool):
        self.number = number
        self.request = request
        self.sampler = sampler
        self.table = BlockTable(pool)
        self.ids: List[int] = list(request.prompt)
        self.limit = request.limit
        self.cached = 0
        self.prefilling = True
        self.reused: Optional[int] = None
        self.prefill_s = 0.0
        self.decode_s = 0.0
        self.decode_steps = self.guessed = self.accepted = 0
        self.prompt_logprobs: Optional[List[LogProbs]] = None if request.prompt_logprobs is None else []
        self.digests: List[bytes] = []
        self.published = 0

    @property
    def generated(self) -> int:
        """Tokens chosen so far."""
        return len(self.ids) - len(self.request.prompt)

    @property
    def scores_prompt(self) -> bool:
        """Its prefill runs token by token in rows, because the logits of each place are wanted."""
        return self.request.prompt_logprobs is not None and not self.generated

    @property
    def missing(self) -> int:
        """Tokens that are not in the cache yet."""
        return len(self.ids) - self.cached


class Scheduler:
    """The queue of requests and the cache's blocks.

    Args:
        pool: the blocks.
        max_batch: most requests that run at once; None leaves it to the blocks.
        whole_prompts: the network takes prompts in one piece only and continues nothing that is in the cache.
        prefix_cache: share full blocks between requests by content.

    Attributes:
        waiting: in the order in which they came.
        running: in the order in which they started.
        put_back: how many times a request has lost its blocks to an older one.
    """

    def __init__(self, pool: BlockPool, max_batch: Optional[int], whole_prompts: bool, prefix_cache: bool):
        self.pool = pool
        self.max_batch = max_batch
        self.whole_prompts = whole_prompts
        self.prefix_cache = prefix_cache and not whole_prompts
        self.waiting: Deque[Continuation] = deque()
        self.running: List[Continuation] = []
        self.put_back = 0
        self._computing: Set[bytes] = set()

    @property
    def is_empty(self) -> bool:
        """Nothing runs and nothing waits."""
        return not self.running and not self.waiting

    def add(self, continuation: Continuation) -> None:
        """Queue a request."""
        self.waiting.append(continuation)

    def remove(self, continuation: Continuation) -> None:
        """Take a request out, running or waiting, and free its blocks; full ones stay findable."""
        if continuation in self.running:
            self.running.remove(continuation)
            self._let_go(continuation)
        else:
            self.waiting.remove(continuation)

    def admit(self) -> None:
        """Start waiting requests, oldest first, while the blocks of their tokens are free beside one more for each that
        runs.

        One whose next block is just being computed by another, as with a common system message, waits for that block;
        those behind it need not.
        """
        place = 0
        while place < min(len(self.waiting),
                          _LOOK_AHEAD) and (self.max_batch is None or len(self.running) < self.max_batch):
            continuation = self.waiting[place]
            found = self._find(continuation)
            if len(found) < len(continuation.digests) and continuation.digests[len(found)] in self._computing:
                place += 1
                continue
            wanted = self.pool.blocks_for(min(len(continuation.ids) + 1, continuation.limit)) - len(found)
            kept_free = sum(map(self._may_grow, self.running))
            if wanted + kept_free > self.pool.free_blocks - sum(map(self.pool.is_idle, found)):
                break
            del self.waiting[place]
            self._start(continuation, found)

    def _find(self, continuation: Continuation) -> List[int]:
        """Published blocks with the beginning of its tokens; the last token always runs, for its logits."""
        if not self.prefix_cache or continuation.scores_prompt:
            return []
        self._digest(continuation, (len(continuation.ids) - 1) // self.pool.block_size)
        return self.pool.find_all(continuation.digests)

    def _digest(self, continuation: Continuation, count: int) -> None:
        name_blocks(continuation.digests, continuation.ids, count, self.pool.block_size)

    def _may_grow(self, continuation: Continuation) -> bool:
        return self.pool.blocks_for(continuation.limit) > len(continuation.table.blocks)

    def _start(self, continuation: Continuation, found: Sequence[int]) -> None:
        continuation.table.adopt(found)
        continuation.table.reserve(len(continuation.ids))
        continuation.cached = len(found) * self.pool.block_size
        continuation.published = len(found)
        continuation.prefilling = True
        if continuation.reused is None:
            continuation.reused = continuation.cached
        self._computing.update(continuation.digests[len(found):])
        self.running.append(continuation)

    def piece(self) -> List[Tuple[Continuation, int]]:
        """The next piece of prefill: for each request in it, how many of its tokens will be in the cache afterwards.

        Half of a piece is for the request that has run longest; the others have equal parts of the rest, and what one
        does not need goes to the oldest that does, unless the piece is the last for somebody else, who then waits no
        longer than for that half. So a short prompt does not wait for a long one in front of it.
        """
        pending = [c for c in self.running if c.prefilling and not c.scores_prompt]
        if not pending:
            return []
        if self.whole_prompts:
            streams = any(not c.prefilling for c in self.running)
            return self._whole(pending, PIECE_TOKENS if streams else WHOLE_PROMPTS_TOKENS)
        room = PIECE_TOKENS
        parts = [0] * len(pending)
        if len(pending) > 1:
            parts[0] = min(pending[0].missing, room // 2)
            equal = (room - parts[0]) // (len(pending) - 1)
            for place in range(1, len(pending)):
                parts[place] = min(pending[place].missing, equal)
        ends = any(part == continuation.missing for part, continuation in zip(parts[1:], pending[1:]))
        left = 0 if ends else room - sum(parts)
        for place, continuation in enumerate(pending):
            more = min(continuation.missing - parts[place], left)
            parts[place] += more
            left -= more
        return [(c, c.cached + part) for c, part in zip(pending, parts) if part]

    @staticmethod
    def _whole(pending: Sequence[Continuation], room: int) -> List[Tuple[Continuation, int]]:
        taken: List[Tuple[Continuation, int]] = []
        for continuation in pending:
            if taken and continuation.missing > room:
                break
            taken.append((continuation, len(continuation.ids)))
            room -= continuation.missing
        return taken

    def scored_piece(self) -> List[Tuple[Continuation, int]]:
        """As `piece`, for the requests that want log probabilities of their prompts; oldest first."""
        taken, room = [], SCORED_ROWS
        for continuation in self.running:
            if continuation.prefilling and continuation.scores_prompt and room:
                part = min(continuation.missing, room)
                taken.append((continuation, continuation.cached + part))
                room -= part
        return taken

    def streams(self) -> List[Continuation]:
        """The requests that decode now, each with a block for its next token; the youngest go back when there are too
        few."""
        for continuation in [c for c in self.running if not c.prefilling]:
            while continuation.table.capacity < len(continuation.ids) and continuation in self.running:
                try:
                    continuation.table.reserve(len(continuation.ids))
                except OutOfBlocks:
                    self._put_back(max(self.running, key=lambda c: c.number))
        return [c for c in self.running if not c.prefilling]

    def reserve_guesses(self, continuation: Continuation, count: int) -> int:
        """Make room for up to `count` guesses behind a stream's tokens, in blocks that nobody else has a use for, and
        return for how many there is; `return_guesses` gives it back."""
        table, length = continuation.table, len(continuation.ids)
        room = table.capacity + self.pool.unused_blocks * self.pool.block_size - length
        count = max(0, min(count, room))
        table.reserve(length + count)
        return count

    @staticmethod
    def return_guesses(continuation: Continuation) -> None:
        """Blocks that only refused guesses were in are free again."""
        continuation.table.shrink(len(continuation.ids))

    def _put_back(self, continuation: Continuation) -> None:
        """To the front of the queue, without blocks; it is computed again later, from all of its tokens."""
        self.running.remove(continuation)
        self._let_go(continuation)
        continuation.cached = 0
        if continuation.scores_prompt:
            continuation.prompt_logprobs = []
        place = 0  # the queue is ordered by arrival; requests put back earlier may be older or younger than this one
        while place < len(self.waiting) and self.waiting[place].number < continuation.number:
            place += 1
        self.waiting.insert(place, continuation)
        self.put_back += 1

    def note_cached(self, continuation: Continuation, cached: int) -> None:
        """The first `cached` tokens are in the cache now: full blocks become findable."""
        continuation.cached = cached
        size = self.pool.block_size
        if self.prefix_cache and (continuation.published + 1) * size <= cached:
            self._digest(continuation, cached // size)
            while (continuation.published + 1) * size <= cached:
                digest = continuation.digests[continuation.published]
                self.pool.publish(continuation.table.blocks[continuation.published], digest)
                self._computing.discard(digest)
                continuation.published += 1

    def distrust(self, continuation: Continuation) -> None:
        """What the request has put into the cache is not to be used by others."""
        self.pool.forget(continuation.table.blocks)

    def _let_go(self, continuation: Continuation) -> None:
        self._computing.difference_update(continuation.digests[continuation.published:])
        continuation.table.release()
