"""Where the native operators are looked for."""

from pathlib import Path

from runtime_py import native


def test_what_is_missing_is_told_once_with_its_folder_and_how_to_get_it(monkeypatch, caplog):
    monkeypatch.setattr(native, "SUFFIXES", ())
    native.tell_if_missing.cache_clear()
    native.tell_if_missing()
    native.tell_if_missing()
    (told,) = caplog.messages
    assert told.startswith(str(Path(native.__file__).parent))
    assert "pip install -e ." in told


def test_switched_off_they_are_not_missed(monkeypatch, caplog):
    monkeypatch.setattr(native, "SUFFIXES", ())
    monkeypatch.setenv("SAMBAY_NATIVE", "0")
    native.tell_if_missing.cache_clear()
    native.tell_if_missing()
    assert native.library_path() is None
    assert caplog.messages == []
