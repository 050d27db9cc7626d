"""What the recipes that sample have in common: prompts with labels, and texts of samples."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from steerlm2.attributes import AttributeSchema
from steerlm2.config.keys import LabelOptions
from steerlm2.data.prompts import Prompt
from steerlm2.data.records import Turn
from steerlm2.data.templates import encode_prompt, encode_response, extra_id_template
from steerlm2.data.tokenizers import tiny_tokenizer
from steerlm2.distributed.world import World
from steerlm2.inference.answers import (
    Item,
    answer_of,
    sample_everywhere,
    sampling_settings,
    with_labels,
)
from steerlm2.inference.engines import Request, Sample, request_seed

TEMPLATE, TOKENIZER = extra_id_template(), tiny_tokenizer()
SCHEMA = AttributeSchema(("humor", "verbosity"))
TURNS = [Turn("User", "Q"), Turn("Assistant", "A", "humor:3"), Turn("User", "R")]


def test_every_label_of_a_prompt_has_a_seed_of_its_own() -> None:
    prompts = [Prompt("S", TURNS, None), Prompt("S", TURNS[:1], None)]
    options = LabelOptions(kind="uniform", attributes=["humor"], labels_per_prompt=5)
    items = with_labels(prompts, options, SCHEMA, seed=7, source="f")
    assert [item.prompt for item in items] == [prompts[0]] * 5 + [prompts[1]] * 5
    assert {item.label for item in items[:5]} == {f"humor:{value}" for value in range(5)}
    assert [item.seed for item in items] == [
        request_seed(7, index, i) for index in range(2) for i in range(5)
    ]


def test_prompts_have_the_label_that_is_asked_for() -> None:
    prompts = [Prompt("S", TURNS, "humor:1")]

    def labels(options: LabelOptions) -> list[str | None]:
        return [i.label for i in with_labels(prompts, options, SCHEMA, seed=0, source="f")]

    assert labels(LabelOptions()) == ["humor:1"]
    assert labels(LabelOptions(kind="fixed", value="humor:4")) == ["humor:4"]
    assert labels(LabelOptions(kind="none")) == [None]
    with pytest.raises(ValueError, match=r"f: 1 of 1 prompts have no label .*\(number 1\)"):
        with_labels([Prompt("S", TURNS, None)], LabelOptions(), SCHEMA, seed=0, source="f")


def test_labels_are_shown_or_hidden_in_all_turns() -> None:
    item = Item(Prompt("S", TURNS, None), "humor:4", 0)
    shown = encode_prompt(TEMPLATE, TOKENIZER, "S", TURNS, "humor:4")
    bare = [TURNS[0], Turn("Assistant", "A"), TURNS[2]]
    assert item.encode(TEMPLATE, TOKENIZER) == shown
    hidden = item.encode(TEMPLATE, TOKENIZER, show_labels=False)
    assert hidden == encode_prompt(TEMPLATE, TOKENIZER, "S", bare, None)
    assert "humor" in TOKENIZER.decode(shown)
    assert "humor" not in TOKENIZER.decode(hidden)


def test_a_complete_sample_has_the_engines_log_prob() -> None:
    tokens = encode_response(TEMPLATE, TOKENIZER, "A bear.")
    answer, otherwise = answer_of(Sample(tokens, "stop", -2.5), TEMPLATE, TOKENIZER)
    assert answer.value == "A bear."
    assert answer.extra == {"finish_reason": "stop", "engine_log_q": -2.5}
    assert not otherwise
    unknown, _ = answer_of(Sample(tokens, "stop", None), TEMPLATE, TOKENIZER)
    assert unknown.extra == {"finish_reason": "stop"}


def test_a_sample_of_other_tokens_has_none() -> None:
    """Letter by letter the text is the same, and its tokens aren't."""
    *_, stop = encode_response(TEMPLATE, TOKENIZER, "")
    letters = [token for letter in "the\n" for token in TOKENIZER.encode(letter)]
    assert letters != TOKENIZER.encode("the\n")
    answer, otherwise = answer_of(Sample([*letters, stop], "stop", -2.5), TEMPLATE, TOKENIZER)
    assert (answer.value, answer.extra, otherwise) == ("the", {"finish_reason": "stop"}, True)


def test_a_sample_that_was_cut_off_keeps_all_its_text() -> None:
    tokens = TOKENIZER.encode("A bear\n")
    answer, otherwise = answer_of(Sample(tokens, "length", -2.5), TEMPLATE, TOKENIZER)
    assert (answer.value, answer.extra) == ("A bear\n", {"finish_reason": "length"})
    assert not otherwise


def test_settings_stop_at_the_templates_end_and_forbid_other_control_tokens() -> None:
    settings = sampling_settings(
        TEMPLATE, TOKENIZER, 514, n=3, temperature=0.5, top_p=0.9, max_new_tokens=7
    )
    assert settings.stop_id == TOKENIZER.token_id("<extra_id_1>")
    forbidden = set(settings.forbidden_ids)
    assert TOKENIZER.token_id("<extra_id_0>") in forbidden
    assert {512, 513} <= forbidden
    assert settings.stop_id not in forbidden
    assert (settings.n, settings.temperature, settings.top_p, settings.max_new_tokens) == (
        *(3, 0.5, 0.9, 7),
    )


class Echo:
    """Samples the prompt."""

    def sample(self, requests: Sequence[Request]) -> list[list[Sample]]:
        return [[Sample(list(request.prompt), "stop", None)] for request in requests]

    def close(self) -> None:
        pass


def test_samples_come_back_by_the_places_of_their_requests() -> None:
    requests = {4: Request([1, 2, 3], 0), 0: Request([1], 0), 2: Request([1, 2], 0)}
    samples = sample_everywhere(Echo(), requests, World(torch.device("cpu")))
    assert {place: own[0].tokens for place, own in samples.items()} == {
        place: list(request.prompt) for place, request in requests.items()
    }
