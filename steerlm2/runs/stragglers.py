"""Which rank the others wait for.

Ranks wait for each other in every layer, so that a step takes the same time on all. What differs is
the time that a rank needs for its own computation. It is taken in the forwards of the layers, after
the shards of the other ranks have come: by CUDA events on a GPU, which wait for nothing, and by the
clock on a CPU. Ranks of one tensor-parallel group wait for each other inside of layers, and are
slow together. What a rank does outside of layers isn't seen here.
"""

from __future__ import annotations

import socket
import statistics
import time
from typing import Any

import torch
from torch import nn
from torchtune.modules import TransformerDecoder

from steerlm2.config.loader import LOG
from steerlm2.distributed.world import World
from steerlm2.runs.logs import warn


class Stragglers:
    """Compares the ranks' own times at log steps, and warns of one that stays behind.

    Args:
        decoder: after `parallelize`.
        share: of the median time by which a rank must be slower.
        times: log steps in a row at which it must be, to be warned of.
    """

    def __init__(
        self, decoder: TransformerDecoder, world: World, *, share: float = 0.2, times: int = 10
    ) -> None:
        self.world = world
        self.share = share
        self.times = times
        self._marks: list[Any] = []  # begin and end of each layer, in turn
        self._slow_for = [0] * world.size
        self._hosts = world.gather(socket.gethostname())
        if world.size > 1:
            for layer in decoder.layers:
                layer.register_forward_pre_hook(self._mark)
                layer.register_forward_hook(self._mark)

    def look(self, step: int) -> dict[str, float]:
        """`slowest_rank_lag` since the last look: the share of the median time by which the slowest
        rank was slower. To be called by all ranks, where a GPU has just been waited for.

        Returns:
            Nothing for a single process.
        """
        if self.world.size == 1:
            return {}
        times_R = torch.zeros(self.world.size)
        times_R[self.world.rank] = self._take_seconds()
        times = self.world.max(times_R).tolist()  # on the host
        LOG.info(f"step {step}: {times[self.world.rank]:.3f} s in the layers' forwards")
        median = statistics.median_low(times)  # of two ranks the faster one
        if median <= 0:
            return {}
        lags = [seconds / median - 1 for seconds in times]
        for rank, lag in enumerate(lags):
            self._slow_for[rank] = self._slow_for[rank] + 1 if lag > self.share else 0
            if self._slow_for[rank] == self.times and self.world.is_main:
                warn(
                    f"step {step}: rank {rank} on {self._hosts[rank]} is slow: for {self.times} "
                    f"log steps its layers have taken more than {self.share:.0%} longer than the "
                    f"median rank's (now {lag:.0%}), and all others wait for it"
                )
        return {"slowest_rank_lag": max(lags)}

    @torch.compiler.disable
    def _mark(self, layer: nn.Module, *values: Any) -> None:
        if not layer.training:
            return
        if self.world.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def _take_seconds(self) -> float:
        marks, self._marks = self._marks, []
        pairs = zip(marks[::2], marks[1::2], strict=True)
        if self.world.device.type == "cuda":
            return sum(begin.elapsed_time(end) for begin, end in pairs) / 1000
        return sum(end - begin for begin, end in pairs)
