"""The trainer's weights for vLLM's weight-transfer API; the only file that imports it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

from megatron_prorl.weights.export import hf_metadata, iter_hf_weights


class MegatronWeightSource(WeightSource):
    """Megatron model chunks as a `WeightSource`: every rank iterates; rank 0 gets the full tensors, the others None."""

    def __init__(self, chunks: Sequence[torch.nn.Module], hf: dict[str, Any]) -> None:
        self._chunks = chunks
        self._hf = hf

    def metadata(self) -> list[ParamMeta]:
        dtype = next(self._chunks[0].parameters()).dtype
        return [ParamMeta(name, dtype, shape) for name, shape, dtype in hf_metadata(self._hf, dtype)]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter_hf_weights(self._chunks, self._hf)  # type: ignore[return-value]  # None away from rank 0
