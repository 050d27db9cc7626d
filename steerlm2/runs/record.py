"""The record of a run (config, revisions, machines) in `output_dir/run.json` and in W&B."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import secrets
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
from steerlm2.config.environment import escaped
from steerlm2.config.loader import instantiate, to_public
from steerlm2.distributed.world import World
from steerlm2.files import parse_json, write_durably
from steerlm2.masking import masked
from steerlm2.runs.output import make_output_dir

RUN_FILE = "run.json"
WANDB_ID_FILE = "wandb_run_id"
"""In a run's folder: the W&B run that a resumed run goes on in."""
PACKAGE_OF_LOGGER = {
    "WandBLogger": "wandb",
    "TensorBoardLogger": "tensorboard",
    "CometLogger": "comet_ml",
}
WANDB_MODES_WITH_KEY = ("online", "shared", "run")
WANDB_MODES = (*WANDB_MODES_WITH_KEY, "offline", "disabled", "dryrun")
WANDB_MODE = "WANDB_MODE"
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
        "command": [masked(argument) for argument in sys.argv],
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
        "config": to_public(config),
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
    earlier: list[Any] = []
    if (before := _read_run(path)) is not None:
        starts = before.pop("earlier_starts", [])
        earlier = [*(starts if isinstance(starts, list) else []), before]
    write_durably(path, json.dumps({**run, "earlier_starts": earlier}, indent=2) + "\n")


def _read_run(path: Path) -> dict[str, Any] | None:
    """What run.json says; None where there is none. A damaged one is set aside with a warning."""
    if not path.exists():
        return None
    try:
        run = parse_json(path.read_bytes())
        if isinstance(run, dict):
            return run
        problem = "it isn't a JSON object"
    except ValueError as error:
        problem = str(error)
    aside = path.with_suffix(".damaged")
    path.replace(aside)
    print(
        f"WARNING: {path} is damaged ({problem}): it is now {aside.name}, and what it says of "
        "earlier starts is left out",
        file=sys.stderr,
    )
    return None


def restarted_run(output_dir: Path, world: World) -> bool:
    """Whether torchrun has restarted the processes of the run in the folder. Called by all ranks.

    It is False if the run in the folder is of another launch, which is the case when processes were
    lost before their own run had begun: a restart doesn't resume an earlier run.
    """
    if not world.restarted:
        return False

    def of_this_launch() -> bool:
        path = output_dir / RUN_FILE
        if not path.exists():
            return False
        if (run := _read_run(path)) is None:
            return True  # rather than begin anew; a state of another run is refused
        launch = run.get("launch")
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


def check_metric_logger(component: Mapping[str, Any] | None) -> None:
    """Find what keeps a metric logger from opening, before a model is loaded.

    Raises:
        ValueError: where its package isn't installed, it can't write to its folder, or W&B has no
            such mode, no key, refuses it, or can't be reached.
    """
    if component is None:
        return
    name = component["_component_"].rpartition(".")[2]
    package = PACKAGE_OF_LOGGER.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        raise ValueError(
            f"metric_logger: {name} needs the package {package}, which isn't installed: install "
            "it, or set metric_logger=null"
        )
    if component.get("log_dir"):
        _check_log_dir(component)
    if package != "wandb":
        return
    modes = {"metric_logger.mode": component.get("mode"), WANDB_MODE: os.environ.get(WANDB_MODE)}
    for key, mode in modes.items():
        if mode is not None and mode not in WANDB_MODES:
            raise ValueError(
                f"metric_logger: {key} must be one of {', '.join(WANDB_MODES)}, got {mode!r}"
            )
    if (component.get("mode") or os.environ.get(WANDB_MODE, "online")) in WANDB_MODES_WITH_KEY:
        import wandb

        try:
            wandb.login()
        except Exception as error:
            if not _is_of_wandb(error, component):
                raise
            raise ValueError(_wandb_problem(error)) from error


def _check_log_dir(component: Mapping[str, Any]) -> None:
    """Check that a metric logger can write its files.

    Raises:
        ValueError: naming the key.
    """
    folder = Path(component["log_dir"])
    make_output_dir(folder, "metric_logger.log_dir")
    file = folder / (component.get("filename") or "")
    if component.get("filename") and (file.is_dir() or not file.parent.is_dir()):
        problem = "is a folder" if file.is_dir() else f"is in no folder: {file.parent} is missing"
        raise ValueError(f"metric_logger.filename {file.absolute()} {problem}")


def open_metric_logger(
    component: Mapping[str, Any] | None, run: Mapping[str, Any], output_dir: Path | None = None
) -> Any:
    """The metric logger of a config. It logs the config; W&B also gets the run's record as `run`.

    Args:
        output_dir: of a run that can be resumed: it keeps the id of the W&B run, which a resumed
            run goes on in.

    Returns:
        None where the config has none.

    Raises:
        ValueError: where W&B doesn't open the run.
    """
    if component is None:
        return None
    id_file = output_dir / WANDB_ID_FILE if output_dir is not None else None
    if id_file is not None and component["_component_"].endswith("WandBLogger"):
        # The config may have changed where it may: its values are W&B's too.
        resumable = {"id": _wandb_id(id_file), "resume": "allow", "allow_val_change": True}
        component = resumable | dict(component)
    logger = open_logger(component, id_file)
    if (tracked := _wandb_run(logger)) is not None and id_file is not None:
        write_durably(id_file, f"{tracked.id}\n")
    log_config(logger, run["config"], output_dir)
    if tracked is not None:
        facts = {key: value for key, value in run.items() if key != "config"}
        tracked.config.update({"run": facts}, allow_val_change=True)
    return logger


def open_logger(component: Mapping[str, Any], id_file: Path | None = None) -> Any:
    """A metric logger that nothing is logged to yet.

    Args:
        id_file: that W&B's run is named in.

    Raises:
        ValueError: where W&B doesn't open the run.
    """
    try:
        return instantiate(component)
    except Exception as error:
        if not _is_of_wandb(error, component):
            raise
        raise ValueError(_wandb_problem(error, id_file)) from error


def log_config(logger: Any, config: Mapping[str, Any], output_dir: Path | None = None) -> None:
    """Log a config of `to_public`; loggers resolve interpolations, and this one stays as it is.

    Args:
        output_dir: where torchtune's loggers write it; None: the config's.
    """
    folder = {} if output_dir is None else {"output_dir": str(output_dir)}
    logger.log_config(OmegaConf.create({**escaped(config), **folder}))


def log_path(logger: Any, name: str, path: Path) -> None:
    """Add the path of an output to W&B's summary of the run; other loggers have no summary."""
    if (tracked := _wandb_run(logger)) is not None:
        tracked.summary[name] = str(path.absolute())


def _wandb_id(file: Path) -> str:
    """The id of W&B's run in a folder; of a damaged file or none, another one."""
    if file.exists():
        known = file.read_bytes().decode(errors="replace").strip()
        if re.fullmatch(r"[\w-]{1,128}", known, re.ASCII):
            return known
        print(f"WARNING: {file} is damaged: a new W&B run begins", file=sys.stderr)
    return os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)


def _is_of_wandb(error: Exception, component: Mapping[str, Any]) -> bool:
    """Whether W&B refuses something; it reads its environment variables with pydantic."""
    module = type(error).__module__
    return module.startswith("wandb.") or (
        module.startswith("pydantic") and component["_component_"].endswith("WandBLogger")
    )


def _wandb_problem(error: Exception, id_file: Path | None = None) -> str:
    known = id_file is not None and id_file.exists()
    return (
        f"metric_logger: W&B can't be used ({' '.join(str(error).split())}): run `wandb login`, or "
        "set WANDB_API_KEY, WANDB_MODE=offline or metric_logger=null"
        + (f"; without {id_file} a new W&B run begins" if known else "")
    )


def _wandb_run(logger: Any) -> Any:
    if not isinstance(logger, WandBLogger):
        return None
    import wandb

    return wandb.run
