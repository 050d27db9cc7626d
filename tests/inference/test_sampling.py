"""Sampling: the tempered, nucleus-cut distribution, and answers that end where they should.

Dimension letters: P prompts, V vocabulary.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torchtune.models.llama3 import llama3
from torchtune.modules import TransformerDecoder

from steerlm2.distributed.world import World
from steerlm2.inference.sampling import choose_tokens, sample_tokens
from steerlm2.models.decoders import end_at_hidden_states

CPU = World(torch.device("cpu"))
DRAWS = 20_000


def frequencies(probs: list[float], *, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """Shares of the tokens in many draws from logits that have these probabilities."""
    logits_PV = torch.tensor(probs).log().expand(DRAWS, -1)
    uniform_P = torch.rand(DRAWS, generator=torch.Generator().manual_seed(0))
    tokens_P = choose_tokens(logits_PV, temperature, top_p, uniform_P)
    return torch.bincount(tokens_P, minlength=len(probs)) / DRAWS


def assert_shares(found: Tensor, expected: list[float]) -> None:
    """Within 5 standard deviations: sqrt(1/4 / 20,000) * 5 = 0.018."""
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=0.018)


def test_tokens_are_drawn_with_their_probabilities() -> None:
    assert_shares(frequencies([0.2, 0.5, 0.3]), [0.2, 0.5, 0.3])


def test_temperature_is_a_power_of_the_probabilities() -> None:
    """Temperature 1/2: squares 4, 25, 9 of 38."""
    found = frequencies([0.2, 0.5, 0.3], temperature=0.5)
    assert_shares(found, [4 / 38, 25 / 38, 9 / 38])


def test_nucleus_holds_the_likeliest_tokens_that_reach_top_p() -> None:
    """0.5 + 0.3 reach 0.7 (0.5 alone doesn't): 5/8 and 3/8, and nothing else."""
    found = frequencies([0.05, 0.3, 0.15, 0.5], top_p=0.7)
    assert_shares(found, [0, 3 / 8, 0, 5 / 8])
    assert found[[0, 2]].tolist() == [0, 0]


def test_nucleus_is_of_the_tempered_distribution() -> None:
    """Temperature 1/2 of (0.5, 0.3, 0.2): 25, 9, 4 of 38, so 0.66 alone reaches 0.6, where the
    untempered 0.5 would not.
    """
    assert frequencies([0.5, 0.3, 0.2], temperature=0.5, top_p=0.6).tolist() == [1, 0, 0]


def test_nucleus_is_never_empty() -> None:
    """The likeliest token always remains."""
    assert frequencies([0.4, 0.6], top_p=1e-6).tolist() == [0, 1]


def test_temperature_zero_takes_the_likeliest() -> None:
    logits_PV = torch.tensor([[0.0, 2.0, 1.0], [5.0, 2.0, 1.0]])
    assert choose_tokens(logits_PV, 0, 0.1, torch.zeros(2)).tolist() == [1, 0]


def test_rows_are_drawn_by_their_own_distributions() -> None:
    """One certain token each, a different one for every prompt."""
    logits_PV = torch.eye(5) * 100
    assert choose_tokens(logits_PV, 1.0, 0.9, torch.linspace(0, 0.99, 5)).tolist() == [
        0,
        1,
        2,
        3,
        4,
    ]


def test_a_draw_is_where_the_cumulative_probability_passes_the_number() -> None:
    """0.2, 0.5, 0.3 add up to 0.2, 0.7, 1: the ids in their order, whatever their probabilities."""
    uniform_P = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71, 1 - 2**-24])
    logits_PV = torch.tensor([0.2, 0.5, 0.3]).log().expand(6, -1)
    assert choose_tokens(logits_PV, 1.0, 1.0, uniform_P).tolist() == [0, 0, 1, 1, 2, 2]


def test_tokens_without_probability_are_never_drawn() -> None:
    """At both ends of the ids, for the smallest and the largest number below 1."""
    logits_PV = torch.tensor([-torch.inf, 0.0, 1.0, -torch.inf]).expand(2, -1)
    uniform_P = torch.tensor([0.0, 1 - 2**-24])
    for top_p in (1.0, 0.999):
        assert choose_tokens(logits_PV, 1.0, top_p, uniform_P).tolist() == [1, 2]


@pytest.fixture(scope="module")
def decoder() -> TransformerDecoder:
    torch.manual_seed(0)
    decoder = llama3(
        vocab_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        embed_dim=32,
        max_seq_len=64,
        intermediate_dim=48,
    )
    for parameter in decoder.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=2 / parameter.shape[1] ** 0.5)
    return decoder.eval()


@pytest.fixture(scope="module")
def sampler(decoder: TransformerDecoder) -> TransformerDecoder:
    sampler = copy.deepcopy(decoder)
    end_at_hidden_states(sampler)
    return sampler


PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]


@torch.no_grad()
def greedy(decoder: TransformerDecoder, prompt: list[int], count: int) -> list[int]:
    """The likeliest next token, again and again, one prompt at a time."""
    text = list(prompt)
    for _ in range(count):
        text.append(int(decoder(torch.tensor([text]))[0, -1].argmax()))
    return text[len(prompt) :]


def answers(sampler: TransformerDecoder, **changes: Any) -> list[list[int]]:
    settings: dict[str, Any] = {
        "stop_id": -1,
        "max_new_tokens": 12,
        "temperature": 0,
        "top_p": 1.0,
        "seed": 0,
    }
    return sample_tokens(sampler, PROMPTS, CPU, **(settings | changes))


def test_greedy_answers_are_those_of_one_prompt_at_a_time(
    decoder: TransformerDecoder, sampler: TransformerDecoder
) -> None:
    """No prompt attends to another in the packed sequence. (-1 never stops.)"""
    assert answers(sampler) == [greedy(decoder, prompt, 12) for prompt in PROMPTS]


def test_an_answer_ends_before_its_stop_token_while_others_go_on(
    decoder: TransformerDecoder, sampler: TransformerDecoder
) -> None:
    """The stop token is the fourth of the first answer; each answer is cut where it appears."""
    whole = [greedy(decoder, prompt, 12) for prompt in PROMPTS]
    stop_id = whole[0][3]
    expected = [a[: a.index(stop_id)] if stop_id in a else a for a in whole]
    assert len({len(answer) for answer in expected}) > 1, "all end together: nothing is tested"
    assert answers(sampler, stop_id=stop_id) == expected


def test_sampled_answers_are_a_function_of_the_seed(sampler: TransformerDecoder) -> None:
    first, again, other = (answers(sampler, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_sampling_leaves_the_global_random_state_alone(sampler: TransformerDecoder) -> None:
    """Whether a run validates must not change how it trains."""
    before = torch.get_rng_state()
    answers(sampler, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_prompts_have_no_answers(sampler: TransformerDecoder) -> None:
    assert (
        sample_tokens(
            sampler, [], CPU, stop_id=0, max_new_tokens=3, temperature=0, top_p=1.0, seed=0
        )
        == []
    )
