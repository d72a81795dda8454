"""The messages that the troubleshooting pages quote are the program's own."""

import ast
import re

import pytest
from conftest import MODULE, ROOT


def texts():
    """Every piece of text in the sources, in pieces where a value stands in it; of the kernels the whole source."""
    for path in sorted(MODULE.rglob("*.cpp")):
        yield path.read_text("utf-8")
    for path in sorted(MODULE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


SOURCES = "\n".join(texts())


def quoted(page):
    """The messages in the first column of a page's tables."""
    return re.findall(r"^\| `([^`]+)` *\|", (ROOT / "docs" / page).read_text("utf-8"), re.M)


@pytest.mark.parametrize("page", ["troubleshooting.md", "troubleshooting_en.md"])
def test_a_message_of_the_page_is_in_the_program(page):
    messages = quoted(page)
    assert len(messages) > 25
    for message in messages:
        for piece in message.split("..."):
            words = piece.strip(" (),:.;=")
            assert words in SOURCES, f"{message!r}: nothing says {words!r}"


def test_both_languages_have_the_same_messages():
    assert quoted("troubleshooting.md") == quoted("troubleshooting_en.md")
