"""How an answer and its figures look on a terminal."""

from __future__ import annotations

from typing import TextIO

from rich.console import Console

from runtime_py.conversation import Timing
from runtime_py.peak_memory import peak_bytes


class AnswerWriter:
    """Writes an answer piece by piece; on a terminal the reasoning is dim."""

    def __init__(self, out: TextIO) -> None:
        """Write to ``out``; a file or a pipe gets the text as it is."""
        self._out = out
        self._terminal = Console(file=out, highlight=False) if out.isatty() else None
        self._thinking = False
        self._held = ""  # may be the beginning of a tag
        self._last = ""

    def write(self, piece: str) -> None:
        """Show a piece at once, but for what may turn out to be a tag."""
        if self._terminal is None:
            self._show(piece)
            return
        # Without escapes: an answer must not command the terminal.
        self._held += piece.replace("\x1b", "")
        while True:
            tag = "</think>" if self._thinking else "<think>"
            before, found, after = self._held.partition(tag)
            if not found:
                break
            self._show(before + tag if self._thinking else before)
            self._held = after if self._thinking else tag + after
            self._thinking = not self._thinking
        keep = next(n for n in range(len(tag), -1, -1) if self._held.endswith(tag[:n]))
        ready = len(self._held) - keep
        self._show(self._held[:ready])
        self._held = self._held[ready:]

    def end(self) -> None:
        """End the answer and its line."""
        self._show(self._held)
        if self._last != "\n":
            self._show("\n")
        self._held, self._thinking, self._last = "", False, ""

    def _show(self, text: str) -> None:
        if not text:
            return
        if self._terminal is None:
            self._out.write(text)
        else:
            self._terminal.out(text, end="", highlight=False, style="dim" * self._thinking or None)
        self._out.flush()
        self._last = text[-1]


def figures(timing: Timing) -> str:
    """One line of speed and memory."""
    peak, read = peak_bytes(), _rate(timing.prompt_tokens, timing.prompt_seconds)
    later = timing.answer_tokens - 1  # the first token comes from the prompt
    return " · ".join(
        (
            f"first token after {timing.prompt_seconds:.2f} s",
            f"{timing.prompt_tokens} tokens read at {read}",
            f"{timing.answer_tokens} written at {_rate(later, timing.answer_seconds)}",
            f"peak memory {f'{peak / 1e9:.2f} GB' if peak else 'n/a'}",
        )
    )


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:.1f} tokens/s" if tokens > 0 and seconds > 0 else "n/a"
