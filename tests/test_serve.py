"""The server as its clients meet it: the openai package, plain HTTP, many at once, those that leave, and its end."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from command_fixtures import make_random
from conftest import MODULE, ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qwen15.serve import protocol
from serve_fixtures import TOOL_TEMPLATE, serving

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")
torch = pytest.importorskip("torch")

PROMPT = "Gravity is"
SYSTEM = "You are a careful assistant. " * 20


@pytest.fixture(scope="module")
def model(tmp_path_factory, small_model):
    """A random model's YAML, with a template that knows tools."""
    folder = tmp_path_factory.mktemp("serve")
    yaml = make_random(folder, small_model)
    path = folder / "random" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["chat_template"] = TOOL_TEMPLATE
    path.write_text(json.dumps(config))
    return yaml


@pytest.fixture(scope="module")
def server(model):
    with serving(model, "--max_batch", "4", "--max_waiting", "6") as started:
        yield started


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def judge(model):
    """transformers on the same weights: (greedy text, log probabilities) of a prompt's ids."""
    transformers = pytest.importorskip("transformers")
    network = transformers.Qwen2ForCausalLM.from_pretrained(model.parent / "random", dtype=torch.float32).eval()

    def greedy(ids, count):
        with torch.no_grad():
            made = network.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=0,
                                    eos_token_id=2)
        return made[0, len(ids):].tolist()

    def log_probabilities(ids):
        with torch.no_grad():
            rows = torch.log_softmax(network(torch.tensor([ids])).logits[0], -1)
        return [float(rows[place, token]) for place, token in enumerate(ids[1:])]

    return greedy, log_probabilities


def complete(client, prompt=PROMPT, **options):
    options = {"max_tokens": 12, "temperature": 0, **options}
    return client.completions.create(model="random", prompt=prompt, **options)


def ids_of(server, text):
    return server.send("/tokenize", {"prompt": text})[1]["tokens"]


def test_a_completion_is_what_transformers_makes_of_the_prompt(client, server, judge):
    ids = ids_of(server, PROMPT)
    expected = server.send("/detokenize", {"tokens": judge[0](ids, 12)})[1]["prompt"]
    answer = complete(client)
    assert answer.choices[0].text == expected and answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (len(ids), 12,
                                                                                                       len(ids) + 12)
    assert complete(client, ids).choices[0].text == expected  # as token ids
    assert [choice.text for choice in complete(client, [PROMPT, ids]).choices] == [expected] * 2


def test_a_stream_says_the_same_piece_by_piece_and_ends_with_the_usage(client):
    whole = complete(client, max_tokens=30)
    chunks = list(complete(client, max_tokens=30, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 30
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_chat_with_log_probabilities_and_its_stream(client):
    def ask(**options):
        return client.chat.completions.create(model="random", messages=[{"role": "user", "content": "Hello"}],
                                              max_tokens=8,
                                              temperature=0, logprobs=True, top_logprobs=3, **options)

    choice = ask().choices[0]
    tokens = choice.logprobs.content
    assert "".join(token.token for token in tokens) == choice.message.content and len(tokens) == 8
    assert all(token.logprob == token.top_logprobs[0].logprob and len(token.top_logprobs) == 3 for token in tokens)
    assert b"".join(map(bytes, (token.bytes for token in tokens))).decode() == choice.message.content
    chunks = [chunk for chunk in ask(stream=True) if chunk.choices]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choice.message.content
    streamed = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert [token.token for token in streamed] == [token.token for token in tokens]


def test_echo_gives_the_prompts_own_log_probabilities_as_transformers_has_them(client, server, judge):
    for text, wanted in (("The quick brown fox jumps over the lazy dog", 0),
                         ("The quick brown fox jumps over the lazy dog", 2), ("The", 0), ("The", 2)):
        ids = ids_of(server, text)
        made = complete(client, ids, echo=True, logprobs=2, max_tokens=wanted).choices[0]
        assert made.text.startswith(text)
        assert made.logprobs.token_logprobs[0] is None and len(made.logprobs.tokens) == len(ids) + wanted
        assert made.logprobs.token_logprobs[1:len(ids)] == pytest.approx(judge[1](ids), abs=1e-3)
        assert all(token in top for token, top in zip(made.logprobs.tokens[1:], made.logprobs.top_logprobs[1:]))
        assert "".join(made.logprobs.tokens) == made.text


def test_many_clients_at_once_get_what_each_gets_alone(server, client):
    prompts = [f"Number {n} " + "and so on " * n for n in range(8)]
    alone = [complete(client, prompt).choices[0].text for prompt in prompts]

    async def together():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as other:
            return await asyncio.gather(*(other.completions.create(model="random", prompt=prompt, max_tokens=12,
                                                                   temperature=0)
                                          for prompt in prompts))

    assert [answer.choices[0].text for answer in asyncio.run(together())] == alone


def test_choices_differ_and_a_seed_repeats_them(client):
    def draw():
        return [choice.text for choice in complete(client, n=3, temperature=1.5, seed=7).choices]

    first = draw()
    assert len(set(first)) == 3 and draw() == first


def test_a_shared_beginning_is_computed_once_and_changes_nothing(client, server):
    def ask(question):
        return client.chat.completions.create(model="random", max_tokens=6, temperature=0, messages=[
            {"role": "system", "content": SYSTEM}, {"role": "user", "content": question}])

    first, again = ask("One?"), ask("One?")
    assert again.usage.prompt_tokens_details.cached_tokens > 90
    assert again.choices[0].message.content == first.choices[0].message.content
    assert ask("Two?").usage.prompt_tokens_details.cached_tokens > 90
    server.wait_until_idle()
    assert server.gauge("kv_cache_free_blocks") == server.gauge("kv_cache_blocks")


def test_a_stop_string_ends_the_answer_before_it(client):
    whole = complete(client, max_tokens=20).choices[0].text
    stop = whole[8:11]
    made = complete(client, max_tokens=20, stop=[stop]).choices[0]
    assert made.text == whole[:whole.index(stop)] and made.finish_reason == "stop"


def test_an_answer_keeps_to_a_json_schema(client):
    pytest.importorskip("llguidance")
    schema = {"type": "object", "additionalProperties": False, "required": ["ok"],
              "properties": {"ok": {"type": "boolean"}}}
    made = client.chat.completions.create(
        model="random", messages=[{"role": "user", "content": "?"}], temperature=0, max_tokens=200,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}).choices[0]
    assert made.finish_reason == "stop" and set(json.loads(made.message.content)) == {"ok"}


def test_a_forced_call_comes_as_a_tool_call_in_one_piece_and_in_a_stream(client):
    pytest.importorskip("llguidance")
    tools = [{"type": "function", "function": {"name": "set_light", "parameters": {
        "type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"],
        "additionalProperties": False}}}]

    def ask(**options):
        return client.chat.completions.create(model="random", messages=[{"role": "user", "content": "Light!"}],
                                              tools=tools,
                                              tool_choice="required", parallel_tool_calls=False, temperature=0,
                                              max_tokens=100,
                                              **options)

    choice = ask().choices[0]
    call = choice.message.tool_calls[0]
    assert choice.finish_reason == "tool_calls" and call.function.name == "set_light"
    assert set(json.loads(call.function.arguments)) == {"on"} and choice.message.content is None
    deltas = [d for chunk in ask(stream=True) for c in chunk.choices for d in c.delta.tool_calls or ()]
    assert [(d.index, d.function.name, d.function.arguments)
            for d in deltas] == [(0, "set_light", call.function.arguments)]


CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "x"}]}


@pytest.mark.parametrize("path, body, status, param", [
    (CHAT, b"{", 400, None), (CHAT, {}, 400, "messages"), (CHAT, {**HELLO, "temprature": 1}, 400, "temprature"),
    (CHAT, {**HELLO, "temperature": "hot"}, 400, "temperature"), (CHAT, {**HELLO, "n": 0}, 400, "n"),
    (CHAT, {**HELLO, "model": "gpt-4"}, 404, "model"), (CHAT, {**HELLO, "max_tokens": 10 ** 9}, 400, "messages"),
    (CHAT, {**HELLO, "max_tokens": 0}, 400, "max_tokens"), (CHAT, {**HELLO, "top_logprobs": 2}, 400, "top_logprobs"),
    (CHAT, {**HELLO, "stream_options": {"include_usage": True}}, 400, "stream_options"),
    (CHAT, {**HELLO, "functions": [{}]}, 400, "functions"),
    *((CHAT, {**HELLO, "logit_bias": {token: bias}}, 400, "logit_bias")
      for token, bias in (("x", 1), ("5", 101), ("05", 1), ("5", True), ("999999999", 1), ("9" * 5000, 1))),
    (CHAT, {**HELLO, "seed": 2 ** 63}, 400, "seed"),
    (CHAT, {**HELLO, "stream": True, "stream_options": {"include_obfuscation": True}}, 400,
     "stream_options.include_obfuscation"),
    (CHAT, {**HELLO, "response_format": {"type": "xml"}}, 400, "response_format"),
    (CHAT, {**HELLO, "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "no"}}}}, 400,
     "response_format"),
    (CHAT, {**HELLO, "tool_choice": "required"}, 400, "tool_choice"), (CHAT, {**HELLO, "tools": [{}]}, 400, "tools[0]"),
    *((path, {**HELLO, "chat_template_kwargs": {name: "x"}}, 400, f"chat_template_kwargs.{name}")
      for path in (CHAT, "/tokenize") for name in ("messages", "tools", "chat_template")),
    ("/tokenize", {**HELLO, "chat_template_kwargs": 3}, 400, "chat_template_kwargs"),
    ("/tokenize", {**HELLO, "tools": 3}, 400, "tools[0]"),
    (TEXT, {"prompt": 3}, 400, "prompt"), (TEXT, {"prompt": []}, 400, "prompt"),
    (TEXT, {"prompt": [10 ** 9]}, 400, "prompt"), (TEXT, {"prompt": [[]]}, 400, "prompt"),
    (TEXT, {"prompt": ""}, 400, "prompt"), (TEXT, {"prompt": "a", "suffix": "b"}, 400, "suffix"),
    (TEXT, {"prompt": "a", "n": 11}, 400, "n"),
    (TEXT, {"prompt": "a", "best_of": 3}, 400, "best_of"), (TEXT, {"prompt": ["a"] * 1000}, 400, "prompt"),
    ("/detokenize", {"tokens": [-1]}, 400, "tokens"), ("/tokenize", {}, 400, "prompt"), ("/v1/nothing", {}, 404, None),
])
def test_what_cannot_be_done_is_refused_in_openais_form(server, path, body, status, param):
    got, answer, _ = server.send(path, body)
    assert (got, answer["error"]["param"]) == (status, param), answer
    assert "Traceback" not in answer["error"]["message"] and str(MODULE) not in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("path, fields", [
    (CHAT, {"seed": -1}), (CHAT, {"seed": 2 ** 63 - 1}), (CHAT, {"top_logprobs": 0}), (CHAT, {"store": False}),
    (CHAT, {"stream": True, "stream_options": {"include_usage": None, "include_obfuscation": False}}),
    (CHAT, {"prompt_cache_retention": "24h", "user": "u", "metadata": {"a": "b"}, "stop": None, "tools": []}),
    (CHAT, {"reasoning_effort": "none", "verbosity": "medium", "modalities": ["text"], "service_tier": "auto"}),
    (CHAT, {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "refusal": "No.",
                                                            "function_call": None, "audio": None, "tool_calls": None},
                         {"role": "user", "content": "x"}]}),
    (TEXT, {"n": 2, "best_of": 2, "stop": ["a", "b", "c", "d"]}), (TEXT, {"best_of": 1, "suffix": None}),
])
def test_what_asks_for_nothing_special_is_answered(server, path, fields):
    base = {CHAT: HELLO, TEXT: {"prompt": "x"}}[path]
    status, answer, _ = server.send(path, {**base, "max_tokens": 2, "temperature": 1, **fields})
    assert status == 200, answer


def test_seeds_that_differ_by_2_to_the_32_differ(server):
    body = {"prompt": "x", "temperature": 2, "max_tokens": 12}
    made = [server.send(TEXT, {**body, "seed": seed})[1]["choices"][0]["text"]
            for seed in (7, 7 + 2 ** 32, 7)]
    assert made[0] == made[2] != made[1]


_FIELDS = sorted(protocol._CHAT | protocol._TEXT | set(protocol._NEUTRAL) | {"tokens", "add_special_tokens"})
_SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.floats(allow_nan=False, allow_infinity=False),
                     st.sampled_from([10 ** 30, 1e308, "auto", "\ud800", "\0"]), st.text(max_size=4))
_NAMES = st.sampled_from(["type", "role", "content", "function", "name", "arguments", "parameters", "schema",
                          "json_schema", "include_usage", "text", "user", "0", "properties"])
_JSON = st.recursive(_SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_NAMES, inner, max_size=3),
                     max_leaves=8)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(path=st.sampled_from([CHAT, TEXT, "/tokenize", "/detokenize"]),
       fields=st.dictionaries(st.sampled_from(_FIELDS), _JSON, min_size=1, max_size=3))
def test_whatever_json_comes_the_server_knows_an_answer(server, path, fields):
    base = {CHAT: {**HELLO, "max_tokens": 2}, TEXT: {"prompt": "x", "max_tokens": 2}}.get(path, {})
    status, answer, _ = server.send(path, {**base, **fields})
    assert status in (200, 400, 404, 429), (status, answer)
    if status != 200:
        error = answer["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"].endswith((".", "?")), error


def test_a_typo_is_answered_with_what_was_meant(server):
    assert "Did you mean temperature?" in server.send(CHAT, {**HELLO, "temprature": 1})[1]["error"]["message"]


def test_other_methods_types_and_sizes_are_refused(server):
    assert server.send(CHAT)[0] == 405
    assert server.send(CHAT, HELLO, {"Content-Type": "text/plain"})[0] == 415
    status, answer, _ = server.send(CHAT, b"x" * (8 * 2 ** 20 + 1))
    assert (status, answer["error"]["code"]) == (413, "body_too_large")


def raw(server, *pieces):
    """What is answered to these bytes until the server closes the connection."""
    link = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    with link:
        for data in pieces:
            link.sendall(data)
            time.sleep(0.2 * (len(pieces) > 1))
        answer = b""
        while piece := link.recv(65536):
            answer += piece
    return answer


HEAD = b"Host: x\r\nConnection: close\r\n"


def test_what_is_no_http_is_refused_in_openais_form_and_leaves_no_traceback(server):
    said = len(server.said)
    for data in ((b"\x16\x03\x01\x02\x00\r\n\r\n",), (b"GET /health HTTP/1.1\r\nX: ", b"a" * 60000, b"a" * 60000),
                 (b"POST /v1/completions HTTP/1.1\r\nContent-Length: -1\r\n" + HEAD + b"\r\n",)):
        head, _, body = raw(server, *data).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ") and json.loads(body)["error"]["type"] == "invalid_request_error"
    head_only = raw(server, b"HEAD /health HTTP/1.1\r\n" + HEAD + b"\r\n").lower()
    assert head_only.startswith(b"http/1.1 200 ") and head_only.endswith(b"connection: close\r\n\r\n")
    health = b"GET /health HTTP/1.1\r\n"
    pipelined = raw(server, (health + b"Host: x\r\n\r\n") * 2 + health + HEAD + b"\r\n")
    assert pipelined.count(b'{"status":"ok"') == 3
    assert not [line for line in server.said[said:] if "Traceback" in line]


def test_a_connection_that_says_nothing_or_half_a_head_is_closed(monkeypatch):
    import uvicorn
    from qwen15.serve import connection

    monkeypatch.setattr(connection, "HEAD_S", 0.5)
    took_s = 1.5

    async def application(scope, receive, send):
        await asyncio.sleep(took_s)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    async def run():
        listener = socket.create_server(("127.0.0.1", 0))
        made = uvicorn.Server(uvicorn.Config(application, http=connection.Connection, log_config=None, lifespan="off"))
        serving_it = asyncio.ensure_future(made.serve(sockets=[listener]))

        async def ask(*pieces):
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            for piece in pieces:
                writer.write(piece)
                await asyncio.sleep(0.3)
            answer = await asyncio.wait_for(reader.read(), 20)
            writer.close()
            return answer

        try:
            return await asyncio.gather(
                ask(), ask(b"GET / HT"), ask(b"GET / HTTP/1.1\r\n", b"Host: x\r\n", b"X: y\r\n"),
                ask(b"GET / HTTP/1.1\r\n", HEAD + b"\r\n"), ask(b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET / H"))
        finally:
            made.should_exit = True
            await serving_it

    *given_up, slow_application, half_a_second_request = asyncio.run(run())
    assert given_up == [b""] * 3
    assert slow_application.endswith(b"ok") and half_a_second_request.endswith(b"ok")


def test_a_client_that_leaves_frees_its_blocks(server):
    for stream in (True, False):
        link = server.connect(TEXT, {"prompt": PROMPT, "max_tokens": 50, "stream": stream, "temperature": 0, "n": 4})
        if stream:
            assert link.recv(1000)
        else:
            time.sleep(0.2)
        link.close()
        server.wait_until_idle()
        assert server.gauge("kv_cache_free_blocks") == server.gauge("kv_cache_blocks")


def test_more_than_may_wait_is_told_to_come_back(server):
    links = [server.connect(TEXT, {"prompt": PROMPT, "max_tokens": 200, "min_tokens": 200, "n": 5})
             for _ in range(2)]
    deadline = time.monotonic() + 30
    while server.send("/health")[1]["waiting"] < 6:
        assert time.monotonic() < deadline
    status, answer, headers = server.send(TEXT, {"prompt": PROMPT, "n": 5})
    assert (status, answer["error"]["code"]) == (429, "queue_full") and int(headers["retry-after"]) >= 1
    for link in links:
        link.close()
    server.wait_until_idle()


def test_the_page_needs_nothing_from_elsewhere(server):
    status, page, headers = server.send("/")
    assert status == 200 and "chat/completions" in page and "default-src 'none'" in headers["content-security-policy"]
    assert "http://" not in page and "https://" not in page


def test_the_model_is_described_and_requests_are_counted(server, client):
    assert client.models.list().data[0].id == "random" == client.models.retrieve("random").id
    before = server.gauge("generated_tokens_total")
    complete(client, max_tokens=5)
    assert server.gauge("generated_tokens_total") == before + 5
    assert any("POST /v1/completions 200" in line and "5 generated" in line for line in server.said)


def test_a_key_is_asked_for_and_the_end_lets_answers_finish(model):
    with serving(model, "--api_key", "secret", "--served_model_name", "a", "b") as server:
        assert server.send("/health")[0] == 200
        for header in ({}, {"Authorization": "Bearer secre"}, {"Authorization": "secret"},
                       {"Authorization": "Bearer sécret"}):
            assert server.send("/v1/models",
                               headers={k: v.encode().decode("latin-1") for k, v in header.items()})[0] == 401
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0)
        assert [entry.id for entry in client.models.list().data] == ["a", "b"]
        stream = client.completions.create(model="b", prompt=PROMPT, max_tokens=50, stream=True)
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 20
        while server.send("/health")[0] == 200 and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises((openai.InternalServerError, openai.APIConnectionError)):
            client.completions.create(model="b", prompt=PROMPT)
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
        assert server.process.wait(60) == 0
        assert not any("Traceback" in line for line in server.said)


def test_control_c_ends_it_with_130(model):
    with serving(model) as server:
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(60) == 130


def test_a_second_control_c_does_not_wait_for_answers_and_their_clients_are_told(model):
    with serving(model, "--max_batch", "2") as server:
        links = [server.connect(TEXT, {"prompt": PROMPT, "max_tokens": 230, "min_tokens": 230, "stream": True, "n": 2})
                 for _ in range(3)]
        assert links[0].recv(100)
        for _ in range(2):
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.3)
        assert server.process.wait(60) == 130
        for link in links:
            answer = b""
            while piece := link.recv(65536):
                answer += piece
            assert b'"code": "server_' in answer or b'"code":"server_' in answer or b"[DONE]" in answer, answer[-300:]
        assert not any("Traceback" in line for line in server.said)


def test_an_empty_key_is_refused(model):
    done = subprocess.run([sys.executable, "-m", "qwen15", "serve", "--config", str(model), "--api_key", ""],
                          cwd=MODULE, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "--api_key: must not be empty" in done.stderr


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(server, model):
    done = subprocess.run([sys.executable, "-m", "qwen15", "serve", "--config", str(model), "--port", str(server.port)],
                          cwd=MODULE,
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "weights: loaded" not in done.stderr
    assert f"error: 127.0.0.1:{server.port}: cannot listen here: Address already in use" in done.stderr


def test_two_ranks_serve_the_same_tokens_and_a_killed_one_is_told_to_the_clients(model, client):
    launcher = ["bash", str(ROOT / "scripts" / "msrun_launcher.sh"),
                f"qwen15 serve --config {model} --device_target CPU --port 0 --use_parallel True "
                "--auto_trans_ckpt True --options parallel_config.model_parallel=2", "2"]
    alone = complete(client, max_tokens=20).choices[0].text
    with serving(model, command=launcher) as server:
        other = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        assert complete(other, max_tokens=20).choices[0].text == alone
        found = {}

        def ask():
            try:
                for _ in other.completions.create(model="random", prompt=PROMPT, max_tokens=200, stream=True):
                    found["begun"] = True
            except openai.APIError as error:
                found["error"] = error

        thread = threading.Thread(target=ask)
        thread.start()
        deadline = time.monotonic() + 30
        while "begun" not in found and time.monotonic() < deadline:
            time.sleep(0.01)
        _kill_rank(server.process.pid, 1)
        thread.join(60)
        assert "worker" in str(found["error"]) or "server" in str(found["error"])
        assert server.process.wait(60) != 0
        assert any(line.startswith("error: rank 1") for line in server.said), server.said[-5:]


def _kill_rank(launcher, rank):
    import os
    from pathlib import Path
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environ = (path / "environ").read_bytes().split(b"\0")
            command = (path / "cmdline").read_bytes()
            if b"MS_ROLE=MS_WORKER" in environ and f"RANK_ID={rank}".encode() in environ and b"serve" in command:
                os.kill(int(path.name), signal.SIGKILL)
        except OSError:
            continue


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to try the page in")
def test_the_page_chats_in_a_browser(server, tmp_path):
    from browser import Page
    with Page(CHROMIUM, tmp_path, server.url) as page:
        assert page.run("document.getElementById('send').textContent") == "Send"  # the browser's language
        page.run("document.getElementById('limit').value = 12")
        page.run("document.getElementById('temperature').value = 0")
        page.run("document.getElementById('text').value = '<b>Hello</b>'; document.getElementById('send').click()")
        page.wait("document.querySelectorAll('.note').length === 1")
        assert page.run("document.querySelector('.user').textContent") == "<b>Hello</b>"
        expected = server.send(CHAT, {"messages": [{"role": "user", "content": "<b>Hello</b>"}], "max_tokens": 12,
                                      "temperature": 0})[1]["choices"][0]["message"]["content"]
        assert page.run("document.querySelector('.assistant').textContent") == expected
        assert page.run("document.getElementById('model').textContent") == "random"
        # a new conversation begins with nothing, also when an answer is under way
        page.run("document.getElementById('limit').value = 200")
        page.run("document.getElementById('text').value = 'More'; document.getElementById('send').click()")
        page.wait("document.querySelectorAll('.assistant')[1]?.textContent.length > 5")
        page.run("document.getElementById('clear').click()")
        page.wait("document.getElementById('send').textContent === 'Send'")
        assert page.run("messages.length") == 0 and page.run("document.querySelectorAll('#talk > div').length") == 0
        server.wait_until_idle()
