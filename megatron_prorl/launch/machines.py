"""All ranks of a run before it begins: who is where, what each of them finds, and a row of the table for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from megatron_prorl.config.schema import Config
from megatron_prorl.errors import UserError
from megatron_prorl.launch.footprint import Footprint

State = Literal["green", "amber", "red", "skipped"]
Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Row:
    """One check: what was found, what is asked, and for what is not green what to do. `nodes` are the culprits."""

    name: str
    state: State
    seen: str
    limit: str = ""
    advice: str = ""
    nodes: tuple[str, ...] = ()


class Failed(Exception):
    """A check cannot be made on some ranks; raised on all."""

    def __init__(self, failures: Mapping[int, str]) -> None:
        super().__init__(failures)
        self.failures = failures  # by rank


@dataclass(slots=True)
class Machines:
    """This rank among all ranks."""

    cfg: Config
    rank: int
    num_ranks: int
    kind: Literal["cuda", "cpu"]
    device: torch.device
    footprint: Footprint | None  # None where the model is not there
    hosts: list[str] = field(default_factory=list)  # by rank
    num_measured: int = 0
    tell: Callable[[str, str], None] = lambda what, text: None  # the store, for when no collective works any more

    @property
    def node(self) -> int:
        return self.rank // self.cfg.parallel.ranks_per_node

    @property
    def leads_node(self) -> bool:
        return self.rank % self.cfg.parallel.ranks_per_node == 0

    @property
    def leaders(self) -> list[int]:
        """The first rank of every node."""
        return list(range(0, self.num_ranks, self.cfg.parallel.ranks_per_node))

    def gather(self, measure: Callable[[], Found]) -> list[Found]:
        """What `measure` finds on every rank, by rank. Collective. Raises Failed on all ranks if it raises on one."""
        mine: tuple[Found | None, str]
        try:
            mine = (measure(), "")
        except Exception as error:
            mine = (None, in_words(error))
            self.tell("failed", in_words(error))
        self.num_measured += 1
        self.tell("reached", str(self.num_measured))
        everybodys: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(everybodys, mine)
        if failed := {rank: text for rank, (_, text) in enumerate(everybodys) if text}:
            raise Failed(failed)
        return [found for found, _ in everybodys]

    def of_first(self, measure: Callable[[], Found]) -> Found:
        """What `measure` finds on rank 0, on all ranks. Collective."""
        return self.gather(lambda: measure() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def gather_nodes(self, measure: Callable[[], Found]) -> dict[str, Found]:
        """What the first rank of every node finds, by the node's name, in the nodes' order. Collective."""
        found = self.gather(lambda: measure() if self.leads_node else None)
        return {self.node_name(rank): found[rank] for rank in self.leaders}  # type: ignore[misc]

    def nodes_of(self, ranks: Sequence[int]) -> tuple[str, ...]:
        """Names of the nodes of these ranks, each once."""
        return tuple(dict.fromkeys(map(self.node_name, ranks)))

    def node_name(self, rank: int) -> str:
        """Its host, with the node's number where several "nodes" are on one host."""
        hosts = [self.hosts[leader] for leader in self.leaders]
        host = self.hosts[rank]
        return host if hosts.count(host) < 2 else f"{host} (node {rank // self.cfg.parallel.ranks_per_node})"


def in_words(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def numbered(name: str, numbers: Sequence[int]) -> str:
    """ "ranks 3, 8 to 15"."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    shown = ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in spans)
    return f"{name}{'' if len(numbers) == 1 else 's'} {shown or 'none'}"
