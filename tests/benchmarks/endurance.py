"""Hours of training with interruptions, beside both servers under load: what does each hold?

    python tests/benchmarks/endurance.py --output DIR --hours 2

Two ranks train tiny/steerlm2, which saves its state every few steps, is ended by SIGTERM at random
moments, about every `--minutes`, and goes on by the same command. Meanwhile clients ask the servers
of tiny/serve_reward and of the model of `--model`, one request after another; each answer is
compared with the one that was given at the beginning. Every `--every` seconds the memory,
descriptors and threads of the servers and of both ranks are noted. The attribute model of `--model`
is the folder `reward` beside it.

Leaves usage.jsonl, endurance.png and endurance.md in DIR.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server_process import TUNE, serving, usage

import serve_reward
import serve_steerlm

PROCESSES = ("reward server", "steering server", "rank 0", "rank 1")
QUANTITIES = {"MB": "memory, MB", "descriptors": "descriptors", "threads": "threads"}
ROUND = 10.0
"""Seconds of load, after which its counts are noted."""
CLIENTS = 2
"""Of each server: training needs a part of the machine too."""


@dataclass
class Training:
    """A run on two ranks that is ended and goes on, again and again, in a thread of its own."""

    output: Path
    minutes: float
    """Between SIGTERMs, on average."""
    process: subprocess.Popen[bytes] | None = None
    statuses: list[int] = field(default_factory=list)
    """Of the runs that were ended."""
    ending: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        rng = random.Random(0)
        while not self.ending.is_set():
            with (self.output / "training.log").open("ab") as log:
                self.process = subprocess.Popen(self._command(), stdout=log, stderr=log)
            before, end = self._size(), float("inf")
            while time.monotonic() < end and not self.ending.wait(0.2):
                if self.process.poll() is not None:
                    self.ending.set()
                    return
                if end == float("inf") and self._size() > before:  # it has begun to train
                    end = time.monotonic() + rng.expovariate(1 / (60 * self.minutes))
            self.process.terminate()
            self.statuses.append(self.process.wait(120))

    def _command(self) -> list[str]:
        return [
            *(str(TUNE), "run", "--nproc_per_node", "2", "steerlm2_distributed"),
            *("--config", "tiny/steerlm2", f"output_dir={self.output / 'run'}"),
            *("epochs=null", "max_steps=1000000", "save_every_n_steps=10", "val_every_n_steps=50"),
            *("keep_last_n_checkpoints=2", "resume_from_checkpoint=true"),
        ]

    def ranks(self) -> dict[str, int]:
        """Process ids by name, while both run."""
        if self.process is None:
            return {}
        found = {}
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        with contextlib.suppress(OSError):
            for child in children.read_text().split():
                environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
                for variable in environment:
                    if variable.startswith(b"RANK="):
                        found[f"rank {variable[5:].decode()}"] = int(child)
        return found if len(found) == 2 else {}

    @property
    def _metrics(self) -> Path:
        return self.output / "run" / "metrics.jsonl"

    def _size(self) -> int:
        return self._metrics.stat().st_size if self._metrics.exists() else 0

    def steps(self) -> list[int]:
        """In metrics.jsonl, in order."""
        entries = map(json.loads, self._metrics.read_text().splitlines())
        return [entry["step"] for entry in entries if "loss" in entry]


@dataclass
class Loaded:
    """What came of asking a server, in all rounds."""

    answers: int = 0
    wrong: int = 0
    errors: int = 0
    slowest: float = 0.0
    """Seconds."""


def in_rounds(ending: threading.Event, one_round: Callable[[], None]) -> threading.Thread:
    def work() -> None:
        while not ending.is_set():
            one_round()

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def table(rows: list[dict[str, Any]]) -> str:
    """Medians of the first and the last fifth of the time, in Markdown."""
    lines = [
        "| process | " + " | ".join(f"{name}, first fifth | last fifth" for name in QUANTITIES),
        "|---" * (1 + 2 * len(QUANTITIES)) + "|",
    ]
    lines[0] += " |"
    for name in PROCESSES:
        own = [row for row in rows if row["process"] == name]
        first, last = (
            [row for row in own if low <= row["hours"] / rows[-1]["hours"] <= low + 0.2]
            for low in (0.0, 0.8)
        )
        cells = [
            f"{statistics.median(row[quantity] for row in part):.0f}" if part else ""
            for quantity in QUANTITIES
            for part in (first, last)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    for panel, (quantity, title) in zip(panels, QUANTITIES.items(), strict=True):
        for name in PROCESSES:
            own = [row for row in rows if row["process"] == name]
            hours, values = [row["hours"] for row in own], [row[quantity] for row in own]
            panel.plot(hours, values, ".", markersize=2, label=name)
        panel.set(title=title, xlabel="hours")
        panel.set_ylim(bottom=0)
    panels[0].legend(markerscale=5)
    figure.savefig(path, dpi=100)


@contextlib.contextmanager
def ended(ending: threading.Event, threads: list[threading.Thread]) -> Iterator[None]:
    try:
        yield
    finally:
        ending.set()
        for thread in threads:
            thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--minutes", type=float, default=5.0, help="between SIGTERMs, on average")
    parser.add_argument("--every", type=float, default=10.0, help="seconds")
    parser.add_argument("--model", type=Path, default=serve_steerlm.MODEL)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends the servers too
    args.output.mkdir(parents=True)
    asked, questions = serve_reward.requests("conversations", 128), serve_steerlm.bodies(64)
    of_reward, of_steering = Loaded(), Loaded()
    training, rows = Training(args.output, args.minutes), list[dict[str, Any]]()
    with (
        serving("serve_reward", 1) as reward,
        serving(
            "serve_steerlm",
            1,
            f"checkpointer.checkpoint_dir={args.model}",
            f"attribute_model.checkpointer.checkpoint_dir={args.model.parent / 'reward'}",
        ) as steering,
    ):
        scores = asyncio.run(serve_reward.one_at_a_time(reward, asked))
        texts = asyncio.run(serve_steerlm.alone(steering, questions))

        def load_reward() -> None:
            found = asyncio.run(serve_reward.load(reward, asked, scores, CLIENTS, ROUND))
            of_reward.answers += found.answers
            of_reward.wrong += found.wrong
            of_reward.errors += found.errors
            of_reward.slowest = max(of_reward.slowest, *found.latencies)

        def load_steering() -> None:
            found = asyncio.run(serve_steerlm.load(steering, questions, texts, CLIENTS, ROUND))
            of_steering.answers += found.counts["answers"]
            of_steering.wrong += found.counts["wrong"]
            of_steering.slowest = max(of_steering.slowest, *found.seconds)

        started, trainer = time.monotonic(), threading.Thread(target=training.run)
        trainer.start()
        loads = [in_rounds(training.ending, load) for load in (load_reward, load_steering)]
        fixed = {"reward server": reward.process.pid, "steering server": steering.process.pid}
        with (
            ended(training.ending, [trainer, *loads]),
            (args.output / "usage.jsonl").open("w") as file,
        ):
            while (hours := (time.monotonic() - started) / 3600) < args.hours:
                if training.ending.wait(args.every):
                    raise SystemExit(f"the training ended by itself: {args.output}/training.log")
                for name, process in (fixed | training.ranks()).items():
                    with contextlib.suppress(OSError, KeyError):  # a rank has ended
                        rows.append({"hours": hours, "process": name, **usage(process)})
                        file.write(json.dumps(rows[-1]) + "\n")
                file.flush()
    steps = training.steps()
    lines = [
        table(rows),
        "",
        f"{args.hours:g} hours; {len(training.statuses)} times ended by SIGTERM (exit statuses "
        f"{sorted(set(training.statuses))}); {len(steps)} steps, each once: "
        f"{steps == list(range(steps[0], steps[0] + len(steps)))}",
    ]
    for name, found in (("reward server", of_reward), ("steering server", of_steering)):
        lines.append(
            f"{name}: {found.answers} answers, {found.wrong} wrong, {found.errors} errors, "
            f"slowest {found.slowest:.2f} s"
        )
    (args.output / "endurance.md").write_text("\n".join(lines) + "\n")
    plot(rows, args.output / "endurance.png")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
