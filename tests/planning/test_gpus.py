"""Cards are found by name."""

from __future__ import annotations

import pytest
import torch

from steerlm2.planning.gpus import GPUS, find_gpu


def test_names_are_found_in_any_case() -> None:
    assert find_gpu("h100") is GPUS["H100"]


def test_an_unknown_card_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown gpu 'H1000'.*H100.*gpu_gib"):
        find_gpu("H1000")


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_bf16_is_faster_and_memory_below_the_number_in_the_name(gpu: object) -> None:
    known = find_gpu(gpu.name)  # type: ignore[attr-defined]
    assert known.flops(torch.bfloat16) > known.flops(torch.float32)
    assert known.network_bytes <= known.link_bytes < known.memory_bytes
