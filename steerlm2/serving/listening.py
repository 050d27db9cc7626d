"""A server's address, and its process: from the first connection to SIGTERM."""

from __future__ import annotations

import gc
import importlib.util
import ipaddress
import math
import signal
import socket
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from steerlm2.checkpoint_dirs import resolve_checkpoint_dir
from steerlm2.config.keys import ServingKeys
from steerlm2.escaping import shown
from steerlm2.inference.server_client import API_KEY
from steerlm2.serving.hosts import usual_hosts

if TYPE_CHECKING:
    from fastapi import FastAPI

    from steerlm2.serving.http import Metrics

REQUIRED = ("fastapi", "httptools", "prometheus_client", "uvicorn")
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


def allowed_hosts(keys: ServingKeys, bound: socket.socket, api_key: str | None) -> Sequence[str]:
    """The hosts that a server answers for: those of its config, or the usual ones."""
    if keys.allowed_hosts is not None:
        return keys.allowed_hosts
    return usual_hosts(keys.host, bound.getsockname()[0], api_key)


def exposure_notice(bound: socket.socket, api_key: str | None) -> str | None:
    """What to say of a server that others than this machine's users reach and may use."""
    address = bound.getsockname()[0]
    if api_key is not None or ipaddress.ip_address(address).is_loopback:
        return None
    return (
        f"notice: this server listens on {address} and asks for no API key: whoever reaches the "
        f"port may use it. Set {API_KEY} in its environment, or host=127.0.0.1"
    )


def serve(
    app: FastAPI,
    bound: socket.socket,
    what: str,
    path: str,
    keys: ServingKeys,
    *,
    api_key: str | None,
    outgoing: int = 0,
) -> None:
    """Answer requests until SIGTERM or SIGINT; what is accepted by then is answered first.

    Args:
        what: is served, for the line that says so.
        path: of the address in that line.
        keys: limits of connections, and the seconds that the last answers have.
        api_key: that callers must send.
        outgoing: connections that the server itself opens.

    Raises:
        ValueError: where the process may open too few files.
    """
    from steerlm2.serving.connections import (
        Connections,
        GuardedConfig,
        GuardedServer,
        connection_room,
        log_seldom,
    )

    room = connection_room(keys.max_connections, outgoing)
    if room < keys.max_connections:
        print(
            f"notice: at most {room} connections at a time instead of {keys.max_connections} "
            "(max_connections): the process may open no more files (ulimit -n)"
        )
    if (notice := exposure_notice(bound, api_key)) is not None:
        print(notice)
    metrics: Metrics = app.state.metrics
    connections = Connections(
        room,
        header_timeout=keys.header_timeout,
        body_timeout=keys.body_timeout,
        on_refusal=lambda status: metrics.refused.labels(status).inc(),
    )
    metrics.connections.set_function(lambda: len(connections))
    server = GuardedServer(
        GuardedConfig(
            app,
            connections,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            # The requests' own timeout comes first, which says that it has.
            timeout_graceful_shutdown=math.ceil(keys.request_timeout) + 1,
        )
    )
    log_seldom()
    # The model's objects stay: to go through them again and again, as a body with very many values
    # would make the garbage collector do, takes seconds in which nothing else runs.
    gc.collect()
    gc.freeze()

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
