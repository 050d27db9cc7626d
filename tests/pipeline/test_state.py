"""When a stage counts as done: the same config and inputs, and its files still there."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from steerlm2.pipeline import state as state_module
from steerlm2.pipeline.state import (
    PipelineState,
    StageRecord,
    digest,
    files_in,
    fingerprint,
    inputs_of,
    set_aside,
)


def print_of(config: object, output_dir: str, inputs: list[Path], seed: int = 1) -> str:
    arguments = (f"output={output_dir}/a/x", f"seed={seed}")
    return fingerprint(config, arguments, None, output_dir, inputs)


def test_fingerprint_follows_config_arguments_and_inputs(tmp_path: Path) -> None:
    source = tmp_path / "data.jsonl"
    source.write_text("one")
    first = print_of({"lr": 1}, "out", [source])
    assert print_of({"lr": 1}, "out", [source]) == first
    assert print_of({"lr": 2}, "out", [source]) != first
    assert print_of({"lr": 1}, "out", [source], seed=2) != first
    source.write_text("two")
    assert print_of({"lr": 1}, "out", [source]) != first


def test_fingerprint_stays_where_the_folder_is_moved(tmp_path: Path) -> None:
    assert print_of({}, "out", []) == print_of({}, str(tmp_path), [])


def test_fingerprint_follows_a_recipe_of_the_users_own(tmp_path: Path) -> None:
    code = tmp_path / "my_recipe.py"
    code.write_text("1")
    first = fingerprint({}, (), code, "out", [])
    code.write_text("2")
    assert fingerprint({}, (), code, "out", []) != first


def test_digest_of_a_run_is_that_of_its_last_export(tmp_path: Path) -> None:
    """Not of what is for resuming, which is ten times as large."""
    for epoch in (2, 10):
        (tmp_path / f"epoch_{epoch}").mkdir()
        (tmp_path / f"epoch_{epoch}" / "config.json").write_text(f"{{{epoch}}}")
        (tmp_path / f"epoch_{epoch}" / "model.safetensors").touch()
    (tmp_path / "metrics.jsonl").write_text("1")
    assert digest(tmp_path) == digest(tmp_path / "epoch_10")
    (tmp_path / "metrics.jsonl").write_text("2")
    assert digest(tmp_path) == digest(tmp_path / "epoch_10")


def test_what_a_readme_says_is_no_input(tmp_path: Path) -> None:
    """The evaluation's results come into those of the models that it read."""
    (tmp_path / "config.json").write_text("{}")
    before = digest(tmp_path)
    (tmp_path / "README.md").write_text("# Results\n")
    assert digest(tmp_path) == before


def test_inputs_are_the_paths_of_the_config_that_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not words that happen to be names of folders, nor what the stage writes."""
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    own, other = out / "own", out / "other"
    for folder in (own, other):
        folder.mkdir(parents=True)
        (folder / "x").touch()
    (other / "y.jsonl").touch()
    config = {
        "output_dir": str(own),
        "output": str(other / "y.jsonl"),
        "section": {"source": str(other / "x"), "lists": [str(other), "cpu", ""]},
        "missing": str(tmp_path / "y"),
        "word": "out",
        "around": str(tmp_path),
        "long": "a" * 5000,
    }
    assert inputs_of(config, own, out) == [other / "x", other]


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    state = PipelineState(tmp_path)
    record = StageRecord("abc", "tune run x", True, 2, 3.5, ["a/b"])
    assert state.read("sft") is None
    state.write("sft", record)
    assert state.read("sft") == record
    assert json.loads((tmp_path / "state" / "sft.json").read_text())["runs"] == 2


@pytest.mark.parametrize(
    "content",
    [
        *(b"", bytes(100), b'{"fingerprint": ', b"[]", b"{}", b"3", b"\xff\xfe", b"[" * 100_000),
        b'{"fingerprint": "abc", "command": "x", "\\u001b[2J": 1}',
        b'{"fingerprint": "abc", "command": "x", "runs": "2"}',
        b'{"fingerprint": "abc", "command": "x", "complete": "no"}',
        b'{"fingerprint": "abc", "command": "x", "files": "ab"}',
        b'{"fingerprint": "abc", "command": "x", "files": [1]}',
    ],
)
def test_a_damaged_record_is_none(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stage is done again; its folder is set aside, or adopted. The warning comes once."""
    state = PipelineState(tmp_path)
    state.write("sft", StageRecord("abc", "tune run x", True))
    (tmp_path / "state" / "sft.json").write_bytes(content)
    assert state.read("sft") is state.read("sft") is None
    warning = capsys.readouterr().err
    assert warning.startswith(f"WARNING: {tmp_path}/state/sft.json is damaged (")
    assert warning.rstrip("\n").isprintable()


def test_files_without_what_is_for_resuming(tmp_path: Path) -> None:
    for name in ("epoch_1/model", "checkpoints/step_1/x", "earlier_runs/1/y", "metrics.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("12")
    assert files_in(tmp_path) == ["epoch_1/model", "metrics.jsonl"]


def test_set_aside_loses_nothing(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / "sft").mkdir()
        (tmp_path / "sft" / "x").write_text(str(number))
        assert set_aside(tmp_path / "sft") == tmp_path / "earlier" / f"sft_{number}"
    assert (tmp_path / "earlier" / "sft_1" / "x").read_text() == "1"


@pytest.mark.parametrize("name", ["lock", "doing"])
def test_a_link_in_place_of_the_lock_is_refused(name: str, tmp_path: Path) -> None:
    """What it leads to stays as it is."""
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / name).symlink_to(tmp_path / "mine")
    with (
        pytest.raises(ValueError, match="must be a file, not a link"),
        PipelineState(tmp_path).lock(),
    ):
        pass
    assert (tmp_path / "mine").read_text() == "mine"


def test_lock_is_held_by_a_stage_that_outlives_its_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_module, "SECONDS_FOR_STRAY_STAGE", 0)
    state = PipelineState(tmp_path)
    with contextlib.suppress(KeyError), state.lock() as lock:
        stage = subprocess.Popen(
            [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock,)
        )
        state.now_at("stage sft")
        raise KeyError
    left_behind = r"a stage that an earlier .* left behind works in .* \(process .*, at stage sft"
    with pytest.raises(ValueError, match=left_behind), state.lock():
        pass
    stage.communicate(b"\n")
    with state.lock():
        pass


def test_a_second_pipeline_is_told_what_the_first_is_doing(tmp_path: Path) -> None:
    """At once, and it changes nothing of what the first one tells."""
    read_end, write_end = os.pipe()
    with PipelineState(tmp_path).lock() as lock:
        first = PipelineState(tmp_path)
        if os.fork() == 0:
            os.close(lock)
            try:
                with first.lock():
                    told = "nothing"
            except ValueError as error:
                told = str(error)
            os.write(write_end, told.encode())
            os._exit(0)
        os.wait()
    assert re.fullmatch(
        rf"another pipeline works in {tmp_path} \(process {os.getpid()} on .*, at its start since "
        r".*\): wait for it, or end it",
        os.read(read_end, 4096).decode(),
    )
    os.close(read_end)
    os.close(write_end)


def test_a_folder_that_is_removed_meanwhile_is_not_made_again(tmp_path: Path) -> None:
    state = PipelineState(tmp_path / "out")
    with state.lock():
        shutil.rmtree(tmp_path / "out")
        with pytest.raises(ValueError, match="was removed or replaced"):
            state.write("sft", StageRecord("", ""))
    assert not (tmp_path / "out").exists()


def test_fingerprint_follows_the_variables_that_a_stage_interpolates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whose values stand in neither config nor arguments."""
    monkeypatch.setenv("STATE_TEST", "one")
    of_config, of_arguments = {"url": "${oc.env:STATE_TEST}"}, ("url=http://${oc.env:STATE_TEST}",)
    first = [
        fingerprint(of_config, (), None, "o", []),
        fingerprint({}, of_arguments, None, "o", []),
    ]
    assert first[0] == fingerprint(of_config, (), None, "o", [])
    monkeypatch.setenv("STATE_TEST", "two")
    assert fingerprint(of_config, (), None, "o", []) != first[0]
    assert fingerprint({}, of_arguments, None, "o", []) != first[1]
