"""The reward recipe through `tune run`: losses, ranks, micro-batches, kill and resume, stages.

The labelled data has 26 conversations with two labelled answers each, of which half lack one of two
labels. With 7 texts a step and 4 ranks, ranks have unequal numbers of texts and of labels.

Dimension letters: N responses, A attributes, P pairs.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from steerlm2.attributes import AttributeSchema
from steerlm2.data.conversations import Conversation, conversation_to_json
from steerlm2.data.jsonl import json_line
from steerlm2.data.packing import RewardGroup
from steerlm2.data.records import Turn
from steerlm2.data.synthetic import synthetic_records
from steerlm2.data.templates import extra_id_template
from steerlm2.data.tokenizers import tiny_tokenizer
from steerlm2.datasets import attribute_dataset
from steerlm2.distributed.world import World
from steerlm2.inference.attribute_model import load_attribute_model
from steerlm2.training.batches import batch_of_step

if TYPE_CHECKING:
    from tests.recipes.conftest import RunFolder, TuneProcess

Train = Callable[..., "RunFolder"]
Entries = dict[int, dict[str, float]]

SCHEMA = AttributeSchema(("humor", "verbosity"))
GLOBAL_BATCH_SIZE = 7
STEPS = 12
SEED = 42
MAX_SEQ_LEN = 200
MODEL = {
    "vocab_size": 512,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 4,
    "embed_dim": 128,
    "intermediate_dim": 384,
    "max_seq_len": 2048,
    "rope_base": 10000,
    "norm_eps": 1e-5,
}
"""tiny/reward's, but without grouped-query attention: 4 ranks can then split its heads."""
BACKBONE = {"_component_": "torchtune.models.llama3.llama3"} | MODEL
LORA = (
    "model=torchtune.models.llama3.lora_llama3",
    "model.lora_attn_modules=[q_proj,v_proj,output_proj]",
    "model.apply_lora_to_mlp=true",
    "model.lora_rank=4",
    "model.lora_alpha=8",
)
PREFERRED = AttributeSchema(("verbosity",))
PAIRS = f"schema.names=[{PREFERRED.names[0]}]"
"""In the command line of every run on pairs."""
SHORT = ("max_steps=2", "val_every_n_steps=2", "save_every_n_steps=null")
ONE_STEP = ("max_steps=1", "val_every_n_steps=null", "save_every_n_steps=null")


def conversation(system: str, turns: list[Turn]) -> bytes:
    return json_line(conversation_to_json(Conversation(turns, system)))


@pytest.fixture(scope="module")
def labelled_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations of two turns, each answer labelled with one or both attributes."""
    rng = random.Random(0)
    lines = []
    for record in synthetic_records(26, 2, seed=3):
        turns = []
        for response in record.responses:
            values = {name: round(score) for name, score in (response.scores or {}).items()}
            if rng.random() < 0.5:
                values.pop(rng.choice(SCHEMA.names))
            label = ",".join(f"{name}:{value}" for name, value in values.items())
            turns += [*record.prompt_turns, Turn("Assistant", response.value, label)]
        lines.append(conversation(record.system, turns))
    path = tmp_path_factory.mktemp("data") / "labelled.jsonl"
    path.write_bytes(b"".join(lines))
    return path


@pytest.fixture(scope="module")
def pair_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs whose longer answer is preferred, by at most 3; a tie where both are as long."""
    lines = []
    for record in synthetic_records(60, 2, seed=0):
        lengths = [(r.scores or {})["verbosity"] for r in record.responses]
        strength = max(-3, min(3, round(lengths[1] - lengths[0])))
        for response in record.responses:
            turns = [*record.prompt_turns, Turn("Assistant", response.value, f"quality:{strength}")]
            lines.append(conversation(record.system, turns))
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_bytes(b"".join(lines))
    return path


def dataset(key: str, path: Path) -> list[str]:
    """Overrides that put a file in the place of tiny/reward's synthetic data."""
    return [
        f"{key}=steerlm2.datasets.attribute_dataset",
        f"{key}.source={path}",
        f"{key}.max_seq_len={MAX_SEQ_LEN}",
        *(f"~{key}.{name}" for name in ("num_records", "responses_per_prompt", "split")),
    ]


@pytest.fixture(scope="module")
def train(
    tune: TuneProcess,
    labelled_file: Path,
    run_folder: type[RunFolder],
    tmp_path_factory: pytest.TempPathFactory,
) -> Train:
    """`train(*overrides, nproc=None, output_dir=<a new folder>)` runs the recipe to its end."""

    def run(*overrides: str, nproc: int | None = None, output_dir: Path | None = None) -> RunFolder:
        folder = output_dir or tmp_path_factory.mktemp("run")
        arguments = command_line(labelled_file, *overrides, f"output_dir={folder}")
        result = tune(*arguments, nproc=nproc)
        return run_folder(folder, result.stdout)

    return run


def labelled_data(file: Path) -> list[str]:
    small = ["dataset_val.num_records=6", "dataset_val.responses_per_prompt=3"]
    return [*dataset("dataset", file), *small]


def command_line(labelled_file: Path, *overrides: str) -> list[str]:
    return [
        *("reward_distributed", "--config", "tiny/reward"),
        *([] if PAIRS in overrides else labelled_data(labelled_file)),
        *(f"model.{key}={value}" for key, value in MODEL.items()),
        f"global_batch_size={GLOBAL_BATCH_SIZE}",
        "max_tokens_per_microbatch=300",
        f"max_steps={STEPS}",
        "lr=1e-3",
        "lr_scheduler.warmup_steps=3",
        "val_every_n_steps=4",
        "save_every_n_steps=5",
        *overrides,
    ]


@pytest.fixture(scope="module")
def reference(train: Train) -> RunFolder:
    return train()


@pytest.fixture(scope="module")
def short_reference(train: Train) -> RunFolder:
    return train(*SHORT)


@pytest.fixture(scope="module")
def pairs(pair_file: Path) -> tuple[str, ...]:
    """Overrides of all runs on pairs."""
    return (
        *dataset("dataset", pair_file),
        *dataset("dataset_val", pair_file),
        PAIRS,
    )


def entries_with(run: RunFolder, key: str) -> Entries:
    """The entries of metrics.jsonl that have the key, by their step."""
    return {row["step"]: row for row in run.entries() if key in row}


def worst(run: RunFolder, reference: RunFolder) -> float:
    """The largest difference of any metric, in training and validation, relative to its size.

    Correlations and accuracies are on a scale of 1: one that is nearly 0 is no more accurate.
    """
    got, expected = run.entries(), reference.entries()
    assert [row.keys() for row in got] == [row.keys() for row in expected]
    differences = [
        abs(a[key] - b[key]) / max(abs(b[key]), 1.0 if "val_" in key and "mse" not in key else 1e-2)
        for a, b in zip(got, expected, strict=True)
        for key in b
    ]
    return torch.tensor(differences).max().item()  # NaN, if there is one


def worst_tensor(run: RunFolder, reference: RunFolder) -> float:
    """The largest ||difference|| / ||expected|| of any exported tensor."""
    got, expected = run.weights(), reference.weights()
    assert got.keys() == expected.keys()
    differences = [(got[name] - expected[name]).norm() / expected[name].norm() for name in expected]
    return torch.stack(differences).max().item()


# The losses of the first step, on four ranks, against plain Python


def fresh_scores(
    groups: list[RewardGroup], schema: AttributeSchema = SCHEMA
) -> list[list[list[float]]]:
    """[group][response][attribute] of the weights that a run starts from, one text at a time."""
    model = load_attribute_model(
        BACKBONE,
        None,
        tiny_tokenizer(),
        extra_id_template(),
        schema,
        World(torch.device("cpu")),
        max_seq_len=MAX_SEQ_LEN,
        max_tokens_per_microbatch=1,
        dtype=torch.float32,
        seed=SEED,
    )
    return [
        [model.score([RewardGroup(group.prompt, [response])])[0][0] for response in group.responses]
        for group in groups
    ]


def first_batch(path: Path, **arguments: Any) -> list[RewardGroup]:
    data = attribute_dataset(
        tiny_tokenizer(), source=str(path), max_seq_len=MAX_SEQ_LEN, schema=SCHEMA, **arguments
    )
    return [data[i] for i in batch_of_step(0, len(data), GLOBAL_BATCH_SIZE, SEED)]


def test_regression_loss_is_the_mean_over_all_labels_of_the_step(
    train: Train, labelled_file: Path
) -> None:
    """Sum over texts and their labels of (score - label)^2, divided by the number of labels."""
    groups = first_batch(labelled_file)
    squares = [
        (score - label) ** 2
        for group, [scores] in zip(groups, fresh_scores(groups), strict=True)
        for score, label in zip(scores, (group.labels or [[]])[0], strict=True)
        if label != -100
    ]
    assert len(squares) < 2 * GLOBAL_BATCH_SIZE, "no label is missing"
    run = train(*ONE_STEP, nproc=4)
    assert entries_with(run, "loss")[1]["loss"] == pytest.approx(
        sum(squares) / len(squares), rel=1e-5
    )


@pytest.mark.parametrize("loss", ["regular_bt", "margin_bt", "scaled_bt"])
def test_bradley_terry_loss_is_the_mean_over_all_pairs_of_the_step(
    train: Train, pairs: tuple[str, ...], pair_file: Path, loss: str
) -> None:
    """With d = preferred - other and s = |strength|: -log sigmoid(d), -log sigmoid(d - s),
    s * -log sigmoid(d); a tie is half of each order."""

    def nll(gap: float, size: float) -> float:
        margin, scale = {
            "regular_bt": (0.0, 1.0),
            "margin_bt": (size, 1.0),
            "scaled_bt": (0.0, size),
        }[loss]
        return scale * math.log1p(math.exp(-(gap - margin)))

    groups = first_batch(pair_file, pairs=True)
    strengths = [group.strength or 0.0 for group in groups]
    assert 0 in strengths, "no tie"
    assert min(strengths) < 0 < max(strengths)
    losses = []
    scores = fresh_scores(groups, PREFERRED)
    for ([first], [second]), strength in zip(scores, strengths, strict=True):
        gap, size = second - first, abs(strength)
        orders = {-1: [-gap], 0: [gap, -gap], 1: [gap]}[(strength > 0) - (strength < 0)]
        losses.append(sum(nll(d, size) for d in orders) / len(orders))
    run = train(*pairs, f"loss={loss}", *ONE_STEP, nproc=2)
    assert entries_with(run, "loss")[1]["loss"] == pytest.approx(
        sum(losses) / len(losses), rel=1e-5
    )


# The reference run by itself


def test_loss_falls(reference: RunFolder) -> None:
    losses = [row["loss"] for row in entries_with(reference, "loss").values()]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


def test_validation_reports_every_attribute(reference: RunFolder) -> None:
    metrics = {"mse", "pearson", "spearman", "pairwise_accuracy", "mse_of_mean"}
    expected = {f"val_{metric}_{name}" for metric in metrics for name in SCHEMA.names}
    assert entries_with(reference, "val_loss")[STEPS].keys() == {"step", "val_loss"} | expected


def test_calibration_counts_every_validation_text(reference: RunFolder) -> None:
    """6 records of 3 responses, with two attributes each."""
    for row in reference.entries("calibration.jsonl"):
        assert sum(line["responses"] for line in row["calibration"]) == 6 * 3 * 2


def test_stdout_says_which_step_was_exported(reference: RunFolder) -> None:
    losses = {
        step: row["val_loss"] for step, row in entries_with(reference, "val_loss").items() if step
    }
    best = min(losses, key=lambda step: losses[step])
    assert reference.stdout.rstrip().endswith(f"(of step {best})")


# The layout changes nothing but the order of sums

FEW_LENGTHS = ("max_tokens_per_microbatch=2000",)
"""A micro-batch a step. Under tensor parallel each new length costs a second on every rank."""
LAYOUTS = {
    "fsdp4": ((), 4),
    "tp2_fsdp2": (("tensor_parallel_dim=2", *FEW_LENGTHS), 4),
    "hsdp_checkpointing": (
        ("data_parallel_replicate_dim=2", "enable_activation_checkpointing=true"),
        4,
    ),
    "one_text_a_row": (("max_tokens_per_microbatch=1",), None),
    "compile": (("compile=true",), None),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_share_one_trajectory(
    train: Train, short_reference: RunFolder, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """All metrics of 2 steps to 1e-4, the exported weights to 1e-3. Compiled to graphs with their
    backward, but not to C++: that is the next test's."""
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "aot_eager")
    overrides, nproc = LAYOUTS[name]
    run = train(*SHORT, *overrides, nproc=nproc)
    assert worst(run, short_reference) < 1e-4
    assert worst_tensor(run, short_reference) < 1e-3


def test_compiled_kernels_share_it(train: Train) -> None:
    """All metrics of one step, whose rows of several lengths take kernels of any length."""
    plain, compiled = (
        train(*ONE_STEP, "lr_scheduler.warmup_steps=0", f"compile={value}")
        for value in ("false", "true")
    )
    assert worst(compiled, plain) < 1e-4
    assert worst_tensor(compiled, plain) < 1e-3


def test_pairs_share_one_trajectory(train: Train, pairs: tuple[str, ...]) -> None:
    """One pair a row, and two ranks with tensor parallel, against rows of several pairs."""
    arguments = (
        *(*pairs, "loss=margin_bt", "max_steps=2", "save_every_n_steps=null"),
        *("val_every_n_steps=2", "limit_val_batches=2"),
    )
    reference = train(*arguments)
    one_a_row = train(*arguments, "max_tokens_per_microbatch=1")
    two_ranks = train(*arguments, "tensor_parallel_dim=2", *FEW_LENGTHS, nproc=2)
    for run in (one_a_row, two_ranks):
        assert worst(run, reference) < 1e-4
        assert worst_tensor(run, reference) < 1e-3


def test_bfloat16_computation_on_float32_weights(train: Train, short_reference: RunFolder) -> None:
    """What the 70B configs do: bfloat16 keeps 8 bits of each activation, so a loss is off by a few
    per cent; the export is bfloat16."""
    run = train(*SHORT, "dtype=bf16", "param_dtype=fp32", "save_dtype=bf16")
    losses, expected = entries_with(run, "loss"), entries_with(short_reference, "loss")
    assert losses.keys() == expected.keys()
    for step, row in losses.items():
        assert row["loss"] == pytest.approx(expected[step]["loss"], rel=0.1)
    assert {tensor.dtype for tensor in run.weights().values()} == {torch.bfloat16}


def test_synthetic_preferences_are_learned(tune_command: TuneProcess, tmp_path: Path) -> None:
    """tiny/reward with another loss and the one attribute that it trains."""
    tune_command(
        *("reward_distributed", "--config", "tiny/reward", "loss=regular_bt", "max_steps=40"),
        "schema.names=[verbosity]",
        *("dataset.num_records=320", f"output_dir={tmp_path}", "val_every_n_steps=40"),
        *("dataset_val.num_records=24", "save_every_n_steps=null", "global_batch_size=16"),
    )
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    accuracy = [r["val_pairwise_accuracy"] for r in map(json.loads, lines) if "val_loss" in r]
    assert accuracy[-1] > max(0.8, accuracy[0])


def test_lora_trains_the_head_and_leaves_the_base(train: Train) -> None:
    """Two ranks give what one gives; unadapted matrices stay as the seed made them."""
    one = train(*LORA, *SHORT)
    two = train(*LORA, *SHORT, "tensor_parallel_dim=2", *FEW_LENGTHS, nproc=2)
    assert worst(two, one) < 1e-4
    start = train(*LORA, *ONE_STEP, "lr=1e-30")
    changed = {
        name for name, tensor in one.weights().items() if not tensor.equal(start.weights()[name])
    }
    assert "score.weight" in changed
    assert "model.layers.0.self_attn.q_proj.weight" in changed
    assert not {name for name in changed if "k_proj" in name or "embed" in name or "norm" in name}


# Stages, and which weights are exported


def stage_of(run: RunFolder, *overrides: str) -> tuple[str, ...]:
    (folder,) = run.path.glob("epoch_*")
    return (
        "checkpointer._component_=steerlm2.checkpoints.HFCheckpointer",
        f"checkpointer.checkpoint_dir={folder}",
        "checkpointer.output_dir=${output_dir}",
        *overrides,
    )


def test_second_stage_starts_with_the_head_of_the_first(train: Train, reference: RunFolder) -> None:
    """Its validation before the first step is that of the exported step."""
    second = train(*stage_of(reference, "load_reward_head=true", "max_steps=1"))
    losses = [row["val_loss"] for step, row in entries_with(reference, "val_loss").items() if step]
    assert entries_with(second, "val_loss")[0]["val_loss"] == pytest.approx(min(losses), rel=1e-5)


def test_fresh_head_on_a_trained_backbone(train: Train, reference: RunFolder) -> None:
    """Not the first stage's head, but its backbone."""
    second = train(*stage_of(reference, *ONE_STEP, "lr=1e-30"))
    ours, theirs = second.weights(), reference.weights()
    assert [name for name in ours if not ours[name].equal(theirs[name])] == ["score.weight"]


@pytest.mark.parametrize("export", ["best", "last"])
def test_exported_weights_are_those_of_the_best_or_the_last_step(train: Train, export: str) -> None:
    """With a learning rate that rises too far, the last step isn't the best."""
    run = train("lr=0.03", "lr_scheduler.warmup_steps=12", f"export={export}")
    losses = {step: row["val_loss"] for step, row in entries_with(run, "val_loss").items() if step}
    assert losses[STEPS] > min(losses.values())
    expected = min(losses.values()) if export == "best" else losses[STEPS]
    again = train(*stage_of(run, "load_reward_head=true", "max_steps=1"))
    assert entries_with(again, "val_loss")[0]["val_loss"] == pytest.approx(expected, rel=1e-4)


def test_start_from_an_export_of_the_same_output_dir_is_refused(
    tune: TuneProcess, labelled_file: Path, reference: RunFolder
) -> None:
    """The run would move its own start away. Nothing of the earlier run is touched."""
    before = sorted(reference.path.rglob("*"))
    overrides = stage_of(reference, "load_reward_head=true", f"output_dir={reference.path}")
    assert "choose another output_dir" in fails(tune, *command_line(labelled_file, *overrides))
    assert sorted(reference.path.rglob("*")) == before


# Kill and resume


def test_killed_run_resumes_bit_for_bit(
    tune: TuneProcess,
    train: Train,
    labelled_file: Path,
    reference: RunFolder,
    run_folder: type[RunFolder],
    tmp_path: Path,
) -> None:
    """SIGKILL after step 7, past the checkpoint of step 5 and the validation of step 4."""
    run = run_folder(tmp_path / "run")
    process = tune.start(*command_line(labelled_file, f"output_dir={run.path}"))
    while process.poll() is None and 7 not in steps_so_far(run.path):
        time.sleep(0.005)
    assert process.poll() is None, "it ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()

    resumed = train("resume_from_checkpoint=true", output_dir=run.path)
    assert "resumed from" in resumed.stdout
    assert resumed.entries() == reference.entries()
    assert resumed.entries("calibration.jsonl") == reference.entries("calibration.jsonl")
    ours, theirs = resumed.weights(), reference.weights()
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_run_resumes_on_other_ranks(
    train: Train, reference: RunFolder, tmp_path: Path, labelled_file: Path
) -> None:
    """Its first 10 steps on one process, the last 2 on two with tensor parallel."""
    first = train("max_steps=10", "save_every_n_steps=10", output_dir=tmp_path / "run")
    shutil.rmtree(next(first.path.glob("epoch_*")))
    layout = ("tensor_parallel_dim=2", *FEW_LENGTHS)
    resumed = train("resume_from_checkpoint=true", *layout, nproc=2, output_dir=first.path)
    schedule = entries_with(reference, "loss")[STEPS]["lr"]
    assert entries_with(resumed, "loss")[STEPS]["lr"] == schedule
    assert list(entries_with(resumed, "loss")) == list(range(1, STEPS + 1))


@pytest.mark.parametrize("override", ["schema.names=[verbosity,humor]", "seed=7"])
def test_resuming_something_else_is_refused(
    tune: TuneProcess, labelled_file: Path, reference: RunFolder, tmp_path: Path, override: str
) -> None:
    """Another order of the attributes would swap the outputs of a half-trained head."""
    shutil.copytree(reference.path, tmp_path / "run")
    arguments = (override, "resume_from_checkpoint=true", f"output_dir={tmp_path / 'run'}")
    assert "in another output_dir" in fails(tune, *command_line(labelled_file, *arguments))


def steps_so_far(folder: Path) -> set[int]:
    file = folder / "metrics.jsonl"
    if not file.exists():
        return set()
    return {json.loads(line)["step"] for line in file.read_text().split("\n")[:-1]}


# What is learned


@pytest.mark.slow
def test_counts_are_learned(train: Train, tmp_path: Path, tune: TuneProcess) -> None:
    """tiny/reward with 60 steps instead of 400: Pearson above 0.9 on questions with labels that the
    training data doesn't have."""
    tune(
        *("reward_distributed", "--config", "tiny/reward", f"output_dir={tmp_path}"),
        *("max_steps=60", "val_every_n_steps=60", "save_every_n_steps=null"),
    )
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    last = [row for row in map(json.loads, lines) if "val_loss" in row][-1]
    for name in SCHEMA.names:
        assert last[f"val_pearson_{name}"] > 0.9
        assert last[f"val_mse_{name}"] < last[f"val_mse_of_mean_{name}"] / 5


def test_preferences_are_learned(train: Train, pairs: tuple[str, ...]) -> None:
    """Of pairs that it is trained on, the model prefers the response that the label prefers."""
    run = train(*pairs, "loss=scaled_bt", "max_steps=60", "val_every_n_steps=60", "lr=2e-3")
    accuracy = {k: row["val_pairwise_accuracy"] for k, row in entries_with(run, "val_loss").items()}
    assert accuracy[60] > 0.9 > accuracy[0]


# Texts that are too long, and users' mistakes


def test_cut_texts_and_labels_are_counted(train: Train, labelled_file: Path) -> None:
    run = train(*ONE_STEP, "dataset.max_seq_len=60")
    counts = [f"{name} {labelled_file.read_text().count(f'{name}:')}" for name in SCHEMA.names]
    assert (
        f"52 texts with labels of {', '.join(counts)} (cut at the beginning, being too long: "
        "37 texts)" in run.stdout
    )


def fails(tune: TuneProcess, *arguments: str) -> str:
    """What the command prints to stderr; one message, without a traceback."""
    result: subprocess.CompletedProcess[str] = tune(*arguments, check=False)
    assert result.returncode == 1, result.stdout
    assert "Traceback" not in result.stderr
    return result.stderr


def test_text_without_any_label_of_the_schema_is_named(
    tune: TuneProcess, labelled_file: Path, tmp_path: Path
) -> None:
    line = conversation("S", [Turn("User", "Q"), Turn("Assistant", "An odd answer", "quality:3")])
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(labelled_file.read_bytes() + line)
    message = fails(tune, *command_line(bad, f"output_dir={tmp_path / 'out'}"))
    assert f"{bad}:27: nothing of humor, verbosity is labelled" in message
    assert "An odd answer" in message


def test_an_attribute_without_a_label_is_refused_before_a_model_is_built(
    tune: TuneProcess, labelled_file: Path, tmp_path: Path
) -> None:
    overrides = ("schema.names=[humor,quality,verbosity]", f"output_dir={tmp_path / 'out'}")
    message = fails(tune, *command_line(labelled_file, *overrides))
    assert "no text has a label of quality, so" in message
    assert "schema.names=[humor,verbosity]" in message


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["loss=scaled_bt", "reward_attribute=humor"], "others of a fresh head would be noise"),
        (["loss=mse"], "'loss' must be one of regression, regular_bt, margin_bt, scaled_bt"),
        (["loss=scaled_bt", "reward_attribute=helpfulness"], "'reward_attribute' must be one of"),
        (["load_reward_head=true"], "'load_reward_head' needs a 'checkpointer'"),
        (["dataset.schema=null"], "'dataset.schema' is taken from 'schema': set that"),
        (["dataset_val=null"], "'val_every_n_steps' needs 'dataset_val'"),
    ],
)
def test_config_problems(
    tune: TuneProcess, labelled_file: Path, tmp_path: Path, overrides: list[str], expected: str
) -> None:
    output_dir = f"output_dir={tmp_path / 'out'}"
    assert expected in fails(tune, *command_line(labelled_file, *overrides, output_dir))


def test_other_attributes_than_the_checkpoints_are_refused(
    tune: TuneProcess, labelled_file: Path, reference: RunFolder, tmp_path: Path
) -> None:
    overrides = stage_of(reference, "load_reward_head=true", "schema.names=[verbosity,humor]")
    message = fails(tune, *command_line(labelled_file, *overrides, f"output_dir={tmp_path / 'o'}"))
    assert "it has verbosity 0 to 4, humor 0 to 4, steerlm2.json of" in message
    assert "has humor 0 to 4, verbosity 0 to 4: leave 'schema' out" in message


def test_torchtunes_checkpointer_is_refused(
    tune: TuneProcess, labelled_file: Path, reference: RunFolder, tmp_path: Path
) -> None:
    shutil.copytree(next(reference.path.glob("epoch_*")), tmp_path / "model")
    overrides = (
        "checkpointer._component_=torchtune.training.FullModelHFCheckpointer",
        f"checkpointer.checkpoint_dir={tmp_path / 'model'}",
        "checkpointer.checkpoint_files=[model.safetensors]",
        "checkpointer.model_type=LLAMA3",
        "checkpointer.output_dir=${output_dir}",
    )
    message = fails(tune, *command_line(labelled_file, *overrides, f"output_dir={tmp_path / 'o'}"))
    assert "steerlm2.checkpoints.HFCheckpointer" in message
