"""SIGTERM, by which a scheduler asks for the nodes, ends a training after its current step."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

import torch

from steerlm2.distributed.world import World


class StopRequest:
    """A context manager in which SIGTERM sets a flag instead of ending the process.

        with StopRequest(world) as stop:
            for step in ...:
                ...
                if stop.asked(): save, and leave the loop

    A run that was asked ignores SIGTERM from then on: launcher and scheduler often both send it,
    and the run is ending already. For one that wasn't, the earlier handler comes back with the end
    of the context, also for a signal that came too late to be asked about: what follows, the
    export, can be ended.
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
        if self._asked or (self._received and error is not None):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            return
        signal.signal(signal.SIGTERM, self._before)
        if self._received:
            signal.raise_signal(signal.SIGTERM)

    def asked(self) -> bool:
        """Whether any rank has received SIGTERM, on every rank. Called by all ranks."""
        # A tensor on the host, also with GPUs: reading one on a GPU would wait for the step.
        self._asked = bool(self.world.max(torch.tensor(float(self._received))).item())
        return self._asked

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = True
