"""torchao's optimizers through `tune run`: trained, saved, and resumed on the same and other ranks.

They compile their update for each shape of a parameter, which takes a minute a run: here that is
done once, for a model of one layer and few shapes, and switched off elsewhere.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fork_server import EAGER

if TYPE_CHECKING:
    from tests.recipes.conftest import RunFolder, TuneProcess

FEW_SHAPES = (
    *("model.num_layers=1", "model.num_kv_heads=4"),
    "model.intermediate_dim=128",  # as embed_dim
)
STEERLM2 = (
    *("steerlm2_distributed", "--config", "tiny/steerlm2", "generation=null", "dataset_val=null"),
    *("val_every_n_steps=null", "max_steps=4", "save_every_n_steps=2"),
    *("keep_last_n_checkpoints=2", "optimizer._component_=torchao.optim.AdamW8bit"),
    # All of them in every step: tensor parallel takes a second for each new length.
    *("dataset.num_records=8", "dataset.responses_per_prompt=4", "global_batch_size=8"),
    *FEW_SHAPES,
)
OTHERS = {
    "sft_distributed": ("--config", "tiny/acsft", "generation=null"),
    "reward_distributed": ("--config", "tiny/reward"),
}
COMPILED = "reward_distributed"


@contextmanager
def without_compiling() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(EAGER, "1")
        yield


@pytest.fixture(scope="module")
def run_on_two(
    tune: TuneProcess, run_folder: type[RunFolder], tmp_path_factory: pytest.TempPathFactory
) -> RunFolder:
    """Tensor parallel over two ranks; saved after steps 2 and 4."""
    folder = tmp_path_factory.mktemp("run") / "run"
    with without_compiling():
        tune(*STEERLM2, "tensor_parallel_dim=2", f"output_dir={folder}", nproc=2)
    return run_folder(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "nproc", "tolerance"),
    [("tensor_parallel_dim=2", 2, 0.0), ("tensor_parallel_dim=1", 2, 1e-3)],
    ids=["same", "fsdp2"],
)
def test_a_resumed_run_goes_on(
    run_on_two: RunFolder,
    tune: TuneProcess,
    run_folder: type[RunFolder],
    tmp_path: Path,
    layout: str,
    nproc: int,
    tolerance: float,
) -> None:
    """Bit for bit on the same layout; on FSDP2 the moments' blocks are others."""
    folder = tmp_path / "run"
    shutil.copytree(run_on_two.path, folder)
    shutil.rmtree(folder / "checkpoints" / "step_000004")
    arguments = (layout, f"output_dir={folder}", "resume_from_checkpoint=true")
    with without_compiling():
        result = tune(*STEERLM2, *arguments, nproc=nproc)
    assert "resumed from" in result.stdout
    got, expected = run_folder(folder).entries(), run_on_two.entries()
    assert [row["lr"] for row in got] == [row["lr"] for row in expected]
    assert [row["loss"] for row in got] == pytest.approx(
        [row["loss"] for row in expected], rel=tolerance, abs=0
    )


@pytest.mark.slow
@pytest.mark.parametrize("recipe", OTHERS)
def test_the_other_recipes_train_and_resume(
    recipe: str, tune: TuneProcess, run_folder: type[RunFolder], tmp_path: Path
) -> None:
    """One process, bit for bit; one recipe compiled as it comes."""
    arguments = (
        *(recipe, *OTHERS[recipe], "val_every_n_steps=null", "dataset_val=null", "export=last"),
        *("dataset.num_records=48", "global_batch_size=12", "max_steps=4", "save_every_n_steps=2"),
        *("keep_last_n_checkpoints=2", "lr_scheduler.warmup_steps=1"),
        *("optimizer._component_=torchao.optim.AdamW8bit", f"output_dir={tmp_path}/run"),
        *FEW_SHAPES,
    )
    with nullcontext() if recipe == COMPILED else without_compiling():
        tune(*arguments)
        run = run_folder(tmp_path / "run")
        expected = run.entries()
        shutil.rmtree(run.path / "checkpoints" / "step_000004")
        tune(*arguments, "resume_from_checkpoint=true")
    assert run.entries() == expected


def test_bf16_weights_with_stochastic_rounding_train(
    tune: TuneProcess, run_folder: type[RunFolder], tmp_path: Path
) -> None:
    """torchao's AdamW without quantization; half of the time bf16 would not move at all."""
    with without_compiling():
        tune(
            *STEERLM2,
            "optimizer._component_=torchao.optim._AdamW",
            "optimizer.bf16_stochastic_round=true",
            *("dtype=bf16", "max_steps=8", "save_every_n_steps=null", "model.num_layers=2"),
            *("lr=1e-3", "lr_scheduler.warmup_steps=0", f"output_dir={tmp_path}/run"),
        )
    loss = [row["loss"] for row in run_folder(tmp_path / "run").entries()]
    assert loss[-1] < 0.8 * loss[0]
