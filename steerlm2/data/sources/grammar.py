"""The grammar of `steerlm2.data.grammar` as a source of conversations and of prompts.

It reads no file. The argument `source` is the split of the pairs of a question and a label:

    held_out  training data have the pairs of the grammar's training split, validation data those
              that it holds out
    all       both have all pairs
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from steerlm2.data.grammar import LabelRule, Split, grammar_conversations, grammar_prompts
from steerlm2.data.sources.base import SplitRecord, Unit
from steerlm2.data.sources.rows import Split as SourceSplit

HELD_OUT, ALL = "held_out", "all"


def grammar_draws(
    source: str,
    *,
    num: int,
    num_val: int,
    seed: int = 0,
    labels: LabelRule | None = "sampled",
) -> Iterator[Unit]:
    """Questions with answers drawn from P(y|x): training conversations, then validation ones.

    With labels and "held_out" the answers don't follow P(y|x): draws with the label of a held-out
    pair are left out of training. Without labels, or with "all", they do.

    Args:
        source: "held_out" or "all", as above.
        num: training conversations.
        num_val: validation conversations; 0: none.
        seed: of the draws.
        labels: "sampled" from P(a|x,y); "rounded" scores; None: answers without a label.

    Raises:
        ValueError: for invalid arguments.
    """
    _check_source(source)
    if num < 1 or num_val < 0:
        raise ValueError(f"num must be at least 1 and num_val at least 0, got {num} and {num_val}")
    if labels not in ("sampled", "rounded", None):
        raise ValueError(f"labels must be 'sampled', 'rounded' or null, got {labels!r}")
    return _draws(source, num, num_val, seed, labels)


def grammar_pairs_to_ask(source: str) -> Iterator[SplitRecord]:
    """Every pair of a question and a label as a SteerLM2 record without responses.

    Args:
        source: "held_out": the training pairs for training, the held-out ones for validation;
            "all": all of them for training.

    Raises:
        ValueError: for another source.
    """
    _check_source(source)
    if source == ALL:
        return _asked("all", "train")
    return itertools.chain(_asked("train", "train"), _asked("validation", "validation"))


def _asked(pairs: Split, split: SourceSplit) -> Iterator[SplitRecord]:
    for record in grammar_prompts(pairs):
        yield SplitRecord(**vars(record), split=split)


def _draws(
    source: str, num: int, num_val: int, seed: int, labels: LabelRule | None
) -> Iterator[Unit]:
    counts: dict[SourceSplit, int] = {"train": num, "validation": num_val}
    for split, count in counts.items():
        pairs: Split = split if source == HELD_OUT else "all"
        # With the same pairs and the same seed two splits would have the same draws.
        own_seed = random.Random(f"{seed}:{split}").getrandbits(32)
        for conversation in grammar_conversations(count, own_seed, pairs, labels=labels):
            yield Unit([conversation], split)


def _check_source(source: str) -> None:
    if source not in (HELD_OUT, ALL):
        raise ValueError(
            f"the grammar's source must be '{HELD_OUT}' or '{ALL}' (which pairs of a question and "
            f"a label are for training), got {source!r}"
        )
