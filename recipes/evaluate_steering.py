"""Requested against obtained attributes, for one model or several side by side.

    tune run evaluate_steering --config tiny/evaluate_steering prompts=prompts.jsonl \\
        label.kind=uniform label.attributes=[humor,verbosity] label.labels_per_prompt=5 \\
        models.acsft.checkpointer._component_=steerlm2.checkpoints.HFCheckpointer \\
        models.acsft.checkpointer.checkpoint_dir=steerlm2_outputs/tiny_acsft
    tune run evaluate_steering --config tiny/evaluate_steering models.acsft.answers=answers.jsonl

Every model answers the same prompts with the same labels and random numbers: a checkpoint, here, on
any number of processes that each hold the whole model, or a vLLM server. A model without labels
(use_labels: false) is asked without them, and compared with them all the same. Answers that there
are already, SteerLM2 records, may stand beside.

What was obtained says an attribute model, or a function where an attribute can be computed from the
text; otherwise the `scores` in the file do. Where the true P(y|a,x) is known, `exact_kl` compares
each checkpoint with it.

Into output_dir go steering.json, steering.md and steering.html, and the answers: answers/NAME.jsonl
as they were sampled, and with `scores` scored/NAME.jsonl, or scored_exactly/NAME.jsonl where the
function scored them; examples.jsonl has a few requests and each model's answer to them. No sampled
answer is left out unless it is empty: those that were cut off are scored as they are, and counted.
A run that was stopped continues where it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torchtune.modules import TransformerDecoder
from torchtune.training.metric_logging import WandBLogger
from tqdm import tqdm

from steerlm2.attributes import NOT_LABELLED, as_schema, parse_label
from steerlm2.checkpoint_dirs import file_digest, resolve_checkpoint_dir
from steerlm2.config.completion import MODEL, TOKENIZER, complete_schema, complete_sections
from steerlm2.config.keys import (
    ModelOptions,
    SamplingKeys,
    ServerOptions,
    at_least_one,
    settings_of,
)
from steerlm2.config.loader import Component, instantiate, to_plain
from steerlm2.data.jsonl import LineProblems, json_line
from steerlm2.data.prompts import read_prompts
from steerlm2.data.records import (
    BROKEN,
    OTHER_TOKENS,
    UNKNOWN_TOKENS,
    Record,
    count_flaws,
    is_blank,
    read_records,
    record_to_json,
    write_records,
)
from steerlm2.data.templates import Template, groups_for_scoring, token_ids_digest
from steerlm2.data.tokenizers import Tokenizer
from steerlm2.distributed.parallelize import DTYPES, free_memory
from steerlm2.evaluation.agreement import (
    cross_talk,
    errors_by_request,
    standard_error,
    steering_curve,
    steering_metrics,
)
from steerlm2.evaluation.exact_kl import model_scorer
from steerlm2.evaluation.examples import choose_examples, request_of
from steerlm2.evaluation.report import (
    SteeringResult,
    log_to_wandb,
    markdown_table,
    metric_rows,
    write_report,
)
from steerlm2.evaluation.texts import text_metrics
from steerlm2.inference.answers import (
    Item,
    answer_of,
    fitting_requests,
    load_whole_decoder,
    open_server,
    sample_everywhere,
    sampling_settings,
    with_labels,
)
from steerlm2.inference.attribute_model import AttributeModel, load_attribute_model
from steerlm2.inference.engines import Engine, Sample
from steerlm2.inference.local import LocalEngine
from steerlm2.inference.server_client import ClassifyClient
from steerlm2.runs.entry import recipe_main
from steerlm2.runs.hangs import LONG, HangWatch
from steerlm2.runs.logs import progress_bar
from steerlm2.runs.output import check_shared, make_output_dir
from steerlm2.runs.processes import join_processes
from steerlm2.runs.record import check_metric_logger, open_logger
from steerlm2.runs.resumable import ResumableOutput

SETTINGS_THAT_CHANGE_ANSWERS = (
    *("label", "max_prompts", "n", "temperature", "top_p", "max_new_tokens", "max_seq_len"),
    *("schema", "seed", "dtype"),
)
SETTINGS_THAT_CHANGE_SCORES = ("schema", "max_seq_len", "dtype")

STANDARD_ERROR = "steering_mae_se"
FLAWS = {
    "not_utf8": BROKEN,
    "encoded_otherwise": OTHER_TOKENS,
    "unknown_tokens": UNKNOWN_TOKENS,
}
"""Metric -> what makes an answer another one than was sampled; the metric counts them."""
NOT_COMPARED = {STANDARD_ERROR, "answers", "left_out", "exact_least_steering_mae", *FLAWS}

EMPTY, TOO_LONG = "empty_answers", "prompt_too_long"
"""Keys of a record in answers/: its number of empty answers, and whether its prompt is too long."""


@dataclass(kw_only=True)
class AnsweringOptions(ModelOptions):
    """A model under `models:`, with one of checkpointer, server and answers."""

    server: ServerOptions | None = None
    """A vLLM server that samples."""
    answers: str | None = None
    """SteerLM2 records with answers that there are already."""
    use_labels: bool = True
    """Show the labels to the model; false: it is asked without, and compared with them."""


@dataclass(kw_only=True)
class AttributeModelOptions(ModelOptions):
    """The `attribute_model:` section, with one of checkpointer and server."""

    server: ServerOptions | None = None
    """A vLLM server that scores, started with --runner pooling."""


@dataclass(kw_only=True)
class EvaluateConfig(SamplingKeys):
    """The keys of evaluate_steering."""

    output_dir: str
    """Folder of the report, the answers and the logs."""
    models: dict[str, AnsweringOptions] = field(default_factory=dict)
    """The models by the names that the report gives them."""
    baseline: str | None = None
    """The model that the others are compared with."""
    checkpointer: Component | None = None
    """Not here: each of `models` has its own."""
    prompts: str | None = None
    """Conversations or SteerLM2 records, for their prompts, which the models answer; null where all
    of them have `answers`."""
    exact_scorer: Component | None = None
    """Function that gives a text's scores by attribute."""
    attribute_model: AttributeModelOptions | None = None
    """What scores where there is no `exact_scorer`; without either the answers have `scores`."""
    exact_kl: Component | None = None
    """Compares checkpoints with the true P(y|a,x), e.g. steerlm2.evaluation.grammar_metrics."""
    metric_logger: Component | None = None
    """torchtune's metric loggers (W&B, TensorBoard, ...), which get the report."""
    max_tokens_per_microbatch: int = 4096
    """Tokens that a rank computes at a time, of the attribute model and of `exact_kl`."""

    @classmethod
    def complete(cls, values: dict[str, Any]) -> list[str]:
        models = values.get("models")
        named = models.items() if isinstance(models, dict) else ()
        sections = {f"models.{name}": section for name, section in named}
        scorer = values.get("attribute_model")
        found = list(complete_sections(values, sections | {"attribute_model": scorer}))
        if isinstance(scorer, dict):
            found += complete_schema(values, scorer, "equal", "attribute_model.")
        if not any(_is_loaded(section) for section in (*sections.values(), scorer)):
            # Nothing is built of them.
            values.setdefault("tokenizer", {"_component_": TOKENIZER, "path": ""})
            values.setdefault("model", {"_component_": MODEL})
        for key, section in sections.items():
            if isinstance(section, dict) and section.get("use_labels", True):
                found += complete_schema(values, section, "any", f"{key}.")
        return found

    def sampled(self) -> dict[str, AnsweringOptions]:
        """The models that are sampled, not those with given answers."""
        return {name: model for name, model in self.models.items() if model.answers is None}

    def problems(self) -> list[str]:
        found = super().problems()
        found += at_least_one(self, "max_tokens_per_microbatch")
        if self.checkpointer is not None:
            found.append("'checkpointer' is a model's own: set models.NAME.checkpointer")
        if self.baseline is not None and self.baseline not in self.models:
            found.append(f"'baseline' must be one of 'models' ({', '.join(self.models)}), got "
                         f"{self.baseline}")  # fmt: skip
        found += self._model_problems()
        found += self._scorer_problems()
        if self.sampled() and self.prompts is None:
            found.append("'prompts' is missing: the file of what the models are asked")
        if self.sampled() and self.label.kind == "none":
            found.append("'label.kind' none asks for nothing; a model without labels has "
                         "use_labels=false")  # fmt: skip
        return found

    def _model_problems(self) -> Iterator[str]:
        for name, options in self.models.items():
            if re.fullmatch(r"[\w-][\w.-]*", name) is None:
                yield f"'models.{name}': letters, digits, '_', '-' and '.' make a name"
            if one := _not_one_of(options, "checkpointer", "server", "answers"):
                yield f"'models.{name}' {one}"
            if options.server is not None:
                yield from options.server.problems(f"models.{name}.server")

    def _scorer_problems(self) -> Iterator[str]:
        scorer = self.attribute_model
        if scorer is not None and self.exact_scorer is not None:
            yield "'exact_scorer' and 'attribute_model' are both given: set one of them to null"
        if scorer is not None and (one := _not_one_of(scorer, "checkpointer", "server")):
            yield f"'attribute_model' {one}"
        if scorer is not None and scorer.server is not None:
            yield from scorer.server.problems("attribute_model.server")
        if scorer is None and self.exact_scorer is None and self.sampled():
            yield (
                f"nothing scores the answers of {', '.join(self.sampled())}: add "
                "'attribute_model' or 'exact_scorer'"
            )
        if self.exact_kl is not None and not any(m.checkpointer for m in self.models.values()):
            yield "'exact_kl' is of models with a 'checkpointer': there is none"


def _is_loaded(section: Any) -> bool:
    """Whether a section of a config, not checked yet, has anything but answers."""
    return isinstance(section, dict) and not section.get("answers")


def _not_one_of(options: object, *keys: str) -> str | None:
    given = [key for key in keys if getattr(options, key) is not None]
    if len(given) == 1:
        return None
    return f"needs one of {', '.join(keys)}, got {' and '.join(given) or 'none'}"


class EvaluateRecipe:
    """The run: setup -> sample -> score -> report."""

    def __init__(self, cfg: EvaluateConfig) -> None:
        if not cfg.models:
            raise ValueError(
                "'models' is empty: add models.NAME.checkpointer, models.NAME.server.url or "
                "models.NAME.answers=FILE"
            )
        self.cfg = cfg
        self.schema = as_schema(cfg.schema)
        self.output_dir = Path(cfg.output_dir)
        checkpointers = [model.checkpointer for model in cfg.models.values()]
        if cfg.attribute_model is not None:
            checkpointers.append(cfg.attribute_model.checkpointer)
        # Where servers compute there need be no GPU.
        device = cfg.device if any(checkpointers) else "cpu"
        self.world = join_processes(cfg, self.output_dir, device=device)
        self.watch = HangWatch(self.world, cfg.hang_timeout_seconds)
        self.exact_metrics: dict[str, dict[str, float]] = {}

    def setup(self) -> None:
        """Check the inputs and the models before the sampling begins."""
        cfg, world = self.cfg, self.world
        self.watch.at("reading the prompts", patience=LONG)
        world.on_main(lambda: make_output_dir(self.output_dir))
        check_shared(self.output_dir, world)
        world.on_main(lambda: check_metric_logger(cfg.metric_logger))
        self.logger = world.on_main(lambda: cfg.metric_logger and open_logger(cfg.metric_logger))
        self.files = {
            name: Path(model.answers or self.output_dir / "answers" / f"{name}.jsonl")
            for name, model in cfg.models.items()
        }
        self.items = self._items(cfg.prompts) if cfg.prompts and cfg.sampled() else []
        self.outputs = {name: self._answers_output(name) for name in cfg.sampled()}
        for output in self.outputs.values():
            world.on_main(output.check)
        world.on_main(lambda: [self._records(file) for file in self._given_answers()])

    def sample(self) -> None:
        """Sample the answers of the models, one after the other."""
        for name, options in self.cfg.sampled().items():
            self._sample(name, options)
            free_memory()

    def _sample(self, name: str, options: AnsweringOptions) -> None:
        cfg, world, output = self.cfg, self.world, self.outputs[name]
        done = world.computed_on_main(lambda: output.begin(len(self.items)))
        tokenizer = instantiate(options.tokenizer or cfg.tokenizer)
        template = instantiate(options.template or cfg.template)
        decoder = None
        if options.checkpointer and (cfg.exact_kl or done < len(self.items)):
            decoder = self._decoder(name, options, tokenizer)
            if cfg.exact_kl:
                self.watch.at(f"{name}, exact_kl", patience=LONG)
                self.exact_metrics[name] = instantiate(
                    cfg.exact_kl,
                    model_scorer(
                        decoder, world, max_tokens_per_microbatch=cfg.max_tokens_per_microbatch
                    ),
                    tokenizer,
                    template,
                    show_labels=options.use_labels,
                )
        if done == len(self.items):
            return
        engine = self._engine(name, options, decoder, tokenizer, template)
        waiting = LONG if decoder is None else 1.0  # a server's progress isn't seen from here
        bar = progress_bar(world, len(self.items), done, unit="group", text=f"{name} answers")
        for start in range(done, len(self.items), cfg.records_per_write):
            chosen = self.items[start : start + cfg.records_per_write]
            patience = LONG if start == done else waiting
            self.watch.at(f"{name}, answers to group {start + 1}", patience=patience)
            requests = fitting_requests(
                chosen,
                template,
                tokenizer,
                max_new_tokens=cfg.max_new_tokens,
                max_seq_len=cfg.max_seq_len,
                show_labels=options.use_labels,
            )
            samples = sample_everywhere(engine, requests, world)
            if world.is_main:
                output.append(
                    json_line(record_to_json(answered(item, samples.get(i), template, tokenizer)))
                    for i, item in enumerate(chosen)
                )
            bar.update(len(chosen))
        bar.close()
        engine.close()
        world.on_main(output.finish)

    def score(self) -> None:
        """Add `scores` to the answers of all models, unless they have stored ones."""
        cfg, world = self.cfg, self.world
        world.barrier()  # the files of answers are there
        for name, file in self.files.items():
            self.watch.at(f"{name}, scores", patience=LONG)
            if cfg.exact_scorer is not None:
                # Scored again in every run, because the function may have been edited.
                self.files[name] = self.output_dir / "scored_exactly" / f"{name}.jsonl"
                world.on_main(functools.partial(self._count, file, self.files[name]))
            elif cfg.attribute_model is not None:
                self.files[name] = self.output_dir / "scored" / f"{name}.jsonl"
                self._score(name, file, cfg.attribute_model)

    def _score(self, name: str, file: Path, options: AttributeModelOptions) -> None:
        cfg, world = self.cfg, self.world
        output = self._scores_output(name, file, options)
        world.on_main(output.check)
        records = self._records(file)
        done = world.computed_on_main(lambda: output.begin(len(records)))
        waiting = LONG if options.server is not None else 1.0
        bar = progress_bar(world, len(records), done, unit="group", text=f"{name} scores")
        for start in range(done, len(records), cfg.records_per_write):
            chosen = records[start : start + cfg.records_per_write]
            patience = LONG if start == done else waiting
            self.watch.at(f"{name}, scores of group {start + 1}", patience=patience)
            scored = self._scored(chosen)
            if world.is_main:
                output.append(json_line(record_to_json(record)) for record in scored)
            bar.update(len(chosen))
        bar.close()
        world.on_main(output.finish)

    def report(self) -> None:
        """Write the report; print its first table."""
        if self.world.is_main:
            records = {name: self._records(file) for name, file in self.files.items()}
            results = self._results(records)
            write_report(results, self.output_dir, choose_examples(records))
            tqdm.write(f"{markdown_table(metric_rows(results))}\n")
            tqdm.write(f"report: {self.output_dir}/steering.html")
            if self.logger:
                self.logger.log_config(OmegaConf.create(to_plain(self.cfg)))
                for name, result in results.items():
                    metrics = {f"{name}/{key}": value for key, value in result.metrics.items()}
                    self.logger.log_dict(metrics, step=0)
                if isinstance(self.logger, WandBLogger):
                    log_to_wandb(results)
                self.logger.close()

    # Helpers

    def _items(self, source: str) -> list[Item]:
        """The prompts with the requested labels."""
        cfg = self.cfg
        prompts = read_prompts(source, cfg.max_prompts)
        return with_labels(prompts, cfg.label, self.schema, seed=cfg.seed, source=source)

    def _given_answers(self) -> list[Path]:
        return [Path(m.answers) for m in self.cfg.models.values() if m.answers is not None]

    def _answers_output(self, name: str) -> ResumableOutput:
        cfg, options = self.cfg, self.cfg.models[name]
        settings = settings_of(cfg, SETTINGS_THAT_CHANGE_ANSWERS)
        settings |= self._model_settings(f"models.{name}", options)
        settings["use_labels"] = options.use_labels
        if cfg.label.file is not None:
            settings["labels_sha256"] = file_digest(cfg.label.file)
        return ResumableOutput(
            self.files[name],
            input_file=str(cfg.prompts),
            settings=settings,
            slice_size=cfg.records_per_write,
        )

    def _scores_output(
        self, name: str, answers: Path, options: AttributeModelOptions
    ) -> ResumableOutput:
        settings = settings_of(self.cfg, SETTINGS_THAT_CHANGE_SCORES)
        return ResumableOutput(
            self.files[name],
            input_file=answers,
            settings=settings | self._model_settings("attribute_model", options),
            slice_size=self.cfg.records_per_write,
        )

    def _model_settings(
        self, where: str, options: AnsweringOptions | AttributeModelOptions
    ) -> dict[str, Any]:
        """The settings that identify a model, so that lines of two models aren't mixed in one file.

        A stopped run may continue with the same model at another server.

        Raises:
            FileNotFoundError: where there is no checkpoint.
        """
        cfg = self.cfg
        if options.checkpointer is not None and "checkpoint_dir" in options.checkpointer:
            with error_context(where):
                resolve_checkpoint_dir(options.checkpointer["checkpoint_dir"])
        return {
            "model": options.model or cfg.model,
            "tokenizer": options.tokenizer or cfg.tokenizer,
            "template": options.template or cfg.template,
            "server": options.server and {"model": options.server.model},
            "checkpointer": options.checkpointer,
        }

    def _decoder(
        self, name: str, options: AnsweringOptions, tokenizer: Tokenizer
    ) -> TransformerDecoder:
        cfg = self.cfg
        self.watch.at(f"{name}, loading the model", patience=LONG)
        with error_context(f"models.{name}"):
            decoder = load_whole_decoder(
                options.model or cfg.model,
                options.checkpointer,
                tokenizer,
                self.world,
                dtype=DTYPES[cfg.dtype],
                max_seq_len=cfg.max_seq_len,
                seed=cfg.seed,
                compile=cfg.compile,
            )
        self.watch.follow(decoder, alike=False)
        return decoder

    def _engine(
        self,
        name: str,
        options: AnsweringOptions,
        decoder: TransformerDecoder | None,
        tokenizer: Tokenizer,
        template: Template,
    ) -> Engine:
        cfg = self.cfg
        settings = sampling_settings(
            template,
            tokenizer,
            decoder.tok_embeddings.num_embeddings if decoder is not None else 0,
            n=cfg.n,
            temperature=cfg.temperature,
            top_p=cfg.top_p,
            max_new_tokens=cfg.max_new_tokens,
        )
        if decoder is not None:
            return LocalEngine(decoder, settings, max_cache_tokens=cfg.max_cache_tokens)
        assert options.server is not None
        # Every process asks for its share.
        concurrency = max(1, options.server.concurrency // self.world.size)
        server = dataclasses.replace(options.server, concurrency=concurrency)
        with error_context(f"models.{name}"):
            return open_server(server, settings, tokenizer, cfg.max_seq_len)

    def _records(self, file: Path) -> list[Record]:
        """A file of answers.

        Raises:
            ValueError: naming the records whose labels don't ask for attributes of the schema, or
                whose answers lack scores where nothing else scores them.
        """
        cfg = self.cfg
        records = read_records(file, require=(), min_responses=0)
        stored = cfg.exact_scorer is None and cfg.attribute_model is None
        problems = LineProblems(file, numbered=", record ")
        for number, record in enumerate(records, start=1):
            try:
                parse_label(record.label or "", self.schema)
                for response in record.responses if stored else []:
                    self._check_scores(response.scores or {})
            except ValueError as error:
                problems.add(number, error)
        problems.raise_if_any()
        if not any(record.responses for record in records):
            raise ValueError(f"{file} has no answers")
        return records

    def _check_scores(self, scores: dict[str, float]) -> None:
        if lacking := [name for name in self.schema.names if name not in scores]:
            raise ValueError(
                f"a response has no score for {', '.join(lacking)}: give an attribute_model or an "
                "exact_scorer, or set schema.names"
            )
        if not all(math.isfinite(scores[name]) for name in self.schema.names):
            raise ValueError(f"the scores of a response are not finite: {scores}")

    def _count(self, answers: Path, scored: Path) -> None:
        """A file of answers with the exact scorer's `scores`."""
        scorer, found = self.cfg.exact_scorer, []
        assert scorer is not None
        for record in self._records(answers):
            scores = [instantiate(scorer, answer.value) for answer in record.responses]
            for own in scores:
                self._check_scores(own)
            found.append(with_scores(record, scores))
        write_records(scored, found)

    def _scored(self, records: Sequence[Record]) -> list[Record]:
        """The records with scores of the attribute model."""
        tokenizer, template = self._attribute_tokens
        texts = [[answer.value for answer in record.responses] for record in records]
        groups = [
            group
            for record, own in zip(records, texts, strict=True)
            if own
            for group in groups_for_scoring(
                template,
                tokenizer,
                record.system,
                record.prompt_turns,
                own,
                max_seq_len=self.cfg.max_seq_len,
            )[0]
        ]
        model = self._attribute_model
        if isinstance(model, ClassifyClient):
            tokens = [[*group.prompt, *text] for group in groups for text in group.responses]
            rows = iter(self.world.on_main(lambda: model.classify(tokens)) or [])
            if not self.world.is_main:
                return []
        else:
            rows = (row for group in model.score(groups) for row in group)
        scored = []
        for record, own in zip(records, texts, strict=True):
            scores = [dict(zip(self.schema.names, next(rows), strict=True)) for _ in own]
            for each in scores:
                self._check_scores(each)
            scored.append(with_scores(record, scores))
        return scored

    @functools.cached_property
    def _attribute_tokens(self) -> tuple[Tokenizer, Template]:
        cfg, options = self.cfg, self.cfg.attribute_model
        assert options is not None
        tokenizer = instantiate(options.tokenizer or cfg.tokenizer)
        return tokenizer, instantiate(options.template or cfg.template)

    @functools.cached_property
    def _attribute_model(self) -> AttributeModel | ClassifyClient:
        """The attribute model, loaded or connected at the first use."""
        cfg, options = self.cfg, self.cfg.attribute_model
        assert options is not None
        tokenizer, template = self._attribute_tokens
        with error_context("attribute_model"):
            if options.server is not None:
                client = ClassifyClient(attributes=self.schema.names, **vars(options.server))
                self.world.on_main(lambda: client.connect(cfg.max_seq_len))
                return client
            self.watch.at("loading the attribute model", patience=LONG)
            model = load_attribute_model(
                options.model or cfg.model,
                options.checkpointer,
                tokenizer,
                template,
                self.schema,
                self.world,
                max_seq_len=cfg.max_seq_len,
                max_tokens_per_microbatch=cfg.max_tokens_per_microbatch,
                dtype=DTYPES[cfg.dtype],
                seed=cfg.seed,
                compile=cfg.compile,
            )
            self.watch.follow(model.decoder)
            return model

    def _results(self, records: dict[str, list[Record]]) -> dict[str, SteeringResult]:
        """The results of every model, in the order of the config, compared with the baseline."""
        cfg = self.cfg
        results = {name: self._result(name, own) for name, own in records.items()}
        if cfg.baseline is None:
            return results
        theirs = results[cfg.baseline].metrics
        for name, result in results.items():
            if name == cfg.baseline:
                continue
            result.baseline = cfg.baseline
            result.change = {
                key: value - theirs[key]
                for key, value in result.metrics.items()
                if key in theirs and key not in NOT_COMPARED
            }
            # Paired differences over the same requests vary less than either error.
            if [*map(request_of, records[name])] == [*map(request_of, records[cfg.baseline])]:
                ours, base = self._errors(records[name]), self._errors(records[cfg.baseline])
                both = [ours[i] - base[i] for i in ours.keys() & base.keys()]
                if len(both) > 1:
                    change = {"steering_mae": result.change.pop("steering_mae")}
                    result.change = change | {STANDARD_ERROR: standard_error(both)} | result.change
        return results

    def _result(self, name: str, records: list[Record]) -> SteeringResult:
        answers = [answer for record in records for answer in record.responses]
        scores_NA, requested_NA, _ = self._scores_and_requests(records)
        metrics = steering_metrics(scores_NA, requested_NA, self.schema)
        errors = list(self._errors(records).values())
        if len(errors) > 1:
            error = {"steering_mae": metrics.pop("steering_mae")}
            metrics = error | {STANDARD_ERROR: standard_error(errors)} | metrics
        metrics |= self.exact_metrics.get(name, {})
        metrics |= text_metrics([answer.value for answer in answers])
        metrics["answers"] = len(answers)
        ended = [answer for answer in answers if answer.finish_reason is not None]
        if ended:
            empty = sum(record.extra.get(EMPTY, 0) for record in records)
            metrics["truncated"] = sum(answer.is_cut_off for answer in ended) / len(ended)
            metrics["empty"] = empty / (len(answers) + empty)
        flaws = count_flaws(answers)
        metrics |= {name: flaws[cause] for name, cause in FLAWS.items() if flaws[cause]}
        if left_out := sum(record.extra.get(TOO_LONG, False) for record in records):
            metrics["left_out"] = left_out
        return SteeringResult(
            metrics,
            steering_curve(scores_NA, requested_NA, self.schema),
            cross_talk(scores_NA, requested_NA, self.schema),
            sees_labels=self.cfg.models[name].use_labels,
        )

    def _errors(self, records: list[Record]) -> dict[int, float]:
        return errors_by_request(*self._scores_and_requests(records), self.schema)

    def _scores_and_requests(
        self, records: list[Record]
    ) -> tuple[list[list[float]], list[list[float]], list[int]]:
        """Each answer's scores [N, A], requested values [N, A] and index of its record [N]."""
        names = self.schema.names
        scores_NA, requested_NA, index_N = [], [], []
        for index, record in enumerate(records):
            wanted = parse_label(str(record.label), self.schema)
            for answer in record.responses:
                scores = answer.scores or {}
                scores_NA.append([float(scores[name]) for name in names])
                requested_NA.append([float(wanted.get(name, NOT_LABELLED)) for name in names])
                index_N.append(index)
        return scores_NA, requested_NA, index_N


def answered(
    item: Item, samples: Sequence[Sample] | None, template: Template, tokenizer: Tokenizer
) -> Record:
    """A record with the answers that have text; None stands for a prompt that is too long."""
    extra = dict(item.prompt.extra)
    answers = [answer_of(sample, template, tokenizer) for sample in samples or []]
    if samples is None:
        extra[TOO_LONG] = True
    if empty := sum(is_blank(answer.value) for answer in answers):
        extra[EMPTY] = empty
    kept = [answer for answer in answers if not is_blank(answer.value)]
    digest = token_ids_digest(template, tokenizer) if any(a.token_ids for a in kept) else None
    return Record(item.prompt.system, item.prompt.turns, item.label, kept, extra, digest)


def with_scores(record: Record, scores: Sequence[dict[str, float]]) -> Record:
    answers = [
        dataclasses.replace(answer, scores=own)
        for answer, own in zip(record.responses, scores, strict=True)
    ]
    return dataclasses.replace(record, responses=answers)


@contextlib.contextmanager
def error_context(where: str) -> Iterator[None]:
    """Add the part of the config that an error comes from to its message."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"{where}: {error}") from error


@recipe_main(EvaluateConfig)
def main(cfg: EvaluateConfig) -> None:
    recipe = EvaluateRecipe(cfg)
    with recipe.watch:
        recipe.setup()
        recipe.sample()
        recipe.score()
    recipe.report()


if __name__ == "__main__":
    main()
