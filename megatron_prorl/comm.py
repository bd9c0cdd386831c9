"""The control channel between trainer ranks: Python objects over a gloo group of its own.

Rank 0 may wait for rollouts for a long time while the others stand in `broadcast`, so this group's timeout is long; the
groups that carry tensors keep theirs.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_prorl import heartbeat

Item = TypeVar("Item")

_TIMEOUT = timedelta(days=2)
_control: Any = None


def init_control_group() -> None:
    """Create the group; collective, once, after torch.distributed is initialised."""
    global _control
    _control = dist.new_group(backend="gloo", timeout=_TIMEOUT)


def rank() -> int:
    return dist.get_rank()


def is_rank_zero() -> bool:
    return rank() == 0


def broadcast(item: Item | None) -> Item:
    """Rank 0's item, on every rank."""
    box = [item]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(box, src=0, group=_control)
    heartbeat.beat()
    return box[0]  # type: ignore[return-value]


def gather(item: Item) -> list[Item]:
    """Every rank's item, in rank order, on every rank."""
    items: list[Any] = [item] * dist.get_world_size()
    if len(items) > 1:
        dist.all_gather_object(items, item, group=_control)
    heartbeat.beat()
    return items


def barrier() -> None:
    """Wait for every rank."""
    dist.barrier(group=_control)
    heartbeat.beat()
