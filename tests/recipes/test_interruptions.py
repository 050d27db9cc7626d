"""Runs that are killed, stopped, or disturbed end in one message or in the uninterrupted result."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fork_server import ForkServer

from processes import workers
from steerlm2.runs.lock import LOCK_FILE

RunFolder = Any
WriteGroups = Callable[..., Path]

TUNE = Path(sys.executable).with_name("tune")
STEPS = 40
KILLS = 10


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory, write_groups: WriteGroups) -> list[str]:
    data = write_groups(tmp_path_factory.mktemp("data") / "groups.jsonl", [2, 4, 3, 5, 4, 2, 3])
    return [
        *("steerlm2_distributed", "--config", "tiny/steerlm2"),
        *("dataset=steerlm2.datasets.steerlm2_dataset", f"dataset.source={data}"),
        *("dataset.max_seq_len=72", "~dataset.num_records", "~dataset.responses_per_prompt"),
        *("~dataset.split", "dataset_val=null", "val_every_n_steps=null", "generation=null"),
        *("model.num_kv_heads=4", "global_batch_size=3", f"max_steps={STEPS}", "lr=1e-3"),
        *("lr_scheduler.warmup_steps=3", "save_every_n_steps=1", "keep_last_n_checkpoints=2"),
        "resume_from_checkpoint=true",
    ]


@pytest.fixture(scope="module")
def reference(
    tune: Any,
    arguments: list[str],
    run_folder: type[RunFolder],
    tmp_path_factory: pytest.TempPathFactory,
) -> RunFolder:
    """Uninterrupted, on one process."""
    folder = tmp_path_factory.mktemp("reference")
    tune(*arguments, f"output_dir={folder}")
    return run_folder(folder)


def steps_of(folder: Path) -> int:
    """Lines in the metrics, one for each step."""
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    while process.poll() is None and not condition():
        time.sleep(0.001)
    assert process.poll() is None, process.communicate()[1][-4000:]


def wait_for_step(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    wait_for(process, lambda: steps_of(folder) >= step)


def kill(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def states(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoints/*"))


def is_saving(folder: Path) -> bool:
    return any(name.endswith(".partial") for name in states(folder))


def assert_same_run(run: RunFolder, reference: RunFolder) -> None:
    """Bit for bit; no step is missing or stands there twice."""
    assert run.entries() == reference.entries()
    got, expected = run.weights(), reference.weights()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_kills_change_nothing(
    tune: Any,
    arguments: list[str],
    reference: RunFolder,
    run_folder: type[RunFolder],
    tmp_path: Path,
) -> None:
    """Every step is saved. The run is killed ten times, and then left alone: within a step's time
    after another step has been logged, every second time as soon as a save has begun then."""
    rng = random.Random(0)
    kills_in_a_save = 0
    for i in range(KILLS):
        reached = steps_of(tmp_path)
        process = tune.start(*arguments, f"output_dir={tmp_path}")
        wait_for(process, lambda reached=reached: steps_of(tmp_path) > reached)
        if i % 2:
            wait_for(process, lambda: is_saving(tmp_path))
        else:
            time.sleep(rng.uniform(0, 0.05))
        kill(process)
        kills_in_a_save += is_saving(tmp_path)
    assert steps_of(tmp_path) < STEPS
    assert kills_in_a_save > 0
    tune(*arguments, f"output_dir={tmp_path}")
    assert_same_run(run_folder(tmp_path), reference)
    assert states(tmp_path) == [f"step_{STEPS - 1:06d}", f"step_{STEPS:06d}"]


# SIGTERM


def test_sigterm_saves_the_step_and_ends_well(
    tune: Any,
    arguments: list[str],
    reference: RunFolder,
    run_folder: type[RunFolder],
    tmp_path: Path,
) -> None:
    """Without a save before it. The same command then gives the uninterrupted run."""
    process = tune.start(*arguments, f"output_dir={tmp_path}", "save_every_n_steps=100")
    wait_for_step(process, tmp_path, 4)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    last = steps_of(tmp_path)
    assert 4 <= last < STEPS
    assert states(tmp_path) == [f"step_{last:06d}"]
    assert f"SIGTERM: stopped after step {last}, which is saved" in stdout
    assert not list(tmp_path.glob("epoch_*"))
    assert not (tmp_path / LOCK_FILE).exists()
    tune(*arguments, f"output_dir={tmp_path}")
    assert_same_run(run_folder(tmp_path), reference)


def test_a_validation_that_was_cut_off_is_made_up_for(
    tune: Any, arguments: list[str], tmp_path: Path
) -> None:
    """SIGTERM saves before it validates; SIGKILL may come in between."""
    (source,) = [each for each in arguments if each.startswith("dataset.source=")]
    command = [
        *(each for each in arguments if not each.startswith(("dataset_val", "val_every"))),
        *("dataset_val=steerlm2.datasets.steerlm2_dataset", "val_every_n_steps=2", "max_steps=4"),
        *("~dataset_val.num_records", "~dataset_val.responses_per_prompt", "~dataset_val.split"),
        *(source.replace("dataset", "dataset_val", 1), "dataset_val.max_seq_len=72"),
        f"output_dir={tmp_path}",
    ]
    tune(*command)
    metrics = tmp_path / "metrics.jsonl"
    whole = metrics.read_text().splitlines(keepends=True)
    assert "val_loss" in whole[-1]
    metrics.write_text("".join(whole[:-1]))
    tune(*command)
    assert metrics.read_text().splitlines(keepends=True) == whole


def test_sigterm_for_one_rank_stops_all(
    tune_torchrun: Any, arguments: list[str], tmp_path: Path
) -> None:
    """Rank 1 alone gets it; both save the same step and end with status 0, so torchrun does too."""
    process = tune_torchrun.start(
        *arguments, f"output_dir={tmp_path}", "save_every_n_steps=100", "max_steps=4000", nproc=2
    )
    wait_for_step(process, tmp_path, 2)
    os.kill(workers(process)[1], signal.SIGTERM)
    _, stderr = process.communicate(timeout=250)
    assert process.returncode == 0, stderr[-4000:]
    assert states(tmp_path) == [f"step_{steps_of(tmp_path):06d}"]


def test_sigterm_for_a_launcher_on_a_node_stops_its_ranks(
    arguments: list[str], fork_server: ForkServer, tmp_path: Path
) -> None:
    """As recipes/launch start it: torchrun leaves the signal alone. The launcher is a process of
    its own; its ranks are forked."""
    launch = ["--nproc_per_node", "2", "--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT"]
    process = subprocess.Popen(
        [sys.executable, "-m", "steerlm2.runs.on_node", TUNE, "run", *launch, *arguments,
         f"output_dir={tmp_path}", "save_every_n_steps=100", "max_steps=4000"],
        cwd=tmp_path,
        env=os.environ | {"PYTHON_EXEC": str(fork_server.python)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    wait_for_step(process, tmp_path, 2)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=250)
    assert process.returncode == 0, stderr[-4000:]
    assert "SIGTERM: stopped after step" in stdout
    assert states(tmp_path) == [f"step_{steps_of(tmp_path):06d}"]


# Ctrl-C, and a folder that is lost


def test_ctrl_c_saves_and_ends_in_one_line(tune: Any, arguments: list[str], tmp_path: Path) -> None:
    process = tune.start(
        *arguments, f"output_dir={tmp_path}", "save_every_n_steps=100", "max_steps=4000"
    )
    wait_for_step(process, tmp_path, 2)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=250)
    assert process.returncode == 128 + signal.SIGINT
    last = steps_of(tmp_path)
    assert states(tmp_path) == [f"step_{last:06d}"]
    *before, end = stderr.splitlines()
    assert end.startswith(f"SIGINT: stopped after step {last}, which is saved; the same command")
    assert "Traceback" not in stderr
    assert "SIGINT" not in stdout + "".join(before)
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_run_whose_folder_is_removed_ends(
    tune: Any, arguments: list[str], tmp_path: Path
) -> None:
    """Instead of making it again, with what it writes from then on."""
    process = tune.start(*arguments, f"output_dir={tmp_path / 'out'}", "max_steps=4000")
    wait_for_step(process, tmp_path / "out", 2)
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    _, stderr = process.communicate(timeout=250)
    assert process.returncode == 1
    assert f"error: {tmp_path / 'out'} was removed or replaced while the run wrote" in stderr
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


# Elastic restarts


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_two_nodes(
    tune_torchrun: Any, arguments: list[str], folder: Path, *overrides: str
) -> list[subprocess.Popen[str]]:
    """Two launchers with a rank each, which meet over loopback, as recipes/launch has them."""
    launch = [
        *("--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_id", "test"),
        *("--rdzv_endpoint", f"localhost:{free_port()}", "--max_restarts", "2"),
    ]
    return [
        tune_torchrun.start(*launch, *arguments, *overrides, f"output_dir={folder}")
        for _ in range(2)
    ]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_nodes_of_which_one_loses_a_worker_give_the_run_of_one_node(
    tune: Any,
    tune_torchrun: Any,
    arguments: list[str],
    run_folder: type[RunFolder],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sharded over both. The second launcher's rank is killed once, in mid-run: both ranks start
    again from the newest checkpoint, without being told to resume."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    overrides = ("max_steps=12", "save_every_n_steps=2")
    single, double = tmp_path / "single", tmp_path / "double"
    tune(*arguments, *overrides, f"output_dir={single}", nproc=2)
    nodes = start_two_nodes(
        tune_torchrun, arguments, double, *overrides, "resume_from_checkpoint=false"
    )
    wait_for(nodes[1], lambda: steps_of(double) >= 5)
    os.kill(workers(nodes[1])[0], signal.SIGKILL)
    outputs = [node.communicate() for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert any("resumed from" in stdout for stdout, _ in outputs)
    run, expected = run_folder(double), run_folder(single)
    assert [row["step"] for row in run.entries()] == list(range(1, 13))
    for row, other in zip(run.entries(), expected.entries(), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
    weights = run.weights()
    for name, tensor in expected.weights().items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-6)


# One message, and nothing harmed


LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def message(status: int, stderr: str) -> str:
    assert status == 1
    assert "Traceback" not in stderr
    assert stderr.count("error: ") == 1, stderr
    return stderr[stderr.index("error: ") :]


def message_of(result: subprocess.CompletedProcess[str]) -> str:
    return message(result.returncode, result.stderr)


def test_a_second_run_into_the_same_folder_is_refused(
    tune: Any, arguments: list[str], tmp_path: Path
) -> None:
    """The first one isn't disturbed."""
    process = tune.start(*arguments, f"output_dir={tmp_path}", "max_steps=100000")
    wait_for_step(process, tmp_path, 1)
    text = message_of(tune(*arguments, f"output_dir={tmp_path}", check=False))
    assert f"another run writes into {tmp_path} (process {process.pid} on " in text
    assert process.poll() is None
    kill(process)
    assert not (tmp_path / "earlier_runs").exists()


def test_a_full_disk_is_one_message_and_earlier_checkpoints_stay(
    tune: Any,
    arguments: list[str],
    reference: RunFolder,
    run_folder: type[RunFolder],
    tmp_path: Path,
) -> None:
    """No file may have more than 1 MB, which a checkpoint of this model has. Step 3's is warned of;
    after step 4's the run ends."""
    tune(*arguments, f"output_dir={tmp_path}", "max_steps=2")
    shutil.rmtree(next(tmp_path.glob("epoch_*")))
    assert states(tmp_path) == ["step_000001", "step_000002"]
    limited = tmp_path / "limited.py"
    limited.write_text(LIMITED)
    process = tune.start_process(
        [limited, TUNE, "run", *arguments, f"output_dir={tmp_path}"], cwd=tmp_path, env=os.environ
    )
    _, stderr = process.communicate()
    text = message(process.returncode, stderr)
    assert f"WARNING: {tmp_path}/checkpoints/step_000003 could not be written" in stderr
    assert f"{tmp_path}/checkpoints/step_000004 could not be written" in text
    assert "resume with resume_from_checkpoint=true" in text
    assert states(tmp_path) == ["step_000001", "step_000002"]
    tune(*arguments, f"output_dir={tmp_path}")
    assert_same_run(run_folder(tmp_path), reference)


def test_a_folder_that_cannot_be_written_to_is_one_message(tune: Any, arguments: list[str]) -> None:
    text = message_of(tune(*arguments, "output_dir=/proc/steerlm2", check=False))
    assert "output_dir /proc/steerlm2 can't be written to" in text
