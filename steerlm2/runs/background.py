"""A process in the background that ends with the one that started it, however that one ends.

This file runs as a watcher: leader of a process group of its own, and parent of the command. Its
standard input is a pipe that nobody writes to. When that closes, because it is told to stop or
because whoever holds the other end was killed, the watcher ends the whole group.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

SECONDS_TO_END = 20.0
"""That the command has after SIGTERM."""


class BackgroundProcess:
    """A running command, whose output goes to a file."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        with log.open("wb") as file:
            self._watcher = subprocess.Popen(
                [sys.executable, "-P", __file__, *command],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def has_ended(self) -> bool:
        return self._watcher.poll() is not None

    def stop(self) -> None:
        """End it, with all that it started: SIGTERM, and SIGKILL for what doesn't heed it."""
        assert self._watcher.stdin is not None
        self._watcher.stdin.close()
        self._watcher.wait()


def watch(command: Sequence[str]) -> None:
    """Run the command until it ends or standard input closes; then end this process group."""
    # Handlers go back to their defaults in the command; ignored signals would stay ignored there.
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: None)
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    except OSError as error:
        print(f"{command[0]} can't be started: {error.strerror}", file=sys.stderr)
        return
    while process.poll() is None and not select.select([sys.stdin], [], [], 0.1)[0]:
        pass
    if process.returncode is not None:
        print(f"ended with status {process.returncode}", file=sys.stderr, flush=True)
    os.killpg(0, signal.SIGTERM)
    deadline = time.monotonic() + SECONDS_TO_END
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    watch(sys.argv[1:])
