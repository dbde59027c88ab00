"""The file that carries measured costs from ``--sensitivity`` to ``--size-budget``."""

from __future__ import annotations

import json
import math
from pathlib import Path

FORMAT, FORMAT_VERSION = "sambay-sensitivity", 1

# Mean KL and weight ratio (dB), by name of the weight; an exact weight has an infinite one.
Costs = dict[str, tuple[float, float]]


def read_costs(path: Path) -> Costs:
    """Measured divergence and weight ratio (dB) by name, from a ranking's JSON.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        if contents["format"] != FORMAT:
            raise ValueError(f"format is {contents['format']!r}")
        return {
            str(each["name"]): (float(each["kl"]), _ratio(each["snr_db"]))
            for each in contents["weights"]
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no ranking of weights ({error}): write one with "
            "phi4export --sensitivity --json FILE"
        ) from error


def _ratio(stored: float | None) -> float:
    return math.inf if stored is None else float(stored)
