"""A checkpoint written under one parallel layout is the same model and optimizer under every other."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from ranks import run_ranks
from tiny_trainer import named_parameters, start, tiny_config, update

from megatron_prorl.checkpoint.store import (
    latest_checkpoint,
    load_checkpoint,
    load_reference,
    prepare_run_dir,
    save_checkpoint,
    save_reference,
)
from megatron_prorl.errors import UserError
from megatron_prorl.policy.device import init_device, shutdown_device
from megatron_prorl.types import Progress

DP2 = {"ranks": 2}
LAYOUTS = {
    "TP2": {"ranks": 2, "tensor": 2},
    "PP2": {"ranks": 2, "pipeline": 2},
    "TP2 x PP2": {"ranks": 4, "tensor": 2, "pipeline": 2},
    "one rank": {"ranks": 1},
}
FP32 = {"dtype": "fp32", "distributed": True}
BF16 = {"dtype": "bf16", "distributed": True}
BF16_REPLICATED = {"dtype": "bf16", "distributed": False}


def train_and_save(run_dir: str, options: dict, hf: dict) -> None:
    """Three updates, then checkpoint step 1 and a reference."""
    _, chunks, optimizer = start(tiny_config(run_dir, **options), **hf)
    if torch.distributed.get_rank() == 0:
        prepare_run_dir(run_dir)
    torch.distributed.barrier()
    for seed in range(3):
        update(chunks, optimizer, seed)
    save_reference(run_dir, "reset-000", chunks)
    save_checkpoint(run_dir, chunks, optimizer, Progress(step=1), {})
    shutdown_device()


def load_and_save_again(run_dir: str, options: dict, hf: dict) -> dict[str, Any]:
    """Load the checkpoint and the reference into other weights, write step 2; what this rank then held."""
    _, chunks, optimizer = start(tiny_config(run_dir, **options), seed=9, **hf)
    load_checkpoint(latest_checkpoint(run_dir), chunks, optimizer)
    assert {group["step"] for group in optimizer.param_groups} == {3}
    save_checkpoint(run_dir, chunks, optimizer, Progress(step=2), {})
    found = {name: param.detach().clone() for name, param in named_parameters(chunks)}
    for _, param in named_parameters(chunks):
        param.data.zero_()
    load_reference(run_dir, "reset-000", chunks)
    assert all(torch.equal(param, found[name]) for name, param in named_parameters(chunks))
    answer = {
        "tensor_rank": parallel_state.get_tensor_model_parallel_rank(),
        "parameters": {name: value.float().numpy() for name, value in found.items()},
    }
    shutdown_device()
    return answer


def shard_by_hand(name: str, full: torch.Tensor, rank: int) -> torch.Tensor:
    """Half number `rank` of a full parameter, by Megatron-Core's rules for tensor parallelism."""
    if "linear_fc1" in name:  # gate above up: each is halved
        gate, up = full.chunk(2)
        return torch.cat([gate.chunk(2)[rank], up.chunk(2)[rank]])
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return full.chunk(2, dim=1)[rank]
    if "linear_qkv" in name or "embedding" in name or "output_layer" in name:
        return full.chunk(2)[rank]
    return full


def full_parameter(name: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """A parameter out of a checkpoint, which stacks the layers and names norms as Transformer Engine fuses them."""
    name = name.replace(".input_layernorm.", ".self_attention.linear_qkv.layer_norm_")
    name = name.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        return tensors[".".join([*parts[:2], *parts[3:]])][int(parts[2])]
    return tensors[name]


def plain_tensors(path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint in full, read by Megatron-Core itself in this process."""
    from megatron.core.dist_checkpointing import load_plain_tensors

    init_device(tiny_config("unused"))
    try:
        return {key: value for key, value in load_plain_tensors(str(path)).items() if isinstance(value, torch.Tensor)}
    finally:
        shutdown_device()


def assert_checkpoints_equal(run_dir: Path) -> dict[str, torch.Tensor]:
    first, second = (plain_tensors(run_dir / "checkpoints" / f"step-00000{step}") for step in (1, 2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    return first


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        (FP32, "TP2"),
        (FP32, "PP2"),
        (BF16, "TP2 x PP2"),
        (BF16, "one rank"),
        (BF16_REPLICATED, "TP2 x PP2"),
    ],
)
def test_weights_and_moments_of_two_data_ranks_load_exactly_elsewhere(tmp_path, kind, layout):
    options = LAYOUTS[layout]
    run_ranks(2, train_and_save, str(tmp_path), DP2 | kind, {})
    answers = run_ranks(options["ranks"], load_and_save_again, str(tmp_path), options | kind, {})
    first = assert_checkpoints_equal(tmp_path)
    moments = [key for key in first if key.startswith(("optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq."))]
    assert len(moments) == 2 * len([key for key in first if not key.startswith("optimizer.")])
    assert all(first[key].any() for key in moments)
    seen = set()
    for answer in answers:
        for name, value in answer["parameters"].items():
            full = full_parameter(name, first)
            expected = shard_by_hand(name, full, answer["tensor_rank"]) if options.get("tensor") == 2 else full
            assert torch.equal(torch.from_numpy(value), expected.float()), name
            seen.add(name)
    assert len(seen) == 3 + 7 * 4  # embedding, head, last norm; seven parameters in each of four layers


def test_tied_embeddings_move_between_one_stage_and_two(tmp_path):
    tied = {"tie_word_embeddings": True}
    run_ranks(2, train_and_save, str(tmp_path), DP2, tied)
    answers = run_ranks(2, load_and_save_again, str(tmp_path), LAYOUTS["PP2"], tied)
    expected = assert_checkpoints_equal(tmp_path)["embedding.word_embeddings.weight"]
    assert torch.equal(torch.from_numpy(answers[0]["parameters"]["embedding.word_embeddings.weight"]), expected)
    assert torch.equal(torch.from_numpy(answers[1]["parameters"]["output_layer.weight"]), expected)


def fail_on_rank(run_dir: str, failing_rank: int) -> str:
    """Save while one rank's files cannot grow; what this rank was told."""
    _, chunks, optimizer = start(tiny_config(run_dir, **DP2))
    if torch.distributed.get_rank() == 0:
        prepare_run_dir(run_dir)
    torch.distributed.barrier()
    save_checkpoint(run_dir, chunks, optimizer, Progress(step=1), {})
    if torch.distributed.get_rank() == failing_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    with pytest.raises(UserError) as error:
        save_checkpoint(run_dir, chunks, optimizer, Progress(step=2), {})
    shutdown_device()
    return str(error.value)


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_a_disk_that_fails_one_rank_is_an_error_on_all_and_nobody_hangs(tmp_path, failing_rank):
    messages = run_ranks(2, fail_on_rank, str(tmp_path), failing_rank, timeout_seconds=60)
    assert all("step-000002: File too large" in message for message in messages)
    assert os.listdir(tmp_path / "checkpoints") == ["step-000001"]
