"""Attributes: their schema, the labels that name their values, and the Beta rule for P(a|x,y).

Dimension letters: N responses, A attributes, V values of an attribute.
"""

from __future__ import annotations

import dataclasses
import math
import random
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Bins = Literal["midpoint", "uniform"]

NOT_LABELLED = -100.0
"""The value of an attribute without a label, in files and tensors."""

_NAME = re.compile(r"[^\s:,]+")
_PIECE = re.compile(r"(?P<name>[^\s:,]+):(?P<value>0|-?[1-9][0-9]*)")


@dataclass(frozen=True)
class AttributeSchema:
    """The attributes in the order in which labels list them, and the range of their values.

    The default order is the published one: four attributes of Open Assistant, five of HelpSteer.
    """

    names: tuple[str, ...] = (
        "quality",
        "toxicity",
        "humor",
        "creativity",
        "helpfulness",
        "correctness",
        "coherence",
        "complexity",
        "verbosity",
    )
    min_value: int = 0
    max_value: int = 4

    def __post_init__(self) -> None:
        problems = []
        if isinstance(self.names, str) or not self.names:
            problems.append(f"names must be a list of at least one name, got {self.names!r}")
        else:
            object.__setattr__(self, "names", tuple(self.names))
            for name in self.names:
                if not isinstance(name, str) or not _NAME.fullmatch(name):
                    problems.append(f"the name {name!r} must be text without spaces, ':' and ','")
            if len(set(self.names)) < len(self.names):
                problems.append(f"names must differ from each other, got {', '.join(self.names)}")
        for key in ("min_value", "max_value"):
            if type(getattr(self, key)) is not int:
                problems.append(f"{key} must be a whole number, got {getattr(self, key)!r}")
        if not problems and self.min_value >= self.max_value:
            problems.append(f"min_value {self.min_value} must be below max_value {self.max_value}")
        if problems:
            raise ValueError("attribute schema: " + "; ".join(problems))

    def range_of(self, name: str) -> tuple[int, int]:
        """The lowest and the highest value of an attribute."""
        return self.min_value, self.max_value

    def only(self, names: Container[str]) -> AttributeSchema:
        """The schema of those of its attributes, in its order."""
        kept = tuple(name for name in self.names if name in names)
        return dataclasses.replace(self, names=kept)


DEFAULT_SCHEMA = AttributeSchema()


class UnknownAttributes(ValueError):
    """Labels name attributes that the schema doesn't have, and nothing else is wrong with them."""

    def __init__(self, message: str, names: Iterable[str], schema: AttributeSchema) -> None:
        super().__init__(message)
        self.names = tuple(names)
        self.schema = schema


def as_schema(schema: AttributeSchema | Mapping[str, Any] | None) -> AttributeSchema:
    """A schema from what a configuration gives: `{names: [...], min_value: 0, max_value: 4}`.

    Raises:
        ValueError: for unknown keys and for values that AttributeSchema refuses.
    """
    if schema is None:
        return DEFAULT_SCHEMA
    if isinstance(schema, AttributeSchema):
        return schema
    unknown = set(schema) - {"names", "min_value", "max_value"}
    if unknown:
        raise ValueError(
            f"attribute schema: unknown keys {', '.join(map(str, sorted(unknown, key=str)))}; "
            "known: names, min_value, max_value"
        )
    return AttributeSchema(**schema)


def schema_to_json(schema: AttributeSchema) -> dict[str, Any]:
    """A schema as `as_schema` reads it."""
    return {
        "names": list(schema.names),
        "min_value": schema.min_value,
        "max_value": schema.max_value,
    }


def encode_label(
    values: Mapping[str, int | float], schema: AttributeSchema = DEFAULT_SCHEMA
) -> str:
    """The label string: "quality:4,humor:0", in the order of the schema.

    Raises:
        ValueError: for no values, unknown names, and values that aren't whole or out of range.
    """
    problems = [] if values else ["a label needs at least one attribute"]
    for name, value in values.items():
        problems += _value_problems(name, value, schema)
    if problems:
        raise ValueError("; ".join(problems))
    return ",".join(f"{name}:{int(values[name])}" for name in schema.names if name in values)


def parse_label(label: str, schema: AttributeSchema | None = None) -> dict[str, int]:
    """The values that a label string names, in its order. The inverse of `encode_label`.

    Args:
        label: "quality:4,humor:0", without spaces: models are trained on exactly this form.
        schema: if given, names and values must be its own.

    Raises:
        UnknownAttributes: where the only mistake is names that the schema doesn't have.
        ValueError: naming every piece that isn't "name:whole number" or names an attribute twice.
    """
    values: dict[str, int] = {}
    problems = []
    for piece in label.split(","):
        match = _PIECE.fullmatch(piece)
        if match is None:
            problems.append(f"{piece!r} is not of the form name:number")
            continue
        name, value = match["name"], int(match["value"])
        if name in values:
            problems.append(f"{name!r} is given twice")
        if schema is not None:
            problems += _value_problems(name, value, schema)
        values[name] = value
    if problems:
        message = f"label {label!r}: {'; '.join(problems)} (a label looks like 'quality:4,humor:0')"
        unknown = [name for name in values if schema is not None and name not in schema.names]
        if schema is not None and len(unknown) == len(problems):
            raise UnknownAttributes(message, unknown, schema)
        raise ValueError(message)
    return values


def label_of_scores(scores: Sequence[float], schema: AttributeSchema = DEFAULT_SCHEMA) -> str:
    """The label with all attributes of the schema: each score clipped to the range, and rounded.

    Args:
        scores: one for each attribute, in the order of the schema.

    Raises:
        ValueError: for NaN scores, naming their attributes.
    """
    nan = [name for name, score in zip(schema.names, scores, strict=True) if math.isnan(score)]
    if nan:
        raise ValueError(
            f"the score of {', '.join(nan)} is NaN, so there is no label: the weights or the "
            "server that gave it are damaged"
        )
    return encode_label(
        {
            name: round(min(max(score, schema.min_value), schema.max_value))
            for name, score in zip(schema.names, scores, strict=True)
        },
        schema,
    )


def draw_label(
    scores: Sequence[float],
    rng: random.Random,
    concentration: float = 24.0,
    bins: str = "midpoint",
    schema: AttributeSchema = DEFAULT_SCHEMA,
) -> str:
    """A label with all attributes of the schema, drawn from P(a|x,y): each value by the Beta rule.

    A model trained on sampled labels learns the P(y|a,x) of Bayes' rule. Rounded scores ignore the
    uncertainty of a label, and lead to a sharper distribution.

    Args:
        scores: one for each attribute, in the order of the schema.
        rng: gives one random number for each attribute.

    Raises:
        ValueError: as `beta_log_prob`.
    """
    values = range(schema.min_value, schema.max_value + 1)
    values_V1 = [[value] for value in values]
    scores_VA = [list(scores)] * len(values)
    p_VA = beta_log_prob(scores_VA, values_V1, concentration, bins, schema).exp()
    drawn = [rng.choices(values, p_V)[0] for p_V in p_VA.t().tolist()]
    return encode_label(dict(zip(schema.names, drawn, strict=True)), schema)


def _value_problems(name: str, value: int | float, schema: AttributeSchema) -> list[str]:
    if name not in schema.names:
        return [f"unknown attribute {name!r}; known: {', '.join(schema.names)}"]
    in_range = (
        isinstance(value, Real)
        and not isinstance(value, bool)
        and float(value).is_integer()
        and schema.min_value <= value <= schema.max_value
    )
    if in_range:
        return []
    allowed = f"{schema.min_value} to {schema.max_value}"
    return [f"{name} must be a whole number from {allowed}, got {value!r}"]


def beta_log_prob(
    scores_NA: Tensor | Sequence[Any],
    values_NA: Tensor | Sequence[Any],
    concentration: float = 24.0,
    bins: str = "midpoint",
    schema: AttributeSchema = DEFAULT_SCHEMA,
) -> Tensor:
    """log P(attribute = value) given a regression score [N, A], nats, in the scores' dtype.

    HelpSteer2 paper, section 4.5: with r = score scaled to (0, 1), the value follows
    Beta(concentration * r, concentration * (1 - r)), cut into one bin per value. The sum over the
    attributes that a label names is log P(a|x,y). Computed in float64, always finite: floored at
    the smallest positive double.

    Args:
        scores_NA: regression scores on the scale of the schema; clipped into it. Python floats
            count as float64.
        values_NA: whole numbers of the schema's range; broadcast to the shape of the scores.
        concentration: alpha + beta of the Beta distribution; 24 in the paper.
        bins: "midpoint" puts the edges halfway between values (consistent with rounding);
            "uniform" makes all bins equally wide.

    Raises:
        ValueError: for NaN scores, for values outside the schema's range, for shapes that don't
            fit, for an unknown `bins` and a concentration that isn't a positive number.
    """
    import numpy as np
    import torch

    scores = _as_tensor(scores_NA)
    values = _as_tensor(values_NA)
    dtype = scores.dtype if scores.dtype.is_floating_point else torch.get_default_dtype()
    problems = []
    if not (math.isfinite(concentration) and concentration > 0):
        problems.append(f"concentration must be a positive number, got {concentration}")
    if bins not in ("midpoint", "uniform"):
        problems.append(f"bins must be 'midpoint' or 'uniform', got {bins!r}")
    try:
        values = values.expand(scores.shape)
    except RuntimeError:
        problems.append(
            f"values of shape {tuple(values.shape)} don't fit scores of {tuple(scores.shape)}"
        )
    score = scores.cpu().double().numpy()
    value = values.cpu().double().numpy()
    if np.isnan(score).any():
        problems.append(f"{np.isnan(score).sum()} of {score.size} scores are NaN")
    low, high = schema.min_value, schema.max_value
    wrong = ~((value >= low) & (value <= high) & (value == np.floor(value)))
    if wrong.any():
        problems.append(
            f"values must be whole numbers from {low} to {high}, got {value[wrong].flat[0]}"
        )
    if problems:
        raise ValueError("; ".join(problems))

    ratio = np.clip((score - low) / (high - low), 1e-6, 1 - 1e-6)
    bin_low, bin_high = _bin_edges(value - low, high - low + 1, bins)
    probability = _beta_interval(concentration * ratio, concentration, ratio, bin_low, bin_high)
    floored = np.maximum(probability, np.finfo(np.float64).smallest_subnormal)
    return torch.as_tensor(np.log(floored)).to(dtype=dtype, device=scores.device)


def label_log_probs(
    scores: Sequence[Mapping[str, float]],
    label: Mapping[str, int],
    concentration: float = 24.0,
    bins: str = "midpoint",
    schema: AttributeSchema = DEFAULT_SCHEMA,
) -> list[float]:
    """log P(a|x,y) of responses: the sum of `beta_log_prob` over the attributes that a label names.

    Args:
        scores: of each response, by attribute; those that the label doesn't name don't count.
        label: the values of the parsed label.

    Raises:
        KeyError: where a response lacks a score.
        ValueError: as `beta_log_prob`.
    """
    scores_NA = [[own[name] for name in label] for own in scores]
    log_p_NA = beta_log_prob(scores_NA, [list(label.values())], concentration, bins, schema)
    return log_p_NA.sum(dim=1).tolist()


def _as_tensor(data: Tensor | Sequence[Any]) -> Tensor:
    import numpy as np
    import torch

    return data.detach() if isinstance(data, torch.Tensor) else torch.as_tensor(np.asarray(data))


def _bin_edges(step: np.ndarray, num_values: int, bins: str) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper edge, within [0, 1], of the bin of the value `step` above the lowest."""
    import numpy as np

    if bins == "uniform":
        return step / num_values, (step + 1) / num_values
    edges = [(step - 0.5) / (num_values - 1), (step + 0.5) / (num_values - 1)]
    return np.clip(edges[0], 0, 1), np.clip(edges[1], 0, 1)


def _beta_interval(
    alpha: np.ndarray,
    concentration: float,
    mean: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
) -> np.ndarray:
    """P(low < X < high) of Beta(alpha, concentration - alpha), from the tail that is small there.

    Above the mean both CDF values are near 1, and their difference would be rounding noise.
    """
    import numpy as np
    from scipy.special import betainc, betaincc

    beta = concentration - alpha
    return np.where(
        low >= mean,
        betaincc(alpha, beta, low) - betaincc(alpha, beta, high),
        betainc(alpha, beta, high) - betainc(alpha, beta, low),
    )
