"""The trainer's weights for vLLM's weight-transfer API, on CUDA; the only file that imports vLLM's side of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

if TYPE_CHECKING:
    from megatron_prorl.weights.sync import Weights


class MegatronWeightSource(WeightSource):
    """`weights` as a `WeightSource`: every trainer rank iterates, a fresh pass each time.

    Rank 0 gets the full tensors. The others get None, or with `everywhere` the tensors too, on their own GPU, for the
    engine there.
    """

    def __init__(self, weights: Weights, *, everywhere: bool) -> None:
        self._weights = weights
        self._everywhere = everywhere

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, dtype, tuple(shape)) for name, shape, dtype in self._weights.metadata]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        send_on = self._everywhere and dist.get_world_size() > 1
        for (name, shape, dtype), (_, tensor) in zip(self._weights.metadata, self._weights.tensors(), strict=True):
            if send_on:
                if tensor is None:
                    tensor = torch.empty(shape, dtype=dtype, device="cuda")
                dist.broadcast(tensor, src=0)
            yield name, tensor  # type: ignore[misc]  # None where nobody reads it
