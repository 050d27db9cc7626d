"""SIGTERM, by which a scheduler asks for the nodes, and Ctrl-C end a training after its step."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

import torch

from steerlm2.distributed.world import World

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class InterruptedRunError(KeyboardInterrupt):
    """Ctrl-C ended a run that has saved all that it did, as the message says."""


class StopRequest:
    """A context manager in which SIGTERM and SIGINT set a flag instead of ending the process.

        with StopRequest(world) as stop:
            for step in ...:
                ...
                if stop.asked(): save, and leave the loop

    A run that was asked ignores SIGTERM from then on: launcher and scheduler often both send it,
    and the run is ending already. A second SIGINT ends it at once: a person needn't wait for a long
    step. For one that wasn't asked, the earlier handlers come back with the end of the context,
    also for a signal that came too late to be asked about: what follows, the export, can be ended.

    Attributes:
        received: the first signal that came to this process; None: none did.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.received: signal.Signals | None = None
        self._asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        # A shell that starts something in the background lets it ignore SIGINT.
        heeded = [each for each in SIGNALS if signal.getsignal(each) != signal.SIG_IGN]
        self._before = {each: signal.signal(each, self._note) for each in heeded}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        is_ending = self._asked or (self.received is not None and error is not None)
        if is_ending:  # at once: another signal may come at any moment
            self._before[signal.SIGTERM] = signal.SIG_IGN
        for each, handler in self._before.items():
            signal.signal(each, handler)
        if self.received is not None and not is_ending:
            signal.raise_signal(self.received)

    def asked(self) -> bool:
        """Whether any rank has received a signal, on every rank. Called by all ranks."""
        # A tensor on the host, also with GPUs: reading one on a GPU would wait for the step.
        came = float(self.received is not None)
        self._asked = bool(self.world.max(torch.tensor(came)).item())
        return self._asked

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is None:
            self.received = signal.Signals(number)
