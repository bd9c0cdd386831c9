"""Values copied from file to file as bytes, without a tensor in between: where they lie, and the copying itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_prorl.errors import UserError

WRITEBACK_BYTES = 32 * 2**20
CHUNK_BYTES = 2**20  # at a time, which stays in a core's cache: of 100 MB at once the kernel takes a third of the rate


class Files:
    """Files as they are now, of which somebody may write others while they are read."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._seen = {path: _identity(path) for path in paths}

    def check_unchanged(self) -> None:
        """Raise UserError that names the first that is another one by now."""
        for path, seen in self._seen.items():
            if not path.exists() or _identity(path) != seen:
                raise UserError(f"{path}: changed while it was read; begin again once it is as it should be")


def _identity(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@dataclass(frozen=True, slots=True)
class Span:
    """`num_bytes` of values from byte `start` of a file on; zeros where that is None."""

    path: Path | None
    start: int
    num_bytes: int


def copy_spans(
    spans: Sequence[Span], dtype: torch.dtype, to: torch.dtype, check: Callable[[Tensor], None]
) -> Iterator[memoryview]:
    """The values of `spans`, which have `dtype`, converted to dtype `to`, in order; `check` sees them as they leave.

    Raises UserError if a file ends before its span does, and OSError, with the file's name, if it cannot be read.
    """
    buffer = memoryview(bytearray(min(CHUNK_BYTES, max(span.num_bytes for span in spans))))
    for span in spans:
        for chunk in _read(span, buffer):
            values = torch.frombuffer(chunk, dtype=dtype).to(to)
            check(values)
            if dtype == to:
                yield chunk
            else:
                yield from tensor_chunks(values)


class Writeback:
    """Has the kernel write to the disk what was written to a file, while more is: so that fsync finds little left."""

    def __init__(self, descriptor: int, start: int = 0) -> None:
        self._descriptor, self._begun = descriptor, start

    def written(self, end: int) -> None:
        """All up to byte `end` was written."""
        if end - self._begun >= WRITEBACK_BYTES:
            # Drops clean pages, of which there are none in what was just written, and begins to write the others.
            os.posix_fadvise(self._descriptor, self._begun, end - self._begun, os.POSIX_FADV_DONTNEED)
            self._begun = end


def tensor_chunks(values: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor on the CPU."""
    whole = values.detach().contiguous().view(-1).view(torch.uint8).numpy().data
    for start in range(0, len(whole), CHUNK_BYTES):
        yield whole[start : start + CHUNK_BYTES]


def _read(span: Span, buffer: memoryview) -> Iterator[memoryview]:
    if span.path is None:
        buffer[:] = bytes(len(buffer))
        for start in range(0, span.num_bytes, len(buffer)):
            yield buffer[: span.num_bytes - start]
        return
    descriptor = os.open(span.path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, span.start, span.num_bytes, os.POSIX_FADV_SEQUENTIAL)
        start, end = span.start, span.start + span.num_bytes
        while start < end:
            wanted = buffer[: end - start]
            filled = 0
            while filled < len(wanted):
                try:
                    count = os.preadv(descriptor, [wanted[filled:]], start + filled)
                except OSError as error:
                    raise OSError(error.errno, error.strerror, str(span.path)) from None
                if not count:
                    raise UserError(f"{span.path}: cut off; copy it again")
                filled += count
            yield wanted
            start += filled
    finally:
        os.close(descriptor)


# Bits of infinity; NaNs are above. Read as integers, of which the processor finds the largest several times as fast.
_INFINITY = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000}
_INTEGERS = {2: (np.int16, np.uint16), 4: (np.int32, np.uint32)}


def is_finite(values: Tensor) -> bool:
    """Whether none of the values is NaN or infinite; bfloat16, float16 or float32, contiguous."""
    if not values.numel():
        return True
    signed, unsigned = _INTEGERS[values.itemsize]
    bits = values.view(-1).view(torch.uint8).numpy()
    infinity, sign = _INFINITY[values.dtype], 1 << (8 * values.itemsize - 1)
    return int(bits.view(signed).max()) < infinity and int(bits.view(unsigned).max()) < sign + infinity


class FiniteCheck:
    """Warns of every tensor that holds NaN or infinity, once. May be used by several threads."""

    def __init__(self, warn: Callable[..., Any]) -> None:
        self._warn = warn
        self._named: set[str] = set()
        self._lock = Lock()

    def check(self, name: str, values: Tensor) -> None:
        if name in self._named or is_finite(values):
            return
        with self._lock:
            if name not in self._named:
                self._named.add(name)
                self._warn("%s holds values that are not finite", name)
