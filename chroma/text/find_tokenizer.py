"""The tokenizer that belongs to a text encoder's file."""

from pathlib import Path

from ..checkpoint.container import is_gguf
from ..checkpoint.gguf import read_gguf_header
from .gguf_tokenizer import tokenizer_from_gguf
from .tokenizer import Tokenizer


def find_tokenizer(beside: Path | None, text_encoder: Path) -> Tokenizer:
    """A tokenizer.json where there is one, else the one that a GGUF file carries.

    Raises CheckpointError if there is neither.
    """
    if is_gguf(text_encoder) and (beside is None or not beside.is_file()):
        return tokenizer_from_gguf(read_gguf_header(text_encoder))
    return Tokenizer.from_file(beside or text_encoder.with_name("tokenizer.json"))
