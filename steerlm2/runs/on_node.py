"""Runs a command on a node so that SIGTERM reaches the ranks that it starts.

    srun ... python -m steerlm2.runs.on_node tune run --signals-to-handle SIGINT,SIGHUP,SIGQUIT ...

Slurm signals the processes that it has started itself, not theirs; and torchrun, which starts the
ranks, would end them after 30 seconds and fail, unless --signals-to-handle leaves SIGTERM out. So
the command ignores the signal, and what comes here goes to its children: ranks that train save, and
all end with status 0. Ranks that have nothing to save die of it: in recipes that don't train,
before the first step, in the export. Where torchrun starts them again (--max_restarts), they die
again. It goes to the children again and again, because a rank that is still starting ignores it
too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

SECONDS_BETWEEN_SIGNALS = 5.0


def run(command: Sequence[str]) -> int:
    """The command's exit status; 128 and the number of the signal that ended it."""
    stopping = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True
        _signal_children(process.pid)

    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the command inherits it
    process = subprocess.Popen(command)
    signal.signal(signal.SIGTERM, stop)
    while True:
        try:
            status = process.wait(SECONDS_BETWEEN_SIGNALS)
        except subprocess.TimeoutExpired:
            if stopping:
                _signal_children(process.pid)
        else:
            return status if status >= 0 else 128 - status


def _signal_children(pid: int) -> None:
    # Ranks and threads end while they are gone through. An error would end this process, and Slurm
    # would kill the ranks that it leaves behind while they save.
    for child in _children(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGTERM)


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):  # a file for each thread
        with contextlib.suppress(OSError):
            found += map(int, children.read_text().split())
    return found


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m steerlm2.runs.on_node COMMAND...")
    sys.exit(run(sys.argv[1:]))
