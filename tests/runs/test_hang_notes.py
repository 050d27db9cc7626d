"""Who is named when no rank is making progress, from the ranks' notes."""

from __future__ import annotations

from steerlm2.runs.hang_notes import Note, describe


def note(
    host: str, count: int, position: str = "step 7, update", doing: str = "f (a.py:1)"
) -> Note:
    return Note(host, 1, count, position, doing, communicates=doing[0] == "f", overdue=True)


def test_a_rank_without_a_sign_is_named_although_it_is_at_the_same_position() -> None:
    notes = [note("a", 20), note("a", 20), note("b", 20, doing="g (a.py:2)")]
    assert describe(notes, silent=[1]).splitlines() == [
        "All wait for rank 1 on a, which did not arrive.",
        "  rank 0 on a: step 7, update, in f (a.py:1)",
        "  rank 1 on a: no sign of life; the last was at step 7, update, in f (a.py:1)",
        "  rank 2 on b: step 7, update, in g (a.py:2)",
    ]


def test_living_ranks_that_are_behind_are_named_with_their_hosts() -> None:
    """The process lives, but its main thread stands in something else."""
    late = "step 7, micro-batch 2"
    notes = [note("a", 20), note("a", 19, late), note("b", 20), note("b", 19, late)]
    assert describe(notes, silent=[]).splitlines() == [
        "All wait for rank 1 on a; rank 3 on b, which did not arrive.",
        "  rank 0 on a; rank 2 on b: step 7, update, in f (a.py:1)",
        "  rank 1 on a; rank 3 on b: step 7, micro-batch 2, in f (a.py:1)",
    ]


def test_at_one_position_it_is_who_does_not_wait_there() -> None:
    """One rank reads a file while the others wait for it in the same micro-batch."""
    notes = [note("a", 20), note("a", 20, doing="read (a.py:3)"), note("b", 20)]
    assert describe(notes, silent=[]).splitlines() == [
        "All ranks are at the same position. Not in a collective there: rank 1 on a.",
        "  rank 0 on a; rank 2 on b: step 7, update, in f (a.py:1)",
        "  rank 1 on a: step 7, update, in read (a.py:3)",
    ]


def test_nobody_is_blamed_where_all_do_the_same() -> None:
    assert describe([note("a", 20), note("b", 20)], silent=[]).splitlines() == [
        "All ranks are at the same position.",
        "  rank 0 on a; rank 1 on b: step 7, update, in f (a.py:1)",
    ]
