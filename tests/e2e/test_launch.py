"""`prorl launch` on this machine, without Slurm, and its task in an experiment of NeMo-Run's own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from toy_run import steps, toy_config

pytest.importorskip("nemo_run", reason="NeMo-Run is not installed")

# What a user's own script may be.
SCRIPT = """
import sys
import nemo_run
from megatron_prorl.launch import prorl_task

if __name__ == "__main__":
    task = prorl_task("config.yaml")
    task.overrides.append("steps=3")
    nemo_run.run(task, executor=nemo_run.LocalExecutor(), name="mine")
"""


@pytest.fixture(scope="module")
def folder(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the configuration of two steps."""
    found = tmp_path_factory.mktemp("launch")
    engines = {"max_running": 16, "kv_cache_gib": 0.25}
    config = toy_config(toy_model, found / "run", steps=2, rollout={"engines": engines}, validation={"every_steps": 0})
    (found / "config.yaml").write_text(yaml.safe_dump(config))
    (found / "script.py").write_text(SCRIPT)
    return found


def call(folder: Path, *words: str, code: int = 0) -> str:
    """What Python prints there."""
    environment = os.environ | {"NEMORUN_HOME": str(folder / "nemo"), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{sys.prefix}/bin:{environment['PATH']}"  # NeMo-Run starts `python`
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


LAUNCH = ("-m", "megatron_prorl.cli", "launch", "config.yaml", "--executor", "local")


def test_the_jobs_follow_each_other_and_after_the_runs_end_do_nothing(folder: Path) -> None:
    printed = call(folder, *LAUNCH, "--jobs", "2")
    assert re.findall(r"^  (prorl\S*) +\S+ +(\w+)$", printed, re.MULTILINE) == [
        ("prorl", "SUCCEEDED"),
        ("prorl_1", "SUCCEEDED"),
    ]
    assert printed.count('"code": 0') == 1
    assert steps(folder / "run") == [0, 1, 2]
    assert "has ended this chain with exit code 0" in call(folder, *LAUNCH, "--logs")


def test_the_task_runs_by_nemo_run_alone(folder: Path) -> None:
    """It goes on with the run of the test before."""
    call(folder, "script.py")
    assert steps(folder / "run") == [0, 1, 2, 3]


def test_the_exit_code_is_that_of_the_run(folder: Path) -> None:
    """A mistake that only the run finds: it began with another seed."""
    call(folder, *LAUNCH, "seed=4", code=2)
