"""A headless Chromium, driven by its DevTools protocol over two pipes: nothing listens.

`Browser.open(path, width_px=390, scheme="dark")` shows a page, `run(script)` gives the JSON value
of a script there, `outline()` what a screen reader is told, `picture()` the page as PNG.
"""

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next((path for name in PROGRAMS if (path := shutil.which(name))), None)

# The protocol's pipes are the descriptors 3 and 4 of the browser.
START = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
os.dup2(ends[0], 3)
os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    def __init__(self, profile):
        """Starts a browser that keeps its profile in a folder."""
        commands, self._commands = os.pipe()
        self._answers, answers = os.pipe()
        program = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        program += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            [sys.executable, "-ISc", START, str(commands), str(answers), *program],
            pass_fds=(commands, answers),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._number, self._session, self._read = 0, None, b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self._commands)  # ends the browser
        os.close(self._answers)
        self._process.wait()

    def _receive(self):
        while b"\0" not in self._read:
            part = os.read(self._answers, 1 << 20)
            assert part, "the browser has ended"
            self._read += part
        message, _, self._read = self._read.partition(b"\0")
        return json.loads(message)

    def _call(self, method, **params):
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, path, *, width_px, scheme):
        """Shows a file to a new visitor, in a window of some width and a light or dark scheme."""
        self._session = None
        visitor = self._call("Target.createBrowserContext")["browserContextId"]
        blank = {"url": "about:blank", "browserContextId": visitor}
        target = self._call("Target.createTarget", **blank)["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        self._call("Page.enable")
        size = {"width": width_px, "height": 900, "deviceScaleFactor": 1, "mobile": width_px < 500}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self._call("Emulation.setEmulatedMedia", features=[feature])
        self._call("Page.navigate", url=Path(path).resolve().as_uri())
        while self._receive().get("method") != "Page.loadEventFired":
            pass

    def run(self, script):
        """Gives the value of an expression of JavaScript, as JSON."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def outline(self, roles):
        """Gives (role, level, name) of the elements of some roles, in the order of reading."""
        nodes = self._call("Accessibility.getFullAXTree")["nodes"]
        by_id, found = {node["nodeId"]: node for node in nodes}, []
        waiting = [nodes[0]["nodeId"]]
        while waiting:
            node = by_id[waiting.pop()]
            waiting += reversed([child for child in node["childIds"] if child in by_id])
            if not node["ignored"] and node["role"]["value"] in roles:
                level = [p["value"]["value"] for p in node["properties"] if p["name"] == "level"]
                found.append((node["role"]["value"], *(level or [0]), node["name"]["value"]))
        return found

    def picture(self, height_px=None):
        """Gives the page as PNG, from its top to its end or some height."""
        width, height = self.run("[innerWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": width, "height": min(height, height_px or height)}
        options = {"clip": {**clip, "scale": 1}, "captureBeyondViewport": True}
        return base64.b64decode(self._call("Page.captureScreenshot", **options)["data"])
