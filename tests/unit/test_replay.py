"""What a replay compares at its end; replays themselves are in tests/e2e/test_replay.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_prorl import replay
from megatron_prorl.checkpoint import folders


def committed(run_dir: Path, *steps: int) -> Path:
    for step in steps:
        folders.begin(folders.checkpoint_folder(run_dir, step), 0)
        folders.commit(folders.checkpoint_folder(run_dir, step))
    return run_dir


def test_a_replay_that_ended_before_the_run_did_is_not_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(replay, "run", lambda cfg, kind: None)
    monkeypatch.setattr(replay, "differing", lambda one, other: iter(()))
    recorded = committed(tmp_path / "run", 1, 5, 6)
    short = SimpleNamespace(run_dir=str(committed(tmp_path / "short", 1, 2)))
    with pytest.raises(replay.Differs, match=r"ended before step-000006, with which .* step-000001 is its last"):
        replay.replay(recorded, short)  # type: ignore[arg-type]
    assert capsys.readouterr().out == "step-000001: identical\n"
    replay.replay(recorded, SimpleNamespace(run_dir=str(committed(tmp_path / "whole", 1, 6))))  # type: ignore[arg-type]


def test_the_checkpoint_that_an_event_took_weights_of() -> None:
    assert replay.gone_back_to({"event": "rollback", "to_step": 4, "last_good_step": 5}) == 4
    assert replay.gone_back_to({"event": "reset", "weights_of_step": 7}) == 7
    assert replay.gone_back_to({"event": "config"}) is None
