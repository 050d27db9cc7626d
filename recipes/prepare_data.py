"""Prepare training data: read a source, split its records, write them as SteerLM2 JSONL.

    tune run prepare_data --config data/oasst_groups source=FILE output_dir=DIR

The `builder` of the config is the function that reads the source; steerlm2/data/sources holds
ours, and any other function that yields records works too.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from steerlm2.data.records import Record, write_records
from steerlm2.training.config import Component, instantiate, recipe_main


@dataclass
class PrepareDataConfig:
    """Keys of the config; the YAML explains them."""

    source: str
    output_dir: str
    builder: Component
    seed: int = 0
    train_fraction: float = 0.95

    def problems(self) -> list[str]:
        problems = []
        if "seed" in self.builder:
            problems.append("'builder.seed' is taken from 'seed': set that")
        if not 0 < self.train_fraction <= 1:
            problems.append(
                f"'train_fraction' must be above 0 and at most 1, got {self.train_fraction}"
            )
        return problems


@recipe_main(PrepareDataConfig)
def main(cfg: PrepareDataConfig) -> None:
    records = list(instantiate(cfg.builder, cfg.source, seed=cfg.seed))
    if not records:
        raise ValueError(
            f"{cfg.source} gave no records: is it the kind of file that the builder reads?"
        )
    random.Random(cfg.seed).shuffle(records)
    num_train = max(1, int(len(records) * cfg.train_fraction))
    splits = {"train.jsonl": records[:num_train], "val.jsonl": records[num_train:]}

    output_dir = Path(cfg.output_dir)
    print(f"{'file':<12} {'prompts':>8} {'responses':>10} {'per prompt':>11}")
    for name, split in splits.items():
        if split:
            write_records(output_dir / name, split)
            print(_table_row(name, split))
        elif (output_dir / name).exists():
            # An earlier run's validation records may be training records now.
            (output_dir / name).unlink()
            print(f"{name:<12} removed: left by an earlier run with another split")
    train_file = (output_dir / "train.jsonl").absolute()
    print(f"\nNext: run the recipe score_responses on {train_file}")


def _table_row(name: str, records: Sequence[Record]) -> str:
    sizes = [len(record.responses) for record in records]
    return f"{name:<12} {len(sizes):>8} {sum(sizes):>10} {f'{min(sizes)} to {max(sizes)}':>11}"


if __name__ == "__main__":
    main()
