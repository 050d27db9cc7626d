"""Revisions, and what becomes of a record when a run starts again."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import steerlm2
from steerlm2.distributed.world import World
from steerlm2.runs.record import (
    describe_run,
    git_state,
    open_metric_logger,
    restarted_run,
    write_run,
)

CPU = World(torch.device("cpu"))


@dataclass
class Config:
    lr: float = 1.0


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "known").write_text("a")
    git = ["git", "-C", tmp_path, "-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    return tmp_path


def test_changes_of_tracked_files_make_a_repository_dirty(repository: Path) -> None:
    (repository / "unknown").write_text("output")
    state = git_state(repository)
    assert state is not None
    assert (len(state["revision"]), state["dirty"]) == (40, False)
    (repository / "known").write_text("b")
    assert git_state(repository) == state | {"dirty": True}


def test_a_file_that_the_repository_does_not_know_is_not_of_it(repository: Path) -> None:
    """A package in an environment inside of a project isn't that project's revision."""
    (repository / "installed").write_text("")
    assert git_state(repository, containing="installed") is None
    assert git_state(repository, containing="known") is not None


def test_no_repository_and_no_git(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(repository) is None
    monkeypatch.undo()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", "/")
    assert git_state(Path("/usr/lib")) is None


def test_earlier_starts_stay_in_their_order(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        write_run(tmp_path, {"started": number})
    assert json.loads((tmp_path / "run.json").read_text()) == {
        "started": 3,
        "earlier_starts": [{"started": 1}, {"started": 2}],
    }


@pytest.mark.parametrize(
    ("launch_of_the_run", "restarts", "expected"),
    [("this", "1", True), ("this", "0", False), ("another", "1", False), (None, "1", False)],
    ids=["restarted", "not restarted", "lost before it began", "lost in an empty folder"],
)
def test_a_restart_goes_on_with_a_run_of_its_own_launch(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    launch_of_the_run: str | None,
    restarts: str,
    expected: bool,
) -> None:
    if launch_of_the_run is not None:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", launch_of_the_run)
        write_run(tmp_path, describe_run(Config(), CPU))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "this")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
    assert restarted_run(tmp_path, CPU) is expected


def test_other_loggers_get_the_config(tmp_path: Path) -> None:
    config = {"output_dir": str(tmp_path), "lr": 1.0}
    component = {
        "_component_": "torchtune.training.metric_logging.DiskLogger",
        "log_dir": str(tmp_path),
    }
    logger = open_metric_logger(component, {"config": config, "started": "now"})
    logger.close()
    assert "lr: 1.0" in (tmp_path / "torchtune_config.yaml").read_text()
    assert open_metric_logger(None, {"config": config}) is None


def test_a_source_tree_without_an_install_has_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", not_installed)
    monkeypatch.setitem(sys.modules, "torchao", None)
    versions = describe_run(Config(), CPU)["versions"]
    assert versions["steerlm2"] == steerlm2.__version__
    assert versions["torchao"] == "unknown"
