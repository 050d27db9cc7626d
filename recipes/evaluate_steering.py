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
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torchtune.modules import TransformerDecoder
from torchtune.training.metric_logging import WandBLogger

from steerlm2.attributes import as_schema, parse_label
from steerlm2.checkpoint_dirs import file_digest, resolve_checkpoint_dir
from steerlm2.config.completion import MODEL, TOKENIZER, complete_schema, complete_sections
from steerlm2.config.keys import (
    ModelOptions,
    SamplingKeys,
    ServerOptions,
    at_least_one,
    settings_of,
)
from steerlm2.config.loader import Component, instantiate, to_public
from steerlm2.data.jsonl import LineProblems, json_line
from steerlm2.data.prompts import read_prompts
from steerlm2.data.records import (
    Record,
    causes_text,
    is_blank,
    read_records,
    record_to_json,
    write_records,
)
from steerlm2.data.templates import Template, token_ids_digest
from steerlm2.data.tokenizers import Tokenizer
from steerlm2.datasets.sampled import left_out_of
from steerlm2.distributed.parallelize import DTYPES, free_memory
from steerlm2.evaluation.exact_kl import model_scorer
from steerlm2.evaluation.examples import choose_examples
from steerlm2.evaluation.report import (
    log_to_wandb,
    markdown_table,
    metric_rows,
    write_report,
)
from steerlm2.evaluation.steering import (
    EMPTY,
    TOO_LONG,
    compare,
    independent_metrics,
    reference_metrics,
    steering_result,
    unequal_requests,
)
from steerlm2.inference.answer_scores import (
    check_scores,
    with_attribute_scores,
    with_reference_log_probs,
    with_scores,
)
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
from steerlm2.inference.language_model import LanguageModel, load_language_model
from steerlm2.inference.local import LocalEngine
from steerlm2.inference.server_client import ClassifyClient
from steerlm2.runs.entry import recipe_main
from steerlm2.runs.hangs import LONG, HangWatch
from steerlm2.runs.logs import tell
from steerlm2.runs.output import check_shared, make_output_dir
from steerlm2.runs.processes import join_processes
from steerlm2.runs.record import check_metric_logger, log_config, open_logger
from steerlm2.runs.resumable import ResumableOutput, remaining_slices

SETTINGS_THAT_CHANGE_ANSWERS = (
    *("label", "max_prompts", "n", "temperature", "top_p", "max_new_tokens", "max_seq_len"),
    *("schema", "seed", "dtype"),
)
SETTINGS_THAT_CHANGE_SCORES = ("schema", "max_seq_len", "dtype")
NO_REFERENCE = (
    "no kl_reference: none of its answers has the log-prob that it was drawn with (a vLLM server's "
    "is known at temperature=1 top_p=1 only), or none fits into max_seq_len"
)
"""Why `reference_metrics` is empty."""
ATTRIBUTE_MODELS = ("attribute_model", "independent_attribute_model")
"""Sections."""

M = TypeVar("M")


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
    independent_attribute_model: AttributeModelOptions | None = None
    """Another attribute model of the same schema, trained on other labels: whether the answers
    please it as well, as `independent_mae`."""
    reference_model: ModelOptions | None = None
    """A language model P(y|x), such as the SFT model: how far the answers are from its own, without
    a label, as `kl_reference`; of answers whose sampler's log-probs are known."""
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
        scorers = {key: values.get(key) for key in ATTRIBUTE_MODELS}
        others = scorers | {"reference_model": values.get("reference_model")}
        found = list(complete_sections(values, sections | others))
        for key, scorer in scorers.items():
            if isinstance(scorer, dict):
                found += complete_schema(values, scorer, "equal", f"{key}.")
        if not any(_is_loaded(section) for section in (*sections.values(), *others.values())):
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
        if self.attribute_model is not None and self.exact_scorer is not None:
            yield "'exact_scorer' and 'attribute_model' are both given: set one of them to null"
        for key in ATTRIBUTE_MODELS:
            scorer = getattr(self, key)
            if scorer is not None and (one := _not_one_of(scorer, "checkpointer", "server")):
                yield f"'{key}' {one}"
            if scorer is not None and scorer.server is not None:
                yield from scorer.server.problems(f"{key}.server")
        one, other = (getattr(self, key) for key in ATTRIBUTE_MODELS)
        if one and other and (one.checkpointer, one.server) == (other.checkpointer, other.server):
            yield (
                "'independent_attribute_model' is 'attribute_model' itself: name one that was "
                "trained on other labels"
            )
        if self.reference_model is not None and self.reference_model.checkpointer is None:
            yield "'reference_model' needs a 'checkpointer': the SFT model's"
        if self.attribute_model is None and self.exact_scorer is None and self.sampled():
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
        others = (cfg.attribute_model, cfg.independent_attribute_model, cfg.reference_model)
        checkpointers = [
            section.checkpointer for section in (*cfg.models.values(), *others) if section
        ]
        # Where servers compute there need be no GPU.
        device = cfg.device if any(checkpointers) else "cpu"
        self.world = join_processes(cfg, self.output_dir, device=device)
        self.watch = HangWatch(self.world, cfg.hang_timeout_seconds)
        self.further: dict[str, dict[str, float]] = {name: {} for name in cfg.models}

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
        world.on_main(self._look_at_given_answers)

    def _look_at_given_answers(self) -> None:
        """Check them, and say of which samples the metrics won't be."""
        for name, options in self.cfg.models.items():
            if options.answers is None:
                continue
            left_out, drawn = left_out_of(self._records(Path(options.answers)))
            if count := left_out.total():
                tell(
                    f"WARNING: models.{name}: {count} of the {drawn} answers drawn to its prompts "
                    f"aren't there ({causes_text(left_out)}), and all metrics are of the others: "
                    "sample_responses keeps them with distinct=false keep_truncated=true"
                )

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
                self.further[name] |= instantiate(
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
        starts = range(done, len(self.items), cfg.records_per_write)
        for _, chosen in remaining_slices(
            self.items, starts, self.watch, text=f"{name}, answers", patience=waiting
        ):
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
        engine.close()
        world.on_main(output.finish)

    def score(self) -> None:
        """Add `scores` to the answers of all models, unless they have stored ones; then see, where
        there are models for it, at what cost the answers came to their scores."""
        cfg, world = self.cfg, self.world
        world.barrier()  # the files of answers are there
        answers = dict(self.files)
        if cfg.exact_scorer is not None:
            # Scored again in every run, because the function may have been edited.
            for name, file in answers.items():
                self.files[name] = self.output_dir / "scored_exactly" / f"{name}.jsonl"
                world.on_main(functools.partial(self._count, file, self.files[name]))
        elif cfg.attribute_model is not None:
            self.files = self._scored_by("attribute_model", cfg.attribute_model, "scored", answers)
        if (other := cfg.independent_attribute_model) is not None:
            section, folder = "independent_attribute_model", "scored_independently"
            for name, file in self._scored_by(section, other, folder, answers).items():
                if world.is_main:
                    self.further[name] |= independent_metrics(self._records(file), self.schema)
        if cfg.reference_model is not None:
            for name, file in self._compared_with(cfg.reference_model, answers).items():
                if world.is_main:
                    found = reference_metrics(self._records(file))
                    self.further[name] |= found
                    if not found:
                        tell(f"WARNING: models.{name}: {NO_REFERENCE}")

    def _scored_by(
        self, section: str, options: AttributeModelOptions, folder: str, answers: dict[str, Path]
    ) -> dict[str, Path]:
        """By model, its answers with `scores` of the attribute model in a section of the config."""
        tokenizer, template = self._tokens_of(options)

        def scored(
            model: AttributeModel | ClassifyClient, records: Sequence[Record]
        ) -> list[Record]:
            return with_attribute_scores(
                records,
                model,
                tokenizer,
                template,
                self.schema,
                self.world,
                max_seq_len=self.cfg.max_seq_len,
            )

        load = functools.partial(self._attribute_model, section, options)
        waiting = LONG if options.server is not None else 1.0
        return self._pass(section, options, folder, answers, load, scored, waiting)

    def _compared_with(self, options: ModelOptions, answers: dict[str, Path]) -> dict[str, Path]:
        """By model, its answers with log P(y|x) of the reference model."""
        load = functools.partial(self._reference_model, options)
        scored = functools.partial(with_reference_log_probs, max_seq_len=self.cfg.max_seq_len)
        return self._pass(
            "reference_model",
            options,
            "reference",
            answers,
            load,
            lambda model, records: scored(records, model),
        )

    def _pass(
        self,
        section: str,
        options: ModelOptions,
        folder: str,
        answers: dict[str, Path],
        load: Callable[[], M],
        scored: Callable[[M, Sequence[Record]], list[Record]],
        waiting: float = 1.0,
    ) -> dict[str, Path]:
        """Pass over the answers of all models with one that is loaded where there is work left."""
        cfg, world = self.cfg, self.world
        loaded = functools.cache(load)
        files = {}
        for name, file in answers.items():
            self.watch.at(f"{name}, {section}", patience=LONG)
            files[name] = self.output_dir / folder / f"{name}.jsonl"
            output = ResumableOutput(
                files[name],
                input_file=file,
                settings=settings_of(cfg, SETTINGS_THAT_CHANGE_SCORES)
                | self._model_settings(section, options),
                slice_size=cfg.records_per_write,
            )
            world.on_main(output.check)
            records = self._records(file)
            done = world.computed_on_main(functools.partial(output.begin, len(records)))
            if done < len(records):
                loaded()
            starts = range(done, len(records), cfg.records_per_write)
            for _, chosen in remaining_slices(
                records, starts, self.watch, text=f"{name}, {section}", patience=waiting
            ):
                found = scored(loaded(), chosen)
                if world.is_main:
                    output.append(json_line(record_to_json(record)) for record in found)
            world.on_main(output.finish)
        loaded.cache_clear()
        free_memory()
        world.barrier()  # the files are there
        return files

    def report(self) -> None:
        """Write the report; print its first table."""
        if self.world.is_main:
            records = {name: self._records(file) for name, file in self.files.items()}
            results = {
                name: steering_result(
                    own,
                    self.schema,
                    further=self.further[name],
                    sees_labels=self.cfg.models[name].use_labels,
                )
                for name, own in records.items()
            }
            if self.cfg.baseline is not None:
                compare(results, records, self.cfg.baseline, self.schema)
            for warning in unequal_requests(records):
                tell(warning)
            write_report(results, self.output_dir, choose_examples(records))
            tell(f"{markdown_table(metric_rows(results))}\n")
            tell(f"report: {self.output_dir}/steering.html")
            if self.logger:
                log_config(self.logger, to_public(self.cfg), self.output_dir)
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

    def _model_settings(self, where: str, options: ModelOptions) -> dict[str, Any]:
        """The settings that identify a model, so that lines of two models aren't mixed in one file.

        A stopped run may continue with the same model at another server.

        Raises:
            FileNotFoundError: where there is no checkpoint.
        """
        cfg, server = self.cfg, getattr(options, "server", None)
        if options.checkpointer is not None and "checkpoint_dir" in options.checkpointer:
            with error_context(where):
                resolve_checkpoint_dir(options.checkpointer["checkpoint_dir"])
        return {
            "model": options.model or cfg.model,
            "tokenizer": options.tokenizer or cfg.tokenizer,
            "template": options.template or cfg.template,
            "server": server and {"model": server.model},
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
                    check_scores(response.scores or {}, self.schema)
            except ValueError as error:
                problems.add(number, error)
        problems.raise_if_any()
        if not any(record.responses for record in records):
            raise ValueError(f"{file} has no answers")
        return records

    def _count(self, answers: Path, scored: Path) -> None:
        """A file of answers with the exact scorer's `scores`."""
        scorer, found = self.cfg.exact_scorer, []
        assert scorer is not None
        for record in self._records(answers):
            scores = [instantiate(scorer, answer.value) for answer in record.responses]
            for own in scores:
                check_scores(own, self.schema)
            found.append(with_scores(record, scores))
        write_records(scored, found)

    def _tokens_of(self, options: ModelOptions) -> tuple[Tokenizer, Template]:
        tokenizer = instantiate(options.tokenizer or self.cfg.tokenizer)
        return tokenizer, instantiate(options.template or self.cfg.template)

    def _attribute_model(
        self, section: str, options: AttributeModelOptions
    ) -> AttributeModel | ClassifyClient:
        cfg = self.cfg
        self.watch.at(f"loading the model of {section}", patience=LONG)
        with error_context(section):
            if options.server is not None:
                client = ClassifyClient(attributes=self.schema.names, **vars(options.server))
                self.world.on_main(lambda: client.connect(cfg.max_seq_len))
                return client
            model = load_attribute_model(
                options.model or cfg.model,
                options.checkpointer,
                *self._tokens_of(options),
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

    def _reference_model(self, options: ModelOptions) -> LanguageModel:
        cfg = self.cfg
        self.watch.at("loading the reference model", patience=LONG)
        with error_context("reference_model"):
            model = load_language_model(
                options.model or cfg.model,
                options.checkpointer,
                *self._tokens_of(options),
                self.world,
                cfg,
                max_seq_len=cfg.max_seq_len,
                max_tokens_per_microbatch=cfg.max_tokens_per_microbatch,
            )
            self.watch.follow(model.decoder)
            return model


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
