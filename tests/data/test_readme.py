"""The examples of steerlm2/data/README.md are read as what they are shown for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import steerlm2.data
from steerlm2.data.conversations import iter_conversations, parse_regression_text
from steerlm2.data.records import iter_records
from steerlm2.data.sources import chat_data
from steerlm2.data.sources.layouts import BY_NAME

README = Path(steerlm2.data.__file__).with_name("README.md")
EXAMPLES = {
    name: (ending, text)
    for name, ending, text in re.findall(
        r"^### (\w+)\n\n(?:(?!```|#).)*?```(\w+)\n(.*?)```$",
        README.read_text(encoding="utf-8"),
        re.DOTALL | re.MULTILINE,
    )
}
SCHEMA = {"names": ["formality", "length"], "min_value": 0, "max_value": 10}


def example(name: str, folder: Path) -> Path:
    ending, text = EXAMPLES[name]
    path = folder / f"example.{ending}"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_layout_and_format_has_an_example() -> None:
    assert EXAMPLES.keys() == {*BY_NAME, "regression"}


@pytest.mark.parametrize("name", BY_NAME)
def test_every_example_is_read_whole_as_its_layout(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = example(name, tmp_path)
    schema = None if name in ("conversations", "steerlm2") else SCHEMA
    items = list(chat_data(path, schema=schema))
    assert f"read as {name} (" in caplog.text
    assert "left out: none" in caplog.text
    assert len(items) == len(path.read_text().splitlines()) - (path.suffix == ".csv")


def test_our_formats_are_read_by_those_who_read_them(tmp_path: Path) -> None:
    assert len(list(iter_conversations(example("conversations", tmp_path)))) == 3
    records = list(iter_records(example("steerlm2", tmp_path), require=(), min_responses=0))
    assert [len(record.responses) for record in records] == [2, 2, 0]
    for line in EXAMPLES["regression"][1].splitlines():
        record = json.loads(line)
        assert parse_regression_text(record["text"])[1][-1].role == "Assistant"
        assert len(record["label"]) == 9
