"""What a person asks of a run from outside: a file in run_dir/requests, which goes once it is done for good.

Each holds a mark of its own, which the event that fulfils it keeps: so none is done twice, and none is lost.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Collection
from pathlib import Path

from megatron_prorl.checkpoint.folders import latest_checkpoint, read_state
from megatron_prorl.config.load import load_config
from megatron_prorl.config.stages import ended_by
from megatron_prorl.errors import UserError

REQUESTS = ("reset", "advance")


def ask(run_dir: str | Path, request: str) -> str:
    """Leave a request for the end of the run's step; returns what to expect.

    Raises UserError for a folder that is no run's, and for a request that the run cannot fulfil.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir}: no run directory; give the run_dir of a run's configuration")
    cfg = load_config(run_dir / "config.yaml")
    if request == "advance" and not cfg.stages:
        raise UserError(f"{run_dir}: the run has no stages")
    checkpoint = latest_checkpoint(run_dir)
    if checkpoint and (reason := ended_by(cfg, read_state(checkpoint)["progress"])):
        raise UserError(f"{run_dir}: no step is left to {request} after: {reason}")
    folder = run_dir / "requests"
    folder.mkdir(exist_ok=True)
    draft = folder / f".{request}"
    draft.write_text(uuid.uuid4().hex)
    draft.replace(folder / request)
    return f"{request}: asked for; the run does it after the step it is in, or when it goes on"


def read_requests(run_dir: str | Path) -> dict[str, str]:
    """What is asked for, with the mark of its being asked for this time."""
    found = {}
    for request in REQUESTS:
        with contextlib.suppress(FileNotFoundError):
            found[request] = (Path(run_dir) / "requests" / request).read_text()
    return found


def clear_requests(run_dir: str | Path, done: Collection[str]) -> None:
    """Remove those whose marks are among `done`; one that is asked for again meanwhile stays."""
    folder = Path(run_dir) / "requests"
    for request in REQUESTS:
        path, taken = folder / request, folder / f".{request}.taken"
        with contextlib.suppress(FileNotFoundError):
            if read_requests(run_dir).get(request) in done:
                path.replace(taken)
            if taken.read_text() in done:
                taken.unlink()
            else:  # asked for since it was read; or a kill came before it was put back
                taken.replace(path)
