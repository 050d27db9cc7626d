"""Watches m, the mean of Q_theta / Q' over a prompt's samples, which should stay near 1."""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Literal, TypeAlias

Cause: TypeAlias = Literal["leak", "memorised, probably", "memorised", "samples"]

LOWEST, HIGHEST = 0.7, 1.4
"""Outside of them m is worth a warning: about a third of the probability has moved."""
STEPS = 20
"""Logged steps that it is looked at over; a single one can be far off by a few groups."""


class RatioWatch:
    """Says once, of each cause, why m has left its range over the last logged steps.

    Args:
        baseline: share of the baseline of the loss.
        unlike_q: how the training samples were drawn, where not from Q' itself; "" where they were
            (`unlike_samples_of_q`).
    """

    def __init__(self, baseline: float, unlike_q: str = "") -> None:
        self.baseline = baseline
        self.unlike_q = unlike_q
        self._recent: deque[float] = deque(maxlen=STEPS)
        self._validation: float | None = None
        self._said: set[Cause] = set()

    def validated(self, mean_ratio: float) -> None:
        """Take note of m on validation groups."""
        self._validation = mean_ratio

    def trained(self, mean_ratio: float) -> str | None:
        """Take note of a logged step's m; a warning, if there is a new one."""
        self._recent.append(mean_ratio)
        typical = median(self._recent)
        if len(self._recent) < STEPS or LOWEST <= typical <= HIGHEST:
            return None
        cause = self._cause(typical)
        if cause in self._said:
            return None
        self._said.add(cause)
        # At the start weights m is 1 whatever was sampled from, so that only the records tell.
        other = (
            f" Or it is no sign of that: the samples aren't from Q' itself, but were drawn at: "
            f"{self.unlike_q}. Then m needn't stay near 1."
        )
        return (
            f"WARNING: mean_ratio, the mean of Q_theta / Q' over the samples, is {typical:.2g} in "
            f"the last {STEPS} logged steps, where it should stay near 1. {self._text(cause)}"
            + (other if self.unlike_q else "")
        )

    def _cause(self, typical: float) -> Cause:
        if typical < LOWEST:
            return "leak"
        if self._validation is None:
            return "memorised, probably"
        return "memorised" if self._validation <= HIGHEST else "samples"

    def _text(self, cause: Cause) -> str:
        if cause == "leak":
            remedy = "lower loss.baseline" if self.baseline > 0 else "lower lr"
            return f"Probability leaks to strings that nobody sampled: {remedy}, or sample again."
        if cause == "memorised, probably":
            return (
                "Probably the training samples are being memorised (dataset_val would tell): raise "
                "loss.baseline, train for fewer steps, or sample again."
            )
        if cause == "memorised":
            return (
                f"On validation groups it is {self._validation:.2g}: the training samples are "
                "being memorised. Raise loss.baseline, train for fewer steps, or sample again."
            )
        return (
            "So it is on validation groups: the samples lack much of what Q' gives (answers that "
            "were cut off or left out), or aren't from Q'."
        )
