"""A report as one HTML file that needs nothing else, and its figures and tables as files beside it."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

from megatron_prorl import __version__
from megatron_prorl.errors import UserError
from megatron_prorl.report.content import Report
from megatron_prorl.report.draw import draw

PAGE = "report.html"


def write(report: Report, out: Path) -> Path:
    """Write `out`/report.html, figures/NAME.svg and .png, tables/NAME.csv and .md; returns the page's path.

    The page appears whole or not at all. Raises UserError where the folder cannot be written.
    """
    from jinja2 import Environment
    from markupsafe import Markup

    figures = [figure for section in report.sections for figure in section.figures]
    tables = [table for section in report.sections for table in section.tables]
    for names in ([figure.name for figure in figures], [table.name for table in tables]):
        assert len(set(names)) == len(names), names
    try:
        (out / "tables").mkdir(parents=True, exist_ok=True)
        drawings = {figure.name: draw(figure, out / "figures") for figure in figures}
        for table in tables:
            (out / "tables" / f"{table.name}.csv").write_text(table.csv(), encoding="utf-8")
            (out / "tables" / f"{table.name}.md").write_text(table.markdown(), encoding="utf-8")
        environment = Environment(autoescape=True, trim_blocks=False)
        environment.filters["slug"] = lambda title: re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        html = environment.from_string(_asset("page.html.j2")).render(
            report=report,
            drawings=drawings,
            version=__version__,
            css=Markup(_asset("page.css")),
            script=Markup(_asset("page.js")),
        )
        draft = out / f".{PAGE}.partial"
        draft.write_text(html, encoding="utf-8")
        return draft.replace(out / PAGE)
    except OSError as error:
        raise UserError(
            f"--out: cannot write {error.filename or out}: {(error.strerror or str(error)).lower()}"
        ) from None


def _asset(name: str) -> str:
    return files(__package__).joinpath("assets", name).read_text(encoding="utf-8")
