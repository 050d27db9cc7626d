"""Sampling answers to a file of prompts: functions that the sampling recipes share."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torchtune.modules import TransformerDecoder

from steerlm2.attributes import AttributeSchema, read_label
from steerlm2.checkpoints.decoder import build_decoder
from steerlm2.checkpoints.weights import (
    check_context,
    load_weights,
    open_checkpointer,
)
from steerlm2.config.keys import LabelOptions, ServerOptions
from steerlm2.data.jsonl import LineProblems
from steerlm2.data.prompts import (
    DrawLabel,
    Prompt,
    draw_labels,
    labels_in,
    labels_like,
    uniform_labels,
)
from steerlm2.data.records import SAMPLER_LOG_PROB, STOP, Response
from steerlm2.data.templates import (
    Template,
    encode_prompt,
    is_encoding,
    response_end,
    sampled_text,
)
from steerlm2.data.tokenizers import Tokenizer
from steerlm2.distributed.world import World
from steerlm2.inference.completions import CompletionsEngine
from steerlm2.inference.engines import (
    OTHER_STOP,
    Engine,
    Request,
    Sample,
    SamplingSettings,
    forbidden_ids,
    request_seed,
)
from steerlm2.models.decoders import end_at_hidden_states, unsupported_parts


class Item(NamedTuple):
    """A prompt with one of its labels and a seed, to be answered."""

    prompt: Prompt
    label: str | None
    seed: int

    def encode(
        self, template: Template, tokenizer: Tokenizer, *, show_labels: bool = True
    ) -> list[int]:
        """The prompt's tokens.

        Args:
            show_labels: False leaves the labels of all turns out, for a model of P(y|x).
        """
        turns, label = self.prompt.turns, self.label
        if not show_labels:
            turns, label = [dataclasses.replace(turn, label=None) for turn in turns], None
        return encode_prompt(template, tokenizer, self.prompt.system, turns, label)


def with_labels(
    prompts: Sequence[Prompt],
    options: LabelOptions,
    schema: AttributeSchema,
    *,
    seed: int,
    source: str,
) -> list[Item]:
    """Every prompt with its labels, as the options say; draws depend on `seed`.

    Args:
        source: the file of the prompts, for messages.

    Raises:
        ValueError: where prompts have no label and `label.kind` is "record", or where the labels to
            draw from are too few; for labels that aren't of the schema. All come in its order.
    """
    draw: DrawLabel | None = None
    if options.kind == "uniform":
        draw = uniform_labels(options.attributes or [], schema)
    elif options.kind == "empirical":
        file = str(options.file)
        known = _read_labels(labels_in(file), schema, file, ", label ")
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
            f"{source}: {len(lacking)} of {len(prompts)} prompts have no label of their own "
            f"(number {', '.join(map(str, lacking[:10]))}{more}): choose another label.kind, "
            "or label them with annotate_attributes"
        )
    labels: Sequence[str | None] = [options.value and read_label(options.value, schema)]
    if options.kind == "record":
        labels = _read_labels([str(p.label) for p in prompts], schema, source, ", prompt ")
    items = []
    for index, prompt in enumerate(prompts):
        own: Sequence[str | None] = [labels[index if options.kind == "record" else 0]]
        if draw is not None:
            own = draw_labels(draw, options.labels_per_prompt, seed, index)
        items += [Item(prompt, label, request_seed(seed, index, i)) for i, label in enumerate(own)]
    return items


def _read_labels(
    labels: Sequence[str], schema: AttributeSchema, source: str, numbered: str
) -> list[str]:
    """The labels in the schema's order.

    Raises:
        ValueError: naming those that aren't of the schema, each different one once.
    """
    problems = LineProblems(source, numbered=numbered)
    known: dict[str, str] = {}
    for number, label in enumerate(labels, start=1):
        if label in known:
            continue
        known[label] = label
        try:
            known[label] = read_label(label, schema)
        except ValueError as error:
            problems.add(number, error)
    problems.raise_if_any()
    return [known[label] for label in labels]


def sampling_settings(
    template: Template,
    tokenizer: Tokenizer,
    num_embeddings: int = 0,
    *,
    n: int,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
) -> SamplingSettings:
    """Sampling settings for a template: its stop token, and no other control tokens.

    Args:
        num_embeddings: of the model, if it is known (see `forbidden_ids`).
    """
    _, stop_id = response_end(template, tokenizer)
    forbidden = forbidden_ids(template, tokenizer, num_embeddings)
    return SamplingSettings(n, temperature, top_p, max_new_tokens, stop_id, forbidden)


def load_whole_decoder(
    model: Mapping[str, Any],
    checkpointer: Mapping[str, Any] | None,
    tokenizer: Tokenizer,
    world: World,
    *,
    dtype: torch.dtype,
    max_seq_len: int,
    seed: int,
    compile: bool,
) -> TransformerDecoder:
    """An unsharded decoder on every rank, whose forward ends at the hidden states.

    Args:
        checkpointer: None: fresh weights from `seed`.
        compile: compile the feed-forward layers.

    Raises:
        ValueError: where tokenizer, model, checkpoint and `max_seq_len` don't fit together.
        FileNotFoundError: where the checkpoint, or a file of it, doesn't exist.
    """
    decoder = build_decoder(model, dtype, checkpointer=checkpointer)
    if problems := list(unsupported_parts(decoder)):
        raise ValueError("; ".join(problems))
    check_context(decoder, max_seq_len)
    source = world.on_main(
        lambda: open_checkpointer(checkpointer, decoder, tokenizer, seed=seed, output_dir="")
    )
    load_weights(decoder, source, world, seed=seed)
    end_at_hidden_states(decoder)
    if compile:
        for layer in decoder.layers:
            layer.mlp.compile()
    return decoder.eval()


def open_server(
    options: ServerOptions, settings: SamplingSettings, tokenizer: Tokenizer, max_seq_len: int
) -> CompletionsEngine:
    """An engine that is connected to the server of the options.

    Raises:
        ValueError: where the server doesn't have the model, or accepts fewer than `max_seq_len`
            tokens.
        ConnectionError: where it doesn't answer.
    """
    more = dataclasses.asdict(options)
    engine = CompletionsEngine(more.pop("url"), settings, tokenizer.encode, **more)
    engine.connect(max_seq_len)
    return engine


def fitting_requests(
    items: Sequence[Item],
    template: Template,
    tokenizer: Tokenizer,
    *,
    max_new_tokens: int,
    max_seq_len: int,
    show_labels: bool = True,
) -> dict[int, Request]:
    """What is asked, by index; not the prompts that leave no room for `max_new_tokens`."""
    prompts = [item.encode(template, tokenizer, show_labels=show_labels) for item in items]
    return {
        index: Request(prompt, item.seed)
        for index, (item, prompt) in enumerate(zip(items, prompts, strict=True))
        if len(prompt) + max_new_tokens <= max_seq_len
    }


def sample_everywhere(
    engine: Engine, requests: Mapping[int, Request], world: World
) -> dict[int, list[Sample]]:
    """[request index] -> samples, on every rank; each rank samples long and short prompts alike."""
    order = sorted(requests, key=lambda index: len(requests[index].prompt))
    mine = order[world.rank :: world.size]
    own = engine.sample([requests[index] for index in mine])
    samples = dict(zip(mine, own, strict=True))
    if world.mesh is None:
        return samples
    of_ranks: list[dict[int, list[Sample]]] = [{}] * world.size
    dist.all_gather_object(of_ranks, samples)
    return {index: own for of_rank in of_ranks for index, own in of_rank.items()}


def answer_of(sample: Sample, template: Template, tokenizer: Tokenizer) -> Response:
    """A sample as a response, its text without the template's end of turn if it is complete.

    The response has the sampled tokens, unless a server didn't give them, and "sampler_log_prob",
    where it is known. If it is complete, it has the engine's untempered log-prob of them, where it
    is known, as "engine_log_q". A token that no response has (a control token that a server sampled
    although it was forbidden) cuts it off, and it has none of them.
    """
    complete = sample.finish_reason == STOP
    if sample.text is not None:
        end_of_turn, _ = response_end(template, tokenizer)
        text = sample.text.removesuffix(end_of_turn) if complete else sample.text
        return Response(text, finish_reason=sample.finish_reason)
    tokens = sample.tokens
    text, whole = sampled_text(template, tokenizer, tokens, complete=complete)
    if not whole:
        return Response(text, finish_reason=OTHER_STOP)
    response = Response(text, token_ids=array("i", tokens), finish_reason=sample.finish_reason)
    response.encodes_otherwise = not is_encoding(
        template, tokenizer, tokens, text, complete=complete
    )
    if complete and sample.log_prob is not None:
        response.extra["engine_log_q"] = sample.log_prob
    if sample.sampler_log_prob is not None:
        response.extra[SAMPLER_LOG_PROB] = sample.sampler_log_prob
    return response
