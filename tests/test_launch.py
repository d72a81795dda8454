"""The launcher's arguments, quoting, environment and output; ranks here are small scripts that form no cluster."""

import dataclasses
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import MODULE
from hypothesis import given
from hypothesis import strategies as st
from launch_runs import LAUNCHER, WORKER, Launch, free_port, worker
from qwen15 import cluster, machine
from qwen15.errors import UserError
from qwen15.launch import plan as launch
from qwen15.launch import ports, secret, supervise
from qwen15.launch.rank_process import _Relay, _WithoutNotices

SCRIPT = str(WORKER)


def refusal(*arguments):
    with pytest.raises(UserError) as caught:
        launch.parse(arguments)
    return str(caught.value)


# -- positional forms


def test_one_argument_means_eight_workers_in_the_foreground():
    plan = launch.parse([f"python {SCRIPT}"])
    assert (plan.worker_num, plan.local_worker, plan.master_addr, plan.master_port) == (8, 8, "127.0.0.1", 8118)
    assert (plan.log_dir, plan.join, plan.timeout_s, plan.port_given) == ("output/msrun_log", True, 600, False)


def test_two_arguments_name_the_number_of_workers():
    plan = launch.parse([SCRIPT, "4"])
    assert (plan.worker_num, plan.local_worker, plan.join) == (4, 4, True)


def test_six_arguments():
    plan = launch.parse([SCRIPT, "4", "9000", "logs", "False", "77"])
    assert (plan.worker_num, plan.local_worker, plan.master_port, plan.port_given) == (4, 4, 9000, True)
    assert (plan.log_dir, plan.join, plan.timeout_s) == ("logs", False, 77)


def test_nine_arguments_give_ranks_by_machine():
    plan = launch.parse([SCRIPT, "4", "2", "10.1.2.3", "9000", "1", "logs", "True", "77"])
    assert (plan.worker_num, plan.local_worker, plan.master_addr, plan.node_rank) == (4, 2, "10.1.2.3", 1)
    assert list(plan.ranks) == [2, 3] and not plan.one_machine


def test_nine_arguments_with_every_worker_here_are_one_machine():
    """As in the original: address and machine number are not used then."""
    plan = launch.parse([SCRIPT, "2", "2", "10.1.2.3", "9000", "1", "logs", "True", "77"])
    assert (plan.master_addr, plan.node_rank, list(plan.ranks)) == ("127.0.0.1", 0, [0, 1])


@pytest.mark.parametrize("arguments, message", [
    ((), "0 arguments"), (("a", "1", "2"), "3 arguments"),
    ((SCRIPT, "0"), "WORKER_NUM: '0' is not a whole number from 1 to 65535"),
    ((SCRIPT, "9" * 30), "WORKER_NUM: '999999999999999999999999999999' is not a whole number from 1 to 65535"),
    ((SCRIPT, "\x1b[2J" + "9" * 5000), "WORKER_NUM: '\\x1b[2J" + "9" * 33 + "...'"),
    ((SCRIPT, "two"), "WORKER_NUM: 'two'"), ((SCRIPT, "２"), "WORKER_NUM: '２'"),
    ((SCRIPT, "2", "70000", "l", "True", "1"), "MASTER_PORT: '70000' is not a whole number from 1 to 65535"),
    ((SCRIPT, "2", "9000", "l", "yes", "1"), "JOIN: 'yes' is neither True nor False"),
    ((SCRIPT, "2", "9000", "", "True", "1"), "LOG_DIR: an empty name"),
    ((SCRIPT, "2", "9000", "l", "True", "-1"), "CLUSTER_TIME_OUT: '-1'"),
    ((SCRIPT, "2", "3", "127.0.0.1", "9000", "0", "l", "True", "1"),
     "LOCAL_WORKER: '3' is not a whole number from 1 to 2"),
    ((SCRIPT, "4", "2", "127.0.0.1", "9000", "2", "l", "True", "1"), "would hold ranks 4 to 5, of 4 (0 to 3)"),
    ((SCRIPT, "4", "2", "192.0.2.1", "9000", "0", "l", "True", "1"),
     "192.0.2.1 is not an address of this machine, and NODE_RANK is 0"),
    ((SCRIPT, "4", "2", "no such host", "9000", "1", "l", "True", "1"),
     "MASTER_ADDR: 'no such host' cannot be resolved"),
    (("", "2"), "COMMAND: an empty command"), (("python", "2"), "python is given nothing to run"),
    (("python missing.py", "2"), "missing.py: no such file"),
    (("missing_program --x", "2"), "'missing_program' is neither"),
    ((f"python {SCRIPT} what's this", "2"), "COMMAND: no closing quotation"),
])
def test_what_cannot_be_is_refused_by_name(arguments, message):
    assert message in refusal(*arguments)


@pytest.mark.parametrize("count", [0, 3, 4, 5, 7, 8, 10])
def test_other_counts_print_the_forms_and_give_2(count):
    done = subprocess.run(["bash", LAUNCHER, *["x"] * count], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert "msrun_launcher.sh COMMAND WORKER_NUM MASTER_PORT" in done.stderr
    assert f"error: {count} arguments are given, 1, 2, 6 or 9 are wanted" in done.stderr


# -- the command


def test_python_and_scripts_get_the_active_interpreter():
    for command in (f"python {SCRIPT} a", f"python3 {SCRIPT} a", f"{SCRIPT} a"):
        assert launch.parse([command]).command == (sys.executable, SCRIPT, "a")
    assert launch.parse(["python -u -m json.tool"]).command == (sys.executable, "-u", "-m", "json.tool")
    assert launch.parse(["pytest -x"]).command == (sys.executable, "-m", "pytest", "-x")
    assert launch.parse(["/bin/echo a"]).command == ("/bin/echo", "a")


def test_our_scripts_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert launch.parse(["python run_qwen1_5.py --help"]).command[1] == str(MODULE / "run_qwen1_5.py")
    (tmp_path / "run_qwen1_5.py").write_text("")
    assert launch.parse(["python run_qwen1_5.py --help"]).command[1] == "run_qwen1_5.py"


@pytest.mark.parametrize("command, words", [
    ("a --predict_data 帮助我制定一份去上海的旅游攻略 \\\n--x 1",
     ["a", "--predict_data", "帮助我制定一份去上海的旅游攻略", "--x", "1"]),
    ("a 'two words' \"it's\" \\\"", ["a", "two words", "it's", '"']),
    ("a '' ''", ["a", "", ""]),
    ("a $(id) `id` $HOME ~ *.py {1,2} a;b|c>d<e&f #g",
     ["a", "$(id)", "`id`", "$HOME", "~", "*.py", "{1,2}", "a;b|c>d<e&f", "#g"]),
    ("a 'keeps\\\nthis' \"joins\\\nthis\"", ["a", "keeps\\\nthis", "joinsthis"]),
    ("a 'line 1\nline 2'", ["a", "line 1\nline 2"]),
    ("a x\u3000y", ["a", "x\u3000y"]),
    ("a \\\\\\\nb", ["a", "\\b"]),
])
def test_a_command_is_split_as_a_shell_splits_it_and_expands_nothing(command, words):
    assert launch.split_command(command) == words


@given(st.lists(st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=12), min_size=1,
                max_size=5))
def test_what_is_quoted_comes_back(words):
    import shlex
    assert launch.split_command(" ".join(map(shlex.quote, words))) == words


HOSTILE = [
    "two words", "it's \"quoted\"", "a; touch hacked", "$(touch hacked)", "`touch hacked`", "> hacked", "< /etc/passwd",
    "a | tee hacked &",
    "line 1\nline 2\r\n\ttab", "帮助我制定一份去上海的旅游攻略，包括景点、美食", "back\\slash \\n \\",
    "$HOME ${PATH} ~ *", "!history",
    "#comment",
    "-n --help", "", "emoji 👩‍👩‍👧 \u202eabc", "%s %d {0}", "a\u3000b\u00a0c",
]


def test_hostile_prompts_reach_every_rank_byte_for_byte(tmp_path):
    import shlex
    command = f"python {SCRIPT} echo " + " ".join(map(shlex.quote, HOSTILE))
    with Launch(command, 2, folder=tmp_path) as run:
        assert run.wait() == 0, run.err
    for rank in range(2):
        seen = json.loads((tmp_path / f"rank_{rank}.json").read_text())
        assert [bytes.fromhex(word).decode() for word in seen["bytes"]] == HOSTILE
    assert not (tmp_path / "hacked").exists()
    run.assert_nothing_left()


def test_bytes_that_are_no_text_pass_too(tmp_path):
    with Launch(os.fsencode(f"{SCRIPT} echo ") + b"\xff\xe4", 1, folder=tmp_path, LC_ALL="C") as run:
        assert run.wait() == 0, run.err
    assert json.loads((tmp_path / "rank_0.json").read_text())["bytes"] == ["ffe4"]


# -- what the ranks get


def test_ranks_get_the_documented_variables_and_keep_the_users(tmp_path):
    kept = {"HCCL_BUFFSIZE": "77", "MS_NODE_TIMEOUT": "99", "PYTHONPATH": "/some/where"}
    with Launch(worker("echo"), 2, folder=tmp_path, **kept) as run:
        assert run.wait() == 0, run.err
    for rank in range(2):
        seen = json.loads((tmp_path / f"rank_{rank}.json").read_text())
        environ = seen["environ"]
        assert seen["executable"] == sys.executable and seen["folder"] == str(tmp_path)
        assert {name: environ[name] for name in ("MS_ROLE", "MS_WORKER_NUM", "MS_NODE_ID", "RANK_ID", "RANK_SIZE",
                                                 "DEVICE_ID",
                                                 "MS_SCHED_HOST", "MS_TOPO_TIMEOUT")} == {
            "MS_ROLE": "MS_WORKER", "MS_WORKER_NUM": "2", "MS_NODE_ID": str(rank), "RANK_ID": str(rank),
                                                     "RANK_SIZE": "2",
            "DEVICE_ID": str(rank), "MS_SCHED_HOST": "127.0.0.1", "MS_TOPO_TIMEOUT": "600"}
        assert int(environ["MS_SCHED_PORT"]) == run.port
        assert environ["HCCL_BUFFSIZE"] == "77" and environ["MS_NODE_TIMEOUT"] == "99"
        assert environ["PYTHONPATH"] == f"{MODULE}:/some/where"


def test_nothing_is_said_to_hccl_when_the_user_says_nothing():
    scheduler, ranks = launch.tasks(launch.parse([SCRIPT, "2"]), 9000, {"PATH": "/bin"})
    assert not any(name.startswith("HCCL") for task in (scheduler, *ranks) for name in task.environ)
    assert ranks[0].environ["MS_NODE_TIMEOUT"] == "300" and "MS_NODE_TIMEOUT" not in scheduler.environ


def test_ranks_of_one_machine_get_memory_that_has_no_name_and_those_of_several_none(monkeypatch):
    one = launch.parse([SCRIPT, "2"])
    several = launch.parse([SCRIPT, "4", "2", "127.0.0.1", "9000", "0", "l", "True", "5"])
    assert launch.make_memory(several) is None and launch.make_memory(launch.parse([SCRIPT, "1"])) is None
    memory = launch.make_memory(one)
    scheduler, ranks = launch.tasks(one, 9000, {cluster.MEMORY: "3:4:5"}, memory)
    assert cluster.MEMORY not in scheduler.environ and scheduler.files == ()
    assert all(rank.files == (memory,) for rank in ranks)
    monkeypatch.setenv("QWEN15_RANK_SUM", "shared")
    assert cluster.shared_memory(ranks[0].environ) == (memory, "")
    assert cluster.describe_sum(ranks[0].environ) == "in shared memory"
    os.close(memory)
    assert cluster.shared_memory(ranks[0].environ) == (
        None, "the memory that the launcher has made did not come down to this process")
    assert launch.tasks(one, 9000, {cluster.MEMORY: "3:4:5"})[1][0].environ.get(cluster.MEMORY) is None


@pytest.mark.parametrize("environ, words", [
    ({"QWEN15_RANK_SUM": "fast"}, "QWEN15_RANK_SUM: wants shared or mindspore, not 'fast'"),
    ({"QWEN15_RANK_SUM": "shared"}, "shared cannot be used: the launcher has handed down no memory"),
    ({"QWEN15_RANK_SUM": "shared", cluster.MEMORY: "x"}, "did not come down to this process"),
    ({"QWEN15_RANK_SUM": "shared", cluster.MEMORY: "99999999999999999999:1:2"}, "did not come down to this process"),
])
def test_a_sum_that_cannot_be_had_is_refused(environ, words):
    with pytest.raises(UserError, match=re.escape(words)):
        cluster.shared_memory(environ)


def test_how_ranks_will_add_is_said_beforehand():
    assert cluster.describe_sum({}).startswith("in shared memory where msrun_launcher.sh starts all on one machine")
    assert cluster.describe_sum({"QWEN15_RANK_SUM": "mindspore"}) == (
        "by MindSpore's collectives (QWEN15_RANK_SUM=mindspore)")
    assert cluster.describe_sum({"RANK_ID": "0"}).startswith("by MindSpore's collectives (the launcher has handed")


def test_the_scheduler_starts_on_machine_0_only():
    first = launch.parse([SCRIPT, "4", "2", "127.0.0.1", "9000", "0", "l", "True", "5"])
    second = launch.parse([SCRIPT, "4", "2", "127.0.0.1", "9000", "1", "l", "True", "5"])
    assert launch.tasks(first, 9000, {})[0] is not None and launch.tasks(second, 9000, {})[0] is None
    assert [task.environ["RANK_ID"] for task in launch.tasks(second, 9000, {})[1]] == ["2", "3"]
    assert [task.environ["DEVICE_ID"] for task in launch.tasks(second, 9000, {})[1]] == ["0", "1"]


@pytest.mark.parametrize("workers, cores, shares", [
    (1, [(0,), (1,)], [(0, 1)]),
    (2, [(0,), (1,)], [(0,), (1,)]),
    (4, [(0,), (1,)], [()] * 4),  # fewer cores than ranks: the kernel shares them out
    (2, [(0, 4), (1, 5), (2, 6), (3, 7)], [(0, 4, 1, 5), (2, 6, 3, 7)]),  # both threads of a core go to one rank
    (3, [(c,) for c in range(8)], [(0, 1), (2, 3, 4), (5, 6, 7)]),
])
def test_ranks_do_not_share_cores(workers, cores, shares):
    assert launch.share_cores(workers, cores) == shares


def test_each_rank_stays_on_its_cores_and_counts_its_threads_by_them(tmp_path):
    cores = machine.processors().cores
    workers = min(2, len(cores))
    with Launch(worker("echo"), workers, folder=tmp_path, OMP_NUM_THREADS=None, QWEN15_THREADS=None) as run:
        assert run.wait() == 0, run.err
    seen = [json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(workers)]
    assert [tuple(rank["cpus"]) for rank in seen] == [tuple(sorted(share))
                                                      for share in launch.share_cores(workers, cores)]
    for rank in seen:
        assert rank["environ"]["OMP_NUM_THREADS"] == rank["environ"]["QWEN15_THREADS"] == str(len(rank["cpus"]))


def test_cores_are_left_alone_when_the_user_says_so(tmp_path):
    with Launch(worker("echo"), 2, folder=tmp_path, QWEN15_AFFINITY="off", OMP_NUM_THREADS="3",
                QWEN15_THREADS=None) as run:
        assert run.wait() == 0, run.err
    seen = json.loads((tmp_path / "rank_1.json").read_text())
    assert seen["cpus"] == sorted(os.sched_getaffinity(0)) and seen["environ"]["OMP_NUM_THREADS"] == "3"


# -- output


def test_stdout_of_rank_0_comes_through_as_it_is_written_half_characters_too(tmp_path):
    with Launch(worker("drip"), 2, folder=tmp_path) as run:
        run.read_until("京".encode()[:2])
        (tmp_path / "go").touch()
        assert run.wait() == 0, run.err
        assert run.out == "京".encode()
        assert run.log("worker_1.log") == "京" and run.log("worker_0.log") == "京"


def test_piped_input_reaches_rank_0_only(tmp_path):
    with Launch(worker("copy_stdin"), 2, folder=tmp_path, stdin=subprocess.PIPE) as run:
        run.popen.stdin.write("输入".encode())
        run.popen.stdin.close()
        run.popen.stdin = None
        assert run.wait() == 0 and run.out == "输入".encode(), run.err
        assert run.log("worker_1.log") == ""


def test_what_was_said_after_an_answer_comes_after_it(tmp_path):
    """stdout and stderr of a rank are passed on by a thread each, here a slow one for stdout."""
    (answers, answer), (notes, note), (result, both) = os.pipe(), os.pipe(), os.pipe()

    def slowly(data):
        time.sleep(0.2)
        return data

    with open(tmp_path / "log", "wb", buffering=0) as log:
        first = _Relay(open(answers, "rb", buffering=0), both, log, slowly, None)
        relays = [first, _Relay(open(notes, "rb", buffering=0), both, log, bytes, None, after=first)]
        os.write(answer, b"Paris\n")
        os.write(note, b"1 token in 1 s\n")
        for relay in relays:
            relay.start()
        for end in (answer, note):
            os.close(end)
        for relay in relays:
            relay.join(10)
    assert os.read(result, 100) == b"Paris\n1 token in 1 s\n"
    os.close(result)
    os.close(both)


def test_mindspore_notices_stay_in_the_log():
    chosen = _WithoutNotices()
    notice = b"[WARNING] DISTRIBUTED(29142,7fba2ca05b80,python):2026-11-24 [x.cc:485] Connect] Connection 11\n"
    assert chosen(notice + b"progress 1%\rprogress 2%\r") == b"progress 1%\rprogress 2%\r"
    assert chosen(b"done\n") == b"done\n"
    assert b"".join(chosen(bytes([byte])) for byte in b"[INFO] ME(1:2,MainProcess): x\n[WARN") == b""
    assert chosen(b"ING] of our own\n") == b"[WARNING] of our own\n"
    assert chosen(b"[ERROR] ME(1:2,x): y\n") == b"[ERROR] ME(1:2,x): y\n"


def test_a_reader_that_goes_away_ends_the_run(tmp_path):
    with Launch(worker("sleep"), 2, folder=tmp_path) as run:
        run.read_until(b"asleep")
        run.popen.stdout.close()  # nothing is written any more: the run goes on
        time.sleep(0.5)
        assert run.popen.poll() is None
    with Launch(f"{sys.executable} -c 'while True: print(1)'", 1, folder=tmp_path) as run:
        run.read_until(b"1")
        run.popen.stdout.close()
        assert run.popen.wait(20) == 1
        run.assert_nothing_left(run.port)


# -- the end


def test_exit_code_and_last_words_of_the_rank_that_failed(tmp_path):
    with Launch(worker("fail", "1", "7"), 2, folder=tmp_path) as run:
        assert run.wait(60) == 7
        assert "the reason for it\n" in run.err and "worker_1.log" in run.err
        assert run.err.rstrip().splitlines()[-1].startswith("error: rank 1: ended with exit code 7.")
        run.assert_nothing_left(run.port)


def test_the_words_of_rank_0_are_not_repeated(tmp_path):
    with Launch(worker("fail", "0", "2"), 2, folder=tmp_path) as run:
        assert run.wait(60) == 2
        assert run.err.count("the reason for it") == 1 and "error: rank 0: ended with exit code 2" in run.err


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_all_even_what_ranks_have_started(number, code, tmp_path):
    with Launch(worker("sleep"), 2, folder=tmp_path) as run:
        run.read_until(b"asleep")
        run.until(lambda run: len([name for name in run.processes() if "sleep 600" in str(name)]) == 2)
        begin = time.monotonic()
        run.popen.send_signal(number)
        assert run.wait(20) == code
        assert time.monotonic() - begin < 10
        assert f"ended by {number.name}" in run.err
        run.assert_nothing_left(run.port)


def test_ranks_that_ignore_the_request_are_ended_all_the_same(tmp_path):
    with Launch(worker("stubborn"), 2, folder=tmp_path) as run:
        run.read_until(b"asleep")
        begin = time.monotonic()
        run.popen.send_signal(signal.SIGINT)
        assert run.wait(20) == 130 and time.monotonic() - begin < 10
        run.assert_nothing_left(run.port)


def test_ranks_do_not_outlive_a_killed_launcher(tmp_path):
    with Launch(worker("sleep"), 2, folder=tmp_path) as run:
        run.read_until(b"asleep")
        run.popen.kill()
        run.popen.wait()
        deadline = time.monotonic() + 10
        while any("sleep 600" not in str(name) for name in run.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert all("sleep 600" in str(name) for name in run.processes())  # ranks and scheduler are gone


def test_a_stopped_rank_is_named(tmp_path):
    with Launch(worker("sleep"), 2, folder=tmp_path, QWEN15_HANG_TIMEOUT_S="2") as run:
        run.read_until(b"asleep")
        os.kill(run.processes()[1], signal.SIGSTOP)
        begin = time.monotonic()
        assert run.wait(30) == 1
        assert 2 <= time.monotonic() - begin < 12
        assert "error: rank 1: stopped (SIGSTOP, state T) for 2 s." in run.err
        run.assert_nothing_left(run.port)


def test_a_rank_without_memory_is_named_with_its_error(tmp_path):
    with Launch(worker("allocate", "1", "512"), 2, folder=tmp_path) as run:
        assert run.wait(60) == 1
        assert "MemoryError" in run.err and "error: rank 1: ended with exit code 1" in run.err
        run.assert_nothing_left(run.port)


def test_a_killed_rank_gives_137(tmp_path):
    with Launch(worker("sleep"), 2, folder=tmp_path) as run:
        run.read_until(b"asleep")
        os.kill(run.processes()[0], signal.SIGKILL)
        assert run.wait(20) == 137 and "error: rank 0: killed by SIGKILL." in run.err
        run.assert_nothing_left(run.port)


# -- in the background


def test_join_false_returns_at_once_and_says_how_to_watch(tmp_path):
    port = free_port()
    with Launch(worker("drip"), 2, port, "logs", "False", 60, folder=tmp_path) as run:
        assert run.wait(20) == 0
        assert run.out == b"" and f"tail -f {tmp_path}/logs/worker_0.log" in run.err and "kill " in run.err
        assert run.processes()
        (tmp_path / "go").touch()
        deadline = time.monotonic() + 60
        while run.processes() and time.monotonic() < deadline:
            time.sleep(0.1)
        run.assert_nothing_left(port)
        assert run.log("worker_0.log", "logs") == "京" == run.log("worker_1.log", "logs")
        assert "launcher: exit code 0" in run.log("launcher.log", "logs")


def test_in_the_background_too_the_first_failure_ends_all(tmp_path):
    port = free_port()
    with Launch(worker("fail", "1", "7"), 2, port, "logs", "False", 60, folder=tmp_path) as run:
        assert run.wait(20) == 0
        deadline = time.monotonic() + 60
        while run.processes() and time.monotonic() < deadline:
            time.sleep(0.1)
        run.assert_nothing_left(port)
        report = run.log("launcher.log", "logs")
        assert "the reason for it" in report
        assert "error: rank 1: ended with exit code 7" in report and "exit code 7" in report


# -- ports and folders


def test_another_port_is_taken_when_the_usual_one_is_in_use(tmp_path):
    with socket.socket() as busy:
        busy.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            busy.bind(("127.0.0.1", 8118))
            busy.listen()
        except OSError:
            pass  # somebody else listens there: as good
        with Launch(worker("echo"), 1, folder=tmp_path) as run:
            assert run.wait() == 0
            assert f"port 8118 is in use, {run.port} is used instead" in run.err and run.port != 8118


def test_a_port_that_was_asked_for_and_is_in_use_is_named(tmp_path):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        with Launch(worker("echo"), 1, port, "logs", "True", 60, folder=tmp_path) as run:
            assert run.wait() == 2
            assert f"error: MASTER_PORT: port {port} of 127.0.0.1 is in use" in run.err
            assert not (tmp_path / "rank_0.json").exists()


def listener(port=0):
    """Somebody who listens as MindSpore does: sharing the address with connections that have ended."""
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind(("127.0.0.1", port))
    server.listen()
    return server


def test_two_launchers_that_start_together_get_different_ports():
    one, two = ports.reserve("127.0.0.1", 8118, False), ports.reserve("127.0.0.1", 8118, False)
    assert one.port != two.port
    listener(one.port).close()  # the scheduler comes
    for reservation in (one, two):
        reservation.close()


def test_a_reserved_port_is_not_given_to_others():
    reservation = ports.reserve("127.0.0.1", free_port(), True)
    with socket.socket() as other, pytest.raises(OSError):
        other.bind(("127.0.0.1", reservation.port))
    reservation.close()


def test_a_port_with_connections_that_have_ended_is_free():
    with listener() as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            accepted, _ = server.accept()
            accepted.close()  # the server's side ends first and keeps TIME_WAIT
            assert client.recv(1) == b""
    reservation = ports.reserve("127.0.0.1", port, True)
    reservation.close()
    assert reservation.port == port


def test_who_holds_a_port_that_is_taken_is_named():
    with listener() as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError) as caught:
            ports.reserve("127.0.0.1", port, True)
    assert f"port {port} of 127.0.0.1 is in use by process {os.getpid()} (" in str(caught.value)
    assert ports.holder_of(port) is None


def test_a_port_that_is_lost_before_the_scheduler_listens_is_another_one(monkeypatch, tmp_path, capfd):
    """The scheduler here is a script that says what MindSpore's says when its port has been taken."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GLOG_v", "2")
    schedulers = tmp_path / "scheduler.py"
    schedulers.write_text("import os, sys, time\nif not os.path.exists('lost'):\n    open('lost', 'w').close()\n"
                          "    sys.exit('Failed to call socket listen, url: 127.0.0.1')\ntime.sleep(60)\n")
    tasks = launch.tasks

    def with_scheduler(*arguments):
        scheduler, ranks = tasks(*arguments)
        return dataclasses.replace(scheduler, command=(sys.executable, str(schedulers))), ranks

    monkeypatch.setattr(launch, "tasks", with_scheduler)
    assert launch.main(["-c 'import os, time; time.sleep(2); print(\"port\", os.environ[\"MS_SCHED_PORT\"])'",
                        "1"]) == 0
    out, err = capfd.readouterr()
    assert "has meanwhile been taken by another program; another one is tried" in err
    assert out.count("port") == 1
    (tmp_path / "lost").unlink()
    with pytest.raises(UserError, match="has meanwhile been taken"):
        launch.main(["-c 'import time; time.sleep(9)'", "1", str(free_port()), "logs", "True", "60"])


def test_a_log_folder_in_use_is_named(tmp_path):
    logs = tmp_path / "logs"
    logs.mkdir()
    descriptor = os.open(logs, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(UserError, match="another launch that still runs writes its logs there"):
            launch.open_log_dir(str(logs))
    finally:
        os.close(descriptor)


def test_a_log_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="LOG_DIR .*/file/logs: logs cannot be written there"):
        launch.open_log_dir(str(tmp_path / "file" / "logs"))


@pytest.mark.parametrize("name", ["worker_0.log", "worker_17.log", "scheduler.log", "launcher.log"])
def test_a_log_that_leads_elsewhere_is_refused(tmp_path, name):
    (tmp_path / "thesis").write_text("mine")
    (tmp_path / "logs").mkdir()
    os.symlink(tmp_path / "thesis", tmp_path / "logs" / name)
    with pytest.raises(UserError, match=f"logs/{name}: is a symbolic link"):
        launch.open_log_dir(str(tmp_path / "logs"))
    assert (tmp_path / "thesis").read_text() == "mine"
    os.rename(tmp_path / "logs" / name, tmp_path / "logs" / "mine.log")  # a name that no log of ours has
    os.close(launch.open_log_dir(str(tmp_path / "logs"))[1])


def test_what_the_launcher_says_of_odd_names_steers_no_terminal(capsys):
    supervise.say("logs in /tmp/a\x1b[2Jb\u202e")
    assert capsys.readouterr().err == "launcher: logs in /tmp/a\\x1b[2Jb\\u202e\n"


def test_help_is_quick_and_needs_no_mindspore(tmp_path):
    environ = {**os.environ, "PATH": os.path.dirname(sys.executable) + ":" + os.environ["PATH"]}
    done = subprocess.run(["bash", LAUNCHER, "--help"], capture_output=True, text=True, env=environ)
    assert done.returncode == 0 and "MASTER_ADDR" in done.stdout
    code = "import sys; from qwen15.launch import plan; sys.exit('mindspore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=MODULE).returncode == 0


def test_the_launchers_secret_is_not_handed_to_the_ranks():
    told = {secret.TEXT: "the secret of the launchers", secret.FILE: "launch.secret", "HCCL_IF_IP": "10.0.0.1"}
    scheduler, ranks = launch.tasks(launch.parse([SCRIPT, "2"]), 8118, told)
    for task in (scheduler, *ranks):
        assert task.environ["HCCL_IF_IP"] == "10.0.0.1" and not {secret.TEXT, secret.FILE} & set(task.environ)
