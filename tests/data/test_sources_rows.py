"""Where rows come from: files, folders laid out as on the hub, the hub itself."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
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
