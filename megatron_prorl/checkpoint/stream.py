"""Torch.distributed checkpoints read one tensor at a time, by one process, whatever layout wrote them; no model.

torch's own reader works here on plans that name boxes of global tensors. No Megatron here.
"""

from __future__ import annotations

import io
import itertools
import pickle
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_prorl.checkpoint import folders
from megatron_prorl.checkpoint.pieces import Index
from megatron_prorl.checkpoint.spans import Files, Span
from megatron_prorl.errors import UserError


def check_metadata(folder: Path) -> None:
    """Make sure that the checkpoint's .metadata, which torch and Megatron unpickle, runs no code when they do.

    Raises UserError for one that holds anything but sizes, names and places of tensors, and for one that is missing
    or damaged.
    """
    _Reader(folder).read_metadata()


_TORCH_METADATA = "torch.distributed.checkpoint.metadata"
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
# By full name, none by its module alone: a name in a pickle may lead from a module to what that module imports.
_METADATA_CLASSES = {
    *((_TORCH_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((_TORCH_METADATA, name) for name in ("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata")),
    (_TORCH_METADATA, "_MEM_FORMAT_ENCODING"),
    # Megatron's own `save` keeps the plans by which the ranks wrote.
    *(("torch.distributed.checkpoint.planner", name) for name in ("SavePlan", "WriteItem", "WriteItemType")),
    ("torch.distributed.checkpoint.planner", "TensorWriteData"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    (_MEGATRON, "MCoreMetadata"),  # in older checkpoints
    (_MEGATRON, "MCoreSavePlan"),
    ("collections", "OrderedDict"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in _METADATA_CLASSES:
            raise UserError(f"its .metadata refers to {f'{module}.{name}'!r}")
        return super().find_class(module, name)


class _Reader(torch_checkpoint.FileSystemReader):
    """With a .metadata that cannot run code; torch's own reader unpickles whatever is there."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        try:
            with open(Path(self.path) / ".metadata", "rb") as file:
                metadata: Metadata = _MetadataUnpickler(file).load()
            if getattr(metadata, "storage_meta", None) is None:
                metadata.storage_meta = StorageMeta()
            metadata.storage_meta.load_id = self.load_id  # type: ignore[union-attr]
        except UserError as error:
            raise UserError(
                f"{self.path}: {error}, which no checkpoint needs and which may run code; use one that you trust"
            ) from None
        except Exception as error:  # a pickle: whatever a damaged one raises
            raise UserError(
                f"{self.path}: no torch.distributed checkpoint (.metadata: {type(error).__name__}); "
                "give the folder that holds .metadata and *.distcp"
            ) from None
        return metadata


class CheckpointReader:
    """The tensors of a torch.distributed checkpoint, read from disk box by box, whatever layout wrote them.

    Raises UserError for a folder that is no complete checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stacks: dict[str, tuple[int, dict[Index, list[ChunkStorageMetadata]]]] = {}
        self._starts: dict[MetadataIndex, int | None] = {}
        self._reader = _Reader(folder)
        self._metadata = self._reader.read_metadata()
        self._check_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        ends: dict[str, int] = defaultdict(int)  # bytes that each file must have
        for info in self._metadata.storage_data.values():
            ends[info.relative_path] = max(ends[info.relative_path], info.offset + info.length)
        missing = sorted(name for name in ends if not (folder / name).is_file())
        if missing:
            raise UserError(f"{folder}: {', '.join(missing[:4])} missing; copy the checkpoint again")
        for name, end in ends.items():
            if (folder / name).stat().st_size < end:
                raise UserError(f"{folder / name}: cut off; copy the checkpoint again")
        self.files = Files(folder / name for name in ends)

    def _check_metadata(self) -> None:
        """Raise UserError unless it says of every chunk of every tensor, which is inside it, where it lies."""
        metadata = self._metadata
        try:
            for key, entry in metadata.state_dict_metadata.items():
                if isinstance(entry, BytesStorageMetadata):
                    continue
                assert isinstance(key, str) and isinstance(entry.properties.dtype, torch.dtype)
                for chunk in entry.chunks:
                    edges = zip(chunk.offsets, chunk.sizes, entry.size, strict=True)
                    assert all(0 <= start <= start + length <= size for start, length, size in edges)
                    assert MetadataIndex(key, chunk.offsets) in metadata.storage_data
            for info in metadata.storage_data.values():
                assert isinstance(info.relative_path, str) and 0 <= info.offset <= info.offset + info.length
                assert not Path(info.relative_path).is_absolute() and ".." not in Path(info.relative_path).parts
        except (AssertionError, AttributeError, TypeError, ValueError):
            raise UserError(f"{self.folder}: its .metadata is damaged; copy the checkpoint again") from None

    def check_committed(self, keys: Collection[str]) -> None:
        """Raise UserError if a file with tensors `keys` is not what was committed, where a list of that is there."""
        if not (self.folder / folders.COMMITTED).is_file():
            return
        places = self._metadata.storage_data.items()
        names = {info.relative_path for index, info in places if index.fqn in keys} | {".metadata"}
        if wrong := folders.verify_digests(self.folder, names):
            raise UserError(
                f"{self.folder}: {', '.join(wrong)} changed since the checkpoint was written; take another checkpoint"
            )

    @cached_property
    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Size, dtype (`properties.dtype`) and chunks of every global tensor."""
        found = self._metadata.state_dict_metadata.items()
        return {key: entry for key, entry in found if not isinstance(entry, BytesStorageMetadata)}

    def read(self, key: str, offset: Index, out: Tensor) -> None:
        """Fill `out` with the box of tensor `key` that begins at `offset`, converting to its dtype.

        `out` may have fewer dimensions than the tensor: the first ones are then of length 1. Chunks that the box
        touches are loaded whole, one at a time: beside `out`, memory holds the largest of them.
        """
        entry = self.tensors[key]
        shape = (1,) * (len(entry.size) - out.dim()) + tuple(out.shape)
        box = ChunkStorageMetadata(offsets=torch.Size(offset), sizes=torch.Size(shape))
        if any(start + length > size for start, length, size in zip(offset, shape, entry.size, strict=True)):
            raise UserError(f"{self.folder}: {key} has shape {list(entry.size)}, too small for this model")
        items = create_read_items_for_chunk_list(key, self._near(key, box), [box])
        if any(_overlap(one, other) for one, other in itertools.combinations(items, 2)):
            raise UserError(f"{self.folder}: parts of {key} are stored twice; take another checkpoint")
        if sum(item.lengths.numel() for item in items) != box.sizes.numel():
            raise UserError(f"{self.folder}: parts of {key} are in none of its files; copy the checkpoint again")
        with self._damage_told(key):
            self._reader.read_data(LoadPlan(items), _IntoTensor(out.view(shape))).wait()

    def spans(self, key: str, lead: Index, start: int, rows: int) -> list[Span] | None:
        """Where the values lie on disk of tensor `key` at `lead` on its first axes, rows `start` on of the next one.

        One after the other as in memory. None if the checkpoint has them otherwise: split in columns, in another dtype
        than it says, compressed; `read` says what is wrong with it if anything is.
        """
        entry, axis = self.tensors[key], len(lead)
        shape = (*(1,) * axis, rows, *entry.size[axis + 1 :])
        offset = (*lead, start, *(0,) * (len(shape) - axis - 1))
        near = self._near(key, ChunkStorageMetadata(offsets=torch.Size(offset), sizes=torch.Size(shape))).chunks
        row_bytes = torch.Size(shape[axis + 1 :]).numel() * entry.properties.dtype.itemsize
        found: list[Span] = []
        end = start
        for chunk in sorted(near, key=lambda chunk: chunk.offsets[axis]):
            first, last = chunk.offsets[axis], chunk.offsets[axis] + chunk.sizes[axis]
            if last <= start or first >= start + rows:
                continue
            has_whole_rows = (*chunk.offsets[:axis], *chunk.offsets[axis + 1 :]) == (*lead, *offset[axis + 1 :]) and (
                chunk.sizes == (*shape[:axis], chunk.sizes[axis], *shape[axis + 1 :])
            )
            follows = first == end if found else first <= start
            place = self._values(key, chunk) if has_whole_rows and follows else None
            if place is None:
                return None
            path, at = place
            last = min(last, start + rows)
            found.append(Span(path, at + (end - first) * row_bytes, (last - end) * row_bytes))
            end = last
        return found if end == start + rows else None

    def _values(self, key: str, chunk: ChunkStorageMetadata) -> tuple[Path, int] | None:
        """The file that has a chunk's values, and where in it they begin; None unless all of them lie there as such."""
        index = MetadataIndex(key, chunk.offsets)
        info = self._metadata.storage_data[index]
        if info.transform_descriptors:
            return None
        path = self.folder / info.relative_path
        if index not in self._starts:
            with path.open("rb") as file, self._damage_told(key):
                found = torch.load(self._reader._slice_file(file, info), map_location="meta", weights_only=True)
            self._starts[index] = _start(found, chunk, self.tensors[key].properties.dtype)
        start = self._starts[index]
        return None if start is None else (path, info.offset + start)

    @contextmanager
    def _damage_told(self, key: str) -> Iterator[None]:
        try:
            yield
        except (UserError, OSError):
            raise
        except Exception as error:  # whatever a damaged pickle or archive raises
            reason = str(error).partition("\n")[0]
            raise UserError(f"{self.folder}: {key} cannot be read ({reason}); copy the checkpoint again") from None

    def _near(self, key: str, box: ChunkStorageMetadata) -> TensorStorageMetadata:
        """The tensor with those of its chunks only that lie in the same layer, and expert, as `box`.

        torch compares a box with every chunk, and a tensor of all experts of all layers has tens of thousands.
        """
        entry = self.tensors[key]
        if key not in self._stacks:
            dims = range(len(entry.size))
            lead = next((dim for dim in dims if any(chunk.sizes[dim] != 1 for chunk in entry.chunks)), 0)
            stacks: dict[Index, list[ChunkStorageMetadata]] = defaultdict(list)
            for chunk in entry.chunks:
                stacks[tuple(chunk.offsets[:lead])].append(chunk)
            self._stacks[key] = lead, stacks
        lead, stacks = self._stacks[key]
        ranges = (range(start, start + length) for start, length in zip(box.offsets, box.sizes, strict=True))
        places = itertools.product(*itertools.islice(ranges, lead))
        return replace(entry, chunks=[chunk for place in places for chunk in stacks.get(place, ())])


def _start(found: Any, chunk: ChunkStorageMetadata, dtype: torch.dtype) -> int | None:
    """Where in its record the values begin of a tensor that was loaded without them; None if they are out of order."""
    as_said = isinstance(found, Tensor) and (found.shape, found.dtype) == (chunk.sizes, dtype)
    if not as_said or not found.is_contiguous():
        return None
    begins = getattr(found.untyped_storage(), "_checkpoint_offset", None)  # torch's: none in its oldest format
    return None if begins is None else begins + found.storage_offset() * dtype.itemsize


def _overlap(one: ReadItem, other: ReadItem) -> bool:
    dims = zip(one.dest_offsets, one.lengths, other.dest_offsets, other.lengths, strict=True)
    return all(a < b + b_length and b < a + a_length for a, a_length, b, b_length in dims)


class _IntoTensor(LoadPlanner):
    """Where `read_data` puts what it reads. It has its plan by then: the steps of making one are never asked for."""

    def __init__(self, out: Tensor) -> None:
        self._out = out

    def set_up_planner(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError

    def create_local_plan(self) -> LoadPlan:
        raise NotImplementedError

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        raise NotImplementedError

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        raise NotImplementedError

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise NotImplementedError

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        assert read_item.type == LoadItemType.TENSOR
        box = self._out
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            box = box.narrow(dim, start, length)
        return box

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass
