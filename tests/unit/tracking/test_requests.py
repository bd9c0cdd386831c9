"""What is asked for by hand is done once, and not forgotten."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_folder import make_run

from megatron_prorl.tracking import requests
from megatron_prorl.tracking.requests import ask, clear_requests, read_requests


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", stages=[{"name": "only"}])


def test_those_that_are_done_go_and_others_stay(run_dir: Path) -> None:
    clear_requests(run_dir, {"mark"})
    ask(run_dir, "reset")
    ask(run_dir, "advance")
    asked = read_requests(run_dir)
    clear_requests(run_dir, {asked["reset"], "mark"})
    assert read_requests(run_dir) == {"advance": asked["advance"]}
    assert [path.name for path in (run_dir / "requests").iterdir()] == ["advance"]


def test_what_is_asked_for_again_while_the_one_before_is_cleared_stays(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(run_dir, "reset")
    done = read_requests(run_dir)
    times = []

    def read_and_ask_again(path: Path) -> dict[str, str]:
        found = read_requests(path)
        ask(run_dir, "reset")
        times.append(read_requests(run_dir))
        return found

    monkeypatch.setattr(requests, "read_requests", read_and_ask_again)
    clear_requests(run_dir, done.values())
    assert read_requests(run_dir) in times and read_requests(run_dir) != done
    assert [path.name for path in (run_dir / "requests").iterdir()] == ["reset"]


def test_a_kill_before_it_is_put_back_loses_nothing(run_dir: Path) -> None:
    ask(run_dir, "reset")
    asked = read_requests(run_dir)
    (run_dir / "requests" / "reset").rename(run_dir / "requests" / ".reset.taken")
    clear_requests(run_dir, {"another"})
    assert read_requests(run_dir) == asked
    (run_dir / "requests" / "reset").rename(run_dir / "requests" / ".reset.taken")
    clear_requests(run_dir, asked.values())
    assert list((run_dir / "requests").iterdir()) == []
