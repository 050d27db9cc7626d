"""The resumable output: stopped at any byte, it becomes the file of a run that wasn't stopped."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from steerlm2.distributed.world import World
from steerlm2.runs.hangs import LONG, HangWatch
from steerlm2.runs.resumable import ResumableOutput, remaining_slices

LINES = [f'{{"line": {i}}}\n'.encode() for i in range(10)]
SLICE = 4
"""10 lines are slices of 4, 4 and 2."""


@pytest.fixture
def input_file(tmp_path: Path) -> Path:
    path = tmp_path / "input.jsonl"
    path.write_text("some records\n")
    return path


def opened(input_file: Path, **settings: object) -> ResumableOutput:
    return ResumableOutput(
        input_file.with_name("output.jsonl"),
        input_file=input_file,
        settings={"seed": 0} | settings,
        slice_size=SLICE,
    )


def run(output: ResumableOutput, *, slices: int | None = None) -> int:
    """Write what is missing, or only so many slices of it; the line it began at."""
    output.check()
    begin = output.begin(len(LINES))
    starts = range(begin, len(LINES), SLICE)
    for start in starts[:slices]:
        output.append(LINES[start : start + SLICE])
    if slices is None:
        output.finish()
    return begin


def stop(output: ResumableOutput) -> None:
    """As the end of its process does."""
    assert output._file is not None
    output._file.close()


def test_the_file_has_its_name_only_when_complete(input_file: Path) -> None:
    output = opened(input_file)
    run(output, slices=2)
    assert not output.path.exists()
    assert output.partial.read_bytes() == b"".join(LINES[:8])
    stop(output)
    assert run(opened(input_file)) == 8
    assert output.path.read_bytes() == b"".join(LINES)
    assert not output.partial.exists()


@pytest.mark.parametrize("size", [*range(0, sum(map(len, LINES)) + 1, 7), sum(map(len, LINES))])
def test_stopped_at_any_byte(input_file: Path, size: int) -> None:
    """It begins again after the whole slices, of 4, 8 or all 10 lines."""
    output = opened(input_file)
    run(output, slices=3)
    stop(output)
    os.truncate(output.partial, size)
    whole = size // len(LINES[0])
    assert run(opened(input_file)) == (whole if whole == len(LINES) else whole - whole % SLICE)
    assert output.path.read_bytes() == b"".join(LINES)


@pytest.mark.parametrize("begin", [0, 4, 5, 7])
@pytest.mark.parametrize("end", ["", "\n"], ids=["no line end", "line end"])
def test_nuls_of_a_power_cut_are_written_again(input_file: Path, begin: int, end: str) -> None:
    """From some line of the two slices on, and one more for the rest: what was on the disk stays,
    in whole slices."""
    output = opened(input_file)
    run(output, slices=2)
    stop(output)
    kept = b"".join(LINES[:begin])
    nuls = bytes(output.partial.stat().st_size - len(kept) - len(end))
    output.partial.write_bytes(kept + nuls + end.encode())
    assert run(opened(input_file)) == begin - begin % SLICE
    assert output.path.read_bytes() == b"".join(LINES)


def test_a_complete_output_is_left_as_it_is(input_file: Path) -> None:
    run(opened(input_file))
    output = opened(input_file)
    before = output.path.stat()
    assert run(output) == len(LINES)
    assert (output.path.stat().st_mtime_ns, output.path.stat().st_ino) == (
        before.st_mtime_ns,
        before.st_ino,
    )
    assert not output.partial.exists()


@pytest.mark.parametrize("complete", [True, False])
def test_other_settings_are_refused(input_file: Path, complete: bool) -> None:
    output = opened(input_file)
    run(output, slices=None if complete else 1)
    with pytest.raises(ValueError, match=r"begun with other settings \(seed, dtype\)"):
        opened(input_file, seed=1, dtype="bf16").check()


def test_another_input_is_refused(input_file: Path) -> None:
    run(opened(input_file), slices=1)
    input_file.write_text("other records\n")
    with pytest.raises(ValueError, match=r"begun with other settings \(input_sha256\)"):
        opened(input_file).check()


def test_a_file_that_nothing_is_known_of_is_refused(input_file: Path) -> None:
    """It isn't overwritten, and not taken for the output."""
    output = opened(input_file)
    output.path.write_text("mine\n")
    with pytest.raises(ValueError, match="begun with other settings"):
        output.check()


def test_a_run_that_wrote_nothing_binds_nobody(input_file: Path) -> None:
    """It had a wrong checkpoint, say: the next one may have another."""
    output = opened(input_file)
    run(output, slices=0)
    stop(output)
    other = opened(input_file, seed=1)
    run(other)
    assert json.loads(other.settings_file.read_text())["seed"] == 1


def test_settings_cut_off_by_a_kill_are_written_anew(input_file: Path) -> None:
    """They are written before the first line is: without a line there is nothing to disagree."""
    output = opened(input_file)
    output.settings_file.write_text('{"se')
    run(output)
    digest = json.loads(output.settings_file.read_text())["input_sha256"]
    assert json.loads(output.settings_file.read_text()) == {"seed": 0, "input_sha256": digest}


def test_two_runs_at_a_time_are_refused(input_file: Path) -> None:
    """A worker that outlives its launcher would write the same lines once more."""
    first = opened(input_file)
    run(first, slices=1)
    with pytest.raises(ValueError, match="another run writes to"):
        run(opened(input_file))
    assert first.partial.read_bytes() == b"".join(LINES[:4])
    stop(first)
    assert run(opened(input_file)) == 4


def test_a_folder_that_cannot_be_made_is_named(input_file: Path) -> None:
    output = ResumableOutput(
        input_file / "output.jsonl", input_file=input_file, settings={}, slice_size=1
    )
    output.check()
    with pytest.raises(ValueError, match=r"the folder of output .* can't be written to"):
        output.begin(1)


def test_a_missing_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        opened(tmp_path / "nowhere.jsonl").check()


def doubled_but_for_the_first(line: bytes) -> bytes:
    return b"" if line == LINES[0] else line + line


def test_lines_can_become_others_when_the_file_is_complete(input_file: Path) -> None:
    """What is resumed are the lines that were appended; the file has what became of them."""
    output = opened(input_file)
    run(output, slices=1)
    stop(output)
    output = opened(input_file)
    output.check()
    assert output.begin(len(LINES)) == 4
    output.append(LINES[4:8])
    output.append(LINES[8:])
    output.finish(doubled_but_for_the_first)
    assert output.path.read_bytes() == b"".join(line + line for line in LINES[1:])
    assert sorted(path.name for path in input_file.parent.iterdir()) == [
        *("input.jsonl", "output.jsonl", "output.jsonl.settings.json"),
    ]


def test_killed_between_the_last_line_and_the_name(input_file: Path) -> None:
    """The final file has its name only when it is whole; a partial one beside it is removed."""
    output = opened(input_file)
    run(output, slices=3)

    def fails(line: bytes) -> bytes:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        output.finish(fails)
    assert not output.path.exists()
    assert run(opened(input_file)) == len(LINES)
    assert output.path.read_bytes() == b"".join(LINES)
    output.partial.write_bytes(LINES[0])  # killed after the file got its name
    assert run(opened(input_file)) == len(LINES)
    assert not output.partial.exists()


def test_another_export_of_the_same_run_is_another_setting(
    input_file: Path, tmp_path: Path
) -> None:
    """checkpoint_dir is the output_dir of a run, which means epoch_1, later epoch_2. Where it is
    doesn't matter."""

    def export(epoch: int) -> None:
        folder = tmp_path / "run" / f"epoch_{epoch}"
        folder.mkdir(parents=True)
        (folder / "config.json").touch()
        (folder / "model.safetensors").write_text(str(epoch))

    def output() -> ResumableOutput:
        model = {"checkpointer": {"checkpoint_dir": str(tmp_path / "run")}}
        return opened(input_file, checkpointer=None, log_q=model)

    export(1)
    first = output()
    run(first, slices=1)
    stop(first)
    output().check()
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "run").symlink_to(tmp_path / "moved")
    output().check()
    export(2)
    with pytest.raises(ValueError, match=r"was begun with other settings \(log_q\)"):
        output().check()


def test_an_output_that_is_removed_meanwhile_ends_its_run(input_file: Path) -> None:
    """A file without a name would be lost with its last line."""
    output = opened(input_file)
    output.check()
    output.begin(len(LINES))
    output.append(LINES[:SLICE])
    output.partial.unlink()
    with pytest.raises(ValueError, match=r"output\.jsonl\.partial was removed or replaced"):
        output.append(LINES[SLICE : 2 * SLICE])
    with pytest.raises(ValueError, match="was removed or replaced"):
        output.finish()


def test_settings_tell_no_secret_but_that_it_is_another_one(input_file: Path) -> None:
    first = opened(input_file, source="http://al:S3CR@h/x")
    run(first, slices=1)
    stop(first)
    assert "S3CR" not in first.settings_file.read_text()
    opened(input_file, source="http://al:S3CR@h/x").check()
    with pytest.raises(ValueError, match="other settings \\(source\\)"):
        opened(input_file, source="http://al:OTHER@h/x").check()


def test_slices_go_on_where_an_earlier_run_ended(capsys: pytest.CaptureFixture[str]) -> None:
    """Also of items that can be read only once; the watch hears of each, and the bar is full."""
    watch = HangWatch(World(torch.device("cpu")), None)
    found = []
    for start, chosen in remaining_slices(iter(LINES), range(4, 10, 4), watch, text="a file"):
        _, position, _, patience = watch._position
        found.append((start, chosen, position, patience == LONG))
    assert found == [
        (4, LINES[4:8], "a file, group 5", True),
        (8, LINES[8:], "a file, group 9", False),
    ]
    assert "10/10" in capsys.readouterr().err


def test_an_input_that_became_shorter_meanwhile_is_refused() -> None:
    watch = HangWatch(World(torch.device("cpu")), None)
    with pytest.raises(ValueError, match="ends after 9 records, and had 10"):
        list(remaining_slices(LINES[:9], range(0, 10, 4), watch, unit="record"))


def test_nothing_is_left_of_a_complete_output() -> None:
    watch = HangWatch(World(torch.device("cpu")), None)
    assert list(remaining_slices(LINES, range(10, 10, 4), watch)) == []


def test_an_errors_message_has_a_line_of_its_own_below_the_bar(
    capsys: pytest.CaptureFixture[str],
) -> None:
    watch = HangWatch(World(torch.device("cpu")), None)
    try:
        for start, _ in remaining_slices(LINES, range(0, 10, 4), watch):
            if start == 4:
                raise ValueError("wrong")
    except ValueError as error:
        print(error, file=sys.stderr)
    assert capsys.readouterr().err.endswith("\nwrong\n")
