"""`prorl launch` on a real Slurm with accounting: a chain of jobs by NeMo-Run trains a run to its end, or stops."""

from __future__ import annotations

import json
import os
import re
import subprocess
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
from ssh_server import missing as ssh_missing
from ssh_server import ssh_server
from toy_run import ledger, steps, toy_config

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(missing(accounting=True)), reason=missing(accounting=True)),
]
pytest.importorskip("nemo_run", reason="NeMo-Run is not installed")

REPOSITORY = Path(__file__).parents[2]
WAIT_SECONDS = 400.0
ENDLESS = 10**6  # steps


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, cluster(Path(folder), accounting=True) as found:
        yield found


@dataclass(frozen=True, slots=True)
class Launch:
    """One configuration, and the site with which it is launched."""

    slurm: Cluster
    folder: Path

    @classmethod
    def of(
        cls, slurm: Cluster, folder: Path, config: dict[str, Any], venv: str = sys.prefix, **more: dict[str, Any]
    ) -> Launch:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        site: dict[str, Any] = {
            "account": "lab",
            "gpus_per_node": 1,
            "checkout": str(REPOSITORY),
            "venv": venv,
            "setup": "export MASTER_ADDR=127.0.0.1 OMP_NUM_THREADS=1",
            "warn_seconds": 120,
        }
        (folder / "site.yaml").write_text(yaml.safe_dump({"slurm": site | more}))
        return cls(slurm, folder)

    def prorl(self, *options: str, code: int = 0) -> str:
        command = [sys.executable, "-m", "megatron_prorl.cli", "launch", "config.yaml", *options]
        environment = os.environ | self.slurm.variables | {"NEMORUN_HOME": str(self.folder / "nemo")}
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout if code == 0 else done.stderr

    def submit(self, *options: str) -> list[str]:
        """The jobs' ids, in their order."""
        return re.findall(r"^  prorl\S* +(\d+) ", self.prorl("--time", "01:00:00", *options), re.MULTILINE)

    @property
    def experiment(self) -> Path:
        """NeMo-Run's folder of the jobs."""
        (found,) = (self.folder / "nemo" / "experiments").glob("*/*/prorl")
        return found

    def log(self, name: str, job: dict[str, str]) -> Path:
        """Of all ranks of the first attempt."""
        title = job["JobName"].removesuffix(f".{name}")
        return self.experiment / f"log-{title}.{name}_{job['JobId']}_0.out"

    def attempts(self) -> list[dict[str, Any]]:
        path = self.folder / "run" / "attempts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not condition():
            if time.monotonic() > deadline:
                logs = [*sorted(self.experiment.glob("*.out")), self.slurm.folder / "slurmctld.log"]
                text = "\n".join(f"--- {path.name}\n{path.read_text()}" for path in logs)
                pytest.fail(f"not within {WAIT_SECONDS:g} s: {what}\n{text}")
            time.sleep(0.3)

    def wait_for_end(self, jobs: list[str]) -> list[dict[str, str]]:
        ends = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED")
        self.wait_for(lambda: all(self.slurm.job(job)["JobState"] in ends for job in jobs), f"the end of {jobs}")
        return [self.slurm.job(job) for job in jobs]


@dataclass(frozen=True, slots=True)
class Ended:
    launch: Launch
    saved: int  # step with which the first job left
    jobs: list[dict[str, str]]


@pytest.fixture(scope="module")
def ended(slurm: Cluster, toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Three jobs of two nodes: the first comes near its time limit, and the run ends in the second."""
    folder = tmp_path_factory.mktemp("launch")
    config = toy_config(
        toy_model,
        folder / "run",
        steps=ENDLESS,
        parallel={"nodes": 1, "ranks_per_node": 1},
        rollout={"engines": {"count": 2, "max_running": 16, "kv_cache_gib": 0.25}},
        validation={"every_steps": 0},
        reset={"every_steps": 0},
        checkpoint={"every_steps": ENDLESS},
    )
    launch = Launch.of(slurm, folder, config)
    first, *others = launch.submit("--nodes", "2", "--jobs", "3")
    launch.wait_for(lambda: 2 in steps(folder / "run"), "two steps")
    hours, minutes, seconds = map(int, slurm.job(first)["RunTime"].split(":"))
    elapsed = 3600 * hours + 60 * minutes + seconds
    # Slurm looks every 30 s and warns 30 s early: 90 to 150 s before the limit, the next look warns.
    slurm.run("scontrol", "update", f"JobId={first}", f"TimeLimit={(elapsed + 150) // 60}")
    launch.wait_for(launch.attempts, "the first job's end")
    saved = launch.attempts()[0]["step"]
    path = launch.experiment / "configs" / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"steps": saved + 5}))
    return Ended(launch, saved, launch.wait_for_end([first, *others]))


def test_before_its_time_limit_a_job_saves_the_last_step_and_the_next_of_the_chain_goes_on(ended: Ended) -> None:
    attempts = ended.launch.attempts()
    first, second = attempts
    assert ended.saved >= 2
    assert (first["code"], first["step"], first["in_vain"]) == (75, ended.saved, 0)
    assert first["cause"].startswith(f"told to end by SIGUSR1: step {ended.saved} is saved")
    assert (second["code"], second["step"]) == (0, ended.saved + 5)
    assert [attempt["job"] for attempt in attempts] == [job["JobId"] for job in ended.jobs[:2]]
    assert f"going on from step {ended.saved} of" in ended.launch.log("prorl_1", ended.jobs[1]).read_text()


def test_no_step_and_no_problem_is_lost_or_done_twice(ended: Ended) -> None:
    run_dir, last = ended.launch.folder / "run", ended.saved + 5
    assert steps(run_dir) == list(range(last + 1))
    draws = [draw for step in range(1, last + 1) for draw in sorted(ledger(run_dir, step))]
    assert draws == list(range(4 * last))


def test_a_job_of_the_chain_that_finds_the_run_finished_ends_at_once(ended: Ended) -> None:
    assert [job["ExitCode"] for job in ended.jobs] == ["75:0", "0:0", "0:0"]
    minutes, seconds = map(int, ended.jobs[2]["RunTime"].split(":")[1:])
    assert 60 * minutes + seconds < 30
    assert not ended.launch.log("prorl_2", ended.jobs[2]).exists()  # no rank was started


def test_status_and_logs_are_those_of_the_chain(ended: Ended) -> None:
    found = ended.launch.prorl("--status")
    states = re.findall(r"^  (prorl\S*) +\d+ +(\w+)$", found, re.MULTILINE)
    assert states == [("prorl", "FAILED"), ("prorl_1", "SUCCEEDED"), ("prorl_2", "SUCCEEDED")]
    assert f'"step": {ended.saved + 5}' in found
    assert "has ended this chain with exit code 0" in ended.launch.prorl("--logs")


def test_a_chain_that_fails_three_times_at_the_same_step_stops_with_a_report(
    slurm: Cluster, toy_model: Path, tmp_path: Path
) -> None:
    launch = Launch.of(slurm, tmp_path, toy_config(toy_model, tmp_path / "run"), venv_with(tmp_path, "exit 1"))
    ended = launch.wait_for_end(launch.submit("--jobs", "5"))
    assert [job["ExitCode"] for job in ended] == ["75:0", "75:0", "1:0", "1:0", "1:0"]
    assert [attempt["in_vain"] for attempt in launch.attempts()] == [1, 2, 3]
    logs = [path.read_text() for path in sorted(launch.experiment.glob("sbatch_*.out"))]
    reports = ["3 attempts in a row saved nothing after step 0, so no other is made:" in text for text in logs]
    assert sorted(reports) == [False, False, False, False, True]


def test_what_slurm_refuses_is_one_line_and_leaves_no_job(slurm: Cluster, toy_model: Path, tmp_path: Path) -> None:
    launch = Launch.of(slurm, tmp_path, toy_config(toy_model, tmp_path / "run"))
    line = launch.prorl("--jobs", "2", "--time", "soon", code=2)
    assert line == "error: slurm refused: sbatch: error: Invalid --time specification\n"
    assert slurm.run("squeue", "-h") == ""


def test_a_single_job_begins_again_by_itself(slurm: Cluster, toy_model: Path, tmp_path: Path) -> None:
    """After a trainer that fails, and with one that finishes the next time."""
    failed = tmp_path / "failed"
    venv = venv_with(tmp_path, f"[ -e {failed} ] && exit 0; touch {failed}; exit 1")
    launch = Launch.of(slurm, tmp_path, toy_config(toy_model, tmp_path / "run"), venv)
    (job,) = launch.submit()
    launch.wait_for(lambda: slurm.job(job)["JobState"] == "COMPLETED", "the job's end")
    assert slurm.job(job)["Restarts"] == "1"
    assert [(attempt["restart"], attempt["code"]) for attempt in launch.attempts()] == [(0, 1), (1, 0)]


def test_a_job_that_is_preempted_leaves_and_the_run_goes_on(slurm: Cluster, toy_model: Path, tmp_path: Path) -> None:
    launch = Launch.of(slurm, tmp_path, toy_config(toy_model, tmp_path / "run"), venv_that_leaves(tmp_path))
    jobs = launch.submit("--jobs", "2")
    launch.wait_for((tmp_path / "started").exists, "the trainer")
    slurm.preempt()
    launch.wait_for_end(jobs)
    assert [attempt["code"] for attempt in launch.attempts()] == [75, 0]


@pytest.mark.skipif(bool(ssh_missing()), reason=ssh_missing())
def test_over_ssh_scripts_go_there_and_status_and_logs_come_back(
    slurm: Cluster, toy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is launched from has no way to Slurm but this."""
    there = tmp_path / "there"
    with ssh_server(tmp_path, slurm.variables) as server:
        monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
        tunnel = server | {"kind": "ssh", "job_dir": str(there)}
        config = toy_config(toy_model, tmp_path / "run")
        launch = Launch.of(slurm, tmp_path, config, venv_with(tmp_path, "exit 1"), tunnel=tunnel)
        no_slurm = Launch(Cluster(tmp_path), tmp_path)
        jobs = no_slurm.submit("--jobs", "4")
        ended = launch.wait_for_end(jobs)
        assert [job["ExitCode"] for job in ended] == ["75:0", "75:0", "1:0", "1:0"]
        assert "job 3 has ended this chain with exit code 1" in no_slurm.prorl("--logs").replace(jobs[2], "3")
        assert no_slurm.prorl("--status").count("FAILED") == 4
        assert len(list(there.glob("*/*/prorl/sbatch_*.out"))) == 4
