"""Records, templates, tokenizers and the sources that records come from."""

from pathlib import Path

TINY_TOKENIZER_DIR = Path(__file__).parent / "tiny_tokenizer"
