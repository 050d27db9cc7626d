"""JSON lines: what can't be read is named, all of it in one message."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
import time
from pathlib import Path
from typing import Any

import pytest

from steerlm2.attributes import AttributeSchema, UnknownAttributes
from steerlm2.data.jsonl import LineProblems, iter_json_lines

LINE = b'{"system": "Be terse.", "turns": [{"value": "Why?"}]}\n'
OTHER_FORMATS = {
    "one JSON array: write an object a line": b"[" + LINE.rstrip() + b",\n" + LINE + b"]\n",
    "one JSON array": b"\xef\xbb\xbf\n [\n" + LINE + b"]\n",
    "JSON over several lines: write an object a line": json.dumps(
        json.loads(LINE), indent=2
    ).encode(),
    "JSON over several": LINE.replace(b", ", b",\n"),
    "UTF-16 or UTF-32: convert it to UTF-8": LINE.decode().encode("utf-16"),
    "UTF-16 or UTF-32": LINE.decode().encode("utf-16-le"),
    "UTF-16": LINE.decode().encode("utf-32-be"),
    "compressed with gzip: give it a name that ends in .gz": gzip.compress(LINE),
    "compressed: unpack it": b"PK\x03\x04" + bytes(100),
    "compressed: unpack": bz2.compress(LINE),
    "compressed:": lzma.compress(LINE),
    "Parquet: recipe prepare_data reads it": b"PAR1" + bytes(100) + b"PAR1",
}


def read(path: str | Path) -> list[Any]:
    problems = LineProblems(path)
    objects = [obj for _, obj in iter_json_lines(path, problems)]
    problems.raise_if_any()
    return objects


def test_unknown_attributes_of_many_lines_are_one_table_and_of_one_a_line() -> None:
    def unknown(*names: str) -> UnknownAttributes:
        return UnknownAttributes(f"no {names}", names, AttributeSchema(("humor",)))

    problems = LineProblems("f.jsonl")
    problems.add(3, unknown("wit"))
    with pytest.raises(ValueError, match=r"^f\.jsonl:3: no \('wit',\)$"):
        problems.raise_if_any()
    problems.add(4, "a bad line")
    problems.add(5, unknown("rigor", "wit"))
    with pytest.raises(ValueError, match="bad line") as error:
        problems.raise_if_any()
    assert str(error.value).splitlines() == [
        "f.jsonl:4: a bad line",
        "2 labels have attributes that the schema lacks; set schema, which has humor now, to "
        "those that the labels name, or correct the labels:",
        "  attribute   labels  first",
        "  wit              2  f.jsonl:3",
        "  rigor            1  f.jsonl:5",
    ]


def test_blank_lines_and_byte_order_mark_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + LINE.rstrip() + b"\r\n  \n\n")
    assert len(read(path)) == 1


@pytest.mark.parametrize("message", OTHER_FORMATS)
def test_other_formats_are_one_message(tmp_path: Path, message: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(OTHER_FORMATS[message])
    with pytest.raises(ValueError, match=f"^{path} is {message}") as error:
        read(path)
    assert "\n" not in str(error.value)


LATIN_1 = '{"system": "Größe"}\n'.encode("latin-1")
OTHER_TEXTS = {
    "seems to be CSV: under a name that ends in .csv": b"prompt,response\nWhy?,So.\nHow?,Thus.\n",
    "seems to be CSV: under": b'\xef\xbb\xbfprompt;"the response"\r\nWhy?;"So,\r\nit is."\r\n',
    "seems to be CSV": b"prompt\tresponse\nWhy?\tSo.\n",
    "seems to be YAML: write an object a line": b"- prompt: Why?\n  response: So.\n",
    "seems to be YAML: write": b"---\nprompt: Why?\n",
    "seems to be YAML": b"data:\n  - Why, and how?\n",
    "seems to be XML or HTML": b"<!DOCTYPE html>\n<html></html>\n",
    "seems to be plain text": b"Once upon a time.\nThe end.\n",
    "is not UTF-8 (line 1, byte 15): convert it": LATIN_1 * 12,
    "is not UTF-8": LATIN_1.rstrip(),
    "seems to be CSV: under a name that ends in .csv or .tsv `prepare_data --config data/chat "
    "source=...` reads it; it is not UTF-8 (line 2": "prompt,response\nGröße,3\n".encode("latin-1"),
}


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("message", OTHER_TEXTS)
def test_a_text_without_a_line_of_json_is_one_message(
    tmp_path: Path, message: str, compressed: bool
) -> None:
    path = tmp_path / ("d.jsonl.gz" if compressed else "d.jsonl")
    content = OTHER_TEXTS[message]
    path.write_bytes(gzip.compress(content) if compressed else content)
    with pytest.raises(ValueError, match=f"^{path} {re.escape(message)}") as error:
        read(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b'{"a": \n{"b"\n', b"{'a': 1}\n{'b': 2}\n"])
def test_objects_with_mistakes_are_named_by_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"d\.jsonl:1: .*\n.*d\.jsonl:2: not valid JSON"):
        read(path)


def test_an_array_in_a_compressed_file_is_one_too(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(gzip.compress(b"[" + LINE + b"]"))
    with pytest.raises(ValueError, match=f"^{path} is one JSON array"):
        read(path)


@pytest.mark.parametrize("line", ['{"a": 1, "b": 2, "a": 1}', '{"b": [{"a": 1, "a": null}]}'])
def test_a_key_that_is_there_twice_is_named(tmp_path: Path, line: str) -> None:
    """Which of them counts is a matter of the reader; json takes the last."""
    path = tmp_path / "d.jsonl"
    path.write_bytes(LINE + line.encode())
    with pytest.raises(ValueError, match=r"d\.jsonl:2: not valid JSON \(key 'a' is given twice\)"):
        read(path)


def test_a_key_that_is_there_twice_is_found_among_very_many(tmp_path: Path) -> None:
    """In a time that doesn't grow with their square, which is most of a minute."""
    keys = [f'"{i}": 0' for i in range(40_000)]
    (tmp_path / "d.jsonl").write_bytes(LINE + f"{{{', '.join([*keys, keys[-1]])}}}".encode())
    started = time.monotonic()
    with pytest.raises(ValueError, match="key '39999' is given twice"):
        read(tmp_path / "d.jsonl")
    assert time.monotonic() < started + 5


def test_bytes_that_are_no_utf8_are_named(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(LINE.rstrip() + b'\n{"system": "\xff"}\n')
    with pytest.raises(ValueError, match=r"d\.jsonl:2: not valid JSON \(not UTF-8 at byte 13\)"):
        read(tmp_path / "d.jsonl")


def test_a_line_nested_too_deeply_is_a_bad_line(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"a": ' * 200_000)
    with pytest.raises(ValueError, match=r"d\.jsonl:1: not valid JSON \(nested too deeply\)"):
        read(path)


def test_a_cut_off_gzip_file_is_an_error(tmp_path: Path) -> None:
    whole = gzip.compress(LINE)
    (tmp_path / "d.jsonl.gz").write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="damaged or cut off"):
        read(tmp_path / "d.jsonl.gz")


def test_what_only_looks_like_gzip_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl.gz").write_bytes(LINE.rstrip())
    with pytest.raises(ValueError, match=r"d\.jsonl\.gz:1: the compressed file is damaged"):
        read(tmp_path / "d.jsonl.gz")


def test_missing_file_names_the_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="working directory") as error:
        read("no/such.jsonl")
    assert str(tmp_path / "no" / "such.jsonl") in str(error.value)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is a folder"):
        read(tmp_path)
