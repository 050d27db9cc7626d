"""SIGTERM and Ctrl-C are noted while a run trains, and end it as usual before and afterwards."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch

from steerlm2.distributed.world import World
from steerlm2.runs.stopping import StopRequest

WORLD = World(torch.device("cpu"))


@pytest.fixture
def received() -> Iterator[list[int]]:
    """Signals that reach the handler from before."""
    got: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    yield got
    signal.signal(signal.SIGTERM, before)


def test_a_request_is_noted(received: list[int]) -> None:
    with StopRequest(WORLD) as stop:
        assert not stop.asked()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked()
    assert received == []


def test_a_request_that_comes_again_while_the_run_ends_changes_nothing(
    received: list[int],
) -> None:
    with StopRequest(WORLD) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked()
    os.kill(os.getpid(), signal.SIGTERM)
    assert received == []


def test_a_request_after_the_training_reaches_the_earlier_handler(received: list[int]) -> None:
    """What is left is the export, which a signal ends."""
    with StopRequest(WORLD) as stop:
        assert not stop.asked()
    os.kill(os.getpid(), signal.SIGTERM)
    assert received == [signal.SIGTERM]


def test_a_request_after_the_last_question_reaches_the_earlier_handler(
    received: list[int],
) -> None:
    """It comes in the last step's validation, say: nobody asks for it any more."""
    with StopRequest(WORLD) as stop:
        assert not stop.asked()
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == []
    assert received == [signal.SIGTERM]


def test_after_an_error_the_earlier_handler_comes_back(received: list[int]) -> None:
    with pytest.raises(KeyError), StopRequest(WORLD):
        raise KeyError
    os.kill(os.getpid(), signal.SIGTERM)
    assert received == [signal.SIGTERM]


def test_ctrl_c_is_noted_and_a_second_one_ends_the_run_at_once() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopRequest(WORLD) as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.received == signal.SIGINT
            assert stop.asked()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    """As in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest(WORLD) as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop.asked()
    finally:
        signal.signal(signal.SIGINT, before)
