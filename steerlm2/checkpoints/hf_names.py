"""Names and row order of a model's tensors: a Hugging Face folder's and a torchtune decoder's.

Both store the same tensors under different names. The rows of the query and key projections can
also have a different order: Hugging Face has the first halves of all rotary pairs of a head before
the second halves; torchtune has, of Llama and Mistral, the two halves of a pair next to each other
(`HeadShape.rotates_halves` false).
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from steerlm2.models.decoders import HeadShape
from steerlm2.models.reward_head import HF_HEAD

HEAD = "output.weight"
"""The decoder's output layer: of a language model or, as a reward head, of an attribute model."""
EMBEDDING = "tok_embeddings.weight"

_HF_NAMES = {
    EMBEDDING: "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    HEAD: "lm_head.weight",
}
_HF_MODULES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
_HF_NORMS = {
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "sa_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}
_HF_OF_LAYER = {
    f"{ours}.{leaf}": f"{theirs}.{leaf}"
    for ours, theirs in _HF_MODULES.items()
    for leaf in ("weight", "bias")
} | {f"{ours}.scale": f"{theirs}.weight" for ours, theirs in _HF_NORMS.items()}
_OURS = {hf_name: name for name, hf_name in _HF_NAMES.items()} | {HF_HEAD: HEAD}
_OURS_OF_LAYER = {hf_name: name for name, hf_name in _HF_OF_LAYER.items()}


def decoder_name(hf_name: str) -> str | None:
    """The name of a tensor in a decoder; None where no family has such a tensor."""
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", hf_name):
        name = _OURS_OF_LAYER.get(match[2])
        return name and f"layers.{match[1]}.{name}"
    return _OURS.get(hf_name)


def hf_name_of(name: str) -> str:
    """The name of a decoder's tensor in a Hugging Face folder of a language model."""
    if name in _HF_NAMES:
        return _HF_NAMES[name]
    _, index, rest = name.split(".", 2)
    return f"model.layers.{index}.{_HF_OF_LAYER[rest]}"


def to_hf(
    name: str, tensor: Tensor, heads: HeadShape, *, is_classifier: bool
) -> tuple[str, Tensor]:
    """A decoder's tensor, with its name, as a Hugging Face folder stores it.

    Args:
        heads: of the whole model, from `head_shape`.
        is_classifier: whether the decoder's output layer is a reward head.
    """
    if is_classifier and name == HEAD:
        return HF_HEAD, tensor
    return hf_name_of(name), rows_to_hf(name, tensor, heads)


def peft_name(name: str) -> str:
    """The name of a LoRA adapter's tensor in PEFT's format."""
    module, which, leaf = name.rsplit(".", 2)
    hf_module = hf_name_of(f"{module}.{leaf}").removesuffix(f".{leaf}")
    return f"base_model.model.{hf_module}.lora_{which[-1].upper()}.{leaf}"


def rows_to_hf(name: str, tensor: Tensor, heads: HeadShape) -> Tensor:
    """A decoder's tensor with its rows in Hugging Face's order.

    Args:
        name: of the tensor; also of a LoRA adapter's B, whose rows are its layer's outputs.
    """
    num_heads = _paired_heads(name, heads)
    if num_heads is None:
        return tensor
    pairs = tensor.reshape(num_heads, heads.head_dim // 2, 2, -1)
    return pairs.transpose(1, 2).reshape(tensor.shape)


def row_order(name: str, heads: HeadShape) -> Tensor | None:
    """[rows] index of each row of a decoder's tensor in the Hugging Face tensor.

    None where the order is the same.
    """
    num_heads = _paired_heads(name, heads)
    if num_heads is None:
        return None
    rows = torch.arange(num_heads * heads.head_dim).view(num_heads, 2, heads.head_dim // 2)
    return rows.transpose(1, 2).flatten()


def _paired_heads(name: str, heads: HeadShape) -> int | None:
    """The heads of a tensor whose rows are in another order than Hugging Face's; or None."""
    is_query, is_key = (f".attn.{which}_proj." in name for which in "qk")
    if heads.rotates_halves or not (is_query or is_key) or name.endswith("lora_a.weight"):
        return None
    return heads.num_heads if is_query else heads.num_kv_heads
