"""What a check is written with: its registration, its figures, and the processes that it starts.

A check is a function under `@check`. It runs in a process of its own, keeps what it measures with
`note` (also what it measured before it failed), and says with `expect` what must hold.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import runpy
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path.cwd()
"""The project's root: the driver is started there."""
GIB = 2**30


@dataclass(frozen=True)
class Check:
    """A check and how the driver treats it."""

    run: Callable[[], None]
    seconds: int
    """Its time limit."""
    least: int
    """It isn't started with fewer seconds left; so many are kept for one that runs alone."""
    alone: bool
    """It measures time: nothing else runs then."""
    needs: tuple[str, ...]
    """Checks whose results it reads."""
    rehearsed_by: str
    """The check that does the same without a GPU: a rehearsal leaves this one out."""
    named: bool
    """On a GPU it is run only where it is named: the budget hasn't room for it."""
    gpus: int
    """It is skipped where there are fewer; on a CPU they are processes."""


CHECKS: dict[str, Check] = {}
"""In the order in which they are defined."""


def check(
    seconds: int,
    *,
    least: int = 25,
    alone: bool = False,
    needs: Sequence[str] = (),
    rehearsed_by: str = "",
    named: bool = False,
    gpus: int = 1,
) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Registers a function as a check under its name."""

    def add(run: Callable[[], None]) -> Callable[[], None]:
        CHECKS[run.__name__] = Check(
            run, seconds, least, alone, tuple(needs), rehearsed_by, named, gpus
        )
        return run

    return add


@dataclass
class Context:
    """Of the check that this process runs."""

    device: str = "cuda"
    work: Path = Path()
    """The folder of all checks: others' results are read there."""
    name: str = ""
    forks: bool = False
    """Python commands run in forks of this process, which spares them their imports."""
    figures: dict[str, Any] = field(default_factory=dict)


CONTEXT = Context()


class OutsideTolerance(Exception):
    """A figure isn't what it should be."""


def note(**figures: Any) -> None:
    """Keep figures, also if the check fails or runs out of time later."""
    for key, value in figures.items():
        CONTEXT.figures[key] = float(f"{value:.4g}") if isinstance(value, float) else value
    write_result(figures=CONTEXT.figures)


def write_result(**result: Any) -> None:
    """Write what the driver reads, whole or not at all."""
    path = CONTEXT.work / f"{CONTEXT.name}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result))
    partial.replace(path)


def expect(condition: bool, why: str) -> None:
    """Raises OutsideTolerance where the condition doesn't hold."""
    if not condition:
        raise OutsideTolerance(why)


def on_gpu() -> bool:
    """Otherwise the check is rehearsed: the same code at tiny sizes on the CPU."""
    return CONTEXT.device == "cuda"


def folder(name: str = "") -> Path:
    """The folder of a check's files; without a name this check's."""
    path = CONTEXT.work / (name or CONTEXT.name)
    path.mkdir(parents=True, exist_ok=True)
    return path


class Child:
    """A command that runs beside this process in a session of its own, its output in a file.

    Args:
        fork: run a Python command in a fork of this process instead of a new interpreter.
    """

    def __init__(
        self,
        command: Sequence[Any],
        log: Path,
        *,
        env: dict[str, str] | None = None,
        fork: bool = False,
    ) -> None:
        self.log = log
        self._status: int | None = None
        self._process: subprocess.Popen | None = None
        words = [str(word) for word in command]
        if fork and words[0] == sys.executable:
            self.pid = os.fork()
            if self.pid == 0:
                _run_python(words[1:], log, env or {})
            return
        with log.open("w") as file:
            self._process = subprocess.Popen(
                words,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | (env or {}),
                start_new_session=True,
            )
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit status, below 0 for a signal; None while it runs."""
        if self._process is not None:
            return self._process.poll()
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status

    def wait(self) -> int:
        while (status := self.poll()) is None:
            time.sleep(0.02)
        return status

    def kill(self) -> None:
        """End it and all that it started; torchrun gives its ranks sessions of their own."""
        if self.poll() is None:
            for pid in [*_descendants(self.pid), self.pid]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except OSError:
                    continue  # it has ended meanwhile
        self.wait()

    def output(self) -> str:
        """All that it has written, once it has ended.

        Raises:
            RuntimeError: with the end of it where the exit status isn't 0.
        """
        status = self.wait()
        text = self.log.read_text(errors="replace")
        print(text[-6000:], flush=True)
        if status:
            raise RuntimeError(f"exit status {status}:\n" + text[-3500:])
        return text


def _descendants(pid: int) -> list[int]:
    """Of a process, as Linux knows them, the deepest first."""
    found = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            pids = [int(child) for child in children.read_text().split()]
        except OSError:
            continue
        for child in pids:
            found += [*_descendants(child), child]
    return found


def _run_python(arguments: list[str], log: Path, env: dict[str, str]) -> None:
    """What `python arguments` does, in this process and to its end."""
    status = 1
    try:
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for standard in (1, 2):
            os.dup2(file, standard)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        os.environ.update(env)
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(arguments[0]).parent))
            runpy.run_path(arguments[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, flush=True)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def start(command: Sequence[Any], *, env: dict[str, str] | None = None) -> Child:
    """A command of a check."""
    print("$", " ".join(str(part) for part in command), flush=True)
    log = folder() / f"command_{len(list(folder().glob('command_*.log'))):02}.log"
    return Child(command, log, env=env, fork=CONTEXT.forks)


def call(command: Sequence[Any], *, env: dict[str, str] | None = None) -> str:
    """The command's output; raises with its end where it fails."""
    return start(command, env=env).output()


def start_tune(
    recipe: str,
    config: str,
    *overrides: str,
    processes: int | None = None,
    env: dict[str, str] | None = None,
) -> Child:
    """`tune run` with a recipe; under torchrun where a number of processes is given."""
    if processes == 1 and CONTEXT.forks:  # what torchrun would set for the only rank
        ranks = ("RANK", "LOCAL_RANK"), ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
        env = (env or {}) | dict.fromkeys(ranks[0], "0") | dict.fromkeys(ranks[1], "1")
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        processes = None
    launch = [f"--nproc_per_node={processes}"] if processes else []
    command = [sys.executable, "-m", "torchtune._cli.tune", "run", *launch, recipe]
    return start([*command, "--config", config, *overrides], env=env)


def tune(recipe: str, config: str, *overrides: str, **options: Any) -> str:
    """The output of `tune run`."""
    return start_tune(recipe, config, *overrides, **options).output()


def entries(run: Path, key: str = "loss") -> list[dict[str, Any]]:
    """The lines of a run's metrics that have a key."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if key in row]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in entries(run)]


def largest_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Relative; infinite where they aren't as many, or one is not a number."""
    if len(ours) != len(theirs) or not all(map(math.isfinite, [*ours, *theirs])):
        return math.inf
    pairs = zip(ours, theirs, strict=True)
    return max((abs(a - b) / max(abs(b), 1e-3) for a, b in pairs), default=0.0)


def relative(ours: Any, exact: Any) -> float:
    """The norm of the difference of two tensors over the exact one's."""
    return ((ours.double() - exact).norm() / exact.norm().clamp(min=1e-12)).item()


def milliseconds(function: Callable[[], Any], repeats: int = 10) -> float:
    """Median time on the device."""
    import torch

    for _ in range(3 if on_gpu() else 1):
        function()
    if not on_gpu():
        started = time.perf_counter()
        function()
        return 1000 * (time.perf_counter() - started)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        function()
        event.record()
    torch.cuda.synchronize()
    pairs = itertools.pairwise(events)
    return statistics.median(first.elapsed_time(last) for first, last in pairs)


def waiting(function: Callable[[], Any]) -> str:
    """What synchronises host and device in it; "" where nothing does."""
    import torch

    if not on_gpu():
        function()
        return ""
    torch.cuda.set_sync_debug_mode("error")
    try:
        function()
    except RuntimeError as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(f.filename).name}:{f.lineno}" for f in frames][-6:]
        return f"{str(error).splitlines()[0][:120]} at {' > '.join(ours)}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def number_of_gpus() -> int:
    """Those that a process of this one sees."""
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return len(visible.split(","))
    return len(ask_card("index").splitlines())


def ask_card(what: str) -> str:
    """A property of the GPU as nvidia-smi names it."""
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return str(error)[-100:]
