"""Two runs never write into one output_dir.

A run holds `.run.lock` in it: by the kernel's lock, which goes away with the process, and by a
count in the file that goes on every few seconds. The first is enough on one node; between nodes not
every file system has it, so that a run looks whether the count still goes on. Where it has (NFSv4,
Lustre), the lock of a node that was lost stays until its lease has run out.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

from steerlm2.escaping import shown
from steerlm2.files import parse_json

LOCK_FILE = ".run.lock"
SECONDS_PER_BEAT = 5.0
BEATS_TO_WAIT = 4
BEATS_OF_LEASE = 36  # 3 minutes; leases are of 90 to 100 s
LENGTH = 512


def lock_file(file: IO[Any] | int) -> bool:
    """Take the kernel's lock of an open file: while a process has the file open, no other gets it.

    A child that inherits the file holds the lock too.

    Returns:
        Whether it was taken; False on a file system without locks, where it keeps nobody out.

    Raises:
        BlockingIOError: where another process holds it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def is_in_place(file: IO[Any], path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(file.fileno()))
    except OSError:
        return False


class RunLock:
    """The right to write into a folder, until `release` or the end of the process.

    Raises:
        ValueError: where another run has it; after minutes where that looks dead, on a lost node.
            Where something else than a file has the lock's name.
    """

    def __init__(self, output_dir: Path) -> None:
        self.path = output_dir / LOCK_FILE
        self._file = self._open()
        self._released = threading.Event()
        if not self._is_free():
            holder = _holder(self.path)
            self._file.close()
            raise ValueError(
                f"another run writes into {output_dir.absolute()} (process {holder.get('pid')} on "
                f"{holder.get('host')}): wait for its end, or choose another output_dir"
            )
        self._beat(0)
        threading.Thread(target=self._keep_beating, daemon=True).start()

    def check(self) -> None:
        """Check that the folder is still this run's.

        Raises:
            ValueError: where it was removed or replaced meanwhile.
        """
        if not is_in_place(self._file, self.path):
            raise ValueError(
                f"{self.path.parent.absolute()} was removed or replaced while the run wrote into "
                "it, and what it had written is lost: start the run again"
            )

    def release(self) -> None:
        self._released.set()
        if is_in_place(
            self._file, self.path
        ):  # another run has its own, where the folder was removed meanwhile
            with contextlib.suppress(OSError):
                self.path.unlink()
        self._file.close()

    def _open(self) -> IO[str]:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW  # a link's target would be written over
        try:
            return os.fdopen(os.open(self.path, flags, 0o666), "r+")
        except OSError as error:
            if self.path.is_symlink() or (self.path.exists() and not self.path.is_file()):
                raise ValueError(
                    f"{self.path.absolute()} must be a file that runs lock: remove it"
                ) from error
            raise

    def _is_free(self) -> bool:
        try:
            locked = lock_file(self._file)
        except BlockingIOError:
            return self._lease_runs_out() and self._is_free()
        if locked:
            if not is_in_place(self._file, self.path):
                self._file.close()  # of a run that has just ended
                self._file = self._open()
                return self._is_free()
            if _holder(self.path).get("host") == socket.gethostname():
                return True
        return not self._goes_on()

    def _lease_runs_out(self) -> bool:
        """Wait for the lock, if a dead run of another node holds it; whether it was to be had."""
        holder = _holder(self.path)
        if holder.get("host") in (None, socket.gethostname()) or self._goes_on():
            return False
        text = (
            f"waiting for the lock of {self.path.parent.absolute()}: process {holder.get('pid')} "
            f"on {holder['host']} gives no sign of life, and a lost node's lock goes within minutes"
        )
        print(shown(text), file=sys.stderr)
        for _ in range(BEATS_OF_LEASE):
            with contextlib.suppress(BlockingIOError):
                if lock_file(self._file):
                    return True
            if _holder(self.path) != holder:  # another run was quicker
                return False
            time.sleep(SECONDS_PER_BEAT)
        return False

    def _goes_on(self) -> bool:
        """Whether the count changes; it takes some beats to be sure that it doesn't."""
        seen = _holder(self.path)
        if not seen:
            return False
        for _ in range(BEATS_TO_WAIT):
            time.sleep(SECONDS_PER_BEAT)
            if _holder(self.path) != seen:
                return self.path.exists()
        return False

    def _beat(self, count: int) -> None:
        mine = {"host": socket.gethostname(), "pid": os.getpid(), "beat": count}
        self._file.seek(0)
        self._file.write(json.dumps(mine).ljust(LENGTH))  # never empty, never in two states
        self._file.flush()

    def _keep_beating(self) -> None:
        count = 0
        while not self._released.wait(SECONDS_PER_BEAT):
            count += 1
            with contextlib.suppress(OSError, ValueError):  # a full disk; released just now
                self._beat(count)


def _holder(path: Path) -> dict[str, Any]:
    """What the holder wrote; nothing where there is none, or what isn't of a run."""
    try:
        holder = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}
