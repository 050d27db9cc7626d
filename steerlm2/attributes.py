"""Attributes: their schema, the labels that name their values, and the Beta rule for P(a|x,y).

Dimension letters: N responses, A attributes, V values of an attribute.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Bins = Literal["midpoint", "uniform"]

NOT_LABELLED = -100.0
"""The value of an attribute without a label, in files and tensors."""

_NAME = re.compile(r"\w[\w.-]{0,63}")
_PIECE = re.compile(r"(?P<name>[^\s:,]+):(?P<value>0|-?[1-9][0-9]*)")


Range = tuple[int, int]
"""Lowest and highest value of an attribute."""

DEFAULT_RANGE: Range = (0, 4)


def _range_problems(name: str, given: object) -> list[str]:
    if not (
        isinstance(given, Sequence)
        and not isinstance(given, str)
        and len(given) == 2
        and all(type(end) is int for end in given)
    ):
        return [f"the range of {name} must be [lowest, highest], two whole numbers, got {given!r}"]
    low, high = given
    if low >= high:
        return [f"the range of {name} must begin below its end, got {low} to {high}"]
    if low <= NOT_LABELLED <= high:
        return [
            f"the range of {name}, {low} to {high}, holds {NOT_LABELLED:g}, which stands for 'not "
            "labelled' in files"
        ]
    return []


@dataclass(frozen=True)
class AttributeSchema:
    """The attributes in the order in which labels list them, each with the range of its values.

    The default order is the published one: four attributes of Open Assistant, five of HelpSteer.

    Raises:
        ValueError: for names that a label or a report can't hold, and ranges that aren't two whole
            numbers, the lower one first, without NOT_LABELLED between them.
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
    ranges: tuple[Range, ...] = ()
    """One for each name; none given: DEFAULT_RANGE for all."""

    def __post_init__(self) -> None:
        problems = []
        if isinstance(self.names, str) or not self.names:
            problems.append(f"names must be a list of at least one name, got {self.names!r}")
        else:
            names = tuple(self.names)
            ranges = tuple(self.ranges) or (DEFAULT_RANGE,) * len(names)
            for name in names:
                if not isinstance(name, str) or not _NAME.fullmatch(name):
                    problems.append(
                        f"the name {name if not isinstance(name, str) else repr(name[:80])} must "
                        "be text of at most 64 letters, digits, '_', '-' and '.'"
                    )
            if len(set(names)) < len(names):
                problems.append(f"names must differ from each other, got {', '.join(names)}")
            if len(ranges) != len(names):
                problems.append(f"{len(names)} names need as many ranges, got {len(ranges)}")
            for name, its_range in zip(names, ranges, strict=False):
                problems += _range_problems(name, its_range)
            if not problems:
                object.__setattr__(self, "names", names)
                object.__setattr__(self, "ranges", tuple((low, high) for low, high in ranges))
        if problems:
            raise ValueError("attribute schema: " + "; ".join(problems))

    @classmethod
    def sharing(cls, names: Iterable[str], lowest: int, highest: int) -> AttributeSchema:
        """Attributes that all have the same range."""
        names = tuple(names)
        return cls(names, ((lowest, highest),) * len(names))

    @property
    def shared_range(self) -> Range | None:
        """The range that all attributes have; None where they have different ones."""
        return self.ranges[0] if len(set(self.ranges)) == 1 else None

    @property
    def error_scales(self) -> tuple[float, ...]:
        """What an attribute's errors are multiplied by before they are added to those of others.

        An error of 1 point is a quarter of a range from 1 to 5 and a tenth of one from 0 to 10.
        Divided by their ranges' widths, errors weigh alike, as in the Beta rule, where a score
        counts by its place in the range. The factor is the mean width over the own one, so that
        where all ranges are equally wide it is exactly 1, and errors remain points.
        """
        widths = [high - low for low, high in self.ranges]
        return tuple(sum(widths) / len(widths) / width for width in widths)

    def range_of(self, name: str) -> Range:
        """The lowest and the highest value of an attribute."""
        return self.ranges[self.names.index(name)]

    def values_of(self, name: str) -> range:
        """All values of an attribute."""
        low, high = self.range_of(name)
        return range(low, high + 1)

    def clip(self, name: str, score: float) -> float:
        """The score, or the end of the attribute's range that it is beyond."""
        low, high = self.range_of(name)
        return min(max(score, low), high)

    def select(self, names: Iterable[str]) -> AttributeSchema:
        """Some of the attributes with their ranges, in the order of `names`.

        Raises:
            UnknownAttributes: for names that the schema doesn't have.
        """
        names = tuple(dict.fromkeys(names))
        if unknown := [name for name in names if name not in self.names]:
            message = "; ".join(_unknown_attribute(name, self) for name in unknown)
            raise UnknownAttributes(message, unknown, self)
        return AttributeSchema(names, tuple(self.range_of(name) for name in names))

    def __str__(self) -> str:
        """The attributes with their ranges, for messages: "formality 0 to 10, length 1 to 5"."""
        return ", ".join(
            f"{name} {low} to {high}"
            for name, (low, high) in zip(self.names, self.ranges, strict=True)
        )


DEFAULT_SCHEMA = AttributeSchema()


class UnknownAttributes(ValueError):
    """Labels name attributes that the schema doesn't have, and nothing else is wrong with them."""

    def __init__(self, message: str, names: Iterable[str], schema: AttributeSchema) -> None:
        super().__init__(message)
        self.names = tuple(names)
        self.schema = schema


_SHARED_KEYS = ("names", "min_value", "max_value")
_KEYS = (*_SHARED_KEYS, "ranges")


def as_schema(schema: AttributeSchema | Mapping[str, Any] | None) -> AttributeSchema:
    """A schema from what a configuration gives, in one of these forms; None is the default schema.

        {formality: [0, 10], length: [1, 5]}                      every attribute with its range
        {names: [humor, verbosity], min_value: 0, max_value: 4}   attributes that share a range
        {names: [formality, length], ranges: [[0, 10], [1, 5]]}   what `schema_to_json` writes

    The order of the attributes is that of the mapping or of the list. In the second form every key
    may be left out, and is the default schema's then. The keys of the other forms can't be names of
    attributes in the first one.

    Raises:
        ValueError: for unknown keys and for values that AttributeSchema refuses.
    """
    if schema is None:
        return DEFAULT_SCHEMA
    if isinstance(schema, AttributeSchema):
        return schema
    given = [key for key in _KEYS if key in schema]
    others = [key for key in schema if key not in _KEYS]
    if given and others:
        raise ValueError(
            f"attribute schema: unknown keys {', '.join(map(str, others))}; known: "
            f"{', '.join(_SHARED_KEYS)}. Attributes with ranges of their own are given alone, "
            "{NAME: [lowest, highest], ...}, and can't be called "
            f"{', '.join(_KEYS[:-1])} or {_KEYS[-1]}; schema={{...}} on the command line replaces "
            "a config's schema"
        )
    if others:
        return AttributeSchema(tuple(others), tuple(schema.values()))
    names: Any = schema.get("names", DEFAULT_SCHEMA.names)
    if "ranges" in given:
        if {"min_value", "max_value"} & set(given):
            raise ValueError("attribute schema: give ranges, or min_value and max_value, not both")
        return AttributeSchema(names, schema["ranges"])
    low, high = schema.get("min_value", DEFAULT_RANGE[0]), schema.get("max_value", DEFAULT_RANGE[1])
    problems = [
        f"{key} must be a whole number, got {value!r}"
        for key, value in (("min_value", low), ("max_value", high))
        if type(value) is not int
    ]
    if not problems and low >= high:
        problems.append(f"min_value {low} must be below max_value {high}")
    problems = problems or _range_problems("all attributes", (low, high))
    if problems:
        raise ValueError("attribute schema: " + "; ".join(problems))
    count = len(names) if isinstance(names, Sequence) and not isinstance(names, str) else 0
    return AttributeSchema(names, ((low, high),) * count)


def schema_to_json(schema: AttributeSchema) -> dict[str, Any]:
    """A schema as JSON values, of which `as_schema` makes it again.

    The order of the attributes is that of a list, so a tool that sorts an object's keys keeps it,
    and equal results mean equal schemas.
    """
    if schema.shared_range is None:
        return {"names": list(schema.names), "ranges": [list(each) for each in schema.ranges]}
    return dict(zip(_SHARED_KEYS, (list(schema.names), *schema.shared_range), strict=True))


def check_same_attributes(
    schema: AttributeSchema, trained: AttributeSchema | Sequence[str], whose: str
) -> None:
    """Check that a schema is the one that a model was trained with, order and ranges included.

    Args:
        trained: the model's schema; or its names, where nothing says which ranges they had.
        whose: what has the model, the beginning of the message.

    Raises:
        ValueError: where it isn't.
    """
    if isinstance(trained, AttributeSchema):
        same, theirs, ours = schema == trained, str(trained), str(schema)
    else:
        same = list(schema.names) == list(trained)
        theirs, ours = ", ".join(trained), ", ".join(schema.names)
    if not same:
        raise ValueError(
            f"{whose} scores {theirs}; the schema has {ours}: they must be the same, in the same "
            "order"
        )


def schema_argument(schema: AttributeSchema) -> str:
    """How a command line states the schema: "schema.names=[humor]", or with the ranges."""
    if schema.shared_range == DEFAULT_RANGE:
        return f"schema.names=[{','.join(schema.names)}]"
    pairs = zip(schema.names, schema.ranges, strict=True)
    inner = ", ".join(f"{name}: [{low}, {high}]" for name, (low, high) in pairs)
    return f"'schema={{{inner}}}'"


def encode_label(
    values: Mapping[str, int | float], schema: AttributeSchema = DEFAULT_SCHEMA
) -> str:
    """The label string: "quality:4,humor:0", in the order of the schema.

    Whatever puts a label into a prompt or a file has it from here (or from `read_label`), so that a
    model never sees the same values in two orders.

    Raises:
        ValueError: for no values, unknown names, and values that aren't whole or out of range.
    """
    problems = [] if values else ["a label needs at least one attribute"]
    for name, value in values.items():
        problems += value_problems(name, value, schema)
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
            problems += value_problems(name, value, schema)
        values[name] = value
    if problems:
        message = f"label {label!r}: {'; '.join(problems)} (a label looks like 'quality:4,humor:0')"
        unknown = [name for name in values if schema is not None and name not in schema.names]
        if schema is not None and len(unknown) == len(problems):
            raise UnknownAttributes(message, unknown, schema)
        raise ValueError(message)
    return values


def read_label(label: str, schema: AttributeSchema | None) -> str:
    """A label of a file or a config, checked, and in the order of the schema if one is given.

    Raises:
        ValueError: as `parse_label`, UnknownAttributes among them.
    """
    values = parse_label(label, schema)
    return label if schema is None else encode_label(values, schema)


def label_of_scores(scores: Sequence[float], schema: AttributeSchema = DEFAULT_SCHEMA) -> str:
    """The label with all attributes of the schema: each score clipped to its range, and rounded.

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
            name: round(schema.clip(name, score))
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
    values = [schema.values_of(name) for name in schema.names]
    # An attribute with fewer values than others has its highest one again, which isn't drawn.
    most = max(map(len, values))
    values_VA = [[own[min(step, len(own) - 1)] for own in values] for step in range(most)]
    scores_VA = [list(scores)] * most
    p_VA = beta_log_prob(scores_VA, values_VA, concentration, bins, schema).exp()
    drawn = [
        rng.choices(own, p_V[: len(own)])[0]
        for own, p_V in zip(values, p_VA.t().tolist(), strict=True)
    ]
    return encode_label(dict(zip(schema.names, drawn, strict=True)), schema)


def value_problems(
    name: str, value: int | float, schema: AttributeSchema, *, whole: bool = True
) -> list[str]:
    """What keeps `value` from being one of an attribute; nothing where it is.

    Args:
        whole: False where human labels may lie between whole numbers, as in the regression format.
    """
    if name not in schema.names:
        return [_unknown_attribute(name, schema)]
    low, high = schema.range_of(name)
    in_range = (
        isinstance(value, Real)
        and not isinstance(value, bool)
        and low <= value <= high
        and (not whole or float(value).is_integer())
    )
    if in_range:
        return []
    number, got = ("a whole number", repr(value)) if whole else ("a number", f"{value:g}")
    return [f"{name} must be {number} from {low} to {high}, got {got}"]


def _unknown_attribute(name: str, schema: AttributeSchema) -> str:
    return f"unknown attribute {name!r}; known: {', '.join(schema.names)}"


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
        scores_NA: regression scores, each on its attribute's scale, and clipped into it. Python
            floats count as float64.
        values_NA: whole numbers of the attributes' ranges; broadcast to the shape of the scores.
        concentration: alpha + beta of the Beta distribution; 24 in the paper. It says how far
            values spread as a share of their range, whatever that is.
        bins: "midpoint" puts the edges halfway between values (consistent with rounding);
            "uniform" makes all bins equally wide.
        schema: its attributes are the columns, in its order (`select` gives one of some columns).
            Where they share a range, any columns may have it.

    Raises:
        ValueError: for NaN scores, for values outside their attribute's range, for shapes that
            don't fit, for an unknown `bins` and a concentration that isn't a positive number.
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
    low, high = _column_ranges(schema, scores.shape)
    score = scores.cpu().double().numpy()
    if np.isnan(score).any():
        problems.append(f"{np.isnan(score).sum()} of {score.size} scores are NaN")
    try:
        value = values.expand(scores.shape).cpu().double().numpy()
    except RuntimeError:
        problems.append(
            f"values of shape {tuple(values.shape)} don't fit scores of {tuple(scores.shape)}"
        )
    else:
        wrong = ~((value >= low) & (value <= high) & (value == np.floor(value)))
        if wrong.any():
            found, lowest, highest = (
                np.broadcast_to(each, value.shape)[wrong].flat[0] for each in (value, low, high)
            )
            problems.append(f"values must be whole numbers from {lowest} to {highest}, got {found}")
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
        schema: has the label's attributes, and maybe others.

    Raises:
        KeyError: where a response lacks a score.
        UnknownAttributes: where the label has attributes that the schema lacks.
        ValueError: as `beta_log_prob`.
    """
    scores_NA = [[own[name] for name in label] for own in scores]
    values_1A, named = [list(label.values())], schema.select(label)
    log_p_NA = beta_log_prob(scores_NA, values_1A, concentration, bins, named)
    return log_p_NA.sum(dim=1).tolist()


def _as_tensor(data: Tensor | Sequence[Any]) -> Tensor:
    import numpy as np
    import torch

    return data.detach() if isinstance(data, torch.Tensor) else torch.as_tensor(np.asarray(data))


def _column_ranges(
    schema: AttributeSchema, shape: Sequence[int]
) -> tuple[np.ndarray | int, np.ndarray | int]:
    """Lowest and highest value of every column [A] of scores; of all of them, where they share it.

    Raises:
        ValueError: where the columns can't be the schema's attributes.
    """
    import numpy as np

    if schema.shared_range is not None:
        return schema.shared_range
    if tuple(shape[-1:]) != (len(schema.names),):
        raise ValueError(
            f"scores of shape {tuple(shape)} need one column for each attribute, which have "
            f"different ranges: {schema}"
        )
    low_A, high_A = np.array(schema.ranges).T
    return low_A, high_A


def _bin_edges(
    step: np.ndarray, num_values: np.ndarray | int, bins: str
) -> tuple[np.ndarray, np.ndarray]:
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
