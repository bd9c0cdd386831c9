"""Where the converter puts parameters and looks for them is where Megatron-Core itself does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from policy_setup import tiny_config
from tiny_model import make_tiny_qwen

from megatron_prorl.config.hf import read_hf_config
from megatron_prorl.policy.device import init_device, shutdown_device
from megatron_prorl.policy.model import build_model
from megatron_prorl.weights.convert import hf_to_megatron
from megatron_prorl.weights.stored import extra_states, stored_parameters

MOE = {"num_experts": 4, "head_dim": 8}


def megatrons_own(folder: Path) -> tuple[dict[str, list[tuple[Any, ...]]], dict[str, Any]]:
    """Key, global shape, offset and shape of every part, by the parameter's name; and the objects by unique key."""
    cfg = tiny_config(folder)
    device = init_device(cfg)
    try:
        with torch.device("meta"):
            on_meta = replace(device, torch_device=torch.device("meta"))
            [model] = build_model(read_hf_config(folder), cfg, on_meta, trainable=False)
        state = model.sharded_state_dict()
    finally:
        shutdown_device()
    parts: dict[str, list[tuple[Any, ...]]] = {}
    objects = {}
    for name, entry in state.items():
        if isinstance(entry, ShardedObject):
            objects[entry.unique_key] = entry.data
            continue
        built = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
        parts[name] = [
            (part.key, tuple(part.global_shape), tuple(part.global_offset), tuple(part.local_shape)) for part in built
        ]
    return parts, objects


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("qwen2", {}),
        ("qwen2", {"tie_word_embeddings": True, "vocab_size": 128, "num_hidden_layers": 1}),
        ("qwen3", {"head_dim": 24, "num_key_value_heads": 1}),
        ("qwen3_moe", MOE),
        ("qwen3_moe", MOE | {"mlp_only_layers": [0, 2]}),
        ("qwen3_moe", MOE | {"decoder_sparse_step": 2, "num_hidden_layers": 3}),
        ("qwen3_moe", MOE | {"mlp_only_layers": [0, 1, 2, 3]}),
    ],
)
def test_parameters_lie_where_megatron_stores_them(tmp_path: Path, family: str, overrides: dict[str, Any]) -> None:
    folder = make_tiny_qwen(tmp_path, family, **overrides)
    hf = read_hf_config(folder)
    parts, objects = megatrons_own(folder)
    ours = {
        stored.row.megatron[0]: [
            (part.key, part.global_shape, (*part.lead, part.start, *(0,) * (len(stored.shape) - 1)),
             (part.rows, *stored.shape[1:]))
            for part in stored.parts
        ]
        for stored in stored_parameters(hf)
    }  # fmt: skip
    assert ours == parts
    assert {blob.key: blob.value for blob in extra_states(hf)} == {key: [value] for key, value in objects.items()}


def test_the_format_is_the_one_that_megatron_names(tmp_path: Path) -> None:
    save_config(CheckpointingConfig("torch_dist", 1), str(tmp_path))
    hf_to_megatron(make_tiny_qwen(tmp_path / "hf", num_hidden_layers=1), tmp_path / "megatron")
    ours, theirs = ((folder / "metadata.json").read_text() for folder in (tmp_path / "megatron", tmp_path))
    assert json.loads(ours) == json.loads(theirs)
