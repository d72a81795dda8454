"""Programs that people use with OpenAI's API, on a server of the small real model: litellm, LangChain,
lm-evaluation-harness. Each is tried where it is installed."""

from __future__ import annotations

import json
import os
import pydoc_data.topics
import re
import subprocess
import sys

import pytest
from serve_fixtures import serving

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
TOOL = {"type": "function", "function": {"name": "weather", "description": "the weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}
MODEL = "small"


@pytest.fixture(scope="module")
def server(small_model):
    """The small real model in float32, without tool calls in its template, as Qwen1.5's."""
    flags = ("--load_checkpoint", str(small_model), "--device_target", "CPU", "--port", "0", "--api_key", "secret",
             "--served_model_name", MODEL, "--options", *(f"model.model_config.{key}={value}" for key, value in {
                 "seq_length": 1024, "max_decode_length": 1024, "param_init_type": "float32",
                 "compute_dtype": "float32"}.items()))
    with serving(None, command=[sys.executable, "-m", "qwen15", "serve", *flags]) as started:
        yield started


@pytest.mark.slow
class TestLitellm:
    @pytest.fixture()
    def ask(self, server, monkeypatch):
        monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        litellm = pytest.importorskip("litellm")

        def call(**options):
            return litellm.completion(model=f"openai/{MODEL}", api_base=f"{server.url}/v1", api_key="secret",
                                      messages=QUESTION, temperature=0, max_tokens=12, num_retries=0, **options)

        return litellm, call

    def test_an_answer_and_its_stream_are_the_same(self, ask):
        _, call = ask
        answer = call()
        assert "Paris" in answer.choices[0].message.content and answer.usage.prompt_tokens > 10
        pieces = [chunk.choices[0].delta.content or "" for chunk in call(stream=True) if chunk.choices]
        assert "".join(pieces) == answer.choices[0].message.content and len(pieces) > 2

    def test_what_is_refused_comes_as_its_own_exceptions(self, ask, server):
        litellm, call = ask
        with pytest.raises(litellm.BadRequestError, match="tool calls"):
            call(tools=[TOOL])
        with pytest.raises(litellm.AuthenticationError):
            litellm.completion(model=f"openai/{MODEL}", api_base=f"{server.url}/v1", api_key="wrong",
                               messages=QUESTION, num_retries=0)
        with pytest.raises(litellm.ContextWindowExceededError):
            litellm.completion(model=f"openai/{MODEL}", api_base=f"{server.url}/v1", api_key="secret",
                               messages=[{"role": "user", "content": "word " * 2000}], num_retries=0)


@pytest.mark.slow
class TestLangChain:
    @pytest.fixture()
    def chat(self, server):
        langchain = pytest.importorskip("langchain_openai")
        return langchain.ChatOpenAI(base_url=f"{server.url}/v1", api_key="secret", model=MODEL, temperature=0,
                                    max_tokens=60, max_retries=0)

    def test_invoke_stream_and_batch_say_the_same(self, chat):
        question = QUESTION[0]["content"]
        answer = chat.invoke(question)
        assert "Paris" in answer.content and answer.usage_metadata["output_tokens"] > 0
        assert "".join(piece.content for piece in chat.stream(question)) == answer.content
        assert [each.content for each in chat.batch([question] * 2)] == [answer.content] * 2

    def test_structured_output_keeps_to_the_schema(self, chat):
        pytest.importorskip("llguidance")
        schema = {"title": "capital", "type": "object", "properties": {"city": {"type": "string", "maxLength": 12}},
                  "required": ["city"], "additionalProperties": False}
        for method in ("json_schema", "json_mode"):
            made = chat.with_structured_output(schema, method=method).invoke(
                "Answer in JSON: which city is the capital of France?")
            assert isinstance(made, dict) and (method == "json_mode" or isinstance(made["city"], str))

    def test_tools_are_refused_with_the_reason_where_the_template_has_none(self, chat):
        openai = pytest.importorskip("openai")
        with pytest.raises(openai.BadRequestError, match="chat template has no tool calls"):
            chat.bind_tools([TOOL]).invoke("How is the weather in Paris?")


def last_words(count):
    """Sentences of Python's own manual and their last words."""
    found = []
    for _, text in sorted(pydoc_data.topics.topics.items()):
        for paragraph in text.split("\n\n"):
            sentence = " ".join(paragraph.split())
            match = re.fullmatch(r"([A-Z][^*`|\[\]]{80,300}) ([a-z]{4,})\.", sentence)
            if match:
                found.append({"context": match[1], "target": " " + match[2]})
    return found[:count]


@pytest.mark.slow
@pytest.mark.timeout(3600)  # the harness scores each word, and then draws 100000 samples for the error of a perplexity
def test_lm_evaluation_harness_finds_what_it_finds_with_transformers(server, small_model, tmp_path):
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")  # its Hugging Face backend wants it
    items = last_words(30)
    assert len(items) == 30
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (tmp_path / "last_word.yaml").write_text(
        "task: last_word\ndataset_path: json\ndataset_kwargs:\n  data_files: {test: "
        f"'{tmp_path / 'items.jsonl'}'}}\noutput_type: loglikelihood\ntest_split: test\n"
        "doc_to_text: '{{context}}'\ndoc_to_target: '{{target}}'\nmetric_list:\n  - {metric: acc, aggregation: mean}\n"
        "  - {metric: perplexity, aggregation: perplexity}\n")

    def judged(model, arguments):
        done = subprocess.run(
            [sys.executable, "-m", "lm_eval", "--model", model, "--model_args", arguments, "--tasks", "last_word",
             "--include_path", str(tmp_path), "--output_path", str(tmp_path / model), "--device", "cpu"],
            capture_output=True, text=True, timeout=1800,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
                 "HF_HOME": str(tmp_path / "hf"), "OPENAI_API_KEY": "secret"})
        assert done.returncode == 0, done.stderr[-2000:]
        written, = (tmp_path / model).rglob("results_*.json")
        results = json.loads(written.read_text())["results"]["last_word"]
        return results["acc,none"], results["perplexity,none"]

    ours = judged("local-completions", f"model={MODEL},base_url={server.url}/v1/completions,tokenizer={small_model},"
                                       "num_concurrent=4,max_retries=1,tokenized_requests=True")
    theirs = judged("hf", f"pretrained={small_model},dtype=float32")
    assert ours[0] == theirs[0] and 0 < ours[0] < 1
    assert ours[1] == pytest.approx(theirs[1], rel=1e-3)
