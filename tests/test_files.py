"""What is written is whole, or isn't there; what has changed since is named."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from steerlm2.files import (
    SUMS_FILE,
    changed,
    check_unchanged,
    open_own,
    parse_json,
    read_sums,
    replace_durably,
    sha256,
    sync_all,
    write_durably,
    write_sums,
)

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
"""SHA-256 of "abc", from FIPS 180-2, appendix B.1."""


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files and folders that were waited for, and "replace"."""
    found: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        found.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def note_replace(self: Path, target: Path) -> None:
        found.append("replace")
        replace(self, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    return found


def test_a_file_has_its_name_once_it_is_on_the_disk(tmp_path: Path, events: list[str]) -> None:
    """Otherwise it can be empty, or full of NULs, after a power cut; then its name is waited for,
    which could be lost as well."""
    write_durably(tmp_path / "x.json", "{}")
    assert events == ["x.json.partial", "replace", tmp_path.name]
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]
    assert (tmp_path / "x.json").read_bytes() == b"{}"


def test_a_file_that_was_written_elsewhere_likewise(tmp_path: Path, events: list[str]) -> None:
    (tmp_path / ".x.tmp").write_text("new")
    replace_durably(tmp_path / ".x.tmp", tmp_path / "x")
    assert events == [".x.tmp", "replace", tmp_path.name]
    assert (tmp_path / "x").read_text() == "new"


def test_a_failure_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "x").write_text("earlier")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_durably(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "earlier"


def test_a_file_system_that_cannot_wait_for_folders_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As some network file systems; for a file it is an error."""

    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) or refuse_files:
            raise OSError(errno.EINVAL, "Invalid argument")

    refuse_files = False
    monkeypatch.setattr(os, "fsync", refuse)
    write_durably(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "new"
    refuse_files = True
    with pytest.raises(OSError, match="Invalid argument"):
        write_durably(tmp_path / "x", "newer")


@pytest.mark.parametrize("name", ["x", "x.partial"])
def test_links_are_not_written_through(name: str, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / name).symlink_to(tmp_path / "mine")
    write_durably(tmp_path / "x", "new")
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / "x").read_text() == "new"


@pytest.mark.parametrize("mode", ["a", "wb", "a+b"])
def test_a_link_is_not_opened_to_be_written_into(mode: str, tmp_path: Path) -> None:
    """Wherever it leads."""
    (tmp_path / "mine").write_text("mine")
    for name, target in (("x", "mine"), ("y", "nowhere")):
        (tmp_path / name).symlink_to(tmp_path / target)
        with pytest.raises(ValueError, match=f"{name} is a link, .*: remove it"):
            open_own(tmp_path / name, mode)
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()
    with open_own(tmp_path / "z", mode) as file:
        file.write("z" if mode == "a" else b"z")
    assert (tmp_path / "z").read_text() == "z"


@pytest.mark.parametrize("text", ["", "{", b"\0\0\0\0", b"\xff", "[" * 100_000])
def test_damaged_json_is_a_wrong_value(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"Expecting|can't decode|nested too deeply"):
        parse_json(text)


def test_files_are_waited_for_with_all_folders_between(tmp_path: Path, events: list[str]) -> None:
    folder = tmp_path / "stage"
    (folder / "epoch_1").mkdir(parents=True)
    (folder / "epoch_1" / "model").touch()
    (folder / "metrics").touch()
    sync_all(folder, ["epoch_1/model", "metrics"])
    assert sorted(events) == ["epoch_1", "metrics", "model", "stage"]


def test_sums_are_in_the_format_of_sha256sum(tmp_path: Path) -> None:
    """Whoever downloads an export checks it by `sha256sum -c SHA256SUMS`."""
    (tmp_path / "a b").write_text("abc")
    write_sums(tmp_path, {"a b": sha256(tmp_path / "a b")})
    assert (tmp_path / SUMS_FILE).read_text() == f"{ABC}  a b\n"
    assert read_sums(tmp_path) == {"a b": ABC}


def test_without_sums_nothing_is_known(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("abc")
    assert read_sums(tmp_path) == {}
    assert changed(tmp_path, ["a"]) == []


@pytest.mark.parametrize(
    "text",
    ["", "\0" * 68, f"{ABC}  a", f"{ABC[:-1]}  a\n", f"{ABC}  a\n\0\0\0", f"{ABC}  ../a\n"],
    ids=["empty", "NULs", "cut off", "short", "ends in NULs", "of another folder"],
)
def test_damaged_sums_are_named(text: str, tmp_path: Path) -> None:
    (tmp_path / SUMS_FILE).write_text(text)
    with pytest.raises(ValueError, match=f"{SUMS_FILE} is damaged"):
        read_sums(tmp_path)


def test_what_changed_is_named(tmp_path: Path) -> None:
    """Of the files that are asked for, that exist, and that SHA256SUMS names."""
    sums = dict.fromkeys(("same", "other", "not asked for", "missing"), ABC)
    write_sums(tmp_path, sums)
    (tmp_path / "same").write_text("abc")
    for name in ("other", "not asked for", "not named"):
        (tmp_path / name).write_text("abd")
    asked = ["same", "other", "missing", "not named"]
    assert changed(tmp_path, asked) == ["other"]
    with pytest.raises(ValueError, match=r": other changed since SHA256SUMS .* remove the file's"):
        check_unchanged(tmp_path, asked)
