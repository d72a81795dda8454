"""What the launchers of several machines tell each other, over real sockets: failures, losses, and strangers who call."""

import json
import socket
import time

import pytest
from launch_runs import free_port
from qwen15.launch import machines
from qwen15.launch.machines import Hub, Machine, Member, Report

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


def hello(connection, **changes):
    connection.sendall(json.dumps({"machine": {"number": 1, "first": 1, "count": 1, "worker_num": 3, **changes}}).encode() + b"\n")
    return json.loads(connection.makefile().readline())


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


STRANGE = [b"GET / HTTP/1.1\r\n\r\n", b"\x00\xff\n", b"[]\n", b'{"machine": 3}\n', b'{"machine": {"number": "x"}}\n', b'{"failed": {}}\n',
           b"[" * 100000 + b"\n", b"x" * (2 ** 18 + 1), b'{"done": true}\n']


def test_strangers_do_no_harm(links):
    strangers = [links.call() for _ in STRANGE]
    for stranger, line in zip(strangers, STRANGE):
        try:
            stranger.sendall(line)
        except OSError:
            pass  # hung up already
    one, joined = links.join(1)
    assert joined
    time.sleep(1)
    assert links.hub.failure is None and one.failure is None
    for stranger in strangers:
        stranger.close()


def test_text_from_elsewhere_cannot_move_the_cursor(links):
    with links.call() as other:
        hello(other)
        other.sendall(json.dumps({"failed": {"where": "rank 1", "what": "\x1b[2Jgone\nerror: forged", "fix": "", "code": 999, "log": "",
                                             "lines": ["a\x07" * 600] * 25}}).encode() + b"\n")
        told = failure_of(links.hub)
        assert told.what == "\ufffd[2Jgone\ufffderror: forged" and told.code == 1
        assert len(told.lines) == 20 and len(told.lines[0]) == 1000 and "\x07" not in told.lines[0]


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
