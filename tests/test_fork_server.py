"""A script that the fork server runs is what it would be in a process of Python's own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fork_server import OWN_TORCHRUN, ForkedProcess, ForkServer

Start = Callable[..., ForkedProcess]

TORCHRUN = Path(sys.executable).with_name("torchrun")

ENV = {
    "PATH": os.environ["PATH"],
    "MINE": "1",
    "PYTHONPATH": "/nowhere",
    "OMP_NUM_THREADS": "1",
}

STATE = """
import json, os, sys, signal
import numpy as np  # which starts threads where it may
json.dump({
    "name": __name__, "argv": sys.argv, "path": sys.path, "cwd": os.getcwd(),
    "env": dict(os.environ), "main": sys.modules["__main__"].__file__,
    "stdin": sys.stdin.read(), "leads_session": os.getsid(0) == os.getpid(),
    "sigterm": signal.getsignal(signal.SIGTERM) is signal.SIG_DFL,
    "threads": len(os.listdir("/proc/self/task")), "files": sorted(os.listdir("/proc/self/fd")),
}, sys.stdout)
"""


@pytest.fixture
def start(fork_server: ForkServer, tmp_path: Path) -> Start:
    """`start(text, *arguments)` runs the text as a script."""

    def begin(
        text: str, *arguments: str, command: tuple[Any, ...] = (), **variables: str
    ) -> ForkedProcess:
        (tmp_path / "script.py").write_text(text)
        return fork_server.start(
            [*command, tmp_path / "script.py", *arguments],
            cwd=tmp_path,
            env=ENV | variables,
        )

    return begin


def test_state_is_that_of_a_new_process(start: Start, tmp_path: Path) -> None:
    forked = json.loads(start(STATE, "a", "b c").communicate()[0])
    real = subprocess.run(
        [sys.executable, tmp_path / "script.py", "a", "b c"],
        cwd=tmp_path,
        env=ENV,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        start_new_session=True,
        check=True,
    )
    expected = json.loads(real.stdout)
    for variables in (forked["env"], expected["env"]):
        variables.pop("LC_CTYPE", None)  # Python sets it while it starts
    assert forked == expected


def test_random_numbers_differ_from_process_to_process(start: Start) -> None:
    draw = (
        "import random, torch, numpy as np\n"
        "print(random.random(), np.random.rand(), torch.rand(()).item())"
    )
    first, second = (start(draw).communicate()[0].split() for _ in range(2))
    assert all(one != other for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("text", "status", "stderr"),
    [
        ("", 0, ""),
        ("import sys; sys.exit()", 0, ""),
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit(True)", 1, ""),
        ("import sys; sys.exit('why')", 1, "why\n"),
        ("import os; os._exit(7)", 7, ""),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
        ("import atexit, sys; atexit.register(lambda: print('end', file=sys.stderr))", 0, "end\n"),
    ],
)
def test_exit_status(start: Start, text: str, status: int, stderr: str) -> None:
    process = start(text)
    assert process.communicate()[1] == stderr
    assert process.returncode == status


def test_an_exception_is_a_traceback_and_status_1(start: Start) -> None:
    process = start("print('before'); 1 / 0")
    stdout, stderr = process.communicate()
    assert (process.returncode, stdout) == (1, "before\n")
    assert stderr.startswith("Traceback (most recent call last)")
    assert stderr.endswith("ZeroDivisionError: division by zero\n")


def test_signals_reach_the_script(start: Start) -> None:
    process = start(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)"
    )
    assert process.stdout.readline() == "ready\n"
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    process.terminate()
    assert process.wait() == 5
    process.communicate()


# Ranks


def test_ranks_meet_in_torchruns_store(start: Start) -> None:
    """Each has its place in the environment, and its own argv."""
    process = start(
        "import os, sys, torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "rank = torch.tensor([dist.get_rank() + 1])\n"
        "dist.all_reduce(rank)\n"
        "places = os.environ['LOCAL_RANK'], os.environ['LOCAL_WORLD_SIZE']\n"
        # in one piece: ranks write at the same time
        "sys.stdout.write(' '.join([*places, str(rank.item()), sys.argv[1]]) + '\\n')",
        "word",
        command=(TORCHRUN, "--nproc_per_node=3"),
    )
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert sorted(stdout.splitlines()) == [f"{rank} 3 6 word" for rank in range(3)]


def test_a_rank_that_fails_ends_the_others(start: Start) -> None:
    process = start(
        "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(4)\ntime.sleep(60)",
        command=(TORCHRUN, "--nproc_per_node=2"),
    )
    stderr = process.communicate()[1]
    assert process.returncode == 1
    assert "a rank ended with status 4" in stderr
    assert "a rank ended with status -15" in stderr


def test_torchrun_itself_starts_forked_ranks_again(start: Start, fork_server: ForkServer) -> None:
    """Those of the second attempt are children of the server too."""
    process = start(
        "import os, signal, sys\n"
        "attempt, rank = os.environ['TORCHELASTIC_RESTART_COUNT'], os.environ['RANK']\n"
        "if attempt + rank == '01': os.kill(os.getpid(), signal.SIGKILL)\n"
        "if attempt == '0': signal.pause()\n"
        "sys.stdout.write(f'{rank} {os.getppid()}\\n')",
        command=(TORCHRUN, "--nproc_per_node=2", "--max_restarts=1"),
        PYTHON_EXEC=str(fork_server.python),
        **{OWN_TORCHRUN: "1"},
    )
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    ranks, parents = zip(*map(str.split, stdout.splitlines()), strict=True)
    assert sorted(ranks) == ["0", "1"]
    assert len(set(parents)) == 1
    assert str(process.pid) not in parents


# Its end


def test_ends_with_those_who_ask(tmp_path: Path) -> None:
    """Killed tests leave no server and none of its children."""
    (tmp_path / "script.py").write_text(
        "import os, time; print(os.getpid(), os.getppid(), flush=True); time.sleep(60)"
    )
    asks = (
        "import os, sys; from pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from fork_server import ForkServer\n"
        "process = ForkServer().start(['script.py'], cwd=Path.cwd(), env=os.environ)\n"
        "print(process.stdout.readline(), end='', flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run(
        [sys.executable, "-c", asks], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    assert killed.returncode == -signal.SIGKILL
    for pid in map(int, killed.stdout.split()):
        while is_alive(pid):  # the test's time limit is the limit
            time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
