"""The device, the process group and Megatron's parallel layout of this process."""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
from megatron.core import parallel_state, tensor_parallel

from megatron_prorl.config.schema import Config
from megatron_prorl.errors import UserError
from megatron_prorl.policy.cpu import enable_cpu_megatron

# A rank may be minutes behind the others in loading a model or writing a checkpoint.
# Waiting for rollouts has a group of its own, see `comm.py`.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
NAMING_TIME = timedelta(minutes=10)  # after which a stall has been named (stalls.py), which a timeout would not be


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Where this process computes, and which of the trainer's processes it is."""

    kind: Literal["cuda", "cpu"]
    torch_device: torch.device
    rank: int
    world_size: int


def init_device(cfg: Config) -> Device:
    """Join the process group and lay out Megatron's parallel groups.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as torchrun sets them; without RANK this is the only
    process. Raises UserError for a layout or a device that this machine cannot give.
    """
    kind = _resolve_kind(cfg)
    timeout = max(COLLECTIVE_TIMEOUT, timedelta(seconds=cfg.stall_seconds) + NAMING_TIME)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    _check_machine(cfg, kind, world_size)

    if kind == "cuda":
        torch_device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(torch_device)
    else:
        torch_device = torch.device("cpu")
        enable_cpu_megatron()
    backend = "nccl" if kind == "cuda" else "gloo"
    if "RANK" in os.environ:
        torch.distributed.init_process_group(backend, timeout=timeout)
    else:  # a store inside the process: no port, so any number of single processes can share a machine
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=cfg.parallel.tensor,
        pipeline_model_parallel_size=cfg.parallel.pipeline,
        context_parallel_size=cfg.parallel.context,
        expert_model_parallel_size=cfg.parallel.expert,
        distributed_timeout_minutes=math.ceil(timeout.total_seconds() / 60),
        create_gloo_process_groups=False,  # CPU twins of the groups, for checkpoint formats not used here
    )
    tensor_parallel.model_parallel_cuda_manual_seed(cfg.seed, force_reset_rng=True)
    return Device(kind=kind, torch_device=torch_device, rank=rank, world_size=world_size)


def shutdown_device() -> None:
    """Leave Megatron's groups and the process group, so that `init_device` can be called again."""
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def layer_implementation(cfg: Config, kind: str) -> Literal["local", "transformer_engine"]:
    """`model.layers` with "auto" resolved: Transformer Engine on CUDA, Megatron's own layers on the CPU."""
    if cfg.model.layers != "auto":
        return cfg.model.layers
    return "transformer_engine" if kind == "cuda" else "local"


def _resolve_kind(cfg: Config) -> Literal["cuda", "cpu"]:
    available = torch.cuda.is_available()
    if cfg.device == "cuda" and not available:
        raise UserError("device: cuda, but torch sees no CUDA device; check the driver or set it to cpu")
    if cfg.device == "auto":
        return "cuda" if available else "cpu"
    return cfg.device


def _check_machine(cfg: Config, kind: str, world_size: int) -> None:
    """What the config alone could not tell: the processes, the GPUs and the packages that are really there."""
    parallel, model = cfg.parallel, cfg.model
    if world_size != parallel.world_size:
        raise UserError(
            f"parallel: nodes*ranks_per_node = {parallel.nodes}*{parallel.ranks_per_node} = {parallel.world_size}, "
            f"but the launcher started {world_size}; make them equal"
        )
    if kind == "cuda" and parallel.ranks_per_node > torch.cuda.device_count():
        raise UserError(
            f"parallel.ranks_per_node: {parallel.ranks_per_node} ranks, but this node shows "
            f"{torch.cuda.device_count()} GPUs; start one rank a GPU"
        )
    if layer_implementation(cfg, kind) == "transformer_engine":
        if kind == "cpu":
            raise UserError("model.layers: transformer_engine needs CUDA, which this machine lacks; set it to local")
        if importlib.util.find_spec("transformer_engine") is None:
            raise UserError("model.layers: Transformer Engine is not installed; install it or set them to local")
        return
    if model.fp8 != "none":
        raise UserError(f"model.fp8: {model.fp8} needs Transformer Engine on CUDA; set it to none here")
