"""Byte-level BPE: vocab.json and merges.txt -> ordinary text to token ids, and ids to bytes. No control tokens, no NFC.

A vocabulary file names every token in the byte alphabet (each of the 256 bytes has a printable character); a merges
file lists which two tokens join into which third, most wanted first. Encoding cuts the text into pieces by a regular
expression and merges each piece's bytes.

The engine is tiktoken. It knows no merges file: it joins two neighbours whenever their bytes together are a token, the
lowest rank first. That gives the same ids as the merges file exactly when every token, merged on its own by the tokens
ranked before it, ends in the very pair that its merge names. `merges_are_canonical` checks this for all merges at load
time (about 50 ms for 150k merges); the rare vocabulary that fails it is served by the `tokenizers` library, which
follows the merges file literally.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import threading
import unicodedata
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

from ..errors import UserError
from ..text_file import read_small
from . import tokenizer_json
from .tokenizer_json import PIECES

if TYPE_CHECKING:
    import numpy as np

# Unicode White_Space, which is \s for the regular expression PIECES (Python's own \s has four more: \x1c to \x1f).
_BLANK = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_BLANKS = re.compile(f"[{_BLANK}]+")

# tiktoken's regular expression engine keeps one stack entry per blank it may give back and stops at a million.
LONGEST_BLANK_RUN = 1 << 16

# Costs in look-ups of a piece of text in the vocabulary (about 0.2 us each): of setting up an engine for one short
# text, and per token of setting up one for the whole vocabulary (measured 165 ms for 151643 tokens).
_ENGINE_LOOKUPS = 8000
_LOOKUPS_PER_TOKEN = 4

_MOST_BYTES = 128 * 2 ** 20  # of a file; Qwen's have 3 MB and 2 MB
_LOOKS_LIKE_CONTROL = re.compile(r"<\|?[^\s<>]+\|?>$")


def byte_alphabet() -> List[str]:
    """The printable character that stands for each of the 256 bytes in vocab.json and merges.txt.

    Printable Latin-1 bytes stand for themselves; the others, in order, take the characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)}
    alphabet, spare = [], 0x100
    for byte in range(256):
        if byte in printable:
            alphabet.append(chr(byte))
        else:
            alphabet.append(chr(spare))
            spare += 1
    return alphabet


_BYTE_OF_SYMBOL = {ord(symbol): byte for byte, symbol in enumerate(byte_alphabet())}


class BytePairEncoder:
    """Ordinary text to ids and ids to bytes, for one vocabulary. Safe to use from several threads.

    Both files are read and checked as a whole at once. The engine is made when it is needed, and for a short text only
    of the part of the vocabulary that occurs in that text: building it of all 150k tokens takes longer than reading
    and checking the files, and many a run has one short prompt. Merging within a text never meets other tokens than
    those that occur in it, so the ids are the same.

    Args:
        vocab_file: vocab.json, token (in the byte alphabet) to id; the ids are 0 to V-1, each once. Ids left out must
            be among `added`. Or a tokenizer.json.
        merges_file: merges.txt, `left right` a line after an optional `#version` line. Or a tokenizer.json.
        added: tokens that are matched whole before any merging (control tokens), with their ids where these are known
            beforehand. Those that vocab.json has too need no merge, and may be written outside the byte alphabet.
        unknown: the token whose id stands for a byte that the vocabulary has no token for (some small vocabularies
            lack bytes that hardly occur). Without it such a vocabulary is refused.

    Attributes:
        vocab: vocab.json as read.
        tokens: per id the token as vocab.json has it, "" for an id left out; V entries.

    Raises:
        UserError: a file is missing, damaged, swapped with the other, or of another model.
    """

    def __init__(self, vocab_file: str, merges_file: str, added: Mapping[str, Optional[int]],
                 unknown: Optional[str] = None):
        import numpy as np

        self.vocab_file, self.merges_file = str(vocab_file), str(merges_file)
        self.vocab = _read_vocab(self.vocab_file, self.merges_file, added)
        self.tokens = [""] * (1 + max(self.vocab.values()))
        for token, index in self.vocab.items():
            self.tokens[index] = token
        self._added = frozenset(added)
        self._values, self._ends = _byte_values(self.tokens)
        self._outside = _outside_alphabet(self._values, self._ends)
        for index in self._outside:
            if self.tokens[index] not in added:
                raise UserError(f"token {self.tokens[index]!r} (id {index}) is not written in the byte alphabet of "
                                "byte-level BPE", self.vocab_file, "This vocabulary is of another kind of tokenizer.")
        self._merges = np.array(_read_merges(self.merges_file, self.vocab, self.vocab_file), np.int64)
        self._byte_ids = [self.vocab.get(symbol) for symbol in byte_alphabet()]
        self._check_reachable()
        self._unknown = None if unknown is None else self.vocab.get(unknown)
        if None in self._byte_ids and self._unknown is None:
            lacking = [f"{byte:#04x}" for byte, index in enumerate(self._byte_ids) if index is None]
            raise UserError(f"has no token for {len(lacking)} of the 256 bytes ({', '.join(lacking[:3])}, ...)",
                            self.vocab_file, "This is not the vocab.json of a Qwen model, or it was cut.")
        self._longest = max(map(len, self.tokens))
        self._lookups_left = _LOOKUPS_PER_TOKEN * len(self.tokens)
        self._lock = threading.Lock()
        self._whole: Union[_ByRank, _ByMerges, None] = None

    def _check_reachable(self) -> None:
        """Every token must come from a merge, a byte or the control tokens, or the merges file is not the whole one."""
        import numpy as np

        reachable = np.zeros(len(self.tokens), bool)
        reachable[self._merges[2]] = True
        reachable[[index for index in self._byte_ids if index is not None]] = True
        lost = [index for index in np.flatnonzero(~reachable).tolist() if self.tokens[index]
                and self.tokens[index] not in self._added and not _LOOKS_LIKE_CONTROL.match(self.tokens[index])]
        if lost:
            raise UserError(
                f"its {self._merges.shape[1]} merges cannot make {len(lost)} of the {len(self.tokens)} tokens of "
                f"{self.vocab_file} (the first is {self.tokens[lost[0]]!r}, id {lost[0]})", self.merges_file,
                "The file is truncated or belongs to another model: take both files from the same checkpoint.")

    @functools.cached_property
    def token_bytes(self) -> List[bytes]:
        """Per id the bytes it stands for (control tokens in UTF-8); V entries."""
        import numpy as np

        raw = self._values.astype(np.uint8).tobytes()
        ends = self._ends.tolist()
        result = [raw[start:stop] for start, stop in zip([0] + ends, ends)]
        for index in self._outside:
            result[index] = self.tokens[index].encode()
        return result

    @property
    def engine(self) -> str:
        """'tiktoken' or 'tokenizers': which of them serves long texts."""
        return self._whole_engine().name

    def _whole_engine(self) -> Union["_ByRank", "_ByMerges"]:
        with self._lock:
            if self._whole is None:
                self._whole = self._made_of(self._merges)
        return self._whole

    def _engine_for(self, text: str) -> Union["_ByRank", "_ByMerges"]:
        """The whole engine, or one of what occurs in `text`, as long as these have cost less than the whole would."""
        if self._whole is not None:
            return self._whole
        data = text.encode()
        self._lookups_left -= _ENGINE_LOOKUPS + len(data) * min(len(data), self._longest)
        if self._lookups_left < 0:
            return self._whole_engine()
        import numpy as np

        alphabet = byte_alphabet()
        symbols, size, longest = "".join([alphabet[byte] for byte in data]), len(data), self._longest
        occurs = np.zeros(len(self.tokens), bool)
        occurs[[self.vocab[part] for part in {symbols[start:stop] for start in range(size)
                                              for stop in range(start + 2, min(size, start + longest) + 1)}
                if part in self.vocab]] = True
        return self._made_of(self._merges[:, occurs[self._merges[2]]])

    def _made_of(self, merges: Any) -> Union["_ByRank", "_ByMerges"]:
        left, right, joined = merges
        kind = _ByRank if merges_are_canonical(left, right, joined, len(self.tokens)) else _ByMerges
        return kind(self.tokens, merges.tolist(), self._byte_ids, self._unknown)

    def encode(self, text: str) -> List[int]:
        """Ids of `text` with nothing in it special. Lone surrogates must have been replaced before."""
        engine, run = self._engine_for(text), _long_blank_run(text)
        if run is None:
            return engine.encode(text)
        ids: List[int] = []
        start = 0
        while run is not None:
            # The run is cut by hand just as the regular expression would: line ends straight after a symbol belong
            # to the symbol's piece, then all up to the last line end, then all but the last blank before a word.
            begin, end = run
            if begin > start and _is_symbol(text[begin - 1]):
                while begin < end and text[begin] in "\r\n":
                    begin += 1
            ids += engine.encode(text[start:begin])
            line_end = 1 + max(text.rfind("\n", begin, end), text.rfind("\r", begin, end), begin - 1)
            tail = end if end == len(text) else max(line_end, end - 1)
            for piece in (text[begin:line_end], text[line_end:tail]):
                if piece:
                    ids += engine.encode_piece(piece)
            start = tail
            run = _long_blank_run(text, end)
        return ids + engine.encode(text[start:])


class _ByRank:
    """tiktoken over merges that are canonical.

    Args:
        tokens: per id the token in the byte alphabet; (V,).
        merges: ids of left part, right part and whole, most wanted first; (3, M).
        byte_ids: id of each byte's token, None for a byte without one; (256,).
        unknown: the id that stands for those.
    """

    name = "tiktoken"

    def __init__(self, tokens: Sequence[str], merges: Sequence[Sequence[int]], byte_ids: Sequence[Optional[int]],
                 unknown: Optional[int]):
        joined, size = merges[2], len(tokens)
        raw = "".join([tokens[index] for index in joined]).translate(_BYTE_OF_SYMBOL).encode("latin-1")
        ends = list(itertools.accumulate([len(tokens[index]) for index in joined]))
        whole = [raw[start:stop] for start, stop in zip([0, *ends], ends)]
        # tiktoken's token is its rank. Where ids follow the merges' order (every Qwen vocabulary) ranks are the ids;
        # elsewhere ranks count bytes, then merges, and `_ids` turns them into ids. A byte without a token gets a rank
        # beyond the others, which `_ids` turns into the unknown token.
        if all(map(int.__lt__, joined, joined[1:])):
            ranks = {bytes((byte,)): size + byte if index is None else index for byte, index in enumerate(byte_ids)}
            ranks.update(zip(whole, joined))
            self._first_odd_rank = size if None in byte_ids else None
            self._ids = [*range(size), *[unknown] * 256] if None in byte_ids else []
        else:
            ranks = {bytes((byte,)): byte for byte in range(256)}
            ranks.update(zip(whole, range(256, 256 + len(whole))))
            self._first_odd_rank = 0
            self._ids = [*[unknown if index is None else index for index in byte_ids], *joined]
        self._ranks = ranks
        self._pieces = _encoding("pieces", PIECES, ranks)

    def encode(self, text: str) -> List[int]:
        """Ids of a text."""
        return _to_ids(self._pieces.encode_ordinary(text), self._first_odd_rank, self._ids)

    def encode_piece(self, piece: str) -> List[int]:
        """Ids of one piece that the regular expression cannot cut out because it is too long for it."""
        return _to_ids(self._single.encode_ordinary(piece), self._first_odd_rank, self._ids)

    @functools.cached_property
    def _single(self) -> Any:
        return _encoding("single", r"(?s:.+)", self._ranks)


class _ByMerges:
    """The `tokenizers` library, which follows the merges to the letter. The arguments are those of `_ByRank`."""

    name = "tokenizers"

    def __init__(self, tokens: Sequence[str], merges: Sequence[Sequence[int]], byte_ids: Sequence[Optional[int]],
                 unknown: Optional[int]):
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers

        # A byte without a token must not vanish: it gets one beyond the vocabulary, which `_ids` makes unknown.
        size = len(tokens)
        vocab = {symbol: size + byte if byte_ids[byte] is None else byte_ids[byte]
                 for byte, symbol in enumerate(byte_alphabet())}
        vocab.update((tokens[index], index) for index in merges[2])
        pairs = [(tokens[left], tokens[right]) for left, right, _ in zip(*merges)]
        tokenizer = Tokenizer(models.BPE(vocab, pairs))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        self._ids = [*range(size), *[unknown] * 256]
        self._first_odd_rank = size if None in byte_ids else None
        self._pieces = tokenizer

    def encode(self, text: str) -> List[int]:
        """Ids of a text."""
        return _to_ids(self._pieces.encode(text, add_special_tokens=False).ids, self._first_odd_rank, self._ids)

    encode_piece = encode  # its regular expression has no limit on a piece's length


def _to_ids(ranks: List[int], first_odd: Optional[int], ids: Sequence[int]) -> List[int]:
    return ranks if first_odd is None or max(ranks, default=-1) < first_odd else [ids[rank] for rank in ranks]


def _encoding(name: str, pattern: str, ranks: Dict[bytes, int]) -> Any:
    import tiktoken

    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def _long_blank_run(text: str, start: int = 0) -> Optional[Tuple[int, int]]:
    """The first run of at least LONGEST_BLANK_RUN blanks at or after `start`, as (begin, end); None without one.

    Such a run covers a multiple of half its length, so probing those places finds it without reading the text.
    """
    step = LONGEST_BLANK_RUN // 2
    probe = start + step
    while probe < len(text):
        run = _BLANKS.match(text, probe)
        if run is None:
            probe += step
            continue
        begin = probe
        while begin > start and _BLANKS.match(text[begin - 1]):
            begin -= 1
        if run.end() - begin >= LONGEST_BLANK_RUN:
            return begin, run.end()
        probe = run.end() + step
    return None


def _is_symbol(character: str) -> bool:
    """Whether PIECES treats it as a symbol: neither blank, letter nor number."""
    return unicodedata.category(character)[0] not in "LN" and not _BLANKS.match(character)


def _read_text(path: str, what: str) -> str:
    try:
        return read_small(path, _MOST_BYTES, what).decode()
    except FileNotFoundError:
        raise UserError(f"there is no such file ({what})", path,
                        "vocab.json and merges.txt come with the Hugging Face checkpoint.") from None
    except IsADirectoryError:
        raise UserError(f"is a folder, {what} is wanted", path, f"Name the file, e.g. {os.path.join(path, what)}."
                        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"is not UTF-8 text (byte {error.start}), so it is not {what}", path,
                        "It is damaged or another kind of file: fetch it again.") from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", path) from None


def _looks_like_merges(text: str) -> bool:
    head = [line for line in text[:4000].split("\n")[:-1] if line and not line.startswith("#version")]
    return bool(head) and all(len(line.split(" ")) == 2 for line in head)


def _read_vocab(vocab_file: str, merges_file: str, added: Mapping[str, Optional[int]]) -> Dict[str, int]:
    whole = tokenizer_json.is_one(vocab_file)
    vocab = tokenizer_json.read(vocab_file).vocab if whole else _parse_vocab(vocab_file, merges_file)
    if not isinstance(vocab, dict) or not set(map(type, vocab.values())) <= {int}:
        fix = "vocab.json of the same checkpoint is wanted."
        if isinstance(vocab, dict) and isinstance(vocab.get("model"), dict):
            fix = "This looks like tokenizer.json, which is known by that name: " + fix
        raise UserError("is JSON but not a vocabulary (token to id)", vocab_file, fix)
    indices = set(vocab.values())
    if len(indices) < len(vocab) or not indices or min(indices) < 0:
        raise UserError(f"{len(vocab)} tokens share {len(indices)} ids, or an id is negative" if indices
                        else "has no tokens", vocab_file, "The file was changed: fetch it again.")
    holes = max(indices) + 1 - len(indices)
    if holes > len(added) or holes and set(range(max(indices))) - indices - set(added.values()):
        raise UserError(f"has {len(vocab)} tokens but ids up to {max(indices)}: {holes} are missing", vocab_file,
                        "The file is truncated or was changed: fetch it again.")
    return vocab


def _parse_vocab(vocab_file: str, merges_file: str) -> Any:
    text = _read_text(vocab_file, "vocab.json")
    if not text.strip():
        raise UserError("is empty", vocab_file, "Fetch vocab.json again.")
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError("is nested too deeply for a vocabulary", vocab_file, "Fetch vocab.json again.") from None
    except ValueError as error:
        if _looks_like_merges(text):
            raise UserError(f"is a merges file, vocab.json is wanted (and {merges_file} was given as the merges)",
                            vocab_file, "Are the vocab and merges files swapped?") from None
        at_end = isinstance(error, json.JSONDecodeError) and text.lstrip()[0] == "{" and not text.rstrip().endswith("}")
        raise UserError(f"ends in the middle of the vocabulary ({len(text.encode())} bytes)" if at_end
                        else f"is not JSON: {error}", vocab_file,
                        "The file is truncated: fetch vocab.json again." if at_end
                        else "It is damaged or another kind of file: fetch vocab.json again.") from None


def _read_merges(merges_file: str, vocab: Dict[str, int], vocab_file: str) -> Tuple[List[int], List[int], List[int]]:
    """Per merge, most wanted first, the ids of its left part, of its right part, and of both joined."""
    if tokenizer_json.is_one(merges_file):
        pairs = tokenizer_json.read(merges_file).merges
        left, right = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    else:
        parts = _parse_merges(merges_file, vocab_file)
        left, right = parts[::2], parts[1::2]
    if not left:
        raise UserError("has no merges", merges_file, "Fetch it again.")
    index_of = vocab.__getitem__
    try:
        return list(map(index_of, left)), list(map(index_of, right)), list(map(index_of, map(str.__add__, left, right)))
    except KeyError:
        foreign = [(a, b) for a, b in zip(left, right) if not {a, b, a + b} <= vocab.keys()]
    a, b = foreign[0]
    where = merges_file
    if not tokenizer_json.is_one(merges_file):
        lines, words = _read_text(merges_file, "merges.txt").split("\n"), f"{a} {b}".split()
        where = f"{merges_file}:{next(number for number, line in enumerate(lines, 1) if line.split() == words)}"
    token = next(token for token in (a, b, a + b) if token not in vocab)
    raise UserError(f"merge {a!r} + {b!r} needs the token {token!r}, which {vocab_file} ({len(vocab)} tokens) does not "
                    f"have; the same goes for {len(foreign)} of {len(left)} merges", where,
                    "The two files belong to different models or one is cut: take both from the same checkpoint.")


def _parse_merges(merges_file: str, vocab_file: str) -> List[str]:
    """Left and right parts in turn."""
    text = _read_text(merges_file, "merges.txt")
    if text.lstrip()[:1] == "{":
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            pass
        else:
            raise UserError(f"is JSON, merges.txt is wanted (and {vocab_file} was given as the vocabulary)",
                            merges_file, "Are the vocab and merges files swapped?")
    # Only the first line can be a comment: in Qwen's merges 96 real ones begin with '#'.
    body = (text.partition("\n")[2] if text.startswith("#version") else text).rstrip("\n")
    return body.replace("\n", " ").split(" ") if _is_two_a_line(body) else _parts_line_by_line(text, merges_file)


def _is_two_a_line(text: str) -> bool:
    """Whether every line is two words with one blank between: then the words can be taken without looking at lines."""
    import numpy as np

    data = np.frombuffer(text.encode() + b"\n", np.uint8)
    marks = np.flatnonzero(data <= 0x20)
    kinds = data[marks]
    return (len(marks) % 2 == 0 and marks[0] > 0 and bool((np.diff(marks) > 1).all())
            and bool((kinds[::2] == 0x20).all()) and bool((kinds[1::2] == 0x0a).all()))


def _parts_line_by_line(text: str, merges_file: str) -> List[str]:
    parts: List[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        pair = [] if number == 1 and line.startswith("#version") else line.split()
        if len(pair) not in (0, 2):
            raise UserError(f"a merge is two tokens, this line has {len(pair)}: {line[:60]!r}",
                            f"{merges_file}:{number}", "The file is damaged, truncated or no merges.txt.")
        parts += pair
    return parts


def _byte_values(tokens: Sequence[str]) -> Tuple[Any, Any]:
    """The bytes behind all tokens in a row, -1 where a character is outside the byte alphabet, and where tokens end.

    All tokens are translated in one go: one at a time takes ten times as long.

    Returns:
        int16 of the bytes of all tokens, and int64 (V,) of the end of each.
    """
    import numpy as np

    alphabet = byte_alphabet()
    table = np.full(1 + max(map(ord, alphabet)), -1, np.int16)
    for byte, symbol in enumerate(alphabet):
        table[ord(symbol)] = byte
    points = np.frombuffer("".join(tokens).encode("utf-32-le", "surrogatepass"), np.uint32)
    values = table[np.minimum(points, len(table) - 1)]
    values[points >= len(table)] = -1
    return values, np.cumsum(np.fromiter(map(len, tokens), np.int64, len(tokens)))


def _outside_alphabet(values: Any, ends: Any) -> List[int]:
    """Ids of tokens with a character outside the byte alphabet."""
    import numpy as np

    return sorted(set(np.searchsorted(ends, np.flatnonzero(values < 0), side="right").tolist()))


def merges_are_canonical(left: np.ndarray, right: np.ndarray, joined: np.ndarray, size: int) -> bool:
    """Whether merging by rank alone ends, for every token, in the pair that the merges file names.

    Args:
        left, right, joined: ids of the two parts and of the whole, one entry per merge, most wanted first; (M,) int64.
        size: number of ids in the vocabulary.

    A token t = a + b goes wrong only if, on the way from bytes to a and b, the part that ends a and the part that
    begins b could themselves be merged before t is due. Those parts are known from the merges: going back in time, the
    younger of the two falls apart into its own parts, and the half next to the seam takes its place. So all seams are
    walked back together, one undone merge a step, looking for a merge across the seam that would have come first.
    Two merges of equal rank are the same pair in a row (`xxx`); the left one comes first, which decides the ties.
    """
    import numpy as np

    if not len(joined):
        return True
    order = np.arange(len(joined))
    rank = np.full(size, -1, np.int64)
    rank[joined] = order
    if not np.array_equal(rank[joined], order):  # two merges make the same token
        return False
    if (rank[left] >= order).any() or (rank[right] >= order).any():  # a part is made after the whole
        return False
    first, last = np.zeros(size, np.int64), np.zeros(size, np.int64)
    first[joined], last[joined] = left, right
    keys = left * size + right
    by_key = np.argsort(keys)
    keys = keys[by_key]

    end, begin = left, right
    while True:
        end_rank, begin_rank = rank[end], rank[begin]
        undo = np.maximum(end_rank, begin_rank) >= 0
        if not undo.any():
            return True
        end, begin, end_rank, begin_rank = end[undo], begin[undo], end_rank[undo], begin_rank[undo]
        begin_is_younger = begin_rank >= end_rank
        # A merge across the seam in the same instant as the undone one wins only if it lies to its left.
        due = np.where(begin_is_younger, begin_rank, end_rank - 1)
        end = np.where(begin_is_younger, end, last[end])
        begin = np.where(begin_is_younger, first[begin], begin)
        key = end * size + begin
        place = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
        if ((keys[place] == key) & (by_key[place] <= due)).any():
            return False
