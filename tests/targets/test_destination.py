import errno
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from targets import destination as module
from targets.destination import DestinationError, check_destination, complete_folder

PACKAGE = '{"format": "sambay-package"}'


def write(destination: Path, text: str = "new", *, force: bool = False) -> None:
    with complete_folder(destination, force=force) as folder:
        (folder / "manifest.json").write_text(PACKAGE, encoding="utf-8")
        (folder / "content").write_text(text, encoding="utf-8")


def write_half(destination: Path, error: BaseException, *, force: bool = False) -> None:
    with complete_folder(destination, force=force) as folder:
        (folder / "half").write_text("half")
        raise error


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_complete_folder_appears_with_its_parents_and_alone(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "er" / "package")
    assert names(tmp_path / "deep" / "er") == ["package"]
    assert (tmp_path / "deep" / "er" / "package" / "content").read_text() == "new"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_an_interrupted_writing_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        write_half(tmp_path / "deep" / "package", error())
    assert names(tmp_path) == []


@pytest.mark.parametrize("force", [False, True])
def test_an_interrupted_replacement_leaves_the_old_package(tmp_path: Path, force: bool) -> None:
    write(tmp_path / "package", "old")
    with pytest.raises(ZeroDivisionError if force else DestinationError):
        write_half(tmp_path / "package", ZeroDivisionError(), force=force)
    assert names(tmp_path) == ["package"]
    assert (tmp_path / "package" / "content").read_text() == "old"


def test_force_replaces_a_package(tmp_path: Path) -> None:
    write(tmp_path / "package", "old")
    (tmp_path / "package" / "left over").write_text("x")
    write(tmp_path / "package", force=True)
    assert names(tmp_path) == ["package"]
    assert names(tmp_path / "package") == ["content", "manifest.json"]


def test_an_existing_package_needs_force(tmp_path: Path) -> None:
    write(tmp_path / "package", "old")
    for attempt in (check_destination, write):
        with pytest.raises(DestinationError, match="--force"):
            attempt(tmp_path / "package")
    assert (tmp_path / "package" / "content").read_text() == "old"


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("manifest", [None, "{}", "[1]", "no json", '{"format": "web app"}'])
def test_a_stranger_s_folder_is_never_replaced_nor_is_force_advised(
    tmp_path: Path, manifest: str | None, force: bool
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one").write_text("kept")
    if manifest is not None:
        (tmp_path / "photos" / "manifest.json").write_text(manifest)
    before = names(tmp_path / "photos")
    for attempt in (check_destination, write):
        with pytest.raises(DestinationError, match="no package") as refused:
            attempt(tmp_path / "photos", force=force)
        assert "--force" not in str(refused.value)
    assert names(tmp_path / "photos") == before


def test_force_fills_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", force=True)
    assert names(tmp_path) == ["empty"]


@pytest.mark.parametrize("force", [False, True])
def test_a_file_is_never_replaced(tmp_path: Path, force: bool) -> None:
    (tmp_path / "file").write_text("kept")
    for destination in (tmp_path / "file", tmp_path / "file" / "package"):
        with pytest.raises(DestinationError, match=r"is a file|is no folder"):
            check_destination(destination, force=force)
    assert (tmp_path / "file").read_text() == "kept"


def test_a_parent_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(module.tempfile, "mkdtemp", refuse)
    with pytest.raises(DestinationError, match=r"cannot write into .*Permission denied"):
        check_destination(tmp_path / "package")


def test_a_disk_without_room_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(DestinationError, match=r"it needs \d+\.\d\d GB"):
        check_destination(tmp_path / "package", size=1 << 60)
    check_destination(tmp_path / "package", size=1000)
    assert names(tmp_path) == []


def test_a_full_disk_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DestinationError, match="is full") as caught:
        write_half(tmp_path / "package", OSError(errno.ENOSPC, "No space left on device"))
    assert isinstance(caught.value.__cause__, OSError)
    assert names(tmp_path) == []


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    kept = [
        f".package.partial-{os.getppid()}",  # still being written
        f".other.partial-{ended.pid}",
        ".package.partial-notes",
    ]
    for name in [*kept, f".package.partial-{ended.pid}", f".package.replaced-{ended.pid}"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.onnx").write_text("half")
    write(tmp_path / "package")
    assert names(tmp_path) == sorted([*kept, "package"])


@pytest.mark.parametrize("force", [False, True])
def test_a_package_left_aside_by_a_killed_process_comes_back(tmp_path: Path, force: bool) -> None:
    """Killed between the two renames: the old package has no name that a user would find."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    write(tmp_path / "package", "old")
    (tmp_path / "package").rename(tmp_path / f".package.replaced-{ended.pid}")
    write_new = partial(write, tmp_path / "package", force=force)
    if force:
        write_new()
    else:
        with pytest.raises(DestinationError, match="--force"):
            write_new()
    assert names(tmp_path) == ["package"]
    assert (tmp_path / "package" / "content").read_text() == ("new" if force else "old")


def test_a_rename_that_fails_brings_the_old_package_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "package", "old")
    rename = Path.rename

    def fail_for_partial(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise PermissionError("in use")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_partial)
    with pytest.raises(PermissionError):
        write(tmp_path / "package", force=True)
    assert names(tmp_path) == ["package"]
    assert (tmp_path / "package" / "content").read_text() == "old"
