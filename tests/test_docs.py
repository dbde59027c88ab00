"""What the documentation says is so: links, examples, commands, names, no path of one machine."""

import argparse
import importlib.util
import re
import runpy
import shlex
import sys
import tomllib
import warnings
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
FOLDERS = (
    "export|graph_passes|targets|runtime_py|kernels|tests|docs|benchmarks|examples|reference_model"
)
BUILT = {"runtime_py/_sambay_ops.so", "runtime_py/_sambay_ops_cuda.so", "benchmarks/results/"}

FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
INLINE = re.compile(r"`([^`\n]+)`")
COMMAND = re.compile(r"(?:\S*/)?(?:(phi4export)|python -m (\S+))(?= |$)(.*)")


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def examples() -> list[Any]:
    """Runnable blocks of each page, and apart those that need a module the tests go without.

    The blocks of one page run one after the other in one namespace.
    """
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        by_needs: dict[str, list[str]] = {}
        for match in FENCE.finditer(text):
            language, *marks = match[1].split() or [""]
            if language == "python" and marks[:1] == ["runnable"]:
                # blank lines before it, so that a traceback tells the line of the page
                code = "\n" * text.count("\n", 0, match.start(2)) + match[2]
                by_needs.setdefault(" ".join(marks[1:]), []).append(code)
        for needs, blocks in by_needs.items():
            name = f"{page.name}-{needs}" if needs else page.name
            found.append(pytest.param(page, blocks, needs.split(), id=name))
    return found


@pytest.mark.parametrize(("page", "blocks", "needs"), examples())
def test_examples_run(export, tmp_path, monkeypatch, page, blocks, needs) -> None:
    for module in needs:
        pytest.importorskip(module)
    if any('"demo"' in block for block in blocks):
        (tmp_path / "demo").symlink_to(export(None, "cpu-int4"), target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block, str(page), "exec"), namespace)


def quoted_lines(page: Path) -> list[str]:
    """A page's indented lines."""
    lines = page.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.startswith("    ")]


def commands(page: Path) -> list[tuple[str, tuple[str, ...]]]:
    """Module and arguments of each command of ours that a page quotes."""
    text, quoted = page.read_text(encoding="utf-8"), quoted_lines(page)
    quoted += INLINE.findall(prose(page))
    for language, block in FENCE.findall(text):
        if language.strip() in ("sh", "bash", "console", "powershell"):
            quoted += block.splitlines()
    found = []
    for line in quoted:
        for part in re.split(r"&&|;|\||<|>| #", line):
            match = COMMAND.fullmatch(part.strip().replace("\\", "/"))
            if match:
                module = SCRIPTS[match[1]].split(":")[0] if match[1] else match[2]
                found.append((module, tuple(shlex.split(match[3]))))
    return sorted(set(found))


class Parsed(BaseException):
    """Ends a command when its arguments are parsed."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def parse(monkeypatch: pytest.MonkeyPatch, module: str, arguments: tuple[str, ...]) -> None:
    """Run a command up to where its arguments are parsed; raises Parsed, or SystemExit."""
    original = argparse.ArgumentParser.parse_args

    def stop(parser, args=None, namespace=None):
        original(parser, args, namespace)
        raise Parsed(parser)

    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the module was imported before
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", [module, *arguments])
        runpy.run_module(module, run_name="__main__")


QUOTED = sorted({command for page in PAGES for command in commands(page)})
FOREIGN = {"venv", "pip", "pytest"}


@pytest.mark.parametrize(("module", "arguments"), QUOTED, ids=lambda part: str(part)[:60])
def test_quoted_commands_parse(monkeypatch, capsys, module, arguments) -> None:
    if module in FOREIGN:
        assert importlib.util.find_spec(module)
        return
    with pytest.raises((Parsed, SystemExit)) as ended:
        parse(monkeypatch, module, arguments)
    assert isinstance(ended.value, Parsed) or ended.value.code == 0, capsys.readouterr().err


def test_options_named_in_prose_exist(monkeypatch) -> None:
    known: set[str] = set()
    verify = ("package", "--checkpoint", "checkpoint")
    for module, arguments in (
        ("export.cli", ()),
        ("export.verify", verify),
        ("runtime_py.chat", ("package",)),
    ):
        with pytest.raises(Parsed) as parsed:
            parse(monkeypatch, module, arguments)
        known.update(parsed.value.parser._option_string_actions)
    for page in PAGES:
        named = {text.split()[0] for text in INLINE.findall(prose(page)) if text[:2] == "--"}
        assert named <= known, page.name


def sources() -> str:
    """All code but the tests."""
    kinds = ("*.py", "*.cc", "*.h", "*.cu")
    folders = [ROOT / folder for folder in FOLDERS.split("|") if folder not in ("tests", "docs")]
    files = [path for folder in folders for kind in kinds for path in folder.rglob(kind)]
    return "".join(path.read_text(encoding="utf-8") for path in files)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_exist(page: Path) -> None:
    code, text = sources(), prose(page)
    for variable in re.findall(r"\bSAMBAY_[A-Z_]+", text):
        assert f'"{variable}"' in code, variable
    for name in INLINE.findall(text):
        if re.fullmatch(rf"(?:{FOLDERS})/[\w./-]*", name) and name not in BUILT:
            assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_path_of_one_machine(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"(?<![\w.:/])/(?:work|tmp|home|root|usr|opt|mnt|Users)\b", text)
    assert not re.findall(r"\b[A-Z]:\\", text)


def test_what_the_readme_installs_and_starts_is_one_copy() -> None:
    # A Python started in the clone takes the clone's modules, where only -e builds the operators.
    starts = [line for line in quoted_lines(ROOT / "README.md") if "-m runtime_py" in line]
    both = [line for line in starts if "pip install" in line]
    assert len(both) == 2
    for line in both:
        assert re.search(r"install -q -e '\.\[export\]'", line), line


def test_the_readme_leads_to_every_page() -> None:
    linked = {link.partition("#")[0] for link in LINK.findall(prose(ROOT / "README.md"))}
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} <= linked
