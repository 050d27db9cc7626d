"""Groups over ranks and micro-batches: nothing lost, budgets kept, loads even."""

from __future__ import annotations

from typing import Any

import pytest
from drawn_groups import group, groups_of_any_size, two_groups
from hypothesis import given
from hypothesis import strategies as st

from steerlm2.data.packing import (
    Dialogue,
    Group,
    RewardGroup,
)
from steerlm2.training.step_plan import (
    Strategy,
    assign_to_ranks,
    costs_of,
    fill_microbatches,
    imbalance,
    microbatches_by_rank,
    plan_step,
)


@given(groups_of_any_size, st.integers(1, 60))
def test_microbatches_hold_every_group_once(groups: list[Group], budget: int) -> None:
    batches = fill_microbatches(groups, budget)
    assert sorted(group.index for batch in batches for group in batch) == list(range(len(groups)))


@given(groups_of_any_size, st.integers(1, 60))
def test_microbatches_keep_to_the_budget_or_hold_one_group(
    groups: list[Group], budget: int
) -> None:
    for batch in fill_microbatches(groups, budget):
        assert sum(group.num_tokens for group in batch) <= budget or len(batch) == 1


@given(groups_of_any_size, st.integers(1, 60))
def test_no_two_microbatches_could_have_been_one(groups: list[Group], budget: int) -> None:
    loads = sorted(sum(g.num_tokens for g in batch) for batch in fill_microbatches(groups, budget))
    assert len(loads) < 2 or loads[0] + loads[1] > budget


def test_microbatches_are_filled_from_the_largest_group_on_and_to_the_brim() -> None:
    """Prompts of 3, 4, 6 and 7 tokens, budget 10: 7 + 3 and 6 + 4. In the order given it would be
    3 + 4, 6, 7.
    """
    groups = [Group([1] * size, [[2]]) for size in (3, 4, 6, 7)]
    batches = fill_microbatches(groups, 10)
    assert [[group.num_tokens for group in batch] for batch in batches] == [[7, 3], [6, 4]]


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 6))
def test_ranks_get_every_item_once(sizes: list[int], num_ranks: int) -> None:
    assigned = assign_to_ranks(sizes, num_ranks)
    assert len(assigned) == num_ranks
    assert sorted(i for rank in assigned for i in rank) == list(range(len(sizes)))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 6))
def test_ranks_differ_by_no_more_than_the_largest_item(sizes: list[int], num_ranks: int) -> None:
    loads = [sum(sizes[i] for i in rank) for rank in assign_to_ranks(sizes, num_ranks)]
    assert max(loads) - min(loads) <= max(sizes)


def test_ranks_are_balanced_by_size_and_not_by_count() -> None:
    """8 alone against 3 + 3 + 2."""
    assert assign_to_ranks([3, 8, 3, 2], 2) == [[1], [0, 2, 3]]


def test_costs_have_a_linear_and_a_quadratic_term() -> None:
    """Prompt of 3 and inputs of 2 and 1 tokens: 6 tokens; 6 + (6 + 3) + (3 + 1) = 19 pairs."""
    made = Group([1] * 3, [[2] * 3, [2] * 2])
    assert costs_of([made], 0.5) == [6 + 0.5 * 19]


def test_long_groups_weigh_more_than_their_tokens() -> None:
    """3 of 4 inputs each against one of 12: the same tokens, but 3 x 10 pairs against 78, so with
    a pair as dear as a token it is 3 x 14 against 90.
    """
    short, long = Dialogue([1] * 5, [1]), Dialogue([1] * 13, [1])
    costs = costs_of([short, short, long, short], 1.0)
    assert costs == [14, 14, 90, 14]
    assert imbalance(costs, [[2], [0, 1, 3]]) == pytest.approx(90 / 66 - 1)


def test_equal_ranks_have_no_imbalance() -> None:
    assert imbalance([3, 1, 2], [[0], [1, 2]]) == imbalance([], [[], []]) == 0


def plans_of(groups: list[Group], num_ranks: int, **settings: Any) -> list[Any]:
    defaults: dict[str, Any] = {
        "strategy": "auto",
        "max_tokens_per_microbatch": 20,
        "micro_batch_size": 2,
        "forward_micro_batch_size": 3,
    }
    return [
        plan_step(groups, rank=rank, num_ranks=num_ranks, **(defaults | settings))
        for rank in range(num_ranks)
    ]


@given(
    groups_of_any_size,
    st.integers(1, 5),
    st.sampled_from(["auto", "single_pass", "two_pass"]),
    st.integers(1, 60),
)
def test_a_step_has_every_group_once_over_all_ranks(
    groups: list[Group], num_ranks: int, strategy: Strategy, budget: int
) -> None:
    found = [
        group.index
        for plan in plans_of(groups, num_ranks, strategy=strategy, max_tokens_per_microbatch=budget)
        for group in [*plan.two_pass, *(g for batch in plan.single_pass for g in batch)]
    ]
    assert sorted(found) == list(range(len(groups)))


@given(groups_of_any_size, st.integers(1, 5), st.integers(1, 60))
def test_auto_takes_two_passes_for_groups_over_the_budget_only(
    groups: list[Group], num_ranks: int, budget: int
) -> None:
    for plan in plans_of(groups, num_ranks, max_tokens_per_microbatch=budget):
        assert all(group.num_tokens > budget for group in plan.two_pass)
        for batch in plan.single_pass:
            assert sum(group.num_tokens for group in batch) <= budget


@pytest.mark.parametrize(
    ("strategy", "kind"), [("single_pass", "two_pass"), ("two_pass", "single_pass")]
)
def test_a_fixed_strategy_leaves_the_other_kind_empty(strategy: str, kind: str) -> None:
    """Of two groups of 4 and 5 tokens one is over the budget of 4."""
    (plan,) = plans_of(two_groups(), 1, strategy=strategy, max_tokens_per_microbatch=4)
    assert getattr(plan, kind) == []


@given(groups_of_any_size, st.integers(1, 5), st.integers(1, 60), st.integers(1, 4))
def test_all_ranks_run_as_many_microbatches_as_the_busiest(
    groups: list[Group], num_ranks: int, budget: int, size: int
) -> None:
    """Backward: micro-batches + slices of `size`. Without a graph: slices of `size` + 1."""
    plans = plans_of(
        groups,
        num_ranks,
        max_tokens_per_microbatch=budget,
        micro_batch_size=size,
        forward_micro_batch_size=size + 1,
    )
    forward = [sum(len(g.slices(size + 1)) for g in plan.two_pass) for plan in plans]
    backward = [
        len(plan.single_pass) + sum(len(g.slices(size)) for g in plan.two_pass) for plan in plans
    ]
    assert {plan.num_no_grad for plan in plans} == {max(forward)}
    assert {plan.num_backward for plan in plans} == {max(backward)}


def test_a_rank_without_groups_runs_the_microbatches_of_the_others() -> None:
    """One group of 5 tokens, budget 5, two ranks: the second has none but runs a micro-batch."""
    first, second = plans_of([group("g|hi jk lmn")], 2, max_tokens_per_microbatch=5)
    assert (len(first.single_pass), second.single_pass, second.two_pass) == (1, [], [])
    assert (second.num_no_grad, second.num_backward) == (0, 1)


reward_groups_of_any_size = groups_of_any_size.map(
    lambda groups: [RewardGroup(g.prompt, g.responses, g.index) for g in groups]
)


@given(reward_groups_of_any_size, st.integers(1, 5), st.integers(1, 60))
def test_microbatches_of_ranks_hold_every_group_once(
    groups: list[RewardGroup], num_ranks: int, max_tokens: int
) -> None:
    """Whole groups (a pair is one): over all ranks, each of them is in one micro-batch."""
    microbatches = microbatches_by_rank(groups, num_ranks, max_tokens)
    found = [made.index for own in microbatches for each in own for made in each]
    assert sorted(found) == list(range(len(groups)))


@given(reward_groups_of_any_size, st.integers(1, 5), st.integers(1, 60))
def test_all_ranks_have_as_many_microbatches(
    groups: list[RewardGroup], num_ranks: int, max_tokens: int
) -> None:
    """One with fewer would leave the others waiting in FSDP2's collectives; none is empty on all
    ranks.
    """
    microbatches = microbatches_by_rank(groups, num_ranks, max_tokens)
    assert len(microbatches) == num_ranks
    assert len({len(own) for own in microbatches}) == 1
    assert all(any(own) for own in zip(*microbatches, strict=True))


@given(reward_groups_of_any_size, st.integers(1, 5), st.integers(1, 60))
def test_microbatches_of_ranks_stay_within_the_budget(
    groups: list[RewardGroup], num_ranks: int, max_tokens: int
) -> None:
    """But for a single group that is larger by itself."""
    for own in microbatches_by_rank(groups, num_ranks, max_tokens):
        for each in own:
            assert len(each) <= 1 or sum(made.num_tokens for made in each) <= max_tokens
