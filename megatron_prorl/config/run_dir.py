"""The configuration and problems a run directory was made with: kept beside it, and compared when the run goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_prorl.config.hf import hf_folder, other_model_files
from megatron_prorl.config.load import ConfigError, dump_config, load_config, read_yaml
from megatron_prorl.config.schema import Config
from megatron_prorl.errors import UserError
from megatron_prorl.files import replace_file

# What a resumed run may change: none of these alters what is learned from which data, but for what a person decides
# about resets and guards while a run goes on. The layout may change because checkpoints reshard on load.
MAY_CHANGE = (
    "run_dir",
    "steps",
    "parallel",
    "batching",
    "checkpoint",
    "tracking",
    "stall_seconds",
    "model.recompute",
    "rollout.engines",
    "verifier.workers",
    "reset",
    "guards",
)


def check_run_dir(cfg: Config) -> list[str]:
    """What differs from the configuration with which `cfg.run_dir` got its checkpoints, as "key was ..., is ...".

    Raises ConfigError, naming what, where that may not differ, or where the model's config, tokenizer or chat template
    is no longer that which the run keeps in `hf`.
    """
    run_dir = Path(cfg.run_dir)
    recorded = run_dir / "config.yaml"
    if not recorded.is_file() or not has_begun(run_dir):
        return []
    different = differences(_completed(read_yaml(recorded)), cfg.model_dump())
    changed = {key: f"{key} was {was}, is {now}" for key, (was, now) in different.items() if key != "run_dir"}
    if refused := [text for key, text in changed.items() if not _may_change(key)]:
        raise ConfigError(
            [
                f"run_dir: {run_dir} was made with another configuration: {'; '.join(refused)}; "
                "use a new run_dir, put it back, or change it in a branch (prorl branch)"
            ]
        )
    if others := _other_model_files(cfg):
        raise ConfigError(
            [
                f"run_dir: {run_dir} was made with another model or tokenizer: {', '.join(others)} of {cfg.model.path} "
                "changed since; use a new run_dir or put it back"
            ]
        )
    return list(changed.values())


def _other_model_files(cfg: Config) -> list[str]:
    kept, now = Path(cfg.run_dir) / "hf", hf_folder(cfg.model.path)
    return other_model_files(kept, now) if kept.is_dir() and now.is_dir() else []


def differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The dotted options that differ in two configurations, each with both values; "absent" where there is none."""
    old, new = _flatten(before), _flatten(now)
    both = {key: (old.get(key, "absent"), new.get(key, "absent")) for key in sorted(old.keys() | new.keys())}
    return {key: (one, other) for key, (one, other) in both.items() if one != other}


def _completed(recorded: dict[str, Any]) -> dict[str, Any]:
    """With the defaults of options that came after it was recorded: by default a new option changes nothing."""
    try:
        return Config.model_validate(recorded, strict=True).model_dump()
    except ValidationError:  # it has options that are gone
        return recorded


def run_config(run_dir: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of the run in `run_dir`, with `overrides` on top. Raises UserError for a folder of no run."""
    recorded = Path(run_dir) / "config.yaml"
    if not recorded.is_file():
        raise UserError(f"{run_dir}: no run directory; give the run_dir of a run's configuration")
    return load_config(recorded, overrides)


def record_config(cfg: Config) -> None:
    """Write `config.yaml` to the run directory, by rename."""
    _write(Path(cfg.run_dir) / "config.yaml", dump_config(cfg))


def check_data(cfg: Config, digests: dict[str, str]) -> None:
    """Write the problem files' digests, by path, to `data.json` of the run directory.

    Raises ConfigError, naming the files, when it holds checkpoints of a run in which they had other problems.
    """
    run_dir = Path(cfg.run_dir)
    target = run_dir / "data.json"
    recorded = read_yaml(target) if target.is_file() and has_begun(run_dir) else {}
    changed = [path for path, digest in sorted(digests.items()) if recorded.get(path, digest) != digest]
    if changed:
        raise ConfigError(
            [
                f"run_dir: {run_dir} was made with other problems: {', '.join(changed)} changed since; "
                "use a new run_dir or put it back"
            ]
        )
    _write(target, json.dumps(digests, indent=2) + "\n")


def has_begun(run_dir: Path) -> bool:
    """Whether the run has a checkpoint, be it one that was set aside and that a person may put back."""
    found = (run_dir / "checkpoints").glob("*step-*")
    return any(not path.name.startswith(".tmp-") for path in found)


def _write(target: Path, text: str) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_file(target, text)
    except OSError as error:
        raise ConfigError([f"run_dir: cannot write {target}: {(error.strerror or str(error)).lower()}"]) from None


def _may_change(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in MAY_CHANGE)


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key to leaf; an empty mapping or list is a leaf."""
    if not isinstance(tree, dict | list) or not tree:
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {
        key: leaf
        for name, child in items
        for key, leaf in _flatten(child, f"{prefix}.{name}" if prefix else str(name)).items()
    }
