"""Seconds of a step and hours of a job, from a trace, the GPU's rates and assumed efficiencies.

A micro-batch costs in proportion to the traced one: matrix products and tensor-parallel traffic by
its tokens, attention by its pairs of tokens. FSDP2's traffic is the same for every micro-batch. It
overlaps with the computation, tensor-parallel collectives don't:

    seconds of a micro-batch = max(computation + tensor parallel, data parallel)

All ranks wait for each other in every micro-batch, so the costliest one of the ranks counts.
Gradients are reduced between replicas in a step's last micro-batch only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import LoRALinear

from steerlm2.data.packing import Dialogue, Group
from steerlm2.planning.gpus import HOST_LINK_BYTES, Gpu
from steerlm2.planning.jobs import PlannedMicrobatch
from steerlm2.planning.trace import Trace
from steerlm2.planning.tracker import Collective

LINK_EFFICIENCY = 0.8
"""Share of a link's rate that large collectives reach. An assumption, typical of NCCL's all-gather
and reduce-scatter of large messages; not measured here."""


@dataclass(frozen=True)
class Cluster:
    """The mesh of the ranks on the nodes; ranks of a tensor-parallel group are consecutive."""

    gpu: Gpu
    gpus_per_node: int
    replicate: int
    shard: int
    tp: int

    @property
    def num_gpus(self) -> int:
        return self.replicate * self.shard * self.tp

    def bytes_per_second(self, dimension: str) -> float:
        """Bytes per second that each rank can send within a group of a mesh dimension.

        In a group over several nodes, its ranks on a node use that node's network together.
        """
        stride, size = {
            "tp": (1, self.tp),
            "dp_shard": (self.tp, self.shard),
            "dp_replicate": (self.tp * self.shard, self.replicate),
        }.get(dimension, (1, self.num_gpus))
        link = self.gpu.link_bytes
        if stride * size > self.gpus_per_node:
            in_node = max(self.gpus_per_node // stride, 1)
            link = min(link, self.gpu.network_bytes * in_node)
        return link * LINK_EFFICIENCY


@dataclass(frozen=True)
class StepTime:
    """An optimizer step; all numbers are seconds, parts of `seconds` that add up to it."""

    compute: float
    tensor_parallel: float
    data_parallel: float
    """Only the part that doesn't overlap with the computation."""
    update: float
    tokens: float
    """Of all ranks, without padding."""

    @property
    def seconds(self) -> float:
        return self.compute + self.tensor_parallel + self.data_parallel + self.update

    @property
    def communication(self) -> float:
        return self.tensor_parallel + self.data_parallel


def step_time(
    trace: Trace,
    steps: Sequence[Sequence[Sequence[PlannedMicrobatch[Any]]]],
    cluster: Cluster,
    dtype: torch.dtype,
    efficiency: float,
    *,
    cpu_offload: bool = False,
    reduce_every_microbatch: bool = True,
) -> StepTime:
    """The mean time over steps.

    Args:
        steps: [step][micro-batch][rank].
        efficiency: share of the GPU's peak rate that the computation reaches.
        cpu_offload: whether shards are copied to the GPU and back.
        reduce_every_microbatch: False: gradients are reduced in a step's last micro-batch only.
    """
    compute = tensor = data = tokens = 0.0
    rate = cluster.gpu.flops(dtype) * efficiency
    for microbatches in steps:
        for number, ranks in enumerate(microbatches, start=1):
            length = max(each.num_tokens for each in ranks) / trace.tokens
            phases = ("forward", "backward") if ranks[0].trains else ("forward",)
            attention = sum(trace.attention_flops.get(phase, 0) for phase in phases)
            linear = sum(trace.flops.get(phase, 0) for phase in phases) - attention
            own_compute = (
                max(
                    linear * each.num_tokens / trace.tokens
                    + attention * each.num_pairs / trace.pairs
                    for each in ranks
                )
                / rate
            )
            own_tensor = own_data = 0.0
            for collective, traffic in trace.traffic.items():
                if collective.phase not in phases:
                    continue
                if number < len(microbatches) and _waits_for_the_last(
                    collective, reduce_every_microbatch
                ):
                    continue
                seconds = traffic.sent / cluster.bytes_per_second(collective.dimension)
                if collective.dimension == "tp":
                    own_tensor += seconds * length
                else:
                    own_data += seconds
            compute += own_compute
            tensor += own_tensor
            data += max(0.0, own_data - own_compute - own_tensor)
            if ranks[0].trains:
                tokens += sum(each.num_tokens for each in ranks)
    state = sum(trace.state.values())
    # The update reads all of the state, and writes all but the gradients.
    update = (2 * state - trace.state["gradients"]) / cluster.gpu.memory_bytes
    if cpu_offload:
        moved = trace.state["parameters"] + trace.state["gradients"]
        update += moved / HOST_LINK_BYTES
    n = len(steps)
    return StepTime(compute / n, tensor / n, data / n, update, tokens / n)


def _waits_for_the_last(collective: Collective, reduce_every_microbatch: bool) -> bool:
    """Whether it runs only once a step (`distributed.parallelize.reduce_gradients`)."""
    if collective.dimension == "dp_replicate":
        return True
    reduces = collective.operation == "reduce_scatter" and collective.dimension == "dp_shard"
    return reduces and not reduce_every_microbatch


def collectives(trace: Trace) -> list[dict[str, Any]]:
    """Bytes of each collective of a traced micro-batch and its update, by mesh dimension."""
    sums: dict[tuple[str, str], list[float]] = {}
    for collective, traffic in trace.traffic.items():
        key = (collective.dimension, collective.operation)
        totals = sums.setdefault(key, [0, 0, 0])
        for i, value in enumerate((traffic.count, traffic.nbytes, traffic.sent)):
            totals[i] += value
    return [
        {
            "dimension": dimension,
            "operation": operation,
            "count": int(count),
            "gib": nbytes / 2**30,
            "sent_gib": sent / 2**30,
        }
        for (dimension, operation), (count, nbytes, sent) in sorted(sums.items())
    ]


def needed_flops(decoder: TransformerDecoder, records: Sequence[Any]) -> float:
    """FLOPs of a step on all ranks, as for the model FLOPs utilization: without recomputation.

    Attention counts only unmasked pairs, a multiply-add counts as 2, and frozen weights need no
    weight gradients.

    Args:
        decoder: not laid out.
        records: of the step.
    """
    trained = frozen = 0
    for module in decoder.layers.modules():
        if isinstance(module, torch.nn.Linear | LoRALinear):
            weight = module.weight
            trained += weight.numel() if weight.requires_grad else 0
            frozen += 0 if weight.requires_grad else weight.numel()
    tokens = sum(record.num_tokens for record in records)
    targets = sum(_num_targets(record) for record in records)
    pairs = sum(record.num_pairs for record in records)
    output = (
        decoder.output.weight.numel()
        if hasattr(decoder.output, "weight")
        else (decoder.tok_embeddings.weight.numel())
    )
    attention_width = decoder.num_heads * decoder.head_dim * len(decoder.layers)
    return tokens * (6 * trained + 4 * frozen) + 6 * targets * output + 12 * attention_width * pairs


def _num_targets(record: Any) -> int:
    if isinstance(record, Dialogue):
        return len(record.target_positions)
    if isinstance(record, Group):
        return sum(map(len, record.responses))
    return len(record.responses)


PAPER_NODE_HOURS = 1184
"""Hours of H100 nodes of 8 GPUs for two iterations of SteerLM 2.0 with Llama 3 70B (HelpSteer2
paper)."""


@dataclass(frozen=True)
class Iteration:
    """GPU-hours of a whole iteration of SteerLM 2.0."""

    sampling: float
    scoring: float
    training: float

    @property
    def total(self) -> float:
        return self.sampling + self.scoring + self.training


def iteration_hours(
    trace: Trace,
    cluster: Cluster,
    dtype: torch.dtype,
    efficiency: float,
    *,
    num_parameters: int,
    sampling_efficiency: float,
    sampled_tokens: float,
    packed_tokens: float,
    training: float,
) -> Iteration:
    """GPU-hours of an iteration: sampling, three scoring forwards (attributes, P, Q') and training.

    Args:
        sampling_efficiency: share of the peak rate that an engine reaches at 2 FLOPs for each
            parameter and token.
        sampled_tokens: of all responses.
        packed_tokens: of all groups.
        training: GPU-hours of the training.
    """
    rate = cluster.gpu.flops(dtype)
    sampling = 2 * num_parameters * sampled_tokens / (rate * sampling_efficiency)
    forward = trace.flops["forward"] * cluster.tp  # attention as in the traced micro-batch
    scoring = 3 * forward * packed_tokens / trace.tokens / (rate * efficiency)
    return Iteration(sampling / 3600, scoring / 3600, training)
