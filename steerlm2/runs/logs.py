"""The log file of each rank, `output_dir/logs/rank_000.log`, warnings, and the progress of a run.

A log has Python's logging of all packages, warnings, the steps, and the error that ended the rank,
with its traceback. Output of libraries below Python is in torchrun's files (`--log_dir`).
"""

from __future__ import annotations

import logging
import os
import shlex
import socket
import sys
import warnings
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO, cast

import torch
from tqdm import tqdm

from steerlm2.config.loader import LOG
from steerlm2.distributed.world import World
from steerlm2.escaping import shown
from steerlm2.files import open_own
from steerlm2.masking import masked

LOG_FOLDER = "logs"


def open_rank_log(output_dir: Path, world: World) -> Path:
    """Open this rank's log file; it is appended to if an earlier start of the run has one."""
    path = output_dir / LOG_FOLDER / f"rank_{world.rank:03d}.log"
    path.parent.mkdir(exist_ok=True)
    file = log_file(path)
    # With a root handler Python no longer prints warnings of loggers without a handler.
    logging.basicConfig(handlers=[file, _warnings_on_stderr(logging.BASIC_FORMAT)], force=True)
    LOG.setLevel(logging.INFO)
    _log_warnings()
    coordinate = world.mesh.get_coordinate() if world.mesh is not None else None
    LOG.info(
        f"rank {world.rank} of {world.size}, process {os.getpid()} on {socket.gethostname()}, "
        f"{world.device}, (dp_replicate, dp_shard, tp) {coordinate}, torch {torch.__version__}: "
        f"{masked(shlex.join(sys.argv))}"
    )
    return path


def log_file(path: Path) -> logging.Handler:
    """What writes into a log file, without secrets; errors of writing are ignored.

    Raises:
        ValueError: where the file is a link.
    """
    file = _QuietFile(path)
    file.setFormatter(_Shown("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    return file


def show_warnings() -> None:
    """Print the library's warnings to stderr, in a recipe without a log file."""
    logging.basicConfig(handlers=[_warnings_on_stderr("%(message)s")])


def tell(text: str) -> None:
    """Print a message for people to stdout, beside a progress bar; `shown` as any other."""
    tqdm.write(shown(text))


def _warnings_on_stderr(form: str) -> logging.Handler:
    stderr = logging.StreamHandler()
    stderr.setFormatter(_Shown(form))
    stderr.setLevel(logging.WARNING)
    stderr.addFilter(lambda record: not logging.getLogger(record.name).handlers)
    return stderr


def warn(text: str) -> None:
    """Print a warning to the rank's log file and to stderr."""
    LOG.warning(text)
    tqdm.write(f"WARNING: {shown(text)}", file=sys.stderr)


class Progress:
    """The progress of a run: a bar on a terminal, otherwise a line for each logged step.

    It is a context manager. Only rank 0 shows the progress.
    """

    def __init__(self, total: int, first: int, world: World) -> None:
        self.total = total
        self._is_main = world.is_main
        self._on_terminal = sys.stderr.isatty()
        shown = self._is_main and self._on_terminal
        self._bar = tqdm(total=total, initial=first, disable=not shown, dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def logged(self, step: int, text: str) -> None:
        line = f"step {step}/{self.total}: {text}"
        self._bar.set_postfix_str(text, refresh=False)
        if self._is_main:
            LOG.info(line)
        if self._is_main and not self._on_terminal:
            print(shown(line), file=sys.stderr, flush=True)

    def update(self) -> None:
        self._bar.update()


class _Shown(logging.Formatter):
    """Also of the tracebacks in a log."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


class _QuietFile(logging.FileHandler):
    """A log file that ignores errors of writing it."""

    def _open(self) -> TextIOWrapper:
        return cast(TextIOWrapper, open_own(Path(self.baseFilename), self.mode))

    def handleError(self, record: logging.LogRecord) -> None:
        pass


def _log_warnings() -> None:
    """Log warnings in addition to stderr (`logging.captureWarnings` would only log them)."""
    shown = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        shown(message, category, filename, lineno, file, line)
        if file is None:
            LOG.warning(warnings.formatwarning(message, category, filename, lineno, line).rstrip())

    warnings.showwarning = show
