"""Seconds and hours follow from counted FLOPs and bytes by arithmetic that can be done by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from steerlm2.data.packing import Group
from steerlm2.planning.estimate import (
    LINK_EFFICIENCY,
    Cluster,
    collectives,
    iteration_hours,
    needed_flops,
    step_time,
)
from steerlm2.planning.gpus import Gpu
from steerlm2.planning.jobs import Job, PlannedMicrobatch
from steerlm2.planning.trace import Trace
from steerlm2.planning.tracker import Collective, Traffic

MakeJob = Callable[..., Job[Any]]

GPU = Gpu("test", 80, 1e15, 1e14, memory_bytes=1e12, link_bytes=400e9, network_bytes=50e9)


HALF_THE_TOKENS = 2 * (2.7 / 2 + 0.3 * 1275 / 5050)
"""Seconds of 50 tokens with `trace` below, at half of GPU's rate."""


def trace(**traffic: float) -> Trace:
    """100 tokens: 1e15 FLOPs forward, 2e15 backward (a tenth of it attention), and what is sent."""
    return Trace(
        peak={},
        state={"parameters": 4e9, "gradients": 4e9, "optimizer": 8e9},
        flops={"forward": 1e15, "backward": 2e15},
        attention_flops={"forward": 1e14, "backward": 2e14},
        traffic={
            Collective("backward", "all_gather", dimension): Traffic(1, 2 * sent, sent)
            for dimension, sent in traffic.items()
        },
        tokens=100,
        pairs=100 * 101 // 2,
    )


def cluster(replicate: int = 1, shard: int = 1, tp: int = 1) -> Cluster:
    return Cluster(GPU, 8, replicate, shard, tp)


def on_ranks(*lengths: int, trains: bool = True) -> list[PlannedMicrobatch[Group]]:
    """A micro-batch of each rank with a group of so many tokens (its one response adds none)."""
    return [PlannedMicrobatch([Group(range(length), [[0]])], trains) for length in lengths]


def seconds(trace: Trace, step: list[list[PlannedMicrobatch[Group]]], where: Cluster) -> float:
    time = step_time(trace, [step], where, torch.bfloat16, 0.5)
    return time.seconds - time.update


def test_computation_at_the_efficiency() -> None:
    """3e15 FLOPs at half of 1e15 a second: 6 s."""
    assert seconds(trace(), [on_ranks(100)], cluster()) == pytest.approx(6)


def test_microbatches_of_other_lengths() -> None:
    """Half the tokens, 1275 of 5050 pairs: half of 2.7e15 FLOPs, 1275/5050 of 0.3e15."""
    assert seconds(trace(), [on_ranks(50)], cluster()) == pytest.approx(HALF_THE_TOKENS)


def test_the_longest_row_of_the_ranks_counts_and_rows_add_up() -> None:
    assert seconds(trace(), [on_ranks(100, 50), on_ranks(0, 50)], cluster()) == pytest.approx(
        6 + HALF_THE_TOKENS
    )


def test_a_forward_alone() -> None:
    """1e15 FLOPs: 2 s; what the backward sends isn't sent."""
    step = [on_ranks(100, trains=False)]
    assert seconds(trace(dp_shard=1e15), step, cluster(shard=2)) == pytest.approx(2)


def test_tensor_parallel_traffic_is_not_hidden() -> None:
    """320e9 bytes at 0.8 of 400e9 a second: 1 s, on top of 6; half of it for half the tokens."""
    where = cluster(tp=8)
    assert seconds(trace(tp=320e9), [on_ranks(100)], where) == pytest.approx(7)
    assert seconds(trace(tp=320e9), [on_ranks(50)], where) == pytest.approx(HALF_THE_TOKENS + 0.5)


@pytest.mark.parametrize(("sent", "expected"), [(160e9, 6), (400e9, 10)])
def test_data_parallel_traffic_is_hidden_up_to_the_computation(
    sent: float, expected: float
) -> None:
    """A rank of the group on each node, so 40e9 bytes a second: 4 s are hidden, 10 aren't."""
    assert seconds(trace(dp_shard=sent), [on_ranks(100)], cluster(shard=4, tp=8)) == pytest.approx(
        expected
    )


@pytest.mark.parametrize(
    ("where", "dimension", "rate"),
    [
        (cluster(tp=8, shard=4), "tp", 400e9),
        (cluster(tp=8, shard=4), "dp_shard", 50e9),  # each group has a network card of each node
        (cluster(tp=2, shard=4), "dp_shard", 400e9),  # 4 ranks, 2 apart: within a node
        (cluster(tp=2, shard=16), "dp_shard", 200e9),  # 4 of a group on a node: 4 cards
        (cluster(tp=1, shard=64), "dp_shard", 400e9),  # 8 cards together
        (cluster(replicate=2, shard=8), "dp_replicate", 50e9),
    ],
)
def test_rate_within_a_dimension(where: Cluster, dimension: str, rate: float) -> None:
    assert where.bytes_per_second(dimension) == pytest.approx(rate * LINK_EFFICIENCY)


def test_update_reads_the_state_and_writes_it_back() -> None:
    """16e9 bytes read, 12e9 written, at 1e12 a second; offloaded, 8e9 travel at 25e9 a second."""
    time = step_time(trace(), [[on_ranks(100)]], cluster(), torch.bfloat16, 0.5)
    assert time.update == pytest.approx(0.028)
    assert time.tokens == 100
    offloaded = step_time(
        trace(), [[on_ranks(100)]], cluster(), torch.bfloat16, 0.5, cpu_offload=True
    )
    assert offloaded.update == pytest.approx(0.028 + 0.32)


def test_collectives_are_summed_over_the_phases() -> None:
    (found,) = collectives(trace(tp=2**30))
    assert found == {
        **{"dimension": "tp", "operation": "all_gather", "count": 1},
        **{"gib": 2.0, "sent_gib": 1.0},
    }


def test_hours_of_an_iteration() -> None:
    """1e9 parameters, 3.6e9 sampled tokens at 10%: 7.2e18 / 1e14 = 72,000 s = 20 GPU-hours.
    Three forwards over 3,600 tokens at 50%: 3 * 36 * 1e15 / 5e14 = 216 s, by 2 GPUs."""
    found = iteration_hours(
        trace(),
        cluster(tp=2),
        torch.bfloat16,
        0.5,
        num_parameters=10**9,
        sampling_efficiency=0.1,
        sampled_tokens=3.6e9,
        packed_tokens=3600,
        training=5,
    )
    assert found.sampling == pytest.approx(20)
    assert found.scoring == pytest.approx(216 * 2 / 3600)
    assert found.total == pytest.approx(25 + 0.12)


def test_needed_flops(make_job: MakeJob) -> None:
    """A prompt of 10 with responses of 5 and 3 tokens: 10 + 4 + 2 tokens, 8 targets. A token sees
    those before it and itself: 55 in the prompt, 4 * 10 + 10 and 2 * 10 + 3 in the responses."""
    job = make_job("tiny/steerlm2")
    decoder = job.build()
    weights = sum(p.numel() for p in decoder.layers.parameters() if p.ndim == 2)
    output = decoder.output.weight.numel()
    attention = 12 * 128 * 2 * (55 + 50 + 23)
    expected = 6 * weights * 16 + 6 * output * 8 + attention
    assert needed_flops(decoder, [job.record(10, [5, 3])]) == expected
