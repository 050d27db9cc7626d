"""From packed sequences to log-probs of responses, or to their attribute scores.

Training, validation and scoring all take this path.

Dimension letters: T tokens of a packed sequence, R response tokens, N responses, D hidden,
A attributes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchtune.modules import TransformerDecoder

from steerlm2.data.packing import (
    Group,
    GroupT,
    PackedDialogues,
    PackedGroups,
    PackedRewardGroups,
    PackedSequence,
    RewardGroup,
    pack,
    pack_for_reward,
)
from steerlm2.distributed.world import World
from steerlm2.models.attention import flex_mask
from steerlm2.models.decoders import gather_sequence, output_weight
from steerlm2.models.logprobs import sum_by_response, token_logps
from steerlm2.training.step_plan import microbatches_by_rank


def hidden_states(
    decoder: TransformerDecoder, batch: PackedSequence, *, sharded_use: bool = True
) -> Tensor:
    """[T, D] after the final norm; under tensor parallel all T tokens on every rank.

    Args:
        sharded_use: whether the ranks split the computation that follows (`gather_sequence`).
    """
    mask = flex_mask(batch.group_T, batch.segment_T) if batch.tokens_T.is_cuda else batch.blocks_X5
    hidden_1TD = decoder(batch.tokens_T[None], mask=mask, input_pos=batch.input_pos_T[None])
    return gather_sequence(hidden_1TD, sharded_use=sharded_use)[0]


def response_logps(decoder: TransformerDecoder, batch: PackedGroups, world: World) -> Tensor:
    """[N] log-probs of the responses, nats, float64, summed over their tokens.

    An empty batch gives [0], with a gradient of zero for every parameter.
    """
    logps_R = target_logps(decoder, batch, world)
    return sum_by_response(logps_R, batch.response_R, batch.num_responses)


def target_logps(
    decoder: TransformerDecoder, batch: PackedGroups | PackedDialogues, world: World
) -> Tensor:
    """[R] log-probs of the targets, nats, float32.

    An empty batch gives [0], with a gradient of zero for every parameter.
    """
    hidden_TD = hidden_states(decoder, batch)
    return token_logps(
        hidden_TD[batch.source_R], output_weight(decoder), batch.targets_R, tp_group=world.tp_group
    )


def attribute_scores(decoder: TransformerDecoder, batch: PackedRewardGroups) -> Tensor:
    """[N, A] scores of the responses, float32: the reward head at their last tokens.

    An empty batch gives [0, A], with a gradient of zero for every parameter.
    """
    hidden_TD = hidden_states(decoder, batch, sharded_use=False)
    return hidden_TD[batch.score_position_N].float() @ output_weight(decoder).float().t()


def score_groups(
    decoder: TransformerDecoder,
    groups: Sequence[Group],
    world: World,
    *,
    max_tokens_per_microbatch: int,
) -> list[list[float]]:
    """[group][response] log-probs, nats, on every rank.

    The groups are spread over the data-parallel ranks; those over the token budget are sliced.
    """

    def score(microbatch: list[Group]) -> list[float]:
        batch = pack(microbatch, multiple_of=world.padding_multiple).to(world.device)
        return response_logps(decoder, batch, world).tolist()

    return _score_on_all_ranks(groups, world, max_tokens_per_microbatch, score)


def score_attributes(
    decoder: TransformerDecoder,
    groups: Sequence[RewardGroup],
    world: World,
    *,
    max_tokens_per_microbatch: int,
) -> list[list[list[float]]]:
    """[group][response][attribute] scores on every rank; see `score_groups`."""

    def score(microbatch: list[RewardGroup]) -> list[list[float]]:
        batch = pack_for_reward(microbatch, multiple_of=world.padding_multiple).to(world.device)
        return attribute_scores(decoder, batch).tolist()

    return _score_on_all_ranks(groups, world, max_tokens_per_microbatch, score)


def check_finite(values: Iterable[float], what: str, model: str) -> None:
    """Check what a model gave for texts: log-probs or scores.

    Args:
        what: they are, for the error.
        model: whose they are.

    Raises:
        ValueError: where one isn't finite.
    """
    if not all(map(math.isfinite, values)):
        raise ValueError(
            f"the {what} of {model} are not finite: its weights are damaged, or dtype is too small "
            "for them"
        )


@torch.no_grad()
def _score_on_all_ranks(
    groups: Sequence[GroupT],
    world: World,
    max_tokens_per_microbatch: int,
    score: Callable[[list[GroupT]], list[Any]],
) -> list[list[Any]]:
    """[group][response] results, on every rank.

    Args:
        score: gives one result for each response of a micro-batch, in their order.
    """
    parts = [
        part
        for index, group in enumerate(groups)
        for part in type(group)(group.prompt, group.responses, index).slices_within(
            max_tokens_per_microbatch
        )
    ]
    scores: dict[tuple[int, int], Any] = {}
    microbatches = microbatches_by_rank(parts, world.dp_size, max_tokens_per_microbatch)
    for microbatch in microbatches[world.dp_rank]:
        indices = [(part.index, n) for part in microbatch for n in part.responses_kept]
        scores |= zip(indices, score(microbatch), strict=True)
    if world.mesh is not None:
        of_ranks: list[dict[tuple[int, int], Any]] = [{}] * world.size
        dist.all_gather_object(of_ranks, scores)
        scores = {index: value for of_rank in of_ranks for index, value in of_rank.items()}
    return [[scores[g, n] for n in range(len(group.responses))] for g, group in enumerate(groups)]
