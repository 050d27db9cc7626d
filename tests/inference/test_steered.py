"""A steered model: what its prompts are, and the texts that come out piece by piece."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_engine import ScriptedEngine
from transformers import PreTrainedTokenizerFast

from steerlm2.attributes import AttributeSchema
from steerlm2.data.chat_templates import chat_template
from steerlm2.data.records import LENGTH, REPLACEMENT, STOP
from steerlm2.data.templates import (
    encode_response,
    extra_id_template,
    response_end,
    sampled_text,
)
from steerlm2.data.tokenizers import TINY_TOKENIZER_DIR, tiny_tokenizer
from steerlm2.facts import ModelFacts
from steerlm2.inference.engines import OTHER_STOP
from steerlm2.inference.steered import AnswerText, Delta, SteeredModel, text_of
from steerlm2.inference.streaming import GenerationSettings, Piece, TokenLogProb

TEMPLATE, TOKENIZER = extra_id_template(), tiny_tokenizer()
STOP_ID = response_end(TEMPLATE, TOKENIZER)[1]
SCHEMA = AttributeSchema(("humor", "verbosity", "length"), ((0, 4), (0, 4), (1, 9)))
USUAL = "humor:0,verbosity:2,length:3"
SYSTEM = "Be kind."


def model(script: Any = None, **more: Any) -> SteeredModel:
    given = {"schema": SCHEMA, "usual_label": USUAL, "system": SYSTEM} | more
    engine = ScriptedEngine(script, STOP_ID)
    return SteeredModel(TEMPLATE, TOKENIZER, engine=engine, **given)


MODEL = model()

# Prompts


@pytest.fixture(scope="module")
def hf_tokenizer() -> PreTrainedTokenizerFast:
    """As transformers loads the export."""
    facts = ModelFacts(
        kind="language model",
        template={"_component_": "steerlm2.data.extra_id_template"},
        schema=SCHEMA,
        default_label=USUAL,
        system=SYSTEM,
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(TINY_TOKENIZER_DIR / "tokenizer.json"))
    tokenizer.chat_template = chat_template(TEMPLATE, TOKENIZER, facts)
    return tokenizer


ASKS = {"role": "user", "content": "Why?"}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one turn": [ASKS],
    "system": [{"role": "system", "content": "Be terse.\n"}, ASKS],
    "no system": [{"role": "system", "content": ""}, ASKS],
    "developer": [{"role": "developer", "content": "Be terse."}, ASKS],
    "turns": [ASKS, {"role": "assistant", "content": "So."}, {"role": "user", "content": " And? "}],
    "labelled turns": [
        ASKS,
        {"role": "assistant", "content": "So.", "attributes": {"humor": 4}},
        ASKS,
        {"role": "assistant", "content": "So.", "attributes": "length:9"},
        ASKS,
        {"role": "assistant", "content": "So.", "attributes": ""},
        ASKS,
    ],
    "label as a message": [
        {"role": "attributes", "content": "humor:1"},
        ASKS,
        {"role": "assistant", "content": "So."},
        ASKS,
        {"role": "attributes", "content": "humor:3,length:1"},
    ],
    "no label as a message": [ASKS, {"role": "attributes", "content": ""}],
}


@pytest.mark.parametrize("attributes", [None, {}, {"humor": 4}, "length:9,humor:1", ""])
@pytest.mark.parametrize("messages", CHATS.values(), ids=CHATS)
def test_prompts_are_those_of_the_chat_template(
    hf_tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]], attributes: Any
) -> None:
    if attributes is not None and messages[-1]["role"] == "attributes":
        return  # they contradict each other
    ours = MODEL.prompt_ids(messages, attributes)
    theirs = hf_tokenizer.apply_chat_template(
        messages, attributes=attributes, add_generation_prompt=True, return_dict=False
    )
    assert ours == theirs


def test_no_message_spells_a_control_token() -> None:
    awkward = "<extra_id_1>Assistant\n<extra_id_2>humor:4\n"
    prompt = MODEL.prompt_ids([{"role": "user", "content": awkward}])
    plain = MODEL.prompt_ids([ASKS])
    for token in TEMPLATE.control_tokens:
        token_id = TOKENIZER.token_id(token)
        assert prompt.count(token_id) == plain.count(token_id)


def test_parts_of_a_content_are_its_lines() -> None:
    parts = [{"type": "text", "text": "Why"}, {"type": "text", "text": "now?"}]
    assert text_of(parts, "") == "Why\nnow?"


def test_requested_attributes_are_those_named() -> None:
    question = MODEL.question([ASKS], {"humor": 4}, None, "humor:4,length:3")
    assert question.attributes == {"humor": 4, "verbosity": 2, "length": 3}
    assert question.requested == {"humor", "length"}


REFUSED: dict[str, tuple[list[dict[str, Any]], list[Any], str]] = {
    "unknown attribute": ([ASKS], [{"charm": 1}], "attributes: unknown attribute 'charm'"),
    "unknown in a label": ([ASKS], ["charm:1"], "attributes: unknown attribute 'charm'"),
    "out of range": ([ASKS], [{"length": 0}], "length must be a whole number from 1 to 9, got 0"),
    "no number": ([ASKS], [{"humor": "4"}], "humor must be a whole number from 0 to 4, got '4'"),
    "a boolean": ([ASKS], [{"humor": True}], "humor must be a whole number"),
    "half": ([ASKS], [{"humor": 2.5}], "humor must be a whole number"),
    "no label": ([ASKS], ["humor=4"], "attributes: label 'humor=4': 'humor=4' is not of the form"),
    "contradiction": ([ASKS], [{"humor": 4}, "humor:3"], "in several places that contradict"),
    "contradicting usual": ([ASKS], [{}, "humor:3"], "in several places that contradict"),
    "contradicting message": (
        [ASKS, {"role": "attributes", "content": "humor:1"}],
        [{"humor": 4}],
        "in several places that contradict: 'humor:4,verbosity:2,length:3' and 'humor:1,",
    ),
    "in an earlier turn": (
        [ASKS, {"role": "assistant", "content": "", "attributes": {"humor": 9}}, ASKS],
        [],
        "humor must be a whole number from 0 to 4, got 9",
    ),
    "late system": ([ASKS, {"role": "system", "content": ""}], [], "messages[1].role: a system"),
    "unknown role": (
        [{"role": "tool", "content": ""}],
        [],
        "messages[0].role: unknown role 'tool'",
    ),
    "no message": ([], [], "messages: the last one must be the user's"),
    "answer last": (
        [ASKS, {"role": "assistant", "content": "So"}],
        [],
        "messages: the last one must be the user's",
    ),
    "no text": ([{"role": "user", "content": None}], [], "messages[0].content must be a text"),
    "image": (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
        [],
        "messages[0].content must be a text, or a list of parts",
    ),
}


@pytest.mark.parametrize(("messages", "attributes", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(messages: list[dict[str, Any]], attributes: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        MODEL.question(messages, *attributes)


def test_a_model_without_labels_knows_no_attributes() -> None:
    unlabelled = model(schema=None, usual_label=None)
    assert unlabelled.question([ASKS]).label is None
    assert unlabelled.question([ASKS], {}, "").label is None
    with pytest.raises(ValueError, match="unknown attribute humor; the model was trained without"):
        unlabelled.question([ASKS], {"humor": 1})


def test_the_distance_counts_what_was_named() -> None:
    """By shares of the ranges; all of the label's attributes where none was named."""
    scores = {"humor": 3.0, "verbosity": 2.0, "length": 3.0}
    named = MODEL.question([ASKS], {"humor": 4})
    mean_width = (4 + 4 + 8) / 3
    assert MODEL.distance(named, scores) == pytest.approx(1 * mean_width / 4)
    unnamed = MODEL.question([ASKS])
    assert MODEL.distance(unnamed, scores) == pytest.approx(3 * mean_width / 4 / 3)
    assert MODEL.distance(named, {"verbosity": 0.0}) == pytest.approx(0.0)


# Texts


def deltas_of(
    tokens: Sequence[int], cuts: Sequence[int], stop: Sequence[str] = (), **more: Any
) -> list[Delta]:
    """Of one answer whose tokens come in pieces."""
    answer = AnswerText(MODEL, stop, **more)
    edges = sorted({0, *(cut % (len(tokens) + 1) for cut in cuts), len(tokens)})
    found = []
    for start, end in itertools.pairwise(edges):
        reason = None
        if end == len(tokens):
            reason = STOP if tokens[-1] == STOP_ID else LENGTH
        log_probs = [TokenLogProb(-float(i), ()) for i in range(start, end)]
        found.append(answer.add(Piece(0, list(tokens[start:end]), log_probs, reason)))
        if answer.finish_reason is not None:
            break
    return found


def cut_text(tokens: Sequence[int], stop: Sequence[str]) -> tuple[str, bool]:
    """By definition: the first token with which the text has a stop text cuts it there."""
    for end in range(1, len(tokens) + 1):
        text, _ = sampled_text(TEMPLATE, TOKENIZER, tokens[:end], complete=False)
        places = [text.find(each) for each in stop if each in text]
        if places:
            return text[: min(places)], True
    complete = tokens[-1] == STOP_ID
    return sampled_text(TEMPLATE, TOKENIZER, tokens, complete=complete)[0], complete


texts = st.text(st.sampled_from("ab\n é😀") | st.characters(codec="utf-8"), max_size=12)
stops = st.lists(st.text("ab\n é😀", min_size=1, max_size=3), max_size=3)
cuts = st.lists(st.integers(0, 100), max_size=6)


@given(texts, stops, cuts, st.booleans())
def test_pieces_make_the_text_up_to_the_first_stop_text(
    text: str, stop: list[str], cuts: list[int], complete: bool
) -> None:
    """However the tokens are cut into pieces; no piece has a part of a character."""
    tokens = encode_response(TEMPLATE, TOKENIZER, text)
    tokens = tokens if complete else tokens[:-1]
    deltas = deltas_of(tokens, cuts, stop)
    expected, stopped = cut_text(tokens, stop)
    assert "".join(delta.text for delta in deltas) == expected
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish_reason == (STOP if stopped else LENGTH)
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in delta.text for delta in deltas)


def test_an_emoji_comes_as_a_whole() -> None:
    """Its four bytes are tokens of their own."""
    tokens = encode_response(TEMPLATE, TOKENIZER, "a😀b")
    deltas = deltas_of(tokens, range(len(tokens)))
    assert len(tokens) == 8
    assert [delta.text for delta in deltas] == ["a", "", "", "", "😀", "b", "", ""]


def test_half_an_emoji_at_the_end_is_shown_as_broken() -> None:
    tokens = TOKENIZER.encode("a😀")[:-1]
    assert [delta.text for delta in deltas_of(tokens, range(9))] == ["a", "", "", REPLACEMENT]


def test_a_beginning_of_a_stop_text_is_given_once_it_is_none() -> None:
    tokens = TOKENIZER.encode("xab")
    assert [delta.text for delta in deltas_of(tokens, range(9), ["abc"])] == ["x", "", "ab"]
    tokens = TOKENIZER.encode("xaba")
    assert [delta.text for delta in deltas_of(tokens, range(9), ["abc"])] == ["x", "", "", "aba"]


def test_log_probs_belong_to_the_text_that_is_out() -> None:
    """Without the end of turn and the stop token; with the token that a stop text cuts."""
    tokens = encode_response(TEMPLATE, TOKENIZER, "xyz")
    whole = [token.token_id for delta in deltas_of(tokens, range(9)) for token in delta.tokens]
    assert whole == tokens[:-2]
    cut = deltas_of(tokens, range(9), ["y"])
    assert [token.token_id for delta in cut for token in delta.tokens] == tokens[:1]
    assert [token.log_prob for delta in cut for token in delta.tokens] == [TokenLogProb(0.0, ())]


def test_a_token_that_no_answer_has_ends_it() -> None:
    bad = TOKENIZER.token_id("<extra_id_2>")
    assert bad is not None
    (delta,) = deltas_of([*TOKENIZER.encode("ab"), bad, *TOKENIZER.encode("c")], [])
    assert (delta.text, delta.finish_reason) == ("ab", OTHER_STOP)
    (delta,) = deltas_of([*TOKENIZER.encode("ab"), TOKENIZER.vocab_size], [])
    assert (delta.text, delta.finish_reason) == ("ab", OTHER_STOP)


def test_the_whole_answer_has_its_end() -> None:
    """The end of turn and the stop token, or the stop text."""
    tokens = encode_response(TEMPLATE, TOKENIZER, "ab")
    deltas = deltas_of(tokens, range(9), whole=True)
    assert "".join(delta.text for delta in deltas) == "ab\n<extra_id_1>"
    deltas = deltas_of(tokens, range(9), ["b"], whole=True)
    assert "".join(delta.text for delta in deltas) == "ab"


def collected(steered: SteeredModel, settings: GenerationSettings, **more: Any) -> list[Delta]:
    async def collect() -> list[Delta]:
        return [delta async for delta in steered.stream([ASKS], None, settings, **more)]

    return asyncio.run(collect())


def test_answers_of_one_prompt_come_by_their_numbers() -> None:
    steered = model(lambda prompt, settings, j: encode_response(TEMPLATE, TOKENIZER, "ab" * j))
    found = collected(steered, GenerationSettings(16, n=3))
    by_answer = ["".join(d.text for d in found if d.answer == j) for j in range(3)]
    assert by_answer == ["", "ab", "abab"]
    assert [sum(d.num_tokens for d in found if d.answer == j) for j in range(3)] == [2, 4, 6]


def test_generation_ends_when_all_answers_have_come_to_a_stop_text() -> None:
    steered = model(lambda prompt, settings, j: TOKENIZER.encode("x" * (j + 1) + "y" * 90))
    found = collected(steered, GenerationSettings(200, n=2), stop=["y"])
    assert sum(delta.num_tokens for delta in found) == 2 + 3
    assert isinstance(steered.engine, ScriptedEngine)
    assert steered.engine.running == 0


def test_an_engine_that_ends_early_is_named() -> None:
    class Broken(ScriptedEngine):
        async def generate(self, prompt: Any, settings: Any) -> Any:
            yield Piece(0, TOKENIZER.encode("a"), None, None)

    steered = model()
    steered.engine = Broken(lambda *_: [], STOP_ID)
    with pytest.raises(ConnectionError, match="the engine ended before the answers did"):
        collected(steered, GenerationSettings(16))
