import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest

from export.interrupts import (
    hold_interrupts,
    interrupt_on_termination,
    keep_interrupts,
    run_apart,
)


class Thing:
    """Something a weak reference can point at."""


def test_an_interrupt_in_the_callback_of_a_weak_reference_is_not_lost() -> None:
    thing = Thing()
    reference = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt), keep_interrupts():  # noqa: PT012
        del thing
        assert reference() is None
        time.sleep(10)


def test_another_dropped_error_is_reported_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[SimpleNamespace] = []
    monkeypatch.setattr("sys.unraisablehook", reported.append)
    thing = Thing()
    reference = weakref.ref(thing, lambda _: 1 // 0)
    with keep_interrupts():
        del thing
    assert reference() is None
    assert [each.exc_type for each in reported] == [ZeroDivisionError]


def test_a_held_interrupt_waits_for_the_end_of_the_block() -> None:
    steps: list[str] = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        with hold_interrupts():
            signal.raise_signal(signal.SIGINT)
            steps.append("the block went on")
        steps.append("not what follows it")
    assert steps == ["the block went on"]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_termination_ends_as_an_interrupt_and_only_once() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with interrupt_on_termination() as came:
        assert came == []
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # while everything is cleaned up
        assert came == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_termination_is_held_as_an_interrupt() -> None:
    steps: list[str] = []
    with interrupt_on_termination(), pytest.raises(KeyboardInterrupt), hold_interrupts():  # noqa: PT012
        signal.raise_signal(signal.SIGTERM)
        steps.append("the block went on")
    assert steps == ["the block went on"]


INTERRUPTED_EARLY = """
import runpy, signal, sys
def strike(event, details):
    if event == "import" and details[0] == "rich.console":
        signal.raise_signal(signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.addaudithook(strike)
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("module", ["export.start", "export.verify"])
def test_ctrl_c_while_the_command_is_loaded_ends_it_quietly(module: str) -> None:
    command = [sys.executable, "-c", INTERRUPTED_EARLY, module, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_interrupts_are_held_in_the_main_thread_only() -> None:
    def hold() -> None:
        with hold_interrupts():
            found.append(signal.getsignal(signal.SIGINT))

    found: list[object] = []
    thread = threading.Thread(target=hold)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]


def test_what_runs_apart_gives_its_result_or_its_error() -> None:
    assert run_apart(lambda: threading.current_thread() is threading.main_thread()) is False
    with pytest.raises(ZeroDivisionError):
        run_apart(lambda: 1 // 0)


def test_an_interrupt_does_not_wait_for_what_runs_apart() -> None:
    steps: list[str] = []
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        signal.raise_signal(signal.SIGINT)  # heard by the main thread
        go_on.wait(60)
        steps.append("the work went on")
        ended.set()

    with pytest.raises(KeyboardInterrupt):
        run_apart(work)
    assert begun.is_set()
    assert steps == []
    go_on.set()
    assert ended.wait(60)
    assert steps == ["the work went on"]


INTERRUPTED_TRACE = """
import os, runpy, signal, sys, threading
def strike(event, details):
    if event == "import" and threading.current_thread() is not threading.main_thread():
        if not came:
            came.append(os.kill(os.getpid(), signal.SIGINT))
came = []
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.addaudithook(strike)
runpy.run_module("export.start", run_name="__main__", alter_sys=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_while_it_traces_ends_the_command_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", INTERRUPTED_TRACE, "-o", str(tmp_path / "package")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    told = "phi4export: interrupted, nothing unfinished is kept\n"
    assert (done.returncode, done.stdout, done.stderr) == (130, "", told)
    assert list(tmp_path.iterdir()) == []
