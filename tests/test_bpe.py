"""The condition under which tiktoken stands in for a merges file, and the vocabularies that do not meet it."""

import json
import random

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from qwen15.errors import UserError
from qwen15.text.bpe import BytePairEncoder, byte_alphabet, merges_are_canonical
from qwen15.text.tokenizer import Qwen2Tokenizer

ALPHABET = byte_alphabet()
SIZE = 256


def learned(text, count):
    """Merges as training finds them: the most frequent pair of the text, again and again."""
    merges, parts = [], list(text)
    while len(merges) < count and len(parts) > 1:
        pairs = list(zip(parts, parts[1:]))
        pair = max(sorted(set(pairs)), key=pairs.count)
        if pair in merges:
            break
        merges.append(pair)
        parts = applied(parts, pair)
    return merges


def applied(parts, pair):
    result, place = [], 0
    while place < len(parts):
        if tuple(parts[place:place + 2]) == pair:
            result.append("".join(pair))
            place += 2
        else:
            result.append(parts[place])
            place += 1
    return result


def by_merges(text, merges):
    """BPE as it is defined: among the pairs present, the one that comes first in the merges; all its places, left to
    right."""
    parts = list(text)
    rank = {pair: place for place, pair in enumerate(merges)}
    while True:
        present = [pair for pair in zip(parts, parts[1:]) if pair in rank]
        if not present:
            return parts
        parts = applied(parts, min(present, key=rank.get))


def by_ranks(text, vocab):
    """What tiktoken does: join neighbours that are a token together, the lowest id first, the leftmost of equals."""
    parts = list(text)
    while True:
        joined = [(vocab[a + b], place) for place, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in vocab]
        if not joined:
            return parts
        place = min(joined)[1]
        parts[place:place + 2] = [parts[place] + parts[place + 1]]


def vocabulary(merges):
    vocab = {symbol: index for index, symbol in enumerate(ALPHABET)}
    for a, b in merges:
        vocab.setdefault(a + b, len(vocab))
    return vocab


def canonical(merges):
    vocab = vocabulary(merges)
    left, right, joined = np.array([(vocab[a], vocab[b], vocab[a + b]) for a, b in merges], np.int64).reshape(-1, 3).T
    return merges_are_canonical(left, right, joined, len(vocab))


MERGES = st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), min_size=1, max_size=9)


def chosen(picks):
    """Merges of any two tokens that exist so far: most such lists are not what training would give."""
    tokens, merges = ["a", "b", "c"], []
    for left, right in picks:
        pair = tokens[left % len(tokens)], tokens[right % len(tokens)]
        if pair not in merges and len("".join(pair)) < 12:
            merges.append(pair)
            if "".join(pair) not in tokens:
                tokens.append("".join(pair))
    return merges


@settings(max_examples=500, deadline=None)
@given(picks=MERGES, text=st.text(alphabet="abc", max_size=40))
def test_canonical_merges_are_what_ranks_give(picks, text):
    merges = chosen(picks)
    vocab = vocabulary(merges)
    alone = all(by_ranks(token, {known: index for known, index in vocab.items() if index < vocab[token]}) == list(pair)
                for pair in merges for token in ["".join(pair)])
    assert canonical(merges) == (alone and len(vocab) == SIZE + len(merges))
    if canonical(merges):
        assert by_merges(text, merges) == by_ranks(text, vocab)


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet="abc", min_size=20, max_size=120))
def test_learned_merges_are_canonical(text):
    merges = learned(text, 30)
    if len({a + b for a, b in merges}) == len(merges):
        assert canonical(merges)


@pytest.mark.parametrize("merges", [
    [("a", "b"), ("b", "c"), ("a", "bc")],          # 'abc' alone becomes ab + c
    [("a", "a"), ("a", "aa")],                      # 'aaa' alone becomes aa + a
    [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")],  # two merges, one token
])
def test_merges_that_ranks_do_not_give_are_noticed(merges):
    assert not canonical(merges)


def encoder(tmp_path, merges, vocab=None, **options):
    vocab = vocab or vocabulary(merges)
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)), encoding="utf-8")
    options.setdefault("added", {})
    return BytePairEncoder(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), **options), vocab


@settings(max_examples=60, deadline=None)
@given(picks=MERGES, seed=st.integers(0, 10**6), shuffled=st.booleans(), missing=st.booleans())
def test_every_vocabulary_gives_the_ids_of_its_merges_file(tmp_path_factory, picks, seed, shuffled, missing):
    """Whatever the order of the ids, whatever the merges, with all bytes or without some: ids as the merges file has
    them."""
    merges, chance = chosen(picks), random.Random(seed)
    vocab = vocabulary(merges)
    if missing:
        del vocab[ALPHABET[ord("d")]]
        vocab = {token: index for index, token in enumerate(vocab)}
    if shuffled:
        order = list(range(len(vocab)))
        chance.shuffle(order)
        vocab = {token: order[index] for token, index in vocab.items()}
    made, _ = encoder(tmp_path_factory.mktemp("bpe"), merges, vocab, unknown="c" if missing else None)
    assert made.engine == ("tiktoken" if canonical(merges) else "tokenizers")
    text = "".join(chance.choice("abcabcd") for _ in range(300))
    expected = [vocab.get(part, vocab["c"]) for part in by_merges(text, merges)]
    assert made.encode(text) == expected
    made._whole, made._lookups_left = None, 10 ** 9
    assert made.encode(text) == expected and made._whole is None  # by an engine of what occurs in the text


def test_the_slower_engine_serves_the_whole_interface(tmp_path):
    transformers = pytest.importorskip("transformers")
    merges = [("a", "b"), ("b", "c"), ("a", "bc"), ("Ġ", "Ġ"), ("Ġ", "a")]
    _, vocab = encoder(tmp_path, merges)
    files = str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")
    ours = Qwen2Tokenizer(*files)
    theirs = transformers.Qwen2Tokenizer(*files, additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    text = "abc  abcbc <|im_end|> aabbcc\n 中文 e\u0301" + " " * 70_000 + "a"
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(text)) == "abc  abcbc <|im_end|> aabbcc\n 中文 é" + " " * 70_000 + "a"


def test_real_vocabularies_use_tiktoken(qwen_vocabulary, small_model):
    for folder in (qwen_vocabulary, small_model):
        assert Qwen2Tokenizer.from_pretrained(folder)._bpe.engine == "tiktoken"


@pytest.fixture(scope="module")
def two_encoders(qwen_vocabulary):
    """One that never makes the whole engine, one that always does."""
    files = str(qwen_vocabulary / "vocab.json"), str(qwen_vocabulary / "merges.txt")
    in_parts, whole = BytePairEncoder(*files, {}), BytePairEncoder(*files, {})
    in_parts._lookups_left, whole._lookups_left = 10 ** 12, 0
    yield in_parts, whole
    assert in_parts._whole is None and whole._whole is not None


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=60) | st.text("etaoin shr\n'\t12,.(", max_size=300))
@example("")
@example(" " * 300 + "x")
@example("帮助我制定一份去上海的旅游攻略，包括景点、美食、住宿等信息" * 5)
def test_an_engine_of_what_occurs_in_a_text_gives_the_ids_of_the_whole_one(two_encoders, text):
    in_parts, whole = two_encoders
    assert in_parts.encode(text) == whole.encode(text)


def test_the_whole_engine_is_made_once_the_small_ones_have_cost_as_much(qwen_vocabulary):
    made = BytePairEncoder(str(qwen_vocabulary / "vocab.json"), str(qwen_vocabulary / "merges.txt"), {})
    ids = made.encode("Hello")
    assert made._whole is None
    assert [made.encode("Hello") for _ in range(200)] == [ids] * 200
    assert made._whole is not None
    assert made.encode("Hello") == ids


@pytest.mark.parametrize("damage", [("a b\n", "a b \n"), ("a b\n", "a\tb\n"), ("a b\n", "a b\n\n"),
                                    ("a b\n", "a b\r\n"), ("a b\n", " a b\n")])
def test_blanks_around_a_merge_do_not_matter(tmp_path, damage):
    merges = [("a", "b"), ("ab", "c"), ("Ġ", "ab")]
    made, vocab = encoder(tmp_path, merges)
    file = tmp_path / "merges.txt"
    file.write_bytes(file.read_text(encoding="utf-8").replace(*damage).encode())
    again = BytePairEncoder(made.vocab_file, made.merges_file, {})
    assert again.encode("abc ab") == made.encode("abc ab") == [vocab["abc"], vocab["Ġab"]]


@pytest.mark.parametrize("line", ["a b c", "ab", "a\u3000b c"])
def test_a_line_that_is_no_pair_is_named(tmp_path, line):
    made, _ = encoder(tmp_path, [("a", "b"), ("b", "c"), ("c", "a")])
    file = tmp_path / "merges.txt"
    file.write_text(file.read_text(encoding="utf-8").replace("b c", line), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        BytePairEncoder(made.vocab_file, made.merges_file, {})
    assert caught.value.where == f"{file}:3"
