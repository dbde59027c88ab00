"""The files of continuous integration say what the project's own pages say."""

import re
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml", reason="needs PyYAML")

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
MARKERS = re.findall(r'"(\w+): ', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def jobs() -> dict[str, dict[str, Any]]:
    return {
        f"{file.stem}/{name}": job
        for file in FILES
        for name, job in yaml.safe_load(file.read_text(encoding="utf-8"))["jobs"].items()
    }


def commands(job: dict[str, Any]) -> list[str]:
    return [step["run"].strip() for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("name", jobs())
def test_a_job_names_its_machine_its_limit_and_what_it_runs(name: str) -> None:
    job = jobs()[name]
    matrix = job.get("strategy", {}).get("matrix", {})
    named = set(re.findall(r"matrix\.(\w+)", str(job)))
    assert named == set(matrix)
    assert job["timeout-minutes"] <= 60
    assert job["steps"][0]["uses"].startswith("actions/checkout@")
    assert commands(job)


def test_every_platform_runs_the_test_command_of_the_readme() -> None:
    job = jobs()["tests/tests"]
    blocks = [line.strip() for line in README.splitlines() if line.startswith("    ")]
    told = [line for line in blocks if line.endswith("-m pytest")]
    assert len(told) == 2
    assert commands(job)[:2] == [line.replace("py -m venv", "python -m venv", 1) for line in told]
    machines = " ".join(job["strategy"]["matrix"]["os"])
    assert all(each in machines for each in ("ubuntu", "-arm", "windows", "macos"))


def test_marked_suites_that_run_are_marked() -> None:
    assert set(jobs()["tests/kernels"]["strategy"]["matrix"]["marker"]) <= set(MARKERS)
