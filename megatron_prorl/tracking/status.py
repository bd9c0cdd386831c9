"""What a run is doing this moment: run_dir/status.json, written by rank 0, and what it says of the run's state.

{"pid": 4711, "host": "node-1", "started": ..., "heartbeat": ..., "step": 412, "steps": 3000, "stage": 0, "resets": 3,
 "phase": "rollouts", "done": 12, "total": 16, "waits_for": "generating 3, verifying 1", "phase_since": ...,
 "last_sign": ..., "usual_seconds": 9.5, ...}

Times are Unix seconds. No torch here.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from megatron_prorl.checkpoint.lock import is_locked
from megatron_prorl.errors import UserError

STATUS_FILE = "status.json"
ENDED = "ended"  # the phase of a process that has closed its run
LEAST_SECONDS = 1.0  # between two writings
HEARTBEAT_SECONDS = 5.0
SILENT_SECONDS = 60.0  # without a heartbeat: a process that is stopped or hangs with the interpreter's lock
STALLED_TIMES = 5.0  # as long as the longest wait that the phase has had in this process
STALLED_LEAST_SECONDS = 120.0
STALLED_UNKNOWN_SECONDS = 1800.0  # of a phase that has not ended once yet


class StatusWriter:
    """Keeps status.json up to date from a thread of its own, so that the training never waits for it.

    As a context it ends with the reason why the run does. Methods may be called from any thread.
    """

    def __init__(self, run_dir: str | Path, steps: int) -> None:
        self._path = Path(run_dir) / STATUS_FILE
        self._lock = threading.Lock()
        self._changed, self._closing = threading.Event(), threading.Event()
        self._longest: dict[str, float] = {}  # seconds without a sign, by phase, of those that have ended
        self._wait = 0.0  # the same, of the present one
        self._waits_for: Callable[[], str] = lambda: ""
        now = time.time()
        self._now: dict[str, Any] = {
            "pid": os.getpid(),
            "process_start": process_start(os.getpid()),
            "machine": machine(),
            "host": socket.gethostname(),
            "started": now,
            "heartbeat": now,
            "step": 0,
            "steps": steps,
            "stage": 0,
            "resets": 0,
            "phase": "start",
            "done": 0,
            "total": None,
            "waits_for": "",
            "phase_since": now,
            "last_sign": now,
            "usual_seconds": None,
            "seconds_a_step": None,
            "end": "",
        }
        self._thread = threading.Thread(target=self._keep, name="status", daemon=True)

    def __enter__(self) -> StatusWriter:
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(_cause(error))

    def end(self, cause: str) -> None:
        """Write that the process ends, and nothing from then on."""
        self._closing.set()
        self._changed.set()
        self._thread.join()
        with self._lock:
            self._now |= {"phase": ENDED, "done": 0, "total": None, "phase_since": time.time(), "end": cause}
        self._write()

    def begin(self, step: int, stage: int, resets: int) -> None:
        """Where the run goes on from."""
        self._set(step=step, stage=stage, resets=resets)

    def watch(self, waits_for: Callable[[], str]) -> None:
        """Ask this, from any thread, what a phase that is counted waits for."""
        self._waits_for = waits_for

    def phase(self, name: str, total: int | None = None) -> None:
        """The run now does `name`, of which `total` items are to be counted with `advance`."""
        with self._lock:
            now, before = self._sign(), self._now["phase"]
            self._longest[before], self._wait = max(self._longest.get(before, 0.0), self._wait), 0.0
            self._now |= {"phase": name, "done": 0, "total": total, "phase_since": now}
            self._now["usual_seconds"] = self._longest.get(name)
        self._changed.set()

    def advance(self, n: int) -> None:
        with self._lock:
            self._sign()
            self._now["done"] += n
        self._changed.set()

    def step_done(self, step: int, metrics: Mapping[str, float], seconds_a_step: float | None) -> None:
        self._set(
            step=step,
            stage=int(metrics.get("stage", 0)),
            resets=int(metrics.get("reset/count", 0)),
            seconds_a_step=seconds_a_step,
        )

    def _set(self, **values: Any) -> None:
        with self._lock:
            self._now |= values
        self._changed.set()

    def _sign(self) -> float:
        """Note that the run moves; returns the time."""
        now = time.time()
        self._wait = max(self._wait, now - self._now["last_sign"])
        self._now["last_sign"] = now
        return now

    def _keep(self) -> None:
        while not self._closing.is_set():
            self._changed.wait(HEARTBEAT_SECONDS)
            self._changed.clear()
            self._write()
            self._closing.wait(LEAST_SECONDS)

    def _write(self) -> None:
        with self._lock:
            self._now["heartbeat"] = time.time()
            self._now["waits_for"] = self._waits_for() if self._now["total"] else ""
            text = json.dumps(self._now)
        draft = self._path.with_suffix(".tmp")
        try:
            draft.write_text(text + "\n", encoding="utf-8")
            os.replace(draft, self._path)
        except OSError:
            pass  # a full disk: no reason to end a run, and the next writing is soon; meanwhile the heartbeat is missed


def note_end(run_dir: str | Path, cause: str) -> None:
    """Write for the process that has a StatusWriter, and that hangs, why it ends."""
    if (status := read_status(run_dir)) is not None:
        path = Path(run_dir) / STATUS_FILE
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(status | {"phase": ENDED, "total": None, "end": cause}) + "\n", encoding="utf-8")
        os.replace(draft, path)


def _cause(error: BaseException | None) -> str:
    """Why a run ends before its time, on one line; empty if it does not."""
    if error is None:
        return ""
    if isinstance(error, KeyboardInterrupt):
        return "Ctrl-C"
    if isinstance(error, SystemExit) and isinstance(error.code, int) and error.code > 128:
        return signal.Signals(error.code - 128).name
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def read_status(run_dir: str | Path) -> dict[str, Any] | None:
    """What the run's last process wrote; None before any."""
    try:
        found: dict[str, Any] = json.loads((Path(run_dir) / STATUS_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found


@dataclass(frozen=True, slots=True)
class Life:
    """Whether the process that a status speaks of trains: "running", "STALLED" or "ended", and more in words."""

    name: Literal["running", "STALLED", "ended"]
    detail: str


def life(run_dir: str | Path, status: Mapping[str, Any] | None, now: float) -> Life:
    """Judged by the process itself on its machine, and from another by the heartbeat and the run's lock."""
    if status is None:
        return Life("ended", "")
    silent = now - status["heartbeat"]
    here = status["machine"] == machine()
    if here:
        alive = process_start(status["pid"]) == status["process_start"]
    else:
        alive = status["phase"] != ENDED and (silent < SILENT_SECONDS or is_locked(Path(run_dir)))
    if not alive:
        return Life("ended", status["end"] if status["phase"] == ENDED else f"killed while it was in {doing(status)}")
    where = f"process {status['pid']} on {'this machine' if here else status['host']}"
    if silent >= SILENT_SECONDS:
        return Life("STALLED", f"in {doing(status)}: no heartbeat for {duration(silent)}, {where}")
    waited, usual = now - status["last_sign"], status["usual_seconds"]
    limit = STALLED_UNKNOWN_SECONDS if usual is None else max(STALLED_LEAST_SECONDS, STALLED_TIMES * usual)
    if waited >= limit:
        known = "" if usual is None else f", which has taken {duration(usual)} at most"
        return Life("STALLED", f"in {doing(status)} without a sign for {duration(waited)}{known}, {where}")
    return Life("running", f"{doing(status)} for {duration(now - status['phase_since'])}, {where}")


def doing(status: Mapping[str, Any]) -> str:
    """The phase with its count and what it waits for, such as "rollouts 12/16 (generating 3, verifying 1)"."""
    count = f" {status['done']}/{status['total']}" if status["total"] else ""
    return status["phase"] + count + (f" ({status['waits_for']})" if status["waits_for"] else "")


def duration(seconds: float) -> str:
    """3:07, 2:03:07 or 4d 02:03."""
    minutes, seconds_left = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02d}:{minutes:02d}"
    return f"{hours}:{minutes:02d}:{seconds_left:02d}" if hours else f"{minutes}:{seconds_left:02d}"


def machine() -> str:
    """Equal where processes can read each other's /proc."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")


def process_start(pid: int) -> int | None:
    """When a living process began, in ticks since the machine did: another one of that id began later. proc(5)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])
