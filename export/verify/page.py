"""A verification as one HTML page with plots; it needs no other file and no script."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path

from export.verify import svg
from export.verify.bounds import Bound
from export.verify.report import Report, bytes_by_kind, decibels, error_cells


def write_html(report: Report, path: Path) -> None:
    """Write one page that needs nothing else."""
    title = f"{report.package}: verification"
    figures = "".join((_layer_figure(report), _size_figure(report), *_histograms(report)))
    bounds = _table(
        ("bound", "found", "limit", ""),
        [
            (b.what, _found(b), f"{'≤' if b.at_most else '≥'} {b.limit:g}", _mark(b.held))
            for b in report.bounds
        ],
    )
    problems = "".join(f'<p class="bad">{escape(line)}</p>' for line in report.failures)
    notes = "".join(f"<p>{escape(note)}</p>" for note in report.notes)
    weights = _table(
        ("weight", "stored as", "bytes", "SNR, dB", "worst row, dB", "largest error"),
        [
            (
                w.name,
                w.stored,
                f"{w.bytes:,}",
                decibels(w.snr_db),
                decibels(w.worst_row_db),
                _number(w.largest),
            )
            for w in report.weights
        ],
    )
    states = _table(
        ("state", "sample", "SNR, dB", "relative error", "largest error"),
        [(s.state, s.sample, *error_cells(s.error)) for s in report.measured.states],
    )
    path.write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main>"
        f"<h1>{escape(title)}</h1><p>{escape(report.target)} from {escape(report.checkpoint)}</p>"
        f"{problems}{notes}{_tokens_table(report)}{figures}<h2>Bounds</h2>{bounds}"
        f"<details><summary>States</summary>{states}</details>"
        f"<details><summary>Weights</summary>{weights}</details></main></body></html>\n",
        encoding="utf-8",
    )


def _tokens_table(report: Report) -> str:
    titles = ("next tokens", "tokens", "KL mean", "KL p99", "top 1", "perplexity ratio")
    rows = []
    for sample, quality in report.measured.tokens.items():
        found = quality.summary()
        names = ("tokens", "kl_mean", "kl_p99", "top1_agreement", "perplexity_ratio")
        rows.append((sample, *(_number(found[name]) for name in names)))
    return _table(titles, rows)


def _layer_figure(report: Report) -> str:
    lines = []
    for colour, sample in enumerate(report.measured.tokens):
        layers = [layer for layer in report.measured.layers if layer.sample == sample]
        after = [(float(each.layer), each.error.relative) for each in layers]
        alone = [(float(each.layer), each.own.relative) for each in layers]
        lines.append(svg.Line(f"{sample}, after the layer", after, colour=colour))
        lines.append(svg.Line(f"{sample}, layer alone", alone, dashed=True, colour=colour))
    return svg.line_chart("Error by layer", lines, x="layer", y="relative error")


def _size_figure(report: Report) -> str:
    found = bytes_by_kind(report)
    bits = sorted({each for by_bits in found.values() for each in by_bits})
    bars = [
        svg.Bar(kind, [(index, float(by_bits.get(b, 0))) for index, b in enumerate(bits)])
        for kind, by_bits in found.items()
    ]
    return svg.bar_chart(
        "Size by kind",
        bars,
        x="kind of weight",
        y="MB",
        names=[f"{each} bit" for each in bits],
        shown=lambda count: f"{count / 1e6:.3g}",
    )


def _histograms(report: Report) -> list[str]:
    figures = []
    for sample, quality in report.measured.tokens.items():
        edges, counts = quality.histogram()
        bars = [
            svg.Bar(f"1e{edge:g}", [(0, float(count))])
            for edge, count in zip(edges[:-1], counts, strict=True)
        ]
        title = f"KL divergence of next tokens, {sample}"
        figures.append(svg.bar_chart(title, bars, x="nats, from", y="tokens"))
    return figures


def _table(titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    def row(cells: tuple[str, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    return f"<table><thead>{row(titles, 'th')}</thead><tbody>{body}</tbody></table>"


def _found(bound: Bound) -> str:
    """A ratio without end is of what is exact; a divergence without end is none."""
    exact = bound.value == math.inf and not bound.at_most
    return "exact" if exact else _number(bound.value)


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "no number"


def _mark(held: bool) -> str:
    return "holds" if held else "exceeded"


_STYLE = """
:root { color-scheme: light dark; --ink: #1c2530; --ground: #fbfbf9; --faint: #d8dbdf;
  --bad: #b3261e; --series-0: #2563b0; --series-1: #c2571a; --series-2: #2c8a57;
  --series-3: #8a3f9c; --series-4: #a07a00; --series-5: #4b5a68; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ea; --ground: #14181d; --faint: #39424c;
  --bad: #ff8a80; --series-0: #6ea8ff; --series-1: #ff9f63; --series-2: #6fd39b;
  --series-3: #d490e4; --series-4: #e3c04a; --series-5: #a9b6c2; } }
body { background: var(--ground); color: var(--ink); font: 15px/1.45 system-ui, sans-serif;
  margin: 0; }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; } .bad { color: var(--bad); }
table { border-collapse: collapse; font-size: .85rem; display: block; overflow-x: auto; }
th, td { text-align: left; padding: .2rem .7rem .2rem 0; border-bottom: 1px solid var(--faint); }
figure { margin: 1.5rem 0; } figcaption { font-weight: 600; }
svg { width: 100%; height: auto; } svg text { fill: var(--ink); font-size: 12px; }
.grid { stroke: var(--faint); } .line { fill: none; stroke-width: 2; }
summary { cursor: pointer; padding: .6rem 0; font-weight: 600; }
.key { margin-right: 1.2rem; font-size: .85rem; border-top: 3px solid; }
.key.dashed { border-top-style: dashed; }
""" + "".join(
    f".line.s{n} {{ stroke: var(--series-{n}); }} .bar.s{n} {{ fill: var(--series-{n}); }} "
    f".key.s{n} {{ border-color: var(--series-{n}); }}\n"
    for n in range(6)
)
