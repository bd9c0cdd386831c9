"""What a stall is called follows from the ranks' heartbeats; a rank that moves is never part of one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_prorl import heartbeat, stalls
from megatron_prorl.config.checks import config_problems
from megatron_prorl.heartbeat import Wait
from megatron_prorl.stalls import Engine, Heartbeat, Rank, Stalled, Watch, name_stall, read_ranks, where
from tests.unit.rollout.test_engine_args import make_config

BROADCAST = {"place": "broadcast_object_list (run.py, collect)", "collective": "broadcast_object_list"}
REDUCE = {"place": "all_reduce (policy/update.py, _run_schedule)", "collective": "all_reduce"}


def rank(number: int, /, silent: str = "", **changes: object) -> Rank:
    beat = Heartbeat(
        attempt="20261121-123456",
        rank=number,
        host=f"node-{number // 2}",
        machine="m",
        pid=4000 + number,
        process_start=1,
        number=7,
        still_seconds=1900.0,
        phase="update",
        doing="microbatch 3 of 12",
        waits=(),
        place="policy/update.py, _forward",
        collective="",
    )
    return Rank(beat=replace(beat, **changes), silent=silent)  # type: ignore[arg-type]


def test_a_rank_that_is_silent_is_named_before_all_that_wait_for_it() -> None:
    ranks = [rank(0, **REDUCE), rank(1, silent="is stopped by a signal"), rank(2, **REDUCE), rank(3, **REDUCE)]
    assert name_stall(ranks) == (
        "rank 1 (process 4001 on node-0) is stopped by a signal, last seen in update, microbatch 3 of 12; ranks 0, 2, "
        "3 wait for it in all_reduce (policy/update.py, _run_schedule)"
    )


def test_a_rank_that_is_not_in_the_collective_of_the_others_is_named_with_its_place() -> None:
    ranks = [rank(0, **REDUCE), rank(1, **REDUCE), rank(2)]
    assert name_stall(ranks) == (
        "rank 2 (process 4002 on node-1) is in policy/update.py, _forward, in update, microbatch 3 of 12; ranks 0, 1 "
        "wait for it in all_reduce (policy/update.py, _run_schedule)"
    )


def test_on_a_gpu_what_torch_has_pending_counts_though_the_host_is_elsewhere() -> None:
    pending = ("nccl:all_reduce number 812 of group TENSOR_MODEL_PARALLEL_GROUP",)
    assert name_stall([rank(0, pending=pending), rank(1, pending=pending), rank(2)]).startswith("rank 2 (process 4002")


WAITS = tuple(Wait("engine", f"http://node-{engine}:8000", "/rollouts", 1950.0 - engine) for engine in (0, 1, 1))


@pytest.mark.parametrize(
    ("engines", "line"),
    [
        (
            (Engine(name="http://node-0:8000", answers=True), Engine(name="http://node-1:8000", answers=False)),
            "engine http://node-1:8000 has not answered /rollouts for 32:29 (2 such); rank 0 (process 4000 on node-0) "
            "waits for that, in collect, group 3 of 16",
        ),
        (
            (),
            "engine http://node-0:8000 has not answered /rollouts for 32:30, but is alive; rank 0 (process 4000 on "
            "node-0) waits for that, in collect, group 3 of 16",
        ),
    ],
)
def test_an_engine_that_does_not_answer_is_named_or_else_the_one_that_was_asked_first(
    engines: tuple[Engine, ...], line: str
) -> None:
    waiting = rank(0, phase="collect", doing="group 3 of 16", waits=WAITS, engines=engines)
    assert name_stall([waiting, rank(1, **BROADCAST)]) == line


def test_verifiers_and_disks_are_named() -> None:
    verifier = Wait("verifier", "math", "16 responses to math-17", 1900.0)
    assert name_stall([rank(0, waits=(verifier,)), rank(1, **BROADCAST)]).startswith(
        "the verifiers of node-0 have not judged 16 responses to math-17 for 31:40; rank 0 "
    )
    disk = Wait("disk", "run/checkpoints/step-000510", "rank 1's part", 1900.0)
    waits = rank(1, waits=(disk,), phase="checkpoint", doing="", place="checkpoint/background.py, _wait")
    rank_zero = rank(0, place="checkpoint/background.py, _wait")  # waits for the word of rank 1
    assert name_stall([rank_zero, waits, rank(2, **BROADCAST)]) == (
        "the disk of run/checkpoints/step-000510 has not taken rank 1's part for 31:40; rank 1 (process 4001 on "
        "node-0) waits for that, in checkpoint"
    )


def test_ranks_in_different_collectives_are_told_apart_and_in_the_same_one_the_network_is_suspect() -> None:
    assert name_stall([rank(0, **REDUCE), rank(1, **REDUCE)]) == (
        "all ranks wait in all_reduce (policy/update.py, _run_schedule): look at the network between the nodes"
    )
    many = [rank(number, **REDUCE) for number in range(9)] + [rank(9, **BROADCAST)]
    assert name_stall(many) == (
        "the ranks wait in different collectives: rank 9 in broadcast_object_list (run.py, collect); ranks 0, 1, 2, 3, "
        "4, 5 and 3 more in all_reduce (policy/update.py, _run_schedule)"
    )


def test_a_thread_in_a_collective_is_seen_there_and_its_caller_named() -> None:
    script = """
import os, sys, threading, time
import torch.distributed as dist
from megatron_prorl import comm, stalls
rank = int(sys.argv[1])
store = dist.FileStore(sys.argv[2], 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
comm.init_control_group()
if rank == 1:
    time.sleep(60)
def look():
    time.sleep(1.0)
    frame = sys._current_frames()[threading.main_thread().ident]
    print(stalls.where(frame), stalls.pending_collectives(), flush=True)
    os._exit(0)
threading.Thread(target=look).start()
comm.barrier()
"""
    folder = os.environ.get("TMPDIR", "/tmp")
    path = f"{folder}/prorl-store-{os.getpid()}"
    command = [sys.executable, "-c", script]
    other = subprocess.Popen([*command, "1", path])
    try:
        shown = subprocess.run([*command, "0", path], capture_output=True, text=True, timeout=60).stdout
    finally:
        other.kill()
        other.wait()
        Path(path).unlink(missing_ok=True)
    assert "('barrier (" in shown and ", 'barrier')" in shown
    assert "gloo:barrier number" in shown


def test_a_place_outside_of_any_collective_has_none() -> None:
    place, collective = where(sys._getframe())
    assert collective == ""
    assert "test_a_place" in place


def watch(run_dir: Path, number: int, **changes: object) -> Watch:
    options = {"rank": number, "num_ranks": 2, "attempt": "a", "limit_seconds": 3.0} | changes
    return Watch(run_dir, **options)  # type: ignore[arg-type]


def write(run_dir: Path, number: int, /, **changes: object) -> None:
    stalls._write(stalls._path(run_dir, number), rank(number, attempt="a", **changes).beat)


def test_nobody_has_stalled_while_any_rank_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = watch(tmp_path, 0)
    monkeypatch.setattr(heartbeat, "_moved", time.monotonic() - 10.0)
    write(tmp_path, 1, still_seconds=0.0)
    assert not mine._nothing_moves()
    write(tmp_path, 1, still_seconds=3.1, number=8)
    assert mine._nothing_moves()
    monkeypatch.setattr(heartbeat, "_moved", time.monotonic())
    assert not mine._nothing_moves()


def test_a_heartbeat_that_stays_the_same_grows_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, clock = watch(tmp_path, 0), [1000.0]
    monkeypatch.setattr(stalls.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(heartbeat, "_moved", 990.0)
    write(tmp_path, 1, still_seconds=0.5)
    assert not mine._nothing_moves(), "new, as far as rank 0 knows"
    clock[0] += 2.0
    assert mine._still_seconds(1) == 2.5
    assert not mine._nothing_moves()
    clock[0] += 1.0
    assert mine._nothing_moves()


def test_a_rank_of_another_start_does_not_count_as_one_that_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, clock = watch(tmp_path, 0), [1000.0]
    monkeypatch.setattr(stalls.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(heartbeat, "_moved", 990.0)
    for number in range(8):
        stalls._write(stalls._path(tmp_path, 1), rank(1, attempt="before", number=number, still_seconds=0.0).beat)
        stalled = mine._nothing_moves()
        clock[0] += 1.0
    assert stalled


PROCESS = """
import sys, threading, time
from megatron_prorl import heartbeat
from megatron_prorl.stalls import Watch
run_dir, limit, moves = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
with Watch(run_dir, rank=0, num_ranks=1, attempt="a", limit_seconds=limit) as watch:
    watch.at_end(lambda cause: open(f"{run_dir}/hook", "w").write(cause))
    heartbeat.phase("update")
    until = time.monotonic() + moves
    while time.monotonic() < until:
        heartbeat.beat()
        time.sleep(0.05)
    if len(sys.argv) > 4:
        threading.Event().wait()
"""


def start(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROCESS, str(folder), *words], capture_output=True, text=True, timeout=60
    )


def test_a_process_that_hangs_ends_with_its_stacks_and_a_code_to_begin_again(tmp_path: Path) -> None:
    ended = start(tmp_path, "1.0", "0", "hang")
    assert ended.returncode == Stalled.exit_code == 76
    assert ended.stderr.startswith("error: stalled: nothing has moved for 0:01: rank 0 (process ")
    (folder,) = (tmp_path / "stalls").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["cause.txt", "rank-00000.json", "rank-00000.txt"]
    assert "line 14 in <module>" in (folder / "rank-00000.txt").read_text()
    assert (tmp_path / "hook").read_text() == (folder / "cause.txt").read_text().strip()


def test_a_process_whose_interpreter_hangs_ends_with_its_stacks_too(tmp_path: Path) -> None:
    script = """
import ctypes, sys, time
from megatron_prorl import stalls
stalls.BACKSTOP_SECONDS = 1.0
with stalls.Watch(sys.argv[1], rank=0, num_ranks=1, attempt="a", limit_seconds=2.0):
    time.sleep(0.5)
    ctypes.PyDLL(None).sleep(1000)  # holds the interpreter's lock
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "Timeout (0:00:03)!" in ended.stderr and "line 7 in <module>" in ended.stderr


RANK = """
import sys, time
import torch.distributed as dist
from megatron_prorl import comm
from megatron_prorl.stalls import Watch
run_dir, rank, hangs = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
dist.init_process_group("gloo", store=dist.FileStore(f"{run_dir}/store", 3), rank=rank, world_size=3)
comm.init_control_group()
with Watch(run_dir, rank=rank, num_ranks=3, attempt="a", limit_seconds=4.0):
    comm.barrier()
    if hangs:
        time.sleep(1000)
    comm.barrier()
"""


def test_all_ranks_end_together_and_one_of_them_tells_whom_they_waited_for(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path), str(number), *(["hangs"] if number == 1 else [])],
            env=os.environ | {"RANK": str(number)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    try:
        told = "".join(process.communicate(timeout=60)[1] for process in processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [76, 76, 76]
    assert told.count("stalled") == told.count("\n") == 1
    assert f"rank 1 (process {processes[1].pid} on " in told
    assert "ranks 0, 2 wait for it in barrier (<string>, <module>)" in told
    (folder,) = (tmp_path / "stalls").iterdir()
    assert len(list(folder.glob("rank-*.txt"))) == 3


def test_a_process_that_moves_is_left_alone_for_much_longer_than_the_limit(tmp_path: Path) -> None:
    ended = start(tmp_path, "0.5", "3.0")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert not (tmp_path / "stalls").exists()
    assert list((tmp_path / "heartbeats").iterdir()) == []


def test_zero_watches_over_nothing(tmp_path: Path) -> None:
    with watch(tmp_path, 0, limit_seconds=0.0, num_ranks=1):
        (found,) = read_ranks(tmp_path)
    assert (found.silent, found.beat.rank) == ("", 0)


def test_from_outside_a_rank_is_silent_once_its_heartbeat_is_a_minute_old(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        start_ticks = stalls.process_start(child.pid)
        write(tmp_path, 0, machine=stalls.machine(), pid=child.pid, process_start=start_ticks)
        path = stalls._path(tmp_path, 0)
        assert [found.silent for found in read_ranks(tmp_path)] == [""]
        os.utime(path, (time.time() - 70, time.time() - 70))
        assert [found.silent for found in read_ranks(tmp_path)] == ["gives no sign, though its process lives"]
        os.kill(child.pid, signal.SIGSTOP)
        time.sleep(0.1)
        assert [found.silent for found in read_ranks(tmp_path)] == ["is stopped by a signal"]
    finally:
        child.kill()
        child.wait()
    assert [found.silent for found in read_ranks(tmp_path)] == ["is gone"]


def test_what_is_waited_for_is_in_the_heartbeat_and_its_end_is_a_move() -> None:
    with heartbeat.waiting("engine", "http://a", "/rollouts"):
        time.sleep(0.05)
        found = heartbeat.now()
    (wait,) = [wait for wait in found.waits if wait.name == "http://a"]
    assert wait.seconds >= 0.05
    assert heartbeat.now().still_seconds < 0.05
    assert "http://a" not in [wait.name for wait in heartbeat.now().waits]


def test_a_move_costs_less_than_a_microsecond_or_so() -> None:
    began = time.perf_counter()
    for _ in range(100_000):
        heartbeat.beat()
    assert (time.perf_counter() - began) / 100_000 < 5e-6  # 0.1 on a quiet machine


def test_threads_that_wait_at_once_are_all_there() -> None:
    def wait(number: int) -> None:
        with heartbeat.waiting("verifier", "math", str(number)):
            time.sleep(0.3)

    threads = [threading.Thread(target=wait, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    assert {wait.what for wait in heartbeat.now().waits} >= set("01234")
    for thread in threads:
        thread.join()


def test_a_limit_below_what_hanging_engines_are_given_is_refused() -> None:
    cfg = make_config()
    assert config_problems(cfg) == config_problems(cfg.model_copy(update={"stall_seconds": 0.0})) == []
    assert config_problems(cfg.model_copy(update={"stall_seconds": 1200.0})) == [
        "stall_seconds: 1200 must be above 2*rollout.engines.request_timeout_seconds = 1200 and "
        "verifier.timeout_seconds = 10"
    ]
