"""A run's plan and its guards: what stages change, what resets and rolls back, what a kill in between leaves of it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from toy_run import Ended, Start, folders, ledger, progress, rows, run_to_its_end, same, steps, toy_config, weights

from megatron_prorl.tracking.lineage import read_lineage

pytestmark = pytest.mark.timeout(600)

GCD = {"task": "gcd", "params": {"min_value": 2, "max_value": 20}}


def events(run_dir: Path) -> list[tuple[str, int]]:
    return [(event["event"], event["step"]) for event in read_lineage(run_dir)]


@pytest.fixture(scope="module")
def plan(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Six steps in three stages, with a reset by hand in the first; killed in the second."""
    run_dir = tmp_path_factory.mktemp("plan")
    config = toy_config(
        toy_model,
        run_dir,
        data={"tasks": [GCD, GCD | {"task": "lcm"}], "validation_problems": 4},
        reset={"every_steps": 0},
        stages=[
            {"name": "gcd alone", "steps": 2, "options": {"data.tasks.1.weight": 0}},
            {
                "name": "lcm alone, fewer rollouts",
                "steps": 2,
                "reset": "clear",
                "options": {
                    "data.tasks.0.weight": 0.0,
                    "rollout.rollouts_per_prompt": 4,
                    "optimizer.learning_rate": 0.1,
                },
            },
            {"name": "both"},
        ],
    )
    (run_dir / "requests").mkdir()
    (run_dir / "requests" / "reset").write_text("first")
    with Start(config) as start:
        start.wait_for(lambda: 3 in steps(run_dir), "the first step of the second stage")
        os.kill(start.process.pid, signal.SIGKILL)
        start.ended()
    return run_to_its_end(config)


def test_a_plan_runs_to_its_end_through_a_kill(plan: Ended) -> None:
    assert (plan.code, plan.err, plan.left_running) == (0, "", [])
    assert steps(plan.run_dir) == list(range(7))
    assert [row.get("stage") for row in rows(plan.run_dir)] == [0, 0, 1, 1, 2, 2, 2], "that which begins, at an end"


def test_each_stage_has_its_options(plan: Ended) -> None:
    for step in range(1, 7):
        table = pq.read_table(plan.run_dir / "rollouts" / f"step-{step:06d}.parquet", columns=["draw", "task"])
        wanted = {1: {"gcd"}, 2: {"gcd"}, 3: {"lcm"}, 4: {"lcm"}, 5: {"gcd", "lcm"}, 6: {"gcd", "lcm"}}[step]
        assert set(table["task"].to_pylist()) == wanted
        assert len(table) == 4 * (4 if step in (3, 4) else 8)
    rates = [row["policy/learning_rate"] for row in rows(plan.run_dir)[1:]]
    assert rates == [3e-4, 3e-4, 0.1, 0.1, 3e-4, 3e-4]


def test_stages_draw_on_where_the_one_before_ended(plan: Ended) -> None:
    assert [draw for step in range(1, 7) for draw in ledger(plan.run_dir, step)] == list(range(24))
    end = progress(plan.run_dir, 6)
    assert (end["stage"], end["stage_start_step"], end["stage_start_draw"]) == (2, 4, 16)
    assert end["source_counts"] == [8, 8]


def test_the_lineage_tells_what_happened_and_why(plan: Ended) -> None:
    expected = [("start", 0), ("reset", 1), ("advance", 2), ("resume", 2), ("advance", 4), ("resume", 4)]
    assert [event for event in events(plan.run_dir) if event != ("resume", 2)] == [
        event for event in expected if event != ("resume", 2)
    ]
    found = {(event["event"], event["step"]): event for event in read_lineage(plan.run_dir)}
    assert (
        found["reset", 1]["trigger"] == "by hand"
        and found["reset", 1]["request"] == "first"
        and found["reset", 1]["reference"] == "reset-001"
    )
    assert found["advance", 2]["reference"] == "reset-002", "the second stage begins with a reset"
    assert "reference" not in found["advance", 4]
    assert list((plan.run_dir / "requests").iterdir()) == []
    assert folders(plan.run_dir, "references") == ["reset-000", "reset-001", "reset-002"]


def test_a_run_that_is_finished_starts_nothing_again(plan: Ended) -> None:
    again = run_to_its_end(plan.config)
    assert (again.code, again.err) == (0, "")
    assert again.out.splitlines()[-1].endswith("the run is finished: step 6 of 6 is done; raise steps to go on")
    assert "vLLM" not in again.out and steps(plan.run_dir) == list(range(7))


@pytest.fixture(scope="module")
def guarded(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Entropy is above this in every step: back to the start after step 2, and then no more."""
    config = toy_config(
        toy_model,
        tmp_path_factory.mktemp("guarded"),
        reset={"every_steps": 0},
        guards={"entropy": {"high": 0.0, "steps": 2, "action": "rollback"}, "max_rollbacks": 1},
        checkpoint={"every_steps": 1, "keep": 1},
        validation={"every_steps": 0},
    )
    return run_to_its_end(config)


def test_a_guard_that_rollbacks_do_not_help_stops_the_run_with_its_reason(guarded: Ended) -> None:
    assert guarded.code == 3 and len(guarded.err.splitlines()) == 1
    assert guarded.err.startswith("error: stopped after step 4: guards.entropy: policy/entropy ")
    assert guarded.err.endswith(" after 2 steps above 0; 1 rollbacks in a row did not help\n")
    assert events(guarded.run_dir) == [("start", 0), ("rollback", 2), ("stop", 4)]


def test_a_rollback_brings_the_last_good_weights_back_and_skips_the_problems_since(guarded: Ended) -> None:
    start = weights(guarded.run_dir / "references" / "reset-000")
    assert same(start, tensors_of(guarded.run_dir, 2)) and not same(start, tensors_of(guarded.run_dir, 4))
    assert [draw for step in range(1, 5) for draw in ledger(guarded.run_dir, step)] == list(range(16))
    (event,) = [event for event in read_lineage(guarded.run_dir) if event["event"] == "rollback"]
    assert (event["to_step"], event["draws_skipped"]) == (0, 8)


def test_rollouts_after_a_rollback_are_of_the_weights_it_brought_back(guarded: Ended) -> None:
    assert [row["mismatch/logprob_diff_max"] < 1e-4 for row in rows(guarded.run_dir)[1:]] == [True] * 4
    assert rows(guarded.run_dir)[3]["policy/kl_reference"] == 0.0


def test_checkpoints_that_a_rollback_may_need_are_kept_beside_the_newest(guarded: Ended) -> None:
    assert folders(guarded.run_dir, "checkpoints") == [f"step-{step:06d}" for step in (0, 2, 3, 4)]


def tensors_of(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return weights(run_dir / "checkpoints" / f"step-{step:06d}")


def test_a_reset_to_the_best_checkpoint(toy_model: Path, tmp_path: Path) -> None:
    """Such a learning rate leaves nothing of the model, so no later step is better than the first."""
    sections: dict[str, Any] = {
        "steps": 3,
        "optimizer": {"learning_rate": 0.5},
        "reset": {
            "every_steps": 0,
            "plateau": {"patience": 2, "min_delta": 1.0},
            "target": "best",
            "optimizer": "keep",
        },
        "validation": {"every_steps": 1, "samples": 1},
        "checkpoint": {"every_steps": 100, "keep": 1},
    }
    ended = run_to_its_end(toy_config(toy_model, tmp_path, **sections))
    assert (ended.code, ended.err) == (0, "")
    (event,) = [event for event in read_lineage(tmp_path) if event["event"] == "reset"]
    assert (event["step"], event["weights_of_step"], event["trigger"]) == (2, 1, "reset.plateau")
    assert folders(tmp_path, "checkpoints") == ["step-000001", "step-000002", "step-000003"], "best, reset, last"
    reference = weights(tmp_path / "references" / "reset-001")
    assert same(tensors_of(tmp_path, 1), tensors_of(tmp_path, 2)) and same(tensors_of(tmp_path, 2), reference)
    assert rows(tmp_path)[3]["policy/kl_reference"] == 0.0
    assert rows(tmp_path)[3]["mismatch/logprob_diff_max"] < 1e-3, "the engine has the best checkpoint's weights"
