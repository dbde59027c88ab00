"""Talk with a package: ``python -m runtime_py.chat model.onnx``."""

from __future__ import annotations

import argparse
import errno
import io
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from collections.abc import Sequence as Many
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import NoReturn

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C while the rest is imported ends the program at once and without a word.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from runtime_py.conversation import DEFAULT, MAX_NEW_TOKENS, Conversation
from runtime_py.errors import BrokenSequenceError, InputError, PackageError
from runtime_py.sampling import Sampling
from runtime_py.sequence import Progress
from runtime_py.session import Session
from runtime_py.terminal import AnswerWriter, figures
from runtime_py.tokenizer import Message

PROGRAM = "python -m runtime_py.chat"
EXAMPLES = f"""\
examples:
  {PROGRAM} package/                              talk with a package
  {PROGRAM} package/model.onnx --system "Be brief."
  {PROGRAM} package/ --prompt "What is 6 * 7?"    one answer on stdout, then exit
  {PROGRAM} package/ --prompt - < question.txt    the prompt comes from stdin
  {PROGRAM} package/ --temperature 0 --stats      the same answer each time, with figures

While it answers, Ctrl-C stops the answer. In the chat, /help lists the commands.
"""
HELP = """\
/new     forget the conversation and begin another
/stats   speed and memory of the latest answer
/help    this list
/quit    leave (also Ctrl-D)
Ctrl-C   stop an answer; what was said so far stays in the conversation"""


def main(arguments: Many[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: of the command line, without the program's name; None takes the process's own.

    Returns:
        Exit status: 0; 2 for a wrong input, told in one line on stderr; 130 for an answer that
        ``--prompt`` asked for and Ctrl-C stopped.
    """
    _open_closed_streams()
    _speak_utf8()
    options = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _note
            return _run(options)
    except (PackageError, InputError, BrokenSequenceError, ArithmeticError) as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        # Whatever is still buffered goes nowhere, quietly.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno in (errno.EPIPE, errno.EINVAL):  # Windows tells a closed pipe by EINVAL
            return 0  # the reader has left
        return _refuse(f"the answer cannot be written or a file read: {error}")


def _refuse(message: str) -> int:
    """One line on stderr, whatever the names in it hold."""
    line = " ".join(message.split())
    shown = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in line)
    sys.stderr.write(f"error: {shown}\n")
    return 2


def _run(options: argparse.Namespace) -> int:
    sampling = Sampling(options.temperature, options.top_p, options.seed)
    if options.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens is {options.max_new_tokens}; give 1 or more")
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    if prompt is not None and not prompt.strip():
        raise InputError("the prompt is empty; give some text")
    providers = None if options.provider is None else [options.provider]
    session = Session(options.package, threads=options.threads, providers=providers)
    first: list[Message] = []
    if options.system is not None:
        first.append({"role": "system", "content": options.system})
    chat = Chat(Conversation(session, first), sampling, options.max_new_tokens, options.stats)
    if prompt is None:
        return chat.talk(first)
    return 0 if chat.answer(prompt) else 130


class Chat:
    """A conversation on the terminal: answers go to stdout, all else to stderr."""

    def __init__(
        self, conversation: Conversation, sampling: Sampling, max_new_tokens: int, stats: bool
    ) -> None:
        """Set up; nothing is shown yet."""
        self.conversation = conversation
        self.sampling = sampling
        self.max_new_tokens = max_new_tokens
        self.stats = stats
        self.notes = Console(stderr=True, highlight=False, soft_wrap=True)
        self.writer = AnswerWriter(sys.stdout)

    def talk(self, first: Many[Message]) -> int:
        """Answer line after line until the user leaves."""
        interactive = sys.stdin.isatty()
        if interactive:
            with suppress(ImportError):  # line editing and history; Windows has its own
                import readline  # noqa: F401
            self.notes.print(f"{self.conversation.session.path}  /help, /quit", style="dim")
        leaving = False
        while True:
            try:
                line = input("> " if interactive else "").strip()
            except EOFError:
                if interactive:
                    self.notes.print()  # the shell's next line begins on its own
                return 0
            except KeyboardInterrupt:
                if leaving:
                    return 130
                leaving = True
                self.notes.print("\nCtrl-C again or Ctrl-D leaves", style="dim")
                continue
            leaving = False
            match line:
                case "":
                    continue
                case "/quit" | "/exit":
                    return 0
                case "/new":
                    self.conversation = Conversation(self.conversation.session, first)
                    self.notes.print("a new conversation", style="dim")
                case "/stats":
                    self.notes.print(figures(self.conversation.timing), style="dim")
                case _ if line.startswith("/"):
                    self.notes.print(HELP, style="dim", markup=False)
                case _:
                    self._answer_or_tell(line)

    def answer(self, prompt: str) -> bool:
        """Write one answer; False if Ctrl-C stopped it.

        Raises:
            InputError: the prompt cannot be answered.
        """
        finished = True
        try:
            with self._reading() as progress:
                pieces = self.conversation.answer(
                    prompt, self.sampling, max_new_tokens=self.max_new_tokens, progress=progress
                )
                # Closed before anything is asked again, so that the conversation knows all that
                # was said, also when Ctrl-C came while a piece was being written.
                with closing(pieces):  # type: ignore[type-var]
                    for piece in pieces:
                        self.writer.write(piece)
        except KeyboardInterrupt:
            finished = False
        self.writer.end()
        if self.stats:
            self.notes.print(figures(self.conversation.timing), style="dim")
        return finished

    def _answer_or_tell(self, prompt: str) -> None:
        try:
            if not self.answer(prompt):
                self.notes.print("(stopped)", style="dim")
        except InputError as error:
            self.notes.print(f"error: {error}", markup=False)
        except BrokenSequenceError as error:
            self.notes.print(f"error: {error} (/new)", markup=False)

    @contextmanager
    def _reading(self) -> Iterator[Progress]:
        """A progress bar for a prompt of more than two chunks, gone once it is read."""
        least = 2 * self.conversation.session.chunk
        columns = (TextColumn("reading"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        bar = Bar(*columns, console=self.notes, transient=True)
        with ExitStack() as shown:

            def show(done: int, total: int) -> None:
                if total <= least or not self.notes.is_terminal:
                    return
                if done == 0:
                    shown.enter_context(bar)
                    bar.add_task("reading", total=total)
                bar.update(bar.task_ids[0], completed=done)
                if done == total:  # before the answer begins
                    shown.close()

            yield show


def _open_closed_streams() -> None:
    """A program may be started without a stream (``>&-``, or no console on Windows)."""
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def _note(message: Warning | str, *_: object, **__: object) -> None:
    sys.stderr.write(f"note: {message}\n")


def _speak_utf8() -> None:
    """A Windows console or a pipe may have an encoding that cannot hold every answer."""
    errors = {sys.stdin: "surrogateescape", sys.stdout: "replace", sys.stderr: "backslashreplace"}
    for stream, handling in errors.items():
        if isinstance(stream, io.TextIOWrapper):
            with suppress(OSError):  # something was read from it already
                stream.reconfigure(encoding="utf-8", errors=handling)


def _text(argument: str) -> str:
    """An argument in UTF-8, also where the locale (C, often) has left its bytes undecoded."""
    try:
        argument.encode("utf-8")
    except UnicodeEncodeError:
        with suppress(UnicodeError):
            return os.fsencode(argument).decode("utf-8")
    return argument


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as every other error."""
        self.exit(2, f"error: {message}; {PROGRAM} --help explains\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        description="Talk with a SambaY package that phi4export wrote.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("package", help="the package folder or its model.onnx")
    add(
        "--prompt",
        type=_text,
        metavar="TEXT",
        help="answer this on stdout and exit; - reads it from stdin",
    )
    add(
        "--system",
        type=_text,
        metavar="TEXT",
        help="what the model is told before the first question",
    )
    add(
        "--temperature",
        type=float,
        default=DEFAULT.temperature,
        metavar="X",
        help="0 takes the most likely token, more varies (default %(default)s)",
    )
    add(
        "--top-p",
        type=float,
        default=DEFAULT.top_p,
        metavar="P",
        help="choose among the likeliest tokens that reach this probability (default %(default)s)",
    )
    add("--seed", type=int, metavar="N", help="repeat an answer exactly")
    add(
        "--max-new-tokens",
        type=int,
        default=MAX_NEW_TOKENS,
        metavar="N",
        help="longest answer (default %(default)s, or what the model's context leaves)",
    )
    add("--threads", type=int, metavar="N", help="default: one a physical core")
    add(
        "--provider",
        metavar="NAME",
        help="ONNX Runtime's execution provider; default: the one the package was made for",
    )
    add("--stats", action="store_true", help="speed and memory after each answer, on stderr")
    return parser


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
