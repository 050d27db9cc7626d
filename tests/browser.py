"""A real browser for tests: Debian's Chromium without a window, over its debugging pipe.

The pipe needs no driver and no package: messages are JSON, each ended by a zero byte. Elements are
found by role and name, as a screen reader finds them, so what has no label can't be used here.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

Json = dict[str, Any]

PACKAGES = ("chromium", "fonts-dejavu-core")
SWITCHES = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--disable-quic", "--mute-audio", "--hide-scrollbars"),
)
KEYS = {
    "Enter": (13, "\r"),
    "Tab": (9, ""),
    "Escape": (27, ""),
    " ": (32, " "),
    "ArrowLeft": (37, ""),
    "ArrowUp": (38, ""),
    "ArrowRight": (39, ""),
    "End": (35, ""),
    "Home": (36, ""),
}
"""Key -> its code and the text that it makes."""
SECONDS = 30.0
"""That a test waits for what it expects."""


def chromium() -> str:
    """The browser's program, installed where it is missing; skips where it can't be."""
    found = shutil.which("chromium")
    if found is not None:
        return found
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        pytest.skip("needs Debian's chromium: apt-get install chromium")
    for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(
            ["apt-get", "-q", "-o", "DPkg::Lock::Timeout=120", *command],
            env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
            capture_output=True,
            text=True,
        )
    found = shutil.which("chromium")
    if found is None:
        pytest.skip(f"chromium can't be installed: {done.stderr.strip()[-300:]}")
    return found


class Browser:
    """One page of a browser that is started with it, and its keyboard and mouse."""

    def __init__(self, program: str, profile: Path) -> None:
        self.complaints: list[str] = []
        """Exceptions and errors of the page, refusals by its Content-Security-Policy among them."""
        # The browser reads from descriptor 3 and writes to 4; ours lie above, in nobody's way.
        pipes = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for _ in range(2) for end in os.pipe()]
        theirs_in, self.to, self.of, theirs_out = pipes
        self.process = os.posix_spawn(
            program,
            [program, *SWITCHES, f"--user-data-dir={profile}", "about:blank"],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, theirs_in, 3),
                (os.POSIX_SPAWN_DUP2, theirs_out, 4),
                (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
            ],
            setpgroup=0,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.received = b""
        self.number = 0
        self.session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "DOM", "Accessibility"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        os.killpg(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        os.close(self.to)
        os.close(self.of)

    def call(self, method: str, **parameters: Any) -> Json:
        """One command of the DevTools protocol."""
        self.number += 1
        message: Json = {"id": self.number, "method": method, "params": parameters}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self.number:
            self._note(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _receive(self) -> Json:
        while b"\0" not in self.received:
            received = os.read(self.of, 1 << 16)
            if not received:
                raise RuntimeError("the browser has ended")
            self.received += received
        message, _, self.received = self.received.partition(b"\0")
        return json.loads(message)

    def _note(self, event: Json) -> None:
        parameters = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(str(parameters["exceptionDetails"]))
        elif event.get("method") == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.complaints.append(parameters["entry"]["text"])

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page; promises are awaited."""
        answer = self.call(
            "Runtime.evaluate",
            expression=expression,
            returnByValue=True,
            awaitPromise=True,
            userGesture=True,
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait(self, expression: str) -> Any:
        """The value of an expression, once it is true."""
        end = time.monotonic() + SECONDS
        while not (value := self.evaluate(expression)):
            if time.monotonic() > end:
                raise AssertionError(f"still not true: {expression}; complaints: {self.complaints}")
            time.sleep(0.02)
        return value

    def find(self, role: str, name: str, count: int = 1) -> list[int]:
        """The visible elements of a role and a name, in the order of the page."""
        end = time.monotonic() + SECONDS
        while True:
            root = self.call("DOM.getDocument", depth=0)["root"]["backendNodeId"]
            nodes = self.call(
                "Accessibility.queryAXTree", backendNodeId=root, accessibleName=name, role=role
            )["nodes"]
            found = [node["backendDOMNodeId"] for node in nodes if not node["ignored"]]
            if len(found) == count:
                return found
            if time.monotonic() > end:
                raise AssertionError(f"{len(found)} elements, not {count}: {role} {name!r}")
            time.sleep(0.02)

    def click(
        self, role: str, name: str, *, which: int = 0, count: int = 1, at: float = 0.5
    ) -> None:
        """Press the mouse on an element, which nothing may cover.

        Args:
            which: of the `count` elements of that role and name.
            at: where, as a share of its width.
        """
        node = self.find(role, name, count)[which]
        self.call("DOM.scrollIntoViewIfNeeded", backendNodeId=node)
        quad = self.call("DOM.getContentQuads", backendNodeId=node)["quads"][0]
        x, y = quad[0] + at * (quad[2] - quad[0]), sum(quad[1::2]) / 4
        target = self.call("DOM.resolveNode", backendNodeId=node)["object"]["objectId"]
        covered = self.call(
            "Runtime.callFunctionOn",
            objectId=target,
            functionDeclaration="function (x, y) {"
            "  return !this.contains(document.elementFromPoint(x, y)); }",
            arguments=[{"value": x}, {"value": y}],
        )
        assert covered["result"]["value"] is False, f"{role} {name!r} is covered"
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str, *, shift: bool = False, times: int = 1) -> None:
        """Press a key of KEYS."""
        code, text = KEYS[key]
        keys = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8 * shift}
        for _ in range(times):
            self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **keys)
            self.call("Input.dispatchKeyEvent", type="keyUp", **keys)

    def write(self, text: str) -> None:
        """Type a text where the focus is."""
        self.call("Input.insertText", text=text)

    def resize(self, width: int, height: int, *, phone: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone},
        )
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)

    def prefer(self, scheme: str) -> None:
        """Have the page "light" or "dark", and without movements."""
        features = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
        self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": name, "value": value} for name, value in features.items()],
        )

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))
