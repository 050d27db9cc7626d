"""The ranks of a `tune run`, for tests that stop or kill some of them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any


def workers(launcher: Any) -> list[int]:
    """The processes of the ranks that torchrun, or the fork server, started, in their order."""
    file = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    return sorted(
        pid
        for pid in map(int, file.read_text().split())
        if b"/recipes/" in (command := Path(f"/proc/{pid}/cmdline").read_bytes())
        or b"fork_server" in command
    )


def stopped_until_named(launcher: Any, folder: Path, partial: str) -> str:
    """Stop the second of two ranks, after four lines of the output, until the log of the first
    names it; then let the run go on to its end.

    Args:
        folder: of the logs.
        partial: the incomplete output, in that folder.

    Returns:
        What the run wrote to stderr.
    """
    output, log = folder / partial, folder / "logs" / "rank_000.log"
    while not output.exists() or output.read_bytes().count(b"\n") < 4:
        assert launcher.poll() is None, launcher.communicate()
        time.sleep(0.001)
    stopped = workers(launcher)[1]
    os.kill(stopped, signal.SIGSTOP)
    while "All wait for rank 1" not in log.read_text():
        assert launcher.poll() is None
        time.sleep(0.02)
    os.kill(stopped, signal.SIGCONT)
    stderr: str = launcher.communicate()[1]
    assert launcher.returncode == 0, stderr
    return stderr


def ranks_with_logs(folder: Path) -> list[int]:
    """The ranks whose log in FOLDER/logs begins with who they are, of two."""
    return [
        rank
        for rank in range(len(list(folder.glob("logs/*"))))
        for log in [folder / "logs" / f"rank_{rank:03d}.log"]
        if f"rank {rank} of 2, process " in log.read_text().splitlines()[0]
    ]
