"""The chat page in a real browser answers as our runtime does."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from runtime_py import Conversation, Sampling, Session
from targets import TARGETS
from tests.examples.webdriver import Page, browser

WEB = Path(__file__).parents[2] / "examples/web"
PACKAGES = [t.name for t in TARGETS if t.name in ("cpu-fp32", "cpu-int4", "webgpu-int4")]

pytestmark = pytest.mark.web


# The third is longer than one call takes, and than the caches of a new conversation.
QUESTIONS = ("What is 347 + 589?", "What is 12 + 30?", " ".join(["What is 12 + 30?"] * 45))
SOFTWARE_ADAPTER = (
    "--enable-unsafe-webgpu",
    "--use-webgpu-adapter=swiftshader",
    "--enable-features=Vulkan",
)


@contextmanager
def chromium(*arguments: str) -> Iterator[Page]:
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not binary or not driver or not (WEB / "node_modules").exists():
        pytest.skip("needs Chromium, its driver and npm packages: see CONTRIBUTING.md")
    with browser(driver, binary, ["--disable-dev-shm-usage", *arguments]) as window:
        yield window


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with chromium() as window:
        yield window


@contextmanager
def served(package: Path) -> Iterator[str]:
    """Address of the page with a package behind it."""
    command = [sys.executable, str(WEB / "serve.py"), str(package), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def ask(page: Page, question: str, *, seconds: float = 120) -> str:
    """What the page answers, greedily."""
    page.type("#temperature", "0")
    page.type("#prompt", question)
    page.click("#send")
    page.wait("#send", seconds=seconds)
    return page.text(".assistant")


@pytest.mark.parametrize("target", PACKAGES)
def test_it_answers_turn_by_turn_as_our_runtime_does(page: Page, export, target: str) -> None:
    package = export(None, target)
    chat = Conversation(Session(package, threads=1, providers=["CPUExecutionProvider"]))
    with served(package) as address:
        page.open(address)
        page.wait("#send")
        for question in QUESTIONS:
            wanted = "".join(chat.answer(question, Sampling(temperature=0)))
            assert ask(page, question) == wanted


@pytest.mark.slow
def test_webgpu_gives_our_runtimes_tokens(export) -> None:
    """On an adapter in software, which has no float16: so the 4-bit recipe in float32."""
    package = export(None, "openvino-int4")
    chat = Conversation(Session(package, threads=1, providers=["CPUExecutionProvider"]))
    wanted = "".join(chat.answer(QUESTIONS[0], Sampling(temperature=0)))
    with chromium(*SOFTWARE_ADAPTER) as page, served(package) as address:
        page.open(f"{address}?provider=webgpu")
        page.wait("#send")
        assert "webgpu" in page.text("#status")
        assert ask(page, QUESTIONS[0], seconds=900) == wanted


@pytest.mark.parametrize("missing", ["model.onnx", "genai_config.json"])
def test_the_server_says_what_is_missing(tmp_path: Path, missing: str) -> None:
    if missing != "model.onnx":
        (tmp_path / "model.onnx").touch()
    command = [sys.executable, str(WEB / "serve.py"), str(tmp_path), "--port", "0"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 2
    assert missing in found.stderr
    assert found.stderr.count("\n") == 1
