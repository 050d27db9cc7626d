"""The groups of an optimizer step: a function of the seed and the step only.

A resumed run sees the same groups as a run that wasn't stopped, on any number of ranks.
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
    epoch, index = divmod(step, steps_per_epoch(num_groups, global_batch_size))
    chosen = slice(index * global_batch_size, (index + 1) * global_batch_size)
    if not shuffle:
        return list(range(num_groups)[chosen])
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(num_groups, generator=generator)[chosen].tolist()
