"""What slurm/job.sh asks of Slurm; srun and scontrol are stand-ins that write down their arguments.

tests/e2e/test_slurm.py runs it under a real one, where there are no containers.
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

JOB = Path(__file__).parents[3] / "slurm" / "job.sh"
# srun ends as one whose ranks were told to end; the judgements, in a container by srun as well, are to begin (again).
SRUN = 'for word in "$@"; do printf "%s|" "$word"; done >> calls; echo >> calls; exit 75'
# Slurm's controller answers the second time. It would end the script then.
SCONTROL = """
[ "$1" = show ] && { echo gpu-7; echo gpu-8; exit; }
echo "scontrol $*" >> calls
[ "$(grep -c ^scontrol calls)" = 2 ] && kill "$PPID"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, body in {
        "srun": SRUN,
        "scontrol": SCONTROL,
        "sleep": 'echo "sleep $*" >> calls',
        ".venv/bin/python": 'echo "judge $*" >> calls; exit 75',
    }.items():
        path = tmp_path / name if "/" in name else tmp_path / "bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    return tmp_path


def run(folder: Path, *words: str, **variables: str) -> tuple[int, list[str], str]:
    """Exit code, what was called, and standard error of the script."""
    environment = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(folder)}
    environment |= {"SLURM_JOB_ID": "31", "SLURM_JOB_NODELIST": "gpu-[7-8]"}
    done = subprocess.run(
        ["bash", str(JOB), *words], env=environment | variables, capture_output=True, text=True, timeout=30
    )
    calls = folder / "calls"
    return done.returncode, calls.read_text().splitlines() if calls.exists() else [], done.stderr


def test_with_a_virtual_environment(folder: Path) -> None:
    code, calls, _ = run(folder, "config.yaml", "steps=3")
    before, ranks, judgement, *requeue = calls
    assert before == "judge -m megatron_prorl.launch.attempts begin config.yaml steps=3"
    assert ranks.startswith(
        "--kill-on-bad-exit=0|--wait=60|--cpu-bind=none|--output=slurm-logs/31/attempt-0/rank-%t.log|bash|"
    )
    assert ranks.endswith("|rank|.venv/bin/python|-m|megatron_prorl.cli|train|config.yaml|steps=3|")
    assert judgement == "judge -m megatron_prorl.launch.attempts end 75 config.yaml steps=3"
    assert requeue == ["scontrol requeue 31", "sleep 20", "scontrol requeue 31"]
    assert code == -signal.SIGTERM


def test_in_a_container_the_ranks_and_the_judgement_are_inside_of_it(folder: Path) -> None:
    variables = {"PRORL_CONTAINER": "/images/a b.sqsh", "PRORL_MOUNTS": "/data:/data", "SLURM_RESTART_COUNT": "2"}
    _, (before, ranks, judgement, *_), _ = run(folder, "config.yaml", **variables)
    inside = f"--container-image=/images/a b.sqsh|--container-mounts=/data:/data|--container-workdir={folder}|"
    assert f"--output=slurm-logs/31/attempt-2/rank-%t.log|{inside}bash|" in ranks
    assert ranks.endswith("|rank|python3|-m|megatron_prorl.cli|train|config.yaml|")
    judge = f"--nodes=1|--ntasks=1|--overlap|{inside}python3|-m|megatron_prorl.launch.attempts|"
    assert (before, judgement) == (f"{judge}begin|config.yaml|", f"{judge}end|75|config.yaml|")


def test_a_job_of_a_chain_leaves_it_to_the_next(folder: Path) -> None:
    code, calls, _ = run(folder, "config.yaml", PRORL_CHAIN="mine")
    assert (code, len(calls)) == (75, 3)


def test_a_job_that_has_nothing_to_do_starts_no_ranks(folder: Path) -> None:
    (folder / ".venv/bin/python").write_text("#!/bin/bash\nexit 3\n")
    assert run(folder, "config.yaml")[:2] == (3, [])


def test_the_file_of_a_site_comes_first(folder: Path) -> None:
    (folder / "site.sh").write_text("export PRORL_LOGS=elsewhere\n")
    _, calls, _ = run(folder, "config.yaml", PRORL_SETUP="site.sh")
    assert "--output=elsewhere/31/" in calls[1]


@pytest.mark.parametrize(
    ("words", "variables", "line"),
    [
        ([], {}, "job.sh: give a configuration\n"),
        (["config.yaml"], {"PRORL_VENV": "none"}, "job.sh: no none/bin/python: set PRORL_VENV or PRORL_CONTAINER\n"),
    ],
)
def test_what_is_missing_is_one_line(folder: Path, words: list[str], variables: dict[str, str], line: str) -> None:
    assert run(folder, *words, **variables) == (2, [], line)
