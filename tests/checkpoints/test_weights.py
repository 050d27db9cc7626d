"""Weights in and out."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torchtune.models.llama3 import llama3, lora_llama3
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import get_adapter_params, set_trainable_params
from torchtune.training import FullModelHFCheckpointer

from steerlm2.attributes import AttributeSchema
from steerlm2.checkpoints.checkpointer import INIT_STD, ScratchCheckpointer
from steerlm2.checkpoints.weights import (
    load_weights,
    open_checkpointer,
    open_reward_checkpointer,
    save_weights,
)
from steerlm2.data.templates import extra_id_template
from steerlm2.data.tokenizers import tiny_tokenizer
from steerlm2.distributed.parallelize import parallelize
from steerlm2.distributed.world import World, close_world, init_world
from steerlm2.models.reward_head import add_reward_head

CPU = World(torch.device("cpu"))
TINY: dict[str, Any] = {
    "vocab_size": 512,
    "num_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 1,
    "embed_dim": 32,
    "max_seq_len": 64,
    "intermediate_dim": 48,
}
LORA: dict[str, Any] = {
    "lora_attn_modules": ["q_proj", "v_proj"],
    "lora_rank": 4,
    "lora_alpha": 8,
}


def meta_decoder(**changes: Any) -> TransformerDecoder:
    with torch.device("meta"):
        return llama3(**(TINY | changes))


def meta_lora_decoder() -> TransformerDecoder:
    with torch.device("meta"):
        decoder = lora_llama3(**LORA, **TINY)
    set_trainable_params(decoder, get_adapter_params(decoder))
    return decoder


def scratch(decoder: TransformerDecoder, seed: int = 0, folder: Any = "out") -> ScratchCheckpointer:
    return ScratchCheckpointer(decoder, tiny_tokenizer(), seed=seed, output_dir=str(folder))


def loaded(decoder: TransformerDecoder, seed: int = 0) -> TransformerDecoder:
    load_weights(decoder, scratch(decoder, seed), CPU, seed=seed)
    return decoder


def same_state(first: Any, second: Any) -> bool:
    """Bitwise equality of nested dicts and lists with tensors in them."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(
            same_state(first[key], second[key]) for key in first
        )
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same_state, first, second))
    return first == second


class Folder:
    """Stands for any checkpointer that reads these weights."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def load_checkpoint(self) -> dict[str, Any]:
        return {"model": self.weights}

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError


# Weights


def test_fresh_weights_are_a_function_of_the_seed() -> None:
    first, again, other = (loaded(meta_decoder(), seed).state_dict() for seed in (3, 3, 4))
    assert same_state(first, again)
    assert not same_state(first, other)


def test_fresh_weights_differ_from_matrix_to_matrix() -> None:
    """w1 and w3 have one shape, but not one set of values."""
    mlp = loaded(meta_decoder()).layers[0].mlp
    assert not torch.equal(mlp.w1.weight, mlp.w3.weight)


def test_fresh_matrices_are_normal_and_norms_are_one() -> None:
    """512 x 32 = 16,384 values: their standard deviation is within 3% of 0.02 (6 sigma)."""
    decoder = loaded(meta_decoder())
    assert decoder.tok_embeddings.weight.std().item() == pytest.approx(INIT_STD, rel=0.03)
    assert torch.equal(decoder.norm.scale, torch.ones(32))


def test_loaded_decoder_has_its_positions() -> None:
    """RoPE's table isn't a weight: a decoder from the meta device has to compute it."""
    decoder = loaded(meta_decoder())
    with torch.no_grad():
        logits = decoder(torch.tensor([[5, 6, 7]]))
        swapped = decoder(torch.tensor([[6, 5, 7]]))
    assert logits.isfinite().all()
    assert not torch.equal(logits[0, -1], swapped[0, -1])


def test_weights_take_the_decoders_dtype() -> None:
    decoder = loaded(meta_decoder().bfloat16())
    assert {p.dtype for p in decoder.parameters()} == {torch.bfloat16}


def test_adapters_start_as_nothing() -> None:
    """LoRA's B is zero and its A is not: the model is the base model, and can be trained."""
    decoder = loaded(meta_lora_decoder())
    q_proj = decoder.layers[0].attn.q_proj
    assert torch.equal(q_proj.lora_b.weight, torch.zeros(32, 4))
    assert (q_proj.lora_a.weight != 0).all()


def test_weights_that_do_not_fit_are_all_named() -> None:
    """One missing, one too many, two of another shape."""
    weights = dict(scratch(meta_decoder(intermediate_dim=40)).weights)
    del weights["norm.scale"]
    weights["extra.weight"] = torch.zeros(1)
    del weights["layers.0.mlp.w2.weight"]
    with pytest.raises(ValueError, match="the checkpoint doesn't fit the model") as error:
        load_weights(meta_decoder(), Folder(weights), CPU, seed=0)
    assert sorted(str(error.value).splitlines()[1:]) == [
        "  - extra.weight is not in the model",
        "  - layers.0.mlp.w1.weight has shape [40, 32], the model's is [48, 32]",
        "  - layers.0.mlp.w2.weight is missing",
        "  - layers.0.mlp.w3.weight has shape [40, 32], the model's is [48, 32]",
        "  - norm.scale is missing",
    ]


def test_exported_weights_are_the_decoders(tmp_path: Path) -> None:
    decoder = loaded(meta_decoder())
    checkpointer = scratch(decoder, folder=tmp_path)
    save_weights(decoder, checkpointer, CPU, epoch=2, dtype=torch.float32, output_dir=tmp_path)
    component = {
        "_component_": "torchtune.training.FullModelHFCheckpointer",
        "checkpoint_dir": str(tmp_path / "epoch_2"),
        "checkpoint_files": ["model.safetensors"],
        "model_type": "LLAMA3",
        "output_dir": str(tmp_path / "next"),
    }
    again = open_checkpointer(component, decoder, tiny_tokenizer(), seed=0, output_dir="unused")
    assert isinstance(again, FullModelHFCheckpointer)
    assert same_state(again.load_checkpoint()["model"], dict(decoder.state_dict()))


def test_export_is_in_the_dtype_asked_for(tmp_path: Path) -> None:
    decoder = loaded(meta_decoder())
    checkpointer = scratch(decoder, folder=tmp_path)
    save_weights(decoder, checkpointer, CPU, epoch=1, dtype=torch.bfloat16, output_dir=tmp_path)
    tensors = load_file(tmp_path / "epoch_1" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "epoch_1" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"


def test_an_export_after_a_validation_is_of_the_trained_weights(tmp_path: Path) -> None:
    """FSDP2 leaves the root's parameters whole then, in bf16: not what is trained, rounded."""
    world = init_world("cpu", needs_mesh=True)
    try:
        decoder = meta_decoder()
        checkpointer = scratch(decoder, folder=tmp_path)
        parallelize(decoder, world, dtype=torch.bfloat16)
        load_weights(decoder, checkpointer, world, seed=0)
        with torch.no_grad():
            decoder(torch.zeros(1, 4, dtype=torch.long))
        save_weights(
            decoder, checkpointer, world, epoch=1, dtype=torch.float32, output_dir=tmp_path
        )
    finally:
        close_world()
    tensors = load_file(tmp_path / "epoch_1" / "model.safetensors")
    trained = loaded(meta_decoder()).state_dict()
    assert torch.equal(tensors["model.embed_tokens.weight"], trained["tok_embeddings.weight"])


def trained_lora_decoder() -> TransformerDecoder:
    decoder = loaded(meta_lora_decoder())
    torch.manual_seed(1)
    for parameter in get_adapter_params(decoder).values():
        torch.nn.init.normal_(parameter)
    return decoder


def test_adapters_are_merged_into_the_exported_weights(tmp_path: Path) -> None:
    """W + (alpha / rank) B A = W + 2 B A."""
    decoder = trained_lora_decoder()
    v_proj = decoder.layers[0].attn.v_proj
    expected = v_proj.weight + 2 * v_proj.lora_b.weight @ v_proj.lora_a.weight
    save_weights(
        decoder,
        scratch(decoder, folder=tmp_path),
        CPU,
        epoch=1,
        dtype=torch.float32,
        output_dir=tmp_path,
    )
    tensors = load_file(tmp_path / "epoch_1" / "model.safetensors")
    torch.testing.assert_close(tensors["model.layers.0.self_attn.v_proj.weight"], expected.detach())


def test_merging_leaves_the_decoder_as_it_is(tmp_path: Path) -> None:
    """An export in mid-run must not merge the adapters into what is trained on."""
    decoder = trained_lora_decoder()
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    save_weights(
        decoder,
        scratch(decoder, folder=tmp_path),
        CPU,
        epoch=1,
        dtype=torch.float32,
        output_dir=tmp_path,
    )
    assert same_state(before, dict(decoder.state_dict()))


@pytest.mark.parametrize("adapter_only", [False, True])
def test_adapters_are_saved_beside_the_merged_weights(adapter_only: bool, tmp_path: Path) -> None:
    decoder = trained_lora_decoder()
    checkpointer = scratch(decoder, folder=tmp_path)
    save_weights(
        decoder,
        checkpointer,
        CPU,
        epoch=1,
        dtype=torch.float32,
        output_dir=tmp_path,
        adapter_only=adapter_only,
    )
    adapters = load_file(tmp_path / "epoch_1" / "adapter" / "adapter_model.safetensors")
    assert len(adapters) == len(get_adapter_params(decoder))
    name = "layers.0.attn.v_proj.lora_b.weight"
    theirs = "base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"
    assert torch.equal(adapters[theirs], decoder.get_parameter(name))
    assert (tmp_path / "epoch_1" / "model.safetensors").exists() != adapter_only


def test_an_adapter_added_to_its_base_is_the_merged_model(tmp_path: Path) -> None:
    """In transformers' names and order of rotary dimensions: W + (lora_alpha / r) B A; the config
    names the folder of W by its whole path."""
    with torch.device("meta"):
        decoder = lora_llama3(**LORA | {"lora_attn_modules": ["q_proj", "k_proj"]}, **TINY)
    start = scratch(meta_decoder(), folder=tmp_path / "base")
    start.save_checkpoint({"model": start.weights}, epoch=1)
    component = {"_component_": "steerlm2.checkpoints.HFCheckpointer"}
    component["checkpoint_dir"] = os.path.relpath(tmp_path / "base")
    checkpointer = open_checkpointer(
        component, decoder, tiny_tokenizer(), seed=0, output_dir=str(tmp_path)
    )
    load_weights(decoder, checkpointer, CPU, seed=0)
    for parameter in get_adapter_params(decoder).values():
        torch.nn.init.normal_(parameter)
    save_weights(decoder, checkpointer, CPU, epoch=1, dtype=torch.float32, output_dir=tmp_path)
    export = tmp_path / "epoch_1"
    config = json.loads((export / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base/epoch_1"
    assert (config["task_type"], config["r"], config["lora_alpha"]) == ("CAUSAL_LM", 4, 8)
    base = load_file(tmp_path / config["base_model_name_or_path"] / "model.safetensors")
    adapter = load_file(export / "adapter" / "adapter_model.safetensors")
    merged = load_file(export / "model.safetensors")
    for module in ("q_proj", "k_proj"):
        name = f"model.layers.0.self_attn.{module}"
        b, a = (adapter[f"base_model.model.{name}.lora_{which}.weight"] for which in "BA")
        expected = base[f"{name}.weight"] + 2 * b @ a
        torch.testing.assert_close(merged[f"{name}.weight"], expected)


def test_without_a_component_weights_start_from_the_seed() -> None:
    checkpointer = open_checkpointer(
        None, meta_decoder(), tiny_tokenizer(), seed=0, output_dir="out"
    )
    assert isinstance(checkpointer, ScratchCheckpointer)


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has 512 tokens, the model only .*model\.vocab_size=512"):
        open_checkpointer(
            None, meta_decoder(vocab_size=500), tiny_tokenizer(), seed=0, output_dir="unused"
        )


def test_a_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    component = {"_component_": "torchtune.training.FullModelHFCheckpointer"}
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} has no config.json.*tune download"):
        open_checkpointer(
            component | {"checkpoint_dir": str(tmp_path)},
            meta_decoder(),
            tiny_tokenizer(),
            seed=0,
            output_dir="out",
        )


# Attribute models: LoRA


def attribute_decoder(*, lora: bool = False) -> TransformerDecoder:
    """On the meta device; under LoRA the adapters and the head are trained."""
    with torch.device("meta"):
        decoder = lora_llama3(**LORA, **TINY) if lora else llama3(**TINY)
        add_reward_head(decoder, 2)
    if lora:
        set_trainable_params(decoder, get_adapter_params(decoder))
        decoder.output.requires_grad_()
    return decoder


def attribute_model(folder: Path, *, lora: bool = False, seed: int = 0) -> tuple[Any, Any]:
    decoder = attribute_decoder(lora=lora)
    checkpointer = open_reward_checkpointer(
        None,
        decoder,
        tiny_tokenizer(),
        extra_id_template(),
        AttributeSchema(("humor", "verbosity")),
        seed=seed,
        output_dir=str(folder),
        load_head=False,
    )
    load_weights(decoder, checkpointer, CPU, seed=seed, fresh_head=lora)
    return decoder, checkpointer


def train(decoder: TransformerDecoder, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Steps on tokens from the global random generator."""
    for _ in range(steps):
        logits = decoder(torch.randint(512, (2, 5)))
        (logits.square().mean() - logits.mean()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def changed(decoder: TransformerDecoder) -> dict[str, Tensor]:
    """All trained parameters are made something else; the state of the decoder after it."""
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return {name: tensor.clone() for name, tensor in decoder.state_dict().items()}


def test_lora_trains_the_head_and_the_adapters(tmp_path: Path) -> None:
    """The head is fresh: with a frozen one the scores would be random directions."""
    decoder, _ = attribute_model(tmp_path, lora=True)
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    trained = [p for p in decoder.parameters() if p.requires_grad]
    train(decoder, torch.optim.AdamW(trained, lr=1e-2), 2)
    moved = {name for name, t in decoder.state_dict().items() if not torch.equal(t, before[name])}
    assert moved == {*get_adapter_params(decoder), "output.weight"}


def exported_adapter(folder: Path, **options: Any) -> tuple[TransformerDecoder, dict[str, Tensor]]:
    decoder, checkpointer = attribute_model(folder, lora=True)
    changed(decoder)
    save_weights(
        decoder, checkpointer, CPU, epoch=1, dtype=torch.float32, output_dir=folder, **options
    )
    return decoder, load_file(folder / "epoch_1" / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("adapter_only", [False, True])
def test_the_adapter_of_an_attribute_model_has_its_head(adapter_only: bool, tmp_path: Path) -> None:
    """Under the name that PEFT gives a module which is saved whole, beside q's and v's A and B."""
    decoder, tensors = exported_adapter(tmp_path, adapter_only=adapter_only)
    head = tensors.pop("base_model.model.score.weight")
    assert torch.equal(head, decoder.output.weight)
    assert len(tensors) == 4
    assert all(".lora_A." in name or ".lora_B." in name for name in tensors)


def test_the_adapters_config_names_the_head(tmp_path: Path) -> None:
    exported_adapter(tmp_path)
    file = tmp_path / "epoch_1" / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]


def test_the_adapter_of_a_language_model_names_no_head(tmp_path: Path) -> None:
    decoder = trained_lora_decoder()
    save_weights(
        decoder,
        scratch(decoder, folder=tmp_path),
        CPU,
        epoch=1,
        dtype=torch.float32,
        output_dir=tmp_path,
    )
    file = tmp_path / "epoch_1" / "adapter" / "adapter_config.json"
    assert "modules_to_save" not in json.loads(file.read_text())


def test_the_merged_attribute_model_has_the_trained_head(tmp_path: Path) -> None:
    decoder, _ = exported_adapter(tmp_path)
    tensors = load_file(tmp_path / "epoch_1" / "model.safetensors")
    assert torch.equal(tensors["score.weight"], decoder.output.weight)
    assert "lm_head.weight" not in tensors
