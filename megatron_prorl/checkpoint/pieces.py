"""Torch.distributed checkpoints written by one process, values going from chunk to file, without a model in memory.

The same files as `sharded.py` writes. torch's own writer wants a tensor of each item, and writes with one thread: with
more it loses the errors of all but the first. No Megatron here.
"""

from __future__ import annotations

import io
import itertools
import os
import pickle
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from types import ModuleType
from typing import Any

import torch
from torch.serialization import get_crc32_options, set_crc32_options, skip_data

from megatron_prorl.checkpoint.spans import Writeback
from megatron_prorl.checkpoint.threads import Stopped, equal_parts, in_threads

NUM_FILES = 2  # written at a time: one thread computes while the other waits for the disk

SWITCH_SECONDS = 0.0005  # or the import beside them, which is all Python, holds the writers up for 5 ms a call

Index = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A box of the global tensor `key`, and how to get its values, of `shape` and `dtype`: as bytes, bit by bit."""

    key: str
    global_shape: Index
    offset: Index
    shape: Index
    dtype: torch.dtype
    chunks: Callable[[], Iterable[memoryview]]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """An object under `key`, stored as torch.save writes it."""

    key: str
    value: Any


@dataclass(frozen=True, slots=True)
class _Written:
    """Where a piece or blob lies."""

    what: Piece | Blob
    file: str
    start: int
    num_bytes: int


def write_pieces(folder: Path, pieces: Sequence[Piece], blobs: Sequence[Blob] = ()) -> dict[str, int]:
    """Write a checkpoint into the existing `folder`: each piece's values are asked for when its turn comes.

    Several files are written at a time, each by a thread that has one chunk in hand. They are on disk (fsync) when this
    returns their CRC-32s, by name. Raises OSError if the disk refuses, and what `chunks` raises; the other threads
    then end with the chunk they have in hand, as they do on Ctrl-C.
    """
    assert len({(piece.key, piece.offset) for piece in pieces}) == len(pieces), "two pieces at one place"
    stop = Event()
    everything: list[Piece | Blob] = [*pieces, *blobs]
    parts = equal_parts(everything, NUM_FILES, lambda one: one.num_bytes if isinstance(one, Piece) else 1)
    files = [_File(folder / f"__0_{number}.distcp") for number in range(len(parts))]
    work: list[Callable[[], Any]] = [
        partial(_write_file, file, part, stop) for file, part in zip(files, parts, strict=True)
    ]
    computes_crc32 = get_crc32_options()
    set_crc32_options(False)  # torch's, of each record; nothing reads it
    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        *written, classes = in_threads([*work, _metadata_classes], stop)
    finally:
        set_crc32_options(computes_crc32)
        sys.setswitchinterval(interval)
        for file in files:
            file.close()
    _write_metadata(folder / ".metadata", list(itertools.chain.from_iterable(written)), *classes)
    return {file.path.name: file.digest for file in files}


def _metadata_classes() -> tuple[ModuleType, ModuleType]:
    """Imported while the files are written: it takes half a second."""
    from torch.distributed.checkpoint import filesystem, metadata

    return metadata, filesystem


def _write_file(file: _File, part: Sequence[Piece | Blob], stop: Event) -> list[_Written]:
    written = []
    with skip_data():
        for one in part:
            start = file.tell()
            if isinstance(one, Piece):
                _save(one, file, stop)
            else:
                content = io.BytesIO()
                torch.save(one.value, content)
                file.write(content.getbuffer())
            written.append(_Written(one, file.path.name, start, file.tell() - start))
        os.fsync(file.fileno())
    return written


def _save(piece: Piece, file: _File, stop: Event) -> None:
    """What torch.save writes of a tensor, around values that come in chunks."""

    def values() -> Iterator[memoryview]:
        for chunk in piece.chunks():
            if stop.is_set():
                raise Stopped
            yield chunk

    file.skipped = values()
    try:
        torch.save(torch.empty(piece.shape, dtype=piece.dtype), file)  # memory that is never touched is none
    except RuntimeError as error:  # about a file position, whatever was raised in the middle
        raise file.failure or error from None


class _File(io.FileIO):
    """Written from beginning to end, with a CRC-32 of what was. Where `skip_data` skips values, `skipped` come."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "wb")
        self.path = path
        self.digest = 0
        self.skipped: Iterator[memoryview] | None = None
        self.failure: BaseException | None = None
        self._writeback = Writeback(self.fileno())
        self._end = 0

    def write(self, content: Any) -> int:
        """All of it, or OSError: one call of the kernel may write less, as on a disk that gets full."""
        left = memoryview(content)
        self.digest = zlib.crc32(left, self.digest)
        try:
            while left:
                left = left[super().write(left) :]
        except OSError as error:
            self.failure = error
            raise
        self._end += len(content)
        self._writeback.written(self._end)
        return len(content)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        assert self.skipped is not None and whence == os.SEEK_CUR, "nothing but values is skipped"
        try:
            written = sum(self.write(chunk) for chunk in self.skipped)
        except BaseException as error:
            self.failure = error
            raise
        assert written == offset, (written, offset)
        self.skipped = None
        return self.tell()


def _write_metadata(path: Path, written: Sequence[_Written], classes: Any, filesystem: Any) -> None:
    """Where all of it lies, as torch's FileSystemWriter notes it."""
    contents: dict[str, Any] = {}
    places = {}
    for one in written:
        what, offset = one.what, None
        if isinstance(what, Piece):
            offset = torch.Size(what.offset)
            entry = contents.setdefault(
                what.key,
                classes.TensorStorageMetadata(
                    properties=classes.TensorProperties(dtype=what.dtype), size=torch.Size(what.global_shape), chunks=[]
                ),
            )
            entry.chunks.append(classes.ChunkStorageMetadata(offsets=offset, sizes=torch.Size(what.shape)))
        else:
            contents[what.key] = classes.BytesStorageMetadata()
        places[classes.MetadataIndex(what.key, offset)] = filesystem._StorageInfo(one.file, one.start, one.num_bytes)
    metadata = classes.Metadata(contents, storage_data=places, storage_meta=classes.StorageMeta())
    metadata.version = filesystem.CURRENT_DCP_VERSION
    with path.open("wb") as file:
        pickle.dump(metadata, file)
        file.flush()
        os.fsync(file.fileno())
