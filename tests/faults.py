"""`prorl` with faults at exact places: python faults.py POINT:N=VICTIM ... train config.yaml

At the N-th call of POINT, and before that call does anything, VICTIM gets SIGKILL. The pseudo-fault "watch=FOLDER"
writes what a reset finds and leaves, reset-1-before.pt and reset-1-after.pt, to FOLDER.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
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
    "trainer": os.getpid,
    "engine": engine,  # the server
    "core": lambda: children(engine())[0],  # the process that holds the model
}


def install(fault: str) -> None:
    from megatron_prorl.checkpoint import folders
    from megatron_prorl.rollout.client import EngineClient

    points: dict[str, tuple[Any, str]] = {
        "sync": (EngineClient, "update_weights"),
        "request": (EngineClient, "generate"),
        "commit": (folders, "commit"),
    }
    where, victim = fault.split("=")
    point, number = where.split(":")
    owner, name = points[point]
    original, calls = getattr(owner, name), itertools.count(1)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == int(number):
            os.kill(VICTIMS[victim](), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, wrapper)


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
    start = sys.argv.index("train")
    for fault in sys.argv[1:start]:
        if fault.startswith("watch="):
            watch_resets(fault.removeprefix("watch="))
        else:
            install(fault)
    from megatron_prorl.cli import main

    sys.exit(main(sys.argv[start:]))
