"""Rotary positions: torchtune's modules, and what they are called in a config.json.

Dimension letters: P rotary pairs of a head.

Settings are the flat dictionary that transformers 5 calls `rope_parameters`: `rope_type`,
`rope_theta`, and what the type needs.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchtune.models.qwen2 import Qwen2RotaryPositionalEmbeddings
from torchtune.modules import RotaryPositionalEmbeddings

from steerlm2.torchtune_private import Llama3ScaledRoPE

NUMBERS_OF = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
"""What each supported `rope_type` needs beside `rope_theta`."""


class LinearScaledRoPE(RotaryPositionalEmbeddings):
    """Positions divided by a factor (transformers' rope type "linear")."""

    def __init__(self, dim: int, max_seq_len: int, base: float, scale_factor: float) -> None:
        self.scale_factor = scale_factor
        super().__init__(dim, max_seq_len, base)

    def rope_init(self) -> None:
        super().rope_init()
        self.register_buffer("theta", self.theta / self.scale_factor, persistent=False)
        self.build_rope_cache(self.max_seq_len)


def build_rope(
    settings: Mapping[str, Any], head_dim: int, max_seq_len: int, *, halves: bool = False
) -> nn.Module:
    """The module of settings with a type of `NUMBERS_OF`, for so many positions.

    Args:
        halves: the first halves of all pairs stand before the second halves, not pair by pair; only
            for the type "default".
    """
    base = settings["rope_theta"]
    if halves:
        assert settings["rope_type"] == "default", "no other is supported by `families`"
        return Qwen2RotaryPositionalEmbeddings(head_dim, max_seq_len, base)
    if settings["rope_type"] == "default":
        return RotaryPositionalEmbeddings(head_dim, max_seq_len, base)
    if settings["rope_type"] == "linear":
        return LinearScaledRoPE(head_dim, max_seq_len, base, settings["factor"])
    return Llama3ScaledRoPE(head_dim, max_seq_len, base, *map(settings.get, NUMBERS_OF["llama3"]))


def rope_settings(rope: Any) -> dict[str, Any]:
    """A module's settings; of an unknown module only its class, as `rope_type`."""
    if type(rope) is RotaryPositionalEmbeddings or rotates_halves(rope):
        return {"rope_type": "default", "rope_theta": float(rope.base)}
    if type(rope) is LinearScaledRoPE:
        numbers = {"factor": float(rope.scale_factor)}
        return {"rope_type": "linear", "rope_theta": float(rope.base)} | numbers
    if type(rope) is Llama3ScaledRoPE:
        return {
            "rope_type": "llama3",
            "rope_theta": float(rope.base),
            "factor": float(rope.scale_factor),
            "low_freq_factor": float(rope.low_freq_factor),
            "high_freq_factor": float(rope.high_freq_factor),
            "original_max_position_embeddings": rope.old_context_len,
        }
    return {"rope_type": type(rope).__name__}


def rotates_halves(rope: Any) -> bool:
    """Whether a module takes the first halves of all pairs before the second halves."""
    return type(rope) is Qwen2RotaryPositionalEmbeddings


def inverse_frequencies(rope: Any) -> Tensor:
    """[P] radians per position, on the host, also of a module on the meta device."""
    own = copy.deepcopy(rope)
    own.max_seq_len = 1
    with torch.device("cpu"):
        own.rope_init()
    return own.theta
