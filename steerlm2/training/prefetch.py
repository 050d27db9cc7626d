"""What a step needs from the host is made while the step before it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def ahead(
    make: Callable[[ItemT], ResultT], items: Iterable[ItemT]
) -> Iterator[tuple[ItemT, ResultT]]:
    """Each item with `make(item)`; a thread makes the next one meanwhile.

    What `make` raises is raised where its item would come.
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
