"""An export that is stopped, killed or runs out of disk leaves no package, and the next succeeds.

Every export here is a process of its own, with real signals. They are forked from one that has
loaded and traced already, so each takes a fraction of a second; a signal comes at the moment when
the process makes a given system call, or, while it traces, after a given time.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from export.cli import REFERENCE
from tests.end_to_end.random_weights import write_checkpoint

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and POSIX signals")

ROOT = Path(__file__).parents[2]
C4 = ROOT / "tests" / "golden" / "C4"
INTERRUPTED = "phi4export: interrupted, nothing unfinished is kept\n"

SERVER = """
import gc, json, os, resource, signal, sys
import torch
torch.set_num_threads(1)
import export.cli, export.trace
from export.checkpoint import open_checkpoint

trace = export.trace.trace
traced = trace(open_checkpoint(sys.argv[1]))


def serve(job):
    log = os.open(job["log"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 1), os.dup2(log, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    export.trace.trace = trace if job["trace"] else lambda *_, **__: traced
    if job["largest"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest"], resource.RLIM_INFINITY))
    if job["moment"]:
        event, piece, number = job["moment"]
        def strike(name, details):
            if name == event and piece in str(details):
                os.kill(os.getpid(), number)
        sys.addaudithook(strike)
    signal.signal(signal.SIGPROF, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    signal.setitimer(signal.ITIMER_PROF, job["after"])
    status = export.cli.main(job["arguments"])
    sys.stderr.flush()
    os._exit(status)  # tearing down a copy of all that the server holds takes seconds


gc.collect()
gc.freeze()
print("ready", flush=True)
for line in sys.stdin:
    process = os.fork()
    if process == 0:
        serve(json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""


@dataclass
class Exporter:
    """Runs exports of C4, each in a process of its own."""

    server: subprocess.Popen[str]
    log: Path

    def __call__(
        self,
        destination: Path,
        *options: str,
        moment: tuple[str, str, int] | None = None,
        after: float = 0,
        trace: bool = False,
        largest: int | None = None,
    ) -> tuple[int, str]:
        """Exit status and all output.

        Args:
            moment: an audit event, a piece of what it is about, and the signal to send then.
            after: seconds of processor time after which it is interrupted; 0 is never.
            trace: trace again, rather than take the model that is there.
            largest: most bytes a file may have.
        """
        arguments = ["--checkpoint", str(C4), "-o", str(destination), *options]
        job = {"arguments": arguments, "log": str(self.log), "moment": moment}
        job |= {"after": after, "trace": trace, "largest": largest}
        assert self.server.stdin is not None
        print(json.dumps(job), file=self.server.stdin, flush=True)
        return int(self.hear()), self.log.read_text()

    def hear(self) -> str:
        """The server's next line."""
        assert self.server.stdout is not None
        return self.server.stdout.readline()


@pytest.fixture(scope="module")
def export_c4(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exporter]:
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(C4)],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with server:
        exporter = Exporter(server, tmp_path_factory.mktemp("log") / "log")
        assert exporter.hear() == "ready\n"
        yield exporter


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Audit events of Python, in the order in which they come.
MOMENTS = {
    "the weights are checked": ("open", "model.safetensors"),
    "the folder is made": ("os.mkdir", ".package.partial-"),
    "the weights are written": ("open", "model.onnx.data"),
    "the manifest is written": ("open", "manifest.json"),
    "the package is moved": ("os.rename", "package"),
}


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_or_a_termination_leaves_nothing(
    export_c4: Exporter, tmp_path: Path, moment: str, number: int, status: int
) -> None:
    stop = (*MOMENTS[moment], number)
    assert export_c4(tmp_path / "package", moment=stop) == (status, INTERRUPTED)
    assert names(tmp_path) == []


@pytest.mark.parametrize("after", [0.1, 0.5, 0.9])
def test_ctrl_c_while_tracing_leaves_nothing(
    export_c4: Exporter, tmp_path: Path, after: float
) -> None:
    assert export_c4(tmp_path / "package", after=after, trace=True) == (130, INTERRUPTED)
    assert names(tmp_path) == []


@pytest.mark.slow
def test_ctrl_c_at_any_time_leaves_nothing_or_a_package(
    export_c4: Exporter, tmp_path: Path
) -> None:
    rng = random.Random(1)
    whole = contents(tmp_path / "package") if export_c4(tmp_path / "package")[0] == 0 else {}
    assert whole
    for _ in range(60):
        found = export_c4(tmp_path / "package", "--force", after=rng.uniform(0.01, 2.5), trace=True)
        assert found == (130, INTERRUPTED) or found[0] == 0
        assert names(tmp_path) == ["package"]
        assert names(tmp_path / "package") == sorted(whole)


def test_a_killed_export_leaves_no_package_and_the_next_one_clears_up(
    export_c4: Exporter, tmp_path: Path
) -> None:
    package = tmp_path / "package"
    for moment in list(MOMENTS.values())[1:]:
        assert export_c4(package, moment=(*moment, signal.SIGKILL)) == (-signal.SIGKILL, "")
        assert not package.exists()
        assert all(name.startswith(".package.partial-") for name in names(tmp_path))
    assert names(tmp_path) != []
    status, said = export_c4(package)
    assert status == 0
    assert "holds no tokenizer" in said
    assert f"wrote {package} for cpu-int4" in said
    assert names(tmp_path) == ["package"]
    files = json.loads((package / "manifest.json").read_text())["files"]
    assert {name: each["bytes"] for name, each in files.items()} == {
        name: len(content) for name, content in contents(package).items() if name != "manifest.json"
    }


def test_a_replaced_package_stays_until_the_new_one_is_complete(
    export_c4: Exporter, tmp_path: Path
) -> None:
    package = tmp_path / "package"
    assert export_c4(package, "--target", "cpu-fp32")[0] == 0
    old = contents(package)
    for moment in list(MOMENTS.values())[2:]:
        for number, status in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
            assert export_c4(package, "--force", moment=(*moment, number))[0] == status
            assert contents(package) == old
    assert export_c4(package, "--force")[0] == 0
    assert contents(package).keys() == old.keys()
    assert contents(package)["model.onnx"] != old["model.onnx"]
    assert names(tmp_path) == ["package"]


def test_a_package_moved_aside_when_an_export_was_killed_comes_back(
    export_c4: Exporter, tmp_path: Path
) -> None:
    package = tmp_path / "package"
    assert export_c4(package)[0] == 0
    old = contents(package)
    between = ("os.rename", ".package.partial-", signal.SIGKILL)  # the second of two renames
    assert export_c4(package, "--force", moment=between)[0] == -signal.SIGKILL
    assert not package.exists()
    status, said = export_c4(package)
    assert status == 2
    assert "exists already: pass --force" in said
    assert contents(package) == old


@pytest.mark.parametrize("largest", [1_000, 100_000])
def test_a_full_disk_gives_one_line_and_leaves_nothing(
    export_c4: Exporter, tmp_path: Path, largest: int
) -> None:
    status, said = export_c4(tmp_path / "deep" / "package", largest=largest)
    assert status == 2
    assert said.startswith("phi4export: error: a file of ")
    assert "nothing was kept; choose another folder" in said
    assert said.count("\n") == 1
    assert names(tmp_path) == []


# Rows for two passes of GPTQ and a short one, columns for many of its lazy updates; a text that is
# two sequences of the calibration.
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 2080,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "sliding_window": 64,
    "vocab_size": 800,
    "max_position_embeddings": 4096,
}
CALIBRATION_MOMENTS = {
    "a layer is done": ("os.rename", "flows_1.pt.part"),
    "that it is done is written": ("os.rename", "calibration.json.part"),
    "inputs are kept": ("os.rename", "layers.2.mlp.fc1.weight.npy.part"),
    "a weight is quantized": ("open", "layers.3.mlp.fc2.weight.npy'"),
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide") / "checkpoint"
    write_checkpoint(folder, {"model_type": "phi4flash", **WIDE}, "BF16")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REFERENCE / name, folder)
    text = (REFERENCE / "quantization.txt").read_text(encoding="utf-8")
    (folder / "quantization.txt").write_text(text[:4000], encoding="utf-8")
    return folder


@pytest.mark.slow
def test_an_interrupted_calibration_leads_to_the_same_package(
    export_c4: Exporter, wide: Path, tmp_path: Path
) -> None:
    def export(name: str, moment: tuple[str, str, int] | None = None) -> int:
        """Exit status; without the library, which a build of it would change meanwhile."""
        told = ["--checkpoint", str(wide), "--quantizer", "gptq", "--portable"]
        cache = ["--calibration-cache", str(tmp_path / f"{name} moments")]
        status, said = export_c4(tmp_path / name, *told, *cache, moment=moment, trace=True)
        assert said == INTERRUPTED or status != 130
        return status

    def written(name: str) -> dict[str, bytes]:
        files = contents(tmp_path / name)
        files["manifest.json"] = re.sub(rb'"created": .*', b"", files["manifest.json"])
        return files

    assert export("whole") == 0
    whole = written("whole")
    for number, status in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        for moment in CALIBRATION_MOMENTS.values():  # each goes on where the one before has stopped
            assert export(number.name, (*moment, number)) == status
            assert not (tmp_path / number.name).exists()
        assert export(number.name) == 0
        assert written(number.name) == whole
