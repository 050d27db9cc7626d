"""Soak of the steering server: many clients, half of them streaming, some dropping in mid-stream.

    python tests/benchmarks/serve_steerlm.py                       # what tiny/quickstart has left
    python tests/benchmarks/serve_steerlm.py --engine vllm
    python tests/benchmarks/serve_steerlm.py --seconds 10 checkpointer.checkpoint_dir=DIR

Starts a server on 127.0.0.1, asks every question alone, then loads the server for `--seconds` and
compares each answer with the one that was given alone; a part of the streams is left after the
first pieces. Says how long answers took, and what the server holds before and after: memory,
descriptors, requests. Then it sends SIGTERM while streams run, which must come to their end. Ends
by itself; other arguments go to the server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from server_process import Server, serving, serving_vllm, usage

from steerlm2.checkpoint_dirs import newest_export

QUESTIONS = [
    f"What is the capital of {country}?"
    for country in ("France", "Spain", "Italy", "Norway", "Egypt", "Peru", "Japan", "Kenya")
]
MODEL = Path("steerlm2_outputs/quickstart/steerlm2_iter2")
MAX_SEQ_LEN = 512
PATH = "/v1/chat/completions"
IDLE_SECONDS = 6.0
"""After which httpx, by which a vLLM server is asked, gives idle connections up (5)."""
DROPPED = 0.2
"""Share of the streams that are left, which are half of the requests."""


def held(server: Server) -> dict[str, float]:
    """Megabytes of memory, descriptors, and requests that are answered."""
    time.sleep(IDLE_SECONDS)
    asyncio.run(alone(server, bodies(1)))  # a request makes the engine's client close idle ones
    found = usage(server.process.pid)
    metrics = httpx.get(f"{server.url}/metrics", trust_env=False).text
    running = re.search(r"^steerlm2_running_requests (\S+)$", metrics, re.MULTILINE)
    assert running is not None
    return {
        "MB": round(found["MB"]),
        "descriptors": found["descriptors"],
        "requests": float(running[1]),
    }


@contextmanager
def engine(args: argparse.Namespace) -> Iterator[list[str]]:
    """Overrides that make the server use the engine, which runs as long."""
    if args.engine == "local":
        yield []
        return
    model = newest_export(args.model) or args.model
    with serving_vllm(model, args.threads, MAX_SEQ_LEN) as url:
        yield [
            "checkpointer=null",
            "tokenizer._component_=steerlm2.data.hf_tokenizer",
            f"tokenizer.path={model}",
            f"server.url={url}",
            f"max_seq_len={MAX_SEQ_LEN}",
        ]


@dataclass
class Load:
    """What came of loading a server."""

    counts: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    first_seconds: list[float] = field(default_factory=list)
    """To the first piece of a stream."""


def bodies(number: int) -> list[dict[str, Any]]:
    """Requests of which each has one right answer."""
    rng = random.Random(0)
    return [
        {
            "messages": [{"role": "user", "content": rng.choice(QUESTIONS)}],
            "attributes": {"humor": rng.randrange(5), "verbosity": rng.randrange(5)},
            **{"seed": i, "max_tokens": 48, "scores": i % 4 == 0},
        }
        for i in range(number)
    ]


async def streamed(
    client: httpx.AsyncClient, url: str, body: dict[str, Any], pieces: int | None, found: Load
) -> str | None:
    """The text of a stream; None where it was left after so many pieces."""
    started, texts = time.perf_counter(), []
    async with client.stream("POST", f"{url}{PATH}", json=body | {"stream": True}) as answer:
        if answer.status_code != 200:
            return f"status {answer.status_code}"
        async for line in answer.aiter_lines():
            if not line.startswith("data: "):
                continue
            if not texts:
                found.first_seconds.append(time.perf_counter() - started)
            if line == "data: [DONE]":
                return "".join(texts)
            event = json.loads(line[6:])
            if "error" in event:
                return f"error {event['error']['message']}"
            texts += [choice["delta"].get("content") or "" for choice in event["choices"]]
            if pieces is not None and len(texts) >= pieces:
                return None
    return "a stream without its end"


async def whole(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> str:
    answer = await client.post(f"{url}{PATH}", json=body)
    if answer.status_code != 200:
        return f"status {answer.status_code}"
    return str(answer.json()["choices"][0]["message"]["content"])


async def load(
    server: Server, asked: list[dict[str, Any]], expected: list[str], clients: int, seconds: float
) -> Load:
    found, end = Load(), time.perf_counter() + seconds

    async def one_client(number: int) -> None:
        rng = random.Random(number)
        async with httpx.AsyncClient(timeout=600, trust_env=False) as client:
            while time.perf_counter() < end:
                i, started = rng.randrange(len(asked)), time.perf_counter()
                text: str | None
                if number % 2:
                    text = await whole(client, server.url, asked[i])
                else:
                    pieces = rng.randrange(2, 6) if rng.random() < DROPPED else None
                    text = await streamed(client, server.url, asked[i], pieces, found)
                if text is None:
                    found.counts["dropped"] += 1
                    continue
                found.seconds.append(time.perf_counter() - started)
                found.counts["answers"] += 1
                if text != expected[i]:
                    found.counts["wrong"] += 1
                    if found.counts["wrong"] <= 3:
                        print(f"asked {i}: {text!r} instead of {expected[i]!r}")

    await asyncio.gather(*map(one_client, range(clients)))
    return found


async def end_streams(server: Server, asked: list[dict[str, Any]], expected: list[str]) -> int:
    """How many of 8 streams that ran at SIGTERM gave their whole answer."""
    begun = asyncio.Semaphore(0)

    async def one(i: int) -> bool:
        texts = []
        async with (
            httpx.AsyncClient(timeout=600, trust_env=False) as client,
            client.stream(
                "POST", f"{server.url}{PATH}", json=asked[i] | {"stream": True}
            ) as answer,
        ):
            async for line in answer.aiter_lines():
                begun.release()
                if line == "data: [DONE]":
                    return "".join(texts) == expected[i]
                if line.startswith("data: "):
                    event = json.loads(line[6:])
                    texts += [choice["delta"].get("content") or "" for choice in event["choices"]]
        return False

    streams = [asyncio.create_task(one(i)) for i in range(8)]
    for _ in streams:
        await begun.acquire()
    server.process.send_signal(signal.SIGTERM)
    return sum(await asyncio.gather(*streams))


async def alone(server: Server, asked: list[dict[str, Any]]) -> list[str]:
    async with httpx.AsyncClient(timeout=600, trust_env=False) as client:
        return [await whole(client, server.url, body) for body in asked]


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[int(len(values) * share)] if values else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1, help="of the model")
    parser.add_argument("--engine", choices=["local", "vllm"], default="local")
    parser.add_argument("--model", type=Path, default=MODEL, help="that a vLLM server serves")
    args, overrides = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends the server too
    asked = bodies(64)
    with (
        engine(args) as of_engine,
        serving("serve_steerlm", args.threads, *of_engine, *overrides) as server,
    ):
        expected = asyncio.run(alone(server, asked))
        # A first load, so that what is held afterwards is a leak and not a warm-up.
        asyncio.run(load(server, asked, expected, args.clients, min(5.0, args.seconds)))
        before = held(server)
        found = asyncio.run(load(server, asked, expected, args.clients, args.seconds))
        after = held(server)
        print(f"{args.clients} clients, {args.seconds:g} s: {dict(found.counts)}")
        print(f"answers per second {found.counts['answers'] / args.seconds:.1f}")
        for name, values in (("answer", found.seconds), ("first piece", found.first_seconds)):
            shown = ", ".join(f"p{p} {percentile(values, p / 100):.2f}" for p in (50, 95, 99))
            print(f"seconds to the {name}: {shown}")
        print(f"held before {before}, after {after}")
        ended = asyncio.run(end_streams(server, asked, expected))
        print(f"{ended} of 8 streams came to their end after SIGTERM", end="")
        print(f"; exit status {server.process.wait(60)}")


if __name__ == "__main__":
    main()
