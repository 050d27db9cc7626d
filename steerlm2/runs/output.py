"""The output folder of a run, and moving files of an earlier run out of the way."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from steerlm2.checkpoint_dirs import resolve_checkpoint_dir
from steerlm2.distributed.world import World

RUN_FILES = (
    "config.yaml",
    "run.json",
    "run.damaged",
    "wandb_run_id",
    "torchtune_config.yaml",  # of its metric loggers
    "metrics.jsonl",
    "samples.jsonl",
    "calibration.jsonl",
    "training_curves.png",
    "checkpoints",
    "epoch_*",
)


def make_output_dir(output_dir: Path, key: str = "output_dir") -> None:
    """Make the folder if it doesn't exist, and check that it is writable.

    Args:
        key: the config key of the folder, for the error.

    Raises:
        ValueError: where it can't be made or isn't writable.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise ValueError(
            f"{key} {output_dir.absolute()} can't be written to ({error.strerror}): choose "
            "another folder"
        ) from error


def check_not_own_run(output_dir: Path, checkpointer: Mapping[str, Any] | None) -> None:
    """Check that a run doesn't start from a checkpoint in its own output_dir.

    It would move the checkpoint away, or resume the run that wrote it.

    Raises:
        ValueError: where it does.
    """
    start = checkpointer and checkpointer.get("checkpoint_dir")
    if not start:
        return
    own = [path.resolve() for pattern in RUN_FILES for path in output_dir.glob(pattern)]
    folder = resolve_checkpoint_dir(start, missing_ok=True)
    if any(folder.resolve().is_relative_to(path) for path in own):
        raise ValueError(
            f"checkpointer.checkpoint_dir {start} is of an earlier run in this run's "
            f"output_dir {output_dir}, and would be moved away: choose another output_dir"
        )


def check_shared(output_dir: Path, world: World) -> None:
    """Check that all ranks see the output folder of rank 0. Called by all ranks.

    All ranks write their shards of a checkpoint, which can be resumed only from one folder.

    Raises:
        ValueError: on every rank, where a rank doesn't see it.
    """
    if world.size == 1:
        return
    mark = output_dir / world.from_main(f".seen_by_all_{os.getpid()}_{time.time_ns()}")
    if world.is_main:
        mark.touch()
    world.barrier()
    unseen = world.max(torch.tensor(float(not mark.exists()), device=world.device)).item()
    world.barrier()
    if world.is_main:
        mark.unlink()
    if unseen:
        raise ValueError(
            f"output_dir {output_dir.absolute()} is not the same folder on all nodes: choose one "
            "on a file system that they share"
        )


def set_aside_earlier_run(output_dir: Path) -> Path | None:
    """Move an earlier run's files into `earlier_runs/1`, `2`, ... of its folder.

    Returns:
        The folder that they were moved to; None where there were none.
    """
    found = [path for pattern in RUN_FILES for path in output_dir.glob(pattern)]
    if not found:
        return None
    number = 1
    while (aside := output_dir / "earlier_runs" / str(number)).exists():
        number += 1
    aside.mkdir(parents=True)
    for path in found:
        path.rename(aside / path.name)
    return aside
