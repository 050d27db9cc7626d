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
max_new_tokens. It has the sampled tokens as "token_ids", the stop token included, which are what is
scored and trained on ("encodes_otherwise": its text encodes to others); the record's
"token_ids_digest" tells their template and tokenizer. A complete one has the engine's own log Q' as
"engine_log_q", untempered, and every one the log-prob that it was drawn with as "sampler_log_prob"
(a vLLM server's is known at temperature 1 and top_p 1 only). A text that isn't valid UTF-8 (half an
emoji) is left out. The record's "sampling" has temperature, top_p, how many responses were drawn,
and what was left out of them.

What is sampled for a prompt follows from the seed, the index of the prompt in the input, and the
number of the response: not from what is sampled beside it, nor from the number of processes. A run
that was stopped continues where it was; the output is in input order.
"""

from __future__ import annotations

import collections
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerlm2.attributes import as_schema
from steerlm2.checkpoint_dirs import file_digest
from steerlm2.config.keys import (
    SamplingKeys,
    ServerOptions,
    at_least_one,
    output_problems,
    settings_of,
)
from steerlm2.config.loader import instantiate
from steerlm2.data.jsonl import json_line
from steerlm2.data.prompts import read_prompts
from steerlm2.data.records import (
    BROKEN,
    DUPLICATES,
    OTHER_TOKENS,
    UNKNOWN_TOKENS,
    Record,
    Response,
    Sampling,
    flaw_of,
    is_blank,
    record_to_json,
)
from steerlm2.data.templates import token_ids_digest
from steerlm2.distributed.parallelize import DTYPES
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
from steerlm2.inference.engines import Engine, Sample, SamplingSettings
from steerlm2.inference.local import LocalEngine
from steerlm2.runs.entry import recipe_main
from steerlm2.runs.hangs import LONG, HangWatch
from steerlm2.runs.logs import tell
from steerlm2.runs.processes import join_processes, process_beside_server
from steerlm2.runs.resumable import ResumableOutput, remaining_slices

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


LEFT_OUT = ("cut_off", BROKEN, "empty", "too_short", DUPLICATES)
"""Why a response isn't in its record, by the names of the counts."""


@dataclass(kw_only=True)
class SampleConfig(SamplingKeys):
    """The keys of sample_responses."""

    input: str
    """Conversations or SteerLM2 records, .jsonl or .jsonl.gz, for their prompts."""
    output: str
    """SteerLM2 records to be written, .jsonl."""
    server: ServerOptions | None = None
    """A vLLM server that samples, instead of the checkpoint."""
    min_new_tokens: int = 1
    """Tokens of an answer; shorter ones are left out."""
    distinct: bool = True
    """Keep only the first of identical answers."""
    min_responses: int = 2
    """Distinct answers of a group; a group with fewer is left out."""
    keep_truncated: bool = False
    """Keep answers that were cut off too. Scoring and training take those that were cut off at
    max_new_tokens as the tokens that were sampled, without a stop token, and leave out others."""

    def problems(self) -> list[str]:
        found = super().problems()
        found += at_least_one(self, "min_new_tokens", "min_responses")
        if self.server is not None:
            found += self.server.problems()
        if self.min_new_tokens > self.max_new_tokens:
            found.append("'min_new_tokens' must be at most 'max_new_tokens'")
        if self.min_responses > self.n:
            found.append(f"'min_responses' must be at most 'n' ({self.n})")
        found += output_problems(self.input, self.output)
        return found


class SampleRecipe:
    """The run: setup -> sample."""

    def __init__(self, cfg: SampleConfig) -> None:
        self.cfg = cfg
        self.schema = as_schema(cfg.schema)
        self.world = (
            process_beside_server()
            if cfg.server is not None
            else join_processes(cfg, Path(cfg.output).parent)
        )
        self.watch = HangWatch(self.world, cfg.hang_timeout_seconds)

    def setup(self) -> None:
        cfg, world = self.cfg, self.world
        self.watch.at("reading the prompts", patience=LONG)
        self.output = self._output()
        world.on_main(self.output.check)
        prompts = read_prompts(cfg.input, cfg.max_prompts)
        self.items = with_labels(prompts, cfg.label, self.schema, seed=cfg.seed, source=cfg.input)
        self.tokenizer = instantiate(cfg.tokenizer)
        self.template = instantiate(cfg.template)
        self.digest = token_ids_digest(self.template, self.tokenizer)
        self.done = world.computed_on_main(lambda: self.output.begin(len(self.items)))
        if self.done < len(self.items):
            self.engine = self._server(cfg.server) if cfg.server else self._local()

    def sample(self) -> None:
        """Sample and append a slice of the items at a time; rename the file when it is complete."""
        cfg, world = self.cfg, self.world
        started, num_tokens = time.perf_counter(), 0
        starts = range(self.done, len(self.items), cfg.records_per_write)
        for _, chosen in remaining_slices(self.items, starts, self.watch):
            requests = fitting_requests(
                chosen,
                self.template,
                self.tokenizer,
                max_new_tokens=cfg.max_new_tokens,
                max_seq_len=cfg.max_seq_len,
            )
            samples = sample_everywhere(self.engine, requests, world)
            num_tokens += sum(len(sample.tokens) for own in samples.values() for sample in own)
            if world.is_main:
                self.output.append(
                    self._line(item, samples.get(index)) for index, item in enumerate(chosen)
                )
        self.watch.at("the end", patience=LONG)
        if self.done < len(self.items):
            self.engine.close()
        if world.is_main:
            seconds = time.perf_counter() - started
            self._finish(num_tokens / seconds if num_tokens else None)

    # Helpers

    def _output(self) -> ResumableOutput:
        cfg, settings = self.cfg, settings_of(self.cfg, SETTINGS_THAT_CHANGE_RESPONSES)
        # A stopped run may continue with the same model at another server.
        settings["server"] = cfg.server and {"model": cfg.server.model}
        if (labels := cfg.label.file) is not None:
            settings["labels_sha256"] = self.world.computed_on_main(lambda: file_digest(labels))
        return ResumableOutput(
            cfg.output,
            input_file=cfg.input,
            settings=settings,
            slice_size=cfg.records_per_write,
        )

    def _local(self) -> Engine:
        cfg = self.cfg
        self.watch.at("loading the model", patience=LONG)
        decoder = load_whole_decoder(
            cfg.model,
            cfg.checkpointer,
            self.tokenizer,
            self.world,
            dtype=DTYPES[cfg.dtype],
            max_seq_len=cfg.max_seq_len,
            seed=cfg.seed,
            compile=cfg.compile,
        )
        self.watch.follow(decoder, alike=False)
        settings = self._settings(decoder.tok_embeddings.num_embeddings)
        return LocalEngine(decoder, settings, max_cache_tokens=cfg.max_cache_tokens)

    def _server(self, options: ServerOptions) -> Engine:
        return open_server(options, self._settings(), self.tokenizer, self.cfg.max_seq_len)

    def _settings(self, num_embeddings: int = 0) -> SamplingSettings:
        cfg = self.cfg
        return sampling_settings(
            self.template,
            self.tokenizer,
            num_embeddings,
            n=cfg.n,
            temperature=cfg.temperature,
            top_p=cfg.top_p,
            max_new_tokens=cfg.max_new_tokens,
        )

    def _line(self, item: Item, samples: list[Sample] | None) -> bytes:
        """The output of an item as JSON: its record, or null if it is left out, and counts."""
        counts: collections.Counter[str] = collections.Counter()
        record = None
        if samples is None:
            counts["too_long"] += 1
        else:
            own: collections.Counter[str] = collections.Counter()
            responses = self._responses(samples, own)
            counts.update(own)
            if len({response.value for response in responses}) < self.cfg.min_responses:
                counts["too_few"] += 1
            else:
                prompt = item.prompt
                known = any(response.token_ids is not None for response in responses)
                digest = self.digest if known else None
                sampling = Sampling(
                    len(samples),
                    self.cfg.temperature,
                    self.cfg.top_p,
                    distinct=self.cfg.distinct,
                    left_out={cause: own[cause] for cause in LEFT_OUT if own[cause]},
                )
                record = record_to_json(
                    Record(
                        *(prompt.system, prompt.turns, item.label, responses, prompt.extra),
                        token_ids_digest=digest,
                        sampling=sampling,
                    )
                )
                counts.update(records=1, responses=len(responses))
        return json_line({"record": record, "counts": dict(counts)})

    def _responses(
        self, samples: Sequence[Sample], counts: collections.Counter[str]
    ) -> list[Response]:
        """The responses that are kept, as text."""
        cfg = self.cfg
        kept: dict[Any, Response] = {}
        for number, sample in enumerate(samples):
            response = answer_of(sample, self.template, self.tokenizer)
            counts["sampled"] += 1
            counts["truncated"] += response.is_cut_off
            if response.is_cut_off and not cfg.keep_truncated:
                counts["cut_off"] += 1
                continue
            if response.is_broken:
                counts[BROKEN] += 1
                continue
            if is_blank(response.value):
                counts["empty"] += 1
                continue
            if len(sample.tokens) < cfg.min_new_tokens:
                counts["too_short"] += 1
                continue
            key = (response.value, response.finish_reason, None if cfg.distinct else number)
            if key in kept:
                counts[DUPLICATES] += 1
                continue
            counts.update([flaw] if (flaw := flaw_of(response)) else [])
            counts["end_unknown"] += not sample.end_known
            kept[key] = response
        return list(kept.values())

    def _finish(self, tokens_per_second: float | None) -> None:
        """Write the complete output, and print what was left out.

        Raises:
            ValueError: where no record is left.
        """
        cfg = self.cfg
        counts: collections.Counter[str] = collections.Counter()

        def final_line(line: bytes) -> bytes:
            entry = json.loads(line)
            counts.update(entry["counts"])
            return b"" if entry["record"] is None else json_line(entry["record"])

        self.output.finish(final_line)
        summary = f"{cfg.output}: complete already"
        if counts:
            summary = (
                f"{cfg.output}: {counts['records']} records, {counts['responses']} responses of "
                f"{counts['sampled']} sampled ({counts['truncated']} truncated, "
                f"{counts[DUPLICATES]} duplicates, {counts['empty']} empty, "
                f"{counts['too_short']} too short, {counts[BROKEN]} {BROKEN}); left out: "
                f"{counts['too_few']} groups with fewer than {cfg.min_responses} distinct "
                f"responses, {counts['too_long']} prompts too long"
            )
            summary += _known_and_unknown(counts)
        if tokens_per_second is not None:
            summary += f"; {tokens_per_second:.0f} tokens/s"
        tell(summary)
        if Path(cfg.output).stat().st_size == 0:
            raise ValueError(
                f"{cfg.output} is empty: no group has {cfg.min_responses} distinct "
                "responses that came to an end (keep_truncated keeps others too) and are valid "
                "UTF-8. Is it the model "
                "that was trained with this template, and is max_new_tokens large enough? Remove "
                "the file to try again"
            )


def _known_and_unknown(counts: Mapping[str, int]) -> str:
    """What is known of the sampled tokens; nothing is said of those that a server didn't give."""
    parts = []
    if counts["responses"] > counts[UNKNOWN_TOKENS]:
        parts.append(f"{counts[OTHER_TOKENS]} responses {OTHER_TOKENS}")
    if unknown := counts[UNKNOWN_TOKENS]:
        parts.append(
            f"{unknown} responses {UNKNOWN_TOKENS} (the server gives no token_ids): it is unknown "
            "whether their texts encode to what was sampled"
        )
    if unknown := counts["end_unknown"]:
        parts.append(
            f"it is unknown whether {unknown} responses came to the stop token (the server gives "
            "no stop_reason)"
        )
    return "".join(f"; {part}" for part in parts)


@recipe_main(SampleConfig)
def main(cfg: SampleConfig) -> None:
    recipe = SampleRecipe(cfg)
    with recipe.watch:
        recipe.setup()
        recipe.sample()


if __name__ == "__main__":
    main()
