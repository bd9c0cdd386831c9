"""What a run is said to need of the disk is what it writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from tiny_trainer import HF, rebuild, tiny_config, update

from megatron_prorl.checkpoint.store import prepare_run_dir, save_checkpoint, save_reference
from megatron_prorl.config.schema import CheckpointConfig, Config, ResetConfig, StageConfig
from megatron_prorl.launch.footprint import footprint, size
from megatron_prorl.policy.device import Device, init_device, shutdown_device
from megatron_prorl.types import Progress


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    yield init_device(tiny_config("unused"))
    shutdown_device()


def config(folder: Path, dtype: Literal["fp32", "bf16"] = "bf16", **changes: Any) -> Config:
    """Of a model of two million parameters, whose tensors outweigh what describes them."""
    (folder / "config.json").write_text(json.dumps(HF | {"hidden_size": 256, "head_dim": 64}))
    cfg = tiny_config(folder / "run", dtype=dtype)
    return cfg.model_copy(update={"model": cfg.model.model_copy(update={"path": str(folder)})} | changes)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_checkpoint_and_a_reference_are_as_large_as_said(
    device: Device, tmp_path: Path, dtype: Literal["fp32", "bf16"]
) -> None:
    cfg = config(tmp_path, dtype)
    needs = footprint(cfg)
    assert needs
    chunks, optimizer = rebuild(cfg, device, hidden_size=256, head_dim=64)
    update(chunks, optimizer, 0)
    prepare_run_dir(cfg.run_dir)
    for folder, expected in (
        (save_checkpoint(cfg.run_dir, chunks, optimizer, Progress(step=1), {}), needs.checkpoint_bytes),
        (save_reference(cfg.run_dir, "reset-000", chunks), needs.weights_bytes),
    ):
        written = sum(path.stat().st_size for path in folder.rglob("*"))
        assert expected < written < 1.1 * expected  # names, metadata, random state


def test_what_stays_is_the_newest_the_best_those_of_resets_and_every_nth(tmp_path: Path) -> None:
    changes = {"steps": 1000, "reset": ResetConfig(every_steps=300), "checkpoint": CheckpointConfig(keep=2)}
    needs = footprint(config(tmp_path, **changes))
    assert needs and (needs.num_checkpoints, needs.num_references) == (2 + 1 + 1 + 3, 4)
    assert needs.describe() == f"7 checkpoints of {size(needs.checkpoint_bytes)}, 4 references"
    assert needs.least_bytes == 3 * needs.checkpoint_bytes + needs.weights_bytes
    changes["checkpoint"] = CheckpointConfig(keep=2, keep_every_steps=100)
    changes["stages"] = [StageConfig(name="a", steps=3), StageConfig(name="b", reset="keep")]
    needs = footprint(config(tmp_path, **changes))
    assert needs and (needs.num_checkpoints, needs.num_references) == (2 + 1 + 1 + 3 + 10 + 1, 5)


def test_without_a_model_nothing_is_said(tmp_path: Path) -> None:
    assert footprint(tiny_config(tmp_path)) is None
