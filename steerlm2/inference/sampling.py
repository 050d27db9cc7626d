"""Drawing tokens, and sampling a few answers while training, at any world size.

Dimension letters: P prompts, T tokens of a packed sequence, D hidden, V vocabulary, B blocks of the
vocabulary, I ids of a block.

`sample_tokens` has no key/value cache: every token recomputes the packed sequence, with the forward
of training. It is meant for a few short answers at validation; training data are sampled by the
engines (`steerlm2.inference.local`, `steerlm2.inference.completions`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torchtune.modules import TransformerDecoder

from steerlm2.data.packing import Group, pack
from steerlm2.distributed.world import World
from steerlm2.models.decoders import output_weight
from steerlm2.training.forward import hidden_states

BLOCK = 256
"""Ids that are summed together in a draw: about the square root of a large vocabulary."""


@torch.no_grad()
def sample_tokens(
    decoder: TransformerDecoder,
    prompts: Sequence[Sequence[int]],
    world: World,
    *,
    stop_id: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> list[list[int]]:
    """One answer for each prompt, without its stop token; the same on every rank.

    Args:
        temperature: 0 takes the most likely token.
        top_p: sample from the most likely tokens that together have this probability.
    """
    generator = torch.Generator(device=world.device).manual_seed(seed)
    answers: list[list[int]] = [[] for _ in prompts]
    open_answers = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        if not open_answers:
            break
        texts = [[*prompts[i], *answers[i]] for i in open_answers]
        logits_PV = _next_token_logits(decoder, texts, world)
        uniform_P = torch.rand(
            len(texts), generator=generator, device=world.device, dtype=torch.float64
        )
        next_P, _ = draw_tokens(logits_PV, temperature, top_p, uniform_P)
        if world.mesh is not None:
            dist.broadcast(next_P, src=0)  # rounding can differ between ranks, but not the tokens
        for i, token in zip(open_answers, next_P.tolist(), strict=True):
            answers[i].append(token)
        open_answers = [i for i in open_answers if answers[i][-1] != stop_id]
    return [answer[:-1] if answer[-1:] == [stop_id] else answer for answer in answers]


@torch.no_grad()
def draw_tokens(
    logits_PV: Tensor,
    temperature: float | Tensor,
    top_p: float | Tensor,
    uniform_P: Tensor,
    top_k: int | Tensor = 0,
    weights_PV: Tensor | None = None,
    *,
    with_log_probs: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Tokens of the tempered distribution, cut to its `top_k` most likely ones and then to the
    `top_p` nucleus of these.

    A draw inverts the cumulative distribution over the ids in their order, not over the sorted
    probabilities, so that a swap of two nearly equal ones by rounding changes no draw. Of equally
    likely tokens at the boundary of a cut those with lower ids remain.

    Args:
        logits_PV: [P, V].
        temperature: 0 takes the most likely token.
        top_p: probability of the nucleus, above 0; 1 keeps all tokens.
        uniform_P: [P] numbers from [0, 1), float64: float32 is too coarse for unlikely tokens.
        top_k: 0 keeps all tokens.
        weights_PV: [P, V] the untempered probabilities up to a factor of each row, where they are
            known; they are changed.

    `temperature`, `top_p` and `top_k` hold for all rows, or are tensors [P] with one for each, on
    the CPU: they decide what is computed, which must not wait for a GPU.

    Returns:
        ids: [P].
        log_probs: [P] float64, that they were drawn with, 0 at a temperature of 0; None unless
            `with_log_probs`.
    """
    temperature_P, top_p_P = (_of_rows(each, logits_PV) for each in (temperature, top_p))
    top_k_P = _of_rows(top_k, logits_PV)
    greedy_P = temperature_P == 0
    if greedy_P.all():
        likeliest_P = logits_PV.argmax(dim=-1)
        return likeliest_P, torch.zeros_like(likeliest_P).double() if with_log_probs else None
    logits_PV = logits_PV.float()
    is_tempered = bool(((temperature_P != 1) & ~greedy_P).any())
    if weights_PV is None or is_tempered:
        weights_PV = _weights(logits_PV, temperature_P.where(~greedy_P, 1) if is_tempered else None)
    if (top_k_P > 0).any():
        weights_PV = keep_likeliest(
            weights_PV, top_k_P.where(top_k_P > 0, torch.inf), by_count=True
        )
    if (top_p_P < 1).any():
        share_P = top_p_P.where(top_p_P < 1, torch.inf)
        weights_PV = keep_likeliest(weights_PV, share_P, by_count=False)
    drawn_P, total_P = _invert(weights_PV, uniform_P.to(logits_PV.device, torch.float64))
    log_prob_P = None
    if with_log_probs:
        drawn_weight_P = weights_PV.gather(1, drawn_P[:, None]).squeeze(1).double()
        log_prob_P = (drawn_weight_P / total_P).log()
    if greedy_P.any():
        is_greedy_P = greedy_P.to(drawn_P.device)
        drawn_P = logits_PV.argmax(dim=-1).where(is_greedy_P, drawn_P)
        log_prob_P = None if log_prob_P is None else log_prob_P.where(~is_greedy_P, 0)
    return drawn_P, log_prob_P


def _weights(logits_PV: Tensor, temperature_P: Tensor | None) -> Tensor:
    """[P, V] relative to the likeliest, whose weight is then exact, as most of the sum may be."""
    weights_PV = logits_PV - logits_PV.amax(dim=-1, keepdim=True)
    if temperature_P is not None:
        weights_PV.div_(temperature_P[:, None].to(weights_PV))
    return weights_PV.exp_()


def keep_likeliest(weights_PV: Tensor, wanted_P: Tensor, *, by_count: bool) -> Tensor:
    """[P, V] weights, 0 but for the fewest largest of each row that reach what is wanted.

    On a CPU the given weights are changed; on a GPU nothing waits for it.

    Args:
        wanted_P: [P] float64, above 0, on the CPU: a number of weights, or a share of their sum. A
            row that can't reach it keeps all.
        by_count: which of the two.
    """
    if weights_PV.device.type != "cpu":
        return _keep_by_bisection(weights_PV, wanted_P, by_count=by_count)
    for row_V, wanted in zip(weights_PV.numpy(), wanted_P.tolist(), strict=True):
        if by_count and wanted < len(row_V):
            _keep_first(row_V, int(wanted))
        elif not by_count and wanted < 1:
            _keep_share(row_V, wanted)
    return weights_PV


def _keep_first(weights_V: np.ndarray, count: int) -> None:
    """Set to 0 all weights but so many of the largest."""
    least = np.partition(weights_V, -count)[-count]
    _keep_from(weights_V, least, count - int(np.count_nonzero(weights_V > least)))


def _keep_share(weights_V: np.ndarray, share: float) -> None:
    """Set to 0 all weights but the largest that together reach this share of the sum.

    Those that even all together couldn't make up the rest needn't be sorted: nearly all where a
    model is sure.
    """
    total = weights_V.sum(dtype=np.float64)
    needless = (
        (1 - share) * total / len(weights_V) * (1 - 1e-6)
    )  # less, for the rounding to float32
    descending = np.sort(weights_V[weights_V > needless])[::-1]
    if len(descending) == 0:  # NaN
        return
    last = int(np.searchsorted(descending.cumsum(dtype=np.float64), share * total))
    least = descending[min(last, len(descending) - 1)]
    _keep_from(weights_V, least, last + 1 - int(np.count_nonzero(descending > least)))


def _keep_from(weights_V: np.ndarray, least: np.floating, count: int) -> None:
    """Set to 0 the weights below `least`, and those equal to it after the first `count` of them."""
    weights_V *= weights_V >= least
    weights_V[np.flatnonzero(weights_V == least)[count:]] = 0


def _keep_by_bisection(weights_PV: Tensor, wanted_P: Tensor, *, by_count: bool) -> Tensor:
    """What `keep_likeliest` gives, without sorting, by operations that never wait for a GPU.

    The least weight to keep is found bit by bit: numbers that aren't negative are in the order of
    their bits.
    """
    bits_PV = weights_PV.view(torch.int32)
    measured_PV = torch.ones_like(weights_PV) if by_count else weights_PV
    wanted_P1 = wanted_P[:, None].to(weights_PV.device, torch.float64)
    if not by_count:
        wanted_P1 = wanted_P1 * _sum(weights_PV)
    least_P1 = torch.zeros_like(bits_PV[:, :1])
    for bit in reversed(range(31)):
        higher_P1 = least_P1 + (1 << bit)
        reached_P1 = _sum(measured_PV.where(bits_PV >= higher_P1, 0))
        least_P1 = higher_P1.where(reached_P1 >= wanted_P1, least_P1)
    above_PV, equal_PV = bits_PV > least_P1, bits_PV == least_P1
    missing_P1 = wanted_P1 - _sum(measured_PV.where(above_PV, 0))
    each_P1 = 1.0 if by_count else least_P1.view(torch.float32).double()
    kept_PV = above_PV | (equal_PV & (equal_PV.cumsum(dim=-1) < missing_P1 / each_P1 + 1))
    return weights_PV.where(kept_PV, 0)


def _sum(numbers_PV: Tensor) -> Tensor:
    return numbers_PV.sum(dim=-1, keepdim=True, dtype=torch.float64)


def _invert(weights_PV: Tensor, uniform_P: Tensor) -> tuple[Tensor, Tensor]:
    """[P] ids where the cumulative weight passes a share `uniform_P` (float64) of the whole, and
    [P] the whole, float64.

    Blocks of ids are summed in float32, whose error is that of one weight; then the blocks, and the
    ids inside one of them, in float64. An id of weight 0 is never found.
    """
    vocabulary = weights_PV.shape[1]
    whole = vocabulary - vocabulary % BLOCK
    blocks_PB = torch.cat(
        [
            weights_PV[:, :whole].unflatten(1, (-1, BLOCK)).sum(dim=-1),
            weights_PV[:, whole:].sum(dim=-1, keepdim=True),
        ],
        dim=1,
    ).double()
    block_P1, share_P1 = _passed(blocks_PB, uniform_P[:, None])
    ids_PI = block_P1 * BLOCK + torch.arange(BLOCK, device=weights_PV.device)
    inside_PI = weights_PV.gather(1, ids_PI.clamp(max=vocabulary - 1)).double()
    place_P1, _ = _passed(inside_PI.where(ids_PI < vocabulary, 0), share_P1)
    drawn_P = ids_PI.gather(1, place_P1).squeeze(1).clamp(max=vocabulary - 1)
    return drawn_P, blocks_PB.sum(dim=-1)


def _passed(weights_PB: Tensor, share_P1: Tensor) -> tuple[Tensor, Tensor]:
    """[P, 1] where the cumulative weight passes a share of the sum, and the share of that weight
    which lies below. All float64."""
    cumulative_PB = weights_PB.cumsum(dim=-1)
    total_P1 = cumulative_PB[:, -1:]
    below_total_P1 = total_P1.nextafter(torch.zeros_like(total_P1))
    wanted_P1 = torch.minimum(share_P1 * total_P1, below_total_P1)
    found_P1 = torch.searchsorted(cumulative_PB, wanted_P1, right=True)
    found_P1 = found_P1.clamp(max=weights_PB.shape[1] - 1)  # NaN is found beyond the end
    before_P1 = cumulative_PB.gather(1, (found_P1 - 1).clamp(min=0)).where(found_P1 > 0, 0)
    return found_P1, (wanted_P1 - before_P1) / weights_PB.gather(1, found_P1)


def _of_rows(setting: float | Tensor, logits_PV: Tensor) -> Tensor:
    """[P] float64."""
    return torch.as_tensor(setting, dtype=torch.float64).expand(logits_PV.shape[0])


def _next_token_logits(
    decoder: TransformerDecoder, texts: Sequence[Sequence[int]], world: World
) -> Tensor:
    """[P, V] float32 logits of the token after each text, from one packed sequence of all texts."""
    batch = pack([Group(text, []) for text in texts], multiple_of=world.padding_multiple)
    hidden_TD = hidden_states(decoder, batch.to(world.device))
    ends = torch.tensor([len(text) for text in texts]).cumsum(0) - 1
    logits_PV = (hidden_TD[ends.to(world.device)] @ output_weight(decoder).t()).float()
    if world.tp_group is None:
        return logits_PV
    shards = [torch.empty_like(logits_PV) for _ in range(world.tp_size)]
    dist.all_gather(shards, logits_PV.contiguous(), group=world.tp_group)
    return torch.cat(shards, dim=-1)
