"""Where the small model's files lie, and what it is called in lists."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
TRANSFORMER = FOLDER / "transformer.safetensors"
TEXT_ENCODER = FOLDER / "text_encoder.safetensors"
VAE = FOLDER / "vae.safetensors"
TOKENIZER = FOLDER / "tokenizer.json"

# What menus and workflows say instead of a file name.
LABEL = "small Chroma (included)"
# Width and height in pixels of the pictures it was trained on.
SIZE = 128
# For those who ask it for more than it learned.
DRAWS = 'the small Chroma draws emoji only, as "a 3d emoji of a fox on a green background"'
