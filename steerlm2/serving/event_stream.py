"""Server-sent events, and callers that go away."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable, Mapping
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from steerlm2.serving.http import RequestError

ResultT = TypeVar("ResultT")

LAST_WORD_SECONDS = 1.0
"""That a caller who may have stopped reading has to take the last event."""


async def while_connected(receive: Receive, work: Awaitable[ResultT]) -> ResultT:
    """The work's result; the work is cancelled when the caller goes away.

    Args:
        receive: of a request whose body has been read.

    Raises:
        RequestError: where the caller has gone.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise RequestError(499, "disconnected", "the caller closed the connection")
        return task.result()
    finally:
        await _end(task, gone)


class EventStream(Response):
    """A response of server-sent events: JSON objects, and [DONE] at the end.

    Args:
        first: the first event, already made: what fails before it has a status of its own.
        events: the others.
        deadline: the loop's time at which the stream ends with `late`.
        held: what the request has of the server's room, which is given back at the end.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        first: Mapping[str, Any],
        events: AsyncGenerator[dict[str, Any]],
        deadline: float,
        late: RequestError,
        held: contextlib.AsyncExitStack,
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(None, 200, headers)
        del self.headers["content-length"]
        self.first, self.events, self.deadline, self.late = first, events, deadline, late
        self.held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self.held:
            pump = asyncio.create_task(self._pump(send))
            gone = asyncio.create_task(_disconnected(receive))
            try:
                await asyncio.wait({pump, gone}, return_when=asyncio.FIRST_COMPLETED)
                if pump.done():
                    pump.result()
            finally:
                await _end(pump, gone)
                await self.events.aclose()

    async def _pump(self, send: Send) -> None:
        """Send everything; an error is the last event."""
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        try:
            async with asyncio.timeout_at(self.deadline):
                await send(_event(self.first))
                async for event in self.events:
                    await send(_event(event))
                    # Events that came together would all be sent before a lost connection is seen.
                    await asyncio.sleep(0)
        except TimeoutError:
            await _say_last(send, _event(self.late.body())["body"])
        except RequestError as error:
            await _say_last(send, _event(error.body())["body"])
        except Exception as error:
            message = f"{type(error).__name__}; the server's log has more"
            failed = RequestError(500, "internal_error", message)
            await _say_last(send, _event(failed.body())["body"])
            raise
        else:
            await _say_last(send, b"data: [DONE]\n\n")


async def _say_last(send: Send, body: bytes) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LAST_WORD_SECONDS):
            await send({"type": "http.response.body", "body": body})


def _event(value: Mapping[str, Any]) -> dict[str, Any]:
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    body = f"data: {text}\n\n".encode()
    return {"type": "http.response.body", "body": body, "more_body": True}


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
