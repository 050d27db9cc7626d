"""The exact KL divergence between the grammar's P(y|a,x) and a model, over all possible responses.

KL(P(.|a,x) || Q(.|a,x)) = sum_y P(y|a,x) (log P(y|a,x) - log Q(y|a,x)), where Q(y|a,x) is the
model's probability of y's tokens, the stop token included. The probability that the model gives to
other strings, or to other tokenisations of the same strings, increases the KL.

Dimension letters: P pairs of a question and a label (or questions alone), N responses, A
attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchtune.modules import TransformerDecoder

from steerlm2.attributes import parse_label
from steerlm2.data.grammar import (
    ATTRIBUTES,
    LABELS,
    SYSTEM_PROMPT,
    Pair,
    Split,
    answers,
    grammar_pairs,
)
from steerlm2.data.packing import Group
from steerlm2.data.records import USER, Turn
from steerlm2.data.templates import Template, encode_prompt, encode_response
from steerlm2.data.tokenizers import Tokenizer
from steerlm2.distributed.world import World
from steerlm2.training.forward import score_groups

Scorer = Callable[[Sequence[Group]], Sequence[Sequence[float]]]
"""[group][response] log-probs of groups of prompt and responses, nats."""


@dataclass(frozen=True)
class ExactKL:
    """The divergence of a model from P(y|a,x), for each pair; float64."""

    pairs: list[Pair]
    kl_P: Tensor
    """[P] KL(P(.|a,x) || Q(.|a,x)), nats."""
    mass_P: Tensor
    """[P] the sum of the model's probabilities of the grammar's responses, at most 1."""
    p_label_P: Tensor
    """[P] P(a|x)."""
    steering_error_PA: Tensor
    """[P, A] E |r(y) - a| over the model's answers, given that the grammar can produce them."""
    least_error_PA: Tensor
    """[P, A] the same for P(y|a,x) itself, the error of a perfect model."""

    def mean(self) -> float:
        """The mean KL over the pairs, each with the same weight.

        Pairs to be sampled, and the grid of a steering evaluation, are chosen with equal weights
        too, so this is the mean to compare with steering errors.
        """
        return self.kl_P.mean().item()

    def weighted_mean(self) -> float:
        """The mean KL over the pairs, weighted by P(a|x).

        Up to a constant it is the expected loss of attribute-conditioned SFT on the grammar's
        draws, in which labels occur with the frequencies P(a|x).
        """
        return ((self.kl_P * self.p_label_P).sum() / self.p_label_P.sum()).item()

    def by_label(self) -> dict[str, float]:
        """The mean KL of every label that a pair has, in the order of `LABELS`."""
        return {
            label: self.kl_P[chosen_P].mean().item()
            for label in LABELS
            if (chosen_P := torch.tensor([pair.label == label for pair in self.pairs])).any()
        }

    def summary(self) -> dict[str, float]:
        """Means over the pairs, by the name of a metric."""
        found = {
            "exact_kl": self.mean(),
            "exact_kl_weighted": self.weighted_mean(),
            "mass": self.mass_P.mean().item(),
            "steering_mae": self.steering_error_PA.mean().item(),
            "least_steering_mae": self.least_error_PA.mean().item(),
        }
        for name, errors_P in zip(ATTRIBUTES, self.steering_error_PA.unbind(dim=1), strict=True):
            found[f"mae_{name}"] = errors_P.mean().item()
        return found


@dataclass(frozen=True)
class ExactResponseKL:
    """The divergence of a model without labels from P(y|x), for each question; float64."""

    prompts: list[str]
    kl_P: Tensor
    """[P] KL(P(.|x) || Q(.|x)), nats."""
    mass_P: Tensor
    """[P] the sum of the model's probabilities of the grammar's responses, at most 1."""

    def summary(self) -> dict[str, float]:
        """Means over the questions, by the name of a metric."""
        return {
            "exact_response_kl": self.kl_P.mean().item(),
            "response_mass": self.mass_P.mean().item(),
        }


def model_scorer(
    decoder: TransformerDecoder, world: World, *, max_tokens_per_microbatch: int = 500
) -> Scorer:
    """A scorer that uses the trainer's code path, `score_groups`."""
    return lambda groups: score_groups(
        decoder, groups, world, max_tokens_per_microbatch=max_tokens_per_microbatch
    )


def exact_kl(
    score: Scorer,
    tokenizer: Tokenizer,
    template: Template,
    pairs: Sequence[Pair],
    *,
    show_labels: bool = True,
) -> ExactKL:
    """The divergence of a model from P(y|a,x), for the given pairs.

    Args:
        pairs: for example of `grammar_pairs`.
        show_labels: False for a model of P(y|x), whose prompts have no label.

    Raises:
        ValueError: for no pairs, and for a question that the grammar doesn't have.
    """
    if not pairs:
        raise ValueError("there are no pairs to score: see `grammar.grammar_pairs`")
    asked = [(pair.prompt, pair.label if show_labels else None) for pair in pairs]
    columns = []
    for pair, log_q_N in zip(pairs, _log_q(score, tokenizer, template, asked), strict=True):
        table = answers(pair.prompt)
        a = LABELS.index(pair.label)
        log_p_N = table.log_posterior_NL[:, a]
        wanted_A = torch.tensor([parse_label(pair.label)[name] for name in ATTRIBUTES])
        error_NA = (table.scores_NA - wanted_A).abs()
        columns.append(
            (
                _kl(log_p_N, log_q_N),
                log_q_N.exp().sum(),
                table.log_p_label_L[a].exp(),
                log_q_N.softmax(dim=0) @ error_NA,
                log_p_N.exp() @ error_NA,
            )
        )
    return ExactKL(list(pairs), *(torch.stack(column) for column in zip(*columns, strict=True)))


def exact_response_kl(
    score: Scorer, tokenizer: Tokenizer, template: Template, prompts: Sequence[str]
) -> ExactResponseKL:
    """The divergence of a model without labels from P(y|x)."""
    log_q = _log_q(score, tokenizer, template, [(prompt, None) for prompt in prompts])
    kl = [_kl(answers(p).log_p_N, log_q_N) for p, log_q_N in zip(prompts, log_q, strict=True)]
    mass = [log_q_N.exp().sum() for log_q_N in log_q]
    return ExactResponseKL(list(prompts), torch.stack(kl), torch.stack(mass))


def grammar_metrics(
    score: Scorer,
    tokenizer: Tokenizer,
    template: Template,
    *,
    show_labels: bool = True,
    split: Split = "validation",
    max_pairs: int | None = None,
) -> dict[str, float]:
    """`exact_kl` over a split's pairs, as metrics whose names begin with `exact_`.

    It is meant for the key `exact_kl` of evaluate_steering.

    Args:
        show_labels: as in `exact_kl`.
        max_pairs: the first so many only; None: all.
    """
    pairs = grammar_pairs(split)[:max_pairs]
    found = exact_kl(score, tokenizer, template, pairs, show_labels=show_labels)
    return {f"exact_{name.removeprefix('exact_')}": v for name, v in found.summary().items()}


def _kl(log_p_N: Tensor, log_q_N: Tensor) -> Tensor:
    """[] sum p (log p - log q), for a q that may add up to less than 1."""
    return (log_p_N.exp() * (log_p_N - log_q_N)).sum()


def _log_q(
    score: Scorer,
    tokenizer: Tokenizer,
    template: Template,
    asked: Sequence[tuple[str, str | None]],
) -> list[Tensor]:
    """[pair] -> [N] log-probs of all responses to a question under a label; each scored once."""
    groups: dict[tuple[str, str | None], Group] = {}
    for prompt, label in asked:
        if (prompt, label) not in groups:
            tokens = encode_prompt(template, tokenizer, SYSTEM_PROMPT, [Turn(USER, prompt)], label)
            texts = answers(prompt).texts
            responses = [encode_response(template, tokenizer, text) for text in texts]
            groups[prompt, label] = Group(tokens, responses, len(groups))
    log_q = score(list(groups.values()))
    by_question = {
        question: torch.tensor(log_q_N, dtype=torch.float64)
        for question, log_q_N in zip(groups, log_q, strict=True)
    }
    return [by_question[question] for question in asked]
