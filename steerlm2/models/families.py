"""The model families that can be trained: how each differs from the others, by its config.json.

A decoder of any of them is torchtune's `TransformerDecoder` with RMS norms, a gated SiLU MLP and
rotary positions; grouped-query attention, head size and tied embeddings are free. To add a family
that is such a decoder, add a line to `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Family:
    """What tells a family from another.

    Args:
        model_type: in config.json.
        name: as the architectures in config.json begin.
        qkv_bias: whether the query, key and value projections have biases.
        head_norms: whether each head's queries and keys are normalised, before the rotation.
        rotates_halves: how the rows of the query and key projections lie in memory. True: as in the
            files, the first halves of a head's rotary pairs before the second halves; False: the
            halves of a pair are next to each other. Both as torchtune has that family, so that its
            builders and checkpointers go together with ours.
        rope_types: that are supported.
        fixed: keys of config.json with the values that are computed here; the first is what an
            absent key means.
        absent: what other absent keys mean in transformers.
    """

    model_type: str
    name: str
    qkv_bias: bool = False
    head_norms: bool = False
    rotates_halves: bool = False
    rope_types: tuple[str, ...] = ("default",)
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    absent: Mapping[str, int] = field(default_factory=dict)

    @property
    def language_model(self) -> str:
        """The architecture of a language model."""
        return f"{self.name}ForCausalLM"

    @property
    def classifier(self) -> str:
        """The architecture of an attribute model."""
        return f"{self.name}ForSequenceClassification"


NO_WINDOW: dict[str, tuple[Any, ...]] = {"use_sliding_window": (False, None)}
"""Qwen's `sliding_window` counts only where this says so."""
QWEN: dict[str, int] = {"max_position_embeddings": 32_768, "num_key_value_heads": 32}

LLAMA = Family(
    model_type="llama",  # Llama 1 to 3.3, and what shares their architecture, e.g. SmolLM2
    name="Llama",
    rope_types=("default", "linear", "llama3"),
    fixed={"attention_bias": (False, None), "mlp_bias": (False, None), "sliding_window": (None,)},
    absent={"max_position_embeddings": 2048},
)
MISTRAL = Family(
    model_type="mistral",
    name="Mistral",
    rope_types=("default", "linear", "llama3"),
    absent={
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
)
QWEN2 = Family(
    model_type="qwen2",  # Qwen 2 and 2.5
    name="Qwen2",
    qkv_bias=True,
    rotates_halves=True,
    fixed=NO_WINDOW,
    absent=QWEN,
)
QWEN3 = Family(
    model_type="qwen3",
    name="Qwen3",
    head_norms=True,
    rotates_halves=True,
    fixed=NO_WINDOW | {"attention_bias": (False, None)},
    absent=QWEN | {"head_dim": 128},
)

FAMILIES = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}
"""By `model_type`."""
CLASSIFIERS = tuple(family.classifier for family in FAMILIES.values())


def family_named(model_type: Any) -> Family | None:
    """The family of a config.json's `model_type`; None where it isn't supported."""
    return FAMILIES.get(model_type) if isinstance(model_type, str) else None
