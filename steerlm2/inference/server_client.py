"""Clients of a vLLM server: their base class, and the one for attribute scores.

The server of attribute scores is `python -m vllm.entrypoints.openai.api_server --model DIR --runner
pooling`, where DIR is an export of reward_distributed. POST /classify takes the token ids of a
text, so the server's chat template and tokenizer aren't used. It returns one score an attribute as
`probs`; for a model with the problem type "regression" these are the raw scores.
"""

from __future__ import annotations

import ipaddress
import os
import threading
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import httpx

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before the first retry, doubled for each further one, and their limit. A choice: a short
overload costs little time, and a server that restarts gets few requests."""

TOO_MANY_REQUESTS = 429

API_KEY = "STEERLM2_API_KEY"
"""The environment variable with the key that servers ask for and clients send."""
API_KEY_FILE = "STEERLM2_API_KEY_FILE"
"""The one with the path of a file that has it."""


AskedT = TypeVar("AskedT")
AnswerT = TypeVar("AnswerT")


class ServerClient:
    """Sends requests from several threads. Connection errors, 429 and 5xx are retried.

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
        self._address = self._checked_url()
        self.url, self.auth = without_user(self.url)
        limits = httpx.Limits(max_connections=concurrency)
        self._http = httpx.Client(
            auth=self.auth,
            timeout=timeout,
            limits=limits,
            trust_env=not is_loopback(self._address.host),
            headers=key_header(),
        )
        self._stop = threading.Event()

    def connect(self, max_seq_len: int) -> None:
        """Check that the server has the model; without a name, `model` becomes its first one.

        Raises:
            ValueError: where the server doesn't have the model, or accepts fewer than `max_seq_len`
                tokens.
            ConnectionError: where it doesn't answer.
        """
        answer = self._request("GET", "/v1/models")
        try:
            models = {model["id"]: model for model in answer["data"]}
        except (KeyError, TypeError) as error:
            raise self._unknown_answer("/v1/models", answer) from error
        if self.model is None:
            self.model = next(iter(models), None)
        if self.model not in models:
            raise ValueError(
                f"the server at {self.url} has no model {self.model}, only {', '.join(models)}"
            )
        limit = models[self.model].get("max_model_len")
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
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            self._stop.clear()

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
                response = self._http.request(method, self.url + path, json=body)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            if response.is_success:
                return self._decoded(path, response)
            problem = f"status {response.status_code}: {reason(response)}"
            if response.status_code < 500 and response.status_code != TOO_MANY_REQUESTS:
                raise ValueError(f"{self.url}{path} refuses the request{hint}: {problem}")
        raise ConnectionError(
            f"the server at {self.url} doesn't answer, tried {self.retries + 1} times ({problem}"
            f"{self._by_proxy()}). "
            "Once it is up again, the same command continues where it stopped"
        )

    def _decoded(self, path: str, response: httpx.Response) -> Any:
        try:
            return response.json()
        except ValueError as error:
            raise self._unknown_answer(path, response.text) from error

    def _unknown_answer(self, path: str, answer: Any) -> ValueError:
        return ValueError(
            f"{self.url}{path} doesn't answer as a vLLM server does: {str(answer)[:200]}"
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
            scores, label = [float(score) for score in result["probs"]], result.get("label")
        except (KeyError, TypeError, ValueError) as error:
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
                f"the model of {self.url} calls {label} what is {ours} in schema.names "
                f"({', '.join(self.attributes)}): they must be the attributes that it was trained "
                "for, in the same order"
            )
        return scores


def own_api_key() -> str | None:
    """The key of the environment, or of the file that it names; None: there is none.

    Raises:
        ValueError: where the file is empty or can't be read.
    """
    if key := os.environ.get(API_KEY):
        return key
    if not (file := os.environ.get(API_KEY_FILE)):
        return None
    try:
        key = Path(file).expanduser().read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{API_KEY_FILE}: {file} can't be read ({error})") from error
    if not key:
        raise ValueError(f"{API_KEY_FILE}: {file} is empty")
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
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:200]
