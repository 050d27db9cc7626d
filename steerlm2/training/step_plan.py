"""The plan of an optimizer step: its groups spread over ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from steerlm2.data.packing import (
    Group,
    Packable,
    PackableT,
    PackedGroups,
    PackedSequence,
    pack,
)

Strategy = Literal["auto", "single_pass", "two_pass"]


@dataclass(frozen=True)
class StepPlan:
    """What one data-parallel rank computes in one optimizer step.

    Under FSDP all ranks must take part in every forward and backward, so every rank runs as many
    micro-batches of each kind as the busiest one; a rank that has fewer runs empty ones.
    """

    single_pass: list[list[Group]]
    """Micro-batches: the groups of one packed sequence each."""
    two_pass: list[Group]
    """Groups that are too large for one micro-batch."""
    num_no_grad: int
    """Micro-batches that every rank runs without a graph (the first pass of `two_pass`)."""
    num_backward: int
    """Micro-batches that every rank runs forward and backward."""
    imbalance: float
    """Load of the busiest rank over the average load, minus 1: 0 if all have the same."""


def plan_step(
    groups: Sequence[Group],
    *,
    rank: int,
    num_ranks: int,
    strategy: Strategy,
    max_tokens_per_microbatch: int,
    micro_batch_size: int,
    forward_micro_batch_size: int,
    pair_cost: float = 0,
) -> StepPlan:
    """Spread one step's groups over the data-parallel ranks, and fill the rank's micro-batches.

    Every rank computes the same assignment, so that nothing needs to be sent. Whole groups go to
    the least loaded rank, costliest first; each rank fills micro-batches up to the token budget.
    A group over the budget takes two passes (`auto`) or a micro-batch of its own (`single_pass`).

    Args:
        micro_batch_size: responses of a two-pass group in one backward.
        forward_micro_batch_size: responses of a two-pass group in one forward without a graph.
        pair_cost: what a pair of `num_pairs` costs in tokens (`models.decoders.pair_cost`).
    """
    costs = costs_of(groups, pair_cost)
    assigned = assign_to_ranks(costs, num_ranks)
    plans = []
    for indices in assigned:
        single: list[Group] = []
        two: list[Group] = []
        for group in (groups[i] for i in indices):
            too_large = group.num_tokens > max_tokens_per_microbatch
            takes_two = strategy == "two_pass" or (strategy == "auto" and too_large)
            (two if takes_two else single).append(group)
        plans.append((fill_microbatches(single, max_tokens_per_microbatch), two))
    single_pass, two_pass = plans[rank]
    return StepPlan(
        single_pass,
        two_pass,
        num_no_grad=max(_num_slices(two, forward_micro_batch_size) for _, two in plans),
        num_backward=max(len(single) + _num_slices(two, micro_batch_size) for single, two in plans),
        imbalance=imbalance(costs, assigned),
    )


def microbatches_by_rank(
    groups: Sequence[PackableT], num_ranks: int, max_tokens: int, pair_cost: float = 0
) -> list[list[list[PackableT]]]:
    """[rank][micro-batch] -> groups: spread by cost, micro-batches filled up to the token budget.

    Every rank has the same number of micro-batches, as under FSDP it must; some can be empty.
    """
    filled = [
        fill_microbatches([groups[i] for i in indices], max_tokens)
        for indices in assign_to_ranks(costs_of(groups, pair_cost), num_ranks)
    ]
    most = max(map(len, filled))
    return [own + [[]] * (most - len(own)) for own in filled]


def costs_of(groups: Sequence[Packable], pair_cost: float) -> list[float]:
    """Estimated cost of each group, in tokens: a linear and a quadratic term."""
    return [group.num_tokens + pair_cost * group.num_pairs for group in groups]


def imbalance(costs: Sequence[float], assigned: Sequence[Sequence[int]]) -> float:
    """Load of the busiest rank over the average load, minus 1: 0 if all have the same."""
    loads = [sum(costs[i] for i in indices) for indices in assigned]
    return max(loads) * len(loads) / sum(loads) - 1 if sum(loads) else 0.0


def assign_to_ranks(sizes: Sequence[float], num_ranks: int) -> list[list[int]]:
    """[rank] -> indices of its items: the largest first, each to the least loaded rank."""
    loads = [0.0] * num_ranks
    assigned: list[list[int]] = [[] for _ in range(num_ranks)]
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        lightest = loads.index(min(loads))
        assigned[lightest].append(i)
        loads[lightest] += sizes[i]
    return [sorted(indices) for indices in assigned]


def fill_microbatches(groups: Sequence[PackableT], max_tokens: int) -> list[list[PackableT]]:
    """Fill few micro-batches, by best fit decreasing; a group over the budget gets its own.

    The fullest come first, so that the ranks run micro-batches of similar size at the same time.
    """
    batches: list[list[PackableT]] = []
    loads: list[int] = []
    for group in sorted(groups, key=lambda group: -group.num_tokens):
        fitting = [i for i, load in enumerate(loads) if load + group.num_tokens <= max_tokens]
        if fitting:
            best = max(fitting, key=lambda i: loads[i])
            batches[best].append(group)
            loads[best] += group.num_tokens
        else:
            batches.append([group])
            loads.append(group.num_tokens)
    return [batches[i] for i in sorted(range(len(batches)), key=lambda i: -loads[i])]


def slices(groups: Sequence[Group], size: int) -> list[Group]:
    """All groups in slices of at most `size` responses."""
    return [part for group in groups for part in group.slices(size)]


def _num_slices(groups: Sequence[Group], size: int) -> int:
    return sum(-(-len(group.responses) // size) for group in groups)


RecordT = TypeVar("RecordT", bound=Packable)
PackedT = TypeVar("PackedT", bound=PackedSequence)


@dataclass(frozen=True)
class StepBatches(Generic[RecordT, PackedT]):
    """What one rank computes in an optimizer step, packed on the host."""

    records: list[RecordT]
    """Of all ranks."""
    micro_batches: list[PackedT]
    """Of this rank; under FSDP every rank has as many, those it lacks are empty."""

    @property
    def num_tokens(self) -> int:
        """Packed tokens of all ranks."""
        return sum(record.num_tokens for record in self.records)


@dataclass(frozen=True)
class GroupBatches:
    """What one rank computes in an optimizer step of SteerLM 2.0, packed on the host."""

    records: list[Group]
    """Of all ranks."""
    own_records: list[Group]
    """Of this rank, in the order of its log-probs: those of two passes first."""
    two_pass: list[Group]
    """Too large for a micro-batch."""
    no_grad: list[PackedGroups]
    """Micro-batches of `two_pass` for the pass without a graph."""
    second_pass: list[PackedGroups]
    """The same for the pass with one."""
    single_pass: list[PackedGroups]
    """All other groups."""
    imbalance: float
    """How much more the busiest rank has to do than the average one, estimated."""

    @property
    def num_tokens(self) -> int:
        """Packed tokens of all ranks."""
        return sum(group.num_tokens for group in self.records)


def pack_step(
    groups: list[Group],
    plan: StepPlan,
    *,
    micro_batch_size: int,
    forward_micro_batch_size: int,
    multiple_of: int,
) -> GroupBatches:
    """A rank's plan of a step as packed micro-batches; empty ones where other ranks have more.

    Args:
        groups: of all ranks.
        micro_batch_size: responses of a backward of two passes, as the plan was made with.
        forward_micro_batch_size: the same of a forward without a graph.
        multiple_of: tokens that packed sequences are padded to a multiple of.
    """
    no_grad = [[part] for part in slices(plan.two_pass, forward_micro_batch_size)]
    no_grad += [[]] * (plan.num_no_grad - len(no_grad))
    second_pass = [[part] for part in slices(plan.two_pass, micro_batch_size)]
    num_empty = plan.num_backward - len(second_pass) - len(plan.single_pass)

    def packed(microbatches: list[list[Group]]) -> list[PackedGroups]:
        return [pack(microbatch, multiple_of=multiple_of) for microbatch in microbatches]

    return GroupBatches(
        records=groups,
        own_records=plan.two_pass + [group for batch in plan.single_pass for group in batch],
        two_pass=plan.two_pass,
        no_grad=packed(no_grad),
        second_pass=packed(second_pass),
        single_pass=packed(plan.single_pass + [[]] * num_empty),
        imbalance=plan.imbalance,
    )
