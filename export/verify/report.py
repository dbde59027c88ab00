"""A verification's figures: tables on screen, and JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from export.console import whole
from export.tensors import layer_of
from export.verify.bounds import Bound
from export.verify.compare import Error
from export.verify.measure import Measured
from export.verify.stored_weights import WeightError

FORMAT, FORMAT_VERSION = "sambay-verification", 1

KINDS = ("embedding", "attention", "mamba and memory", "feed-forward", "norms")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What ``export.verify`` found.

    Attributes:
        package, checkpoint: names of the folders.
        damaged: files that are not as the manifest says.
        notes: what was left out, and why.
        peak_bytes: of this process; None where the system does not tell.
    """

    package: str
    checkpoint: str
    target: str
    weights: list[WeightError]
    measured: Measured
    bounds: list[Bound]
    damaged: list[str]
    notes: list[str]
    seconds: float
    peak_bytes: int | None

    @property
    def failures(self) -> list[str]:
        """Lines that say what does not hold."""
        return [*self.damaged, *(str(bound) for bound in self.bounds if not bound.held)]


def bytes_by_kind(report: Report) -> dict[str, dict[int, int]]:
    """Bytes of the weights by kind and by bits."""
    found: dict[str, dict[int, int]] = {kind: {} for kind in KINDS}
    attention = {each.layer for each in report.measured.layers if each.kind.endswith("attention")}
    for weight in report.weights:
        kind = _kind(weight.name, attention)
        found[kind][weight.bits] = found[kind].get(weight.bits, 0) + weight.bytes
    return found


def _kind(name: str, attention: set[int]) -> str:
    if "embed_tokens" in name or "lm_head" in name:
        return "embedding"
    if "norm" in name or "subln" in name:
        return "norms"
    if ".mlp." in name:
        return "feed-forward"
    return "attention" if layer_of(name) in attention else "mamba and memory"


def to_json(report: Report) -> dict[str, Any]:
    """Everything, for other programs; a number that is not finite is null.

    A signal-to-noise ratio is null where the error is zero, or where its largest is null, too.
    """
    measured = report.measured
    tokens = []
    for sample, quality in measured.tokens.items():
        edges, counts = quality.histogram()
        histogram = {"edges_log10": edges, "counts": counts}
        tokens.append({"sample": sample, **quality.summary(), "histogram": histogram})
    contents = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "package": report.package,
        "target": report.target,
        "checkpoint": report.checkpoint,
        "held": not report.failures,
        "failures": report.failures,
        "bounds": [asdict(bound) | {"held": bound.held} for bound in report.bounds],
        "next_tokens": tokens,
        "layers": [asdict(layer) for layer in measured.layers],
        "states": [asdict(state) for state in measured.states],
        "weights": [asdict(weight) for weight in report.weights],
        "bytes_by_kind": {
            kind: {str(bits): count for bits, count in by_bits.items()}
            for kind, by_bits in bytes_by_kind(report).items()
        },
        "notes": report.notes,
        "seconds": report.seconds,
        "peak_bytes": report.peak_bytes,
    }
    finite: dict[str, Any] = _finite(contents)
    return finite


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_report(report: Report, console: Console) -> None:
    """Tables: next tokens, layers, the weights that have lost most, bounds."""
    titles = _right("tokens", "KL mean", "p99", "max", "top 1", "perplexity")
    table = Table("next tokens", *titles, box=None)
    for sample, quality in report.measured.tokens.items():
        found = quality.summary()
        ratio = f"{found['reference_perplexity']:.4g} x {found['perplexity_ratio']:.4f}"
        numbers = [f"{found[name]:.2g}" for name in ("kl_mean", "kl_p99", "kl_max")]
        agreement = f"{found['top1_agreement']:.2%}"
        table.add_row(sample, f"{found['tokens']:g}", *numbers, agreement, ratio)
    console.print(whole(table))
    _print_layers(report, console)
    _print_states(report, console)
    _print_weights(report, console)
    for note in report.notes:
        console.print(f"note: {note}", markup=False, highlight=False)
    verdict = f"{len(report.failures)} bounds exceeded" if report.failures else "all bounds hold"
    memory = "" if report.peak_bytes is None else f", peak memory {report.peak_bytes / 1e9:.2f} GB"
    console.print(f"{verdict}; {report.seconds:.0f} s{memory}", highlight=False)


def _print_layers(report: Report, console: Console) -> None:
    """Signal-to-noise ratios after each layer, and of the layer alone."""
    samples = list(report.measured.tokens)
    titles = _right(*(title for name in samples for title in (f"{name}\ndB", "\nalone")))
    table = Table("layer", "kind", *titles, box=None)
    rows: dict[int, list[str]] = {}
    for each in report.measured.layers:
        row = rows.setdefault(each.layer, [str(each.layer), each.kind.replace("_", " ")])
        row += [decibels(each.error.snr_db), decibels(each.own.snr_db)]
    for row in rows.values():
        table.add_row(*row)
    console.print(whole(table))


def _print_states(report: Report, console: Console) -> None:
    table = Table("state", *_right(*(f"{s}\ndB" for s in report.measured.tokens)), box=None)
    rows: dict[str, list[str]] = {}
    for each in report.measured.states:
        rows.setdefault(each.state, [each.state]).append(error_cells(each.error)[0])
    for row in rows.values():
        table.add_row(*row)
    console.print(whole(table))


def _print_weights(report: Report, console: Console) -> None:
    titles = _right("weights", "MB", "mean dB", "least dB")
    table = Table("stored as", *titles, "weight that lost most", box=None)
    for label in sorted({weight.stored for weight in report.weights}):
        group = [weight for weight in report.weights if weight.stored == label]
        worst = min(group, key=lambda each: each.snr_db)
        mean = sum(each.snr_db for each in group) / len(group)
        size = f"{sum(each.bytes for each in group) / 1e6:,.2f}"
        lost = worst.name if math.isfinite(worst.snr_db) else ""
        ratios = decibels(mean), decibels(worst.snr_db)
        table.add_row(label, str(len(group)), size, *ratios, lost)
    console.print(whole(table))


def _right(*titles: str) -> list[Any]:
    return [Column(title, justify="right") for title in titles]


def error_cells(error: Error | None) -> list[str]:
    """Ratio, relative and largest error as text."""
    if error is None:
        return ["another shape", "", ""]
    return [decibels(error.snr_db), f"{error.relative:.2g}", f"{error.largest:.2g}"]


def decibels(value: float) -> str:
    """A signal-to-noise ratio as text."""
    if value == math.inf:
        return "exact"
    return f"{value:.1f}" if math.isfinite(value) else "no number"
