"""What requests to a steering server may hold, and what they mean.

Fields of OpenAI's API that this server doesn't implement are accepted where they change nothing,
and refused otherwise, in one message.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    SkipValidation,
    ValidationError,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from steerlm2.data.conversations import is_text
from steerlm2.inference.streaming import GenerationSettings
from steerlm2.serving.http import FirstProblem, RequestError, Strict, listed

INVALID = "invalid_request_error"
"""OpenAI's type of errors that the caller can mend."""

ANYTHING = object()
"""Any value changes nothing."""

Neutral = Mapping[str, tuple[Any, ...]]
"""Fields -> values that change nothing; null is always one of them."""

NEUTRAL: Neutral = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (ANYTHING,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "web_search_options": (),
    "verbosity": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "metadata": (ANYTHING,),
    "user": (ANYTHING,),
    "safety_identifier": (ANYTHING,),
    "prompt_cache_key": (ANYTHING,),
    "prompt_cache_retention": (ANYTHING,),
    "suffix": ("",),
    "echo": (False,),
    # vLLM's
    "min_p": (0,),
    "min_tokens": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (ANYTHING,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "prompt_logprobs": (),
}
"""Fields that aren't implemented, of OpenAI's API and of vLLM's."""

HINTS = {
    "verbosity": " (an attribute of that name goes into `attributes`)",
    "attributes": " (they are for chats: here the prompt has all)",
    "scores": " (they are for chats)",
}

LOWEST_TEMPERATURE = 1e-5
"""Lower ones take the most likely token: logits divided by them overflow. As in vLLM."""

MOST_TOP_K = 2**31 - 1
"""More than any vocabulary, and a number that engines can hold."""


def one_of(wanted: str) -> WrapValidator:
    """A field of several types, of which a mistake is one problem and not one of each type."""

    def check(value: object, validate: Callable[[object], Any]) -> Any:
        try:
            return validate(value)
        except ValidationError:
            raise PydanticCustomError("one_of_type", f"Input should be {wanted}") from None

    return WrapValidator(check)


def check_stop(stop: object) -> object:
    """Every token of an answer is compared with all of them.

    Raises:
        ValueError: where a list has more texts than a request may.
    """
    if isinstance(stop, list) and len(stop) > 16:
        raise ValueError(f"at most 16 texts, got {len(stop)}")
    return stop


Attributes = Annotated[
    dict[str, Any] | str | None, one_of("an object, or a label such as 'helpfulness:4,verbosity:1'")
]
Content = Annotated[str | list[Any], one_of("a text, or a list of parts")]
Stop = Annotated[
    str | list[str] | None, one_of("a text, or a list of texts"), BeforeValidator(check_stop)
]


def usable_temperature(asked: float) -> float:
    return float(asked) if asked >= LOWEST_TEMPERATURE else 0.0


def changes_nothing(name: str, value: object, neutral: Neutral) -> bool:
    allowed = neutral[name]
    return value is None or any(own is ANYTHING or own == value for own in allowed)


class Ignoring(Strict):
    """A request whose fields of the table are taken out where they change nothing."""

    NEUTRAL: ClassVar[Neutral] = NEUTRAL

    @model_validator(mode="before")
    @classmethod
    def _take_out_neutral(cls, body: object) -> object:
        if not isinstance(body, dict):
            return body
        known = {name: cls.NEUTRAL[name] for name in body.keys() & cls.NEUTRAL.keys()}
        wrong = sorted(name for name in known if not changes_nothing(name, body[name], cls.NEUTRAL))
        if wrong:
            shown = ", ".join(f"{name}{HINTS.get(name, '')}" for name in wrong)
            raise ValueError(f"this server doesn't do {shown}: leave it out")
        # Null says nothing, whatever the field.
        own = cls.model_fields
        return {
            name: value
            for name, value in body.items()
            if name not in known and (name in own or value is not None)
        }


class StreamOptions(Ignoring):
    """OpenAI's stream_options."""

    NEUTRAL: ClassVar[Neutral] = {
        "include_obfuscation": (ANYTHING,),
        "continuous_usage_stats": (False,),
    }

    include_usage: bool | None = None


class TemplateArguments(Ignoring):
    """What clients of vLLM send to the chat template."""

    NEUTRAL: ClassVar[Neutral] = {"add_generation_prompt": (True,), "enable_thinking": (ANYTHING,)}

    attributes: Attributes = None


class ChatMessage(Ignoring):
    """A message; an assistant's may have the label that it was given under."""

    NEUTRAL: ClassVar[Neutral] = {
        "name": (),
        "refusal": (),
        "annotations": ([],),
        "audio": (),
        "function_call": (),
        "tool_calls": ([],),
        "tool_call_id": (ANYTHING,),  # the role, tool, is what can't be done
        "reasoning_content": (ANYTHING,),
        "reasoning": (ANYTHING,),
        "provider_specific_fields": (ANYTHING,),  # LiteLLM's, in answers that come back
    }

    role: str
    content: Content
    attributes: Attributes = None


class GenerationRequest(Ignoring):
    """What requests for chats and for texts have in common."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=MOST_TOP_K, description="0 and -1: all tokens")
    max_tokens: int | None = Field(None, ge=1)
    stop: Stop = Field(None, description="up to 16 texts")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    best_of: int | None = Field(None, ge=1)

    @property
    def stop_texts(self) -> list[str]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in given if text]

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @model_validator(mode="after")
    def _check_together(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are for stream: true")
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise ValueError(f"best_of ({self.best_of}) must be at least n ({self.n or 1})")
        return self

    def settings(
        self, *, n: int, max_new_tokens: int, top_log_probs: int | None
    ) -> GenerationSettings:
        """How answers are sampled; what isn't said is as in OpenAI's API."""
        # Seeds of the answers follow each other, and JSON has negative ones too.
        seed = secrets.randbits(48) if self.seed is None else self.seed % 2**62
        return GenerationSettings(
            max_new_tokens=max_new_tokens,
            n=n,
            temperature=1.0 if self.temperature is None else usable_temperature(self.temperature),
            top_p=1.0 if self.top_p is None else float(self.top_p),
            top_k=max(self.top_k or 0, 0),
            seed=seed,
            top_log_probs=top_log_probs,
        )


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: FirstProblem[ChatMessage] = Field(min_length=1)
    attributes: Attributes = Field(
        None, description='{"helpfulness": 4}, or a label "helpfulness:4,verbosity:1"'
    )
    chat_template_kwargs: TemplateArguments | None = None
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    scores: bool | None = Field(None, description="score every answer by the attribute model")

    @model_validator(mode="after")
    def _check_chat(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise ValueError("max_tokens and max_completion_tokens differ: send one of them")
        return self

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def top_log_probs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


Prompt = str | list[str] | list[int] | list[list[int]]


def _check_prompt(prompt: object) -> object:
    """pydantic would try one of the types after the other, and collect all problems of each."""
    if isinstance(prompt, str) or (isinstance(prompt, list) and _are_prompts(prompt)):
        return prompt
    raise ValueError("should be a text, token ids, or a list of texts or of lists of token ids")


def _are_prompts(items: list[Any]) -> bool:
    first = type(items[0]) if items else str
    if any(type(item) is not first for item in items):
        return False
    if first is list:
        return all(type(token_id) is int for item in items for token_id in item)
    return first in (str, int)


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    NEUTRAL: ClassVar[Neutral] = {**NEUTRAL, "attributes": (), "scores": (False,)}

    prompt: Annotated[Prompt, SkipValidation, AfterValidator(_check_prompt)]
    logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _check_completion(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of is for chats, whose answers an attribute model can compare")
        return self


def invalid(message: str, param: str | None = None, code: str | None = None) -> RequestError:
    """What is answered to a request that the caller can mend."""
    return RequestError(400, INVALID, listed([message], 1), param=param, code=code)


def check_text(value: object, where: str = "") -> None:
    """Raises:
    RequestError: where a text of a request isn't Unicode.
    """
    if isinstance(value, str) and not is_text(value):
        raise invalid(f"{where}: holds half of a surrogate pair: not valid Unicode text")
    if isinstance(value, BaseModel):
        value = {name: getattr(value, name) for name in type(value).model_fields}
    if isinstance(value, Mapping):
        for name, inner in value.items():
            check_text(name, where)
            check_text(inner, f"{where}.{name}".removeprefix("."))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            if inner and not isinstance(inner, int | float):
                check_text(inner, f"{where}[{i}]")


def check_at_most(values: Mapping[str, int | None], most: int, key: str) -> None:
    """Raises:
    RequestError: naming the fields above a limit of the server, and the limit's key.
    """
    for name, value in values.items():
        if value is not None and value > most:
            raise invalid(f"{name} must be at most {most} ({key}), got {value}", param=name)


def split_model(model: str | None, own: Collection[str]) -> str | None:
    """The label behind the model's name, "name@helpfulness:4"; None: there is none.

    Raises:
        RequestError: for another model.
    """
    if model is None or model in own:
        return None
    name, _, label = model.rpartition("@")
    if name in own:
        return label
    raise RequestError(
        404,
        INVALID,
        f"there is no model {listed([repr(model)], 1)}, only {', '.join(own)} "
        f"(or {next(iter(own))}@NAME:VALUE,...)",
        param="model",
        code="model_not_found",
    )
