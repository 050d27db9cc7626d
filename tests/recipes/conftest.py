"""Running recipes as a user does: torchtune's `tune`, in processes of their own."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from steerlm2.data.records import LOG_PROB_KEYS
from steerlm2.data.templates import encode_prompt, encode_response, extra_id_template
from steerlm2.data.tokenizers import tiny_tokenizer

TUNE = Path(sys.executable).with_name("tune")
Json = dict[str, Any]
WriteGroups = Callable[..., Path]

MAX_SEQ_LEN = 160
"""Of the groups that `write_groups` makes: a prompt with its longest response has so many tokens."""


@dataclass
class TuneProcess:
    """Starts `tune run`; one thread for each process, so that a run repeats bit for bit."""

    cwd: Path

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

    def start(self, *arguments: str, nproc: int | None = None) -> subprocess.Popen[str]:
        """The same as a process group of its own, to be killed."""
        launcher = [] if nproc is None else ["--nproc_per_node", str(nproc)]
        return subprocess.Popen(
            [TUNE, "run", *launcher, *arguments],
            cwd=self.cwd,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )


@pytest.fixture(scope="session")
def tune(tmp_path_factory: pytest.TempPathFactory) -> TuneProcess:
    return TuneProcess(tmp_path_factory.mktemp("cwd"))


@dataclass
class RunFolder:
    """What a training run left in its `output_dir`."""

    path: Path

    def rows(self, file: str = "metrics.jsonl") -> list[Json]:
        """The lines of a .jsonl file, without what measures the machine and not the run."""
        machine = {"tokens_per_second", "peak_memory_gib"}
        return [
            {key: value for key, value in json.loads(line).items() if key not in machine}
            for line in (self.path / file).read_text().splitlines()
        ]

    def weights(self, file: str = "model.safetensors") -> dict[str, torch.Tensor]:
        """The exported tensors."""
        (folder,) = self.path.glob("epoch_*")
        return load_file(folder / file)


def write_groups(
    path: Path, sizes: Iterable[int], *, seed: int = 0, extra_tokens: int = 0
) -> Path:
    """SteerLM2 records with log P(a|x,y) only, of random words.

    Group g has `sizes[g]` responses. Their lengths are drawn from 1 word to the limit of
    MAX_SEQ_LEN; the shortest and the longest that are possible both appear in every second group.

    Args:
        extra_tokens: how far the longest responses go beyond the limit.
    """
    rng = random.Random(seed)
    template, tokenizer = extra_id_template(), tiny_tokenizer()
    end = len(encode_response(template, tokenizer, "a")) - len(tokenizer.encode("a"))

    def text(num_tokens: int) -> str:
        while True:
            words = rng.choices(WORDS, k=num_tokens)
            while len(tokenizer.encode(" ".join(words))) > num_tokens:
                words.pop()
            words += rng.choices(LETTERS, k=num_tokens - len(tokenizer.encode(" ".join(words))))
            if len(tokenizer.encode(" ".join(words))) == num_tokens:
                return " ".join(words)

    lines = []
    for g, size in enumerate(sizes):
        record: Json = {
            "system": "Answer.",
            "prompt_turns": [{"from": "User", "value": text(rng.randint(1, 12))}],
            "label": f"humor:{g % 5},verbosity:{g % 3}",
        }
        probe = parse_turns(record)
        prompt = encode_prompt(template, tokenizer, record["system"], probe, record["label"])
        limit = MAX_SEQ_LEN - len(prompt) - end
        lengths = [rng.randint(1, limit) for _ in range(size)]
        if g % 2 == 0:
            lengths[:2] = [1, limit + extra_tokens]
        record["responses"] = [
            {
                "from": "Assistant",
                "value": text(length),
                LOG_PROB_KEYS["log_p_attributes"]: rng.uniform(-4, 0),
            }
            for length in lengths
        ]
        lines.append(json.dumps(record) + "\n")
    path.write_text("".join(lines))
    return path
