"""Headless Chromium, driven over the pipe that its DevTools protocol offers: no port, no driver, no package."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

from qcompiler.inspection.document import Document

EXECUTABLE = next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)
_FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --hide-scrollbars"
    " --disable-extensions --disable-background-networking --disable-component-update --disable-gpu-watchdog"
    " --remote-debugging-pipe"
)
_PATIENCE = 60.0


class Browser:
    """One window. `problems` are what pages said on the console, exceptions, and addresses that they asked for."""

    def __init__(self, folder: Path, *, width: int = 1440, height: int = 1000) -> None:
        assert EXECUTABLE is not None
        to_us, its_end = os.pipe()
        its_start, from_us = os.pipe()
        command = f'exec "$0" "$@" 3<&{its_start} 4>&{its_end}'
        self._process = subprocess.Popen(
            [
                "bash",  # sh knows descriptors of one digit only
                "-c",
                command,
                EXECUTABLE,
                *_FLAGS.split(),
                f"--user-data-dir={folder}",
                f"--window-size={width},{height}",
                "about:blank",
            ],
            pass_fds=(its_start, its_end),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(its_start)
        os.close(its_end)
        self._in, self._out, self._buffer, self._last = to_us, from_us, b"", 0
        self._session: str | None = None
        self.problems: list[str] = []
        self._loaded = False
        targets = self.send("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self.send("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._session = None
            self.send("Browser.close")
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
        finally:
            self._process.kill()
            self._process.wait()
            os.close(self._in)
            os.close(self._out)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol, and its result."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            heard = self._hear()
            if heard.get("id") == self._last:
                assert "error" not in heard, f"{method}: {heard['error']}"
                return dict(heard["result"])
            self._note(heard)

    def open(self, address: str, *, when: str = "document.documentElement.dataset.ready === 'true'") -> None:
        """Load a page, and wait until it is drawn."""
        self.send("Page.navigate", url=address)
        self.wait(f"document.readyState === 'complete' && ({when})")

    def wait(self, condition: str) -> None:
        limit = time.monotonic() + _PATIENCE
        while not self.run(condition):
            assert time.monotonic() < limit, f"it never came true: {condition}; {self.problems}"
            time.sleep(0.02)

    def run(self, expression: str) -> Any:
        """The value of an expression in the page."""
        done = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def click(self, selector: str) -> None:
        """A press of the mouse's button at the middle of an element, whatever lies there."""
        found = json.dumps(selector)
        self.run(f"document.querySelector({found}).scrollIntoView({{block: 'center', behavior: 'instant'}})")
        middle = "(({x, y, width, height}) => [x + width / 2, y + height / 2])"
        box = self.run(f"{middle}(document.querySelector({found}).getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def press(self, key: str, *, modifiers: int = 0) -> None:
        """A key by its name (`ArrowDown`, `Enter`) or character."""
        text = {"Enter": "\r", " ": " "}.get(key, key if len(key) == 1 else "")
        code = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        common = {"key": key, "windowsVirtualKeyCode": code.get(key, 0), "modifiers": modifiers}
        self.send("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **common)
        self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text: str) -> None:
        for character in text:
            self.press(character)

    def screenshot(self, file: Path, *, whole: bool = False) -> None:
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(shot["data"]))

    def _hear(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], _PATIENCE)
            got = os.read(self._in, 1 << 20) if ready else b""
            assert got, "the browser fell silent"
            self._buffer += got
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))

    def _note(self, event: dict[str, Any]) -> None:
        told = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                self.problems.append(f"exception: {told['exceptionDetails']}")
            case "Runtime.consoleAPICalled":
                self.problems.append(f"console: {told['args']}")
            case "Log.entryAdded":
                self.problems.append(f"log: {told['entry']['text']}")
            case "Page.javascriptDialogOpening":
                self.problems.append(f"dialog: {told['message']}")
            case "Network.requestWillBeSent" if not told["request"]["url"].startswith("file:"):
                self.problems.append(f"request: {told['request']['url']}")


Show: TypeAlias = Callable[[Document], Browser]


def text(browser: Browser, selector: str) -> str:
    return str(browser.run(f"document.querySelector({json.dumps(selector)}).innerText"))


def cell(row: int, column: int) -> str:
    return f"#grid tbody tr:nth-child({row}) td:nth-of-type({column})"


def focused(browser: Browser) -> str:
    return str(browser.run("document.activeElement.getAttribute('aria-label') ?? document.activeElement.id"))
