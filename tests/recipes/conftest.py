"""Running recipes as a user does: torchtune's `tune`, in processes of their own."""

from __future__ import annotations

import fcntl
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fork_server import OWN_TORCHRUN, ForkedProcess, ForkServer
from safetensors.torch import load_file

from steerlm2.data.records import Record, Response, Turn, write_records
from steerlm2.data.templates import encode_prompt, encode_response, extra_id_template
from steerlm2.data.tokenizers import tiny_tokenizer

TUNE = Path(sys.executable).with_name("tune")
Json = dict[str, Any]
WriteGroups = Callable[..., Path]
Process = subprocess.Popen[str] | ForkedProcess

MAX_SEQ_LEN = 72
"""Tokens of a prompt with the longest response that `write_groups` makes."""


@dataclass(frozen=True)
class TuneProcess:
    """Starts `tune run`; one thread for each process, so that a run repeats bit for bit."""

    cwd: Path
    start_process: Callable[..., Process]
    """Takes a command, and `cwd` and `env`."""
    variables: dict[str, str] = field(default_factory=dict)
    """Of the environment, besides this process's own."""

    def __call__(
        self, *arguments: str, nproc: int | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """`tune run [--nproc_per_node nproc] arguments`, to its end."""
        process = self.start(*arguments, nproc=nproc)
        stdout, stderr = process.communicate()
        result = subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
        if check:
            assert result.returncode == 0, stdout + stderr
        return result

    def start(self, *arguments: str, nproc: int | None = None, **options: Any) -> Process:
        """The same as a process group of its own, to be killed.

        Args:
            options: `stderr`, a file to write to.
        """
        launcher = [] if nproc is None else ["--nproc_per_node", str(nproc)]
        return self.start_process(
            [TUNE, "run", *launcher, *arguments],
            cwd=self.cwd,
            env=os.environ | self.variables,
            **options,
        )


@pytest.fixture(scope="session")
def tune(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> TuneProcess:
    """`tune run` in children of the fork server: seconds less than `tune_command`.

    What a recipe starts by way of bash is run there too.
    """
    cwd, shell_function = tmp_path_factory.mktemp("cwd"), fork_server.shell_function(TUNE)
    return TuneProcess(cwd, fork_server.start, shell_function)


@pytest.fixture(scope="session")
def tune_torchrun(tune: TuneProcess, fork_server: ForkServer) -> TuneProcess:
    """`tune` with the real torchrun, which watches ranks and starts them again."""
    ranks = {"PYTHON_EXEC": str(fork_server.python)}
    return replace(tune, variables=tune.variables | {OWN_TORCHRUN: "1"} | ranks)


@pytest.fixture(scope="session")
def tune_command(tmp_path_factory: pytest.TempPathFactory) -> TuneProcess:
    """`tune run` as a user starts it, with the real torchrun."""

    def start(command: list[Any], **options: Any) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, text=True, start_new_session=True, **(pipes | options))

    return TuneProcess(tmp_path_factory.mktemp("cwd"), start)


@dataclass
class RunFolder:
    """What a training run left in its `output_dir`, and printed."""

    path: Path
    stdout: str = ""

    def entries(self, file: str = "metrics.jsonl") -> list[Json]:
        """The lines of a .jsonl file, without what measures the machine and not the run."""
        machine = {
            *("tokens_per_second", "peak_memory_gib", "checkpoint_pause_seconds"),
            "slowest_rank_lag",
        }
        return [
            {key: value for key, value in json.loads(line).items() if key not in machine}
            for line in (self.path / file).read_text().splitlines()
        ]

    def weights(self, file: str = "model.safetensors") -> dict[str, torch.Tensor]:
        """The exported tensors."""
        (folder,) = self.path.glob("epoch_*")
        return load_file(folder / file)


@pytest.fixture(scope="session")
def run_folder() -> type[RunFolder]:
    return RunFolder


WORDS = ("a", "the", "of", "and", "is", "to", "it", "has", "you", "for", "this", "capital", "good")
"""Each is one token of the tiny tokenizer."""


def words(num_tokens: int, rng: random.Random) -> str:
    return " ".join(["a", *rng.choices(WORDS, k=num_tokens - 1)])


@pytest.fixture(scope="session")
def write_groups() -> WriteGroups:
    return _write_groups


def _write_groups(path: Path, sizes: Iterable[int], *, seed: int = 0, too_long: int = 0) -> Path:
    """SteerLM2 records of random words, with log P(a|x,y) only. Group g has `sizes[g]` responses.

    Their lengths are drawn from 1 word to the limit of MAX_SEQ_LEN; in every second group the first
    response has 1 word and the second is as long as it can be.

    Args:
        too_long: tokens by which those longest responses go beyond the limit.
    """
    rng = random.Random(seed)
    template, tokenizer = extra_id_template(), tiny_tokenizer()
    end = len(encode_response(template, tokenizer, "a")) - 1
    records = []
    for g, size in enumerate(sizes):
        turns = [Turn("User", words(rng.randint(1, 12), rng))]
        label = f"humor:{g % 5},verbosity:{g % 3}"
        prompt = encode_prompt(template, tokenizer, "Answer.", turns, label)
        limit = MAX_SEQ_LEN - len(prompt) - end
        lengths = [rng.randint(1, limit) for _ in range(size)]
        if g % 2 == 0:
            lengths[:2] = [1, limit + too_long]
        responses = [Response(words(n, rng), log_p_attributes=rng.uniform(-4, 0)) for n in lengths]
        records.append(Record("Answer.", turns, label, responses))
    write_records(path, records)
    return path


# Trained models, for whoever asks: one of the workers trains them


@pytest.fixture(scope="session")
def train_once(tune: TuneProcess, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`train_once(name, recipe, config, *overrides)`: the folder that a run exports at its end."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all workers

    def train(name: str, recipe: str, config: str, *overrides: str) -> Path:
        output_dir, done = folder / name, folder / f"{name}.done"
        no_validation = ("dataset_val=null", "val_every_n_steps=null", "save_every_n_steps=null")
        with (folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                tune(
                    *(recipe, "--config", config, f"output_dir={output_dir}"),
                    *("lr_scheduler.warmup_steps=5", *no_validation, "export=last", *overrides),
                )
                done.touch()
        (exported,) = output_dir.glob("epoch_*")
        return exported

    return train


@pytest.fixture(scope="session")
def attribute_model(train_once: Callable[..., Path]) -> Path:
    """After 40 steps its scores are not good yet, but differ from text to text."""
    return train_once(
        *("attribute_model", "reward_distributed", "tiny/reward"),
        *("max_steps=40", "dataset.num_records=320"),
    )


@pytest.fixture(scope="session")
def acsft_model(train_once: Callable[..., Path]) -> Path:
    """An attribute-conditioned model after 60 steps: most of its responses end."""
    return train_once(
        *("acsft_model", "sft_distributed", "tiny/acsft", "max_steps=60", "generation=null"),
        *("dataset.num_records=100", "global_batch_size=12", "lr=4.0e-3"),
    )
