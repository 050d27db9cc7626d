"""Clients of a vLLM server: their base class, and the one for attribute scores.

The server of attribute scores is `python -m vllm.entrypoints.openai.api_server --model DIR --runner
pooling`, where DIR is an export of reward_distributed. POST /classify takes the token ids of a
text, so the server's chat template and tokenizer aren't used. It returns one score an attribute as
`probs`; for a model with the problem type "regression" these are the raw scores.
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import json
import math
import os
import re
import socket
import ssl
import threading
import time
import urllib.request
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import httpx

from steerlm2.escaping import one_line

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before the first retry, doubled for each further one, and their limit. A choice: a short
overload costs little time, and a server that restarts gets few requests."""

TRANSIENT = (408, 425, 429)
"""Statuses below 500 that may pass: a slow request, one too early, too many."""

MOST_ANSWER_BYTES = 256 << 20
"""Of a server's answer, unpacked. A choice: far above those to the largest requests of ours."""

MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)
"""What it raises to read an answer that isn't of the form that it should have."""

API_KEY = "STEERLM2_API_KEY"
"""The environment variable with the key that servers ask for and clients send."""
API_KEY_FILE = "STEERLM2_API_KEY_FILE"
"""The one with the path of a file that has it."""


AskedT = TypeVar("AskedT")
AnswerT = TypeVar("AnswerT")


class ServerClient:
    """Sends requests from several threads. Connection errors, 408, 425, 429 and 5xx are retried.

    A server on this machine is asked directly, others through the environment's proxy if it has one
    for them.

    Args:
        url: of the server, "http://127.0.0.1:8000"; a user and password in it are sent, and in no
            message.
        model: the server's name for the model; None: its first one.
        concurrency: requests at a time.
        timeout: seconds for an answer.
        retries: of a request, with pauses of 0.5 s, 1 s, 2 s, ... before them.

    Raises:
        ValueError: where the URL isn't one.
    """

    def __init__(
        self, url: str, *, model: str | None, concurrency: int, timeout: float, retries: int
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.model = model
        self.concurrency = concurrency
        self.retries = retries
        self.timeout = timeout
        self._address = self._checked_url()
        self.url, self.auth = without_user(self.url)
        limits = httpx.Limits(max_connections=concurrency)
        self._http = httpx.Client(
            auth=self.auth,
            timeout=timeout,
            limits=limits,
            trust_env=not is_loopback(self._address.host),
            headers=key_header(),
            verify=ssl_context(),
        )
        self._stop = threading.Event()
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        """Of all connections."""

    def connect(self, max_seq_len: int) -> None:
        """Check that the server has the model; without a name, `model` becomes its first one.

        Raises:
            ValueError: where the server doesn't have the model, or accepts fewer than `max_seq_len`
                tokens.
            ConnectionError: where it doesn't answer.
        """
        answer = self._request("GET", "/v1/models")
        try:
            limits = {as_text(model["id"]): _model_limit(model) for model in answer["data"]}
        except MALFORMED as error:
            raise self._unknown_answer("/v1/models", answer) from error
        if self.model is None:
            self.model = next(iter(limits), None)
        if self.model is None:
            raise ValueError(f"the server at {self.url} has no model")
        if self.model not in limits:
            known = one_line(", ".join(limits))
            raise ValueError(f"the server at {self.url} has no model {self.model}, only {known}")
        limit = limits[self.model]
        if limit is not None and limit < max_seq_len:
            raise ValueError(
                f"the server at {self.url} takes texts of at most {limit} tokens: set "
                f"max_seq_len={limit}, or start it with --max-model-len {max_seq_len}"
            )

    def close(self) -> None:
        self._http.close()

    def _ask_all(
        self, ask: Callable[[AskedT], AnswerT], everything: Iterable[AskedT]
    ) -> list[AnswerT]:
        """The answers in order, from `concurrency` threads; the first failure ends all of them."""
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            return list(pool.map(ask, everything))
        except BaseException:
            self._stop.set()  # ends the retries of the other threads
            self._hang_up()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            self._stop.clear()

    def _hang_up(self) -> None:
        """End what waits for an answer, in any thread: that may take as long as the timeout."""
        for connected in list(self._sockets):
            with contextlib.suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)

    def _trace(self, event: str, info: dict[str, Any]) -> None:
        """Called by httpx with all that it does."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            self._sockets.add(info["return_value"].get_extra_info("socket"))

    def _request(
        self, method: str, path: str, body: dict[str, Any] | None = None, hint: str = ""
    ) -> Any:
        """The decoded answer to a request.

        Args:
            hint: added to the message if the server refuses the request.
        """
        problem = ""
        for attempt in range(self.retries + 1):
            pause = min(FIRST_PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE) if attempt else 0.0
            if self._stop.wait(pause):
                break
            try:
                response = self._whole_answer(method, path, body)
            except httpx.RequestError as error:  # no connection, a cut answer, or bad compression
                problem = one_line(f"{type(error).__name__}: {error}")
                continue
            if response.is_success:
                return self._decoded(path, response)
            problem = f"status {response.status_code}: {reason(response)}"
            if response.status_code < 500 and response.status_code not in TRANSIENT:
                raise ValueError(f"{self.url}{path} refuses the request{hint}: {problem}")
        raise ConnectionError(
            f"the server at {self.url} doesn't answer, tried {self.retries + 1} times ({problem}"
            f"{self._by_proxy()}). "
            "Once it is up again, the same command continues where it stopped"
        )

    def _whole_answer(self, method: str, path: str, body: dict[str, Any] | None) -> httpx.Response:
        """An answer with its body.

        Raises:
            ValueError: for a body beyond MOST_ANSWER_BYTES.
            httpx.RequestError: where there is none within the timeout, or it can't be read.
        """
        end = time.monotonic() + self.timeout
        traced = {"trace": self._trace}
        with self._http.stream(method, self.url + path, json=body, extensions=traced) as response:
            content = bytearray()
            for chunk in response.iter_bytes():
                content += chunk
                if len(content) > MOST_ANSWER_BYTES:
                    raise ValueError(
                        f"{self.url}{path} answers with more than {MOST_ANSWER_BYTES >> 20} MiB: "
                        "it doesn't seem to be a vLLM server"
                    )
                if time.monotonic() > end:  # httpx itself counts from each part of it
                    raise httpx.ReadTimeout(f"no whole answer within {self.timeout:g} seconds")
        return httpx.Response(response.status_code, content=bytes(content))

    def _decoded(self, path: str, response: httpx.Response) -> Any:
        try:
            return json.loads(response.content)
        except (ValueError, RecursionError) as error:
            raise self._unknown_answer(path, response.text) from error

    def _unknown_answer(self, path: str, answer: Any) -> ValueError:
        return ValueError(
            f"{self.url}{path} doesn't answer as a vLLM server does: {one_line(str(answer))}"
        )

    def _by_proxy(self) -> str:
        """Of the environment, where a request goes through one."""
        scheme, host = self._address.scheme, self._address.host
        proxy = urllib.request.getproxies().get(scheme)
        if not proxy or not self._http.trust_env or urllib.request.proxy_bypass(host):
            return ""
        return f", through the proxy that {scheme}_proxy names; no_proxy={host} spares it"

    def _checked_url(self) -> httpx.URL:
        try:
            parts = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise ValueError(f"server.url {self.url!r}: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.host:
            raise ValueError(f"server.url must look like http://127.0.0.1:8000, got {self.url!r}")
        return parts


class ClassifyClient(ServerClient):
    """Requests attribute scores.

    Args:
        attributes: the names that the scores are for, in their order.
        url, model, concurrency, timeout, retries: as in `ServerClient`.
    """

    def __init__(
        self,
        url: str,
        attributes: Sequence[str],
        *,
        model: str | None = None,
        concurrency: int = 16,
        timeout: float = 60.0,
        retries: int = 5,
    ) -> None:
        super().__init__(
            url, model=model, concurrency=concurrency, timeout=timeout, retries=retries
        )
        self.attributes = list(attributes)

    def classify(self, texts: Sequence[Sequence[int]]) -> list[list[float]]:
        """[text][attribute] scores of tokenised texts, in their order.

        Raises:
            ValueError: where the server refuses a text, or its model has other attributes.
            ConnectionError: where it doesn't answer after all retries.
        """
        return self._ask_all(self._scores, texts)

    def _scores(self, text: Sequence[int]) -> list[float]:
        body = {"model": self.model, "input": list(text), "use_activation": False}
        hint = " (is it started with --runner pooling?)"
        answer = self._request("POST", "/classify", body, hint)
        try:
            (result,) = answer["data"]
            scores = [as_number(score) for score in as_list(result["probs"])]
            label = result.get("label")
            label = None if label is None else as_text(label)
        except MALFORMED as error:
            raise self._unknown_answer("/classify", answer) from error
        if len(scores) != len(self.attributes):
            raise ValueError(
                f"the model of {self.url} gives {len(scores)} scores, schema.names has "
                f"{len(self.attributes)} attributes ({', '.join(self.attributes)}): they must be "
                "the ones that it was trained for, in the same order"
            )
        # The server names the attribute of the highest score, or LABEL_0 if it has no names.
        ours = self.attributes[scores.index(max(scores))]
        if label not in (None, ours) and not label.startswith("LABEL_"):
            raise ValueError(
                f"the model of {self.url} calls {one_line(label)} what is {ours} in schema.names "
                f"({', '.join(self.attributes)}): they must be the attributes that it was trained "
                "for, in the same order"
            )
        return scores


@functools.cache
def ssl_context() -> ssl.SSLContext:
    """httpx's own, of which each would load all certificates again."""
    return httpx.create_ssl_context()


def own_api_key() -> str | None:
    """The key of the environment, or of the file that it names; None: there is none.

    Raises:
        ValueError: where the file is empty or can't be read, and where the key isn't a word that a
            header can have; the message doesn't tell it.
    """
    if key := os.environ.get(API_KEY):
        return _checked_key(key, API_KEY)
    if not (file := os.environ.get(API_KEY_FILE)):
        return None
    try:
        key = Path(file).expanduser().read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{API_KEY_FILE}: {file} can't be read ({error})") from error
    if not key:
        raise ValueError(f"{API_KEY_FILE}: {file} is empty")
    return _checked_key(key, f"{API_KEY_FILE}: {file}")


def _checked_key(key: str, where: str) -> str:
    if not re.fullmatch(r"[!-~]+", key):
        raise ValueError(f"{where} must have one key, of ASCII characters without spaces")
    return key


def without_user(url: str) -> tuple[str, tuple[str, str] | None]:
    """A URL without the user in it, and that user with their password; None: it has none."""
    parts = httpx.URL(url)
    if not parts.userinfo:
        return url, None
    scheme, _, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}", (parts.username, parts.password)


def key_header() -> dict[str, str]:
    """The header that sends the key of the environment."""
    key = own_api_key()
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def is_loopback(host: str) -> bool:
    """Whether a host of a URL is this machine."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def reason(response: httpx.Response) -> str:
    """The server's message about a failure: vLLM's, or the beginning of the body."""
    try:
        return one_line(str(json.loads(response.content)["error"]["message"]))
    except (*MALFORMED, RecursionError):
        return one_line(response.text)


# What an answer holds, checked: JSON that is of another type must not become a number or a text.


def as_text(value: object) -> str:
    """Raises:
    ValueError: for what is no text.
    """
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value


def as_list(value: object) -> list[Any]:
    """Raises:
    ValueError: for what is no list; a text would be one of characters.
    """
    if not isinstance(value, list):
        raise ValueError(f"{value!r} is no list")
    return value


def as_number(value: object) -> float:
    """Raises:
    ValueError: for what is no finite number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no finite number")
    return float(value)


def as_whole(value: object) -> int:
    """Raises:
    ValueError: for what is no whole number from 0 to 2^31 - 1.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise ValueError(f"{value!r} is no whole number from 0 on")
    return value


def _model_limit(model: dict[str, Any]) -> int | None:
    limit = model.get("max_model_len")
    return None if limit is None else as_whole(limit)
