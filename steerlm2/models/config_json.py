"""config.json of a Hugging Face folder: what it describes, and whether a decoder computes that.

Absent keys have transformers' defaults. What transformers computes and the decoders here don't is
refused, not left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torchtune.modules import RMSNorm, TransformerDecoder
from torchtune.modules.peft import LoRALinear
from torchtune.modules.tied_linear import TiedLinear

from steerlm2.models.attention import HeadNormAttention
from steerlm2.models.decoders import context_length, head_shape
from steerlm2.models.families import FAMILIES, LLAMA, QWEN2, QWEN3, Family, family_named
from steerlm2.models.nf4 import has_quantized
from steerlm2.models.reward_head import RewardHead, is_classifier
from steerlm2.models.rope import (
    NUMBERS_OF,
    build_rope,
    inverse_frequencies,
    rope_settings,
    rotates_halves,
)

FIXED: dict[str, tuple[Any, ...]] = {
    "text_config": (None,),
    "hidden_act": ("silu", "swish"),
    "is_causal": (True,),
    "partial_rotary_factor": (None, 1),
    "quantization_config": (None,),
    "compression_config": (None,),
}
"""Keys with the values that a decoder here computes, of every family (`Family.fixed` has more); the
first is what an absent key means."""

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
"""Whole numbers that aren't null; an absent one must be in `Family.absent`."""

BUILDER_ARGUMENTS = {
    "vocab_size": "vocab_size",
    "hidden_size": "embed_dim",
    "intermediate_size": "intermediate_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "max_position_embeddings": "max_seq_len",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_base",
    "factor": "scale_factor",
    "tie_word_embeddings": "tie_word_embeddings",
}
"""What torchtune's builders call a key."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """What a model computes, by the names of its config.json."""

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope: Mapping[str, Any]
    """Settings, as in `steerlm2.models.rope`."""


def decoder_config(values: Mapping[str, Any], source: str = "config.json") -> DecoderConfig:
    """What a config.json describes.

    Args:
        source: its name in the error.

    Raises:
        ValueError: naming every key whose value isn't supported, or isn't one.
    """
    if problems := list(unsupported_keys(values)):
        raise ValueError(
            f"{source} doesn't describe a model that can be computed here:\n  - "
            + "\n  - ".join(problems)
        )
    family = FAMILIES[values["model_type"]]
    heads, hidden = values["num_attention_heads"], values["hidden_size"]
    return DecoderConfig(
        family=family,
        **{key: _size(values, key, family) for key in SIZES},
        num_key_value_heads=_size(values, "num_key_value_heads", family) or heads,
        head_dim=_size(values, "head_dim", family) or hidden // heads,
        rms_norm_eps=float(values.get("rms_norm_eps", 1e-6)),
        tie_word_embeddings=values.get("tie_word_embeddings", False),
        rope=_rope(values),
    )


def unsupported_family(checkpoint_dir: Path) -> str | None:
    """That a folder's model is of no family that is supported; None where it is, or isn't known.

    Reads `model_type` of config.json alone: a file that is missing or damaged is for those who need
    the rest of it.
    """
    file = checkpoint_dir / "config.json"
    try:
        values = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or "model_type" not in values:
        return None
    if family_named(values["model_type"]) is not None:
        return None
    return f"{file}: {next(unsupported_keys(values))}"


def unsupported_keys(values: Mapping[str, Any]) -> Iterator[str]:
    """Every key of a config.json that isn't supported, with its value; nothing where all are."""
    family = family_named(values.get("model_type"))
    if family is None:
        yield (
            f"model_type {_shown(values.get('model_type'))}: only {', '.join(FAMILIES)} are "
            "supported"
        )
        return
    for key, allowed in (FIXED | dict(family.fixed)).items():
        value = values.get(key, allowed[0])
        if value not in allowed:
            yield f"{key} {_shown(value)}: only {_shown(allowed[0])} is supported"
    layers = sorted({str(kind) for kind in values.get("layer_types") or []})
    if layers not in ([], ["full_attention"]):
        yield f"layer_types {', '.join(layers)}: only full_attention is supported"
    if values.get("text_config") is not None:
        return  # its own sizes stand in there
    wrong = [key for key in SIZES if not _is_size(_size(values, key, family))]
    for key in ("num_key_value_heads", "head_dim"):  # null means what the others make of it
        if not _is_size(_given(values, key, 1)):
            wrong.append(key)
    for key in wrong:
        yield f"{key} {_shown(values.get(key))}: it must be a whole number of at least 1"
    if not _is_positive(values.get("rms_norm_eps", 1e-6)):
        yield f"rms_norm_eps {_shown(values['rms_norm_eps'])}: it must be a number above 0"
    tied = values.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        yield f"tie_word_embeddings {_shown(tied)}: it must be true or false"
    if not wrong:
        yield from _head_problems(values, family)
        yield from _window_problems(values, family)
    yield from _rope_problems(values, family)


def family_of(decoder: TransformerDecoder) -> Family:
    """The family that a decoder is closest to; of what a Llama computes too, Llama."""
    if decoder.layers[0].attn.q_norm is not None:
        return QWEN3
    return QWEN2 if _has_bias(decoder, "attn") else LLAMA


def unlike(decoder: TransformerDecoder, family: Family) -> Iterator[str]:
    """Parts of a decoder that no model of the family has, so that no config.json describes it."""
    norms = [decoder.norm]
    for layer in decoder.layers:
        norms += [layer.sa_norm, layer.mlp_norm]
        if family.head_norms:
            norms += [norm for norm in (layer.attn.q_norm, layer.attn.k_norm) if norm is not None]
    if not all(isinstance(norm, RMSNorm) and norm.eps == decoder.norm.eps for norm in norms):
        kinds = sorted({f"{type(norm).__name__}({getattr(norm, 'eps', '')})" for norm in norms})
        yield (
            f"norms {', '.join(kinds)}: those of {family.model_type} are all RMSNorm with one "
            "rms_norm_eps"
        )
    activations = {type(layer.mlp.activation).__name__ for layer in decoder.layers}
    if activations != {"SiLU"}:
        yield f"hidden_act {', '.join(sorted(activations))}: that of {family.model_type} is silu"
    biased = {
        name
        for layer in decoder.layers
        for name, module in layer.attn.named_children()
        if getattr(module, "bias", None) is not None
    }
    wanted = {"q_proj", "k_proj", "v_proj"} if family.qkv_bias else set()
    if biased != wanted:
        yield (
            f"biases of {', '.join(sorted(biased)) or 'no projection'}: {family.model_type} has "
            f"them for {', '.join(sorted(wanted)) or 'none'}"
        )
    if _has_bias(decoder, "mlp"):
        yield f"mlp_bias true: that of {family.model_type} is false"
    normed = {layer.attn.q_norm is not None for layer in decoder.layers}
    if normed != {family.head_norms}:
        has = "has them" if family.head_norms else "has none"
        yield f"norms of queries and keys in {sum(normed)} layers: {family.model_type} {has}"
    elif family.head_norms and not all(
        isinstance(layer.attn, HeadNormAttention) for layer in decoder.layers
    ):
        yield f"queries and keys normalised after the rotation: {family.model_type} does it before"
    rope = decoder.layers[0].attn.pos_embeddings
    settings = rope_settings(rope)
    if "rope_theta" not in settings or rotates_halves(rope) != family.rotates_halves:
        yield (
            f"rotary positions of the class {type(rope).__name__}: {family.model_type} has others"
        )


def _has_bias(decoder: TransformerDecoder, part: str) -> bool:
    names = [name for name, _ in decoder.named_parameters()]
    return any(name.endswith(".bias") and f".{part}." in name for name in names)


def hf_config(
    decoder: TransformerDecoder, dtype: str = "float32", *, family: Family | None = None
) -> dict[str, Any]:
    """The config.json of a Hugging Face model that computes what this decoder computes.

    Token ids come from the tokenizer.

    Args:
        family: of the model; none: found out (`family_of`).

    Raises:
        ValueError: where no model of that family computes it.
    """
    family = family or family_of(decoder)
    if parts := list(unlike(decoder, family)):
        raise ValueError(
            f"only models of {', '.join(FAMILIES)} can be trained and exported; `model` has "
            + "; ".join(parts)
        )
    attention = decoder.layers[0].attn
    rope = rope_settings(attention.pos_embeddings)
    config: dict[str, Any] = {
        "architectures": [family.language_model],
        "model_type": family.model_type,
        "vocab_size": decoder.tok_embeddings.num_embeddings,
        "hidden_size": decoder.tok_embeddings.embedding_dim,
        "intermediate_size": decoder.layers[0].mlp.w1.weight.shape[0],
        "num_hidden_layers": len(decoder.layers),
        "num_attention_heads": decoder.num_heads,
        "num_key_value_heads": head_shape(decoder).num_kv_heads,
        "head_dim": decoder.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": context_length(decoder),
        "rms_norm_eps": decoder.norm.eps,
        "rope_theta": rope.pop("rope_theta"),
        "tie_word_embeddings": isinstance(decoder.output, TiedLinear),
        "torch_dtype": dtype,
    }
    config |= {key: allowed[0] for key, allowed in family.fixed.items() if key.endswith("_bias")}
    if "sliding_window" in family.absent:
        config["sliding_window"] = None
    if rope["rope_type"] != "default":
        config["rope_scaling"] = rope
    return config


def computation(decoder: TransformerDecoder) -> dict[str, Any]:
    """What a decoder computes with its weights, by the keys of config.json and of `model`.

    Two decoders of one computation and the same weights give the same outputs, to rounding.

    Raises:
        ValueError: where no model of a known family computes that.
    """
    adapted = {name: m for name, m in decoder.named_modules() if isinstance(m, LoRALinear)}
    any_adapted = next(iter(adapted.values()), None)
    config = hf_config(decoder)
    for says_nothing in ("architectures", "model_type", "torch_dtype", "max_position_embeddings"):
        del config[says_nothing]
    return {
        "rope_scaling": None,
        **config,
        "lora_modules": sorted({name.rpartition(".")[2] for name in adapted}),
        "lora_rank": any_adapted and any_adapted.rank,
        "lora_alpha": any_adapted and any_adapted.alpha,
        "quantize_base": has_quantized(decoder),
    }


def decoder_problems(decoder: TransformerDecoder, values: Mapping[str, Any]) -> list[str]:
    """Where a decoder doesn't compute what transformers computes from a config.json.

    Frequencies of rotary positions are compared, not the settings that they come from. An attribute
    model's head may stand in for the output layer.

    Args:
        values: of config.json.
    """
    problems = [f"config.json: {problem}" for problem in unsupported_keys(values)]
    family = family_named(values.get("model_type"))
    if family is not None:
        problems += [f"model: {part}" for part in unlike(decoder, family)]
    is_attribute_model = isinstance(decoder.output, RewardHead)
    if not is_attribute_model and is_classifier(values):
        (name,) = values["architectures"]
        problems.append(f"config.json: architectures [{name}], model: a language model")
    if problems:
        return problems
    theirs, ours = decoder_config(values), decoder_config(hf_config(decoder, family=family))
    return list(_differences(theirs, ours, is_attribute_model))


def check_decoder(decoder: TransformerDecoder, values: Mapping[str, Any], folder: Path) -> None:
    """Check that a decoder computes what transformers computes from a folder's config.json.

    Raises:
        ValueError: listing every key that differs, with both values.
    """
    if problems := decoder_problems(decoder, values):
        raise ValueError(
            f"`model` isn't the model that {(folder / 'config.json').absolute()} describes:\n  - "
            + "\n  - ".join(problems)
            + "\nSet `model` to steerlm2.models.from_checkpoint, which builds what config.json "
            "describes, or its builder's arguments to the values of config.json."
        )


def exported_config(decoder: TransformerDecoder, values: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a decoder that was loaded from a folder, in all of transformers' versions.

    The rotary positions are spelled as transformers 4 reads them (5 reads that too), and as the
    folder spells them. The context stays the folder's.

    Args:
        values: of the folder's config.json; its keys that say nothing of the computation stay.
    """
    own = hf_config(decoder, family=FAMILIES[values["model_type"]])
    del own["torch_dtype"]
    if isinstance(decoder.output, RewardHead):  # `classification_config` describes it
        del own["architectures"], own["tie_word_embeddings"]
    own["max_position_embeddings"] = decoder_config(values).max_position_embeddings
    if "rope_scaling" in values:
        own.setdefault("rope_scaling", None)
    if "rope_parameters" in values:
        own["rope_parameters"] = dict(decoder_config(own).rope)
    return {**values, **own}


def _differences(
    theirs: DecoderConfig, ours: DecoderConfig, is_attribute_model: bool
) -> Iterator[str]:
    exact = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"]
    exact += ["num_attention_heads", "num_key_value_heads", "head_dim"]
    exact += [] if is_attribute_model else ["tie_word_embeddings"]
    for key in exact:
        if getattr(theirs, key) != getattr(ours, key):
            yield _difference(key, getattr(theirs, key), getattr(ours, key))
    if not math.isclose(theirs.rms_norm_eps, ours.rms_norm_eps, rel_tol=1e-6):
        yield _difference("rms_norm_eps", theirs.rms_norm_eps, ours.rms_norm_eps)
    if theirs.max_position_embeddings < ours.max_position_embeddings:
        yield _difference(
            "max_position_embeddings", theirs.max_position_embeddings, ours.max_position_embeddings
        )
    if theirs.head_dim == ours.head_dim:
        one, other = (
            inverse_frequencies(build_rope(config.rope, config.head_dim, 1))
            for config in (theirs, ours)
        )
        if not torch.allclose(one, other, rtol=1e-6, atol=0):
            same_kind = theirs.rope["rope_type"] == ours.rope["rope_type"]
            for key in theirs.rope if same_kind else ("rope_type", "rope_theta"):
                if theirs.rope[key] != ours.rope[key]:
                    yield _difference(key, theirs.rope[key], ours.rope[key])


def _difference(key: str, theirs: Any, ours: Any) -> str:
    line = f"config.json: {key} {_shown(theirs)}, model: {_shown(ours)}"
    argument = BUILDER_ARGUMENTS.get(key)
    return line if argument is None else f"{line} (model.{argument}={_shown(theirs)})"


def _head_problems(values: Mapping[str, Any], family: Family) -> Iterator[str]:
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    kv_heads = _size(values, "num_key_value_heads", family) or heads
    head_dim = _size(values, "head_dim", family)
    if hidden % heads and (head_dim is None or family is LLAMA):  # as transformers' Llama
        yield f"hidden_size {hidden}: it must be a multiple of num_attention_heads {heads}"
    if heads % kv_heads:
        yield f"num_key_value_heads {kv_heads}: it must divide num_attention_heads {heads}"
    if (head_dim or hidden // heads) % 2:
        yield f"head_dim {head_dim or hidden // heads}: it must be even"


def _window_problems(values: Mapping[str, Any], family: Family) -> Iterator[str]:
    if "sliding_window" not in family.absent:
        return
    window = values.get("sliding_window", family.absent["sliding_window"])
    context = _size(values, "max_position_embeddings", family)
    if window is None:
        return
    if not _is_size(window):
        yield f"sliding_window {_shown(window)}: it must be null or a whole number of at least 1"
    elif window < context:
        yield (
            f"sliding_window {window}: a window shorter than the context "
            f"(max_position_embeddings {context}) is not supported. Up to {window} tokens all "
            f"attention is full: for such texts set max_position_embeddings to {window}, in "
            "config.json"
        )


def _rope_problems(values: Mapping[str, Any], family: Family) -> Iterator[str]:
    spellings: dict[str, Any] = {
        key: {} if values.get(key) is None else values[key]
        for key in ("rope_scaling", "rope_parameters")
    }
    wrong = [key for key, spelling in spellings.items() if not _is_flat(spelling)]
    for key in wrong:
        yield f"{key} {_shown(values[key])}: it must be one flat object"
    if wrong:
        return
    for spelling in spellings.values():
        kinds = [spelling[key] for key in ("rope_type", "type") if key in spelling]
        if any(kind != kinds[0] for kind in kinds):
            yield f"rope_type {_shown(kinds[0])}, but type {_shown(kinds[1])}"
            return
    settings = _rope(values)
    kind = settings["rope_type"]
    if kind not in family.rope_types:
        known = ", ".join(family.rope_types)
        yield f"rope_type {_shown(kind)}: only {known} {_is_or_are(family.rope_types)} supported"
        return
    numbers = ("rope_theta", *NUMBERS_OF[kind])
    wrong_numbers = [key for key in numbers if not _is_positive(settings[key])]
    for key in wrong_numbers:
        yield f"{key} {_shown(settings[key])}: it must be a number above 0 for rope_type {kind}"
    if wrong_numbers:
        return
    if kind == "llama3" and settings["low_freq_factor"] >= settings["high_freq_factor"]:
        yield (
            f"low_freq_factor {settings['low_freq_factor']}: it must be below high_freq_factor "
            f"{settings['high_freq_factor']}"
        )
    for spelling in spellings.values():
        factor = spelling.get("partial_rotary_factor")
        if factor not in (None, 1):
            yield f"partial_rotary_factor {_shown(factor)}: only 1 is supported"
    original = "original_max_position_embeddings"
    if kind == "llama3" and values.get(original, settings[original]) != settings[original]:
        yield f"{original} {_shown(values[original])}, but {settings[original]} in the rope's"
    if spellings["rope_parameters"] and ("rope_theta" in values or spellings["rope_scaling"]):
        version_4 = _rope({key: value for key, value in values.items() if key != "rope_parameters"})
        if version_4 != settings or version_4 != _rope({**values, "rope_scaling": None}):
            yield (
                "rope_parameters (transformers 5) and rope_theta with rope_scaling (transformers "
                "4) say different things: leave the wrong ones out"
            )


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that transformers 5 reads, from either spelling; None where a number lacks."""
    spelling = values.get("rope_scaling") or values.get("rope_parameters") or {}
    kind = spelling.get("rope_type", spelling.get("type", "default"))
    theta = spelling.get("rope_theta", values.get("rope_theta", 10_000.0))
    numbers = {key: spelling.get(key) for key in NUMBERS_OF.get(kind, ())}
    return {"rope_type": kind, "rope_theta": theta, **numbers}


def _given(values: Mapping[str, Any], key: str, default: int) -> int:
    value = values.get(key)
    return default if value is None else value


def _size(values: Mapping[str, Any], key: str, family: Family) -> Any:
    """A key's value, or what an absent one means."""
    return values.get(key, family.absent.get(key))


def _is_or_are(values: Sequence[Any]) -> str:
    return "is" if len(values) == 1 else "are"


def _is_flat(value: Any) -> bool:
    return isinstance(value, Mapping) and not any(isinstance(v, Mapping) for v in value.values())


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_positive(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0


def _shown(value: Any) -> str:
    """As JSON, without quotes around text; a long one cut off."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
