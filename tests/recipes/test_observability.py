"""What a training run leaves behind besides its results, and what it says when ranks stand still.

Real processes on gloo.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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


def test_one_process(tune: Any, arguments: list[str], tmp_path: Path) -> None:
    """What the run was, its log, a plain line a step; a resumed and a new run keep what was."""
    result = tune(*arguments, f"output_dir={tmp_path}", "log_every_n_steps=2")
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["config"]["global_batch_size"] == 3
    assert run["config"]["clip_grad_norm"] is not None  # of the YAML
    assert run["config"]["val_every_n_steps"] is None
    assert run["command"][1:3] == ["--config", arguments[2]] or arguments[2] in str(run["command"])
    assert run["hosts"] == [HOST]
    assert run["versions"].keys() == {"python", "torch", "torchtune", "torchao", "steerlm2"}
    assert run["git"] is None  # `tune` runs in a folder without a repository
    assert run["earlier_starts"] == []

    lines = [line for line in result.stderr.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == ["step 2/6", "step 4/6", "step 6/6"]
    assert all(re.search(r"loss [\d.e-]+, distance [\d.e-]+, \d+ tokens/s$", li) for li in lines)
    assert "\r" not in result.stderr
    log = (tmp_path / "logs" / "rank_000.log").read_text()
    assert f"rank 0 of 1, process {_pid(log)} on {HOST}" in log
    assert all(line in log for line in lines)
    assert not any("slowest_rank_lag" in line for line in (tmp_path / "metrics.jsonl").open())


def _pid(log: str) -> str:
    return re.findall(r"process (\d+) on", log)[0]


def test_a_stopped_rank_is_named_and_the_run_goes_on_with_it(
    tune: Any, arguments: list[str], tmp_path: Path
) -> None:
    process = start(tune, arguments, tmp_path, "max_steps=40", "hang_timeout_seconds=5")
    stopped = workers(process)[1]
    os.kill(stopped, signal.SIGSTOP)
    began = time.monotonic()
    wait_for(process, lambda: "no rank has come further" in (tmp_path / "stderr").read_text())
    seconds = time.monotonic() - began
    os.kill(stopped, signal.SIGCONT)
    assert process.wait(timeout=120) == 0
    print(seconds, (tmp_path / "stderr").read_text())
    assert 0


def start(
    tune: Any, arguments: list[str], folder: Path, *overrides: str, nproc: int = 3
) -> subprocess.Popen[str]:
    """A run that has come to its third step; its stderr is in a file."""
    with (folder / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            [Path(sys.executable).with_name("tune"), "run", "--nproc_per_node", str(nproc)]
            + [*arguments, f"output_dir={folder}", *overrides],
            cwd=tune.cwd,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )
    metrics = folder / "metrics.jsonl"
    wait_for(process, lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 3)
    return process


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    while process.poll() is None and not condition():
        time.sleep(0.02)
    assert process.poll() is None


def workers(launcher: subprocess.Popen[str]) -> list[int]:
    """The processes of the ranks, in the order of their start."""
    file = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    return sorted(
        pid
        for pid in map(int, file.read_text().split())
        if b"steerlm2_distributed" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
