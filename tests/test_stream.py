"""Tokens to text: half characters, control tokens, stop strings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from qwen15.text.stream import TextStream


def run(pieces, **options):
    stream = TextStream(lambda token: pieces[token], **options)
    shown = [stream.feed(token) for token in range(len(pieces))]
    return shown + [stream.end()], stream


def test_half_characters_wait_for_their_other_half():
    shown, _ = run(["上".encode()[:1], "上".encode()[1:] + b"a", b"b"])
    assert shown == ["", "上a", "b", ""]


def test_unfinished_character_at_the_end_becomes_the_replacement_character():
    shown, _ = run([b"a", "上".encode()[:2]])
    assert "".join(shown) == "a\ufffd"


def test_control_tokens_print_nothing():
    shown, _ = run([b"a", b"<|im_end|>", b"b"], skipped=frozenset({1}))
    assert "".join(shown) == "ab"


def test_stop_string_over_several_tokens_is_never_shown():
    shown, stream = run([b"one EN", b"D", b" two"], stop_strings=["END"])
    assert shown == ["one ", "", "", ""]
    assert stream.stopped


def test_text_that_only_began_like_a_stop_string_is_shown():
    shown, stream = run([b"one EN", b"TER"], stop_strings=["END"])
    assert shown == ["one ", "ENTER", ""]
    assert not stream.stopped


def test_held_back_text_comes_out_at_the_end():
    shown, _ = run([b"one EN"], stop_strings=["END"])
    assert shown == ["one ", "EN"]


@given(st.text(max_size=30), st.text(min_size=1, max_size=4), st.integers(1, 5))
def test_any_cut_of_the_bytes_gives_the_text_up_to_the_stop_string(text, stop, width):
    try:
        data = text.encode()
    except UnicodeEncodeError:
        return
    pieces = [data[i:i + width] for i in range(0, len(data), width)]
    shown, stream = run(pieces, stop_strings=[stop])
    assert "".join(shown) == text.split(stop, 1)[0]
    assert stream.stopped == (stop in text)


def test_empty_stop_strings_do_not_end_everything():
    shown, _ = run([b"a"], stop_strings=[""])
    assert "".join(shown) == "a"
