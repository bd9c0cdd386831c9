"""A stage of the plan as a configuration of its own: the file's options with the stage's on top."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from megatron_prorl.config.load import ConfigError, describe, set_option
from megatron_prorl.config.schema import Config

# What a stage may set. The rest is one for the whole run: its model, layout, problems and what is held out of them.
SETTABLE = ("algorithm", "batching", "guards", "optimizer", "reset", "rollout", "tasks", "validation", "verifier")
FIXED = ("optimizer.distributed", "rollout.engines.count")
_SETTABLE_TEXT = f"{', '.join(f'{name}.*' for name in SETTABLE)} (but {', '.join(FIXED)}), data.tasks.<i>.weight and \
data.sources.<i>.weight"


def stage_config(cfg: Config, stage: int) -> Config:
    """The configuration in force in stage `stage`; `cfg` itself where there is no plan.

    Options are relative to the file's own, not to the stage before. Raises ConfigError, a line for each option.
    """
    if not cfg.stages:
        return cfg
    document = cfg.model_dump()
    document["stages"] = []  # or this would be asked for each stage again
    for key, value in cfg.stages[stage].options.items():
        where = f"stages.{stage}.options.{key}"
        if not _is_settable(key):
            raise ConfigError([f"{where}: no option that a stage may set; those are {_SETTABLE_TEXT}"])
        set_option(document, key, value, where)
    try:
        found = Config.model_validate(document, strict=True)
    except ValidationError as error:
        problems = [problem for detail in error.errors() for problem in describe(detail)]
        raise ConfigError([f"stages.{stage}.options: {problem}" for problem in problems]) from None
    return found.model_copy(update={"stages": cfg.stages})


def ended_by(cfg: Config, progress: Mapping[str, Any]) -> str:
    """Why nothing is left to train after a checkpoint with this progress; empty if something is."""
    if cfg.stages and progress.get("stage", 0) >= len(cfg.stages):
        return f"all {len(cfg.stages)} stages are done; add one in a branch to go on (prorl branch)"
    if progress["step"] >= cfg.steps:
        return f"step {progress['step']} of {cfg.steps} is done; raise steps to go on"
    return ""


def _is_settable(key: str) -> bool:
    *parents, last = key.split(".")
    if parents[:1] == ["data"]:
        return last == "weight"
    return bool(parents) and parents[0] in SETTABLE and not any(f"{key}.".startswith(f"{name}.") for name in FIXED)
