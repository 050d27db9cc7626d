"""One run at a time writes into a folder, on one node or on several."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

from steerlm2.runs import lock as lock_module
from steerlm2.runs.lock import LOCK_FILE, RunLock, lock_file

HOLD = """
import sys, time
from pathlib import Path
from steerlm2.runs.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def quick_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "SECONDS_PER_BEAT", 0.05)


@pytest.fixture
def other_run(tmp_path: Path) -> subprocess.Popen[str]:
    """A process that holds the lock of tmp_path."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_file_is_locked_for_one_process_at_a_time(
    other_run: subprocess.Popen[str], tmp_path: Path
) -> None:
    with (tmp_path / LOCK_FILE).open() as file:
        with pytest.raises(BlockingIOError):
            lock_file(file)
        other_run.kill()
        other_run.wait()
        assert lock_file(file)


def test_without_locks_nobody_is_kept_out(tmp_path: Path) -> None:
    """The kernel refuses to lock what was opened as a mere path."""
    file = os.open(tmp_path, os.O_PATH)
    assert not lock_file(file)
    os.close(file)


def on_another_node(folder: Path, beat: int = 0) -> None:
    holder = {"host": "another", "pid": 1, "beat": beat}
    (folder / LOCK_FILE).write_text(json.dumps(holder))


def test_a_second_run_is_refused_and_told_who_has_the_folder(
    other_run: subprocess.Popen[str], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"another run writes into {tmp_path} ") as error:
        RunLock(tmp_path)
    assert f"(process {other_run.pid} on {socket.gethostname()})" in str(error.value)
    other_run.kill()
    other_run.wait()


def test_the_lock_of_a_killed_run_is_taken_at_once(
    other_run: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without waiting for a sign of life: torchrun starts the run again right away."""
    monkeypatch.setattr(lock_module, "SECONDS_PER_BEAT", 60)
    os.kill(other_run.pid, signal.SIGKILL)
    other_run.wait()
    assert (tmp_path / LOCK_FILE).exists()
    RunLock(tmp_path).release()


def test_a_released_lock_leaves_nothing(tmp_path: Path) -> None:
    RunLock(tmp_path).release()
    assert list(tmp_path.iterdir()) == []
    RunLock(tmp_path).release()


def test_a_run_of_another_node_that_is_alive_is_respected(tmp_path: Path) -> None:
    """On a file system whose locks end at the node: its count goes on."""
    on_another_node(tmp_path)
    done = threading.Event()

    def live() -> None:
        beat = 0
        while not done.wait(0.02):
            beat += 1
            on_another_node(tmp_path, beat)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(ValueError, match=r"\(process 1 on another\)"):
            RunLock(tmp_path)
    finally:
        done.set()
        thread.join()


def test_a_run_of_another_node_that_is_dead_is_not(tmp_path: Path) -> None:
    on_another_node(tmp_path)
    RunLock(tmp_path).release()


def test_a_holder_gives_signs_of_life(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    beats = set()
    deadline = time.monotonic() + 10
    while len(beats) < 3 and time.monotonic() < deadline:
        beats.add(json.loads((tmp_path / LOCK_FILE).read_text())["beat"])
    lock.release()
    assert len(beats) == 3


def test_a_lock_without_a_holder_is_free(tmp_path: Path) -> None:
    """A run that was killed before it wrote its name."""
    (tmp_path / LOCK_FILE).touch()
    RunLock(tmp_path).release()


def test_a_lock_that_is_no_runs_is_free(tmp_path: Path) -> None:
    for text in ("[1, 2]", "3", "null", "{garbage", "\0" * 512, "[" * 100_000):
        (tmp_path / LOCK_FILE).write_text(text)
        RunLock(tmp_path).release()


def test_a_link_is_refused_and_its_target_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("precious")
    (tmp_path / LOCK_FILE).symlink_to(mine)
    with pytest.raises(ValueError, match=rf"{LOCK_FILE} must be a file that runs lock: remove it"):
        RunLock(tmp_path)
    assert mine.read_text() == "precious"


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_in_place_of_the_lock_is_refused(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    make(tmp_path / LOCK_FILE)
    with pytest.raises(ValueError, match=rf"{LOCK_FILE} must be a file that runs lock: remove it"):
        RunLock(tmp_path)


def test_a_run_removes_no_lock_but_its_own(tmp_path: Path) -> None:
    """Its folder was removed and made again, and another run has begun there."""
    folder = tmp_path / "run"
    folder.mkdir()
    first = RunLock(folder)
    shutil.rmtree(folder)
    folder.mkdir()
    second = RunLock(folder)
    first.release()
    with pytest.raises(ValueError, match="another run writes into"):
        RunLock(folder)
    second.release()


@pytest.fixture
def lost_node(tmp_path: Path) -> Iterator[IO[str]]:
    """The file of tmp_path's lock, which a lost node's run holds until this is closed."""
    on_another_node(tmp_path)
    with (tmp_path / LOCK_FILE).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def test_the_lock_of_a_lost_node_is_waited_for(
    lost_node: IO[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its file system keeps it for 10 beats; 4 show that the run is dead, 36 are the most."""
    threading.Timer(10 * lock_module.SECONDS_PER_BEAT, lost_node.close).start()
    RunLock(tmp_path).release()
    said = capsys.readouterr().err
    assert said.startswith(f"waiting for the lock of {tmp_path}: process 1 on another gives no ")
    assert said.count("\n") == 1


@pytest.mark.usefixtures("lost_node")
def test_a_lock_that_never_goes_is_not_waited_for_forever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock_module, "BEATS_OF_LEASE", 2)
    with pytest.raises(ValueError, match=r"\(process 1 on another\)"):
        RunLock(tmp_path)


def test_a_holder_notices_that_its_folder_was_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    lock = RunLock(folder)
    lock.check()
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"{folder} was removed or replaced"):
        lock.check()
    folder.mkdir()
    with pytest.raises(ValueError, match=f"{folder} was removed or replaced"):
        lock.check()
    lock.release()
