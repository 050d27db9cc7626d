"""steerlm2.json, and the schema that training labels have."""

from __future__ import annotations

from pathlib import Path

import pytest

from steerlm2.attributes import DEFAULT_SCHEMA, AttributeSchema
from steerlm2.facts import ModelFacts, read_facts, schema_of_labels, write_facts

TEMPLATE = {"_component_": "steerlm2.data.extra_id_template"}


@pytest.mark.parametrize(
    "schema", [None, DEFAULT_SCHEMA, AttributeSchema(("formality", "length"), ((-1, 1), (0, 9)))]
)
def test_what_is_written_is_read(tmp_path: Path, schema: AttributeSchema | None) -> None:
    facts = ModelFacts(
        kind="language model",
        template=TEMPLATE,
        schema=schema,
        default_label="humor:1",
        system="Höflich.",
        trained={"data": "train.jsonl"},
    )
    write_facts(tmp_path, facts)
    (tmp_path / "config.json").touch()
    assert read_facts(tmp_path) == facts


def test_a_folder_without_the_file_says_nothing(tmp_path: Path) -> None:
    assert read_facts(tmp_path / "missing") is None


def test_labels_name_their_part_of_the_default_schema_in_its_order() -> None:
    """Most frequent: verbosity 1 (twice), humor 2 (ties: the lower one)."""
    labels = ["verbosity:1", "verbosity:1,humor:3", "humor:2,verbosity:4"]
    schema, usual = schema_of_labels(labels, None)
    assert schema is not None
    assert schema.names == ("humor", "verbosity")
    assert usual == "humor:2,verbosity:1"


def test_a_given_schema_stays_whole() -> None:
    given = AttributeSchema.sharing(["length", "formality"], 0, 9)
    assert schema_of_labels(["formality:9"], given) == (given, "formality:9")


def test_without_labels_there_is_nothing_to_add() -> None:
    assert schema_of_labels([], None) == (None, None)
    assert schema_of_labels([], DEFAULT_SCHEMA) == (DEFAULT_SCHEMA, None)


@pytest.mark.parametrize("labels", [["formality:2"], ["humor:7"], ["humor:2,formality:1"]])
def test_labels_outside_the_schema_are_refused_with_what_they_are(labels: list[str]) -> None:
    with pytest.raises(ValueError, match=r"Set schema .*\{.*: \[\d, \d\]\}"):
        schema_of_labels(labels, None)
