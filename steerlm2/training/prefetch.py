"""Prefetching: the host prepares the batch of the next step while this step runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def prefetch(
    make: Callable[[ItemT], ResultT], items: Iterable[ItemT]
) -> Iterator[tuple[ItemT, ResultT]]:
    """Each item with `make(item)`, which a thread computes one item ahead of its use.

    An exception of `make` is raised when its item is asked for.
    """
    with ThreadPoolExecutor(max_workers=1) as worker:
        waiting: tuple[ItemT, Future[ResultT]] | None = None
        for item in items:
            following = item, worker.submit(make, item)
            if waiting:
                yield waiting[0], waiting[1].result()
            waiting = following
        if waiting:
            yield waiting[0], waiting[1].result()
