"""Thousands of requests of every kind at once, good and bad: the server keeps nothing of them and answers as before."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from pathlib import Path

import pytest
from command_fixtures import make_random
from serve_fixtures import serving

pytest.importorskip("starlette")
pytest.importorskip("torch")

REQUESTS = int(os.environ.get("QWEN15_TEST_SOAK", "2000"))
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def resident_mib(pid):
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def threads(pid):
    return len(os.listdir(f"/proc/{pid}/task"))


class Client:
    """One that behaves at random."""

    def __init__(self, server, seed, expected):
        self.server, self.random, self.expected = server, random.Random(seed), expected
        self.done, self.wrong = 0, []

    def act(self):
        kind = self.random.choice([self.answered, self.answered, self.streamed, self.left_at_once,
                                   self.left_in_a_stream,
                                   self.malformed, self.oversize, self.half_sent])
        try:
            kind()
        except (ConnectionError, socket.timeout, OSError) as error:
            self.wrong.append(f"{kind.__name__}: {error!r}")
        self.done += 1

    def body(self, **more):
        prompt = self.random.choice(list(self.expected))
        return prompt, {"prompt": prompt, "max_tokens": 8, "temperature": 0, **more}

    def check(self, held, told):
        if not held:
            self.wrong.append(told)

    def answered(self):
        prompt, body = self.body(n=self.random.choice([1, 1, 2]))
        status, answer, _ = self.server.send(TEXT, body)
        self.check(status == 429 or status == 200 and
                   all(c["text"] == self.expected[prompt] for c in answer["choices"]), (status, answer))

    def streamed(self):
        prompt, body = self.body(stream=True)
        status, answer, _ = self.server.send(TEXT, body)
        self.check(status == 429 or status == 200 and answer.rstrip().endswith("data: [DONE]"), (status, answer))

    def left_at_once(self):
        self.server.connect(TEXT, self.body(n=3, max_tokens=40)[1]).close()

    def left_in_a_stream(self):
        link = self.server.connect(TEXT, self.body(stream=True, max_tokens=60)[1])
        link.recv(self.random.choice([1, 200, 2000]))
        link.close()

    def malformed(self):
        body = self.random.choice([b"{", b"\xff", b"[]", b'{"prompt": 3}', b'{"prompt": "a", "n": "x"}',
                                   b'{"messages": {}}'])
        status, answer, _ = self.server.send(self.random.choice([CHAT, TEXT]), body)
        self.check(status == 400 and "error" in answer, (status, answer))

    def oversize(self):
        status, answer, _ = self.server.send(TEXT, {"prompt": "long " * 5000, "max_tokens": 1})
        self.check(status == 400 and answer["error"]["code"] == "context_length_exceeded", (status, answer))

    def half_sent(self):
        link = socket.create_connection(("127.0.0.1", self.server.port), timeout=30)
        link.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
        link.close()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_requests_of_every_kind_leave_nothing_behind(tmp_path, small_model):
    with serving(make_random(tmp_path, small_model), "--max_batch", "8", "--max_waiting", "64") as server:
        pid = server.process.pid
        expected = {prompt: server.send(TEXT,
                                        {"prompt": prompt, "max_tokens": 8, "temperature": 0})[1]["choices"][0]["text"]
                    for prompt in (f"Number {n} " + "and so on " * n for n in range(12))}
        clients = [Client(server, seed, expected) for seed in range(12)]

        def run(client, count):
            for _ in range(count):
                client.act()

        def all_run(count):
            running = [threading.Thread(target=run, args=(client, count)) for client in clients]
            for thread in running:
                thread.start()
            for thread in running:
                thread.join()
            server.wait_until_idle(120)

        all_run(REQUESTS // 4 // len(clients))  # until pools and caches have their size
        time.sleep(1)
        before = resident_mib(pid), threads(pid)
        all_run(REQUESTS * 3 // 4 // len(clients))
        time.sleep(1)
        after = resident_mib(pid), threads(pid)
        wrong = [line for client in clients for line in client.wrong]
        print(f"{sum(client.done for client in clients)} requests, resident {before[0]:.0f} -> {after[0]:.0f} MiB, "
              f"threads {before[1]} -> {after[1]}")
        assert wrong == []
        assert server.gauge("kv_cache_free_blocks") == server.gauge("kv_cache_blocks")
        assert after[1] <= before[1] and after[0] < before[0] * 1.05 + 10
        assert not [line for line in server.said if "Traceback" in line or "error:" in line]
