"""The output folder of a run: nothing that an earlier run left there is overwritten."""

from __future__ import annotations

from pathlib import Path

RUN_FILES = (
    "config.yaml",
    "metrics.jsonl",
    "samples.jsonl",
    "training_curves.png",
    "checkpoints",
    "epoch_*",
)


def set_aside_earlier_run(output_dir: Path) -> Path | None:
    """Make the folder; move an earlier run's files into `earlier_runs/1`, `2`, ... of it.

    Returns:
        The folder they were moved to, None where there was nothing.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
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
