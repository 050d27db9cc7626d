"""steerlm2.json: what an exported model says of itself, so that no config has to say it again.

    {
      "kind": "language model",
      "template": {"_component_": "steerlm2.data.llama3_template"},
      "schema": {"names": ["humor", "verbosity"], "min_value": 0, "max_value": 4},
      "default_label": "humor:0,verbosity:2",
      "system": "Answer the question.",
      "trained": {"method": "SteerLM 2.0", "from": "acsft/epoch_1", "base": "Llama-3.2-1B",
                  "data": "train.jsonl", "records": 500, "steps": 800, "loss": 0.07}
    }

Paths aren't in it: a folder is published as it is.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from steerlm2.attributes import (
    DEFAULT_SCHEMA,
    AttributeSchema,
    as_schema,
    encode_label,
    parse_label,
    schema_to_json,
)
from steerlm2.checkpoint_dirs import read_json, resolve_checkpoint_dir

FACTS_FILE = "steerlm2.json"

Kind = Literal["language model", "attribute model"]


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What whoever uses a model must know of its training."""

    kind: Kind
    template: Mapping[str, Any]
    """As in a config: `_component_` and its arguments."""
    schema: AttributeSchema | None
    """An attribute model's attributes, or those of a language model's labels; None: it was trained
    without labels."""
    default_label: str | None = None
    """Of a language model: each attribute's most frequent value in training."""
    system: str | None = None
    """Of a language model: the most frequent system text in training."""
    trained: Mapping[str, Any] = field(default_factory=dict)
    """How, from which model, on which data, for how many steps, and what came of it: for people to
    read, in the model card too."""


def read_facts(checkpoint_dir: str | Path) -> ModelFacts | None:
    """What a checkpoint says of itself; None where it doesn't exist, or isn't an export of ours.

    Args:
        checkpoint_dir: its folder, or the output_dir of a run.

    Raises:
        ValueError: where its steerlm2.json can't be understood, naming the file.
    """
    file = resolve_checkpoint_dir(checkpoint_dir, missing_ok=True) / FACTS_FILE
    if not file.is_file():
        return None
    values = read_json(file)
    try:
        if values["kind"] not in ("language model", "attribute model"):
            raise ValueError(f"unknown kind {values['kind']!r}")
        if not isinstance(values["template"]["_component_"], str):
            raise ValueError("template._component_ must be text")
        schema = values.get("schema")
        return ModelFacts(
            kind=values["kind"],
            template=values["template"],
            schema=None if schema is None else as_schema(schema),
            default_label=values.get("default_label"),
            system=values.get("system"),
            trained=values.get("trained") or {},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file.absolute()} isn't what this version writes ({error!r}): export the model "
            "again, or remove the file and give template and schema in the config"
        ) from error


def write_facts(folder: Path, facts: ModelFacts) -> None:
    """Write steerlm2.json into an export's folder."""
    values = vars(facts) | {"schema": facts.schema and schema_to_json(facts.schema)}
    known = {key: value for key, value in values.items() if value is not None}
    text = json.dumps(known, indent=2, ensure_ascii=False)
    (folder / FACTS_FILE).write_text(text + "\n", encoding="utf-8")


def schema_of_labels(
    labels: Iterable[str], schema: AttributeSchema | None
) -> tuple[AttributeSchema | None, str | None]:
    """The schema of training labels, and the label of each attribute's most frequent value.

    Args:
        labels: of all answers that have one.
        schema: what they may name; None: they are attributes of the default schema, and the result
            has only those of them that occur.

    Raises:
        ValueError: for labels of other attributes or values, with the schema that would hold them.
    """
    counts: dict[str, Counter[int]] = {}
    for label, number in Counter(labels).items():
        for name, value in parse_label(label).items():
            counts.setdefault(name, Counter())[value] += number
    if not counts:
        return schema, None
    known = schema or DEFAULT_SCHEMA
    try:
        for name, values in counts.items():
            encode_label({name: min(values)}, known)
            encode_label({name: max(values)}, known)
    except ValueError as error:
        seen = ", ".join(f"{name}: [{min(v)}, {max(v)}]" for name, v in counts.items())
        raise ValueError(
            f"the labels of the training data aren't those of 'schema' ({error}). Set schema to "
            f"the attributes with the ranges that their values can have; the data have {{{seen}}}"
        ) from error
    own = known.select(name for name in known.names if name in counts)
    usual = {name: max(sorted(values), key=values.__getitem__) for name, values in counts.items()}
    return schema or own, encode_label(usual, known)
