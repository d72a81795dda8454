"""What many tests need: random models as transformers would save them, the small real model, the real vocabulary."""

import collections
import gc
import importlib.util
import os
import random
import signal
import sys
from pathlib import Path

import fork_server
import pytest

os.environ.setdefault("GLOG_v", "3")  # MindSpore's warnings would bury the tests' own output
if "PYTEST_XDIST_WORKER" in os.environ:  # tests run side by side: each has one core
    os.environ.setdefault("QWEN15_THREADS", "1")
    os.environ.setdefault("QWEN15_READING", "outer,4096,2")  # else the first test of a machine would measure
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts its background jobs with Ctrl-C ignored, and what the tests start would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
MODULE = ROOT / "research" / "qwen1_5"
DATA = Path(os.environ.get("QWEN15_TEST_DATA", ROOT / "models"))

sys.path.insert(0, str(MODULE))


ALONE = ("test_startup", "test_tokenizer_speed")
"""Files whose tests measure time: nothing runs beside them. Of a run in two parts this
is the one that the environment variable QWEN15_TEST_PART calls `alone`; the other is `beside`."""

LONGEST = ("test_ascend_graphs", "test_bench", "test_tokenizer", "test_docs", "test_ascend_emulation",
           "test_launch_faults", "test_launch_machines", "test_repl", "test_speculate_runs", "test_tensor_parallel",
           "test_network", "test_launch_predict", "test_launch_bench", "test_kernels", "test_launch",
           "test_launch_cluster", "test_tokenizer_mindformers", "test_serve", "test_convert_faults",
           "test_quantised_network", "test_hub", "test_batch", "test_ascend_plugin", "test_api", "test_predict",
           "test_calibration", "test_types", "test_launch_speculate", "test_launch_chat")
"""Files that take longest, longest first."""


EVERY = int(os.environ.get("QWEN15_TEST_EVERY", "1"))
"""One case in so many of each test runs: sanitizers and emulators are slow. Which ones, QWEN15_TEST_SEED says."""
if EVERY > 1:
    os.environ.setdefault("QWEN15_TEST_SEED", str(random.randrange(10 ** 6)))  # the same in all processes of this run


def pytest_configure(config):
    """Processes that run tests side by side share the servers that fork (fork_server.py), and take files in the order
    that is given below: xdist's own begins with those that have most tests, which are the short ones."""
    fork_server.folder()
    config.option.loadscopereorder = False


def pytest_report_header():
    """What brings a run of some cases back."""
    return f"QWEN15_TEST_EVERY={EVERY} QWEN15_TEST_SEED={os.environ['QWEN15_TEST_SEED']}" if EVERY > 1 else None


def some_cases(items, every, seed):
    """One in `every` cases of each test, and so many more that every value of each parameter is there once."""
    cases = collections.defaultdict(list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
    for function, of_it in cases.items():
        random.Random(f"{seed} {function}").shuffle(of_it)
        seen = set()
        for number, item in enumerate(of_it):
            values = {(name, repr(value)) for name, value in item.callspec.params.items()} \
                if hasattr(item, "callspec") else {function}
            if number * every < len(of_it) or not values <= seen:
                yield item
            seen |= values


def pytest_ignore_collect(collection_path):
    """Read only the files of the part that is wanted."""
    part = os.environ.get("QWEN15_TEST_PART")
    if part and collection_path.suffix == ".py" and (collection_path.stem in ALONE) != (part == "alone"):
        return True
    return None


def pytest_collection_modifyitems(config, items):
    """Begin with the longest files, so that no process waits for another."""
    if EVERY > 1:
        kept = set(some_cases(items, EVERY, os.environ["QWEN15_TEST_SEED"]))
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]
    place = {stem: number for number, stem in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(scope="module", autouse=True)
def old_objects_are_not_looked_through():
    """MindSpore collects garbage whenever it compiles, which took a second beside the objects of torch and
    transformers: those that are there before a file's tests stay out of it."""
    gc.collect()
    gc.freeze()


def require(*modules: str) -> None:
    """Skip this test, or this file, where one of the modules is not installed. Imports none of them."""
    for name in modules:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed", allow_module_level=True)


@pytest.fixture(scope="session")
def module_dir() -> Path:
    """research/qwen1_5, where a user runs the scripts."""
    return MODULE


@pytest.fixture(scope="session")
def small_model() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder."""
    folder = DATA / "SmolLM2-135M-Instruct"
    if not (folder / "model.safetensors.index.json").exists():
        pytest.skip(f"no small model in {folder}: run scripts/test.sh")
    return folder


@pytest.fixture(scope="session")
def qwen_vocabulary() -> Path:
    """Folder with the real Qwen vocab.json and merges.txt."""
    folder = DATA / "qwen-vocabulary"
    if not (folder / "vocab.json").exists():
        pytest.skip(f"no vocabulary in {folder}: run scripts/test.sh")
    return folder


def random_model(folder: Path, *, seed: int = 0, dtype: str = "float32", max_shard_size: str = "5GB", **sizes):
    """Save a random Qwen2ForCausalLM to `folder` and return it (float32, evaluation mode), its weights rounded to
    `dtype`.

    Weights are large enough that logits differ clearly between tokens; norms and biases are random as well, so that a
    network that drops one gives other results.
    """
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = {"vocab_size": 199, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3,
              "num_attention_heads": 6,
              "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": False,
              "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1}
    config.update(sizes)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**config)).eval()
    generator = torch.Generator().manual_seed(seed)
    kind = getattr(torch, dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.2 if parameter.ndim == 1 else 1.5 / parameter.shape[1] ** 0.5
            values = torch.randn(parameter.shape, generator=generator) * scale + (1.0 if "norm" in name else 0.0)
            parameter.copy_(values.to(kind).float())
    model.generation_config.eos_token_id = None
    saved = transformers.Qwen2ForCausalLM(model.config).to(kind)
    saved.load_state_dict(model.state_dict())
    saved.save_pretrained(folder, max_shard_size=max_shard_size)
    return model
