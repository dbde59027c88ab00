"""At equal size, searched scales lose less than nearest ones, and calibrated weights far less."""

from pathlib import Path

from benchmarks.weight_quality import METHODS, WeightQuality
from graph_passes.recipe import WeightFormat


def lost(folder: Path, doublings: int) -> dict[str, float]:
    measured = WeightQuality(tokens=128, doublings=doublings)
    calibration = measured.calibrate(folder, tokens=3000)
    form = WeightFormat()
    return {each.name: measured.cost(form, each, calibration).kl for each in METHODS}


def test_calibrated_weights_lose_a_third_less_than_rounded_ones(tmp_path: Path) -> None:
    found = lost(tmp_path, doublings=0)
    assert 0 < found["gptq"] < 0.7 * found["rtn"]
    assert found["search"] < found["rtn"] < 0.05
    assert found["gptq"] < 1.1 * found["gptq, not evened out"]


def test_loud_inputs_cost_little_once_they_are_evened_out(tmp_path: Path) -> None:
    found = lost(tmp_path, doublings=4)
    assert found["search, evened out"] < 0.6 * found["search, calibrated"]
    assert found["gptq"] < 0.8 * found["gptq, not evened out"]
