"""The reward head takes the output layer's place, and config.json says what it scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate
from torchtune.models.llama3 import llama3, lora_llama3
from torchtune.models.llama3_2 import llama3_2
from torchtune.modules import TransformerDecoder

from steerlm2.distributed.world import close_world, init_world
from steerlm2.models.decoders import output_weight, tensor_parallel_plan, unsupported_parts
from steerlm2.models.reward_head import (
    RewardHead,
    add_reward_head,
    attribute_names,
    classification_config,
)

TINY: dict[str, Any] = {
    "vocab_size": 512,
    "num_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 1,
    "embed_dim": 32,
    "max_seq_len": 64,
    "intermediate_dim": 48,
}


def with_head(builder: Callable[..., TransformerDecoder], **changes: Any) -> TransformerDecoder:
    with torch.device("meta"):
        decoder = builder(**(TINY | changes))
        add_reward_head(decoder, 3)
    return decoder


@pytest.mark.parametrize("builder", [llama3, llama3_2], ids=["untied", "tied"])
def test_the_head_is_the_only_output(builder: Callable[..., TransformerDecoder]) -> None:
    """[A, D] = [3, 32], without a bias, and no vocabulary-sized matrix but the embedding."""
    decoder = with_head(builder)
    output = [(name, tuple(p.shape)) for name, p in decoder.named_parameters() if "output." in name]
    assert output == [("output.weight", (3, 32))]
    vocabulary = [name for name, p in decoder.named_parameters() if 512 in p.shape]
    assert vocabulary == ["tok_embeddings.weight"]


def test_the_output_weight_of_a_tied_decoder_is_the_heads() -> None:
    """Not the embedding, which tied decoders are read from otherwise."""
    decoder = with_head(llama3_2)
    assert output_weight(decoder) is decoder.output.weight


@pytest.mark.parametrize("builder", [llama3, llama3_2], ids=["untied", "tied"])
def test_an_attribute_model_has_no_unsupported_part(
    builder: Callable[..., TransformerDecoder],
) -> None:
    assert list(unsupported_parts(with_head(builder))) == []


def test_the_head_replaces_an_adapted_output_layer() -> None:
    lora = {"lora_attn_modules": ["q_proj"], "apply_lora_to_output": True, "lora_rank": 2}
    decoder = with_head(lora_llama3, lora_alpha=4, **lora)
    assert isinstance(decoder.output, RewardHead)
    assert list(unsupported_parts(decoder)) == []


def test_config_names_the_attributes_in_order() -> None:
    assert classification_config(("wit", "kindness")) == {
        "architectures": ["LlamaForSequenceClassification"],
        "problem_type": "regression",
        "num_labels": 2,
        "id2label": {"0": "wit", "1": "kindness"},
        "label2id": {"wit": 0, "kindness": 1},
        "tie_word_embeddings": False,
    }


def test_config_there_and_back_is_the_same_names() -> None:
    """12 names: sorted as text, "10" would come before "2"."""
    names = [f"attribute_{i}" for i in range(12)]
    assert attribute_names(classification_config(names)) == names


def test_names_come_back_in_the_order_of_the_scores() -> None:
    """Whatever the order in the file."""
    config = classification_config(("a", "b", "c"))
    config["id2label"] = dict(reversed(config["id2label"].items()))
    assert attribute_names(config) == ["a", "b", "c"]


@pytest.mark.parametrize("config", [{}, {"architectures": ["LlamaForCausalLM"]}])
def test_a_language_model_has_no_attributes(config: dict[str, Any]) -> None:
    assert attribute_names(config) is None


def test_the_plan_keeps_the_head_whole_on_the_others_mesh() -> None:
    """A gradient norm over parameters on different meshes is an error. A mesh of one rank."""
    decoder = with_head(llama3)
    world = init_world("cpu", needs_mesh=True)
    try:
        assert world.mesh is not None
        tensor_parallel_plan(decoder)["output"]._apply(decoder.output, world.mesh["tp"])
        weight = decoder.output.weight
        assert isinstance(weight, DTensor)
        assert weight.placements == (Replicate(),)
        assert weight.device_mesh == world.mesh["tp"]
    finally:
        close_world()


def test_a_frozen_head_stays_frozen_when_it_is_laid_out() -> None:
    decoder = with_head(llama3)
    decoder.output.requires_grad_(False)
    world = init_world("cpu", needs_mesh=True)
    try:
        assert world.mesh is not None
        tensor_parallel_plan(decoder)["output"]._apply(decoder.output, world.mesh["tp"])
        assert not decoder.output.weight.requires_grad
    finally:
        close_world()


@pytest.mark.parametrize(
    "labels",
    [None, {"0": "LABEL_0", "1": "LABEL_1"}, {"good": 1}, "missing"],
    ids=["null", "generic", "not numbered", "missing"],
)
def test_labels_without_names_of_their_own_are_unknown(labels: Any) -> None:
    """What transformers writes by default, or leaves out: not the same as no head (None)."""
    config = {"architectures": ["LlamaForSequenceClassification"]}
    if labels != "missing":
        config["id2label"] = labels
    assert attribute_names(config) == []
