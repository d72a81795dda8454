"""A headless Chromium with one page open, driven over its debugging pipe: no driver and no package is needed."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any, Dict


class Page:
    """One page.

    Args:
        browser: Chromium's executable.
        folder: for its profile.
        url: what to open.
    """

    def __init__(self, browser: str, folder: Path, url: str):
        hear, their_out = os.pipe()
        their_in, say = os.pipe()

        def place() -> None:  # Chromium reads its orders from 3 and answers on 4
            ours, theirs = os.dup(their_in), os.dup(their_out)
            os.dup2(ours, 3)
            os.dup2(theirs, 4)

        self._process = subprocess.Popen(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--disable-dev-shm-usage",
             f"--user-data-dir={folder / 'profile'}", "--remote-debugging-pipe", "about:blank"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, close_fds=False,
            preexec_fn=place)
        os.close(their_in)
        os.close(their_out)
        self._say, self._hear, self._held, self._number = say, hear, b"", 0
        self._session: Dict[str, str] = {}
        target = self._ask("Target.createTarget", url=url)["targetId"]
        self._session = {"sessionId": self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *failure: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._say)
        os.close(self._hear)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        made = self._ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in made, made["exceptionDetails"]
        return made["result"].get("value")

    def wait(self, condition: str, timeout_s: float = 60) -> None:
        """Returns when a JavaScript condition holds."""
        deadline = time.monotonic() + timeout_s
        while not self.run(condition):
            assert time.monotonic() < deadline, condition
            time.sleep(0.05)

    def picture(self, path: Path) -> None:
        """A PNG of what is seen."""
        import base64
        path.write_bytes(base64.b64decode(self._ask("Page.captureScreenshot")["data"]))

    def _ask(self, method: str, **parameters: Any) -> Dict[str, Any]:
        self._number += 1
        order = {"id": self._number, "method": method, "params": parameters, **self._session}
        os.write(self._say, json.dumps(order).encode() + b"\0")
        while True:
            while b"\0" not in self._held:
                data = os.read(self._hear, 1 << 16)
                assert data, "the browser has ended"
                self._held += data
            line, self._held = self._held.split(b"\0", 1)
            answer = json.loads(line)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
