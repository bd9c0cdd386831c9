"""The report on evaluations: every analysis is there as a figure and a table, and holds what was evaluated."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
from evaluation_folder import make_evaluation
from run_folder import make_run

from megatron_prorl.errors import UserError
from megatron_prorl.report.report import report

OUTSIDE = {"out_of_distribution": True}
ABOUT = {
    "g6": {"family": "graph", "difficulty": {"vertices": 6}, **OUTSIDE},
    "g10": {"family": "graph", "difficulty": {"vertices": 10}},
    "sums": {"domain": "math"},
    "cut": OUTSIDE,
}
COUNTS = {
    "base": {"g6": [1] * 64, "g10": [4, 4] * 32, "sums": [0] * 64, "cut": [0] * 64},
    "mid": {"g6": [2] * 64, "g10": [8, 2] * 32, "sums": [8, 0] * 32, "cut": [0, 1] * 32},
    "final": {"g6": [3] * 64, "g10": [8, 0] * 32, "sums": [8] * 64, "cut": [1, 1] * 32},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    # mid's g10 is above base at pass@1, and final's at neither.
    return make_evaluation(tmp_path / "out", COUNTS, 8, **ABOUT)


def table(page: Path, name: str) -> list[list[str]]:
    return list(csv.reader((page.parent / "tables" / f"{name}.csv").open()))


def test_every_analysis_has_a_figure_and_a_table(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("the answer of sums is 7 the answer of")
    page = report([str(folder)], corpus=[str(tmp_path / "corpus.txt")])
    titles = re.findall(r"<h2>(.*?)</h2>", page.read_text())
    assert titles == [
        *("pass@k", "Regimes", "Gain against the base model", "Shift of pass@1", "Difficulty of graph"),
        *("Out of distribution", "Length", "Creativity index"),
    ]
    tables = {path.stem for path in (page.parent / "tables").glob("*.csv")}
    assert tables == {"pass_at_k", "regimes", "gain", "shift", "sweep_graph", "ood", "lengths", "creativity"}
    figures = {path.stem for path in (page.parent / "figures").glob("*.svg")}
    assert {"pass_at_k", "pass_at_k_math", "regimes", "gain", "shift_logic", "sweep_graph_pass_at_8"} < figures
    assert {"ood", "lengths", "truncated", "creativity"} < figures


def test_tables_hold_what_was_evaluated(folder: Path) -> None:
    page = report([str(folder)])
    regimes = {row[0]: row for row in table(page, "regimes")[1:]}
    assert [regimes["sums"][i] for i in (1, 2, 3)] == ["sustained", "+50.0", "+50.0"]
    assert regimes["g10"][1] == "undecided"
    gains = {row[0]: row[1:] for row in table(page, "gain")[1:]}
    assert gains["g10"] == ["100.0", "50.0", "-50.0", "-50.0%"]
    assert gains["sums"] == ["0.0", "100.0", "+100.0", "–"]
    sweep = table(page, "sweep_graph")
    assert [row[:2] for row in sweep[1:]] == [["6", "no"], ["10", "yes"]]
    lengths = [row for row in table(page, "lengths")[1:] if row[:2] == ["math", "mid"]]
    assert lengths == [["math", "mid", "15", "10", "20", "10 / 10 / 15 / 20 / 20", "0.0%"]]
    assert [row[0] for row in table(page, "ood")[1:]] == ["cut", "mean in distribution"]


def test_runs_and_evaluations_share_a_page(folder: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    other = make_evaluation(tmp_path / "other", {"base": {"gcd": [1, 2]}}, 2, name="one model")
    page = report([str(run), str(folder), str(other)])  # whose figures would have names in common
    assert page == run / "report" / "report.html"
    titles = re.findall(r"<h2>(.*?)</h2>", page.read_text())
    assert titles[0] == "Run"
    assert {"Regimes: toys", "pass@k: toys", "pass@k: one model", "Length: one model"} < set(titles)
    assert "Regimes: one model" not in titles and "Gain against the base model: one model" not in titles


def test_what_is_wrong_with_a_corpus_is_one_line(folder: Path, tmp_path: Path) -> None:
    def line(*folders: Path, corpus: str) -> str:
        with pytest.raises(UserError) as caught:
            report([str(folder) for folder in folders], corpus=[corpus])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert line(folder, corpus="none.txt") == "--corpus: none.txt: no such file or directory"
    (tmp_path / "empty.txt").write_text(" ")
    assert line(folder, corpus=str(tmp_path / "empty.txt")).startswith("--corpus: no words in")
    assert line(make_run(tmp_path / "run"), corpus="x.txt").startswith("--corpus: responses are compared with it")
    (tmp_path / "corpus.txt").write_text("some words")
    (folder / "samples" / "mid.jsonl").write_text('{"suite": "x"}\n{"problem": "g6/1", "sample": 0, "sc\n')
    assert line(folder, corpus=str(tmp_path / "corpus.txt")).startswith(f"{folder}/samples/mid.jsonl line 2: not JSON")


def test_tasks_and_domains_of_one_name_have_files_of_their_own(tmp_path: Path) -> None:
    counts = {"base": {"logic": [1], "a b": [0], "a_b": [2], "sums": [1]}}
    page = report([str(make_evaluation(tmp_path / "out", counts, 2, sums={"domain": "math"}))])
    figures = {path.stem for path in (page.parent / "figures").glob("pass_at_k*.svg")}
    names = ("logic", "logic_2", "a_b", "a_b_2", "sums", "math")
    assert figures == {"pass_at_k", *(f"pass_at_k_{name}" for name in names)}
