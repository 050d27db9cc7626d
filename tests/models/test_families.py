"""Which families there are: what their config.json may say, and which decoders are of them."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torchtune.modules import RMSNorm, TransformerDecoder
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from steerlm2.models.config_json import (
    decoder_config,
    decoder_problems,
    family_of,
    hf_config,
    unsupported_keys,
)
from steerlm2.models.families import FAMILIES, MISTRAL, QWEN2, QWEN3, Family

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
}
TINY: dict[str, Any] = {
    "vocab_size": 512,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 128,
    "max_seq_len": 2048,
    "intermediate_dim": 384,
}


def built(builder: str, **changes: Any) -> TransformerDecoder:
    """One of torchtune's decoders, on the meta device."""
    module, _, name = f"torchtune.models.{builder}".rpartition(".")
    with torch.device("meta"):
        return getattr(importlib.import_module(module), name)(**changes)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_absent_keys_mean_what_they_mean_in_transformers(family: Family) -> None:
    """Mistral's sliding window too: an absent one is no full attention."""
    theirs = AutoConfig.for_model(family.model_type, **SIZES)
    window = {"sliding_window": None} if "sliding_window" in family.absent else {}
    ours = decoder_config({"model_type": family.model_type} | SIZES | window)
    for key in ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps"):
        assert getattr(ours, key) == getattr(theirs, key)
    assert ours.head_dim == getattr(theirs, "head_dim", 128 // 32)
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.rope == theirs.rope_parameters
    if window:
        assert family.absent["sliding_window"] == theirs.sliding_window
    for key, allowed in family.fixed.items():
        assert getattr(theirs, key, None) in allowed


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_architectures_are_transformers(family: Family) -> None:
    config = AutoConfig.for_model(family.model_type, **SIZES)
    with torch.device("meta"):
        models = [
            auto.from_config(config)
            for auto in (AutoModelForCausalLM, AutoModelForSequenceClassification)
        ]
    names = [type(model).__name__ for model in models]
    assert names == [family.language_model, family.classifier]


@pytest.mark.parametrize(
    "model_type",
    [
        *("gemma", "gemma2", "gemma3_text", "phi", "phi3", "mixtral", "qwen2_moe", "qwen3_moe"),
        *("qwen2_5_vl", "qwen3_vl", "llava", "mllama", "llama4", "mistral3", "gpt2", "qwen3_5"),
        *("", None, ["llama"]),
    ],
)
def test_other_families_are_refused_by_their_name_alone(model_type: Any) -> None:
    """With the list of what there is, whatever else the file says."""
    problems = list(unsupported_keys({"model_type": model_type, "hidden_act": "gelu"}))
    shown = "null" if model_type is None else '["llama"]' if model_type == ["llama"] else model_type
    assert problems == [f"model_type {shown}: only llama, mistral, qwen2, qwen3 are supported"]


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}


@pytest.mark.parametrize(
    ("model_type", "changes", "problem"),
    [
        ("mistral", {"sliding_window": 1024}, "sliding_window 1024: a window shorter than the"),
        ("mistral", {"sliding_window": "wide"}, "sliding_window wide: it must be null or a whole"),
        ("mistral", {"sliding_window": 2048}, None),
        ("mistral", {"sliding_window": None}, None),
        ("mistral", {"max_position_embeddings": 8192}, "sliding_window 4096: a window shorter"),
        ("mistral", {"rope_scaling": YARN}, "rope_type yarn: only default, linear, llama3 are"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window true: only false"),
        ("qwen2", {"sliding_window": 1024}, None),
        ("qwen2", {"use_sliding_window": False, "layer_types": ["sliding_attention"]}, "layer_typ"),
        ("qwen2", {"rope_scaling": YARN}, "rope_type yarn: only default is supported"),
        ("qwen3", {"rope_scaling": YARN}, "rope_type yarn: only default is supported"),
        ("qwen3", {"rope_scaling": {"type": "linear", "factor": 2}}, "rope_type linear: only def"),
        ("qwen3", {"rope_scaling": None}, None),
        ("qwen3", {"attention_bias": True}, "attention_bias true: only false"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window true: only false"),
        ("qwen3", {"hidden_size": 130, "head_dim": 64}, None),
        ("qwen2", {"hidden_size": 130}, "hidden_size 130: it must be a multiple of"),
        ("llama", {"hidden_size": 130, "head_dim": 64}, "hidden_size 130: it must be a multiple"),
    ],
)
def test_what_a_family_computes_otherwise_is_named(
    model_type: str, changes: dict[str, Any], problem: str | None
) -> None:
    values = {"model_type": model_type, "max_position_embeddings": 2048} | SIZES | changes
    found = list(unsupported_keys(values))
    assert len(found) == (problem is not None)
    assert problem is None or found[0].startswith(problem)


QWEN_2_5_7B = {
    "model_type": "qwen2",
    "vocab_size": 152_064,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "use_sliding_window": False,
    "sliding_window": 131_072,
    "max_window_layers": 28,
    "tie_word_embeddings": False,
}
MISTRAL_7B = {
    "model_type": "mistral",
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
"""What the published files say, Mistral's with the window taken away."""


@pytest.mark.parametrize(
    ("builder", "values"),
    [("qwen2_5.qwen2_5_7b_base", QWEN_2_5_7B), ("mistral.mistral_7b", MISTRAL_7B)],
)
def test_torchtunes_builders_are_accepted_where_they_compute_the_same(
    builder: str, values: dict[str, Any]
) -> None:
    decoder = built(builder)
    assert decoder_problems(decoder, values) == []
    assert decoder_problems(decoder, values | {"rope_theta": 5e5}) == [
        f"config.json: rope_theta 500000, model: {values['rope_theta']:.0f} "
        "(model.rope_base=500000)"
    ]
    llama = decoder_problems(decoder, values | {"model_type": "llama", "sliding_window": None})
    assert bool(llama) == (values["model_type"] == "qwen2")


@pytest.mark.parametrize("builder", ["llama3.llama3", "mistral.mistral"])
def test_a_decoder_of_another_family_is_refused_for_a_qwen(builder: str) -> None:
    (biases, rope) = decoder_problems(built(builder, **TINY), {"model_type": "qwen2"} | SIZES)
    assert biases == ("model: biases of no projection: qwen2 has them for k_proj, q_proj, v_proj")
    assert rope.startswith("model: rotary positions of the class RotaryPositionalEmbeddings")


def test_norms_after_the_rotation_are_not_a_qwen3s() -> None:
    """torchtune's own attention has them there; only the scales tell the two apart."""
    decoder = built("qwen2.qwen2", **TINY)
    for layer in decoder.layers:
        for name in "qkv":
            layer.attn.get_submodule(f"{name}_proj").bias = None
        layer.attn.q_norm = layer.attn.k_norm = RMSNorm(32, eps=decoder.norm.eps)
    (problem,) = decoder_problems(decoder, {"model_type": "qwen3"} | SIZES)
    assert problem == (
        "model: queries and keys normalised after the rotation: qwen3 does it before"
    )


@pytest.mark.parametrize(
    ("builder", "arguments"),
    [
        ("gemma.gemma", {"head_dim": 32}),
        ("gemma2.gemma2", {"head_dim": 32}),
        ("phi3.phi3", {}),
    ],
)
def test_no_other_decoder_can_be_exported(builder: str, arguments: dict[str, Any]) -> None:
    """Before it is trained: nothing else asks of which family fresh weights are."""
    with pytest.raises(ValueError, match="only models of llama, mistral, qwen2, qwen3 can be"):
        hf_config(built(builder, **(TINY | arguments)))


def test_a_decoder_says_of_which_family_it_is() -> None:
    """Of what Llama and Mistral both are, a Llama, unless a config.json says otherwise."""
    assert family_of(built("qwen2.qwen2", **TINY)) is QWEN2
    mistral = built("mistral.mistral", **TINY)
    assert hf_config(mistral)["architectures"] == ["LlamaForCausalLM"]
    assert hf_config(mistral, family=MISTRAL)["architectures"] == ["MistralForCausalLM"]
    with pytest.raises(ValueError, match="qwen3 has them"):
        hf_config(mistral, family=QWEN3)
