"""Config sections of the recipes that sample, with the checks of their keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from steerlm2.attributes import AttributeSchema, encode_label, parse_label


@dataclass
class LabelOptions:
    """The `label:` section."""

    kind: Literal["record", "fixed", "uniform", "empirical", "none"] = "record"
    value: str | None = None  # of kind fixed
    attributes: list[str] | None = None  # of kind uniform
    file: str | None = None  # of kind empirical: conversations or SteerLM2 records
    labels_per_prompt: int = 1  # of kinds uniform and empirical, all different

    def problems(self, schema: AttributeSchema) -> Iterator[str]:
        """Problems of its keys."""
        if self.labels_per_prompt < 1:
            yield f"'label.labels_per_prompt' must be at least 1, got {self.labels_per_prompt}"
        for kind, key in (("fixed", "value"), ("uniform", "attributes"), ("empirical", "file")):
            given = getattr(self, key)
            if self.kind == kind and not given:
                yield f"'label.{key}' is missing: 'label.kind' is {kind}"
            if self.kind != kind and given:
                yield f"'label.{key}' is for 'label.kind' {kind}, not {self.kind}"
        if self.labels_per_prompt > 1 and self.kind not in ("uniform", "empirical"):
            yield (
                f"'label.kind' {self.kind} has one label a prompt: set label.labels_per_prompt=1"
            )
        try:
            if self.value:
                parse_label(self.value, schema)
            if self.attributes:
                encode_label(dict.fromkeys(self.attributes, schema.min_value), schema)
        except ValueError as error:
            yield f"'label': {error}"
        if self.kind == "uniform" and self.attributes:
            grid = (schema.max_value - schema.min_value + 1) ** len(set(self.attributes))
            if self.labels_per_prompt > grid:
                yield f"'label.labels_per_prompt': there are only {grid} labels"


@dataclass
class ServerOptions:
    """The `server:` section."""

    url: str
    model: str | None = None  # as the server names it; none: its first one
    concurrency: int = 64  # requests at a time, each of n responses
    timeout: float = 600.0  # seconds for an answer
    retries: int = 5  # of a request, with pauses of 0.5 s, 1 s, 2 s, ...

    def problems(self, section: str = "server") -> Iterator[str]:
        """Problems of its keys; `section` is the config key of the section."""
        if self.concurrency < 1:
            yield f"'{section}.concurrency' must be at least 1, got {self.concurrency}"
        if self.retries < 0:
            yield f"'{section}.retries' must be at least 0, got {self.retries}"
        if self.timeout <= 0:
            yield f"'{section}.timeout' must be above 0, got {self.timeout}"


def sampling_problems(
    *, n: int, temperature: float, top_p: float, max_new_tokens: int, max_seq_len: int
) -> Iterator[str]:
    """Problems of the keys of the same names; those that count something are at least 1."""
    if temperature < 0:
        yield f"'temperature' must be at least 0, got {temperature}"
    if temperature == 0 and n > 1:
        yield "'temperature' is 0: all responses of a prompt would be the same; set n=1"
    if not 0 < top_p <= 1:
        yield f"'top_p' must be above 0 and at most 1, got {top_p}"
    if max_new_tokens >= max_seq_len:
        yield "'max_new_tokens' must be below 'max_seq_len': a prompt has tokens too"
