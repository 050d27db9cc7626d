"""What the three training recipes do alike: they share a `TrainingRun` and the keys."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import steerlm2_distributed
from steerlm2.data.packing import targets_of
from steerlm2.facts import read_facts

if TYPE_CHECKING:
    from tests.recipes.conftest import RunFolder, TuneProcess

SHORT = (
    *("global_batch_size=4", "max_tokens_per_microbatch=512", "lr_scheduler.warmup_steps=0"),
    *("val_every_n_steps=null", "dataset_val=null"),
)
ANSWERS = ("dataset.num_records=4", "dataset.responses_per_prompt=2")
RECIPES = {
    "reward_distributed": ("tiny/reward", *SHORT, *ANSWERS),
    "sft_distributed": ("tiny/sft", *SHORT, *ANSWERS, "generation=null"),
    "steerlm2_distributed": (
        "tiny/steerlm2",
        *(key for key in SHORT if not key.startswith("max_tokens")),
        "dataset.num_records=8",
        "generation=null",
        "limit_val_batches=null",
    ),
}


SAYS = {
    "reward_distributed": ("attribute model", ("humor", "verbosity")),
    "sft_distributed": ("language model", None),  # of plain SFT no label is seen
    "steerlm2_distributed": ("language model", ("humor", "verbosity")),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_resumed_beyond_a_smaller_max_steps_the_export_is_of_the_steps_done(
    tune: TuneProcess, run_folder: type[RunFolder], tmp_path: Path, recipe: str
) -> None:
    """8 records in batches of 4: 6 steps are 3 epochs, saved twice. Resumed with max_steps=2 the
    weights are still those of step 6, and so are the folder's epoch and what it says of itself."""
    config, *keys = RECIPES[recipe]
    run = run_folder(tmp_path / "run")
    common = (recipe, "--config", config, *keys, "save_every_n_steps=3", f"output_dir={run.path}")
    tune(*common, "max_steps=6")
    weights = run.weights()
    (folder,) = run.path.glob("epoch_*")
    folder.rename(tmp_path / "first_export")
    again = tune(*common, "max_steps=2", "resume_from_checkpoint=true")
    assert [path.name for path in run.path.glob("epoch_*")] == ["epoch_3"]
    assert f"weights: {run.path}/epoch_* (of step 6)" in again.stdout
    assert all(run.weights()[name].equal(weights[name]) for name in weights)
    facts = read_facts(run.path)
    assert facts is not None
    assert facts.template == {"_component_": "steerlm2.data.extra_id_template"}
    assert (facts.kind, facts.schema and facts.schema.names) == SAYS[recipe]
    assert facts.trained["steps"] == 6


@pytest.mark.parametrize("recipe", ["sft_distributed", "steerlm2_distributed"])
def test_answers_of_no_tokens_are_refused(tune: TuneProcess, tmp_path: Path, recipe: str) -> None:
    config, *_ = RECIPES[recipe]
    key = "generation.max_new_tokens"
    failed = tune(
        recipe, "--config", config, f"{key}=0", f"output_dir={tmp_path / 'run'}", check=False
    )
    assert failed.returncode == 1
    assert f"'{key}' must be at least 1, got 0" in failed.stderr


def test_a_rank_without_a_group_adds_nothing_whatever_the_loss_gives_for_none() -> None:
    """The mean of no log-probs is nan."""
    recipe = object.__new__(steerlm2_distributed.SteerLM2Recipe)
    recipe.loss_fn = lambda logps_N, *_: logps_N.mean()
    logps_N = torch.zeros(0, requires_grad=True)
    loss = recipe._loss(logps_N, targets_of([]))
    loss.backward()
    assert loss.item() == 0
