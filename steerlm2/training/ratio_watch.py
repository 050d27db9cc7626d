"""Watches m, the mean of Q_theta / Q' over a prompt's samples, which should stay near 1."""

from __future__ import annotations

from collections import deque
from statistics import median

LOWEST, HIGHEST = 0.7, 1.4
"""Outside of them m is worth a warning: about a third of the probability has moved."""
STEPS = 20
"""Logged steps that it is looked at over; a single one can be far off by a few groups."""


class RatioWatch:
    """Says once, of each cause, why m has left its range over the last logged steps.

    Args:
        baseline: share of the baseline of the loss.
    """

    def __init__(self, baseline: float) -> None:
        self.baseline = baseline
        self._recent: deque[float] = deque(maxlen=STEPS)
        self._first: float | None = None
        self._validation: float | None = None
        self._said: set[str] = set()

    def validated(self, mean_ratio: float) -> None:
        """Take note of m on validation groups."""
        self._validation = mean_ratio

    def trained(self, mean_ratio: float) -> str | None:
        """Take note of a logged step's m; a warning, if there is a new one."""
        if self._first is None:
            self._first = mean_ratio
        self._recent.append(mean_ratio)
        typical = median(self._recent)
        if len(self._recent) < STEPS or LOWEST <= typical <= HIGHEST:
            return None
        cause = self._cause(typical)
        if cause in self._said:
            return None
        self._said.add(cause)
        return (
            f"WARNING: mean_ratio, the mean of Q_theta / Q' over the samples, is {typical:.2g} in "
            f"the last {STEPS} logged steps, where it should stay near 1. {cause}"
        )

    def _cause(self, typical: float) -> str:
        assert self._first is not None
        if not LOWEST <= self._first <= HIGHEST:
            return (
                "It was not near 1 at the first logged step either: the samples aren't from Q' "
                "(the start weights at temperature 1 and top_p 1), or their log-probs are "
                "another's, or lr is far too high."
            )
        if typical < LOWEST:
            remedy = "lower loss.baseline" if self.baseline > 0 else "lower lr"
            return f"Probability leaks to strings that nobody sampled: {remedy}, or sample again."
        if self._validation is None:
            return (
                "Probably the training samples are being memorised (dataset_val would tell): raise "
                "loss.baseline, train for fewer steps, or sample again."
            )
        if self._validation <= HIGHEST:
            return (
                f"On validation groups it is {self._validation:.2g}: the training samples are "
                "being memorised. Raise loss.baseline, train for fewer steps, or sample again."
            )
        return (
            "So it is on validation groups: the samples lack much of what Q' gives (answers that "
            "were cut off or left out), or aren't from Q'."
        )
