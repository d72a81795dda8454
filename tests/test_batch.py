"""Files of prompts: what is read, what is refused, how results are written, continued, and equal to single runs."""

import argparse
import io
import json
import signal
import subprocess
import time
from dataclasses import replace

import pytest
from command_fixtures import MODULE, command, environment, error_line, make_random, run
from qwen15.commands import batch_progress, prompt_file, result_file
from qwen15.commands.prompt_file import read_file
from qwen15.commands.prompts import PromptEntry
from qwen15.commands.results import JsonLines, Text, write_line
from qwen15.errors import EXIT_FAILED, UserError
from qwen15.generation.request import Step, Usage
from qwen15.generation.session import Settings

DEFAULTS = Settings(False, 1.0, 0, 1.0, 1.0, None, 64, None)


@pytest.fixture(scope="module")
def random_yaml(tmp_path_factory, small_model):
    return make_random(tmp_path_factory.mktemp("batch"), small_model)


def read(path, contents, **options):
    path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    return list(prompt_file.read_file(str(path), DEFAULTS, **options))


class TestReading:
    def test_one_prompt_a_line_blank_ones_skipped(self, tmp_path):
        entries = read(tmp_path / "p", "\ufeffone\r\n\n  two \n上海")
        assert [e.source for e in entries] == ["one", "  two ", "上海"]
        assert [e.index for e in entries] == [0, 1, 2] and entries[1].where.endswith("p:3")

    def test_json_lines_with_settings_of_their_own(self, tmp_path):
        lines = [{"prompt": "a", "max_new_tokens": 3, "stop": "x", "id": 7},
                 {"messages": [{"role": "user", "content": "b"}]},
                 {"prompt": "c", "do_sample": True, "temperature": 2, "seed": 5, "stop": ["y", "z"], "logprobs": 2}]
        entries = read(tmp_path / "p.jsonl", "\n".join(map(json.dumps, lines)))
        assert entries[0].settings.max_new_tokens == 3 and entries[0].settings.stop == ("x",) and entries[0].name == 7
        assert entries[1].source == [{"role": "user", "content": "b"}] and entries[1].settings == DEFAULTS
        assert (entries[2].settings.temperature, entries[2].settings.seed, entries[2].settings.logprobs) == (2.0, 5, 2)

    def test_the_kind_of_file_is_seen_from_its_name_or_its_first_line(self, tmp_path):
        line = '{"prompt": "a"}\n'
        assert read(tmp_path / "p", line)[0].source == "a"
        assert read(tmp_path / "p.txt", line)[0].source == line.strip()
        assert read(tmp_path / "q", '{"other": 1}\n')[0].source == '{"other": 1}'

    def test_a_conversation_is_made_of_texts_with_chat(self, tmp_path):
        assert read(tmp_path / "p", "hello", as_chat=True, system="be brief")[0].source == [
            {"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
        own = read(tmp_path / "p.jsonl", '{"prompt": "hello", "system": "mine"}', as_chat=True, system="be brief")
        assert own[0].source[0]["content"] == "mine"

    @pytest.mark.parametrize("line, fragment", [
        ('{"prompt": "a", "temprature": 1}', "Did you mean temperature?"),
        ('{"prompt": "a", "temperature": -1}', "temperature must be at least 0"),
        ('{"prompt": "a", "temperature": "1"}', "temperature wants a number"),
        ('{"prompt": "a", "top_k": 2.5}', "top_k wants a whole number"),
        ('{"prompt": "a", "max_new_tokens": 0}', "max_new_tokens must be at least 1"),
        ('{"prompt": "a", "stop": [1]}', "stop wants a text"),
        ('{"prompt": "a", "stop": ""}', "empty text"),
        ('{"prompt": "a", "logprobs": -1}', "logprobs wants"),
        ('{"prompt": "a", "prompt": "b"}', "gives 'prompt' twice"),
        ('{"prompt": "a", "seed": NaN}', "NaN is not JSON"),
        ('{"prompt": "a", "seed": -Infinity}', "-Infinity is not JSON"),
        ('{"prompt": "a", "id": 1e999}', "holds 1e999"),
        ('{"prompt": "a", "id": ' + "7" * 5000 + "}", "a number of 5000 digits"),
        ('{"prompt": ' + "[" * 99999, "nested"),
        ('{"prompt": 3}', "prompt wants a text"),
        ('{"max_new_tokens": 3}', "neither a prompt nor messages"),
        ('{"prompt": "a", "messages": []}', "both"),
        ('{"messages": []}', "list of role and content"),
        ('{"messages": [{"role": "user"}]}', "message 1"),
        ('{"prompt": "a", "system": "b"}', "Add --chat"),
        ('[1]', "wants an object"), ('{"prompt": "a"', "is not JSON"), ("plain", "is not JSON"),
        ("[" * 99999, "nested"),
    ])
    def test_a_line_that_cannot_be_used_is_named(self, tmp_path, line, fragment):
        path = tmp_path / "p.jsonl"
        with pytest.raises(UserError) as caught:
            read(path, '{"prompt": "fine"}\n' + line)
        assert fragment in str(caught.value) and f"{path}:2" in str(caught.value)

    @pytest.mark.parametrize("contents, fragment",
                             [(b"", "no prompt"), (b" \n\n", "no prompt"), (b"fine\n\xff", "p:2: is not UTF-8")])
    def test_a_file_that_cannot_be_used(self, tmp_path, contents, fragment):
        with pytest.raises(UserError, match=fragment):
            read(tmp_path / "p", contents)
        with pytest.raises(UserError, match="cannot be read"):
            list(prompt_file.read_file(str(tmp_path / "none"), DEFAULTS))


class TestResultFile:
    KEYS = ["aa", "bb", "cc"]

    def write(self, path, *indices):
        file = result_file.ResultFile(str(path), self.KEYS)
        for index in indices:
            file.write(index, {"index": index, "text": "x\u2028\n"})
        file.close()

    def test_continues_after_what_is_there(self, tmp_path):
        path = tmp_path / "out"
        self.write(path, 2, 0)
        again = result_file.ResultFile(str(path), self.KEYS)
        assert again.done == {0, 2}
        again.close()
        self.write(path, 1)
        lines = path.read_text().splitlines()
        assert [json.loads(line)["index"] for line in lines] == [2, 0,
                                                                 1] and json.loads(lines[0])["text"] == "x\u2028\n"

    def test_the_line_in_which_it_was_killed_is_cut_off(self, tmp_path):
        path = tmp_path / "out"
        self.write(path, 0, 1)
        whole = path.read_bytes()
        first = whole.index(b"\n") + 1
        for cut in range(first + 1, len(whole)):
            path.write_bytes(whole[:cut])
            file = result_file.ResultFile(str(path), self.KEYS)
            assert file.done == {0} and path.read_bytes() == whole[:first]
            file.close()

    @pytest.mark.parametrize("contents, fragment", [
        ("my notes\n", "1: is not a result"), ("my notes", "1: is not a result"), ('{"a": 1}\n', "1: is not a result"),
        ('{"index": 0, "mine": true', "1: is not a result"), ('{"index": 0', "1: is not a result"),
        ('{"index": 0, "request": "zz", "text": "', "1: is not a result"),
        ('{"index": 1e999, "request": "aa"}\n', "1: is not a result"),
        ('{"index": ' + "1" * 5000 + "}\n", "1: is not a result"), ("[" * 100000 + "\n", "1: is not a result"),
        ('{"index": 0, "request": "aa"}\n{"index": 1, "notes": "', "2: is not a result"),
        ('{"index": 7, "request": "aa"}\n', "there are 3 prompts"),
        ('{"index": 1, "request": "aa"}\n', "another prompt 1"),
        ('{"index": 0, "request": "aa"}\n{"index": 0, "request": "aa"}\n', "2: is a second result"),
    ])
    def test_what_is_not_its_own_is_left_as_it_is(self, tmp_path, contents, fragment):
        path = tmp_path / "out"
        path.write_text(contents)
        with pytest.raises(UserError, match=fragment):
            result_file.ResultFile(str(path), self.KEYS)
        assert path.read_text() == contents

    def test_two_runs_do_not_write_one_file(self, tmp_path):
        file = result_file.ResultFile(str(tmp_path / "out"), self.KEYS)
        with pytest.raises(UserError, match="another run"):
            result_file.ResultFile(str(tmp_path / "out"), self.KEYS)
        file.close()

    def test_a_full_disk_is_told(self):
        file = result_file.ResultFile("/dev/full", self.KEYS)
        with pytest.raises(UserError, match="No space left.*0 of 3 results are there") as caught:
            file.write(0, {"index": 0})
        assert caught.value.exit_code == EXIT_FAILED
        file.close()

    def test_a_folder_that_is_not_there(self, tmp_path):
        with pytest.raises(UserError, match="cannot be written"):
            result_file.ResultFile(str(tmp_path / "none" / "out"), self.KEYS)


class TestProgress:
    class Screen(io.StringIO):
        def __init__(self, tty):
            super().__init__()
            self.tty = tty

        def isatty(self):
            return self.tty

    def feed(self, tty):
        now = [0.0]
        screen = self.Screen(tty)
        progress = batch_progress.BatchProgress(4, screen, clock=lambda: now[0])
        answer = argparse.Namespace(token_ids=[1] * 10, siblings=1)
        for second in range(1, 101):
            now[0] = float(second)
            progress.take(batch_progress.Piece(second % 4, "x", answer,
                                               Usage(5, 0, 10, 1, 1) if second in (10, 60) else None))
        return screen.getvalue(), progress.finish()

    def test_on_a_terminal_one_line_is_rewritten(self):
        text, end = self.feed(True)
        assert "\n" not in text and text.count("\r") > 50
        assert text.split("\r")[10].startswith("1 of 4 prompts, 3 running, 4.0 tokens/s, 30s left")
        assert end == "2 prompts, 10 prompt tokens and 20 new tokens in 100.00 s: 0.2 new tokens/s"

    def test_elsewhere_a_line_comes_now_and_then(self):
        text, _ = self.feed(False)
        assert text.count("\n") == 3 and "\r" not in text


def records(done):
    return {r["index"]: r for r in map(json.loads, done.stdout.splitlines())}


def prompts_file(path, count=24, **settings):
    words = "sea light time water house king story".split()
    lines = [{"prompt": " ".join(words[(i * j) % 7] for j in range(1 + i % 9)), "max_new_tokens": 3 + i % 13,
              **settings}
             for i in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def test_results_equal_those_of_single_runs(random_yaml, tmp_path):
    path = tmp_path / "p.jsonl"
    lines = prompts_file(path)
    together = records(run("--config", random_yaml, "--predict_file", path, "--max_batch", 8))
    alone = records(run("--config", random_yaml, "--predict_file", path, "--max_batch", 1))
    assert len(together) == len(lines)
    for index, line in enumerate(lines):
        assert together[index]["token_ids"] == alone[index]["token_ids"]
        assert together[index]["text"] == alone[index]["text"]
        assert together[index]["prompt"] == line["prompt"]
        assert len(together[index]["token_ids"]) <= line["max_new_tokens"]


def test_a_seed_gives_the_same_texts_in_any_company(random_yaml, tmp_path):
    path, backwards = tmp_path / "p.jsonl", tmp_path / "b.jsonl"
    lines = prompts_file(path, 10, do_sample=True, temperature=3.0, seed=11)
    backwards.write_text("".join(json.dumps(line) + "\n" for line in reversed(lines[3:])))
    forward = records(run("--config", random_yaml, "--predict_file", path, "--max_batch", 4))
    back = records(run("--config", random_yaml, "--predict_file", backwards, "--max_batch", 3))
    unique = [i for i in range(3, 10) if sum(line["prompt"] == lines[i]["prompt"] for line in lines) == 1]
    assert len(unique) >= 5
    for i in unique:
        assert forward[i]["token_ids"] == back[9 - i]["token_ids"]
    assert len({tuple(r["token_ids"]) for r in forward.values()}) > 5


def test_killed_and_continued_it_holds_what_one_run_holds(random_yaml, tmp_path):
    path, out = tmp_path / "p.txt", tmp_path / "out.jsonl"
    path.write_text("".join(f"prompt number {i}\n" for i in range(150)))
    arguments = ("--config", random_yaml, "--predict_file", path, "--output_file", out, "--max_new_tokens", 20)
    process = subprocess.Popen(command(*arguments), cwd=MODULE, stderr=subprocess.PIPE, env=environment())
    while not out.exists() or out.read_bytes().count(b"\n") < 5:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = out.read_bytes()
    assert before.count(b"\n") < 150
    done = run(*arguments)
    assert "of 150 results are there" in done.stderr and done.stdout == ""
    assert out.read_bytes().startswith(before[:before.rindex(b"\n") + 1])
    results = {r["index"]: r["token_ids"] for r in map(json.loads, out.read_text().splitlines())}
    whole = records(run("--config", random_yaml, "--predict_file", path, "--max_new_tokens", 20))
    assert results == {index: r["token_ids"] for index, r in whole.items()} and len(results) == 150
    assert "nothing is left to do" in run(*arguments).stderr
    line = error_line(*arguments[:-1], 21)
    assert f"{out}:1" in line and "other settings" in line


def test_stdin_stop_strings_and_log_probabilities(random_yaml):
    plain = records(run("--config", random_yaml, "--predict_file", "-", "--max_new_tokens", 9, "--logprobs", 3,
                        stdin="hello\n"))[0]
    assert len(plain["logprobs"]) == 9 and all(len(step["top"]) == 3 for step in plain["logprobs"])
    for step, token in zip(plain["logprobs"], plain["token_ids"]):
        assert step["token_id"] == token == step["top"][0]["token_id"]
        assert step["logprob"] == pytest.approx(step["top"][0]["logprob"])
        assert step["top"][0]["logprob"] >= step["top"][1]["logprob"]
    middle = len(plain["text"]) // 2
    stop = plain["text"][middle:middle + 3]
    stopped = records(run("--config", random_yaml, "--predict_file", "-", "--max_new_tokens", 9, "--stop", stop,
                          stdin="hello\n"))[0]
    assert stopped["text"] == plain["text"][:plain["text"].index(stop)] and stopped["finish_reason"] == "stop"
    assert stopped["generated_tokens"] < 9


def test_a_bad_line_is_refused_before_anything_is_loaded(random_yaml, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "fine"}\n{"prompt": "' + "word " * 100 + '"}\n')
    line = error_line("--config", random_yaml, "--predict_file", path)
    assert "p.jsonl:2 has 10" in line and "--predict_length" in line
    path.write_text('{"prompt": "a", "do_sample": false, "temperature": 2.0}\n')
    done = run("--config", random_yaml, "--predict_file", path, "--dry_run")
    assert "temperature has no effect without do_sample" in done.stderr and "dry run" in done.stdout


@pytest.mark.parametrize("flags, fragment", [
    (["--predict_data", "a", "--predict_file", "b"], "both"),
    (["--predict_data", "a", "--output_file", "b", "--output_format", "text"], "JSON lines"),
    (["--predict_data", "a", "--logprobs", "2"], "jsonl"),
    (["--predict_data", "a", "--max_batch", "0"], "at least 1"),
    (["--predict_data", "a", "--output_format", "jsonl", "--no-echo"], "--echo"),
    (["--predict_data", "a", "--stop", ""], "empty text"),
    (["--predict_file", "nowhere.txt"], "nowhere.txt"),
])
def test_flags_that_make_no_sense(random_yaml, flags, fragment):
    assert fragment in error_line("--config", random_yaml, *flags)


def test_texts_in_order_and_without_the_prompt(random_yaml):
    arguments = ("--config", random_yaml, "--predict_data", "one", "two", "--max_new_tokens", 3)
    echoed, bare = run(*arguments).stdout, run(*arguments, "--no-echo").stdout
    assert echoed.startswith("one") and "two" in echoed
    assert bare == echoed.replace("one", "", 1).replace("\ntwo", "\n", 1)


def test_quiet_but_for_the_answer(random_yaml):
    done = run("--config", random_yaml, "--predict_data", "one", "--max_new_tokens", 3, "--log_level", "error")
    assert done.stderr == "" and done.stdout.startswith("one")
    default = run("--config", random_yaml, "--predict_data", "one", "--max_new_tokens", 3)
    assert default.stdout == done.stdout
    assert not any(word in default.stderr for word in ("WARNING", "Warning", "[ERROR]"))


# ---- several answers to one prompt ----

def several(count):
    """Answers to one prompt as a session gives them, the last one first to end."""
    from qwen15.generation.session import Answer, Piece, Prompt

    class Tokenizer:
        control_token_ids = frozenset()

        @staticmethod
        def token_bytes(token):
            return bytes([token])

    prompt = Prompt((1, 2), replace(DEFAULTS, do_sample=True, n=count), frozenset())
    answers = [Answer(Tokenizer, prompt) for _ in range(count)]
    usage = Usage(2, 0, 2, 0.5, 0.25)
    for choice in reversed(range(count)):
        for token, reason in ((ord("a") + choice, None), (ord("!"), "length")):
            text = answers[choice].take(Step(choice, token, reason, usage if reason else None))
            yield Piece(0, text, answers[choice], usage if reason else None, choice)


def test_a_prompt_with_several_answers_is_one_object_once_the_last_has_ended():
    out = io.StringIO()
    results = JsonLines([PromptEntry(0, "p.jsonl:1", "Hi", DEFAULTS)],
                        lambda _, value: write_line(out, value), True)
    for piece in several(3):
        assert out.getvalue() == ""
        results.take(piece)
    made = json.loads(out.getvalue())
    assert made["text"] == "a!" and [answer["text"] for answer in made["answers"]] == ["a!", "b!", "c!"]
    assert [answer["finish_reason"] for answer in made["answers"]] == ["length"] * 3


def test_several_answers_stream_one_after_the_other_each_behind_its_prompt():
    out = io.StringIO()
    text = Text(out, ["Hi: "], [3])
    for piece in several(3):
        text.take(piece)
    text.close()
    assert out.getvalue() == "Hi: a!\nHi: b!\nHi: c!\n"


@pytest.mark.parametrize("line, message", [
    ('{"prompt": "x", "n": 0}', "n wants a whole number from 1 to 128, not 0"),
    ('{"prompt": "x", "logit_bias": {"a": 1}}', "logit_bias wants token ids with a number each"),
    ('{"prompt": "x", "min_p": 1.5}', "min_p"),
    ('{"prompt": "x", "presence_penalty": 3}', "presence_penalty"),
    ('{"prompt": "x", "prompt_logprobs": -1}', "prompt_logprobs wants a whole number from 0 to 1000"),
])
def test_settings_of_sampling_are_checked_with_their_line(tmp_path, line, message):
    path = tmp_path / "p.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UserError, match=message):
        list(read_file(str(path), DEFAULTS))


def test_a_prompt_reaches_another_rank_with_all_its_settings():
    from qwen15.generation.session import Prompt

    settings = DEFAULTS.changed({"logit_bias": {"7": -5, "3": float("-inf")}, "n": 4, "stop": ["a"], "min_p": 0.1,
                                 "no_repeat_ngram_size": 3, "prompt_logprobs": 2})
    prompt = Prompt((1, 2), settings, frozenset({9, 4}), "p:1", 3)
    assert Prompt.from_json(json.loads(json.dumps(prompt.to_json()))) == prompt
    assert settings.params(1, 2).logit_bias == ((3, float("-inf")), (7, -5.0))
