"""Stragglers: ranks whose own computation is slower than that of the others.

Ranks wait for each other in every layer, so a step takes the same time on all of them. What differs
is the time of a rank's own computation. It is measured in the forwards of the layers, after the
all-gather of their parameters: with CUDA events on a GPU (which don't synchronize), with the clock
on a CPU. Ranks of one tensor-parallel group wait for each other inside of layers, so they are slow
together. Work outside of layers isn't measured.
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
    """Compares the ranks' own times at log steps, and warns of a straggler.

    The defaults are a choice: 20% is above the differences of ranks by their micro-batches, which
    are balanced to a few percent (tests/benchmarks/README.md, "Packing") and change from step to
    step; a rank that is slower ten times in succession has another cause. Fewer times would warn
    earlier, and more often of nothing.

    Args:
        decoder: after `parallelize`.
        share: a rank is slow if it takes longer than the median by more than this share.
        times: consecutive log steps at which a rank must be slow for a warning.
    """

    def __init__(
        self, decoder: TransformerDecoder, world: World, *, share: float = 0.2, times: int = 10
    ) -> None:
        self.world = world
        self.share = share
        self.times = times
        self._marks: list[Any] = []  # begin and end of each layer, alternating
        self._slow_for = [0] * world.size
        self._hosts = world.gather(socket.gethostname())
        if world.size > 1:
            for layer in decoder.layers:
                layer.register_forward_pre_hook(self._mark)
                layer.register_forward_hook(self._mark)

    def look(self, step: int) -> dict[str, float]:
        """Compare the ranks' times since the last call. Called by all ranks.

        It reads CUDA events, so it is to be called just after a synchronization with the GPU.

        Returns:
            `slowest_rank_lag`: the share of the median time by which the slowest rank was slower;
            nothing for a single process.
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
