"""Cards are found by name."""

from __future__ import annotations

import pytest
import torch

from steerlm2.planning.gpus import GPUS, find_gpu


@pytest.mark.parametrize(
    ("names", "known"),
    [
        ("h100 H100-80GB h100_80g nvidia-h100 H100-SXM5-80GB", "H100"),
        ("A100-80GB a100-80gb A100-80G A100-SXM4-80GB", "A100"),
        ("a100-40gb A100_40GB A100-SXM4-40GB A10040GB", "A100-40GB"),
        ("rtx4090 rtx-4090 RTX-4090-24GB GeForce-RTX-4090 4090", "RTX4090"),
        ("h200 H200-141GB", "H200"),
        ("l40s L40S-48GB", "L40S"),
        ("NVIDIA-B200", "B200"),
    ],
)
def test_usual_spellings_are_found(names: str, known: str) -> None:
    for name in names.split():
        assert find_gpu(name) is GPUS[known]
        assert find_gpu(name.replace("-", " ")) is GPUS[known]


@pytest.mark.parametrize("name", ["A100-81GB", "H100-40GB", "A10", "RTX4090D", "RTX3090", ""])
def test_what_is_another_card_is_not_taken_for_a_known_one(name: str) -> None:
    with pytest.raises(ValueError, match="unknown gpu"):
        find_gpu(name)


def test_an_unknown_card_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown gpu 'H1000'.*H100.*gpu_gib"):
        find_gpu("H1000")


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_bf16_is_faster_and_memory_below_the_number_in_the_name(gpu: object) -> None:
    known = find_gpu(gpu.name)  # type: ignore[attr-defined]
    assert known.flops(torch.bfloat16) > known.flops(torch.float32)
    assert known.network_bytes <= known.link_bytes < known.memory_bytes
