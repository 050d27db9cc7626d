"""A user's mistakes end in one message that says what to do: no traceback, exit status not 0."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchtune.models.llama3 import llama3

from steerlm2.checkpoints.checkpointer import ScratchCheckpointer
from steerlm2.data.tokenizers import tiny_tokenizer

Json = dict[str, Any]

MAX_SEQ_LEN = 72
"""As the groups of conftest.py are made for."""


def message(tune: Any, *arguments: str, nproc: int | None = None) -> str:
    """What a failing run tells its user: one message, from the start of a line of stderr on."""
    result = tune(*arguments, nproc=nproc, check=False)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Traceback (most recent call last)" not in result.stdout + result.stderr
    assert "Warning" not in result.stderr
    messages = list(re.finditer(r"^error: ", result.stderr, re.MULTILINE))
    assert len(messages) == 1, result.stderr
    return result.stderr[messages[0].start() :]


def training(data: Path | str, output_dir: Path, *more: str) -> list[str]:
    """A run of two steps of the tiny model on a file of its own."""
    return [
        *("steerlm2_distributed", "--config", "tiny/steerlm2", f"output_dir={output_dir}"),
        *("dataset=steerlm2.datasets.steerlm2_dataset", f"dataset.source={data}"),
        *(f"dataset.max_seq_len={MAX_SEQ_LEN}", "~dataset.num_records", "~dataset.split"),
        *("~dataset.responses_per_prompt", "dataset_val=null", "val_every_n_steps=null"),
        *("generation=null", "save_every_n_steps=null", "max_steps=2"),
        *("lr_scheduler.warmup_steps=0", "lr_scheduler.constant_steps=0"),
        *("steerlm2.score_with_start_model=false", *more),
    ]


@pytest.fixture(scope="module")
def groups(write_groups: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good records, with log P(a|x,y) only."""
    return write_groups(tmp_path_factory.mktemp("groups") / "groups.jsonl", [2, 3, 4, 2])


def response(**changes: Any) -> Json:
    """Of a good record; what is changed to None is left out."""
    keys = {"from": "Assistant", "value": "a", "log(P(a|x,y))": -1.0, "log(P(y|x))": -2.0}
    keys |= {"log(Q(y|a,x))": -3.0} | changes
    return {key: value for key, value in keys.items() if value is not None}


def record(*first: Json, turns: int = 1, responses: int = 2, label: str = "humor:0") -> str:
    """The line of a good record, whose first responses are `first`."""
    roles = ("User", "Assistant")
    return json.dumps(
        {
            "system": "Answer.",
            "prompt_turns": [{"from": roles[i % 2], "value": "is it"} for i in range(turns)],
            "label": label,
            "responses": [*first, *(response() for _ in range(responses - len(first)))],
        }
    )


BAD_LINES = {
    "not valid JSON (Expecting ',' delimiter at column 21)": '{"system": "Answer."',
    "responses[0]: missing 'log(P(y|x))' (recipe score_responses adds it)": record(
        response(**{"log(P(y|x))": None})
    ),
    "responses[0]: 'log(Q(y|a,x))' must be finite, got nan": record(
        response(**{"log(Q(y|a,x))": float("nan")})
    ),
    "odd count, got 2": record(turns=2),
    "needs at least 2 responses, got 1": record(responses=1),
    "responses[0]: the response text is empty": record(response(value=" ")),
    "'humor=0' is not of the form name:number": record(label="humor=0"),
}


def lines_with_problems(text: str, file: Path) -> dict[int, str]:
    """Line number -> problem, from lines of the form "FILE:12: problem"."""
    found = re.findall(rf"{re.escape(str(file))}:(\d+): (.*)", text)
    return {int(number): problem for number, problem in found}


def write_lines(path: Path, lines: Iterable[str]) -> Path:
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_all_bad_lines_of_a_file_are_named_at_once(tune: Any, tmp_path: Path) -> None:
    """Good lines stand between them: bad line k is line 2k of the file."""
    lines = [line for bad in BAD_LINES.values() for line in (record(), bad)]
    data = write_lines(tmp_path / "data.jsonl", lines)
    text = message(tune, *training(data, tmp_path / "run"))
    problems = lines_with_problems(text, data)
    assert list(problems) == [2 * k for k in range(1, len(BAD_LINES) + 1)]
    for expected, problem in zip(BAD_LINES, problems.values(), strict=True):
        assert expected in problem
    assert len(text.splitlines()) == len(BAD_LINES)


def test_ten_of_many_bad_lines_are_named_and_the_rest_counted(tune: Any, tmp_path: Path) -> None:
    """score_responses reads with the same checks: 12 bad lines among 24, 10 named, 2 counted."""
    lines = [line for _ in range(12) for line in (record(), record(responses=1))]
    data = write_lines(tmp_path / "data.jsonl", lines)
    text = message(
        tune,
        *("score_responses", "--config", "tiny/score_responses"),
        *(f"input={data}", f"output={tmp_path / 'scored.jsonl'}"),
    )
    assert list(lines_with_problems(text, data)) == [2 * k for k in range(1, 11)]
    assert text.endswith("... and 2 more bad lines\n")
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_missing_data_file(tune: Any, tmp_path: Path) -> None:
    text = message(tune, *training("no_such.jsonl", tmp_path / "run"))
    assert f"{tune.cwd / 'no_such.jsonl'} does not exist; give a .jsonl or .jsonl.gz file" in text


def test_data_without_log_probs(tune: Any, groups: Path, tmp_path: Path) -> None:
    """What prepare_data writes: the message names the recipe that adds them."""
    text = message(tune, *training(groups, tmp_path / "run"))
    assert "missing 'log(P(y|x))', 'log(Q(y|a,x))' (recipe score_responses adds it)" in text


def test_all_problems_of_a_config_are_named_at_once(tune: Any, tmp_path: Path) -> None:
    """Unknown keys at every depth with the nearest known one, a wrong type, a wrong choice."""
    text = message(
        tune,
        *training("no_such.jsonl", tmp_path / "run"),
        *("global_batchsize=8", "steerlm2.log_q_tolerence=1", "optimizer.weight_decai=0.1"),
        *("seed=many", "dtype=fp16"),
    )
    assert "unknown key 'global_batchsize' (did you mean 'global_batch_size'?)" in text
    assert "unknown key 'steerlm2.log_q_tolerence' (did you mean 'log_q_tolerance'?)" in text
    assert "unknown key 'optimizer.weight_decai' (did you mean 'weight_decay'?)" in text
    assert "'seed' must be a whole number, got 'many'" in text
    assert "'dtype' must be one of fp32, bf16, got 'fp16'" in text
    assert text.count("\n  - ") == 5
    assert not (tmp_path / "run").exists()


def test_unknown_key_in_the_yaml(tune: Any, tmp_path: Path) -> None:
    config = tmp_path / "my.yaml"
    config.write_text("output_dir: out\nmax_step: 3\n")
    text = message(tune, "steerlm2_distributed", "--config", str(config))
    assert "unknown key 'max_step' (did you mean 'max_steps'?)" in text
    for required in ("tokenizer", "model", "dataset", "optimizer"):
        assert f"'{required}' is missing" in text


def test_missing_config_file(tune: Any) -> None:
    text = message(tune, "steerlm2_distributed", "--config", "no_such.yaml")
    assert f"there is no file {tune.cwd / 'no_such.yaml'}" in text
    assert "no ready-made config of that name (`tune ls` lists them)" in text


def test_output_dir_that_is_a_file(tune: Any, groups: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    text = message(tune, *training(groups, tmp_path / "run"))
    assert f"output_dir {tmp_path / 'run'} can't be written to" in text
    assert (tmp_path / "run").read_text() == "mine"


def test_heads_that_tensor_parallel_cannot_split(tune: Any, groups: Path, tmp_path: Path) -> None:
    text = message(
        tune,
        *training(groups, tmp_path, "steerlm2.score_with_start_model=true"),
        *("tensor_parallel_dim=2", "model.num_kv_heads=1"),
        nproc=2,
    )
    assert "the model's 1 key/value heads can't be split over 2 tensor-parallel ranks" in text
    assert "choose another tensor_parallel_dim" in text


def test_number_of_processes_that_the_dims_do_not_divide(tune: Any, tmp_path: Path) -> None:
    """2 processes, 3 wanted for each tensor-parallel group."""
    text = message(
        tune,
        *("steerlm2_distributed", "--config", "tiny/steerlm2", f"output_dir={tmp_path / 'run'}"),
        "tensor_parallel_dim=3",
        nproc=2,
    )
    assert "2 process(es) can't form data_parallel_replicate_dim=1" in text
    assert "tensor_parallel_dim=3" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_ranks_without_gpus(tune: Any, tmp_path: Path) -> None:
    """One line, from rank 0."""
    text = message(
        tune,
        *("steerlm2_distributed", "--config", "tiny/steerlm2", f"output_dir={tmp_path / 'run'}"),
        "device=cuda",
        nproc=2,
    )
    assert "PyTorch sees no GPU here; set device=cpu dtype=fp32" in text.splitlines()[0]


def test_tensor_parallel_without_torchrun(tune: Any, tmp_path: Path) -> None:
    text = message(
        tune,
        *("steerlm2_distributed", "--config", "tiny/steerlm2", f"output_dir={tmp_path / 'run'}"),
        "tensor_parallel_dim=2",
    )
    assert "1 process(es) can't form" in text
    assert "tune run --nproc_per_node N" in text


def checkpoint_of_width(embed_dim: int, folder: Path) -> Path:
    """The folder that a run of a tiny model with this `embed_dim` leaves."""
    model = llama3(
        vocab_size=512, num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=embed_dim,
        intermediate_dim=384, max_seq_len=2048, rope_base=10000, norm_eps=1e-5,
    )  # fmt: skip
    exporter = ScratchCheckpointer(model, tiny_tokenizer(), seed=0, output_dir=str(folder))
    exporter.save_checkpoint({"model": exporter.weights}, epoch=0)
    return folder / "epoch_0"


def checkpointer(folder: Path, output_dir: Path) -> list[str]:
    return [
        "checkpointer._component_=torchtune.training.FullModelHFCheckpointer",
        f"checkpointer.checkpoint_dir={folder}",
        "checkpointer.checkpoint_files=[model.safetensors]",
        "checkpointer.model_type=LLAMA3",
        f"checkpointer.output_dir={output_dir}",
    ]


@pytest.mark.parametrize("nproc", [None, 2])
def test_checkpoint_of_another_shape(
    nproc: int | None, tune: Any, groups: Path, tmp_path: Path
) -> None:
    """64 wide, where the config's model is 128 wide.

    Rank 0 alone reads it; the other rank must hear of it, not lose its connection.
    """
    folder = checkpoint_of_width(64, tmp_path)
    text = message(
        tune,
        *training(groups, tmp_path / "run", "steerlm2.score_with_start_model=true"),
        *checkpointer(folder, tmp_path / "run"),
        nproc=nproc,
    )
    assert f"`model` isn't the model that {folder}/config.json describes" in text
    assert "config.json: hidden_size 64, model: 128 (model.embed_dim=64)" in text
    assert "config.json: head_dim 16, model: 32" in text
    assert text.count("\n  - ") == 2


def test_checkpoint_dir_without_a_checkpoint(tune: Any, groups: Path, tmp_path: Path) -> None:
    text = message(
        tune,
        *training(groups, tmp_path / "run", "steerlm2.score_with_start_model=true"),
        *checkpointer(tmp_path, tmp_path / "run"),
    )
    assert f"{tmp_path} has no config.json: checkpointer.checkpoint_dir must be" in text


def test_log_probs_of_another_model_fail_the_drift_check(
    tune: Any, groups: Path, tmp_path: Path
) -> None:
    """Scored with the weights of seed 1, trained from those of seed 2: no step is taken.

    Untrained models all give about -log 512 a token, so they differ by little: 0.06 nats measured,
    hence a tolerance below the default 0.05.
    """
    scored = tmp_path / "scored.jsonl"
    tune(
        *("score_responses", "--config", "tiny/score_responses", "seed=1"),
        *(f"input={groups}", f"output={scored}", f"max_seq_len={MAX_SEQ_LEN}"),
    )
    run = tmp_path / "run"
    text = message(tune, *training(scored, run, "seed=2", "steerlm2.log_q_tolerance=1e-3"))
    found = re.search(r"differ from the stored log\(Q\(y\|a,x\)\) by (\S+) nats per token", text)
    assert found
    assert float(found[1]) > 1e-3
    assert "more than steerlm2.log_q_tolerance=0.001. Likely causes: another checkpoint" in text
    assert not (run / "metrics.jsonl").exists()
    assert not list(run.glob("epoch_*"))


def damaged_checkpoint(folder: Path) -> Path:
    """The export of a model one of whose weights is NaN, without digests that would show it."""
    export = checkpoint_of_width(128, folder)
    weights = load_file(export / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][0, 0] = math.nan
    save_file(weights, export / "model.safetensors", {"format": "pt"})
    (export / "SHA256SUMS").unlink(missing_ok=True)
    return export


def test_damaged_weights_score_nothing(tune: Any, groups: Path, tmp_path: Path) -> None:
    """Their log-probs would be NaN in the output, which only the training on it would refuse."""
    output = tmp_path / "scored.jsonl"
    result = tune(
        *("score_responses", "--config", "tiny/score_responses", f"input={groups}"),
        *(f"output={output}", f"max_seq_len={MAX_SEQ_LEN}", "quantities=[log_p_response]"),
        "checkpointer._component_=steerlm2.checkpoints.HFCheckpointer",
        f"checkpointer.checkpoint_dir={damaged_checkpoint(tmp_path)}",
        check=False,
    )
    assert result.returncode == 1, result.stderr
    assert "error: the log-probs of the model are not finite: its weights are dam" in result.stderr
    assert "Traceback (most recent call last)" not in result.stderr
    assert not output.exists()


def test_damaged_weights_are_not_said_to_be_of_another_model(tune: Any, tmp_path: Path) -> None:
    data, run = tmp_path / "scored.jsonl", tmp_path / "run"
    data.write_text(f"{record(response(), response(value='b'))}\n")
    text = message(
        tune,
        *training(data, run, "global_batch_size=1"),
        "checkpointer._component_=steerlm2.checkpoints.HFCheckpointer",
        *(
            f"checkpointer.checkpoint_dir={damaged_checkpoint(tmp_path)}",
            f"checkpointer.output_dir={run}",
        ),
    )
    assert "the log-probs of the start model are not finite: its weights are damaged" in text
    assert "Likely causes" not in text
    assert not (run / "metrics.jsonl").exists()
