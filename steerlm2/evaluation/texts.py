"""Length and variety of answers: what a model may change to please an attribute model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def text_metrics(texts: Sequence[str]) -> dict[str, float]:
    """`words_mean`, `words_median`, `words_p90`, `distinct_1` and `distinct_2` of answers.

    distinct_n is the number of different n-grams of words over the number of all (Li et al. 2016,
    section 5.1), over all answers together: it falls with their number and length, so it is to be
    compared between models that answered the same prompts. Without n-grams it is left out.

    Args:
        texts: at least one.
    """
    words = [text.split() for text in texts]
    lengths = [len(own) for own in words]
    metrics = {
        "words_mean": float(np.mean(lengths)),
        "words_median": float(np.median(lengths)),
        "words_p90": float(np.percentile(lengths, 90)),
    }
    for n in (1, 2):
        ngrams = [tuple(own[i : i + n]) for own in words for i in range(len(own) - n + 1)]
        if ngrams:
            metrics[f"distinct_{n}"] = len(set(ngrams)) / len(ngrams)
    return metrics
