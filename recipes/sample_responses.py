"""n responses for every prompt and label from Q'(y|a,x), as SteerLM2 records.

    tune run sample_responses --config tiny/sample_responses \\
        input=conversations.jsonl output=groups.jsonl
    tune run sample_responses --config llama3_1/70B_sample_responses_vllm \\
        input=conversations.jsonl output=groups.jsonl

The prompts are those of conversations (what comes before the last answer) or of SteerLM2 records.
Their labels are their own, or one given, or drawn. A checkpoint samples with its keys and values
cached, on any number of processes that each hold the whole model, or a vLLM server does.

A record is a prompt with a label and its responses, without log-probs: recipe score_responses adds
them. Every response has a "finish_reason": "stop", or "length" where it was cut off at
max_new_tokens. Where its text encodes to the very tokens that were sampled, it has the engine's own
log Q' as "engine_log_q", untempered.

What is sampled for a prompt follows from the seed, the place of the prompt in the input, and the
number of the response: not from what is sampled beside it, nor from the number of processes. A run
that was stopped continues where it was; the output is in input order.
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

from steerlm2.attributes import as_schema, encode_label, parse_label
from steerlm2.data.prompts import (
    DrawLabel,
    Prompt,
    draw_labels,
    labels_in,
    labels_like,
    read_prompts,
    uniform_labels,
)
from steerlm2.data.records import Record, Response, json_line, record_to_json
from steerlm2.data.templates import encode_prompt, encode_response
from steerlm2.generation.engines import (
    STOP,
    Engine,
    Request,
    Sample,
    SamplingSettings,
    forbidden_ids,
    request_seed,
    response_end,
)
from steerlm2.generation.local import LocalEngine
from steerlm2.generation.openai import CompletionsEngine
from steerlm2.models.llama import unsupported_parts
from steerlm2.training.checkpoint import (
    check_context,
    check_vocabulary,
    load_weights,
    open_checkpointer,
)
from steerlm2.training.config import Component, instantiate, recipe_main, to_plain
from steerlm2.training.distributed import DTYPES, World, close_world, init_world
from steerlm2.training.resumable import ResumableOutput

SETTINGS_THAT_CHANGE_RESPONSES = (
    "label",
    "max_prompts",
    "n",
    "temperature",
    "top_p",
    "max_new_tokens",
    "min_new_tokens",
    "distinct",
    "min_responses",
    "keep_truncated",
    "tokenizer",
    "template",
    "model",
    "checkpointer",
    "schema",
    "max_seq_len",
    "seed",
    "dtype",
)


@dataclass
class LabelOptions:
    """The `label:` section."""

    kind: Literal["record", "fixed", "uniform", "empirical", "none"] = "record"
    value: str | None = None  # of kind fixed
    attributes: list[str] | None = None  # of kind uniform
    file: str | None = None  # of kind empirical: conversations or SteerLM2 records
    labels_per_prompt: int = 1  # of kinds uniform and empirical, all different


@dataclass
class ServerOptions:
    """The `server:` section."""

    url: str
    model: str | None = None  # as the server names it; none: its first one
    concurrency: int = 64  # requests at a time, each of n responses
    timeout: float = 600.0  # seconds for an answer
    retries: int = 5  # of a request, with pauses of 0.5 s, 1 s, 2 s, ...


@dataclass
class SampleConfig:
    """Every key of the recipe, with its default."""

    input: str
    output: str
    tokenizer: Component
    model: Component
    template: Component = field(
        default_factory=lambda: Component(_component_="steerlm2.data.templates.extra_id_template")
    )
    checkpointer: Component | None = None  # none: fresh weights from the seed
    server: ServerOptions | None = None  # samples instead of the checkpoint
    schema: dict[str, Any] | None = None  # names, min_value and max_value; none: the default ones
    label: LabelOptions = field(default_factory=LabelOptions)
    max_prompts: int | None = None  # the first so many; none: all

    n: int = 10  # responses of a prompt with a label
    temperature: float = 0.7
    top_p: float = 0.9
    max_new_tokens: int = 1024  # the stop token among them; a longer response is truncated
    min_new_tokens: int = 1  # shorter responses are left out
    distinct: bool = True  # of identical responses one is enough
    min_responses: int = 2  # a group with fewer distinct complete ones is left out
    keep_truncated: bool = False
    max_seq_len: int = 4096  # a prompt that leaves no room for max_new_tokens is left out
    max_cache_tokens: int = 65536  # prompts with all their responses that are sampled together
    records_per_write: int = 128  # a stopped run repeats at most so many

    seed: int = 0
    device: Literal["cpu", "cuda"] = "cuda"
    dtype: Literal["fp32", "bf16"] = "bf16"
    compile: bool = False
    tensor_parallel_dim: int = 1

    def problems(self) -> list[str]:
        """What is wrong between keys that are right by themselves."""
        positive: dict[str, float | None] = {
            name: getattr(self, name)
            for name in (
                *("max_prompts", "n", "max_new_tokens", "min_new_tokens", "min_responses"),
                *("max_seq_len", "max_cache_tokens", "records_per_write"),
            )
        }
        positive["label.labels_per_prompt"] = self.label.labels_per_prompt
        if self.server is not None:
            positive["server.concurrency"] = self.server.concurrency
        found = [
            f"'{name}' must be at least 1, got {value}"
            for name, value in positive.items()
            if value is not None and value < 1
        ]
        if self.server is not None and self.server.retries < 0:
            found.append(f"'server.retries' must be at least 0, got {self.server.retries}")
        if self.server is not None and self.server.timeout <= 0:
            found.append(f"'server.timeout' must be above 0, got {self.server.timeout}")
        if self.temperature < 0:
            found.append(f"'temperature' must be at least 0, got {self.temperature}")
        if self.temperature == 0 and self.n > 1:
            found.append("'temperature' is 0: all responses of a prompt would be the same; set n=1")
        if not 0 < self.top_p <= 1:
            found.append(f"'top_p' must be above 0 and at most 1, got {self.top_p}")
        if self.min_new_tokens > self.max_new_tokens:
            found.append("'min_new_tokens' must be at most 'max_new_tokens'")
        if self.max_new_tokens >= self.max_seq_len:
            found.append("'max_new_tokens' must be below 'max_seq_len': a prompt has tokens too")
        if self.min_responses > self.n:
            found.append(f"'min_responses' must be at most 'n' ({self.n})")
        if self.tensor_parallel_dim != 1:
            found.append(
                "'tensor_parallel_dim' must be 1: every process holds the whole model; for a "
                "larger one start a vLLM server and give server.url"
            )
        found += self._label_problems()
        if Path(self.input).absolute() == Path(self.output).absolute():
            found.append("'output' must be another file than 'input'")
        if Path(self.output).suffix == ".gz":
            found.append("'output' can't be compressed: it is appended to; give a .jsonl name")
        return found

    def _label_problems(self) -> list[str]:
        label = self.label
        try:
            schema = as_schema(self.schema)
        except (ValueError, TypeError) as error:
            return [f"'schema': {error}"]
        found = []
        for kind, key in (("fixed", "value"), ("uniform", "attributes"), ("empirical", "file")):
            given = getattr(label, key)
            if label.kind == kind and not given:
                found.append(f"'label.{key}' is missing: 'label.kind' is {kind}")
            if label.kind != kind and given:
                found.append(f"'label.{key}' is for 'label.kind' {kind}, not {label.kind}")
        if label.labels_per_prompt > 1 and label.kind not in ("uniform", "empirical"):
            found.append(f"'label.kind' {label.kind} has one label a prompt: set "
                         "label.labels_per_prompt=1")  # fmt: skip
        try:
            if label.value:
                parse_label(label.value, schema)
            if label.attributes:
                encode_label(dict.fromkeys(label.attributes, schema.min_value), schema)
        except ValueError as error:
            found.append(f"'label': {error}")
        if label.kind == "uniform" and label.attributes:
            grid = (schema.max_value - schema.min_value + 1) ** len(set(label.attributes))
            if label.labels_per_prompt > grid:
                found.append(f"'label.labels_per_prompt': there are only {grid} labels")
        return found


class Item(NamedTuple):
    """A prompt with one of its labels: a record of the output."""

    prompt: Prompt
    label: str | None
    seed: int


class SampleRecipe:
    """The run: setup -> sample."""

    def __init__(self, cfg: SampleConfig) -> None:
        self.cfg = cfg
        self.schema = as_schema(cfg.schema)
        if cfg.server is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                "with 'server' one process asks for all responses: run it without "
                "--nproc_per_node and --nnodes, and set server.concurrency"
            )
        self.world = init_world(cfg.device) if cfg.server is None else World(torch.device("cpu"))
        plain = to_plain(cfg)
        settings = {key: plain[key] for key in SETTINGS_THAT_CHANGE_RESPONSES}
        # The same model may be served elsewhere when a stopped run continues.
        settings["server"] = cfg.server and {"model": cfg.server.model}
        if cfg.label.file is not None:
            settings["labels_sha256"] = self.world.from_main(
                self.world.on_main(lambda: digest(cfg.label.file))
            )
        self.output = ResumableOutput(
            cfg.output,
            input_file=cfg.input,
            settings=settings,
            slice_size=cfg.records_per_write,
        )

    def setup(self) -> None:
        cfg, world = self.cfg, self.world
        world.on_main(self.output.check)
        self.items = self._items(read_prompts(cfg.input, cfg.max_prompts))
        self.tokenizer = instantiate(cfg.tokenizer)
        self.template = instantiate(cfg.template)
        self.end_of_turn, stop_id = response_end(self.template, self.tokenizer)
        num_items = len(self.items)
        self.done = world.from_main(world.on_main(lambda: self.output.begin(num_items)) or 0)
        if self.done < num_items:
            self.engine = self._server(stop_id) if cfg.server else self._local(stop_id)

    def sample(self) -> None:
        """Sample and append a slice of the items at a time; at the end the file gets its name."""
        cfg, world = self.cfg, self.world
        bar = tqdm(
            total=len(self.items), initial=self.done, disable=not world.is_main, unit="group"
        )
        started, num_tokens = time.perf_counter(), 0
        for start in range(self.done, len(self.items), cfg.records_per_write):
            chosen = self.items[start : start + cfg.records_per_write]
            requests = {
                place: Request(prompt, item.seed)
                for place, item in enumerate(chosen)
                for prompt in [self._encode(item)]
                if len(prompt) + cfg.max_new_tokens <= cfg.max_seq_len
            }
            samples = self._sample(requests)
            num_tokens += sum(len(sample.tokens) for own in samples.values() for sample in own)
            if world.is_main:
                self.output.append(
                    self._line(item, samples.get(place)) for place, item in enumerate(chosen)
                )
            bar.update(len(chosen))
        bar.close()
        if self.done < len(self.items):
            self.engine.close()
        if world.is_main:
            seconds = time.perf_counter() - started
            self._finish(num_tokens / seconds if num_tokens else None)
        close_world()

    # What follows is small print that the methods above call by name.

    def _items(self, prompts: Sequence[Prompt]) -> list[Item]:
        """Every prompt with its labels.

        Raises:
            ValueError: where prompts have no label of their own, though they should, or the labels
                to draw from are too few or none of the schema's.
        """
        cfg, options = self.cfg, self.cfg.label
        draw: DrawLabel | None = None
        if options.kind == "uniform":
            draw = uniform_labels(options.attributes or [], self.schema)
        elif options.kind == "empirical":
            known = labels_in(str(options.file))
            if len(set(known)) < options.labels_per_prompt:
                raise ValueError(
                    f"label.labels_per_prompt is {options.labels_per_prompt}, but {options.file} "
                    f"has only {len(set(known))} different labels"
                )
            draw = labels_like(known)
        lacking = [i for i, prompt in enumerate(prompts, start=1) if prompt.label is None]
        if options.kind == "record" and lacking:
            more = ", ..." if len(lacking) > 10 else ""
            raise ValueError(
                f"{cfg.input}: {len(lacking)} of {len(prompts)} prompts have no label of their own "
                f"(number {', '.join(map(str, lacking[:10]))}{more}): choose another label.kind, "
                "or label them with annotate_attributes"
            )
        items = []
        for index, prompt in enumerate(prompts):
            own: Sequence[str | None] = [prompt.label]
            if draw is not None:
                own = draw_labels(draw, options.labels_per_prompt, cfg.seed, index)
            elif options.kind != "record":
                own = [options.value]
            items += [
                Item(prompt, label, request_seed(cfg.seed, index, i)) for i, label in enumerate(own)
            ]
        return items

    def _local(self, stop_id: int) -> Engine:
        """The whole model, on every rank."""
        cfg, world = self.cfg, self.world
        with torch.device("meta"):
            model = instantiate(cfg.model).to(DTYPES[cfg.dtype])
        if problems := list(unsupported_parts(model)):
            raise ValueError("; ".join(problems))
        check_vocabulary(model, self.tokenizer)
        check_context(model, cfg.max_seq_len)
        checkpointer = world.on_main(
            lambda: open_checkpointer(
                cfg.checkpointer, model, self.tokenizer, seed=cfg.seed, output_dir=""
            )
        )
        load_weights(model, checkpointer, world, seed=cfg.seed)
        if cfg.compile:
            for layer in model.layers:
                layer.mlp.compile()
        settings = self._settings(stop_id, model.tok_embeddings.num_embeddings)
        return LocalEngine(model, settings, max_cache_tokens=cfg.max_cache_tokens)

    def _server(self, stop_id: int) -> Engine:
        assert self.cfg.server is not None
        options = to_plain(self.cfg.server)
        engine = CompletionsEngine(
            options.pop("url"), self._settings(stop_id), self.tokenizer.encode, **options
        )
        engine.connect(self.cfg.max_seq_len)
        return engine

    def _settings(self, stop_id: int, num_embeddings: int = 0) -> SamplingSettings:
        cfg = self.cfg
        forbidden = forbidden_ids(self.template, self.tokenizer, num_embeddings)
        return SamplingSettings(
            cfg.n, cfg.temperature, cfg.top_p, cfg.max_new_tokens, stop_id, forbidden
        )

    def _encode(self, item: Item) -> list[int]:
        prompt = item.prompt
        return encode_prompt(self.template, self.tokenizer, prompt.system, prompt.turns, item.label)

    def _sample(self, requests: dict[int, Request]) -> dict[int, list[Sample]]:
        """The samples of all requests, on every rank; long and short prompts go to all ranks."""
        world = self.world
        order = sorted(requests, key=lambda place: len(requests[place].prompt))
        mine = order[world.rank :: world.size]
        own = self.engine.sample([requests[place] for place in mine])
        samples = dict(zip(mine, own, strict=True))
        if world.mesh is None:
            return samples
        everyones: list[dict[int, list[Sample]]] = [{}] * world.size
        dist.all_gather_object(everyones, samples)
        return {place: own for part in everyones for place, own in part.items()}

    def _line(self, item: Item, samples: list[Sample] | None) -> bytes:
        """What becomes of an item: its record, if there is one, and what was counted."""
        counts: collections.Counter[str] = collections.Counter()
        record = None
        if samples is None:
            counts["too_long"] += 1
        else:
            responses = self._responses(samples, counts)
            complete = {r.value for r in responses if r.extra["finish_reason"] == STOP}
            if len(complete) < self.cfg.min_responses:
                counts["too_few"] += 1
            else:
                prompt = item.prompt
                record = record_to_json(
                    Record(prompt.system, prompt.turns, item.label, responses, prompt.extra)
                )
                counts.update(records=1, responses=len(responses))
        return json_line({"record": record, "counts": dict(counts)})

    def _responses(
        self, samples: Sequence[Sample], counts: collections.Counter[str]
    ) -> list[Response]:
        """The samples that are kept, as text."""
        cfg = self.cfg
        kept: dict[Any, Response] = {}
        for number, sample in enumerate(samples):
            complete = sample.finish_reason == STOP
            counts["sampled"] += 1
            counts["truncated"] += not complete
            if not complete and not cfg.keep_truncated:
                continue
            text = self.tokenizer.decode(sample.tokens[: -1 if complete else None])
            if complete:
                text = text.removesuffix(self.end_of_turn)
            if not text.strip():
                counts["empty"] += 1
                continue
            if len(sample.tokens) < cfg.min_new_tokens:
                counts["too_short"] += 1
                continue
            extra: dict[str, Any] = {"finish_reason": sample.finish_reason}
            key = (text, sample.finish_reason, None if cfg.distinct else number)
            if key in kept:
                counts["duplicates"] += 1
                continue
            if complete:
                same = encode_response(self.template, self.tokenizer, text) == sample.tokens
                counts["encoded_otherwise"] += not same
                if same and sample.log_prob is not None:
                    extra["engine_log_q"] = sample.log_prob
            kept[key] = Response(text, extra=extra)
        return list(kept.values())

    def _finish(self, tokens_per_second: float | None) -> None:
        """Raises:
        ValueError: where no record is left.
        """
        cfg = self.cfg
        counts: collections.Counter[str] = collections.Counter()

        def final_line(line: bytes) -> bytes:
            row = json.loads(line)
            counts.update(row["counts"])
            return b"" if row["record"] is None else json_line(row["record"])

        self.output.finish(final_line)
        summary = f"{cfg.output}: complete already"
        if counts:
            summary = (
                f"{cfg.output}: {counts['records']} records, {counts['responses']} responses of "
                f"{counts['sampled']} sampled ({counts['truncated']} truncated, "
                f"{counts['duplicates']} duplicates, {counts['empty']} empty, "
                f"{counts['too_short']} too short); left out: {counts['too_few']} groups with "
                f"fewer than {cfg.min_responses} distinct complete responses, {counts['too_long']} "
                f"prompts too long; {counts['encoded_otherwise']} responses encode to other tokens "
                "than were sampled"
            )
        if tokens_per_second is not None:
            summary += f"; {tokens_per_second:.0f} tokens/s"
        tqdm.write(summary)
        if Path(cfg.output).stat().st_size == 0:
            raise ValueError(
                f"{cfg.output} is empty: no group has {cfg.min_responses} distinct complete "
                "responses. Is it the model that was trained with this template, and is "
                "max_new_tokens large enough? Remove the file to try again"
            )


def digest(path: str | None) -> str:
    """Of a file's content."""
    assert path is not None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@recipe_main(SampleConfig)
def main(cfg: SampleConfig) -> None:
    recipe = SampleRecipe(cfg)
    recipe.setup()
    recipe.sample()


if __name__ == "__main__":
    main()
