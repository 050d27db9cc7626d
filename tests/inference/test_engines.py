"""What can't stand in a response, and the seeds of requests."""

from __future__ import annotations

import itertools

from steerlm2.data.templates import extra_id_template
from steerlm2.data.tokenizers import TINY_SPECIAL_TOKENS, tiny_tokenizer
from steerlm2.inference.engines import forbidden_ids, request_seed

TOKENIZER = tiny_tokenizer()


def test_control_tokens_are_forbidden_but_for_the_stop_token() -> None:
    """No other token is: every text can be sampled."""
    control = {TOKENIZER.token_id(token) for token in TINY_SPECIAL_TOKENS}
    stop_id = TOKENIZER.token_id("<extra_id_1>")
    assert set(forbidden_ids(extra_id_template(), TOKENIZER)) == control - {stop_id}


def test_embeddings_without_a_token_are_forbidden() -> None:
    """A model with 515 rows for 512 tokens."""
    more = forbidden_ids(extra_id_template(), TOKENIZER, num_embeddings=515)
    assert more == (*forbidden_ids(extra_id_template(), TOKENIZER), 512, 513, 514)


def test_tokens_that_a_template_takes_over_are_forbidden_too() -> None:
    """Llama 2's way: ordinary tokens of the vocabulary stand in for control tokens."""
    taken = {f"<extra_id_{i}>": token for i, token in enumerate("zqj")}
    template = extra_id_template(taken)

    class OrdinaryTokens:
        """As far as `forbidden_ids` asks; these tokens are no added ones."""

        vocab_size = 512
        control_ids = frozenset({0})

        @staticmethod
        def token_id(token: str) -> int | None:
            return {"z": 7, "q": 8, "j": 9}.get(token)

        @staticmethod
        def encode(text: str) -> list[int]:
            return []

    assert forbidden_ids(template, OrdinaryTokens()) == (0, 7, 9)  # type: ignore[arg-type]


def test_seeds_differ_by_record_label_and_run() -> None:
    """Whole numbers that JSON and int64 hold, further apart than the n that are added to them;
    the same in every version, or a run that is continued would sample otherwise."""
    seeds = [request_seed(s, i, j) for s in range(3) for i in range(300) for j in range(3)]
    assert all(0 <= seed < 2**48 for seed in seeds)
    ordered = sorted(seeds)
    assert min(b - a for a, b in itertools.pairwise(ordered)) > 1000
    assert request_seed(0, 1, 2) == 129023467254802
