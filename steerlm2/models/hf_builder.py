"""The decoder that a Hugging Face folder's config.json describes, with LoRA adapters or without."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torchtune.modules import (
    FeedForward,
    FrozenNF4Linear,
    MultiHeadAttention,
    RMSNorm,
    TransformerDecoder,
    TransformerSelfAttentionLayer,
)
from torchtune.modules.peft import DoRALinear, LoRALinear
from torchtune.modules.tied_linear import TiedLinear

from steerlm2.checkpoint_dirs import read_json, resolve_checkpoint_dir
from steerlm2.models.attention import HeadNormAttention
from steerlm2.models.config_json import DecoderConfig, decoder_config, hf_config
from steerlm2.models.nf4 import UNIT
from steerlm2.models.rope import build_rope

ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "output_proj")
BIASED = ATTENTION_MODULES[:3]
"""With `Family.qkv_bias`."""

MakeLinear = Callable[[int, int], nn.Module]
"""Of the numbers of inputs and outputs."""


def from_checkpoint(
    checkpoint_dir: str = "",
    *,
    lora_attn_modules: Sequence[str] = (),
    apply_lora_to_mlp: bool = False,
    apply_lora_to_output: bool = False,
    lora_rank: int | None = None,
    lora_alpha: float | None = None,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
    quantize_base: bool = False,
    planned_as: str | None = None,
) -> TransformerDecoder:
    """The decoder that computes what transformers computes from a folder, usable as `_component_`.

    The LoRA arguments are those of torchtune's `lora_` builders; without any there are no adapters.

    Args:
        checkpoint_dir: the folder with config.json, or the output_dir of a run. In a config it may
            be left out: then it is the folder of the model's checkpointer.
        lora_attn_modules: of q_proj, k_proj, v_proj, output_proj.
        lora_rank: none: 8.
        lora_alpha: none: 16.
        quantize_base: the matrices of the layers are kept in 4 bits (QLoRA).
        planned_as: builder, without arguments, of the decoder to plan with (plan_memory) while
            there is no such folder; e.g. torchtune.models.llama3_1.llama3_1_8b.

    Raises:
        FileNotFoundError: where there is no such folder, and no `planned_as`.
        ValueError: where config.json has what can't be computed here, or the LoRA arguments don't
            go together.
    """
    adapts = bool(lora_attn_modules) or apply_lora_to_mlp or apply_lora_to_output
    _check_lora(
        lora_attn_modules,
        rank_or_alpha=lora_rank is not None or lora_alpha is not None,
        adapts=adapts,
        quantize_base=quantize_base,
    )
    adapted = partial(
        DoRALinear if use_dora else LoRALinear,
        rank=8 if lora_rank is None else lora_rank,
        alpha=16 if lora_alpha is None else lora_alpha,
        dropout=lora_dropout,
    )
    frozen = FrozenNF4Linear if quantize_base else nn.Linear
    config = _config(checkpoint_dir, planned_as)

    def linear_of(name: str) -> MakeLinear:
        of_mlp = name not in ATTENTION_MODULES
        bias = config.family.qkv_bias and name in BIASED
        if apply_lora_to_mlp if of_mlp else name in lora_attn_modules:
            return partial(adapted, quantize_base=quantize_base, use_bias=bias)
        return partial(frozen, bias=bias)

    if quantize_base:
        _check_quantizable(config)
    rope = build_rope(
        config.rope,
        config.head_dim,
        config.max_position_embeddings,
        halves=config.family.rotates_halves,
    )
    norm = partial(RMSNorm, config.hidden_size, eps=config.rms_norm_eps)
    layers = [
        TransformerSelfAttentionLayer(
            attn=_attention(config, rope, linear_of),
            mlp=_mlp(config, linear_of),
            sa_norm=norm(),
            mlp_norm=norm(),
        )
        for _ in range(config.num_hidden_layers)
    ]
    embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
    output: nn.Module | TiedLinear
    if config.tie_word_embeddings and not apply_lora_to_output:
        output = TiedLinear(embeddings)
    elif apply_lora_to_output:
        output = adapted(config.hidden_size, config.vocab_size)
    else:
        output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    return TransformerDecoder(
        tok_embeddings=embeddings,
        layers=nn.ModuleList(layers),
        max_seq_len=config.max_position_embeddings,
        num_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        norm=norm(),
        output=output,
    )


def _attention(
    config: DecoderConfig, rope: nn.Module, linear_of: Callable[[str], MakeLinear]
) -> MultiHeadAttention:
    hidden, head_dim = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    attention, norms = MultiHeadAttention, dict[str, Any]()
    if config.family.head_norms:
        attention = HeadNormAttention
        norms = {name: RMSNorm(head_dim, config.rms_norm_eps) for name in ("q_norm", "k_norm")}
    return attention(
        embed_dim=queries,  # torchtune only checks that it is a multiple of num_heads
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        q_proj=linear_of("q_proj")(hidden, queries),
        k_proj=linear_of("k_proj")(hidden, keys),
        v_proj=linear_of("v_proj")(hidden, keys),
        output_proj=linear_of("output_proj")(queries, hidden),
        pos_embeddings=rope,
        max_seq_len=config.max_position_embeddings,
        **norms,
    )


def _mlp(config: DecoderConfig, linear_of: Callable[[str], MakeLinear]) -> FeedForward:
    hidden, inner = config.hidden_size, config.intermediate_size
    return FeedForward(
        gate_proj=linear_of("w1")(hidden, inner),
        down_proj=linear_of("w2")(inner, hidden),
        up_proj=linear_of("w3")(hidden, inner),
    )


def _check_quantizable(config: DecoderConfig) -> None:
    """Check that torchao can keep every matrix of the layers in 4 bits.

    Raises:
        ValueError: naming those that it can't.
    """
    hidden, heads = config.hidden_size, {"q": config.num_attention_heads}
    heads["k"] = config.num_key_value_heads
    sizes = {f"{name}_proj": number * config.head_dim for name, number in heads.items()}
    sizes["mlp"] = config.intermediate_size
    problems = [
        f"{name} [{size}, {hidden}]" for name, size in sizes.items() if size * hidden % UNIT
    ]
    if problems:
        raise ValueError(
            f"model.quantize_base: {', '.join(problems)} can't be quantized, because a matrix must "
            f"have a multiple of {UNIT} numbers: set it to false"
        )


def _config(checkpoint_dir: str, planned_as: str | None) -> DecoderConfig:
    if not checkpoint_dir and planned_as is None:
        raise ValueError(
            "steerlm2.models.from_checkpoint needs a checkpoint: set checkpointer, or "
            "model.checkpoint_dir"
        )
    folder = resolve_checkpoint_dir(
        checkpoint_dir, "model.checkpoint_dir", missing_ok=planned_as is not None
    )
    if checkpoint_dir and (folder / "config.json").is_file():
        file = folder / "config.json"
        return decoder_config(read_json(file), str(file.absolute()))
    assert planned_as is not None
    module, _, name = planned_as.rpartition(".")
    with torch.device("meta"):
        planned = getattr(importlib.import_module(module), name)()
    return decoder_config(hf_config(planned), planned_as)


def _check_lora(
    modules: Sequence[str], *, rank_or_alpha: bool, adapts: bool, quantize_base: bool
) -> None:
    """Check that the LoRA arguments go together.

    Raises:
        ValueError: where they don't.
    """
    if isinstance(modules, str) or (unknown := set(modules) - set(ATTENTION_MODULES)):
        named = modules if isinstance(modules, str) else ", ".join(sorted(unknown))
        raise ValueError(
            f"model.lora_attn_modules must be a list of {', '.join(ATTENTION_MODULES)}; got {named}"
        )
    if not adapts and (rank_or_alpha or quantize_base):
        raise ValueError(
            "model.lora_rank, lora_alpha and quantize_base are for LoRA: set lora_attn_modules or "
            "apply_lora_to_mlp, or leave them out"
        )
