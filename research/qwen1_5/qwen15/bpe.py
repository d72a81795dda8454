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

import json
import os
import re
import unicodedata
from typing import Collection, Dict, List, Mapping, Optional, Sequence, Tuple

from .errors import UserError

# Qwen2's way of cutting text into pieces: contractions, words with one leading mark, single digits, runs of symbols,
# line ends, other white space (the last blank stays with the next word).
PIECES = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")

# Unicode White_Space, which is \s for the regular expression above (Python's own \s has four more: \x1c to \x1f).
_BLANK = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_BLANKS = re.compile(f"[{_BLANK}]+")

# tiktoken's regular expression engine keeps one stack entry per blank it may give back and stops at a million.
LONGEST_BLANK_RUN = 1 << 16

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


class BytePairEncoder:
    """Ordinary text to ids and ids to bytes, for one vocabulary. Safe to use from several threads.

    Args:
        vocab_file: vocab.json, token (in the byte alphabet) to id; the ids are 0 to V-1, each once. Ids left out must
            be among `added`.
        merges_file: merges.txt, `left right` a line after an optional `#version` line.
        added: tokens that are matched whole before any merging (control tokens), with their ids where these are known
            beforehand. Those that vocab.json has too need no merge, and may be written outside the byte alphabet.
        unknown: the token whose id stands for a byte that the vocabulary has no token for (some small vocabularies
            lack bytes that hardly occur). Without it such a vocabulary is refused.

    Attributes:
        vocab: vocab.json as read.
        token_bytes: per id the bytes it stands for (control tokens in UTF-8); V entries.
        engine: 'tiktoken' or 'tokenizers'.

    Raises:
        UserError: a file is missing, damaged, swapped with the other, or of another model.
    """

    def __init__(self, vocab_file: str, merges_file: str, added: Mapping[str, Optional[int]],
                 unknown: Optional[str] = None):
        self.vocab_file, self.merges_file = str(vocab_file), str(merges_file)
        self.vocab = _read_vocab(self.vocab_file, self.merges_file, added)
        merges = _read_merges(self.merges_file, self.vocab_file)
        tokens = [""] * (1 + max(self.vocab.values()))
        for token, index in self.vocab.items():
            tokens[index] = token
        self.token_bytes = _token_bytes(tokens, self.vocab_file, added)
        left, right, joined = _merge_ids(merges, self.vocab, self.vocab_file, self.merges_file)
        byte_ids = [self.vocab.get(symbol) for symbol in byte_alphabet()]
        self._check_reachable(tokens, joined, byte_ids, added, len(merges))
        self._unknown = self.vocab.get(unknown)
        if None in byte_ids and self._unknown is None:
            lacking = [f"{byte:#04x}" for byte, index in enumerate(byte_ids) if index is None]
            raise UserError(f"has no token for {len(lacking)} of the 256 bytes ({', '.join(lacking[:3])}, ...)",
                            self.vocab_file, "This is not the vocab.json of a Qwen model, or it was cut.")
        self._whole = None
        if merges_are_canonical(left, right, joined, len(tokens)):
            self.engine = "tiktoken"
            self._load_tiktoken(joined, byte_ids)
        else:
            self.engine = "tokenizers"
            self._load_tokenizers(merges)

    def _check_reachable(self, tokens: Sequence[str], joined: Sequence[int], byte_ids: Sequence[Optional[int]],
                         added: Collection[str], n_merges: int) -> None:
        """Every token must come from a merge, a byte or the control tokens, or the merges file is not the whole one."""
        reachable = bytearray(len(tokens))
        for index in joined:
            reachable[index] = 1
        for index in byte_ids:
            if index is not None:
                reachable[index] = 1
        lost = [index for index in range(len(tokens)) if not reachable[index] and tokens[index]
                and tokens[index] not in added and not _LOOKS_LIKE_CONTROL.match(tokens[index])]
        if lost:
            raise UserError(
                f"its {n_merges} merges cannot make {len(lost)} of the {len(tokens)} tokens of {self.vocab_file} "
                f"(the first is {tokens[lost[0]]!r}, id {lost[0]})", self.merges_file,
                "The file is truncated or belongs to another model: take both files from the same checkpoint.")

    def _load_tiktoken(self, joined: Sequence[int], byte_ids: Sequence[Optional[int]]) -> None:
        size = len(self.token_bytes)
        in_order = all(map(int.__lt__, joined, joined[1:]))
        # tiktoken's token is its rank. Where ids follow the merges' order (every Qwen vocabulary) ranks are the ids;
        # elsewhere ranks count bytes, then merges, and `_ids` turns them into ids. A byte without a token gets a rank
        # beyond the others, which `_ids` turns into the unknown token.
        ranks: Dict[bytes, int] = {}
        if in_order:
            for byte, index in enumerate(byte_ids):
                ranks[bytes((byte,))] = size + byte if index is None else index
            for index in joined:
                ranks[self.token_bytes[index]] = index
            self._first_odd_rank: Optional[int] = size if None in byte_ids else None
            self._ids: List[int] = [*range(size), *[self._unknown] * 256] if None in byte_ids else []
        else:
            self._ids = [self._unknown if index is None else index for index in byte_ids] + list(joined)
            for byte in range(256):
                ranks[bytes((byte,))] = byte
            for rank, index in enumerate(joined, 256):
                ranks[self.token_bytes[index]] = rank
            self._first_odd_rank = 0
        self._ranks = ranks
        self._pieces = _encoding("pieces", PIECES, ranks)
        self._encode = self._encode_tiktoken

    def _load_tokenizers(self, merges: Sequence[Tuple[str, str]]) -> None:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers

        # A byte without a token must not vanish: it gets one beyond the vocabulary, which `_ids` makes unknown.
        vocab, size = dict(self.vocab), len(self.token_bytes)
        for byte, symbol in enumerate(byte_alphabet()):
            vocab.setdefault(symbol, size + byte)
        tokenizer = Tokenizer(models.BPE(vocab, list(merges)))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        self._ids = [*range(size), *[self._unknown] * 256]
        self._first_odd_rank = size if len(vocab) > len(self.vocab) else None
        self._pieces = tokenizer
        self._encode = self._encode_tokenizers

    def encode(self, text: str) -> List[int]:
        """Ids of `text` with nothing in it special. Lone surrogates must have been replaced before."""
        run = _long_blank_run(text)
        if run is None:
            return self._encode(text)
        ids: List[int] = []
        start = 0
        while run is not None:
            # The run is cut by hand just as the regular expression would: line ends straight after a symbol belong
            # to the symbol's piece, then all up to the last line end, then all but the last blank before a word.
            begin, end = run
            if begin > start and _is_symbol(text[begin - 1]):
                while begin < end and text[begin] in "\r\n":
                    begin += 1
            ids += self._encode(text[start:begin])
            line_end = 1 + max(text.rfind("\n", begin, end), text.rfind("\r", begin, end), begin - 1)
            tail = end if end == len(text) else max(line_end, end - 1)
            for piece in (text[begin:line_end], text[line_end:tail]):
                if piece:
                    ids += self._encode_whole(piece)
            start = tail
            run = _long_blank_run(text, end)
        return ids + self._encode(text[start:])

    def _encode_tiktoken(self, text: str) -> List[int]:
        return self._to_ids(self._pieces.encode_ordinary(text))

    def _encode_tokenizers(self, text: str) -> List[int]:
        return self._to_ids(self._pieces.encode(text, add_special_tokens=False).ids)

    def _encode_whole(self, piece: str) -> List[int]:
        """Ids of one piece that the regular expression cannot cut out because it is too long for it."""
        if self.engine == "tokenizers":
            return self._encode_tokenizers(piece)
        if self._whole is None:
            self._whole = _encoding("whole", r"(?s:.+)", self._ranks)
        return self._to_ids(self._whole.encode_ordinary(piece))

    def _to_ids(self, ranks: List[int]) -> List[int]:
        if self._first_odd_rank is None or max(ranks, default=-1) < self._first_odd_rank:
            return ranks
        return [self._ids[rank] for rank in ranks]


def _encoding(name: str, pattern: str, ranks: Dict[bytes, int]):
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
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        raise UserError(f"there is no such file ({what})", path,
                        "vocab.json and merges.txt come with the Hugging Face checkpoint.") from None
    except IsADirectoryError:
        raise UserError(f"is a folder, {what} is wanted", path, f"Name the file, e.g. {os.path.join(path, what)}."
                        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"is not UTF-8 text (byte {error.start}), so it is no {what}", path,
                        "It is damaged or another kind of file: fetch it again.") from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", path) from None


def _looks_like_merges(text: str) -> bool:
    head = [line for line in text[:4000].split("\n")[:-1] if line and not line.startswith("#version")]
    return bool(head) and all(len(line.split(" ")) == 2 for line in head)


def _read_vocab(vocab_file: str, merges_file: str, added: Mapping[str, Optional[int]]) -> Dict[str, int]:
    text = _read_text(vocab_file, "vocab.json")
    if not text.strip():
        raise UserError("is empty", vocab_file, "Fetch vocab.json again.")
    try:
        vocab = json.loads(text)
    except ValueError as error:
        if _looks_like_merges(text):
            raise UserError(f"is a merges file, vocab.json is wanted (and {merges_file} was given as the merges)",
                            vocab_file, "Are the vocab and merges files swapped?") from None
        at_end = isinstance(error, json.JSONDecodeError) and text.lstrip()[0] == "{" and not text.rstrip().endswith("}")
        raise UserError(f"ends in the middle of the vocabulary ({len(text.encode())} bytes)" if at_end
                        else f"is not JSON: {error}", vocab_file,
                        "The file is truncated: fetch vocab.json again." if at_end
                        else "It is damaged or another kind of file: fetch vocab.json again.") from None
    if not isinstance(vocab, dict) or not all(type(index) is int for index in vocab.values()):
        fix = "vocab.json of the same checkpoint is wanted."
        if isinstance(vocab, dict) and isinstance(vocab.get("model"), dict):
            fix = "This looks like tokenizer.json: " + fix
        raise UserError("is JSON but not a vocabulary (token to id)", vocab_file, fix)
    indices = set(vocab.values())
    if len(indices) < len(vocab) or not indices or min(indices) < 0:
        raise UserError(f"{len(vocab)} tokens share {len(indices)} ids, or an id is negative" if indices
                        else "has no tokens", vocab_file, "The file was changed: fetch vocab.json again.")
    holes = max(indices) + 1 - len(indices)
    if holes and set(range(max(indices))) - indices - set(added.values()):
        raise UserError(f"has {len(vocab)} tokens but ids up to {max(indices)}: {holes} are missing", vocab_file,
                        "The file is truncated or was changed: fetch vocab.json again.")
    return vocab


def _read_merges(merges_file: str, vocab_file: str) -> List[Tuple[str, str]]:
    text = _read_text(merges_file, "merges.txt")
    if text.lstrip()[:1] == "{":
        try:
            json.loads(text)
        except ValueError:
            pass
        else:
            raise UserError(f"is JSON, merges.txt is wanted (and {vocab_file} was given as the vocabulary)",
                            merges_file, "Are the vocab and merges files swapped?")
    lines = text.split("\n")
    # Only the first line can be a comment: in Qwen's merges 96 real ones begin with '#'.
    first = 1 if lines[0].startswith("#version") else 0
    merges = []
    for number, line in enumerate(lines[first:], first + 1):
        pair = tuple(line.split())
        if len(pair) == 2:
            merges.append(pair)
        elif pair:
            raise UserError(f"a merge is two tokens, this line has {len(pair)}: {line[:60]!r}",
                            f"{merges_file}:{number}", "The file is damaged, truncated or no merges.txt.")
    if not merges:
        raise UserError("has no merges", merges_file, "Fetch merges.txt again.")
    return merges


def _merge_ids(merges: Sequence[Tuple[str, str]], vocab: Dict[str, int], vocab_file: str,
               merges_file: str) -> Tuple[List[int], List[int], List[int]]:
    try:
        return ([vocab[a] for a, _ in merges], [vocab[b] for _, b in merges], [vocab[a + b] for a, b in merges])
    except KeyError:
        foreign = [(a, b) for a, b in merges if a not in vocab or b not in vocab or a + b not in vocab]
        a, b = foreign[0]
        with open(merges_file, encoding="utf-8") as file:
            line = next(number for number, text in enumerate(file, 1) if tuple(text.split()) == (a, b))
        token = next(token for token in (a, b, a + b) if token not in vocab)
        raise UserError(f"merge {a!r} + {b!r} needs the token {token!r}, which {vocab_file} ({len(vocab)} tokens) does "
                        f"not have; the same goes for {len(foreign)} of {len(merges)} merges", f"{merges_file}:{line}",
                        "The two files belong to different models or one is cut: take both from the same checkpoint."
                        ) from None


def _token_bytes(tokens: Sequence[str], vocab_file: str, added: Collection[str]) -> List[bytes]:
    """The bytes behind every token. All tokens are translated in one go: one at a time takes ten times as long."""
    import numpy as np

    alphabet = byte_alphabet()
    table = np.full(1 + max(map(ord, alphabet)), -1, np.int16)
    for byte, symbol in enumerate(alphabet):
        table[ord(symbol)] = byte
    points = np.frombuffer("".join(tokens).encode("utf-32-le", "surrogatepass"), np.uint32)
    values = table[np.minimum(points, len(table) - 1)]
    values[points >= len(table)] = -1
    raw = values.astype(np.uint8).tobytes()
    ends = np.cumsum(np.fromiter(map(len, tokens), np.int64, len(tokens)))
    stops = ends.tolist()
    result = [raw[start:stop] for start, stop in zip([0] + stops, stops)]
    for index in sorted(set(np.searchsorted(ends, np.flatnonzero(values < 0), side="right").tolist())):
        if tokens[index] not in added:
            raise UserError(f"token {tokens[index]!r} (id {index}) is not written in the byte alphabet of byte-level "
                            "BPE", vocab_file, "This vocabulary is of another kind of tokenizer.")
        result[index] = tokens[index].encode()
    return result


def merges_are_canonical(left: Sequence[int], right: Sequence[int], joined: Sequence[int], size: int) -> bool:
    """Whether merging by rank alone ends, for every token, in the pair that the merges file names.

    Args:
        left, right, joined: ids of the two parts and of the whole, one entry per merge, most wanted first; (M,).
        size: number of ids in the vocabulary.

    A token t = a + b goes wrong only if, on the way from bytes to a and b, the part that ends a and the part that
    begins b could themselves be merged before t is due. Those parts are known from the merges: going back in time, the
    younger of the two falls apart into its own parts, and the half next to the seam takes its place. So all seams are
    walked back together, one undone merge a step, looking for a merge across the seam that would have come first.
    Two merges of equal rank are the same pair in a row (`xxx`); the left one comes first, which decides the ties.
    """
    import numpy as np

    left, right, joined = (np.asarray(ids, np.int64) for ids in (left, right, joined))
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
