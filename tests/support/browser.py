"""Headless Chromium over its debugging pipe: opens a file and says what happened, by the standard library alone.

CHROMIUM is the program's path, None where there is none.
"""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
)


class Browser:
    """One page. `events` holds everything that the browser reported of it, in order."""

    def __init__(self, send, receive):
        self._send, self._receive, self._count, self._buffer = send, receive, 0, b""
        self.events = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    _session = None

    def call(self, method, **params):
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self):
        while b"\0" not in self._buffer:
            part = os.read(self._receive, 1 << 20)
            assert part, "the browser has gone"
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(line)
        if "method" in message:
            self.events.append(message)
        return message

    def open(self, file, width, height=900):
        """Opens a file at a width in CSS pixels and waits until it has loaded."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.events.clear()
        self.call("Page.navigate", url=Path(file).resolve().as_uri())
        end = time.monotonic() + 60
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            assert time.monotonic() < end, "the page did not load"
            self._next()

    def evaluate(self, expression):
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"]["value"]

    def requests(self):
        """Addresses that the page asked for."""
        sent = [event["params"] for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [params["request"]["url"] for params in sent]

    def complaints(self):
        """Exceptions, console messages and log entries."""
        wanted = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [event for event in self.events if event["method"] in wanted]

    def screenshot(self, file):
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        Path(file).write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def browser():
    (theirs, send), (receive, back) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        # The program wants to read from descriptor 3 and to write to descriptor 4.
        start = f"import os, sys; os.dup2({theirs}, 3); os.dup2({back}, 4); os.execv(sys.argv[1], sys.argv[1:])"
        process = subprocess.Popen(
            [sys.executable, "-c", start, CHROMIUM, *FLAGS, f"--user-data-dir={folder}"],
            pass_fds=(theirs, back),
            stderr=subprocess.DEVNULL,
        )
        for descriptor in (theirs, back):  # so that the end of the program is the end of the pipe
            os.close(descriptor)
        try:
            yield Browser(send, receive)
        finally:
            process.kill()
            process.wait()
            for descriptor in (send, receive):
                os.close(descriptor)
