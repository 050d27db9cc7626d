"""The local engine that serves: requests together are what each is alone; each ends by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torchtune.models.llama3 import llama3
from torchtune.modules import TransformerDecoder

from steerlm2.inference.engines import Request, SamplingSettings
from steerlm2.inference.local import LocalEngine
from steerlm2.inference.local_streaming import LocalStreamingEngine
from steerlm2.inference.streaming import GenerationSettings, Piece, StreamingEngine

VOCABULARY = 48
STOP = 5
FORBIDDEN = (0, 7)
MAX_SEQ_LEN = 120


def build() -> TransformerDecoder:
    torch.manual_seed(0)
    decoder = llama3(
        vocab_size=VOCABULARY,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        embed_dim=32,
        max_seq_len=MAX_SEQ_LEN,
        intermediate_dim=48,
    )
    for parameter in decoder.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=2 / parameter.shape[1] ** 0.5)
    return decoder.eval()


def serve(
    use: Callable[[LocalStreamingEngine], Awaitable[Any]],
    *,
    stop_id: int = STOP,
    max_cache_tokens: int = 10_000,
) -> Any:
    """What a coroutine function returns that is given an engine; the engine is closed behind it."""

    async def run() -> Any:
        engine = LocalStreamingEngine(
            build(),
            stop_id=stop_id,
            forbidden_ids=FORBIDDEN,
            max_seq_len=MAX_SEQ_LEN,
            max_cache_tokens=max_cache_tokens,
        )
        try:
            return await use(engine)
        finally:
            await engine.close()

    return asyncio.run(asyncio.wait_for(run(), timeout=120))


async def pieces_of(
    engine: StreamingEngine, prompt: list[int], settings: GenerationSettings
) -> list[Piece]:
    return [piece async for piece in engine.generate(prompt, settings)]


def answers_of(pieces: list[Piece]) -> list[tuple[list[int], str | None]]:
    """The tokens and the finish reason of each answer."""
    numbers = sorted({piece.answer for piece in pieces})
    own = [[piece for piece in pieces if piece.answer == number] for number in numbers]
    assert all(piece.finish_reason is None for each in own for piece in each[:-1])
    return [
        ([token for piece in each for token in piece.tokens], each[-1].finish_reason)
        for each in own
    ]


PLAIN = GenerationSettings(40, n=3, seed=11)
REQUESTS = [
    ([1, 2, 3], PLAIN),
    ([4], GenerationSettings(70, temperature=0.7, top_p=0.9, seed=3)),
    ([6, 8, 9, 10, 11, 12, 13], GenerationSettings(1, n=2, seed=5)),
    ([2] * 30, GenerationSettings(50, n=4, top_k=3, seed=8, top_log_probs=2)),
    ([9, 9], GenerationSettings(40, temperature=0.0, n=2)),
]


def test_answers_dont_depend_on_other_requests() -> None:
    """Alone, together, and joining one after the other, though each has settings of its own."""

    async def use(engine: LocalStreamingEngine) -> None:
        alone = [answers_of(await pieces_of(engine, *request)) for request in REQUESTS]
        assert [len(answers) for answers in alone] == [3, 1, 2, 4, 2]
        assert {reason for answers in alone for _, reason in answers} == {"stop", "length"}
        assert alone[4][0] == alone[4][1]
        together = await asyncio.gather(*(pieces_of(engine, *request) for request in REQUESTS))
        assert [answers_of(pieces) for pieces in together] == alone

        tasks = []
        for request in REQUESTS[::-1]:
            tasks.append(asyncio.create_task(pieces_of(engine, *request)))
            await anext(engine.generate([1], GenerationSettings(1)))  # a few tokens later
        assert [answers_of(await task) for task in tasks[::-1]] == alone

    serve(use)


def test_answers_are_those_of_the_engine_that_samples() -> None:
    """The same seeds and settings."""
    settings = SamplingSettings(3, 1.0, 1.0, 40, STOP, FORBIDDEN)
    requests = [Request(prompt, 11 + i) for i, (prompt, _) in enumerate(REQUESTS)]
    expected = LocalEngine(build(), settings, max_cache_tokens=10_000).sample(requests)

    async def use(engine: LocalStreamingEngine) -> list[list[Piece]]:
        return await asyncio.gather(
            *(
                pieces_of(engine, list(request.prompt), replace(PLAIN, seed=request.seed))
                for request in requests
            )
        )

    for pieces, samples in zip(serve(use), expected, strict=True):
        assert answers_of(pieces) == [(one.tokens, one.finish_reason) for one in samples]


@torch.no_grad()
def test_log_probs_are_the_models() -> None:
    """Before temperature, cuts and forbidden tokens; the likeliest tokens first."""
    prompt = [3, 1, 4]
    settings = GenerationSettings(20, n=2, temperature=0.6, top_k=5, top_log_probs=3)
    silent = replace(settings, top_log_probs=None)

    async def use(engine: LocalStreamingEngine) -> list[list[Piece]]:
        return await asyncio.gather(
            *(pieces_of(engine, prompt, each) for each in (silent, settings, silent))
        )

    without, pieces, _ = serve(use, stop_id=-1)
    assert answers_of(without) == answers_of(pieces)
    assert all(piece.log_probs is None for piece in without)
    model = build()
    for number, (tokens, _) in enumerate(answers_of(pieces)):
        logps_TV = model(torch.tensor([[*prompt, *tokens]]))[0, len(prompt) - 1 :].log_softmax(-1)
        known = [one for piece in pieces if piece.answer == number for one in piece.log_probs or ()]
        assert len(known) == len(tokens) == 20
        for token, one, logps_V in zip(tokens, known, logps_TV, strict=False):
            assert one.log_prob == pytest.approx(logps_V[token].item(), abs=1e-4)
            expected = logps_V.topk(3)
            assert [each for each, _ in one.top] == expected.indices.tolist()
            assert [each for _, each in one.top] == pytest.approx(
                expected.values.tolist(), abs=1e-4
            )


def test_tokens_come_while_others_are_generated() -> None:
    """Two requests of 80 tokens take turns: when one ends, the other has begun long before."""
    settings = GenerationSettings(80)

    async def use(engine: LocalStreamingEngine) -> list[str]:
        order: list[str] = []

        async def read(name: str) -> None:
            async for _ in engine.generate([1, 2], settings):
                order.append(name)

        await asyncio.gather(read("one"), read("other"))
        return order

    order = serve(use, stop_id=-1)
    assert len(order) == 160
    assert order.index(order[-1]) < 40


def test_a_request_waits_for_room_in_the_cache() -> None:
    """With room for two of the three, the third begins when one has ended."""
    settings = GenerationSettings(30)

    async def use(engine: LocalStreamingEngine) -> list[str]:
        order: list[str] = []

        async def read(name: str, settings: GenerationSettings) -> None:
            async for _ in engine.generate([1, 2], settings):
                order.append(name)

        await asyncio.gather(
            read("long", settings),
            read("short", replace(settings, max_new_tokens=10)),
            read("third", settings),
        )
        return order

    order = serve(use, stop_id=-1, max_cache_tokens=64)
    third = order.index("third")
    assert order[:third].count("short") == 10
    assert order[:third].count("long") < 30


def test_whoever_closes_the_iterator_ends_the_generation() -> None:
    """Its place is free for who waited; the others go on as if alone."""
    long = GenerationSettings(100)

    async def use(engine: LocalStreamingEngine) -> None:
        alone = await pieces_of(engine, [4], long)
        dropped = engine.generate([1, 2], long)
        await anext(dropped)
        other = asyncio.create_task(pieces_of(engine, [4], long))
        waiting = asyncio.create_task(pieces_of(engine, [1, 2], long))
        never = asyncio.create_task(pieces_of(engine, [1, 2], long))
        await asyncio.sleep(0)
        never.cancel()
        await dropped.aclose()
        assert await other == alone
        assert len(await waiting) == 100
        while not engine._decoding.is_empty:
            await asyncio.sleep(0.01)
        assert engine._running == {}
        assert len(engine._waiting) == 0

    serve(use, stop_id=-1, max_cache_tokens=220)


@pytest.mark.parametrize(
    ("prompt", "changes", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([VOCABULARY], {}, "no tokens but 0 to 47"),
        ([1] * 81, {}, "81 tokens and max_new_tokens 40 are more than the 120"),
        ([1], {"n": 30}, "1201 tokens; the engine has room for 1000"),
        ([1], {"n": 0}, "at least 1"),
        ([1], {"max_new_tokens": 0}, "at least 1"),
        ([1], {"temperature": -1.0}, "temperature"),
        ([1], {"top_p": 0.0}, "top_p"),
        ([1], {"top_k": -1}, "top_k"),
        ([1], {"seed": -1}, "seed"),
        ([1], {"top_log_probs": VOCABULARY + 1}, "top_log_probs"),
    ],
)
def test_what_cant_be_generated_is_refused(
    prompt: list[int], changes: dict[str, Any], message: str
) -> None:
    """And the next request is answered."""

    async def use(engine: LocalStreamingEngine) -> None:
        with pytest.raises(ValueError, match=message):
            await pieces_of(engine, prompt, replace(PLAIN, **changes))
        assert len(answers_of(await pieces_of(engine, [1] * 80, PLAIN))) == 3

    serve(use, max_cache_tokens=1000)


def test_an_error_reaches_all_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that run, those that wait and those that come later."""

    async def use(engine: LocalStreamingEngine) -> list[Any]:
        running = engine.generate([1], PLAIN)
        await anext(running)

        def fail() -> None:
            raise ValueError("no memory")

        monkeypatch.setattr(engine._decoding, "advance", fail)
        ends = await asyncio.gather(
            *(pieces_of(engine, [1], PLAIN) for _ in range(3)), return_exceptions=True
        )
        for request in (running, engine.generate([1], PLAIN)):
            with pytest.raises(RuntimeError) as raised:
                [piece async for piece in request]
            ends.append(raised.value)
        return ends

    ends = serve(use)
    assert {type(end) for end in ends} == {RuntimeError}
    assert {str(end) for end in ends} == {"the local engine has stopped after an error: no memory"}


def test_closing_ends_what_is_generated() -> None:
    async def use(engine: LocalStreamingEngine) -> None:
        running = engine.generate([1], GenerationSettings(100))
        await anext(running)
        await engine.close()
        for request in (running, engine.generate([1], PLAIN)):
            with pytest.raises(RuntimeError, match="engine was closed"):
                [piece async for piece in request]

    serve(use, stop_id=-1)
