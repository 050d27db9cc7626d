"""Log-probs of given responses: log P(y|x), log Q'(y|a,x) and log P(a|x,y) into a SteerLM2 file.

    tune run score_responses --config tiny/score_responses input=groups.jsonl output=scored.jsonl
    tune run --nproc_per_node 8 score_responses --config llama3_1/8B_score_responses \\
        input=groups.jsonl output=scored.jsonl

log P(y|x) belongs to the SFT model and its prompt has no label; log Q'(y|a,x) belongs to the
attribute-conditioned model that sampled the responses; log P(a|x,y) belongs to the attribute model,
or follows from attribute scores that the records carry. One run fills the `quantities` it is asked
for and keeps the rest. Models are loaded in turn: each passes over the file and hands it to the
next.

Where responses carry the "engine_log_q" of what sampled them, the run ends with how far it lies
from our log Q': a line, and OUTPUT.engine_log_q.json.

A sampled response is scored as the "token_ids" that were sampled, where template and tokenizer are
those of the sampling. Responses that aren't what was sampled are left out and counted
(`steerlm2.datasets.ResponseEncoder` has the rule).

The log-probs come from the trainer's own packed code path. A run that was stopped continues where
it was, on any number of processes; the output is in input order.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from steerlm2.attributes import (
    AttributeSchema,
    as_schema,
    label_log_probs,
    parse_label,
)
from steerlm2.config.completion import complete_model, complete_schema, complete_sections
from steerlm2.config.keys import (
    ModelOptions,
    ScoringKeys,
    at_least_one,
    output_problems,
    settings_of,
)
from steerlm2.config.loader import instantiate
from steerlm2.data.jsonl import LineProblems, json_line, shortened
from steerlm2.data.packing import Group
from steerlm2.data.records import (
    Record,
    Response,
    causes_text,
    count_flaws,
    iter_records,
    read_records,
    record_to_json,
)
from steerlm2.data.settings import settings_file
from steerlm2.data.templates import Template, groups_for_scoring
from steerlm2.data.tokenizers import Tokenizer
from steerlm2.datasets import ResponseEncoder, tokenize_records
from steerlm2.distributed.parallelize import DTYPES, free_memory
from steerlm2.files import write_durably
from steerlm2.inference.answer_scores import with_scores
from steerlm2.inference.attribute_model import AttributeModel, load_attribute_model
from steerlm2.inference.language_model import LanguageModel, load_language_model
from steerlm2.runs.entry import recipe_main
from steerlm2.runs.hangs import LONG, HangWatch
from steerlm2.runs.logs import tell
from steerlm2.runs.processes import join_processes
from steerlm2.runs.resumable import ResumableOutput, remaining_slices

Quantity = Literal["log_p_attributes", "log_p_response", "log_q"]
QUANTITIES: tuple[Quantity, ...] = typing.get_args(Quantity)

ENGINE_TOLERANCE = 0.05
"""The largest accepted mean difference of an engine's log Q' from ours, in nats a token; the
default of the trainer's check, steerlm2.log_q_tolerance. A choice: errors of logits rounded to
bfloat16 (at most 0.06 nats for a logit of 16) have both signs and mostly cancel in the mean over
tokens; another template, tokenizer, checkpoint or temperature changes most log-probs by more. A
smaller value would find smaller mistakes, but could refuse sound data of a less precise engine."""

SETTINGS_THAT_CHANGE_SCORES = (
    "quantities",
    "tokenizer",
    "template",
    "model",
    "checkpointer",
    "log_p_response",
    "log_q",
    "log_p_attributes",
    "seed",
    "dtype",
    "max_seq_len",
    "min_responses",
    "concentration",
    "bins",
    "schema",
)


@dataclass(kw_only=True)
class ScoreConfig(ScoringKeys):
    """The keys of score_responses."""

    input: str
    """SteerLM2 records, .jsonl or .jsonl.gz."""
    output: str
    """The same with log-probs, to be written, .jsonl."""
    quantities: list[Quantity] = field(default_factory=lambda: ["log_p_response", "log_q"])
    """Log-probs to compute, in nats: log_p_response is log P(y|x), log_q is log Q'(y|a,x),
    log_p_attributes is log P(a|x,y)."""
    log_p_response: ModelOptions | None = None
    """The SFT model; null: `checkpointer` is its."""
    log_q: ModelOptions | None = None
    """The attribute-conditioned model that sampled the responses; null: `checkpointer` is its."""
    log_p_attributes: ModelOptions | None = None
    """The attribute model; null: the responses have `scores`."""
    min_responses: int = 2
    """Of a group; one with fewer is left out. Training needs two; 1: to score single answers."""
    max_seq_len: int = 4096
    """Tokens of a prompt with one response; longer responses are left out. A text that an attribute
    model scores loses its beginning."""

    @classmethod
    def complete(cls, values: dict[str, Any]) -> list[str]:
        sections: dict[str, Any] = {name: values.get(name) for name in QUANTITIES}
        whole = dict(values)  # what a section doesn't say isn't the other model's
        found = [*complete_model(whole), *complete_sections(values, sections)]
        values |= whole
        scorer = values.get("log_p_attributes")
        if isinstance(scorer, dict):
            found += complete_schema(values, scorer, "equal", "log_p_attributes.")
        return [*found, *complete_schema(values, values, "any")]

    def problems(self) -> list[str]:
        found = super().problems()
        found += at_least_one(self, "max_seq_len", "min_responses")
        if not self.quantities:
            found.append("'quantities' is empty: name at least one of log_p_attributes, "
                         "log_p_response, log_q")  # fmt: skip
        sections = {name: getattr(self, name) for name in QUANTITIES}
        found += [
            f"'{name}' says how to score what 'quantities' doesn't ask for: add it there, or "
            f"remove the section (~{name})"
            for name, section in sections.items()
            if section is not None and name not in self.quantities
        ]
        if self.log_p_attributes is not None and self.log_p_attributes.checkpointer is None:
            found.append("'log_p_attributes' needs a 'checkpointer': an attribute model's")
        found += output_problems(self.input, self.output)
        return found


class Stage(NamedTuple):
    """A pass over the file with one model, or with none."""

    quantities: list[Quantity]
    scorer: ModelOptions


class EngineGap(NamedTuple):
    """The difference between an engine's log Q' of a response and ours."""

    nats: float
    tokens: int


class ScoreRecipe:
    """The run: one stage after the other, each from a file to a file."""

    def __init__(self, cfg: ScoreConfig) -> None:
        self.cfg = cfg
        self.schema = as_schema(cfg.schema)
        self.stages = stages_of(cfg)
        self.world = join_processes(cfg, Path(cfg.output).parent)
        self.watch = HangWatch(self.world, cfg.hang_timeout_seconds)

    def score(self) -> None:
        """Score all quantities, and remove the stages' intermediate files at the end."""
        cfg, world = self.cfg, self.world
        *handed_on, last = [
            f"{cfg.output}.{'+'.join(stage.quantities)}" for stage in self.stages[:-1]
        ] + [cfg.output]
        world.on_main(self._output(last).check)
        source = cfg.input
        for stage, target in zip(self.stages, [*handed_on, last], strict=True):
            if target != last and world.from_main(Path(last).exists()):
                continue  # a complete output exists
            self.watch.at("reading the groups", patience=LONG)
            output = self._output(target)
            world.on_main(output.check)
            if "log_p_attributes" in stage.quantities and stage.scorer.checkpointer:
                self._score_attributes(stage, source, output)
            else:
                self._score_log_probs(stage, source, output)
            free_memory()
            world.barrier()
            source = target
        if world.is_main:
            for file in handed_on:
                for path in (Path(file), settings_file(file)):
                    path.unlink(missing_ok=True)

    def _score_log_probs(self, stage: Stage, source: str, output: ResumableOutput) -> None:
        """log P(y|x) and log Q'(y|a,x) of a model, and log P(a|x,y) from stored scores."""
        cfg, world = self.cfg, self.world
        records = read_records(source, require=(), min_responses=cfg.min_responses)
        if "log_p_attributes" in stage.quantities:
            records = with_log_p_attributes(
                records, source, cfg.concentration, cfg.bins, self.schema
            )
        tokenizer = instantiate(stage.scorer.tokenizer or cfg.tokenizer)
        template = instantiate(stage.scorer.template or cfg.template)
        data = tokenize_records(
            records,
            tokenizer,
            template,
            cfg.max_seq_len,
            source,
            min_responses=cfg.min_responses,
        )
        groups = data.groups
        done = world.computed_on_main(lambda: output.begin(len(groups)))
        inputs: dict[str, list[Group]] = {}
        if "log_p_response" in stage.quantities:
            inputs["log_p_response"] = data.without_label()
        if "log_q" in stage.quantities:
            inputs["log_q"] = groups
        model = None
        if done < len(groups) and inputs:
            model = self._language_model(stage.scorer, tokenizer, template, data.longest())

        starts, text = range(done, len(groups), cfg.records_per_write), ", ".join(stage.quantities)
        for start, chosen in remaining_slices(groups, starts, self.watch, text=text):
            rows = slice(start, start + len(chosen))
            scores = {
                name: model.score(prompts_and_responses[rows])
                for name, prompts_and_responses in inputs.items()
                if model is not None
            }
            if world.is_main:
                output.append(
                    json_line(record_to_json(scored_record(data.records, group, new_values)))
                    for i, group in enumerate(chosen)
                    for new_values in [{name: values[i] for name, values in scores.items()}]
                )
        if world.is_main:
            output.finish()
            tell(f"{output.path}: {data.summary()}")

    def _score_attributes(self, stage: Stage, source: str, output: ResumableOutput) -> None:
        """`scores` of an attribute model, and log P(a|x,y) from them."""
        cfg, world = self.cfg, self.world
        records = read_records(source, require=(), min_responses=cfg.min_responses)
        check_labels(records, source, self.schema)
        done = world.computed_on_main(lambda: output.begin(len(records)))
        num_cut = 0
        model = self._attribute_model(stage.scorer) if done < len(records) else None
        starts, text = range(done, len(records), cfg.records_per_write), ", ".join(stage.quantities)
        for _, chosen in remaining_slices(records, starts, self.watch, text=text):
            assert model is not None
            encoded = [
                groups_for_scoring(
                    model.template,
                    model.tokenizer,
                    record.system,
                    record.prompt_turns,
                    [response.value for response in record.responses],
                    cfg.max_seq_len,
                )
                for record in chosen
            ]
            num_cut += sum(cut for _, cut in encoded)
            scores = model.score([group for groups, _ in encoded for group in groups])
            rows = (row for group in scores for row in group)
            names = self.schema.names
            scored = [
                with_scores(
                    record, [dict(zip(names, next(rows), strict=True)) for _ in record.responses]
                )
                for record in chosen
            ]
            scored = with_log_p_attributes(scored, source, cfg.concentration, cfg.bins, self.schema)
            if world.is_main:
                output.append(json_line(record_to_json(record)) for record in scored)
        if world.is_main:
            output.finish()
            flaws = count_flaws(response for record in records for response in record.responses)
            tell(
                f"{output.path}: {len(records)} groups (texts cut at the beginning, being too "
                f"long: {num_cut}; responses: {causes_text(flaws)})"
            )

    def compare_with_engine(self) -> None:
        """Compare `engine_log_q` with log Q' over the complete output, also of earlier runs."""
        cfg = self.cfg
        if "log_q" not in cfg.quantities or not self.world.is_main:
            return
        scorer = cfg.log_q or ModelOptions()
        tokenizer = instantiate(scorer.tokenizer or cfg.tokenizer)
        encoder = ResponseEncoder(instantiate(scorer.template or cfg.template), tokenizer)
        gaps: list[EngineGap] = []
        num_unknown = 0
        for record in iter_records(cfg.output, require=("log_q",), min_responses=1):
            for response in record.responses:
                if response.log_q is None:
                    continue
                engines = response.extra.get("engine_log_q")
                if isinstance(engines, int | float) and math.isfinite(engines):
                    length = len(encoder.encode(record, response)[0])
                    gaps.append(EngineGap(abs(response.log_q - engines), length))
                elif "engine_log_q" in response.extra or (
                    response.token_ids is not None and not response.is_cut_off
                ):
                    num_unknown += 1
        if num_unknown:
            tell(
                f"the engine's log Q' is unknown of {num_unknown} responses (a server that gives "
                "no log-probs, or none that are numbers): these aren't compared with ours"
            )
        if not gaps:
            return
        summary = summary_of(gaps)
        file = Path(f"{cfg.output}.engine_log_q.json")
        write_durably(file, json.dumps(summary, indent=2) + "\n")
        tell(
            f"the engine's log Q' differs from ours, over {len(gaps)} responses, by "
            + "; ".join(
                ", ".join(f"{name} {value:.3g}" for name, value in summary[unit].items())
                + f" nats a {unit.removeprefix('per_')}"
                for unit in ("per_sequence", "per_token")
            )
            + f" ({file})"
        )
        if summary["per_token"]["mean"] > ENGINE_TOLERANCE:
            tell(
                f"WARNING: that is more than {ENGINE_TOLERANCE} nats a token: the engine had "
                "another checkpoint, template or tokenizer, or gave tempered log-probs. Was "
                f"{cfg.input} sampled from the model that scored log Q' here?"
            )

    # Helpers

    def _output(self, path: str) -> ResumableOutput:
        return ResumableOutput(
            path,
            input_file=self.cfg.input,
            settings=settings_of(self.cfg, SETTINGS_THAT_CHANGE_SCORES),
            slice_size=self.cfg.records_per_write,
        )

    def _language_model(
        self, scorer: ModelOptions, tokenizer: Tokenizer, template: Template, longest: int
    ) -> LanguageModel:
        cfg = self.cfg
        self.watch.at("loading the model", patience=LONG)
        model = load_language_model(
            scorer.model or cfg.model,
            scorer.checkpointer or cfg.checkpointer,
            tokenizer,
            template,
            self.world,
            cfg,
            max_seq_len=longest,
            max_tokens_per_microbatch=cfg.max_tokens_per_microbatch,
        )
        self.watch.follow(model.decoder)
        return model

    def _attribute_model(self, scorer: ModelOptions) -> AttributeModel:
        cfg = self.cfg
        self.watch.at("loading the attribute model", patience=LONG)
        model = load_attribute_model(
            scorer.model or cfg.model,
            scorer.checkpointer,
            instantiate(scorer.tokenizer or cfg.tokenizer),
            instantiate(scorer.template or cfg.template),
            self.schema,
            self.world,
            max_seq_len=cfg.max_seq_len,
            max_tokens_per_microbatch=cfg.max_tokens_per_microbatch,
            dtype=DTYPES[cfg.dtype],
            seed=cfg.seed,
            compile=cfg.compile,
            reshard_after_forward=cfg.fsdp_reshard_after_forward,
            cpu_offload=cfg.fsdp_cpu_offload,
        )
        self.watch.follow(model.decoder)
        return model


def stages_of(cfg: ScoreConfig) -> list[Stage]:
    """The passes over the file: quantities of one model share one."""
    stages: list[Stage] = []
    for quantity in QUANTITIES:
        if quantity not in cfg.quantities:
            continue
        scorer = getattr(cfg, quantity) or ModelOptions()
        if stages and stages[-1].scorer == scorer:
            stages[-1].quantities.append(quantity)
        else:
            stages.append(Stage([quantity], scorer))
    return stages


def summary_of(gaps: Sequence[EngineGap]) -> dict[str, Any]:
    """The number of responses, and statistics of their differences by sequence and by token."""
    return {
        "responses": len(gaps),
        "per_sequence": _spread(gap.nats for gap in gaps),
        "per_token": _spread(gap.nats / gap.tokens for gap in gaps),
    }


def _spread(values: Iterable[float]) -> dict[str, float]:
    values_N = torch.tensor(list(values), dtype=torch.float64)
    median, p99 = (values_N.quantile(q).item() for q in (0.5, 0.99))
    return {"mean": values_N.mean().item(), "median": median, "p99": p99,
            "max": values_N.max().item()}  # fmt: skip


def check_labels(records: Sequence[Record], source: str, schema: AttributeSchema) -> None:
    """Check that every record has a label of the schema.

    Raises:
        ValueError: naming the records without one.
    """
    problems = LineProblems(source, numbered=", record ")
    for number, record in enumerate(records, start=1):
        try:
            if record.label is None:
                raise ValueError("no label, which log_p_attributes needs")
            parse_label(record.label, schema)
        except ValueError as error:
            problems.add(number, error)
    problems.raise_if_any()


def with_log_p_attributes(
    records: Sequence[Record],
    source: str,
    concentration: float,
    bins: str,
    schema: AttributeSchema,
) -> list[Record]:
    """Records with log P(a|x,y) = sum over the label's attributes, from their `scores`.

    Raises:
        ValueError: naming the records without a label of the schema, or with responses that lack a
            score.
    """
    problems, scored = [], []
    for number, record in enumerate(records, start=1):
        try:
            label = parse_label(record.label, schema) if record.label is not None else {}
        except ValueError as error:
            problems.append(f"{source}, record {number}: {error}")
            continue
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
        raise ValueError(
            "log_p_attributes needs a label, and `scores` of every response for its attributes:\n"
            + "\n".join(shortened(problems))
        )
    return scored


def scored_record(
    records: Sequence[Record], group: Group, new_values: dict[str, list[float]]
) -> Record:
    """The group's record with its new log-probs, without the responses that were too long."""
    record = records[group.index]
    responses: list[Response] = []
    for i, n in enumerate(group.responses_kept):
        response = dataclasses.replace(record.responses[n])
        for name, log_probs in new_values.items():
            setattr(response, name, log_probs[i])
        responses.append(response)
    sampling = record.sampling
    if sampling is not None and (lost := len(record.responses) - len(responses)):
        left_out = dict(sampling.left_out)
        left_out["not_scored"] = left_out.get("not_scored", 0) + lost
        sampling = dataclasses.replace(sampling, left_out=left_out)
    return dataclasses.replace(record, responses=responses, sampling=sampling)


@recipe_main(ScoreConfig)
def main(cfg: ScoreConfig) -> None:
    recipe = ScoreRecipe(cfg)
    with recipe.watch:
        recipe.score()
    recipe.compare_with_engine()


if __name__ == "__main__":
    main()
