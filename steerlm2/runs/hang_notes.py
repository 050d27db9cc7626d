"""The text of the hang watch's report (`runs.hangs`)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Note:
    """A rank's heartbeat and its position in the run."""

    host: str
    beat: int
    """Heartbeats so far: it increases while the process lives."""
    count: int
    """Positions and forwards so far; ranks at the same position have the same count."""
    position: str
    doing: str
    """The Python function in which the main thread is, with its file and line."""
    communicates: bool
    """Whether torch.distributed is on the main thread's stack."""
    overdue: bool
    """Whether it has been there for longer than is allowed."""


def describe(notes: Sequence[Note], silent: Collection[int]) -> str:
    """Which ranks the others wait for, and the position of each rank.

    Args:
        silent: the ranks without heartbeats.
    """
    furthest = max(note.count for rank, note in enumerate(notes) if rank not in silent)
    behind = [rank for rank, note in enumerate(notes) if note.count < furthest]
    if missing := sorted(silent) or behind:
        lines = [f"All wait for {_names(missing, notes)}, which did not arrive."]
    else:
        lines = ["All ranks are at the same position."]
        busy = [rank for rank, note in enumerate(notes) if not note.communicates]
        if 0 < len(busy) < len(notes):
            lines[0] += f" Not in a collective there: {_names(busy, notes)}."
    groups: dict[str, list[int]] = {}
    for rank, note in enumerate(notes):
        where = f"{note.position}, in {note.doing}"
        text = f"no sign of life; the last was at {where}" if rank in silent else where
        groups.setdefault(text, []).append(rank)
    lines += [f"  {_names(ranks, notes)}: {text}" for text, ranks in groups.items()]
    return "\n".join(lines)


def _names(ranks: Iterable[int], notes: Sequence[Note]) -> str:
    """rank 3 on node1; rank 4, 5 on node2"""
    hosts: dict[str, list[str]] = {}
    for rank in ranks:
        hosts.setdefault(notes[rank].host, []).append(str(rank))
    return "; ".join(f"rank {', '.join(names)} on {host}" for host, names in hosts.items())
