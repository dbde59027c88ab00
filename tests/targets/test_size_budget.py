"""A size is met from below within one per cent, by the mix that loses least."""

import itertools
import json
import math
import re
from pathlib import Path

import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.checkpoint import open_checkpoint
from export.cli import REFERENCE
from export.cli import main as phi4export
from export.quantize.sensitivity import matrices
from export.trace import trace
from graph_passes.pipeline import run_passes
from graph_passes.recipe import resolve
from targets import cpu
from targets.package import package_size
from targets.recipes import recipe_of
from targets.size_budget import (
    TOLERANCE,
    BudgetError,
    Choice,
    fit_target,
    package_bytes,
    parse_size,
    solve,
)

DOCS = Path(__file__).parents[2] / "docs"
SIZES = {"2.2GB": 2_200_000_000, "900 MB": 900_000_000, "1GiB": 2**30, "0.5 kb": 500, "7B": 7}


@pytest.mark.parametrize("text", SIZES)
def test_a_size_is_read(text: str) -> None:
    assert parse_size(text) == SIZES[text]


@pytest.mark.parametrize(
    "text", ["2.2XB", "2.2", "GB", "-1GB", "0MB", "1e9B", "2,2GB", "", "nanGB"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(BudgetError, match="is no size: give a number and one of B, KB, MB, GB"):
        parse_size(text)


options = st.lists(st.tuples(st.integers(1, 60), st.floats(0, 10)), min_size=1, max_size=3).map(
    lambda found: tuple((bits, *each) for bits, each in zip((4, 8, None), found, strict=False))
)


@given(st.lists(options, min_size=1, max_size=5), st.integers(1, 250), st.integers(0, 40))
def test_the_mix_costs_least_of_all_that_fit(found, budget: int, slack: int) -> None:
    choices = [Choice(f"weight {n}", each) for n, each in enumerate(found)]
    least = max(0, budget - slack)
    fitting = [
        sum(cost for _, _, cost in mix)
        for mix in itertools.product(*found)
        if least <= sum(size for _, size, _ in mix) <= budget
    ]
    chosen = solve(choices, budget, least=least)
    if not fitting:
        assert chosen is None
        return
    assert chosen is not None
    taken = [
        next(option for option in choice.options if option[0] == chosen[choice.name])
        for choice in choices
    ]
    assert least <= sum(size for _, size, _ in taken) <= budget
    assert sum(cost for _, _, cost in taken) == pytest.approx(min(fitting))


@pytest.fixture(scope="module")
def model() -> ir.Model:
    return trace(open_checkpoint(REFERENCE))


@pytest.fixture(scope="module")
def usual(model: ir.Model) -> int:
    """Bytes of the default package, without the tokenizer's files."""
    return package_bytes(model, cpu.INT4)


@pytest.mark.parametrize("times", [0.9, 1.0, 1.234, 1.7, 2.5])
def test_the_budget_is_met_from_below(model: ir.Model, usual: int, times: float) -> None:
    others = 40_000
    budget = int(usual * times) + others
    target = fit_target(model, cpu.INT4, budget, others=others)
    made = package_bytes(model, target) + others
    assert budget * (1 - TOLERANCE) <= made <= budget
    assert package_size(run_passes(model, target.passes)) < budget - others
    recipe = recipe_of(target)
    steering = {n: storage for n, storage in recipe.rules if "x_proj" in n or "dt_proj" in n}
    assert len(steering) == 6
    forms = [resolve(recipe.default, storage) for storage in steering.values()]
    assert all(form is None or form.bits == 8 for form in forms)
    if times == 0.9:  # larger blocks save what fewer bits cannot
        formats = [resolve(recipe.default, storage) for _, storage in recipe.rules]
        assert {form.block_size for form in formats if form is not None and form.bits == 4} - {32}


def test_measured_costs_decide_what_is_kept(model: ir.Model, usual: int) -> None:
    dear = "model.layers.3.mlp.fc1.weight"
    names = matrices(open_checkpoint(REFERENCE))
    for cost, costly in (((1e6, 20.0), True), ((1e-6, 20.0), False), ((1e-15, math.inf), False)):
        costs = dict.fromkeys(names, (1.0, 20.0)) | {dear: cost}
        recipe = recipe_of(fit_target(model, cpu.INT4, int(1.3 * usual), others=0, costs=costs))
        kept = resolve(recipe.default, dict(recipe.rules).get(dear, 4))
        assert (kept is None) if costly else (kept.bits == 4)


def test_costs_of_another_model_are_refused(model: ir.Model) -> None:
    with pytest.raises(BudgetError, match="they lack 'model"):
        fit_target(model, cpu.INT4, 1_000_000, others=0, costs={"another.weight": (1.0, 20.0)})


@pytest.mark.parametrize("times", [0.001, 0.7, 50])
def test_an_impossible_budget_says_what_is_possible(
    model: ir.Model, usual: int, times: float
) -> None:
    with pytest.raises(
        BudgetError, match=r"the smallest has \d+\.\d+ MB, the largest \d+\.\d+ MB$"
    ):
        fit_target(model, cpu.INT4, int(usual * times), others=0)


def test_a_target_that_quantizes_nothing_has_no_mix(model: ir.Model) -> None:
    with pytest.raises(BudgetError, match="quantizes no weights"):
        fit_target(model, cpu.FP32, 1_000_000, others=0)


def test_a_package_has_the_size_and_its_manifest_the_mix(tmp_path: Path) -> None:
    package, page = tmp_path / "package", (DOCS / "package.md").read_text(encoding="utf-8")
    (size,) = re.findall(r"phi4export --size-budget (\S+) --costs costs.json --portable", page)
    budget = parse_size(size)
    costs = tmp_path / "costs.json"
    dear = "model.layers.0.mlp.fc1.weight"
    weights = [
        {"name": name, "kl": 1e6 if name == dear else 1.0, "snr_db": 20.0}
        for name in matrices(open_checkpoint(REFERENCE))
    ]
    costs.write_text(json.dumps({"format": "sambay-sensitivity", "weights": weights}))
    arguments = ["--portable", "-o", str(package), "--size-budget", size]
    assert phi4export([*arguments, "--costs", str(costs)]) == 0
    made = sum(file.stat().st_size for file in package.iterdir())
    assert budget * (1 - TOLERANCE) <= made <= budget
    passes = json.loads((package / "manifest.json").read_text())["passes"]
    (mix,) = (each for each in passes if each.startswith("quantize_matmul("))
    assert f"('{dear}', None)" in mix


BAD_INPUT = {
    "no unit": (["--size-budget", "2.2XB"], "'2.2XB' is no size"),
    "no budget": (["--costs", "costs.json"], "--costs is for --size-budget"),
    "no costs": (["--size-budget", "1MB", "--costs", "costs.json"], "is no ranking of weights"),
    "too small": (["--size-budget", "1KB", "--portable"], "the smallest has "),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused_in_one_line(tmp_path: Path, capsys, monkeypatch, case: str) -> None:
    arguments, told = BAD_INPUT[case]
    monkeypatch.chdir(tmp_path)
    Path("costs.json").write_text("{}")
    assert phi4export([*arguments, "-o", "package"]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.strip().count("\n") == 0
    assert not Path("package").exists()
