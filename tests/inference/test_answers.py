"""What the recipes that sample have in common: prompts with labels, and texts of samples."""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from steerlm2.attributes import AttributeSchema
from steerlm2.config.keys import LabelOptions
from steerlm2.data.prompts import Prompt
from steerlm2.data.records import Response, Turn
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
STOP_ID = encode_response(TEMPLATE, TOKENIZER, "")[-1]
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


def test_labels_are_asked_for_in_the_order_of_the_schema_and_must_be_of_it(tmp_path: Path) -> None:
    """Whether they come from the prompts, the config or a file of labels."""
    schema = AttributeSchema(("humor", "verbosity"), ((0, 4), (1, 9)))
    file = tmp_path / "labels.jsonl"
    known = {"system": "S", "prompt_turns": [{"from": "User", "value": "Q"}], "responses": []}

    def labels(options: LabelOptions, own: str) -> list[str | None]:
        file.write_text(json.dumps(known | {"label": own}) + "\n")
        prompts = [Prompt("S", TURNS, own)]
        return [i.label for i in with_labels(prompts, options, schema, seed=0, source="f")]

    turned, right = "verbosity:9,humor:1", "humor:1,verbosity:9"
    fixed = LabelOptions(kind="fixed", value=turned)
    empirical = LabelOptions(kind="empirical", file=str(file))
    for options in (LabelOptions(), fixed, empirical):
        assert labels(options, turned) == [right]
    with pytest.raises(ValueError, match=r"f, prompt 1: .*verbosity must be .* 1 to 9, got 0"):
        labels(LabelOptions(), "verbosity:0")
    with pytest.raises(ValueError, match=r"labels\.jsonl, label 1: .*unknown attribute 'wit'"):
        labels(empirical, "wit:1")


def test_labels_are_shown_or_hidden_in_all_turns() -> None:
    item = Item(Prompt("S", TURNS, None), "humor:4", 0)
    shown = encode_prompt(TEMPLATE, TOKENIZER, "S", TURNS, "humor:4")
    bare = [TURNS[0], Turn("Assistant", "A"), TURNS[2]]
    assert item.encode(TEMPLATE, TOKENIZER) == shown
    hidden = item.encode(TEMPLATE, TOKENIZER, show_labels=False)
    assert hidden == encode_prompt(TEMPLATE, TOKENIZER, "S", bare, None)
    assert "humor" in TOKENIZER.decode(shown)
    assert "humor" not in TOKENIZER.decode(hidden)


def response(value: str, tokens: Sequence[int] | None, **more: Any) -> Response:
    ids = None if tokens is None else array("i", tokens)
    return Response(value, token_ids=ids, **({"finish_reason": "stop"} | more))


def test_a_complete_sample_has_its_tokens_and_the_engines_log_prob() -> None:
    tokens = encode_response(TEMPLATE, TOKENIZER, "A bear.")
    answer = answer_of(Sample(tokens, "stop", -2.5), TEMPLATE, TOKENIZER)
    assert answer == response("A bear.", tokens, extra={"engine_log_q": -2.5})
    unknown = answer_of(Sample(tokens, "stop", None), TEMPLATE, TOKENIZER)
    assert unknown == response("A bear.", tokens)


@pytest.mark.parametrize("text", ["the\n", "the"], ids=["letter by letter", "no end of turn"])
def test_a_sample_of_other_tokens_says_so(text: str) -> None:
    """Its text is the same, and its tokens aren't those of the text; its log-prob is of them."""
    tokens = [*(token for letter in text for token in TOKENIZER.encode(letter)), STOP_ID]
    assert tokens != encode_response(TEMPLATE, TOKENIZER, "the")
    answer = answer_of(Sample(tokens, "stop", -2.5), TEMPLATE, TOKENIZER)
    expected = response("the", tokens, encodes_otherwise=True, extra={"engine_log_q": -2.5})
    assert answer == expected


def test_a_sample_that_was_cut_off_keeps_all_its_text() -> None:
    tokens = TOKENIZER.encode("A bear\n")
    answer = answer_of(Sample(tokens, "length", -2.5), TEMPLATE, TOKENIZER)
    assert answer == response("A bear\n", tokens, finish_reason="length")


@pytest.mark.parametrize("finish_reason", ["stop", "other_stop", "length"])
@pytest.mark.parametrize("token", ["<|endoftext|>", "<extra_id_2>", None])
def test_a_token_that_no_response_has_cuts_a_sample_off(
    token: str | None, finish_reason: str
) -> None:
    """A control token, or an id of the model that isn't the tokenizer's, whatever follows it."""
    strange = TOKENIZER.vocab_size if token is None else TOKENIZER.token_id(token)
    assert strange is not None
    tokens = [*TOKENIZER.encode("A bear"), strange, *encode_response(TEMPLATE, TOKENIZER, "!")]
    answer = answer_of(Sample(tokens, finish_reason, -2.5), TEMPLATE, TOKENIZER)
    assert answer == response("A bear", None, finish_reason="other_stop")


@pytest.mark.parametrize(
    ("tokens", "broken"),
    [
        (TOKENIZER.encode("\N{GRINNING FACE}")[:-1], True),
        (TOKENIZER.encode("\N{REPLACEMENT CHARACTER}"), False),
    ],
    ids=["half a character", "the replacement character"],
)
def test_half_a_character_is_broken(tokens: list[int], broken: bool) -> None:
    """Both read U+FFFD."""
    tokens = [*tokens, *encode_response(TEMPLATE, TOKENIZER, "")]
    answer = answer_of(Sample(tokens, "stop", -2.5), TEMPLATE, TOKENIZER)
    assert "\N{REPLACEMENT CHARACTER}" in answer.value
    assert answer.is_broken == broken


def test_a_text_without_tokens_claims_none() -> None:
    """What a server says is taken as it is, without the end of turn."""
    tokens = encode_response(TEMPLATE, TOKENIZER, "A bear.")
    sample = Sample(tokens, "stop", None, "A bear.\n")
    assert answer_of(sample, TEMPLATE, TOKENIZER) == response("A bear.", None)
    cut = Sample(tokens[:-1], "length", None, "A bear.\n")
    expected = response("A bear.\n", None, finish_reason="length")
    assert answer_of(cut, TEMPLATE, TOKENIZER) == expected


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
