"""Chat with the shipped model, as a user meets it: on a terminal, in a pipe, in a program."""

import contextlib
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime_py import Conversation, InputError, Sampling, Session, generate
from runtime_py import Sequence as TokenSequence
from runtime_py import chat as chat_module

ROOT = Path(__file__).parents[2]
SUM = "What is 347 + 589?"
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def package(export: Callable[..., Path]) -> Path:
    return export(None, "cpu-int4")


@pytest.fixture(scope="module")
def session(package: Path) -> Session:
    return Session(package, threads=1)


def answer(session: Session, prompt: Any, sampling: Sampling = GREEDY, **options: Any) -> str:
    return "".join(generate(session, prompt, sampling, **options))


def test_the_shipped_model_adds(session: Session) -> None:
    assert answer(session, SUM).endswith(r"\boxed{936}")


def test_greedy_and_seeded_answers_repeat_and_others_differ(session: Session) -> None:
    assert answer(session, SUM) == answer(session, SUM)
    wild = [Sampling(temperature=100, seed=seed) for seed in (1, 1, 2, None, None)]
    first, again, *others = (answer(session, SUM, each, max_new_tokens=20) for each in wild)
    assert first == again
    assert len({first, *others}) == 4


def test_a_second_turn_feeds_its_own_tokens_only(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed: list[int] = []
    step = TokenSequence.step

    def counted(self: TokenSequence, ids: Any, *arguments: Any, **named: Any) -> np.ndarray:
        fed.extend(ids)
        return step(self, ids, *arguments, **named)

    monkeypatch.setattr(TokenSequence, "step", counted)
    chat = Conversation(session)
    first = "".join(chat.answer(SUM, GREEDY))
    second = "".join(chat.answer("What is 2 + 2?", GREEDY))
    tokenizer = session.tokenizer
    whole = tokenizer.render(chat.messages[:-1]) + second
    assert tokenizer.encode(whole)[: len(fed)] == fed, "every token once, in order"
    assert first in whole
    assert chat.timing.prompt_tokens < len(tokenizer.encode("What is 2 + 2?")) + 8

    alone = [{"role": "user", "content": SUM}, {"role": "assistant", "content": first}]
    asked = [*alone, {"role": "user", "content": "What is 2 + 2?"}]
    assert answer(session, asked) == second


def test_a_fork_leaves_the_original_unchanged(session: Session) -> None:
    ids = session.tokenizer.encode(SUM)
    one, other = session.start(), session.start()
    one.step(ids)
    other.step(ids)
    fork = one.fork()
    moved = fork.step([5, 6, 7])
    assert (one.length, fork.length) == (len(ids), len(ids) + 3)
    np.testing.assert_array_equal(one.step([9]), other.step([9]))
    assert not np.array_equal(fork.step([9]), one.logits)
    np.testing.assert_array_equal(moved, other_way(session, [*ids, 5, 6, 7]))


def other_way(session: Session, ids: list[int]) -> np.ndarray:
    """Logits after the same tokens in the same calls, without a fork."""
    sequence = session.start()
    sequence.step(ids[:-3])
    return sequence.step(ids[-3:])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("", "the prompt is empty"), (" \n", "is empty"), ("5" * 9000, "takes 4095 at most")],
)
def test_a_prompt_that_cannot_be_answered_is_refused(
    session: Session, capsys: pytest.CaptureFixture[str], prompt: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        generate(session, prompt)
    assert chat_module.main([str(session.path), "--prompt", prompt]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def command(package: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "runtime_py.chat", str(package), "--threads", "1", *options]


def run(package: Path, *options: str, stdin: bytes = b"", **settings: Any) -> tuple[int, str, str]:
    """Run the command with pipes: exit status, stdout, stderr."""
    done = subprocess.run(
        command(package, *options), cwd=ROOT, input=stdin, capture_output=True, **settings
    )
    return done.returncode, done.stdout.decode("utf-8"), done.stderr.decode("utf-8")


def test_in_a_pipe_stdout_is_the_answer_alone_whatever_the_locale(
    package: Path, session: Session
) -> None:
    environment = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
    # Nearly even odds: bytes beyond ASCII come up, many of them no UTF-8.
    wild = ("--temperature", "100", "--seed", "3", "--max-new-tokens", "300")
    status, out, err = run(
        package, *wild, "--stats", "--system", "Ünï", "--prompt", "wie heißt «π»?", env=environment
    )
    assert status == 0
    messages = [
        {"role": "system", "content": "Ünï"},
        {"role": "user", "content": "wie heißt «π»?"},
    ]
    expected = answer(session, messages, Sampling(100, 0.95, 3), max_new_tokens=300)
    assert not expected.isascii()
    assert out.rstrip("\n") == expected.rstrip("\n")
    assert re.fullmatch(
        r"first token after \d+\.\d\d s · \d+ tokens read at .* tokens/s · "
        r"\d+ written at .* tokens/s · peak memory \d+\.\d\d GB\n",
        err,
    )


def test_lines_from_stdin_are_turns_and_its_end_ends_the_program(package: Path) -> None:
    lines = f"{SUM}\nWhat is 2 + 2?".encode()  # the last line is not ended
    status, out, err = run(package, "--temperature", "0", "--stats", stdin=lines)
    first, second = out.splitlines()
    assert (status, first[-11:], second[-9:]) == (0, r"\boxed{936}", r"\boxed{4}")
    asked = [int(count) for count in re.findall(r"(\d+) tokens read", err)]
    written = [int(count) for count in re.findall(r"(\d+) written", err)]
    assert len(asked) == 2
    assert asked[1] < asked[0] + 2, "the second turn costs its own tokens, not the first one's"
    assert written[0] > 10
    assert len(err.splitlines()) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_one_line(package: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            command(package, "--prompt", "hi"), cwd=ROOT, stdout=full, stderr=subprocess.PIPE
        )
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: the answer cannot be written")
    assert done.stderr.count(b"\n") == 1


@contextlib.contextmanager
def terminal(package: Path, *options: str) -> Iterator[tuple[Callable[..., str], subprocess.Popen]]:
    """The command on a terminal: a function that types and reads on until a mark, the process."""
    import pty

    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command(package, *options),
        cwd=ROOT,
        env=environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=_take_terminal,  # so that the key Ctrl-C sends its signal
    ) as process:
        os.close(theirs)

        def type_and_read(keys: str, until: str, seconds: float = 60) -> str:
            os.write(ours, keys.encode())
            # input() misses a signal that comes just before it waits: a person presses again.
            if keys == "\x03" and not select.select([ours], [], [], 10)[0]:
                os.write(ours, keys.encode())
            seen, end = b"", time.monotonic() + seconds
            while until not in seen.decode("utf-8", "replace"):
                assert select.select([ours], [], [], max(0, end - time.monotonic()))[0], seen
                try:
                    seen += os.read(ours, 4096)
                except OSError:  # Linux says so at the end of the other side
                    break
            return seen.decode("utf-8", "replace")

        try:
            yield type_and_read, process
        finally:
            process.kill()
            os.close(ours)


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.mark.skipif(os.name == "nt", reason="POSIX terminals")
def test_on_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_leaves(package: Path) -> None:
    # At such a temperature this seed goes on for hundreds of tokens, to the end of the context.
    with terminal(package, "--temperature", "1e9", "--top-p", "1", "--seed", "8") as (say, process):
        assert "/help" in say("", "> ")
        say(f"{SUM}\n", "?\r\n")
        stopped = say("", " ") + say("\x03", "> ")
        assert "(stopped)" in stopped
        assert "a new conversation" in say("/new\n", "> ")
        assert "Ctrl-C again or Ctrl-D leaves" in say("\x03", "> ")
        assert process.poll() is None
        say("\x04", "nothing more")
        assert process.wait(20) == 0


@pytest.mark.parametrize("module", ["export.cli", "runtime_py.chat"])
def test_help_explains_every_option_and_teaches_by_examples(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "100"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    options, examples = done.stdout.split("options:")[1].split("examples:")
    for option in re.split(r"\n  (?=-)", options)[1:]:
        assert re.search(r"\s{2,}\w", option), f"no explanation: {option}"
    assert len(re.findall(r"^  \S", examples, re.MULTILINE)) >= 4
