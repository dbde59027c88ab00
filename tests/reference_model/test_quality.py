import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from benchmarks.quality import TASKS, divergence, held_out, main, mcnemar

logits = hnp.arrays(np.float32, (3, 5), elements=st.floats(-30, 30, width=32))
quick = settings(max_examples=40, deadline=None)


@quick
@given(logits, logits)
def test_divergence_is_never_negative_and_nothing_for_the_same(one, two):
    assert (divergence(one, two) >= -1e-9).all()
    np.testing.assert_allclose(divergence(one, one + np.float32(2)), 0, atol=1e-5)


def test_divergence_of_known_distributions():
    even, sure = np.log([[0.5, 0.5]]), np.log([[0.9, 0.1]])
    wanted = 0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1)
    np.testing.assert_allclose(divergence(even, sure), [wanted])


@quick
@given(st.integers(0, 200), st.integers(0, 200))
def test_mcnemar_is_a_symmetric_probability(lost, won):
    assert 0 < mcnemar(lost, won) <= 1
    assert mcnemar(lost, won) == mcnemar(won, lost)


def test_mcnemar_of_known_splits():
    assert mcnemar(0, 0) == mcnemar(4, 4) == 1
    assert mcnemar(0, 10) == pytest.approx(2 / 2**10)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_has_as_many_cases_as_asked_for_and_always_the_same(task):
    groups = held_out(task, 45)
    assert sum(len(group.turns) for group in groups) == 45
    assert groups == held_out(task, 45)
    for group in groups:
        assert len({turn.question for turn in group.turns}) == len(group.turns)


def test_a_missing_package_is_told_in_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "nothing")]) == 2
    assert "nothing" in capsys.readouterr().err


@pytest.mark.parametrize("count", ["0", "-3", "many"])
def test_a_count_of_cases_below_one_is_refused(count, capsys):
    with pytest.raises(SystemExit):
        main(["package", "--cases", count])
    assert "--cases" in capsys.readouterr().err
