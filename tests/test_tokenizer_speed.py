"""How fast the tokenizer is beside Qwen2TokenizerFast, in one run: pytest -m slow -s tests/test_tokenizer_speed.py"""

import os
import random
import statistics
import time

import pytest
from qwen15.text.tokenizer import Qwen2Tokenizer
from tokenizer_corpus import corpus

pytestmark = pytest.mark.slow
ROUNDS = 7


def measure(*calls):
    """Median seconds of each call; they take turns, so that whatever else runs on the machine meets all of them."""
    seconds = [[] for _ in calls]
    for _ in range(ROUNDS):
        for times, call in zip(seconds, calls):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


@pytest.fixture(scope="module")
def setup(qwen_vocabulary):
    """The tokenizers and 4.5 MB of chats about code, Chinese and emoji, in messages of 1500 characters."""
    transformers = pytest.importorskip("transformers")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    files = str(qwen_vocabulary / "vocab.json"), str(qwen_vocabulary / "merges.txt")
    ours = Qwen2Tokenizer(*files)
    theirs = transformers.Qwen2TokenizerFast(*files, additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    kinds = corpus(lambda index: ours.decode([index]), ours.vocab_size)
    messages = []
    for kind, size in (("code and English", 2_000_000), ("Chinese", 600_000), ("emoji", 60_000), ("combining", 60_000)):
        text = "".join(kinds[kind])[:size]
        messages += ["<|im_start|>user\n" + text[place:place + 1500] + "<|im_end|>\n"
                     for place in range(0, len(text), 1500)]
    random.Random(0).shuffle(messages)
    return ours, theirs, messages


def report(name, megabytes, seconds):
    rates = ", ".join(f"{label} {megabytes / value:.1f} MB/s" for label, value in seconds.items())
    ratio = seconds["Qwen2TokenizerFast"] / seconds["ours"]
    print(f"\n{name}, {megabytes:.1f} MB: {rates}; {ratio:.1f} x")
    return ratio


def test_a_whole_text_is_at_least_8_times_as_fast(setup):
    ours, theirs, messages = setup
    text = "".join(messages)
    assert ours.encode(text) == theirs.encode(text)
    own, other = measure(lambda: ours.encode(text), lambda: theirs.encode(text))
    assert report("whole text", len(text.encode()) / 1e6, {"ours": own, "Qwen2TokenizerFast": other}) >= 8


def test_a_batch_is_at_least_3_times_as_fast(setup):
    ours, theirs, messages = setup
    assert ours(messages).input_ids == theirs(messages)["input_ids"]
    own, other = measure(lambda: ours(messages), lambda: theirs(messages))
    assert report("batch", sum(len(text.encode()) for text in messages) / 1e6,
                  {"ours": own, "Qwen2TokenizerFast": other}) >= 3


def test_loading_takes_less_than_a_second(setup):
    ours, _, _ = setup
    seconds, = measure(lambda: Qwen2Tokenizer(ours.vocab_file, ours.merges_file))
    print(f"\nloading: {seconds:.2f} s")
    assert seconds < 1
