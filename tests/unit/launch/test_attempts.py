"""What a job does after an attempt follows from its exit code and from whether anything new was saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_prorl.checkpoint import folders
from megatron_prorl.launch.attempts import ATTEMPTS_FILE, begin, judge


def save(run_dir: Path, step: int) -> None:
    """A committed checkpoint without tensors."""
    folder = folders.checkpoint_folder(run_dir, step)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folders.begin(folder, 0)
    (temporary / folders.STATE).write_text(json.dumps({"progress": {"step": step}}))
    folders.commit(folder)


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "PRORL_CHAIN"):
        monkeypatch.delenv(name, raising=False)


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / ATTEMPTS_FILE).read_text().splitlines()]


def verdicts(run_dir: Path, *codes: int) -> list[int]:
    return [judge(run_dir, code)[0] for code in codes]


@pytest.mark.parametrize("code", [0, 2, 3])
def test_what_another_attempt_would_not_change_ends_the_job(tmp_path: Path, code: int) -> None:
    assert verdicts(tmp_path, code) == [code]


@pytest.mark.parametrize("code", [75, 76, 1, 137, 139])
def test_everything_else_begins_again_and_the_third_time_in_vain_ends_the_job(tmp_path: Path, code: int) -> None:
    assert verdicts(tmp_path, code, code, code) == [75, 75, 1 if code == 75 else code]


def test_a_new_checkpoint_begins_the_count_anew(tmp_path: Path) -> None:
    assert verdicts(tmp_path, 1, 1) == [75, 75]
    save(tmp_path, 7)
    assert verdicts(tmp_path, 1, 1, 1, 1) == [75, 75, 75, 1]


def test_a_long_run_that_is_told_to_end_again_and_again_goes_on(tmp_path: Path) -> None:
    for step in range(1, 20):
        save(tmp_path, step)
        assert verdicts(tmp_path, 75) == [75]


def test_a_job_that_is_submitted_again_after_a_stop_has_three_attempts(tmp_path: Path) -> None:
    assert verdicts(tmp_path, 1, 1, 1) == [75, 75, 1]
    assert verdicts(tmp_path, 1, 1, 1) == [75, 75, 1]


def test_the_report_names_the_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    save(tmp_path, 50)
    for restart, code in enumerate((1, 137, 75, 139)):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        _, text = judge(tmp_path, code)
    lines = text.splitlines()
    assert lines[0] == "3 attempts in a row saved nothing after step 50, so no other is made:"
    assert [line.partition("  job ")[2] for line in lines[1:-1]] == [
        f"4711, restart {restart}: exit code {code}, no cause was told"
        for restart, code in ((1, 137), (2, 75), (3, 139))
    ]
    assert [(row["code"], row["step"], row["in_vain"]) for row in rows(tmp_path)] == [
        (1, 50, 0),
        (137, 50, 1),
        (75, 50, 2),
        (139, 50, 3),
    ]


def test_an_attempt_whose_end_nobody_saw_is_noted_by_the_next_and_counts(tmp_path: Path) -> None:
    found = [begin(tmp_path) for _ in range(4)]
    assert [verdict for verdict, _ in found] == [75, 75, 75, 1]
    text = found[-1][1]
    assert text.startswith("3 attempts in a row saved nothing after step 0, so no other is made:")
    assert text.count("ended by Slurm or with its node, no cause was told") == 3
    assert [row["in_vain"] for row in rows(tmp_path)] == [1, 2, 3]


def test_an_attempt_that_ended_by_itself_is_noted_once(tmp_path: Path) -> None:
    for _ in range(2):
        assert begin(tmp_path) == (75, "")
        assert judge(tmp_path, 1)[0] == 75
    assert [row["code"] for row in rows(tmp_path)] == [1, 1]


def in_job(monkeypatch: pytest.MonkeyPatch, job: int, chain: str = "", restart: int = 0) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", str(job))
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
    monkeypatch.setenv("PRORL_CHAIN", chain)


@pytest.mark.parametrize(
    ("codes", "last"), [((0,), 0), ((2,), 2), ((3,), 3), ((139, 139, 139), 139), ((75, 75, 75), 1)]
)
def test_once_a_chain_has_ended_its_other_jobs_end_at_once_and_another_chain_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codes: tuple[int, ...], last: int
) -> None:
    for job, code in enumerate(codes):
        in_job(monkeypatch, job, "prorl_1")
        assert begin(tmp_path)[0] == 75
        judge(tmp_path, code)
    before = len(rows(tmp_path))
    in_job(monkeypatch, 100, "prorl_1")
    verdict, text = begin(tmp_path)
    assert (verdict, len(rows(tmp_path))) == (last, before)
    assert text == f"job {len(codes) - 1} has ended this chain with exit code {last}"
    in_job(monkeypatch, 101, "prorl_2")
    assert begin(tmp_path)[0] == 75


def test_jobs_of_a_chain_count_together_and_other_jobs_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for job in range(2):
        in_job(monkeypatch, job, "prorl_1")
        judge(tmp_path, 1)
    in_job(monkeypatch, 2)
    assert judge(tmp_path, 1)[0] == 75
    assert [row["in_vain"] for row in rows(tmp_path)] == [1, 2, 1]


def test_a_job_that_somebody_requeues_after_its_end_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_job(monkeypatch, 7, "prorl_1")
    judge(tmp_path, 2)
    in_job(monkeypatch, 7, "prorl_1", restart=1)
    assert begin(tmp_path)[0] == 75
