"""A server's address, and its process: from the first connection to SIGTERM."""

from __future__ import annotations

import importlib.util
import math
import signal
import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from steerlm2.checkpoint_dirs import resolve_checkpoint_dir
from steerlm2.runs.logs import shown

if TYPE_CHECKING:
    from fastapi import FastAPI

REQUIRED = ("fastapi", "prometheus_client", "uvicorn")
"""Packages of the extra `serve`."""

KEEP_ALIVE_SECONDS = 75
"""How long an idle connection is kept open. A choice: longer than the 60 s of common proxies, which
otherwise reuse connections that the server has just closed."""


def check_packages() -> None:
    """Raises:
    ValueError: naming the packages that a server needs and that aren't installed.
    """
    if lacking := [name for name in REQUIRED if importlib.util.find_spec(name) is None]:
        raise ValueError(f'the server needs {", ".join(lacking)}: pip install "steerlm2[serve]"')


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that is bound to an address but doesn't accept connections yet.

    Raises:
        ValueError: where the address can't be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise ValueError(
            f"can't listen on host {host!r}, port {port}: {error.strerror}. Give another host= or "
            "port= (port=0 takes any free one)"
        ) from error
    return bound


def serve(app: FastAPI, bound: socket.socket, what: str, path: str, request_timeout: float) -> None:
    """Answer requests until SIGTERM or SIGINT; what is accepted by then is answered first.

    Args:
        what: is served, for the line that says so.
        path: of the address in that line.
        request_timeout: seconds that the last answers have.
    """
    import uvicorn

    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            # The requests' own timeout comes first, which says that it has.
            timeout_graceful_shutdown=math.ceil(request_timeout) + 1,
        )
    )

    def stop(signum: int, frame: object) -> None:
        server.should_exit = True

    # uvicorn replaces these handlers while it runs, and raises the signal again afterwards, which
    # would end the process with a status other than 0.
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, stop)
    bound.listen()
    host, port = bound.getsockname()[:2]
    address = f"[{host}]" if ":" in host else host
    print(shown(f"serving {what} on http://{address}:{port}{path}"), flush=True)
    server.run(sockets=[bound])


def served_name(name: str | None, checkpointer: Mapping[str, Any] | None) -> str:
    """The model's name for callers: the given one, or the checkpoint's last two folders."""
    if name is not None:
        return name
    if checkpointer is None:
        return "untrained"
    folder = resolve_checkpoint_dir(checkpointer["checkpoint_dir"])
    return "/".join(folder.absolute().parts[-2:])
