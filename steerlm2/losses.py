"""The losses, their weights and diagnostics, as functions of plain tensors.

Dimension letters: G groups (prompts), N responses of all groups together, group after group,
A attributes, P pairs.

The first part is SteerLM 2.0; the losses of attribute models follow at the end.

For one group, with log Q_theta the model being trained and log Q' the fixed proposal (the model
that the responses were sampled from; SteerLM 2.0, HelpSteer2 paper, section 4.5):

    w'_i = softmax_i(log P(a|x,y_i) + log P(y_i|x) - log Q'(y_i|a,x))     target weights
    b'_i = softmax_i(log Q_theta(y_i|a,x) - log Q'(y_i|a,x))              baseline weights

The paper's gradient, -sum_i (w'_i - b'_i) grad log Q_theta(y_i|a,x), is the gradient of
KL(w' || b'): a softmax cross-entropy over the responses of a prompt. One forward and one backward
therefore suffice, without a separate pass for b'.

Departure from the paper: by default a group's KL is divided by its mean response length, as
NeMo-Aligner does; `normalize="none"` is the paper's form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from steerlm2.attributes import NOT_LABELLED

DISTANCE_EPS = 1e-8
"""Added to both weights in `kl_distance`, so that the published metric stays finite."""


def target_weights(
    log_p_attributes_N: Tensor,
    log_p_response_N: Tensor,
    log_q_N: Tensor,
    group_sizes: Sequence[int] | Tensor,
) -> Tensor:
    """w' [N]: the target weight of each response in its group. They sum to 1 within each group.

    Args:
        log_p_attributes_N: log P(a|x,y), nats.
        log_p_response_N: log P(y|x), nats, summed over the response's tokens.
        log_q_N: log Q'(y|a,x), nats, summed over the response's tokens.
        group_sizes: [G] number of responses of each group; sums to N.
    """
    return group_log_softmax(log_p_attributes_N + log_p_response_N - log_q_N, group_sizes).exp()


def baseline_weights(
    logps_N: Tensor, log_q_N: Tensor, group_sizes: Sequence[int] | Tensor
) -> Tensor:
    """b' [N]: the weight that the trained model gives each response in its group.

    Args:
        logps_N: log Q_theta(y|a,x), nats, summed over the response's tokens.
        log_q_N: log Q'(y|a,x) likewise.
        group_sizes: [G] number of responses of each group; sums to N.
    """
    return group_log_softmax(logps_N - log_q_N, group_sizes).exp()


def kl_distance(w_N: Tensor, b_N: Tensor, group_sizes: Sequence[int] | Tensor) -> Tensor:
    """The `distance` metric: mean over groups of sum_i (w'+eps) log((w'+eps) / (b'+eps)), a scalar.

    It is 0 when the baseline weights equal the target weights, and 0 for no groups.

    Args:
        w_N: [N] target weights.
        b_N: [N] baseline weights.
        group_sizes: [G] number of responses of each group; sums to N.
    """
    w_N, b_N = w_N + DISTANCE_EPS, b_N + DISTANCE_EPS
    return mean_over_groups(sum_by_group(w_N * (w_N / b_N).log(), group_sizes))


def effective_sample_size(w_N: Tensor, group_sizes: Sequence[int] | Tensor) -> Tensor:
    """[G] 1 / sum_i w_i^2 as a share of the group's size: 1 for equal weights, 1/n for one-hot."""
    sizes_G = torch.as_tensor(group_sizes, device=w_N.device)
    return 1 / (sum_by_group(w_N.square(), group_sizes) * sizes_G)


def max_weight(w_N: Tensor, group_sizes: Sequence[int] | Tensor) -> Tensor:
    """[G] the largest weight of each group."""
    index_N = group_index(group_sizes, w_N)
    max_G = w_N.new_zeros(len(group_sizes))
    return max_G.scatter_reduce(0, index_N, w_N, "amax")


class GroupLoss(Protocol):
    """A loss that steerlm2_distributed trains with: any callable with this signature.

    It is a mean over the groups, each of which counts by itself: then a step's gradient doesn't
    depend on the micro-batches that the groups come in. `sum_by_group`, `group_log_softmax` and
    `mean_over_groups` are for it.
    """

    def __call__(
        self,
        logps_N: Tensor,
        log_q_N: Tensor,
        w_N: Tensor,
        group_sizes: Tensor,
        response_lengths: Tensor,
        /,
    ) -> Tensor:
        """The loss, a scalar. The arguments are those of `SteerLM2Loss`, given by position."""


class SteerLM2Loss:
    """Mean over groups of KL(w' || b') / mean response length of the group.

    Its gradient is d loss / d log Q_theta(y_i) = -(w'_i - b'_i) / mean length / number of groups.

    Args:
        normalize: "mean_response_length" (NeMo-Aligner) or "none" (the paper's form).

    Raises:
        ValueError: for another `normalize`.
    """

    def __init__(
        self, normalize: Literal["mean_response_length", "none"] = "mean_response_length"
    ) -> None:
        if normalize not in ("mean_response_length", "none"):
            raise ValueError(
                f"normalize must be 'mean_response_length' or 'none', got {normalize!r}"
            )
        self.normalize = normalize

    def __call__(
        self,
        logps_N: Tensor,
        log_q_N: Tensor,
        w_N: Tensor,
        group_sizes: Sequence[int] | Tensor,
        response_lengths: Sequence[int] | Tensor,
    ) -> Tensor:
        """The loss, a scalar; 0 (with a gradient of 0) for no groups.

        Args:
            logps_N: log Q_theta(y|a,x), nats, summed over the response's tokens; has the gradient.
            log_q_N: log Q'(y|a,x) likewise, fixed.
            w_N: target weights.
            group_sizes: [G] number of responses of each group; sums to N.
            response_lengths: [N] tokens of each response, its stop token included.
        """
        log_b_N = group_log_softmax(logps_N - log_q_N, group_sizes)
        kl_G = sum_by_group(torch.xlogy(w_N, w_N) - w_N * log_b_N, group_sizes)
        if self.normalize == "mean_response_length":
            lengths_N = torch.as_tensor(response_lengths, device=kl_G.device).to(kl_G.dtype)
            sizes_G = torch.as_tensor(group_sizes, device=kl_G.device)
            kl_G = kl_G * sizes_G / sum_by_group(lengths_N, group_sizes)
        return mean_over_groups(kl_G)


METRIC_NAMES = (
    "distance",
    "ess_target",
    "ess_baseline",
    "share_one_hot_target",
    "mean_log_ratio",
)
"""The metrics of `metric_sums`, in order."""

ONE_HOT = 0.99
"""A group whose largest weight is above this counts as one-hot. A choice: its effective sample size
is then below 1.03 responses."""


def metric_sums(
    logps_N: Tensor, log_q_N: Tensor, w_N: Tensor, group_sizes: Sequence[int] | Tensor
) -> Tensor:
    """Sums over groups of the reported metrics, [len(METRIC_NAMES)].

    Divided by the number of groups of all micro-batches and ranks they are the step's distance,
    effective sample sizes of w' and b' (as shares of n), share of groups with max w' > 0.99, and
    mean of log Q_theta - log Q'.
    """
    b_N = baseline_weights(logps_N, log_q_N, group_sizes)
    num_groups = len(group_sizes)
    sizes_G = torch.as_tensor(group_sizes, device=w_N.device)
    return torch.stack(
        [
            kl_distance(w_N, b_N, group_sizes) * num_groups,
            effective_sample_size(w_N, group_sizes).sum(),
            effective_sample_size(b_N, group_sizes).sum(),
            (max_weight(w_N, group_sizes) > ONE_HOT).sum(),
            (sum_by_group(logps_N - log_q_N, group_sizes) / sizes_G).sum(),
        ]
    )


PairLoss = Literal["regular_bt", "margin_bt", "scaled_bt"]


def num_labelled(labels_NA: Tensor) -> int:
    """The number of values that are labels."""
    return int((labels_NA != NOT_LABELLED).sum())


def squared_error_sum(
    scores_NA: Tensor, labels_NA: Tensor, scale_A: Tensor | None = None
) -> Tensor:
    """Sum of (scale * (score - label))^2 over the labelled attributes, a float64 scalar.

    Divided by `num_labelled` of the whole step, all micro-batches and ranks, it is the mean squared
    error that regression reward models are trained with (HelpSteer2 paper, section 3).

    Args:
        scores_NA: the model's scores; have the gradient.
        labels_NA: attribute values, NOT_LABELLED where there is none.
        scale_A: `AttributeSchema.error_scales`, float64; None: 1. Unscaled, an attribute from 0 to
            10 would weigh six times one from 1 to 5 in what all of them share, the backbone,
            although the Beta rule takes both by their shares of the range.
    """
    labels_NA = labels_NA.view_as(scores_NA)
    error_NA = torch.where(labels_NA == NOT_LABELLED, 0, scores_NA.double() - labels_NA)
    if scale_A is not None:
        error_NA = error_NA * scale_A
    return error_NA.square().sum()


def bradley_terry_sum(rewards_N: Tensor, strength_P: Tensor, kind: PairLoss) -> Tensor:
    """Sum over pairs of a Bradley-Terry loss, a float64 scalar; divide it by the number of pairs.

    With d = reward of the preferred response - reward of the other (HelpSteer2-Preference paper,
    arXiv 2410.01257):

        regular_bt  -log sigmoid(d)
        margin_bt   -log sigmoid(d - |strength|)
        scaled_bt   |strength| * -log sigmoid(d)

    A tie, strength 0, counts as half of a preference for each response, and so pulls d towards 0
    (with scaled_bt it has no effect).

    Args:
        rewards_N: [N] the two rewards of a pair are adjacent: N = 2 P.
        strength_P: [P] below 0 the first of the pair is preferred, above 0 the second.
    """
    first_P, second_P = rewards_N.double().view(-1, 2).unbind(dim=1)
    size_P = strength_P.abs()
    margin_P = size_P if kind == "margin_bt" else torch.zeros_like(size_P)
    scale_P = size_P if kind == "scaled_bt" else torch.ones_like(size_P)
    prefers_second_P = (strength_P.sign() + 1) / 2
    gap_P = second_P - first_P
    loss_P = -prefers_second_P * logsigmoid(gap_P - margin_P)
    loss_P -= (1 - prefers_second_P) * logsigmoid(-gap_P - margin_P)
    return (scale_P * loss_P).sum()


def group_index(group_sizes: Sequence[int] | Tensor, values_N: Tensor) -> Tensor:
    """[N] the number of the group that each response belongs to.

    Args:
        group_sizes: [G] number of responses of each group; sums to N.
        values_N: a value of each response, for their number and device.
    """
    # A tensor isn't checked here: reading it would wait for everything that is queued on a GPU.
    # (repeat_interleave checks it on a CPU.)
    assert isinstance(group_sizes, Tensor) or sum(group_sizes) == len(values_N), (
        f"group_sizes {list(group_sizes)} don't add up to the {len(values_N)} responses"
    )
    sizes_G = torch.as_tensor(group_sizes, dtype=torch.long, device=values_N.device)
    numbers_G = torch.arange(len(sizes_G), device=values_N.device)
    return torch.repeat_interleave(numbers_G, sizes_G, output_size=len(values_N))


def sum_by_group(values_N: Tensor, group_sizes: Sequence[int] | Tensor) -> Tensor:
    """[G] the sum over the responses of each group."""
    index_N = group_index(group_sizes, values_N)
    return values_N.new_zeros(len(group_sizes)).index_add(0, index_N, values_N)


def mean_over_groups(values_G: Tensor) -> Tensor:
    """The mean, a scalar; 0 (with a gradient of 0) for no groups."""
    return values_G.sum() / max(len(values_G), 1)


def group_log_softmax(logits_N: Tensor, group_sizes: Sequence[int] | Tensor) -> Tensor:
    """[N] the logarithm of the softmax of each response among those of its group."""
    index_N = group_index(group_sizes, logits_N)
    floor_G = logits_N.new_full((len(group_sizes),), -torch.inf)
    max_G = floor_G.scatter_reduce(0, index_N, logits_N.detach(), "amax")
    shifted_N = logits_N - max_G[index_N]
    return shifted_N - sum_by_group(shifted_N.exp(), group_sizes).log()[index_N]
