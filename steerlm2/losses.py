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

Departures from the paper: by default a group's KL is divided by its mean response length, as
NeMo-Aligner does; `normalize="none"` is the paper's form. `baseline`, the share of the baseline
weights in the gradient, is 1 in the paper; `SteerLM2Loss` says what less of it is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

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
    return _group_max(w_N, group_sizes)


RARE = -20.0
"""log q below which a response is taken as never drawn twice: c = q / (1 - (1 - q)^n) is 1/n up to
a relative n q / 2, 1e-9 n."""


def log_shares(
    log_q_N: Tensor, group_sizes: Sequence[int] | Tensor, drawn: int | Tensor | None = None
) -> Tensor:
    """[N] log c: what each response stands for in an average over samples, at a sum of 1 or near.

    Of k independent draws each counts 1/k. Of n draws from which duplicates were taken out, the
    response y_i is there with probability pi_i = 1 - (1 - q_i)^n, so that

        E sum_i c_i f(y_i) = sum_y pi(y) c(y) f(y) = sum_y q(y) f(y)    with c_i = q_i / pi_i

    for every f: unbiased as the average over all draws is (Horvitz and Thompson 1952, equation 2).
    c_i is between 1/n (rare responses) and 1, and needs no number of times that y_i was drawn.

    Args:
        log_q_N: log-probs under what was sampled from, nats.
        group_sizes: [G] number of responses of each group; sums to N.
        drawn: n, of all groups or [G]; None: the responses are independent draws.
    """
    index_N = group_index(group_sizes, log_q_N)
    if drawn is None:
        sizes_G = torch.as_tensor(group_sizes, device=log_q_N.device)
        return -sizes_G.to(log_q_N.dtype).log()[index_N]
    if isinstance(drawn, int):
        drawn_N = torch.full_like(log_q_N, drawn)  # a tensor of it would have to be copied to a GPU
    else:
        drawn_N = drawn.to(log_q_N)[index_N]
    log_q_N = log_q_N.detach().clamp(max=0)  # rounding may give more
    log_pi_N = (-torch.expm1(drawn_N * torch.log1p(-log_q_N.exp()))).log()
    return torch.where(log_q_N < RARE, -drawn_N.log(), log_q_N - log_pi_N)


def shared_weights(w_N: Tensor, log_c_N: Tensor, group_sizes: Sequence[int] | Tensor) -> Tensor:
    """[N] weights times c, summing to 1 in each group again."""
    w_N = w_N * log_c_N.exp()
    return w_N / sum_by_group(w_N, group_sizes)[group_index(group_sizes, w_N)]


class GroupLoss(Protocol):
    """A loss that steerlm2_distributed trains with: any callable with this signature.

    It is a mean over the groups, each of which counts by itself: then a step's gradient doesn't
    depend on the micro-batches that the groups come in. `sum_by_group`, `group_log_softmax` and
    `mean_over_groups` are for it.

    Two attributes are read where it has them (of a function, its arguments of these names in the
    config). `baseline` below 1, the share of the baseline weights, says that it is right only for
    samples from Q' itself, which the run then checks. Where `samples_per_prompt` isn't None it is
    called with `drawn_G=` too: [G] draws of each group, duplicates included.
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


def check_share(value: Any, name: str) -> None:
    """Raises:
    ValueError: where the value isn't a number from 0 to 1.
    """
    if not (type(value) in (int, float) and 0 <= value <= 1):
        raise ValueError(f"{name} must be a number from 0 to 1, got {value!r}")


def check_samples_per_prompt(value: Any, name: str) -> None:
    """Raises:
    ValueError: where the value isn't a number of draws, "recorded" or None.
    """
    if not ((type(value) is int and value >= 2) or value in (None, "recorded")):
        raise ValueError(
            f"{name} must be a number of draws from 2, 'recorded' or null, got {value!r}"
        )


class SteerLM2Loss:
    """Mean over groups of KL(w' || b') / mean response length of the group, and beyond the paper.

    Its gradient is d loss / d log Q_theta(y_i) = -(w'_i - baseline * b'_i) / mean length / number
    of groups: between -1 and `baseline` before the normalisation. With r = Q_theta / Q', c =
    `log_shares` and m = sum_i c_i r_i, a group's loss before it is

        sum_i w'_i log w'_i - sum_i w'_i (log c_i + log r_i) + baseline * log m
            = KL(w' || b') - (1 - baseline) log m        b'_i = c_i r_i / m

    **What the baseline does.** b' is the same for any multiple of Q_theta: the paper's loss
    (`baseline=1`, section 4.5) knows the samples' probabilities only relative to each other. Up to
    a constant, -E sum_i w'_i log r_i is KL(P || Q_theta), as sum_i w'_i f(y_i) estimates E_P f, so
    that the expected loss is KL(P || Q_theta) + baseline * E log m. E m = 1 for every Q_theta when
    samples are from Q', but E log m <= 0 falls as r varies (Jensen): the second term rewards moving
    probability from the samples to strings that nobody sampled. Where P's weights are noisy
    (few samples) the baseline also takes noise out of the gradient, so that less of it is a
    compromise: `baseline=0` is fine-tuning on weighted samples, which memorises them. A mean over
    few weights w' leans from E_P to E_Q', by about chi^2(P || Q') / n: much where Q' is far from P.
    b' leans likewise, and at 1 the two cancel for Q_theta = P. Below 1 a share of (1 - baseline) of
    it is left, less in each iteration, as Q' comes nearer to P.

    Below 1 the term is right only for samples from Q' itself (temperature 1, top_p 1), or with the
    sampler's own log-probs in the place of log Q'; at 1 w' = b' holds for Q_theta = P under any.

    Args:
        normalize: "mean_response_length" (NeMo-Aligner) or "none" (the paper's form).
        baseline: share of the baseline weights, from 0 to 1; 1 is the paper.
        samples_per_prompt: how many responses were drawn for each prompt, before duplicates were
            taken out: a number, or "recorded" for each group's own (`drawn_G`); at least the
            group's responses, as `as_sampled` sees to. It turns on the correction of `log_shares`,
            in m, b' and w'. None: the responses count alike, as in the paper, which is right where
            no draws were taken out.

    Raises:
        ValueError: for other arguments.
    """

    def __init__(
        self,
        normalize: Literal["mean_response_length", "none"] = "mean_response_length",
        baseline: float = 1.0,
        samples_per_prompt: int | Literal["recorded"] | None = None,
    ) -> None:
        if normalize not in ("mean_response_length", "none"):
            raise ValueError(
                f"normalize must be 'mean_response_length' or 'none', got {normalize!r}"
            )
        check_share(baseline, "baseline")
        check_samples_per_prompt(samples_per_prompt, "samples_per_prompt")
        self.normalize = normalize
        self.baseline = baseline
        self.samples_per_prompt = samples_per_prompt

    def __call__(
        self,
        logps_N: Tensor,
        log_q_N: Tensor,
        w_N: Tensor,
        group_sizes: Sequence[int] | Tensor,
        response_lengths: Sequence[int] | Tensor,
        drawn_G: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """The loss, a scalar; 0 (with a gradient of 0) for no groups.

        Args:
            logps_N: log Q_theta(y|a,x), nats, summed over the response's tokens; has the gradient.
            log_q_N: log Q'(y|a,x) likewise, fixed.
            w_N: target weights.
            group_sizes: [G] number of responses of each group; sums to N.
            response_lengths: [N] tokens of each response, its stop token included.
            drawn_G: responses drawn for each group, duplicates included; used only where
                `samples_per_prompt` is "recorded".

        Raises:
            ValueError: where `drawn_G` is wanted and isn't given.
        """
        drawn = self._drawn(drawn_G)
        log_r_N = logps_N - log_q_N
        if drawn is not None:
            log_c_N = log_shares(log_q_N, group_sizes, drawn)
            w_N = shared_weights(w_N, log_c_N, group_sizes)
            log_r_N = log_r_N + log_c_N
        if self.baseline == 1:
            log_b_N = group_log_softmax(log_r_N, group_sizes)
            loss_G = sum_by_group(torch.xlogy(w_N, w_N) - w_N * log_b_N, group_sizes)
        else:
            # c belongs inside the logarithms, as m is an average; of independent draws it is 1/n,
            # which cancels above.
            if drawn is None:
                log_r_N = log_r_N + log_shares(log_q_N, group_sizes)
            loss_G = sum_by_group(torch.xlogy(w_N, w_N) - w_N * log_r_N, group_sizes)
            loss_G = loss_G + self.baseline * group_logsumexp(log_r_N, group_sizes)
        if self.normalize == "mean_response_length":
            lengths_N = torch.as_tensor(response_lengths, device=loss_G.device).to(loss_G.dtype)
            sizes_G = torch.as_tensor(group_sizes, device=loss_G.device)
            loss_G = loss_G * sizes_G / sum_by_group(lengths_N, group_sizes)
        return mean_over_groups(loss_G)

    def _drawn(self, drawn_G: Sequence[int] | Tensor | None) -> int | Tensor | None:
        if self.samples_per_prompt != "recorded":
            return self.samples_per_prompt
        if drawn_G is None:
            raise ValueError("samples_per_prompt is 'recorded': give drawn_G, each group's number")
        return torch.as_tensor(drawn_G)


METRIC_NAMES = (
    "distance",
    "ess_target",
    "ess_baseline",
    "share_one_hot_target",
    "mean_log_ratio",
    "mean_ratio",
    "log_mean_ratio",
)
"""The metrics of `metric_sums`, in order."""

ONE_HOT = 0.99
"""A group whose largest weight is above this counts as one-hot. A choice: its effective sample size
is then below 1.03 responses."""


HIGHEST_LOG_RATIO = 80.0
"""Of the metric `mean_ratio`: e^80 and above are reported as e^80, a float32 that can be added."""


def metric_sums(
    logps_N: Tensor,
    log_q_N: Tensor,
    w_N: Tensor,
    group_sizes: Sequence[int] | Tensor,
    drawn: int | Tensor | None = None,
) -> Tensor:
    """Sums over groups of the reported metrics, [len(METRIC_NAMES)].

    Divided by the number of groups of all micro-batches and ranks they are the step's distance,
    effective sample sizes of w' and b' (as shares of n), share of groups with max w' > 0.99, means
    of log Q_theta - log Q', of m and of log m, with m = sum_i c_i r_i / sum_i c_i the mean of
    Q_theta / Q' over a group's responses. It starts at 1.

    Args:
        drawn: as in `log_shares`, whose correction then is in w', b' and m.
    """
    sizes_G = torch.as_tensor(group_sizes, device=w_N.device)
    num_groups = len(group_sizes)
    log_c_N = log_shares(log_q_N, group_sizes, drawn)
    if drawn is not None:
        w_N = shared_weights(w_N, log_c_N, group_sizes)
        b_N = group_log_softmax(logps_N - log_q_N + log_c_N, group_sizes).exp()
    else:
        b_N = baseline_weights(logps_N, log_q_N, group_sizes)
    log_m_G = group_logsumexp(logps_N - log_q_N + log_c_N, group_sizes)
    log_m_G = log_m_G - group_logsumexp(log_c_N, group_sizes)
    return torch.stack(
        [
            kl_distance(w_N, b_N, group_sizes) * num_groups,
            effective_sample_size(w_N, group_sizes).sum(),
            effective_sample_size(b_N, group_sizes).sum(),
            (max_weight(w_N, group_sizes) > ONE_HOT).sum(),
            (sum_by_group(logps_N - log_q_N, group_sizes) / sizes_G).sum(),
            log_m_G.clamp(max=HIGHEST_LOG_RATIO).exp().sum(),
            log_m_G.sum(),
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
    shifted_N = logits_N - _group_max(logits_N.detach(), group_sizes)[index_N]
    return shifted_N - sum_by_group(shifted_N.exp(), group_sizes).log()[index_N]


def group_logsumexp(logits_N: Tensor, group_sizes: Sequence[int] | Tensor) -> Tensor:
    """[G] log sum exp of each group's responses, without overflow."""
    max_G = _group_max(logits_N.detach(), group_sizes)
    shifted_N = logits_N - max_G[group_index(group_sizes, logits_N)]
    return max_G + sum_by_group(shifted_N.exp(), group_sizes).log()


def _group_max(values_N: Tensor, group_sizes: Sequence[int] | Tensor) -> Tensor:
    """[G] the largest value of each group."""
    floor_G = values_N.new_full((len(group_sizes),), -torch.inf)
    return floor_G.scatter_reduce(0, group_index(group_sizes, values_N), values_N, "amax")
