"""Drawing tokens, and sampling a few answers while training, at any world size.

Dimension letters: P prompts, T tokens of a packed sequence, D hidden, V vocabulary.

`sample_tokens` has no key/value cache: every token recomputes the packed sequence, with the forward
of training. It is meant for a few short answers at validation; training data are sampled by the
engines (`steerlm2.inference.local`, `steerlm2.inference.completions`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torchtune.modules import TransformerDecoder

from steerlm2.data.packing import Group, pack
from steerlm2.distributed.world import World
from steerlm2.models.decoders import output_weight
from steerlm2.training.forward import hidden_states


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
        uniform_P = torch.rand(len(texts), generator=generator, device=world.device)
        next_P = choose_tokens(logits_PV, temperature, top_p, uniform_P)
        if world.mesh is not None:
            dist.broadcast(next_P, src=0)  # rounding can differ between ranks, but not the tokens
        for i, token in zip(open_answers, next_P.tolist(), strict=True):
            answers[i].append(token)
        open_answers = [i for i in open_answers if answers[i][-1] != stop_id]
    return [answer[:-1] if answer[-1:] == [stop_id] else answer for answer in answers]


def choose_tokens(logits_PV: Tensor, temperature: float, top_p: float, uniform_P: Tensor) -> Tensor:
    """[P] token ids drawn from the tempered distribution, cut to its `top_p` nucleus.

    A draw inverts the cumulative distribution over the ids in their order, not over the sorted
    probabilities, so that a swap of two nearly equal ones by rounding changes no draw.

    Args:
        logits_PV: [P, V].
        temperature: 0 takes the most likely token.
        top_p: probability of the nucleus, above 0; 1 keeps all tokens.
        uniform_P: [P] numbers from [0, 1).
    """
    if temperature == 0:
        return logits_PV.argmax(dim=-1)
    probs_PV = (logits_PV.float() / temperature).softmax(dim=-1)
    if top_p < 1:
        sorted_PV, order_PV = probs_PV.sort(dim=-1, descending=True)
        before_PV = sorted_PV.cumsum(dim=-1) - sorted_PV
        nucleus_PV = sorted_PV.where(before_PV < top_p, 0)
        probs_PV = torch.zeros_like(probs_PV).scatter(-1, order_PV, nucleus_PV)
    cumulative_PV = probs_PV.cumsum(dim=-1)
    total_P1 = cumulative_PV[:, -1:]
    below_total_P1 = total_P1.nextafter(torch.zeros_like(total_P1))
    drawn_P1 = torch.minimum(uniform_P[:, None] * total_P1, below_total_P1)
    found_P = torch.searchsorted(cumulative_PV, drawn_P1, right=True).squeeze(1)
    return found_P.clamp(max=logits_PV.shape[1] - 1)  # NaN is found beyond the end


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
