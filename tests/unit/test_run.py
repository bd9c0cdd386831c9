"""The lock on a run directory, and what a run does when every engine is lost."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from megatron_prorl import comm, ending, run
from megatron_prorl.checkpoint import folders
from megatron_prorl.checkpoint.lock import only_writer
from megatron_prorl.errors import ToldToEnd, UserError
from megatron_prorl.rollout.dispatch import NoEngineLeft
from megatron_prorl.run import MAX_REPEATS, Run, _check_seen
from megatron_prorl.tracking.metrics import PhaseTimer
from megatron_prorl.types import Collected, Progress
from tests.unit.rollout.test_engine_args import make_config


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_one_line(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError, match=f"run_dir: the file system of {tmp_path} has no locks") as caught:
        only_writer(tmp_path).__enter__()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("held_seconds", "patience_seconds"), [(1.0, 20.0), (20.0, 1.0)])
def test_a_run_waits_for_the_end_of_another_in_its_directory_as_long_as_it_is_told_to(
    tmp_path: Path, held_seconds: float, patience_seconds: float
) -> None:
    program = f"import fcntl, time; f = open({str(tmp_path / '.lock')!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
    program += f"print(flush=True); time.sleep({held_seconds})"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        holder.stdout.readline()
        if held_seconds < patience_seconds:
            with only_writer(tmp_path, patience_seconds=patience_seconds):
                assert holder.wait() == 0
        else:
            with pytest.raises(UserError, match="another process trains in"):
                only_writer(tmp_path, patience_seconds=patience_seconds).__enter__()
            holder.kill()


def test_a_run_directory_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"run_dir: cannot write {tmp_path}/file/run: not a directory"):
        only_writer(tmp_path / "file" / "run").__enter__()


def test_a_run_directory_that_a_node_does_not_see_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "SEEN_SECONDS", 0.1)
    (tmp_path / "checkpoints").mkdir()
    _check_seen(tmp_path, None)
    with pytest.raises(UserError, match=r"step-000002 is on the first node and not on .* all nodes share"):
        _check_seen(tmp_path, tmp_path / "checkpoints" / "step-000002")
    with pytest.raises(UserError, match="checkpoints is on the first node"):
        _check_seen(tmp_path / "elsewhere", None)


class FakeRankZero:
    """Loses every engine in its first `num_lost` collections."""

    def __init__(self, num_lost: int) -> None:
        self.num_lost = num_lost
        self.asked: list[int] = []
        self.num_readmitted = 0
        self.display = SimpleNamespace(message=lambda text: None, phase=lambda name: None)

    def collect(self, progress: Progress) -> Collected:
        self.asked.append(progress.next_draw)
        if len(self.asked) <= self.num_lost:
            raise NoEngineLeft("no engine is left")
        return Collected(kept=[], dropped_groups=[], next_draw=progress.next_draw + 4, metrics={})

    def readmit_engines(self) -> None:
        self.num_readmitted += 1


def make_run(rank_zero: FakeRankZero | None) -> tuple[Run, list[int]]:
    pushed: list[int] = []
    made = Run.__new__(Run)
    made.timer = PhaseTimer()
    made.progress = Progress(next_draw=8, weight_version=3)
    made._rank_zero = rank_zero  # type: ignore[assignment]
    made._sync = SimpleNamespace(push=lambda version: pushed.append(version) or {})  # type: ignore[assignment, func-returns-value]
    return made, pushed


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comm, "broadcast", lambda item: item)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("num_lost", range(MAX_REPEATS + 1))
def test_a_collection_that_loses_every_engine_begins_anew_with_the_same_problems(num_lost: int) -> None:
    rank_zero = FakeRankZero(num_lost)
    made, pushed = make_run(rank_zero)
    collected = made.collect()
    assert rank_zero.asked == [8] * (num_lost + 1)
    assert collected.next_draw == 12
    assert collected.metrics == {"rollout/repeats": num_lost}
    assert pushed == [3] * num_lost  # the same weights
    assert rank_zero.num_readmitted == num_lost


@pytest.mark.usefixtures("alone")
def test_a_collection_that_loses_every_engine_again_and_again_ends_the_run() -> None:
    made, pushed = make_run(FakeRankZero(99))
    with pytest.raises(NoEngineLeft):
        made.collect()
    assert len(pushed) == MAX_REPEATS


def test_the_other_ranks_take_part_in_the_sync_between(monkeypatch: pytest.MonkeyPatch) -> None:
    """What rank 0 tells them, lost and abandoned: lost, lost, done, and what it found."""
    found = Collected(kept=[], dropped_groups=[], next_draw=12, metrics={})
    told = iter([(True, False), (True, False), (False, False), found])
    monkeypatch.setattr(comm, "broadcast", lambda item: next(told))
    made, pushed = make_run(None)
    assert made.collect() is found
    assert pushed == [3, 3]


def test_the_other_ranks_leave_with_rank_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comm, "broadcast", lambda item: (False, True))
    made, _ = make_run(None)
    monkeypatch.setattr(made, "_leave", lambda: (_ for _ in ()).throw(ToldToEnd("left")))
    with pytest.raises(ToldToEnd, match="left"):
        made.collect()


@pytest.mark.usefixtures("alone")
def test_engines_that_end_with_the_signal_that_tells_the_run_to_are_not_started_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ending, "wait_told", lambda seconds: True)
    made, pushed = make_run(FakeRankZero(1))
    monkeypatch.setattr(made, "_leave", lambda: (_ for _ in ()).throw(ToldToEnd("left")))
    with pytest.raises(ToldToEnd, match="left"):
        made.collect()
    assert pushed == []


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("backend", "order"),
    [
        ("ipc", ["engines start", "engines ready", "models", "engines ready"]),
        ("nccl", ["engines start", "models", "engines ready"]),
        ("shm", ["engines start", "models", "engines ready"]),
    ],
)
def test_only_engines_that_share_gpus_are_waited_for_before_the_models_are_built(
    backend: str, order: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []

    class FakeSupervisor:
        addresses: ClassVar[list[Any]] = []

        def __init__(self, *_: Any, **__: Any) -> None: ...

        def __enter__(self) -> FakeSupervisor:
            happened.append("engines start")
            return self

        def __exit__(self, *_: object) -> None: ...

        def wait_ready(self) -> None:
            happened.append("engines ready")

        def restart(self, indices: list[int]) -> list[int]:
            return indices

    class FakePolicy:
        def __init__(self, *_: Any) -> None:
            happened.append("models")
            self.chunks, self.reference, self.hf = [torch.nn.Linear(1, 1)], None, {"vocab_size": 8}
            self.probe = None

    (tmp_path / "checkpoints").mkdir()
    no_engines = {
        "find_checkpoint": lambda self: None,
        "note_stall": lambda self, cause: None,
        "check_tokenizer": lambda self, hf: None,
        "begin_stage": lambda self, cfg, progress: None,
        "open_problems": lambda self, progress: None,
        "open_collector": lambda self, sync, engines: None,
        "__init__": lambda self, cfg, stack: None,
    }
    fakes = {
        "EngineSupervisor": FakeSupervisor,
        "Policy": FakePolicy,
        "RankZero": type("FakeRankZero", (), no_engines),
        "transfer_backend": lambda cfg, device: backend,
        "hf_metadata": lambda hf, dtype: [],
        "WeightSync": lambda *_, **__: SimpleNamespace(close=lambda: None),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(run, name, fake)
    monkeypatch.setattr(comm, "rank", lambda: 0)
    monkeypatch.setattr(comm, "gather", lambda item: [item])
    monkeypatch.setattr(comm, "barrier", lambda: None)
    cfg = make_config().model_copy(update={"run_dir": str(tmp_path)})
    with ExitStack() as stack:
        Run(cfg, SimpleNamespace(kind="cuda"), stack)  # type: ignore[arg-type]
    assert happened == order


@pytest.mark.usefixtures("alone")
def test_a_changed_state_does_not_say_that_the_run_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comm, "is_rank_zero", lambda: True)
    cfg = make_config().model_copy(update={"run_dir": str(tmp_path), "steps": 8})
    assert not run.is_finished(cfg)
    folder = folders.checkpoint_folder(tmp_path, 8)
    (folders.begin(folder, num_bytes=0) / folders.STATE).write_text('{"progress": {"step": 8}}')
    folders.commit(folder)
    assert run.is_finished(cfg)
    (folder / folders.STATE).write_text('{"progress": {"step": 9}}')
    assert not run.is_finished(cfg)
