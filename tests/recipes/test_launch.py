"""The files of recipes/launch, with stand-ins for Slurm's commands and for `tune`."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from steerlm2.pipeline.state import PipelineState

LAUNCH = Path(__file__).resolve().parents[2] / "recipes" / "launch"
SCRIPTS = ("train.sbatch", "pipeline.sbatch", "torchrun.sh")

TUNE = """
import os, signal, subprocess, sys, time
folder = os.environ["CALLS"]
with open(f"{folder}/tune", "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
if "wait" in sys.argv and "dry_run=true" not in sys.argv:
    if "sft_distributed" in sys.argv:  # torchrun, which leaves SIGTERM alone, and a rank
        sys.exit(subprocess.call([sys.executable, f"{folder}/rank.py"]))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a pipeline that waits for its stage
    with open(f"{folder}/running", "w") as file:
        file.write(str(os.getpid()))
    time.sleep(120)
"""
RANK = """
import os, signal, sys, time
folder = os.path.dirname(__file__)
def stop(number, frame):
    time.sleep(0.5)  # it saves
    open(f"{folder}/stopped", "w").close()
    sys.exit(0)
if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    open(f"{folder}/running", "w").close()
    time.sleep(60)
"""
STAND_INS = {
    # SIGTERM makes it kill all that it has started; Slurm signals tasks, but not their children
    "srun": """
        while [[ $1 == -* ]]; do shift; done
        setsid "$@" & task=$!; echo $task > "$CALLS/task"
        trap 'kill -KILL -- -$task' TERM
        wait $task""",
    "scontrol": """
        echo "$@" >> "$CALLS/scontrol"
        case $1 in
        show) printf "node1\\nnode2\\n" ;;
        requeue) kill -KILL $(< "$CALLS/running") ;;  # ends the job
        esac 2> /dev/null""",
    "scancel": 'echo "$@" >> "$CALLS/scancel"; [[ ! -f $CALLS/task ]] || kill $(< "$CALLS/task")',
    "launcher": '"$@" & wait $!',  # as torchrun starts a rank
}


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job's script; what is called leaves its arguments in CALLS."""
    commands, calls = tmp_path / "bin", tmp_path / "calls"
    commands.mkdir()
    calls.mkdir()
    bodies = {name: f"#!/usr/bin/env bash\n{body}\n" for name, body in STAND_INS.items()}
    for name, body in (bodies | {"tune": f"#!{sys.executable}{TUNE}"}).items():
        (commands / name).write_text(body)
        (commands / name).chmod(0o755)
    (calls / "rank.py").write_text(RANK)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2"}
    paths = {"PATH": f"{commands}:{os.environ['PATH']}", "CALLS": str(calls)}
    return dict(os.environ) | job | paths | {"LOG_DIR": str(tmp_path / "logs")}


def start(name: str, slurm: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", LAUNCH / name, *arguments],
        env=slurm,
        cwd=slurm["CALLS"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def calls(slurm: dict[str, str], command: str) -> list[str]:
    file = Path(slurm["CALLS"]) / command
    return file.read_text().splitlines() if file.exists() else []


def stop_when_running(process: subprocess.Popen[str], slurm: dict[str, str]) -> str:
    while not (Path(slurm["CALLS"]) / "running").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    return process.communicate(timeout=60)[0]


@pytest.mark.parametrize("name", SCRIPTS)
def test_without_arguments_the_usage_is_shown(name: str, slurm: dict[str, str]) -> None:
    process = start(name, slurm)
    assert "usage: " in process.communicate()[0]
    assert process.returncode == 2
    assert not calls(slurm, "tune")


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say(name: str) -> None:
    result = subprocess.run(["shellcheck", LAUNCH / name], capture_output=True, text=True)
    assert result.stdout == ""


@pytest.mark.parametrize("name", SCRIPTS[:2])
def test_a_job_is_warned_and_queued_again(name: str) -> None:
    """The options are in the first block of comments, where sbatch reads them."""
    head = (LAUNCH / name).read_text().split("\nset -uo")[0]
    assert "\n#SBATCH --signal=B:TERM@120\n" in head
    assert "\n#SBATCH --requeue\n" in head


def test_a_stage_is_started_by_torchrun_and_resumes(slurm: dict[str, str]) -> None:
    process = start("train.sbatch", slurm, "sft_distributed", "--config", "my config", "lr=1")
    assert process.communicate()[0] == ""
    assert process.returncode == 0
    (line,) = calls(slurm, "tune")
    assert line.startswith("run --nnodes 2 --nproc_per_node 8 --rdzv_id 7 --rdzv_backend c10d ")
    assert "--rdzv_endpoint node1:29500 --max_restarts 3 " in line
    assert line.endswith(" sft_distributed --config my config lr=1 resume_from_checkpoint=true")
    assert calls(slurm, "scontrol") == ["show hostnames node[1-2]"]


def test_other_recipes_are_not_told_to_resume(slurm: dict[str, str]) -> None:
    start("train.sbatch", slurm, "score_responses", "--config", "c").communicate()
    assert calls(slurm, "tune")[0].endswith(" score_responses --config c")


def test_a_stage_that_fails_fails_the_job(slurm: dict[str, str]) -> None:
    (Path(slurm["PATH"].split(":")[0]) / "tune").write_text("#!/usr/bin/env bash\nexit 3\n")
    process = start("train.sbatch", slurm, "sft_distributed")
    process.communicate()
    assert process.returncode == 3
    assert not any("requeue" in call for call in calls(slurm, "scontrol"))


def test_a_preempted_stage_saves_and_is_queued_again(slurm: dict[str, str]) -> None:
    process = start("train.sbatch", slurm, "sft_distributed", "wait")
    output = stop_when_running(process, slurm)
    assert output == "stopped by SIGTERM: queued again\n"
    assert process.returncode == 0
    assert (Path(slurm["CALLS"]) / "stopped").exists()
    assert calls(slurm, "scancel") == ["--signal=TERM 7"]
    assert calls(slurm, "scontrol")[-1] == "requeue 7"


@pytest.mark.parametrize(
    ("name", "recipe"), [("train.sbatch", "score_responses"), ("pipeline.sbatch", "--config")]
)
def test_a_job_is_queued_again_before_what_does_not_stop_has_ended(
    name: str, recipe: str, slurm: dict[str, str]
) -> None:
    """At a time limit Slurm wouldn't: it ends a script that goes on waiting."""
    process = start(name, slurm | {"SECONDS_TO_STOP": "2"}, recipe, "wait")
    started = time.monotonic()
    assert "stopped by SIGTERM: queued again\n" in stop_when_running(process, slurm)
    assert 2 <= time.monotonic() - started < 30
    assert calls(slurm, "scontrol")[-1] == "requeue 7"


def test_a_pipeline_prints_its_plan_first(slurm: dict[str, str]) -> None:
    process = start("pipeline.sbatch", slurm, "--config", "c", "iterations=1")
    process.communicate()
    assert process.returncode == 0
    first, second = calls(slurm, "tune")
    assert second == "run steerlm2_pipeline --config c iterations=1"
    assert first == f"{second} dry_run=true"


def test_the_stage_of_a_preempted_pipeline_saves(slurm: dict[str, str], tmp_path: Path) -> None:
    """It ends with status 0, but isn't taken for complete, and no other stage begins."""
    config = tmp_path / "stage.yaml"
    config.write_text("lr: 1\n")
    launch = "srun python -m steerlm2.runs.on_node launcher"
    stage = {"recipe": "rank", "config": str(config), "launch": launch}
    pipeline = {"output_dir": str(tmp_path / "out"), "stages": {"train": stage, "next": stage}}
    OmegaConf.save(OmegaConf.create(pipeline), tmp_path / "pipeline.yaml")
    tune = Path(sys.executable).with_name("tune")
    (Path(slurm["PATH"].split(":")[0]) / "tune").write_text(
        f'#!/usr/bin/env bash\n[[ $* == *dry_run=true ]] || exec {tune} "$@"\n'
    )

    process = start("pipeline.sbatch", slurm, "--config", str(tmp_path / "pipeline.yaml"))
    output = stop_when_running(process, slurm)
    assert (Path(slurm["CALLS"]) / "stopped").exists(), output
    assert "stage train was stopped before its end" in output
    assert output.endswith("stopped by SIGTERM: queued again\n")
    assert calls(slurm, "scancel") == ["--signal=TERM 7"]
    assert calls(slurm, "scontrol")[-1] == "requeue 7"
    state = PipelineState(tmp_path / "out")
    record = state.read("train")
    assert record is not None
    assert not record.complete
    assert state.read("next") is None


def test_without_slurm_a_lost_worker_is_started_again(slurm: dict[str, str]) -> None:
    environment = slurm | {"NNODES": "4", "HEAD": "here", "RUN": "mine", "NPROC": "2"}
    process = start("torchrun.sh", environment, "reward_distributed", "--config", "c")
    assert process.communicate()[0] == ""
    (line,) = calls(slurm, "tune")
    assert line.startswith("run --nnodes 4 --nproc_per_node 2 --rdzv_id mine --rdzv_backend c10d ")
    assert "--rdzv_endpoint here:29500 " in line
    assert "--max_restarts 3 " in line
    assert line.endswith(" reward_distributed --config c resume_from_checkpoint=true")


def test_without_slurm_sigterm_reaches_the_ranks(slurm: dict[str, str]) -> None:
    process = start("torchrun.sh", slurm, "sft_distributed", "wait")
    assert stop_when_running(process, slurm) == ""
    assert process.returncode == 0
    assert (Path(slurm["CALLS"]) / "stopped").exists()
