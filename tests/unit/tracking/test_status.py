"""What status.json says of a run, judged on the machine that it trains on and from another."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from run_folder import make_folder, make_run, row, write_rows

from megatron_prorl.checkpoint.folders import checkpoint_folder
from megatron_prorl.checkpoint.lock import only_writer
from megatron_prorl.errors import UserError
from megatron_prorl.tracking.overview import overview, render
from megatron_prorl.tracking.requests import ask
from megatron_prorl.tracking.status import Life, StatusWriter, life, read_status

TRAINER = """
import sys, time
from megatron_prorl.tracking.status import StatusWriter
with StatusWriter(sys.argv[1], 100) as status:
    status.begin(40, 0, 3)
    status.watch(lambda: "generating 3, verifying 1")
    status.phase("rollouts", 16)
    status.advance(12)
    time.sleep(60)
"""


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 30.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


@pytest.fixture
def trainer(run_dir: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is at the rollouts of step 41."""
    with subprocess.Popen([sys.executable, "-c", TRAINER, str(run_dir)]) as process:
        try:
            wait_for(lambda: (read_status(run_dir) or {}).get("done") == 12)
            yield process
        finally:
            process.kill()


def elsewhere(run_dir: Path, **changes: Any) -> dict[str, Any]:
    """The status as another machine's process would have written it."""
    status = read_status(run_dir)
    assert status
    return status | {"machine": "another", "host": "node-7"} | changes


def test_a_run_that_trains_tells_what_it_does(run_dir: Path, trainer: subprocess.Popen[bytes]) -> None:
    found = overview(run_dir)
    assert (found["state"], found["step"], found["resets"]) == ("running", 40, 3)
    assert found["detail"].startswith("rollouts 12/16 (generating 3, verifying 1) for 0:0")
    assert found["detail"].endswith(f"process {trainer.pid} on this machine")


def test_a_killed_run_is_not_running_from_then_on(run_dir: Path, trainer: subprocess.Popen[bytes]) -> None:
    trainer.kill()
    trainer.wait()
    found = overview(run_dir)
    assert found["state"] == "ended"
    assert (
        found["detail"]
        == "killed while it was in rollouts 12/16 (generating 3, verifying 1); prorl train goes on from step 40"
    )


def test_a_process_that_is_stopped_is_stalled_once_its_heart_has_not_beaten_for_a_minute(
    run_dir: Path, trainer: subprocess.Popen[bytes]
) -> None:
    os.kill(trainer.pid, signal.SIGSTOP)
    status = read_status(run_dir)
    assert status
    assert life(run_dir, status, status["heartbeat"] + 59).name == "running"
    found = life(run_dir, status, status["heartbeat"] + 61)
    assert found.name == "STALLED" and found.detail.startswith(
        "in rollouts 12/16 (generating 3, verifying 1): no heartbeat for 1:01"
    )


def test_a_phase_is_stalled_when_it_takes_much_longer_than_ever(run_dir: Path) -> None:
    with StatusWriter(run_dir, 100):
        now = time.time()
        written = read_status(run_dir) or {}
        known = written | {"phase": "sync", "usual_seconds": 30.0, "last_sign": now, "heartbeat": now}
        for waited, name in ((149, "running"), (151, "STALLED")):
            found = life(run_dir, known | {"last_sign": now - waited}, now)
            assert found.name == name
        assert found.detail.startswith("in sync without a sign for 2:31, which has taken 0:30 at most")
        first_time = known | {"usual_seconds": None, "last_sign": now - 600}
        assert life(run_dir, first_time, now).name == "running"
        assert life(run_dir, known | {"usual_seconds": 0.1, "last_sign": now - 100}, now).name == "running"


def test_a_run_that_is_stalled_names_the_rank_that_the_others_wait_for(
    run_dir: Path, trainer: subprocess.Popen[bytes]
) -> None:
    script = """
import sys, time
from megatron_prorl import heartbeat
from megatron_prorl.stalls import Watch
with Watch(sys.argv[1], rank=1, num_ranks=2, attempt="a", limit_seconds=0.0):
    heartbeat.phase("update")
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script, str(run_dir)]) as rank:
        path = run_dir / "heartbeats" / "rank-00001.json"
        wait_for(path.exists)
        os.kill(rank.pid, signal.SIGSTOP)
        for stopped in (path, run_dir / "status.json"):
            os.utime(stopped, (time.time() - 90, time.time() - 90))
        os.kill(trainer.pid, signal.SIGSTOP)  # or it would write that it lives
        status = read_status(run_dir)
        assert status
        (run_dir / "status.json").write_text(json.dumps(status | {"heartbeat": time.time() - 90}))
        found = overview(run_dir)
        rank.kill()
    assert found["state"] == "STALLED"
    assert f"; rank 1 (process {rank.pid} on " in found["detail"] and "is stopped by a signal" in found["detail"]


def test_the_usual_length_of_a_phase_is_the_longest_wait_of_those_that_ended(run_dir: Path) -> None:
    status = StatusWriter(run_dir, 100)
    with status:
        status.phase("rollouts", 2)
        status.advance(0)
        time.sleep(0.3)
        status.advance(1)
        assert status._now["usual_seconds"] is None, "the first of them has not ended"
        status.phase("update")
        status.phase("rollouts", 2)
        assert 0.3 <= status._now["usual_seconds"] < 0.6


def test_from_another_machine_the_heartbeat_counts_and_then_the_lock(
    run_dir: Path, trainer: subprocess.Popen[bytes]
) -> None:
    status = elsewhere(run_dir, pid=1)
    beat = status["heartbeat"]
    assert life(run_dir, status, beat + 50).name == "running"
    assert "process 1 on node-7" in life(run_dir, status, beat + 50).detail
    assert life(run_dir, status, beat + 70).name == "ended", "nobody holds the lock"
    with only_writer(run_dir):
        assert life(run_dir, status, beat + 70).name == "STALLED"
        assert life(run_dir, status | {"phase": "ended"}, beat + 70).name == "ended"


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (UserError("disk full:\nmake room"), "disk full: make room"),
        (RuntimeError("a bug"), "RuntimeError: a bug"),
        (SystemExit(128 + signal.SIGTERM), "SIGTERM"),
        (KeyboardInterrupt(), "Ctrl-C"),
        (None, ""),
    ],
)
def test_the_cause_of_an_end_is_kept(run_dir: Path, error: BaseException | None, cause: str) -> None:
    with suppress(BaseException), StatusWriter(run_dir, 100):
        if error:
            raise error
    assert life(run_dir, elsewhere(run_dir), time.time()) == Life("ended", cause)


def test_a_status_is_never_half_written(run_dir: Path) -> None:
    with StatusWriter(run_dir, 100) as status:
        for number in range(300):
            status.phase(f"phase {number}")
            assert read_status(run_dir)
    assert (read_status(run_dir) or {})["phase"] == "ended"
    assert not (run_dir / "status.tmp").exists()


def test_a_run_is_finished_once_its_last_checkpoint_ends_it(run_dir: Path) -> None:
    config = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(config.replace("steps: 100", "steps: 40"))
    assert overview(run_dir)["state"] == "finished"


def test_a_run_that_a_guard_stopped_says_by_which_and_why(run_dir: Path) -> None:
    lines = (run_dir / "lineage.jsonl").read_text()
    stop = {"event": "stop", "step": 40, "trigger": "guards.kl", "reason": "0.4 above 0.3", "time": 2000.0}
    (run_dir / "lineage.jsonl").write_text(lines + json.dumps(stop) + "\n")
    found = overview(run_dir)
    assert (found["state"], found["detail"]) == ("stopped", "by guards.kl after step 40: 0.4 above 0.3")


def test_the_table_has_the_figures(run_dir: Path) -> None:
    ask(run_dir, "reset")
    shown = render(overview(run_dir))
    for expected in (
        "step        40 of 100",
        "resets      3, the last 10 steps ago",
        "held-out    0.300 first, 0.300 last, 0.500 best at step 20",
        "rate        2.0 s a step",
        "requests    reset",
        "step 30  reset 3: reference := policy, optimizer cleared (reset.every_steps: 10 steps since the last)",
    ):
        assert expected in shown
    json.dumps(overview(run_dir), allow_nan=False)


def append(path: Path, *rows: dict[str, Any]) -> None:
    path.write_text(path.read_text() + "".join(json.dumps(row) + "\n" for row in rows))


def test_a_reset_counts_once_the_row_of_its_step_is_there(run_dir: Path) -> None:
    reset = {"event": "reset", "step": 41, "number": 4, "weights_of_step": 41, "optimizer": "clear", "time": 2000.0}
    append(run_dir / "lineage.jsonl", reset)
    assert "resets      3, the last 10 steps ago" in render(overview(run_dir))
    append(run_dir / "metrics.jsonl", row(41))
    shown = render(overview(run_dir))
    assert "step        41 of 100" in shown and "resets      4, the last 0 steps ago" in shown


@pytest.mark.parametrize("lasting", [True, False])
def test_the_best_is_of_no_step_that_a_rollback_left_behind(run_dir: Path, lasting: bool) -> None:
    rollback = {"event": "rollback", "step": 22, "last_good_step": 12, "to_step": 10, "draws_skipped": 3}
    if lasting:  # a branch has it from its checkpoint alone
        state = checkpoint_folder(run_dir, 40) / "state.json"
        content = json.loads(state.read_text())
        content["progress"]["events"].append(rollback)
        shutil.rmtree(state.parent)
        make_folder(state.parent, b"weights 40", json.dumps(content).encode())
    else:
        append(run_dir / "lineage.jsonl", rollback | {"trigger": "guards.kl", "reason": "high", "time": 2000.0})
    assert "held-out    0.300 first, 0.300 last, 0.400 best at step 10" in render(overview(run_dir))
    append(run_dir / "lineage.jsonl", rollback | {"step": 45, "last_good_step": 5, "time": 2001.0, "trigger": "x"})
    assert overview(run_dir)["held_out"]["best_step"] == 10, "its step died with the process"


def test_a_run_without_a_row_or_checkpoint_has_a_status(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "new", steps=0)
    write_rows(run_dir / "metrics.jsonl", [])
    assert "state   ended: prorl train begins anew" in render(overview(run_dir))


def test_a_folder_of_no_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run directory; give the run_dir"):
        overview(tmp_path)


def test_a_finished_run_says_what_would_go_on_and_takes_no_requests(run_dir: Path) -> None:
    config = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(config.replace("steps: 100", "steps: 40"))
    assert overview(run_dir)["detail"] == "step 40 of 40 is done; raise steps to go on"
    with pytest.raises(UserError, match=r"no step is left to reset after: step 40 of 40 is done; raise steps to go on"):
        ask(run_dir, "reset")
    assert not (run_dir / "requests").exists()
