"""metrics.jsonl outlives kills and resumes; the table and the plot show what is in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch

from steerlm2.distributed.world import World
from steerlm2.runs.metrics import (
    JsonLines,
    answer_metrics,
    logged_validation_loss,
    peak_memory_gib,
    plot_curves,
    summary_table,
)


@pytest.fixture
def lines(tmp_path: Path) -> JsonLines:
    return JsonLines(tmp_path / "run" / "metrics.jsonl")


def entries_of(*steps: int) -> list[dict[str, Any]]:
    return [{"step": step, "loss": 1 / (1 + step)} for step in steps]


def write(lines: JsonLines, *steps: int) -> None:
    for entry in entries_of(*steps):
        lines.append(entry)


def test_one_json_object_a_line(lines: JsonLines) -> None:
    write(lines, 1, 2)
    assert [json.loads(line) for line in lines.path.read_text().splitlines()] == entries_of(1, 2)


def test_entries_are_read_back(lines: JsonLines) -> None:
    """Any text, also with line breaks of its own."""
    entry = {"step": 1, "response": 'Grüße\n"\u2028"\x85日本'}
    lines.append(entry)
    assert lines.read() == [entry]


def test_no_file_has_no_entries(lines: JsonLines) -> None:
    assert lines.read() == []


def test_a_cut_last_line_is_not_read(lines: JsonLines) -> None:
    write(lines, 1, 2)
    whole = lines.path.read_text()
    lines.path.write_text(whole[:-3])
    assert lines.read() == entries_of(1)


DEEP = b"[" * 100_000


@pytest.mark.parametrize("damage", [b"\0" * 9, b'{"st', b"\xff", b"[1]", b'{"loss": 1}', b"", DEEP])
def test_damaged_lines_are_left_out_and_counted(
    lines: JsonLines, damage: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    write(lines, 1)
    with lines.path.open("ab") as file:
        file.write(damage + b"\n")
    write(lines, 2)
    assert lines.read() == lines.read() == entries_of(1, 2)
    assert capsys.readouterr().err == f"WARNING: {lines.path}: 1 damaged line(s) left out\n"


def test_appending_after_a_cut_last_line_leaves_whole_lines(lines: JsonLines) -> None:
    """A killed run is resumed: `keep_until` comes before the first append."""
    write(lines, 1, 2)
    lines.path.write_text(lines.path.read_text()[:-3])
    lines.keep_until(1)
    write(lines, 2, 3)
    assert lines.read() == entries_of(1, 2, 3)


def test_a_cut_only_line_is_removed_too(lines: JsonLines) -> None:
    """Otherwise what is appended continues it: `{"ste{"step": 1}`."""
    lines.path.write_text('{"ste')
    lines.keep_until(5)
    write(lines, 6)
    assert lines.read() == entries_of(6)


def test_keep_until_drops_later_entries_only(lines: JsonLines) -> None:
    write(lines, 1, 2, 3, 4)
    lines.keep_until(3)
    assert lines.read() == entries_of(1, 2, 3)


def test_keep_until_may_drop_all_entries(lines: JsonLines) -> None:
    """Logged every 20 steps, saved every 10: the checkpoint of step 10 is older than any."""
    write(lines, 20)
    lines.keep_until(10)
    assert lines.read() == []


def test_keep_until_needs_no_file(lines: JsonLines) -> None:
    lines.keep_until(3)
    assert lines.read() == []


def test_keep_until_leaves_no_other_file(lines: JsonLines) -> None:
    write(lines, 1, 2)
    lines.keep_until(1)
    assert [path.name for path in lines.path.parent.iterdir()] == ["metrics.jsonl"]


def test_table_averages_consecutive_parts_of_the_run() -> None:
    """Steps 1..10 in 5 parts of 2; loss = step: means 1.5, 3.5, ... 9.5."""
    entries = [{"step": step, "loss": step, "lr": 1e-7} for step in range(1, 11)]
    header, _, loss, lr = summary_table(entries, ("loss", "lr")).split("\n")
    assert header.split()[-5:] == ["1-2", "3-4", "5-6", "7-8", "9-10"]
    assert loss.split() == ["loss", "1.5", "3.5", "5.5", "7.5", "9.5"]
    assert lr.split() == ["lr"] + ["1e-07"] * 5


@pytest.mark.parametrize("count", [1, 4, 5, 6, 11, 299])
def test_parts_of_the_table_cover_every_step_once(count: int) -> None:
    """Every entry weighs 1: the heads' ranges follow each other from the first to the last step."""
    header, *_ = summary_table(entries_of(*range(count)), ("loss",)).split("\n")
    spans = [head.split("-") for head in header.removeprefix("mean over steps").split()]
    steps = [step for span in spans for step in range(int(span[0]), int(span[-1]) + 1)]
    assert steps == list(range(count))


def test_table_of_few_steps_has_a_column_for_each() -> None:
    header, _, loss = summary_table(entries_of(1, 3), ("loss",)).split("\n")
    assert (header.split()[-2:], loss.split()) == (["1", "3"], ["loss", "0.5", "0.25"])


def test_table_leaves_validation_entries_out() -> None:
    entries = [{"step": 0, "val_loss": 3.0}, *entries_of(1), {"step": 1, "val_loss": 2.0}]
    assert summary_table(entries, ("loss",)) == summary_table(entries_of(1), ("loss",))


def test_table_of_nothing_says_so() -> None:
    assert summary_table([{"step": 0, "val_loss": 1.0}], ("loss",)) == (
        "no training step was logged"
    )


def drawn(entries: list[dict[str, Any]], path: Path) -> np.ndarray:
    plot_curves(entries, ("loss", "distance"), path)
    return matplotlib.image.imread(path, format="png")


def test_plot_is_a_picture_with_a_panel_for_each_key(tmp_path: Path) -> None:
    """2 panels of 5 x 3.6 inches at 120 dots an inch: 432 x 1200 points of 4 colours."""
    entries = [{"step": step, "loss": 1.0, "distance": 2.0} for step in range(3)]
    assert drawn(entries, tmp_path / "plot.png").shape == (432, 1200, 4)


def test_plot_shows_validation_values(tmp_path: Path) -> None:
    train = [{"step": step, "loss": 1.0, "distance": 2.0} for step in range(3)]
    validation: list[dict[str, Any]] = [{"step": 1, "val_loss": 0.5}]
    without = drawn(train, tmp_path / "without.png")
    assert not np.array_equal(drawn(train + validation, tmp_path / "with.png"), without)


def test_plot_takes_names_as_they_are(tmp_path: Path) -> None:
    """Not for formulas, which needn't be any."""
    plot_curves([{"step": 1, "$\\frac$": 1.0}], ["$\\frac$", "$x^$"], tmp_path / "plot.png")


@pytest.mark.filterwarnings("error")
def test_plot_of_nothing_is_a_picture(tmp_path: Path) -> None:
    """A run that logged nothing ends as well, and without warnings."""
    assert drawn([], tmp_path / "plot.png").shape == (432, 1200, 4)


def test_peak_memory_is_at_least_what_is_allocated() -> None:
    """64 Mi float32 are 1/4 GiB; a process with torch has less than 64 GiB."""
    held = torch.ones(1 << 26)
    assert held.nbytes / 2**30 <= peak_memory_gib(torch.device("cpu")) < 64


# Metric functions that a config names


@pytest.fixture
def metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], dict[str, str]]:
    """`metric(name, returned)`: the component of a new function that returns this expression."""
    monkeypatch.syspath_prepend(tmp_path)

    def component(name: str, returned: str) -> dict[str, str]:
        code = f"def f(prompts, labels, responses): return {returned}"
        (tmp_path / f"{name}.py").write_text(code)
        return {"_component_": f"{name}.f"}

    return component


def test_answer_metrics_of_all_functions_together(metric: Any) -> None:
    """A number may be a tensor."""
    components = [
        metric("metric_pairs", "{'pairs': len(list(zip(prompts, labels, strict=True)))}"),
        metric("metric_mean", "{'mean': __import__('torch').tensor(len(responses[0]) / 2)}"),
    ]
    found = answer_metrics(components, ["p", "q"], [None, "humor:1"], ["abc", ""])
    assert found == {"pairs": 2.0, "mean": 1.5}
    assert {type(value) for value in found.values()} == {float}


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ("{'loss': 1.0}", "returns loss: the validation loss or another metric function"),
        ("{'a': [1]}", "must return a mapping from names to numbers"),
        ("[1.0]", "must return a mapping from names to numbers"),
        ("None", "must return a mapping from names to numbers"),
    ],
)
def test_function_that_returns_something_else_is_named(
    metric: Any, returned: str, expected: str
) -> None:
    component = metric(f"metric_{abs(hash(returned))}", returned)
    with pytest.raises(ValueError, match=f"{component['_component_']} {expected}"):
        answer_metrics([component], ["p"], [None], ["r"])


def test_functions_may_not_share_a_name(metric: Any) -> None:
    component = metric("metric_shared", "{'a': 1}")
    with pytest.raises(ValueError, match=r"metric_shared\.f returns a: .* another metric function"):
        answer_metrics([component, component], ["p"], [None], ["r"])


def test_a_validation_that_was_cut_off_has_no_loss(lines: JsonLines) -> None:
    for entry in (*entries_of(1, 2), {"step": 2, "val_loss": 0.5}, *entries_of(3)):
        lines.append(entry)
    world = World(torch.device("cpu"))
    losses = [logged_validation_loss(lines, step, world) for step in (1, 2, 3)]
    assert losses == [None, 0.5, None]
