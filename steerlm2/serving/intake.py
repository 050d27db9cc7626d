"""What comes before the model: bodies are read, parsed and tokenised without holding up others.

The bytes of bodies that are read or worked on are bounded over all requests, and what takes more
than a few milliseconds runs in threads of its own, so that the event loop goes on answering.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from fastapi import Request

from steerlm2.serving.http import RequestError, check_content_type, overloaded

LARGE_BODY = 16_384
"""Bytes from which a request is parsed and tokenised in a thread: so many take a few milliseconds,
in which other requests would stand still."""

THREADS = 2
"""For large bodies. A choice: they hold up each other instead of the model and small requests."""

Arguments = ParamSpec("Arguments")
ResultT = TypeVar("ResultT")


class Intake:
    """The way in, for all routes of a server.

    Args:
        max_body_bytes: of one body.
        max_pending_bytes: of all bodies whose requests are read or worked on at a time.
        body_timeout: seconds in which a body must have come.
    """

    def __init__(self, *, max_body_bytes: int, max_pending_bytes: int, body_timeout: float) -> None:
        self.max_body_bytes, self.max_pending_bytes = max_body_bytes, max_pending_bytes
        self.body_timeout = body_timeout
        self.pending_bytes = 0
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="intake")

    @contextlib.asynccontextmanager
    async def body(self, request: Request, fewer: str = "texts") -> AsyncIterator[bytes]:
        """The body of a request, of which no more than `max_body_bytes` are ever held.

        Args:
            fewer: what to send less of, for messages.

        Raises:
            RequestError: for another content type than JSON, for a body that is too large or comes
                too slowly, and where too many bytes are pending.
        """
        check_content_type(request.headers)
        too_large = RequestError(
            413,
            "too_large",
            f"the body has more than {self.max_body_bytes} bytes (max_body_bytes): send fewer "
            f"{fewer} at a time",
        )
        if int(request.headers.get("content-length", 0)) > self.max_body_bytes:
            raise too_large
        chunks, size = [], 0
        try:
            try:
                async with asyncio.timeout(self.body_timeout):
                    async for chunk in request.stream():
                        size += len(chunk)
                        self.pending_bytes += len(chunk)
                        if size > self.max_body_bytes:
                            raise too_large
                        if self.pending_bytes > self.max_pending_bytes:
                            raise overloaded(
                                "the requests at work have too many bytes already (the limit is "
                                f"{self.max_pending_bytes}, max_pending_bytes)"
                            )
                        chunks.append(chunk)
            except TimeoutError:
                raise RequestError(
                    408,
                    "timeout",
                    f"the body didn't come within {self.body_timeout:g} seconds (body_timeout)",
                    headers={"Connection": "close"},
                ) from None
            yield b"".join(chunks)
        finally:
            self.pending_bytes -= size

    async def run(
        self,
        num_bytes: int,
        work: Callable[Arguments, ResultT],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> ResultT:
        """The result of what has to be done with so many bytes: at once, or in a thread."""
        if num_bytes < LARGE_BODY:
            return work(*args, **kwargs)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: work(*args, **kwargs))
