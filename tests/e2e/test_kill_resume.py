"""`kill -9` of any process at any time, start again: the run goes on from its last checkpoint as if never stopped."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
from toy_run import (
    Ended,
    Start,
    folders,
    ledger,
    moments,
    progress,
    rows,
    run_to_its_end,
    same,
    steps,
    toy_config,
    weights,
)

from megatron_prorl.config.schema import Config
from megatron_prorl.data.problems import TrainProblems

pytestmark = pytest.mark.timeout(900)  # several starts of 15 s each on a quiet machine

STEPS = range(1, 7)


@dataclass(frozen=True, slots=True)
class Stop:
    """How a start ended, and the run directory as it then was."""

    ended: Ended
    steps: list[int]
    checkpoints: list[str]
    references: list[str]

    @classmethod
    def of(cls, ended: Ended) -> Stop:
        found = [folders(ended.run_dir, kind) for kind in ("checkpoints", "references")]
        return cls(ended, steps(ended.run_dir), *found)


@pytest.fixture(scope="module")
def stops(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Stop]:
    """The run of `whole_run`, killed in a sync, in a save, after a step; its engine, too, which it has to survive."""
    config = toy_config(toy_model, tmp_path_factory.mktemp("killed"))
    found = [
        Stop.of(run_to_its_end(config, faults=faults))
        for faults in (
            ("sync:3=trainer",),  # weights go out before the first step and after every one: after step 2
            ("commit:4=trainer",),  # reset-000, step-000002, reset-001: the checkpoint of the reset after step 3
        )
    ]
    # The server dies with requests under way in step 3 (its third of four), its core in the sync of step 4: the pushes
    # are that of the start, one to the new server, those of steps 3 and 4.
    with Start(config, faults=("request:3=engine", "sync:4=core")) as start:
        start.wait_for(lambda: 5 in steps(start.run_dir), "five steps")
        os.kill(start.process.pid, signal.SIGKILL)
        found.append(Stop.of(start.ended()))
    return [*found, Stop.of(run_to_its_end(config))]


def test_a_kill_in_a_sync_before_the_first_checkpoint_leaves_nothing_half_done(stops: list[Stop]) -> None:
    stop = stops[0]
    assert stop.ended.code == -signal.SIGKILL
    assert (stop.steps, stop.checkpoints, stop.references) == ([0, 1], [], ["reset-000"])


def test_a_kill_in_a_save_leaves_the_checkpoint_before_it(stops: list[Stop]) -> None:
    stop = stops[1]
    assert stop.ended.code == -signal.SIGKILL
    assert stop.steps == [0, 1, 2, 3]
    assert stop.checkpoints == [".tmp-step-000003", "step-000002"]
    assert stop.references == ["reset-000", "reset-001"]  # the second belongs to no checkpoint yet


def test_a_run_survives_the_end_of_its_engine_in_a_collection_and_in_a_sync(stops: list[Stop]) -> None:
    stop = stops[2]
    assert stop.steps == [0, 1, 2, 3, 4, 5]
    assert stop.checkpoints == ["step-000002", "step-000003", "step-000004"]
    assert stop.ended.out.count("engine 0 is back") == 1
    restarts, retries = ([row.get(key, 0) for row in rows_of(stop)] for key in RESTARTS_AND_RETRIES)
    assert restarts[4] == 1 and sum(restarts) == 1
    assert retries[3] >= 1 and sum(retries) == retries[3]


RESTARTS_AND_RETRIES = ("sync/engine_restarts", "rollout/retries")


def rows_of(stop: Stop) -> list[dict[str, float]]:
    return rows(stop.ended.run_dir)[: len(stop.steps)]


def test_every_start_ends_as_it_was_made_to_and_leaves_no_process(stops: list[Stop]) -> None:
    assert [stop.ended.code for stop in stops] == [-signal.SIGKILL] * 3 + [0]
    assert [stop.ended.left_running for stop in stops] == [[]] * 4


def test_the_end_of_a_run_that_was_killed_leaves_nothing_in_shared_memory(stops: list[Stop]) -> None:
    there = set(os.listdir("/dev/shm"))
    assert stops[-1].ended.left_in_memory == set()
    assert not there & set.union(*(stop.ended.left_in_memory for stop in stops))


def test_six_steps_with_kills_ask_what_six_steps_without_do(stops: list[Stop], whole_run: Ended) -> None:
    run_dir = stops[-1].ended.run_dir
    assert [ledger(run_dir, step) for step in STEPS] == [ledger(whole_run.run_dir, step) for step in STEPS]


def test_every_step_is_told_once(stops: list[Stop]) -> None:
    run_dir = stops[-1].ended.run_dir
    assert steps(run_dir) == [0, *STEPS]
    assert [row["reset/count"] for row in rows(run_dir)] == [0, 0, 0, 1, 1, 1, 2]
    assert len(list((run_dir / "rollouts").iterdir())) == 6


def test_nothing_unfinished_remains(stops: list[Stop]) -> None:
    assert stops[-1].checkpoints == [f"step-{step:06d}" for step in (2, 3, 4, 6)]
    assert stops[-1].references == ["reset-000", "reset-001", "reset-002"]


def test_a_reset_that_was_interrupted_is_made_again_as_a_whole(stops: list[Stop]) -> None:
    """The reference of the first attempt is replaced: both it and the checkpoint are of the second."""
    run_dir = stops[-1].ended.run_dir
    for step, reference in ((3, "reset-001"), (6, "reset-002")):
        checkpoint = run_dir / "checkpoints" / f"step-{step:06d}"
        assert progress(run_dir, step)["reference"] == reference
        assert same(weights(run_dir / "references" / reference), weights(checkpoint))


def test_a_reset_clears_the_optimizer_across_a_kill(stops: list[Stop]) -> None:
    run_dir = stops[-1].ended.run_dir
    for step, updates in ((2, 2), (3, 0), (4, 1), (6, 0)):
        cleared = [not moment.any() for moment in moments(run_dir / "checkpoints" / f"step-{step:06d}")]
        assert cleared and (all(cleared) if updates == 0 else not any(cleared))
        assert progress(run_dir, step)["optimizer_updates"] == updates


def test_the_divergence_from_the_reference_begins_at_0_again_though_another_process_goes_on(stops: list[Stop]) -> None:
    divergences = [row["policy/kl_reference"] for row in rows(stops[-1].ended.run_dir)[1:]]
    assert divergences[0] == divergences[3] == 0.0
    assert all(divergences[i] > 1e-6 for i in (1, 2, 4, 5))


@pytest.fixture(scope="module")
def two_ranks(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Stop]:
    """Five steps on two tensor-parallel ranks with dynamic sampling; a rank is killed, then the launcher."""
    config = toy_config(
        toy_model,
        tmp_path_factory.mktemp("ranks"),
        steps=5,
        parallel={"ranks_per_node": 2, "tensor": 2, "sequence": True},
        rollout={"dynamic_sampling": True, "rollouts_per_prompt": 4},
        optimizer={"updates_per_step": 2},
        reset={"every_steps": 2},
        checkpoint={"every_steps": 1},
    )
    found = []
    with Start(config) as start:
        start.wait_for(lambda: 2 in steps(start.run_dir), "two steps")
        (rank,) = start.pids(RANK="1")
        os.kill(rank, signal.SIGKILL)
        found.append(Stop.of(start.ended()))
    with Start(config) as start:
        start.wait_for(lambda: 4 in steps(start.run_dir), "four steps")
        os.kill(start.process.pid, signal.SIGKILL)
        found.append(Stop.of(start.ended()))
    return [*found, Stop.of(run_to_its_end(config))]


def test_a_killed_rank_ends_the_run_with_one_line(two_ranks: list[Stop]) -> None:
    ended = two_ranks[0].ended
    assert ended.code == 128 + signal.SIGKILL
    assert ended.err == "error: rank 1 was ended by SIGKILL; all ranks were stopped\n"


def test_ranks_and_engines_end_with_the_launcher_and_with_each_other(two_ranks: list[Stop]) -> None:
    assert [stop.ended.left_running for stop in two_ranks] == [[]] * 3
    assert (two_ranks[2].ended.code, two_ranks[2].ended.err) == (0, "")


def test_with_dynamic_sampling_no_problem_is_lost_or_asked_twice(two_ranks: list[Stop]) -> None:
    ended = two_ranks[-1].ended
    cfg = Config.model_validate(ended.config)
    assert steps(ended.run_dir) == list(range(6))
    asked = [ledger(ended.run_dir, step) for step in range(1, 6)]
    draws = [draw for step in asked for draw in sorted(step)]
    assert draws == list(range(len(draws)))
    assert [progress(ended.run_dir, step)["next_draw"] for step in range(1, 6)] == [max(step) + 1 for step in asked]
    with TrainProblems(cfg.data, cfg.seed) as problems:
        assert [problem for step in asked for _, problem in sorted(step.items())] == [
            problems.problem(draw).id for draw in draws
        ]


def test_dynamic_sampling_had_something_to_drop(two_ranks: list[Stop]) -> None:
    """Else the law above says nothing."""
    drawn = [row["rollout/groups_drawn"] for row in rows(two_ranks[-1].ended.run_dir)[1:]]
    assert sum(drawn) > 4 * 5
