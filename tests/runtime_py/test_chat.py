import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from runtime_py import chat
from runtime_py.conversation import Timing
from runtime_py.peak_memory import peak_bytes
from runtime_py.terminal import AnswerWriter, figures

ROOT = Path(__file__).parents[2]
GREEDY = ("--temperature", "0", "--threads", "1")


@pytest.fixture
def run(package, capsys, monkeypatch):
    """Run the command in this process: exit status, stdout, stderr."""

    def act(*arguments, stdin="", package=package):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        try:
            status = chat.main([str(package), *GREEDY, *arguments])
        except SystemExit as leave:
            status = leave.code
        out, err = capsys.readouterr()
        return status, out, err

    return act


def test_a_prompt_gives_one_answer_and_nothing_else_on_stdout(run):
    assert run("--prompt", "hi") == (0, "héy\n", "")


def test_a_prompt_may_come_from_stdin(run):
    assert run("--prompt", "-", stdin="hi") == (0, "héy\n", "")


def test_stats_go_to_stderr(run):
    status, out, err = run("--prompt", "hi", "--stats")
    assert (status, out) == (0, "héy\n")
    assert "first token" in err
    assert "5 tokens read" in err
    assert "peak memory" in err


def test_lines_are_answered_turn_by_turn_until_the_end(run):
    status, out, err = run(stdin="hi\n\n/stats\n/help\n/new\nagain\n/quit\nnever\n")
    assert (status, out) == (0, "héy\nhéy\n")
    assert "/stats" in err
    assert "a new conversation" in err
    assert run(stdin="hi\n")[1] == "héy\n"  # the end of the input leaves as well


def test_a_refused_question_does_not_end_the_chat(run):
    status, out, err = run(stdin=f"{'x' * 4000}\nhi\n")
    assert (status, out) == (0, "héy\n")
    assert err.count("error: ") == 1


def test_the_system_message_comes_first(run, monkeypatch):
    seen = []
    answer = chat.Conversation.answer

    def noted(self, prompt, *arguments, **named):
        seen.append([*self.messages])
        return answer(self, prompt, *arguments, **named)

    monkeypatch.setattr(chat.Conversation, "answer", noted)
    run("--system", "brief", stdin="a\n/new\nb\n")
    assert seen == [[{"role": "system", "content": "brief"}]] * 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--prompt", ""), "empty"),
        (("--prompt", "-"), "empty"),
        (("--prompt", "x" * 4000), "4003 tokens"),
        (("--prompt", "a\udc80"), "Unicode"),
        (("--prompt", "a", "--temperature", "-1"), "temperature"),
        (("--prompt", "a", "--top-p", "0"), "top_p"),
        (("--prompt", "a", "--top-p", "2"), "top_p"),
        (("--prompt", "a", "--seed", "-3"), "seed"),
        (("--prompt", "a", "--seed", "x"), "seed"),
        (("--prompt", "a", "--max-new-tokens", "0"), "max-new-tokens"),
        (("--prompt", "a", "--threads", "0"), "threads"),
        (("--colour",), "--colour"),
    ],
    ids=lambda value: str(value)[:30].encode("ascii", "replace").decode(),
)
def test_a_wrong_input_gives_one_line_and_status_2(run, arguments, said):
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("what", ["missing", "folder", "noise", "foreign", "no tokenizer"])
def test_a_package_that_cannot_be_used_gives_one_line_and_status_2(run, tmp_path, model_file, what):
    path = tmp_path / "some.onnx"
    if what == "folder":
        path.mkdir()
    elif what == "noise":
        path.write_bytes(b"\x00noise")
    elif what != "missing":
        model_file(path, metadata={} if what == "foreign" else None)
    status, out, err = run("--prompt", "hi", package=path)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_a_long_prompt_shows_a_bar_on_stderr_that_is_gone_before_the_answer(
    package, monkeypatch, capsys
):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    status = chat.main([str(package), *GREEDY, "--prompt", "x" * 1100])
    out, err = capsys.readouterr()
    assert (status, out) == (0, "héy\n")
    assert "reading" in err
    assert "/1103" in err


def test_help_teaches_by_examples(run):
    status, out, _ = run("--help")
    assert status == 0
    assert "examples:" in out
    assert "--prompt - <" in out


def test_beyond_the_context_a_note_is_shown_on_stderr(run):
    status, out, err = run("--prompt", "x" * 2500, "--max-new-tokens", "1")
    assert (status, out) == (0, "h\n")
    assert err.startswith("note: 2503 tokens")
    assert err.count("\n") == 1


def test_ctrl_c_stops_a_single_answer_with_status_130(run, monkeypatch):
    def interrupted(self, piece):
        raise KeyboardInterrupt

    monkeypatch.setattr(chat.AnswerWriter, "write", interrupted)
    status, out, _ = run("--prompt", "hi")
    assert status == 130
    assert out == "\n"


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(run, monkeypatch):
    write, left = chat.AnswerWriter.write, [True]

    def interrupted(self, piece):
        write(self, piece)
        if left:
            left.clear()
            raise KeyboardInterrupt

    monkeypatch.setattr(chat.AnswerWriter, "write", interrupted)
    status, out, err = run(stdin="hi\nagain\n")
    assert (status, out) == (0, "h\nhéy\n")
    assert "(stopped)" in err


def test_ctrl_c_at_the_prompt_leaves_the_second_time(run, monkeypatch):
    lines = iter([KeyboardInterrupt, "hi", KeyboardInterrupt, KeyboardInterrupt])

    def asked(_):
        line = next(lines)
        if line is KeyboardInterrupt:
            raise line
        return line

    monkeypatch.setattr("builtins.input", asked)
    status, out, err = run()
    assert (status, out) == (130, "héy\n")
    assert err.count("Ctrl-C again") == 2


def command(package, *arguments):
    return [sys.executable, "-m", "runtime_py.chat", str(package), *GREEDY, *arguments]


def test_output_is_utf_8_whatever_the_locale(package):
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(
        command(package, "--prompt", "hi"), cwd=ROOT, env=environment, capture_output=True
    )
    assert done.stdout.decode("utf-8").splitlines() == ["héy"]
    assert done.stderr == b""


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_reader_that_leaves_ends_the_program_quietly(tmp_path, model_file, tokenizer_files):
    model_file(tmp_path / "model.onnx", follows=[64] * 261)  # goes on for ever
    tokenizer_files(tmp_path)
    with subprocess.Popen(
        command(tmp_path, "--prompt", "hi"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout.read(3) == b"aaa"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(20) == 0


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_real_ctrl_c_stops_the_answer_not_the_program(tmp_path, model_file, tokenizer_files):
    model_file(
        tmp_path / "model.onnx",
        follows=[64] * 261,
        context_length=200_000,
        max_position_embeddings=200_000,
    )
    tokenizer_files(tmp_path)
    with subprocess.Popen(
        command(tmp_path, "--max-new-tokens", "200000"),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        for _ in range(2):
            process.stdin.write(b"hi\n")
            process.stdin.flush()
            assert process.stdout.read(5) == b"aaaaa"
            process.send_signal(signal.SIGINT)
            while process.stdout.read(1) != b"\n":
                pass
        process.stdin.close()
        assert process.stdout.read() == b""
        assert process.stderr.read().count(b"(stopped)") == 2
        assert process.wait(20) == 0


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_on_a_terminal_the_reasoning_is_dim_and_the_text_is_whole(size, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out, text = Terminal(), "a<b<think>c</thi</think>d <thin\x1b[2J"
    writer = AnswerWriter(out)
    for start in range(0, len(text), size):
        writer.write(text[start : start + size])
    writer.end()
    plain, dim, is_dim = "", "", False
    for part in out.getvalue().split("\x1b["):
        code, _, shown = part.partition("m") if plain or dim else ("0", "", part)
        is_dim = code == "2"
        dim, plain = (dim + shown, plain) if is_dim else (dim, plain + shown)
    assert dim == "<think>c</thi</think>"
    assert plain == "a<bd <thin[2J\n"


def test_figures_without_an_answer_have_no_rates():
    assert "n/a" in figures(Timing())


def test_the_peak_memory_is_plausible():
    peak = peak_bytes()
    assert peak is not None
    assert 10e6 < peak < 100e9


INTERRUPTED_IMPORT = """
import os, runpy, signal, sys
def strike(event, details):
    if event == "import" and details[0] == sys.argv[1]:
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(strike)
runpy.run_module("runtime_py.chat", run_name="__main__", alter_sys=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("module", ["rich.console", "numpy", "onnxruntime", "tokenizers"])
def test_ctrl_c_while_it_starts_ends_it_without_a_word(module):
    command = [sys.executable, "-c", INTERRUPTED_IMPORT, module]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")
