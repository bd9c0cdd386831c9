"""Work that several threads share, of which any error, and Ctrl-C, stops all. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from threading import Condition, Event
from typing import TypeVar

CTRL_C_SECONDS = 0.1  # Python misses one that comes just as it begins to wait for a lock, until the wait ends

T = TypeVar("T")


class Stopped(Exception):
    """Another thread failed."""


def in_threads(work: Sequence[Callable[[], T]], stop: Event) -> list[T]:
    """The result of each of `work`, which run at the same time.

    Once one of them raises, or Ctrl-C comes, `stop` is set: all have to look at it often, and to raise Stopped then.
    Returns, and raises what was raised first of all but Stopped, when none of them is running any more.
    """
    running = 0
    changed = Condition()  # of `running`

    @contextmanager
    def none_left() -> Iterator[None]:
        """The pool forgets a thread when Ctrl-C comes while it is being started."""
        try:
            yield
        finally:
            with changed:
                changed.wait_for(lambda: running == 0)

    @contextmanager
    def stopping_all() -> Iterator[None]:
        try:
            yield
        except BaseException:
            stop.set()
            raise

    def run(one: Callable[[], T]) -> T:
        nonlocal running
        with changed:
            if stop.is_set():
                raise Stopped
            running += 1
        try:
            with stopping_all():
                return one()
        finally:
            with changed:
                running -= 1
                changed.notify()

    with ThreadPoolExecutor(max(1, len(work))) as threads, none_left(), stopping_all():
        futures = [threads.submit(run, one) for one in work]
        while wait(futures, timeout=CTRL_C_SECONDS).not_done:
            pass
        errors = [error for future in futures if (error := future.exception())]
        for error in sorted(errors, key=lambda error: isinstance(error, Stopped)):
            raise error
        return [future.result() for future in futures]


def equal_parts(items: Sequence[T], num_parts: int, size: Callable[[T], int]) -> list[list[T]]:
    """The items in their order, cut where the parts have about equal sizes; parts without an item are left out."""
    parts: list[list[T]] = [[] for _ in range(num_parts)]
    total, end = sum(size(item) for item in items), 0
    for item in items:
        end += size(item)
        parts[min(num_parts - 1, max(0, end - 1) * num_parts // max(1, total))].append(item)
    return [part for part in parts if part]
