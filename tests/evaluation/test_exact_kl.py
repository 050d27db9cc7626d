"""Exact KL: zero for the posterior itself, by hand in a world of two answers, and of a model.

Dimension letters: P pairs, N responses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torchtune.models.llama3 import llama3

from steerlm2.data import grammar
from steerlm2.data.grammar import LABELS, SYSTEM_PROMPT, Answers, Pair, answers, grammar_pairs
from steerlm2.data.packing import Group
from steerlm2.data.records import USER, Turn
from steerlm2.data.templates import encode_prompt, encode_response, extra_id_template
from steerlm2.data.tokenizers import tiny_tokenizer
from steerlm2.distributed.parallelize import parallelize
from steerlm2.distributed.world import World
from steerlm2.evaluation import exact_kl as exact_kl_module
from steerlm2.evaluation.exact_kl import exact_kl, exact_response_kl, model_scorer

TOKENIZER, TEMPLATE = tiny_tokenizer(), extra_id_template()
PAIRS = [pair for pair in grammar_pairs("validation") if "France" in pair.prompt or
         "hot" in pair.prompt]  # fmt: skip


class FakeModel:
    """Answers groups with given log-probs: [pair] -> those of all responses, in their order."""

    def __init__(self, log_q: Sequence[Sequence[float]]) -> None:
        self.log_q = log_q
        self.groups: list[Group] = []

    def __call__(self, groups: Sequence[Group]) -> Sequence[Sequence[float]]:
        self.groups = list(groups)
        return self.log_q


def posterior(pair: Pair) -> torch.Tensor:
    return answers(pair.prompt).log_posterior_NL[:, LABELS.index(pair.label)]


def test_the_posterior_itself_has_kl_zero_mass_one_and_the_least_error() -> None:
    found = exact_kl(FakeModel([posterior(p).tolist() for p in PAIRS]), TOKENIZER, TEMPLATE, PAIRS)
    assert found.kl_P.tolist() == pytest.approx([0] * 10, abs=1e-12)
    assert found.mass_P.tolist() == pytest.approx([1] * 10, abs=1e-12)
    torch.testing.assert_close(found.steering_error_PA, found.least_error_PA)
    assert (found.least_error_PA > 0).any()  # scores aren't whole numbers, labels are


def test_any_other_model_has_a_positive_kl_and_leaked_mass_adds_its_logarithm() -> None:
    """KL(p || m q) = KL(p || q) - log m for a q that adds up to 1: with q = p, -log 0.8."""
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(90, generator=generator).double() for _ in PAIRS]
    noisy = [(posterior(p) + e).log_softmax(dim=0) for p, e in zip(PAIRS, noise, strict=True)]
    found = exact_kl(FakeModel([q.tolist() for q in noisy]), TOKENIZER, TEMPLATE, PAIRS)
    assert (found.kl_P > 0.01).all()
    assert found.mass_P.tolist() == pytest.approx([1] * 10)

    leaky = [(posterior(p) + math.log(0.8)).tolist() for p in PAIRS]
    found = exact_kl(FakeModel(leaky), TOKENIZER, TEMPLATE, PAIRS)
    assert found.kl_P.tolist() == pytest.approx([-math.log(0.8)] * 10)
    assert found.mass_P.tolist() == pytest.approx([0.8] * 10)
    torch.testing.assert_close(found.steering_error_PA, found.least_error_PA)


@pytest.fixture
def two_answers(monkeypatch: pytest.MonkeyPatch) -> Pair:
    """P(y|x) = (3/4, 1/4), P(a|x,y) = (1/5, 9/10) for one label."""
    pair = Pair("Really?", "humor:1,verbosity:2")
    log_p_label_NL = torch.full((2, 25), -5.0, dtype=torch.float64)
    log_p_label_NL[:, LABELS.index(pair.label)] = torch.tensor([0.2, 0.9]).double().log()
    table = Answers(
        ("No.", "Yes! Yes."),
        (75, 25),
        torch.tensor([[0.0, 1.5], [1.0, 4.0]]).double(),
        torch.tensor([0.75, 0.25]).double().log(),
        log_p_label_NL,
    )
    for module in (grammar, exact_kl_module):
        monkeypatch.setattr(module, "answers", {pair.prompt: table}.__getitem__)
    return pair


def test_kl_and_errors_of_two_answers_by_hand(two_answers: Pair) -> None:
    """P(a|x) = 0.75 x 0.2 + 0.25 x 0.9 = 0.375, so P(y|a,x) = (0.15, 0.225) / 0.375 = (0.4, 0.6).

    Q = (0.5, 0.3): KL = 0.4 log(0.4 / 0.5) + 0.6 log(0.6 / 0.3) = 0.4 log 0.8 + 0.6 log 2,
    mass 0.8. Errors: humor |0 - 1|, |1 - 1|, verbosity |1.5 - 2|, |4 - 2|; the model, given that
    it answers with one of both, weighs them 0.625 and 0.375, a perfect one 0.4 and 0.6.
    """
    model = FakeModel([[math.log(0.5), math.log(0.3)]])
    found = exact_kl(model, TOKENIZER, TEMPLATE, [two_answers])
    kl = 0.4 * math.log(0.8) + 0.6 * math.log(2)
    assert found.kl_P.tolist() == pytest.approx([kl])
    assert found.mass_P.tolist() == pytest.approx([0.8])
    assert found.p_label_P.tolist() == pytest.approx([0.375])
    assert found.steering_error_PA[0].tolist() == pytest.approx([0.625, 0.625 * 0.5 + 0.375 * 2])
    assert found.least_error_PA[0].tolist() == pytest.approx([0.4, 0.4 * 0.5 + 0.6 * 2])
    assert found.summary() == pytest.approx(
        {
            "exact_kl": kl,
            "exact_kl_weighted": kl,
            "mass": 0.8,
            "steering_mae": (0.625 + 1.0625) / 2,
            "least_steering_mae": (0.4 + 1.4) / 2,
            "mae_humor": 0.625,
            "mae_verbosity": 1.0625,
        }
    )
    (group,) = model.groups
    turns = [Turn(USER, "Really?")]
    assert list(group.prompt) == encode_prompt(
        TEMPLATE, TOKENIZER, SYSTEM_PROMPT, turns, "humor:1,verbosity:2"
    )
    assert [list(response) for response in group.responses] == [
        encode_response(TEMPLATE, TOKENIZER, text) for text in ("No.", "Yes! Yes.")
    ]


def test_kl_of_answers_without_a_label_by_hand(two_answers: Pair) -> None:
    """P(y|x) = (3/4, 1/4) against Q = (1/2, 1/4): KL = 3/4 log(3/2), mass 3/4."""
    model = FakeModel([[math.log(0.5), math.log(0.25)]])
    found = exact_response_kl(model, TOKENIZER, TEMPLATE, [two_answers.prompt])
    assert found.summary() == pytest.approx(
        {"exact_response_kl": 0.75 * math.log(1.5), "response_mass": 0.75}
    )
    turns = [Turn(USER, "Really?")]
    assert list(model.groups[0].prompt) == encode_prompt(
        TEMPLATE, TOKENIZER, SYSTEM_PROMPT, turns, None
    )


def test_means_over_pairs_uniform_weighted_and_by_label() -> None:
    """A model that is off by i in the i-th pair: log Q = log P - i gives a KL of i."""
    log_q = [(posterior(pair) - i).tolist() for i, pair in enumerate(PAIRS)]
    found = exact_kl(FakeModel(log_q), TOKENIZER, TEMPLATE, PAIRS)
    assert found.mean() == pytest.approx(4.5)
    p = [
        answers(pair.prompt).log_p_label_L[LABELS.index(pair.label)].exp().item() for pair in PAIRS
    ]
    assert found.p_label_P.tolist() == pytest.approx(p)
    weighted = sum(i * p_i for i, p_i in enumerate(p)) / sum(p)
    assert found.weighted_mean() == pytest.approx(weighted)
    assert weighted != pytest.approx(4.5, abs=0.1)
    by_label = {
        label: sum(own) / len(own)
        for label in LABELS
        if (own := [i for i, pair in enumerate(PAIRS) if pair.label == label])
    }
    assert found.by_label() == pytest.approx(by_label)


def test_a_model_without_labels_is_asked_each_question_once() -> None:
    """P(y|x) itself: its KL is that of the posterior from the prior, its answers never differ."""
    table = answers(PAIRS[0].prompt)
    pairs = [Pair(PAIRS[0].prompt, label) for label in LABELS]
    model = FakeModel([table.log_p_N.tolist()])
    found = exact_kl(model, TOKENIZER, TEMPLATE, pairs, show_labels=False)
    assert len(model.groups) == 1
    for a, kl in enumerate(found.kl_P.tolist()):
        log_p_N = table.log_posterior_NL[:, a]
        assert kl == pytest.approx((log_p_N.exp() * (log_p_N - table.log_p_N)).sum().item())
    assert (found.steering_error_PA.mean(dim=0) > found.least_error_PA.mean(dim=0) + 0.5).all()


@torch.no_grad()
def test_a_model_is_scored_like_one_response_at_a_time() -> None:
    """log Q(y|a,x) from plain logits of prompt and response, in a row of its own."""
    torch.manual_seed(0)
    decoder = llama3(
        vocab_size=512, num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=32,
        max_seq_len=256, intermediate_dim=64,
    )  # fmt: skip
    pair = PAIRS[2]
    prompt = encode_prompt(
        TEMPLATE, TOKENIZER, SYSTEM_PROMPT, [Turn(USER, pair.prompt)], pair.label
    )
    log_q = []
    for text in answers(pair.prompt).texts:
        response = encode_response(TEMPLATE, TOKENIZER, text)
        logps_TV = decoder(torch.tensor([prompt + response]))[0].float().log_softmax(dim=-1)
        start = len(prompt) - 1
        log_q.append(sum(logps_TV[start + i, token].item() for i, token in enumerate(response)))
    by_hand = exact_kl(FakeModel([log_q]), TOKENIZER, TEMPLATE, [pair])

    world = World(torch.device("cpu"))
    parallelize(decoder, world, dtype=torch.float32)
    found = exact_kl(model_scorer(decoder, world), TOKENIZER, TEMPLATE, [pair])
    assert found.kl_P.item() == pytest.approx(by_hand.kl_P.item(), rel=1e-6)
    assert found.mass_P.item() < 1e-6  # untrained


def test_no_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="no pairs to score"):
        exact_kl(FakeModel([]), TOKENIZER, TEMPLATE, [])
