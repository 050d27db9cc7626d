"""Records, templates, tokenizers, and what turns them into packed sequences.

The names below are for `_component_` in YAML files, and stay the same when modules move. They are
imported on first use, so that reading records doesn't import PyTorch. The sources of prepare_data
are in `steerlm2.data.sources`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steerlm2.data.synthetic import score_text, steering_metrics
    from steerlm2.data.templates import chatml_template, extra_id_template, llama3_template
    from steerlm2.data.tokenizers import hf_tokenizer, tiny_tokenizer

__all__ = [
    "chatml_template",
    "extra_id_template",
    "hf_tokenizer",
    "llama3_template",
    "score_text",
    "steering_metrics",
    "tiny_tokenizer",
]

_MODULES = {
    "chatml_template": "templates",
    "extra_id_template": "templates",
    "hf_tokenizer": "tokenizers",
    "llama3_template": "templates",
    "score_text": "synthetic",
    "steering_metrics": "synthetic",
    "tiny_tokenizer": "tokenizers",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
