"""The linear layer that makes a decoder an attribute model: one score for each attribute.

Dimension letters: D hidden, A attributes.

It replaces the decoder's output layer and is applied at one token of a text (see
`steerlm2.training.forward.attribute_scores`). In Hugging Face terms the model is a
LlamaForSequenceClassification (or the like of its family) with the problem type "regression".
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torchtune.modules import TransformerDecoder

from steerlm2.models.families import CLASSIFIERS, FAMILIES

HF_HEAD = "score.weight"
"""The name of the head's weight [A, D] in a Hugging Face checkpoint; it has no bias."""


class RewardHead(nn.Linear):
    """Hidden states [..., D] to attribute scores [..., A]."""

    def __init__(self, hidden_size: int, num_attributes: int) -> None:
        super().__init__(hidden_size, num_attributes, bias=False)


def add_reward_head(decoder: TransformerDecoder, num_attributes: int) -> None:
    """Replace the output layer (tied or not) by a reward head, in place."""
    decoder.output = RewardHead(decoder.tok_embeddings.embedding_dim, num_attributes)


def classification_config(names: Sequence[str], model_type: str = "llama") -> dict[str, Any]:
    """The keys of an attribute model's config.json that differ from its backbone's.

    Args:
        names: of the attributes, in the order of the scores.
        model_type: of the backbone's config.json.
    """
    return {
        "architectures": [FAMILIES[model_type].classifier],
        "problem_type": "regression",
        "num_labels": len(names),
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        "tie_word_embeddings": False,
    }


def is_classifier(config: Mapping[str, Any]) -> bool:
    """Whether a config.json describes an attribute model."""
    return config.get("architectures") in [[name] for name in CLASSIFIERS]


def attribute_names(config: Mapping[str, Any]) -> list[str] | None:
    """The attributes that a checkpoint's config.json names; None where it has no reward head.

    The list is empty where the labels have only generic names (LABEL_0, ...).
    """
    if not is_classifier(config):
        return None
    labels = config.get("id2label")
    if not isinstance(labels, Mapping) or not all(str(i).isdecimal() for i in labels):
        return []
    names = [str(labels[i]) for i in sorted(labels, key=int)]
    return [] if all(re.fullmatch(r"LABEL_\d+", name) for name in names) else names
