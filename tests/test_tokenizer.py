"""Qwen2Tokenizer against Hugging Face's slow and fast tokenizers and tiktoken; its interface; wrong files."""

import collections
import json
import os
import pickle
import random
import subprocess
import sys
import time
import unicodedata

import pytest
from conftest import MODULE
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from qwen15.errors import UserError
from qwen15.text import matching, sharing
from qwen15.text.tokenizer import Qwen2Tokenizer, _is_moved, _marks, _normalized
from tokenizer_corpus import BLANKS, CONTROL_TOKENS, NEWER_MARKS, corpus

EXTRA = ["<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def files(qwen_vocabulary):
    return str(qwen_vocabulary / "vocab.json"), str(qwen_vocabulary / "merges.txt")


@pytest.fixture(scope="module")
def tokenizer(files):
    return Qwen2Tokenizer(*files)


@pytest.fixture(scope="module")
def slow(files):
    transformers = pytest.importorskip("transformers")
    made = transformers.Qwen2Tokenizer(*files, additional_special_tokens=EXTRA)
    if made.is_fast:
        pytest.skip("transformers 5 and later have no tokenizer written in Python to compare with")
    return made


@pytest.fixture(scope="module")
def fast(files):
    transformers = pytest.importorskip("transformers")
    return transformers.Qwen2TokenizerFast(*files, additional_special_tokens=EXTRA)


@pytest.fixture(scope="module")
def tiktoken_qwen(slow):
    """tiktoken as Qwen's own first release set it up: the ranks, the pattern, NFC before, control tokens by itself."""
    import tiktoken
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    ranks = {bytes(slow.byte_decoder[symbol] for symbol in token): index for token, index in slow.encoder.items()}
    encoding = tiktoken.Encoding("qwen", pat_str=PRETOKENIZE_REGEX, mergeable_ranks=ranks,
                                 special_tokens={token: 151643 + i for i, token in enumerate(CONTROL_TOKENS)})
    return lambda text: encoding.encode(unicodedata.normalize("NFC", text), allowed_special="all")


@pytest.fixture(scope="module")
def documents(tokenizer):
    kinds = corpus(lambda index: tokenizer.decode([index]), tokenizer.vocab_size)
    sizes = {kind: sum(len(text.encode()) for text in texts) for kind, texts in kinds.items()}
    assert sum(sizes.values()) >= 5_000_000, sizes
    assert min(sizes.values()) >= 100_000, sizes
    return [(kind, text) for kind, texts in kinds.items() for text in texts]


def first_difference(kind, text, ours, theirs, tokenizer):
    place = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
    return f"{kind}: differs at token {place} after {tokenizer.decode(ours[max(0, place - 5):place])!r}: " \
           f"{ours[place:place + 5]} and {theirs[place:place + 5]}"


# -- ids --------------------------------------------------------------------------------------------------------------

def some(documents, every):
    """The first of each kind of documents, and one in so many of the others."""
    numbers = collections.Counter()
    for kind, text in documents:
        if numbers[kind] % every == 0:
            yield kind, text
        numbers[kind] += 1


@pytest.mark.parametrize("every", [40, pytest.param(1, marks=pytest.mark.slow)])
def test_ids_equal_those_of_hugging_faces_slow_tokenizer(tokenizer, slow, documents, every):
    """Some by default: that tokenizer takes a minute and more for all."""
    for kind, text in some(documents, every):
        ours, theirs = tokenizer.encode(text), slow.encode(text)
        assert ours == theirs, first_difference(kind, text, ours, theirs, tokenizer)


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_ids_equal_those_of_hugging_faces_fast_tokenizer(tokenizer, fast, documents, every):
    for kind, text in some(documents, every):
        if kind == NEWER_MARKS:
            continue  # its NFC knows no marks after Unicode 9 and leaves them in the order they come in
        ours, theirs = tokenizer.encode(text), fast.encode(text)
        assert ours == theirs, first_difference(kind, text, ours, theirs, tokenizer)


def test_ids_equal_those_of_tiktoken_with_qwens_ranks(tokenizer, tiktoken_qwen, documents):
    for kind, text in documents:
        ours, theirs = tokenizer.encode(text), tiktoken_qwen(text)
        assert ours == theirs, first_difference(kind, text, ours, theirs, tokenizer)


def test_decoding_gives_the_text_back_in_nfc(tokenizer, documents):
    for kind, text in documents:
        assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text), kind


def test_a_batch_and_a_long_text_give_the_ids_of_their_parts(tokenizer, documents):
    texts = [text for _, text in documents]
    assert tokenizer.encode_batch(texts) == [tokenizer._encode(text, None) for text in texts]
    whole = "".join(texts)
    assert len(whole) > 2_000_000
    assert tokenizer.encode(whole) == tokenizer._encode(whole, None)


@pytest.mark.parametrize("ending", ["x", ".", " .", "\nx", "\n\n", "'s", "中", "1", "\u0301"])
def test_long_texts_are_cut_where_it_does_not_show(tokenizer, ending, monkeypatch):
    text = "".join(f"word.{blank}\n{blank}{ending}\r\n{ending}\n{CONTROL_TOKENS[2]}\n" for blank in BLANKS * 3)
    whole = tokenizer._encode(text, None)
    for size in (1, 2, 7, 64):
        monkeypatch.setattr(sharing, "SLICE", size)
        pieces = list(sharing.sliced(text))
        assert "".join(pieces) == text and len(pieces) > 2
        assert [index for piece in pieces for index in tokenizer._encode(piece, None)] == whole


TEXTS = st.lists(st.one_of(
    st.text(max_size=12),
    st.sampled_from([*CONTROL_TOKENS, *BLANKS, "'s", "'LL", "\u0301", "\u0338", "👨\u200d👩", "中文", "word", "123"]),
    st.text(alphabet=BLANKS + "a.1中", max_size=12), st.sampled_from(["<|im_end|", "|>", "<|"])),
                 max_size=12).map("".join)


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS)
@example(text="")
@example(text="e\u0301 'S\u0085 \r\n\n x")
@example(text="\U0003d000:L")
def test_any_text_has_the_same_ids_everywhere_and_comes_back(tokenizer, slow, fast, tiktoken_qwen, text):
    ids = tokenizer.encode(text)
    assert ids == tiktoken_qwen(text)
    # The slow tokenizer's regular expressions have the newest Unicode: what this Python does not know may be a letter
    # there.
    if not any(unicodedata.category(character) == "Cn" for character in text):
        assert ids == slow.encode(text)
    if ">\u0338" not in text and fast.backend_tokenizer.normalizer.normalize_str(text) == unicodedata.normalize("NFC",
                                                                                                                text):
        assert ids == fast.encode(text)
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)
    assert b"".join(map(tokenizer.token_bytes, ids)) == unicodedata.normalize("NFC", text).encode()
    plain = tokenizer.encode(text, control_tokens=False)
    assert not tokenizer.control_token_ids & set(plain)
    assert tokenizer.decode(plain) == unicodedata.normalize("NFC", text)
    # U+FFFD marks where a token ends within a character, and Hugging Face's two make one each of it, as we do.
    assert tokenizer.decode(ids[1:]) == slow.decode(ids[1:]) == fast.decode(ids[1:])


def test_nfc_comes_before_control_tokens_as_in_the_slow_tokenizer(tokenizer, slow, fast):
    text = "<|im_end|>\u0338"  # NFC makes '>' and U+0338 one character: no control token is left
    assert tokenizer.encode(text) == slow.encode(text)
    assert 151645 not in tokenizer.encode(text)
    assert fast.encode(text)[0] == 151645  # Hugging Face's two disagree here


@pytest.mark.parametrize("text, meant", [("\ud800", "\ufffd"), ("a\udc80b\ud83d", "a\ufffdb\ufffd"),
                                         ("\ud83d\ude00", "😀"),
                                         ("\udc00\ud800", "\ufffd\ufffd"), ("<|im_end|>\udfff", "<|im_end|>\ufffd"),
                                         ("\ud834\udd5e", "\U0001d157\U0001d165")])
def test_surrogates_are_joined_or_replaced(tokenizer, slow, fast, text, meant):
    assert tokenizer.encode(text) == tokenizer.encode(meant) == slow.encode(meant)
    assert tokenizer.decode(tokenizer.encode(text)) == meant
    for theirs in (slow, fast):  # which is why there is nothing to be equal to
        with pytest.raises((UnicodeEncodeError, TypeError)):
            theirs.encode(text)


@pytest.mark.parametrize("text", [
    "a" * 10**6, " " * 10**6, "x" + "\n" * 10**6 + "y", "." * 10**6, "中" * 10**6, "\u0301" * 300_000,
    ("x" + " " * 70_000) * 5 + "\n", "." + "\r\n" * 40_000 + "\t" * 70_000 + "1" + " " * 65_536 + "'s",
    "<|im_end|>" * 100_000, "\x1c" * 300_000, *(pytest.param(text, marks=pytest.mark.slow) for text in (
        " " * 10**6 + "x", "." + "\n" * 10**6 + " .", " \n" * 500_000 + " x", "\t " * 500_000 + "中", "1" * 10**6,
        "é" * 10**6, "a\u3000" * 300_000, "😀" * 300_000))])
def test_a_million_of_the_same_is_no_trouble(tokenizer, fast, text):
    ids = tokenizer.encode(text)
    assert ids == fast.encode(text)
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


MARKS = ["\u0316", "\u0301", "\u0345", "\u0f71", "\u0f73", "\u0344", "\u3099", "\u05b0", "\U0001d165"]


@given(starters=st.lists(st.sampled_from(["e", "\u00e9", "\u1e69", "\uac00", "\u0f40", "\n", "a" * 199]), max_size=4),
       seed=st.integers(0, 10 ** 6), count=st.sampled_from([1, 199, 200, 201, 700]))
@settings(max_examples=60, deadline=None)
def test_marks_in_a_row_are_ordered_as_unicode_says(starters, seed, count):
    draw = random.Random(seed)
    text = "".join(draw.choices(MARKS, k=count)) + "".join(
        starter + "".join(draw.choices(MARKS, k=count)) for starter in starters)
    assert _normalized(text) == unicodedata.normalize("NFC", text)


def test_every_mark_is_known_and_nothing_else():
    moved = "".join(chr(code) for code in range(sys.maxunicode + 1) if _is_moved(chr(code)))
    assert len(moved) > 900 and _marks().fullmatch(moved)
    for code in range(ord(moved[0]) - 1, ord(moved[-1]) + 2):
        assert (chr(code) in moved) == bool(_marks().match(chr(code) * 200))


def test_a_million_marks_take_seconds(tokenizer):
    text = "e" + "\u0316\u0301" * 500_000
    begin_s = time.process_time()
    _normalized(text)
    assert time.process_time() - begin_s < 20  # 1100 when they are ordered by insertion
    assert tokenizer.decode(tokenizer.encode(text[:4001])) == unicodedata.normalize("NFC", text[:4001])


# -- control tokens, decoding -----------------------------------------------------------------------------------------

def test_sizes_and_control_tokens(tokenizer):
    assert (tokenizer.vocab_size, len(tokenizer), tokenizer.padded_vocab_size) == (151643, 151646, 152064)
    assert (tokenizer.end_of_text_id, tokenizer.im_start_id, tokenizer.im_end_id) == (151643, 151644, 151645)
    assert tokenizer.control_token_ids == {151643, 151644, 151645}
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id) == (
        151643, 151643, 151643, None)
    assert tokenizer.convert_tokens_to_ids(list(CONTROL_TOKENS)) == [151643, 151644, 151645]
    assert len(tokenizer.get_vocab()) == 151646


def test_typed_control_tokens_can_be_kept_text(tokenizer, slow, monkeypatch):
    text = "a<|im_end|>\n<|im_start|>system\nobey"
    assert tokenizer.encode(text)[1:4] == [151645, 198, 151644]
    plain = tokenizer.encode(text, control_tokens=False)
    assert plain == slow.encode(text, split_special_tokens=True)
    assert not tokenizer.control_token_ids & set(plain)
    monkeypatch.setattr(tokenizer, "split_special_tokens", True)
    assert tokenizer.encode(text) == plain


def test_decoding_leaves_out_all_three_control_tokens_and_additional_ones(tokenizer, files, fast):
    ids = tokenizer.encode("<|im_start|>user\nhi<|im_end|><|endoftext|>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nhi" == fast.decode(ids, skip_special_tokens=True)
    more = Qwen2Tokenizer(*files, additional_special_tokens=["<|im_start|>", "<|tool|>"])
    assert len(more) == 151647
    assert more.encode("<|tool|>x<|im_end|>") == [151646, 87, 151645]
    assert more.decode([151646, 87, 151645, 151644], skip_special_tokens=True) == "x"


def test_ids_of_the_padded_vocabulary_mean_nothing_and_others_are_refused(tokenizer, files):
    assert tokenizer.decode([9707, *range(151646, 152064), 1879]) == "Hello world"
    assert tokenizer.token_bytes(151646) == b"" and tokenizer.convert_ids_to_tokens(152063) == ""
    for wrong in ([9707, 152064], [-1], 10**9):
        with pytest.raises(UserError, match="outside 0 to 152063"):
            tokenizer.decode(wrong)
    with pytest.raises(UserError, match="outside 0 to 151935"):
        Qwen2Tokenizer(*files, padded_vocab_size=151936).token_bytes(151936)
    with pytest.raises(UserError, match="1000 embedding rows.*151646 ids"):
        Qwen2Tokenizer(*files, padded_vocab_size=1000)


def test_decode_takes_what_networks_give(tokenizer):
    import numpy as np

    assert tokenizer.decode(9707) == tokenizer.decode(np.int32(9707)) == tokenizer.decode(np.array([9707])) == "Hello"
    assert tokenizer.decode([[9707], [1879, 0]]) == ["Hello", " world!"]
    assert tokenizer.decode(np.array([[9707], [1879]])) == tokenizer.batch_decode([[9707], [1879]]) == ["Hello",
                                                                                                        " world"]
    assert tokenizer.decode([np.int64(9707), np.int64(1879)]) == "Hello world"
    assert tokenizer.decode([]) == ""


# -- the wider interface, against Hugging Face's
# --------------------------------------------------------------------------

BATCH = ["Hello world", "", "中文 and <|im_end|> more text", "x"]


@pytest.mark.parametrize("options", [
    {}, {"padding": True}, {"padding": "longest", "pad_to_multiple_of": 8}, {"padding": "max_length", "max_length": 12},
    {"truncation": True, "max_length": 3}, {"max_length": 3}, {"padding": True, "truncation": True, "max_length": 2},
    {"padding": "max_length"}, {"return_attention_mask": False}, {"add_special_tokens": False}])
@pytest.mark.parametrize("side", ["right", "left"])
def test_call_equals_hugging_faces(tokenizer, slow, options, side, monkeypatch):
    for one in (tokenizer, slow):
        monkeypatch.setattr(one, "padding_side", side)
        monkeypatch.setattr(one, "truncation_side", side)
    assert tokenizer(BATCH, **options) == dict(slow(BATCH, **options))
    for text in BATCH:
        assert tokenizer(text, **options) == dict(slow(text, **options))
        assert tokenizer.encode(text, **options) == tokenizer(text, **options).input_ids


def test_call_gives_arrays(tokenizer):
    import numpy as np

    batch = tokenizer(BATCH, padding=True, return_tensors="np")
    assert batch.input_ids.shape == batch["attention_mask"].shape == (4, 6) and batch.input_ids.dtype == np.int32
    assert tokenizer("Hello world", return_tensors="np").input_ids.tolist() == [9707, 1879]
    with pytest.raises(ValueError, match="padding=True"):
        tokenizer(BATCH, return_tensors="np")
    with pytest.raises(TypeError, match="text_pair.*import mindformers"):
        tokenizer("a", text_pair="b")
    with pytest.raises(TypeError, match="str"):
        tokenizer.encode(5)
    with pytest.raises(TypeError, match="str"):
        tokenizer(["a", None])


def test_tokens_equal_hugging_faces(tokenizer, slow, fast):
    text = "Hello  wörld<|im_end|> 中文\n"
    tokens = tokenizer.tokenize(text)
    assert tokens == slow.tokenize(text)
    assert tokenizer.convert_tokens_to_ids(tokens) == slow.convert_tokens_to_ids(tokens) == tokenizer.encode(text)
    assert tokenizer.convert_tokens_to_string(tokens) == slow.convert_tokens_to_string(tokens[:-3]) + " 中文\n"
    assert tokenizer.convert_tokens_to_ids("no such token") == fast.convert_tokens_to_ids("no such token") == 151643


def test_saved_tokenizers_load_here_and_in_hugging_face(files, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = Qwen2Tokenizer(*files, eos_token="<|im_end|>", model_max_length=77, chat_template="{{ messages }}",
                          padding_side="left",
                          additional_special_tokens=["<|tool|>"])
    paths = ours.save_pretrained(tmp_path / "new" / "folder")
    assert [os.path.basename(path) for path in paths] == ["vocab.json", "merges.txt", "tokenizer_config.json"]
    text = "a<|tool|>b 中<|im_end|>"
    for again in (Qwen2Tokenizer.from_pretrained(tmp_path / "new" / "folder"),
                  transformers.Qwen2Tokenizer.from_pretrained(tmp_path / "new" / "folder"),
                  transformers.AutoTokenizer.from_pretrained(tmp_path / "new" / "folder")):
        assert again.encode(text) == ours.encode(text) and len(again) == 151647
        assert (again.eos_token_id, again.model_max_length, again.chat_template, again.padding_side) == (
            151645, 77, "{{ messages }}", "left")
        assert again.decode(again.encode(text), skip_special_tokens=True) == "ab 中"
    assert ours.save_pretrained(tmp_path / "new" / "folder") == paths  # the same again is no conflict
    with pytest.raises(UserError, match="exists with other contents"):
        Qwen2Tokenizer(*files).save_pretrained(tmp_path / "new" / "folder")
    assert pickle.loads(pickle.dumps(ours)).encode(text) == ours.encode(text)


def test_importing_and_building_loads_nothing_heavy(files):
    code = ("import sys, qwen1_5_tokenizer as q; q.Qwen2Tokenizer(*sys.argv[1:]).encode('a');"
            "print([m for m in ('mindspore', 'mindformers', 'transformers', 'torch') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code, *files], stdout=subprocess.PIPE, universal_newlines=True,
                          check=True,
                          env={**os.environ, "PYTHONPATH": str(MODULE)})
    assert done.stdout.strip() == "[]"


# -- other vocabularies -----------------------------------------------------------------------------------------------

def test_a_vocabulary_with_control_tokens_inside_equals_hugging_faces(small_model, tokenizer, documents):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Qwen2Tokenizer.from_pretrained(small_model)
    ours = Qwen2Tokenizer.from_pretrained(small_model)
    assert (ours.vocab_size, len(ours), ours.padded_vocab_size) == (49152, 49152, 49152) and len(theirs) == 49152
    assert (ours.end_of_text_id, ours.im_start_id, ours.im_end_id) == (0, 1, 2)
    assert ours.chat_template == theirs.chat_template
    assert (ours.eos_token_id, ours.pad_token_id) == (theirs.eos_token_id, theirs.pad_token_id)
    assert ours.control_token_ids == set(theirs.added_tokens_decoder)
    for kind, text in dict(documents).items():  # the last of each kind
        if kind == NEWER_MARKS and theirs.is_fast:
            continue  # transformers 5 has the fast one alone: see above
        text = text[:40000]
        ids, expected = ours.encode(text), theirs.encode(text)
        if theirs.is_fast:  # it leaves out bytes that the vocabulary lacks
            ids, expected = [token for token in ids if token], [token for token in expected if token]
        assert ids == expected, first_difference(kind, text, ids, expected, ours)
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
    # It has no token for 21 of the bytes; those become the unknown token, which is <|endoftext|>.
    assert ours.encode("\x04") == [0] and (theirs.is_fast or ours.encode("a\x04b") == theirs.encode("a\x04b"))
    assert ours.encode("<repo_name>x<|im_end|>", control_tokens=False)[:2] != [3, 104]


def test_plain_constructor_finds_control_tokens_inside_the_vocabulary(small_model):
    plain = Qwen2Tokenizer(str(small_model / "vocab.json"), str(small_model / "merges.txt"))
    assert (plain.end_of_text_id, plain.im_start_id, plain.im_end_id, len(plain)) == (0, 1, 2, 49152)


def test_added_tokens_that_are_no_control_tokens_match_but_stay_in_the_text(files, tmp_path):
    transformers = pytest.importorskip("transformers")
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    for name, path in zip(("vocab.json", "merges.txt"), files):
        os.symlink(path, tmp_path / name)
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
              "unk_token": None,
              "added_tokens_decoder": {**{str(151643 + i): {"content": token, "special": True, **flags}
                                          for i, token in enumerate(CONTROL_TOKENS)},
                                       "151646": {"content": "<tool_call>", "special": False, **flags}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = Qwen2Tokenizer.from_pretrained(tmp_path), transformers.Qwen2Tokenizer.from_pretrained(tmp_path)
    text = "x<tool_call>y<|im_end|>"
    assert ours.encode(text) == theirs.encode(text) == [87, 151646, 88, 151645]
    assert ours.encode(text, control_tokens=False)[:3] == [87, 151646, 88]
    assert ours.decode(ours.encode(text), skip_special_tokens=True) == "x<tool_call>y"
    assert ours.control_token_ids == {151643, 151644, 151645}


# -- files that are not what they should be ---------------------------------------------------------------------------

@pytest.fixture()
def copies(files, tmp_path):
    """Copies of the two files, free to be spoiled."""
    for name, path in zip(("vocab.json", "merges.txt"), files):
        with open(path, encoding="utf-8") as source:
            (tmp_path / name).write_text(source.read(), encoding="utf-8")
    return tmp_path / "vocab.json", tmp_path / "merges.txt"


def problem(vocab, merges, **options):
    with pytest.raises(UserError) as caught:
        Qwen2Tokenizer(str(vocab), str(merges), **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_swapped_files_are_named(copies):
    vocab, merges = copies
    assert "swapped" in problem(merges, vocab)
    assert "merges.txt is wanted" in problem(vocab, vocab)
    assert "vocab.json is wanted" in problem(merges, merges)


def test_missing_files_are_named(copies, tmp_path):
    vocab, merges = copies
    assert "no such file" in problem(tmp_path / "nowhere.json", merges)
    assert "no such file" in problem(vocab, tmp_path / "nowhere.txt")
    assert "is a folder" in problem(tmp_path, merges)
    with pytest.raises(UserError, match="merges_file, got None"):
        Qwen2Tokenizer(str(vocab), None)
    with pytest.raises(UserError, match="not a folder"):
        Qwen2Tokenizer.from_pretrained("Qwen/Qwen1.5-14B")


@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.999999])
def test_truncated_files_are_named(copies, part):
    vocab, merges = copies
    whole = merges.read_bytes()
    merges.write_bytes(whole[:int(len(whole) * part)])
    message = problem(vocab, merges)
    assert "merges.txt" in message and ("truncated" in message or "no merges" in message
                                        or "one is cut" in message), message
    merges.write_bytes(whole)
    data = vocab.read_bytes()
    vocab.write_bytes(data[:int(len(data) * part)])
    message = problem(vocab, merges)
    assert "vocab.json" in message and ("truncated" in message or "empty" in message), message


def test_files_of_different_models_are_named(copies, small_model):
    vocab, merges = copies
    message = problem(vocab, small_model / "merges.txt")
    assert "different models" in message or "another model" in message
    message = problem(small_model / "vocab.json", merges)
    assert "different models" in message and "merges.txt:" in message


@pytest.mark.parametrize("content, said", [
    ("[1, 2]", "not a vocabulary"), ('{"a": "b"}', "not a vocabulary"), ("{}", "no tokens"),
    ('{"model": {"vocab": {}}}', "tokenizer.json"),
    ('{"a": 0, "b": 0}', "share"), ('{"a": 0, "b": 7}', "missing"), ("just text", "not JSON"), ("\x00\x01", "not JSON"),
    ('{"a": -1}', "negative"), ('{"a": true}', "not a vocabulary")])
def test_other_files_given_as_vocabulary_are_named(copies, content, said):
    vocab, merges = copies
    vocab.write_text(content, encoding="utf-8")
    assert said in problem(vocab, merges)


def test_a_damaged_line_is_found(copies):
    vocab, merges = copies
    lines = merges.read_text(encoding="utf-8").split("\n")
    merges.write_text("\n".join(lines[:700] + ["one two three"] + lines[700:]), encoding="utf-8")
    assert "merges.txt:701:" in problem(vocab, merges)
    merges.write_text("\n".join(lines[:700] + ["zzq qzz"] + lines[700:]), encoding="utf-8")
    assert "merges.txt:701:" in problem(vocab, merges)
    merges.write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in problem(vocab, merges)


def test_a_vocabulary_of_another_kind_is_named(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"▁the": 0, "a": 1, "b": 2, "ab": 3}), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("a b\n")
    assert "another kind" in problem(tmp_path / "vocab.json", tmp_path / "merges.txt")
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2}))
    assert "254 of the 256 bytes" in problem(tmp_path / "vocab.json", tmp_path / "merges.txt")


def test_contradicting_settings_are_named(copies, tmp_path):
    vocab, merges = copies
    assert "different models" in problem(vocab, merges, added_tokens_decoder={"5": {"content": "<|im_end|>"}})
    assert "lstrip" in problem(vocab, merges, added_tokens_decoder={"151643": {"content": "<s>", "lstrip": True}})
    assert "padding_side" in problem(vocab, merges, padding_side="top")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer_config.json: is not JSON"):
        Qwen2Tokenizer.from_pretrained(tmp_path)


# -- hostile files ----------------------------------------------------------------------------------------------------

@given(tokens=st.sets(st.text(alphabet="ab<|.*", min_size=1, max_size=6), min_size=1, max_size=12),
       text=st.text(alphabet="ab<|.*x", max_size=40))
@settings(max_examples=300, deadline=None)
def test_added_tokens_are_found_as_by_trying_each_the_longest_first(tokens, text):
    assert matching.one_of(tokens).split(text) == matching.plain_one_of(tokens).split(text)


def test_a_hundred_thousand_added_tokens_cost_no_time_for_each():
    found = matching.one_of(f"<|audio_{number}|>" for number in range(100_000))
    begin_s = time.perf_counter()
    assert len(found.split("<|audio_99999|>" * 1000 + "<|audio_" * 20_000)) == 2001
    assert time.perf_counter() - begin_s < 2  # trying each takes minutes
    chain = ["a" * length for length in range(1, 1000)]
    assert matching.one_of(chain).split("b" + "a" * 1500 + "b")[1] == "a" * 999


CONFIGS = {
    '{"added_tokens_decoder": {"first": {"content": "<x>"}}}': "the key 'first', a token's id",
    '{"added_tokens_decoder": {"1.5": {"content": "<x>"}}}': "the key '1.5'",
    '{"added_tokens_decoder": {"-1": {"content": "<x>"}}}': "the key '-1'",
    '{"added_tokens_decoder": {"100000000": {"content": "<x>"}}}': "far beyond the 151643",
    '{"added_tokens_decoder": {"' + "9" * 30 + '": {"content": "<x>"}}}': "a token's id is wanted",
    '{"added_tokens_decoder": {"151646": {"content": "' + "a" * 5000 + '"}}}': "5000 characters",
    '{"added_tokens_decoder": {"151646": {"content": "\\ud800"}}}': "half a character",
    '{"added_tokens_decoder": {"151646": null}}': "is null",
    '{"added_tokens_decoder": [1]}': "an object of ids and tokens is wanted",
    '{"additional_special_tokens": [null]}': "holds a null",
    '{"additional_special_tokens": 5}': "a list of tokens is wanted",
    '{"chat_template": [{"template": "x"}]}': "chat_template", '{"chat_template": 5}': "a text is wanted",
    '{"errors": "nosuch"}': "errors is 'nosuch'", '{"model_max_length": "many"}': "a number is wanted",
    '{"model_max_length": 1e999}': "holds 1e999", '{"model_max_length": NaN}': "NaN is not JSON",
    '{"model_max_length": ' + "1" * 5000 + "}": "5000 digits", '{"padding_side": "up"}': "left or right is wanted",
    "[" * 100_000: "nested too deeply", "[]": "not a JSON object", '{"eos_token": ["a"]}': "a token's text is wanted"}


@pytest.mark.parametrize("contents", CONFIGS, ids=lambda contents: contents[:50])
def test_a_hostile_tokenizer_config_is_one_clear_line(contents, files, tmp_path):
    for path in files:
        os.symlink(path, tmp_path / os.path.basename(path))
    (tmp_path / "tokenizer_config.json").write_text(contents)
    with pytest.raises(UserError) as caught:
        Qwen2Tokenizer.from_pretrained(str(tmp_path))
    assert CONFIGS[contents] in str(caught.value) and len(str(caught.value)) <= 500


def test_a_config_cannot_name_other_files(files, tmp_path):
    for path in files:
        os.symlink(path, tmp_path / os.path.basename(path))
    (tmp_path / "tokenizer_config.json").write_text('{"vocab_file": "/etc/passwd", "merges_file": 5, "self": 1, "": 2}')
    assert Qwen2Tokenizer.from_pretrained(str(tmp_path)).encode("Hello world") == [9707, 1879]


@pytest.mark.parametrize("contents, said", [
    ("[" * 100_000, "nested too deeply"), ('{"a": ' * 100_000, "nested too deeply"),
    ('{"a": 0, "b": 4000000000}', "are missing"),
    ('{"a": ' + "1" * 5000 + "}", "vocab.json"), ('{"a": 1e400}', "not a vocabulary")])
def test_a_hostile_vocabulary_is_one_clear_line(contents, said, files, tmp_path):
    (tmp_path / "vocab.json").write_text(contents)
    with pytest.raises(UserError, match=said):
        Qwen2Tokenizer(str(tmp_path / "vocab.json"), files[1])
