"""From packed rows to log-probs of responses, or to their attribute scores: the one path for
training, validation and scoring.

Dimension letters: T tokens of a row, R response tokens, N responses, D hidden, A attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchtune.modules import TransformerDecoder

from steerlm2.data.packing import (
    DialogueRow,
    Group,
    GroupT,
    PackedRow,
    RewardGroup,
    RewardRow,
    Row,
    pack,
    pack_for_reward,
)
from steerlm2.distributed.world import World
from steerlm2.models.attention import flex_mask
from steerlm2.models.llama import gather_sequence, output_weight
from steerlm2.models.logprobs import sum_by_response, token_logps
from steerlm2.training.step_plan import rows_by_rank


def hidden_states(decoder: TransformerDecoder, row: Row, *, sharded_use: bool = True) -> Tensor:
    """[T, D] after the final norm; under tensor parallel the whole row on every rank.

    Args:
        sharded_use: whether the ranks split what they compute from it (`gather_sequence`).
    """
    mask = flex_mask(row.group_T, row.segment_T) if row.tokens_T.is_cuda else row.blocks_X5
    hidden_1TD = decoder(row.tokens_T[None], mask=mask, input_pos=row.input_pos_T[None])
    return gather_sequence(hidden_1TD, sharded_use=sharded_use)[0]


def response_logps(decoder: TransformerDecoder, row: PackedRow, world: World) -> Tensor:
    """[N] log-probs of a row's responses, nats, float64, summed over their tokens.

    An empty row gives [0], with a gradient of zero for every parameter.
    """
    logps_R = target_logps(decoder, row, world)
    return sum_by_response(logps_R, row.response_R, row.num_responses)


def target_logps(decoder: TransformerDecoder, row: PackedRow | DialogueRow, world: World) -> Tensor:
    """[R] log-probs of a row's targets, nats, float32.

    An empty row gives [0], with a gradient of zero for every parameter.
    """
    hidden_TD = hidden_states(decoder, row)
    return token_logps(
        hidden_TD[row.source_R], output_weight(decoder), row.targets_R, tp_group=world.tp_group
    )


def attribute_scores(decoder: TransformerDecoder, row: RewardRow) -> Tensor:
    """[N, A] scores of a row's responses, float32: the reward head at their last tokens.

    An empty row gives [0, A], with a gradient of zero for every parameter.
    """
    hidden_TD = hidden_states(decoder, row, sharded_use=False)
    return hidden_TD[row.read_N].float() @ output_weight(decoder).float().t()


def score_groups(
    decoder: TransformerDecoder,
    groups: Sequence[Group],
    world: World,
    *,
    max_tokens_per_microbatch: int,
) -> list[list[float]]:
    """[group][response] log-probs on every rank, with the weights as they are.

    The groups are spread over the data-parallel ranks; those over the token budget are sliced.
    """

    def score_row(parts: list[Group]) -> list[float]:
        row = pack(parts, multiple_of=world.tp_size).to(world.device)
        return response_logps(decoder, row, world).tolist()

    return _score_everywhere(groups, world, max_tokens_per_microbatch, score_row)


def score_attributes(
    decoder: TransformerDecoder,
    groups: Sequence[RewardGroup],
    world: World,
    *,
    max_tokens_per_microbatch: int,
) -> list[list[list[float]]]:
    """[group][response][attribute] scores on every rank, spread and sliced as in `score_groups`."""

    def score_row(parts: list[RewardGroup]) -> list[list[float]]:
        row = pack_for_reward(parts, multiple_of=world.tp_size).to(world.device)
        return attribute_scores(decoder, row).tolist()

    return _score_everywhere(groups, world, max_tokens_per_microbatch, score_row)


@torch.no_grad()
def _score_everywhere(
    groups: Sequence[GroupT],
    world: World,
    max_tokens_per_microbatch: int,
    score_row: Callable[[list[GroupT]], list[Any]],
) -> list[list[Any]]:
    """`score_row` gives one result a response; here they come back by group, on every rank."""
    parts = [
        part
        for index, group in enumerate(groups)
        for part in type(group)(group.prompt, group.responses, index).slices_within(
            max_tokens_per_microbatch
        )
    ]
    scores: dict[tuple[int, int], Any] = {}
    for row_parts in rows_by_rank(parts, world.dp_size, max_tokens_per_microbatch)[world.dp_rank]:
        places = [(part.index, n) for part in row_parts for n in part.responses_kept]
        scores |= zip(places, score_row(row_parts), strict=True)
    if world.mesh is not None:
        everyones: list[dict[tuple[int, int], Any]] = [{}] * world.size
        dist.all_gather_object(everyones, scores)
        scores = {place: score for part in everyones for place, score in part.items()}
    return [[scores[g, n] for n in range(len(group.responses))] for g, group in enumerate(groups)]
