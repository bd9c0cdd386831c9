"""A run again from its recorded rollouts: the same updates, resets and checkpoints, without engines and verifiers.

On one layout and kind of machine training is deterministic, so the replay ends with the run's own weights and optimizer
to the bit, however often either was interrupted. That is what `prorl replay` tells.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_prorl import comm
from megatron_prorl.algo.decide import BY_HAND
from megatron_prorl.checkpoint.folders import committed_checkpoints, latest_checkpoint, read_state
from megatron_prorl.checkpoint.stream import CheckpointReader
from megatron_prorl.config.load import load_config
from megatron_prorl.config.schema import Config
from megatron_prorl.errors import RunStopped, UserError
from megatron_prorl.policy.device import Device
from megatron_prorl.policy.policy import Policy
from megatron_prorl.run import Run
from megatron_prorl.tracking.lineage import read_lineage
from megatron_prorl.tracking.metrics import read_metrics
from megatron_prorl.tracking.rollouts import read_rollouts
from megatron_prorl.train import run
from megatron_prorl.types import Collected, Completion, Event, Group, Problem, Rollout, Verdict

# What a replay finds anew, or has none of.
RECOMPUTED = ("policy/", "mismatch/", "correction/", "sync/", "time", "reset/", "stage", "step")


HARMLESS = ("steps ", "stall_seconds", "tracking", "rollout.engines", "verifier.workers")  # to what a run computes


def replay_config(recorded: str | Path, out: str | Path) -> Config:
    """The configuration of the run in `recorded`, with `out` as its run directory and as many steps as it has done.

    Raises UserError for a folder that is no run's, or that lacks the rollouts of a step.
    """
    recorded = Path(recorded)
    if not (recorded / "config.yaml").is_file():
        raise UserError(f"{recorded}: no run directory; give the run_dir of a run's configuration")
    if Path(out).resolve() == recorded.resolve():
        raise UserError(f"{out}: is the run itself; give another folder to replay it in")
    changes = [text for event in read_lineage(recorded) if event["event"] == "config" for text in event["changed"]]
    if odd := [text for text in changes if not text.startswith(HARMLESS)]:
        raise UserError(f"{recorded}: went on with other options, which a replay does not know of: {'; '.join(odd)}")
    checkpoint = latest_checkpoint(recorded)
    if not checkpoint:
        raise UserError(f"{recorded}: no checkpoint yet, so there is nothing to compare a replay with")
    steps = read_state(checkpoint)["progress"]["step"]
    if not (recorded / "rollouts" / "step-000001.parquet").is_file():
        raise UserError(f"{recorded}: its first step's rollouts are elsewhere; replay the run that it branched from")
    return load_config(recorded / "config.yaml", [f"run_dir={json.dumps(str(out))}", f"steps={steps}"])


class Differs(UserError):
    """The replay did not end as the run did."""

    exit_code = 1


def replay(recorded: str | Path, cfg: Config) -> None:
    """Train in `cfg.run_dir` on what the run in `recorded` recorded, or go on with that, and compare. Collective.

    Prints a line for every checkpoint that both have. Raises Differs if one is not the same to the bit.
    """

    class Replay(_Replay):
        source = Path(recorded)

    with suppress(RunStopped):  # as the run itself was
        run(cfg, Replay)
    if os.environ.get("RANK", "0") != "0":
        return
    theirs = {path.name: path for path in committed_checkpoints(recorded)}
    common = [path for path in committed_checkpoints(cfg.run_dir) if path.name in theirs]
    if not common:
        raise UserError(f"{recorded} and {cfg.run_dir} have no checkpoint of the same step to compare")
    newest = max(theirs)
    odd = []
    for path in common:
        different = list(differing(path, theirs[path.name]))
        odd += [path.name] if different else []
        shown = f"{len(different)} values differ: {', '.join(different[:3])}" if different else "identical"
        print(f"{path.name}: {shown}", flush=True)
    if odd:
        raise Differs(f"{cfg.run_dir} is not what {recorded} became: {odd[0]} is the first checkpoint that differs")
    if newest not in {path.name for path in common}:
        raise Differs(
            f"{cfg.run_dir} ended before {newest}, with which {recorded} goes on: {common[-1].name} is its last"
        )


def differing(first: Path, second: Path) -> Iterator[str]:
    """Names of the tensors, and of the values in `progress`, that differ in two checkpoints."""
    readers = [CheckpointReader(folder) for folder in (first, second)]
    entries = [reader.tensors for reader in readers]
    yield from sorted(entries[0].keys() ^ entries[1].keys())
    for key in sorted(entries[0].keys() & entries[1].keys()):
        values = []
        for reader, found in zip(readers, entries, strict=True):
            values.append(torch.empty(found[key].size, dtype=found[key].properties.dtype))
            reader.read(key, (0,) * len(found[key].size), values[-1])
        if not torch.equal(*(value.contiguous().view(torch.uint8) for value in values)):
            yield key
    states = [read_state(folder)["progress"] for folder in (first, second)]
    yield from (f"progress.{key}" for key in states[0] if json.dumps(states[0][key]) != json.dumps(states[1].get(key)))


class _Replay(Run):
    """A run whose collections, validations and requests are those that another has recorded."""

    source: Path

    def _start(self, stack: ExitStack, device: Device, checkpoint: Path | None) -> None:
        self.policy = Policy(self.cfg, device)
        self._load(checkpoint)

    def collect(self) -> Collected:
        step = self.progress.step + 1
        with self.timer("collect"):
            kept, dropped = [], []
            for group, reason in _read_groups(self.source, step):
                dropped.append((group, reason)) if reason else kept.append(group)
            last = max((group.draw for group in kept + [group for group, _ in dropped]), default=-1)
            return Collected(
                kept=kept,
                dropped_groups=dropped if comm.is_rank_zero() else [],
                next_draw=max(last + 1, self.progress.next_draw),
                metrics={k: v for k, v in self._row(step).items() if not k.startswith("validation/")},
            )

    def sync(self) -> dict[str, float]:
        return {}

    def validate(self) -> dict[str, float]:
        return {k: v for k, v in self._row(self.progress.step).items() if k.startswith("validation/")}

    def validation_due(self) -> bool:
        return any(key.startswith("validation/") for key in self._row(self.progress.step))

    def requests(self) -> dict[str, str]:
        return {event["event"]: event["request"] for event in self._events() if event.get("trigger") == BY_HAND}

    def checkpoint_due(self) -> bool:
        """Also where the run had one that it went back to, because it was told to end then, say."""
        return super().checkpoint_due() or self.progress.step in {gone_back_to(event) for event in self._lineage}

    def _newest_sound(self, wanted: Callable[[int], bool]) -> Path | None:
        """That which the run went back to: what else was on its disk then is not known."""
        steps = [gone_back_to(event) for event in self._events()]
        return super()._newest_sound(lambda step: step in steps)

    def _best(self) -> int | None:
        return next((event["weights_of_step"] for event in self._events() if "weights_of_step" in event), None)

    def _events(self) -> list[Event]:
        return [event for event in self._lineage if event["step"] == self.progress.step]

    @cached_property
    def _lineage(self) -> list[Event]:
        return read_lineage(self.source)

    def _row(self, step: int) -> dict[str, float]:
        if step not in self._rows:
            raise UserError(f"{self.source}: metrics.jsonl has no row of step {step}, so it cannot be replayed")
        row = self._rows[step]
        return {key: value for key, value in row.items() if not key.startswith(RECOMPUTED)}

    @cached_property
    def _rows(self) -> dict[int, dict[str, float]]:
        return {int(row["step"]): row for row in read_metrics(self.source)}


def gone_back_to(event: Event) -> int | None:
    """The step of the checkpoint whose weights an event took."""
    found: int | None = event.get("to_step", event.get("weights_of_step"))
    return found


def _read_groups(run_dir: Path, step: int) -> Iterator[tuple[Group, str]]:
    """The groups of a step's ledger, in the order of their draws, each with the reason why it was dropped, or ""."""
    try:
        rows = read_rollouts(run_dir, step).to_pylist()
    except FileNotFoundError:
        raise UserError(f"{run_dir}: the rollouts of step {step} are missing, so it cannot be replayed") from None
    rows.sort(key=lambda row: (row["draw"], row["rollout"] or 0))
    for draw, of_draw in groupby(rows, key=lambda row: row["draw"]):
        of_group: list[dict[str, Any]] = list(of_draw)
        first = of_group[0]
        problem = Problem(
            id=first["problem_id"],
            domain=first["domain"],
            task=first["task"],
            messages=json.loads(first["messages"]),
            verification=json.loads(first["verification"]),
            source="ledger",
        )
        rollouts = [
            Rollout(
                completion=Completion(
                    token_ids=np.array(row["response_token_ids"], np.int32),
                    sampler_logprobs=np.array(row["sampler_logprobs"], np.float32),
                    finish_reason=row["finish_reason"],
                    weight_version=row["weight_version"],
                ),
                text=row["text"],
                verdict=Verdict(score=row["reward"], reason=row["reason"]),
            )
            for row in of_group
            if row["rollout"] is not None
        ]
        group = Group(draw=draw, problem=problem, prompt_token_ids=first["prompt_token_ids"], rollouts=rollouts)
        yield group, first["drop_reason"]
