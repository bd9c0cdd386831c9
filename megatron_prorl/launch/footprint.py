"""What a run will need of disk and host memory, from its configuration and the model's config.json."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatron_prorl.config.hf import hf_folder, read_hf_config
from megatron_prorl.config.schema import Config
from megatron_prorl.errors import UserError
from megatron_prorl.weights.tables import hf_shapes

STATE_BYTES = 12  # of the optimizer for a parameter: main copy and two moments, float32
GRADIENT_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Sizes in bytes; numbers are those at the run's end, without what resets by validation or by hand add."""

    weights_bytes: int  # one copy of the model in its dtype
    num_parameters: int
    num_checkpoints: int  # one of them being written
    num_references: int
    least_checkpoints: int
    replicas_a_node: float  # of the trainer's model
    nodes: int
    has_reference: bool
    engines_a_node: int
    kv_cache_bytes: int  # of an engine on the CPU

    @property
    def checkpoint_bytes(self) -> int:
        return self.weights_bytes + STATE_BYTES * self.num_parameters

    @property
    def run_bytes(self) -> int:
        """On disk at the end of the run."""
        return self.num_checkpoints * self.checkpoint_bytes + self.num_references * self.weights_bytes

    @property
    def least_bytes(self) -> int:
        """On disk before anything can be removed."""
        return self.least_checkpoints * self.checkpoint_bytes + min(1, self.num_references) * self.weights_bytes

    def host_bytes(self, kind: Literal["cuda", "cpu"]) -> int:
        """Memory of a node's host, about: copies of checkpoints; on the CPU trainer, engines and the sync as well."""
        checkpoint = self.checkpoint_bytes // self.nodes
        if kind == "cuda":
            return checkpoint
        models = 2 if self.has_reference else 1
        trainer = self.replicas_a_node * (models * self.weights_bytes + GRADIENT_BYTES * self.num_parameters)
        trainer += STATE_BYTES * self.num_parameters / self.nodes
        engines = self.engines_a_node * (self.weights_bytes + self.kv_cache_bytes)
        return int(checkpoint + trainer + engines + self.weights_bytes)

    def describe(self) -> str:
        checkpoint = size(self.checkpoint_bytes)
        return f"{self.num_checkpoints} checkpoints of {checkpoint}, {self.num_references} references"


def size(num_bytes: float) -> str:
    """In MiB or GiB."""
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**29 else f"{num_bytes / 2**20:,.1f} MiB"


def footprint(cfg: Config) -> Footprint | None:
    """None where the model is not there, or none that can be trained."""
    try:
        hf = read_hf_config(hf_folder(cfg.model.path))
    except UserError:
        return None
    num_parameters = sum(math.prod(shape) for shape in hf_shapes(hf).values())
    has_reference = cfg.algorithm.kl.coefficient > 0
    resets = cfg.steps // cfg.reset.every_steps if cfg.reset.every_steps else 0
    resets += sum(stage.reset != "none" for stage in cfg.stages)
    every = cfg.checkpoint.keep_every_steps
    layout = cfg.parallel
    return Footprint(
        weights_bytes=num_parameters * {"bf16": 2, "fp32": 4}[cfg.model.dtype],
        num_parameters=num_parameters,
        # The newest, the best, those of resets and every n-th stay, and one is being written.
        num_checkpoints=cfg.checkpoint.keep + 2 + resets + (cfg.steps // every if every else 0),
        num_references=1 + resets if has_reference else 0,
        least_checkpoints=cfg.checkpoint.keep + 1,
        replicas_a_node=layout.data / layout.nodes,
        nodes=layout.nodes,
        has_reference=has_reference,
        engines_a_node=cfg.rollout.engines.count // layout.nodes,
        kv_cache_bytes=int(cfg.rollout.engines.kv_cache_gib * 2**30),
    )
