from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_prorl.errors import UserError
from megatron_prorl.tracking.plots import curves, stages


def make_run(folder: Path, rows: list[dict[str, float | None]]) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


FULL: list[dict[str, float | None]] = [{"step": 0, "validation/reward": 0.3}] + [
    {
        "step": step,
        "reward/mean": 0.3 + step / 400,
        "policy/entropy": 0.5,
        "policy/kl_reference": 0.01,
        "reset/happened": float(step == 60),
        "rollout/response_tokens_mean": 6.0,
        "rollout/truncated_fraction": 0.01,
    }
    for step in range(1, 121)
]


def test_a_run_gives_a_picture_in_the_format_of_the_name(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", FULL)
    assert curves(run, tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    svg = curves(str(run), tmp_path / "curves.svg").read_text()
    assert "<svg" in svg


def test_several_runs_are_laid_over_each_other_under_their_labels(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", FULL), make_run(tmp_path / "b", FULL)]
    svg = curves(runs, tmp_path / "curves.svg", labels=["with resets", "without"]).read_text()
    assert "with resets" in svg and "without" in svg


def test_metrics_that_a_run_lacks_are_left_out(tmp_path: Path) -> None:
    for i, row in enumerate([{"step": 1}, {"step": 1, "policy/entropy": None}, {"step": 0, "validation/reward": 0.5}]):
        assert curves(make_run(tmp_path / f"run{i}", [row]), tmp_path / "curves.png").exists()


def test_a_folder_without_metrics_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no metrics there"):
        curves(tmp_path, tmp_path / "curves.png")


def test_stages_are_marked_where_they_begin(tmp_path: Path) -> None:
    numbers = [0, 0, 1, 1, 2, 3]  # that which begins, at an end; the last ends with the run
    rows = [{"step": step, "reward/mean": 0.5, "stage": stage} for step, stage in enumerate(numbers)]
    assert stages(rows) == [(0, 1), (2, 2), (4, 3)]
    assert "stage begins" in curves(make_run(tmp_path / "run", rows), tmp_path / "curves.svg").read_text()
