"""A run that begins at a checkpoint of another one, with other options; and the end of a run directory. No torch here.

The branch has the checkpoint, its reference and the metrics so far; the rollouts so far stay with the parent.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from megatron_prorl.algo.decide import best_step
from megatron_prorl.checkpoint.folders import (
    COMMITTED,
    LOCK,
    STATE,
    TEMPORARY,
    begin,
    checkpoint_folder,
    commit,
    committed_checkpoints,
    discard,
    is_committed,
    publish,
    read_state,
    reference_folder,
    step_of,
    verify_digests,
)
from megatron_prorl.checkpoint.lock import only_writer
from megatron_prorl.config.hf import hf_folder, important, other_model_files
from megatron_prorl.config.load import ConfigError, dump_config
from megatron_prorl.config.run_dir import differences, run_config
from megatron_prorl.config.schema import Config, DataConfig
from megatron_prorl.config.stages import stage_config
from megatron_prorl.data.order import Mixture
from megatron_prorl.errors import UserError
from megatron_prorl.files import replace_file
from megatron_prorl.tracking.lineage import BRANCHES, LINEAGE_FILE, describe_changes, read_branches, read_lineage
from megatron_prorl.tracking.metrics import METRICS_FILE
from megatron_prorl.tracking.rows import read_rows
from megatron_prorl.types import Event, Progress

# How the checkpoint is written, so that another value could not read it.
FIXED = ("optimizer.distributed", "model.dtype")


def branch_config(run_dir: str | Path, new_dir: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The run's configuration with `overrides` and `new_dir` as its run directory.

    Raises UserError for a folder that is no run's, and for options that cannot be others in a branch.
    """
    parent = run_config(run_dir)
    if any(override.partition("=")[0] == "run_dir" for override in overrides):
        raise ConfigError(["run_dir: is that of the branch already; leave it out"])
    cfg = run_config(run_dir, [*overrides, f"run_dir={json.dumps(str(new_dir))}"])
    changed = differences(parent.model_dump(), cfg.model_dump())
    problems = [
        f"{key}: is {was} in {run_dir}, and its checkpoints cannot be read with {now}; leave it as it is"
        for key, (was, now) in changed.items()
        if key in FIXED
    ]
    if "model.path" in changed:
        problems += _model_problems(Path(run_dir) / "hf", cfg)
    if problems:
        raise ConfigError(problems)
    return cfg


def _model_problems(before: Path, cfg: Config) -> list[str]:
    """How the model differs from that whose files the parent has kept, but for its weights."""
    now = hf_folder(cfg.model.path)
    if not (before / "config.json").is_file() or not (now / "config.json").is_file():
        return [f"model.path: cannot compare {now} with the run's model; leave it as it is"]
    old, new = (json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (before, now))
    if keys := list(differences(important(old), important(new))):
        return [f"model.path: {now} is another model than the run's ({', '.join(keys[:3])}); leave it as it is"]
    if others := other_model_files(before, now):
        named = ", ".join(others)
        return [f"model.path: {now} has another tokenizer or chat template than the run's ({named}); leave it as it is"]
    return []


def branch(run_dir: str | Path, cfg: Config, start: str = "") -> str:
    """Make `cfg.run_dir` a run directory that begins at a checkpoint of the run in `run_dir`; says so in words.

    `start` is "reset-<number>", "step-<number>" or empty for the newest checkpoint; `cfg` is of `branch_config`.
    Files are hard-linked, or copied where the file system cannot. The folder appears complete or not at all. The parent
    may train meanwhile. Raises UserError if there is no such checkpoint, if it is damaged, or if the folder is there.
    """
    parent, new_dir = Path(run_dir).resolve(), Path(cfg.run_dir).absolute()
    _check_new(new_dir)
    checkpoint, name = _find(parent, start)
    before = run_config(parent)
    progress = _carried_over(Progress(**read_state(checkpoint)["progress"]), before, cfg)
    _check_goes_on(progress, cfg, name)
    changed = {k: v for k, v in differences(before.model_dump(), cfg.model_dump()).items() if k != "run_dir"}
    event: Event = {"step": progress.step, "from": name, "changed": changed, "id": uuid.uuid4().hex[:12]}
    event["time"] = round(time.time(), 3)
    same_problems = not any(
        key == "seed" or (key.startswith("data.") and not key.endswith(".weight")) for key in changed
    )  # or others may be held out, and scores do not compare
    begin_anew: Event = {"event": "branch", "step": progress.step, "scores_compare": same_problems}
    progress = replace(progress, events=[*progress.events, begin_anew])

    record = parent / BRANCHES / f"{event['id']}.json"
    unfinished = branch_event(_temporary(new_dir))  # of a process that was killed: `begin` removes it
    try:
        draft = begin(new_dir, 0)
        _remove_record(unfinished)
        linked = _take_checkpoints(parent, checkpoint, draft, progress, cfg)
        _take_small_files(parent, draft, progress.step, same_data=not any(key.startswith("data.") for key in changed))
        (draft / "config.yaml").write_text(dump_config(cfg), encoding="utf-8")
        _write_row(draft / LINEAGE_FILE, {"event": "branch", "parent": str(parent)} | event)
        record.parent.mkdir(exist_ok=True)
        _write_row(record, {"event": "branched", "run": str(new_dir)} | event)  # first: no branch is without one
        publish(new_dir)
    except BaseException as error:
        record.unlink(missing_ok=True)
        discard(new_dir)
        if isinstance(error, OSError):
            reason = os.strerror(error.errno or 0).lower()
            raise UserError(f"{new_dir}: cannot make it: {error.filename or 'the disk'}: {reason}") from None
        raise
    how = "linked" if linked else "copied"
    changes = describe_changes(event)
    told = f"{cfg.run_dir} begins at {name} (step {progress.step}) of {run_dir}, its files {how}: {changes}"
    if not same_problems:
        told += "\nother problems may be held out than before: scores do not compare, and some may have been trained on"
    return told


def delete(run_dir: str | Path) -> str:
    """Remove a run directory; says so in words.

    Raises UserError for a folder that is no run's, in which a process trains, or from which others branch: also where
    a branch is not found, which may be moved or on a disk that is not there now.
    """
    folder = Path(run_dir).resolve()
    run_config(run_dir)
    # One whose making or deletion was interrupted is in its temporary folder.
    branches = [event for event in read_branches(folder) if not _is(event, _temporary(Path(event["run"])))]
    if there := [event for event in branches if _is(event, Path(event["run"]))]:
        named = ", ".join(f"{event['run']} (at {event['from']})" for event in there)
        raise UserError(f"{run_dir}: is where {named} branched off; delete those first")
    if branches:
        named = ", ".join(f"{event['run']} (at {event['from']})" for event in branches)
        records = ", ".join(str(folder / BRANCHES / f"{event['id']}.json") for event in branches)
        raise UserError(
            f"{run_dir}: is where {named} branched off, which is not there now: delete it first where it was moved to, "
            f"or mount its disk; where it is gone for good, remove {records}"
        )
    with only_writer(folder):
        own, doomed = branch_event(folder), _temporary(folder)
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)  # first, so that a half-removed folder never looks like a run
        _remove_record(own)
        shutil.rmtree(doomed)
    return f"deleted {run_dir}"


def _is(event: Event, run_dir: Path) -> bool:
    """Whether the folder is that of the branch; one that cannot be looked into is not."""
    try:
        return bool(branch_event(run_dir).get("id") == event["id"])
    except OSError:  # a network file system that is gone
        return False


def _temporary(run_dir: Path) -> Path:
    return run_dir.with_name(TEMPORARY + run_dir.name)


def _remove_record(own: Event) -> None:
    """Of a branch that is no more, from the run that it came from."""
    if own:
        (Path(own["parent"]) / BRANCHES / f"{own['id']}.json").unlink(missing_ok=True)


def branch_event(run_dir: str | Path) -> Event:
    """With what a run that branched from another began; {} for one that did not, or that is gone."""
    first = next(iter(read_lineage(run_dir)), {})
    return first if first.get("event") == "branch" else {}


def _check_new(new_dir: Path) -> None:
    if new_dir.is_dir() and not any(new_dir.iterdir()):
        return  # which a rename replaces
    if new_dir.exists():
        raise UserError(f"{new_dir}: is there already; give another folder for the branch")


def _find(run_dir: Path, start: str) -> tuple[Path, str]:
    """The checkpoint that `start` means, and its name: "reset-003" or "step-000500"."""
    found = {step_of(path): path for path in committed_checkpoints(run_dir)}
    if not found:
        raise UserError(f"{run_dir}: no checkpoint yet, so there is nothing to branch from")
    events = read_state(found[max(found)])["progress"]["events"]
    resets = {event["number"]: event["step"] for event in events if "number" in event}
    names = {step: f"reset-{number:03d}" for number, step in resets.items()}
    if not start:
        return found[max(found)], names.get(max(found), found[max(found)].name)
    match = re.fullmatch(r"(reset|step)-(\d+)", start)
    if not match:
        raise UserError(f"--from {start}: expected reset-<number> or step-<number>, as in reset-3 or step-500")
    kind, number = match[1], int(match[2])
    step = resets.get(number, -1) if kind == "reset" else number
    if step not in found:
        there = [f"step-{at}" + (f" ({names[at]})" if at in names else "") for at in sorted(found)]
        raise UserError(f"--from {start}: {run_dir} has no such checkpoint; it has {', '.join(there)}")
    return found[step], names[step] if kind == "reset" else found[step].name


def _carried_over(progress: Progress, before: Config, cfg: Config) -> Progress:
    """The checkpoint's progress as it has to be under the branch's plan and mix.

    A plan that has the same stages up to the present one goes on there; another one begins at its first. In another
    mix, each task and source that was there goes on where it was.
    """
    old = _data_in(before, progress.stage)
    num_begun = min(progress.stage + 1, len(before.stages))  # one may be added to a plan that is done
    names = [[stage.name for stage in config.stages[:num_begun]] for config in (before, cfg)]
    if names[0] != names[1]:
        progress = replace(progress, stage=0, stage_start_step=progress.step)
    if (old, before.seed) == (_data_in(cfg, progress.stage), cfg.seed):
        return progress
    mixture = Mixture(old.weights, before.seed, progress.stage_start_draw, progress.source_counts)
    given = list(zip(_parts(before.data), mixture.counts(progress.next_draw), strict=True))
    counts = []
    for part in _parts(cfg.data):
        known = next((place for place, (name, _) in enumerate(given) if name == part), None)
        counts.append(0 if known is None else given.pop(known)[1])
    return replace(progress, source_counts=counts, stage_start_draw=progress.next_draw)


def _data_in(cfg: Config, stage: int) -> DataConfig:
    """The mix of a stage, or the file's own after the last and without any."""
    return stage_config(cfg, stage).data if stage < len(cfg.stages) else cfg.data


def _parts(data: DataConfig) -> list[str]:
    """What tells the tasks and sources apart, whatever their weights."""
    parts = [part.model_dump(exclude={"weight"}) for part in (*data.tasks, *data.sources)]
    return [json.dumps(part, sort_keys=True) for part in parts]


def _check_goes_on(progress: Progress, cfg: Config, name: str) -> None:
    if progress.step >= cfg.steps:
        raise ConfigError([f"steps: {name} is of step {progress.step}, and steps = {cfg.steps} ends there; raise it"])
    if cfg.stages and progress.stage >= len(cfg.stages):
        raise ConfigError([f"stages: all {len(cfg.stages)} are done at {name}; give the branch stages of its own"])


def _take_checkpoints(parent: Path, checkpoint: Path, draft: Path, progress: Progress, cfg: Config) -> bool:
    """The checkpoint, that with the best validation if resets go back to it, and their references; whether linked."""
    checkpoints, linked = [checkpoint], True
    of_stage = stage_config(cfg, progress.stage)
    best = best_step(progress, of_stage.reset.score) if of_stage.reset.target == "best" else None
    if best not in (None, progress.step) and is_committed(checkpoint_folder(parent, best)):
        checkpoints.append(checkpoint_folder(parent, best))
    for path in checkpoints:
        state = read_state(path)
        reference = reference_folder(parent, state["progress"]["reference"])
        target = reference_folder(draft, reference.name)
        if is_committed(reference) and not target.exists():
            linked &= _take_folder(reference, target, {})
        now = state | {"progress": asdict(progress)} if path == checkpoint else state
        texts = {} if now == state else {STATE: json.dumps(now, indent=1)}
        linked &= _take_folder(path, checkpoint_folder(draft, step_of(path)), texts)
    coefficient = of_stage.algorithm.kl.coefficient
    if coefficient > 0 and not reference_folder(draft, progress.reference).exists():
        raise UserError(
            f"algorithm.kl.coefficient: {coefficient:g} needs a reference, and {checkpoint} has none; set it to 0"
        )
    return linked


def _take_folder(source: Path, target: Path, texts: Mapping[str, str]) -> bool:
    """Link or copy a committed folder, with `texts` in place of the files so named; whether all could be linked."""
    if damaged := verify_digests(source):
        raise UserError(f"{source}: {', '.join(damaged[:4])} changed since written; branch from another checkpoint")
    digests = json.loads((source / COMMITTED).read_text()).get("crc32", {})
    temporary, linked = begin(target, 0), True
    for path in sorted(source.rglob("*")):
        name = str(path.relative_to(source))
        if path.is_dir() or name in (COMMITTED, LOCK):
            continue
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        if name in texts:
            (temporary / name).write_text(texts[name])
        else:
            linked &= _link(path, temporary / name)
    commit(target, {name: digest for name, digest in digests.items() if name not in texts})
    return linked


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise UserError(f"{source}: the run has just removed it; branch from a checkpoint that it keeps") from None
    except OSError:  # another file system, or one that has no links, or too many of them
        shutil.copyfile(source, target)
        return False
    return True


def _take_small_files(parent: Path, draft: Path, step: int, *, same_data: bool) -> None:
    if (parent / "hf").is_dir():
        shutil.copytree(parent / "hf", draft / "hf")
    if same_data and (parent / "data.json").is_file():
        shutil.copyfile(parent / "data.json", draft / "data.json")  # the problems have to be the same, too
    lines = [line for row, line in read_rows(parent / METRICS_FILE) if row["step"] <= step]
    (draft / METRICS_FILE).write_text("".join(lines), encoding="utf-8")


def _write_row(path: Path, row: Event) -> None:
    replace_file(path, json.dumps(row) + "\n")
