"""What a pipeline has done, on disk: so that a rerun does what is left and nothing twice.

A stage is complete when its command has ended well. It stays so as long as its config and the
content of its inputs are the same, and its files are there. `output_dir/state/STAGE.json` holds
that.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from steerlm2.checkpoint_dirs import file_digest, resolve_checkpoint_dir
from steerlm2.config.environment import variables_in
from steerlm2.escaping import shown
from steerlm2.files import parse_json, write_durably
from steerlm2.runs.lock import is_in_place, lock_file

RESUME_FILES = {"checkpoints", "earlier_runs"}
"""In a stage's folder: not what it was run for."""

LOCK = "lock"
"""File that a pipeline and its stages lock."""
DOING = "doing"
"""File that a pipeline locks for itself alone, and that says what it is doing."""
SECONDS_FOR_STRAY_STAGE = 60


@dataclass
class StageRecord:
    """What is known of a stage."""

    fingerprint: str
    command: str
    complete: bool = False
    runs: int = 0
    """How often its command was started."""
    seconds: float = 0.0
    """Of all runs that ended."""
    files: list[str] = field(default_factory=list)
    """What it left in its folder, by relative path."""


class PipelineState:
    """The records of all stages, and the lock that keeps two pipelines apart.

    Args:
        output_dir: of the pipeline.
    """

    def __init__(self, output_dir: Path) -> None:
        self.folder = output_dir / "state"
        self._damaged: set[str] = set()
        self._held: IO[str] | None = None
        self._doing: IO[str] | None = None

    def read(self, stage: str) -> StageRecord | None:
        """None where there is none. A damaged one is none, with a warning."""
        file = self.folder / f"{stage}.json"
        if not file.exists():
            return None
        try:
            return _record(parse_json(file.read_bytes()))
        except (ValueError, TypeError) as error:
            if stage not in self._damaged:
                self._damaged.add(stage)
                text = (
                    f"WARNING: {file} is damaged ({error}): whether stage {stage} is complete "
                    "isn't known, and it is done again (with adopt=true its files count as "
                    "complete)"
                )
                print(shown(text), file=sys.stderr)
            return None

    def write(self, stage: str, record: StageRecord) -> None:
        """Whole or not at all, whenever the process is killed.

        Raises:
            ValueError: where the folder was removed since it was locked.
        """
        if self._held is not None and not is_in_place(self._held, self.folder / LOCK):
            raise ValueError(
                f"{self.folder.parent} was removed or replaced while the pipeline wrote into it: "
                "the same command begins anew"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_durably(self.folder / f"{stage}.json", json.dumps(asdict(record), indent=2))

    @contextlib.contextmanager
    def lock(self) -> Iterator[int]:
        """The lock's file descriptor: a stage that inherits it holds the lock with us, so that one
        that outlives a killed pipeline isn't joined by a second.

        Raises:
            ValueError: where another pipeline works here, at once; where a stage that one left
                behind goes on, after a minute.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._open(LOCK) as file, self._open(DOING) as doing:
            started, waits = time.monotonic(), False
            while True:
                try:
                    lock_file(file)
                    break
                except BlockingIOError as error:
                    who, told = "another pipeline", _told(doing)
                    if not _is_held(doing):
                        who = "a stage that an earlier pipeline left behind"
                        if time.monotonic() < started + SECONDS_FOR_STRAY_STAGE:
                            if not waits:
                                print(shown(f"waiting for {who}{told}"), flush=True)
                            waits = True
                            time.sleep(0.5)
                            continue
                    raise ValueError(
                        f"{who} works in {self.folder.parent}{told}: wait for it, or end it"
                    ) from error
            fcntl.lockf(doing, fcntl.LOCK_EX)
            self._held, self._doing = file, doing
            try:
                self.now_at("its start")
                yield file.fileno()
                doing.truncate(0)
            finally:
                self._held = self._doing = None

    def now_at(self, what: str) -> None:
        """Tell other pipelines that want the folder what this one is doing."""
        assert self._doing is not None
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        told = f"process {os.getpid()} on {socket.gethostname()}, at {what} since {since}"
        self._doing.seek(0)
        self._doing.truncate(0)
        self._doing.write(told)
        self._doing.flush()

    def _open(self, name: str) -> IO[str]:
        path = self.folder / name
        try:
            return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+")
        except OSError as error:
            if path.is_symlink() or (path.exists() and not path.is_file()):
                raise ValueError(f"{path} must be a file, not a link: remove it") from error
            raise


def _record(values: dict[str, Any]) -> StageRecord:
    """
    Raises:
        TypeError: where the values aren't those of a record.
    """
    record = StageRecord(**values)
    known = StageRecord("", "", files=[""])
    for name, own in vars(record).items():
        kind = (int, float) if name == "seconds" else type(getattr(known, name))
        if not isinstance(own, kind):
            raise TypeError(f"{name} can't be {own!r}")
    if not all(isinstance(name, str) for name in record.files):
        raise TypeError("files must be names")
    return record


def _is_held(doing: IO[str]) -> bool:
    """Whether the pipeline itself goes on: no child of it inherits this lock."""
    try:
        fcntl.lockf(doing, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    fcntl.lockf(doing, fcntl.LOCK_UN)
    return False


def _told(doing: IO[str]) -> str:
    doing.seek(0)
    text = doing.read()
    return f" ({text})" if text else ""


def fingerprint(
    config: Any, arguments: tuple[str, ...], code: Path | None, output_dir: str, inputs: list[Path]
) -> str:
    """Of all that a stage's result depends on; it tells nothing of that.

    Args:
        config: the values of its YAML.
        arguments: of the command line; the pipeline's folder may be moved.
        code: the recipe's file, where it is the user's own.
        inputs: files and folders that it reads.
    """
    own_paths = re.compile(rf"(?<![\w./-]){re.escape(output_dir)}(?=[/\"'\],]|$)")
    parts = {
        "config": config,
        "arguments": [own_paths.sub("{output_dir}", argument) for argument in arguments],
        "code": digest(code) if code is not None else None,
        "inputs": [digest(path) for path in inputs],
    }
    if variables := variables_in([config, *arguments]):
        parts["environment"] = {name: os.environ.get(name) for name in variables}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def inputs_of(config: Any, folder: Path, output_dir: Path) -> list[Path]:
    """The existing files and folders that the values of a stage's whole config name.

    Args:
        config: with the command line's values. What has no "/" and no suffix is a word, not a path;
            `output` and `output_dir` aren't inputs, and `outputs` and `data.dir` stand in the paths
            of those that are.
        folder: the stage's own, which isn't an input.
        output_dir: the pipeline's: no folder around it is one.
    """
    found = []
    for text in _texts(config):
        path = Path(text).expanduser()
        try:
            exists = ("/" in text or path.suffix != "") and path.exists()
        except OSError:  # too long a name
            continue
        own = path.resolve().is_relative_to(folder.resolve())
        around = output_dir.resolve().is_relative_to(path.resolve())
        if exists and not own and not around:
            found.append(path)
    return list(dict.fromkeys(found))


def digest(path: Path) -> str:
    """Of a file, or of all files of a folder; of a training run's folder, its last export's.

    A folder's README.md is for people: an evaluation is added to that of its own input.
    """
    if not path.is_dir():
        return file_digest(path)
    folder = resolve_checkpoint_dir(path, missing_ok=True)
    everything = (file for file in folder.rglob("*") if file.is_file())
    files = sorted(file for file in everything if file.name != "README.md")
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(file_digest, files))
    names = [file.relative_to(folder).as_posix() for file in files]
    return hashlib.sha256(json.dumps([*zip(names, digests, strict=True)]).encode()).hexdigest()


def files_in(folder: Path) -> list[str]:
    """What a stage left in its folder, by relative path, without what is for resuming only."""
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    return [name.as_posix() for name in names if name.parts[0] not in RESUME_FILES]


def set_aside(folder: Path) -> Path:
    """Move a stage's folder out of the way of a new one; returns where it is now."""
    earlier = folder.parent / "earlier"
    earlier.mkdir(exist_ok=True)
    number = 1
    while (target := earlier / f"{folder.name}_{number}").exists():
        number += 1
    return folder.rename(target)


def _texts(value: Any, above: str = "") -> Iterator[str]:
    """
    Args:
        above: the key of the value.
    """
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in ("output", "output_dir", "outputs") and (key, above) != ("dir", "data"):
                yield from _texts(item, key)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
