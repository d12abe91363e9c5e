"""Tools for LoRA files: info, convert, merge, concatenate, extract, resize."""
