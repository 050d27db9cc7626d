"""The processes behind a `tune run`, for tests that stop or kill some of them."""

from __future__ import annotations

import subprocess
from pathlib import Path


def workers(launcher: subprocess.Popen[str], recipe: str = "steerlm2_distributed") -> list[int]:
    """The processes of the ranks, in the order of their start."""
    file = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    return sorted(
        pid
        for pid in map(int, file.read_text().split())
        if recipe.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
