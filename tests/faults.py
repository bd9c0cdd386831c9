"""`prorl` with faults at exact places: python faults.py POINT:N[:after]=VICTIM ... train config.yaml

At the N-th call of POINT, before that call does anything or once it is done, VICTIM gets its signal, or what else its
name says happens. The pseudo-fault "watch=FOLDER" writes what a reset finds and leaves, reset-1-before.pt and
reset-1-after.pt, to FOLDER; "patience=SECONDS" is what a verifier is given to take up a problem.
"""

from __future__ import annotations

import errno
import itertools
import os
import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any


def children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def engine() -> int:
    own = children(os.getpid())
    return next(pid for pid in own if b"megatron_prorl.rollout.server" in Path(f"/proc/{pid}/cmdline").read_bytes())


VICTIMS = {
    "trainer": (os.getpid, signal.SIGKILL),
    "term": (os.getpid, signal.SIGTERM),
    "engine": (engine, signal.SIGKILL),  # the server
    "core": (lambda: children(engine())[0], signal.SIGKILL),  # the process that holds the model
    "frozen": (lambda: children(engine())[0], signal.SIGSTOP),
    "verifier": (lambda: verifier(), signal.SIGKILL),
    "frozen-verifier": (lambda: verifier(), signal.SIGSTOP),
    "stopped": (os.getpid, signal.SIGSTOP),
}


ERRORS = {"full": errno.ENOSPC, "broken": errno.EIO}  # raised there
HANGS = "hangs"  # there, for ever
CLOCKS = {"tomorrow": 86400.0, "yesterday": -86400.0}  # what the wall clock jumps by


def points() -> dict[str, tuple[Any, str]]:
    """Name of a point to owner and name of the function that is called there."""
    from megatron_prorl import rank_zero, replay, run
    from megatron_prorl.checkpoint import folders
    from megatron_prorl.checkpoint.writer import CheckpointWriter
    from megatron_prorl.policy.optimizer import PolicyOptimizer
    from megatron_prorl.policy.policy import Policy
    from megatron_prorl.rollout.client import EngineClient
    from megatron_prorl.tasks import pool
    from megatron_prorl.tracking.lineage import LineageWriter
    from megatron_prorl.tracking.metrics import MetricsWriter

    return {
        "sync": (EngineClient, "update_weights"),
        "request": (EngineClient, "generate"),
        "verdict": (pool.VerifierPool, "verify_many"),
        "judge": (pool._Worker, "_verify"),
        "load": (run, "load_checkpoint"),
        "load-reference": (run, "load_reference"),
        "learn": (Policy, "learn"),
        "update": (PolicyOptimizer, "step"),
        "validate": (replay._Replay, "validate"),
        "act": (run.Run, "act"),
        "reset": (Policy, "reset"),
        "reference": (run, "save_reference"),
        "note": (LineageWriter, "write"),
        "rollouts": (rank_zero, "write_rollouts"),
        "row": (MetricsWriter, "write"),
        "save": (CheckpointWriter, "save"),
        "poll": (CheckpointWriter, "poll"),
        "wait": (CheckpointWriter, "wait"),
        "begin": (folders, "begin"),
        "commit": (folders, "commit"),
        "publish": (folders, "publish"),
        "prune": (run, "prune"),
        "remove": (folders.shutil, "rmtree"),
        "request-done": (run, "clear_requests"),
        "advance": (run.Run, "_advance"),
    }


def install(fault: str) -> None:
    """POINT:N=VICTIM strikes before the N-th call, POINT:N:after=VICTIM after it."""
    where, victim = fault.split("=")
    point, number, *after = where.split(":")
    owner, name = points()[point]
    original, calls = getattr(owner, name), itertools.count(1)

    def strike() -> None:
        if victim in ERRORS:
            raise OSError(ERRORS[victim], os.strerror(ERRORS[victim]))
        if victim == HANGS:
            threading.Event().wait()
        if victim in CLOCKS:
            right = time.time
            time.time = lambda: right() + CLOCKS[victim]
            return
        find, signum = VICTIMS[victim]
        os.kill(find(), signum)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        its_time = next(calls) == int(number)
        if its_time and not after:
            strike()
        found = original(*args, **kwargs)
        if its_time and after:
            strike()
        return found

    setattr(owner, name, wrapper)


def verifier() -> int:
    own = children(os.getpid())
    return next(pid for pid in own if b"tasks.pool" in Path(f"/proc/{pid}/cmdline").read_bytes())


def watch_resets(folder: str) -> None:
    import torch

    from megatron_prorl.policy.policy import Policy

    original, calls = Policy.reset, itertools.count(1)

    def write(policy: Policy, path: str) -> None:
        found = {
            "weights": [p for chunk in policy.chunks for p in chunk.parameters()],
            "reference": [p for chunk in policy.reference for p in chunk.parameters()],
            "moments": [
                moment
                for part in policy.optimizer.chained_optimizers
                for state in part.optimizer.state.values()
                for moment in state.values()
            ],
        }
        torch.save({name: [tensor.detach().cpu() for tensor in tensors] for name, tensors in found.items()}, path)

    def wrapper(policy: Policy, **kwargs: Any) -> None:
        number = next(calls)
        write(policy, f"{folder}/reset-{number}-before.pt")
        original(policy, **kwargs)
        write(policy, f"{folder}/reset-{number}-after.pt")

    Policy.reset = wrapper  # type: ignore[method-assign]


if __name__ == "__main__":
    start = next(i for i, word in enumerate(sys.argv) if word in ("train", "replay"))
    warnings.filterwarnings("ignore", module=r"megatron\.")  # as the command does, before it imports them
    for fault in sys.argv[1:start]:
        if fault.startswith("watch="):
            watch_resets(fault.removeprefix("watch="))
        elif fault.startswith("patience="):
            from megatron_prorl.tasks import pool

            pool.PREPARE_TIMEOUT_SECONDS = float(fault.removeprefix("patience="))
        else:
            install(fault)
    from megatron_prorl.cli import main

    sys.exit(main(sys.argv[start:]))
