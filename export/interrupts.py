"""Ctrl-C that is not lost, and does not become another error.

Python raises it wherever the main thread happens to be. In the callback of a weak reference or in
a destructor an exception can only be printed and forgotten, and tracing spends a tenth of its time
there. In the initialisation of an extension module it turns into an ImportError.
"""

from __future__ import annotations

import _thread
import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

_PAUSE = 0.01  # seconds, for such a callback to come to its end


@contextlib.contextmanager
def keep_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt again, a moment later, where Python had to drop it.

    For the main thread. Other dropped exceptions are reported as before.
    """
    report, timers = sys.unraisablehook, list[threading.Timer]()

    def again(dropped: Any) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            report(dropped)
            return
        timer = threading.Timer(_PAUSE, _thread.interrupt_main)
        timers.append(timer)
        timer.start()

    sys.unraisablehook = again
    try:
        yield
    finally:
        for timer in timers:  # none may fire into what comes after
            timer.join()
        sys.unraisablehook = report


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
