"""Connections that can't hold up a server: deadlines, caps, and room for the next caller.

uvicorn's protocol reads heads and bodies of any length for any time. Here a head has a deadline and
a largest size, a body has a deadline, and an answer that nobody reads is given up. The number of
connections is bounded: to make room for a new one, that is closed which has been without a request
for the longest time, and some room is kept in which only the paths that are always open are
answered, so that a probe of the server's health finds it whatever other callers do.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from steerlm2.serving.http import ALWAYS_OPEN, RequestError, json_response, overloaded

log = logging.getLogger(__name__)

MOST_HEAD_BYTES, MOST_HEAD_FIELDS = 32_768, 100
"""Of a request's head, and of what follows a body. A choice, as common proxies have it."""

MOST_PIPELINED = 16
"""Requests that a connection may send ahead of their answers."""

WRITE_SECONDS = 60.0
"""That an answer waits for a caller who doesn't read it."""

SPARE_CONNECTIONS = 8
"""Of those that a server may have: requests that need work don't take them."""

ACCEPTED_AT_ONCE, WAITING_CONNECTIONS = 16, 1024
"""Connections that are accepted before others are served, and that the system keeps until then."""

OTHER_FILES = 16
"""Descriptors for files that are opened while a server runs."""

LOG_SECONDS = 10.0
"""In which one message is logged once: callers can cause any number of them."""


class Connections:
    """The connections of a server.

    Args:
        most: of them.
        header_timeout: seconds for a request's head, from the connection or the head's first byte.
        body_timeout: seconds for a request's body, from its head.
        open_paths: answered although all other room is taken.
        on_refusal: called with the status of an answer that is given here, or with "none" where a
            connection is closed without one, to make room.
    """

    def __init__(
        self,
        most: int,
        *,
        header_timeout: float,
        body_timeout: float,
        open_paths: Collection[str] = ALWAYS_OPEN,
        on_refusal: Callable[[str], object] = lambda status: None,
    ) -> None:
        self.most = most
        self.most_busy = most - min(SPARE_CONNECTIONS, most // 2)
        self.header_timeout, self.body_timeout = header_timeout, body_timeout
        self.open_paths = open_paths
        self.on_refusal = on_refusal
        self._open: set[GuardedProtocol] = set()
        self._idle: dict[GuardedProtocol, None] = {}
        """Those without a request, the longest of them first."""

    def __len__(self) -> int:
        return len(self._open)

    @property
    def num_busy(self) -> int:
        """Connections with a request."""
        return len(self._open) - len(self._idle)

    @property
    def are_busy(self) -> bool:
        """Whether more of them have requests than may be worked on."""
        return self.num_busy > self.most_busy

    def add(self, connection: GuardedProtocol) -> None:
        """A new connection, for which another one may have to go."""
        self._open.add(connection)
        self._idle[connection] = None
        if len(self._open) > self.most:
            self.on_refusal("none")
            next(iter(self._idle)).abort()

    def remove(self, connection: GuardedProtocol) -> None:
        self._open.discard(connection)
        self._idle.pop(connection, None)

    def begin(self, connection: GuardedProtocol) -> None:
        """The connection has a request."""
        self._idle.pop(connection, None)

    def end(self, connection: GuardedProtocol) -> None:
        """The connection's requests are answered."""
        if connection in self._open:
            self._idle[connection] = None


class GuardedConfig(uvicorn.Config):
    """uvicorn's settings for a server of guarded connections; arguments as of `uvicorn.Config`."""

    def __init__(self, app: Any, connections: Connections, **settings: Any) -> None:
        super().__init__(app, http=GuardedProtocol, ws="none", backlog=ACCEPTED_AT_ONCE, **settings)
        self.connections = connections


class GuardedServer(uvicorn.Server):
    """uvicorn's server, which accepts few connections at a time and lets many wait."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for bound in sockets or []:
            bound.listen(WAITING_CONNECTIONS)


class GuardedProtocol(HttpToolsProtocol):
    """A connection with deadlines and caps, among the `Connections` of its server.

    The deadline is that of the head from its first byte (or the connection's begin) to its end, and
    that of the body from there on. While a request is worked on, the application has its own ones.
    """

    def __init__(
        self,
        config: GuardedConfig,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.guard = config.connections
        self._answer_with_room, self.app = self.app, self._answer
        self._deadline: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._refusal: RequestError | None = None
        self._in_head = False
        self._field_bytes, self._num_fields = 0, 0
        self._unparsed = 0
        """Bytes since something of a request was complete, which the parser keeps."""

    @property
    def is_busy(self) -> bool:
        """Whether a request isn't answered yet."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arm(self.guard.header_timeout)
        self.guard.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self.resume_writing()
        self._unset_keepalive_if_required()
        self.guard.remove(self)
        super().connection_lost(exc)

    def abort(self) -> None:
        """Close without another word."""
        self.guard.remove(self)
        self.transport.abort()

    # What comes in

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._deadline is None:
            self._arm(self.guard.header_timeout)
        self._unparsed += len(data)
        super().data_received(data)
        if self._unparsed > MOST_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(_too_large())

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._unparsed = self._field_bytes = self._num_fields = 0

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_fields += 1
        self._count(len(name) + len(value))
        if self._in_head:  # what follows a body is dropped
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head, self._unparsed = False, 0
        if len(self.pipeline) >= MOST_PIPELINED:
            raise self._refused(RequestError(400, "pipelined", "too many requests ahead"))
        self._arm(self.guard.body_timeout)
        super().on_headers_complete()
        self.guard.begin(self)

    def on_body(self, body: bytes) -> None:
        self._unparsed = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unparsed = 0
        self._disarm()
        super().on_message_complete()

    def _count(self, num_bytes: int) -> None:
        self._unparsed = 0
        self._field_bytes += num_bytes
        if self._field_bytes > MOST_HEAD_BYTES or self._num_fields > MOST_HEAD_FIELDS:
            raise self._refused(_too_large())

    # What goes out

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.guard.are_busy and scope["path"] not in self.guard.open_paths:
            log.warning("no connection is left for work (max_connections): answering 503")
            error = overloaded("too many connections have requests already (max_connections)")
            self.guard.on_refusal(str(error.status))
            response = json_response(
                error.status, error.body(), {**(error.headers or {}), "Connection": "close"}
            )
            await response(scope, receive, send)
            return
        await self._answer_with_room(scope, receive, send)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.is_busy:
            self.guard.end(self)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stalled is None:
            self._stalled = self.loop.call_later(WRITE_SECONDS, self.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def send_400_response(self, msg: str) -> None:
        """uvicorn's answer to what is no HTTP, or what was refused while it was parsed."""
        self._refuse(self._refusal or RequestError(400, "malformed_http", msg))

    def _refused(self, error: RequestError) -> RequestError:
        self._refusal = error
        return error

    def _refuse(self, error: RequestError) -> None:
        """Answer without the application, and close; what has begun to be answered is cut off."""
        self.guard.on_refusal(str(error.status))
        if not self.is_busy or not self.cycle.response_started:
            self.transport.write(_raw_response(error, self.server_state.default_headers))
        self.transport.close()

    # Deadlines

    def _arm(self, seconds: float) -> None:
        self._disarm()
        self._deadline = self.loop.call_later(seconds, self._at_deadline)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _at_deadline(self) -> None:
        self._deadline = None
        if self.transport.is_closing():
            return
        if self.is_busy:  # of the body, that of `read_body` comes first; or of a request ahead
            self._arm(self.guard.body_timeout)
        elif self._in_head:
            seconds = self.guard.header_timeout
            self._refuse(RequestError(408, "timeout", f"no whole head within {seconds:g} seconds"))
        else:
            self.transport.close()


def _too_large() -> RequestError:
    most = f"{MOST_HEAD_BYTES} bytes or {MOST_HEAD_FIELDS} fields"
    return RequestError(431, "head_too_large", f"the request's head has more than {most}")


def _raw_response(error: RequestError, headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    response = json_response(error.status, error.body(), {"Connection": "close"})
    fields = [b"%b: %b\r\n" % each for each in (*headers, *response.raw_headers)]
    return b"".join([STATUS_LINE[error.status], *fields, b"\r\n", bytes(response.body)])


def connection_room(wanted: int, outgoing: int) -> int:
    """How many connections this process has descriptors for: at most the wanted number.

    The soft limit of descriptors is raised as far as the hard one allows.

    Args:
        outgoing: connections that the server itself opens.

    Raises:
        ValueError: where there is hardly room for any.
    """
    others = len(os.listdir("/dev/fd")) + outgoing + ACCEPTED_AT_ONCE + OTHER_FILES
    needed = wanted + others
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    room = wanted if soft == resource.RLIM_INFINITY else min(wanted, soft - others)
    if room < min(wanted, 2):
        raise ValueError(
            f"a server needs at least {others + 2} file descriptors, the limit is {soft}: raise it "
            "(ulimit -n)"
        )
    return room


LOGGERS = ("asyncio", "uvicorn.error", __name__, "steerlm2.serving.batcher")
"""Of what callers can cause."""


class LoggedSeldom(logging.Filter):
    """Lets one message of a kind through in LOG_SECONDS, with the number of those in between."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[tuple[str, object], tuple[float, int]] = {}
        """Message and exception -> when it was logged, and how many weren't since."""

    def filter(self, record: logging.LogRecord) -> bool:
        kind = (str(record.msg), record.exc_info[0] if record.exc_info else None)
        last, dropped = self._last.get(kind, (-LOG_SECONDS, 0))
        now = time.monotonic()
        if now - last < LOG_SECONDS:
            self._last[kind] = (last, dropped + 1)
            return False
        if dropped:
            record.msg = f"{record.getMessage()} (and {dropped} more since)"
            record.args = ()
        if len(self._last) > 1000:
            self._last.clear()
        self._last[kind] = (now, 0)
        return True


def log_seldom(names: Sequence[str] = LOGGERS) -> None:
    """Keep callers from filling a disk: what they can cause is logged seldom."""
    for name in names:
        logging.getLogger(name).addFilter(LoggedSeldom())
