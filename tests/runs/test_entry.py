"""The command-line entry of a recipe: what it is given, and how it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from example_config import GOOD, TEMPLATE, Config

from steerlm2.runs.entry import recipe_main
from steerlm2.runs.stopping import InterruptedRunError


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Calls an entry with a config file and `key=value` arguments; returns the exit status."""

    def call(main: Callable[[Config], None], text: str, *overrides: str) -> Any:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        monkeypatch.setattr(sys, "argv", ["recipe", "--config", str(path), *overrides])
        with pytest.raises(SystemExit) as exit:
            recipe_main(Config)(main)()
        return exit.value.code

    return call


@pytest.fixture
def heeds_signals() -> Iterator[None]:
    """What ends ignores a further Ctrl-C."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def failing(error: Exception) -> Callable[[Config], None]:
    def main(cfg: Config) -> None:
        raise error

    return main


WHERE = "(STEERLM2_TRACEBACK=1 shows where)\n"
"""Follows errors that neither steerlm2 nor the recipe raised, such as those raised in this file."""


def test_recipe_gets_the_file_with_the_command_lines_values(run: Callable[..., Any]) -> None:
    """File: lr 1e-7 as people write it. Command line: a key of a section, a list."""
    seen: list[Config] = []
    text = f"output_dir: out\nlr: 1e-7\nmodel:\n  _component_: {TEMPLATE}\n"

    def main(cfg: Config) -> None:
        seen.append(cfg)

    status = run(main, text, "steerlm2.max_tokens=64", "prompts=[a,b]")
    assert status is None
    assert (seen[0].lr, seen[0].steerlm2.max_tokens, seen[0].prompts) == (1e-7, 64, ["a", "b"])


def test_problems_end_in_a_message_and_status_1(
    run: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(failing(AssertionError("built")), yaml.safe_dump(GOOD), "stepps=3") == 1
    assert capsys.readouterr().err == (
        "error: the config has problems:\n  - unknown key 'stepps' (did you mean 'steps'?)\n"
    )


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("line 1\nline 2"), "error: line 1\nline 2\n"),
        (FileNotFoundError("no such thing; make it"), "error: no such thing; make it\n"),
        (FileNotFoundError(2, "No such file", "/a/b"), "error: there is no file /a/b\n"),
        (
            OSError(28, "No space left on device"),
            "error: [Errno 28] No space left on device. Free some space where the outputs are, "
            "and give the same command again: what was complete is kept\n",
        ),
        (
            OSError(30, "Read-only file system", "out/run.json"),
            "error: [Errno 30] Read-only file system: 'out/run.json'. Make the outputs' file "
            "system writable, and give the same command again: what was complete is kept\n",
        ),
        (ValueError(), "error: ValueError\n"),
    ],
)
def test_a_users_mistake_ends_in_one_message(
    error: Exception, message: str, run: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(failing(error), yaml.safe_dump(GOOD)) == 1
    assert capsys.readouterr().err == message + WHERE


def test_broken_yaml_ends_in_a_message(
    run: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(failing(AssertionError("built")), "output_dir: [out\nlr: }") == 1
    assert capsys.readouterr().err.startswith("error: the config is not valid YAML: ")


def test_other_ranks_name_themselves(
    run: Callable[..., Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr("steerlm2.runs.entry.SECONDS_FOR_RANK_0", 0.0)
    run(failing(ValueError("line 1\nline 2")), yaml.safe_dump(GOOD))
    assert capsys.readouterr().err == "error on rank 3: line 1\nline 2\n" + WHERE


def test_our_own_bugs_keep_their_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    monkeypatch.setattr(sys, "argv", ["recipe", "--config", str(path)])
    with pytest.raises(KeyError):
        recipe_main(Config)(failing(KeyError("bug")))()


def test_a_rank_with_a_bug_ends_at_once(tmp_path: Path) -> None:
    """With its traceback; waiting for its threads, it would hold up the ranks that wait for it."""
    script = f"""
import sys, threading, time
from dataclasses import dataclass
from steerlm2.runs.entry import recipe_main
from steerlm2.runs.stopping import InterruptedRunError
from steerlm2.distributed.world import init_world

@dataclass
class Config:
    name: str

@recipe_main(Config)
def main(cfg):
    init_world("cpu", needs_mesh=True)
    threading.Thread(target=time.sleep, args=(3600,)).start()
    raise KeyError("bug")

sys.argv[1:] = ["--config", "{tmp_path / "config.yaml"}"]
main()
"""
    (tmp_path / "config.yaml").write_text("name: any")
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 1
    assert "KeyError: 'bug'" in ended.stderr


def test_traceback_is_shown_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    monkeypatch.setattr(sys, "argv", ["recipe", "--config", str(path)])
    monkeypatch.setenv("STEERLM2_TRACEBACK", "1")
    with pytest.raises(ValueError, match="mistake"):
        recipe_main(Config)(failing(ValueError("mistake")))()


@pytest.mark.parametrize(
    ("interrupt", "message"),
    [
        (KeyboardInterrupt(), "SIGINT: stopped; what was complete is kept\n"),
        (InterruptedRunError("saved\x1b[2J"), "saved\ufffd[2J\n"),
    ],
)
def test_ctrl_c_ends_in_one_line_and_a_shells_status(
    interrupt: KeyboardInterrupt,
    message: str,
    run: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
    heeds_signals: None,
) -> None:
    def main(cfg: Config) -> None:
        raise interrupt

    assert run(main, yaml.safe_dump(GOOD)) == 130
    assert capsys.readouterr().err == message


def test_messages_and_tracebacks_tell_no_secret_and_move_no_cursor(
    run: Callable[..., Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    text = "http://al:S3CR@h fails\x1b[2J"
    assert run(failing(ValueError(text)), yaml.safe_dump(GOOD)) == 1
    assert capsys.readouterr().err == f"error: http://***@h fails\ufffd[2J\n{WHERE}"
    try:
        raise KeyError(text)
    except KeyError as error:
        sys.excepthook(KeyError, error, error.__traceback__)
    shown = capsys.readouterr().err
    assert "http://***@h fails" in shown
    assert "raise KeyError(text)" in shown
    assert "S3CR" not in shown


def help_of(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["recipe", *arguments])
    recipe_main(Config)(failing(AssertionError("built")))()
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--help", "--config", ""]])
def test_help_needs_no_config(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recipe is this file, so its docstring comes first."""
    lines = help_of(arguments, monkeypatch, capsys)
    assert lines[0].startswith("usage: tune run ")
    assert lines[2] == "The command-line entry of a recipe: what it is given, and how it ends."
    assert "  steerlm2.strategy: one of auto, two_pass; default auto" in lines


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    (tmp_path / "config.yaml").write_text("lr: 0.5\nmodel: 5\noutput_dir: ???\nsteps: ${a}")
    return str(tmp_path / "config.yaml")


def test_help_with_a_config_has_its_values_and_the_command_lines(
    config_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", config_file, "--help", "steerlm2.max_tokens=64"]
    lines = help_of(arguments, monkeypatch, capsys)
    assert "  lr: a number or null; default null; this config: 0.5" in lines
    assert "  steerlm2.max_tokens: a whole number; default 4096; this config: 64" in lines


def test_help_ends_with_the_problems_of_the_config(
    config_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--help", "--config", config_file, "stepps=3", "steps=1"]
    *_, title, unknown, missing, model = help_of(arguments, monkeypatch, capsys)
    assert title == "the config has problems:"
    assert unknown == "  - unknown key 'stepps' (did you mean 'steps'?)"
    assert missing == "  - 'output_dir' is missing: add output_dir=... to the command line"
    assert model == "  - 'model' must be a mapping of keys, got 5"


def test_help_with_a_broken_interpolation_shows_it_and_says_so(
    config_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = help_of(["--help", "--config", config_file], monkeypatch, capsys)
    assert "  steps: a whole number or null; default null; this config: ${a}" in lines
    assert any(line.startswith("the config has a broken interpolation: ") for line in lines)


def test_help_is_printed_by_one_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert help_of(["--help"], monkeypatch, capsys) == []


def test_help_of_a_config_that_is_not_there_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="1"):
        help_of(["--help", "--config", str(tmp_path / "none.yaml")], monkeypatch, capsys)
    assert capsys.readouterr().err.startswith("error: there is no file ")
