"""Moments of 8 bits: a state holds codes and scales, and any layout can read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torchao.optim import AdamW4bit, AdamW8bit, AdamWFp8, _AdamW
from torchao.optim.subclass_8bit import OptimState8bit

from steerlm2.checkpoints.quantized_state import (
    plain_state,
    quantizes,
    read_converted,
    split_by_form,
)
from steerlm2.checkpoints.state_reader import StateReader

SHAPE = (64, 128)
BLOCK = 256


def numbers() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def moment(values: Tensor) -> OptimState8bit:
    state = OptimState8bit.zeros(values.shape, True, BLOCK)
    state.copy_(values)
    return state


def write(folder: Path, plain: dict[str, Any]) -> set[str]:
    """A checkpoint of one parameter `w`; returns its keys."""
    keys = {f"optimizer.state.w.{key}": value for key, value in plain.items()}
    dcp.save(keys, checkpoint_id=folder, no_dist=True)
    return set(keys)


def rows(plain: dict[str, Tensor], first: int) -> dict[str, Tensor]:
    """As another rank names what it has of the moment from row `first` on."""
    return {key.replace("@0,0", f"@{first},0"): value for key, value in plain.items()}


def halves() -> dict[str, Tensor]:
    """What two ranks with half of the rows each write."""
    top, bottom = numbers().chunk(2)
    written = plain_state({"w": {"exp_avg": moment(top)}})["w"]
    return written | rows(plain_state({"w": {"exp_avg": moment(bottom)}})["w"], len(top))


def test_plain_tensors_share_memory_with_the_moment() -> None:
    state = moment(torch.zeros(SHAPE))
    plain = plain_state({"w": {"exp_avg": state, "step": torch.tensor(1.0)}})["w"]
    place = "exp_avg.OptimState8bit@0,0+64,128"
    assert plain.keys() == {f"{place}.codes", f"{place}.scale", "step"}
    plain[f"{place}.codes"].fill_(255)
    assert (state.codes == 255).all()


def test_the_same_layout_reads_its_own_parts(tmp_path: Path) -> None:
    state = moment(torch.zeros(SHAPE))
    keys = write(tmp_path, plain_state({"w": {"exp_avg": moment(numbers())}})["w"])
    present, converted = split_by_form({"w": {"exp_avg": state}}, keys, quantized=True)
    assert {f"optimizer.state.w.{key}" for key in present["w"]} == keys
    assert converted == {}


def test_another_layout_puts_parts_together(tmp_path: Path) -> None:
    """A whole moment from two halves: a block of 256 is 2 rows in both, so the codes stay as they
    are, to a step of 8 bits (a 60th of the largest number)."""
    target = moment(torch.zeros(SHAPE))
    keys = write(tmp_path, halves())
    present, converted = split_by_form({"w": {"exp_avg": target}}, keys, quantized=True)
    assert present == {}
    read_converted(converted, StateReader(tmp_path))
    got, expected = target.dequantize(), numbers()
    assert (got - expected).abs().max() < expected.abs().max() / 60


def test_moments_that_were_not_quantized_are_quantized(tmp_path: Path) -> None:
    """From a checkpoint of torch.optim.AdamW."""
    target = moment(torch.zeros(SHAPE))
    keys = write(tmp_path, {"exp_avg": numbers()})
    _, converted = split_by_form({"w": {"exp_avg": target}}, keys, quantized=True)
    read_converted(converted, StateReader(tmp_path))
    assert torch.equal(target.codes, moment(numbers()).codes)


def test_quantized_moments_become_numbers_for_another_optimizer(tmp_path: Path) -> None:
    """Those that the codes stand for."""
    target = torch.zeros(SHAPE)
    keys = write(tmp_path, halves())
    present, converted = split_by_form({"w": {"exp_avg": target}}, keys, quantized=False)
    assert present == {}
    read_converted(converted, StateReader(tmp_path))
    expected = torch.cat([moment(half).dequantize() for half in numbers().chunk(2)])
    assert torch.equal(target, expected)


def test_what_a_checkpoint_lacks_is_asked_for() -> None:
    """DCP then says what is missing."""
    present, converted = split_by_form({"w": {"exp_avg": numbers()}}, [], quantized=False)
    assert present["w"].keys() == {"exp_avg"}
    assert converted == {}


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [(AdamW8bit, True), (AdamW4bit, True), (AdamWFp8, True), (_AdamW, False)],
)
def test_optimizers_that_quantize(optimizer: Any, expected: bool) -> None:
    assert quantizes(optimizer([torch.nn.Parameter(torch.zeros(1))])) is expected
    assert not quantizes(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]))
