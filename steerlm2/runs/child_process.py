"""A command that ends with the process that started it, however that one ends, SIGKILL included.

This file runs as a watcher between the two: parent of the command, with the read end of a pipe that
nobody writes to. When the pipe closes, because the command is to stop or because whoever holds the
other end was killed, the watcher sends SIGTERM to the command, which may save. Its exit status is
the command's.

`on_node` isn't made of this: it is about a signal that must reach the ranks while everybody lives.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any

SECONDS_BETWEEN_LOOKS = 0.05
NOT_STARTED = 127
"""Exit status of a command that can't be started, as a shell has it."""

FOR_OTHERS = (
    *(signal.SIGHUP, signal.SIGINT, signal.SIGQUIT),
    *(signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2),
)
"""Signals that a terminal or Slurm sends to all processes of a group: the watcher outlives them."""


class ChildProcess:
    """A running command; as a context manager, it is stopped at the end.

    Args:
        seconds_to_end: that it has after SIGTERM, before SIGKILL; None: as many as it takes.
        own_group: make the command leader of a process group of its own, which no signal for the
            caller's group reaches, and end all that it has started with it. Without, it stays in
            the caller's group, gets what a terminal or Slurm sends there, and has to end by itself
            what it has started.
        output: file of its stdout and stderr; None: those of the caller.
        stdin: as in `subprocess.Popen`.
        env: its environment; None: the caller's.
        pass_fds: file descriptors that it inherits.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        seconds_to_end: float | None,
        own_group: bool = False,
        output: IO[Any] | None = None,
        stdin: int | None = subprocess.DEVNULL,
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        read_end, write_end = os.pipe()
        self._write_end: int | None = write_end
        options = [str(read_end), str(int(own_group)), str(seconds_to_end)]
        try:
            self._watcher = subprocess.Popen(
                [sys.executable, "-P", __file__, *options, *command],
                stdin=stdin,
                stdout=output,
                stderr=output,
                env=env,
                pass_fds=(read_end, *pass_fds),
                start_new_session=own_group,
            )
        finally:
            os.close(read_end)

    def __enter__(self) -> ChildProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def has_ended(self) -> bool:
        return self._watcher.poll() is not None

    def wait(self) -> int:
        """Wait for its end; its exit status, 128 + n where signal n ended it."""
        return self._watcher.wait()

    def stop(self) -> int:
        """End it, if it goes on, and wait for that; its exit status."""
        if self._write_end is not None:
            os.close(self._write_end)
            self._write_end = None
        return self._watcher.wait()


def watch(
    caller: int, own_group: bool, seconds_to_end: float | None, command: Sequence[str]
) -> int:
    """Run a command until it ends or the pipe `caller` closes; its exit status."""
    os.set_inheritable(caller, False)
    for signum in FOR_OTHERS:
        # Handlers go back to their defaults in the command; ignored signals would stay ignored.
        signal.signal(signum, lambda *_: None)
    try:
        process = subprocess.Popen(command, close_fds=False, process_group=0 if own_group else None)
    except OSError as error:
        print(f"{command[0]} can't be started: {error.strerror}", file=sys.stderr)
        return NOT_STARTED

    def send(signum: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # ended, or a zombie
            if own_group:
                os.killpg(process.pid, signum)
            else:
                process.send_signal(signum)

    while process.poll() is None:
        if select.select([caller], [], [], SECONDS_BETWEEN_LOOKS)[0]:
            break
    if own_group and process.returncode is not None:
        print(f"ended with status {process.returncode}", file=sys.stderr, flush=True)
    send(signal.SIGTERM)
    stopped = time.monotonic()
    while process.poll() is None:
        if seconds_to_end is not None and time.monotonic() > stopped + seconds_to_end:
            break
        time.sleep(SECONDS_BETWEEN_LOOKS)
    if seconds_to_end is not None:
        send(signal.SIGKILL)
    status = process.wait()
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    given_caller, given_group, given_seconds, *given_command = sys.argv[1:]
    sys.exit(
        watch(
            int(given_caller),
            given_group == "1",
            None if given_seconds == "None" else float(given_seconds),
            given_command,
        )
    )
