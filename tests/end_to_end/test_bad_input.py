"""Bad input: status 2 and one line that says what was found, expected, where, and what to do.

Most commands run in this process, where stdout and stderr are caught; a few run as a user runs
them. The text of every error is in the tests of the module that raises it; here the whole command
must be silent but for that line, and leave every file as it was.
"""

import json
import os
import shutil
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from export.cli import main as phi4export
from runtime_py import InputError, Session
from runtime_py import chat as chat_module

ROOT = Path(__file__).parents[2]
C4 = ROOT / "tests" / "golden" / "C4"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM, FC2 = "model.final_layernorm.weight", "model.layers.0.mlp.fc2.weight"
Line = Callable[..., str]


@pytest.fixture
def line(capsys: pytest.CaptureFixture[str]) -> Line:
    """line(command, *arguments): run one that must refuse, and return its line."""

    def run(command: Callable[..., int], *arguments: object) -> str:
        capsys.readouterr()
        try:
            status = command([str(each) for each in arguments])
        except SystemExit as leave:
            status = leave.code
        out, err = capsys.readouterr()
        assert (status, out) == (2, "")
        assert err.endswith("\n")
        assert err.count("\n") == 1, err
        return err

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the golden C4, for a test to damage."""
    return Path(shutil.copytree(C4, tmp_path / "checkpoint"))


def contents(folder: Path) -> dict[Path, bytes | None]:
    """Every file and folder below, hidden ones too."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(content), encoding="utf-8")


def edit_header(folder: Path, name: str, **changes: Any) -> None:
    """Change what the header says of a tensor; without changes, remove the tensor, the last one."""
    content = (folder / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    data = content[8 + length :]
    if changes:
        header[name] |= changes
    else:
        begin, _ = header.pop(name)["data_offsets"]
        data = data[:begin]
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data)


def last_tensor(folder: Path) -> tuple[str, list[int]]:
    content = (folder / WEIGHTS).read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    header.pop("__metadata__", None)
    name = max(header, key=lambda each: header[each]["data_offsets"][1])
    return name, header[name]["data_offsets"]


def lie(folder: Path, begin: int, end: int) -> None:
    """Shift what the header says of the last tensor's bytes."""
    name, (first, last) = last_tensor(folder)
    edit_header(folder, name, data_offsets=[first + begin, last + end])


def shard(folder: Path) -> None:
    """Turn the file into shards by an index, which lists one more than there is."""
    (folder / WEIGHTS).rename(folder / "part-2.safetensors")
    content = {"weight_map": {NORM: "part-1.safetensors", FC2: "part-2.safetensors"}}
    (folder / INDEX).write_text(json.dumps(content), encoding="utf-8")


def poison(folder: Path) -> None:
    """Make one number of one tensor NaN."""
    content = bytearray((folder / WEIGHTS).read_bytes())
    length = struct.unpack("<Q", content[:8])[0]
    begin = json.loads(content[8 : 8 + length])[FC2]["data_offsets"][0] + 8 + length
    content[begin + 40 : begin + 44] = np.float32(np.nan).tobytes()
    (folder / WEIGHTS).write_bytes(content)


def cut(folder: Path, keep: int) -> None:
    os.truncate(folder / WEIGHTS, keep)


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


# What is done to a checkpoint, and pieces of the line: where, what was found, expected, to do.
CHECKPOINTS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no folder": (shutil.rmtree, ("checkpoint does not exist", "give a checkpoint folder")),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), ("holds neither", WEIGHTS, INDEX, "give")),
    "missing shard": (shard, ("part-1.safetensors is missing", INDEX, "download it again")),
    "truncated header": (lambda f: cut(f, 100), (WEIGHTS, "truncated", "100", "download it again")),
    "truncated data": (lambda f: cut(f, 900_000), (WEIGHTS, "900000 bytes", "expected", "again")),
    "offsets beyond": (lambda f: lie(f, 10**9, 10**9), (WEIGHTS, "leaves a gap", "again")),
    "overlap": (lambda f: lie(f, -8, -8), (WEIGHTS, "overlaps", "expected", "again")),
    "wrong length": (lambda f: lie(f, 0, 8), (WEIGHTS, "spans", "takes", "again")),
    "wrong shape": (
        lambda f: edit_header(f, FC2, shape=[160, 64]),
        (WEIGHTS, f"{FC2} has shape [160, 64]", "implies [64, 160]", "different models"),
    ),
    "missing tensor": (
        lambda f: edit_header(f, last_tensor(f)[0]),
        ("checkpoint lacks", "different models"),
    ),
    "NaN": (poison, (f"tensor '{FC2}'", "checkpoint holds NaN", "expected finite", "fetch it")),
    "model type": (config(model_type="llama"), ("config.json", "'llama'", "'phi4flash'", "only")),
    "mb_per_layer": (config(mb_per_layer=4), ("config.json", "mb_per_layer is 4", "2", "only")),
    "no layer": (config(num_hidden_layers=0), ("config.json", "is 0", "positive", "correct it")),
    "many layers": (config(num_hidden_layers=4 * 10**12), ("4000000000000 layers", "63 tensors")),
    "broken config": (
        lambda f: (f / "config.json").write_text('{"model_type": '),
        ("config.json is not JSON", "download it again"),
    ),
    "no config": (lambda f: (f / "config.json").unlink(), ("config.json does not exist", "give")),
    "broken tokenizer_config": (
        lambda f: (f / "tokenizer_config.json").write_text("[]"),
        ("tokenizer_config.json", "a JSON list, expected an object", "download it again"),
    ),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_bad_checkpoint_is_refused(folder: Path, line: Line, case: str) -> None:
    damage, pieces = CHECKPOINTS[case]
    damage(folder)
    before = contents(folder.parent)
    said = line(phi4export, "--checkpoint", folder, "-o", folder.parent / "package")
    assert str(folder) in said
    for piece in pieces:
        assert piece in said
    assert contents(folder.parent) == before


def occupied(folder: Path, content: str) -> Path:
    folder.mkdir()
    (folder / "manifest.json").write_text(content)
    return folder


OURS = '{"format": "sambay-package"}'
DESTINATIONS: dict[str, tuple[Callable[[Path], Path], tuple[str, ...], tuple[str, ...]]] = {
    "exists": (lambda t: occupied(t / "p", OURS), (), ("exists already", "--force")),
    "another's": (lambda t: occupied(t / "p", "{}"), ("--force",), ("is no package", "choose")),
    "the checkpoint": (lambda _: C4, ("--force",), ("is no package", "choose")),
    "below a file": (lambda _: C4 / WEIGHTS / "p", (), (f"{WEIGHTS} is no folder", "choose")),
    "a file": (lambda _: C4 / WEIGHTS, ("--force",), (f"{WEIGHTS} is a file, expected a folder",)),
    "too long": (lambda t: t / ("n" * 300), (), ("too long", "choose another folder")),
}
if sys.platform == "linux":
    # No account may write here, whatever its rights.
    DESTINATIONS["unwritable"] = (lambda _: Path("/proc/p"), (), ("write into /proc", "choose"))


@pytest.mark.parametrize("case", DESTINATIONS)
def test_a_bad_destination_is_refused(tmp_path: Path, line: Line, case: str) -> None:
    make, options, pieces = DESTINATIONS[case]
    destination = make(tmp_path)
    before = contents(tmp_path) | contents(C4)
    said = line(phi4export, "--checkpoint", C4, "-o", destination, *options)
    for piece in (str(destination.parent), *pieces):
        assert piece in said
    assert contents(tmp_path) | contents(C4) == before


@pytest.mark.parametrize(
    ("arguments", "pieces"),
    [
        (("--target", "cpu-int5"), ("'cpu-int5'", "did you mean", "cpu-int8", "cpu-int4")),
        (("--target", ""), ("unknown target ''",)),
        (("--checkpoint", ""), ("empty name", "give a folder")),
        (("--targt",), ("--targt", "--help explains")),
        (("--checkpoint", "owner/name"), ("owner/name", "pip install huggingface_hub")),
    ],
)
def test_a_bad_argument_is_refused(
    tmp_path: Path,
    line: Line,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    pieces: tuple[str, ...],
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    said = line(phi4export, *arguments)
    for piece in pieces:
        assert piece in said
    assert not contents(tmp_path)


def test_names_in_an_error_cannot_break_its_line_or_command_the_terminal(line: Line) -> None:
    said = line(phi4export, "--checkpoint", "no\nsuch \x1b[31m folder")
    assert "no such \\x1b[31m folder" in said
    assert "no such \\x1b[31m folder" in line(chat_module.main, "no\nsuch \x1b[31m folder")


@pytest.mark.parametrize("case", ["NaN", "target", "destination"])
def test_bad_input_is_told_before_torch_is_loaded(folder: Path, case: str) -> None:
    poison(folder)
    arguments = {
        "NaN": ["--checkpoint", str(folder), "-o", str(folder.parent / "package")],
        "target": ["--target", "cpu"],
        "destination": ["-o", str(folder), "--force"],
    }[case]
    code = "import sys, export.cli; status = export.cli.main(); print('torch' in sys.modules)"
    command = [sys.executable, "-c", f"{code}; sys.exit(status)", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "False\n")
    assert done.stderr.startswith("phi4export: error: ")
    assert done.stderr.count("\n") == 1


@pytest.fixture
def package(export: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of C4's package, which has no tokenizer, for a test to damage."""
    return Path(shutil.copytree(export(C4, "cpu-fp32"), tmp_path / "package"))


def edit_model(package: Path, **metadata: Any) -> None:
    """Change the model's metadata, as another version or another program would write it."""
    model = onnx.load(package / "model.onnx", load_external_data=False)
    found = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(
        model, {key: value for key, value in (found | metadata).items() if value is not None}
    )
    onnx.save(model, package / "model.onnx")
    (package / "manifest.json").unlink()  # it knows the old size


def exchange(package: Path, folder: Path) -> None:
    """Put another folder in a package's place."""
    shutil.rmtree(package)
    shutil.copytree(folder, package)


def empty(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
        path.mkdir()
    else:
        path.write_bytes(b"")


PACKAGES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "nothing": (shutil.rmtree, ("does not exist", "give a package folder")),
    "empty folder": (empty, ("holds no model.onnx", "give the folder")),
    "a checkpoint": (
        lambda p: exchange(p, C4),
        ("is a checkpoint, expected a package", "phi4export --checkpoint"),
    ),
    "empty model": (lambda p: empty(p / "model.onnx"), ("has 0 bytes", "manifest.json", "again")),
    "no data": (lambda p: (p / "model.onnx.data").unlink(), ("model.onnx.data is missing", "copy")),
    "half the data": (
        lambda p: os.truncate(p / "model.onnx.data", 1000),
        ("model.onnx.data has 1000 bytes", "manifest.json says", "copy or export"),
    ),
    "foreign": (
        lambda p: edit_model(p, **{"sambay.version": None}),
        ("no sambay.version", "phi4export wrote"),
    ),
    "newer": (
        lambda p: edit_model(p, **{"sambay.version": "7"}),
        ("'7'", "reads '1'", "export the checkpoint again"),
    ),
    "no tokenizer": (lambda _: None, ("tokenizer.json is missing", "put the checkpoint's")),
}


@pytest.mark.parametrize("case", PACKAGES)
def test_a_bad_package_is_refused(package: Path, line: Line, case: str) -> None:
    damage, pieces = PACKAGES[case]
    damage(package)
    for given in (package, package / "model.onnx"):
        said = line(chat_module.main, given, "--prompt", "hi")
        if given == package or case not in ("nothing", "empty folder", "a checkpoint"):
            assert str(package) in said
            for piece in pieces:
                assert piece in said


def test_a_package_without_a_tokenizer_takes_token_ids(package: Path) -> None:
    logits = Session(package, threads=1).start().step([1, 2, 3])
    assert logits.shape == (1, 256)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 256], r"token id 256 \(row 0, token 1\) .* ids are 0 to 255"),
        ([-1], r"token id -1 .* ids are 0 to 255"),
        ([], "give at least one token"),
        ([[1], [2]], r"expected \[1, tokens\]"),
        ([0.5], "expected integers"),
    ],
)
def test_ids_that_are_none_are_refused_and_nothing_is_run(
    package: Path, ids: list[Any], message: str
) -> None:
    sequence = Session(package, threads=1).start()
    with pytest.raises(InputError, match=message):
        sequence.step(ids)
    assert sequence.length == 0


def test_beyond_the_published_context_warns_and_beyond_its_positions_refuses(package: Path) -> None:
    found = json.loads(
        Session(package, threads=1).model.get_modelmeta().custom_metadata_map["sambay.config"]
    )
    limits = {"context_length": 65_536, "max_position_embeddings": 262_144}
    edit_model(package, **{"sambay.config": json.dumps(found | limits)})
    session = Session(package, threads=1)

    class EnoughError(Exception):
        """The limits are checked before the first token is run."""

    def stop(_: int, __: int) -> None:
        raise EnoughError

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(EnoughError):
            session.start().step(np.ones(65_536, np.int64), progress=stop)
    with pytest.warns(UserWarning, match="65537 tokens are more than the 65536"):  # noqa: SIM117
        with pytest.raises(EnoughError):
            session.start().step(np.ones(65_537, np.int64), progress=stop)
    with pytest.raises(InputError, match="takes 262144 at most: shorten the input"):
        session.start().step(np.ones(262_145, np.int64))
