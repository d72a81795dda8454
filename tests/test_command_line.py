"""Every command answers a wrong flag or value in one line that says what was meant, and --help with examples."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import MODULE, ROOT
from qwen15 import __main__ as qwen15_main
from qwen15.errors import run_main
from qwen15.verbs import GROUPS, VERBS, parsers

sys.path.insert(0, str(ROOT / "scripts"))
import flags_page  # noqa: E402

MISTAKES = [
    ("predict --temprature 0.7", "qwen15 predict: --temprature is not one of its flags. Did you mean --temperature?"),
    ("make-yaml --chekpoint x", "qwen15 make-yaml: --chekpoint is not one of its flags. Did you mean --checkpoint?"),
    ("predict --temperature 0,7", "--temperature: wants a number, not '0,7'. Did you mean 0.7?"),
    ("predict --do_sample perhaps", "--do_sample: wants True or False, not 'perhaps'"),
    ("predict --do_sample yes", "--do_sample: wants True or False, not 'yes'. Did you mean True?"),
    ("predict --do_sample Ture", "--do_sample: wants True or False, not 'Ture'. Did you mean True?"),
    ("predict --seed abc", "--seed: wants a whole number, not 'abc'"),
    ("predict --max_new_tokens 1e3", "--max_new_tokens: wants a whole number, not '1e3'. Did you mean 1000?"),
    ("predict --max_new_tokens 1,000.5", "--max_new_tokens: wants a whole number, not '1,000.5'"),
    ("predict --top_k " + "9" * 5000, "--top_k: 5000 digits are too many for any number here"),
    ("predict --top_k \u0663", "--top_k: wants a whole number, not '\u0663'. Did you mean 3?"),
    ("predict --top-k 3", "qwen15 predict: --top-k is not one of its flags. Did you mean --top_k?"),
    ("predict \u2014top_k 3", "qwen15 predict: '\u2014top_k' begins with U+2014, which only looks like a hyphen. "
                              "Did you mean --top_k?"),
    ("predict --output_format jason", "--output_format: wants one of text, jsonl, not 'jason'. Did you mean jsonl?"),
    ("predict --predict_data", "--predict_data: a value is missing. "
                               "One that begins with a hyphen is written with an equals sign: --predict_data=-..."),
    ("predict stray", "qwen15 predict: 'stray' is not expected. Put words that belong together in quotes."),
    ("predict --tempera 0.7", "qwen15 predict: --tempera is not one of its flags. Did you mean --temperature?"),
    ("convert --dtype bf16", "--dtype: wants one of auto, bfloat16, float16, float32, not 'bf16'. "
                             "Did you mean bfloat16?"),
    ("convert --model_parallel two", "--model_parallel: wants a whole number, not 'two'"),
    ("convert-reversed --torch_ckpt_pth x", "qwen15 convert-reversed: --torch_ckpt_pth is not one of its flags. "
                                            "Did you mean --torch_ckpt_path?"),
    ("transform --src_ckpt x", "qwen15 transform: --src_ckpt is not one of its flags. Did you mean --src_ckpt_dir?"),
    ("make-yaml", "qwen15 make-yaml: --checkpoint is missing. qwen15 make-yaml --help shows what it is."),
    ("doctor --prot 1", "qwen15 doctor: --prot is not one of its flags. Did you mean --port?"),
    ("doctor --port x", "--port: wants a whole number, not 'x'"),
    ("memory --config", "--config: a value is missing. "
                        "One that begins with a hyphen is written with an equals sign: --config=-..."),
    ("convert", "--torch_ckpt_dir: is not given, and ./config.json is not there. Give the model that is to be "
                "converted."),
    ("convert-reversed", "--mindspore_ckpt_path: is not given, and transform.ckpt is not there. Give the model that is "
                         "to be converted."),
    ("bench", "qwen15 bench: WHAT is missing. qwen15 bench --help shows what it is."),
    ("bench decdoe", "Did you mean decode?"),
    ("bench decode --batch 0", "--batch: wants at least 1, not 0"),
    ("bench decode --batch x", "--batch: wants a whole number, not 'x'"),
    ("ascend-check --dtype int8", "--dtype: wants one of"),
    ("prdict", "qwen15: 'prdict' is not one of its commands. Did you mean predict?"),
]


@pytest.mark.parametrize("line, said", MISTAKES, ids=[line[:40] for line, _ in MISTAKES])
def test_a_mistake_gets_one_line_and_no_usage(line, said, capsys):
    assert run_main(qwen15_main.main, line.split(" ")) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert said in printed.err


@pytest.mark.parametrize("script, arguments, said", [
    ("run_qwen1_5.py", ["--temprature", "1"], "error: run_qwen1_5.py: --temprature is not one of its flags. "
                                              "Did you mean --temperature?\n"),
    ("convert_weight.py", ["--dtype", "bf16"], "error: --dtype: wants one of auto, bfloat16, float16, float32, not "
                                               "'bf16'. Did you mean bfloat16?\n"),
    ("convert_reversed.py", ["x"], "error: convert_reversed.py: 'x' is not expected. "
                                   "Put words that belong together in quotes.\n"),
    ("transform_ckpt.py", ["--model_parallel", "-"], "error: --model_parallel: wants a whole number, not '-'\n"),
])
def test_the_scripts_say_the_same_under_their_own_names(script, arguments, said):
    done = subprocess.run([sys.executable, script, *arguments], cwd=MODULE, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


# --- help

def test_every_verb_stands_in_the_overview(capsys):
    for arguments in ([], ["help"], ["--help"], ["-h"]):
        assert qwen15_main.main(arguments) == 0
        shown = capsys.readouterr().out
        assert all(f"\n{group}:\n" in shown for group in GROUPS)
        assert all(f"  {name} " in shown and verb.what in shown for name, verb in VERBS.items())


def test_the_version_is_the_packages(capsys):
    for argument in ("--version", "-V", "version"):
        assert qwen15_main.main([argument]) == 0
        assert capsys.readouterr().out == f"qwen15 {qwen15_main.version()}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_help_begins_with_one_line_of_usage_and_ends_with_examples(verb, capsys):
    shown = []
    for arguments in ([verb, "--help"], ["help", verb]):
        assert run_main(qwen15_main.main, arguments) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    lines = shown[0].splitlines()
    first = {"bench": "WHAT", "completion": "SHELL", "launch": "COMMAND [WORKER_NUM]"}.get(verb, "[flags]")
    assert lines[0].startswith(f"usage: qwen15 {verb} {first}")
    assert lines[1] == "" or verb == "launch"
    assert f"  qwen15 {verb}" in shown[0][shown[0].index("examples:"):]
    assert lines[-1].startswith("exit codes: ") and "0 " in lines[-1]


def test_every_flag_has_a_sentence():
    for name, parser in parsers():
        for action in parser._actions:
            assert action.help, (name, action.option_strings)


@pytest.mark.parametrize("language, name", [("en", "flags_en.md"), ("zh", "flags.md")])
def test_the_page_of_all_flags_is_current(language, name):
    assert (ROOT / "docs" / name).read_text("utf-8") == flags_page.page(language), "run python scripts/flags_page.py"


# --- completion

@pytest.fixture(scope="module")
def completion(tmp_path_factory):
    """What bash offers for words, the last of which is not complete."""
    pytest.importorskip("shtab")
    script = tmp_path_factory.mktemp("completion") / "qwen15.bash"
    script.write_text(subprocess.run([sys.executable, "-m", "qwen15", "completion", "bash"], cwd=MODULE, check=True,
                                     capture_output=True, text=True).stdout)

    def offered(*words):
        program = (f"source {script}; COMP_WORDS=(\"$@\"); COMP_CWORD=$(($# - 1)); _shtab_qwen15; "
                   'printf "%s\\n" "${COMPREPLY[@]}"')
        return subprocess.run(["bash", "-c", program, "bash", "qwen15", *words], capture_output=True, text=True,
                              check=True).stdout.split()

    return offered


@pytest.mark.parametrize("words, expected", [
    (["pre"], ["predict"]), (["con"], ["convert", "convert-reversed"]), (["predict", "--temp"], ["--temperature"]),
    (["predict", "--do_sample", ""], ["True", "False"]), (["bench", "deco"], ["decode"]),
    (["bench", "decode", "--roun"], ["--rounds"]), (["completion", "z"], ["zsh"]),
    (["convert", "--torch_ckpt_dir", "/et"], ["/etc"])])
def test_bash_completes_commands_flags_values_and_paths(completion, words, expected):
    assert completion(*words) == expected


def test_completion_without_shtab_names_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert run_main(qwen15_main.main, ["completion", "bash"]) == 2
    assert capsys.readouterr().err == ("error: qwen15 completion: the Python package shtab is missing. "
                                       "Run: pip install shtab\n")


# --- what is printed and cannot be

@pytest.mark.parametrize("arguments", [["--help"], ["predict", "--help"], ["memory"], ["doctor", "--json"]])
def test_a_full_disk_under_stdout_is_one_line_and_exit_code_1(arguments):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "qwen15", *arguments], cwd=MODULE, stdout=full,
                              stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "error: the output: cannot be written: No space left on device\n")


def test_a_reader_that_goes_away_is_no_complaint():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "qwen15", "memory"], cwd=MODULE, stdout=write, stderr=subprocess.PIPE,
                          text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")
