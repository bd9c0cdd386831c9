"""What this process does, what it waits for, and when it last moved; `stalls` names by it what a run hangs in.

Code that works says so with `beat`, which costs a tenth of a microsecond: after every microbatch, response, verdict,
tensor and piece of a file. A wait that has a limit of its own, at whose end something is done about it, beats too. All
functions may be called from any thread. No torch here.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

Item = TypeVar("Item")
Kind = Literal["engine", "verifier", "disk"]


@dataclass(frozen=True, slots=True)
class Wait:
    """Something outside of this process that has been asked and has not answered."""

    kind: Kind
    name: str  # which one: the URL of an engine, the folder that is written
    what: str  # it was asked for
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """This process at one moment."""

    still_seconds: float  # since it last moved
    phase: str
    doing: str  # within the phase, such as "microbatch 3 of 12"; may be empty
    waits: tuple[Wait, ...]  # the longest first


_moved = time.monotonic()
_phase, _doing = "start", ""
_waits: dict[object, tuple[Kind, str, str, float]] = {}


def beat() -> None:
    """Something moved."""
    global _moved
    _moved = time.monotonic()


def phase(name: str) -> None:
    """The main thread now does `name`."""
    global _phase, _doing
    _phase, _doing = name, ""
    beat()


def doing(what: str) -> None:
    """How far the main thread is in its phase."""
    global _doing
    _doing = what
    beat()


def beating(items: Iterable[Item]) -> Iterator[Item]:
    """The same items, each of which is a move."""
    for item in items:
        beat()
        yield item


@contextmanager
def waiting(kind: Kind, name: str, what: str) -> Iterator[None]:
    """While the block runs, `name` is asked for `what`; its answer is a move, whatever it is."""
    key = object()
    _waits[key] = (kind, name, what, time.monotonic())
    try:
        yield
    finally:
        _waits.pop(key, None)
        beat()


def now() -> Beat:
    at = time.monotonic()
    waits = [Wait(kind, name, what, at - since) for kind, name, what, since in list(_waits.values())]
    return Beat(still_seconds=at - _moved, phase=_phase, doing=_doing, waits=tuple(waits))
