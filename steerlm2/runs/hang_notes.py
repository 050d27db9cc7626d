"""Where the ranks are when none comes further (hang_watch.py), as text."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Note:
    """Where a rank is."""

    host: str
    beat: int
    """Counts on while the process lives."""
    count: int
    """Of the places so far; the same on ranks that are at the same."""
    place: str
    doing: str
    """The Python function that the main thread is in."""
    communicates: bool
    """Whether that was called by something of torch.distributed."""
    overdue: bool
    """Whether it is there for longer than it may."""


def describe(notes: Sequence[Note], silent: Collection[int]) -> str:
    """Which ranks are waited for, and where each one is.

    Args:
        silent: the ranks whose process gives no sign.
    """
    furthest = max(note.count for rank, note in enumerate(notes) if rank not in silent)
    behind = [rank for rank, note in enumerate(notes) if note.count < furthest]
    if missing := sorted(silent) or behind:
        lines = [f"All wait for {_names(missing, notes)}, which did not arrive."]
    else:
        lines = ["All have come to the same place."]
        busy = [rank for rank, note in enumerate(notes) if not note.communicates]
        if 0 < len(busy) < len(notes):
            lines[0] += f" Not in a collective there: {_names(busy, notes)}."
    groups: dict[str, list[int]] = {}
    for rank, note in enumerate(notes):
        where = f"{note.place}, in {note.doing}"
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
