"""A fork server: Python scripts in processes of their own, without the seconds of their imports.

`ForkServer` starts one process that imports what recipes import, torch and torchtune among it, and
then waits on a Unix socket. For each request it forks a child, which takes over the request's
arguments, environment, working directory and files, and runs the script as `__main__`: `tune`, with
`run RECIPE --config CONFIG` for a recipe. The child is the leader of a session of its own. What it
prints, its exit status, and how it ends by an exception or a signal is what the script would do if
Python had started it.

torchrun, and so `tune run --nproc_per_node N`, forks its ranks likewise (`run_on_forked_ranks`),
without an agent that watches and restarts them. Where that is wanted, torchrun itself runs in the
child (`OWN_TORCHRUN`), or in a process of its own, and starts ranks with `ForkServer.python` in
place of Python (`PYTHON_EXEC`, a variable of torchrun's).

What differs from a process of its own: `/proc/PID/cmdline`, the seed of Python's hashes, which is
the same for all children, and variables that packages read when they are imported, which are the
server's. Where a test is about one of these, or about torchrun, it starts a real process.

This file is the server as well, and stands in for commands that recipes start (`main`).
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import ctypes
import fcntl
import gc
import json
import os
import runpy
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import IO, NoReturn

RunRanks = Callable[[argparse.Namespace], None]

MAX_REQUEST = 1 << 18
"""Bytes of arguments and environment; a message of a Unix socket must fit into its buffer."""
SECONDS_TO_END = 5
"""Between SIGTERM and SIGKILL for the ranks that are left; torchrun waits 30."""
PR_SET_PDEATHSIG = 1
NO_THREADS = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # pyarrow's allocator
}
"""For the server: a fork takes over only the thread that forks."""


@dataclass
class Request:
    """A script to run: what a new process of it would be given."""

    argv: list[str]
    """The script's file and its arguments."""
    cwd: str
    env: dict[str, str]
    """The whole environment."""
    files: list[int]
    """Numbers of the open files that come with the request."""


# In the process of the tests


class ForkServer:
    """Starts the server when it is first asked for a process; `close` ends it and its children.

    Args:
        interpreter: of the server, and so of all its children.
        env: the server's.
    """

    def __init__(
        self, interpreter: str | Path = sys.executable, env: Mapping[str, str] = os.environ
    ) -> None:
        self._interpreter, self._env = interpreter, env
        self._folder = tempfile.TemporaryDirectory(prefix="fork_server_")
        self._address = f"{self._folder.name}/socket"
        self._server: subprocess.Popen[bytes] | None = None

    def start(
        self,
        argv: Sequence[str | Path],
        *,
        cwd: Path,
        env: Mapping[str, str],
        stderr: IO[str] | None = None,
    ) -> ForkedProcess:
        """Run `argv[0]`, a Python script, with the rest as its arguments; stdin is empty.

        Args:
            stderr: a file in place of a pipe.
        """
        if self._server is None:
            self._server = self._started()
        command = [str(word) for word in argv]
        return ForkedProcess(self._address, command, cwd, dict(env), stderr)

    def shell_function(self, script: Path) -> dict[str, str]:
        """The environment that makes bash run a script here where its name is called.

        For recipes that start commands of their own.
        """
        command = shlex.join([sys.executable, "-IS", __file__, "run", self._address, str(script)])
        return {f"BASH_FUNC_{script.name}%%": f'() {{ exec {command} "$@"; }}'}

    @property
    def python(self) -> Path:
        """A program that runs scripts here, as a Python interpreter would."""
        program = Path(self._folder.name) / "python"
        if self._server is None:
            self._server = self._started()
        if not program.exists():
            command = shlex.join([sys.executable, "-IS", __file__, "run", self._address])
            program.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
            program.chmod(0o755)
        return program

    def close(self) -> None:
        if self._server is not None:
            self._server.communicate()  # the end of its stdin says that nobody needs it
        self._folder.cleanup()

    def _started(self) -> subprocess.Popen[bytes]:
        """The server, which listens already, and is still busy with its imports."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(self._address)
            listener.listen()
            return subprocess.Popen(
                [self._interpreter, __file__, "serve", str(listener.fileno())],
                env={**self._env, **NO_THREADS},
                stdin=subprocess.PIPE,
                pass_fds=[listener.fileno()],
                start_new_session=True,
            )


class ForkedProcess:
    """A child of the server, with the part of `subprocess.Popen` that tests use.

    When this object goes, the process and its group are killed.
    """

    def __init__(
        self,
        address: str,
        command: list[str],
        cwd: Path,
        env: dict[str, str],
        stderr: IO[str] | None = None,
    ) -> None:
        self.args = command
        self.returncode: int | None = None
        self._outputs: tuple[str, str] | None = None
        self.stdout, child_stdout = _pipe()
        self.stderr, child_stderr = _pipe()
        with child_stdout, child_stderr, open(os.devnull) as nothing:
            files = [file.fileno() for file in (nothing, child_stdout, stderr or child_stderr)]
            request = Request(command, str(cwd), env, [0, 1, 2])
            self._connection, self.pid = _ask(address, request, files)

    def poll(self) -> int | None:
        """The exit status, None while the process runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._connection.settimeout(timeout)
            try:
                self.returncode = os.waitstatus_to_exitcode(_answer(self._connection))
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
            self._connection.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What stdout and stderr have, to their ends; then `returncode` is known."""
        if self._outputs is not None:
            return self._outputs
        outputs = ["", ""]

        def read(i: int, stream: IO[str]) -> None:
            outputs[i] = stream.read()

        readers = [
            threading.Thread(target=read, args=(i, stream), daemon=True)
            for i, stream in enumerate((self.stdout, self.stderr))
        ]
        end = None if timeout is None else time.monotonic() + timeout
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(None if end is None else end - time.monotonic())
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
        self.wait(None if end is None else max(0.0, end - time.monotonic()))
        self.stdout.close()
        self.stderr.close()
        self._outputs = outputs[0], outputs[1]
        return self._outputs

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _ask(address: str, request: Request, files: Sequence[int]) -> tuple[socket.socket, int]:
    """Have the server fork: a connection, which will have the status, and the child's pid."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(address)
    socket.send_fds(connection, [json.dumps(asdict(request)).encode()], files)
    return connection, _answer(connection)


def _answer(connection: socket.socket) -> int:
    answer = b""
    with contextlib.suppress(ConnectionResetError):
        answer = connection.recv(64)
    if not answer:
        raise RuntimeError("the fork server has ended: its stderr says why")
    return int(answer)


def _pipe() -> tuple[IO[str], IO[str]]:
    reading, writing = os.pipe()
    return open(reading, encoding="utf-8"), open(writing, "w", encoding="utf-8")


# In place of a command (`ForkServer.shell_function`) or of Python (`ForkServer.python`)


def run_command(address: str, argv: list[str]) -> None:
    """Have the server run a script with this process's files, folder and environment.

    A `-u` before it is Python's own.

    Signals are passed on, and this process ends as the script does. When it is killed, the server
    kills the script.
    """
    files = sorted(int(name) for name in os.listdir("/proc/self/fd"))
    files = [file for file in files if os.path.exists(f"/proc/self/fd/{file}")]
    environment = dict(os.environ)
    if argv[0] == "-u":
        argv, environment = argv[1:], environment | {"PYTHONUNBUFFERED": "1"}
    request = Request(argv, os.getcwd(), environment, files)
    passed_on = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    signal.pthread_sigmask(signal.SIG_BLOCK, passed_on)  # until there is someone to pass them to
    connection, pid = _ask(address, request, files)
    for number in passed_on:
        signal.signal(number, lambda number, frame: os.kill(pid, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, passed_on)
    status = os.waitstatus_to_exitcode(_answer(connection))
    # The script has ended, and Python ends its handlers before itself: a signal would kill it then.
    signal.pthread_sigmask(signal.SIG_BLOCK, passed_on)
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {-status})
        os.kill(os.getpid(), -status)
    sys.exit(status)


# In the server


@dataclass
class Child:
    """A forked process and who asked for it."""

    pid: int
    ended: int
    """A pidfd."""
    client: socket.socket


class Server:
    """Forks children until its stdin ends."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._children: list[Child] = []
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._selector.register(0, selectors.EVENT_READ)

    def next_request(self) -> Request:
        """Serve; returns in children only, which are to run the request."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._listener:
                    if (request := self._fork()) is not None:
                        return request
                elif key.data is None:
                    self._end()
                elif key.fileobj == key.data.ended:
                    self._report(key.data)
                elif key.data in self._children:
                    # Nothing ever comes from a client, except its end.
                    self._selector.unregister(key.data.client)
                    _kill_group(key.data.pid)

    def _fork(self) -> Request | None:
        client, _ = self._listener.accept()
        message, files, _, _ = socket.recv_fds(client, MAX_REQUEST, 8)
        pid = os.fork()
        if pid == 0:
            client.close()
            self._close()
            request = Request(**json.loads(message))
            _enter(request, files)
            return request
        for file in files:
            os.close(file)
        with contextlib.suppress(OSError):  # of a client that was killed: its end comes next
            client.send(str(pid).encode())
        child = Child(pid, os.pidfd_open(pid), client)
        self._children.append(child)
        self._selector.register(child.ended, selectors.EVENT_READ, child)
        self._selector.register(client, selectors.EVENT_READ, child)
        return None

    def _report(self, child: Child) -> None:
        _, status = os.waitpid(child.pid, 0)
        with contextlib.suppress(KeyError):  # of a client that has gone
            self._selector.unregister(child.client)
        with contextlib.suppress(OSError):
            child.client.send(str(status).encode())
        self._selector.unregister(child.ended)
        self._children.remove(child)
        os.close(child.ended)
        child.client.close()

    def _end(self) -> None:
        for child in self._children:
            _kill_group(child.pid)
        os._exit(0)

    def _close(self) -> None:
        """A child keeps nothing of the server's files."""
        self._selector.close()
        self._listener.close()
        for child in self._children:
            child.client.close()
            os.close(child.ended)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _enter(request: Request, files: Sequence[int]) -> None:
    """Make this child what a new process of the request would be, with its `files`."""
    os.setsid()
    # As at a terminal: what a shell starts in the background ignores it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.fsync = _no_wait  # tests/test_files.py has what must be on the disk, and when
    free = 1 + max([*request.files, *files])
    moved = [fcntl.fcntl(file, fcntl.F_DUPFD, free) for file in files]
    for file in files:
        os.close(file)
    for number, file in zip(request.files, moved, strict=True):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request.cwd)
    of_server = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    of_request = request.env.get("PYTHONPATH", "").split(os.pathsep)
    os.environ.clear()
    os.environ.update(request.env)
    if EAGER in os.environ:
        import torch

        torch.compiler.set_stance("force_eager")
    if "PYTHONUNBUFFERED" in os.environ:
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    kept = [path for path in sys.path[1:] if path not in of_server]
    search_path[:] = [*filter(None, of_request), *kept]
    _become(request.argv, os.path.dirname(os.path.realpath(request.argv[0])))


def _no_wait(descriptor: int) -> None:
    """A run waits some tenths of a second for the disk, which is a tenth of a small one's time."""


EAGER = "FORKED_PROCESSES_COMPILE_NOTHING"
"""In a request's environment: torch.compile, also with fullgraph, then returns what it is given."""

search_path: list[str] = []
"""A child's, before its script changes it; without the script's own folder."""


def _become(argv: Sequence[str], folder: str) -> None:
    """A script has a folder of its own first on the path; each process draws its own numbers."""
    import numpy as np
    import torch

    sys.argv[:] = argv
    sys.path[:] = [folder, *search_path]
    torch.default_generator.seed()
    np.random.seed()


def run_to_the_end(script: Callable[[], object]) -> NoReturn:
    """Call the script, and end the process as Python does after a script: its exit status, the
    traceback of an exception, non-daemon threads, `atexit`.

    The modules aren't taken apart, which takes a second in a forked process.
    """
    status = 0
    try:
        script()
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        status = error.code if isinstance(error.code, int) else error.code is not None
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status = 1
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status & 0xFF)


OWN_TORCHRUN = "FORKED_PROCESSES_KEEP_TORCHRUN"
"""In a request's environment: torchrun itself starts the ranks, for several nodes and restarts."""


def torchrun_or_forked_ranks(torchrun: RunRanks) -> RunRanks:
    """In place of `torch.distributed.run.run`."""

    def run(args: argparse.Namespace) -> None:
        if OWN_TORCHRUN in os.environ:
            torchrun(args)
        else:
            run_on_forked_ranks(args)

    return run


def run_on_forked_ranks(args: argparse.Namespace) -> None:
    """As torchrun does on one node, without restarts.

    Each rank runs `args.training_script`. As with torchrun they meet in a store of the launcher's;
    when one of them fails, the others get SIGTERM, and the launcher ends with status 1.
    """
    import torch.distributed as dist

    if args.nnodes not in ("1", "1:1") or args.max_restarts or args.rdzv_endpoint:
        raise ValueError("for several nodes, and for restarts, set OWN_TORCHRUN (tune_torchrun)")
    size = int(args.nproc_per_node)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    ranks: set[int] = set()
    for rank in range(size):
        if (pid := os.fork()) == 0:
            listener.close()
            _become_rank(rank, size, port)
            run_to_the_end(lambda: _run_training_script(args))
        ranks.add(pid)
    store = dist.TCPStore(
        "127.0.0.1",
        port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    failed = _wait_for_ranks(ranks)
    del store
    if failed:
        sys.exit(1)


def _become_rank(rank: int, size: int, port: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # nobody else would end it
    sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]  # torchrun: python -u
    os.environ.update(
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_MAX_RESTARTS": "0",
            "TORCHELASTIC_RUN_ID": f"forked_{os.getppid()}",
        }
    )


def _run_training_script(args: argparse.Namespace) -> None:
    script = args.training_script
    argv = [script, *args.training_script_args]
    if args.module:  # a recipe of the user's, as `tune` calls it
        _become(argv, os.getcwd())
        runpy.run_module(script, run_name="__main__", alter_sys=True)
    else:
        _become(argv, os.path.dirname(script))
        runpy.run_path(script, run_name="__main__")


def _wait_for_ranks(ranks: set[int]) -> bool:
    """Wait for their ends; whether one of them failed, or the launcher was told to stop."""
    failed = False

    def send(number: int) -> None:
        for pid in ranks:
            os.kill(pid, number)

    def stop(number: int = 0, frame: FrameType | None = None) -> None:
        nonlocal failed
        failed = True
        send(signal.SIGTERM)
        signal.alarm(SECONDS_TO_END)

    signal.signal(signal.SIGALRM, lambda *_: send(signal.SIGKILL))
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    while ranks:
        pid, status = os.wait()
        ranks.discard(pid)
        if status != 0:
            print(f"a rank ended with status {os.waitstatus_to_exitcode(status)}", file=sys.stderr)
            if not failed:
                stop()
    return failed


def preload() -> None:
    """Import what recipes import, and have torchrun fork.

    Nothing here may start a thread: a child would have what the thread held, but not the thread.
    """
    import torch.distributed.run as launcher

    launcher.run = torchrun_or_forked_ranks(launcher.run)
    import scipy.stats  # noqa: F401
    import torchtune._cli.tune  # noqa: F401
    from torchtune._recipe_registry import get_all_recipes

    from steerlm2._tune import RECIPES
    from steerlm2.runs.metrics import plot_curves

    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        plot_curves([{"step": 1, "loss": 1.0}], ["loss"], Path(file.name))  # imports matplotlib
    for recipe in get_all_recipes():
        if recipe.name in RECIPES:
            runpy.run_path(recipe.file_path)
    assert len(os.listdir("/proc/self/task")) == 1
    gc.collect()
    gc.freeze()  # else a child's first collection would copy all pages


def main() -> None:
    if sys.argv[1] == "run":
        run_command(sys.argv[2], sys.argv[3:])
    preload()
    request = Server(socket.socket(fileno=int(sys.argv[2]))).next_request()
    run_to_the_end(lambda: runpy.run_path(request.argv[0], run_name="__main__"))


if __name__ == "__main__":
    main()
