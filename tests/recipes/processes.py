"""The ranks of a `tune run`, for tests that stop or kill some of them."""

from __future__ import annotations

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
