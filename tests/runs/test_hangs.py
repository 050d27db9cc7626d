"""What counts as progress, and how long a position may take."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from steerlm2.distributed.world import World
from steerlm2.runs import hangs
from steerlm2.runs.hangs import LONG, HangWatch


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    clock = [0.0]
    monkeypatch.setattr(hangs.time, "monotonic", lambda: clock[0])
    return clock


def test_a_forward_is_progress_and_ends_the_patience_of_its_position(now: list[float]) -> None:
    """With 20 times the patience two forwards may take 20 x 5 seconds, the third one 5."""
    watch, decoder = HangWatch(World(torch.device("cpu")), 5), nn.Linear(2, 2)
    watch.follow(decoder)
    watch.at("validation", patience=LONG)
    shares = []
    for _ in range(3):
        decoder(torch.zeros(2))
        now[0] += 50
        shares.append(watch._waited())
    assert shares == [0.5, 0.5, 10]


def test_a_new_position_has_its_own_patience(now: list[float]) -> None:
    watch = HangWatch(World(torch.device("cpu")), 5)
    watch.at("saving", patience=LONG)
    now[0] += 5
    assert watch._waited() == 1 / LONG
    watch.at("step 1")
    now[0] += 5
    assert watch._waited() == 1


def test_ranks_whose_forwards_differ_are_at_the_same_place(now: list[float]) -> None:
    """A rank that samples shorter responses isn't behind; its forwards are progress."""
    watch, decoder = HangWatch(World(torch.device("cpu")), 5), nn.Linear(2, 2)
    watch.follow(decoder, alike=False)
    watch.at("group 1")
    count = watch._note().count
    now[0] += 5
    decoder(torch.zeros(2))
    assert watch._note().count == count
    assert watch._waited() == 0


def test_an_error_ends_the_watch() -> None:
    watch = HangWatch(World(torch.device("cpu")), 5)
    with pytest.raises(ValueError, match="no"), watch:
        raise ValueError("no")
    assert watch._closed.is_set()
