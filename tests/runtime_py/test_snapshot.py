import numpy as np
import pytest

from runtime_py import SnapshotError


def test_a_saved_sequence_goes_on_where_it_was(session, expected, tmp_path):
    sequence = session.start(batch=2)
    sequence.step([[1, 2, 3], [4, 5, 0]], [[1, 1, 1], [1, 1, 0]])
    sequence.save(tmp_path / "a")
    again = session.load(tmp_path / "a")
    assert (again.length, again.batch) == (3, 2)
    np.testing.assert_array_equal(again.logits, sequence.logits)
    logits = again.step([[6], [7]])
    np.testing.assert_array_equal(logits, sequence.step([[6], [7]]))
    assert logits.max(axis=1).tolist() == [expected([1, 2, 3, 6]), expected([4, 5, 7])]


def test_a_sequence_can_be_saved_before_its_first_token(session, expected, tmp_path):
    session.start().save(tmp_path / "a")
    again = session.load(tmp_path / "a")
    assert again.logits is None
    assert again.step([3]).max() == expected([3])


def test_only_the_used_part_is_saved(session, tmp_path):
    sequence = session.start()
    sequence.step([1, 2])
    sequence.save(tmp_path / "a")
    with np.load(tmp_path / "a") as stored:
        assert stored["past_key_values.0.key"].shape == (1, 1, 2, 1)
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_a_snapshot_of_another_model_is_refused(session, make_session, tmp_path):
    sequence = make_session().start()
    sequence.step([1])
    sequence.save(tmp_path / "a")
    with pytest.raises(SnapshotError, match="another model"):
        session.load(tmp_path / "a")


@pytest.mark.parametrize("content", [None, b"", b"noise", "cut", "other"], ids=str)
def test_what_is_no_snapshot_is_refused(session, tmp_path, content):
    path = tmp_path / "a"
    session.start().save(path)
    if content is None:
        path.unlink()
    elif content == "cut":
        path.write_bytes(path.read_bytes()[:-50])
    elif content == "other":
        with path.open("wb") as file:
            np.savez(file, x=np.zeros(1))
    else:
        path.write_bytes(content)
    with pytest.raises(SnapshotError, match=r"does not exist|no snapshot"):
        session.load(path)
