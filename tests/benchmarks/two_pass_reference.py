"""The standard SteerLM 2.0 step, written from the method's description: what ours is measured by.

Dimension letters: N responses (rows), T tokens of a padded row, V vocabulary.

Every response is a row of its own, prompt and response together, padded to the longest of the batch
and up to a multiple of 8. The model gives full float32 logits. `two_pass_step` computes b' in a
pass without a graph, then the gradient of sum_i -(w'_i - b'_i) log Q_theta(y_i|a,x) in
micro-batches. `padded_single_pass_step` is what a general trainer would do with the loss, which is
KL(w'||b'): one forward and one backward of a whole group, on the same padded rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from steerlm2.data.packing import Group, targets_of
from steerlm2.losses import SteerLM2Loss

ROUND_UP_TO = 8


def padded_length(groups: Sequence[Group]) -> int:
    """Tokens of a padded row of the batch."""
    longest = max(len(g.prompt) + max(map(len, g.responses)) for g in groups)
    return -(-longest // ROUND_UP_TO) * ROUND_UP_TO


def two_pass_step(model: nn.Module, groups: Sequence[Group], max_tokens: int) -> None:
    """Adds the gradient of the mean loss over the groups to the parameters' own.

    Args:
        model: tokens [N, T] -> logits [N, T, V], causal.
        max_tokens: of a micro-batch, padding included.
    """
    length = padded_length(groups)
    rows = max(1, max_tokens // length)
    for group in groups:
        parts = group.slices(rows)
        with torch.no_grad():
            logps_N = torch.cat([_padded_logps(model, part, length) for part in parts])
        grad_N = torch.func.grad(lambda logps_N, group=group: _loss(logps_N, group))(logps_N)
        for part, part_grad_N in zip(parts, grad_N.split(rows), strict=True):
            _padded_logps(model, part, length).backward(part_grad_N / len(groups))


def padded_single_pass_step(model: nn.Module, groups: Sequence[Group]) -> None:
    """The same gradient, with all rows of a group in one forward and one backward."""
    length = padded_length(groups)
    for group in groups:
        (_loss(_padded_logps(model, group, length), group) / len(groups)).backward()


def _padded_logps(model: nn.Module, group: Group, length: int) -> Tensor:
    """[N] log-probs of a group's responses, float64 sums over their tokens."""
    device = next(model.parameters()).device
    rows = [[*group.prompt, *response] for response in group.responses]
    tokens_NT = torch.tensor([row + [0] * (length - len(row)) for row in rows], device=device)
    place_T = torch.arange(1, length, device=device)
    ends_N1 = torch.tensor([[len(row)] for row in rows], device=device)
    response_NT = (place_T >= len(group.prompt)) & (place_T < ends_N1)
    logits_NTV = model(tokens_NT)[:, :-1].float()
    logps_NT = logits_NTV.log_softmax(dim=-1).gather(2, tokens_NT[:, 1:, None]).squeeze(2)
    return (logps_NT.double() * response_NT).sum(dim=1)


def _loss(logps_N: Tensor, group: Group) -> Tensor:
    targets = targets_of([group]).to(logps_N.device)
    assert targets.log_q_N is not None
    assert targets.w_N is not None
    return SteerLM2Loss()(
        logps_N, targets.log_q_N, targets.w_N, targets.sizes_G, targets.response_lengths_N
    )
