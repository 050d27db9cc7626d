"""Batches: whose texts they hold, what they cost, and that nobody notices them."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence

import pytest

from steerlm2.data.packing import RewardGroup
from steerlm2.serving.batcher import (
    Batcher,
    QueueFullError,
    Scores,
    ScoringError,
    Text,
    num_shared,
    share_prefixes,
)

BAD = 99
"""A token that the model of these tests fails on."""


class FakeModel:
    """Scores a text with (its number of tokens, their sum); notes its batches, and can be held."""

    def __init__(self) -> None:
        self.batches: list[list[Text]] = []
        self.go_on = threading.Event()
        self.go_on.set()

    def score(self, groups: Sequence[RewardGroup]) -> list[list[Scores]]:
        self.go_on.wait(10)
        whole = [[[*g.prompt, *response] for response in g.responses] for g in groups]
        self.batches.append([text for texts in whole for text in texts])
        return [[self._score_one(text) for text in texts] for texts in whole]

    def _score_one(self, text: Text) -> Scores:
        if BAD in text:
            raise RuntimeError("boom")
        return [float(len(text)), float(sum(text))]


def score_of(text: Text) -> Scores:
    return [float(len(text)), float(sum(text))]


def with_batcher(batcher: Batcher, use: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        worker = asyncio.create_task(batcher.run())
        await use()
        worker.cancel()

    asyncio.run(run())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


def texts_of(groups: Sequence[RewardGroup]) -> dict[int, Text]:
    return {
        place: [*group.prompt, *response]
        for group in groups
        for place, response in zip(group.responses_kept, group.responses, strict=True)
    }


def partitions(places: list[int]) -> Iterator[list[list[int]]]:
    """All ways to put places into groups."""
    if not places:
        yield []
        return
    first, *rest = places
    for groups in partitions(rest):
        yield [[first], *groups]
        for i, group in enumerate(groups):
            yield [*groups[:i], [first, *group], *groups[i + 1 :]]


def cost(texts: Sequence[Text]) -> int:
    """Tokens of a group: n texts that share m tokens, none of them a text's last, take m once."""
    shared = 0
    while all(len(text) > shared + 1 and text[shared] == texts[0][shared] for text in texts):
        shared += 1
    return sum(map(len, texts)) - (len(texts) - 1) * shared


@pytest.mark.parametrize("seed", range(40))
def test_groups_hold_every_text_with_the_fewest_tokens(seed: int) -> None:
    """Against all partitions of 5 texts over an alphabet of two, where much is shared by chance."""
    rng = random.Random(seed)
    texts = [rng.choices([1, 2], k=rng.randint(1, 6)) for _ in range(5)]
    groups = share_prefixes(texts)
    assert texts_of(groups) == dict(enumerate(texts))
    assert all(len(response) > 0 for group in groups for response in group.responses)
    fewest = min(
        sum(cost([texts[i] for i in places]) for places in split)
        for split in partitions([*range(5)])
    )
    assert sum(group.num_tokens for group in groups) == fewest


def test_one_system_prompt_is_computed_once() -> None:
    """10 texts of 100 + 5 tokens: 100 + 10 x 5, not 10 x 105; another one of 8 stands apart."""
    texts = [[*range(100), 200 + i, 1, 1, 1, 2] for i in range(10)]
    groups = share_prefixes([*texts, [7] * 8])
    assert sorted(group.num_tokens for group in groups) == [8, 150]


def test_what_comes_while_the_model_is_busy_makes_the_next_batch() -> None:
    """The first text starts at once and alone; the 5 that come meanwhile are one batch."""
    model = FakeModel()
    sizes: list[int] = []
    batcher = Batcher(model, max_tokens=1000, max_queue=10, on_batch=sizes.append)
    texts = [[1, 2, i] for i in range(6)]

    async def use() -> None:
        model.go_on.clear()
        first = asyncio.create_task(batcher.score(texts[:1]))
        await until(lambda: sizes == [1])
        others = [asyncio.create_task(batcher.score([text])) for text in texts[1:]]
        await until(lambda: len(batcher) == 5)
        model.go_on.set()
        assert await asyncio.gather(first, *others) == [[score_of(text)] for text in texts]

    with_batcher(batcher, use)
    assert sizes == [1, 5]


@pytest.mark.parametrize(
    ("max_tokens", "expected"),
    [
        (1, [1, 1, 1, 1]),  # batching switched off
        (10, [1, 1, 1, 1]),  # 10 + 1 tokens don't fit
        (11, [2, 2]),  # 10, and 1 beyond the 9 that are shared
        (13, [4]),
    ],
)
def test_budget_counts_what_is_shared_once(max_tokens: int, expected: list[int]) -> None:
    """4 texts of 10 tokens that share 9."""
    model = FakeModel()
    texts = [[*range(9), 10 + i] for i in range(4)]
    batcher = Batcher(model, max_tokens=max_tokens, max_queue=10)

    async def use() -> None:
        assert await batcher.score(texts) == [score_of(text) for text in texts]

    with_batcher(batcher, use)
    assert [len(batch) for batch in model.batches] == expected


def test_a_full_queue_takes_a_request_whole_or_not_at_all() -> None:
    """Room for 3: of 2 + 2 the second request is refused, a later one of 1 is not."""
    model = FakeModel()
    batcher = Batcher(model, max_tokens=1, max_queue=3)

    async def use() -> None:
        model.go_on.clear()
        running = asyncio.create_task(batcher.score([[1]]))
        await until(lambda: len(batcher) == 0 and not running.done())
        waiting = asyncio.create_task(batcher.score([[2], [3]]))
        await until(lambda: len(batcher) == 2)
        with pytest.raises(QueueFullError):
            await batcher.score([[4], [5]])
        last = asyncio.create_task(batcher.score([[6]]))
        await until(lambda: len(batcher) == 3)
        model.go_on.set()
        await asyncio.gather(running, waiting, last)

    with_batcher(batcher, use)
    assert model.batches == [[[1]], [[2]], [[3]], [[6]]]


def test_cancelled_requests_leave_the_queue() -> None:
    model = FakeModel()
    batcher = Batcher(model, max_tokens=1, max_queue=10)

    async def use() -> None:
        model.go_on.clear()
        running = asyncio.create_task(batcher.score([[1]]))
        await until(lambda: len(batcher) == 0 and not running.done())
        gone = asyncio.create_task(batcher.score([[2], [3]]))
        stays = asyncio.create_task(batcher.score([[4]]))
        await until(lambda: len(batcher) == 3)
        gone.cancel()
        await until(lambda: len(batcher) == 1)
        model.go_on.set()
        assert await stays == [score_of([4])]
        await running

    with_batcher(batcher, use)
    assert model.batches == [[[1]], [[4]]]


def test_only_the_caller_of_a_bad_text_gets_an_error() -> None:
    """In one batch with good ones; the next batch is scored as if nothing had been."""
    model = FakeModel()
    batcher = Batcher(model, max_tokens=1000, max_queue=10)

    async def use() -> None:
        good, bad, mixed = await asyncio.gather(
            batcher.score([[1, 2], [3]]),
            batcher.score([[4, BAD]]),
            batcher.score([[5], [BAD]]),
            return_exceptions=True,
        )
        assert good == [score_of([1, 2]), score_of([3])]
        assert isinstance(bad, ScoringError)
        assert isinstance(mixed, ScoringError)
        assert await batcher.score([[6]]) == [score_of([6])]

    with_batcher(batcher, use)


@pytest.mark.parametrize("length", [0, 1, 2, 3, 7, 64])
def test_the_common_prefix_is_found_wherever_it_ends(length: int) -> None:
    """Texts that differ at every place, and those of which one goes on."""
    text = list(range(length))
    assert num_shared(text, [*text, 1000]) == length
    for place in range(length):
        other = [*text[:place], -1, *text[place + 1 :], 5]
        assert num_shared(text, other) == num_shared(other, text) == place
