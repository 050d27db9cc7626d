"""The local engine: cached logits, exact distributions, responses that depend on their seed alone.

Dimension letters: P prompts, M slots, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torchtune.models.llama3 import llama3, lora_llama3
from torchtune.models.llama3_2 import llama3_2
from torchtune.models.qwen2 import qwen2
from torchtune.modules import RMSNorm, TransformerDecoder

from steerlm2.inference import shared_prompts
from steerlm2.inference.engines import Request, Sample, SamplingSettings, request_seed
from steerlm2.inference.local import (
    STEPS_BETWEEN_CHECKS,
    Answer,
    Decoding,
    Drawn,
    Generation,
    LocalEngine,
)
from steerlm2.inference.shared_prompts import EMPTY, SharedPromptDecoder
from steerlm2.inference.streaming import GenerationSettings, Piece
from steerlm2.models.attention import HeadNormAttention
from steerlm2.models.decoders import output_weight

VOCABULARY = 48
STOP = 5
DRAWS = 20_000


def build(
    builder: Callable[..., TransformerDecoder] = llama3, *, spread: float = 2.0, **more: Any
) -> TransformerDecoder:
    torch.manual_seed(0)
    decoder = builder(
        vocab_size=VOCABULARY,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        embed_dim=32,
        max_seq_len=256,
        intermediate_dim=48,
        **more,
    )
    for parameter in decoder.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=spread / parameter.shape[1] ** 0.5)
    return decoder.eval()


@pytest.fixture(scope="module")
def decoder() -> TransformerDecoder:
    return build()


def engine(
    decoder: TransformerDecoder, *, max_cache_tokens: int = 100_000, **changes: Any
) -> LocalEngine:
    settings: dict[str, Any] = {
        "n": 4,
        "temperature": 1.0,
        "top_p": 1.0,
        "max_new_tokens": 40,
        "stop_id": STOP,
        "forbidden_ids": (),
    }
    return LocalEngine(
        copy.deepcopy(decoder),
        SamplingSettings(**(settings | changes)),
        max_cache_tokens=max_cache_tokens,
    )


PROMPTS = [[1, 2, 3], [4], [6, 7, 8, 9, 10, 11, 12], [2], [3] * 20]
REQUESTS = [Request(prompt, request_seed(0, i, 0)) for i, prompt in enumerate(PROMPTS)]


@torch.no_grad()
def uncached_logits(decoder: TransformerDecoder, text: list[int]) -> Tensor:
    """[V] after the text, by torchtune's own forward over all of it."""
    return decoder(torch.tensor([text]))[0, -1]


def with_head_norms(**sizes: Any) -> TransformerDecoder:
    """A Qwen3: queries and keys are normalised."""
    decoder = qwen2(**sizes)
    for layer in decoder.layers:
        layer.attn.__class__ = HeadNormAttention
        for name in ("q", "k"):
            norm = RMSNorm(layer.attn.head_dim)
            torch.nn.init.uniform_(norm.scale, 0.5, 1.5)
            setattr(layer.attn, f"{name}_norm", norm)
    return decoder


@pytest.mark.parametrize(
    ("decoder", "compacting"),
    [(build(), False), (build(), True), (build(with_head_norms), True)],
    ids=["kept", "compacting", "Qwen3"],
)
@torch.no_grad()
def test_cached_logits_are_those_of_an_uncached_forward(
    decoder: TransformerDecoder, compacting: bool
) -> None:
    """To 1e-4, for prompts of different lengths with three samples each, of which some end.

    With `compacting` sequences and columns are removed between the steps, and slots are moved.
    """
    cached = SharedPromptDecoder(copy.deepcopy(decoder))
    logits_PV = cached.logits(cached.prefill(PROMPTS))
    for prompt, logits_V in zip(PROMPTS, logits_PV, strict=True):
        torch.testing.assert_close(logits_V, uncached_logits(decoder, prompt), rtol=0, atol=1e-4)

    texts = {(p, m): list(prompt) for p, prompt in enumerate(PROMPTS) for m in range(3)}
    alive: list[list[tuple[int, int] | None]]
    alive = [[(p, m) for m in range(3)] for p in range(len(PROMPTS))]
    generator = torch.Generator().manual_seed(1)
    cached.compact(torch.arange(len(PROMPTS)), torch.arange(3).expand(len(PROMPTS), 3))
    for step in range(20):
        sample_PM = torch.tensor(
            [[EMPTY if one is None else one[1] for one in slots] for slots in alive]
        )
        tokens_PM = torch.randint(VOCABULARY, sample_PM.shape, generator=generator)
        logits_PMV = cached.logits(cached.step(tokens_PM, sample_PM))
        for slots, tokens_M, logits_MV in zip(alive, tokens_PM.tolist(), logits_PMV, strict=True):
            for one, token, logits_V in zip(slots, tokens_M, logits_MV, strict=True):
                if one is not None:
                    texts[one].append(token)
                    expected_V = uncached_logits(decoder, texts[one])
                    torch.testing.assert_close(logits_V, expected_V, rtol=0, atol=1e-4)
        if step == 4:  # the third prompt has ended, and single samples of others
            alive = [[one if one not in {(0, 1), (4, 0), (4, 1)} else None for one in slots]
                     if p != 2 else [None] * 3 for p, slots in enumerate(alive)]  # fmt: skip
        if step == 9 and compacting:
            alive = [
                [(4, 2), None, None],
                [(0, 2), (0, 0), None],
                [(3, 0), (3, 1), (3, 2)],
            ]
            kept_P = torch.tensor([4, 0, 3])
            cached.compact(kept_P, torch.tensor([[2, EMPTY, EMPTY], [2, 0, EMPTY], [0, 1, 2]]))


@torch.no_grad()
def test_prefill_keeps_no_scores_of_all_pairs(decoder: TransformerDecoder) -> None:
    """It runs where only the kernel that goes through them in blocks may, also on several query
    heads for one key; a mask per pair of tokens would be a tensor of that size itself."""
    cached = SharedPromptDecoder(copy.deepcopy(decoder))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), NoMask():
        cached.prefill(PROMPTS)


class NoMask(TorchFunctionMode):
    """Fails where attention is called with a mask."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.nn.functional.scaled_dot_product_attention:
            assert "attn_mask" not in (kwargs or {})
            assert len(args) == 3
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("forbidden", [(), (STOP,)], ids=["ends", "no end"])
def test_rare_checks_change_no_sample(
    decoder: TransformerDecoder, monkeypatch: pytest.MonkeyPatch, forbidden: tuple[int, ...]
) -> None:
    """As on a GPU: samples that have ended go on unseen until the next check."""
    expected = engine(decoder, forbidden_ids=forbidden).sample(REQUESTS)
    lengths = {len(sample.tokens) for samples in expected for sample in samples}
    assert (min(lengths) < 16) == (not forbidden)
    monkeypatch.setitem(STEPS_BETWEEN_CHECKS, "cpu", 16)
    found = engine(decoder, forbidden_ids=forbidden).sample(REQUESTS)
    for samples, expected_samples in zip(found, expected, strict=True):
        for sample, other in zip(samples, expected_samples, strict=True):
            assert (sample.tokens, sample.finish_reason) == (other.tokens, other.finish_reason)
            assert sample.log_prob == pytest.approx(other.log_prob, rel=1e-6)


@torch.no_grad()
def test_between_two_checks_no_value_of_a_gpu_is_read(
    decoder: TransformerDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading one would wait for it. Tensors on the meta device have none, so that it fails."""
    steps: list[int] = []

    def check(
        self: Decoding, answers: Sequence[Answer], drawn: Sequence[Drawn]
    ) -> list[tuple[Generation, Piece]]:
        steps.append(len(drawn))
        for answer in answers:
            answer.num_tokens, answer.last_token = answer.num_tokens + len(drawn), 1
        return []

    monkeypatch.setattr(Decoding, "_pieces", check)
    monkeypatch.setattr(shared_prompts, "_first", lambda marked_PC: marked_PC.long())  # waits too
    decoding = Decoding(
        copy.deepcopy(decoder).to("meta"),
        stop_id=STOP,
        forbidden_ids=[0],
        steps_between_checks={"meta": 16},
    )
    settings = GenerationSettings(30, n=2, temperature=0.7, top_p=0.9, seed=0, top_log_probs=2)
    decoding.join([Generation(prompt, settings) for prompt in PROMPTS])
    decoding.advance()
    decoding.advance()
    assert steps == [1, 16, 13]


def sequence_log_prob(decoder: TransformerDecoder, prompt: list[int], tokens: list[int]) -> float:
    """log Q of a response, nats, by torchtune's own forward."""
    with torch.no_grad():
        logps_TV = decoder(torch.tensor([[*prompt, *tokens]]))[0].log_softmax(dim=-1)
    start = len(prompt) - 1
    return sum(logps_TV[start + i, token].item() for i, token in enumerate(tokens))


@pytest.mark.parametrize(
    "model",
    [
        build(),
        build(llama3_2),
        build(lora_llama3, lora_attn_modules=["q_proj", "v_proj"], lora_rank=4, lora_alpha=8),
    ],
    ids=["plain", "tied", "LoRA"],
)
def test_log_probs_are_the_models(model: TransformerDecoder) -> None:
    """Those of the untempered, uncut distribution, though the tokens come from another one."""
    sampler = engine(model, temperature=0.7, top_p=0.9, forbidden_ids=(1, 2))
    for request, samples in zip(REQUESTS, sampler.sample(REQUESTS), strict=True):
        for sample in samples:
            expected = sequence_log_prob(model, list(request.prompt), sample.tokens)
            assert sample.log_prob == pytest.approx(expected, abs=1e-4)


def next_token_probs(logits_V: Tensor, temperature: float, top_p: float) -> list[float]:
    """Re-derived in float64: the fewest most likely tokens that reach `top_p`, to sum 1."""
    probs = (logits_V.double() / temperature).softmax(dim=0).tolist()
    kept: dict[int, float] = {}
    for token in sorted(range(len(probs)), key=lambda token: -probs[token]):
        kept[token] = probs[token]
        if sum(kept.values()) >= top_p:
            break
    return [kept.get(token, 0.0) / sum(kept.values()) for token in range(len(probs))]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (1.4, 1.0), (0.7, 0.9)])
def test_the_samplers_log_probs_are_of_what_it_drew_from(
    decoder: TransformerDecoder, temperature: float, top_p: float
) -> None:
    """Token by token: without the forbidden ones, tempered, cut and renormalised."""
    settings = {"temperature": temperature, "top_p": top_p, "forbidden_ids": (1, 2)}
    sampler = engine(decoder, **settings)
    for request, samples in zip(REQUESTS, sampler.sample(REQUESTS), strict=True):
        for sample in samples:
            with torch.no_grad():
                logits_TV = decoder(torch.tensor([[*request.prompt, *sample.tokens]]))[0]
            logits_TV[:, [1, 2]] = -torch.inf
            start = len(request.prompt) - 1
            expected = sum(
                math.log(next_token_probs(logits_TV[start + i], temperature, top_p)[token])
                for i, token in enumerate(sample.tokens)
            )
            assert sample.sampler_log_prob == pytest.approx(expected, abs=1e-4)


def draw(decoder: TransformerDecoder, prompt: list[int], **settings: Any) -> list[list[int]]:
    """20,000 responses to one prompt, asked for 200 times."""
    sampler = engine(decoder, n=100, stop_id=-1, **settings)
    requests = [Request(prompt, request_seed(0, i, 0)) for i in range(DRAWS // 100)]
    return [sample.tokens for samples in sampler.sample(requests) for sample in samples]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9)])
def test_distribution_is_the_models_exact_one(temperature: float, top_p: float) -> None:
    """Chi-square of 20,000 draws of two tokens each: the first, and the second after the most
    frequent first one.
    """
    decoder, prompt = build(spread=1), [1, 2, 3]
    drawn = draw(decoder, prompt, max_new_tokens=2, temperature=temperature, top_p=top_p)
    first = Counter(tokens[0] for tokens in drawn)
    ((likeliest, times),) = first.most_common(1)
    second = Counter(tokens[1] for tokens in drawn if tokens[0] == likeliest)
    assert times > 1000
    for found, text, draws in ((first, prompt, DRAWS), (second, [*prompt, likeliest], times)):
        probs = next_token_probs(uncached_logits(decoder, text), temperature, top_p)
        assert {token for token, prob in enumerate(probs) if prob == 0} & found.keys() == set()
        assert chi_square_p(found, probs, draws) > 0.01


def chi_square_p(found: Counter[int], probs: list[float], draws: int) -> float:
    """Tokens that are expected fewer than 5 times are one class together."""
    common = [token for token, prob in enumerate(probs) if prob * draws >= 5]
    counts = [found[token] for token in common]
    expected = [probs[token] * draws for token in common]
    if draws - sum(expected) > 1e-6 * draws:
        counts.append(draws - sum(counts))
        expected.append(draws - sum(expected))
    assert len(counts) > 5
    scale = sum(counts) / sum(expected)
    return float(chisquare(counts, [e * scale for e in expected]).pvalue)


def test_chi_square_would_notice_another_temperature() -> None:
    """0.75 instead of 0.7: the test above isn't one that passes whatever is drawn."""
    decoder, prompt = build(spread=1), [1, 2, 3]
    drawn = draw(decoder, prompt, max_new_tokens=1, temperature=0.75)
    found = Counter(tokens[0] for tokens in drawn)
    probs = next_token_probs(uncached_logits(decoder, prompt), 0.7, 1.0)
    assert chi_square_p(found, probs, DRAWS) < 0.001


def tokens_of(answers: list[list[Sample]]) -> list[list[list[int]]]:
    return [[sample.tokens for sample in samples] for samples in answers]


def test_responses_are_a_function_of_the_seed(decoder: TransformerDecoder) -> None:
    sampler = engine(decoder)
    first, again = (tokens_of(sampler.sample(REQUESTS)) for _ in range(2))
    other = tokens_of(sampler.sample([r._replace(seed=r.seed + 100) for r in REQUESTS]))
    assert first == again
    assert all(one != two for one, two in zip(first, other, strict=True))
    assert len({tuple(tokens) for samples in first for tokens in samples}) == 20


def test_responses_dont_depend_on_what_is_sampled_beside_them(decoder: TransformerDecoder) -> None:
    """Together, alone, in another order, in small batches: the same responses."""
    together = tokens_of(engine(decoder).sample(REQUESTS))
    alone = [tokens_of(engine(decoder).sample([request]))[0] for request in REQUESTS]
    assert alone == together
    backwards = tokens_of(engine(decoder).sample(REQUESTS[::-1]))
    assert backwards[::-1] == together
    assert tokens_of(engine(decoder, max_cache_tokens=350).sample(REQUESTS)) == together


def test_more_responses_begin_with_the_same_ones(decoder: TransformerDecoder) -> None:
    """Response j of a prompt depends on j, not on n."""
    few, many = (tokens_of(engine(decoder, n=n).sample(REQUESTS)) for n in (2, 7))
    assert [samples[:2] for samples in many] == few


def test_long_responses_survive_compacting(decoder: TransformerDecoder) -> None:
    """Some end early, some go on over several compactions: each is the model's greedy continuation,
    or, cut at its stop token, the beginning of it."""
    sampler = engine(decoder, n=1, temperature=0, max_new_tokens=100, stop_id=-1)
    whole = [samples[0].tokens for samples in sampler.sample(REQUESTS)]
    for prompt, tokens in zip(PROMPTS, whole, strict=True):
        for place in (0, 31, 32, 33, 64, 65, 99):
            assert uncached_logits(decoder, [*prompt, *tokens[:place]]).argmax() == tokens[place]


def test_response_ends_with_its_stop_token_or_is_cut(decoder: TransformerDecoder) -> None:
    """The same numbers drawn, without a stop token and with one: what comes before it is equal."""
    endless = tokens_of(engine(decoder, stop_id=-1).sample(REQUESTS))
    ended = engine(decoder).sample(REQUESTS)
    reasons = Counter[str]()
    for samples, texts in zip(ended, endless, strict=True):
        for sample, text in zip(samples, texts, strict=True):
            expected = text[: text.index(STOP) + 1] if STOP in text else text
            assert sample.tokens == expected
            assert sample.finish_reason == ("stop" if STOP in text else "length")
            reasons[sample.finish_reason] += 1
    assert min(reasons["stop"], reasons["length"]) >= 3


def test_forbidden_tokens_are_never_sampled(decoder: TransformerDecoder) -> None:
    """Not even where they are the likeliest."""
    likeliest = int(uncached_logits(decoder, PROMPTS[0]).argmax())
    forbidden = (likeliest, 0, VOCABULARY - 1)
    for temperature, n in ((1.0, 20), (0.0, 1)):
        sampler = engine(decoder, forbidden_ids=forbidden, temperature=temperature, n=n)
        for samples in sampler.sample(REQUESTS):
            for sample in samples:
                assert set(sample.tokens) & set(forbidden) == set()


def test_a_forbidden_token_with_nearly_all_probability_leaves_the_others_theirs() -> None:
    """The others' weights beside it, exp(-200), are 0 in float32."""
    decoding = engine(build()).decoding
    decoding._forbidden = torch.tensor([0])
    logits_LV = torch.zeros(1, VOCABULARY)
    logits_LV[0, 0] = 200.0
    settings = GenerationSettings(max_new_tokens=1, top_log_probs=0)
    answer = Answer(Generation([1], settings), 0)
    drawn = decoding._draw(logits_LV, [answer], torch.tensor([0.5], dtype=torch.float64))
    assert drawn.token_L.tolist() == [24]
    assert drawn.log_prob_L is not None
    assert drawn.log_prob_L.tolist() == pytest.approx([-200.0])


def test_a_packed_output_matrix_gives_the_same_logits(
    decoder: TransformerDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_prompts, "PACKED_FROM", 0)
    packed = SharedPromptDecoder(copy.deepcopy(decoder))
    assert packed._packed_output is not None, "PyTorch's packed product isn't where it was"
    hidden_LD = torch.randn(7, 32)
    torch.testing.assert_close(
        packed.logits(hidden_LD), hidden_LD @ output_weight(decoder).t(), rtol=1e-5, atol=1e-5
    )


def test_damaged_weights_are_noticed(decoder: TransformerDecoder) -> None:
    broken = copy.deepcopy(decoder)
    broken.output.weight.data[3] = math.nan
    with pytest.raises(ValueError, match="probabilities are not finite"):
        engine(broken).sample(REQUESTS)


def test_nothing_to_sample(decoder: TransformerDecoder) -> None:
    assert engine(decoder).sample([]) == []


def test_the_global_random_state_is_left_alone(decoder: TransformerDecoder) -> None:
    before = torch.get_rng_state()
    engine(decoder).sample(REQUESTS)
    assert torch.equal(torch.get_rng_state(), before)
