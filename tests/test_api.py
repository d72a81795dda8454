"""The Python interface, as its documentation shows it."""

import doctest
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import qwen15
from command_fixtures import MODULE, make_random
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
    with pytest.raises(UserError, match="temperature must be above 0"):
        generate(model, "a", temperature=0)
    with pytest.raises(UserError, match="is empty"):
        generate(model, "")
    with pytest.raises(UserError, match="prompt 2 is empty"):
        generate(model, ["a", ""])
    with pytest.raises(UserError, match="Did you mean seq_length"):
        load(small_model, seq_lenght=3)
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "nothing")
    with pytest.raises(UserError, match="to_hugging_face"):
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
