"""A real browser, driven by the WebDriver protocol over plain HTTP."""

import json
import re
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of an element in the protocol


class Page:
    """One window of a browser."""

    def __init__(self, session: str) -> None:
        self._session = session

    def open(self, address: str) -> None:
        """Load a page and wait until it is loaded."""
        _call("POST", f"{self._session}/url", {"url": address})

    def text(self, selector: str) -> str:
        """Text of the last element of a CSS selector."""
        script = f"return [...document.querySelectorAll({json.dumps(selector)})].at(-1).textContent"
        return _call("POST", f"{self._session}/execute/sync", {"script": script, "args": []})

    def type(self, selector: str, text: str) -> None:
        """Replace what stands in a field, key by key."""
        field = self._find(selector)
        _call("POST", f"{field}/clear", {})
        _call("POST", f"{field}/value", {"text": text})

    def click(self, selector: str) -> None:
        """Click into the middle of an element."""
        _call("POST", f"{self._find(selector)}/click", {})

    def enabled(self, selector: str) -> bool:
        """Whether a button can be pressed."""
        return _call("GET", f"{self._find(selector)}/enabled")

    def wait(self, selector: str, *, seconds: float = 120) -> None:
        """Wait until a button can be pressed; TimeoutError tells what the page says instead."""
        end = time.monotonic() + seconds
        while not self.enabled(selector):
            status = self.text("#status")
            if status.startswith("failed") or time.monotonic() > end:
                raise TimeoutError(f"{selector} is disabled; the page says {status!r}")
            time.sleep(0.2)

    def _find(self, selector: str) -> str:
        query = {"using": "css selector", "value": selector}
        found = _call("POST", f"{self._session}/element", query)
        return f"{self._session}/element/{found[_ELEMENT]}"


@contextmanager
def browser(driver: str, binary: str, arguments: Sequence[str] = ()) -> Iterator[Page]:
    """A headless Chromium that ends with the block."""
    with subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            said = next(line for line in process.stdout if "successfully" in line)
            port = re.findall(r"port (\d+)", said)[-1]
            options = {"binary": binary, "args": ["--headless=new", "--no-sandbox", *arguments]}
            capabilities = {"alwaysMatch": {"goog:chromeOptions": options}}
            sessions = f"http://127.0.0.1:{port}/session"
            session = _call("POST", sessions, {"capabilities": capabilities})["sessionId"]
            try:
                yield Page(f"{sessions}/{session}")
            finally:
                _call("DELETE", f"{sessions}/{session}")
        finally:
            process.terminate()


def _call(method: str, address: str, body: object = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    request.method = method
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["value"]
