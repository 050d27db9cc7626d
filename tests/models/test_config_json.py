"""A decoder that isn't what config.json describes is refused, by every key with both values."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchtune.models.llama3 import llama3
from torchtune.models.llama3_1 import llama3_1
from torchtune.models.llama3_2 import llama3_2
from torchtune.modules import TransformerDecoder

from steerlm2.checkpoint_dirs import read_json
from steerlm2.checkpoints.weights import open_checkpointer
from steerlm2.data.tokenizers import tiny_tokenizer
from steerlm2.models.config_json import (
    check_decoder,
    decoder_config,
    decoder_problems,
    exported_config,
    hf_config,
    unsupported_keys,
)
from steerlm2.models.reward_head import add_reward_head, classification_config

TINY: dict[str, Any] = {
    "vocab_size": 512,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 128,
    "max_seq_len": 2048,
    "rope_base": 10_000,
    "intermediate_dim": 384,
}
VERSION_4: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
"""What `meta(llama3)` computes, as transformers 4 writes it."""
VERSION_5 = {key: value for key, value in VERSION_4.items() if not key.startswith("rope_")} | {
    "head_dim": 32,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}
"""The same as transformers 5 writes it."""
SPELLINGS = {"transformers 4": VERSION_4, "transformers 5": VERSION_5}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def meta(builder: Callable[..., TransformerDecoder] = llama3, **changes: Any) -> TransformerDecoder:
    with torch.device("meta"):
        return builder(**(TINY | changes))


@pytest.mark.parametrize("values", SPELLINGS.values(), ids=SPELLINGS)
def test_the_decoder_of_a_config_has_no_problems(values: dict[str, Any]) -> None:
    assert decoder_problems(meta(), values) == []


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("vocab_size", 520, "vocab_size 520, model: 512 (model.vocab_size=520)"),
        ("hidden_size", 256, "hidden_size 256, model: 128 (model.embed_dim=256)"),
        ("intermediate_size", 192, "intermediate_size 192, model: 384 "),
        ("num_hidden_layers", 3, "num_hidden_layers 3, model: 2 (model.num_layers=3)"),
        ("num_attention_heads", 8, "num_attention_heads 8, model: 4 (model.num_heads=8)"),
        ("num_key_value_heads", 4, "num_key_value_heads 4, model: 2 (model.num_kv_heads=4)"),
        ("num_key_value_heads", None, "num_key_value_heads 4, model: 2 "),
        ("head_dim", 64, "head_dim 64, model: 32"),
        ("rms_norm_eps", 1e-6, "rms_norm_eps 1e-06, model: 1e-05 (model.norm_eps=1e-06)"),
        ("tie_word_embeddings", True, "tie_word_embeddings true, model: false "),
        ("max_position_embeddings", 512, "max_position_embeddings 512, model: 2048 "),
        ("model_type", "mixtral", "model_type mixtral: only llama, mistral, qwen2, qwen3 are"),
        ("model_type", None, "model_type null: only llama"),
        ("hidden_act", "gelu", "hidden_act gelu: only silu"),
        ("attention_bias", True, "attention_bias true: only false"),
        ("mlp_bias", True, "mlp_bias true: only false"),
        ("sliding_window", 64, "sliding_window 64: only null"),
        ("layer_types", ["sliding_attention"] * 2, "layer_types sliding_attention: only full"),
        ("is_causal", False, "is_causal false: only true"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor 0.5: only null"),
        ("quantization_config", {"quant_method": "fp8"}, 'quantization_config {"quant_method"'),
        ("text_config", {"hidden_size": 128}, "text_config {"),
        ("architectures", ["LlamaForSequenceClassification"], "model: a language model"),
        ("num_attention_heads", "four", "num_attention_heads four: it must be a whole number"),
        ("vocab_size", True, "vocab_size true: it must be a whole number"),
        ("num_key_value_heads", 3, "num_key_value_heads 3: it must divide"),
        ("head_dim", 31, "head_dim 31: it must be even"),
        ("rms_norm_eps", "1e-5", "rms_norm_eps 1e-5: it must be a number above 0"),
        ("rms_norm_eps", 0, "rms_norm_eps 0: it must be a number above 0"),
        ("tie_word_embeddings", "yes", "tie_word_embeddings yes: it must be true or false"),
        ("rope_parameters", "llama3", "rope_parameters llama3: it must be one flat object"),
        (
            "rope_parameters",
            {"full_attention": {"rope_theta": 1e6}},
            "rope_parameters {",
        ),
    ],
)
def test_an_altered_key_is_named_with_both_values(
    spelling: str, key: str, value: Any, problem: str
) -> None:
    (found,) = decoder_problems(meta(), SPELLINGS[spelling] | {key: value})[:1]
    assert problem in found
    assert found.startswith("config.json: ")


ROPES: dict[str, tuple[dict[str, Any], float | None, list[str]]] = {
    "theta": ({}, 500_000.0, ["rope_theta 500000, model: 10000 (model.rope_base=500000)"]),
    "llama3": (LLAMA3, 10_000.0, ["rope_type llama3, model: default"]),
    "llama3 of another theta": (
        LLAMA3,
        500_000.0,
        ["rope_type llama3, model: default", "rope_theta 500000, model: 10000 "],
    ),
    "linear": ({"rope_type": "linear", "factor": 4}, 1e4, ["rope_type linear, model: default"]),
    "old key": ({"type": "linear", "factor": 4}, 1e4, ["rope_type linear, model: default"]),
    "dynamic": ({"rope_type": "dynamic", "factor": 4}, 1e4, ["rope_type dynamic: only default"]),
    "yarn": ({"rope_type": "yarn", "factor": 4}, 1e4, ["rope_type yarn: only default"]),
    "longrope": ({"type": "longrope"}, 1e4, ["rope_type longrope: only default"]),
    "no name": ({"rope_type": None}, 1e4, ["rope_type null: only default"]),
    "no factor": ({"rope_type": "linear"}, 1e4, ["factor null: it must be a number above 0"]),
    "factor 0": ({"rope_type": "linear", "factor": 0}, 1e4, ["factor 0: it must be a number"]),
    "two types": ({"rope_type": "linear", "type": "llama3"}, 1e4, ["rope_type linear, but type"]),
    "part of a head": (
        LLAMA3 | {"partial_rotary_factor": 0.5},
        1e4,
        ["partial_rotary_factor 0.5: only 1"],
    ),
    "factors the wrong way": (
        LLAMA3 | {"low_freq_factor": 4.0},
        1e4,
        ["low_freq_factor 4.0: it must be below"],
    ),
    "no context": (
        {key: LLAMA3[key] for key in list(LLAMA3)[:-1]},
        1e4,
        ["original_max_position_embeddings null: it must be"],
    ),
    "theta null": ({}, None, ["rope_theta null: it must be a number"]),
}


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize(("scaling", "theta", "problems"), ROPES.values(), ids=ROPES)
def test_another_rope_is_named_in_both_spellings(
    scaling: dict[str, Any], theta: float | None, problems: list[str], version: int
) -> None:
    if version == 4:
        values = VERSION_4 | {"rope_theta": theta, "rope_scaling": scaling or None}
    else:
        values = VERSION_5 | {"rope_parameters": {"rope_theta": theta, **scaling}}
    found = decoder_problems(meta(), values)
    assert len(found) == len(problems)
    assert all(problem in line for problem, line in zip(problems, found, strict=True))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"factor": 32.0}, "factor 32, model: 8 (model.scale_factor=32)"),
        ({"low_freq_factor": 2.0}, "low_freq_factor 2, model: 1"),
        ({"high_freq_factor": 16.0}, "high_freq_factor 16, model: 4"),
        ({"original_max_position_embeddings": 64}, "original_max_position_embeddings 64, model: 8"),
    ],
)
def test_the_numbers_of_a_scaling_are_compared(change: dict[str, Any], problem: str) -> None:
    values = VERSION_4 | {"rope_scaling": LLAMA3 | change}
    (found,) = decoder_problems(meta(llama3_1), values)
    assert problem in found


def test_a_scaling_that_no_frequency_notices_is_none() -> None:
    """The frequencies of these heads are all above the scaled ones: transformers computes alike."""
    values = VERSION_4 | {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 2**30}}
    assert decoder_problems(meta(), values) == []


@pytest.mark.parametrize(
    ("more", "same"),
    [
        ({"rope_theta": 10_000.0}, True),
        ({"rope_theta": 500_000.0}, False),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, False),
        ({"rope_scaling": None}, True),
    ],
)
def test_both_spellings_at_once_must_say_the_same(more: dict[str, Any], same: bool) -> None:
    """transformers 4 reads one, transformers 5 the other."""
    problems = list(unsupported_keys(VERSION_5 | more))
    assert [("say different things" in problem) for problem in problems] == ([] if same else [True])


PUBLISHED: dict[str, dict[str, Any]] = {
    "llama2.llama2_70b": {"vocab_size": 32_000, "max_position_embeddings": 4096},
    "llama3.llama3_70b": {"rope_theta": 500_000.0, "max_position_embeddings": 8192},
    "llama3_1.llama3_1_70b": {"rope_theta": 500_000.0, "rope_scaling": LLAMA3},
    "llama3_3.llama3_3_70b": {"rope_theta": 500_000.0, "rope_scaling": LLAMA3},
}
"""What tells the 70B models' published config.json from one another."""


@pytest.mark.parametrize("builder", PUBLISHED)
def test_builders_of_the_70b_configs_build_what_is_published(builder: str) -> None:
    sizes = {"vocab_size": 128_256, "hidden_size": 8192, "intermediate_size": 28_672}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8, "num_hidden_layers": 80}
    more = {"model_type": "llama", "rms_norm_eps": 1e-5, "max_position_embeddings": 131_072}
    module, _, name = f"torchtune.models.{builder}".rpartition(".")
    with torch.device("meta"):
        decoder = getattr(importlib.import_module(module), name)()
    assert decoder_problems(decoder, sizes | heads | more | PUBLISHED[builder]) == []


def test_all_differences_are_in_one_message(tmp_path: Path) -> None:
    values = VERSION_4 | {"vocab_size": 520, "rope_theta": 500_000.0, "rms_norm_eps": 1e-6}
    with pytest.raises(ValueError, match=f"{tmp_path}/config.json describes") as error:
        check_decoder(meta(), values, tmp_path)
    message = str(error.value)
    assert [key in message for key in ("vocab_size", "rope_theta", "rms_norm_eps")] == [True] * 3
    assert "steerlm2.models.from_checkpoint" in message


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (
            lambda m: setattr(m.layers[1].mlp, "activation", nn.GELU()),
            "model: hidden_act GELU, SiLU",
        ),
        (lambda m: setattr(m.layers[1].sa_norm, "eps", 1e-6), "RMSNorm(1e-05), RMSNorm(1e-06)"),
        (lambda m: setattr(m, "norm", nn.LayerNorm(128)), "norms LayerNorm(1e-05), RMSNorm(1e-05)"),
        (lambda m: setattr(m.layers[0].mlp, "w2", nn.Linear(384, 128)), "model: mlp_bias true"),
        (lambda m: setattr(m.layers[0].attn, "q_norm", nn.Identity()), "norms of queries and keys"),
    ],
)
def test_parts_that_no_llama_has_are_named(
    change: Callable[[TransformerDecoder], None], part: str
) -> None:
    decoder = meta()
    change(decoder)
    (found,) = decoder_problems(decoder, VERSION_4)
    assert part in found


@pytest.mark.parametrize("tied", [False, True])
def test_the_backbone_of_an_attribute_model_may_be_tied(tied: bool) -> None:
    """The head takes the output layer's place; a language model can be the start of it."""
    decoder = meta(llama3_2 if tied else llama3_1, **({"scale_factor": 8} if tied else {}))
    with torch.device("meta"):
        add_reward_head(decoder, 3)
    values = VERSION_4 | {"rope_scaling": LLAMA3, "tie_word_embeddings": tied}
    assert decoder_problems(decoder, values) == []
    assert decoder_problems(decoder, values | classification_config(["a", "b", "c"])) == []


# Files


@pytest.mark.parametrize("text", ["", '{"model_type": "lla', "[]"])
def test_a_damaged_config_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path}/config.json (is damaged|must hold a JSON)"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    "component",
    ["steerlm2.checkpoints.HFCheckpointer", "torchtune.training.FullModelHFCheckpointer"],
)
def test_no_checkpointer_opens_a_folder_of_another_model(component: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(VERSION_4 | {"rope_theta": 5e5}))
    section = {"_component_": component, "checkpoint_dir": str(tmp_path)}
    with pytest.raises(ValueError, match="rope_theta 500000, model: 10000"):
        open_checkpointer(section, meta(), tiny_tokenizer(), seed=0, output_dir="")


def test_a_torchtune_checkpointer_of_another_family_is_refused(tmp_path: Path) -> None:
    """Names and shapes fit, but the rows of queries and keys would be in another order."""
    (tmp_path / "config.json").write_text(json.dumps(VERSION_4))
    section = {
        "_component_": "torchtune.training.FullModelHFCheckpointer",
        "checkpoint_dir": str(tmp_path),
        "model_type": "QWEN2",
    }
    with pytest.raises(ValueError, match=r"checkpointer\.model_type QWEN2 reads queries and keys"):
        open_checkpointer(section, meta(), tiny_tokenizer(), seed=0, output_dir="")


def test_a_resized_vocabulary_says_what_the_models_must_be(tmp_path: Path) -> None:
    """Tokenizer and checkpoint have more tokens than the model: the model is to be changed."""
    tokenizer = tiny_tokenizer()
    (tmp_path / "config.json").write_text(json.dumps(VERSION_4 | {"vocab_size": 520}))
    section = {
        "_component_": "steerlm2.checkpoints.HFCheckpointer",
        "checkpoint_dir": str(tmp_path),
    }
    with pytest.raises(ValueError, match=r"model\.vocab_size=520"):
        open_checkpointer(section, meta(vocab_size=500), tokenizer, seed=0, output_dir="")


# Exports


def test_an_export_describes_the_decoder_and_keeps_the_rest() -> None:
    values = VERSION_4 | {"rope_scaling": LLAMA3, "eos_token_id": [3, 7], "pad_token_id": 5}
    del values["rms_norm_eps"]
    decoder = meta(llama3_1, norm_eps=1e-6, max_seq_len=1024)
    written = exported_config(decoder, values)
    own = hf_config(decoder)
    computed = own.keys() - {"torch_dtype", "max_position_embeddings"}
    assert {key: written[key] for key in computed} == {key: own[key] for key in computed}
    kept = ("eos_token_id", "pad_token_id", "torch_dtype", "max_position_embeddings")
    assert {key: written[key] for key in kept} == {key: values[key] for key in kept}


@pytest.mark.parametrize("values", SPELLINGS.values(), ids=SPELLINGS)
def test_an_export_describes_the_same_model_as_its_folder(values: dict[str, Any]) -> None:
    """And both spellings say the same."""
    written = exported_config(meta(), values)
    assert decoder_config(written) == decoder_config(values)
