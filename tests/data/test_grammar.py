"""The grammar: its tables are probabilities, its draws follow them, its splits keep apart.

Dimension letters: N responses, L labels.
"""

from __future__ import annotations

import collections
import itertools
import math

import pytest
import torch
from scipy.stats import chisquare

from steerlm2.attributes import beta_log_prob, encode_label, parse_label
from steerlm2.data.conversations import conversation_to_json, parse_conversation
from steerlm2.data.grammar import (
    ATTRIBUTES,
    LABELS,
    LOG_ZERO,
    SYSTEM_PROMPT,
    WEIGHT_TOTAL,
    LabelRule,
    Pair,
    answers,
    draw_answers,
    grammar_conversations,
    grammar_pairs,
    grammar_prompts,
    grammar_record,
    prompts,
)
from steerlm2.data.records import USER, Turn, parse_record, record_to_json
from steerlm2.data.synthetic import score_text
from steerlm2.data.templates import encode_prompt, encode_response, extra_id_template
from steerlm2.data.tokenizers import tiny_tokenizer

FRANCE = "What is the capital of France?"


def test_every_question_has_90_different_answers_and_no_two_questions_are_the_same() -> None:
    """3 openings x 2 bodies x 5 tails x 3 closings."""
    assert len(set(prompts())) == len(prompts()) == 20
    for prompt in prompts():
        assert len(set(answers(prompt).texts)) == len(answers(prompt).texts) == 90


def test_probabilities_of_the_answers_add_up_to_one_in_whole_numbers() -> None:
    for prompt in prompts():
        assert sum(answers(prompt).weights) == WEIGHT_TOTAL
        assert answers(prompt).log_p_N.exp().sum().item() == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize(
    ("text", "percents"),
    [
        ("Paris.", (60, 50, 40, 70)),
        ("Paris. Yay!", (60, 50, 40, 20)),
        ("Wow! The capital of France is Paris. That is all.", (25, 50, 15, 40)),
        (
            "Oh boy! Wow! Paris. We learn it at school. It has been so for long. Ta da! Yay!",
            (15, 50, 8, 40),
        ),
    ],
)
def test_an_answer_has_the_product_of_its_choices(
    text: str, percents: tuple[int, int, int, int]
) -> None:
    """Opening, body, tail given the body, closing given the opening."""
    table = answers(FRANCE)
    assert table.weights[table.texts.index(text)] == math.prod(percents)


def test_labels_of_an_answer_have_probabilities_that_add_up_to_one() -> None:
    for prompt in prompts():
        table = answers(prompt)
        assert table.log_p_label_NL.shape == (90, 25)
        torch.testing.assert_close(
            table.log_p_label_NL.exp().sum(dim=1), torch.ones(90).double(), rtol=0, atol=1e-12
        )
        assert table.log_p_label_L.exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_scores_are_counted_in_the_text_and_labels_follow_the_beta_rule() -> None:
    table = answers("Which color does fresh grass have?")
    n = table.texts.index("Wow! Green. Most people know this. Ta da! Yay!")
    scores = {"humor": 3.0, "verbosity": (5 - 1) / 4}  # three exclamations; five words
    assert score_text(table.texts[n]) == scores
    assert dict(zip(ATTRIBUTES, table.scores_NA[n].tolist(), strict=True)) == scores
    for a, label in enumerate(LABELS):
        each = [
            beta_log_prob([[scores[name]]], [[value]]).item()
            for name, value in parse_label(label).items()
        ]
        assert table.log_p_label_NL[n, a].item() == pytest.approx(sum(each), rel=1e-12)


def test_posterior_is_bayes_rule_in_plain_probabilities() -> None:
    """P(y|a,x) = P(a|x,y) P(y|x) / sum_y' P(a|x,y') P(y'|x), one number after the other."""
    for prompt in (prompts()[0], prompts()[7], prompts()[-1]):
        table = answers(prompt)
        for a in range(len(LABELS)):
            joint = [
                math.exp(table.log_p_label_NL[n, a].item()) * weight / WEIGHT_TOTAL
                for n, weight in enumerate(table.weights)
            ]
            assert table.log_p_label_L[a].exp().item() == pytest.approx(sum(joint), rel=1e-10)
            posterior = table.log_posterior_NL[:, a].exp().tolist()
            assert posterior == pytest.approx([p / sum(joint) for p in joint], rel=1e-10)
            assert sum(posterior) == pytest.approx(1, abs=1e-12)


def test_no_label_is_too_rare_to_be_learned() -> None:
    """Every label of every question in at least 1 of 250 draws."""
    rarest = min(answers(prompt).log_p_label_L.min().exp().item() for prompt in prompts())
    assert rarest > 1 / 250


def test_kinds_of_questions_are_answered_differently() -> None:
    """A model can't do without the question: the means of humor and verbosity tell kinds apart."""
    means = [answers(prompt).log_p_N.exp() @ answers(prompt).scores_NA for prompt in prompts()[::5]]
    for one, other in itertools.combinations(means, 2):
        assert (one - other).abs().max() > 0.1


def test_texts_come_back_from_their_tokens_and_end_with_the_stop_token() -> None:
    tokenizer, template = tiny_tokenizer(), extra_id_template()
    stop = tokenizer.token_id("<extra_id_1>")
    for prompt in prompts():
        responses = [encode_response(template, tokenizer, y) for y in answers(prompt).texts]
        for text, tokens in zip(answers(prompt).texts, responses, strict=True):
            assert tokenizer.decode(tokens) == f"{text}\n<extra_id_1>"
            assert tokens[-1] == stop
            assert stop not in tokens[:-1]
            assert 4 <= len(tokens) <= 40
        turns = [Turn(USER, prompt)]
        longest = encode_prompt(template, tokenizer, SYSTEM_PROMPT, turns, LABELS[0])
        assert len(longest) <= 60


def test_draws_follow_the_joint_distribution() -> None:
    """Chi-square of 20,000 draws, twice: y of a question, and labels of all of its answers."""
    draws = [(pair.label, y) for pair, y in draw_answers(20_000, 3, "all") if pair.prompt == FRANCE]
    table = answers(FRANCE)
    assert len(draws) == pytest.approx(1000, abs=5 * math.sqrt(1000))
    texts = collections.Counter(y for _, y in draws)
    labels = collections.Counter(label for label, _ in draws)
    for counts, outcomes, p in (
        (texts, table.texts, table.log_p_N.exp()),
        (labels, LABELS, table.log_p_label_L.exp()),
    ):
        observed, expected = _pooled(
            [counts[outcome] for outcome in outcomes], (p * len(draws)).tolist()
        )
        assert chisquare(observed, expected).pvalue > 1e-3


def test_draws_of_a_split_have_the_posterior_of_their_pair() -> None:
    """Leaving pairs out must not change P(y|a,x): the commonest training pair, 40,000 draws."""
    table = answers(FRANCE)
    pair = Pair(FRANCE, "humor:0,verbosity:1")
    assert pair in grammar_pairs("train")
    drawn = collections.Counter(y for p, y in draw_answers(40_000, 4, "train") if p == pair)
    p_N = table.log_posterior_NL[:, LABELS.index(pair.label)].exp()
    observed, expected = _pooled(
        [drawn[text] for text in table.texts], (p_N * drawn.total()).tolist()
    )
    assert len(observed) > 3
    assert chisquare(observed, expected).pvalue > 1e-3


def _pooled(observed: list[int], expected: list[float]) -> tuple[list[int], list[float]]:
    """Outcomes expected fewer than five times count as one, as the test needs it."""
    bins = [[i] for i, e in enumerate(expected) if e >= 5]
    rare = [i for i, e in enumerate(expected) if e < 5]
    bins += [rare] if rare else []
    return [sum(observed[i] for i in b) for b in bins], [sum(expected[i] for i in b) for b in bins]


def test_rounded_labels_are_those_of_the_scores() -> None:
    for pair, text in draw_answers(200, 0, "all", labels="rounded"):
        assert parse_label(pair.label) == {
            name: round(score) for name, score in score_text(text).items()
        }


def test_the_same_seed_gives_the_same_draws_and_another_seed_or_split_others() -> None:
    def texts(seed: int, *, labelled: bool, validation: bool = False) -> list[str]:
        return [
            conversation.turns[1].value
            for conversation in grammar_conversations(
                50,
                seed,
                "validation" if validation else "train",
                labels="sampled" if labelled else None,
            )
        ]

    for labelled in (True, False):
        assert texts(5, labelled=labelled) == texts(5, labelled=labelled)
        assert texts(5, labelled=labelled) != texts(6, labelled=labelled)
        assert texts(5, labelled=labelled) != texts(5, labelled=labelled, validation=True)


def test_splits_share_no_pair_and_hold_out_every_label_of_every_kind_once() -> None:
    train, validation = grammar_pairs("train"), grammar_pairs("validation")
    assert set(train).isdisjoint(validation)
    assert sorted([*train, *validation]) == sorted(grammar_pairs("all"))
    assert len(grammar_pairs("all")) == 20 * 25
    kinds = [set(prompts()[i : i + 5]) for i in range(0, 20, 5)]
    for kind in kinds:
        held_out = [pair.label for pair in validation if pair.prompt in kind]
        assert sorted(held_out) == sorted(LABELS)
    for prompt in prompts():
        labels = [parse_label(pair.label) for pair in validation if pair.prompt == prompt]
        for name in ATTRIBUTES:
            assert sorted(label[name] for label in labels) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("labels", ["sampled", "rounded"])
def test_labelled_conversations_keep_to_the_pairs_of_their_split(labels: LabelRule) -> None:
    pairs = grammar_pairs("validation")
    for conversation in grammar_conversations(300, 0, "validation", labels=labels):
        user, assistant = conversation.turns
        assert (user.value, assistant.label) in pairs
        assert assistant.value in answers(user.value).texts
        assert parse_conversation(conversation_to_json(conversation)) == conversation


def test_conversations_without_labels_are_draws_from_all_answers() -> None:
    """Validation pairs of a question are 5 of 25: answers to the others must come too."""
    texts = collections.defaultdict(set)
    for conversation in grammar_conversations(3000, 0, "validation", labels=None):
        assert conversation.turns[1].label is None
        texts[conversation.turns[0].value].add(score_text(conversation.turns[1].value)["humor"])
    assert {prompt: {0, 1, 2, 3, 4} for prompt in prompts()} == texts


def test_records_hold_the_exact_log_probs_of_given_responses() -> None:
    label = encode_label({"humor": 2, "verbosity": 1})
    table = answers(FRANCE)
    texts = [table.texts[n] for n in (17, 3, 88)]
    record = grammar_record(Pair(FRANCE, label), texts)
    for n, response in zip((17, 3, 88), record.responses, strict=True):
        assert response.log_p_response == pytest.approx(table.log_p_N[n].item(), rel=1e-12)
        log_p_label = table.log_p_label_NL[n, LABELS.index(label)].item()
        assert response.log_p_attributes == pytest.approx(log_p_label, rel=1e-12)
        assert response.scores == score_text(response.value)
    required = ("log_p_attributes", "log_p_response")
    assert parse_record(record_to_json(record), require=required) == record


def test_a_text_that_the_grammar_cannot_make_is_scored_and_has_no_weight() -> None:
    record = grammar_record(Pair(FRANCE, LABELS[0]), ["Paris. Paris.", "Paris."])
    bad, good = record.responses
    assert bad.scores == {"humor": 0, "verbosity": 0.25}
    assert (bad.log_p_response, bad.log_q) == (LOG_ZERO, None)
    assert math.isfinite(LOG_ZERO)
    assert good.log_p_response is not None
    assert math.exp(LOG_ZERO - good.log_p_response) < 1e-300


def test_prompts_to_sample_from_are_the_pairs_of_a_split() -> None:
    records = grammar_prompts("validation")
    asked = [(record.prompt_turns[0].value, record.label) for record in records]
    assert asked == grammar_pairs("validation")
    assert all(record.system == SYSTEM_PROMPT and not record.responses for record in records)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"'Why\?' is no question of the grammar"):
        answers("Why?")
    with pytest.raises(ValueError, match="split must be 'train', 'validation' or 'all', got 'x'"):
        grammar_pairs("x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="labels must be 'sampled' or 'rounded', got 'x'"):
        next(draw_answers(1, 0, "all", labels="x"))  # type: ignore[arg-type]
