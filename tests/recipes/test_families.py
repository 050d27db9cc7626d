"""Training models of every family through `tune run`: the layout over ranks changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from steerlm2.data.tokenizers import tiny_tokenizer

if TYPE_CHECKING:
    from tests.recipes.conftest import RunFolder, TuneProcess

TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 1,
    "initializer_range": 0.1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None, "head_dim": 16},
    "qwen2": {"rope_theta": 10_000.0},
    "qwen3": {"rope_theta": 10_000.0, "head_dim": 32, "tie_word_embeddings": True},
}
OF_HEADS = {"qwen2": "self_attn.q_proj.bias", "qwen3": "self_attn.q_norm.weight"}
"""Tensors whose gradients are of this rank's heads alone, or are sums over the ranks. Mistral has
none that Llama hasn't: its layouts are Llama's."""

OF_LLAMA = (
    *("vocab_size", "num_layers", "num_heads", "num_kv_heads", "embed_dim", "intermediate_dim"),
    *("max_seq_len", "rope_base", "norm_eps"),
)
"""Keys of tiny/acsft's model."""


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a family as transformers writes it, with a tokenizer."""
    path = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **TINY, **FAMILIES[request.param])
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(path)
    tiny_tokenizer().save(path)
    return path


@pytest.fixture
def train(tune: TuneProcess, folder: Path, run_folder: type[RunFolder]) -> Callable[..., RunFolder]:
    """`train(path, "key=value", nproc=2)` is a run of 2 steps at a constant rate."""

    def run(path: Path, *overrides: str, nproc: int | None = None) -> RunFolder:
        tune(
            *("sft_distributed", "--config", "tiny/acsft", f"output_dir={path}"),
            *("model=steerlm2.models.from_checkpoint", *(f"~model.{key}" for key in OF_LLAMA)),
            "checkpointer._component_=steerlm2.checkpoints.HFCheckpointer",
            *(f"checkpointer.checkpoint_dir={folder}", f"checkpointer.output_dir={path}"),
            *("dataset_val.num_records=4", "max_steps=2", "lr=1e-2"),
            # All of them in every step: tensor parallel takes a second for each new length.
            *("dataset.num_records=12", "global_batch_size=12"),
            *("lr_scheduler.warmup_steps=0", "lr_scheduler.min_lr=1e-2", "clip_grad_norm=0.1"),
            *("save_every_n_steps=null", "val_every_n_steps=2", "generation=null", "export=last"),
            *(("tensor_parallel_dim=2",) if nproc else ()),
            *overrides,
            nproc=nproc,
        )
        return run_folder(path)

    return run


@pytest.fixture(scope="module")
def one_path(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `one` trains, once a family."""
    return tmp_path_factory.mktemp("one") / "run"


@pytest.fixture
def one(train: Callable[..., RunFolder], one_path: Path, run_folder: type[RunFolder]) -> RunFolder:
    """The run of one process."""
    return run_folder(one_path) if one_path.exists() else train(one_path)


def assert_same_run(actual: RunFolder, expected: RunFolder) -> None:
    """Losses and gradient norms to 1e-4 and the exported weights to 1e-3."""
    for key in ("loss", "grad_norm", "val_loss"):
        numbers = [
            torch.tensor([row[key] for row in run.entries() if key in row])
            for run in (expected, actual)
        ]
        assert len(numbers[0]) > 0
        torch.testing.assert_close(numbers[1], numbers[0], rtol=1e-4, atol=0)
    got, wanted = actual.weights(), expected.weights()
    assert got.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert (got[name] - weight).norm() < 1e-3 * weight.norm()


@pytest.mark.parametrize("folder", OF_HEADS, indirect=True, scope="module")
def test_two_tensor_parallel_ranks_times_two_shards_train_as_one_process(
    train: Callable[..., RunFolder], one: RunFolder, folder: Path, tmp_path: Path
) -> None:
    """The biases are sharded with their projections, and the norms that all heads share have the
    sum of the ranks' gradients."""
    assert_same_run(train(tmp_path, nproc=4), one)
    start, trained = load_file(folder / "model.safetensors"), one.weights()
    assert start.keys() == trained.keys()
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    moved = f"model.layers.0.{OF_HEADS[model_type]}"
    assert (trained[moved] - start[moved]).norm() > 1e-2 * start[moved].norm()


@pytest.mark.parametrize("folder", OF_HEADS, indirect=True, scope="module")
def test_adapters_over_two_tensor_parallel_ranks_train_as_in_one_process(
    train: Callable[..., RunFolder], folder: Path, tmp_path: Path
) -> None:
    """Biases and head norms stay as they are, whoever has them."""
    lora = (
        "model.lora_attn_modules=[q_proj,k_proj,v_proj,output_proj]",
        *("model.apply_lora_to_mlp=true", "model.lora_rank=4", "model.lora_alpha=8"),
    )
    alone = train(tmp_path / "alone", *lora)
    assert_same_run(train(tmp_path / "two", *lora, nproc=2), alone)
    start, trained = load_file(folder / "model.safetensors"), alone.weights()
    for name, weight in start.items():
        adapted = "proj.weight" in name
        assert trained[name].equal(weight) != adapted


@pytest.mark.parametrize("folder", FAMILIES, indirect=True, scope="module")
def test_a_resumed_run_is_one_that_was_not_stopped_bit_for_bit(
    train: Callable[..., RunFolder], one: RunFolder, tmp_path: Path
) -> None:
    """Stopped after its first step of two."""
    save = ("save_every_n_steps=1", "resume_from_checkpoint=true")
    train(tmp_path, *save, "max_steps=1")
    resumed = train(tmp_path, *save)
    losses = [
        [row["loss"] for row in run.entries() if row["step"] == 2 and "loss" in row]
        for run in (resumed, one)
    ]
    assert losses[0] == losses[1] != []
    got, wanted = resumed.weights("model.safetensors"), one.weights()
    assert all(got[name].equal(weight) for name, weight in wanted.items())
