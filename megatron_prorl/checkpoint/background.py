"""Folders of sharded tensors, written by a thread of every rank while the training goes on.

All that takes all ranks happens in `start_writing`: who writes what, and the copy of it. From then on no thread uses
torch.distributed, which the training does meanwhile. Each rank's thread writes that rank's file and leaves word in the
temporary folder; rank 0's waits for all words, writes what is left and commits.

.tmp-step-000510/.rank-00003    empty while rank 3 writes, then what it wrote; gone if it cannot

What lies on disk is what `megatron.core.dist_checkpointing.save` leaves there; docs/decisions/0004 says why only the
writing differs.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from threading import Event, Thread
from typing import Any, TypeVar

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    distribute_main_replicas_with_precomputed_distribution,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _DistWrapper

from megatron_prorl import comm, heartbeat
from megatron_prorl.checkpoint import folders
from megatron_prorl.errors import UserError

WORD_SECONDS = 3600.0  # for the words of the other ranks, once rank 0 has written; dead ranks end the run long before
POLL_SECONDS = 0.05
CTRL_C_SECONDS = 0.1  # Python misses one that comes just as it begins to wait, until the wait ends
STOP_SECONDS = 10.0  # a thread looks for the end every WRITE_BYTES, unless the disk hangs
WRITE_BYTES = 1 << 20
NUM_COPIERS = 4

Answer = TypeVar("Answer")


class HostBuffers:
    """Host memory for copies of this rank's tensors, kept for the next ones: pages are slow only when touched first."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def copy(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies on the host, which the next call overwrites. Tensors that share memory share the copy.

        (In float32 the optimizer's main parameters are the weights.)
        """
        tensors = [tensor.detach().contiguous() for tensor in tensors]
        places = [(tensor.data_ptr(), tensor.nbytes, tensor.dtype) for tensor in tensors]
        distinct = dict(zip(places, tensors, strict=True))
        self._buffers = [self._buffer(number, tensor) for number, tensor in enumerate(distinct.values())]
        _copy_all(list(zip(self._buffers, distinct.values(), strict=True)))
        found = dict(zip(distinct, self._buffers, strict=True))
        return [found[place].view(tensor.shape) for place, tensor in zip(places, tensors, strict=True)]

    def _buffer(self, number: int, like: Tensor) -> Tensor:
        if number < len(self._buffers):
            buffer = self._buffers[number]
            if buffer.shape == like.shape and buffer.dtype == like.dtype:
                return buffer
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)


def _copy_all(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Fill the first of each pair, on the host, with the second."""
    if torch.cuda.is_available():
        for buffer, tensor in pairs:
            buffer.copy_(tensor, non_blocking=True)
        torch.cuda.current_stream().synchronize()
        return
    pairs.sort(key=lambda pair: -pair[0].nbytes)
    with ThreadPoolExecutor(NUM_COPIERS) as threads:
        for _ in threads.map(lambda pair: pair[0].copy_(pair[1]), pairs):
            pass


def start_writing(
    folder: Path, state_dict: dict[str, Any], files: Mapping[str, bytes], buffers: HostBuffers | None
) -> Writing:
    """Begin to write `state_dict` (sharded) and `files` as `folder`. Collective.

    The state may change when this returns; without `buffers` nothing is copied, and it must not before the end. Raises
    UserError on every rank if the disk refuses already, or is not one that all ranks share; nothing of the folder then
    remains.
    """
    tensors, common = save_preprocess(state_dict)
    num_bytes = sum(comm.gather(_num_bytes(tensors)))
    content = io.BytesIO()
    torch.save(common, content)
    files = {COMMON_STATE_FNAME: content.getvalue(), **files}
    try:
        _together(lambda: folders.begin(folder, num_bytes) if comm.is_rank_zero() else None)
        marks = _together(lambda: _mark(folder))
        missing = comm.broadcast([name for name in marks if not (_temporary(folder) / name).is_file()])
        if missing:
            raise UserError(
                f"cannot write {folder}: rank 0 does not see {len(missing)} of {len(marks)} files that the ranks "
                f"made there, {missing[0]} for one; put run_dir on a disk that all nodes share"
            )
        planner, plan, metadata = _plan(tensors, folder)
        planner.take(plan, buffers)
    except (OSError, UserError) as error:
        _discard_everywhere(folder)
        raise _explained(error, folder, num_bytes) from error
    except BaseException:  # on this rank, perhaps no other
        _withdraw(folder, comm.rank())
        if comm.is_rank_zero():
            folders.discard(folder)
        raise
    return Writing(folder, num_bytes, planner, plan, metadata, files)


class Writing:
    """What `start_writing` began. Collective methods are called by all ranks, and answer the same on all."""

    def __init__(
        self,
        folder: Path,
        num_bytes: int,
        planner: _Planner,
        plan: SavePlan,
        metadata: Metadata | None,
        files: Mapping[str, bytes],
    ) -> None:
        self.folder = folder
        self._num_bytes = num_bytes
        self._planner = planner
        self._plan = plan
        self._metadata = metadata  # on rank 0
        self._files = files
        self._rank, self._num_ranks = comm.rank(), torch.distributed.get_world_size()
        self._error: Exception | None = None
        self._stop, self._done = Event(), Event()  # after a Ctrl-C, Thread.join and is_alive take a live one for dead
        Thread(target=self._run, name=f"write {folder.name}", daemon=True).start()

    def ended(self) -> bool:
        """Whether it is committed or has failed: `finish` then takes no time. Collective."""
        ended, failed = comm.broadcast((self._done.is_set(), self._error is not None))
        if failed:
            self._stop.set()
        return ended

    def finish(self) -> None:
        """Wait until the folder is committed. Collective.

        Raises UserError on every rank if the disk refused; nothing of the folder then remains, and one of the same name
        that was there before is untouched.
        """
        self._wait(math.inf)
        errors = [error for error in comm.gather(self._error) if error]
        if errors:
            _discard_everywhere(self.folder)
            first = min(errors, key=lambda error: isinstance(error, _Stopped))  # the others are its consequences
            raise _explained(first, self.folder, self._num_bytes) from first

    def abandon(self, seconds: float) -> Exception | None:
        """End it without the other ranks, which perhaps did not fail: what takes longer than `seconds` is removed.

        On rank 0, why it is not committed, or None if it is.
        """
        try:
            self._wait(seconds)
        finally:  # after another signal, too
            self._stop.set()
            if (has_ended := self._wait(STOP_SECONDS)) and self._error and self._rank == 0:
                folders.discard(self.folder)
        if not has_ended:
            return UserError(f"{self.folder} is not complete: the disk hangs; the next start removes what is there")
        if isinstance(self._error, _Stopped):
            return UserError(f"{self.folder} is not complete and was removed: {self._error}")
        return self._error and _explained(self._error, self.folder, self._num_bytes)

    def _wait(self, seconds: float) -> bool:
        """Whether the thread has ended, after `seconds` at the latest."""
        deadline = time.monotonic() + seconds
        while not self._done.wait(min(CTRL_C_SECONDS, max(0.0, deadline - time.monotonic()))):
            if time.monotonic() >= deadline:
                return False
        return True

    def _run(self) -> None:
        try:
            with _true_disk_error():
                with heartbeat.waiting("disk", str(self.folder), f"rank {self._rank}'s part"):
                    written = self._write()
                if self._metadata:
                    self._commit([written, *map(self._word_of, range(1, self._num_ranks))], self._metadata)
                else:
                    self._leave(written)
        except (OSError, UserError, _Stopped) as error:
            self._error = error
        except BaseException:
            if self._stop.is_set():  # torch.save hides the reason
                self._error = _Stopped("the run ended")
            else:
                text = f"writing {self.folder} failed on rank {self._rank}\n{traceback.format_exc()}"
                self._error = RuntimeError(text)
        if self._error:
            _withdraw(self.folder, self._rank)
        self._done.set()

    def _write(self) -> _Written:
        """This rank's file, on disk when this returns."""
        writer = _storage(self.folder)
        writer.fs = disk = _DigestingDisk(self._stop)
        results = writer.write_data(self._plan, self._planner).wait()
        sizes = {name: (_temporary(self.folder) / name).stat().st_size for name in disk.digests}
        return _Written(results, disk.digests, sizes)

    def _leave(self, written: _Written) -> None:
        mark = _mark_of(self.folder, self._rank)
        new = mark.with_suffix(".new")
        new.write_bytes(pickle.dumps(written))
        new.rename(mark)

    def _word_of(self, rank: int) -> _Written:
        deadline = time.monotonic() + WORD_SECONDS
        while True:
            try:
                content = _mark_of(self.folder, rank).read_bytes()
            except FileNotFoundError:
                raise _Stopped(f"rank {rank} could not write") from None
            if content:
                written: _Written = pickle.loads(content)
                return written
            if time.monotonic() > deadline:
                raise UserError(
                    f"cannot write {self.folder}: rank {rank} has not written its part {WORD_SECONDS:.0f} s after rank "
                    "0; look at the disk of its node"
                )
            if self._stop.wait(POLL_SECONDS):
                raise _Stopped("the run ended")

    def _commit(self, written: list[_Written], metadata: Metadata) -> None:
        temporary = _temporary(self.folder)
        for rank, part in enumerate(written):
            for name, size in part.sizes.items():
                found = (temporary / name).stat().st_size
                if found != size:
                    raise UserError(
                        f"cannot write {self.folder}: rank 0 sees {found} of the {size} bytes of {name} that rank "
                        f"{rank} wrote; put run_dir on a disk that all nodes share"
                    )
        _storage(self.folder).finish(metadata, [part.results for part in written])
        for name, content in self._files.items():
            (temporary / name).write_bytes(content)
        save_config(CheckpointingConfig("torch_dist", 1), str(temporary))
        for rank in range(self._num_ranks):
            _mark_of(self.folder, rank).unlink()
        if self._stop.is_set():
            raise _Stopped("the run ended")
        folders.commit(self.folder, dict(chain.from_iterable(part.digests.items() for part in written)))


@dataclass(frozen=True, slots=True)
class _Written:
    """What a rank's thread wrote: where each item lies, and digests and sizes of the files by name."""

    results: list[WriteResult]
    digests: dict[str, int]
    sizes: dict[str, int]


class _Stopped(Exception):
    """Another rank failed, or the run ends."""


class _Planner(MCoreSavePlanner):
    """Holds the data of its plan from `take` on."""

    def take(self, plan: SavePlan, buffers: HostBuffers | None) -> None:
        found = {item.index: super(_Planner, self).resolve_data(item) for item in plan.items}
        tensors = {index: data for index, data in found.items() if isinstance(data, Tensor)}
        if buffers:
            found |= zip(tensors, buffers.copy(list(tensors.values())), strict=True)
        self._taken: dict[MetadataIndex, Tensor | io.BytesIO] = found

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        return self._taken[write_item.index]


class _DigestingDisk(FileSystem):
    """Keeps the CRC-32 of each file that it writes, by name; stops between two pieces when told to."""

    def __init__(self, stop: Event) -> None:
        self.digests: dict[str, int] = {}
        self._stop = stop

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        with super().create_stream(path, mode) as file:
            digesting = _DigestingFile(file, self._stop)
            yield digesting
            self.digests[Path(path).name] = digesting.digest


class _DigestingFile(io.IOBase):
    def __init__(self, file: Any, stop: Event) -> None:
        self.digest = 0
        self._file = file
        self._stop = stop

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), WRITE_BYTES):
            if self._stop.is_set():
                raise _Stopped("the run ended")
            piece = view[start : start + WRITE_BYTES]
            self.digest = zlib.crc32(piece, self.digest)
            self._file.write(piece)
            heartbeat.beat()
        return len(view)

    def tell(self) -> int:
        position: int = self._file.tell()
        return position

    def flush(self) -> None:
        self._file.flush()

    def fileno(self) -> int:
        number: int = self._file.fileno()
        return number


def _plan(tensors: dict[str, Any], folder: Path) -> tuple[_Planner, SavePlan, Metadata | None]:
    """What this rank writes; on rank 0 also what lies where in the end, without the places in files."""
    # Data-parallel ranks hold the same values: each writes a part.
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    distribution = determine_main_replica_uniform_distribution(tensors, group)
    distribute_main_replicas_with_precomputed_distribution(tensors, group, distribution)
    renamed, _, _ = _replace_state_dict_keys_with_sharded_keys(tensors, keep_only_main_replica=True)
    planner = _Planner(dedup_replicated_tensors=False, flatten_state_dict=False)
    planner.set_up_planner(mcore_to_pyt_state_dict(renamed, is_loading=False), is_coordinator=comm.is_rank_zero())
    metadata: Metadata | None = None

    def global_plan(plans: list[SavePlan]) -> list[SavePlan]:
        nonlocal metadata
        plans, metadata = planner.create_global_plan(plans)
        return _storage(folder).prepare_global_plan(plans)

    plan = _DistWrapper(None, True, 0).reduce_scatter("plan", planner.create_local_plan, global_plan)
    return planner, planner.finish_plan(plan), metadata


def _storage(folder: Path) -> torch_checkpoint.FileSystemWriter:
    # One thread, because the errors of any other would be lost. Nothing to copy ahead: it is on the host.
    return torch_checkpoint.FileSystemWriter(_temporary(folder), thread_count=1, per_thread_copy_ahead=0)


def _temporary(folder: Path) -> Path:
    return folder.with_name(folders.TEMPORARY + folder.name)


def _mark_of(folder: Path, rank: int) -> Path:
    return _temporary(folder) / f".rank-{rank:05d}"


def _mark(folder: Path) -> str:
    mark = _mark_of(folder, comm.rank())
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    return mark.name


def _withdraw(folder: Path, rank: int) -> None:
    """Tell rank 0 that this rank will not write; possible on a full disk, too."""
    with suppress(OSError):
        _mark_of(folder, rank).unlink(missing_ok=True)


def _num_bytes(tensors: dict[str, Any]) -> int:
    """Bytes of the tensors of which this rank holds the first replica."""
    return sum(
        value.data.numel() * value.data.element_size()
        for value in nested_values(tensors)
        if isinstance(value, ShardedTensor) and is_main_replica(value.replica_id)
    )


def _together(action: Callable[[], Answer]) -> list[Answer]:
    """The answers of all ranks; the first OSError or UserError of any is raised on all."""
    answer: Answer | Exception
    try:
        answer = action()
    except (OSError, UserError) as error:
        answer = error
    answers = comm.gather(answer)
    for found in answers:
        if isinstance(found, Exception):
            raise found
    return answers  # type: ignore[return-value]


def _discard_everywhere(folder: Path) -> None:
    """Rank 0 first, which holds the lock; on the other ranks there is something left only if the disk is not shared."""
    for is_turn in (comm.is_rank_zero(), not comm.is_rank_zero()):
        if is_turn:
            folders.discard(folder)
        comm.barrier()


def _explained(error: Exception, folder: Path, num_bytes: int) -> Exception:
    if not isinstance(error, OSError):
        return error
    return UserError(
        f"cannot write {folder}: {error.strerror}; {folders.free_bytes(folder):,} bytes are free there and "
        f"{num_bytes:,} are needed: make room or allow writing; what was saved before is intact"
    )


@contextmanager
def _true_disk_error() -> Iterator[None]:
    """torch.save tells of a full disk with a RuntimeError about a file position; raise the OSError below it."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
