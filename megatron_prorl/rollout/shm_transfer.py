"""Weights from a trainer on the same machine to an engine on the CPU, through memory that has no name.

The trainer writes every tensor in Hugging Face layout into one memory file (memfd) and sends where each lies; the
engine maps the file through /proc/<trainer>/fd/<n>. Nothing is in /dev/shm or on a disk, so nothing is left behind when
either side is killed. vLLM registers this backend as "shm" (rollout/plugin.py); the sender is weights/sync.py.

An update is all or nothing up to the first write: checksums are verified before the model is touched. Afterwards what
the model computes with is read back and compared with what was sent, because vLLM prepacks weights on a CPU: a stale
packed copy gives wrong log-probs while every named parameter looks right.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from megatron_prorl.rollout.read_back import first_wrong_parameter
from megatron_prorl.weights.checksum import checksum

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.config.weight_transfer import WeightTransferConfig

MISMATCH = "weights differ"  # begins the message of every failed check; the parameter's name follows in quotes


@dataclass
class ShmInitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class ShmUpdateInfo(WeightTransferUpdateInfo):
    """Where the tensors lie: `tensors` holds [name, dtype, shape, offset in bytes, checksum]."""

    pid: int
    fd: int
    tensors: list[tuple[str, str, list[int], int, int]]


class ShmWeightTransferEngine(WeightTransferEngine[ShmInitInfo, ShmUpdateInfo]):
    """Worker side. Raises ValueError naming the first parameter that arrived or was loaded wrong."""

    init_info_cls = ShmInitInfo
    update_info_cls = ShmUpdateInfo

    def __init__(
        self, config: WeightTransferConfig, vllm_config: VllmConfig, device: torch.device, model: nn.Module
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        self._num_updates = 0

    def init_transfer_engine(self, init_info: ShmInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        """Nothing yet: the model stays usable until the checksums of what arrives are right."""

    def receive_weights(self, update_info: ShmUpdateInfo) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        sent = _map_tensors(update_info)
        initialize_layerwise_reload(self.model)
        self.model.load_weights(sent.items())
        finalize_layerwise_reload(self.model, self.model_config)
        _repack_tied(self.model)
        self._num_updates += 1
        wrong = first_wrong_parameter(self.model, sent, seed=self._num_updates)
        if wrong:
            raise ValueError(f"{MISMATCH}: '{wrong}' was not loaded as it was sent")

    def finish_weight_update(self) -> None:
        """Nothing left: `receive_weights` gets all tensors at once."""

    def shutdown(self) -> None:
        pass


def _map_tensors(info: ShmUpdateInfo) -> dict[str, Tensor]:
    """Views of the trainer's memory, verified. The memory stays mapped as long as a view lives."""
    fd = os.open(f"/proc/{info.pid}/fd/{info.fd}", os.O_RDONLY)
    try:
        # A private mapping is writable for torch and never written: no page is copied.
        memory = mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    finally:
        os.close(fd)
    tensors = {}
    for name, dtype_name, shape, offset, expected in info.tensors:
        dtype = getattr(torch, dtype_name)
        count = torch.Size(shape).numel()
        tensor = torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape)
        if checksum(tensor) != expected:
            raise ValueError(f"{MISMATCH}: '{name}' changed on its way to the engine")
        tensors[name] = tensor
    return tensors


def _repack_tied(model: nn.Module) -> None:
    """Prepack again what shares its weight with another module.

    vLLM's layerwise reload processes a shared parameter for the module that it is loaded through, the embedding; the LM
    head would go on multiplying with its packed copy of the old weight.
    """
    owners: dict[int, nn.Module] = {}
    module: Any
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.numel() and owners.setdefault(weight.data_ptr(), module) is not module:
            module.quant_method.process_weights_after_loading(module)
