"""An attribute model that is loaded once and scores texts.

Dimension letters: A attributes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torchtune.modules import TransformerDecoder

from steerlm2.attributes import AttributeSchema
from steerlm2.checkpoints.decoder import build_decoder
from steerlm2.checkpoints.weights import (
    check_context,
    load_weights,
    open_reward_checkpointer,
)
from steerlm2.data.packing import RewardGroup
from steerlm2.data.records import Turn
from steerlm2.data.templates import Template, encode_for_scoring
from steerlm2.data.tokenizers import Tokenizer
from steerlm2.distributed.parallelize import parallelize
from steerlm2.distributed.world import World
from steerlm2.training.forward import check_finite, score_attributes


@dataclass
class AttributeModel:
    """A decoder with a reward head, and what scoring needs beside it (`load_attribute_model`)."""

    decoder: TransformerDecoder
    tokenizer: Tokenizer
    template: Template
    schema: AttributeSchema
    world: World
    max_seq_len: int
    max_tokens_per_microbatch: int

    def encode(
        self, system: str, turns: Sequence[Turn], responses: Sequence[str]
    ) -> tuple[RewardGroup, int]:
        """The texts of a conversation's responses, and how many of them were cut.

        Texts are cut at the beginning, to `max_seq_len` tokens.
        """
        return encode_for_scoring(
            self.template, self.tokenizer, system, turns, responses, self.max_seq_len
        )

    def score(self, groups: Sequence[RewardGroup]) -> list[list[list[float]]]:
        """[group][response][attribute] scores, on every rank, in the order of the schema.

        Raises:
            ValueError: on every rank, where one isn't finite.
        """
        scores = score_attributes(
            self.decoder,
            groups,
            self.world,
            max_tokens_per_microbatch=self.max_tokens_per_microbatch,
        )
        rows = chain.from_iterable(scores)
        check_finite(chain.from_iterable(rows), "scores", "the attribute model")
        return scores


def load_attribute_model(
    model: Mapping[str, Any],
    checkpointer: Mapping[str, Any] | None,
    tokenizer: Tokenizer,
    template: Template,
    schema: AttributeSchema,
    world: World,
    *,
    max_seq_len: int,
    max_tokens_per_microbatch: int,
    dtype: torch.dtype,
    seed: int = 0,
    compile: bool = False,
    reshard_after_forward: bool = True,
    cpu_offload: bool = False,
) -> AttributeModel:
    """Build the model of a config section, and fill it with a checkpoint's weights.

    Args:
        model: the backbone's builder.
        checkpointer: of a checkpoint with a reward head; None: fresh weights from `seed`.

    Raises:
        ValueError: where tokenizer, model, checkpoint, schema and `max_seq_len` don't fit together.
        FileNotFoundError: where the checkpoint, or a file of it, doesn't exist.
    """
    decoder = build_decoder(
        model, dtype, checkpointer=checkpointer, num_attributes=len(schema.names)
    )
    check_context(decoder, max_seq_len)
    source = world.on_main(
        lambda: open_reward_checkpointer(
            checkpointer,
            decoder,
            tokenizer,
            template,
            schema,
            seed=seed,
            output_dir="",
            load_head=checkpointer is not None,
        )
    )
    parallelize(
        decoder,
        world,
        dtype=dtype,
        compile=compile,
        reshard_after_forward=reshard_after_forward,
        cpu_offload=cpu_offload,
    )
    load_weights(decoder, source, world, seed=seed, cpu_offload=cpu_offload)
    decoder.eval()
    return AttributeModel(
        decoder, tokenizer, template, schema, world, max_seq_len, max_tokens_per_microbatch
    )
