"""Batches: a pass over the data has every group once, and follows from seed and step alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerlm2.training.batches import batch_of_step, steps_per_epoch


def epoch(number: int, *, num_groups: int = 10, size: int = 4, seed: int = 0) -> list[list[int]]:
    steps = steps_per_epoch(num_groups, size)
    return [
        batch_of_step(step, num_groups, size, seed)
        for step in range(number * steps, (number + 1) * steps)
    ]


def flat(batches: list[list[int]]) -> list[int]:
    return [index for batch in batches for index in batch]


@pytest.mark.parametrize(("num_groups", "steps"), [(1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_steps_of_an_epoch_round_up(num_groups: int, steps: int) -> None:
    """Batches of 4."""
    assert steps_per_epoch(num_groups, 4) == steps


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 3), st.integers(0, 2**31))
def test_an_epoch_has_every_group_once(num_groups: int, size: int, number: int, seed: int) -> None:
    batches = epoch(number, num_groups=num_groups, size=size, seed=seed)
    assert sorted(flat(batches)) == list(range(num_groups))


def test_only_the_last_batch_of_an_epoch_is_smaller() -> None:
    """10 = 4 + 4 + 2, in every epoch."""
    assert [[len(batch) for batch in epoch(number)] for number in range(3)] == [[4, 4, 2]] * 3


def test_epochs_differ_in_order() -> None:
    orders = {tuple(flat(epoch(number, num_groups=20))) for number in range(5)}
    assert len(orders) == 5


def test_seeds_differ_in_order() -> None:
    assert len({tuple(flat(epoch(0, num_groups=20, seed=seed))) for seed in range(5)}) == 5


def test_order_is_a_function_of_the_seed() -> None:
    assert epoch(3, seed=7) == epoch(3, seed=7)


def test_without_shuffle_groups_come_in_file_order_in_every_epoch() -> None:
    """10 groups in batches of 4: step 4 is the second batch of the second epoch."""
    assert batch_of_step(2, 10, 4, seed=0, shuffle=False) == [8, 9]
    assert batch_of_step(4, 10, 4, seed=0, shuffle=False) == [4, 5, 6, 7]


def test_large_seeds_draw_too() -> None:
    """The last one that a config can have (2^63 - 1), and one whose multiple is beyond 64 bits."""
    drawn = [flat(epoch(3, seed=seed)) for seed in (20261127120000, 2**63 - 2, 2**63 - 1)]
    assert all(sorted(order) == list(range(10)) for order in drawn)
    assert len({tuple(order) for order in drawn}) == 3
