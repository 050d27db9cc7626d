"""Memory and rates of GPUs from data sheets: FLOPs without sparsity, one direction of a link."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Gpu:
    """Memory as PyTorch reports it (below the number in the name), rates in units per second."""

    name: str
    memory_gib: float
    bf16_flops: float
    fp32_flops: float
    memory_bytes: float
    link_bytes: float
    """To the other GPUs of its node."""
    network_bytes: float
    """To other nodes: its share of the node's network."""

    def flops(self, dtype: torch.dtype) -> float:
        return self.bf16_flops if dtype == torch.bfloat16 else self.fp32_flops


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100-40GB", 39.4, 312e12, 19.5e12, 1.55e12, 300e9, 25e9),
        Gpu("A100", 79.1, 312e12, 19.5e12, 2.0e12, 300e9, 25e9),
        Gpu("H100", 79.1, 989e12, 67e12, 3.35e12, 450e9, 50e9),
        Gpu("H200", 139.8, 989e12, 67e12, 4.8e12, 450e9, 50e9),
        Gpu("B200", 178.3, 2250e12, 75e12, 8.0e12, 900e9, 50e9),
        Gpu("L40S", 44.4, 362e12, 91.6e12, 0.86e12, 32e9, 12.5e9),
        Gpu("RTX4090", 23.5, 165e12, 82.6e12, 1.0e12, 32e9, 12.5e9),
    )
}
"""A100 and H100 are those with 80 GB on SXM boards. The network is one 400 Gbit/s link a GPU for
H100 and later, 200 Gbit/s for A100 and 100 Gbit/s for the others, as is usual in clusters."""

HOST_LINK_BYTES = 25e9
"""Between a GPU and its host's memory. An assumption: a PCIe 4 or 5 x16 link (32 or 64 GB/s) that
is shared with other GPUs."""


def find_gpu(name: str) -> Gpu:
    """The GPU of a name in any case.

    Raises:
        ValueError: for a GPU that isn't in the list.
    """
    found = {known.lower(): gpu for known, gpu in GPUS.items()}.get(name.lower())
    if found is None:
        raise ValueError(
            f"unknown gpu {name!r}: it can be {', '.join(GPUS)} (gpu_gib=... gives the memory of "
            "one that is like these)"
        )
    return found
