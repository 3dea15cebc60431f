"""Charts as inline SVG: bars and lines with axes, units and titles to hover over. Colours come from the page's style sheet.

A series has a style for what it means, a class of the style sheet's, so that a meaning has one colour in every chart; series of one meaning
are told apart by their dashes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from .amounts import whole_percents

WIDTH, HEIGHT = 480, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 12, 10, 40
_LETTER = 6.8  # about as wide as a letter of a tick
_MOST_TITLES = 160  # points of a line that can be hovered over


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Values with a name.

    Attributes:
      name: for the legend; "" keeps it out.
      points: x and y; bars are at whole x.
      marks: whether points stand alone, without a line.
      style: its class.
      dash: the number of its dashes, for lines; 0: a solid one.
    """

    name: str
    points: Sequence[tuple[float, float]]
    marks: bool = False
    style: str = "other"
    dash: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """What the axes show.

    Attributes:
      x_label, y_label: with the unit.
      x_text, y_text: how values are written.
      log_x, log_y: whether an axis is logarithmic.
      top: least upper end of y.
      x_ticks: where x is labelled; None: at round values.
    """

    x_label: str
    y_label: str
    x_text: Callable[[float], str] = lambda value: plain(value)
    y_text: Callable[[float], str] = lambda value: plain(value)
    log_x: bool = False
    log_y: bool = False
    top: float | None = None
    x_ticks: Sequence[float] | None = None


def plain(value: float) -> str:
    """Three digits at least, and never an exponent."""
    return (
        f"{value:.0f}"
        if abs(value) >= 100
        else f"{value:.3g}"
        if abs(value) >= 0.001 or not value
        else f"{value:.6f}".rstrip("0")
    )


def lines(series: Sequence[Series], axes: Axes, name: str) -> str:
    """Lines or single points over common axes; `name` is read out in place of the picture."""
    points = [point for one in series for point in one.points]
    if not points:
        return nothing()
    scale = _Scale(axes, [x for x, _ in points], [y for _, y in points], bars=False)
    body = [scale.grid()]
    for one in series:
        places = [(scale.x(x), scale.y(y)) for x, y in one.points]
        if not one.marks and len(places) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            body.append(f'<polyline class="{_line_class(one)}" points="{path}"/>')
        if one.marks or len(places) <= _MOST_TITLES:
            shape = "mark" if one.marks else "dot"
            for (x, y), (value, amount) in zip(places, one.points, strict=True):
                title = escape(f"{one.name}: {axes.y_text(amount)} at {axes.x_text(value)}")
                circle = f'class="{shape} {one.style}" cx="{x:.1f}" cy="{y:.1f}" r="{5 if one.marks else 2.5}"'
                body.append(f"<circle {circle}><title>{title}</title></circle>")
    return _figure(body, name) + legend(series, bars=False)


def stacked_bars(series: Sequence[Series], axes: Axes, name: str) -> str:
    """Bars at x = 0, 1, ..., the series on top of each other; all have a value at the same places."""
    if not series or not series[0].points:
        return nothing()
    places = [x for x, _ in series[0].points]
    totals = [sum(one.points[at][1] for one in series) for at in range(len(places))]
    scale = _Scale(axes, places, totals, bars=True)
    width = max(1.0, 0.82 * (WIDTH - _LEFT - _RIGHT) / (max(places) - min(places) + 1))
    body, bases = [scale.grid()], [0.0] * len(places)
    for one in series:
        for at, (x, amount) in enumerate(one.points):
            upper, lower = scale.y(bases[at] + amount), scale.y(bases[at])
            title = escape(f"{axes.x_text(x)}, {one.name}: {axes.y_text(amount)}")
            body.append(
                f'<rect class="bar {one.style}" x="{scale.x(x) - width / 2:.1f}" y="{upper:.1f}" width="{width:.1f}" '
                f'height="{max(lower - upper, 0):.1f}"><title>{title}</title></rect>'
            )
            bases[at] += amount
    return _figure(body, name) + legend(series, bars=True)


def split_bar(parts: Sequence[tuple[str, str, float]], text: Callable[[float], str], name: str) -> str:
    """One horizontal bar cut into parts (name, style, amount); the legend has their amounts. The style sheet stretches it."""
    shares = whole_percents([amount for _, _, amount in parts])
    named = [f"{part}: {text(amount)}, {share} %" for (part, _, amount), share in zip(parts, shares, strict=True)]
    total = sum(amount for _, _, amount in parts) or 1.0
    body, at = [], 0.0
    for words, (_, style, amount) in zip(named, parts, strict=True):
        width = WIDTH * amount / total
        title = f"<title>{escape(words)}</title>"
        body.append(f'<rect class="bar {style}" x="{at:.1f}" y="0" width="{width:.1f}" height="40">{title}</rect>')
        at += width
    shape = f'class="split" viewBox="0 0 {WIDTH} 40" preserveAspectRatio="none"'
    picture = f'<svg {shape} role="img" aria-label="{escape(name)}">{"".join(body)}</svg>'
    return picture + legend(
        [Series(name=words, points=(), style=style) for words, (_, style, _) in zip(named, parts, strict=True)], bars=True
    )


def legend(series: Sequence[Series], *, bars: bool) -> str:
    named = [one for one in series if one.name]
    if not named:
        return ""
    items = "".join(
        f'<li><svg viewBox="0 0 22 10" aria-hidden="true">{_key(one, bars=bars)}</svg>{escape(one.name)}</li>' for one in named
    )
    return f'<ul class="legend">{items}</ul>'


def nothing(why: str = "There is nothing to draw: this run had none of it.") -> str:
    return f'<p class="empty">{escape(why)}</p>'


def _key(one: Series, *, bars: bool) -> str:
    if one.marks:
        return f'<circle class="mark {one.style}" cx="11" cy="5" r="4.5"/>'
    if bars:
        return f'<rect class="bar {one.style}" x="0" y="0" width="22" height="10"/>'
    return f'<line class="{_line_class(one)}" x1="0" x2="22" y1="5" y2="5"/>'


def _line_class(one: Series) -> str:
    return f"line {one.style} d{one.dash}"


def _figure(body: Sequence[str], name: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(name)}">{"".join(body)}</svg>'


def _rule(kind: str, y: float) -> str:
    return f'<line class="{kind}" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'


def _words(kind: str, text: str, place: str) -> str:
    return f'<text class="{kind}" {place}>{escape(text)}</text>'


class _Scale:
    """From values to places in the picture."""

    def __init__(self, axes: Axes, xs: Sequence[float], ys: Sequence[float], *, bars: bool) -> None:
        self._axes, margin = axes, 0.5 if bars else 0.0
        self._x = (min(xs) - margin, max(max(xs), min(xs) + 1e-9) + margin)
        if axes.log_y:
            positive = [y for y in ys if y > 0] or [1.0]
            low = 10 ** math.floor(math.log10(min(positive)))
            self._y = (low, max(round_up(max(positive)), 10 * low))
        else:
            self._y = (0.0, round_up(max(max(ys), axes.top or 0.0, 1e-9)))
        if axes.log_x and self._x[0] == self._x[1]:
            self._x = (self._x[0] / 2, self._x[1] * 2)
        self._bars = bars

    def x(self, value: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * _share(value, self._x, log=self._axes.log_x)

    def y(self, value: float) -> float:
        return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * _share(value, self._y, log=self._axes.log_y)

    def grid(self) -> str:
        """Both axes with ticks and labels; a logarithmic one says so."""
        axes, parts = self._axes, []
        for value in self._between_ticks():
            parts.append(_rule("grid between", self.y(value)))
        for value in self._y_ticks():
            y = self.y(value)
            parts.append(_rule("grid", y))
            parts.append(_words("tick", axes.y_text(value), f'x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end"'))
        parts += self._x_labels()
        parts.append(_rule("axis", HEIGHT - _BOTTOM))
        across, up = (_LEFT + WIDTH - _RIGHT) / 2, (_TOP + HEIGHT - _BOTTOM) / 2
        x_label, y_label = (
            f"{label}, logarithmic" if log else label for label, log in ((axes.x_label, axes.log_x), (axes.y_label, axes.log_y))
        )
        parts.append(_words("label", x_label, f'x="{across}" y="{HEIGHT - 6}" text-anchor="middle"'))
        parts.append(_words("label", y_label, f'transform="translate(12 {up}) rotate(-90)" text-anchor="middle"'))
        return "".join(parts)

    def _x_labels(self) -> list[str]:
        """Ticks below the axis: all inside the picture, and none on top of the one before."""
        parts, free_from = [], 0.0
        for value in self._x_ticks():
            at, text = self.x(value), self._axes.x_text(value)
            parts.append(f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{HEIGHT - _BOTTOM}" y2="{HEIGHT - _BOTTOM + 4}"/>')
            half = len(text) * _LETTER / 2
            middle = min(at, WIDTH - half)
            if middle - half >= free_from:
                parts.append(_words("tick", text, f'x="{middle:.1f}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle"'))
                free_from = middle + half + _LETTER
        return parts

    def _between_ticks(self) -> list[float]:
        """On a logarithmic axis 2, 3, ... 9 of each power of ten, which come closer and closer."""
        return self._of_powers(range(2, 10)) if self._axes.log_y else []

    def _of_powers(self, parts: Sequence[int]) -> list[float]:
        low, high = self._y
        powers = range(round(math.log10(low)), math.ceil(math.log10(high)) + 1)
        return [10.0**power * part for power in powers for part in parts if 10.0**power * part <= high * (1 + 1e-9)]

    def _y_ticks(self) -> list[float]:
        low, high = self._y
        if self._axes.log_y:
            return self._of_powers((1, 2, 5) if high <= 100 * low else (1,))
        return [high * part / 4 for part in range(5)]

    def _x_ticks(self) -> list[float]:
        if self._axes.x_ticks is not None:
            return list(self._axes.x_ticks)
        low, high = self._x
        step = round_up((high - low) / 6)
        if self._bars:
            step = max(1, round(step))
        first = math.ceil(low / step)
        return [number * step for number in range(first, math.floor(high / step) + 1)]


def _share(value: float, ends: tuple[float, float], *, log: bool) -> float:
    low, high = ends
    if log:
        value, low, high = (math.log(max(one, 1e-12)) for one in (value, low, high))
    return min(max((value - low) / ((high - low) or 1.0), 0.0), 1.0)


def round_up(value: float) -> float:
    """The next of 1, 2, 2.5, 4, 5, 8, 10 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 4, 5, 8, 10) if step * power >= value * (1 - 1e-9))
