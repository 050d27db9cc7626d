"""Data, weights, tokenizers, states and the files of runs are read, never run.

Each file that somebody else may have made has a payload in it, which would make a folder. What runs
is named by a config. Training states: `tests/checkpoints/test_training_state.py`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torchtune.models.llama3 import llama3

from steerlm2.attributes import AttributeSchema
from steerlm2.checkpoints.checkpointer import HFCheckpointer, ScratchCheckpointer
from steerlm2.checkpoints.safetensors_io import write_safetensors
from steerlm2.checkpoints.side_files import TrainedText
from steerlm2.checkpoints.weights import load_weights, open_checkpointer, save_weights
from steerlm2.config.docs import ready_made_recipes
from steerlm2.config.loader import load_config
from steerlm2.data.chat_templates import render
from steerlm2.data.records import read_records
from steerlm2.data.settings import schema_of_data, settings_file
from steerlm2.data.sources.chat import chat_data
from steerlm2.data.templates import extra_id_template
from steerlm2.data.tokenizers import hf_tokenizer, tiny_tokenizer
from steerlm2.distributed.world import World
from steerlm2.evaluation.model_card import add_evaluation
from steerlm2.evaluation.report import write_report
from steerlm2.facts import FACTS_FILE, ModelFacts
from steerlm2.pipeline.state import PipelineState
from steerlm2.runs import lock
from steerlm2.runs.lock import RunLock
from steerlm2.runs.logs import log_file
from steerlm2.runs.metrics import JsonLines, plot_curves
from steerlm2.runs.record import RUN_FILE, write_run
from steerlm2.runs.resumable import ResumableOutput
from steerlm2_pipeline import run_command

CPU = World(torch.device("cpu"))
SCHEMA = AttributeSchema(("humor", "verbosity"))


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that payloads make, which nothing may. The working directory is the test's: a
    module in it can be found."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "ran"
    yield folder
    assert not folder.exists()


def code(ran: Path) -> str:
    return f"import os\nos.makedirs({str(ran)!r}, exist_ok=True)\n"


def jinja(ran: Path) -> str:
    """Out of a template without a sandbox, to the operating system."""
    return "{{ cycler.__init__.__globals__.os.mkdir(" + repr(str(ran)) + ") }}"


def tagged(ran: Path) -> str:
    """YAML that PyYAML's full loader runs."""
    return f"!!python/object/apply:os.mkdir [{ran}]\n"


def nothing_runs(read: Callable[[], object]) -> None:
    """A file may be refused as well as read."""
    with contextlib.suppress(ValueError, OSError):
        read()


def test_the_payloads_work(tmp_path: Path) -> None:
    """Otherwise the tests below couldn't fail."""
    import jinja2
    import yaml

    for number, run in enumerate(
        (
            lambda ran: pickle.loads(pickle.dumps(Payload(ran))),
            lambda ran: exec(code(ran), {}),
            lambda ran: jinja2.Template(jinja(ran)).render(),
            lambda ran: yaml.unsafe_load(tagged(ran)),
        )
    ):
        run(tmp_path / str(number))
        assert (tmp_path / str(number)).is_dir()


# Checkpoints


def decoder() -> Any:
    with torch.device("meta"):
        return llama3(
            vocab_size=512,
            num_layers=1,
            num_heads=2,
            num_kv_heads=1,
            embed_dim=32,
            max_seq_len=64,
            intermediate_dim=48,
        )


def planted_checkpoint(folder: Path, ran: Path) -> Path:
    """A language model with a payload in every file that a repository of the Hub may have, beside
    what is needed."""
    source = ScratchCheckpointer(decoder(), tiny_tokenizer(), seed=0, output_dir=str(folder))
    source.save_checkpoint({"model": source.weights}, epoch=1)
    model = folder / "epoch_1"
    (model / "SHA256SUMS").unlink()
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt"):
        torch.save(Payload(ran), model / name)
    for name in ("rng_state.pth", "tokenizer.pkl", "added_tokens.json", "merges.txt"):
        (model / name).write_bytes(pickle.dumps(Payload(ran)))
    for name in ("theirs.py", "modeling_llama.py", "tokenization_llama.py", "__init__.py"):
        (model / name).write_text(code(ran))
    (model / "chat_template.jinja").write_text(jinja(ran))
    auto_map = {f"Auto{kind}": "theirs.Own" for kind in ("Config", "Model", "ModelForCausalLM")}
    for name, more in {
        "config.json": {"auto_map": auto_map, "_name_or_path": jinja(ran)},
        "generation_config.json": {"custom_generate": "theirs.py", "auto_map": auto_map},
        "tokenizer_config.json": {
            "auto_map": {"AutoTokenizer": ["theirs.Own", "theirs.Own"]},
            "tokenizer_class": "theirs.Own",
            "chat_template": jinja(ran),
        },
        "special_tokens_map.json": {"eos_token": "<|endoftext|>", "chat_template": jinja(ran)},
        "original_repo_id.json": {"repo_id": jinja(ran)},
    }.items():
        file = model / name
        known = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps(known | more))
    (model / "README.md").write_text(f"---\nlicense: {tagged(ran)}---\n{jinja(ran)}\n")
    return model


def export(source: Any, output_dir: Path, facts: ModelFacts) -> Path:
    model = decoder()
    text = TrainedText(tiny_tokenizer(), extra_id_template(), stop_id=3)
    load_weights(model, source, CPU, seed=0)
    options = {"dtype": torch.float32, "output_dir": output_dir, "text": text, "facts": facts}
    return save_weights(model, source, CPU, epoch=1, **options)


@pytest.mark.parametrize("whose", ["ours", "torchtune's"])
def test_nothing_in_a_checkpoint_is_run(whose: str, ran: Path, tmp_path: Path) -> None:
    """It is loaded and trained on; of its code, pickles and templates nothing comes along."""
    model = planted_checkpoint(tmp_path / "model", ran)
    names = {
        "ours": "steerlm2.checkpoints.HFCheckpointer",
        "torchtune's": "torchtune.training.FullModelHFCheckpointer",
    }
    component = {"_component_": names[whose], "checkpoint_dir": str(model)}
    if whose != "ours":
        component |= {"checkpoint_files": ["model.safetensors"], "model_type": "LLAMA3"}
    source = open_checkpointer(
        component, decoder(), hf_tokenizer(model), seed=0, output_dir=str(tmp_path / "out")
    )
    facts = ModelFacts(
        kind="language model",
        template={"_component_": "steerlm2.data.extra_id_template"},
        schema=SCHEMA,
        system=f'"}}}}{jinja(ran)}{{{{ "',
    )
    exported = export(source, tmp_path / "out", facts)
    ours = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    more = {"README.md", FACTS_FILE, "SHA256SUMS", "chat_template.jinja", "generation_config.json"}
    torchtunes = {"model-00001-of-00001.safetensors", "model.safetensors.index.json"}
    assert {file.name for file in exported.iterdir()} <= ours | more | torchtunes | {
        "special_tokens_map.json",
        *("added_tokens.json", "merges.txt"),
    }
    for file in exported.glob("*.json"):
        assert "theirs" not in file.read_text()
    shown = render((exported / "chat_template.jinja").read_text(), [])
    assert jinja(ran) in shown  # as text


def test_weights_in_a_pickle_are_not_read(ran: Path, tmp_path: Path) -> None:
    """HFCheckpointer reads safetensors only, torchtune's `weights_only`."""
    model = planted_checkpoint(tmp_path / "model", ran)
    (model / "model.safetensors").rename(model / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"lacks model\.safetensors"):
        load_weights(decoder(), HFCheckpointer(str(model)), CPU, seed=0)
    for weights in (b"pickle", b"index"):
        (model / "model.safetensors").write_bytes(pickle.dumps([Payload(ran), weights]))
        with pytest.raises(ValueError, match="is damaged or cut off"):
            load_weights(decoder(), HFCheckpointer(str(model)), CPU, seed=0)
    component = {
        "_component_": "torchtune.training.FullModelHFCheckpointer",
        "checkpoint_dir": str(model),
        "checkpoint_files": ["pytorch_model.bin"],
        "model_type": "LLAMA3",
    }
    theirs = open_checkpointer(
        component, decoder(), tiny_tokenizer(), seed=0, output_dir=str(tmp_path / "out")
    )
    with pytest.raises(Exception, match="Unable to load checkpoint"):
        theirs.load_checkpoint()


def test_a_chat_template_cannot_leave_its_sandbox(ran: Path) -> None:
    import jinja2

    with pytest.raises(jinja2.exceptions.SecurityError):
        render(jinja(ran), [])


def test_what_a_checkpoint_says_of_itself_is_not_run(ran: Path, tmp_path: Path) -> None:
    """As a component, or as the name of one."""
    model = planted_checkpoint(tmp_path / "model", ran)
    (tmp_path / "theirs.py").write_text(code(ran))
    _, config_class = ready_made_recipes()["sample_responses"]
    values = {"input": "a.jsonl", "output": "b.jsonl", "device": "cpu", "dtype": "fp32"}
    for component in (
        {"_component_": "os.mkdir", "path": str(ran)},
        {"_component_": "theirs.Template"},
        {"_component_": "steerlm2.data.extra_id_template.__globals__.os.mkdir", "path": str(ran)},
    ):
        facts = {"kind": "language model", "template": component, "trained": {"base": component}}
        (model / FACTS_FILE).write_text(json.dumps(facts))
        with pytest.raises(ValueError, match="what a checkpoint names isn't run"):
            load_config(config_class, values | {"checkpointer": {"checkpoint_dir": str(model)}})


# Data


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv", "d.parquet", "d.jsonl.gz", "d.pkl"])
def test_a_pickle_in_place_of_data_is_not_run(name: str, ran: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(Payload(ran)))
    nothing_runs(lambda: list(chat_data(tmp_path / name)))


def test_expressions_in_data_are_text(ran: Path, tmp_path: Path) -> None:
    """Cells of tables may spell lists in Python; of an expression nothing is computed."""
    expression = f"__import__('os').mkdir({str(ran)!r})"
    row = {"messages": f"[{{'role': 'user', 'content': {expression}}}]"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    nothing_runs(lambda: list(chat_data(tmp_path / "a.jsonl")))
    row = {"prompt": expression, "response": jinja(ran), "label": tagged(ran)}
    (tmp_path / "b.jsonl").write_text(json.dumps(row) + "\n")
    nothing_runs(lambda: list(chat_data(tmp_path / "b.jsonl")))
    nothing_runs(lambda: list(read_records(tmp_path / "b.jsonl")))


def test_a_loading_script_beside_data_is_not_run(ran: Path, tmp_path: Path) -> None:
    """As data sets of the Hub once had them."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"prompt": "Hi.", "response": "Hello."}\n')
    for name in ("theirs.py", "dataset.py", "__init__.py"):
        (folder / name).write_text(code(ran))
    assert len(list(chat_data(folder))) == 1


# Files of runs


def test_files_of_a_run_are_not_run(
    ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """run.json, metrics, the lock, config.yaml, records of stages, settings of outputs, which hold
    a pickle, YAML, or a component."""
    monkeypatch.setattr(lock, "SECONDS_PER_BEAT", 0.05)
    component = {"_component_": "os.mkdir", "path": str(ran)}
    contents = (
        pickle.dumps(Payload(ran)),
        tagged(ran).encode(),
        json.dumps(component).encode(),
        json.dumps([component]).encode(),
        json.dumps({"step": 1, "launch": component, "schema": component, "seed": 0}).encode(),
        jinja(ran).encode(),
        b"[" * 100_000,
    )
    for number, content in enumerate(contents):
        run = tmp_path / str(number)
        (run / "state").mkdir(parents=True)
        data = run / "out.jsonl"
        names = (RUN_FILE, ".run.lock", "config.yaml")
        for name in (*names, "metrics.jsonl", "state/sft.json", settings_file(data).name, data):
            (run / name).write_bytes(content)
        (run / "in.jsonl").touch()
        output = ResumableOutput(data, input_file=run / "in.jsonl", settings={}, slice_size=1)
        for read in (
            lambda run=run: write_run(run, {"config": {}}),
            lambda run=run: JsonLines(run / "metrics.jsonl").keep_until(5),
            lambda run=run: RunLock(run).release(),
            lambda run=run: PipelineState(run).read("sft"),
            lambda data=data: schema_of_data(data),
            output.check,
        ):
            nothing_runs(read)


# What a run writes into a folder that others have made


def write_resumable(folder: Path) -> None:
    (folder / "in.jsonl").touch()
    output = folder / "out.jsonl"
    ResumableOutput(output, input_file=folder / "in.jsonl", settings={}, slice_size=1).begin(3)


def write_card_of_evaluation(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    add_evaluation(folder, {})


def write_log(folder: Path) -> None:
    with contextlib.closing(log_file(folder / "rank_000.log")) as file:
        file.emit(logging.makeLogRecord({"msg": "a line"}))


WRITERS: dict[str, Callable[[Path], object]] = {
    "metrics.jsonl": lambda folder: JsonLines(folder / "metrics.jsonl").append({"step": 1}),
    "training_curves.png": lambda folder: plot_curves([], ["loss"], folder / "training_curves.png"),
    "rank_000.log": write_log,
    "out.jsonl.partial": write_resumable,
    "steering.json": lambda folder: write_report({}, folder),
    "steering.md": lambda folder: write_report({}, folder),
    "steering.html": lambda folder: write_report({}, folder),
    "README.md": write_card_of_evaluation,
    "model.safetensors": lambda folder: write_safetensors(
        {"a": torch.ones(2)}, folder / "model.safetensors"
    ),
    "sft.log": lambda folder: run_command("true", folder / "sft.log", sys.stdout.fileno()),
}
"""A run's files that aren't made anew -> what writes them."""


@pytest.mark.parametrize("name", WRITERS)
def test_a_run_writes_through_no_link(name: str, tmp_path: Path) -> None:
    """Whoever made the folder would choose a file of the user's that is overwritten."""
    mine, folder = tmp_path / "mine", tmp_path / "run"
    mine.write_text("<!-- evaluation --><!-- end of evaluation -->")
    before = mine.read_bytes()
    folder.mkdir()
    (folder / name).symlink_to(mine)
    with contextlib.suppress(ValueError):
        WRITERS[name](folder)
    assert mine.read_bytes() == before
