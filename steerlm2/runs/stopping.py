"""A run that is told to end (SIGTERM: a scheduler needs the nodes) ends after the step it is in."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

import torch

from steerlm2.distributed.world import World


class StopRequest:
    """While it is entered, SIGTERM is noted instead of ending the process.

        with StopRequest(world) as stop:
            for step in ...:
                ...
                if stop.asked(): save, and leave the loop

    It may come again, or for the first time, while the run is ending: launcher and scheduler often
    both send it, and a run that has trained has only to export. Then it changes nothing.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._received = False
        self._asked = False
        self._before: Any = None

    def __enter__(self) -> StopRequest:
        self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        ending = error is None or self._received or self._asked
        signal.signal(signal.SIGTERM, signal.SIG_IGN if ending else self._before)

    def asked(self) -> bool:
        """Whether any rank has received it; the same on all. To be called by all of them."""
        # On the host, also of a GPU run: reading a GPU's tensor would wait for the step.
        self._asked = bool(self.world.max(torch.tensor(float(self._received))).item())
        return self._asked

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = True
