"""QLoRA through `tune run`, from a checkpoint: NF4 weights in one process and over FSDP2."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torchao.dtypes.nf4tensor import to_nf4
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

if TYPE_CHECKING:
    from tests.recipes.conftest import RunFolder, TuneProcess

QLORA = (
    *("steerlm2_distributed", "--config", "tiny/steerlm2"),
    "model=steerlm2.models.from_checkpoint",
    "model.lora_attn_modules=[q_proj,v_proj,output_proj]",
    "model.apply_lora_to_mlp=true",
    *("model.lora_rank=4", "model.lora_alpha=8", "model.quantize_base=true"),
    *("~model.vocab_size", "~model.num_layers", "~model.num_heads", "~model.num_kv_heads"),
    *("~model.embed_dim", "~model.intermediate_dim", "~model.max_seq_len"),
    *("~model.rope_base", "~model.norm_eps"),
    "checkpointer._component_=steerlm2.checkpoints.HFCheckpointer",
    *("dataset.num_records=4", "dataset.responses_per_prompt=4", "global_batch_size=4"),
    *("dataset_val=null", "val_every_n_steps=null", "generation=null"),
    *("max_steps=6", "save_every_n_steps=3", "keep_last_n_checkpoints=2"),
    *("lr=2e-3", "lr_scheduler.warmup_steps=0"),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """`checkpointer.checkpoint_dir=` a folder of transformers."""
    folder = tmp_path_factory.mktemp("base")
    sizes = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512}
    layers = {"num_attention_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 256}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, **layers)).save_pretrained(folder)
    return f"checkpointer.checkpoint_dir={folder}"


@pytest.fixture(scope="module")
def runs(
    tune: TuneProcess,
    base: str,
    run_folder: type[RunFolder],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, RunFolder]:
    """By name: one process; two ranks, those resumed from step 3."""
    folders = {name: tmp_path_factory.mktemp("run") / "run" for name in ("one", "two")}
    for name, nproc in (("one", None), ("two", 2)):
        tune(*QLORA, base, f"output_dir={folders[name]}", nproc=nproc)
    return {name: run_folder(folder) for name, folder in folders.items()}


def losses(run: RunFolder) -> list[float]:
    return [row["loss"] for row in run.entries() if "loss" in row]


def test_two_ranks_give_the_loss_of_one_process(runs: dict[str, RunFolder]) -> None:
    assert losses(runs["two"]) == pytest.approx(losses(runs["one"]), rel=1e-4)


def test_adapters_learn(runs: dict[str, RunFolder]) -> None:
    """All 4 groups are in every step."""
    loss = losses(runs["one"])
    assert loss[-1] < 0.9 * loss[0]


def test_checkpoints_hold_only_the_adapters(runs: dict[str, RunFolder]) -> None:
    """2 layers x 6 matrices x A and B of rank 4, three times (AdamW) in float32: 3 x 4 x 26,624
    bytes; the base has 3.3 million numbers."""
    state = runs["two"].path / "checkpoints" / "step_000006"
    assert sum(file.stat().st_size for file in state.glob("*.distcp")) < 1e6


def test_resumed_ranks_give_the_losses_of_the_uninterrupted_run(
    runs: dict[str, RunFolder], base: str, tune: TuneProcess, run_folder: type[RunFolder]
) -> None:
    run = runs["two"]
    expected = run.entries()
    for file in (run.path / "checkpoints" / "step_000006").iterdir():
        file.unlink()
    tune(*QLORA, base, f"output_dir={run.path}", "resume_from_checkpoint=true", nproc=2)
    assert run_folder(run.path).entries() == expected


def test_another_lora_alpha_is_refused(
    runs: dict[str, RunFolder], base: str, tune: TuneProcess
) -> None:
    """The adapters fit, but count for twice as much."""
    folder = f"output_dir={runs['one'].path}"
    other = ("model.lora_alpha=16", "max_steps=8", "resume_from_checkpoint=true")
    result = tune(*QLORA, base, folder, *other, check=False)
    assert result.returncode == 1
    assert "\n  - model, lora_alpha: 8 then, 16 now\n" in result.stderr


def test_exports_are_dequantized_weights_with_the_adapters(runs: dict[str, RunFolder]) -> None:
    """k_proj has none: quantizing it again changes little. transformers loads the folder."""
    weights = runs["one"].weights()
    weight = weights["model.layers.0.self_attn.k_proj.weight"]
    again = to_nf4(weight).get_original_weight()
    assert (again - weight).norm() < 0.01 * weight.norm()
    (folder,) = runs["one"].path.glob("epoch_*")
    assert AutoModelForCausalLM.from_pretrained(Path(folder)).num_parameters() > 1e6
