"""Log-probs of given responses: log P(y|x), log Q'(y|a,x) and log P(a|x,y) into a SteerLM2 file.

    tune run score_responses --config tiny/score_responses input=groups.jsonl output=scored.jsonl
    tune run --nproc_per_node 8 score_responses --config llama3_1/8B_score_responses \\
        input=groups.jsonl output=scored.jsonl quantities=[log_q]

One run uses one checkpoint. log P(y|x) belongs to the SFT model and its prompt has no label;
log Q'(y|a,x) belongs to the attribute-conditioned model that sampled the responses; log P(a|x,y)
follows from attribute scores that the records carry. A run fills the `quantities` it is asked for
and keeps the rest, so two runs with two checkpoints complete a file.

The log-probs come from the trainer's own packed code path. A run that was stopped continues where
it was, on any number of processes; the output is in input order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from steerlm2.attributes import (
    AttributeSchema,
    as_schema,
    label_log_probs,
    parse_label,
)
from steerlm2.data.packing import Group
from steerlm2.data.records import Record, Response, json_line, read_records, record_to_json
from steerlm2.datasets import SteerLM2Dataset, tokenize_records
from steerlm2.training.checkpoint import (
    check_context,
    check_vocabulary,
    load_weights,
    open_checkpointer,
)
from steerlm2.training.config import Component, instantiate, recipe_main, to_plain
from steerlm2.training.distributed import DTYPES, close_world, init_world, parallelize
from steerlm2.training.forward import score_groups
from steerlm2.training.resumable import ResumableOutput

Quantity = Literal["log_p_attributes", "log_p_response", "log_q"]

SETTINGS_THAT_CHANGE_SCORES = (
    "input",
    "quantities",
    "tokenizer",
    "template",
    "model",
    "checkpointer",
    "seed",
    "dtype",
    "max_seq_len",
    "concentration",
    "bins",
    "schema",
)


@dataclass
class ScoreConfig:
    """Every key of the recipe, with its default."""

    input: str
    output: str
    tokenizer: Component
    model: Component
    quantities: list[Quantity] = field(default_factory=lambda: ["log_p_response", "log_q"])
    template: Component = field(
        default_factory=lambda: Component(_component_="steerlm2.data.templates.extra_id_template")
    )
    checkpointer: Component | None = None  # none: fresh weights from the seed
    max_seq_len: int = 4096  # tokens of a prompt with one response; longer ones are left out
    max_tokens_per_microbatch: int = 4096
    records_per_write: int = 128  # a stopped run repeats at most so many
    concentration: float = 24.0  # of the Beta rule for log P(a|x,y)
    bins: Literal["midpoint", "uniform"] = "midpoint"
    schema: dict[str, Any] | None = None  # names, min_value and max_value; none: the default ones

    seed: int = 0
    device: Literal["cpu", "cuda"] = "cuda"
    dtype: Literal["fp32", "bf16"] = "bf16"
    compile: bool = False
    tensor_parallel_dim: int = 1
    data_parallel_replicate_dim: int = 1
    data_parallel_shard_dim: int = -1
    fsdp_cpu_offload: bool = False
    fsdp_reshard_after_forward: bool = True

    def problems(self) -> list[str]:
        """What is wrong between keys that are right by themselves."""
        found = [
            f"'{name}' must be at least 1, got {getattr(self, name)}"
            for name in ("max_seq_len", "max_tokens_per_microbatch", "records_per_write")
            if getattr(self, name) < 1
        ]
        if self.fsdp_cpu_offload and self.device == "cpu":
            found.append("'fsdp_cpu_offload' needs 'device: cuda'")
        if not self.quantities:
            found.append("'quantities' is empty: name at least one of log_p_attributes, "
                         "log_p_response, log_q")  # fmt: skip
        if Path(self.input).absolute() == Path(self.output).absolute():
            found.append("'output' must be another file than 'input'")
        if Path(self.output).suffix == ".gz":
            found.append("'output' can't be compressed: it is appended to; give a .jsonl name")
        return found


class ScoreRecipe:
    """The run: setup -> score."""

    def __init__(self, cfg: ScoreConfig) -> None:
        self.cfg = cfg
        plain = to_plain(cfg)
        self.output = ResumableOutput(
            cfg.output,
            input_file=cfg.input,
            settings={key: plain[key] for key in SETTINGS_THAT_CHANGE_SCORES},
            slice_size=cfg.records_per_write,
        )
        self.world = init_world(
            cfg.device,
            tensor_parallel_dim=cfg.tensor_parallel_dim,
            data_parallel_replicate_dim=cfg.data_parallel_replicate_dim,
            data_parallel_shard_dim=cfg.data_parallel_shard_dim,
            needs_mesh=cfg.fsdp_cpu_offload,
        )

    def setup(self) -> None:
        cfg, world = self.cfg, self.world
        world.on_main(self.output.check)
        records = read_records(cfg.input, require=())
        if "log_p_attributes" in cfg.quantities:
            schema = as_schema(cfg.schema)
            records = score_attributes(records, cfg.input, cfg.concentration, cfg.bins, schema)
        tokenizer = instantiate(cfg.tokenizer)
        template = instantiate(cfg.template)
        self.data: SteerLM2Dataset = tokenize_records(
            records, tokenizer, template, cfg.max_seq_len, cfg.input
        )
        self.done = world.from_main(world.on_main(lambda: self.output.begin(len(self.data))) or 0)
        if self.done == len(self.data):
            return

        dtype = DTYPES[cfg.dtype]
        with torch.device("meta"):
            self.model = instantiate(cfg.model).to(dtype)
        check_vocabulary(self.model, tokenizer)
        check_context(self.model, self.data.longest())
        checkpointer = world.on_main(
            lambda: open_checkpointer(
                cfg.checkpointer,
                self.model,
                tokenizer,
                seed=cfg.seed,
                output_dir="",
            )
        )
        parallelize(
            self.model,
            world,
            dtype=dtype,
            compile=cfg.compile,
            reshard_after_forward=cfg.fsdp_reshard_after_forward,
            cpu_offload=cfg.fsdp_cpu_offload,
        )
        load_weights(
            self.model, checkpointer, world, seed=cfg.seed, cpu_offload=cfg.fsdp_cpu_offload
        )
        self.model.eval()

    def score(self) -> None:
        """Score and append a slice of the groups at a time; rename the file when it is complete."""
        cfg, world = self.cfg, self.world
        groups = self.data.groups
        inputs: dict[str, list[Group]] = {}
        if "log_p_response" in cfg.quantities:
            inputs["log_p_response"] = self.data.without_label()
        if "log_q" in cfg.quantities:
            inputs["log_q"] = groups
        bar = tqdm(total=len(groups), initial=self.done, disable=not world.is_main, unit="group")
        for start in range(self.done, len(groups), cfg.records_per_write):
            chosen = slice(start, start + cfg.records_per_write)
            scores = {
                name: score_groups(
                    self.model,
                    prompts_and_responses[chosen],
                    world,
                    max_tokens_per_microbatch=cfg.max_tokens_per_microbatch,
                )
                for name, prompts_and_responses in inputs.items()
            }
            if world.is_main:
                self.output.append(
                    json_line(record_to_json(scored_record(self.data.records, group, new_values)))
                    for i, group in enumerate(groups[chosen])
                    for new_values in [{name: values[i] for name, values in scores.items()}]
                )
            bar.update(len(groups[chosen]))
        bar.close()
        if world.is_main:
            self.output.finish()
            tqdm.write(f"{cfg.output}: {self.data.summary()}")
        close_world()


def score_attributes(
    records: Sequence[Record],
    source: str,
    concentration: float,
    bins: str,
    schema: AttributeSchema,
) -> list[Record]:
    """Records with log P(a|x,y) = sum over the label's attributes, from their `scores`.

    Raises:
        ValueError: naming the records without a label, or with responses that lack a score.
    """
    problems, scored = [], []
    for number, record in enumerate(records, start=1):
        label = parse_label(record.label) if record.label is not None else {}
        lacking = sorted(
            {name for r in record.responses for name in label if name not in (r.scores or {})}
        )
        if not label or lacking:
            reason = f"no score for {', '.join(lacking)}" if lacking else "no label"
            problems.append(f"{source}, record {number}: {reason}")
            continue
        scores = [r.scores or {} for r in record.responses]
        log_probs = label_log_probs(scores, label, concentration, bins, schema)
        responses = [
            dataclasses.replace(response, log_p_attributes=log_p)
            for response, log_p in zip(record.responses, log_probs, strict=True)
        ]
        scored.append(dataclasses.replace(record, responses=responses))
    if problems:
        more = [f"... and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise ValueError(
            "log_p_attributes needs a label, and `scores` of every response for its attributes:\n"
            + "\n".join(problems[:10] + more)
        )
    return scored


def scored_record(
    records: Sequence[Record], group: Group, new_values: dict[str, list[float]]
) -> Record:
    """The group's record with its new log-probs, without the responses that were too long."""
    record = records[group.index]
    responses: list[Response] = []
    for place, n in enumerate(group.responses_kept):
        response = dataclasses.replace(record.responses[n])
        for name, log_probs in new_values.items():
            setattr(response, name, log_probs[place])
        responses.append(response)
    return dataclasses.replace(record, responses=responses)


@recipe_main(ScoreConfig)
def main(cfg: ScoreConfig) -> None:
    recipe = ScoreRecipe(cfg)
    recipe.setup()
    recipe.score()


if __name__ == "__main__":
    main()
