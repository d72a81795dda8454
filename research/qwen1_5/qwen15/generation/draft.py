"""A small model that guesses for a big one, with a network and a KV cache of its own that keep in step with the text.

The draft chooses each guess as the big model's sampler would, with the random numbers that it is going to use: where
the two models agree on the probabilities they draw the same token.
"""

from __future__ import annotations

from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np

from .. import interrupts
from ..config.schema import Config
from ..network.base import Network
from . import memory, memory_check, sampling
from .blocks import BlockPool, BlockTable, OutOfBlocks, Part, decode_inputs, name_blocks, prefill_inputs
from .sampling import NonFiniteLogits, Sampler, Selection
from .scheduler import PIECE_TOKENS, Continuation
from .speculate import Speculation, SuccessRate, most_streams, worth

_PRIOR = 0.6
_PACE, _OWN_COST = 1.1, 0.01
"""A call of the draft reads so much slower than a step of the big model, and does other things for this part of such a
step (0.5 ms beside a model of 1 GB)."""
_FEW = 4
"""Up to so many new tokens of each stream go through a decode call, row by row; more are a prefill."""


class _Track:
    """What the draft's cache holds of one stream: `cached` tokens of its text, then the guesses that were fed.

    `unknown`: the text has a token that the draft has no embedding of, so nothing is guessed any more.
    """

    def __init__(self, pool: BlockPool):
        self.table = BlockTable(pool)
        self.cached = 0
        self.fed: List[int] = []
        self.digests: List[bytes] = []
        self.published = 0
        self.read = 0
        self.unknown = False
        self.record = SuccessRate(_PRIOR, 0.85, 0.001)

    def settle(self, ids: Sequence[int]) -> None:
        """Keep of the guesses those that have become the text."""
        for token in self.fed:
            # The text's last token goes through the network again, for its logits.
            if self.cached >= len(ids) - 1 or ids[self.cached] != token:
                break
            self.cached += 1
        self.fed = []


class DraftModel(Speculation):
    """Guesses what a smaller model would say.

    Args:
        network: the draft's.
        num_blocks, block_size: its KV cache's blocks and the tokens in one.
        vocab_size: of the big model; ids beyond it are never guessed.
        most: most guesses of a stream in a step.
        cost: time of one call of the draft, over a step of the big model.
        selection: the searches over the vocabulary.
        quantised: the big model's weights are.
    """

    everywhere = False

    def __init__(self, network: Network, num_blocks: int, block_size: int, vocab_size: int, most: int, cost: float,
                 selection: Selection = sampling.PLAIN, quantised: bool = False):
        self.network = network
        self.most, self.most_streams = most, most_streams(quantised)
        self.pool = BlockPool(num_blocks, block_size)
        self._vocab_size = min(vocab_size, network.vocab_size)
        self._cost, self._selection, self._quantised = cost, selection, quantised
        self._tracks: Dict[int, _Track] = {}

    def guess(self, streams: Sequence[Continuation], rooms: Sequence[int]) -> List[List[int]]:
        made: List[List[int]] = [[] for _ in streams]
        tracks = [self._track(c) if room > 0 else None for c, room in zip(streams, rooms)]
        chances = [0.0 if track is None or track.unknown else track.record.chance for track in tracks]
        counts = worth(chances, [room if chance else 0 for room, chance in zip(rooms, chances)], self._quantised,
                       self._cost)
        running = []
        for continuation, track, chance, count, guesses in zip(streams, tracks, chances, counts, made):
            if track is not None and count:
                running.append(_Guessing(continuation, track, count, guesses))
            elif track is not None and chance:
                track.record.rest()
        running = self._caught_up(running)
        while running:
            running = [each for each in running if len(each.made) < each.count]
            running = self._fed(running)
        return made

    def learn(self, continuation: Continuation, guesses: Sequence[int], right: int) -> None:
        self._track(continuation).record.learn(len(guesses), right)

    def forget(self, continuation: Continuation) -> None:
        track = self._tracks.pop(continuation.number, None)
        if track is not None:
            track.table.release()

    # ---- the draft's cache ----

    def _track(self, continuation: Continuation) -> _Track:
        track = self._tracks.get(continuation.number)
        if track is None:
            track = self._tracks[continuation.number] = _Track(self.pool)
            self._adopt(track, continuation.ids)
        unread = continuation.ids[track.read:]
        track.read += len(unread)
        track.unknown = track.unknown or max(unread, default=0) >= self.network.vocab_size
        return track

    def _adopt(self, track: _Track, ids: Sequence[int]) -> None:
        """Begin with the blocks that an earlier stream has left, such as those of a conversation's last turn."""
        name_blocks(track.digests, ids, (len(ids) - 1) // self.pool.block_size, self.pool.block_size)
        found = self.pool.find_all(track.digests)
        track.table.adopt(found)
        track.published = len(found)
        track.cached = len(found) * self.pool.block_size

    def _publish(self, track: _Track, ids: Sequence[int]) -> None:
        full = track.cached // self.pool.block_size
        name_blocks(track.digests, ids, full, self.pool.block_size)
        while track.published < full:
            self.pool.publish(track.table.blocks[track.published], track.digests[track.published])
            track.published += 1

    def _caught_up(self, wanted: List["_Guessing"]) -> List["_Guessing"]:
        """Bring each stream's text into the cache and make its first guess; those that are not there yet are left
        out."""
        room = PIECE_TOKENS
        parts: List[Tuple[_Guessing, int]] = []
        for each in wanted:
            each.track.settle(each.ids)
            stop = min(len(each.ids), each.track.cached + room)
            if stop == each.track.cached or not self._reserved(each, stop):
                continue
            room -= stop - each.track.cached
            parts.append((each, stop))
        if not parts:
            return []
        counts = [stop - each.track.cached for each, stop in parts]
        if max(counts) <= _FEW:
            logits, largest = self._decode([(each, each.ids[each.track.cached:stop]) for each, stop in parts])
            last = np.cumsum(counts) - 1
            logits, largest = logits[last], [largest[at] for at in last]
        else:
            logits = self._prefill(parts)
            largest = _unknown(logits)
        ready = []
        for (each, stop), row, found in zip(parts, logits, largest):
            each.track.cached = stop
            self._publish(each.track, each.ids)
            if stop == len(each.ids):
                ready.append((each, row, found))
        return self._chosen(ready)

    def _fed(self, running: List["_Guessing"]) -> List["_Guessing"]:
        """Each stream's last guess goes through the network, and the next one comes out."""
        running = [each for each in running if self._reserved(each, len(each.ids) + len(each.made))]
        if not running:
            return []
        logits, largest = self._decode([(each, each.made[-1:]) for each in running])
        for each in running:
            each.track.fed.append(each.made[-1])
        return self._chosen(list(zip(running, logits, largest)))

    def _reserved(self, each: "_Guessing", tokens: int) -> bool:
        try:
            each.track.table.reserve(tokens)
        except OutOfBlocks:
            return False
        return True

    # ---- the draft's network ----

    def _prefill(self, parts: Sequence[Tuple["_Guessing", int]]) -> np.ndarray:
        with interrupts.held():
            return self.network.prefill(*prefill_inputs(
                [Part(each.track.table, each.ids[each.track.cached:stop], each.track.cached) for each, stop in parts],
                self.pool.block_size))

    def _decode(self, parts: Sequence[Tuple["_Guessing", Sequence[int]]]) -> Tuple[np.ndarray, List[Optional[int]]]:
        """Logits (rows, V) with a row for each token, behind what the cache holds of its stream, and the largest one's
        id of each row where the network knows it."""
        logits = self.network.decode(*decode_inputs(
            [Part(each.track.table, tokens, each.track.cached + len(each.track.fed)) for each, tokens in parts],
            self.pool.block_size))
        largest = self.network.largest(logits)
        return logits, _unknown(logits) if largest is None else largest.tolist()

    def _chosen(self, ready: Sequence[Tuple["_Guessing", np.ndarray, Optional[int]]]) -> List["_Guessing"]:
        """Add a guess to each; those whose logits are of no use end here."""
        going = []
        for each, row, largest in ready:
            row = row[:self._vocab_size]
            try:
                if each.sampler is not None:
                    token = each.sampler.choose(row)
                elif largest is not None and 0 <= largest < len(row):
                    token = largest
                else:
                    token = int(self._selection.argmax(np.ascontiguousarray(row)[None])[0])
            except NonFiniteLogits:
                continue
            each.made.append(token)
            going.append(each)
        return going


def _unknown(logits: np.ndarray) -> List[Optional[int]]:
    """Of no row the largest logit is known."""
    return [None] * len(logits)


class _Guessing:
    """One stream's guesses of one step as they come: up to `count` into `made`."""

    def __init__(self, continuation: Continuation, track: _Track, count: int, made: List[int]):
        self.ids, self.track, self.count, self.made = continuation.ids, track, count, made
        own = continuation.sampler
        self.sampler: Optional[Sampler] = None if own.is_plain_greedy else own.imagined()


# ---- which draft ----

def draft_cost(config: Config, draft: Config) -> float:
    """Time of a call of the draft over a step of the big model, as the bytes that each reads let expect."""
    return _PACE * _read_bytes(draft) / _read_bytes(config) + _OWN_COST


def _read_bytes(config: Config) -> int:
    """Of weights, in a decode step."""
    wanted = memory.need(config.model, config.parallel, config.device_target, memory_check.held(config))
    return wanted.layer_bytes + wanted.embedding_bytes // (1 if config.model.dims.tie_word_embeddings else 2)
