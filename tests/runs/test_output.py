"""An output folder is used twice: nothing of the earlier run is lost or mixed in."""

from __future__ import annotations

from pathlib import Path

import pytest

from steerlm2.runs.output import (
    RUN_FILES,
    check_not_own_run,
    make_output_dir,
    set_aside_earlier_run,
)


def make_run(folder: Path, mark: str) -> None:
    """What a run leaves; every file holds `mark`."""
    for name in (*RUN_FILES[:-1], "epoch_1", "epoch_2"):
        path = folder / name
        if name == "checkpoints" or name.startswith("epoch_"):
            path = path / "inside"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(mark)


def marks(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_new_folder_is_made(tmp_path: Path) -> None:
    make_output_dir(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_file_in_the_folders_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"output_dir .*file can't be written to .*choose another"):
        make_output_dir(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_does_not_start_from_its_own_exports(tmp_path: Path) -> None:
    """Neither by the export's folder nor by its output_dir, which means that export."""
    folder = tmp_path / "epoch_1"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).touch()
    for start in (folder, tmp_path):
        with pytest.raises(ValueError, match=f"{start} is of an earlier run in this run's"):
            check_not_own_run(tmp_path, {"checkpoint_dir": str(start)})
    check_not_own_run(tmp_path / "other", {"checkpoint_dir": str(tmp_path)})


def test_an_empty_folder_stays_empty(tmp_path: Path) -> None:
    assert set_aside_earlier_run(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_run_is_moved_whole(tmp_path: Path) -> None:
    make_run(tmp_path, "first")
    before = marks(tmp_path)
    aside = set_aside_earlier_run(tmp_path)
    assert aside == tmp_path / "earlier_runs" / "1"
    assert marks(aside) == before
    assert [path.name for path in tmp_path.iterdir()] == ["earlier_runs"]


def test_every_earlier_run_is_kept(tmp_path: Path) -> None:
    for mark in ("first", "second", "third"):
        make_run(tmp_path, mark)
        set_aside_earlier_run(tmp_path)
    kept = {name: set(marks(tmp_path / "earlier_runs" / name).values()) for name in "123"}
    assert kept == {"1": {"first"}, "2": {"second"}, "3": {"third"}}


@pytest.mark.parametrize("name", ["notes.txt", "data.jsonl", "my_config.yaml", "epochs"])
def test_other_peoples_files_stay(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    (tmp_path / "metrics.jsonl").write_text("")
    set_aside_earlier_run(tmp_path)
    assert (tmp_path / name).read_text() == "mine"


def test_a_start_from_the_runs_own_folder_is_refused(tmp_path: Path) -> None:
    """The earlier run's export would be moved away, or its checkpoints resumed."""
    (tmp_path / "out" / "epoch_1").mkdir(parents=True)
    with pytest.raises(ValueError, match="choose another output_dir"):
        check_not_own_run(tmp_path / "out", {"checkpoint_dir": str(tmp_path / "out" / "epoch_1")})


@pytest.mark.parametrize("start", ["model", "out/earlier_runs/1/epoch_1", "out/model"])
def test_other_starts_are_fine(start: str, tmp_path: Path) -> None:
    for folder in (start, "out/epoch_1"):
        (tmp_path / folder).mkdir(parents=True)
    check_not_own_run(tmp_path / "out", {"checkpoint_dir": str(tmp_path / start)})
    check_not_own_run(tmp_path / "out", None)
