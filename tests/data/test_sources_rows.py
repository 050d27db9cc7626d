"""Where rows come from: files, folders laid out as on the hub, the hub itself."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from steerlm2.data.jsonl import LineProblems
from steerlm2.data.sources.rows import iter_rows


def write(path: Path, *values: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        datasets.Dataset.from_list([{"v": value} for value in values]).to_parquet(str(path))
        return path
    text = "".join(json.dumps({"v": value}) + "\n" for value in values)
    with gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w") as file:
        file.write(text)
    return path


def read(source: str | Path, subset: str = "") -> list[tuple[Any, str | None]]:
    problems = LineProblems(source)
    rows = [(row.value["v"], row.split) for row in iter_rows(source, problems, subset)]
    problems.raise_if_any()
    return rows


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet", "train.jsonl"])
def test_a_file_has_no_split_whatever_its_name(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, 1, 2)
    assert read(path) == [(1, None), (2, None)]
    rows = list(iter_rows(path, LineProblems(path)))
    assert [(row.path, row.number) for row in rows] == [(path, 1), (path, 2)]


@pytest.mark.parametrize("name", ["{}.jsonl", "{}.jsonl.gz", "{}.parquet", "data/{}-0-1.parquet"])
def test_a_folder_has_a_file_for_each_split(tmp_path: Path, name: str) -> None:
    write(tmp_path / name.format("validation"), 3)
    write(tmp_path / name.format("train"), 1, 2)
    assert read(tmp_path) == [(1, "train"), (2, "train"), (3, "validation")]


def test_validation_data_may_be_called_val_and_be_absent(tmp_path: Path) -> None:
    write(tmp_path / "a" / "train.jsonl", 1)
    write(tmp_path / "b" / "val.jsonl", 2)
    assert read(tmp_path / "a") == [(1, "train")]
    assert read(tmp_path / "b") == [(2, "validation")]


def test_shards_are_read_in_order_and_a_split_only_once(tmp_path: Path) -> None:
    for i in (1, 0):
        write(tmp_path / "data" / f"train-0000{i}-of-00002.parquet", i)
    assert read(tmp_path) == [(0, "train"), (1, "train")]
    write(tmp_path / "train.jsonl.gz", 5)
    write(tmp_path / "train.jsonl", 6)
    assert read(tmp_path) == [(5, "train")]


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz", "pairs.parquet"])
def test_a_subset_is_one_file_of_its_name(tmp_path: Path, name: str) -> None:
    write(tmp_path / "train.jsonl", 1)
    write(tmp_path / "pairs" / name, 2)
    assert read(tmp_path, "pairs") == [(2, None)]
    assert read(tmp_path / "pairs", "pairs") == [(2, None)]


def test_a_subset_may_have_splits(tmp_path: Path) -> None:
    write(tmp_path / "pairs" / "train.jsonl.gz", 1)
    write(tmp_path / "pairs" / "validation.jsonl.gz", 2)
    assert read(tmp_path, "pairs") == [(1, "train"), (2, "validation")]


def test_a_folder_without_a_subset_is_not_read_in_its_place(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", 1)
    with pytest.raises(FileNotFoundError, match=r"pairs holds no pairs\.jsonl\.gz"):
        read(tmp_path, "pairs")
    with pytest.raises(FileNotFoundError, match=r"holds no train\.jsonl\.gz"):
        read(write(tmp_path / "c" / "test.jsonl", 1).parent)


@pytest.mark.parametrize("source", ["no.jsonl", "data/no.jsonl.gz", "data/no.parquet", "/a/b/c"])
def test_a_missing_file_is_not_taken_for_a_hub_id(source: str) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read(source)


def test_other_files_of_a_folder_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "train.jsonl", 1)
    for name in ("train.csv", "test.json", "README.md", "dataset_info.json"):
        (tmp_path / name).write_text("[]")
    assert read(tmp_path) == [(1, "train")]
    assert "not read: train.csv" in caplog.text
    assert "test.json" not in caplog.text


@pytest.mark.parametrize("name", ["val", "valid", "dev", "test"])
@pytest.mark.parametrize("ending", ["json", "csv", "tsv.gz"])
def test_validation_data_have_several_names_and_any_container(
    tmp_path: Path, name: str, ending: str
) -> None:
    content = {"json": '[{"v": "1"}]', "csv": "v\n1\n", "tsv.gz": "v\n1\n"}[ending].encode()
    for split in ("train", name):
        (tmp_path / f"{split}.{ending}").write_bytes(
            gzip.compress(content) if ending.endswith("gz") else content
        )
    assert read(tmp_path) == [("1", "train"), ("1", "validation")]


def test_test_data_are_not_read_where_there_are_validation_data(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for i, name in enumerate(("train", "validation", "test")):
        write(tmp_path / f"{name}.jsonl", i)
    assert read(tmp_path) == [(0, "train"), (1, "validation")]
    assert "not read: test.jsonl" in caplog.text


def test_a_folder_of_other_names_is_read_whole_in_their_order_and_has_no_split(
    tmp_path: Path,
) -> None:
    for i in (1, 0):
        write(tmp_path / f"part-{i}.jsonl", i)
    (tmp_path / "notes.txt").write_text("x")
    assert read(tmp_path) == [(0, None), (1, None)]


@pytest.mark.parametrize("folder", ["", "data/"])
def test_files_of_several_splits_are_not_read_together(tmp_path: Path, folder: str) -> None:
    for name in ("train_sft", "test_sft", "train_prefs"):
        write(tmp_path / f"{folder}{name}-00000-of-00001.parquet", 1)
    with pytest.raises(FileNotFoundError, match=r"it holds test_sft-.*builder\.splits"):
        read(tmp_path)


def test_splits_can_be_named_and_must_be_there(tmp_path: Path) -> None:
    write(tmp_path / "train_sft.jsonl", 1)
    write(tmp_path / "train.jsonl", 2)
    problems = LineProblems(tmp_path)
    rows = iter_rows(tmp_path, problems, splits={"train": "train_sft"})
    assert [row.value["v"] for row in rows] == [1]
    with pytest.raises(FileNotFoundError, match="holds no train_gen"):
        next(iter_rows(tmp_path, problems, splits={"train": "train_gen"}))


# Containers


def values(path: Path, content: str | bytes) -> tuple[list[tuple[int, Any]], str]:
    """(number, value) of a file's rows, and the error that names the others, "" without."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    problems = LineProblems(path)
    found = []
    try:
        for row in iter_rows(path, problems):
            found.append((row.number, row.value))
        problems.raise_if_any()
    except ValueError as error:
        return found, str(error)
    return found, ""


def test_cells_are_text_with_quotes_delimiters_and_line_breaks(tmp_path: Path) -> None:
    """A row's number is the line on which it begins; blank lines are none."""
    content = 'a,b\r\n"1, ""x""","2\r\n3"\r\n\r\n,4\r\n'
    assert values(tmp_path / "d.csv", "\ufeff" + content) == (
        [(2, {"a": '1, "x"', "b": "2\r\n3"}), (5, {"a": "", "b": "4"})],
        "",
    )


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"1", "has 1 cells, the first line has 2"),
        (b"1,2,3", "has 3 cells, the first line has 2"),
        (b"caf\xe9,2", "not UTF-8 (save the table as CSV UTF-8)"),
        (b'"1" 2,3', "not valid CSV (',' expected after '\"')"),
    ],
)
def test_bad_lines_of_a_table_are_named_and_the_others_read(
    tmp_path: Path, line: bytes, problem: str
) -> None:
    path = tmp_path / "d.csv"
    found, error = values(path, b"a,b\n1,2\n" + line + b"\n5,6\n")
    assert found == [(2, {"a": "1", "b": "2"}), (4, {"a": "5", "b": "6"})]
    assert error == f"{path}:3: {problem}"


def test_a_quote_that_is_not_closed_is_named_where_it_begins(tmp_path: Path) -> None:
    found, error = values(tmp_path / "d.csv", 'a,b\n1,2\n"3,4\n5,6\n')
    assert found == [(2, {"a": "1", "b": "2"})]
    assert "d.csv:3: not valid CSV (unexpected end of data)" in error


def test_cells_may_be_long(tmp_path: Path) -> None:
    """csv's own limit is 128 KiB."""
    text = "x" * 300_000
    assert values(tmp_path / "d.csv", f"a,b\n{text},2\n")[0] == [(2, {"a": text, "b": "2"})]


def test_columns_need_names_of_their_own(tmp_path: Path) -> None:
    assert "names columns twice: a" in values(tmp_path / "d.csv", "a,b,a\n1,2,3\n")[1]
    assert values(tmp_path / "d.csv", ",b\n0,x\n")[0] == [(2, {"column 1": "0", "b": "x"})]


def test_many_columns_take_no_time(tmp_path: Path) -> None:
    """A time that grows with their square is most of a minute."""
    names = [f"c{i}" for i in range(40_000)]
    started = time.monotonic()
    assert values(tmp_path / "d.csv", ",".join([*names, names[-1]]) + "\n")[0] == []
    assert time.monotonic() < started + 5


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('[{"v": 1},\n{"v": }]', "not valid JSON (line 2, Expecting value at column 7)"),
        ('[{"v": 1, "v": 2}]', "not valid JSON (key 'v' is given twice)"),
        ('{"a": [{"v": 1}], "b": [{"v": 1}]}', "with 2 such lists and the keys 'a', 'b'"),
        ('{"a": 1}', "with 0 such lists and the keys 'a'"),
        ('{"prompt": ["Q"], "response": ["A"]}', "is a table by columns ('prompt', 'response')"),
        ('{"prompt": {"0": "Q"}, "response": {"0": "A"}}', "is a table by columns ("),
        ('"text"', "must be a JSON array, or an object with a list of objects"),
        (b"\xff\xfe[\x00", "is UTF-16"),
        (b"PAR1", "is Parquet"),
    ],
)
def test_json_that_has_no_rows_is_refused_with_the_reason(
    tmp_path: Path, content: str | bytes, problem: str
) -> None:
    found, error = values(tmp_path / "d.json", content)
    assert found == []
    assert "d.json" in error
    assert problem in error


@pytest.mark.parametrize(
    "row", [{"messages": [{"role": "user"}]}, {"prompt": "Q", "x": [{"y": 1}]}]
)
def test_one_record_is_not_taken_for_what_holds_records(tmp_path: Path, row: Any) -> None:
    assert values(tmp_path / "d.json", json.dumps(row, indent=1))[0] == [(1, row)]


@pytest.mark.parametrize("name", ["d.json.gz", "d.csv.gz", "d.parquet.gz"])
def test_compressed_files_that_are_cut_off_are_named(tmp_path: Path, name: str) -> None:
    content = gzip.compress(json.dumps([{"v": str(i)} for i in range(5000)]).encode())
    assert name in values(tmp_path / name, content[: len(content) // 2])[1]


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"rows\.parquet can't be read as Parquet"):
        read(path)


def test_bad_json_is_named_with_its_file(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", 1)
    (tmp_path / "validation.jsonl").write_text("{]\n")
    with pytest.raises(ValueError, match=r"validation\.jsonl:1: not valid JSON"):
        read(tmp_path)


@pytest.mark.parametrize("kind", ["Image", "Audio", "Video"])
@pytest.mark.parametrize("where", ["file", "hub"])
def test_pictures_and_recordings_of_a_table_are_not_fetched(
    kind: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cell names any file or address, and texts need none of them."""
    cell = {"bytes": None, "path": "http://127.0.0.1:9/x"}
    layout = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = {"info": {"features": {"v": {"_type": kind}}}}
    table = pa.table({"v": pa.array([cell], layout)})
    table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, tmp_path / "train.parquet")
    if where == "file":
        assert read(tmp_path) == [(cell, "train")]
        return
    rows = datasets.Dataset.from_parquet(str(tmp_path / "train.parquet"), cache_dir=str(tmp_path))
    loaded = datasets.DatasetDict({"train": rows})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, data_dir: loaded)
    assert read("owner/name") == [(cell, "train")]


def test_hub_ids_are_loaded_with_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def load_dataset(name: str, *, data_dir: str | None) -> datasets.DatasetDict:
        asked.append((name, data_dir))
        rows = {"validation": [3], "train": [1, 2], "test": [4]}
        return datasets.DatasetDict(
            {k: datasets.Dataset.from_list([{"v": v} for v in vs]) for k, vs in rows.items()}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("owner/name") == [(1, "train"), (2, "train"), (3, "validation")]
    read("owner/name", "pairs")
    assert asked == [("owner/name", None), ("owner/name", "pairs")]


def test_without_the_hub_the_way_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, *, data_dir: str | None) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"owner/name is no local .*no route.*download its files"):
        read("owner/name")
