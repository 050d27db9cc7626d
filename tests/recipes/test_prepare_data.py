"""prepare_data from its command line: files, split, and mistakes without a traceback."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steerlm2.data.records import Record, read_records

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "prepare_data.py"
CONFIG = ROOT / "recipe_configs" / "data" / "oasst_groups.yaml"


Prepare = Callable[..., tuple[int, str, str]]


@pytest.fixture
def prepare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Prepare:
    """Runs the recipe as a script in `tmp_path`; gives exit status, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(RECIPE), "--config", str(CONFIG), *arguments])
        try:
            runpy.run_path(str(RECIPE), run_name="__main__")
            status = 0
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        return status, *capsys.readouterr()

    return run


def read(path: Path) -> list[Record]:
    return read_records(path, require=("log_p_attributes",))


@pytest.fixture
def trees(tmp_path: Path) -> Path:
    """Ten trees of one prompt with two labelled replies each."""

    def reply(text: str, quality: float) -> dict[str, Any]:
        return {"role": "assistant", "text": text, "labels": {"quality": {"value": quality}}}

    def tree(i: int) -> dict[str, Any]:
        replies = [reply(f"good {i}", 1.0), reply(f"bad {i}", 0.0)]
        prompt = {"role": "prompter", "text": f"Q{i}", "message_id": str(i), "replies": replies}
        return {"prompt": prompt}

    path = tmp_path / "trees.jsonl"
    path.write_text("".join(json.dumps(tree(i)) + "\n" for i in range(10)), encoding="utf-8")
    return path


def prompts(records: list[Record]) -> list[str]:
    return [record.prompt_turns[-1].value for record in records]


def test_split_is_a_partition_shuffled_by_the_seed(
    trees: Path, tmp_path: Path, prepare: Prepare
) -> None:
    """10 records, train_fraction 0.7: 7 and 3, all different, the same again with the same seed."""
    files: dict[str, list[bytes]] = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        arguments = (f"source={trees}", f"output_dir={name}", f"seed={seed}")
        assert prepare(*arguments, "train_fraction=0.7")[0] == 0
        files[name] = [(tmp_path / name / f).read_bytes() for f in ("train.jsonl", "val.jsonl")]
        train, val = (read(tmp_path / name / f) for f in ("train.jsonl", "val.jsonl"))
        assert (len(train), len(val)) == (7, 3)
        assert sorted(prompts(train + val)) == [f"Q{i}" for i in range(10)]
    assert files["a"] == files["b"]
    assert prompts(read(tmp_path / "a/train.jsonl")) != prompts(read(tmp_path / "c/train.jsonl"))


def test_prints_counts_and_the_next_step(trees: Path, tmp_path: Path, prepare: Prepare) -> None:
    _, stdout, _ = prepare(f"source={trees}", "output_dir=out", "train_fraction=0.7")
    rows = [line.split() for line in stdout.splitlines()]
    assert ["train.jsonl", "7", "14", "2", "to", "2"] in rows
    assert ["val.jsonl", "3", "6", "2", "to", "2"] in rows
    assert str(tmp_path / "out" / "train.jsonl") in stdout


def test_train_fraction_one_leaves_no_validation_file_also_of_earlier_runs(
    trees: Path, tmp_path: Path, prepare: Prepare
) -> None:
    prepare(f"source={trees}", "output_dir=out")
    assert (tmp_path / "out" / "val.jsonl").exists()
    _, stdout, _ = prepare(f"source={trees}", "output_dir=out", "train_fraction=1.0")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["train.jsonl"]
    assert len(read(tmp_path / "out" / "train.jsonl")) == 10
    assert ["val.jsonl", "removed:"] in [line.split()[:2] for line in stdout.splitlines()]


def test_arguments_of_the_source_can_be_overridden(
    trees: Path, tmp_path: Path, prepare: Prepare
) -> None:
    status, _, stderr = prepare(
        *(f"source={trees}", "output_dir=out", "train_fraction=1.0"),
        *("builder.label=quality:2,humor:1", "builder.system_prompt=Be brief."),
    )
    assert status == 0, stderr
    records = read(tmp_path / "out" / "train.jsonl")
    assert {(r.system, r.label) for r in records} == {("Be brief.", "quality:2")}


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ([], ["'source' is missing", "'output_dir' is missing"]),
        (["source=no.jsonl", "output_dir=out"], ["no.jsonl does not exist"]),
        (["source=trees.jsonl", "output_dir=out", "sed=1"], ["unknown key 'sed'", "'seed'"]),
        (["source=trees.jsonl", "output_dir=out", "builder.labl=best"], ["'builder.labl'"]),
        (["source=trees.jsonl", "output_dir=out", "builder.label=worst"], ["'sampled', 'best'"]),
        (["source=trees.jsonl", "output_dir=out", "preference=true"], ["'preference'"]),
        (["source=trees.jsonl", "output_dir=out", "sample_fraction=2"], ["'sample_fraction' must"]),
        (["source=trees.jsonl", "output_dir=out", "repeat=0"], ["'repeat' must be at least 1"]),
        (["source=trees.jsonl", "output_dir=out", "builder.bins=equal"], ["'midpoint' or"]),
        (
            ["source=trees.jsonl", "output_dir=out", "train_fraction=0"],
            ["'train_fraction' must be above 0 and at most 1, got 0.0"],
        ),
        (["source=broken.jsonl", "output_dir=out"], ["broken.jsonl:2: not valid JSON"]),
        (["source=none.jsonl", "output_dir=out"], ["none.jsonl gave no records"]),
    ],
)
def test_mistakes_end_in_one_message_and_no_files(
    trees: Path, tmp_path: Path, prepare: Prepare, arguments: list[str], messages: list[str]
) -> None:
    first_line = trees.read_text(encoding="utf-8").splitlines()[0]
    (tmp_path / "broken.jsonl").write_text(first_line + "\n{\n", encoding="utf-8")
    (tmp_path / "none.jsonl").write_text('{"prompt": {"role": "prompter", "text": "Q"}}\n')
    status, _, stderr = prepare(*arguments)
    assert status == 1
    assert "Traceback" not in stderr
    for message in messages:
        assert message in stderr
    assert not (tmp_path / "out").exists()


def test_real_trees_in_a_process_of_its_own(shared_dir: Path, tmp_path: Path) -> None:
    """141 groups, train_fraction 0.95: int(133.95) = 133 and 8."""
    source = shared_dir / "data" / "oasst2_trees.jsonl.gz"
    command = [sys.executable, str(RECIPE), "--config", str(CONFIG), f"source={source}"]
    result = subprocess.run(
        [*command, "output_dir=out"], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    counts = [len(read(tmp_path / "out" / name)) for name in ("train.jsonl", "val.jsonl")]
    assert counts == [133, 8]


def test_a_builder_that_is_no_source_of_ours_works(tmp_path: Path, prepare: Prepare) -> None:
    (tmp_path / "own_source.py").write_text(
        "from steerlm2.data.synthetic import synthetic_records\n"
        "def numbers(source, *, seed, num_records):\n"
        "    return iter(synthetic_records(num_records, 3, seed))\n"
    )
    config = tmp_path / "own.yaml"
    config.write_text(
        "source: none\noutput_dir: out\n"
        "builder: {_component_: own_source.numbers, num_records: 4, seed: 3}\n"
    )
    status, stdout, stderr = prepare("--config", str(config))
    assert status == 0, stderr
    assert ["train.jsonl", "3", "9", "3", "to", "3"] in [
        line.split() for line in stdout.splitlines()
    ]
