"""The C# programs: compile without warnings, and give our runtime's tokens and text."""

import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from runtime_py import Conversation, Sampling, Session
from runtime_py.native import library_path

SOURCE = Path(__file__).parents[2] / "examples/csharp"
TOOLS = os.environ.get("CSHARP_TOOLS")

pytestmark = [
    pytest.mark.csharp,
    pytest.mark.skipif(TOOLS is None, reason="set CSHARP_TOOLS as CONTRIBUTING.md says"),
]


def native_libraries(folder: Path) -> Path:
    """A folder with the wheels' libraries, by the names that the assemblies load."""
    for module, pattern, name in (
        ("onnxruntime", "capi/libonnxruntime.so.*", "libonnxruntime.so"),
        ("onnxruntime_genai", "libonnxruntime-genai.so", "libonnxruntime-genai.so"),
    ):
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.origin is not None:
            (folder / name).symlink_to(next(Path(spec.origin).parent.glob(pattern)))
    return folder


class Dotnet:
    """The SDK of CSHARP_TOOLS, kept to a folder of its own."""

    def __init__(self, folder: Path) -> None:
        assert TOOLS
        self.folder, self.tools = folder, Path(TOOLS).absolute()
        (folder / "native").mkdir()
        self.environment = os.environ | {
            "DOTNET_CLI_HOME": str(folder / "home"),
            "DOTNET_CLI_TELEMETRY_OPTOUT": "1",
            "DOTNET_NOLOGO": "1",
            "DOTNET_SYSTEM_GLOBALIZATION_INVARIANT": "1",
            "LD_LIBRARY_PATH": str(native_libraries(folder / "native")),
        }

    def run(self, *arguments: str | Path, **options) -> subprocess.CompletedProcess[str]:
        command = [self.tools / "dotnet/dotnet", *arguments]
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, **options
        )

    def build(self, project: str) -> Path:
        """Compile a program against the assemblies of CSHARP_TOOLS; a warning is an error."""
        copy = shutil.copytree(SOURCE / project, self.folder / project)
        managed = self.tools / "managed"
        settings = [f"-p:Managed={managed}", "-p:DisableTransitiveFrameworkReferenceDownloads=true"]
        told = self.run("build", copy, "-warnaserror", "--source", managed, *settings)
        assert told.returncode == 0, told.stdout
        return next(copy.glob(f"bin/Debug/*/{project}.dll"))


@pytest.fixture(scope="module")
def dotnet(tmp_path_factory) -> Dotnet:
    return Dotnet(tmp_path_factory.mktemp("csharp"))


@pytest.fixture(scope="module")
def binding(dotnet: Dotnet) -> Path:
    return dotnet.build("IoBinding")


@pytest.fixture(scope="module")
def chat(dotnet: Dotnet) -> Path:
    pytest.importorskip("onnxruntime_genai")
    return dotnet.build("GenAIChat")


@pytest.mark.parametrize("target", ["cpu-fp32", "cpu-int4"])
@pytest.mark.parametrize("native", [False, True], ids=["portable", "native"])
def test_bound_states_give_our_runtimes_tokens(
    dotnet: Dotnet, binding: Path, expected, tmp_path: Path, target: str, native: bool
) -> None:
    if native and library_path() is None:
        pytest.skip("the native operators were not built: needs a C++ compiler")
    wanted = expected(target)
    package = wanted.package
    if not native:
        ignore = shutil.ignore_patterns("sambay_ops*")
        package = shutil.copytree(package, tmp_path / "package", ignore=ignore)
    found = dotnet.run(binding, package, *map(str, wanted.prompt))
    assert (found.returncode, found.stderr) == (0, "")
    assert [int(line) for line in found.stdout.split()] == wanted.tokens


def test_the_chat_answers_turn_by_turn_as_our_runtime_does(
    dotnet: Dotnet, chat: Path, export, tmp_path: Path
) -> None:
    package = shutil.copytree(export(None, "cpu-int4"), tmp_path / "package")
    config = json.loads((package / "genai_config.json").read_text())
    config["search"]["top_k"] = 1  # greedy, whatever the program sets else
    (package / "genai_config.json").write_text(json.dumps(config))
    questions = ("What is 347 + 589?", "What is 12 + 30?", "What is 7 * 8?")
    ours = Conversation(Session(package, threads=1))
    answers = ["".join(ours.answer(each, Sampling(temperature=0))) for each in questions]
    found = dotnet.run(chat, package, input="\n".join([*questions, ""]))
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout == "".join(f"> {answer}\n" for answer in answers) + "> "


@pytest.mark.parametrize("program", ["binding", "chat"])
def test_a_wrong_call_is_told_how_to_call(dotnet: Dotnet, request, program: str) -> None:
    found = dotnet.run(request.getfixturevalue(program))
    assert found.returncode == 2
    assert found.stderr.startswith("usage: ")
    assert found.stderr.count("\n") == 1
