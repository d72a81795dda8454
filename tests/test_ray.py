"""Ray: replicas of the server behind one gate, and files of prompts over a cluster; nodes that are killed meanwhile.

The clusters are Ray's own test clusters: several nodes as processes of this machine.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
import yaml
from command_fixtures import error_line, make_random
from conftest import MODULE
from qwen15.errors import UserError
from qwen15.ray_environment import ENVIRONMENT
from qwen15.serve import replicas

for name in ("RAY_DASHBOARD_STARTUP_TIMEOUT_S", "RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT"):
    os.environ.setdefault(name, "300")  # Ray's own patience ends when the machine has other work; read at its import
NODE = {"object_store_memory": 80 * 2 ** 20}
LONG = {"prompt": "Gravity is", "max_tokens": 1500, "min_tokens": 1500, "temperature": 0, "stream": True}


def test_the_yamls_arguments_are_the_flags_of_serve():
    from qwen15.serve.command import parser
    made = replicas.command_line({"load_checkpoint": "/m", "max_batch": 4, "use_past": True, "debug": False,
                                  "served_model_name": ["a", "b"],
                                  "options": {"model.model_config.seq_length": 512}})
    args = parser().parse_args(made)
    assert (args.max_batch, args.served_model_name, args.options) == (4, ["a", "b"],
                                                                     ["model.model_config.seq_length=512"])
    shipped, = yaml.safe_load((MODULE / "ray_serve.yaml").read_text())["applications"]
    assert shipped["import_path"] == "qwen15.serve.replicas:application"
    parser().parse_args(replicas.command_line(shipped["args"]))
    assert shipped["runtime_env"] == {"env_vars": ENVIRONMENT}  # its ray_actor_options replace the code's


@pytest.mark.parametrize("arguments, line", [
    ({"port": 80}, "http_options.port"), ({"max_bach": 3}, "Did you mean max_batch?"),
    ({"use_parallel": True}, "Every replica is one process"),
])
def test_an_argument_that_cannot_be_is_told(arguments, line):
    with pytest.raises(UserError, match=line):
        replicas.command_line(arguments)


def test_flags_of_a_cluster_that_contradict_others_are_refused(tmp_path, small_model):
    file = tmp_path / "p.txt"
    file.write_text("Gravity is\n")
    base = ("--load_checkpoint", small_model)
    assert "--ray_workers: has no effect without --ray" in error_line(*base, "--predict_file", file,
                                                                      "--ray_workers", "2")
    assert "--ray: is for files of prompts" in error_line(*base, "--predict_data", "x", "--ray")
    assert "--ray_cpus: wants at least 1, not 0" in error_line(*base, "--predict_file", file, "--ray",
                                                                 "--ray_cpus", "0")


@pytest.mark.slow
def test_a_cluster_that_does_not_answer_is_told_in_one_line(tmp_path, small_model):
    pytest.importorskip("ray")
    file = tmp_path / "p.txt"
    file.write_text("Gravity is\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    line = error_line("--load_checkpoint", small_model, "--predict_file", file, "--ray", address, code=1)
    assert f"no Ray cluster answers at {address}" in line


@pytest.fixture(scope="module")
def model(tmp_path_factory, small_model):
    """A random model's YAML, with room for long answers."""
    made = make_random(tmp_path_factory.mktemp("ray"), small_model)
    text = made.read_text().replace("seq_length: 256", "seq_length: 4096").replace("num_blocks: 64", "num_blocks: 1024")
    made.write_text(text.replace("max_decode_length: 64", "max_decode_length: 4096"))
    return made


@pytest.fixture()
def cluster():
    """A head that computes nothing, and nodes with room for one replica or worker each."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": True,
                                                         "dashboard_port": port, **NODE})
    made.dashboard = f"http://127.0.0.1:{port}"
    made.nodes = [made.add_node(num_cpus=1, **NODE) for _ in range(2)]
    yield made
    made.shutdown()


@pytest.mark.slow
def test_a_killed_node_loses_no_prompt_and_none_is_written_twice(cluster, model, tmp_path):
    prompts, answers, alone = tmp_path / "p.txt", tmp_path / "answers.jsonl", tmp_path / "alone.jsonl"
    prompts.write_text("".join(f"Prompt number {number}\n" for number in range(160)))
    command = [sys.executable, "-m", "qwen15", "predict", "--config", str(model), "--device_target", "CPU",
               "--predict_file", str(prompts), "--max_new_tokens", "150", "--max_batch", "4"]
    on_cluster = [*command, "--output_file", str(answers), "--ray", cluster.address, "--ray_cpus", "1"]
    process = subprocess.Popen(on_cluster, cwd=MODULE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _wait(lambda: answers.exists() and answers.read_text().count("\n") >= 8, process=process)
    cluster.remove_node(cluster.nodes.pop(), allow_graceful=False)
    said, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    assert said == "" and "a worker is gone" in told and "Traceback" not in told
    results = [json.loads(line) for line in answers.read_text().splitlines()]
    assert sorted(result["index"] for result in results) == list(range(160))
    subprocess.run([*command, "--output_file", str(alone)], cwd=MODULE, check=True, capture_output=True, timeout=300)
    expected = {result["index"]: result["text"] for result in map(json.loads, alone.read_text().splitlines())}
    assert {result["index"]: result["text"] for result in results} == expected
    again = subprocess.run(on_cluster, cwd=MODULE, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and "nothing is left to do" in again.stderr


class Service:
    """The application on a cluster, deployed from a YAML by `serve deploy`."""

    def __init__(self, cluster, model, folder, **deployment):
        self._cluster, self._file = cluster, folder / "serve.yaml"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._shipped = yaml.safe_load((MODULE / "ray_serve.yaml").read_text())
        self._shipped["http_options"]["port"] = self.port
        application, = self._shipped["applications"]
        application["args"] = {"config": str(model), "device_target": "CPU", "api_key": "secret", "max_batch": 4,
                               "max_waiting": 2}
        self.deploy(**deployment)

    def deploy(self, **deployment):
        """Deploy, or change, the replicas."""
        application, = self._shipped["applications"]
        application["deployments"] = [{"name": "Model", "ray_actor_options": {"num_cpus": 1}, **deployment}]
        self._file.write_text(yaml.safe_dump(self._shipped))
        subprocess.run([sys.executable, "-m", "ray.serve.scripts", "deploy", "-a", self._cluster.dashboard,
                        str(self._file)], check=True, timeout=120, capture_output=True)

    def replicas(self):
        """Running replicas of the model; 0 while there is none."""
        with urllib.request.urlopen(self._cluster.dashboard + "/api/serve/applications/", timeout=30) as answer:
            told = json.load(answer)
        application = told["applications"].get("qwen", {})
        assert application.get("status") != "DEPLOY_FAILED", application["message"]
        found = application.get("deployments", {}).get("Model", {}).get("replicas", [])
        return sum(replica["state"] == "RUNNING" for replica in found)

    def open(self, body, key="secret"):
        made = urllib.request.Request(f"http://127.0.0.1:{self.port}/v1/completions", json.dumps(body).encode(),
                                      {"Content-Type": "application/json", "Authorization": f"Bearer {key}"})
        return urllib.request.urlopen(made, timeout=120)

    def send(self, body, key="secret"):
        """Status and JSON."""
        try:
            with self.open(body, key) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def stream(self, body=LONG):
        """The events of a stream, as JSON's values; the last may be 'DONE'."""
        with self.open(body) as answer:
            for line in answer:
                if line.startswith(b"data: "):
                    yield "DONE" if line.strip() == b"data: [DONE]" else json.loads(line[6:])


@pytest.mark.slow
def test_replicas_answer_as_one_server_and_a_killed_node_loses_its_own_requests_only(cluster, model, tmp_path):
    service = Service(cluster, model, tmp_path, num_replicas=2, autoscaling_config=None)
    _wait(lambda: service.replicas() == 2, 180)
    short = {**LONG, "max_tokens": 6, "min_tokens": 6}
    status, answer = service.send({**short, "stream": False})
    assert status == 200 and answer["usage"]["completion_tokens"] == 6
    *pieces, done = service.stream(short)
    assert done == "DONE"
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == answer["choices"][0]["text"]
    assert service.send(short, key="wrong")[0] == 401
    refused, told = service.send({"prompt": "a", "temprature": 1})
    assert refused == 400 and told["error"]["param"] == "temprature"
    refused, told = service.send({"prompt": "a", "n": 9, "temperature": 1})
    assert refused == 400 and "at most 6" in told["error"]["message"]  # a replica's own max_batch and max_waiting

    ends, begun = {}, []

    def follow(number):
        for event in service.stream():
            if number not in begun:
                begun.append(number)
            ends[number] = event

    threads = [threading.Thread(target=follow, args=(number,)) for number in range(4)]
    for number, thread in enumerate(threads):  # one by one: Ray shares them out by what is known to run
        thread.start()
        _wait(lambda number=number: number in begun, 60)
    cluster.remove_node(cluster.nodes.pop(), allow_graceful=False)
    for thread in threads:
        thread.join(180)
    lost = [end for end in ends.values() if end != "DONE"]
    assert len(ends) == 4 and 0 < len(lost) < 4, ends
    assert all(end["error"]["code"] == "replica_failed" for end in lost), lost
    assert service.send({**short, "stream": False})[0] == 200
    cluster.add_node(num_cpus=1, **NODE)
    _wait(lambda: service.replicas() == 2, 180)
    assert [service.send({**short, "stream": False})[0] for _ in range(4)] == [200] * 4


@pytest.mark.slow
def test_more_requests_bring_more_replicas(cluster, model, tmp_path):
    service = Service(cluster, model, tmp_path, autoscaling_config={
        "min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 1, "upscale_delay_s": 1,
        "look_back_period_s": 2, "metrics_interval_s": 1})
    _wait(lambda: service.replicas() == 1, 180)
    stop = threading.Event()

    def keep_asking():
        while not stop.is_set():
            for _ in service.stream():
                if stop.is_set():
                    return

    threads = [threading.Thread(target=keep_asking) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        _wait(lambda: service.replicas() == 2, 180)
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)


def _wait(condition, timeout_s=120, process=None):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process is None or process.poll() is None, process.stderr.read()
        if time.monotonic() > deadline:
            if process is not None:
                process.send_signal(signal.SIGKILL)
            raise AssertionError(f"not within {timeout_s} s")
        time.sleep(0.05)
