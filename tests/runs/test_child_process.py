"""A command that ends with its caller: how it ends, and what it has of its caller until then."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from steerlm2.runs.child_process import ChildProcess

SAVES = """
import os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
def stop(number, frame):
    time.sleep(float(sys.argv[2]))
    (folder / "saved").write_text(str(number))
    sys.exit(5)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
(folder / "pid").write_text(str(os.getpid()))
time.sleep(60)
"""
"""Saves for sys.argv[2] seconds when it is told to end."""

DEAF = """
import os, signal, subprocess, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "60"])
Path(sys.argv[1], "pid").write_text(f"{os.getpid()} {child.pid}")
time.sleep(60)
"""
"""Ignores SIGTERM, and so does its child."""

CALLER = """
import sys
from steerlm2.runs.child_process import ChildProcess
seconds, own_group, *command = sys.argv[1:]
ChildProcess(command, seconds_to_end=eval(seconds), own_group=eval(own_group)).wait()
"""


def alive(pid: int) -> bool:
    """Neither gone nor waiting for its parent to take note."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def pids(folder: Path) -> list[int]:
    """Of the command, once it has told."""
    file = folder / "pid"
    wait_until(lambda: file.exists() and file.read_text() != "")
    return [int(pid) for pid in file.read_text().split()]


def python(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", code, *map(str, arguments)]


@pytest.mark.parametrize("own_group", [False, True])
@pytest.mark.parametrize(
    ("command", "status"), [("true", 0), ("exit 3", 3), ("kill -9 $$", 128 + 9)]
)
def test_the_status_is_the_commands(own_group: bool, command: str, status: int) -> None:
    child = ChildProcess(["bash", "-c", command], seconds_to_end=5, own_group=own_group)
    assert child.wait() == status
    assert child.has_ended()
    assert child.stop() == status


def test_a_command_that_can_not_be_started_says_so(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        assert ChildProcess(["/no/command"], seconds_to_end=5, output=log).wait() == 127
    said = "/no/command can't be started: No such file or directory\n"
    assert (tmp_path / "log").read_text() == said


def test_output_environment_and_files_are_what_it_is_given(tmp_path: Path) -> None:
    """And no other file: not the pipe to the watcher either."""
    code = "import os; print(os.environ['ONLY'], sorted(map(int, os.listdir('/proc/self/fd'))))"
    with (tmp_path / "log").open("wb") as log, (tmp_path / "lock").open("wb") as lock:
        ChildProcess(
            python(code),
            seconds_to_end=5,
            output=log,
            env={"ONLY": "this"},
            pass_fds=(lock.fileno(),),
        ).wait()
        fd = lock.fileno()
    word, open_files = (tmp_path / "log").read_text().split(" ", 1)
    assert word == "this"
    listing = {3, 4} - {fd}  # the folder that is being listed is open too
    assert set(eval(open_files)) - listing == {0, 1, 2, fd}


def test_stop_lets_it_save(tmp_path: Path) -> None:
    """As long as it takes: None."""
    child = ChildProcess(python(SAVES, tmp_path, 1), seconds_to_end=None)
    pids(tmp_path)
    assert not child.has_ended()
    assert child.stop() == 5
    assert (tmp_path / "saved").read_text() == str(int(signal.SIGTERM))


def test_it_is_stopped_at_the_end_of_its_context(tmp_path: Path) -> None:
    with ChildProcess(python(SAVES, tmp_path, 0), seconds_to_end=None):
        (pid,) = pids(tmp_path)
    assert not alive(pid)
    assert (tmp_path / "saved").exists()


def test_what_does_not_end_is_killed(tmp_path: Path) -> None:
    """With all that it has started, in a group of its own."""
    child = ChildProcess(python(DEAF, tmp_path), seconds_to_end=0.5, own_group=True)
    both = pids(tmp_path)
    assert child.stop() == 128 + signal.SIGKILL
    wait_until(lambda: not any(map(alive, both)))


@pytest.mark.parametrize("own_group", [False, True])
def test_it_does_not_outlive_a_killed_caller(own_group: bool, tmp_path: Path) -> None:
    """SIGKILL, after which the caller can do nothing: the command is told to end, and may save."""
    caller = subprocess.Popen(python(CALLER, None, own_group, *python(SAVES, tmp_path, 0.5)))
    (pid,) = pids(tmp_path)
    caller.kill()
    caller.wait()
    wait_until(lambda: not alive(pid))
    assert (tmp_path / "saved").read_text() == str(int(signal.SIGTERM))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_a_terminal_sends_reaches_a_command_in_the_callers_group(
    number: signal.Signals, tmp_path: Path
) -> None:
    """The command is sent it once by the terminal, and ends; its watcher waits for that."""
    caller = subprocess.Popen(
        python(CALLER, None, False, *python(SAVES, tmp_path, 0.5)), start_new_session=True
    )
    (pid,) = pids(tmp_path)
    os.killpg(caller.pid, number)
    caller.wait()
    wait_until(lambda: not alive(pid))
    assert (tmp_path / "saved").exists()


def test_what_a_terminal_sends_does_not_reach_a_group_of_its_own(tmp_path: Path) -> None:
    """Here SIGUSR1, which would end it."""
    code = f"import signal; signal.signal(signal.SIGUSR1, signal.SIG_IGN)\n{CALLER}"
    caller = subprocess.Popen(
        python(code, None, True, *python(SAVES, tmp_path, 0)), start_new_session=True
    )
    (pid,) = pids(tmp_path)
    os.killpg(caller.pid, signal.SIGUSR1)
    caller.send_signal(signal.SIGTERM)
    caller.wait()
    wait_until(lambda: not alive(pid))
    assert (tmp_path / "saved").read_text() == str(int(signal.SIGTERM))
