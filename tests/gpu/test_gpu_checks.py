"""Each check of gpu_check.py on a GPU; without one a rehearsal of all of them on the CPU."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fork_server import ForkServer

from checking import CHECKS
from gpu_check import ORDER, Driver, every_check

DRIVER = Path(__file__).with_name("gpu_check.py")
ROOT = DRIVER.parents[2]


def driver(work: Path, *arguments: str) -> list[str | Path]:
    """The driver's file and arguments."""
    return [DRIVER, "--work", work / "checks", "--out", work / "out", *arguments]


def results(work: Path) -> dict[str, dict[str, Any]]:
    """Of the checks, by name."""
    lines = (work / "out" / "results.jsonl").read_text().splitlines()
    return {result["check"]: result for result in map(json.loads, lines)}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all checks: what one needs of another is computed once, and kernels compiled once."""
    return tmp_path_factory.mktemp("gpu")


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="the checks of CUDA paths need a GPU, and there is none"
)
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ORDER)
def test_on_the_gpu(work: Path, name: str) -> None:
    options = ("--only", name, "--patience", "2", "--budget", "580")
    subprocess.run([sys.executable, *driver(work, *options)], cwd=ROOT, stdout=subprocess.DEVNULL)
    result = results(work)[name]
    if CHECKS[name].gpus > torch.cuda.device_count():
        pytest.skip(result["why"])
    assert result["status"] == "passed", result


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rehearsal_on_the_cpu(tmp_path: Path, fork_server: ForkServer) -> None:
    """The same code at tiny sizes, so that a mistake in a check isn't found on a rented GPU."""
    options = ("--device", "cpu", "--forks", "--threads", "1", "--budget", "840", "--patience", "4")
    fork_server.start(driver(tmp_path, *options), cwd=ROOT, env=os.environ).communicate()
    found = results(tmp_path)
    assert found.keys() == {name for name in ORDER if not CHECKS[name].rehearsed_by}
    assert {name: result for name, result in found.items() if result["status"] != "passed"} == {}


def test_every_check_has_a_place_in_the_order() -> None:
    assert sorted(ORDER) == sorted(CHECKS)


def test_what_a_rehearsal_leaves_out_another_check_does() -> None:
    others = [CHECKS[check.rehearsed_by] for check in CHECKS.values() if check.rehearsed_by]
    assert len(others) == 8
    assert not any(check.rehearsed_by for check in others)


def test_checks_that_run_alone_leave_the_others_half_of_the_default_budget() -> None:
    reserved = sum(check.least for check in CHECKS.values() if check.alone and not check.named)
    assert reserved <= 280
    assert ORDER[-sum(check.alone for check in CHECKS.values()) :] == tuple(
        name for name in ORDER if CHECKS[name].alone
    )


def test_checks_that_must_be_named_run_alone_and_are_rehearsed() -> None:
    named = [name for name, check in CHECKS.items() if check.named]
    assert named == ["speed_8b_lora", "speed_sampling"]
    assert all(CHECKS[name].alone for name in named)
    assert not set(named) & set(every_check("cuda"))
    assert set(named) <= set(every_check("cpu"))


def test_a_check_that_needs_more_gpus_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    (tmp_path / "cpu_reference.json").write_text('{"status": "passed"}')
    options: dict[str, Any] = {"out": tmp_path, "work": tmp_path, "device": "cuda", "jobs": 1}
    options |= {"budget": 480.0, "patience": 1.0}
    only = argparse.Namespace(only="steps_two_gpus", skip=None, **options)
    one = Driver(only)
    one.start()
    assert one.results["steps_two_gpus"]["why"] == "it needs 2 GPUs, and there are 1"
    assert one.passed
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    begun = []
    monkeypatch.setattr("gpu_check.Running", lambda name, *others: begun.append(name))
    Driver(only).start()
    assert begun == ["steps_two_gpus"]


def test_an_unknown_check_is_an_error_that_names_those_there_are(tmp_path: Path) -> None:
    command = [sys.executable, DRIVER, "--only", "speed_2b", "--out", tmp_path, "--work", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no such check: speed_2b; there are environment, " in done.stderr
