"""NAME.settings.json beside a data file NAME: what its lines depend on, with the schema of its
labels."""

from __future__ import annotations

from pathlib import Path

from steerlm2.attributes import AttributeSchema, as_schema
from steerlm2.files import parse_json


def settings_file(data: str | Path) -> Path:
    """Where the settings of a data file are."""
    path = Path(data)
    return path.with_name(path.name + ".settings.json")


def schema_of_data(data: str | Path) -> AttributeSchema | None:
    """The schema that a data file was written with; None where nothing says so, or it was the
    default one.

    Raises:
        ValueError: where its settings can't be understood, naming their file.
    """
    file = settings_file(data)
    if not file.is_file():
        return None
    try:
        schema = parse_json(file.read_bytes()).get("schema")
        return None if schema is None else as_schema(schema)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} is damaged ({error}): write the data again, or remove it and give 'schema'"
        ) from error
