"""Labels from an attribute model: for the turns of conversations, or the responses of groups.

    tune run annotate_attributes --config tiny/annotate_attributes \\
        input=conversations.jsonl output=labelled.jsonl
    tune run annotate_attributes --config tiny/annotate_attributes \\
        input=groups.jsonl output=scored.jsonl server.url=http://127.0.0.1:8000

Of a folder that prepare_data wrote, both files are labelled.

What the input is, its first line tells:

    conversations     every Assistant turn with a "label" gets a new one, of all attributes: the
                      scores, clipped to the range and rounded, or (labels: sampled) values drawn
                      from P(a|x,y), the Beta rule of the scores
    SteerLM2 records  every response gets its `scores`, as they are, and log P(a|x,y) by the Beta
                      rule (HelpSteer2 paper, section 4.5) where the record has a label; no label
                      is written, whatever `labels` says

Fine-tuning on labels drawn from P(a|x,y) has just the P(y|a,x) for its target that SteerLM 2.0 aims
at, P(y|x) P(a|x,y) / P(a|x); rounded labels have a sharper one. A drawn label follows from the
seed, the index of its record and of its turn, and the scores: neither from slices nor from the
number of processes.

A response is scored in its conversation so far, in which no label shows. Nothing else of the input
changes. The scores come from a checkpoint, on any number of processes, or from a vLLM server.

A run that was stopped continues where it was; the output is in input order.
"""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from steerlm2.attributes import (
    AttributeSchema,
    as_schema,
    draw_label,
    label_log_probs,
    label_of_scores,
    parse_label,
)
from steerlm2.config.completion import SchemaRule
from steerlm2.config.keys import (
    ScoringKeys,
    ServerOptions,
    at_least_one,
    output_problems,
    settings_of,
)
from steerlm2.config.loader import instantiate
from steerlm2.data.conversations import parse_conversation
from steerlm2.data.jsonl import LineProblems, iter_json_lines, json_line
from steerlm2.data.packing import RewardGroup
from steerlm2.data.records import (
    ASSISTANT,
    LOG_PROB_KEYS,
    Turn,
    causes_text,
    count_flaws,
    parse_record,
)
from steerlm2.data.templates import groups_for_scoring
from steerlm2.distributed.parallelize import DTYPES
from steerlm2.inference.attribute_model import load_attribute_model
from steerlm2.inference.server_client import ClassifyClient
from steerlm2.runs.entry import recipe_main
from steerlm2.runs.hangs import LONG, HangWatch
from steerlm2.runs.logs import tell
from steerlm2.runs.processes import join_processes, process_beside_server
from steerlm2.runs.resumable import ResumableOutput, remaining_slices

SETTINGS_THAT_CHANGE_SCORES = (
    "turns",
    "labels",
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

PREPARED = ("train.jsonl", "val.jsonl")
"""The files of a folder of prepare_data."""


@dataclass(kw_only=True)
class AnnotateConfig(ScoringKeys):
    """The keys of annotate_attributes."""

    input: str
    """Conversations or SteerLM2 records, .jsonl or .jsonl.gz; or a folder of prepare_data: its
    train.jsonl and val.jsonl."""
    output: str
    """The same with labels or scores, to be written, .jsonl; of a folder, a folder."""
    server: ServerOptions | None = None
    """A vLLM server that scores, started with --runner pooling, instead of the checkpoint."""
    turns: Literal["with_label", "all"] = "with_label"
    """Assistant turns to label: those that have a "label", whatever it is, or all."""
    labels: Literal["rounded", "sampled"] = "rounded"
    """What becomes a label: the rounded scores, or values drawn from P(a|x,y) with `seed`."""
    max_seq_len: int = 4096
    """Tokens of a response with its conversation; a longer text loses its beginning."""

    SCHEMA_RULE: ClassVar[SchemaRule] = "equal"

    def problems(self) -> list[str]:
        found = super().problems()
        found += at_least_one(self, "max_seq_len")
        if self.server is not None:
            found += self.server.problems()
        found += output_problems(self.input, self.output)
        if Path(self.input).is_dir() and Path(self.output).suffix == ".jsonl":
            found.append("'output' must be a folder, as 'input' is one")
        return found

    def files(self) -> list[tuple[Path, Path]]:
        """What is read, and where it is written with its labels.

        Raises:
            FileNotFoundError: for a folder without such files.
        """
        folder, output = Path(self.input), Path(self.output)
        if not folder.is_dir():
            return [(folder, output)]
        found = [folder / name for name in PREPARED if (folder / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{folder} has neither {' nor '.join(PREPARED)}: name a file")
        return [(file, output / file.name) for file in found]


class Question(NamedTuple):
    """Responses to one conversation, to be scored."""

    system: str
    turns: list[Turn]
    responses: list[str]


class Format(Protocol):
    """The interface of input formats: responses to score in a decoded line, and labels to write."""

    def questions(self, obj: Any) -> list[Question]:
        """The responses of a line to be scored, each with its conversation.

        Raises:
            ValueError: with all problems of the line.
        """

    def annotate(self, obj: Any, scores_NA: list[list[float]], index: int) -> None:
        """Put the scores of all responses of its questions into the line.

        Args:
            index: of the record in the file, from 0.
        """

    def flaws(self, obj: Any) -> Counter[str]:
        """What makes responses of a valid line others than were sampled (`count_flaws`)."""


@dataclass
class Job:
    """A file with its output."""

    input: Path
    output: ResumableOutput
    num_records: int = 0
    kind: str = ""
    """Its format (`kind_of`)."""
    flaws: Counter[str] = field(default_factory=Counter)
    done: int = 0
    """Records of an earlier run."""


class AnnotateRecipe:
    """The run: setup -> annotate."""

    def __init__(self, cfg: AnnotateConfig) -> None:
        self.cfg = cfg
        self.schema = as_schema(cfg.schema)
        self.client: ClassifyClient | None = None
        self.files = cfg.files()
        if cfg.server is None:
            self.world = join_processes(cfg, self.files[0][1].parent)
        else:
            self.world = process_beside_server()
            self.client = ClassifyClient(attributes=self.schema.names, **vars(cfg.server))
        self.watch = HangWatch(self.world, cfg.hang_timeout_seconds)

    def setup(self) -> None:
        cfg, world = self.cfg, self.world
        self.watch.at("reading the input", patience=LONG)
        self.jobs = [Job(source, self._output(source, target)) for source, target in self.files]
        for job in self.jobs:
            world.on_main(job.output.check)
            check = functools.partial(self._check_input, job.input)
            job.num_records, job.kind, job.flaws = world.computed_on_main(check)
        self.tokenizer = instantiate(cfg.tokenizer)
        self.template = instantiate(cfg.template)
        for job in self.jobs:
            begin = functools.partial(job.output.begin, job.num_records)
            job.done = world.computed_on_main(begin)
        if all(job.done == job.num_records for job in self.jobs):
            return
        if self.client is not None:
            self.client.connect(cfg.max_seq_len)
            return
        self.watch.at("loading the model", patience=LONG)
        self.model = load_attribute_model(
            cfg.model,
            cfg.checkpointer,
            self.tokenizer,
            self.template,
            self.schema,
            world,
            max_seq_len=cfg.max_seq_len,
            max_tokens_per_microbatch=cfg.max_tokens_per_microbatch,
            dtype=DTYPES[cfg.dtype],
            seed=cfg.seed,
            compile=cfg.compile,
            reshard_after_forward=cfg.fsdp_reshard_after_forward,
            cpu_offload=cfg.fsdp_cpu_offload,
        )
        self.watch.follow(self.model.decoder)

    def annotate(self) -> None:
        """Score and append a slice of the lines at a time; rename a file when it is complete."""
        for job in self.jobs:
            self._annotate_file(job)

    def _annotate_file(self, job: Job) -> None:
        cfg, world, labelling = self.cfg, self.world, self._format(job.kind)
        num_texts, num_cut = 0, 0
        starts = range(job.done, job.num_records, cfg.records_per_write)
        lines = _lines(job.input)
        for start, chosen in remaining_slices(lines, starts, self.watch, unit="record"):
            groups: list[list[RewardGroup]] = []
            for _, obj in chosen:
                encoded = [self._encode(question) for question in labelling.questions(obj)]
                groups.append([group for own, _ in encoded for group in own])
                num_cut += sum(cut for _, cut in encoded)
            scores = iter(self._score([group for own in groups for group in own]))
            pairs = enumerate(zip(chosen, groups, strict=True), start=start)
            for index, ((_, obj), own) in pairs:
                scores_NA = [row for _ in own for row in next(scores)]
                labelling.annotate(obj, scores_NA, index)
                num_texts += len(scores_NA)
            if world.is_main:
                job.output.append(json_line(obj) for _, obj in chosen)
        if world.is_main:
            job.output.finish()
            flaws = f"; of the responses: {causes_text(job.flaws)}" if job.flaws else ""
            earlier = f"; {job.done} records are of an earlier run" if job.done else ""
            tell(
                f"{job.output.path}: {job.num_records} records, {num_texts} texts scored (cut at "
                f"the beginning, being too long: {num_cut} texts{earlier}){flaws}"
            )

    # Helpers

    def _output(self, source: Path, target: Path) -> ResumableOutput:
        cfg, settings = self.cfg, settings_of(self.cfg, SETTINGS_THAT_CHANGE_SCORES)
        # A stopped run may continue with the same model at another server.
        settings["server"] = cfg.server and {"model": cfg.server.model}
        return ResumableOutput(
            target, input_file=source, settings=settings, slice_size=cfg.records_per_write
        )

    def _check_input(self, source: Path) -> tuple[int, str, Counter[str]]:
        """The number of records, their format and flaws of responses, after a check of all of them.

        Raises:
            ValueError: naming every bad line (the first 10), or for an input with nothing to score.
        """
        kind = ""
        num_records, num_texts = 0, 0
        flaws: Counter[str] = Counter()
        problems = LineProblems(source)
        for line_number, obj in iter_json_lines(source, problems):
            num_records += 1
            try:
                kind = kind or kind_of(obj)
                questions = self._format(kind).questions(obj)
            except ValueError as error:
                problems.add(line_number, error)
            else:
                num_texts += sum(len(question.responses) for question in questions)
                flaws.update(self._format(kind).flaws(obj))
        problems.raise_if_any()
        if num_records == 0:
            raise ValueError(f"{source} holds no records: the file is empty")
        if num_texts == 0:
            raise ValueError(
                f"{source}: no Assistant turn of its {num_records} conversations has a 'label' "
                "to be filled; turns=all labels those without one too"
            )
        return num_records, kind, flaws

    def _format(self, kind: str) -> Format:
        cfg = self.cfg
        if kind == "conversations":
            return ConversationFormat(
                self.schema, cfg.turns, cfg.labels, cfg.seed, cfg.concentration, cfg.bins
            )
        return GroupFormat(self.schema, cfg.concentration, cfg.bins)

    def _encode(self, question: Question) -> tuple[list[RewardGroup], int]:
        """The tokenised responses of a question, and how many of them were cut."""
        return groups_for_scoring(
            self.template, self.tokenizer, *question, max_seq_len=self.cfg.max_seq_len
        )

    def _score(self, groups: list[RewardGroup]) -> list[list[list[float]]]:
        """[group][response][attribute] scores of tokenised responses."""
        if self.client is None:
            return self.model.score(groups)
        texts = [[*group.prompt, *response] for group in groups for response in group.responses]
        scores = iter(self.client.classify(texts))
        return [[next(scores) for _ in group.responses] for group in groups]


def _lines(source: Path) -> Iterator[tuple[int, Any]]:
    problems = LineProblems(source)
    yield from iter_json_lines(source, problems)
    problems.raise_if_any()


def kind_of(obj: Any) -> str:
    """The key that tells one format from the other, "conversations" or "responses".

    Raises:
        ValueError: where there is neither.
    """
    kinds = [key for key in ("conversations", "responses") if isinstance(obj, dict) and key in obj]
    if not kinds:
        raise ValueError(
            "neither a conversation (with 'conversations') nor a SteerLM2 record (with 'responses')"
        )
    return kinds[0]


@dataclass
class ConversationFormat:
    """Assistant turns get labels."""

    schema: AttributeSchema
    which: Literal["with_label", "all"]
    labels: Literal["rounded", "sampled"]
    seed: int
    concentration: float
    bins: Literal["midpoint", "uniform"]

    def questions(self, obj: Any) -> list[Question]:
        conversation = parse_conversation(self._without_labels(obj))
        labelled = [i for i, item in enumerate(obj["conversations"]) if self._is_labelled(item)]
        turns = conversation.turns
        return [Question(conversation.system, turns[:i], [turns[i].value]) for i in labelled]

    def annotate(self, obj: Any, scores_NA: list[list[float]], index: int) -> None:
        items = obj["conversations"]
        labelled = [i for i, item in enumerate(items) if self._is_labelled(item)]
        for i, scores in zip(labelled, scores_NA, strict=True):
            items[i]["label"] = self._label(scores, f"labels:{self.seed}:{index}:{i}")

    def flaws(self, obj: Any) -> Counter[str]:
        return Counter()

    def _label(self, scores: list[float], seed: str) -> str:
        if self.labels == "rounded":
            return label_of_scores(scores, self.schema)
        rng = random.Random(seed)
        return draw_label(scores, rng, self.concentration, self.bins, self.schema)

    def _is_labelled(self, item: dict[str, Any]) -> bool:
        return item["from"] == ASSISTANT and (self.which == "all" or "label" in item)

    def _without_labels(self, obj: Any) -> Any:
        """Ignore the labels that turns have, which are replaced."""
        items = obj.get("conversations") if isinstance(obj, dict) else None
        if not isinstance(items, list):
            return obj
        bare = [
            item | {"label": None}
            if isinstance(item, dict) and item.get("from") == ASSISTANT
            else item
            for item in items
        ]
        return obj | {"conversations": bare}


@dataclass
class GroupFormat:
    """Responses of SteerLM2 records get scores, and log P(a|x,y) where there is a label."""

    schema: AttributeSchema
    concentration: float
    bins: Literal["midpoint", "uniform"]

    def questions(self, obj: Any) -> list[Question]:
        record = parse_record(obj, require=(), min_responses=1)
        if record.label is not None:
            parse_label(record.label, self.schema)
        responses = [response.value for response in record.responses]
        return [Question(record.system, record.prompt_turns, responses)]

    def annotate(self, obj: Any, scores_NA: list[list[float]], index: int) -> None:
        scores = [dict(zip(self.schema.names, scores_A, strict=True)) for scores_A in scores_NA]
        for response, own in zip(obj["responses"], scores, strict=True):
            response["scores"] = own
        if obj.get("label") is None:
            return
        values = parse_label(obj["label"], self.schema)
        log_probs = label_log_probs(scores, values, self.concentration, self.bins, self.schema)
        for response, log_p in zip(obj["responses"], log_probs, strict=True):
            response[LOG_PROB_KEYS["log_p_attributes"]] = log_p

    def flaws(self, obj: Any) -> Counter[str]:
        return count_flaws(parse_record(obj, require=(), min_responses=1).responses)


@recipe_main(AnnotateConfig)
def main(cfg: AnnotateConfig) -> None:
    recipe = AnnotateRecipe(cfg)
    with recipe.watch:
        recipe.setup()
        recipe.annotate()


if __name__ == "__main__":
    main()
