"""Stalls get a name: a thread of every rank sees that no rank moves any more, and ends the run with a code to go on.

run_dir/heartbeats/rank-00003.json    what rank 3 does and when it last moved, every few seconds (`Heartbeat`)
run_dir/stalls/20261121-123456/       of the attempt that began then: stacks of all threads of every rank that still
    rank-00003.txt rank-00003.json    answers, its heartbeat with the place in which it stands,
    cause.txt                         and one line: what the run hung in

A rank that is stopped or whose node is gone gives no sign; it is named by that. Where a process cannot even run this
thread (the interpreter's lock is held, or the run directory's disk hangs), faulthandler's own thread, which needs
neither, writes the stacks to standard error and ends the process with exit code 1.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from megatron_prorl import heartbeat
from megatron_prorl.errors import UserError
from megatron_prorl.heartbeat import Wait
from megatron_prorl.launch.local import report_user_error
from megatron_prorl.tracking.status import SILENT_SECONDS, duration, machine, note_end, process_start

HEARTBEATS, STALLS, CAUSE = "heartbeats", "stalls", "cause.txt"
LONGEST_PERIOD_SECONDS = 10.0
PERIODS = 60  # in the time after which a run has stalled
STILL_PERIODS = 3  # before a rank that does not move itself looks at the others: those of most waits need not
REPORT_SECONDS = 15.0  # for the stacks of the ranks that still answer
HOOK_SECONDS = 5.0  # to end engines and note the end
TRACE_SECONDS = 5.0  # for torch's record of collectives: it asks the GPU, which may hang
RANKS_SHOWN = 6
BACKSTOP_SECONDS = 60.0  # after the time in which the other ranks see the stall

# Where a rank waits for others though no function of torch.distributed is on the stack: handles of started collectives.
_WAITING_FILES = ("megatron/core/pipeline_parallel/p2p_communication.py", "megatron/core/distributed/")
_C10D = "torch/distributed/distributed_c10d.py"


class Stalled(UserError):
    """Nothing moved on any rank: to be started again, when the run goes on from its last checkpoint."""

    exit_code = 76


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """An engine as rank 0 finds it when nothing moves."""

    name: str  # its URL
    answers: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """What a rank says of itself. Seconds are its own clock's: those of two machines are never compared."""

    attempt: str
    rank: int
    host: str
    machine: str  # equal where processes can read each other's /proc
    pid: int
    process_start: int | None
    number: int  # of this heartbeat
    still_seconds: float
    phase: str
    doing: str
    waits: tuple[Wait, ...]
    place: str  # where its main thread is, such as "all_reduce (policy/update.py, _combine)"
    collective: str  # which of torch.distributed that is, or ""
    pending: tuple[str, ...] = ()  # collectives that torch has begun and not ended; only known once the run has stalled
    engines: tuple[Engine, ...] = ()  # of rank 0, once the run has stalled


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """A rank when nothing moves: its last heartbeat, and why it is silent, or "" if it still answers."""

    beat: Heartbeat
    silent: str


class Watch:
    """The heartbeat of this rank, and the eye on those of the others; a context, on every rank alike.

    `limit_seconds` is for how long no rank may have moved, 0 for ever. `attempt` names this start of the run, the same
    on all ranks. `engines()` tells on rank 0 whether the engines answer. What `at_end` was given is called with the
    one-line cause before this process ends by a stall, in a thread of its own.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        rank: int,
        num_ranks: int,
        attempt: str,
        limit_seconds: float,
    ) -> None:
        self.engines: Callable[[], list[Engine]] = list
        self._run_dir = Path(run_dir)
        self._rank, self._num_ranks = rank, num_ranks
        self._attempt = attempt
        self._limit = limit_seconds
        self._period = min(LONGEST_PERIOD_SECONDS, limit_seconds / PERIODS) if limit_seconds else LONGEST_PERIOD_SECONDS
        self._folder = self._run_dir / STALLS / attempt
        self._main_thread = threading.main_thread().ident
        self._number = 0
        self._first_seen: dict[int, tuple[int, float]] = {}  # by rank: number of a heartbeat, and when it was new
        self._mover = 0  # the rank that was the last to move
        self._hooks: list[Callable[[str], None]] = []
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="heartbeat", daemon=True)

    def at_end(self, hook: Callable[[str], None]) -> None:
        """Call this with the cause before the process ends, at most HOOK_SECONDS long."""
        self._hooks.append(hook)

    def __enter__(self) -> Watch:
        heartbeat.beat()
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._thread.join()
        if self._limit:
            faulthandler.cancel_dump_traceback_later()
        with contextlib.suppress(OSError):
            _path(self._run_dir, self._rank).unlink(missing_ok=True)

    def _keep(self) -> None:
        while not self._closing.wait(self._period):
            if self._limit:
                limit = self._limit + BACKSTOP_SECONDS
                faulthandler.dump_traceback_later(limit, exit=True, file=sys.__stderr__ or 2)
            # What nobody can read is no reason to believe that nobody moves.
            if self._write() and self._limit and (self._folder.exists() or self._nothing_moves()):
                self._end()

    def _beat(self) -> Heartbeat:
        now = heartbeat.now()
        place, collective = where(sys._current_frames().get(self._main_thread or 0))
        return Heartbeat(
            attempt=self._attempt,
            rank=self._rank,
            host=socket.gethostname(),
            machine=machine(),
            pid=os.getpid(),
            process_start=process_start(os.getpid()),
            number=self._number,
            still_seconds=now.still_seconds,
            phase=now.phase,
            doing=now.doing,
            waits=now.waits,
            place=place,
            collective=collective,
        )

    def _write(self) -> bool:
        """Whether the heartbeat is on the disk; a full one is no reason to end a run."""
        self._number += 1
        try:
            _write(_path(self._run_dir, self._rank), self._beat())
        except OSError:
            return False
        return True

    def _nothing_moves(self) -> bool:
        """Whether all ranks have been still for the limit; reads as few heartbeats as show that one is not."""
        if heartbeat.now().still_seconds < STILL_PERIODS * self._period:
            self._first_seen.clear()
            return False
        others = [rank for rank in range(self._num_ranks) if rank != self._rank]
        still = [heartbeat.now().still_seconds]
        for rank in sorted(others, key=lambda rank: rank != self._mover):
            still.append(self._still_seconds(rank))
            if still[-1] < STILL_PERIODS * self._period:
                self._mover = rank
                return False
        return min(still) >= self._limit

    def _still_seconds(self, rank: int) -> float:
        """Since this rank last moved, as far as is known: a heartbeat that stays the same grows old."""
        beat = self._read(rank)
        number, said = (beat.number, beat.still_seconds) if beat else (0, 0.0)
        now = time.monotonic()
        known, since = self._first_seen.get(rank, (-1, now))
        if known != number:
            self._first_seen[rank] = number, (since := now)
        return said + now - since

    def _read(self, rank: int) -> Heartbeat | None:
        found = read_heartbeat(_path(self._run_dir, rank))
        return found if found and found.attempt == self._attempt else None

    def _end(self) -> None:
        """Report, name the stall or wait for the rank that does, and end this process."""
        cause = self._folder / CAUSE
        try:
            self._folder.parent.mkdir(exist_ok=True)
            self._folder.mkdir()
            leads = True
        except FileExistsError:
            leads = False
        self._report()
        if leads:
            text, silent = self._name()
            if 0 in silent:  # which would note its end itself
                with contextlib.suppress(OSError):
                    note_end(self._run_dir, text)
            report_user_error(Stalled(text))  # before any rank ends: a launcher ends the others then
            _write_text(cause, text + "\n")
        deadline = time.monotonic() + 2 * REPORT_SECONDS
        while not cause.exists() and time.monotonic() < deadline:
            time.sleep(self._period / 4)
        try:
            text = cause.read_text(encoding="utf-8").strip()
        except OSError:
            text = f"stalled: see {self._folder}"
        hooks = threading.Thread(target=self._call_hooks, args=(text,), daemon=True)
        hooks.start()
        hooks.join(HOOK_SECONDS)
        os._exit(Stalled.exit_code)  # the main thread may stand in a collective that never returns

    def _call_hooks(self, text: str) -> None:
        for hook in reversed(self._hooks):
            with contextlib.suppress(Exception):  # of a process whose state nobody knows; the others are to be called
                hook(text)

    def _report(self) -> None:
        """This rank's stacks, and its last heartbeat with what only now is worth finding out."""
        with (self._folder / f"rank-{self._rank:05d}.txt").open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        beat = self._beat()
        pending: list[str] = []
        trace = threading.Thread(target=lambda: pending.extend(pending_collectives()), daemon=True)
        trace.start()
        trace.join(TRACE_SECONDS)
        beat = replace(beat, pending=tuple(pending), engines=tuple(self.engines()))
        _write(self._folder / f"rank-{self._rank:05d}.json", beat)

    def _name(self) -> tuple[str, list[int]]:
        """The one line, and the silent ranks, once all ranks that answer have reported."""
        deadline = time.monotonic() + REPORT_SECONDS
        reports = [self._folder / f"rank-{rank:05d}.json" for rank in range(self._num_ranks)]
        while not all(path.exists() for path in reports) and time.monotonic() < deadline:
            time.sleep(self._period / 4)
        ranks = []
        for rank, path in enumerate(reports):
            if report := read_heartbeat(path):
                ranks.append(Rank(beat=report, silent=""))
            elif last := self._read(rank):
                ranks.append(Rank(beat=last, silent=_why_silent(last)))
        silent = [rank.beat.rank for rank in ranks if rank.silent]
        unheard = sorted(set(range(self._num_ranks)) - {rank.beat.rank for rank in ranks})
        what = f"nothing was ever heard of {_ranks(unheard)}" if unheard else name_stall(ranks)
        text = f"stalled: nothing has moved for {duration(self._limit)}: {what}"
        return f"{text}; the stacks of all that answer are in {self._folder}", silent + unheard


def name_stall(ranks: Sequence[Rank]) -> str:
    """What a run hangs in, by its ranks when nothing moves: a rank, an engine, the verifiers, a disk or the network."""
    if silent := [rank for rank in ranks if rank.silent]:
        found = "; ".join(f"{_who(rank.beat)} {rank.silent}, last seen {_in(rank.beat)}" for rank in silent)
        return found + _waiting_for(ranks, silent)
    absent = [rank for rank in ranks if not _is_in_collective(rank)]
    if not absent:
        return _all_in_collectives(ranks)
    # A rank that waits for something outside explains one that merely is elsewhere.
    culprit = max(absent, key=lambda rank: (bool(rank.beat.waits), -rank.beat.rank)).beat
    if not culprit.waits:
        found = "; ".join(f"{_who(rank.beat)} is in {rank.beat.place}, {_in(rank.beat)}" for rank in absent)
        return found + _waiting_for(ranks, absent)
    dead = {engine.name for engine in culprit.engines if not engine.answers}
    worst = next((wait for wait in culprit.waits if wait.name in dead), culprit.waits[0])
    many = len([wait for wait in culprit.waits if wait.name == worst.name])
    asked = f"{worst.what} for {duration(worst.seconds)}" + (f" ({many} such)" if many > 1 else "")
    text = {
        "engine": f"engine {worst.name} has not answered {asked}" + ("" if worst.name in dead else ", but is alive"),
        "verifier": f"the verifiers of {culprit.host} have not judged {asked}",
        "disk": f"the disk of {worst.name} has not taken {asked}",
    }[worst.kind]
    return f"{text}; {_who(culprit)} waits for that, {_in(culprit)}"


def _is_in_collective(rank: Rank) -> bool:
    return bool(rank.beat.collective or rank.beat.pending)  # on a GPU the host may be past it already


def _all_in_collectives(ranks: Sequence[Rank]) -> str:
    groups: dict[str, list[int]] = {}
    for rank in ranks:
        pending = f", {rank.beat.pending[-1]}" if rank.beat.pending else ""
        groups.setdefault(rank.beat.place + pending, []).append(rank.beat.rank)
    if len(groups) == 1:
        return f"all ranks wait in {next(iter(groups))}: look at the network between the nodes"
    parts = [f"{_ranks(numbers)} in {place}" for place, numbers in sorted(groups.items(), key=lambda g: len(g[1]))]
    return f"the ranks wait in different collectives: {'; '.join(parts)}"


def _waiting_for(ranks: Sequence[Rank], culprits: Sequence[Rank]) -> str:
    waiting = [rank.beat for rank in ranks if rank not in culprits and _is_in_collective(rank)]
    if not waiting:
        return ""
    places = " and ".join(sorted({beat.place for beat in waiting}))
    verb = "waits" if len(waiting) == 1 else "wait"
    whom = "it" if len(culprits) == 1 else "them"
    return f"; {_ranks([beat.rank for beat in waiting])} {verb} for {whom} in {places}"


def _ranks(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:RANKS_SHOWN]))
    more = f" and {len(numbers) - RANKS_SHOWN} more" if len(numbers) > RANKS_SHOWN else ""
    return f"rank{'' if len(numbers) == 1 else 's'} {shown}{more}"


def _who(beat: Heartbeat) -> str:
    return f"rank {beat.rank} (process {beat.pid} on {beat.host})"


def _in(beat: Heartbeat) -> str:
    return f"in {beat.phase}" + (f", {beat.doing}" if beat.doing else "")


def where(frame: FrameType | None) -> tuple[str, str]:
    """The place in which a thread is, in words, and the collective of torch.distributed that this is, or ""."""
    frames: list[tuple[str, str]] = []
    while frame:
        frames.append((frame.f_code.co_filename.replace(os.sep, "/"), frame.f_code.co_name))
        frame = frame.f_back
    if not frames:
        return "no Python code", ""
    collective = ""
    if frames[0][0].endswith(_C10D):
        for file, function in frames:
            if "torch/distributed/" not in file:
                break
            if file.endswith(_C10D):
                collective = function
    elif any(part in frames[0][0] for part in _WAITING_FILES):
        collective = frames[0][1]
    # The channel of `comm` says less than who uses it, as do torch's own frames.
    callers = [part for part in frames if not part[0].endswith("/megatron_prorl/comm.py") and "/torch/" not in part[0]]
    ours = (part for part in callers if "/megatron_prorl/" in part[0])
    file, function = next(ours, (callers or frames)[0])
    at = f"{file.rpartition('/megatron_prorl/')[2]}, {function}"
    return (f"{collective} ({at})" if collective else at), collective


def pending_collectives() -> list[str]:
    """The collectives of this process that torch's flight recorder knows to have begun and not to have ended."""
    from torch._C import _distributed_c10d as c10d

    with contextlib.suppress(Exception):  # an undocumented call, of which nothing depends
        entries = json.loads(c10d._dump_fr_trace_json())["entries"]  # type: ignore[attr-defined]
        return [
            f"{entry['profiling_name']} number {entry['collective_seq_id']} of group {entry['process_group'][1]}"
            for entry in entries
            if not entry["retired"]
        ]
    return []


def read_heartbeat(path: Path) -> Heartbeat | None:
    """None for one that is missing or damaged."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found["waits"] = tuple(Wait(**wait) for wait in found["waits"])
        found["engines"] = tuple(Engine(**engine) for engine in found["engines"])
        return Heartbeat(**found | {"pending": tuple(found["pending"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def read_ranks(run_dir: str | Path) -> list[Rank]:
    """All ranks of the run's last start, as their heartbeats show them from outside."""
    found, now = [], time.time()
    for path in sorted((Path(run_dir) / HEARTBEATS).glob("rank-*.json")):
        if beat := read_heartbeat(path):
            with contextlib.suppress(OSError):  # it ends
                is_silent = now - path.stat().st_mtime >= SILENT_SECONDS
                found.append(Rank(beat=beat, silent=_why_silent(beat) if is_silent else ""))
    last = max((rank.beat.attempt for rank in found), default="")
    return [rank for rank in found if rank.beat.attempt == last]


def _why_silent(beat: Heartbeat) -> str:
    if beat.machine != machine():
        return "gives no sign: it, or its node, hangs or is gone"
    try:
        fields = Path(f"/proc/{beat.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "is gone"
    if int(fields[19]) != beat.process_start or fields[0] == "Z":
        return "is gone"
    state = {"T": "is stopped by a signal", "t": "is stopped by a debugger", "D": "hangs in the kernel, as for a disk"}
    return state.get(fields[0], "gives no sign, though its process lives")


def _path(run_dir: Path, rank: int) -> Path:
    return run_dir / HEARTBEATS / f"rank-{rank:05d}.json"


def _write(path: Path, beat: Heartbeat) -> None:
    _write_text(path, json.dumps(asdict(beat)) + "\n")


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)
