"""prepare_data from its command line: files, split, merging, and mistakes without a traceback.

What the sources make of their input is tested in tests/data/test_sources*.py.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import runpy
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steerlm2.attributes import parse_label
from steerlm2.data.grammar import grammar_pairs
from steerlm2.data.prompts import read_prompts
from steerlm2.data.records import Record, read_records
from steerlm2.data.settings import schema_of_data
from steerlm2.data.spool import Spool
from steerlm2.data.tokenizers import tiny_tokenizer
from steerlm2.datasets import attribute_dataset

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "prepare_data.py"
CONFIGS = ROOT / "recipe_configs" / "data"
CONFIG = CONFIGS / "oasst_groups.yaml"
FILES = ("train.jsonl", "train_reg.jsonl", "val.jsonl", "val_reg.jsonl")


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


def config(name: str) -> tuple[str, str]:
    """Arguments that put another ready-made config in the place of data/oasst_groups."""
    return "--config", str(CONFIGS / f"{name}.yaml")


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
    """141 groups, train_fraction 0.95: int(133.95) = 133 and 8. What was left out is printed."""
    source = shared_dir / "data" / "oasst2_trees.jsonl.gz"
    command = [sys.executable, str(RECIPE), "--config", str(CONFIG), f"source={source}"]
    result = subprocess.run(
        [*command, "output_dir=out"], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    counts = [len(read(tmp_path / "out" / name)) for name in ("train.jsonl", "val.jsonl")]
    assert counts == [133, 8]
    assert "left out messages: 10 deleted" in result.stderr


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


# Conversations


@pytest.fixture(scope="module")
def vectors(shared_dir: Path) -> dict[str, Any]:
    text = (shared_dir / "vectors" / "preprocess.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def write_lines(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w") as file:
        file.write(text)


@pytest.fixture(params=[".jsonl", ".jsonl.gz"])
def hub_folder(request: pytest.FixtureRequest, vectors: dict[str, Any], tmp_path: Path) -> Path:
    """The rows of the vectors, laid out as on the hub."""
    folder = tmp_path / "hub"
    for split in ("train", "validation"):
        write_lines(folder / f"{split}{request.param}", vectors["rows"]["default"][split])
    pairs = vectors["rows"]["preference"]["train"]
    write_lines(folder / "preference" / f"preference{request.param}", pairs)
    return folder


def facts(folder: Path) -> dict[str, dict[str, Any]]:
    """Counts and digests of the output, arranged as in the vectors."""
    found: dict[str, dict[str, Any]] = {"train": {}, "val": {}}
    for split, values in found.items():
        for kind, name in (("", f"{split}.jsonl"), ("regression_", f"{split}_reg.jsonl")):
            content = (folder / name).read_bytes()
            values[f"{kind}records"] = content.count(b"\n")
            values[f"{kind}sha256"] = hashlib.sha256(content).hexdigest()
    return found


def test_open_assistant_is_the_reference_to_the_byte(
    shared_dir: Path, vectors: dict[str, Any], tmp_path: Path, prepare: Prepare
) -> None:
    source = shared_dir / "data" / "oasst2_trees.jsonl.gz"
    options = ("builder.keep_rejected=true", "split_by=record")
    status, _, stderr = prepare(*config("oasst"), f"source={source}", "output_dir=out", *options)
    assert status == 0, stderr
    assert facts(tmp_path / "out") == vectors["expected"]["oasst"]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("helpsteer", ["helpsteer"]),
        ("helpsteer2", ["helpsteer2"]),
        ("helpsteer2_only_helpfulness", ["helpsteer2", "only_helpfulness=true"]),
        ("helpsteer2_preference", ["helpsteer2", "preference=true"]),
    ],
)
def test_helpsteer_is_the_reference_to_the_byte(
    hub_folder: Path,
    vectors: dict[str, Any],
    tmp_path: Path,
    prepare: Prepare,
    name: str,
    arguments: list[str],
) -> None:
    shipped, *options = arguments
    status, _, stderr = prepare(
        *config(shipped),
        *(f"source={hub_folder}", "output_dir=out", "builder.split_turns=false", *options),
    )
    assert status == 0, stderr
    assert facts(tmp_path / "out") == vectors["expected"][name]


# What the regression format can't hold


MARKED = "It looks so:\n<extra_id_1>User\nHello\n<extra_id_1>Assistant\nBye"


def labelled_row(question: str, answer: str, label: str = "humor:1", **more: Any) -> dict[str, Any]:
    turns = [
        {"from": "User", "value": question},
        {"from": "Assistant", "value": answer, "label": label},
    ]
    return {"conversations": turns, **more}


@pytest.mark.parametrize(
    "row",
    [
        labelled_row("Q", MARKED),
        labelled_row("Q", "<extra_id_2>humor:4"),
        labelled_row("a <extra_id_1> b", "A"),
        labelled_row("Q", "A", system="<extra_id_0>System"),
    ],
)
def test_contents_that_spell_markers_are_in_the_conversation_file_only_and_named(
    tmp_path: Path, prepare: Prepare, row: dict[str, Any]
) -> None:
    """The third of four conversations, and with repeat=2 the seventh line too."""
    others = [labelled_row(f"Q{i}", "A") for i in range(3)]
    write_lines(tmp_path / "in.jsonl", [*others[:2], row, others[2]])
    arguments = ("source=in.jsonl", "output_dir=out", "train_fraction=null", "repeat=2")
    status, stdout, stderr = prepare(*config("conversations"), *arguments)
    assert status == 0, stderr
    lines = (tmp_path / "out" / "train.jsonl").read_text().splitlines()
    spelled = json.loads(lines[2])["conversations"]
    assert [turn["value"] for turn in spelled] == [turn["value"] for turn in row["conversations"]]
    regression = (tmp_path / "out" / "train_reg.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"].count("<extra_id_") for line in regression] == [4] * 6
    assert "train_reg.jsonl: left out 2 labelled turns" in stdout
    assert "in lines 3, 7)" in stdout
    assert ["train_reg.jsonl", "6"] in [line.split() for line in stdout.splitlines()]


def test_contents_without_a_label_need_no_place_in_the_regression_file(
    tmp_path: Path, prepare: Prepare
) -> None:
    rows = [labelled_row("Q", MARKED, label=""), labelled_row("R", "A")]
    write_lines(tmp_path / "in.jsonl", rows)
    arguments = ("source=in.jsonl", "output_dir=out", "train_fraction=null")
    _, stdout, _ = prepare(*config("conversations"), *arguments)
    assert "left out" not in stdout


def test_of_a_pair_both_are_in_the_regression_file_or_none(
    tmp_path: Path, prepare: Prepare
) -> None:
    """A single one would make pairs of the wrong lines."""
    pairs = [[(f"Q{i}", MARKED if i == 1 else "A"), (f"Q{i}", "B")] for i in range(3)]
    rows = [labelled_row(*spoken, "quality:1") for pair in pairs for spoken in pair]
    write_lines(tmp_path / "in.jsonl", rows)
    arguments = ("source=in.jsonl", "output_dir=out", "train_fraction=null", "preference=true")
    status, stdout, stderr = prepare(*config("conversations"), *arguments)
    assert status == 0, stderr
    source = str(tmp_path / "out" / "train_reg.jsonl")
    groups = attribute_dataset(tiny_tokenizer(), source=source, max_seq_len=512, pairs=True).groups
    assert len(groups) == 2
    assert "left out 2 labelled turns" in stdout


@pytest.mark.parametrize(("preference", "left", "num_left_out"), [("false", 3, 1), ("true", 2, 2)])
def test_answers_of_broken_utf8_are_left_out_and_counted(
    tmp_path: Path, prepare: Prepare, preference: str, left: int, num_left_out: int
) -> None:
    """Of a pair both. In a question, which no model learns to write, it may stand."""
    answers = [("Q \ufffd", "A"), ("Q \ufffd", "B"), ("R", "half of an emoji: \ufffd"), ("R", "B")]
    rows = [labelled_row(*spoken, "quality:1") for spoken in answers]
    write_lines(tmp_path / "in.jsonl", rows)
    arguments = (
        "source=in.jsonl",
        "output_dir=out",
        "train_fraction=null",
        "schema={quality: [0, 4]}",
    )
    status, stdout, stderr = prepare(
        *config("conversations"), *arguments, f"preference={preference}"
    )
    assert status == 0, stderr
    for name in ("train.jsonl", "train_reg.jsonl"):
        assert len((tmp_path / "out" / name).read_text().splitlines()) == left
    assert f"left out {num_left_out} conversations with U+FFFD in an answer" in stdout


# The sides of a split


def sides(folder: Path) -> tuple[list[str], list[str]]:
    train, val = (first_texts(folder / name) for name in ("train.jsonl", "val.jsonl"))
    return train, val


def test_a_split_keeps_a_prompt_on_one_side(tmp_path: Path, prepare: Prepare) -> None:
    """20 prompts with two answers each, 0.8 of 40: 32 and 8, whatever the seed; not so one by one.
    Spaces at the ends make no other prompt."""
    rows = [scored(f"P{i % 20}", 1) | {"prompt": f"P{i % 20}" + "\n" * (i > 19)} for i in range(40)]
    write_lines(tmp_path / "rows.jsonl", rows)
    arguments = ("source=rows.jsonl", "output_dir=out", "train_fraction=0.8")
    for seed in range(5):
        assert prepare(*config("helpsteer2"), *arguments, f"seed={seed}")[0] == 0
        train, val = ([text.strip() for text in texts] for texts in sides(tmp_path / "out"))
        assert (len(train), len(val)) == (32, 8)
        assert not set(train) & set(val)
    assert prepare(*config("helpsteer2"), *arguments, "split_by=record")[0] == 0
    train, val = ([text.strip() for text in texts] for texts in sides(tmp_path / "out"))
    assert (len(train), len(val)) == (32, 8)
    assert set(train) & set(val)


def test_threads_that_begin_alike_stay_on_one_side(tmp_path: Path, prepare: Prepare) -> None:
    """As Open Assistant's, which data/oasst writes and data/conversations reads again."""
    rows = []
    for i in range(10):
        row = labelled_row(f"Q{i}", "A")
        more = [{"from": "User", "value": f"more {i}"}, {"from": "Assistant", "value": "B"}]
        rows += [row, row | {"conversations": row["conversations"] + more}]
    write_lines(tmp_path / "in.jsonl", rows)
    arguments = ("source=in.jsonl", "output_dir=out", "train_fraction=0.7")
    assert prepare(*config("conversations"), *arguments)[0] == 0
    train, val = sides(tmp_path / "out")
    assert (len(train), len(val)) == (14, 6)
    assert not set(train) & set(val)


def test_groups_of_one_tree_stay_on_one_side(tmp_path: Path, prepare: Prepare) -> None:
    def reply(text: str, *replies: Any) -> dict[str, Any]:
        labels = {"quality": {"value": 1.0}}
        return {"role": "assistant", "text": text, "labels": labels, "replies": list(replies)}

    def ask(text: str, *replies: Any) -> dict[str, Any]:
        return {"role": "prompter", "text": text, "message_id": text, "replies": list(replies)}

    trees = [
        {"prompt": ask(f"Q{i}", reply("A", ask("more", reply("C"), reply("D"))), reply("B"))}
        for i in range(10)
    ]
    write_lines(tmp_path / "trees.jsonl", trees)
    assert prepare("source=trees.jsonl", "output_dir=out", "train_fraction=0.7")[0] == 0
    train, val = (
        [record.prompt_turns[0].value for record in read(tmp_path / "out" / name)]
        for name in ("train.jsonl", "val.jsonl")
    )
    assert (len(train), len(val)) == (14, 6)
    assert not set(train) & set(val)


def test_merged_sources_share_the_side_of_a_prompt(tmp_path: Path, prepare: Prepare) -> None:
    """The second source has ten prompts of the first and ten others."""
    for name, first in (("a", 0), ("b", 10)):
        write_lines(tmp_path / f"{name}.jsonl", [scored(f"P{first + i}", 1) for i in range(20)])
    own = tmp_path / "own.yaml"
    builder = "builder: steerlm2.data.sources.helpsteer_conversations, train_fraction: 0.5"
    merge = f"merge: {{b: {{source: b.jsonl, {builder}}}}}"
    own.write_text(f"{{source: a.jsonl, output_dir: out, {builder}, {merge}}}")
    status, _, stderr = prepare("--config", str(own))
    assert status == 0, stderr
    train, val = sides(tmp_path / "out")
    assert (len(train), len(val)) == (20, 20)
    assert not set(train) & set(val)


def test_a_prompt_on_both_sides_of_a_sources_own_split_is_noted(
    tmp_path: Path, prepare: Prepare
) -> None:
    write_lines(tmp_path / "in" / "train.jsonl", [scored(f"P{i}", 1) for i in range(5)])
    write_lines(tmp_path / "in" / "validation.jsonl", [scored(f"P{i}", 2) for i in (3, 4, 5)])
    _, stdout, _ = prepare(*config("helpsteer2"), "source=in", "output_dir=out")
    assert "in: 2 records have a prompt that the other side of the split has too" in stdout


def test_a_single_prompt_cannot_be_split_which_is_said(tmp_path: Path, prepare: Prepare) -> None:
    write_lines(tmp_path / "rows.jsonl", [scored("P", i % 5) for i in range(8)])
    arguments = ("source=rows.jsonl", "output_dir=out", "train_fraction=0.5")
    _, stdout, _ = prepare(*config("helpsteer2"), *arguments)
    assert "rows.jsonl: all on one side, because its records have one prompt" in stdout
    assert sorted(os.listdir(tmp_path / "out")) == ["train.jsonl", "train_reg.jsonl"]


def scored(name: str, score: int) -> dict[str, Any]:
    return {"prompt": name, "response": f"re {name}", "helpfulness": score}


@pytest.fixture
def scored_folder(tmp_path: Path) -> Path:
    """HelpSteer in small: 8 rows a0..a7 to train on and b0, b1 to validate."""
    folder = tmp_path / "scored"
    write_lines(folder / "train.jsonl", [scored(f"a{i}", i % 5) for i in range(8)])
    write_lines(folder / "validation.jsonl", [scored(f"b{i}", i) for i in range(2)])
    return folder


def first_texts(path: Path) -> list[str]:
    """The first text of each conversation of a file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["conversations"][0]["value"] for line in lines]


TRAIN = [f"a{i}" for i in range(8)]
VAL = ["b0", "b1"]


def test_own_split_is_kept_in_order_and_a_fraction_splits_anew(
    scored_folder: Path, tmp_path: Path, prepare: Prepare
) -> None:
    """10 rows, train_fraction 0.5: 5 and 5, from both files."""
    common = (*config("helpsteer"), f"source={scored_folder}")
    assert prepare(*common, "output_dir=own")[0] == 0
    assert first_texts(tmp_path / "own" / "train.jsonl") == TRAIN
    assert first_texts(tmp_path / "own" / "val.jsonl") == VAL
    assert prepare(*common, "output_dir=new", "train_fraction=0.5")[0] == 0
    train, val = (first_texts(tmp_path / "new" / f) for f in ("train.jsonl", "val.jsonl"))
    assert (len(train), len(val)) == (5, 5)
    assert sorted(train + val) == TRAIN + VAL
    assert train + val != TRAIN + VAL


def test_a_single_file_without_a_split_is_training_data(
    scored_folder: Path, tmp_path: Path, prepare: Prepare
) -> None:
    source = f"source={scored_folder / 'validation.jsonl'}"
    assert prepare(*config("helpsteer2"), source, "output_dir=out")[0] == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "train.jsonl",
        "train_reg.jsonl",
    ]
    assert first_texts(tmp_path / "out" / "train.jsonl") == VAL


def test_table_counts_conversations_and_labelled_turns(
    scored_folder: Path, prepare: Prepare
) -> None:
    _, stdout, _ = prepare(*config("helpsteer"), f"source={scored_folder}", "output_dir=out")
    assert [line.split() for line in stdout.splitlines()] == [
        ["file", "records", "labelled", "per", "record"],
        ["train.jsonl", "8", "8", "1", "to", "1"],
        ["train_reg.jsonl", "8"],
        ["val.jsonl", "2", "2", "1", "to", "1"],
        ["val_reg.jsonl", "2"],
    ]


def test_merged_output_is_the_sources_outputs_joined_and_passes_alternate(
    scored_folder: Path, trees: Path, tmp_path: Path, prepare: Prepare
) -> None:
    """repeat 2 and 3: A B A B B for training, A B for validation; regression files alike."""
    for name, source in (("oasst", trees), ("helpsteer", scored_folder)):
        arguments = (f"source={source}", f"output_dir={name}", "seed=10")
        assert prepare(*config(name), *arguments)[0] == 0
    status, _, stderr = prepare(
        *config("oasst_helpsteer"),
        *(f"source={trees}", f"merge.helpsteer.source={scored_folder}"),
        *("repeat=2", "merge.helpsteer.repeat=3", "output_dir=merged"),
    )
    assert status == 0, stderr
    for file in FILES:
        a, b = ((tmp_path / name / file).read_bytes() for name in ("oasst", "helpsteer"))
        expected = a + b + a + b + b if file.startswith("train") else a + b
        assert (tmp_path / "merged" / file).read_bytes() == expected


def test_merged_outputs_of_earlier_runs_equal_their_join(
    scored_folder: Path, tmp_path: Path, prepare: Prepare
) -> None:
    """data/conversations reads what the other configs write, and keeps the split of a folder."""
    assert prepare(*config("helpsteer"), f"source={scored_folder}", "output_dir=a")[0] == 0
    status, _, stderr = prepare(
        *config("conversations"), "source=a", "output_dir=b", "train_fraction=null"
    )
    assert status == 0, stderr
    for file in FILES:
        assert (tmp_path / "b" / file).read_bytes() == (tmp_path / "a" / file).read_bytes()


def test_a_sample_is_drawn_by_the_seed_from_each_split_and_keeps_the_order(
    scored_folder: Path, tmp_path: Path, prepare: Prepare
) -> None:
    """Half of 8 and of 2 rows: 4 and 1."""
    common = (*config("helpsteer"), f"source={scored_folder}", "sample_fraction=0.5")
    for name, seed in (("x", 1), ("y", 1), ("z", 2)):
        assert prepare(*common, f"output_dir={name}", f"seed={seed}")[0] == 0
    drawn = {name: first_texts(tmp_path / name / "train.jsonl") for name in "xyz"}
    assert len(drawn["x"]) == 4
    assert drawn["x"] == sorted(set(drawn["x"]) & set(TRAIN))
    assert len(first_texts(tmp_path / "x" / "val.jsonl")) == 1
    assert drawn["x"] == drawn["y"] != drawn["z"]


def test_pairs_stay_together_when_shuffled_and_sampled(tmp_path: Path, prepare: Prepare) -> None:
    pairs = [
        {"prompt": f"P{i}", "response_1": "1", "response_2": "2", "preference_strength": i % 4 - 2}
        for i in range(40)
    ]
    write_lines(tmp_path / "pairs.jsonl", pairs)
    status, _, stderr = prepare(
        *config("helpsteer2"),
        *("source=pairs.jsonl", "output_dir=out", "preference=true"),
        *("train_fraction=0.7", "sample_fraction=0.5", "seed=4"),
    )
    assert status == 0, stderr
    for file, count in (("train.jsonl", 28), ("val.jsonl", 12)):  # of 40: 28 and 12, half of both
        lines = [json.loads(line) for line in (tmp_path / "out" / file).read_text().splitlines()]
        assert len(lines) == count
        texts = [[turn["value"] for turn in line["conversations"]] for line in lines]
        assert texts[::2] == [[prompt, "1"] for prompt, _ in texts[1::2]]
        assert texts[1::2] == [[prompt, "2"] for prompt, _ in texts[::2]]


SEVERAL_TURNS = "Hi\n\n<extra_id_1>Assistant\nHello.\n\n<extra_id_1>User\nA river?"


@pytest.mark.parametrize("preference", [False, True])
def test_the_files_of_one_command_are_the_same_texts_to_an_attribute_model(
    tmp_path: Path, prepare: Prepare, preference: bool
) -> None:
    """Prompts of several turns in one text among others: token by token, with the labels."""
    pair = {"response_1": "1", "response_2": "2"}
    prompts = [SEVERAL_TURNS, "Q", SEVERAL_TURNS.replace("Hi", "Ho")]
    rows = [
        scored("A", i) | pair | {"prompt": prompt, "preference_strength": i}
        for i, prompt in enumerate(prompts)
    ]
    write_lines(tmp_path / "rows.jsonl", rows)
    options = ("source=rows.jsonl", "output_dir=out", f"preference={str(preference).lower()}")
    assert prepare(*config("helpsteer2"), *options)[0] == 0
    conversations, regression = (
        attribute_dataset(
            tiny_tokenizer(),
            source=str(tmp_path / "out" / name),
            max_seq_len=512,
            pairs=preference,
        )
        for name in ("train.jsonl", "train_reg.jsonl")
    )
    assert conversations.groups == regression.groups
    assert len(conversations) == 3


def test_prompts_of_several_turns_are_split_without_a_change_to_the_regression_files(
    tmp_path: Path, prepare: Prepare
) -> None:
    source = tmp_path / "rows"
    source.mkdir()
    write_lines(source / "train.jsonl", [scored("one", 3) | {"prompt": SEVERAL_TURNS}])
    outputs = {}
    for split in ("true", "false"):
        outputs[split] = tmp_path / split
        prepare(
            *config("helpsteer2"),
            f"source={source}",
            f"output_dir={outputs[split]}",
            f"builder.split_turns={split}",
        )
    (line,) = (outputs["true"] / "train.jsonl").read_text().splitlines()
    turns = [(turn["from"], turn["value"]) for turn in json.loads(line)["conversations"][:-1]]
    assert turns == [("User", "Hi\n"), ("Assistant", "Hello.\n"), ("User", "A river?")]
    files = [(folder / "train_reg.jsonl").read_bytes() for folder in outputs.values()]
    assert files[0] == files[1]


def test_helpsteer3(tmp_path: Path, prepare: Prepare) -> None:
    row = {"context": [{"role": "user", "content": "P"}], "response1": "1", "response2": "2"}
    write_lines(tmp_path / "hub/preference/train.jsonl.gz", [row | {"overall_preference": -1}])
    assert prepare(*config("helpsteer3"), "source=hub", "output_dir=out")[0] == 0
    lines = (tmp_path / "out" / "train_reg.jsonl").read_text().splitlines()
    assert [json.loads(line)["label"] for line in lines] == [[-1.0, *[-100.0] * 8]] * 2


def test_attributes_that_the_schema_lacks_are_one_table(tmp_path: Path, prepare: Prepare) -> None:
    """Not a line for each of 30 rows."""
    write_lines(tmp_path / "rows.jsonl", [scored(f"P{i}", 1) for i in range(30)])
    arguments = ("source=rows.jsonl", "output_dir=out", "schema.names=[humor]")
    status, _, stderr = prepare(*config("helpsteer2"), *arguments)
    assert status == 1
    assert "set schema, which has humor now" in stderr
    assert stderr.splitlines()[-1].split() == ["helpfulness", "30", "rows.jsonl,", "record", "1"]


def test_labels_are_written_in_the_order_of_the_schema_and_must_be_in_its_ranges(
    tmp_path: Path, prepare: Prepare
) -> None:
    """Of any builder: this one's labels have the order of Open Assistant's attributes."""
    schema = "schema={humor: [0, 10], quality: [1, 3]}"
    labels = {"quality": {"value": 1.0}, "humor": {"value": 0.5}}
    replies = [{"role": "assistant", "text": "A", "labels": labels}]
    tree = {"prompt": {"role": "prompter", "text": "Q", "replies": replies}}
    write_lines(tmp_path / "t.jsonl", [tree])
    arguments = ("source=t.jsonl", "output_dir=out", "builder.attributes=[quality,humor]", schema)
    status, _, stderr = prepare(*config("oasst"), *arguments)
    assert status == 0, stderr
    (line,) = (tmp_path / "out" / "train.jsonl").read_text().splitlines()
    assert json.loads(line)["conversations"][1]["label"] == "humor:5,quality:3"
    (line,) = (tmp_path / "out" / "train_reg.jsonl").read_text().splitlines()
    assert json.loads(line)["label"] == [5.0, 3.0]

    write_lines(tmp_path / "rows.jsonl", [scored("P", 4)])
    status, _, stderr = prepare(
        *config("helpsteer2"),
        "source=rows.jsonl",
        "output_dir=out",
        "only_helpfulness=true",
        "schema={helpfulness: [0, 3]}",
    )
    assert status == 1
    assert "record 1: label 'helpfulness:4': helpfulness must be a whole number from 0" in stderr


def test_regression_format_of_an_own_schema(tmp_path: Path, prepare: Prepare) -> None:
    turns = [
        {"from": "User", "value": "Q"},
        {"from": "Assistant", "value": "A", "label": "wit:3,rigour:1"},
    ]
    write_lines(tmp_path / "own.jsonl", [{"conversations": turns}])
    status, _, stderr = prepare(
        *config("conversations"),
        *("source=own.jsonl", "output_dir=out", "schema.names=[rigour,grace,wit]"),
    )
    assert status == 0, stderr
    (line,) = (tmp_path / "out" / "train_reg.jsonl").read_text().splitlines()
    assert json.loads(line)["label"] == [1.0, -100.0, 3.0]


def test_an_own_schema_stands_beside_the_files(tmp_path: Path, prepare: Prepare) -> None:
    """That of the last run: the default one needs nothing."""
    (tmp_path / "own.csv").write_text("prompt,response,wit,humor\nQ,A,7,3\n")
    common = ("source=own.csv", "output_dir=out", "train_fraction=null")
    status, _, stderr = prepare(*config("chat"), *common, "schema={wit: [0, 9], humor: [0, 4]}")
    assert status == 0, stderr
    for name in ("train.jsonl", "train_reg.jsonl"):
        schema = schema_of_data(tmp_path / "out" / name)
        assert str(schema) == "wit 0 to 9, humor 0 to 4"
    assert prepare(*config("chat"), *common)[0] == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["train.jsonl", "train_reg.jsonl"]


def test_other_kinds_of_output_of_an_earlier_run_are_removed(
    scored_folder: Path, trees: Path, tmp_path: Path, prepare: Prepare
) -> None:
    assert prepare(*config("helpsteer"), f"source={scored_folder}", "output_dir=out")[0] == 0
    assert prepare(f"source={trees}", "output_dir=out", "train_fraction=1.0")[0] == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["helpsteer2", "preference=true", "only_helpfulness=true"], "set one of"),
        (["helpsteer", "builder.preference=true", "preference=true"], "'builder.preference'"),
        (["oasst", "only_helpfulness=true"], "only_helpfulness"),
        (["helpsteer3", "preference=false"], "preference pairs only"),
        (["helpsteer2", "preference=true"], "preference holds no preference.jsonl.gz"),
        (["helpsteer", "schema.names=[a,a]"], "names must differ"),
        (["helpsteer", "schema.names=[a,b]"], "unknown attribute 'coherence'"),
        (["oasst_helpsteer", "merge.helpsteer.repeat=0"], "'merge.helpsteer.repeat' must be"),
        (["oasst_helpsteer", "merge.helpsteer.sorce=x"], "'merge.helpsteer.sorce'"),
    ],
)
def test_mistakes_with_conversations(
    tmp_path: Path, prepare: Prepare, arguments: list[str], message: str
) -> None:
    names = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    row = {"prompt": "P", "response": "R"} | dict.fromkeys(names, 1)
    write_lines(tmp_path / "in" / "train.jsonl", [row])
    shipped, *options = arguments
    status, _, stderr = prepare(*config(shipped), "source=in", "output_dir=out", *options)
    assert status == 1
    assert message in stderr
    assert "Traceback" not in stderr
    assert sorted(os.listdir(tmp_path)) == ["in"]


def test_conversations_and_groups_do_not_mix(
    scored_folder: Path, trees: Path, tmp_path: Path, prepare: Prepare
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(
        f"source: {trees}\noutput_dir: out\n"
        "builder: steerlm2.data.sources.oasst_groups\n"
        f"merge: {{b: {{source: {scored_folder},"
        " builder: steerlm2.data.sources.helpsteer_conversations}}\n"
    )
    status, _, stderr = prepare("--config", str(own))
    assert status == 1
    assert "can't be merged" in stderr
    assert not (tmp_path / "out").exists()


def test_the_grammar_gives_conversations_with_labels_and_their_regression_files(
    tmp_path: Path, prepare: Prepare
) -> None:
    """Held-out pairs are in the validation files only; a label is [humor, verbosity]."""
    numbers = ("builder.num=60", "builder.num_val=30")
    status, _, stderr = prepare(*config("grammar"), "output_dir=out", *numbers)
    assert status == 0, stderr
    settings = [f"{name}.settings.json" for name in FILES]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*FILES, *settings])
    for name, split, count in (("train", "train", 60), ("val", "validation", 30)):
        rows = [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").open()]
        pairs = [
            (row["conversations"][0]["value"], row["conversations"][1]["label"]) for row in rows
        ]
        assert len(rows) == count
        assert set(pairs) <= set(grammar_pairs(split))  # type: ignore[arg-type]
        labels = [list(parse_label(label).values()) for _, label in pairs]
        regression = [json.loads(line) for line in (tmp_path / "out" / f"{name}_reg.jsonl").open()]
        assert [row["label"] for row in regression] == labels


def test_unlabelled_answers_of_the_grammar_have_no_regression_files(
    tmp_path: Path, prepare: Prepare
) -> None:
    options = ("source=all", "builder.labels=null", "builder.num=20", "builder.num_val=0")
    assert prepare(*config("grammar"), "output_dir=out", *options)[0] == 0
    assert [path.name for path in (tmp_path / "out").glob("*.jsonl")] == ["train.jsonl"]


def test_prompts_of_the_grammar_repeat_pass_after_pass(tmp_path: Path, prepare: Prepare) -> None:
    """400 training pairs three times, the 100 held-out ones once; a pair's place in the file, from
    which sample_responses has its seed, is another one in every pass."""
    status, stdout, _ = prepare(*config("grammar_prompts"), "output_dir=out", "repeat=3")
    assert status == 0
    for name, split, passes in (("train", "train", 3), ("val", "validation", 1)):
        asked = read_prompts(tmp_path / "out" / f"{name}.jsonl")
        pairs = [(prompt.turns[-1].value, prompt.label) for prompt in asked]
        assert pairs == grammar_pairs(split) * passes  # type: ignore[arg-type]
    rows = [line.split() for line in stdout.splitlines()]
    assert ["train.jsonl", "1200", "0", "0", "to", "0"] in rows
    assert "Next: run the recipe sample_responses on" in stdout


def test_best_of_gives_conversations_to_fine_tune_on(tmp_path: Path, prepare: Prepare) -> None:
    """4 records, of which one has no response near humor:4; two are kept of each other."""

    def scored_response(text: str, humor: float) -> dict[str, Any]:
        return {"from": "Assistant", "value": text, "scores": {"humor": humor}}

    turns = [{"from": "User", "value": "Q"}]
    records = [
        {"system": "", "prompt_turns": turns, "label": "humor:4"}
        | {"responses": [scored_response(f"{i}{j}", humor) for j, humor in enumerate(scores)]}
        for i, scores in enumerate([(3.6, 1, 4), (2, 3), (4, 4), (3.9, 4.2, 4)])
    ]
    write_lines(tmp_path / "scored.jsonl", records)
    options = ("source=scored.jsonl", "output_dir=out", "train_fraction=null", "builder.keep=2")
    status, stdout, stderr = prepare(*config("best_of"), *options)
    assert status == 0, stderr
    rows = [json.loads(line)["conversations"] for line in (tmp_path / "out/train.jsonl").open()]
    assert [turns[-1]["value"] for turns in rows] == ["02", "00", "20", "21", "31", "32"]
    assert {turns[-1]["label"] for turns in rows} == {"humor:4"}
    assert ["train.jsonl", "6", "6", "1", "to", "1"] in [
        line.split() for line in stdout.split("\n")
    ]
    status, _, stderr = prepare(*config("best_of"), *options, "builder.max_distance=-1")
    assert (status, "max_distance at least 0" in stderr) == (1, True)


def test_memory_does_not_grow_with_the_text(tmp_path: Path, prepare: Prepare) -> None:
    """2000 rows of 20 kB are 40 MB, twice that in both formats; in memory they are numbers."""
    row = scored("x" * 20_000, 1)
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt", compresslevel=1) as file:
        file.writelines(json.dumps(row | {"id": i}) + "\n" for i in range(2000))
    tracemalloc.start()
    try:
        arguments = ("source=rows.jsonl.gz", "output_dir=out", "train_fraction=0.9")
        assert prepare(*config("helpsteer"), *arguments)[0] == 0
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "out" / "train.jsonl").stat().st_size > 36_000_000
    assert peak < 10_000_000


# Chat data


def write_table(path: Path, rows: list[tuple[str, str, object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([("question", "answer", "formality"), *rows])


OWN_SCHEMA = ("schema.names=[formality,length]", "schema.min_value=0", "schema.max_value=10")


def test_a_table_gives_labelled_conversations_and_says_how_it_was_read(
    tmp_path: Path, prepare: Prepare, caplog: pytest.LogCaptureFixture
) -> None:
    """Ten rows of five prompts, one of them without an answer: a prompt is on one side."""
    rows: list[tuple[str, str, object]] = [(f"Q{i // 2}", f"A{i}", i) for i in range(10)]
    rows[3] = ("Q1", "", 3)
    write_table(tmp_path / "data.csv", rows)
    arguments = ("source=data.csv", "output_dir=out", "train_fraction=0.6", *OWN_SCHEMA)
    status, stdout, stderr = prepare(*config("chat"), *arguments)
    assert status == 0, stderr
    assert "data.csv: read as prompt_response (prompt=question, response=answer)" in caplog.text
    assert "rows: 10; conversations: 9, in the order of the rows" in caplog.text
    assert "left out: 1 with an empty answer" in caplog.text
    train, val = sides(tmp_path / "out")
    assert train
    assert val
    assert not {*train} & {*val}
    assert ["train_reg.jsonl", str(len(train))] in [line.split() for line in stdout.splitlines()]
    lines = (tmp_path / "out" / "train_reg.jsonl").read_text().splitlines()
    for line in map(json.loads, lines):
        answer = line["text"].split("Assistant\nA")[1][0]
        assert line["label"] == [float(answer), -100.0]


def test_columns_and_splits_can_be_given_on_the_command_line(
    tmp_path: Path, prepare: Prepare
) -> None:
    for name in ("train_prefs", "test_prefs"):
        row = {"prompt": name, "good one": "A", "rejected": "B"}
        write_lines(tmp_path / f"{name}.jsonl.gz", [row])
    arguments = ("builder.columns={chosen: good one}", "builder.splits.train=train_prefs")
    status, _, stderr = prepare(
        *config("chat"),
        *("source=.", "output_dir=out", *arguments, "builder.splits.validation=test_prefs"),
    )
    assert status == 0, stderr
    assert sides(tmp_path / "out") == (["train_prefs"] * 2, ["test_prefs"] * 2)


@pytest.mark.parametrize(("own_split", "counts"), [("true", [6, 1]), ("false", [5, 2])])
def test_a_folders_own_split_is_kept_unless_it_is_split_anew_which_is_said(
    tmp_path: Path, prepare: Prepare, own_split: str, counts: list[int]
) -> None:
    """6 and 1 rows; int(0.75 * 7) = 5."""
    write_table(tmp_path / "train.csv", [(f"Q{i}", "A", 1) for i in range(6)])
    write_table(tmp_path / "test.csv", [("R", "B", 1)])
    arguments = ("source=.", "output_dir=out", f"own_split={own_split}", "train_fraction=0.75")
    status, stdout, stderr = prepare(*config("chat"), *arguments)
    assert status == 0, stderr
    names = ("train.jsonl", "val.jsonl")
    assert [len((tmp_path / "out" / n).read_text().splitlines()) for n in names] == counts
    assert ("its own split, 6 and 1 records, isn't kept" in stdout) == (own_split == "false")


def ultrafeedback_row(prompt: str) -> dict[str, Any]:
    names = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    return {
        "instruction": prompt,
        "completions": [
            {
                "response": f"answer {rating}",
                "annotations": {name: {"Rating": str(rating)} for name in names},
                "overall_score": 2.0 * rating,
            }
            for rating in (2, 5, 1, 4)
        ],
    }


@pytest.mark.parametrize(
    ("name", "option", "answers"),
    [
        ("ultrafeedback", "builder.make=conversations", ["2", "5", "1", "4"]),
        ("ultrafeedback", "builder.keep=1", ["5"]),
        ("ultrafeedback", "builder.make=pairs", ["5", "1"]),
        ("ultrafeedback_groups", "builder.label=best", ["2", "5", "1", "4"]),
    ],
)
def test_ultrafeedback(
    tmp_path: Path, prepare: Prepare, name: str, option: str, answers: list[str]
) -> None:
    write_lines(tmp_path / "uf.jsonl", [ultrafeedback_row(f"Q{i}") for i in range(3)])
    arguments = ("source=uf.jsonl", "output_dir=out", "train_fraction=null", option)
    status, _, stderr = prepare(*config(name), *arguments)
    assert status == 0, stderr
    if name == "ultrafeedback_groups":
        records = read(tmp_path / "out" / "train.jsonl")
        assert [[r.value[-1] for r in record.responses] for record in records] == [answers] * 3
        assert {len(parse_label(record.label or "")) for record in records} == {4}
    else:
        lines = (tmp_path / "out" / "train.jsonl").read_text().splitlines()
        texts = [json.loads(line)["conversations"][-1]["value"][-1] for line in lines]
        assert texts == answers * 3


def test_a_file_that_is_not_understood_ends_in_one_message_and_no_files(
    tmp_path: Path, prepare: Prepare
) -> None:
    write_lines(tmp_path / "in.jsonl", [{"title": "T", "body": "Once upon a time"}] * 30)
    status, _, stderr = prepare(*config("chat"), "source=in.jsonl", "output_dir=out")
    assert status == 1
    assert "Traceback" not in stderr
    assert stderr.count("isn't understood") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_removed_meanwhile_is_named(
    tmp_path: Path, trees: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_spool = Spool.read

    def read_and_remove(spool: Spool, offset: int) -> Any:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        return read_spool(spool, offset)

    monkeypatch.setattr(Spool, "read", read_and_remove)
    status, _, error = prepare(f"source={trees}", "output_dir=out")
    assert status == 1
    assert f"error: {tmp_path / 'out'} was removed or replaced while the run wrote" in error
    assert "Traceback" not in error
