"""A language model that is loaded once and gives log-probs of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torchtune.modules import TransformerDecoder

from steerlm2.checkpoints.decoder import build_decoder, lay_out
from steerlm2.checkpoints.weights import check_context, open_checkpointer
from steerlm2.config.keys import DistributedKeys
from steerlm2.data.packing import Group
from steerlm2.data.templates import Template
from steerlm2.data.tokenizers import Tokenizer
from steerlm2.distributed.parallelize import DTYPES
from steerlm2.distributed.world import World
from steerlm2.training.forward import check_finite, score_groups


@dataclass
class LanguageModel:
    """A decoder, and what scoring needs beside it (`load_language_model`)."""

    decoder: TransformerDecoder
    tokenizer: Tokenizer
    template: Template
    world: World
    max_tokens_per_microbatch: int

    def score(self, groups: Sequence[Group]) -> list[list[float]]:
        """[group][response] log-probs in nats, on every rank.

        Raises:
            ValueError: on every rank, where one isn't finite.
        """
        log_probs = score_groups(
            self.decoder,
            groups,
            self.world,
            max_tokens_per_microbatch=self.max_tokens_per_microbatch,
        )
        check_finite(chain.from_iterable(log_probs), "log-probs", "the model")
        return log_probs


def load_language_model(
    model: Mapping[str, Any],
    checkpointer: Mapping[str, Any] | None,
    tokenizer: Tokenizer,
    template: Template,
    world: World,
    cfg: DistributedKeys,
    *,
    max_seq_len: int,
    max_tokens_per_microbatch: int,
) -> LanguageModel:
    """Build the model of a config section, and fill it with a checkpoint's weights.

    Args:
        model: its builder.
        checkpointer: None: fresh weights from the config's seed.
        cfg: how it is laid out.
        max_seq_len: tokens of the longest text.

    Raises:
        ValueError: where tokenizer, model, checkpoint and `max_seq_len` don't fit together.
        FileNotFoundError: where the checkpoint, or a file of it, doesn't exist.
    """
    decoder = build_decoder(model, DTYPES[cfg.dtype], checkpointer=checkpointer)
    check_context(decoder, max_seq_len)
    source = world.on_main(
        lambda: open_checkpointer(checkpointer, decoder, tokenizer, seed=cfg.seed, output_dir="")
    )
    lay_out(decoder, source, world, cfg)
    return LanguageModel(decoder.eval(), tokenizer, template, world, max_tokens_per_microbatch)
