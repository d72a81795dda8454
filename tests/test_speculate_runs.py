"""Guessed tokens as a user meets them: flags, files, chat, the Python interface, the server."""

from __future__ import annotations

import json
import shutil
import threading

import pytest
from command_fixtures import Terminal, command, error_line, run
from conftest import random_model
from qwen15 import generate, load
from qwen15.errors import UserError
from serve_fixtures import serving
from speculate_fixtures import make_twins

pytest.importorskip("torch")

TEXTS = ["one", "two three two three two", "a b c a b c a b", "上海的旅游攻略",
         "def f(x):\n    return x\n\ndef f(y):\n", "the cat and the dog and the cat and",
         " ".join(map(str, range(20))), "!" * 12]


@pytest.fixture(scope="module")
def twins(tmp_path_factory, small_model):
    return make_twins(tmp_path_factory.mktemp("speculate"), small_model)


@pytest.fixture(scope="module")
def yaml(twins):
    return twins[0]


@pytest.fixture(scope="module")
def twin(twins):
    """A draft that says what the model says."""
    return twins[1]


@pytest.fixture(scope="module")
def draft(yaml, small_model):
    """A narrower model with the same tokenizer and a longer vocabulary: another one's guesses, mostly wrong."""
    folder = yaml.parent / "other"
    random_model(folder, seed=5, vocab_size=49200, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                 num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True, eos_token_id=2, bos_token_id=1)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(small_model / name, folder)
    return folder


@pytest.fixture(scope="module")
def loaded(yaml, draft, twin):
    """The same model without guesses, with lookup, with another model as its draft, and with its twin."""
    ways = {"plain": {}, "ngram": {"speculate": "ngram"}, "draft": {"speculate": str(draft), "speculate_tokens": 3},
            "twin": {"speculate": str(twin)}}
    models = {name: load(yaml.parent / "random", yaml, device_target="CPU", **more) for name, more in ways.items()}
    yield models
    for model in models.values():
        model.close()


WAYS = ["ngram", "draft", "twin"]


@pytest.mark.parametrize("way", WAYS)
def test_greedy_texts_are_those_without_guesses(loaded, way):
    plain = generate(loaded["plain"], TEXTS, max_new_tokens=40)
    for text, one in zip(TEXTS, plain):
        made = generate(loaded[way], text, max_new_tokens=40)
        assert made.token_ids == one.token_ids and made.text == one.text
        assert made.guessed_tokens >= made.accepted_tokens and one.guessed_tokens is None
        assert one.decode_steps == len(one.token_ids) - 1
        assert made.decode_steps + made.accepted_tokens >= len(one.token_ids) - 1
        if way == "twin":
            assert made.accepted_tokens >= 0.9 * made.guessed_tokens > 9 and made.decode_steps < one.decode_steps / 2
    together = generate(loaded[way], TEXTS[:3], max_new_tokens=40)
    assert [made.token_ids for made in together] == [one.token_ids for one in plain[:3]]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("settings", [
    {"do_sample": True, "temperature": 0.7}, {"do_sample": True, "top_k": 7, "repetition_penalty": 1.2},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3}, {"do_sample": True, "top_p": 0.6, "frequency_penalty": 0.5},
    {"logit_bias": {"40": 6.0, "41": 5.5}, "min_new_tokens": 12}], ids=str)
def test_a_seed_gives_the_same_text_with_and_without_guesses(loaded, way, settings):
    plain, guessed = (generate(loaded[name], TEXTS[1], max_new_tokens=30, seed=11, logprobs=2, **settings)
                      for name in ("plain", way))
    assert guessed.token_ids == plain.token_ids and guessed.finish_reason == plain.finish_reason
    for one, other in zip(guessed.logprobs, plain.logprobs):
        assert one["token_id"] == other["token_id"] and one["logprob"] == pytest.approx(other["logprob"], abs=1e-3)


def test_a_stop_string_within_accepted_guesses_ends_the_answer_there(loaded):
    plain = generate(loaded["plain"], TEXTS[0], max_new_tokens=40)
    for place in range(3, 30, 4):
        stop = plain.text[place:place + 2]
        one, made = (generate(loaded[name], TEXTS[0], max_new_tokens=40, stop=stop) for name in ("plain", "twin"))
        assert made.text == one.text and stop not in made.text
        assert made.token_ids == one.token_ids and made.finish_reason == one.finish_reason == "stop"


def test_a_single_prompt_may_do_without(loaded):
    made = generate(loaded["ngram"], TEXTS[2], max_new_tokens=10, speculate=False)
    assert made.guessed_tokens is None and made.decode_steps == 9
    with pytest.raises(UserError, match="speculate wants true or false"):
        generate(loaded["ngram"], "a", speculate="ngram")


def test_answers_of_a_conversation_are_the_same_turn_by_turn(loaded):
    histories = {}
    for way in ("plain", *WAYS):
        messages = []
        for question in ("Count to ten.", "Again.", "And backwards?"):
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": loaded[way].chat(messages, max_new_tokens=20).text or "-"})
        histories[way] = messages
    assert all(messages == histories["plain"] for messages in histories.values())


def test_the_command_line_reports_tokens_a_step(yaml, twin, tmp_path):
    done = run("--config", yaml, "--predict_data", TEXTS[2], "--max_new_tokens", "40", "--speculate", twin,
               "--output_format", "jsonl")
    made = json.loads(done.stdout)
    assert made["guessed_tokens"] >= made["accepted_tokens"] > 0 and made["decode_steps"] < 39
    assert made["tokens_per_step"] == pytest.approx((made["generated_tokens"] - 1) / made["decode_steps"], abs=1e-3)
    assert f"{made['accepted_tokens']} of {made['guessed_tokens']} guesses right" in done.stderr
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text, "speculate": i != 1}) + "\n"
                               for i, text in enumerate(TEXTS[:3])))
    done = run("--config", yaml, "--predict_file", prompts, "--output_file", out, "--max_new_tokens", "30",
               "--speculate", twin, "--speculate_tokens", "4", "--max_batch", "1")
    records = {r["index"]: r for r in map(json.loads, out.read_text().splitlines())}
    assert "guessed_tokens" not in records[1] and records[0]["accepted_tokens"] > 10
    assert "tokens a step" in done.stderr and "draft model: weights" in done.stderr
    # what is there already does not depend on how it was guessed
    again = run("--config", yaml, "--predict_file", prompts, "--output_file", out, "--max_new_tokens", "30")
    assert "nothing is left to do" in again.stderr


def test_what_will_be_done_is_told_before(yaml, draft):
    done = run("--config", yaml, "--print_config", "--speculate", draft)
    assert "speculate_tokens = 5" in done.stdout and f"speculate = '{draft}'" in done.stdout
    assert f"# speculation: up to 5 tokens a step, guessed by {draft} (1 layers, hidden 32" in done.stdout
    done = run("--config", yaml, "--print_config", "--options", "speculate=ngram", "speculate_tokens=3")
    assert "# speculation: up to 3 tokens a step, looked up in the text itself" in done.stdout
    done = run("--config", yaml, "--dry_run", "--speculate", draft)
    assert "draft model's checkpoint: " in done.stdout and "; draft model: weights " in done.stdout
    assert " together, of " in done.stdout


def test_drafts_that_cannot_be_used_are_refused_in_one_line(yaml, draft, tmp_path, qwen_vocabulary):
    line = error_line("--config", yaml, "--predict_data", "a", "--speculate", "ngrams")
    assert "speculate 'ngrams' is neither ngram nor the folder of a draft model" in line
    assert "Did you mean ngram" in line
    line = error_line("--config", yaml, "--predict_data", "a", "--speculate", tmp_path)
    assert f"--speculate: the draft model {tmp_path} cannot be used: " in line and "the draft's config.json" in line
    bare = tmp_path / "bare"
    shutil.copytree(draft, bare)
    (bare / "vocab.json").unlink()
    line = error_line("--config", yaml, "--predict_data", "a", "--speculate", bare)
    assert "no vocab.json and merges.txt beside the draft model" in line
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(qwen_vocabulary / name, bare)
    (bare / "tokenizer_config.json").unlink()
    line = error_line("--config", yaml, "--predict_data", "a", "--speculate", bare)
    assert "the draft model's tokenizer cannot be used: has 151646 tokens" in line
    line = error_line("--config", yaml, "--predict_data", "a", "--speculate", "ngram", "--speculate_tokens", "0")
    assert "speculate_tokens must be at least 1" in line
    line = error_line("--config", yaml, "--predict_data", "a", "--options", "speculat=ngram")
    assert "Did you mean speculate?" in line
    done = run("--config", yaml, "--predict_data", "a", "--max_new_tokens", "2", "--speculate_tokens", "4", "--dry_run")
    assert "speculate_tokens 4 (--speculate_tokens) has no effect without speculate" in done.stderr


def test_a_chat_at_the_terminal_guesses_too(yaml):
    screen = Terminal(command("--config", yaml, "--chat", "--speculate", "ngram", "--max_new_tokens", "30",
                              "--log_level", "debug"))
    screen.expect("> ")
    screen.type("one two one two one two\n")
    screen.expect(r"tokens a step \(\d+ of \d+ guesses right\)")
    screen.type("/quit\n")
    assert screen.end() == 0


def test_the_server_guesses_and_counts(yaml, twin):
    with serving(yaml, "--speculate", str(twin), "--max_batch", "4") as server:
        body = {"model": "random", "prompt": TEXTS[0], "max_tokens": 40, "temperature": 0}
        status, whole, _ = server.send("/v1/completions", body)
        assert status == 200
        details = whole["usage"]["completion_tokens_details"]
        assert details["accepted_prediction_tokens"] > 10 > details["rejected_prediction_tokens"]
        stop = whole["choices"][0]["text"][9:12]
        link = server.connect("/v1/completions", {**body, "stop": stop, "stream": True,
                                                  "stream_options": {"include_usage": True}})
        data = b""
        while b"[DONE]" not in data:
            data += link.recv(65536)
        chunks = [json.loads(line[6:]) for line in data.decode().splitlines() if line.startswith("data: {")]
        text = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
        full = whole["choices"][0]["text"]
        assert text == full[:full.index(stop)]
        assert [c["choices"][0]["finish_reason"] for c in chunks if c["choices"]][-1] == "stop"
        _, alone, _ = server.send("/v1/completions", {**body, "stop": stop})
        assert alone["usage"]["completion_tokens"] == chunks[-1]["usage"]["completion_tokens"] < 40
        results = {}

        def ask(text):
            results[text] = server.send("/v1/completions", {**body, "prompt": text})[1]["choices"][0]["text"]

        threads = [threading.Thread(target=ask, args=(text,)) for text in TEXTS]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        for text in TEXTS:
            assert server.send("/v1/completions", {**body, "prompt": text})[1]["choices"][0]["text"] == results[text]
        server.wait_until_idle()
        assert server.gauge("guessed_tokens_total") >= server.gauge("accepted_tokens_total") > 40
        assert server.gauge("kv_cache_free_blocks") == server.gauge("kv_cache_blocks")
