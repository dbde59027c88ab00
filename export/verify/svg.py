"""Two kinds of chart as inline SVG: lines and bars. Colours come from the page's style.

A page sets ``--ink``, ``--faint`` and ``--series-0`` to ``--series-5``, so one figure reads on a
light and on a dark ground.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 16, 16, 44
_COLOURS = 6


@dataclass(frozen=True)
class Line:
    """A named series; points that are not finite are left out."""

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False
    colour: int = 0


@dataclass(frozen=True)
class Bar:
    """A bar of stacked parts: (series, height)."""

    label: str
    parts: Sequence[tuple[int, float]]


def line_chart(title: str, lines: Sequence[Line], *, x: str, y: str) -> str:
    """Lines over a linear axis, upwards on a logarithmic one; y values above zero.

    Args:
        x, y: what the axes show.
    """
    points = [point for line in lines for point in _drawn(line)]
    if not points:
        return _figure(title, _text(WIDTH / 2, HEIGHT / 2, "nothing to show", "middle"))
    low = math.floor(math.log10(min(value for _, value in points)))
    high = max(math.ceil(math.log10(max(value for _, value in points))), low + 1)
    first, last = min(at for at, _ in points), max(at for at, _ in points)
    across = _scale(first, max(last, first + 1), _LEFT, WIDTH - _RIGHT)
    up = _scale(low, high, HEIGHT - _BOTTOM, _TOP)
    parts = [_grid(up(power), f"1e{power}") for power in _ticks(low, high)]
    for at in _ticks(int(first), int(last)):
        parts.append(_text(across(at), HEIGHT - _BOTTOM + 16, str(at), "middle"))
    for line in lines:
        path = " ".join(f"{across(at):.1f},{up(math.log10(v)):.1f}" for at, v in _drawn(line))
        style = ' stroke-dasharray="5 4"' if line.dashed else ""
        parts.append(
            f'<polyline class="line s{line.colour % _COLOURS}" points="{path}"{style}>'
            f"<title>{escape(line.name)}</title></polyline>"
        )
    keys = [(line.name, line.colour, line.dashed) for line in lines]
    return _figure(title, "".join([*parts, _axes(x, y)]), keys)


def bar_chart(
    title: str,
    bars: Sequence[Bar],
    *,
    x: str,
    y: str,
    names: Sequence[str] = (),
    shown: Callable[[float], str] = "{:g}".format,
) -> str:
    """Stacked bars side by side.

    Args:
        names: of the series, for the key.
        shown: text of a height.
    """
    highest = max((sum(height for _, height in bar.parts) for bar in bars), default=0)
    if highest <= 0:
        return _figure(title, _text(WIDTH / 2, HEIGHT / 2, "nothing to show", "middle"))
    up = _scale(0, highest, HEIGHT - _BOTTOM, _TOP)
    room = (WIDTH - _LEFT - _RIGHT) / len(bars)
    parts = [_grid(up(highest * n / 4), shown(highest * n / 4)) for n in range(5)]
    every = max(1, math.ceil(len(bars) / 12))
    for index, bar in enumerate(bars):
        left, floor = _LEFT + room * (index + 0.1), 0.0
        for series, height in bar.parts:
            if height:
                parts.append(
                    f'<rect class="bar s{series % _COLOURS}" x="{left:.1f}" '
                    f'y="{up(floor + height):.1f}" width="{room * 0.8:.1f}" '
                    f'height="{up(floor) - up(floor + height):.1f}">'
                    f"<title>{escape(bar.label)}: {escape(shown(height))}</title></rect>"
                )
            floor += height
        if index % every == 0:
            middle = left + room * 0.4
            parts.append(_text(middle, HEIGHT - _BOTTOM + 16, bar.label, "middle"))
    keys = [(name, series, False) for series, name in enumerate(names)]
    return _figure(title, "".join([*parts, _axes(x, y)]), keys)


def _drawn(line: Line) -> list[tuple[float, float]]:
    return [(at, value) for at, value in line.points if math.isfinite(value) and value > 0]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _ticks(low: int, high: int) -> range:
    return range(low, high + 1, max(1, math.ceil((high - low) / 12)))


def _grid(y: float, label: str) -> str:
    return (
        f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        + _text(_LEFT - 8, y + 4, label, "end")
    )


def _axes(x: str, y: str) -> str:
    middle = (_TOP + HEIGHT - _BOTTOM) / 2
    turned = f' transform="rotate(-90 14 {middle:.0f})"'
    return _text((_LEFT + WIDTH) / 2, HEIGHT - 8, x, "middle") + _text(
        14, middle, y, "middle", turned
    )


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(text)}</text>'


def _figure(title: str, drawing: str, keys: Sequence[tuple[str, int, bool]] = ()) -> str:
    key = "".join(
        f'<span class="key s{colour % _COLOURS}{" dashed" if dashed else ""}">{escape(name)}</span>'
        for name, colour, dashed in keys
    )
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">'
        f'{drawing}</svg><div class="keys">{key}</div></figure>'
    )
