"""Figures: what is drawn is what was given, and the page's data are its values."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from megatron_prorl.report.content import Figure, Mark, Series, Table
from megatron_prorl.report.draw import MOST_POINTS, draw, running_mean, thinned

STEPS = list(range(1, 41))


def figure(**changes: object) -> Figure:
    series = [
        Series(label="one", x=STEPS, y=[step / 40 for step in STEPS], colour="#0072B2"),
        Series(label="two", x=STEPS[::10], y=[0.1, 0.0, 0.3, 0.25], colour="#D55E00", kind="marked"),
    ]
    plain = {"name": "reward", "title": "Reward <of> two", "series": series}
    return Figure(**{**plain, "marks": [Mark(x=20, kind="reset", colour="#595959")], **changes})  # type: ignore[arg-type]


def test_a_figure_is_left_as_png_and_svg_and_is_the_same_every_time(tmp_path: Path) -> None:
    first = draw(figure(), tmp_path)
    svg = (tmp_path / "reward.svg").read_bytes()
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in svg
    assert draw(figure(), tmp_path) == first
    assert (tmp_path / "reward.svg").read_bytes() == svg


def test_the_data_beside_a_figure_are_its_values(tmp_path: Path) -> None:
    drawing = draw(figure(), tmp_path)
    data = json.loads(drawing.data)
    assert [row["label"] for row in data["series"]] == ["one", "two"]
    assert data["xs"][data["series"][1]["x"]] == [1, 11, 21, 31]
    assert data["series"][1]["y"] == [0.1, 0, 0.3, 0.25]
    assert data["marks"] == [20]
    # The frame is where the picture has it: a value lies on the line that the SVG draws.
    left, top, right, bottom = data["box"]
    start, end = data["x"]
    low, high = data["y"]
    x = left + (right - left) * (40 - start) / (end - start)
    y = bottom - (bottom - top) * (1.0 - low) / (high - low)
    path = drawing.svg.split('id="reward:0"')[1].split('d="')[1].split('"')[0].split()
    assert (float(path[-2]), float(path[-1])) == pytest.approx((x, y), abs=0.02)


def test_text_of_a_figure_cannot_end_the_page(tmp_path: Path) -> None:
    named = Series(label="</script><b>", x=[1.0], y=[2.0], colour="#000000", kind="points", names=["</script>"])
    drawing = draw(figure(series=[named, *figure().series]), tmp_path)
    assert "</script" not in drawing.data + drawing.svg
    assert "<of>" not in drawing.svg


def test_small_values_keep_their_digits(tmp_path: Path) -> None:
    tiny = [Series(label="", x=STEPS, y=[2e-6] * 40, colour="#0072B2")]
    svg = draw(figure(series=tiny), tmp_path).svg
    assert "2e-6" in svg and "0.00<" not in svg


@pytest.mark.parametrize(
    "changes",
    [
        {"series": []},
        {"series": [Series(label="", x=[3], y=[0.0], colour="#0072B2")]},
        {"categories": ["a", "b"], "series": [Series(label="m", x=[0.1, 0.2], y=[0, 1], colour="#0072B2", kind="points",
                                                     low=[0.0, 0.1], high=[0.2, 0.4])]},
        {"log2": True, "series": [Series(label="m", x=[1, 2, 4], y=[0.1, 0.2, 0.3], colour="#0072B2", low=[0, 0, 0],
                                         high=[1, 1, 1])]},
        {"series": [Series(label=c, x=STEPS, y=STEPS, colour="#0072B2", kind="area") for c in "ab"]},
        {"diagonal": True, "series": [Series(label="a", x=[-1], y=[1], colour="#0072B2", kind="points", names=["t"])]},
        {"series": [Series(label="a", x=[0, 1, 2], y=[1, 3, 2], colour="#0072B2", kind="steps")]},
    ],
)  # fmt: skip
def test_every_kind_of_figure_is_drawn(tmp_path: Path, changes: dict[str, object]) -> None:
    assert "<svg" in draw(figure(**changes), tmp_path).svg


def test_the_running_mean_is_of_the_last_values() -> None:
    values = [random.Random(0).random() for _ in range(50)]
    expected = [math.fsum(values[max(0, i - 6) : i + 1]) / min(7, i + 1) for i in range(50)]
    assert running_mean(values, 7) == pytest.approx(expected)


def test_a_thinned_curve_keeps_its_peaks() -> None:
    y = [0.0] * 10_000
    y[1234], y[7777] = 5.0, -3.0
    x, thin = thinned(list(range(10_000)), y)
    assert len(x) <= MOST_POINTS
    assert dict(zip(x, thin, strict=True))[1234] == 5.0 and min(thin) == -3.0
    assert x == sorted(x)


def test_a_table_is_csv_and_markdown() -> None:
    table = Table(name="t", header=["task", "share"], rows=[["a|b", "1.0%"], ['say "x", y', "−2.0%"]])
    assert table.csv() == 'task,share\na|b,1.0%\n"say ""x"", y",−2.0%\n'
    assert table.markdown().splitlines() == [
        "| task | share |",
        "| - | -: |",
        "| a\\|b | 1.0% |",
        '| say "x", y | −2.0% |',
    ]
