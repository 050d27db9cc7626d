"""The grammar's data sets: its draws, as training reads them."""

from __future__ import annotations

import pytest

from steerlm2.attributes import DEFAULT_SCHEMA, NOT_LABELLED, AttributeSchema
from steerlm2.data.grammar import draw_answers, grammar_conversations, prompts
from steerlm2.data.synthetic import score_text
from steerlm2.data.tokenizers import tiny_tokenizer
from steerlm2.datasets import grammar_attribute_dataset, grammar_dialogue_dataset

TOKENIZER = tiny_tokenizer()


@pytest.mark.parametrize("use_labels", [True, False])
def test_dialogues_are_the_draws_of_their_split(use_labels: bool) -> None:
    data = grammar_dialogue_dataset(
        TOKENIZER,
        num_records=40,
        max_seq_len=128,
        use_labels=use_labels,
        split="validation",
        seed=3,
    )
    conversations = list(
        grammar_conversations(40, 3, "validation", labels="sampled" if use_labels else None)
    )
    assert data.conversations == conversations
    for dialogue, conversation in zip(data.dialogues, conversations, strict=True):
        text = TOKENIZER.decode(dialogue.tokens)
        targets = TOKENIZER.decode([dialogue.tokens[i] for i in dialogue.target_positions])
        assert targets == f"{conversation.turns[1].value}\n<extra_id_1>"
        assert (f"<extra_id_2>{conversation.turns[1].label}\n" in text) == use_labels
        assert ("<extra_id_2>" in text) == use_labels


def test_rounded_labels_are_passed_on() -> None:
    data = grammar_dialogue_dataset(
        TOKENIZER, num_records=30, max_seq_len=128, use_labels=True, labels="rounded"
    )
    expected = list(grammar_conversations(30, 0, "train", labels="rounded"))
    assert data.conversations == expected


def test_attribute_texts_have_the_exact_scores_at_their_place_in_the_schema() -> None:
    data = grammar_attribute_dataset(
        TOKENIZER, num_records=25, max_seq_len=128, schema=DEFAULT_SCHEMA, seed=2
    )
    for group, (pair, text) in zip(data, draw_answers(25, 2, "train"), strict=True):
        assert TOKENIZER.decode(group.responses[0]) == f"Assistant\n{text}\n<extra_id_2>"
        assert f"\n{pair.prompt}\n" in TOKENIZER.decode(group.prompt)
        assert pair.label not in TOKENIZER.decode(group.prompt)
        assert group.labels is not None
        values = dict(zip(DEFAULT_SCHEMA.names, group.labels[0], strict=True))
        assert {name: v for name, v in values.items() if v != NOT_LABELLED} == score_text(text)


def test_a_schema_without_its_attributes_is_refused() -> None:
    with pytest.raises(ValueError, match="labelled with humor, verbosity, none of which"):
        grammar_attribute_dataset(
            TOKENIZER, num_records=1, max_seq_len=128, schema=AttributeSchema(("quality",))
        )


def test_every_question_is_trained_on() -> None:
    data = grammar_dialogue_dataset(TOKENIZER, num_records=400, max_seq_len=128, use_labels=True)
    asked = {conversation.turns[0].value for conversation in data.conversations}
    assert asked == set(prompts())
