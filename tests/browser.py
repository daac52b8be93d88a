"""Headless Chromium over the WebDriver protocol, for tests of pages."""

import base64
import json
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars", "--window-size=1200,900",
]  # fmt: skip
PATIENCE = 120  # seconds; a loaded machine starts a browser slowly
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # how the protocol marks elements


def missing():
    """Why there is no browser to test with; empty if there is one."""
    for name in ("chromium", "chromedriver"):
        if shutil.which(name) is None:
            return f"{name} is not installed (Debian: apt-get install chromium chromium-driver)"
    return ""


class Browser:
    """A browser that starts with the block and ends with it."""

    def __init__(self, flags=()):
        self._flags = [*FLAGS, *flags]

    def __enter__(self):
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        folder = Path(self._folder.name)
        self.downloads = folder / "downloads"
        self.downloads.mkdir()
        log = folder / "log"
        with log.open("w") as out:
            self._driver = subprocess.Popen(
                [shutil.which("chromedriver"), "--port=0"], stdout=out, stderr=subprocess.STDOUT
            )
        try:
            self._url = f"http://127.0.0.1:{self._port(log)}"
            options = {
                "binary": shutil.which("chromium"),
                "args": [*self._flags, f"--user-data-dir={folder / 'profile'}"],
                "prefs": {"download.default_directory": str(self.downloads)},
            }
            wanted = {
                "alwaysMatch": {
                    "goog:chromeOptions": options,
                    "goog:loggingPrefs": {"browser": "ALL"},
                    "unhandledPromptBehavior": "ignore",
                }
            }
            made = self._ask("POST", "/session", {"capabilities": wanted})
            self._session = f"/session/{made['sessionId']}"
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_):
        try:
            self._ask("DELETE", self._session)
        finally:
            self._end()

    def _end(self):
        self._driver.terminate()
        self._driver.wait(30)
        self._folder.cleanup()

    def _port(self, log):
        for _ in range(10 * PATIENCE):
            text = log.read_text()
            if "on port " in text and "successfully" in text:
                return int(text.rsplit("on port ", 1)[1].split(".")[0].split()[0])
            time.sleep(0.1)
        raise TimeoutError(log.read_text())

    def _ask(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self._url + path, data, {"Content-Type": "application/json"}, method=method
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=PATIENCE) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            with error:
                raise RuntimeError(json.load(error)["value"]) from None

    def open(self, path):
        """Open a local file."""
        self._ask("POST", f"{self._session}/url", {"url": Path(path).resolve().as_uri()})

    def run(self, script, *arguments):
        """Return what a script's function body returns."""
        body = {"script": script, "args": list(arguments)}
        return self._ask("POST", f"{self._session}/execute/sync", body)

    def find(self, selector):
        """Return the first element."""
        body = {"using": "css selector", "value": selector}
        return self._ask("POST", f"{self._session}/element", body)[ELEMENT]

    def click(self, selector):
        """Click as a person does: refused if something lies above it."""
        self._ask("POST", f"{self._session}/element/{self.find(selector)}/click", {})

    def type(self, selector, text):
        """Type into an element; keys have the protocol's codes."""
        body = {"text": text}
        self._ask("POST", f"{self._session}/element/{self.find(selector)}/value", body)

    def keys(self, text):
        """Press keys wherever the focus is."""
        steps = [{"type": kind, "value": c} for c in text for kind in ("keyDown", "keyUp")]
        actions = [{"type": "key", "id": "keys", "actions": steps}]
        self._ask("POST", f"{self._session}/actions", {"actions": actions})

    def devtools(self, command, **parameters):
        """Run a command of the DevTools protocol."""
        body = {"cmd": command, "params": parameters}
        return self._ask("POST", f"{self._session}/goog/cdp/execute", body)

    def size(self, width, height, *, phone=False):
        """Set the size of the page, also one that no window can have."""
        self.devtools(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=phone,
        )  # fmt: skip

    def scheme(self, name):
        """Prefer ``light`` or ``dark``, as the system's settings do."""
        feature = {"name": "prefers-color-scheme", "value": name}
        self.devtools("Emulation.setEmulatedMedia", features=[feature])

    def screenshot(self, path, *, whole=False):
        """Write what is seen, or the whole page, as PNG."""
        taken = self.devtools("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        Path(path).write_bytes(base64.b64decode(taken))

    def log(self):
        """Return the messages of the console since the last call."""
        return self._ask("POST", f"{self._session}/se/log", {"type": "browser"})
