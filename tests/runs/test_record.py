"""Revisions, and what becomes of a record when a run starts again."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import json
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

import steerlm2
from steerlm2.distributed.world import World
from steerlm2.runs.record import (
    check_metric_logger,
    describe_run,
    git_state,
    log_config,
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
    [
        ("this", "1", True),
        ("this", "0", False),
        ("another", "1", False),
        (None, "1", False),
        ("damaged", "1", True),
    ],
    ids=[
        "restarted",
        "not restarted",
        "lost before it began",
        "lost in an empty folder",
        "damaged",
    ],
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
    if launch_of_the_run == "damaged":
        (tmp_path / "run.json").write_text('{"launch": "th')
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


def test_loggers_get_a_variable_by_its_name_and_the_folder_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They resolve interpolations of what they are given."""
    monkeypatch.setenv("RECORD_TEST", "plantedword")
    got: list[Any] = []
    logger = types.SimpleNamespace(
        log_config=lambda config: got.append(OmegaConf.to_container(config, resolve=True))
    )
    public = {"url": "${oc.env:RECORD_TEST}/x", "output_dir": "${oc.env:RECORD_TEST}"}
    log_config(logger, public, tmp_path)
    assert got == [{"url": "${oc.env:RECORD_TEST}/x", "output_dir": str(tmp_path)}]


def test_a_source_tree_without_an_install_has_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", not_installed)
    monkeypatch.setitem(sys.modules, "torchao", None)
    versions = describe_run(Config(), CPU)["versions"]
    assert versions["steerlm2"] == steerlm2.__version__
    assert versions["torchao"] == "unknown"


WANDB = {"_component_": "torchtune.training.metric_logging.WandBLogger"}


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """In place of the package: `started` has what its runs were begun with."""

    class UsageError(Exception):
        __module__ = "wandb.errors"

    class Values(dict):
        def update(self, *values: Any, allow_val_change: bool) -> None:
            changed = any(self.get(key, value) != value for key, value in values[0].items())
            assert allow_val_change or not changed
            super().update(*values)

    module: Any = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.run, module.started, module.config = None, [], Values()
    module.errors = types.SimpleNamespace(Error=UsageError)

    def init(**arguments: Any) -> Any:
        module.started.append(arguments)
        if arguments["project"] == "refused":
            raise UsageError("no such project")
        run = types.SimpleNamespace(id=arguments["id"], config=module.config, finish=lambda: None)
        module.run = run
        run._label = lambda repo: None
        return run

    def login() -> None:
        raise UsageError("No API key configured.\nUse `wandb login`")

    module.init, module.login, module.save = init, login, lambda *a, **k: None
    module.finish = lambda: setattr(module, "run", None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def opened(folder: Path, lr: float = 1.0) -> None:
    config = {"output_dir": str(folder), "lr": lr}
    open_metric_logger(WANDB, {"config": config, "started": str(lr)}, folder).close()


def test_a_resumed_run_goes_on_in_its_wandb_run(tmp_path: Path, wandb: Any) -> None:
    """Also with another lr; another folder is another run, and so is one with a damaged file."""
    opened(tmp_path)
    opened(tmp_path, lr=2.0)
    first, second = (arguments["id"] for arguments in wandb.started)
    assert first == second
    assert {arguments["resume"] for arguments in wandb.started} == {"allow"}
    (tmp_path / "wandb_run_id").write_bytes(b"\xff\0")
    opened(tmp_path)
    assert wandb.started[-1]["id"] != first


def test_a_run_that_wandb_refuses_is_one_line(tmp_path: Path, wandb: Any) -> None:
    with pytest.raises(ValueError, match=r"W&B can't be used \(no such project\)"):
        open_metric_logger(WANDB | {"project": "refused"}, {"config": {}}, tmp_path)


def test_wandb_without_a_key_is_found_before_a_run(
    wandb: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(ValueError, match=r"\(No API key configured\. Use `wandb login`\)") as error:
        check_metric_logger(WANDB)
    assert "\n" not in str(error.value)
    check_metric_logger(WANDB | {"mode": "offline"})
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_metric_logger(WANDB)
    check_metric_logger(None)


@pytest.mark.parametrize("mode", ["sometimes", "", "OFFLINE"])
@pytest.mark.parametrize("name", ["WANDB_MODE", "metric_logger.mode"])
def test_a_mode_that_wandb_lacks_is_one_line(
    wandb: Any, monkeypatch: pytest.MonkeyPatch, name: str, mode: str
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if name == "WANDB_MODE":
        monkeypatch.setenv("WANDB_MODE", mode)
    component = WANDB | ({"mode": mode} if name == "metric_logger.mode" else {})
    with pytest.raises(ValueError, match=f"metric_logger: {name} must be one of .* {mode!r}$"):
        check_metric_logger(component)


def test_settings_that_wandb_refuses_are_one_line(
    tmp_path: Path, wandb: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its other environment variables, at the login and when the run opens."""

    class ValidationError(ValueError):
        __module__ = "pydantic_core._pydantic_core"

    def refuse(**_: Any) -> None:
        raise ValidationError("1 validation error for Settings\nconsole\n  Input should be 'auto'")

    monkeypatch.setenv("WANDB_MODE", "online")
    wandb.login = wandb.init = refuse
    for open_it in (check_metric_logger, lambda component: open_metric_logger(component, {})):
        with pytest.raises(ValueError, match=r"^metric_logger: W&B can't be used") as error:
            open_it(WANDB)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["DiskLogger", "TensorBoardLogger"])
@pytest.mark.parametrize("log_dir", ["file", "file/logs"])
def test_a_log_dir_that_is_no_folder_is_named(tmp_path: Path, name: str, log_dir: str) -> None:
    (tmp_path / "file").write_text("")
    component = {
        "_component_": f"torchtune.training.metric_logging.{name}",
        "log_dir": str(tmp_path / log_dir),
    }
    with pytest.raises(ValueError, match=rf"metric_logger.log_dir {tmp_path / log_dir} can't be"):
        check_metric_logger(component)


@pytest.mark.parametrize("filename", [".", "missing/log.txt"])
def test_a_log_file_that_can_not_be_is_named(tmp_path: Path, filename: str) -> None:
    component = {
        "_component_": "torchtune.training.metric_logging.DiskLogger",
        "log_dir": str(tmp_path),
        "filename": filename,
    }
    with pytest.raises(ValueError, match=r"metric_logger.filename .* is (a|in no) folder"):
        check_metric_logger(component)
