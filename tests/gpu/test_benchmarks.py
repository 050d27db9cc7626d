"""Benchmarks of a GPU: what they count, and where a way can't be measured, that the others are."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def benchmark(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> Any:
    """The module of a script, and its command line."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    return importlib.import_module(name)


def test_a_padded_pass_that_memory_does_not_hold_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In the second of three steps."""
    gpu = benchmark(
        *("gpu", monkeypatch, "--device", "cpu", "--no-compile", "--warm-up", 1, "--rounds", 2),
        *("--n", 2, "--prompt", 8, "--response", 4, "--groups", 1, "--json", tmp_path / "out"),
    )
    padded = gpu.padded_single_pass_step
    calls: list[int] = []

    def of_little_memory(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("logits of a group")
        padded(*arguments)

    monkeypatch.setattr(gpu, "padded_single_pass_step", of_little_memory)
    gpu.main()
    found = json.loads((tmp_path / "out").read_text())
    assert len(calls) == 2
    assert {"ours_tokens_per_second", "reference_time_ratio"} <= found.keys()
    assert not any(key.startswith("padded_") for key in found)


def test_our_sequences_are_padded_as_those_of_the_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = benchmark(
        *("gpu", monkeypatch, "--device", "cpu", "--no-compile", "--warm-up", 0, "--rounds", 1),
        *("--n", 2, "--prompt", 8, "--response", 4, "--groups", 1),
    )
    monkeypatch.setattr(gpu.World, "padding_multiple", 64)
    response_logps = gpu.response_logps
    lengths: list[int] = []

    def noted(model: Any, batch: Any, world: Any) -> torch.Tensor:
        lengths.append(len(batch.tokens_T))
        return response_logps(model, batch, world)

    monkeypatch.setattr(gpu, "response_logps", noted)
    gpu.main()
    assert set(lengths) == {64}


def test_a_frozen_weight_needs_no_gradient_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of 8 tokens and two responses of 3, of the tiny decoder with adapters: 2 layers of
    frozen weights (64 x 64, 64 x 32, 64 x 32, 64 x 64; three of 64 x 128; norms of 64 and 64), and
    adapters of rank 8 beside all but the keys' matrix."""
    gpu = benchmark("gpu", monkeypatch)
    model = gpu.llama(argparse.Namespace(model="8b_lora", device="cpu"))
    frozen = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64)
    adapters = 2 * 8 * (2 * (64 + 64) + (64 + 32) + 3 * (64 + 128))
    group = gpu.Group([1] * 8, [[1] * 3] * 2)
    expected = (4 * frozen + 6 * adapters) * group.num_tokens
    expected += 12 * 2 * 64 * group.num_pairs + 4 * 64 * 400 * 6
    assert gpu.needed_flops(model, [group]) == expected


def test_a_log_prob_layer_that_fails_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sizes = ("--vocabulary", 64, "--tokens", 32, "--hidden", 16, "--json", tmp_path / "out")
    layers = benchmark("logprob_memory", monkeypatch, *sizes)

    def broken(*tensors: torch.Tensor) -> torch.Tensor:
        raise TypeError("another signature")

    monkeypatch.setitem(layers.WAYS, "torch", broken)
    monkeypatch.setattr(layers, "runs_here", lambda way, device: way != "liger")
    layers.main()
    found = json.loads((tmp_path / "out").read_text())
    assert found["torch_failure"] == "TypeError: another signature"
    assert {"full_seconds", "ours_seconds"} <= found.keys()
