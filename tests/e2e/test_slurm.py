"""slurm/*.sh under a real Slurm of four nodes: a job is warned, leaves, loses a node, begins again, and ends well."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from slurm_cluster import Cluster, cluster, missing, venv_that_leaves, venv_with
from toy_run import folders, ledger, steps, toy_config

pytestmark = [
    pytest.mark.timeout(900),  # three starts on four nodes, each with an engine: two minutes on two quiet cores
    pytest.mark.skipif(bool(missing()), reason=missing()),
]

REPOSITORY = Path(__file__).parents[2]
WAIT_SECONDS = 400.0
ENDLESS = 10**6  # steps


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, cluster(Path(folder)) as found:
        yield found


@dataclass(frozen=True, slots=True)
class Job:
    slurm: Cluster
    number: str
    out: Path
    logs: Path

    @classmethod
    def submit(cls, slurm: Cluster, folder: Path, script: str, *words: str, **variables: str) -> Job:
        """From the checkout, with one task a node and a warning two minutes before the limit."""
        out, logs = folder / "job.out", folder / "logs"
        options = ["--ntasks-per-node=1", "--gpus-per-node=1", "--time=60", "--signal=B:USR1@120", f"--output={out}"]
        variables |= {"PRORL_LOGS": str(logs), "MASTER_ADDR": "127.0.0.1", "PRORL_LEAVE_SECONDS": "60"}
        variables |= {"PRORL_VENV": variables.get("PRORL_VENV", sys.prefix), "OMP_NUM_THREADS": "1"}
        number = slurm.run(
            "sbatch", "--parsable", *options, f"slurm/{script}", *words, cwd=REPOSITORY, variables=variables
        )
        return cls(slurm, number.strip(), out, logs / number.strip())

    def state(self) -> str:
        return self.slurm.job(self.number)["JobState"]

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not condition():
            shown = self.slurm.job(self.number)
            has_ended = shown["JobState"] in ("FAILED", "TIMEOUT", "CANCELLED")
            if has_ended or time.monotonic() > deadline:
                why = "the job has ended" if has_ended else f"not within {WAIT_SECONDS:g} s"
                logs = [self.out, *sorted(self.logs.rglob("*.log")), self.slurm.folder / "slurmctld.log"]
                text = "\n".join(f"--- {path.name}\n{path.read_text()}" for path in logs if path.exists())
                pytest.fail(f"{why}: {what}\n{shown}\n{text}")
            time.sleep(0.3)


def attempts(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "attempts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@dataclass(frozen=True, slots=True)
class Ended:
    job: Job
    run_dir: Path
    saved: int  # step at which the first attempt left
    last: int  # step of the run
    shown: dict[str, str]  # of the job, at its end


@pytest.fixture(scope="module")
def ended(slurm: Cluster, toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """A run without an end on four nodes: its time limit draws near, then a node goes down, then it may finish."""
    folder = tmp_path_factory.mktemp("slurm")
    run_dir, path = folder / "run", folder / "config.yaml"
    config = toy_config(
        toy_model,
        run_dir,
        steps=ENDLESS,
        parallel={"nodes": 4, "ranks_per_node": 1, "tensor": 2},
        rollout={"engines": {"count": 4, "max_running": 16, "kv_cache_gib": 0.25}},
        validation={"every_steps": 0},
        reset={"every_steps": 0},
        checkpoint={"every_steps": ENDLESS},
    )
    path.write_text(yaml.safe_dump(config))
    job = Job.submit(slurm, folder, "prorl_4node.sh", str(path))
    job.wait_for(lambda: 2 in steps(run_dir), "two steps")
    hours, minutes, seconds = map(int, slurm.job(job.number)["RunTime"].split(":"))
    elapsed = 3600 * hours + 60 * minutes + seconds
    # Slurm looks every 30 s and warns 30 s early: 90 to 150 s before the limit, the next look warns.
    slurm.run("scontrol", "update", f"JobId={job.number}", f"TimeLimit={(elapsed + 150) // 60}")
    job.wait_for(lambda: attempts(run_dir), "the first attempt's end")
    saved = attempts(run_dir)[0]["step"]
    slurm.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")
    job.wait_for(lambda: (job.logs / "attempt-1").exists() and saved + 1 in steps(run_dir), "a step of the second")
    path.write_text(yaml.safe_dump(config | {"steps": saved + 10}))  # of the third attempt
    slurm.run("scontrol", "update", "NodeName=node4", "State=down", "Reason=test")  # until its slurmd answers again
    job.wait_for(lambda: job.state() == "COMPLETED", "the job's end")
    return Ended(job, run_dir, saved, saved + 10, slurm.job(job.number))


def test_before_its_time_limit_a_job_saves_the_last_step_and_leaves(ended: Ended) -> None:
    first = attempts(ended.run_dir)[0]
    assert (first["code"], first["restart"], first["in_vain"]) == (75, 0, 0)
    assert first["cause"].startswith(f"told to end by SIGUSR1: step {ended.saved} is saved")
    assert ended.saved >= 2


def test_it_begins_again_by_itself_and_goes_on_to_the_end(ended: Ended) -> None:
    assert (ended.shown["Restarts"], ended.shown["ExitCode"]) == ("2", "0:0")
    assert f"going on from step {ended.saved} of" in (ended.job.logs / "attempt-1" / "rank-0.log").read_text()
    found = folders(ended.run_dir, "checkpoints")
    assert (found[0], found[-1]) == (f"step-{ended.saved:06d}", f"step-{ended.last:06d}")


def test_when_a_node_goes_down_slurm_begins_the_job_again_from_what_was_saved(ended: Ended) -> None:
    """The third notes how the second ended. Its ranks may have saved more in the seconds that they had."""
    assert [(attempt["restart"], attempt["code"]) for attempt in attempts(ended.run_dir)] == [
        (0, 75),
        (1, None),
        (2, 0),
    ]
    log = (ended.job.logs / "attempt-2" / "rank-0.log").read_text()
    assert any(f"going on from step {step} of" in log for step in range(ended.saved, ended.last))


def test_no_step_and_no_problem_is_lost_or_done_twice(ended: Ended) -> None:
    found = steps(ended.run_dir)
    assert found == list(range(ended.last + 1))
    draws = [draw for step in found[1:] for draw in sorted(ledger(ended.run_dir, step))]
    assert draws == list(range(4 * ended.last))


def test_every_rank_has_a_log_and_they_are_one_run_of_tensor_and_data_parallel_ranks(ended: Ended) -> None:
    for attempt in ("attempt-0", "attempt-1", "attempt-2"):
        found = sorted(path.name for path in (ended.job.logs / attempt).iterdir())
        assert found == [f"rank-{rank}.log" for rank in range(4)]
    checkpoint = ended.run_dir / "checkpoints" / f"step-{ended.saved:06d}"
    layout = json.loads((checkpoint / "state.json").read_text())["layout"]
    assert (layout["world_size"], layout["tensor"]) == (4, 2)


def test_a_job_that_fails_three_times_at_the_same_step_stops_with_a_report(
    slurm: Cluster, toy_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(toy_config(toy_model, tmp_path / "run")))
    job = Job.submit(slurm, tmp_path, "prorl_1node.sh", str(path), PRORL_VENV=venv_with(tmp_path, "exit 1"))
    deadline = time.monotonic() + WAIT_SECONDS
    while job.state() != "FAILED":
        assert time.monotonic() < deadline, job.out.read_text()
        time.sleep(0.3)
    shown = slurm.job(job.number)
    assert (shown["Restarts"], shown["ExitCode"]) == ("2", "1:0")
    assert [(attempt["restart"], attempt["in_vain"]) for attempt in attempts(tmp_path / "run")] == [
        (0, 1),
        (1, 2),
        (2, 3),
    ]
    assert "3 attempts in a row saved nothing after step 0, so no other is made:" in job.out.read_text()


def test_a_job_that_is_preempted_leaves_and_begins_again_when_there_is_room(
    slurm: Cluster, toy_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(toy_config(toy_model, tmp_path / "run")))
    job = Job.submit(slurm, tmp_path, "prorl_1node.sh", str(path), PRORL_VENV=venv_that_leaves(tmp_path))
    job.wait_for((tmp_path / "started").exists, "the trainer")
    urgent = slurm.preempt()
    job.wait_for(lambda: job.state() == "COMPLETED", "the job's end")
    assert [(attempt["restart"], attempt["code"]) for attempt in attempts(tmp_path / "run")] == [(0, 75), (1, 0)]
    assert slurm.job(urgent)["JobState"] == "COMPLETED"
