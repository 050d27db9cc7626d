"""The spool: objects come back in any order, and the file has no name."""

from __future__ import annotations

from pathlib import Path

from steerlm2.data.spool import open_spool


def test_objects_come_back_in_any_order_also_between_writes(tmp_path: Path) -> None:
    objects = [("a", {"": b"\x00" * 100_000}), None, ["ü"], 3]
    with open_spool(tmp_path) as spool:
        places = [spool.add(each) for each in objects[:3]]
        assert spool.read(places[1]) is None
        places.append(spool.add(objects[3]))
        assert [spool.read(place) for place in reversed(places)] == objects[::-1]


def test_nothing_is_seen_or_left(tmp_path: Path) -> None:
    with open_spool(tmp_path) as spool:
        spool.add("x")
        assert list(tmp_path.iterdir()) == []
    assert list(tmp_path.iterdir()) == []
