"""Items come in order with what is made of them, one ahead of their use."""

from __future__ import annotations

import threading

import pytest

from steerlm2.training.prefetch import prefetch


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_items_come_in_order_with_their_results(count: int) -> None:
    assert list(prefetch(lambda i: i * i, range(count))) == [(i, i * i) for i in range(count)]


def test_the_next_item_is_made_while_one_is_used() -> None:
    """Making the second would wait forever if it only began after the first was used."""
    made = threading.Event()

    def make(item: int) -> int:
        if item == 1:
            made.set()
        return item

    for item, _ in prefetch(make, range(2)):
        assert item != 0 or made.wait(timeout=60)


def test_no_more_than_one_is_made_ahead() -> None:
    """While item 0 is used 1 may have been made, 2 is not even begun."""
    begun: list[int] = []
    for item, _ in prefetch(begun.append, range(5)):
        assert len(begun) <= item + 2


def test_errors_come_at_their_item() -> None:
    """1 / 1 is there before 1 / 0 fails."""
    items = prefetch(lambda i: 1 / i, [1, 0])
    assert next(items) == (1, 1)
    with pytest.raises(ZeroDivisionError):
        next(items)
