"""Sampling from a vLLM server through OpenAI's completions API.

Prompts are sent as token ids, so the server's chat template isn't used. These fields of a request
are vLLM's extensions: stop_token_ids, return_token_ids, and NO_OTHER_CUTS, which switches off the
sampling defaults of the server (from a checkpoint's generation_config.json) and its own end of
text. The stop token may be that end of text: without ignore_eos its `stop_reason` would be null.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from steerlm2.data.records import CLAMPED_LOG_PROB, HIGHEST_LOG_PROB, STOP
from steerlm2.inference.engines import OTHER_STOP, Request, Sample, SamplingSettings
from steerlm2.inference.server_client import (
    MALFORMED,
    ServerClient,
    as_list,
    as_text,
    as_whole,
)

NEVER = -100
"""The logit bias of a token that must not be sampled: the lowest that the API allows."""

NO_OTHER_CUTS = {
    "ignore_eos": True,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


class CompletionsEngine(ServerClient):
    """Requests n completions of each prompt. Call `connect` before it is used.

    Args:
        settings: of every response.
        encode: text -> token ids, for servers that return no ids.
        url, model, concurrency, timeout, retries: as in `ServerClient`.
    """

    def __init__(
        self,
        url: str,
        settings: SamplingSettings,
        encode: Callable[[str], list[int]],
        *,
        model: str | None = None,
        concurrency: int = 16,
        timeout: float = 600.0,
        retries: int = 5,
    ) -> None:
        super().__init__(
            url, model=model, concurrency=concurrency, timeout=timeout, retries=retries
        )
        self.settings = settings
        self.encode = encode

    def sample(self, requests: Sequence[Request]) -> list[list[Sample]]:
        """[request][n] samples, in the order of the requests.

        Raises:
            ValueError: where the server refuses a request, or its answer isn't in vLLM's format.
            ConnectionError: where it doesn't answer after all retries.
        """
        return self._ask_all(self._samples, requests)

    def _samples(self, request: Request) -> list[Sample]:
        wanted = self.settings
        body: dict[str, Any] = NO_OTHER_CUTS | {
            "model": self.model,
            "prompt": list(request.prompt),
            "n": wanted.n,
            "temperature": wanted.temperature,
            "top_p": wanted.top_p,
            "max_tokens": wanted.max_new_tokens,
            "seed": request.seed,
            "stop_token_ids": [wanted.stop_id],
            "logit_bias": {str(token_id): NEVER for token_id in wanted.forbidden_ids},
            "logprobs": 0,  # of the sampled tokens alone
            "return_token_ids": True,
        }
        answer = self._request("POST", "/v1/completions", body)
        try:
            choices = {as_whole(choice["index"]): choice for choice in as_list(answer["choices"])}
            num_choices = len(answer["choices"])
            samples = [self._sample(choices[i]) for i in sorted(choices)]
        except MALFORMED as error:
            raise self._unknown_answer("/v1/completions", answer) from error
        if num_choices != wanted.n:
            raise ValueError(
                f"{self.url}/v1/completions gave {num_choices} completions instead of {wanted.n}"
            )
        if sorted(choices) != list(range(wanted.n)):
            raise self._unknown_answer("/v1/completions", answer)
        return samples

    def _sample(self, choice: dict[str, Any]) -> Sample:
        reason = as_text(choice["finish_reason"])
        if choice.get("token_ids") is None:
            return self._sample_without_ids(choice, reason)
        tokens = [as_whole(token_id) for token_id in as_list(choice["token_ids"])]
        if len(tokens) > self.settings.max_new_tokens:
            raise ValueError("more tokens than were asked for")
        if reason == STOP and tokens[-1:] != [self.settings.stop_id]:
            reason = OTHER_STOP
        logprobs: list[Any] = (choice.get("logprobs") or {}).get("token_logprobs") or []
        known = [float(logprob) for logprob in logprobs if _is_known(logprob)]
        log_prob = sum(known) if len(known) == len(tokens) else None
        # vLLM's are raw unless it is started otherwise; forbidden tokens have next to no share.
        plain = self.settings.temperature == 1 and self.settings.top_p == 1
        return Sample(tokens, reason, log_prob, sampler_log_prob=log_prob if plain else None)

    def _sample_without_ids(self, choice: dict[str, Any], reason: str) -> Sample:
        """`stop_reason` is the id of the token that ended a response, null for an end of text."""
        stop_id, text = self.settings.stop_id, _with_whole_characters(as_text(choice["text"]))
        end_known = reason != STOP or "stop_reason" in choice
        if reason == STOP and choice.get("stop_reason", stop_id) != stop_id:
            reason = OTHER_STOP
        stop = [stop_id] if reason == STOP else []
        return Sample([*self.encode(text), *stop], reason, None, text, end_known)


def _with_whole_characters(text: str) -> str:
    """The text with U+FFFD for halves of surrogate pairs, which JSON can hold and UTF-8 can't."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _is_known(logprob: object) -> bool:
    """Whether a server's log-prob of a token is one: not null, NaN, infinite, clamped, above 0."""
    if not isinstance(logprob, int | float) or isinstance(logprob, bool):
        return False
    return CLAMPED_LOG_PROB < logprob <= HIGHEST_LOG_PROB
