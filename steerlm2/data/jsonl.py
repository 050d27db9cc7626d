"""Files of JSON lines: reading them with all their problems in one message, and writing a line."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

from steerlm2.attributes import AttributeSchema, UnknownAttributes

START = 4096
"""Bytes of a file that tell its format."""
_UTF_16 = "UTF-16 or UTF-32: convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)"
_ARCHIVE = "compressed: unpack it, or compress it with gzip under a name that ends in .gz"
_OTHER_FORMATS = {
    b"PAR1": "Parquet: recipe prepare_data reads it under a name that ends in .parquet",
    b"\x1f\x8b": "compressed with gzip: give it a name that ends in .gz",
    codecs.BOM_UTF16_LE: _UTF_16,
    codecs.BOM_UTF16_BE: _UTF_16,
    b"PK\x03\x04": _ARCHIVE + " (an Excel file: save it as CSV)",  # zip
    b"\x28\xb5\x2f\xfd": _ARCHIVE,  # Zstandard
    b"BZh": _ARCHIVE,
    b"\xfd7zXZ": _ARCHIVE,
    b"ARROW1": "Arrow: recipe prepare_data reads Parquet, under a name that ends in .parquet",
}
"""First bytes -> what a file is, and what to do."""

_OBJECT_A_LINE = "write an object a line"
_KINDS_OF_TEXT = {
    r"\{": "",  # JSON lines with mistakes in them, which their own messages name
    r"<": f"XML or HTML: {_OBJECT_A_LINE}",
    r"---\s*$|- |[\w.\"'-]+\s*:(\s|$)": f"YAML: {_OBJECT_A_LINE} (yq -o json -I 0 '.[]')",
    r"[^,;\t]{1,60}([,;\t][^,;\t]{0,60})+$": (
        "CSV: under a name that ends in .csv or .tsv `prepare_data --config data/chat source=...` "
        "reads it"
    ),
    r"": f"plain text: {_OBJECT_A_LINE}",
}
"""How the first line of a text begins -> what it seems to be, and what to do; the first that fits.
A name of a column has at most 60 characters: a choice, so that few sentences seem to be CSV."""

_MAX_REPORTED = 10


def shortened(problems: Sequence[str]) -> list[str]:
    """The first 10 problems, and how many more there are."""
    more = len(problems) - _MAX_REPORTED
    return [*problems[:_MAX_REPORTED], *([f"... and {more} more"] if more > 0 else [])]


class LineProblems:
    """Collects the bad lines of a file, so that one message can name them together."""

    def __init__(self, path: str | Path, numbered: str = ":") -> None:
        """
        Args:
            path: of the file.
            numbered: what stands between the file's name and a number.
        """
        self.path = path
        self.numbered = numbered
        self.count = 0
        self._first: list[str] = []
        self._unknown = _UnknownTable()

    def add(
        self, line_number: int, problem: str | ValueError, path: str | Path | None = None
    ) -> None:
        """Note a bad line.

        Args:
            line_number: from 1.
            problem: UnknownAttributes of several lines become one table.
            path: the line's file, if it isn't `self.path`.
        """
        where = f"{path or self.path}{self.numbered}{line_number}"
        self.count += 1
        if isinstance(problem, UnknownAttributes):
            self._unknown.add(where, problem)
        elif len(self._first) < _MAX_REPORTED:
            self._first.append(f"{where}: {problem}")

    def raise_if_any(self) -> None:
        """Report the bad lines, if there are any.

        Raises:
            ValueError: "FILE:LINE: problem" for the first 10 bad lines, how many more there are,
                and a table of the attributes that the schema lacks.
        """
        if not self.count:
            return
        more = self.count - len(self._first) - self._unknown.count
        tail = [f"... and {more} more bad line{'s' * (more > 1)}"] if more else []
        raise ValueError("\n".join([*self._first, *tail, *self._unknown.lines()]))


class _UnknownTable:
    """The attributes that labels name and the schema lacks: one mistake, however many lines."""

    def __init__(self) -> None:
        self.count = 0
        self._first = ""
        self._schema: AttributeSchema | None = None
        self._times: Counter[str] = Counter()
        self._first_place: dict[str, str] = {}

    def add(self, where: str, error: UnknownAttributes) -> None:
        self.count += 1
        self._first = self._first or f"{where}: {error}"
        self._schema = error.schema
        for name in error.names:
            self._times[name] += 1
            self._first_place.setdefault(name, where)

    def lines(self) -> list[str]:
        if self._schema is None or self.count == 1:
            return [self._first] if self._first else []
        width = max(map(len, ["attribute", *self._times]))
        return [
            f"{self.count} labels have attributes that the schema lacks; set schema, which has "
            f"{', '.join(self._schema.names)} now, to those that the labels name, or correct "
            "the labels:",
            f"  {'attribute':<{width}} {'labels':>8}  first",
            *(
                f"  {name:<{width}} {times:>8}  {self._first_place[name]}"
                for name, times in self._times.most_common()
            ),
        ]


def iter_json_lines(path: str | Path, problems: LineProblems) -> Iterator[tuple[int, Any]]:
    """(line number from 1, decoded JSON) of the lines of a .jsonl or .jsonl.gz file.

    Blank lines are skipped. Lines that can't be decoded, or have a key twice, go to `problems`,
    which the caller raises at the end.

    Raises:
        FileNotFoundError: with the absolute path.
        ValueError: for a file of another format, which it names; after the last line, if the text
            shows it.
    """
    path = Path(path)
    line_number = 0
    is_any_json, first_line, not_utf8 = False, b"", ""
    with open_for_reading(path) as file:
        try:
            _refuse_other_formats(path, file.peek(START))
            for line_number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                first_line = first_line or line
                try:
                    obj = json.loads(
                        line.rstrip(b"\r\n").decode("utf-8-sig" if line_number == 1 else "utf-8"),
                        object_pairs_hook=unique_keys,
                    )
                except (ValueError, RecursionError) as error:
                    if isinstance(error, UnicodeDecodeError) and not not_utf8:
                        not_utf8 = f"line {line_number}, byte {error.start + 1}"
                    problems.add(line_number, f"not valid JSON ({json_hint(error)})")
                else:
                    is_any_json = True
                    yield line_number, obj
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            problems.add(line_number + 1, f"the compressed file is damaged or cut off ({error})")
            return
    if first_line and not is_any_json:
        _refuse_other_text(path, first_line, not_utf8)


def open_for_reading(
    path: Path, wanted: str = ".jsonl or .jsonl.gz"
) -> gzip.GzipFile | BufferedReader:
    """Open a file for reading bytes, which are decompressed if its name ends in .gz.

    Raises:
        FileNotFoundError: with the absolute path, and that a file of a `wanted` name is.
    """
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"{path.absolute()} {what}; give a {wanted} file"
            " (relative paths start at the working directory)"
        )
    return gzip.open(path) if path.suffix == ".gz" else open(path, "rb")


def json_line(obj: dict[str, Any]) -> bytes:
    """One line of a JSONL file in UTF-8, without escapes of characters, with the line end."""
    line = json.dumps(obj, ensure_ascii=False)
    if not is_unicode(line):  # half a surrogate pair in an unknown key needs a \u escape
        line = json.dumps(obj, ensure_ascii=True)
    return line.encode("utf-8") + b"\n"


@contextlib.contextmanager
def open_for_writing(path: Path, compressed: bool) -> Iterator[IO[bytes] | gzip.GzipFile]:
    """Open a file; the gzip header has neither time nor name, so equal records give equal bytes."""
    with open(path, "wb") as raw:
        if compressed:
            with gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file:
                yield file
        else:
            yield raw


def refuse_what_is_no_text(path: Path, start: bytes) -> None:
    """One message for a file of another kind than text in UTF-8.

    Args:
        start: the first bytes of the file, or of what is compressed in it.

    Raises:
        ValueError: naming the kind, and what to do.
    """
    for magic, what in _OTHER_FORMATS.items():
        if start.startswith(magic):
            raise ValueError(f"{path} is {what}")
    if b"\0" in start[:4]:
        raise ValueError(f"{path} is {_UTF_16}")


def _refuse_other_formats(path: Path, start: bytes) -> None:
    """One message instead of one a line.

    Raises:
        ValueError: where the start isn't that of JSON lines in UTF-8.
    """
    refuse_what_is_no_text(path, start)
    text = start.removeprefix(codecs.BOM_UTF8).lstrip()
    one_a_line = f"{_OBJECT_A_LINE} (jq -c"
    if text.startswith(b"["):
        raise ValueError(
            f"{path} is one JSON array: {one_a_line} '.[]' {path.name}); recipe prepare_data reads "
            "it under a name that ends in .json"
        )
    first_line, line_end, _ = text.partition(b"\n")
    if line_end and first_line.rstrip().endswith((b"{", b"[", b",")):
        raise ValueError(f"{path} is JSON over several lines: {one_a_line} . {path.name})")


def _refuse_other_text(path: Path, first_line: bytes, not_utf8: str) -> None:
    """One message for a text of which no line is JSON.

    Args:
        not_utf8: where its first bytes are that aren't UTF-8; "": nowhere.

    Raises:
        ValueError: where it doesn't look like JSON lines, or isn't UTF-8.
    """
    text = first_line.removeprefix(codecs.BOM_UTF8).decode("latin-1").strip()
    kind = next(kind for start, kind in _KINDS_OF_TEXT.items() if re.match(start, text))
    problems = [f"seems to be {kind}"] if kind else []
    if not_utf8:
        problems.append(
            f"is not UTF-8 ({not_utf8}): convert it, from Latin-1 with iconv -f LATIN1 -t UTF-8"
        )
    if problems:
        raise ValueError(f"{path} {'; it '.join(problems)}")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises ValueError for a key that is there twice, of which json would take the last."""
    obj = dict(pairs)
    if len(obj) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, times in counts.items() if times > 1)
        raise ValueError(f"key {twice[:100]!r} is given twice")
    return obj


def json_hint(error: Exception) -> str:
    """What is wrong with a text that isn't JSON, and where."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {error.start + 1}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
