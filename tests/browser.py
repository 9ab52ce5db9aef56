"A headless Chromium driven by the DevTools protocol, and programs that live as long as a test."
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync --remote-debugging-port=0 --window-size=1200,900").split()


def until(question, seconds: float = 180.0):
    "The first answer that is not empty; the last exception is told if there is none."
    deadline, error = time.monotonic() + seconds, None
    while time.monotonic() < deadline:
        try:
            if answer := question():
                return answer
        except (OSError, ValueError, KeyError, IndexError) as failure:
            error = failure
        time.sleep(0.2)
    raise AssertionError(f"no answer within {seconds:.0f} s: {error}")


def get(url: str):
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.loads(answer.read())


@contextlib.contextmanager
def program(command: list, log: Path, **options):
    "A program for as long as it is needed, with its children."
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, **options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class Page:
    "A page of a browser, driven by the DevTools protocol."

    def __init__(self, socket):
        self.socket, self.numbers = socket, itertools.count(1)
        self.events = []  # what the browser said beside its answers

    def send(self, method: str, **parameters):
        self.socket.send(json.dumps({"id": (number := next(self.numbers)), "method": method, "params": parameters}))
        while (answer := json.loads(self.socket.recv())).get("id") != number:
            self.events.append(answer)
        return answer["result"]

    def value(self, expression: str):
        "The value of a JavaScript expression; None if it fails."
        return self.send("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    websocket = pytest.importorskip("websocket", reason="websocket-client is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium to look with; on Debian: apt-get install chromium")
    profile = tmp_path_factory.mktemp("chromium")
    with program([CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"], profile / "chromium.log"):
        port = until(lambda: (profile / "DevToolsActivePort").read_text().split()[0])
        address = until(lambda: [tab for tab in get(f"http://127.0.0.1:{port}/json") if tab["type"] == "page"][0]["webSocketDebuggerUrl"])
        yield Page(websocket.create_connection(address, timeout=60, suppress_origin=True))
