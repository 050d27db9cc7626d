"""Digests tell other data and other templates from the same ones, and nothing else."""

from __future__ import annotations

import dataclasses
from array import array

import pytest

from steerlm2.data.digest import LABELS, LOG_PROBS, ORDER, TOKENS, data_digests, template_digest
from steerlm2.data.packing import Dialogue, Group, RewardGroup
from steerlm2.data.templates import extra_id_template, llama3_template

DIALOGUES = [Dialogue([1, 2, 3], [2]), Dialogue([4, 5], [1], index=1)]
GROUP = Group([1, 2], [[3], [4, 5]], log_p_attributes=[-1.0, -2.0], log_q=[-3.0, -4.0])
REWARD = RewardGroup([1, 2], [[3], [4, 5]], labels=[[0.0, 4.0], [-100.0, 1.0]])
PAIR = RewardGroup([1, 2], [[3], [4, 5]], strength=-2.0)


def changed(before: list, after: list) -> set[str]:
    """The kinds whose digests differ."""
    first, second = data_digests(before), data_digests(after)
    return {kind for kind in first if first[kind] != second[kind]}


def test_the_same_records_have_the_same_digests() -> None:
    """Lists or arrays, and whatever index they had in their file."""
    again = [
        Dialogue(array("i", [1, 2, 3]), array("i", [2]), index=7),
        Dialogue([4, 5], [1], index=9),
    ]
    assert changed(DIALOGUES, again) == set()
    weighted = dataclasses.replace(GROUP, weights=[0.5, 0.5], index=3, responses_kept=[0, 1])
    assert changed([GROUP], [weighted]) == set()


def test_another_order_is_seen() -> None:
    assert changed(DIALOGUES, DIALOGUES[::-1]) == {ORDER}


@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [
        (DIALOGUES[0], Dialogue([1, 2, 9], [2]), TOKENS),
        (DIALOGUES[0], Dialogue([1, 2, 3], [1]), TOKENS),
        (GROUP, dataclasses.replace(GROUP, responses=[[3, 4], [5]]), TOKENS),
        (GROUP, dataclasses.replace(GROUP, log_q=[-3.0, -4.5]), LOG_PROBS),
        (GROUP, dataclasses.replace(GROUP, log_q=None), LOG_PROBS),
        (GROUP, dataclasses.replace(GROUP, log_q=None, log_p_response=GROUP.log_q), LOG_PROBS),
        (GROUP, dataclasses.replace(GROUP, log_proposal=[-3.0, -4.0]), LOG_PROBS),
        (GROUP, dataclasses.replace(GROUP, drawn=4), LOG_PROBS),
        (REWARD, dataclasses.replace(REWARD, labels=[[0.0, 3.0], [-100.0, 1.0]]), LABELS),
        (PAIR, dataclasses.replace(PAIR, strength=2.0), LABELS),
    ],
)
def test_what_differs_is_named(before: object, after: object, kind: str) -> None:
    assert changed([before], [after]) == {kind, ORDER}


def test_templates_differ_by_what_they_write() -> None:
    tokens = {"<extra_id_0>": "<|reserved_special_token_0|>"}
    digests = {
        template_digest(template)
        for template in (extra_id_template(), extra_id_template(tokens), llama3_template())
    }
    assert len(digests) == 3
    assert template_digest(extra_id_template({})) in digests
