"""Dynamic batching: texts of different callers are scored together, in one packed sequence.

While the model is busy, texts wait in a queue; then all of them, up to a token budget, form the
next batch. An idle model starts at once, without waiting for further texts.

Many texts have a common prefix: the same system prompt, or the same conversation with different
answers. Common prefixes are computed once (`share_prefixes`).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from steerlm2.data.packing import RewardGroup

log = logging.getLogger(__name__)

Text = list[int]
"""The tokens of a text, up to the one where its scores are read."""
Scores = list[float]
"""A text's score for every attribute, in the order of the schema."""

LARGEST_GROUP = 64
"""The largest number of texts in a group. A choice: the search for the best groups takes time in
proportion to it, and longer groups save little more (a prefix is computed 64 times less often)."""


class QueueFullError(Exception):
    """More texts than the queue has room for."""


class ScoringError(Exception):
    """The model failed on a text."""


class Scorer(Protocol):
    """The part of an `AttributeModel` that the batcher uses."""

    def score(self, groups: Sequence[RewardGroup]) -> list[list[Scores]]:
        """Of each response of each group, all of them finite."""
        ...


@dataclass
class Waiting:
    """A text in the queue."""

    text: Text
    scores: asyncio.Future[Scores]


class Batcher:
    """A queue of texts in front of a model, which runs in its own thread.

    Args:
        max_tokens: tokens of a batch, without the prefix that a text shares with the first one. A
            longer text is scored alone, so 1 switches batching off.
        max_queue: texts that can wait.
        on_batch: called with the number of texts of every batch.
    """

    def __init__(
        self,
        model: Scorer,
        *,
        max_tokens: int,
        max_queue: int,
        on_batch: Callable[[int], None] = lambda num_texts: None,
    ) -> None:
        self.model = model
        self.max_tokens = max_tokens
        self.max_queue = max_queue
        self.on_batch = on_batch
        self._waiting: deque[Waiting] = deque()
        self._arrived = asyncio.Event()

    def __len__(self) -> int:
        """The number of waiting texts."""
        return len(self._waiting)

    async def score(self, texts: Sequence[Text]) -> list[Scores]:
        """The scores of the texts, in their order. If it is cancelled, waiting texts are withdrawn.

        Raises:
            QueueFullError: where the queue has no room for all of them; then none is scored.
            ScoringError: where the model fails on one of them.
        """
        if len(self._waiting) + len(texts) > self.max_queue:
            raise QueueFullError
        loop = asyncio.get_running_loop()
        mine = [Waiting(text, loop.create_future()) for text in texts]
        self._waiting.extend(mine)
        self._arrived.set()
        try:
            return await asyncio.gather(*(waiting.scores for waiting in mine))
        except BaseException:
            for waiting in mine:
                waiting.scores.cancel()
            self._waiting = deque(w for w in self._waiting if not w.scores.done())
            raise

    async def run(self) -> None:
        """Score waiting texts, batch after batch, until cancelled."""
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, thread_name_prefix="model") as thread:
            while True:
                await self._arrived.wait()
                batch = self._take()
                if not batch:
                    self._arrived.clear()
                    continue
                self.on_batch(len(batch))
                texts = [waiting.text for waiting in batch]
                results = await loop.run_in_executor(thread, self._score, texts)
                for waiting, result in zip(batch, results, strict=True):
                    if waiting.scores.done():  # its caller has gone
                        continue
                    if isinstance(result, ScoringError):
                        waiting.scores.set_exception(result)
                    else:
                        waiting.scores.set_result(result)

    def _take(self) -> list[Waiting]:
        """The texts of the next batch, from the head of the queue."""
        batch: list[Waiting] = []
        tokens = 0
        while self._waiting:
            text = self._waiting[0].text
            tokens += len(text) - (num_shared(batch[0].text, text) if batch else 0)
            if batch and tokens > self.max_tokens:
                break
            batch.append(self._waiting.popleft())
        return batch

    def _score(self, texts: list[Text]) -> list[Scores | ScoringError]:
        try:
            return [*score_texts(self.model, texts)]
        except Exception as error:
            if len(texts) > 1:  # only callers whose texts fail alone get the error
                return [result for text in texts for result in self._score([text])]
            log.exception("the model failed on a text of %d tokens", len(texts[0]))
            return [ScoringError(f"the model failed: {type(error).__name__}")]


def score_texts(model: Scorer, texts: Sequence[Text]) -> list[Scores]:
    """The scores of the texts, in their order; common prefixes are computed once."""
    groups = share_prefixes(texts)
    scores: list[Scores] = [[]] * len(texts)
    for group, of_group in zip(groups, model.score(groups), strict=True):
        for index, of_text in zip(group.responses_kept, of_group, strict=True):
            scores[index] = of_text
    return scores


def share_prefixes(texts: Sequence[Text]) -> list[RewardGroup]:
    """The texts as groups with few tokens in total: a group's prompt is a common prefix.

    In sorted order the texts with the longest common prefixes are neighbours, so a group is a run
    of them. Dynamic programming finds the runs that save the most tokens: a run of n texts with a
    common prefix of m tokens saves (n - 1) * m.

    Returns:
        Groups whose `responses_kept` are the indices of their texts in `texts`.
    """
    order = sorted(range(len(texts)), key=lambda index: texts[index])
    ordered = [texts[index] for index in order]
    common = [num_shared(*pair) for pair in itertools.pairwise(ordered)]
    best = [(0, 0)]  # for the first i texts: tokens saved, and start of the last run
    for stop in range(1, len(texts) + 1):
        shared = len(ordered[stop - 1]) - 1  # without the last token, where the scores are read
        options = [(best[stop - 1][0], stop - 1)]
        for start in range(stop - 2, max(-1, stop - 1 - LARGEST_GROUP), -1):
            shared = min(shared, common[start], len(ordered[start]) - 1)
            options.append((best[start][0] + (stop - start - 1) * shared, start))
        best.append(max(options))
    groups = []
    stop = len(texts)
    while stop > 0:
        start = best[stop][1]
        run = ordered[start:stop]
        shared = min(num_shared(run[0], run[-1]), *(len(text) - 1 for text in run))
        groups.append(
            RewardGroup(
                prompt=run[0][:shared],
                responses=[text[shared:] for text in run],
                responses_kept=order[start:stop],
            )
        )
        stop = start
    return groups


def num_shared(one: Text, other: Text) -> int:
    """The length of the common prefix of two texts, in tokens.

    By halves, each compared at once: token by token, to compare the texts of a full queue would
    take so long that nothing else is answered meanwhile.
    """
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while high - low > 1:  # the first `low` are shared, the first `high` aren't
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low
