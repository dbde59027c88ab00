"""Ctrl-C that is not lost.

Python raises it wherever the main thread happens to be. In the callback of a weak reference or in
a destructor an exception can only be printed and forgotten, and tracing spends a tenth of its time
there: without this, one Ctrl-C in ten changes nothing.
"""

from __future__ import annotations

import _thread
import contextlib
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
