"""Losses that a config names, and what is said of a schedule."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from steerlm2.losses import SteerLM2Loss, group_log_softmax, mean_over_groups, sum_by_group
from steerlm2.training.setup import build_loss, warmup_note

EXAMPLE = (
    torch.tensor([-1.0, -2.0, -3.0], requires_grad=True),
    torch.tensor([-2.0, -2.0, -2.0]),
    torch.tensor([0.5, 0.5, 1.0]),
    torch.tensor([2, 1]),
    torch.tensor([2, 4, 3]),
)


def squared(
    logps_N: Tensor, log_q_N: Tensor, w_N: Tensor, sizes_G: Any, lengths_N: Any, factor: float = 1
) -> Tensor:
    """factor * mean over groups of the sum of (w' - b')^2."""
    b_N = group_log_softmax(logps_N - log_q_N, sizes_G).exp()
    return factor * mean_over_groups(sum_by_group((w_N - b_N).square(), sizes_G))


class Tempered:
    """As SteerLM2Loss, with a temperature."""

    def __init__(self, temperature: float, normalize: str = "none") -> None:
        self.temperature, self.normalize = temperature, normalize

    def __call__(self, *arguments: Tensor) -> Tensor:
        logps_N, *others = arguments
        return SteerLM2Loss(self.normalize)(logps_N / self.temperature, *others)  # type: ignore[arg-type]


def shared(
    logps_N: Tensor, log_q_N: Tensor, w_N: Tensor, sizes_G: Any, lengths_N: Any,
    baseline: float = 1, samples_per_prompt: Any = None, drawn_G: Any = None,
) -> Tensor:  # fmt: skip
    """SteerLM2Loss as a function."""
    loss = SteerLM2Loss(baseline=baseline, samples_per_prompt=samples_per_prompt)
    return loss(logps_N, log_q_N, w_N, sizes_G, lengths_N, drawn_G)


class Shared(Tempered):
    """With attributes that can't be."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(1.0)
        vars(self).update(attributes)


BROKEN = {
    "a baseline that is no share": lambda: Shared(baseline=None),
    "draws that are no number": lambda: Shared(samples_per_prompt="all"),
    "no callable": lambda: 5.0,
    "too few arguments": lambda: lambda logps_N: logps_N.sum(),
    "a text": lambda: lambda *arguments: "loss",
    "a loss for each response": lambda: lambda logps_N, *_: logps_N,
    "no gradient": lambda: lambda logps_N, *_: logps_N.detach().sum(),
    "a sum": lambda: lambda logps_N, *_: logps_N.sum(),
    "a mean over responses": lambda: lambda logps_N, *_: logps_N.mean(),
    "nan": lambda: lambda logps_N, *_: logps_N.sum() * float("nan"),
    "other shapes": lambda: lambda logps_N, log_q_N, *_: logps_N @ log_q_N[:1],
}


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's own that has the losses above."""
    own = types.ModuleType("own_losses")
    vars(own).update(squared=squared, shared=shared, Tempered=Tempered)
    vars(own).update({name.replace(" ", "_"): make for name, make in BROKEN.items()})
    monkeypatch.setitem(sys.modules, own.__name__, own)
    return own.__name__


def test_a_function_of_log_probs_is_the_loss_with_its_arguments_filled_in(module: str) -> None:
    """b' = 0.731, 0.269 and 1: (0.231^2 + 0.231^2) / 2 = 0.0534, twice that with factor 2."""
    loss = build_loss({"_component_": f"{module}.squared", "factor": 2.0}, "mean_response_length")
    assert loss(*EXAMPLE).item() == pytest.approx(0.10678, abs=1e-4)


def test_what_is_read_of_a_loss_may_be_arguments_of_a_function(module: str) -> None:
    """So that its samples are checked as those of SteerLM2Loss are."""
    given = {"baseline": 0.5, "samples_per_prompt": "recorded"}
    loss = build_loss({"_component_": f"{module}.shared", **given}, "mean_response_length")
    assert vars(loss) == given
    with pytest.raises(
        ValueError, match=r"`baseline` of own_losses.shared must be a number from 0"
    ):
        build_loss({"_component_": f"{module}.shared", "baseline": 2}, "mean_response_length")


@pytest.mark.parametrize("normalize", ["mean_response_length", "none"])
def test_a_class_makes_the_loss_and_gets_normalize_where_it_takes_it(
    module: str, normalize: Any
) -> None:
    loss = build_loss({"_component_": f"{module}.Tempered", "temperature": 1.0}, normalize)
    assert loss(*EXAMPLE).item() == SteerLM2Loss(normalize)(*EXAMPLE).item()


def test_a_normalize_that_a_loss_would_not_see_is_refused(module: str) -> None:
    with pytest.raises(ValueError, match="'steerlm2"):
        build_loss({"_component_": f"{module}.squared"}, "none")


@pytest.mark.parametrize("kind", BROKEN)
def test_what_cannot_be_trained_with_is_refused_before_a_model_is_built(
    module: str, kind: str
) -> None:
    with pytest.raises(ValueError, match=f"own_losses.{kind.replace(' ', '_')}"):
        build_loss({"_component_": f"{module}.{kind.replace(' ', '_')}"}, "mean_response_length")


@pytest.mark.parametrize(("steps", "warmup"), [(2, 10), (10, 10)])
def test_a_run_that_ends_in_its_warmup_is_noted(steps: int, warmup: int) -> None:
    note = warmup_note({"warmup_steps": warmup}, steps)
    assert f"{steps} step(s), is in the warm-up (lr_scheduler.warmup_steps={warmup})" in note


@pytest.mark.parametrize("scheduler", [{"warmup_steps": 10}, {"warmup_steps": 0}, {}])
def test_other_runs_have_no_note(scheduler: dict[str, int]) -> None:
    assert warmup_note(scheduler, 11) == ""
