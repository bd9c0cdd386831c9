"""Which rows of which tensors a layout puts where, found by sending row numbers through it. No Megatron."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Run:
    """Rows `first` to `first + count` of tensor number `source`; rows of zeros if that is None."""

    source: int | None
    first: int
    count: int


def shard_runs(shard: Callable[[list[Tensor]], Tensor], num_rows: Sequence[int]) -> list[Run]:
    """Of which rows of tensors with `num_rows` each `shard`, which moves rows only, makes its result, in order."""
    starts = [2 + sum(num_rows[:i]) + i for i in range(len(num_rows))]  # 0 is padding; a gap parts every two
    rows = shard([torch.arange(start, start + num)[:, None] for start, num in zip(starts, num_rows, strict=True)])
    found = []
    for first, count in _consecutive(rows.flatten()):
        if not first:
            found.append(Run(None, 0, count))
            continue
        source = max(i for i, start in enumerate(starts) if start <= first)
        found.append(Run(source, first - starts[source], count))
    return found


def full_runs(full: Callable[[Tensor], list[Tensor]], num_rows: int) -> list[list[Run]]:
    """Of which rows of one tensor with `num_rows` each result of `full`, which moves rows only, is made, in order."""
    return [
        [Run(0, first, count) for first, count in _consecutive(rows.flatten())]
        for rows in full(torch.arange(num_rows)[:, None])
    ]


def _consecutive(rows: Tensor) -> Iterator[tuple[int, int]]:
    """(first, count) of the stretches in which numbers rise by one, or are zeros and stay so."""
    steps = rows.diff()
    ends = ((steps != 1) & ((steps != 0) | (rows[1:] != 0))).nonzero().flatten() + 1
    bounds = [0, *ends.tolist(), len(rows)]
    for start, end in zip(bounds, bounds[1:], strict=False):
        if end > start:
            yield int(rows[start]), end - start


def cut(runs: Sequence[Run], start: int, end: int) -> Iterator[Run]:
    """The part of `runs` that makes rows `start` to `end` of their result."""
    at = 0
    for run in runs:
        low, high = max(start, at), min(end, at + run.count)
        if low < high:
            yield Run(run.source, run.first + (low - at if run.source is not None else 0), high - low)
        at += run.count
