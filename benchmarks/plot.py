"""Draw decode benchmarks: milliseconds a token over depth.

    python -m benchmarks.plot OUT.svg NAME=decode.json [NAME=decode.json ...]

Needs matplotlib: pip install 'phi4export[bench]'.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("out", type=Path)
    parser.add_argument("curves", nargs="+", metavar="NAME=FILE")
    options = parser.parse_args(arguments)
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "phi4export"  # the same drawing from the same numbers
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    limit: list[tuple[int, float]] = []
    for curve in options.curves:
        name, _, path = curve.partition("=")
        rows = json.loads(Path(path).read_text(encoding="utf-8"))["depths"]
        depths = [row["depth"] / 1024 for row in rows]
        axes.plot(depths, [row["median_ms"] for row in rows], marker="o", label=name)
        limit = limit or [(row["depth"], row["limit_ms"]) for row in rows]
    axes.plot(
        [depth / 1024 for depth, _ in limit],
        [ms for _, ms in limit],
        linestyle="--",
        color="gray",
        label="memory bus: weights and cache read once",
    )
    axes.set_xlabel("tokens before, in thousands (1024)")
    axes.set_ylabel("ms a token, median")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(options.out, metadata={"Date": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
