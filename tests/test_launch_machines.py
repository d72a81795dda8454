"""The form with nine arguments between two machines: two network namespaces with an address each. Needs root and
iproute2."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid

import pytest
from launch_runs import SCHEDULER, Launch, worker

pytest.importorskip("mindspore")
pytestmark = pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"),
                                reason="network namespaces need root and iproute2")
PORT = 9118
ENDS_WITHIN_S = 10


class Machines:
    """Two namespaces joined by a cable, machine 0 at 10.200.77.1 and machine 1 at 10.200.77.2."""

    def __init__(self):
        mark = uuid.uuid4().hex[:6]
        self.names = [f"q15-{mark}-{number}" for number in (0, 1)]
        self.addresses = ["10.200.77.1", "10.200.77.2"]
        self._cables = [f"v{mark}{number}" for number in (0, 1)]

    def __enter__(self):
        for name in self.names:
            self.ip("netns", "add", name)
        self.ip("link", "add", self._cables[0], "type", "veth", "peer", "name", self._cables[1])
        for name, cable, address in zip(self.names, self._cables, self.addresses):
            self.ip("link", "set", cable, "netns", name)
            self.ip("-n", name, "addr", "add", f"{address}/24", "dev", cable)
            self.ip("-n", name, "link", "set", cable, "up")
            self.ip("-n", name, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_):
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False)

    @staticmethod
    def ip(*words):
        subprocess.run(["ip", *words], check=True, capture_output=True)

    def unplug(self):
        """Take the cable out."""
        self.ip("-n", self.names[1], "link", "set", self._cables[1], "down")

    def launch(self, number, folder, command, workers=2, local=1, address=None, timeout_s=60, **environ):
        """The launcher on one machine."""
        folder = folder / f"machine_{number}"
        folder.mkdir()
        return Launch(command, workers, local, address or self.addresses[0], PORT, number, "logs", "True", timeout_s,
                      folder=folder, prefix=("ip", "netns", "exec", self.names[number]), **environ)


@pytest.fixture
def machines():
    try:
        with Machines() as made:
            yield made
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")


@pytest.mark.parametrize("first, local", [
    (0, 1), pytest.param(1, 1, marks=pytest.mark.slow), pytest.param(0, 2, marks=pytest.mark.slow)])
def test_two_machines_add_up_in_any_order_of_starting(first, local, machines, tmp_path):
    shared = {} if local > 1 else {"QWEN15_LAUNCH_SECRET": "the same on both machines"}
    with machines.launch(first, tmp_path, worker("add"), 2 * local, local, **shared) as one:
        if first == 1:
            one.until(lambda run: "waiting up to 60 s for the scheduler at 10.200.77.1:9118" in run.err)
        else:
            time.sleep(1)
        with machines.launch(1 - first, tmp_path, worker("add"), 2 * local, local, **shared) as two:
            assert two.wait() == 0, two.err + one.err
            assert one.wait() == 0, one.err
            total = local * (2 * local + 1)
            assert ("warning: without a secret" in one.err + two.err) is not bool(shared)
            answers = {one: one.out, two: two.out}
            assert answers[one if first == 0 else two] == f"rank 0 of {2 * local}: sum {total}\n".encode()
            assert answers[two if first == 0 else one] == b""
            other = two if first == 0 else one
            assert f"rank {2 * local - 1} of {2 * local}: sum {total}" in other.log(f"worker_{2 * local - 1}.log",
                                                                                    "logs")
            assert one.processes() == {} == two.processes()


def test_a_wrong_address_is_named_on_either_machine(machines, tmp_path):
    with machines.launch(1, tmp_path, worker("add"), address="10.200.77.9", timeout_s=3) as run:
        assert run.wait(30) == 1
        assert "no scheduler at 10.200.77.9:9118 within 3 s (" in run.err and "Start machine 0" in run.err
        assert run.processes() == {}
    with machines.launch(0, tmp_path, worker("add"), address="10.200.77.9") as run:
        assert run.wait(30) == 2
        assert "10.200.77.9 is not an address of this machine, and NODE_RANK is 0" in run.err


@pytest.mark.slow
def test_a_machine_that_never_comes_is_named(machines, tmp_path):
    with machines.launch(0, tmp_path, worker("add"), timeout_s=12) as run:
        assert run.wait(60) != 0
        assert "rank 1 did not join within 12 s; rank 0 did" in run.err
        assert run.processes() == {}
    with machines.launch(1, tmp_path, worker("add"), timeout_s=3) as run:
        assert run.wait(30) == 1 and "no scheduler at 10.200.77.1:9118 within 3 s (connection refused)" in run.err


def decoding(machines, tmp_path):
    one = machines.launch(0, tmp_path, worker("phases", "4000"))
    two = machines.launch(1, tmp_path, worker("phases", "4000"))
    for run in (one, two):
        (run.folder / "load").touch()
    return one, two


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow),
                                    pytest.param(SCHEDULER, marks=pytest.mark.slow)])
def test_what_is_killed_on_one_machine_is_named_on_both_and_ends_both(victim, machines, tmp_path):
    one, two = decoding(machines, tmp_path)
    with one, two:
        one.read_until(b"step 3 ")
        two.until(lambda run: "step 3 " in run.log("worker_1.log", "logs"))
        here, there = (two, one) if victim == 1 else (one, two)
        number = 1 if victim == 1 else 0
        begin = time.monotonic()
        os.kill(here.processes()[victim], signal.SIGKILL)
        assert here.wait(30) == 137 and there.wait(30) == 137, one.err + two.err
        assert time.monotonic() - begin < ENDS_WITHIN_S
        name = "the scheduler" if victim == SCHEDULER else f"rank {victim}"
        assert f"error: {name}: killed by SIGKILL." in here.err
        assert f"error: {name} on machine {number}: killed by SIGKILL." in there.err
        log = "scheduler.log" if victim == SCHEDULER else f"worker_{victim}.log"
        assert f"Its log there: {here.folder}/logs/{log}." in there.err
        if victim != SCHEDULER:
            assert re.search(rf"last lines of \S*worker_{victim}\.log there\n(.*\n)*step 3 sum 2\n", there.err)
        assert one.processes() == {} == two.processes()


@pytest.mark.parametrize("how", ["unplugged", pytest.param("launcher killed", marks=pytest.mark.slow),
                                 pytest.param("launcher stopped", marks=pytest.mark.slow)])
def test_a_machine_lost_while_decoding_is_named_within_seconds(how, machines, tmp_path):
    one, two = decoding(machines, tmp_path)
    with one, two:
        one.read_until(b"step 3 ")
        begin = time.monotonic()
        if how == "unplugged":
            machines.unplug()
        else:
            two.popen.send_signal(signal.SIGKILL if how == "launcher killed" else signal.SIGSTOP)
        assert one.wait(90) == 1
        assert time.monotonic() - begin < ENDS_WITHIN_S, one.err
        why = "its launcher has ended" if how == "launcher killed" else "nothing has been heard from it for 6 s"
        assert f"error: machine 1 (rank 1) at 10.200.77.2: {why}." in one.err
        if how == "unplugged":
            assert two.wait(60) == 1
            assert "error: machine 0 (rank 0) at 10.200.77.1: nothing has been heard from it for 6 s." in two.err
            assert time.monotonic() - begin < ENDS_WITHIN_S + 1
        if how == "launcher stopped":
            two.popen.send_signal(signal.SIGCONT)
            assert two.wait(30) == 1 and "machine 0" in two.err
        deadline = time.monotonic() + 5
        while two.processes() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert one.processes() == {} == two.processes()


@pytest.mark.slow
def test_ctrl_c_on_one_machine_ends_the_other(machines, tmp_path):
    one, two = decoding(machines, tmp_path)
    with one, two:
        one.read_until(b"step 3 ")
        begin = time.monotonic()
        two.popen.send_signal(signal.SIGINT)
        assert two.wait(30) == 130 and one.wait(30) == 130
        assert time.monotonic() - begin < ENDS_WITHIN_S
        assert "error: the launcher on machine 1: ended by SIGINT" in one.err
        assert one.processes() == {} == two.processes()


@pytest.mark.slow
def test_without_the_launchers_connection_mindspores_heartbeat_finds_a_lost_machine(machines, tmp_path):
    with subprocess.Popen(["ip", "netns", "exec", machines.names[0], sys.executable, "-c",
                           f"import socket, time; s = socket.create_server(('{machines.addresses[0]}', {PORT + 1})); "
                           "print(flush=True); time.sleep(600)"], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        try:
            one, two = decoding(machines, tmp_path)
            with one, two:
                one.read_until(b"step 3 ")
                begin = time.monotonic()
                machines.unplug()
                assert one.wait(90) != 0
                assert 20 < time.monotonic() - begin < 30 + 5 + 10
                assert f"port {PORT + 1} of 10.200.77.1 cannot be used (Address already in use)" in one.err
                assert "no heartbeat has come from rank 1, on another machine, for 30 s" in one.err
                assert "launcher does not answer at 10.200.77.1:9119" in two.err
                assert two.wait(60) != 0, two.err
                assert one.processes() == {} == two.processes()
        finally:
            other.kill()


@pytest.mark.slow
def test_machines_that_do_not_fit_together_are_named(machines, tmp_path):
    with machines.launch(0, tmp_path, worker("add"), 4, 1) as one:
        one.until(lambda run: "started" in run.err)
        with machines.launch(1, tmp_path, worker("add"), 5, 1) as two:
            assert two.wait(30) == 2
            assert ("error: NODE_RANK 1: machine 0 does not take this one: WORKER_NUM is 5 here and 4 on machine 0"
                    in two.err)
        assert one.popen.poll() is None
