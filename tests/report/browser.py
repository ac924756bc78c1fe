"""Headless Chromium over its debugging pipe: what a page shows, asks for and complains about at a given screen."""

from __future__ import annotations

import base64
import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
#: Without these a container has no sandbox and no shared memory to give, and Chromium talks to its maker.
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--remote-debugging-pipe",
)


def find() -> str | None:
    """The browser on this machine, if there is one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@dataclasses.dataclass(frozen=True)
class Screen:
    width: int
    scheme: str = "light"
    height: int = 800
    scripts: bool = True


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    to_child, commands = os.pipe()
    replies, from_child = os.pipe()

    def take_pipes() -> None:
        # Chromium reads commands from 3 and writes replies to 4; the copies below keep the two from clashing.
        reader, writer = os.dup(to_child), os.dup(from_child)
        os.dup2(reader, 3)
        os.dup2(writer, 4)

    binary = find()
    assert binary is not None
    process = subprocess.Popen(
        [binary, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        preexec_fn=take_pipes,
        close_fds=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(to_child)
    os.close(from_child)
    try:
        yield Browser(commands, replies)
    finally:
        os.close(commands)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(replies)


class Browser:
    """One tab. `problems` are console messages and errors, `requests` the addresses asked for, since `open`."""

    def __init__(self, commands: int, replies: int) -> None:
        self.commands, self.replies, self.rest = commands, replies, b""
        self.numbers = itertools.count(1)
        self.session: str | None = None
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.loaded = False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def open(self, path: Path, screen: Screen) -> None:
        """Show a file and wait until it is loaded."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=screen.width,
            height=screen.height,
            deviceScaleFactor=1,
            mobile=screen.width < 600,
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": screen.scheme}])
        self.call("Emulation.setScriptExecutionDisabled", value=not screen.scripts)
        self.problems, self.requests, self.loaded = [], [], False
        self.call("Page.navigate", url=path.absolute().as_uri())
        while not self.loaded:
            self.receive()

    def evaluate(self, expression: str) -> Any:
        """The JSON value of a JavaScript expression on the page."""
        reply = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    def shoot(self, path: Path, whole: bool = True) -> None:
        """A PNG of the page, below the fold too."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        message = {"id": (number := next(self.numbers)), "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while (reply := self.receive()).get("id") != number:
            pass
        assert "error" not in reply, reply
        return reply["result"]

    def receive(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            chunk = os.read(self.replies, 1 << 20)
            assert chunk, "the browser is gone"
            self.rest += chunk
        line, _, self.rest = self.rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        self.note(message.get("method", ""), message.get("params", {}))
        return message

    def note(self, event: str, details: dict[str, Any]) -> None:
        if event == "Page.loadEventFired":
            self.loaded = True
        elif event == "Network.requestWillBeSent":
            self.requests.append(details["request"]["url"])
        elif event == "Runtime.consoleAPICalled":
            self.problems.append(str([argument.get("value") for argument in details["args"]]))
        elif event == "Runtime.exceptionThrown":
            self.problems.append(str(details["exceptionDetails"]))
        elif event == "Log.entryAdded":
            self.problems.append(details["entry"]["text"])
