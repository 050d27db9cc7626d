"""Synthetic questions, and a grammar of their answers with known probabilities.

All responses to a question can be listed with their exact P(y|x). The attribute scores r(y) are
counted in a response's text, and P(a|x,y) is the Beta rule of `steerlm2.attributes` on those
scores. So P(y|a,x) = P(a|x,y) P(y|x) / P(a|x) is a finite table, and a model's divergence from it
is computed exactly (`steerlm2.evaluation.exact_kl`). It models no human preference.

    response -> opening body tail closing      (pieces joined by spaces, empty ones left out)

The opening and the body depend on the kind of question, the tail on the body, the closing on the
opening. All weights are percent, so that probabilities are whole multiples of 100^-4.

Dimension letters: N responses of a prompt, L labels, A attributes.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from steerlm2.attributes import beta_log_prob, encode_label, parse_label
from steerlm2.data.conversations import Conversation
from steerlm2.data.records import ASSISTANT, USER, Record, Response, Turn
from steerlm2.data.synthetic import ATTRIBUTES, SYSTEM_PROMPT, score_text

Split = Literal["train", "validation", "all"]
LabelRule = Literal["sampled", "rounded"]

LABEL_VALUES = tuple(itertools.product(range(5), repeat=len(ATTRIBUTES)))
"""The values of `ATTRIBUTES` for each of `LABELS`."""

LABELS = tuple(encode_label(dict(zip(ATTRIBUTES, v, strict=True))) for v in LABEL_VALUES)

WEIGHT_TOTAL = 100**4
"""The weights of all responses to a question add up to this."""

LOG_ZERO = math.log(5e-324)
"""log P(y|x) of a text that the grammar can't produce: finite, as in `beta_log_prob`."""


class Pair(NamedTuple):
    """A question with a requested label."""

    prompt: str
    label: str


@dataclass(frozen=True)
class Answers:
    """All responses to one question, with their probabilities; float64, nats."""

    texts: tuple[str, ...]
    weights: tuple[int, ...]
    """P(y|x) in units of 1 / WEIGHT_TOTAL."""
    scores_NA: Tensor
    """[N, A] r(y), from 0 to 4."""
    log_p_N: Tensor
    """[N] log P(y|x)."""
    log_p_label_NL: Tensor
    """[N, L] log P(a|x,y)."""

    @property
    def log_p_label_L(self) -> Tensor:
        """[L] log P(a|x) = log sum_y P(a|x,y) P(y|x)."""
        return (self.log_p_label_NL + self.log_p_N[:, None]).logsumexp(dim=0)

    @property
    def log_posterior_NL(self) -> Tensor:
        """[N, L] log P(y|a,x), by Bayes' rule."""
        return self.log_p_label_NL + self.log_p_N[:, None] - self.log_p_label_L


def prompts() -> tuple[str, ...]:
    """All questions; those of one kind follow each other."""
    return tuple(_questions())


@functools.cache
def answers(prompt: str) -> Answers:
    """The table of all responses to a question.

    Raises:
        ValueError: for a question that isn't one of `prompts`.
    """
    if prompt not in _questions():
        raise ValueError(f"{prompt!r} is no question of the grammar: see `grammar.prompts()`")
    texts, weights = zip(*_derivations(_questions()[prompt]), strict=True)
    scores = [score_text(text) for text in texts]
    scores_NA = torch.tensor([[s[a] for a in ATTRIBUTES] for s in scores], dtype=torch.float64)
    values_L1A = torch.tensor(LABEL_VALUES)[:, None]
    log_p_LN = beta_log_prob(scores_NA.expand(len(LABELS), -1, -1), values_L1A).sum(dim=-1)
    return Answers(
        texts,
        weights,
        scores_NA,
        (torch.tensor(weights, dtype=torch.float64) / WEIGHT_TOTAL).log(),
        log_p_LN.t().contiguous(),
    )


def grammar_pairs(split: Split) -> list[Pair]:
    """The pairs of a split, by question.

    Of the 25 labels of a question 5 are held out for validation, with every value of either
    attribute once. The 5 questions of a kind hold out different labels, so every label is held out
    exactly once for every kind. This doesn't depend on a seed.

    Raises:
        ValueError: for an unknown split.
    """
    if split not in ("train", "validation", "all"):
        raise ValueError(f"split must be 'train', 'validation' or 'all', got {split!r}")
    return [
        Pair(prompt, label)
        for i, prompt in enumerate(prompts())
        for (humor, verbosity), label in zip(LABEL_VALUES, LABELS, strict=True)
        if split == "all" or ((humor + 2 * verbosity + i) % 5 == 0) == (split == "validation")
    ]


def draw_answers(
    num: int, seed: int, split: Split, labels: LabelRule = "sampled"
) -> Iterator[tuple[Pair, str]]:
    """Draws (x, a, y): x uniform, y from P(y|x), a from P(a|x,y), given that (x, a) is in `split`.

    Given x and a, y follows P(y|a,x) exactly, also within a split, so a model can learn P(y|a,x)
    from these draws. Labels occur with the frequencies P(a|x).

    Args:
        labels: "rounded" takes the rounded scores instead of a draw from P(a|x,y). The
            distribution of y given x and a is then not P(y|a,x), as in a data set that a regression
            model annotated.

    Raises:
        ValueError: for an unknown split or rule.
    """
    if labels not in ("sampled", "rounded"):
        raise ValueError(f"labels must be 'sampled' or 'rounded', got {labels!r}")
    rng = random.Random(f"{split}:{seed}")
    allowed = set(grammar_pairs(split))
    drawn = 0
    while drawn < num:
        prompt = rng.choice(prompts())
        table = answers(prompt)
        n = rng.choices(range(len(table.texts)), table.weights)[0]
        if labels == "sampled":
            label = rng.choices(LABELS, table.log_p_label_NL[n].exp().tolist())[0]
        else:
            values = [round(score) for score in table.scores_NA[n].tolist()]
            label = encode_label(dict(zip(ATTRIBUTES, values, strict=True)))
        if Pair(prompt, label) in allowed:
            drawn += 1
            yield Pair(prompt, label), table.texts[n]


def grammar_conversations(
    num: int, seed: int, split: Split, *, labels: LabelRule | None = "sampled"
) -> Iterator[Conversation]:
    """Draws as conversations: with labels for Q'(y|a,x), with None for P(y|x).

    Without labels the splits differ only by their seed: if responses were left out by their labels,
    the others wouldn't follow P(y|x).
    """
    if labels is None:
        draws = ((p, y, None) for (p, _), y in draw_answers(num, _seed(seed, split), "all"))
        yield from (_conversation(*draw) for draw in draws)
    else:
        for (prompt, label), text in draw_answers(num, seed, split, labels):
            yield _conversation(prompt, text, label)


def grammar_prompts(split: Split) -> list[Record]:
    """Every pair of a split as a record without responses, to sample responses from Q' for."""
    return [grammar_record(pair, []) for pair in grammar_pairs(split)]


def grammar_record(pair: Pair, texts: Sequence[str]) -> Record:
    """A record of the given responses with their exact scores, log P(a|x,y) and log P(y|x).

    The log P(y|x) of a text that the grammar can't produce is LOG_ZERO.
    """
    wanted = parse_label(pair.label)
    log_p_of = dict(
        zip(answers(pair.prompt).texts, answers(pair.prompt).log_p_N.tolist(), strict=True)
    )
    responses = []
    for text in texts:
        scores = score_text(text)
        log_p_A = beta_log_prob([[scores[name] for name in wanted]], [list(wanted.values())])
        responses.append(
            Response(
                text,
                log_p_attributes=log_p_A.sum().item(),
                log_p_response=log_p_of.get(text, LOG_ZERO),
                scores=scores,
            )
        )
    extra = {"synthetic": True}
    return Record(SYSTEM_PROMPT, [Turn(USER, pair.prompt)], pair.label, responses, extra)


def _conversation(prompt: str, text: str, label: str | None) -> Conversation:
    return Conversation([Turn(USER, prompt), Turn(ASSISTANT, text, label)], SYSTEM_PROMPT)


def _seed(seed: int, split: Split) -> int:
    """A different seed for every split."""
    return random.Random(f"{split}:{seed}:unlabelled").getrandbits(32)


@dataclass(frozen=True)
class _Kind:
    """Weights, in percent, of the openings and bodies of answers to one kind of question."""

    opening: tuple[int, int, int]
    body: tuple[int, int]


class _Question(NamedTuple):
    kind: _Kind
    bodies: tuple[str, str]


def _derivations(question: _Question) -> Iterator[tuple[str, int]]:
    """Every response with its weight. No text has two derivations."""
    kind, bodies = question
    for opening, body in itertools.product(range(len(_OPENINGS)), range(len(bodies))):
        for tail, closing in itertools.product(range(len(_TAILS)), range(len(_CLOSINGS))):
            pieces = [_OPENINGS[opening], bodies[body], _TAILS[tail], _CLOSINGS[closing]]
            weight = kind.opening[opening] * kind.body[body]
            weight *= _TAIL_WEIGHTS[body][tail] * _CLOSING_WEIGHTS[opening][closing]
            yield " ".join(piece for piece in pieces if piece), weight


@functools.cache
def _questions() -> dict[str, _Question]:
    found = {}
    for kind, question, short, full, things in _TEMPLATES:
        for thing, answer in (item.split(": ") for item in things.split("; ")):
            bodies = [body.format(thing=thing, answer=answer) for body in (short, full)]
            text = question.format(thing=thing)
            found[text] = _Question(kind, (_capitalized(bodies[0]), _capitalized(bodies[1])))
    return found


def _capitalized(text: str) -> str:
    return text[0].upper() + text[1:]


_OPENINGS = ("", "Wow!", "Oh boy! Wow!")
_CLOSINGS = ("", "Yay!", "Ta da! Yay!")
_CLOSING_WEIGHTS = ((70, 20, 10), (40, 35, 25), (30, 30, 40))
"""By opening: an answer that begins with exclamations ends with them more often."""

_TAILS = (
    "",
    "That is all.",
    "Most people know this.",
    "We learn it at school. That is all.",
    "We learn it at school. It has been so for long.",
)
_TAIL_WEIGHTS = ((40, 20, 20, 12, 8), (25, 15, 20, 20, 20))
"""By body: the short one has long tails less often."""

_TEMPLATES = (
    (
        _Kind(opening=(60, 25, 15), body=(50, 50)),
        "What is the capital of {thing}?",
        "{answer}.",
        "The capital of {thing} is {answer}.",
        "France: Paris; Italy: Rome; Spain: Madrid; Greece: Athens; Japan: Tokyo",
    ),
    (
        _Kind(opening=(45, 30, 25), body=(65, 35)),
        "Which color does {thing} have?",
        "{answer}.",
        "{thing} is {answer}.",
        "a ripe banana: yellow; fresh grass: green; clean snow: white; the clear sky: blue; "
        "a ripe tomato: red",
    ),
    (
        _Kind(opening=(30, 35, 35), body=(35, 65)),
        "What is a young {thing} called?",
        "A {answer}.",
        "A young {thing} is called a {answer}.",
        "dog: puppy; cat: kitten; cow: calf; horse: foal; sheep: lamb",
    ),
    (
        _Kind(opening=(50, 30, 20), body=(50, 50)),
        "What is the opposite of {thing}?",
        "{answer}.",
        "The opposite of {thing} is {answer}.",
        "hot: cold; big: small; up: down; day: night; old: new",
    ),
)
