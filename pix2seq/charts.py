"""Charts as SVG: lines, reliability diagrams and confusion matrices, each a text that stands alone or within HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

COLORS = ("#1f6feb", "#d1570a", "#1a7f37", "#8250df", "#bf3989", "#57606a")
INK, FAINT = "#24292f", "#d0d7de"
SIDE = 280  # of the area of data, in pixels
LEFT, TOP, BOTTOM = 52, 34, 46  # of that area's margins
MAX_POINTS = 400  # of a line; more cannot be seen


@dataclass(frozen=True)
class Line:
    """A named line through points in [0, 1]."""

    name: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]


def line_chart(lines: Sequence[Line], *, title: str, x_label: str, y_label: str) -> str:
    """Return lines over the unit square, with their names beside it."""
    parts = [_axes(x_label, y_label)]
    for k, line in enumerate(lines):
        color = COLORS[k % len(COLORS)]
        chosen = np.unique(np.linspace(0, len(line.x) - 1, min(len(line.x), MAX_POINTS)).round().astype(int))
        points = " ".join(f"{_x(x):.1f},{_y(y):.1f}" for x, y in zip(line.x[chosen], line.y[chosen], strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts.append(_text(LEFT + SIDE + 28, TOP + 14 + 18 * k, line.name))
        parts.append(f'<rect x="{LEFT + SIDE + 10}" y="{TOP + 4 + 18 * k}" width="12" height="12" fill="{color}"/>')
    longest = max((len(line.name) for line in lines), default=0)
    return _svg(title, LEFT + SIDE + 40 + 7 * longest, TOP + SIDE + BOTTOM, parts)


@dataclass(frozen=True)
class Bar:
    """Answers with scores from `low` to `high`; those without one have neither mean nor share."""

    low: float
    high: float
    count: int
    mean_score: float | None
    share_right: float | None


def reliability_chart(bars: Sequence[Bar], *, title: str) -> str:
    """Return the share of right answers by score, beside the diagonal of perfect scores; pale bars count answers."""
    parts = []
    most = max((bar.count for bar in bars), default=0)
    for bar in bars:
        height = SIDE * bar.count / most if most else 0.0
        parts.append(
            f'<rect x="{_x(bar.low):.1f}" y="{_y(0) - height:.1f}" width="{SIDE * (bar.high - bar.low):.1f}" '
            f'height="{height:.1f}" fill="#eaeef2"><title>{bar.count} answers</title></rect>'
        )
    parts.append(_axes("score", "share of right answers"))
    parts.append(f'<line x1="{_x(0)}" y1="{_y(0)}" x2="{_x(1)}" y2="{_y(1)}" stroke="{INK}" stroke-dasharray="4"/>')
    both = [(bar.mean_score, bar.share_right) for bar in bars]
    known = [(mean, share) for mean, share in both if mean is not None and share is not None]
    points = " ".join(f"{_x(mean):.1f},{_y(share):.1f}" for mean, share in known)
    parts.append(f'<polyline points="{points}" fill="none" stroke="{COLORS[0]}" stroke-width="2"/>')
    for mean, share in known:
        parts.append(
            f'<circle cx="{_x(mean):.1f}" cy="{_y(share):.1f}" r="4" fill="{COLORS[0]}">'
            f"<title>score {mean:.3f}, right {share:.3f}</title></circle>"
        )
    return _svg(title, LEFT + SIDE + 20, TOP + SIDE + BOTTOM, parts)


def matrix_chart(names: Sequence[str], counts: NDArray[np.int64], *, title: str, rows: str, columns: str) -> str:
    """Return a matrix (N, N) of counts with the names of its rows and columns, darker by the share of the row."""
    cell = 30
    left = 40 + 7 * max(map(len, names), default=0)
    top = TOP + 20 + 6 * max(map(len, names), default=0)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    parts = [_text(left, TOP + 8, f"rows: {rows}; columns: {columns}", faint=True)]
    for i, name in enumerate(names):
        parts.append(_text(left - 8, top + cell * i + 20, name, anchor="end"))
        x = left + cell * i + 18
        parts.append(
            f'<text x="{x}" y="{top - 8}" transform="rotate(-50 {x} {top - 8})" font-size="12" '
            f'fill="{INK}">{escape(name)}</text>'
        )
        for j in range(len(names)):
            strength = round(255 - 190 * float(shares[i, j]))
            fill = f"rgb({strength},{round(255 - 120 * float(shares[i, j]))},255)"
            place = f'x="{left + cell * j}" y="{top + cell * i}" width="{cell - 1}" height="{cell - 1}"'
            parts.append(
                f'<rect {place} fill="{fill}">'
                f"<title>{escape(name)} as {escape(names[j])}: {counts[i, j]}</title></rect>"
            )
            if counts[i, j]:
                parts.append(
                    _text(left + cell * j + cell / 2, top + cell * i + 19, str(counts[i, j]), anchor="middle", size=10)
                )
    return _svg(title, left + cell * len(names) + 60, top + cell * len(names) + 12, parts)


def _axes(x_label: str, y_label: str) -> str:
    parts = []
    for k in range(6):
        value = k / 5
        parts.append(f'<line x1="{_x(0)}" y1="{_y(value)}" x2="{_x(1)}" y2="{_y(value)}" stroke="{FAINT}"/>')
        parts.append(f'<line x1="{_x(value)}" y1="{_y(0)}" x2="{_x(value)}" y2="{_y(1)}" stroke="{FAINT}"/>')
        parts.append(_text(_x(0) - 6, _y(value) + 4, f"{value:.1f}", anchor="end"))
        parts.append(_text(_x(value), _y(0) + 16, f"{value:.1f}", anchor="middle"))
    parts.append(_text(LEFT + SIDE / 2, TOP + SIDE + 36, x_label, anchor="middle"))
    y = TOP + SIDE / 2
    parts.append(
        f'<text x="14" y="{y}" transform="rotate(-90 14 {y})" text-anchor="middle" font-size="12" '
        f'fill="{INK}">{escape(y_label)}</text>'
    )
    return "".join(parts)


def _x(value: float) -> float:
    return LEFT + SIDE * value


def _y(value: float) -> float:
    return TOP + SIDE * (1 - value)


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, faint: bool = False) -> str:
    fill = "#57606a" if faint else INK
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{fill}">{escape(text)}</text>'
    )


def _svg(title: str, width: float, height: float, parts: Sequence[str]) -> str:
    width = max(width, 16 + 8.5 * len(title))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="sans-serif" role="img">'
        f'<rect width="100%" height="100%" fill="white"/>'
        f'<text x="8" y="20" font-size="14" font-weight="bold" fill="{INK}">{escape(title)}</text>'
        f"{''.join(parts)}</svg>"
    )
