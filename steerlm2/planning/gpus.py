"""Memory and rates of GPUs from data sheets: FLOPs without sparsity, one direction of a link."""

from __future__ import annotations

import re
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


SAME = {"A100-80GB": "A100", "H100-80GB": "H100", "H200-141GB": "H200", "B200-192GB": "B200"}
SAME |= {"L40S-48GB": "L40S", "RTX4090-24GB": "RTX4090", "4090": "RTX4090"}
"""Other names that people have for these."""

_NOT_TOLD_APART = re.compile(r"[\s_-]|nvidia|geforce|tesla|hbm2e|hbm3e?|sxm[45]?")


def find_gpu(name: str) -> Gpu:
    """The GPU of a name in any case and spelling: A100-80GB, nvidia_h100, RTX 4090.

    Raises:
        ValueError: for a GPU that isn't in the list.
    """
    names = {known: known for known in GPUS} | SAME
    found = {_plain(each): known for each, known in names.items()}.get(_plain(name))
    if found is None:
        raise ValueError(
            f"unknown gpu {name!r}: it can be {', '.join(GPUS)} (gpu_gib=... gives the memory of "
            "one that is like these)"
        )
    return GPUS[found]


def _plain(name: str) -> str:
    text = _NOT_TOLD_APART.sub("", name.lower())
    return re.sub(r"(?<=\d)(gib|g)$", "gb", text)
