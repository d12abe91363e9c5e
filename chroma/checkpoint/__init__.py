"""Any published file to (config, canonical state dict), and to a ready module."""

from .check import check_state
from .container import open_checkpoint
from .identify import Kind, identify
from .load import load_autoencoder, load_text_encoder, load_transformer
from .read import find_model, read_autoencoder, read_text_encoder, read_transformer
from .reader import read_header

__all__ = [
    "Kind",
    "check_state",
    "find_model",
    "identify",
    "load_autoencoder",
    "load_text_encoder",
    "load_transformer",
    "open_checkpoint",
    "read_autoencoder",
    "read_header",
    "read_text_encoder",
    "read_transformer",
]
