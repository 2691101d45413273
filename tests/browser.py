"""A browser for tests: Chromium without a window, driven through chromedriver's own HTTP interface (W3C WebDriver)."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
MISSING = "needs Chromium and its driver: apt-get install chromium chromium-driver"
# Where it is required, its tests fail without it instead of being skipped.
WANTED = bool(CHROMIUM and DRIVER) or os.environ.get("HFCOMPRESS_BROWSER") == "required"
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the name that the standard gives to an element's id


class Browser:
    """One page at a time; a click is one at the middle of what is seen, so nothing can lie over it."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM, MISSING
        assert DRIVER, MISSING
        self.process = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = next(line for line in self.process.stdout if "started successfully on port" in line)
        self.url = f"http://127.0.0.1:{line.rsplit(' ', 1)[1].strip().rstrip('.')}"
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                     "--hide-scrollbars", f"--user-data-dir={profile}"]  # fmt: skip
        options = {"goog:chromeOptions": {"binary": CHROMIUM, "args": arguments},
                   "goog:loggingPrefs": {"browser": "ALL"}}  # fmt: skip
        made = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": options}})
        self.url += f"/session/{made['sessionId']}"

    def _ask(self, method: str, path: str, values: Any = None) -> Any:
        body = json.dumps({} if values is None else values).encode() if method == "POST" else None
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read())["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.loads(error.read())["value"]["message"]) from None

    def open(self, page: Path, width: int, height: int = 900, *, dark: bool = False) -> None:
        """Open a file in a window of this many pixels."""
        self._devtools("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                       mobile=False)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._devtools("Emulation.setEmulatedMedia", features=[scheme])
        # What a page does not paint stays transparent in its pictures.
        self._devtools("Emulation.setDefaultBackgroundColorOverride", color={"r": 0, "g": 0, "b": 0, "a": 0})
        self._ask("POST", "/url", {"url": page.absolute().as_uri()})

    def _devtools(self, command: str, **values: Any) -> Any:
        return self._ask("POST", "/goog/cdp/execute", {"cmd": command, "params": values})

    def find(self, selector: str) -> list[str]:
        """Return the ids of what a CSS selector finds."""
        found = self._ask("POST", "/elements", {"using": "css selector", "value": selector})
        return [one[_ELEMENT] for one in found]

    def click(self, selector: str) -> None:
        """Click the first that a CSS selector finds; an error if something else lies over it."""
        self._ask("POST", f"/element/{self.find(selector)[0]}/click")

    def choose(self, selector: str, text: str) -> None:
        """Choose an option of a select by its text."""
        options = self.texts(f"{selector} option")
        assert text in options, f"{selector} has {options}"
        self._ask("POST", f"/element/{self.find(f'{selector} option')[options.index(text)]}/click")

    def texts(self, selector: str) -> list[str]:
        """Return the texts of what a CSS selector finds, as they are seen."""
        every = f"[...document.querySelectorAll({json.dumps(selector)})]"
        found: list[str] = self.run(f"return {every}.map((one) => one.innerText ?? one.textContent)")
        return found

    def run(self, script: str) -> Any:
        """Run JavaScript in the page and return what it returns."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": []})

    def complaints(self) -> list[str]:
        """Return what the page wrote to its console, errors of scripts and blocked loads among it."""
        return [one["message"] for one in self._ask("POST", "/se/log", {"type": "browser"})]

    def picture(self, path: Path, down_to: str | None = None) -> Path:
        """Write a PNG of the whole page, or of its upper part with the first that a CSS selector finds."""
        found = f"document.querySelector({json.dumps(down_to)}).getBoundingClientRect().bottom + 8"
        end = "document.documentElement.scrollHeight" if down_to is None else found
        width, height = self.run(f"return [innerWidth, Math.round({end})]")
        self._devtools("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                       mobile=False)  # fmt: skip
        path.write_bytes(base64.b64decode(self._ask("GET", "/screenshot")))
        return path

    def close(self) -> None:
        """End the browser and its driver."""
        try:
            self._ask("DELETE", "")
        finally:
            self.process.kill()
            self.process.wait()
            if self.process.stdout is not None:
                self.process.stdout.close()
