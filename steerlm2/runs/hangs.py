"""Says within a minute which rank the others wait for in vain, and where each of them is.

The recipe notes where it is (`at`), micro-batch by micro-batch; every forward of the model is
progress too (`follow`). A thread of every rank puts the
note into the store in which the ranks have met, again and again: that shows that the process lives.
When no living rank has come further for `seconds`, the lowest of them names those that stayed
behind. It is no more than a message: what takes long may go on, and what doesn't is ended by the
timeout of the collectives. Where a GPU hangs, its host may already have noted a later micro-batch;
the flight recorder's files say which collective it is.
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
"""The message comes at most three beats late: the own one, the other ranks' and the judge's."""
BEATS_OF_SILENCE = 3.5
"""A process without a beat for so long is stopped, or its node is lost."""
LONG = 20.0
"""Patience with loading, compiling, validating and writing weights."""
HOW_ON = (
    "the stacks of all are in logs/rank_*.log. The run goes on if they do; otherwise it ends after "
    "collective_timeout_seconds."
)


class HangWatch:
    """Watches the progress of all ranks until `close`.

    Args:
        seconds: without progress before it is said; None: never. A single process isn't watched.
    """

    def __init__(self, world: World, seconds: float | None) -> None:
        self.world = world
        self.seconds = seconds
        self._main = threading.get_ident()
        self._closed = threading.Event()
        self._beats = 0
        self._count = 0
        self._forwards = 0  # since the last place
        self.at("setup", patience=LONG)
        if world.size == 1 or seconds is None:
            return
        self._pause = min(MAX_SECONDS_PER_BEAT, seconds / 10)
        self._silence = BEATS_OF_SILENCE * self._pause
        # A connection of its own: the main thread may be waiting on the other one.
        store: Any = dist.distributed_c10d._get_default_store()
        self._store = store.clone()
        self._put()
        self._notes = world.gather(self._note())  # and so all have put theirs
        self._heard = [0.0] * world.size  # when a new beat of each rank was read
        self._read_at = 0.0
        self._worried_since: float | None = None
        for loop in (self._exchange, self._judge):
            threading.Thread(target=loop, daemon=True).start()

    def at(self, place: str, *, patience: float = 1.0) -> None:
        """Note that this rank is at a place; all ranks come to the same ones in the same order.

        Args:
            patience: how many times longer than usual it may stay there.
        """
        self._count += 1
        self._forwards = 0
        self._place = (self._count, place, time.monotonic(), patience)

    def follow(self, decoder: nn.Module) -> None:
        """Count a decoder's forwards as progress. The patience with a place ends after two of them,
        which may compile.
        """
        decoder.register_forward_pre_hook(lambda *_: self._forward())

    def _forward(self) -> None:
        _, place, _, patience = self._place
        self._count += 1
        self._forwards += 1
        now = time.monotonic()
        self._place = (self._count, place, now, patience if self._forwards <= 2 else 1.0)

    def close(self) -> None:
        self._closed.set()

    def _waited(self) -> float:
        """At the place where this rank is, as a share of what it may."""
        _, _, since, patience = self._place
        return (time.monotonic() - since) / ((self.seconds or 1) * patience)

    def _note(self) -> Note:
        count, place, _, _ = self._place
        frames = [frame for frame, _ in traceback.walk_stack(sys._current_frames()[self._main])]
        code = frames[0].f_code
        return Note(
            socket.gethostname(),
            self._beats,
            count,
            place,
            f"{code.co_name} ({os.path.basename(code.co_filename)}:{frames[0].f_lineno})",
            communicates=any("/torch/distributed/" in f.f_code.co_filename for f in frames),
            overdue=self._waited() >= 1,
        )

    def _put(self) -> None:
        self._store.set(f"hang_watch/{self.world.rank}", json.dumps(asdict(self._note())))

    def _exchange(self) -> None:
        """Put the own note, and read those of all while there may be a reason to."""
        keys = [f"hang_watch/{rank}" for rank in range(self.world.size)]
        while not self._closed.wait(self._pause):
            self._beats += 1
            try:
                self._put()
                if self._waited() < 0.5:
                    self._worried_since = None
                    continue
                if self._worried_since is None:
                    now = time.monotonic()
                    self._heard, self._read_at = [now] * self.world.size, now
                    self._worried_since = now
                notes = [Note(**json.loads(text)) for text in self._store.multi_get(keys)]
            except RuntimeError:  # the store is gone, and the run with it
                return
            self._read_at = time.monotonic()
            for rank, (note, before) in enumerate(zip(notes, self._notes, strict=True)):
                if note.beat != before.beat:
                    self._heard[rank] = self._read_at
            self._notes = notes

    def _judge(self) -> None:
        """Say it once when nothing goes on, and when it goes on again."""
        looked_at = time.monotonic()
        while not self._closed.wait(self._pause):
            before, looked_at = looked_at, time.monotonic()
            if looked_at - before > self._silence:
                self._worried_since = None  # it is this rank that was stopped
            count, judgement = self._count, self._judgement(looked_at)
            if judgement is None:
                continue
            stack = "".join(traceback.format_stack(sys._current_frames()[self._main]))
            LOG.warning(f"no rank comes further; this one is at {self._place[1]}:\n{stack}")
            speaker, text = judgement
            if self.world.rank == speaker:
                warn(text)
            while self._count == count and not self._closed.wait(self._pause):
                looked_at = time.monotonic()
            if self.world.rank == speaker and not self._closed.is_set():
                warn(f"the ranks go on: {self._place[1]}")

    def _judgement(self, now: float) -> tuple[int, str] | None:
        """The rank that speaks for all, and what it says; None while there is nothing to say."""
        since = self._worried_since
        if since is None or now - since < self._silence or self._waited() < 1:
            return None
        notes = self._notes
        waited = f"no rank has come further for {self.seconds:g} seconds (hang_timeout_seconds)."
        if now - self._read_at > self._silence:
            return 1, (
                f"{waited} Rank 0 on {notes[0].host} is stopped or lost, or the launcher there: "
                f"it holds the store with the notes of all. Rank 1 is at {self._place[1]}; {HOW_ON}"
            )
        silent = [rank for rank, heard in enumerate(self._heard) if now - heard > self._silence]
        living = [rank for rank in range(len(notes)) if rank not in silent]
        if not all(notes[rank].overdue for rank in living):
            return None
        return living[0], f"{waited} {describe(notes, silent)}\n{HOW_ON}"
