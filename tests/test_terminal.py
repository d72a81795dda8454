"""What reaches a terminal: nothing that a file, a name or an answer holds can move its cursor, rename its window or
turn its lines."""

from __future__ import annotations

import importlib
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from qwen15 import terminal
from qwen15.errors import UserError, run_main
from qwen15.reporting import Reporter

HOSTILE = {"escape": "\x1b]0;owned\x07", "8-bit escape": "\x9b2J", "carriage return": "all is well\rerror",
           "override": "txt\u202efdp.exe",
           "isolate": "\u2066x", "line separator": "one\u2028two", "lone surrogate": "\ud800", "delete": "\x7f",
           "NUL": "a\0b"}


def harmless(text):
    return all(character.isprintable() or character == "\t" or unicodedata.category(character) == "Zs"  # blanks
               for character in text)


@pytest.mark.parametrize("name", HOSTILE)
def test_an_error_shows_what_steers_a_terminal_as_text(name, capsys):
    def fails(argv):
        raise UserError(f"{HOSTILE[name]} is wrong", where=f"{HOSTILE[name]}.json", fix=f"Not {HOSTILE[name]}.")

    assert run_main(fails, []) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.endswith("\n") and harmless(said[:-1])


def test_an_error_nobody_expected_is_shown_as_text_too(capsys):
    def fails(argv):
        raise RuntimeError("\x1b[2J" + "x" * 10 ** 6)

    assert run_main(fails, []) == 1
    said = capsys.readouterr().err
    assert "\\x1b[2J" in said and harmless(said[:-1]) and len(said) < 700


@pytest.mark.parametrize("missing, said", [
    ("nobodys_package", f"error: {sys.executable}: has no package nobodys_package. Install this program and its "
                        "packages, `pip install .` in its folder, or use the Python that has it.\n"),
    ("nobodys_package.part", f"error: {sys.executable}: has no package nobodys_package. Install"),
    ("json.nothing", "error: ModuleNotFoundError: No module named 'json.nothing' (unexpected; "),
    ("qwen15.nothing", "error: ModuleNotFoundError: No module named 'qwen15.nothing' (unexpected; ")])
def test_a_package_that_is_not_installed_is_named(capsys, missing, said):
    assert run_main(lambda _: importlib.import_module(missing) and 0, []) == 1
    assert capsys.readouterr().err.startswith(said)


def test_what_a_run_reports_is_shown_as_text(capsys):
    Reporter("info").info("loaded \x1b]0;owned\x07\n  second line")
    assert capsys.readouterr().err == "loaded \\x1b]0;owned\\x07\n  second line\n"


def test_a_long_error_keeps_its_place_and_its_way_out():
    line = str(UserError(f"{'y' * 10 ** 6} is no number", where="prompts.jsonl:12", fix="Write a number."))
    assert len(line) == terminal.MOST_CHARACTERS
    assert line.startswith("prompts.jsonl:12: yyy")
    assert line.endswith("y is no number. Write a number.") and "more characters" in line


def test_names_that_people_use_stay_as_they_are():
    for name in ("模型/你好.json", "naïve café", "Ελληνικά", "C:\\models", "a\tb", "50 % → 100 %"):
        assert terminal.line(name) == name


@given(st.text())
def test_no_text_steers_a_terminal(text):
    assert harmless(terminal.line(text)) and len(terminal.line(text)) <= terminal.MOST_CHARACTERS
    assert not set(terminal.answer(text)) & set(map(chr, [*range(9), *range(11, 32), *range(127, 160)]))


def test_an_answer_keeps_its_words_lines_and_emoji():
    text = "Hello\n\tمرحبا 👨\u200d👩\u200d👧 \u200fעברית\n"
    assert terminal.answer(text) == text
    assert terminal.answer("\x1b[2Jgone") == "\\x1b[2Jgone"
