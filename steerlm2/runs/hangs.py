"""The hang watch: reports within a minute which rank the others wait for, and where each rank is.

The recipe records its position in the run (`at`), micro-batch by micro-batch; every forward of the
model counts as progress too (`follow`). On every rank a thread writes the position into the
process group's store again and again, as a heartbeat. When no living rank has made progress for
`seconds`, the lowest of them reports the ranks that are behind. The hang watch only reports: a slow
run can go on, and a run that hangs is ended by the timeout of the collectives. When a GPU hangs,
the position on its host can be a later micro-batch; the flight recorder's files name the
collective.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from dataclasses import asdict
from typing import Any

import torch.distributed as dist
from torch import nn

from steerlm2.config.loader import LOG
from steerlm2.distributed.world import World
from steerlm2.runs.hang_notes import Note, describe
from steerlm2.runs.logs import warn

MAX_SECONDS_PER_BEAT = 4.0
"""Seconds between two heartbeats, at most. A choice: the report comes up to three heartbeats late
(this rank's, the other ranks' and that of `_watch_progress`), so with the default of 45 seconds
within a minute; every heartbeat is one write to the store."""
BEATS_OF_SILENCE = 3.5
"""After so many missing heartbeats a process counts as stopped or lost. A choice: three may be late
on a busy machine, and more would delay the report."""
LONG = 20.0
"""Patience with loading, compiling, validating and writing weights. A choice: with the default of
45 seconds it is 15 minutes, enough for all that was measured, and a hang there is reported late."""
HOW_ON = (
    "the stacks of all ranks are in logs/rank_*.log. The run goes on if the missing ranks do; "
    "otherwise it ends after collective_timeout_seconds."
)


class HangWatch:
    """Watches the progress of all ranks until `close`, or as a context manager.

    Args:
        seconds: without progress, after which it is reported; None: never. A single process isn't
            watched.
    """

    def __init__(self, world: World, seconds: float | None) -> None:
        self.world = world
        self.seconds = seconds
        self._main = threading.get_ident()
        self._closed = threading.Event()
        self._beats = 0
        self._count = 0
        self._forwards = 0  # since the last call of `at`
        self.at("setup", patience=LONG)
        if world.size == 1 or seconds is None:
            return
        self._pause = min(MAX_SECONDS_PER_BEAT, seconds / 10)
        self._silence = BEATS_OF_SILENCE * self._pause
        # A separate connection: the main thread may be blocked on the other one.
        store: Any = dist.distributed_c10d._get_default_store()
        self._store = store.clone()
        self._put()
        self._notes = world.gather(self._note())  # after it every rank's note is in the store
        self._heard = [0.0] * world.size  # when a new beat of each rank was read
        self._read_at = 0.0
        self._stalled_since: float | None = None
        for loop in (self._exchange, self._watch_progress):
            threading.Thread(target=loop, daemon=True).start()

    def at(self, position: str, *, patience: float = 1.0) -> None:
        """Record this rank's position in the run.

        Args:
            position: as text, such as "step 3, update"; all ranks pass the same positions in the
                same order.
            patience: a factor for `seconds` at this position.
        """
        self._count += 1
        self._forwards = 0
        self._position = (self._count, position, time.monotonic(), patience)

    def follow(self, decoder: nn.Module, *, alike: bool = True) -> None:
        """Count a decoder's forwards as progress.

        A position's patience holds for its first two forwards, which may compile; then it is 1.

        Args:
            alike: all ranks run the same number of forwards, so that one with fewer is behind.
        """
        decoder.register_forward_pre_hook(lambda *_: self._forward(alike))

    def _forward(self, alike: bool) -> None:
        _, position, _, patience = self._position
        self._count += alike
        self._forwards += 1
        now = time.monotonic()
        self._position = (self._count, position, now, patience if self._forwards <= 2 else 1.0)

    def close(self) -> None:
        self._closed.set()

    def __enter__(self) -> HangWatch:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _waited(self) -> float:
        """Time without progress on this rank, as a share of the time that is allowed."""
        _, _, since, patience = self._position
        return (time.monotonic() - since) / ((self.seconds or 1) * patience)

    def _note(self) -> Note:
        count, position, _, _ = self._position
        frames = [frame for frame, _ in traceback.walk_stack(sys._current_frames()[self._main])]
        code = frames[0].f_code
        return Note(
            socket.gethostname(),
            self._beats,
            count,
            position,
            f"{code.co_name} ({os.path.basename(code.co_filename)}:{frames[0].f_lineno})",
            communicates=any("/torch/distributed/" in f.f_code.co_filename for f in frames),
            overdue=self._waited() >= 1,
        )

    def _put(self) -> None:
        self._store.set(f"hang_watch/{self.world.rank}", json.dumps(asdict(self._note())))

    def _exchange(self) -> None:
        """Write this rank's note at every heartbeat; read all notes while progress is overdue."""
        keys = [f"hang_watch/{rank}" for rank in range(self.world.size)]
        while not self._closed.wait(self._pause):
            self._beats += 1
            try:
                self._put()
                if self._waited() < 0.5:
                    self._stalled_since = None
                    continue
                if self._stalled_since is None:
                    now = time.monotonic()
                    self._heard, self._read_at = [now] * self.world.size, now
                    self._stalled_since = now
                notes = [Note(**json.loads(text)) for text in self._store.multi_get(keys)]
            except RuntimeError:  # the store is gone, and the run with it
                return
            self._read_at = time.monotonic()
            for rank, (note, before) in enumerate(zip(notes, self._notes, strict=True)):
                if note.beat != before.beat:
                    self._heard[rank] = self._read_at
            self._notes = notes

    def _watch_progress(self) -> None:
        """Report a hang once, and once more when the run goes on."""
        now = time.monotonic()
        while not self._closed.wait(self._pause):
            before, now = now, time.monotonic()
            if now - before > self._silence:
                self._stalled_since = None  # this process itself was stopped: start over
            position, report = self._position, self._hang_report(now)
            if report is None:
                continue
            stack = "".join(traceback.format_stack(sys._current_frames()[self._main]))
            LOG.warning(f"no rank is making progress; this one is at {self._position[1]}:\n{stack}")
            reporting_rank, text = report
            if self.world.rank == reporting_rank:
                warn(text)
            while self._position is position and not self._closed.wait(self._pause):
                now = time.monotonic()
            if self.world.rank == reporting_rank and not self._closed.is_set():
                warn(f"the ranks go on: {self._position[1]}")

    def _hang_report(self, now: float) -> tuple[int, str] | None:
        """The rank that reports a hang, and its message; None while there is no hang."""
        since = self._stalled_since
        if since is None or now - since < self._silence or self._waited() < 1:
            return None
        notes = self._notes
        waited = f"no rank has made progress for {self.seconds:g} seconds (hang_timeout_seconds)."
        if now - self._read_at > self._silence:
            return 1, (
                f"{waited} Rank 0 on {notes[0].host} is stopped or lost, or the launcher there: "
                f"it holds the store with all positions. Rank 1 is at {self._position[1]}; {HOW_ON}"
            )
        silent = [rank for rank, heard in enumerate(self._heard) if now - heard > self._silence]
        living = [rank for rank in range(len(notes)) if rank not in silent]
        if not all(notes[rank].overdue for rank in living):
            return None
        return living[0], f"{waited} {describe(notes, silent)}\n{HOW_ON}"
