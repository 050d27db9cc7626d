"""Sources of data, for the key `builder` of prepare_data. `base` describes their interface."""

from steerlm2.data.sources.best_of import best_of_responses
from steerlm2.data.sources.chat import chat_data
from steerlm2.data.sources.conversations import labelled_conversations
from steerlm2.data.sources.grammar import grammar_draws, grammar_pairs_to_ask
from steerlm2.data.sources.helpsteer import helpsteer3_conversations, helpsteer_conversations
from steerlm2.data.sources.oasst import oasst_conversations, oasst_groups

__all__ = [
    "best_of_responses",
    "chat_data",
    "grammar_draws",
    "grammar_pairs_to_ask",
    "helpsteer3_conversations",
    "helpsteer_conversations",
    "labelled_conversations",
    "oasst_conversations",
    "oasst_groups",
]
