"""What a report is made of: sections with text, figures and tables, as plain data that knows no format."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["line", "noisy", "marked", "points", "steps", "area"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One curve or cloud of points. `x`, `y`, and `low`, `high`, `names` where given, have the same length.

    `noisy` is drawn as its values, faint, with a running mean; `marked` is a line with a marker at each value; `steps`
    is the outline of a histogram whose bins end at `x`; `area` is laid upon the areas before it.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    kind: Kind = "line"
    dashed: bool = False
    marker: str = "o"
    low: Sequence[float] = ()  # of an interval: a band along a line; of points among categories, along x
    high: Sequence[float] = ()
    names: Sequence[str] = ()  # of points


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A vertical line over the whole height."""

    x: float
    kind: Literal["reset", "stage", "note"]
    colour: str
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One pair of axes. With `categories` the y axis has their names from top to bottom, at y = 0, 1, ..."""

    name: str  # of its files
    title: str
    series: Sequence[Series]
    xlabel: str = "step"
    ylabel: str = ""
    marks: Sequence[Mark] = ()
    note: str = ""
    zero: bool = True  # the y axis begins at 0
    top: float = 0.0  # the y axis goes up to this at least
    log2: bool = False  # k on the x axis
    diagonal: bool = False  # lines at 0 in both directions instead of a grid
    categories: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Cells are text; a column in which all are numbers or signs is set to the right."""

    name: str  # of its files
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    note: str = ""

    def csv(self) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.header, *self.rows])
        return text.getvalue()

    def markdown(self) -> str:
        rule = ["-:" if right else "-" for right in self.right()]
        rows = [self.header, rule, *self.rows]
        return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in rows)

    def right(self) -> list[bool]:
        """Which columns hold numbers."""
        columns = list(zip(*self.rows, strict=True)) if self.rows else [()] * len(self.header)
        return [any(column) and all(cell[:1] in "0123456789+-−<–" for cell in column) for column in columns]


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    title: str
    text: Sequence[str] = ()  # paragraphs
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    title: str
    about: Sequence[str]  # lines below the title
    sections: Sequence[Section] = field(default_factory=tuple)
    warnings: Sequence[str] = ()
