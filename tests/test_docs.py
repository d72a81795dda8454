"""Every command in the documents is run, in the order of the pages, by a small model in place of a large one; every
link leads somewhere."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import warm_commands
import yaml
from checkpoint_fixtures import dims, write_model
from conftest import MODULE, ROOT
from quantised_fixtures import Form, write_quantised
from qwen15 import naming

PAGES = [ROOT / "README.md", *sorted(MODULE.glob("README*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
SIZES = dims(hidden=64, intermediate=96, layers=2, heads=8, kv_heads=8, head_dim=8, vocab=152064)

NOT_RUN = (
    (r"load_checkpoint Qwen/", "needs a hub"),
    (r"scripts/(quickstart|test)\.sh|^source \.venv|^pip install", "installs"),
    (r"Ascend/|ascend-check|14b\.ckpt|/path/72b ", "needs a 910B card"),
    (r'run_qwen1_5\.py \.\.\."', "stands for a command that is given in full elsewhere on its page"),
    (r"^docker ", "needs a container engine"),
    (r"qwen15 serve|^curl ", "the server's own tests do that"),
    (r"bench (numerics|serve)|small-int8", "takes minutes with a real model"),
    (r"bench (scaling|neighbour|decode --(dtype|size)|prefill)",
     "takes minutes; tests/test_bench.py runs each on less"),
    (r"14b-int4", "takes a file of 8.5 GB and minutes"),
)
"""Pattern of a command -> why it is not run here."""

IN_PLACE = (
    (r"^bash \.\./\.\./scripts/msrun_launcher\.sh .*--auto_trans_ckpt False", "/path/model_dir", "/path/slices"),
    (r"transform_ckpt\.py", "/path/model_dir", "/path/split"),
    (r"convert_weight\.py", "/path/model_dir --model_parallel", "/path/new_slices --model_parallel"),
    ("", "<torch_ckpt_dir>", "/path/hf_model"),
    ("", "<mindspore_ckpt_path>", "/path/converted.ckpt"),
)
"""Pattern of a command, what it names, and what takes its place; then /path is a folder of the test."""

MODELS = ("hf_model", "Qwen1.5-0.5B-Chat", "Qwen1.5-72B-Chat", "Qwen2.5-7B-Instruct")


def commands():
    """(page, command) of every shell block, each command once, continued lines joined."""
    seen = {}
    for page in PAGES:
        for _, block in re.findall(r"^( *)```(?:shell|bash)\n(.*?)^ *```", page.read_text("utf-8"), re.M | re.S):
            for line in re.sub(r"\\\n\s*", " ", block).splitlines():
                line = re.sub(r" # .*", "", " ".join(line.split()))
                if line and not line.startswith("#"):
                    seen.setdefault(line, page.relative_to(ROOT).as_posix())
    return [(page, command) for command, page in seen.items()]


SLOW = r"msrun_launcher\.sh"
"""Commands that run with the slow tests: several ranks. tests/test_launch_predict.py has the README's with the real
vocabulary, and tests/test_launch_chat.py a conversation with a smaller model."""

COMMANDS = commands()


@pytest.fixture(scope="module")
def world(tmp_path_factory, qwen_vocabulary):
    """A checkout whose YAML files describe a model of 40 MB, with such models where the documents have theirs."""
    folder = tmp_path_factory.mktemp("docs")
    repo, paths = folder / "repo", folder / "path"
    module = repo / "research" / "qwen1_5"
    for made in (module, repo / "docs", repo / "models", folder / "bin", folder / "home", paths):
        made.mkdir(parents=True)
    (repo / "scripts").symlink_to(ROOT / "scripts")
    shutil.copytree(ROOT / "docs" / "tables", repo / "docs" / "tables")
    for source in MODULE.iterdir():
        if source.name.startswith("predict_") and "smollm2" not in source.name:
            (module / source.name).write_text(shrunk(source), "utf-8")
        elif source.suffix in (".py", ".yaml") or source.name == "qwen15":
            (module / source.name).symlink_to(source)
    model = paths / MODELS[0]
    write_model(model, SIZES, finite_contents(), shards=2, eos_token_id=151643, bos_token_id=151643,
                max_position_embeddings=32768)
    (model / "tokenizer_config.json").unlink()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(qwen_vocabulary / name, model)
    for name in MODELS[1:]:
        (paths / name).symlink_to(model)
    (repo / "models" / "Qwen1.5-0.5B-Chat").symlink_to(model)
    write_quantised(paths / "Qwen1.5-14B-Chat-GPTQ-Int4", Form(biases=True))
    (module / "Qwen1.5-72B").symlink_to(model)
    (module / "prompts.txt").write_text("你好\n帮助我\n", "utf-8")
    (module / "calibration.txt").write_text("帮助我制定一份去上海的旅游攻略。\n" * 40, "utf-8")
    (paths / "SmolLM2-135M-Instruct").symlink_to(qwen_vocabulary.parent / "SmolLM2-135M-Instruct")
    command = folder / "bin" / "qwen15"
    command.write_text(f'#!/bin/sh\nPYTHONPATH={MODULE} exec python -m qwen15 "$@"\n')
    command.chmod(0o755)
    for target, more in (("your.ckpt", ()), ("transform.ckpt", ()), ("model_dir/model.safetensors", ()),
                         ("slices", ("--model_parallel", "4"))):
        done = run(folder, f"python convert_weight.py --torch_ckpt_dir /path/hf_model --mindspore_ckpt_path "
                           f"/path/{target} " + " ".join(more))
        assert done.returncode == 0, done.stderr
    return folder


def shrunk(source):
    """A shipped YAML with this test's sizes: short answers, float32, the CPU."""
    config = yaml.safe_load(source.read_text("utf-8"))
    config["model"]["model_config"].update(
        hidden_size=SIZES.hidden_size, intermediate_size=SIZES.intermediate_size, num_layers=SIZES.num_layers,
        num_heads=SIZES.num_heads,
        n_kv_heads=SIZES.num_kv_heads, vocab_size=SIZES.vocab_size, tie_word_embeddings=False, seq_length=128,
        num_blocks=64,
        block_size=16, max_decode_length=48)
    config["context"]["device_target"] = "CPU"
    return yaml.safe_dump(config, allow_unicode=True)


def finite_contents():
    """Weights a network can run with: normal numbers in bfloat16, norms near 1."""
    rng = np.random.default_rng(0)
    contents = {}
    for weight in naming.weights(SIZES):
        values = rng.standard_normal(weight.shape).astype(np.float32) * 0.2 + (1 if "norm" in weight.hf else 0)
        contents[weight.hf] = ("BF16", weight.shape, (values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    return contents


def run(folder, command):
    """Run a command as a reader does, in the folder its page names, with something typed for those that ask."""
    for pattern, old, new in IN_PLACE:
        if re.search(pattern, command):
            command = command.replace(old, new)
    command = command.replace("/path/", f"{folder}/path/")
    from_root = re.match(r"python research/|PYTHONPATH=|cd research|qwen15 (predict --load_checkpoint models/|memory "
                         r"--update)", command)
    env = {**os.environ, "HOME": str(folder / "home"), "XDG_STATE_HOME": str(folder / "home"),
           "LOG_MF_PATH": str(folder / "home"),
           "PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    cwd, typed = folder / "repo" if from_root else folder / "repo/research/qwen1_5", "你好\n/quit\n"
    words = shlex.split(command)
    if words[0] in ("python", "qwen15") and not set(words) & {"-c", "&&", "|", ">", "doctor"}:
        if words[0] == "qwen15":
            words[:1] = ["python", "-m", "qwen15"]
        return warm_commands.run(words[1:], cwd, env, typed, 240)
    return subprocess.run(["bash", "-c", command], cwd=cwd, env=env, input=typed, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, encoding="utf-8", errors="replace", timeout=240)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("page, command", [
    pytest.param(page, command, id=f"{page}: {command}", marks=[pytest.mark.slow] if re.search(SLOW, command) else [])
    for page, command in COMMANDS])
def test_the_command_works(page, command, world):
    for pattern, why in NOT_RUN:
        if re.search(pattern, command):
            pytest.skip(why)
    if "SmolLM2" in command and not (world / "path" / "SmolLM2-135M-Instruct" / "config.json").exists():
        pytest.skip("no small model: run scripts/test.sh")
    if "/path/your.bin" in command:
        pytest.importorskip("torch")
    done = run(world, command)
    assert done.returncode == 0, done.stderr[-3000:]
    if "run_qwen1_5.py" in command and "prompts.txt" not in command:
        assert done.stdout.strip()


def test_reasons_for_not_running_are_needed():
    for pattern, _ in NOT_RUN:
        assert any(re.search(pattern, command) for _, command in COMMANDS), pattern
    assert sum(not any(re.search(pattern, c) for pattern, _ in NOT_RUN) for _, c in COMMANDS) > 25


@pytest.mark.parametrize("page", PAGES, ids=[page.relative_to(ROOT).as_posix() for page in PAGES])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), target


def test_the_files_that_contributing_names_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    places = (ROOT, MODULE, MODULE / "qwen15", MODULE / "qwen15" / "checkpoint")
    named = re.findall(r"`([\w/*.]+\.(?:py|sh|cpp|md))`", text)
    assert len(named) > 30
    assert [name for name in named if not any(list(place.glob(name)) for place in places)] == []
