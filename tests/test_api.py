"""The Python interface, as its documentation shows it."""

import doctest
import os
import re
import select
import subprocess
import sys
import threading
import warnings
from dataclasses import replace

import numpy as np
import pytest
import qwen15
from command_fixtures import MODULE, make_random
from conftest import ROOT
from qwen15 import UserError, api, generate, load, ops


@pytest.fixture(scope="module")
def model(tmp_path_factory, small_model):
    folder = tmp_path_factory.mktemp("api")
    with load(folder / "random" if make_random(folder, small_model) else "", seq_length=256,
              device_target="CPU") as loaded:
        yield loaded


def test_the_documented_example_runs(small_model, tmp_path):
    names = {"checkpoint": str(small_model), "target": str(tmp_path / "model.safetensors")}
    result = doctest.testmod(api, extraglobs=names)
    assert result.attempted >= 6 and result.failed == 0


def python_blocks(page):
    """The page's Python examples, in order, as one program."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / page).read_text("utf-8"), re.M | re.S))


def test_the_examples_of_the_page_run(small_model, tmp_path):
    program = python_blocks("python_en.md").replace("models/SmolLM2-135M-Instruct", str(small_model))
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": str(MODULE)})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == " Paris.\n\n length 5 4".splitlines()[0] and "length 5 4" in done.stdout
    assert "Rome" in done.stdout and "top_p" in done.stdout and (tmp_path / "converted").is_dir()


def test_both_languages_show_the_same_examples():
    english, chinese = (re.sub(r" *#.*", "", python_blocks(page)) for page in ("python_en.md", "python.md"))
    assert english == chinese


def test_the_name_stays_a_function_whatever_was_imported_before():
    code = (
        "import qwen15.conversion.hugging_face, qwen15\nfrom qwen15 import convert\nassert callable(convert), convert\n"
            "assert set(qwen15.__all__) >= {'load', 'generate', 'convert'}\nqwen15.nothing")
    done = subprocess.run([sys.executable, "-c", code], cwd=MODULE, capture_output=True, text=True)
    assert "has no attribute 'nothing'" in done.stderr and "AssertionError" not in done.stderr


def test_several_prompts_equal_one_at_a_time_and_the_stream(model):
    texts = ["one", "two three four", "上海"]
    together = generate(model, texts, max_new_tokens=6)
    for text, one in zip(texts, together):
        alone = generate(model, text, max_new_tokens=6)
        assert alone.token_ids == one.token_ids and alone.text == one.text == "".join(model.stream(text,
                                                                                                   max_new_tokens=6))
        assert one.prompt_tokens == len(model.tokenizer.encode(text)) and one.finish_reason in ("stop", "length")


def test_log_probabilities_and_seed(model):
    one, two = (generate(model, "hello", max_new_tokens=4, do_sample=True, temperature=2.0, seed=3, logprobs=2)
                for _ in range(2))
    assert one.token_ids == two.token_ids and len(one.logprobs) == 4
    assert np.exp(one.logprobs[0]["logprob"]) <= 1


def test_mistakes(model, small_model, tmp_path):
    with pytest.raises(TypeError, match="Did you mean temperature"):
        generate(model, "a", temprature=1.0)
    with pytest.raises(UserError, match="temperature must be at least 0"):
        generate(model, "a", temperature=-1)
    with pytest.raises(UserError, match="do_sample True contradicts temperature 0"):
        generate(model, "a", temperature=0, do_sample=True)
    with pytest.raises(UserError, match=r"this is a conversation.*Use model.chat\(messages\)."):
        generate(model, [{"role": "user", "content": "a"}])
    with pytest.raises(UserError, match=r"this is a conversation.*Use model.chat\(messages\)."):
        generate(model, {"role": "user"})
    for no_text in (3, ["a", 3]):
        with pytest.raises(TypeError, match="a prompt is a text, not int"):
            generate(model, no_text)
    with pytest.raises(UserError, match="is empty"):
        generate(model, "")
    with pytest.raises(UserError, match="prompt 2 is empty"):
        generate(model, ["a", ""])
    with pytest.raises(UserError, match="Did you mean seq_length"):
        load(small_model, seq_lenght=3)
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "nothing")
    with pytest.raises(UserError, match="slices are for MindSpore"):
        qwen15.convert(small_model, tmp_path / "x", model_parallel=2, to_hugging_face=True)


def test_a_closed_model_says_so(model):
    other = api.Model(model._open())
    other.close()
    other.close()
    with pytest.raises(ValueError, match="closed"):
        generate(other, "a")


def test_the_programs_own_warnings_come_as_before_loading(model, small_model):
    before = list(warnings.filters)
    with load(small_model, seq_length=64, num_blocks=2, device_target="CPU"):
        assert warnings.filters == before
    with pytest.warns(RuntimeWarning, match="the program's own"):
        warnings.warn("the program's own", RuntimeWarning, stacklevel=1)


THREADS = """
import os, sys
from qwen15 import generate, load

def kernel_threads():
    # MindSpore starts threads of its own as well, so count those that come with the first prompt.
    return len(os.listdir("/proc/self/task"))

counts = []
for threads in (1, 5, 3):
    with load(sys.argv[1], seq_length=64, num_blocks=2, device_target="CPU", runtime_num_threads=threads) as model:
        generate(model, "one two three", max_new_tokens=2)
        counts.append(kernel_threads())
print(counts[1] - counts[0], counts[2] - counts[1])
"""


def test_the_kernels_run_on_as_many_threads_as_the_setting_says(small_model):
    if ops.decide()[0] == "reference":
        pytest.skip("the reference operators have no threads of their own")
    done = subprocess.run([sys.executable, "-c", THREADS, str(small_model)], cwd=MODULE, capture_output=True, text=True,
                          env={**os.environ, "QWEN15_THREADS": "2"})
    assert done.stdout.split() == ["4", "-2"], done.stdout + done.stderr


def test_a_text_is_a_question(model):
    asked = model.chat("Say hello.", max_new_tokens=5, do_sample=False)
    assert asked == replace(model.chat([{"role": "user", "content": "Say hello."}], max_new_tokens=5, do_sample=False),
                            prefill_s=asked.prefill_s, decode_s=asked.decode_s, cached_tokens=asked.cached_tokens)
    assert len(asked.token_ids) == 5


def test_temperature_asks_for_sampling_and_temperature_0_for_none(model):
    likeliest = generate(model, "hello", max_new_tokens=8)
    assert generate(model, "hello", max_new_tokens=8, temperature=0).token_ids == likeliest.token_ids
    drawn = {generate(model, "hello", max_new_tokens=8, temperature=5.0, seed=seed).token_ids for seed in range(3)}
    assert len(drawn) == 3
    assert generate(model, "hello", max_new_tokens=8, temperature=5.0, do_sample=False).token_ids == likeliest.token_ids


def test_threads_take_turns_on_one_model_and_on_two(model, small_model):
    with load(small_model, seq_length=256, num_blocks=32, device_target="CPU") as other:
        models = (model, other)
        expected = [generate(each, "one two", max_new_tokens=12).token_ids for each in models]
        texts = [generate(each, "one two", max_new_tokens=12).text for each in models]
        wrong = []

        def work(number):
            each = number % 2
            for _ in range(3):
                if generate(models[each], "one two", max_new_tokens=12).token_ids != expected[each]:
                    wrong.append(("generate", number))
                if "".join(models[each].stream("one two", max_new_tokens=12)) != texts[each]:
                    wrong.append(("stream", number))

        threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not any(thread.is_alive() for thread in threads), "they wait for each other"
        assert wrong == []


def test_a_stream_that_is_left_early_gives_its_turn_and_its_blocks_back(model):
    expected = generate(model, "one two", max_new_tokens=12).token_ids
    first = model.stream("one two", max_new_tokens=200)
    next(first)
    assert generate(model, "one two", max_new_tokens=12).token_ids == expected
    first.close()
    assert generate(model, "one two", max_new_tokens=12).token_ids == expected


def test_a_forked_child_is_told_instead_of_waiting_for_ever(model):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        said = []
        for call in (lambda: generate(model, "a", max_new_tokens=2), lambda: next(model.stream("a")),
                     lambda: load("anything")):
            try:
                call()
            except UserError as error:
                said.append(str(error))
        os.write(write, "\n".join(said).encode())
        os._exit(0)
    os.close(write)
    assert select.select([read], [], [], 60)[0], "the child waits"
    lines = os.read(read, 4096).decode().splitlines()
    os.close(read)
    os.waitpid(child, 0)
    assert len(lines) == 3 and all("was forked off" in line and "spawn" in line for line in lines)
