"""Rebuild the small model.

    python -m chroma_nodes.chroma.tiny.build WORK --font NotoColorEmoji.ttf

WORK keeps sources, pictures and the training state; an interrupted build goes on from there.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from . import train_vae
from .captions import build_tokenizer
from .dataset import SIZE, Scene, Sources, cutout, load_concepts, render, training_scenes
from .sources import fetch
from .train import Recipe, load, save, train

RENDERS_PER_PAIR = 64
VAE_STEPS = 5000
STEPS = 10_000


def render_all(scenes: Sequence[Scene], sources: Sources, file: Path) -> np.ndarray:
    """All pictures, (N, SIZE, SIZE, 3) uint8, kept in `file`."""
    if file.exists():
        return np.load(file, mmap_mode="r")
    part = file.with_suffix(".part.npy")
    pictures = np.lib.format.open_memmap(part, "w+", np.uint8, (len(scenes), SIZE, SIZE, 3))
    drawn, art = None, None
    for index, scene in enumerate(scenes):
        if art is None or drawn != (scene.concept, scene.style):
            drawn, art = (scene.concept, scene.style), cutout(sources, scene.concept, scene.style)
        pictures[index] = render(art, scene.colour, scene.size, scene.position)
    pictures.flush()
    part.replace(file)
    return np.load(file, mmap_mode="r")


def build(
    work: Path, font: Path, out: Path, vae_steps: int, steps: int, start: Path | None
) -> None:
    """Write tokenizer.json, vae.safetensors, text_encoder.safetensors, transformer.safetensors.

    `start` is a folder with all four to go on from: its autoencoder is kept, the rest trained on.
    """
    fetch(work)
    sources = Sources.below(work, font)
    concepts = load_concepts(sources)
    scenes = list(training_scenes(concepts, RENDERS_PER_PAIR))
    pictures = render_all(scenes, sources, work / "pictures.npy")
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(concepts)
    tokenizer.save(str(out / "tokenizer.json"))
    vae_file = work / "vae.safetensors"
    if start is not None:
        vae_file.write_bytes((start / "vae.safetensors").read_bytes())
    elif not vae_file.exists():
        train_vae.save(train_vae.train(pictures, vae_steps), vae_file)
    (out / "vae.safetensors").write_bytes(vae_file.read_bytes())
    latents = train_vae.encode_all(train_vae.load(vae_file), pictures)
    model = None if start is None else load(start, tokenizer.get_vocab_size())
    state_file = work / "training.state"
    save(train(latents, scenes, tokenizer, Recipe(steps), state_file, model), out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, help="folder for sources and intermediate results")
    parser.add_argument("--font", type=Path, required=True, help="NotoColorEmoji.ttf")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--vae-steps", type=int, default=VAE_STEPS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--start", type=Path, help="folder with weights to go on from")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    build(args.work, args.font, args.out, args.vae_steps, args.steps, args.start)


if __name__ == "__main__":
    main()
