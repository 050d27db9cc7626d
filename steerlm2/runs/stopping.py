"""SIGTERM, by which a scheduler asks for the nodes, ends a run after its current step."""

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

    After the context SIGTERM is ignored if the run is ending regularly: launcher and scheduler
    often both send it, and then only the export is left to do.
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
        """Whether any rank has received SIGTERM, on every rank. Called by all ranks."""
        # A tensor on the host, also with GPUs: reading one on a GPU would wait for the step.
        self._asked = bool(self.world.max(torch.tensor(float(self._received))).item())
        return self._asked

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = True
