"""Ctrl-C that is not lost, and does not become another error; SIGTERM that ends like Ctrl-C.

Python raises it wherever the main thread happens to be. In the callback of a weak reference or in
a destructor an exception can only be printed and forgotten. In the initialisation of an extension
module it turns into an ImportError, and where C++ has called Python, as all through a trace of
torch, into another error or the end of the process by a signal of its own.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn, TypeVar

_PAUSE = 0.05  # seconds, for such a callback to come to its end
_ends = list[threading.Event]()  # of what runs apart, or has run

T = TypeVar("T")


@contextlib.contextmanager
def keep_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt again, a moment later, where Python had to drop it.

    For the main thread. Other dropped exceptions are reported as before.
    """
    report, ended = sys.unraisablehook, threading.Event()

    def interrupt() -> None:
        if ended.wait(_PAUSE):
            return
        if hasattr(signal, "pthread_kill"):  # a signal ends a wait of the main thread, too
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        else:
            _thread.interrupt_main()

    def again(dropped: Any) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            report(dropped)
            return
        # Not threading.Thread: its start waits, and could be interrupted itself.
        _thread.start_new_thread(interrupt, ())

    sys.unraisablehook = again
    try:
        yield
    finally:
        ended.set()
        sys.unraisablehook = report


@contextlib.contextmanager
def interrupt_on_termination() -> Iterator[list[int]]:
    """Take SIGTERM as Ctrl-C, so that what is unfinished is cleaned up.

    Yields:
        What came: empty, or SIGTERM, and then the program's exit status should be 143.
    """
    came = list[int]()
    if threading.current_thread() is not threading.main_thread():
        yield came
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        if came:
            return  # it is on its way; cleaning up goes on
        came.append(number)
        held = signal.getsignal(signal.SIGINT)  # hold_interrupts lets it wait
        (held if callable(held) else signal.default_int_handler)(signal.SIGINT, frame)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def hold_interrupts() -> Iterator[None]:
    """Let Ctrl-C wait until the block has ended: for imports of extension modules."""
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    came = list[int]()
    signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if came:
        raise KeyboardInterrupt


def run_apart(work: Callable[[], T]) -> T:
    """What ``work`` gives, done in a thread of its own: Ctrl-C ends the waiting, not its midst.

    It then goes on with nobody waiting; a command ends by ``leave``.
    """
    results = list[T]()
    errors = list[BaseException]()
    end = threading.Event()  # an interrupted Thread.join of Python 3.11 takes a thread for ended

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)
        end.set()

    _ends.append(end)
    threading.Thread(target=run, daemon=True).start()
    while not end.wait(_PAUSE):
        pass  # Windows hears Ctrl-C between two waits only
    if errors:
        raise errors[0]
    return results[0]


def leave(status: int) -> NoReturn:
    """End the program, at once where work still runs apart: the interpreter would wait for it."""
    if not all(end.is_set() for end in _ends):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(status)
    sys.exit(status)
