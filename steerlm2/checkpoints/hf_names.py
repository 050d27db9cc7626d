"""Names and row order of a Llama's tensors: a Hugging Face folder's and a torchtune decoder's.

Both store the same matrices under different names, and the rows of the query and key projections in
a different order: Hugging Face has the first halves of all rotary pairs of a head before the second
halves, torchtune has the two halves of a pair next to each other.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torchtune.models.convert_weights import hf_to_tune, tune_to_hf

from steerlm2.models.reward_head import HF_HEAD

HEAD = "output.weight"
"""The decoder's output layer: of a language model or, as a reward head, of an attribute model."""
EMBEDDING = "tok_embeddings.weight"

_ROW_PAIR = torch.zeros(2, 1)
"""A smallest weight (one head of one rotary pair), to convert its name only."""


def decoder_name(hf_name: str) -> str | None:
    """The name of a tensor in a decoder; None where a Llama has no such tensor."""
    if hf_name == HF_HEAD:
        return HEAD
    try:
        (name,) = hf_to_tune({hf_name: _ROW_PAIR}, 1, 1, 1, head_dim=2)
    except Exception:  # torchtune raises a bare Exception for an unknown name
        return None
    return name


def to_hf(
    name: str, tensor: Tensor, heads: Mapping[str, int], *, is_classifier: bool
) -> tuple[str, Tensor]:
    """A decoder's tensor, with its name, as a Hugging Face folder stores it.

    Args:
        heads: of the whole model, from `head_shape`.
        is_classifier: whether the decoder's output layer is a reward head.
    """
    if is_classifier and name == HEAD:
        return HF_HEAD, tensor
    ((hf_name, value),) = tune_to_hf({name: tensor}, **heads).items()
    return hf_name, value


def row_order(name: str, heads: Mapping[str, int]) -> Tensor | None:
    """[rows] index of each row of a decoder's tensor in the Hugging Face tensor.

    None where the order is the same.
    """
    if not name.endswith(("attn.q_proj.weight", "attn.k_proj.weight")):
        return None
    num_heads = heads["num_heads" if name.endswith("q_proj.weight") else "num_kv_heads"]
    rows = torch.arange(num_heads * heads["head_dim"]).unsqueeze(1)
    hf_name = "model.layers.0.self_attn.q_proj.weight"
    order = hf_to_tune({hf_name: rows}, num_heads, num_heads, 1, heads["head_dim"])
    return order["layers.0.attn.q_proj.weight"].squeeze(1)
