"""From packed rows to log-probs of responses: the one path for training, validation and scoring.

Dimension letters: T tokens of a row, R response tokens, N responses, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torchtune.modules import TransformerDecoder

from steerlm2.data.packing import Group, PackedRow, assign_to_ranks, fill_microbatches, pack
from steerlm2.logprobs import sum_by_response, token_logps
from steerlm2.models.llama import gather_sequence, output_weight
from steerlm2.training.distributed import World


def hidden_states(decoder: TransformerDecoder, row: PackedRow) -> Tensor:
    """[T, D] after the final norm; under tensor parallel the whole row on every rank."""
    hidden_1TD = decoder(
        row.tokens_T[None], mask=row.attention_mask_TT()[None], input_pos=row.input_pos_T[None]
    )
    return gather_sequence(hidden_1TD)[0]


def response_logps(decoder: TransformerDecoder, row: PackedRow, world: World) -> Tensor:
    """[N] log-probs of a row's responses, nats, float64, summed over their tokens.

    An empty row gives [0], with a gradient of zero for every parameter.
    """
    hidden_TD = hidden_states(decoder, row)
    logps_R = token_logps(
        hidden_TD[row.source_R], output_weight(decoder), row.targets_R, tp_group=world.tp_group
    )
    return sum_by_response(logps_R, row.response_R, row.num_responses)


@torch.no_grad()
def score_groups(
    decoder: TransformerDecoder,
    groups: Sequence[Group],
    world: World,
    *,
    max_tokens_per_microbatch: int,
) -> list[list[float]]:
    """Log-probs of every response of every group, on every rank, with the weights as they are.

    The groups are spread over the data-parallel ranks; those over the token budget are sliced.
    """
    parts = [
        part
        for index, group in enumerate(groups)
        for part in _indexed(group, index).slices_within(max_tokens_per_microbatch)
    ]
    rows_by_rank = [
        fill_microbatches([parts[i] for i in indices], max_tokens_per_microbatch)
        for indices in assign_to_ranks([part.num_tokens for part in parts], world.dp_size)
    ]
    mine = rows_by_rank[world.dp_rank]
    scores: dict[tuple[int, int], float] = {}
    for i in range(max(len(rows) for rows in rows_by_rank)):
        row_parts = mine[i] if i < len(mine) else []
        row = pack(row_parts, multiple_of=world.tp_size).to(world.device)
        places = [(part.index, n) for part in row_parts for n in part.responses_kept]
        scores |= zip(places, response_logps(decoder, row, world).tolist(), strict=True)
    if world.mesh is not None:
        everyones: list[dict[tuple[int, int], float]] = [{}] * world.size
        dist.all_gather_object(everyones, scores)
        scores = {place: score for part in everyones for place, score in part.items()}
    return [[scores[g, n] for n in range(len(group.responses))] for g, group in enumerate(groups)]


def _indexed(group: Group, index: int) -> Group:
    return Group(group.prompt, group.responses, index)
