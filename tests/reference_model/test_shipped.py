"""The shipped weights do what their card says, as float32 and as the default package."""

import pytest

from benchmarks.quality import main, measure
from export.cli import main as phi4export
from runtime_py import Session

CASES = 60
# What the card promises of 500 cases, less four standard errors of a sample of CASES.
LEAST = {
    "sums, 3 digits": 0.93,
    "differences, 3 digits": 0.93,
    "products, 3 digits by 1": 0.85,
    "talk": 0.93,
    "phonebook, 32": 0.93,
    "phonebook, 64": 0.93,
}


@pytest.fixture(scope="module", params=["cpu-fp32", "cpu-int4"])
def shipped(request, tmp_path_factory):
    package = tmp_path_factory.mktemp("shipped") / request.param
    assert phi4export(["--target", request.param, "--output", str(package)]) == 0
    return package


def test_held_out_cases_are_answered_as_the_card_says(shipped):
    session = Session(shipped, threads=1)
    scores = {task: measure(session, task, CASES).score for task in LEAST}
    assert all(scores[task] >= least for task, least in LEAST.items()), scores


def test_a_package_equals_itself(shipped, capsys):
    arguments = [str(shipped), "--against", str(shipped), "--cases", "5", "--tasks", "talk"]
    assert main([*arguments, "--threads", "1"]) == 0
    assert "100.00%" in capsys.readouterr().out
