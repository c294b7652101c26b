"""Headless Chromium, driven over its debugging pipe: messages in JSON, each ended by a zero byte. Nothing else is needed."""

import base64
import json
import select
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PATH = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking")
PATIENCE = 120  # seconds for an answer


class Tab:
    """One tab of one browser. `events` holds what it said unasked since it was opened."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._session: str | None = None
        self._received = b""
        self._count = 0
        self.events: list[tuple[str, dict[str, Any]]] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> Any:
        """One command of the DevTools protocol, and its answer."""
        self._count += 1
        session = {"sessionId": self._session} if self._session else {}
        message = {"id": self._count, "method": method, "params": parameters, **session}
        assert self._process.stdin
        self._process.stdin.write(json.dumps(message).encode() + b"\0")
        self._process.stdin.flush()
        while (answer := self._receive()).get("id") != self._count:
            pass
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _receive(self) -> Any:
        """The next message, noted if it is an event."""
        assert self._process.stdout
        while b"\0" not in self._received:
            ready, _, _ = select.select([self._process.stdout], [], [], PATIENCE)
            assert ready, f"Chromium said nothing for {PATIENCE} s"
            more = self._process.stdout.read1()
            assert more, "Chromium is gone"
            self._received += more
        message, _, self._received = self._received.partition(b"\0")
        found = json.loads(message)
        if "method" in found:
            self.events.append((found["method"], found["params"]))
        return found

    def open(self, path: Path) -> None:
        """Load a file, and wait until all of it is there."""
        self.send("Page.navigate", url=path.resolve().as_uri())
        while self._receive().get("method") != "Page.loadEventFired":
            pass

    def run(self, script: str) -> Any:
        """The value of an expression, or of its promise."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def look(self, *, width: int = 1200, height: int = 900, scheme: str = "light", touch: bool = False) -> None:
        """The window's size, and whether the person likes it dark."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch)
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def press(self, key: str) -> None:
        """A key, by its DOM name."""
        codes = {"Tab": 9, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        for kind in ("rawKeyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key])

    def mouse(self, kind: str, x: float, y: float, *, held: bool = False) -> None:
        """mouseMoved, mousePressed or mouseReleased; with the left button `held` or concerned."""
        button = {"button": "left", "clickCount": 1} if kind != "mouseMoved" else {}
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, buttons=int(held), **button)

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """What is seen, or the whole page, as PNG."""
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def opened(profile: Path) -> Iterator[Tab]:
    """A browser of its own with one tab; its files lie in `profile`."""
    assert PATH
    arguments = [PATH, *OPTIONS, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
    # it reads from descriptor 3 and writes to 4
    command = ["sh", "-c", 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1', "sh", *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            tab = Tab(process)
            yield tab
            tab.send("Target.getTargets")  # so that all events are in
        finally:
            process.terminate()
