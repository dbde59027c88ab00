"""At equal size, searched scales lose less than nearest ones, and calibrated weights far less."""

from benchmarks.weight_quality import WeightQuality
from graph_passes.recipe import QUANTIZERS, WeightFormat


def test_calibrated_weights_lose_a_third_less_than_rounded_ones(tmp_path) -> None:
    measured = WeightQuality(tokens=128)
    calibration = measured.calibrate(tmp_path, tokens=3000)
    lost = {
        quantizer: measured.cost(WeightFormat(quantizer=quantizer), calibration).kl
        for quantizer in QUANTIZERS
    }
    assert 0 < lost["gptq"] < 0.7 * lost["rtn"]
    assert lost["search"] < lost["rtn"] < 0.05
