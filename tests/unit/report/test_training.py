"""The report on runs: what it holds is what their folders say."""

from __future__ import annotations

import csv
import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from run_folder import make_run, write_rows

from megatron_prorl.cli import main
from megatron_prorl.errors import UserError
from megatron_prorl.report.report import report
from megatron_prorl.tracking.status import StatusWriter, read_status


def full_row(step: int) -> dict[str, float | None]:
    """Drawn 10, dropped 3."""
    return {
        "step": step,
        "time": 1000.0 + step,
        "reward/mean": 0.3 + step / 200,
        "reward/gcd": 0.2,
        "reward/lcm": 0.4,
        "policy/entropy": 0.5,
        "policy/kl_reference": 0.001 * (step % 20),
        "policy/clip_low_fraction": 0.01,
        "policy/clip_high_fraction": 0.02,
        "policy/grad_norm": None if step == 7 else 1.0,
        "rollout/response_tokens_mean": 10.0,
        "rollout/truncated_fraction": 0.125,
        "rollout/groups_drawn": 10.0,
        "rollout/groups_dropped_all_0": 2.0,
        "rollout/groups_dropped_all_1": 1.0,
        "mismatch/logprob_diff_mean": 1e-3,
        "time/step": 4.0,
        "time/collect": 3.0,
        "time/update": 1.0,
        "reset/happened": float(step == 20),
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = make_run(tmp_path / "run")
    write_rows(folder / "metrics.jsonl", [{"step": 0, "validation/reward": 0.25}, *map(full_row, range(1, 41))])
    return folder


def figures(page: Path) -> dict[str, dict[str, object]]:
    """The data of the page's figures by name."""
    blocks = re.findall(r'<script type="application/json">(.*?)</script>', page.read_text(), re.DOTALL)
    return {data["name"]: data for data in map(json.loads, blocks)}


def table(page: Path, name: str) -> list[list[str]]:
    return list(csv.reader((page.parent / "tables" / f"{name}.csv").open()))


def test_a_run_is_one_page_that_needs_nothing_else(run: Path) -> None:
    page = report([str(run)])
    assert page == run / "report" / "report.html"
    html = page.read_text()
    sources: list[tuple[str, str | None]] = []

    class Links(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            sources.extend((tag, value) for name, value in attrs if name in ("src", "href"))

    Links().feed(html)
    assert sources and all(tag == "a" and str(value).startswith("#") for tag, value in sources if tag != "use")
    assert all(str(value).startswith("#") for tag, value in sources if tag == "use")
    assert "@import" not in html and "url(http" not in html and "fetch(" not in html


def test_every_figure_and_table_is_a_file_as_well(run: Path) -> None:
    page = report([str(run)])
    names = set(figures(page))
    for suffix in ("png", "svg"):
        assert {path.stem for path in (page.parent / "figures").glob(f"*.{suffix}")} == names
    assert {"reward", "held_out", "entropy", "kl", "clipped", "length", "truncated", "pass_rate", "mismatch"} <= names
    assert {"step_time", "phases"} <= names
    for suffix in ("csv", "md"):
        assert {path.stem for path in (page.parent / "tables").glob(f"*.{suffix}")} == {"runs", "events", "time"}


def test_what_the_figures_hold_is_what_the_run_logged(run: Path) -> None:
    found = figures(report([str(run)]))
    [passed, all_wrong, all_right] = found["pass_rate"]["series"]  # type: ignore[misc]
    assert [set(series["y"]) for series in (passed, all_wrong, all_right)] == [{0.7}, {0.2}, {0.1}]
    assert found["kl"]["marks"] == [20]
    assert len(found["grad_norm"]["xs"][0]) == 39  # type: ignore[index]  # the step that has no number is left out
    rows = dict(row[:2] for row in table(run / "report" / "report.html", "runs"))
    assert rows["truncated"] == "12.5%"
    assert rows["resets"] == "3"
    assert rows["training reward"] == f"{0.3 + 35.5 / 200:.3f}"  # the mean of steps 31 to 40
    seconds = dict(table(run / "report" / "report.html", "time")[1:])
    assert (seconds["collect"], seconds["all steps"]) == ("120.0 (75.0%)", "2:40")


def test_events_tell_when_and_why(run: Path) -> None:
    rows = table(report([str(run)]), "events")
    assert [row[0] for row in rows[1:]] == ["0", "10", "20", "30"]
    assert rows[2][2].startswith("reset 1: reference := policy, optimizer cleared (reset.every_steps")


def test_resets_stages_and_rollbacks_are_marked(run: Path) -> None:
    rows = [full_row(step) | {"stage": float(step > 29)} for step in range(1, 41)]
    write_rows(run / "metrics.jsonl", rows)
    back = {
        "event": "rollback",
        "step": 35,
        "to_step": 30,
        "last_good_step": 30,
        "draws_skipped": 4,
        "trigger": "guards.kl",
        "reason": "high",
    }
    with (run / "lineage.jsonl").open("a") as lineage:
        lineage.write(json.dumps(back | {"time": 1035.0}) + "\n")
    page = report([str(run)])
    assert figures(page)["kl"]["marks"] == [20, 35, 1, 30]
    svg = (page.parent / "figures" / "kl.svg").read_text()
    assert all(text in svg for text in ("rollback", "reset", "stage begins"))


def test_runs_side_by_side_share_their_axes_and_say_in_what_they_differ(run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", steps=20, seed=5)
    write_rows(other / "metrics.jsonl", [full_row(step) for step in range(1, 21)])
    page = report([str(run), str(other)], str(tmp_path / "both"))
    assert page == tmp_path / "both" / "report.html"
    found = figures(page)
    assert [series["label"] for series in found["reward"]["series"]] == ["run", "other"]  # type: ignore[union-attr]
    assert {"clipped_low", "clipped_high", "phases_1", "phases_2"} <= set(found)
    assert table(page, "runs")[0] == ["", "run", "other"]
    assert ["seed", "0", "5"] in table(page, "options")
    assert {row[0] for row in table(page, "events")[1:]} == {"run", "other"}


def test_a_run_in_progress_says_so(run: Path) -> None:
    assert "is in progress" not in report([str(run)]).read_text()
    with StatusWriter(run, steps=100) as status:
        status.begin(step=40, stage=0, resets=3)
        while (read_status(run) or {})["step"] != 40:  # a thread of its own writes it
            time.sleep(0.01)
        html = report([str(run)]).read_text()
    assert re.search(r'<p class="warning">run is in progress \(running: .*\): figures up to step 40 of 100</p>', html)


def test_a_first_row_is_enough(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=10)
    write_rows(folder / "metrics.jsonl", [{"step": 0, "validation/reward": 0.25}])
    assert set(figures(report([str(folder)]))) == {"held_out"}


def test_what_is_wrong_is_one_line(run: Path, tmp_path: Path) -> None:
    def line(*folders: Path, out: Path | None = None) -> str:
        with pytest.raises(UserError) as caught:
            report([str(folder) for folder in folders], str(out) if out else None)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert line(tmp_path / "none") == (
        f"{tmp_path}/none: no such folder; give a run directory, or the --out of an evaluation"
    )
    assert line(tmp_path) == f"{tmp_path}: neither a run (metrics.jsonl) nor a finished evaluation (results.json)"
    assert line(run, run) == "a run is given twice"
    assert line(*[run] * 7).startswith("7 runs are too many")
    (tmp_path / "file").write_text("")
    assert line(run, out=tmp_path / "file").startswith(f"--out: cannot write {tmp_path}/file")
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    assert line(run).startswith(f"{run}/metrics.jsonl line 2: not JSON")
    (run / "metrics.jsonl").write_text("")
    assert line(run) == f"{run}: no metrics there yet; a report needs a first step"


def test_the_command_prints_where_the_page_is_or_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(run), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/out/report.html\n"
    assert main(["report", str(run), str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/none: no such folder; give a run directory, or the --out of an evaluation\n"
    )
