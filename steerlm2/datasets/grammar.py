"""Data sets drawn from the grammar (`steerlm2.data.grammar`), tokenised, in memory."""

from __future__ import annotations

import dataclasses

from steerlm2.attributes import DEFAULT_SCHEMA, NOT_LABELLED, AttributeSchema
from steerlm2.data.grammar import (
    SYSTEM_PROMPT,
    LabelRule,
    Split,
    draw_answers,
    grammar_conversations,
)
from steerlm2.data.records import USER, Turn
from steerlm2.data.synthetic import score_text
from steerlm2.data.templates import Template, encode_for_scoring, extra_id_template
from steerlm2.data.tokenizers import Tokenizer
from steerlm2.datasets.dialogues import DialogueDataset, tokenize_conversations
from steerlm2.datasets.labelled import RewardDataset, check_computed_labels


def grammar_dialogue_dataset(
    tokenizer: Tokenizer,
    *,
    num_records: int,
    max_seq_len: int,
    use_labels: bool,
    labels: LabelRule = "sampled",
    train_on_input: bool = False,
    template: Template | None = None,
    split: Split = "train",
    seed: int = 0,
) -> DialogueDataset:
    """Questions with answers drawn from the grammar, of which P(y|x) and P(y|a,x) are known.

    Args:
        num_records: conversations of one question and one answer.
        max_seq_len: tokens of a conversation.
        use_labels: True: the prompt has the label, and the pairs are those of `split`, for
            Q'(y|a,x). False: no labels, and answers to all pairs, for P(y|x).
        labels: "sampled" from P(a|x,y), or the "rounded" scores of the answer.
        train_on_input: train on all tokens, not only on the assistant's.
        template: defaults to the extra_id template.
    """
    return tokenize_conversations(
        grammar_conversations(num_records, seed, split, labels=labels if use_labels else None),
        tokenizer,
        template,
        "the grammar",
        max_seq_len=max_seq_len,
        use_labels=use_labels,
        train_on_input=train_on_input,
    )


def grammar_attribute_dataset(
    tokenizer: Tokenizer,
    *,
    num_records: int,
    max_seq_len: int,
    schema: AttributeSchema = DEFAULT_SCHEMA,
    template: Template | None = None,
    split: Split = "train",
    seed: int = 0,
) -> RewardDataset:
    """Answers drawn from the grammar, labelled with their exact scores, which aren't whole numbers.

    Raises:
        ValueError: where the schema has neither humor nor verbosity, or other ranges for them.
    """
    check_computed_labels(schema, "the grammar's answers are")
    dataset = RewardDataset()
    for pair, text in draw_answers(num_records, seed, split):
        scores = score_text(text)
        group, num_cut = encode_for_scoring(
            template or extra_id_template(),
            tokenizer,
            SYSTEM_PROMPT,
            [Turn(USER, pair.prompt)],
            [text],
            max_seq_len,
        )
        labels = [[scores.get(name, NOT_LABELLED) for name in schema.names]]
        dataset.groups.append(dataclasses.replace(group, labels=labels))
        dataset.num_cut += num_cut
    return dataset
