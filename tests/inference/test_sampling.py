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
from steerlm2.inference import sampling
from steerlm2.inference.sampling import draw_tokens, keep_likeliest, sample_tokens
from steerlm2.models.decoders import end_at_hidden_states

CPU = World(torch.device("cpu"))
DRAWS = 5_000


def frequencies(
    probs: list[float], *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0
) -> Tensor:
    """Shares of the tokens in many draws from logits that have these probabilities."""
    logits_PV = torch.tensor(probs).log().expand(DRAWS, -1)
    uniform_P = torch.rand(DRAWS, generator=torch.Generator().manual_seed(0))
    tokens_P, _ = draw_tokens(logits_PV, temperature, top_p, uniform_P, top_k)
    return torch.bincount(tokens_P, minlength=len(probs)) / DRAWS


def assert_shares(found: Tensor, expected: list[float]) -> None:
    """Within 5 standard deviations: sqrt(1/4 / 5,000) * 5 = 0.036."""
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=0.036)


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
    assert draw_tokens(logits_PV, 0, 0.1, torch.zeros(2))[0].tolist() == [1, 0]


def test_rows_are_drawn_by_their_own_distributions() -> None:
    """One certain token each, a different one for every prompt."""
    logits_PV = torch.eye(5) * 100
    assert draw_tokens(logits_PV, 1.0, 0.9, torch.linspace(0, 0.99, 5))[0].tolist() == [
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
    assert draw_tokens(logits_PV, 1.0, 1.0, uniform_P)[0].tolist() == [0, 0, 1, 1, 2, 2]


def test_tokens_without_probability_are_never_drawn() -> None:
    """At both ends of the ids, for the smallest and the largest number below 1."""
    logits_PV = torch.tensor([-torch.inf, 0.0, 1.0, -torch.inf]).expand(2, -1)
    uniform_P = torch.tensor([0.0, 1 - 2**-24])
    for top_p in (1.0, 0.999):
        assert draw_tokens(logits_PV, 1.0, top_p, uniform_P)[0].tolist() == [1, 2]


def test_top_k_holds_the_likeliest_tokens() -> None:
    """0.5 and 0.3: 5/8 and 3/8. Of equally likely ones those with lower ids."""
    assert_shares(frequencies([0.05, 0.3, 0.15, 0.5], top_k=2), [0, 3 / 8, 0, 5 / 8])
    assert frequencies([0.2, 0.2, 0.4, 0.2], top_k=2)[[1, 3]].tolist() == [0, 0]


def test_nucleus_is_of_what_top_k_leaves() -> None:
    """0.4 of the 0.8 that two tokens have is half of it, so the likeliest alone reaches 0.5; of all
    tokens it would take two."""
    assert frequencies([0.4, 0.1, 0.35, 0.15], top_k=2, top_p=0.5).tolist() == [1, 0, 0, 0]
    assert frequencies([0.4, 0.1, 0.35, 0.15], top_p=0.5)[2] > 0


@pytest.mark.parametrize("vocabulary", [700, 1024, 128_256])
def test_every_token_can_be_drawn(vocabulary: int) -> None:
    """Where one token has nearly all probability, the number in the middle of each token's interval
    draws it; with float32 sums and numbers most tokens of this distribution are never drawn."""
    logits_V = torch.linspace(-1, 1, vocabulary).sin() * 3
    logits_V[vocabulary // 3] = 20
    weights_V = (logits_V - logits_V.max()).exp().double()
    ends_V = weights_V.cumsum(0) / weights_V.sum()
    middles_V = ends_V - weights_V / weights_V.sum() / 2
    tokens_P = torch.arange(0, vocabulary, 1 if vocabulary < 2000 else 1001)
    logits_PV = logits_V.expand(len(tokens_P), -1)
    for part_P in tokens_P.split(50):
        drawn_P, _ = draw_tokens(logits_PV[: len(part_P)], 1.0, 1.0, middles_V[part_P])
        assert drawn_P.tolist() == part_P.tolist()


def reference_choice(
    logits_V: Tensor, temperature: float, top_p: float, top_k: int, uniform: float
) -> int:
    """By a stable sort and float64 sums of the same weights."""
    if temperature == 0:
        return int(logits_V.argmax())
    weights_V = ((logits_V - logits_V.max()) / temperature).exp().double()
    order_V = weights_V.argsort(descending=True, stable=True)
    kept_V = order_V[: top_k or None]
    before_V = weights_V[kept_V].cumsum(0) - weights_V[kept_V]
    kept_V = kept_V[before_V < top_p * weights_V[kept_V].sum()]
    cut_V = torch.zeros_like(weights_V).index_copy(0, kept_V, weights_V[kept_V])
    cumulative_V = cut_V.cumsum(0)
    return int((cumulative_V > uniform * cumulative_V[-1]).nonzero()[0])


def random_cases() -> list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Logits, temperatures, top-p, top-k and numbers of rows: flat and peaked ones, with ties."""
    generator = torch.Generator().manual_seed(0)
    cases = []
    for vocabulary in (3, 255, 256, 257, 3000):
        for spread in (0.3, 3.0, 12.0):
            shape = (20, vocabulary)
            logits_PV = torch.randn(shape, generator=generator) * spread
            logits_PV[:10] = logits_PV[:10].round()
            choices = torch.rand(4, 20, generator=generator, dtype=torch.float64)
            temperature_P = torch.tensor([0.0, 0.5, 0.7, 1.0, 1.5])[(choices[0] * 5).long()]
            top_p_P = torch.tensor([0.05, 0.5, 0.9, 0.999, 1.0])[(choices[1] * 5).long()]
            top_k_P = torch.tensor([0, 1, 2, 50])[(choices[2] * 4).long()]
            cases.append((logits_PV, temperature_P, top_p_P, top_k_P, choices[3]))
    return cases


def test_draws_are_those_of_a_full_sort() -> None:
    """Each row with settings of its own."""
    for logits_PV, temperature_P, top_p_P, top_k_P, uniform_P in random_cases():
        drawn_P, _ = draw_tokens(logits_PV, temperature_P, top_p_P, uniform_P, top_k_P)
        expected = [
            reference_choice(logits_V, *settings)
            for logits_V, *settings in zip(
                logits_PV,
                temperature_P.tolist(),
                top_p_P.double().tolist(),
                top_k_P.tolist(),
                uniform_P.tolist(),
                strict=True,
            )
        ]
        assert drawn_P.tolist() == expected


def test_gpus_keep_the_same_tokens() -> None:
    """By bisection, here on the CPU, what sorting keeps."""
    for logits_PV, _, top_p_P, top_k_P, _ in random_cases():
        weights_PV = (logits_PV - logits_PV.amax(dim=1, keepdim=True)).exp()
        for by_count, setting_P in ((True, top_k_P), (False, top_p_P)):
            wanted_P = setting_P.double().where(setting_P.clamp(max=1) * (not by_count) < 1, 2)
            if by_count:
                wanted_P = wanted_P.where(wanted_P > 0, torch.inf)
            sorted_PV = keep_likeliest(weights_PV.clone(), wanted_P, by_count=by_count)
            bisected_PV = sampling._keep_by_bisection(weights_PV, wanted_P, by_count=by_count)
            assert torch.equal(bisected_PV, sorted_PV)
            assert (sorted_PV == 0).any()


def test_a_draw_reads_no_value_of_a_gpu() -> None:
    """Reading one would wait for it. Tensors on the meta device have none, so that it fails."""
    logits_PV = torch.empty(3, 1000, device="meta")
    uniform_P = torch.empty(3, device="meta", dtype=torch.float64)
    temperature_P, top_p_P = torch.tensor([1, 0, 0.7]), torch.tensor([0.9, 1, 0.5])
    drawn_P, log_prob_P = draw_tokens(
        logits_PV, temperature_P, top_p_P, uniform_P, torch.tensor([0, 5, 7]), with_log_probs=True
    )
    assert log_prob_P is not None
    assert drawn_P.is_meta
    assert (drawn_P.shape, log_prob_P.shape) == ((3,), (3,))


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
