"""What the launchers of several machines tell each other, over real sockets: failures, losses, strangers, and the
secret."""

import contextlib
import json
import os
import resource
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from launch_runs import free_port
from qwen15.errors import UserError
from qwen15.launch import machines, secret
from qwen15.launch.machines import Hub, Member
from qwen15.launch.messages import Machine, Report

HERE = "127.0.0.1"
FAILURE = Report("rank 1 on machine 1", "killed by SIGKILL", "See dmesg.", 137, "/logs/worker_1.log", ("one", "two"))


def machine(number, count=1, worker_num=3):
    return Machine(number, number * count, count, worker_num)


@pytest.fixture
def links():
    """A hub and what calls it; `join(number)` makes a member."""
    class Links:
        port = free_port()
        hub = Hub(machine(0), HERE, port, silence_s=1.5)
        members = []

        def join(self, number, **changes):
            self.members.append(Member(machine(number, **changes), HERE, self.port, silence_s=1.5))
            return self.members[-1], self.members[-1].join()

        def call(self):
            return socket.create_connection((HERE, self.port), timeout=10)

    made = Links()
    made.hub.start()
    yield made
    for member in made.members:
        member.close()
    made.hub.close()


def failure_of(link, timeout_s=5):
    deadline = time.monotonic() + timeout_s
    while link.failure is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return link.failure


def test_a_failure_is_told_to_all(links):
    (one, joined), (two, also) = links.join(1), links.join(2)
    assert joined and also
    one.failed(FAILURE)
    one.close()
    assert failure_of(links.hub) == FAILURE == failure_of(two)


def test_what_fails_on_machine_0_is_told_to_all(links):
    (one, _), (two, _) = links.join(1), links.join(2)
    links.hub.failed(FAILURE)
    links.hub.close()
    assert failure_of(one) == FAILURE == failure_of(two)


def test_a_good_end_is_no_failure(links):
    (one, _), (two, _) = links.join(1), links.join(2)
    one.done()
    one.close()
    time.sleep(2)  # longer than silence is borne
    links.hub.done()
    links.hub.close()
    time.sleep(0.5)
    assert links.hub.failure is None and one.failure is None and two.failure is None


def test_a_launcher_that_ends_without_a_word_is_told_to_all(links):
    (one, _), (two, _) = links.join(1), links.join(2)
    one.close()
    told = failure_of(links.hub)
    assert told == failure_of(two)
    assert told.where == "machine 1 (rank 1) at 127.0.0.1" and told.what == "its launcher has ended" and told.code == 1


def hello(connection, proof="", **changes):
    """Come as machine 1 does; gives what machine 0 answers."""
    lines = connection.makefile()
    assert "challenge" in json.loads(lines.readline())
    machine = {"number": 1, "first": 1, "count": 1, "worker_num": 3, **changes}
    connection.sendall(json.dumps({"machine": machine, "challenge": "c", "proof": proof}).encode() + b"\n")
    answer = lines.readline()
    return json.loads(answer) if answer else None


def test_silence_is_a_loss(links):
    with links.call() as silent:
        assert "welcome" in hello(silent)
        begin = time.monotonic()
        assert failure_of(links.hub).what == "nothing has been heard from it for 1.5 s"
        assert 1 < time.monotonic() - begin < 4


def test_machines_that_do_not_fit_together_are_refused(links):
    links.join(1)
    for changes, reason in (({}, "a launcher with NODE_RANK 1 has come already"),
                            ({"number": 2, "worker_num": 4}, "WORKER_NUM is 4 here and 3 on machine 0"),
                            ({"number": 2, "first": 1, "count": 2}, "hold the same ranks")):
        with links.call() as other:
            assert reason in hello(other, **changes)["refused"]
    other, joined = links.join(2, worker_num=5)
    assert not joined and other.refusal == "WORKER_NUM is 5 here and 3 on machine 0"
    assert links.hub.failure is None


STRANGE = [b"GET / HTTP/1.1\r\n\r\n", b"\x00\xff\n", b"[]\n", b'{"machine": 3}\n', b'{"machine": {"number": "x"}}\n',
           b'{"failed": {}}\n',
           b"[" * 3000 + b"\n", b"[" * 100000 + b"\n", b"x" * (2 ** 18 + 1), b'{"done": true}\n',
           b'{"machine": ' + b"1" * 4000 + b"}\n"]
NO_MACHINE = [{"number": 1e999}, {"number": float("nan")}, {"number": -1}, {"number": 1.5}, {"number": True},
              {"number": None},
              {"number": "1"}, {"number": 10 ** 30}]


def test_strangers_do_no_harm(links):
    with ExitStack() as calls:
        for line in STRANGE:
            stranger = calls.enter_context(links.call())
            try:
                stranger.sendall(line)
            except OSError:
                pass  # hung up already
        for changes in NO_MACHINE:
            assert hello(calls.enter_context(links.call()), **changes) is None
        one, joined = links.join(1)
        assert joined
        time.sleep(1)
        assert links.hub.failure is None and one.failure is None


def test_a_machine_beyond_the_ranks_is_refused(links):
    for changes in ({"number": 100, "first": 10 ** 6}, {"number": 2, "first": 2, "count": 2},
                    {"number": 2, "first": 2, "count": 0}):
        with links.call() as other:
            assert "among 3 ranks" in hello(other, **changes)["refused"]


def test_a_stranger_who_never_says_who_it_is_is_sent_away(links, monkeypatch):
    """However often it sends a byte."""
    monkeypatch.setattr(machines, "_HELLO_S", 0.5)
    with links.call() as slow:
        begin = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - begin < 5:
                slow.sendall(b" ")
                time.sleep(0.1)
        assert time.monotonic() - begin < 3


def test_a_crowd_of_strangers_keeps_nobody_out_and_closing_stays_quick(links):
    one = Member(machine(1), HERE, links.port)
    with ExitStack() as calls:
        for _ in range(300):
            calls.enter_context(links.call())
        assert one.join() and links.hub.failure is None
        begin = time.monotonic()
        links.hub.close()
        assert time.monotonic() - begin < 2
    one.close()


def test_a_crowd_that_takes_all_descriptors_is_survived(links):
    one = Member(machine(1), HERE, links.port)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Ours and the strangers' in one process
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 41, hard))
    try:
        crowd = []
        with contextlib.suppress(OSError):
            while True:
                crowd.append(links.call())
        assert len(crowd) > 10
        for stranger in crowd[:3]:
            stranger.close()
        while not one.join():  # the hub still takes in those who called before: more of them leave
            crowd.pop().close()
            one = Member(machine(1), HERE, links.port)
        assert links.hub.failure is None
        for stranger in crowd:
            stranger.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    one.close()


def test_closing_does_not_wait_for_machines_that_do_not_hang_up(links):
    with links.call() as one, links.call() as two:
        assert "welcome" in hello(one) and "welcome" in hello(two, number=2, first=2)
        begin = time.monotonic()
        links.hub.failed(FAILURE)
        links.hub.close()
        assert time.monotonic() - begin < 2


def test_text_from_elsewhere_is_shown_and_not_obeyed(links):
    with links.call() as other:
        hello(other)
        other.sendall(json.dumps({"failed": {"where": "rank 1", "what": "\x1b[2Jgone\nerror: forged \u202egnp",
                                             "fix": "", "code": 9,
                                             "log": "", "lines": ["a\x07" * 600] * 25}}).encode() + b"\n")
        told = failure_of(links.hub)
        assert told.what == r"\x1b[2Jgone\nerror: forged \u202egnp" and told.code == 9
        assert len(told.lines) == 20 and told.lines[0].startswith(r"a\x07a\x07") and "\x07" not in told.lines[0]


@pytest.mark.parametrize("code", [1e999, 0, 256, -1, "1", None])
def test_an_exit_code_that_is_none_is_a_failure_of_its_own(code, links):
    with links.call() as other:
        hello(other)
        other.sendall(json.dumps({"failed": {"where": "rank 1", "what": "w", "fix": "", "code": code, "log": "",
                                             "lines": []}}).encode() + b"\n")
        told = failure_of(links.hub)
        assert told.where == "machine 1 (rank 1) at 127.0.0.1"
        assert told.what == "what comes from it is not what a launcher says"
        assert told.code == 1


# -- the secret

SECRET, OTHER = b"a secret of some length", b"another one of some length"


@pytest.mark.parametrize("here, there, refusal", [
    (SECRET, SECRET, None), (SECRET, OTHER, "machine 0 has a secret, and its own is another one"),
    (SECRET, None, "machine 0 has a secret, and it has none"),
    (None, SECRET, "it has a secret and machine 0 has none")])
def test_launchers_join_that_have_the_same_secret(here, there, refusal):
    port = free_port()
    hub = Hub(machine(0), HERE, port, shared=here)
    hub.start()
    member = Member(machine(1), HERE, port, shared=there)
    assert member.join() is (refusal is None)
    assert (member.refusal or "").startswith(refusal or "") and bool(member.refusal) is bool(refusal)
    member.close()
    hub.close()


def test_a_stranger_cannot_be_machine_0():
    """Who listens in machine 0's place does not know the secret, and cannot send a member's proof back as its own."""
    with socket.create_server((HERE, 0)) as false:
        member = Member(machine(1), HERE, false.getsockname()[1], shared=SECRET)

        def answer():
            connection, _ = false.accept()
            connection.sendall(b'{"challenge": "c"}\n')
            said = json.loads(connection.makefile().readline())
            welcome = {"number": 0, "first": 0, "count": 1, "worker_num": 3}
            connection.sendall(json.dumps({"welcome": welcome, "proof": said["proof"]}).encode() + b"\n")
            return said

        with ThreadPoolExecutor(1) as pool:
            said = pool.submit(answer)
            assert not member.join()
        assert member.refusal.startswith("it does not prove that it knows the secret")
        assert SECRET.decode() not in json.dumps(said.result())


def test_what_one_caller_has_proved_does_not_serve_another():
    port = free_port()
    hub = Hub(machine(0), HERE, port, shared=SECRET)
    hub.start()
    overheard = secret.proof(SECRET, "member", "the challenge of an earlier call", "c", machine(1).line)
    with socket.create_connection((HERE, port)) as other:
        assert "its own is another one" in hello(other, proof=overheard)["refused"]
    hub.close()


def test_the_secret_is_read_from_a_file_or_a_variable(tmp_path):
    path = tmp_path / "launch.secret"
    path.write_bytes(SECRET + b"\n")
    path.chmod(0o600)
    assert secret.read({secret.FILE: str(path)}) == SECRET == secret.read({secret.TEXT: SECRET.decode()})
    assert secret.read({}) is None


@pytest.mark.parametrize("mode, content, reason", [
    (0o644, SECRET, "other users may read or change it"),
    (0o600, b"short", "a secret of 5 characters; at least 16 are wanted"),
    (None, b"", "cannot be read (No such file or directory)")])
def test_a_secret_that_protects_nothing_is_refused(mode, content, reason, tmp_path):
    path = tmp_path / "launch.secret"
    if mode is not None:
        path.write_bytes(content)
        path.chmod(mode)
    with pytest.raises(UserError) as caught:
        secret.read({secret.FILE: str(path)})
    assert reason in str(caught.value) and str(path) in str(caught.value)
    with pytest.raises(UserError, match="are both set"):
        secret.read({secret.FILE: str(path), secret.TEXT: SECRET.decode()})


def test_nobody_at_home(monkeypatch):
    monkeypatch.setattr(machines, "_CONNECT_S", 0.5)
    begin = time.monotonic()
    member = Member(machine(1), HERE, free_port())
    assert not member.join() and member.refusal is None
    assert time.monotonic() - begin < 3
    with socket.create_server((HERE, 0)) as mute:  # a scheduler of MindSpore, say
        member = Member(machine(1), HERE, mute.getsockname()[1])
        assert not member.join() and member.refusal is None
    member.close()
