"""The record of a run (config, revisions, machines) in `output_dir/run.json` and in W&B."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torchtune.training.metric_logging import WandBLogger

import steerlm2
from steerlm2.config.loader import instantiate, to_plain
from steerlm2.distributed.world import World

RUN_FILE = "run.json"
PACKAGES = ("torch", "torchtune", "torchao", "steerlm2")
SECONDS_FOR_GIT = 10.0
"""Timeout of a git command. A choice: with a slow file system a run starts without its revision
rather than late."""
LAUNCH_VARIABLE = "TORCHELASTIC_RUN_ID"


def describe_run(config: Any, world: World) -> dict[str, Any]:
    """The config, revisions, versions and machines of a run, as plain values. Called by all ranks.

    `hosts` and `devices` are lists over the ranks. `git` is the revision of the working directory
    and `steerlm2_git` that of the code, each None outside of a repository.
    """
    device = world.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    machines = world.gather((socket.gethostname(), name))
    mesh = world.mesh
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": list(sys.argv),
        "working_directory": os.getcwd(),
        "process": os.getpid(),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        "launch": os.environ.get(LAUNCH_VARIABLE),
        "git": git_state(Path.cwd()),
        "steerlm2_git": git_state(Path(steerlm2.__file__).parent, containing="__init__.py"),
        "versions": {"python": platform.python_version()}
        | {package: _version(package) for package in PACKAGES},
        "hosts": [host for host, _ in machines],
        "devices": [device_name for _, device_name in machines],
        "mesh": dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True)) if mesh else None,
        "config": to_plain(config),
    }


def _version(package: str) -> str:
    """Of an installed package; of one that is only on the path, what it says itself."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(sys.modules.get(package), "__version__", "unknown"))


def write_run(output_dir: Path, run: Mapping[str, Any]) -> None:
    """Write `run.json`. Earlier starts of a resumed run are kept under `earlier_starts`."""
    path = output_dir / RUN_FILE
    earlier: list[dict[str, Any]] = []
    if path.exists():
        before = json.loads(path.read_text())
        earlier = [*before.pop("earlier_starts", []), before]
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({**run, "earlier_starts": earlier}, indent=2) + "\n")
    partial.replace(path)


def restarted_run(output_dir: Path, world: World) -> bool:
    """Whether torchrun has restarted the processes of the run in the folder. Called by all ranks.

    It is False if the run in the folder is of another launch, which is the case when processes were
    lost before their own run had begun: a restart doesn't resume an earlier run.
    """
    if not world.restarted:
        return False

    def of_this_launch() -> bool:
        path = output_dir / RUN_FILE
        launch = json.loads(path.read_text()).get("launch") if path.exists() else None
        return launch is not None and launch == os.environ.get(LAUNCH_VARIABLE)

    return bool(world.from_main(world.on_main(of_this_launch)))


def git_state(folder: Path, containing: str | None = None) -> dict[str, Any] | None:
    """`revision` and `dirty` (tracked files have changes) of the repository around a folder.

    Args:
        containing: a file in the folder that the repository must track; an installed package can be
            inside an unrelated repository.

    Returns:
        None where there is no such repository, or no git.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
            timeout=SECONDS_FOR_GIT,
        ).stdout

    try:
        if containing is not None:
            git("ls-files", "--error-unmatch", containing)
        changes = git("status", "--porcelain", "--untracked-files=no")
        return {"revision": git("rev-parse", "HEAD").strip(), "dirty": bool(changes.strip())}
    except (OSError, subprocess.SubprocessError):
        return None


def open_metric_logger(component: Mapping[str, Any] | None, run: Mapping[str, Any]) -> Any:
    """The metric logger of a config. It logs the config; W&B also gets the run's record as `run`.

    Returns:
        None where the config has none.
    """
    if component is None:
        return None
    logger = instantiate(component)
    logger.log_config(OmegaConf.create(run["config"]))
    if (tracked := _wandb_run(logger)) is not None:
        facts = {key: value for key, value in run.items() if key != "config"}
        tracked.config.update({"run": facts}, allow_val_change=True)
    return logger


def log_path(logger: Any, name: str, path: Path) -> None:
    """Add the path of an output to W&B's summary of the run; other loggers have no summary."""
    if (tracked := _wandb_run(logger)) is not None:
        tracked.summary[name] = str(path.absolute())


def _wandb_run(logger: Any) -> Any:
    if not isinstance(logger, WandBLogger):
        return None
    import wandb

    return wandb.run
