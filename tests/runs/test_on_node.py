"""A command's end is the wrapper's end, and SIGTERM goes to what the command starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from steerlm2.runs import on_node

ON_NODE = [sys.executable, "-m", "steerlm2.runs.on_node"]


@pytest.mark.parametrize(
    ("command", "status"),
    [(["true"], 0), (["bash", "-c", "exit 3"], 3), (["bash", "-c", "kill -9 $$"], 128 + 9)],
)
def test_the_status_is_the_commands(command: list[str], status: int) -> None:
    assert subprocess.run([*ON_NODE, *command]).returncode == status


def test_no_command_is_an_error() -> None:
    result = subprocess.run(ON_NODE, capture_output=True, text=True)
    assert result.returncode == 1
    assert "usage: " in result.stderr


@pytest.mark.parametrize("seconds_deaf", [0, 1])
def test_sigterm_reaches_the_children_also_those_that_first_ignore_it(
    seconds_deaf: int, tmp_path: Path
) -> None:
    """The command itself survives it. Sent again every 5 seconds."""
    child = f"""
import signal, time
from pathlib import Path
Path({str(tmp_path / "started")!r}).touch()
time.sleep({seconds_deaf})
def stop(number, frame):
    Path({str(tmp_path / "stopped")!r}).touch()
    raise SystemExit(0)
signal.signal(signal.SIGTERM, stop)
Path({str(tmp_path / "listening")!r}).touch()
time.sleep(60)
"""
    parent = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {child!r}]))"
    process = subprocess.Popen([*ON_NODE, sys.executable, "-c", parent])
    awaited = tmp_path / ("started" if seconds_deaf else "listening")
    while not awaited.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "stopped").exists()


def test_sigterm_ends_a_recipe_that_does_not_save(tmp_path: Path) -> None:
    """In its `main` it no longer ignores what its launcher ignores."""
    recipe, config = tmp_path / "recipe.py", tmp_path / "config.yaml"
    config.write_text("seconds: 60\n")
    recipe.write_text(f"""
import dataclasses, time
from pathlib import Path
from steerlm2.runs.entry import recipe_main
@dataclasses.dataclass
class Config:
    seconds: int
@recipe_main(Config)
def main(cfg: Config) -> None:
    Path({str(tmp_path / "running")!r}).touch()
    time.sleep(cfg.seconds)
main()
""")
    launcher = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]) != 0)"
    rank = [sys.executable, str(recipe), "--config", str(config)]
    process = subprocess.Popen([*ON_NODE, sys.executable, "-c", launcher, *rank])
    while not (tmp_path / "running").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 1


def test_a_child_that_has_just_ended_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the listing and the signal its parent has waited for it; the next one gets it."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    living = subprocess.Popen(["sleep", "60"])
    monkeypatch.setattr(on_node, "_children", lambda pid: [ended.pid, living.pid])
    try:
        on_node._signal_children(os.getpid())
        assert living.wait(timeout=10) == -signal.SIGTERM
    finally:
        living.kill()


def test_a_thread_that_has_just_ended_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the listing of the threads and the reading of theirs."""
    glob = Path.glob
    ended = Path("/proc/self/task/0/children")
    monkeypatch.setattr(Path, "glob", lambda path, pattern: [ended, *glob(path, pattern)])
    child = subprocess.Popen(["sleep", "60"])
    try:
        assert child.pid in on_node._children(os.getpid())
    finally:
        child.kill()
        child.wait()
