"""Watches m, the mean of Q_theta / Q' over a prompt's samples, which should stay near 1."""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Literal, TypeAlias

Cause: TypeAlias = Literal["unlike", "leak", "memorised, probably", "memorised", "left out"]

LOWEST, HIGHEST = 0.7, 1.4
"""Outside of them m is worth a warning: about a third of the probability has moved."""
STEPS = 20
"""Logged steps that it is looked at over; a single one can be far off by a few groups. A validation
counts for as many."""


class RatioWatch:
    """Says once, of each cause, why m has left its range over the last logged steps.

    Args:
        baseline: share of the baseline of the loss.
        unlike_q: how the training samples were drawn, where not from Q' itself; "" where they were
            (`unlike_samples_of_q`).
        missing: share of the draws that aren't there, duplicates aside (`share_missing`). Where
            the loss moves all probability to the others, m comes to 1 / (1 - missing).
    """

    def __init__(self, baseline: float, unlike_q: str = "", missing: float = 0.0) -> None:
        self.baseline = baseline
        self.unlike_q = unlike_q
        self.missing = missing
        self._recent: deque[float] = deque(maxlen=STEPS)
        self._validation: float | None = None
        self._age = 0
        self._said: set[Cause] = set()

    def validated(self, mean_ratio: float) -> None:
        """Take note of m on validation groups."""
        self._validation, self._age = mean_ratio, 0

    def trained(self, mean_ratio: float) -> str | None:
        """Take note of a logged step's m; a warning, if there is a new one."""
        self._recent.append(mean_ratio)
        self._age += 1
        if self._age >= STEPS:
            self._validation = None
        typical = median(self._recent)
        if len(self._recent) < STEPS or LOWEST <= typical <= HIGHEST:
            return None
        cause = self._cause(typical)
        if cause in self._said:
            return None
        self._said |= {"memorised, probably", cause} if cause == "memorised" else {cause}
        return (
            f"WARNING: mean_ratio, the mean of Q_theta / Q' over the samples, is {typical:.2g} in "
            f"the last {STEPS} logged steps, where it should stay near 1. {self._text(cause)}"
        )

    def _cause(self, typical: float) -> Cause:
        if self.unlike_q:
            return "unlike"
        if typical < LOWEST:
            return "leak"
        if self._validation is not None:
            return "memorised" if self._validation <= HIGHEST else "left out"
        return "left out" if self.missing > 1 - 1 / HIGHEST else "memorised, probably"

    def _text(self, cause: Cause) -> str:
        if cause == "unlike":
            # At the start weights m is 1 whatever was sampled from, so that only the records tell.
            return (
                f"But the samples aren't from Q' itself ({self.unlike_q}), so that m needn't stay "
                "near 1, and can't tell whether probability leaks to strings that nobody sampled, "
                "or the samples are memorised: samples of temperature=1 top_p=1 would."
            )
        if cause == "leak":
            remedy = "lower loss.baseline" if self.baseline > 0 else "lower lr"
            return f"Probability leaks to strings that nobody sampled: {remedy}, or sample again."
        if cause == "left out":
            missing = f": {self.missing:.0%} of the draws" if self.missing else ""
            return (
                "The samples lack much of what Q' gives (answers that were cut off or left out"
                f"{missing}), or aren't from Q': keep or complete them (max_new_tokens)."
            )
        remedy = "raise loss.baseline, train" if self.baseline < 1 else "train"
        remedy += " for fewer steps, or sample again."
        if cause == "memorised, probably":
            return (
                "Probably the training samples are being memorised (a validation now would tell): "
                f"{remedy}"
            )
        return (
            f"On validation groups it is {self._validation:.2g}: the training samples are being "
            f"memorised; {remedy}"
        )
