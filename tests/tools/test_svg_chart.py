"""Charts: every value is in the picture where its axis says, with a title, and the SVG is well formed."""

import xml.etree.ElementTree as ET

import pytest

from inflash.tools.svg_chart import WIDTH, Axes, Series, lines, round_up, split_bar, stacked_bars

AXES = Axes(x_label="step", y_label="ms <all>")


def elements(html: str, name: str) -> list[ET.Element]:
    return list(ET.fromstring(f"<div>{html}</div>").iter(name))


def test_bars_stand_on_each_other() -> None:
    series = [
        Series(name="a", points=[(0, 10.0), (1, 20.0)], style="wait"),
        Series(name="b", points=[(0, 30.0), (1, 0.0)], style="compute"),
    ]
    bars = [
        bar for bar in elements(stacked_bars(series, AXES, "two"), "rect") if "y" in bar.attrib and bar.find("title") is not None
    ]
    place = [(float(bar.attrib["y"]), float(bar.attrib["height"])) for bar in bars]
    assert [round(height / place[0][1], 2) for _, height in place] == [1, 2, 3, 0]
    assert place[2][0] + place[2][1] == pytest.approx(place[0][0], abs=0.2)
    assert [bar.findtext("title") for bar in bars] == ["0, a: 10", "1, a: 20", "0, b: 30", "1, b: 0"]


@pytest.mark.parametrize("log", [False, True])
def test_lines_rise_where_values_do(log: bool) -> None:
    axes = Axes(x_label="size", y_label="rate", log_x=log, log_y=log)
    html = lines(
        [
            Series(name="disk", points=[(4.0, 10.0), (64.0, 100.0), (1024.0, 1000.0)]),
            Series(name="here", points=[(64.0, 50.0)], marks=True, style="compute"),
        ],
        axes,
        "rates",
    )
    (line,) = elements(html, "polyline")
    (x0, y0), (x1, y1), (x2, y2) = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
    assert x0 < x1 < x2 and y0 > y1 > y2
    if log:
        assert x1 - x0 == pytest.approx(x2 - x1, abs=0.3) and y0 - y1 == pytest.approx(y1 - y2, abs=0.3)
    marks = [
        circle for circle in elements(html, "circle") if circle.find("title") is not None and "mark" in circle.attrib["class"]
    ]
    assert [mark.findtext("title") for mark in marks] == ["here: 50 at 64"] and float(marks[0].attrib["cy"]) > y1
    assert [item.text for item in elements(html, "text")][-1] == ("rate, logarithmic" if log else "rate")
    between = [rule for rule in elements(html, "line") if rule.attrib["class"] == "grid between"]
    assert len(between) == (16 if log else 0)  # of two powers of ten


def test_labels_of_ticks_stay_in_the_picture_and_apart() -> None:
    ticks = [4.0, 4.2, 1024.0, 100000.0]
    axes = Axes(x_label="size", y_label="rate", log_x=True, x_ticks=ticks, x_text=lambda value: f"{value:.1f} KiB")
    html = lines([Series(name="a", points=[(4.0, 1.0), (100000.0, 2.0)])], axes, "far apart")
    labels = [item for item in elements(html, "text") if item.text and item.text.endswith("KiB")]
    assert [item.text for item in labels] == ["4.0 KiB", "1024.0 KiB", "100000.0 KiB"]  # 4.2 would be on top of 4.0
    assert float(labels[-1].attrib["x"]) + len("100000.0 KiB") * 3.4 <= WIDTH
    assert [line.attrib["class"] for line in elements(html, "line")].count("axis") == len(ticks) + 1


def test_the_parts_of_a_split_bar_fill_it() -> None:
    html = split_bar([("waiting", "wait", 30.0), ("computing", "compute", 10.0)], lambda value: f"{value:.0f} ms", "parts")
    assert [float(bar.attrib["width"]) for bar in elements(html, "rect") if bar.find("title") is not None] == [360.0, 120.0]
    assert "waiting: 30 ms, 75 %" in html and "computing: 10 ms, 25 %" in html


def test_nothing_is_said_rather_than_drawn() -> None:
    for html in (lines([], AXES, "none"), stacked_bars([], AXES, "none"), lines([Series(name="a", points=[])], AXES, "none")):
        assert not elements(html, "svg") and "nothing to draw" in html


def test_one_point_and_only_zeros_are_drawn() -> None:
    assert elements(
        lines([Series(name="a", points=[(3.0, 0.0)])], Axes(x_label="x", y_label="y", log_x=True, log_y=True), "one"), "circle"
    )
    assert elements(stacked_bars([Series(name="a", points=[(0, 0.0)])], AXES, "zero"), "rect")


@pytest.mark.parametrize(("value", "rounded"), [(0.9, 1), (1, 1), (2.1, 2.5), (31, 40), (0.0071, 0.008), (420, 500)])
def test_axes_end_at_round_numbers(value: float, rounded: float) -> None:
    assert round_up(value) == pytest.approx(rounded)
