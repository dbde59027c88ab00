"""What a command shows: results on stdout, progress on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, Task, TextColumn
from rich.progress import TimeRemainingColumn as Remaining
from rich.table import Table
from rich.text import Text

_WIDEST = 10_000  # columns
_EXTRA = {"torch", "onnx", "onnx_ir", "onnxscript", "ml_dtypes"}  # of the extra "export"


@contextmanager
def stdout_console() -> Iterator[Console]:
    """A console for results: tables as wide as a terminal, whole lines in a file or a pipe.

    A reader that leaves ends the block quietly.

    Raises:
        OSError: stdout cannot be written, on a full disk for example.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _WIDEST
    try:
        yield console
    except SystemExit:
        return  # so rich leaves when the reader of a pipe has; that is no fault
    except OSError as error:
        # What is still buffered goes nowhere, so that the exit does not complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OSError(f"cannot write to stdout: {error.strerror}") from error


def whole(table: Table) -> Table:
    """The table, cutting no cell: on a narrow terminal it goes on in the next line."""
    for column in table.columns:
        column.overflow = "fold"
    return table


def bytes_progress(console: Console) -> Progress:
    """Stages of work, with bytes where they are known; nothing where no terminal shows it."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), _Bytes())
    hidden = not console.is_terminal
    return Progress(*columns, Remaining(), console=console, transient=True, disable=hidden)


def missing_extra(error: ModuleNotFoundError) -> str:
    """What to do about a module that is missing; an error that is no such thing goes on."""
    if (error.name or "").split(".")[0] not in _EXTRA:
        raise error
    return f"{error.name} is not installed; exporting needs: pip install 'phi4export[export]'"


class _Bytes(DownloadColumn):
    def render(self, task: Task) -> Text:
        """Nothing for a stage whose size is not known."""
        return Text() if task.total is None else super().render(task)
