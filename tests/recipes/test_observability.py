"""What a training run leaves behind besides its results, and what it says when ranks stand still.

Real processes on gloo.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from processes import workers

Start = Callable[..., Any]

HOST = socket.gethostname()


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory, write_groups: Callable) -> list[str]:
    """A steerlm2 run of six steps, of about three seconds."""
    data = write_groups(tmp_path_factory.mktemp("data") / "groups.jsonl", [2, 4, 3, 5, 4, 2, 3])
    return [
        *("steerlm2_distributed", "--config", "tiny/steerlm2"),
        *("dataset=steerlm2.datasets.steerlm2_dataset", f"dataset.source={data}"),
        *("dataset.max_seq_len=72", "~dataset.num_records", "~dataset.responses_per_prompt"),
        *("~dataset.split", "dataset_val=null", "val_every_n_steps=null", "generation=null"),
        *("global_batch_size=3", "max_steps=6", "lr_scheduler.warmup_steps=1"),
        *("save_every_n_steps=3", "keep_last_n_checkpoints=1"),
    ]


def test_what_a_run_was(tune: Any, arguments: list[str], tmp_path: Path) -> None:
    """In a repository with a change. A resumed run's record has both starts; a new run sets it
    aside."""
    folder, repository = tmp_path / "out", tmp_path / "repository"
    repository.mkdir()
    git = ["git", "-C", repository, "-c", "user.name=n", "-c", "user.email=e"]
    (repository / "notes").write_text("a")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "notes"]):
        subprocess.run([*git, *command], check=True)
    (repository / "notes").write_text("b")
    revision = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    tune = dataclasses.replace(tune, cwd=repository)

    result = tune(*arguments, f"output_dir={folder}", "log_every_n_steps=2", "max_steps=4")
    run = json.loads((folder / "run.json").read_text())
    assert run["config"]["global_batch_size"] == 3
    assert run["config"]["collective_timeout_seconds"] == 3600  # a default
    assert f"output_dir={folder}" in run["command"]
    assert run["git"] == {"revision": revision.strip(), "dirty": True}
    assert (run["hosts"], run["mesh"], run["earlier_starts"]) == ([HOST], None, [])
    assert run["versions"].keys() == {"python", "torch", "torchtune", "torchao", "steerlm2"}

    lines = [line for line in result.stderr.splitlines() if line.startswith("step ")]
    number = r"[\d.e+-]+"
    for line, step in zip(lines, (2, 4), strict=True):
        pattern = rf"step {step}/4: loss {number}, distance {number}, \d+ tokens/s"
        assert re.fullmatch(pattern, line)
    assert "\r" not in result.stderr
    log = (folder / "logs" / "rank_000.log").read_text()
    assert f"rank 0 of 1, process {run['process']} on {HOST}" in log
    assert all(line in log for line in lines)
    assert "slowest_rank_lag" not in (folder / "metrics.jsonl").read_text()

    tune(*arguments, f"output_dir={folder}", "resume_from_checkpoint=true")
    resumed = json.loads((folder / "run.json").read_text())
    earlier = resumed["earlier_starts"]
    assert earlier == [{key: run[key] for key in run if key != "earlier_starts"}]
    tune(*arguments, f"output_dir={folder}")
    assert json.loads((folder / "earlier_runs" / "1" / "run.json").read_text()) == resumed
    assert json.loads((folder / "run.json").read_text())["earlier_starts"] == []


def test_an_error_is_in_the_log_with_its_traceback(
    tune: Any, arguments: list[str], tmp_path: Path
) -> None:
    """The user sees one message."""
    broken = tune(*arguments, f"output_dir={tmp_path}", "lr=1e30", check=False)
    assert broken.returncode == 1
    assert "Traceback" not in broken.stderr
    log = (tmp_path / "logs" / "rank_000.log").read_text()
    assert "ended by an error\nTraceback" in log
    assert "the gradient norm is" in log.splitlines()[-1]


def test_wandb_gets_the_run_and_its_paths(
    tune: Any, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real package, offline."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = "metric_logger._component_=torchtune.training.metric_logging.WandBLogger"
    tune(*arguments, f"output_dir={tmp_path}", logger, f"metric_logger.log_dir={tmp_path}")
    run = json.loads((tmp_path / "run.json").read_text())
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    written = file.read_bytes()  # protocol buffers: text is in them as it is
    (exported,) = tmp_path.glob("epoch_*")
    for name, value in {
        "global_batch_size": "3",
        "run": f'"started":"{run["started"]}"',
        "steerlm2_git": run["steerlm2_git"]["revision"] if run["steerlm2_git"] else "null",
        "newest_checkpoint": f'"{tmp_path}/checkpoints/step_000006"',
        "exported_weights": f'"{exported}"',
    }.items():
        assert name.encode() in written
        assert value.encode() in written, name

    # Two more steps go on in the same run of W&B.
    more = ("max_steps=8", "resume_from_checkpoint=true")
    tune(*arguments, *more, f"output_dir={tmp_path}", logger, f"metric_logger.log_dir={tmp_path}")
    starts = [folder.name for folder in tmp_path.glob("wandb/offline-run-*-*")]
    assert len(starts) == 2
    assert {name.rpartition("-")[2] for name in starts} == {
        (tmp_path / "wandb_run_id").read_text().strip()
    }


SLOW_MODEL = """
import os, time
from torchtune.models.llama3_1 import llama3_1

def model(**sizes):
    decoder = llama3_1(**sizes)
    if os.environ["RANK"] == "1":
        for layer in decoder.layers:
            layer.attn.register_forward_pre_hook(lambda *_: time.sleep(0.1))
    return decoder
"""


def test_a_slow_rank_is_named(
    tune: Any, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 sleeps in each layer. All ranks' steps take as long as its own."""
    (tmp_path / "slow_model.py").write_text(SLOW_MODEL)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    slow = ("model._component_=slow_model.model", "max_steps=12", f"output_dir={tmp_path}")
    result = tune(*arguments, *slow, nproc=3)
    (warning,) = [line for line in result.stderr.splitlines() if line.startswith("WARNING")]
    # The first steps are slow on all ranks, so that the ten in a row may begin after them.
    named = rf"WARNING: step 1[0-2]: rank 1 on {re.escape(HOST)} is slow: for 10 log steps"
    assert re.match(named, warning)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert all(row["slowest_rank_lag"] > 0.5 for row in rows[2:])
    logs = [(tmp_path / "logs" / f"rank_{rank:03d}.log").read_text() for rank in range(3)]
    times = [re.findall(r"([\d.]+) s in the layers' forwards", log) for log in logs]
    assert [len(seconds) for seconds in times] == [12, 12, 12]
    own = [statistics.median(map(float, seconds)) for seconds in times]
    assert own[1] > 2 * 0.1 > max(own[0], own[2])


@pytest.fixture
def start(tune: Any, arguments: list[str], tmp_path: Path) -> Iterator[Start]:
    """Starts a run of three ranks and waits for its third step; its stderr is in a file."""
    started: list[Any] = []

    def begin(*overrides: str) -> Any:
        with (tmp_path / "stderr").open("w") as stderr:
            process = tune.start(
                *arguments, f"output_dir={tmp_path}", *overrides, nproc=3, stderr=stderr
            )
        started.append(process)
        metrics = tmp_path / "metrics.jsonl"
        wait_for(process, lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 3)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_a_stopped_rank_is_named_and_the_run_goes_on_with_it(start: Start, tmp_path: Path) -> None:
    """Three beats late at most: 45 + 3 * 4 seconds by default, here 4 + 3 * 0.4. Two more seconds
    are for a busy machine."""
    process = start("max_steps=12", "hang_timeout_seconds=4")
    stopped = workers(process)[1]
    os.kill(stopped, signal.SIGSTOP)
    began = time.monotonic()
    wait_for(process, lambda: "no sign of life" in (tmp_path / "stderr").read_text())
    assert 3 < time.monotonic() - began < 4 + 3 * 0.4 + 2
    os.kill(stopped, signal.SIGCONT)
    assert process.wait(timeout=120) == 0
    stderr = (tmp_path / "stderr").read_text()
    assert f"All wait for rank 1 on {HOST}, which did not arrive." in stderr
    where = r"step \d+, (micro-batch \d+|update), in \w+ \(\w+\.py:\d+\)"
    assert re.search(rf"\n  rank 0, 2 on {HOST}: {where}\n", stderr)
    assert re.search(rf"\n  rank 1 on {HOST}: no sign of life; the last was at ", stderr)
    assert stderr.count("no rank has made progress") == 1
    assert stderr.count("the ranks go on") == 1
    log = (tmp_path / "logs" / "rank_000.log").read_text()
    assert "this one is at step" in log
    assert "steerlm2_distributed.py" in log.split("this one is at")[1]  # its stack


@pytest.mark.slow
def test_a_rank_that_never_comes_ends_the_run(start: Start, tmp_path: Path) -> None:
    """Rank 0, which leaves rank 1 to say it."""
    timeouts = ("hang_timeout_seconds=3", "collective_timeout_seconds=8")
    process = start("max_steps=4000", *timeouts)
    os.kill(workers(process)[0], signal.SIGSTOP)
    assert process.wait(timeout=120) != 0
    stderr = (tmp_path / "stderr").read_text()
    assert f"All wait for rank 0 on {HOST}, which did not arrive." in stderr
    assert "the ranks go on" not in stderr


def wait_for(process: Any, condition: Callable[[], bool]) -> None:
    while process.poll() is None and not condition():
        time.sleep(0.02)
    assert process.poll() is None
