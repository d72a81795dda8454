"""A conversation typed at a terminal with several workers: rank 0 has the terminal, Ctrl-C is an answer's end and not
the run's."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from command_fixtures import Terminal, make_random
from conftest import MODULE
from launch_runs import LAUNCHER, Launch, free_port

pytest.importorskip("mindspore")
pytest.importorskip("torch")


@pytest.fixture(scope="module")
def random_yaml(tmp_path_factory, small_model):
    return make_random(tmp_path_factory.mktemp("launch_chat"), small_model)


@pytest.fixture
def start(random_yaml, tmp_path):
    """Starts the launcher with two workers in a terminal of its own."""
    def run(*arguments, shell="exec {}", **environ):
        command = shlex.join(["python", "run_qwen1_5.py", "--config", str(random_yaml), "--device_target", "CPU",
                              "--use_parallel", "True",
                              "--auto_trans_ckpt", "True", "--options", "parallel_config.model_parallel=2",
                              "model.model_config.seq_length=4096", "model.model_config.num_blocks=260", *arguments])
        words = shlex.join(["bash", str(LAUNCHER), command, "2", str(free_port()), str(tmp_path / "logs"), "True",
                            "60"])
        path = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
        return Terminal([shutil.which("bash"), "--norc", "-c", shell.format(words)], PATH=path,
                        XDG_STATE_HOME=str(tmp_path / "state"), **environ)
    return run


def test_a_conversation_of_two_workers(start, tmp_path):
    terminal = start("--chat")
    terminal.expect(r"ready in [\d.]+ s\nchat with random, 4096 tokens of context\. /help shows the commands, Ctrl-C "
                    r".*\n> $")
    terminal.type("Write a very long story about the sea.\n")
    terminal.expect(r"about the sea\.\n.*\w")
    terminal.type("\x03")
    terminal.expect(r"\[stopped\]\n> ", timeout_s=10)
    terminal.type("half a line")
    terminal.expect("half a line")
    time.sleep(0.5)  # Python's readline misses a signal that comes within the same instant as a key
    terminal.type("\x03")
    terminal.expect(r"Ctrl-D or /quit leaves\.\n> ", timeout_s=10)
    terminal.type("\x1b[A")  # the line before
    terminal.expect(r"Write a very long story about the sea\.")
    terminal.type("\x15/system Be brief.\n")
    terminal.expect(r"the system message is set\]\n> $")
    terminal.type("\x04")
    assert terminal.end() == 0, terminal.seen
    assert "Write a very long story" in (tmp_path / "state" / "qwen15" / "chat_history").read_text()
    assert "chat with" not in (tmp_path / "logs" / "worker_1.log").read_text()


def ranks_in(logs):
    """{rank: pid} of the launch that writes its logs there."""
    found = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/environ", "rb") as file:
                environ = dict(line.split(b"=", 1) for line in file.read().split(b"\0") if b"=" in line)
            with open(f"/proc/{entry}/stat", encoding="ascii") as file:
                group = file.read().rpartition(")")[2].split()[2]
        except OSError:
            continue
        ours = environ.get(b"XDG_STATE_HOME") == os.fsencode(logs.parent / "state")
        if ours and environ.get(b"MS_ROLE") and group == entry:
            found["scheduler" if environ[b"MS_ROLE"] == b"MS_SCHED" else int(environ[b"RANK_ID"])] = int(entry)
    return found


def test_before_rank_0_reads_control_c_ends_all(start, tmp_path):
    terminal = start("--chat")
    terminal.expect(r"started, scheduler \S+, logs in \S+\n")
    time.sleep(1)
    terminal.type("\x03")
    assert terminal.end() == 130
    assert "ended by SIGINT, all workers with it" in terminal.seen and "error" not in terminal.seen
    assert ranks_in(tmp_path / "logs") == {}


@pytest.mark.slow
@pytest.mark.parametrize("victim, at", [(0, "prompt"), (1, "prompt"), ("scheduler", "prompt"), (1, "answer"),
                                        (0, "answer")])
def test_a_process_that_is_lost_is_named_and_the_terminal_is_the_shells_again(victim, at, start, tmp_path):
    terminal = start("--chat", shell="{}; echo code $?; read -p 'again: ' line; echo read $line")
    terminal.expect(r"\n> $")
    if at == "answer":
        terminal.type("Write a very long story about the sea.\n")
        terminal.expect(r"about the sea\.\n.*\w")
    begin = time.monotonic()
    os.kill(ranks_in(tmp_path / "logs")[victim], signal.SIGKILL)
    name = victim if victim == "scheduler" else f"rank {victim}"
    terminal.expect(rf"error: (the )?{name}: killed by SIGKILL\.[^\n]*\ncode 137\nagain: ", timeout_s=10)
    assert time.monotonic() - begin < 10
    assert ranks_in(tmp_path / "logs") == {}
    terminal.type("typed\n")
    terminal.expect(r"^typed\nread typed\n")  # once by the terminal's echo, once by the shell
    assert terminal.end() == 0


@pytest.mark.slow
def test_a_user_who_takes_his_time_is_not_a_hang(start):
    terminal = start("--chat", "--max_new_tokens", "4", QWEN15_HANG_TIMEOUT_S="8")
    terminal.expect(r"\n> $")
    for _ in range(2):
        time.sleep(12)
        terminal.type("hello\n")
        terminal.expect(r"\[--max_new_tokens 4 reached\]\n> $|\w\n> $")
    terminal.type("/quit\n")
    assert terminal.end() == 0


@pytest.mark.slow
def test_control_z_does_not_suspend_one_of_several(start):
    terminal = start("--chat")
    terminal.expect(r"\n> $")
    terminal.type("\x1a")
    terminal.expect(r"Ctrl-Z: a run of several processes cannot be suspended")
    terminal.type("/system\n")
    terminal.expect(r"no system message is set.*\n> $")
    terminal.type("\x04")
    assert terminal.end() == 0


@pytest.mark.slow
def test_answers_into_a_file_and_questions_typed(start, tmp_path):
    out = tmp_path / "answers"
    terminal = start("--chat", "--max_new_tokens", "4", shell="exec {} >" + shlex.quote(str(out)))
    terminal.expect(r"> $")
    terminal.type("hello\n")
    terminal.expect(r"reached\]\n> $|> $")
    terminal.type("\x04")
    assert terminal.end() == 0
    assert out.read_text().strip()


@pytest.mark.slow
def test_a_prompt_on_the_command_line_can_be_interrupted_at_a_terminal(start):
    terminal = start("--predict_data", "a text", "--predict_length", "4000")
    terminal.expect(r"started, scheduler")
    terminal.expect(r"ready in [\d.]+ s\n")
    terminal.type("\x03")
    assert terminal.end() == 130
    assert "error" not in terminal.seen


@pytest.mark.slow
def test_lines_from_a_pipe_get_the_answers_of_one_process(random_yaml, tmp_path):
    lines = b"Who are you?\n/system Be brief.\nAnd what do you like?\n"
    arguments = ["--config", str(random_yaml), "--device_target", "CPU", "--chat", "--max_new_tokens", "12"]
    alone = subprocess.run([sys.executable, "run_qwen1_5.py", *arguments], cwd=MODULE, input=lines, capture_output=True,
                           timeout=120)
    assert alone.returncode == 0 and alone.stdout.strip(), alone.stderr.decode()
    command = shlex.join(["python", "run_qwen1_5.py", *arguments, "--use_parallel", "True", "--auto_trans_ckpt", "True",
                          "--options",
                          "parallel_config.model_parallel=2"])
    with Launch(command, 2, folder=tmp_path, stdin=subprocess.PIPE) as run:
        run.popen.stdin.write(lines)
        run.popen.stdin.close()
        run.popen.stdin = None
        assert run.wait() == 0, run.err
        assert run.out == alone.stdout and "[the system message is set]" in run.err
        run.assert_nothing_left(run.port)
