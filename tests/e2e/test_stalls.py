"""A run that hangs says in what, leaves the stacks of its ranks, and ends whole with a code to begin again."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
from toy_run import Start, folders, run_to_its_end, steps, toy_config

from megatron_prorl.tracking.status import read_status

pytestmark = pytest.mark.timeout(900)

STALLED = 76
LIMIT = {"stall_seconds": 30.0}
ENGINES = {"max_running": 32, "kv_cache_gib": 0.25, "request_timeout_seconds": 5.0}


def config(model: Path, run_dir: Path, **sections: Any) -> dict[str, Any]:
    found = toy_config(
        model,
        run_dir,
        validation={"every_steps": 0},
        reset={"every_steps": 0},
        checkpoint={"every_steps": 1},
        **sections,
    )
    found["rollout"] |= {"engines": ENGINES | sections.get("rollout", {}).get("engines", {})}
    return found | LIMIT


def stalls(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "stalls").iterdir())


def cause(run_dir: Path) -> str:
    """Why the run ended, as a job and `prorl status` tell."""
    return (read_status(run_dir) or {})["end"]


def test_a_rank_that_is_stopped_in_an_update_is_named_and_the_same_command_goes_on(
    toy_model: Path, tmp_path: Path
) -> None:
    two = {"nodes": 2, "ranks_per_node": 1, "tensor": 2}
    split = config(toy_model, tmp_path, parallel=two, rollout={"engines": {"count": 2}})
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    group = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with (  # as srun starts them: nobody ends one of them for the other
        Start(split, variables=group | {"RANK": "0"}) as first,
        Start(split, variables=group | {"RANK": "1"}, faults=("update:3=stopped",)) as second,
    ):
        ended = first.ended()
        stopped = second.process.pid
        os.kill(stopped, signal.SIGKILL)  # as srun does when the others have left
        second.wait()
        assert second.ended().left_running == []
    assert (ended.code, ended.left_running, ended.left_in_tmp) == (STALLED, [], [])
    assert ended.err.startswith(
        f"error: stalled: nothing has moved for 0:30: rank 1 (process {stopped} on {socket.gethostname()}) is stopped "
        "by a signal, last seen in "  # its last heartbeat may be from before the update
    )
    assert "; rank 0 waits for it in " in ended.err and ended.err.count("\n") == 1
    (folder,) = stalls(tmp_path)
    assert sorted(os.listdir(folder)) == ["cause.txt", "rank-00000.json", "rank-00000.txt"]
    assert " in learn" in (folder / "rank-00000.txt").read_text()
    assert folders(tmp_path, "checkpoints") == ["step-000001", "step-000002"]
    assert f"error: {cause(tmp_path)}\n" == ended.err

    one = config(toy_model, tmp_path, parallel={"ranks_per_node": 2, "tensor": 2})
    with Start(one) as start:
        start.wait_for(lambda: 4 in steps(tmp_path), "two steps more")
        (rank,) = start.pids("megatron_prorl.cli", RANK="0")  # with the engine
        os.kill(rank, signal.SIGSTOP)  # wherever it is
        ended = start.ended()
    assert (ended.code, ended.left_running) == (STALLED, [])  # the launcher has killed it
    assert f"rank 0 (process {rank} on {socket.gethostname()}) is stopped by a signal" in ended.err
    assert ended.err.count("\n") == 1
    assert len(stalls(tmp_path)) == 2
    assert f"error: {cause(tmp_path)}\n" == ended.err

    ended = run_to_its_end(one)
    assert (ended.code, ended.err) == (0, "")
    assert steps(tmp_path) == list(range(7))


def test_an_engine_and_a_verifier_that_hang_are_replaced_and_no_stall_is_called(
    toy_model: Path, tmp_path: Path
) -> None:
    ended = run_to_its_end(
        config(toy_model, tmp_path), faults=("patience=5", "request:6=frozen", "verdict:14=frozen-verifier")
    )
    assert ended.code == 0, ended.err
    assert "engine 0 is back" in ended.out
    assert not (tmp_path / "stalls").exists()
    assert steps(tmp_path) == list(range(7))


def test_verifiers_that_hang_beyond_their_own_limit_are_named(toy_model: Path, tmp_path: Path) -> None:
    ended = run_to_its_end(config(toy_model, tmp_path), faults=("judge:9=hangs",))
    assert (ended.code, ended.left_running, ended.left_in_tmp) == (STALLED, [], [])
    assert f"0:30: the verifiers of {socket.gethostname()} have not judged 8 responses to gcd" in ended.err
    assert "in collect, group " in ended.err
    (folder,) = stalls(tmp_path)
    assert " in strike\n" in (folder / "rank-00000.txt").read_text()
