"""Builders of data sets for `dataset:` in a config: read, checked and tokenised, in memory.

A builder takes the tokenizer first and its settings by name, as torchtune's builders do.
"""

from steerlm2.datasets.dialogues import (
    DialogueDataset,
    dialogue_dataset,
    language_model_facts,
    synthetic_dialogue_dataset,
)
from steerlm2.datasets.grammar import grammar_attribute_dataset, grammar_dialogue_dataset
from steerlm2.datasets.groups import (
    ResponseEncoder,
    SteerLM2Dataset,
    steerlm2_dataset,
    synthetic_dataset,
    tokenize_records,
    with_log_probs,
)
from steerlm2.datasets.labelled import (
    RewardDataset,
    attribute_dataset,
    synthetic_attribute_dataset,
)

__all__ = [
    "DialogueDataset",
    "ResponseEncoder",
    "RewardDataset",
    "SteerLM2Dataset",
    "attribute_dataset",
    "dialogue_dataset",
    "grammar_attribute_dataset",
    "grammar_dialogue_dataset",
    "language_model_facts",
    "steerlm2_dataset",
    "synthetic_attribute_dataset",
    "synthetic_dataset",
    "synthetic_dialogue_dataset",
    "tokenize_records",
    "with_log_probs",
]
