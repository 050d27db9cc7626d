"""Which groups make up which optimizer step: a function of the seed and the step alone.

A run that is resumed at a step, on any number of ranks, sees the very groups it would have seen.
"""

from __future__ import annotations

import torch


def steps_per_epoch(num_groups: int, global_batch_size: int) -> int:
    """Optimizer steps of a pass over the data; the last one may have fewer groups."""
    return -(-num_groups // global_batch_size)


def batch_of_step(
    step: int, num_groups: int, global_batch_size: int, seed: int, shuffle: bool = True
) -> list[int]:
    """Indices of the groups of an optimizer step (counted from 0), all ranks together."""
    epoch, place = divmod(step, steps_per_epoch(num_groups, global_batch_size))
    chosen = slice(place * global_batch_size, (place + 1) * global_batch_size)
    if not shuffle:
        return list(range(num_groups)[chosen])
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(num_groups, generator=generator)[chosen].tolist()
