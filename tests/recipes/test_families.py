"""Training models of every family through `tune run`: the layout over ranks changes nothing."""

from __future__ import annotations

import json
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
    "qwen2": {"rope_theta": 10_000.0},
    "qwen3": {"rope_theta": 10_000.0, "head_dim": 32, "tie_word_embeddings": True},
}
OF_HEADS = {"qwen2": "self_attn.q_proj.bias", "qwen3": "self_attn.q_norm.weight"}
"""Tensors whose gradients are of this rank's heads alone, or are sums over the ranks."""

OF_LLAMA = (
    *("vocab_size", "num_layers", "num_heads", "num_kv_heads", "embed_dim", "intermediate_dim"),
    *("max_seq_len", "rope_base", "norm_eps"),
)
"""Keys of tiny/acsft's model."""


@pytest.fixture(scope="module", params=FAMILIES)
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


def test_two_tensor_parallel_ranks_times_two_shards_train_as_one_process(
    tune: TuneProcess, folder: Path, run_folder: type[RunFolder], tmp_path: Path
) -> None:
    """Losses and gradient norms of 3 steps, clipped, to 1e-4 and the exported weights to 1e-3: the
    biases are sharded with their projections, and the norms that all heads share have the sum of
    the ranks' gradients."""
    runs = []
    for name, nproc in (("one", None), ("four", 4)):
        path = tmp_path / name
        tune(
            *("sft_distributed", "--config", "tiny/acsft", f"output_dir={path}"),
            *("model=steerlm2.models.from_checkpoint", *(f"~model.{key}" for key in OF_LLAMA)),
            "checkpointer._component_=steerlm2.checkpoints.HFCheckpointer",
            *(f"checkpointer.checkpoint_dir={folder}", f"checkpointer.output_dir={path}"),
            *("dataset.num_records=40", "dataset_val.num_records=4", "max_steps=3", "lr=1e-2"),
            *("lr_scheduler.warmup_steps=0", "clip_grad_norm=0.1", "save_every_n_steps=null"),
            *("val_every_n_steps=3", "generation=null", "export=last"),
            *(("tensor_parallel_dim=2",) if nproc else ()),
            nproc=nproc,
        )
        runs.append(run_folder(path))
    one, four = runs
    for key in ("loss", "grad_norm", "val_loss"):
        numbers = [
            torch.tensor([row[key] for row in run.entries() if key in row]) for run in (one, four)
        ]
        assert len(numbers[0]) > 0
        torch.testing.assert_close(numbers[1], numbers[0], rtol=1e-4, atol=0)
    start, expected, got = load_file(folder / "model.safetensors"), one.weights(), four.weights()
    assert start.keys() == expected.keys() == got.keys()
    for name, weight in expected.items():
        assert (got[name] - weight).norm() < 1e-3 * weight.norm()
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    moved = f"model.layers.0.{OF_HEADS[model_type]}"
    assert (expected[moved] - start[moved]).norm() > 1e-2 * start[moved].norm()
