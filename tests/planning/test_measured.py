"""Planned memory against what real training takes, within 10%.

The real side is a recipe's own run in processes of its own: see measured_step.py.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from fork_server import ForkServer

TORCHRUN = Path(sys.executable).with_name("torchrun")
SCRIPT = Path(__file__).with_name("measured_step.py")
MODEL = ("model.embed_dim=384", "model.intermediate_dim=1152", "model.num_layers=2")
STEPS = (
    *("max_steps=2", "lr_scheduler.warmup_steps=0", "dataset.num_records=16"),
    *("dataset_val=null", "val_every_n_steps=null", "save_every_n_steps=null"),
)
STEERLM2 = ("generation=null", "steerlm2.max_tokens_per_microbatch=1500")


@pytest.mark.parametrize(
    ("processes", "recipe", "config", "overrides"),
    [
        (1, "steerlm2_distributed", "tiny/steerlm2", STEERLM2),
        (2, "steerlm2_distributed", "tiny/steerlm2", STEERLM2),
        (
            *(4, "steerlm2_distributed", "tiny/steerlm2"),
            (*STEERLM2, "tensor_parallel_dim=2", "enable_activation_checkpointing=true"),
        ),
        (2, "sft_distributed", "tiny/sft", ("generation=null", "tensor_parallel_dim=2")),
        (2, "reward_distributed", "tiny/reward", ()),
    ],
    ids=[
        *("one process", "FSDP2 over 2", "FSDP2 over 2 x TP over 2, checkpointing"),
        *("SFT, TP over 2", "attribute model, FSDP2 over 2"),
    ],
)
def test_planned_memory_is_within_a_tenth_of_what_training_takes(
    processes: int,
    recipe: str,
    config: str,
    overrides: tuple[str, ...],
    fork_server: ForkServer,
    tmp_path: Path,
) -> None:
    """The largest micro-batch of rank 0, in its second step: parameters, gradients of earlier
    micro-batches, AdamW's moments, activations, logits, FSDP2's buffers."""
    launcher = [] if processes == 1 else [TORCHRUN, f"--nproc_per_node={processes}"]
    result = tmp_path / "result.json"
    run = fork_server.start(
        [
            *(*launcher, SCRIPT, recipe, config, result),
            *(*MODEL, *STEPS, *overrides, f"output_dir={tmp_path / 'run'}"),
        ],
        cwd=tmp_path,
        env=os.environ,
    )
    _, stderr = run.communicate()
    assert run.returncode == 0, stderr
    found = json.loads(result.read_text())
    assert found["measured"] > 40 * 2**20  # the rest of a run is lost in that
    assert sum(found["planned"].values()) == pytest.approx(found["measured"], rel=0.1)
