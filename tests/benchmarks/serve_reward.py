"""Throughput of the reward server: one client, many clients, and many without batching.

    python tests/benchmarks/serve_reward.py                                   # the tiny model
    python tests/benchmarks/serve_reward.py --seconds 30 model.embed_dim=512 model.num_layers=8

Starts two servers on 127.0.0.1, one of them with a batch of one text, and loads them in turns for
`--seconds` each, `--rounds` times. Every answer is compared with the scores that the same server
gave beforehand, asked for one text at a time. Ends by itself; other arguments go to both servers.

CPU time is that of the server, user and system: on a shared machine it says more than the clock.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from server_process import Server, serving

WORDS = ("a", "the", "of", "and", "is", "to", "it", "has", "you", "for", "this", "capital", "good")
"""Each is one token of the tiny tokenizer."""

TOLERANCE = 1e-5


def requests(kind: str, number: int) -> list[bytes]:
    """HTTP requests to score one text each.

    conversations: a question of 5 to 30 tokens and an answer of 20 to 60
    texts: such an answer alone
    answers: such answers to one and the same question of 800 tokens
    """
    rng = random.Random(0)
    found = []
    for _ in range(number):
        question = "a " * 800 if kind == "answers" else words(rng, 5, 30)
        answer = words(rng, 20, 60)
        turns = [{"from": "User", "value": question}, {"from": "Assistant", "value": answer}]
        content = {"conversations": [{"conversations": turns}]}
        body = json.dumps({"texts": [answer]} if kind == "texts" else content).encode()
        head = (
            "POST /v1/attributes HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        found.append(head.encode() + body)
    return found


def words(rng: random.Random, fewest: int, most: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(fewest, most)))


def cpu_seconds(server: Server) -> float:
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Client:
    """One keep-alive connection."""

    async def connect(self, port: int) -> None:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", port)

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """(status, body)"""
        self.writer.write(request)
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        assert length is not None, head
        return int(head[9:12]), await self.reader.readexactly(int(length[1]))


@dataclass
class Load:
    """What came of loading a server."""

    answers: int
    wrong: int
    errors: int
    seconds: float
    cpu_seconds: float
    latencies: list[float]

    @property
    def rate(self) -> float:
        return self.answers / self.seconds

    @property
    def cpu_rate(self) -> float:
        return self.answers / self.cpu_seconds

    def __add__(self, other: Load) -> Load:
        return Load(*(getattr(self, name) + getattr(other, name) for name in vars(self)))


def scores(body: bytes) -> list[float]:
    (only,) = json.loads(body)["scores"]
    return list(only.values())


async def load(
    server: Server,
    asked: Sequence[bytes],
    expected: Sequence[list[float]],
    clients: int,
    seconds: float,
) -> Load:
    """Each client asks as soon as it has its answer, for so many seconds."""
    found = Load(0, 0, 0, 0.0, 0.0, [])
    rng = random.Random(clients)
    cpu, started = cpu_seconds(server), time.perf_counter()

    async def one_client() -> None:
        client = Client()
        await client.connect(server.port)
        while time.perf_counter() < started + seconds:
            i = rng.randrange(len(asked))
            sent = time.perf_counter()
            status, body = await client.ask(asked[i])
            found.latencies.append(time.perf_counter() - sent)
            if status != 200:
                found.errors += 1
                continue
            found.answers += 1
            pairs = zip(scores(body), expected[i], strict=True)
            found.wrong += max(abs(score - wanted) for score, wanted in pairs) > TOLERANCE
        client.writer.close()

    await asyncio.gather(*(one_client() for _ in range(clients)))
    found.seconds = time.perf_counter() - started
    found.cpu_seconds = cpu_seconds(server) - cpu
    return found


async def one_at_a_time(server: Server, asked: Sequence[bytes]) -> list[list[float]]:
    client = Client()
    await client.connect(server.port)
    found = [scores((await client.ask(request))[1]) for request in asked]
    client.writer.close()
    return found


async def measure(
    batching: Server, single: Server, asked: Sequence[bytes], args: argparse.Namespace
) -> dict[str, Load]:
    plans = {
        "(a) 1 client": (batching, 1),
        f"(b) {args.clients} clients": (batching, args.clients),
        f"(c) {args.clients} clients, batches of 1": (single, args.clients),
    }
    expected = {server.port: await one_at_a_time(server, asked) for server in (single, batching)}
    found: dict[str, Load] = {}
    for _ in range(args.rounds):
        for name, (server, clients) in plans.items():
            new = await load(server, asked, expected[server.port], clients, args.seconds)
            found[name] = found[name] + new if name in found else new
    return found


def report(found: dict[str, Load]) -> None:
    print(
        f"{'':<32}{'req/s':>8}{'per CPU s':>11}{'p50 ms':>8}{'p99 ms':>8}{'wrong':>7}{'errors':>8}"
    )
    for name, of_load in found.items():
        latencies = sorted(of_load.latencies)
        p50, p99 = (1000 * latencies[int(len(latencies) * share)] for share in (0.5, 0.99))
        print(
            f"{name:<32}{of_load.rate:>8.0f}{of_load.cpu_rate:>11.0f}{p50:>8.1f}{p99:>8.1f}"
            f"{of_load.wrong:>7}{of_load.errors:>8}"
        )
    one, many, unbatched = found.values()
    print(f"(b)/(a) {many.rate / one.rate:.2f}, per CPU second {many.cpu_rate / one.cpu_rate:.2f}")
    print(
        f"(b)/(c) {many.rate / unbatched.rate:.2f}, per CPU second "
        f"{many.cpu_rate / unbatched.cpu_rate:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=5.0, help="of one load")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1, help="of the model")
    parser.add_argument(
        "--kind", choices=["conversations", "texts", "answers"], default="conversations"
    )
    args, overrides = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends the servers too
    asked = requests(args.kind, 128)
    with (
        serving("serve_reward", args.threads, *overrides) as batching,
        serving("serve_reward", args.threads, *overrides, "max_tokens_per_microbatch=1") as single,
    ):
        report(asyncio.run(measure(batching, single, asked, args)))


if __name__ == "__main__":
    main()
