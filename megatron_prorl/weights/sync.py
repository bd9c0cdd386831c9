"""The trainer's weights to every engine, and the proof that they arrived.

They travel by vLLM's weight-transfer API: through shared memory on a CPU (rollout/shm_transfer.py), CUDA IPC where
engine and trainer share GPUs, NCCL where they do not. After every push each engine is checked:

* on a CPU, by the engine: a checksum of each tensor as it arrived, and a read-back of the live parameters, bit for bit;
  the first wrong parameter is named;
* the engine's weight version;
* log-probs of a fixed token sequence, engine against trainer, within PROBE_TOLERANCE.
"""

from __future__ import annotations

import logging
import mmap
import os
import random
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prorl import comm
from megatron_prorl.config.schema import Config
from megatron_prorl.rollout.client import EngineClient, EngineDied, EngineRefused
from megatron_prorl.weights.checksum import checksum

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Failures = dict[int, Exception]  # by engine index

# Mean absolute difference of log-probs, in nats. fp32: engine and trainer differ in the order of sums only (1e-6 seen).
# bf16: each rounds activations to 8 bits at other places (1e-2 seen); a wrong parameter moves the mean by 0.1 and more.
PROBE_TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}
PROBE_TOKENS = 32
ALIGNMENT_BYTES = 64  # a cache line, and a multiple of every element's size
MAX_RESTARTS = 2  # of engines within one push


class SyncMismatch(RuntimeError):
    """An engine does not have the trainer's weights; the message names the engine and the first wrong parameter."""


@dataclass(frozen=True, slots=True)
class Weights:
    """What to send: name, full shape and dtype of every tensor in Hugging Face terms, and a fresh pass over them.

    `tensors()` is collective over the trainer ranks and yields in the order of `metadata`; away from rank 0 it may
    yield None for a tensor.
    """

    metadata: list[tuple[str, tuple[int, ...], torch.dtype]]
    tensors: Callable[[], Iterator[tuple[str, Tensor | None]]]


class WeightSync:
    """Sends `weights` to `engines`; made and used by every trainer rank, with the engines on rank 0 only.

    `backend` is `rollout.engine.transfer_backend`. `probe` (collective) gives the trainer's log-probs at temperature 1
    of every token after the first; `vocab_size` bounds the probe's token ids. `restart_dead` restarts those of the
    given engines that have died (EngineSupervisor.restart_dead).
    """

    def __init__(
        self,
        cfg: Config,
        backend: str,
        weights: Weights,
        engines: Sequence[EngineClient],
        *,
        probe: Callable[[list[int]], list[float]],
        vocab_size: int,
        restart_dead: Callable[[list[int]], list[int]],
    ) -> None:
        self._engines = list(engines)
        self._probe = probe
        self._tolerance = PROBE_TOLERANCE[cfg.model.dtype]
        self._restart_dead = restart_dead
        num_tokens = min(PROBE_TOKENS, cfg.rollout.max_prompt_tokens + cfg.rollout.max_response_tokens - 1)
        numbers = random.Random(0)
        self._probe_ids = [numbers.randrange(vocab_size) for _ in range(num_tokens)]
        self._version = 0
        self._transfer: _Transfer = (
            _ShmTransfer(weights, self._engines) if backend == "shm" else _CudaTransfer(weights, self._engines, backend)
        )

    def push(self, version: int) -> dict[str, float]:
        """Bring every engine to the weights of now, as `version`, and verify them. Collective.

        An engine that dies on the way is restarted and given the weights again; the others are not held up. Returns
        metrics. Raises on every rank: SyncMismatch if an engine does not have the weights afterwards, EngineDied if
        one does not come back.
        """
        started = time.monotonic()
        self._version = version
        self._transfer.gather()
        indices = list(range(len(self._engines)))
        num_restarts = 0
        while True:
            failures = self._transfer.send(indices, version)
            indices = _on_rank_zero(partial(self._survey, failures, num_restarts))
            if not indices:
                break
            num_restarts += 1
            indices = _on_rank_zero(partial(self._restart, failures))
        sent = time.monotonic()
        probe_error = self.verify(version)
        return {
            "sync/seconds": sent - started,
            "sync/verify_seconds": time.monotonic() - sent,
            "sync/probe_error": probe_error,
            "sync/engine_restarts": float(num_restarts),
        }

    def verify(self, version: int) -> float:
        """Check every engine's version and log-probs; the largest mean difference in nats. Collective.

        Raises SyncMismatch on every rank.
        """
        expected = self._probe(self._probe_ids)
        return _on_rank_zero(
            lambda: max((self._verify_one(engine, version, expected) for engine in self._engines), default=0.0)
        )

    def refresh(self, index: int) -> EngineClient:
        """Restart engine `index` if it is dead, and give it the weights of the last push; on rank 0 alone, CPU only.

        For an engine that dies while the other ranks wait. Raises EngineDied where the transfer needs all ranks: the
        engine then comes back with the next push.
        """
        if not isinstance(self._transfer, _ShmTransfer):
            raise EngineDied(f"{self._engines[index].url}: comes back with the next sync")
        self._restart_dead([index])
        failures = self._transfer.send([index], self._version)
        if failures:
            raise failures[index]
        return self._engines[index]

    def close(self) -> None:
        """Release the transfer's memory and communicators."""
        self._transfer.close()

    def _survey(self, failures: Failures, num_restarts: int) -> list[int]:
        """The engines that died. Raises what a restart cannot mend."""
        for index, failure in failures.items():
            if not isinstance(failure, EngineDied):
                raise SyncMismatch(f"engine {index}: {failure}") from failure
            if num_restarts == MAX_RESTARTS:
                raise failure
            logger.warning("engine %d died in a weight sync: %s", index, failure)
        return list(failures)

    def _restart(self, failures: Failures) -> list[int]:
        """Restart the dead engines; returns those to send to again."""
        self._restart_dead(list(failures))
        return self._transfer.again(list(failures))

    def _verify_one(self, engine: EngineClient, version: int, expected: list[float]) -> float:
        found = engine.weight_version()
        if found != version:
            raise SyncMismatch(f"{engine.url}: has weight version {found}, the trainer {version}")
        scored = engine.score(self._probe_ids)
        error = sum(abs(a - b) for a, b in zip(scored, expected, strict=True)) / len(expected)
        if not error <= self._tolerance:  # NaN is a mismatch too
            raise SyncMismatch(
                f"{engine.url}: log-probs differ from the trainer's by {error:.3g} nats on average, more than "
                f"{self._tolerance:g}, at weight version {version}"
            )
        return error


class _Transfer(Protocol):
    def gather(self) -> None:
        """Take the weights of now from all ranks. Collective."""

    def send(self, indices: list[int], version: int) -> Failures:
        """Give them to these engines; what failed, on rank 0. Collective unless said otherwise."""

    def again(self, restarted: list[int]) -> list[int]:
        """The engines to send to after some have been restarted. On rank 0 alone."""

    def close(self) -> None: ...


class _ShmTransfer:
    """One memory file of rank 0 holds all tensors; any engine can be sent them at any time, by rank 0 alone."""

    def __init__(self, weights: Weights, engines: list[EngineClient]) -> None:
        self._weights = weights
        self._engines = engines
        self._fd = -1
        self._tensors: list[tuple[str, str, tuple[int, ...], int, int]] = []
        if not engines:
            return
        self._offsets = [0]
        for _, shape, dtype in weights.metadata:
            size = torch.Size(shape).numel() * dtype.itemsize
            self._offsets.append(self._offsets[-1] + -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES)
        self._fd = os.memfd_create("megatron-prorl-weights")
        os.ftruncate(self._fd, self._offsets[-1])
        self._memory = mmap.mmap(self._fd, self._offsets[-1])

    def gather(self) -> None:
        if self._fd < 0:
            for _ in self._weights.tensors():
                pass
            return
        self._tensors = []
        rows = zip(self._weights.metadata, self._offsets[:-1], self._weights.tensors(), strict=True)
        for (name, shape, dtype), offset, (found, tensor) in rows:
            assert tensor is not None and (found, tuple(tensor.shape), tensor.dtype) == (name, tuple(shape), dtype), (
                f"the stream of weights has {found} where its metadata has {name} {tuple(shape)} {dtype}"
            )
            place = torch.frombuffer(self._memory, dtype=dtype, count=tensor.numel(), offset=offset).view(shape)
            place.copy_(tensor)
            self._tensors.append((name, str(dtype).removeprefix("torch."), tuple(shape), offset, checksum(place)))

    def send(self, indices: list[int], version: int) -> Failures:
        """On rank 0 alone; all engines at once. An engine that refuses stays paused: it samples nothing wrong."""
        update_info = {"pid": os.getpid(), "fd": self._fd, "tensors": self._tensors}

        def send_one(index: int) -> Exception | None:
            engine = self._engines[index]
            try:
                engine.pause()
                engine.start_weight_update()
                engine.update_weights(update_info)
                engine.finish_weight_update(str(version))
                engine.reset_prefix_cache()
                engine.resume()
            except (EngineDied, EngineRefused) as error:
                return error
            return None

        if not indices:
            return {}
        with ThreadPoolExecutor(len(indices)) as threads:
            outcomes = zip(indices, threads.map(send_one, indices), strict=True)
        return {index: failure for index, failure in outcomes if failure}

    def again(self, restarted: list[int]) -> list[int]:
        return restarted

    def close(self) -> None:
        if self._fd >= 0:
            self._memory.close()
            os.close(self._fd)
            self._fd = -1


class _CudaTransfer:
    """vLLM's own CUDA IPC and NCCL transfers (vllm/distributed/weight_transfer), to all engines at once."""

    def __init__(self, weights: Weights, engines: list[EngineClient], backend: str) -> None:
        self._weights = weights
        self._engines = engines
        self._backend = backend
        self._control = _FanOut(engines)
        self._trainer: Any = None

    def gather(self) -> None:
        """Nothing: the tensors go out as they are gathered."""

    def send(self, indices: list[int], version: int) -> Failures:
        if self._control.failures:  # the last attempt's: every engine has to meet the trainer anew
            self.close()
            self._control.failures = {}
        self._control.each(EngineClient.pause)
        if self._trainer is None:
            self._trainer = self._connect()
        self._trainer.send_weights()
        self._control.each(lambda engine: engine.set_weight_version(version))
        self._control.each(EngineClient.reset_prefix_cache)
        self._control.each(EngineClient.resume)
        return self._control.failures

    def again(self, restarted: list[int]) -> list[int]:
        """All of them: each has to meet the trainer anew."""
        return list(range(len(self._engines)))

    def close(self) -> None:
        if self._trainer is not None:
            self._trainer.shutdown()
            self._trainer = None

    def _connect(self) -> Any:
        """Collective."""
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        from megatron_prorl.weights.source import MegatronWeightSource

        rank = _rank()
        if self._backend == "ipc":
            # Packed: the memory of one buffer, not of a second model.
            init_info: Any = IPCTrainerInitInfo(rank=rank, packed=True)
        else:
            num_workers = sum(self._control.sizes())
            init_info = NCCLTrainerInitInfo(
                rank=rank, master_address=_own_address(), master_port=_free_port(), world_size=1 + num_workers
            )
        return WeightTransferTrainerFactory.trainer_init(
            init_info,
            client=self._control,
            source=MegatronWeightSource(self._weights, everywhere=self._backend == "ipc"),
        )


class _FanOut:
    """vLLM's VLLMWeightSyncClient protocol for several engines: each call goes to all that have not failed, at once.

    Raises nothing, so that the trainer ranks' collectives go on: failures are kept by engine index.
    """

    def __init__(self, engines: list[EngineClient]) -> None:
        self._engines = engines
        self.failures: Failures = {}

    def sizes(self) -> list[int]:
        """Workers of every engine."""
        return [engine.world_size() for engine in self._engines]

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        if "rank_offset" not in init_info:
            self.each(lambda engine: engine.init_weight_transfer_engine(init_info))
            return
        first_rank = init_info["rank_offset"]
        offsets = {}
        for engine, size in zip(self._engines, self.sizes(), strict=True):
            offsets[engine.url] = first_rank
            first_rank += size
        self.each(lambda engine: engine.init_weight_transfer_engine(init_info | {"rank_offset": offsets[engine.url]}))

    def start_weight_update(self) -> None:
        self.each(EngineClient.start_weight_update)

    def update_weights(self, update_info: Any) -> None:
        from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient

        # vLLM's own client knows how CUDA IPC handles travel over HTTP.
        self.each(lambda engine: _translated(engine, HTTPVLLMWeightSyncClient(engine.url).update_weights, update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.each(lambda engine: engine.finish_weight_update(weight_version))

    def each(self, call: Callable[[EngineClient], None]) -> None:
        """`call` on every engine that has not failed, all at once."""

        def attempt(index: int) -> None:
            try:
                call(self._engines[index])
            except (EngineDied, EngineRefused) as error:
                self.failures[index] = error

        indices = [i for i in range(len(self._engines)) if i not in self.failures]
        if indices:
            with ThreadPoolExecutor(len(indices)) as threads:
                list(threads.map(attempt, indices))


def _translated(engine: EngineClient, call: Callable[[Any], None], argument: Any) -> None:
    import requests

    try:
        call(argument)
    except requests.HTTPError as error:
        raise EngineRefused(f"{engine.url}: {error}") from error
    except requests.RequestException as error:
        raise EngineDied(f"{engine.url}: {error!r}") from error


def _on_rank_zero(action: Callable[[], Result]) -> Result:
    """What `action` returns or raises on rank 0, on every rank. Collective."""
    outcome: tuple[Result | None, Exception | None] | None = None
    if _rank() == 0:
        try:
            outcome = (action(), None)
        except Exception as error:
            outcome = (None, error)
    result, failure = comm.broadcast(outcome) if dist.is_initialized() else outcome  # type: ignore[misc]
    if failure:
        raise failure
    return result  # type: ignore[return-value]


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _own_address() -> str:
    return socket.gethostbyname(socket.gethostname())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
