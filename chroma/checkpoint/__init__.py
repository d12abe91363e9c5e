"""Any published file to (config, canonical state dict), and to a ready module."""

from .identify import Kind, identify, quantisation
from .load import (
    check_state,
    fill,
    load_autoencoder,
    load_text_encoder,
    load_transformer,
    read_autoencoder,
    read_text_encoder,
    read_transformer,
)
from .reader import read_header

__all__ = [
    "Kind",
    "check_state",
    "fill",
    "identify",
    "load_autoencoder",
    "load_text_encoder",
    "load_transformer",
    "quantisation",
    "read_autoencoder",
    "read_header",
    "read_text_encoder",
    "read_transformer",
]
