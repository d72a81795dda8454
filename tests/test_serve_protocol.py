"""What a request may say to the server, and how it is refused; no model is needed for that."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest

pytest.importorskip("starlette")

from qwen15.serve.protocol import messages, parse_json
from qwen15.serve.refusal import Refusal
from qwen15.serve.tool_calls import ToolCalls


def refusal(call, *arguments):
    with pytest.raises(Refusal) as caught:
        call(*arguments)
    return caught.value


@pytest.mark.parametrize("body, told", [
    (b"", "not JSON"), (b"{", "not JSON"), (b"[1]", "must be a JSON object, not a list"),
    (b"\xff{}", "not UTF-8 (byte 0)"),
    (b'{"a": NaN}', "NaN is not JSON"), (b"[" * 100000, "nested too deeply"), (b"null", "not null"),
    (b'{"seed": ' + b"1" * 5000 + b"}", "a number of 5000 digits"), (b'{"n": 1, "n": 2}', "gives 'n' twice"),
    (b'{"prompt": "a \\ud800"}', "\\ud800, which is half of a character"), (b'{"\\udfff": 1}', "half of a character"),
])
def test_a_body_that_is_no_object_is_told_what_it_is(body, told):
    refused = refusal(parse_json, body)
    assert refused.status == 400 and told in refused.message and len(refused.message) < 500
    assert refused.body["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("value, where", [
    ([], "messages"), ("hello", "messages"), ([1], "messages[0]"),
    ([{"role": "robot", "content": "x"}], "messages[0].role"),
    ([{"role": "user"}], "messages[0].content"), ([{"role": "user", "content": 3}], "messages[0].content"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages[0].content"),
    ([{"role": "user", "content": "x", "colour": "red"}], "messages[0].colour"),
    ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
     "messages[0].tool_calls[0]"),
])
def test_a_message_that_is_none_is_named(value, where):
    assert refusal(messages, value).param == where


def test_messages_become_what_templates_take():
    made = messages([{"role": "developer", "content": "Be brief."},
                     {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                     {"role": "assistant", "content": None, "tool_calls": [
                         {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]},
                     {"role": "tool", "content": "2", "tool_call_id": "1"}])
    assert made == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "ab"},
                    {"role": "assistant", "content": "", "tool_calls": [
                        {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]},
                    {"role": "tool", "content": "2"}]


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>'


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_calls_are_found_however_the_text_is_cut(size):
    text = f"Let me look.\n{CALL}\n{CALL} done <tool"
    reader, said, calls = ToolCalls(), "", []
    for start in range(0, len(text), size):
        piece, found = reader.feed(text[start:start + size], False)
        said, calls = said + piece, calls + found
        assert "<tool" not in said
    piece, found = reader.feed("", True)
    assert said + piece == "Let me look.\n\n done <tool" and found == []
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [("weather", {"city": "北京"})] * 2
    assert len({call.id for call in calls}) == 2


@pytest.mark.parametrize("text", ['<tool_call>{"name": 3}</tool_call>', "<tool_call>nonsense</tool_call>",
                                  "<tool_call>[",
                                  "a < b", "<tool_call>"])
def test_what_is_no_call_stays_text(text):
    said, calls = ToolCalls().feed(text, True)
    assert (said, calls) == (text, [])


def test_a_call_that_ends_with_the_answer_counts():
    said, calls = ToolCalls().feed('<tool_call>{"name": "now", "arguments": {}}', True)
    assert said == "" and calls[0].name == "now"


def test_a_character_in_two_escapes_is_one():
    assert parse_json(b'{"prompt": "\\ud83d\\ude00"}') == {"prompt": "\U0001f600"}


def test_a_key_is_utf_8_and_the_case_of_the_scheme_means_nothing():
    app = pytest.importorskip("qwen15.serve.app")
    for header, right in (("Bearer s\u00e9cret", True), ("bearer s\u00e9cret", True), ("Bearer  s\u00e9cret ", True),
                          ("Bearer secret", False), ("Basic s\u00e9cret", False), ("s\u00e9cret", False), ("", False)):
        with nullcontext() if right else pytest.raises(Refusal, match="Wrong or missing API key"):
            app.check_key("s\u00e9cret", "/v1/models", header.encode())
    app.check_key("x", "/health", b"")
    app.check_key(None, "/metrics", b"")
