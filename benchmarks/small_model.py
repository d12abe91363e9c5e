"""How well the small model obeys its prompts, on combinations that training never showed.

    python benchmarks/small_model.py WORK --font NotoColorEmoji.ttf

WORK is the folder of `chroma.tiny.build` (the artwork to compare with lies there). Each picture is
compared with every emoji of the data set, drawn on the picture's own background colour: the nearest
one (mean squared error at 32 x 32) decides whether emoji and style were obeyed; the nearest named
colour of the picture's border decides the background.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
import torch
from chroma_nodes.chroma.pipeline import Pipeline, Settings, generate
from chroma_nodes.chroma.tiny.dataset import (
    COLOURS,
    SIZE,
    SIZES,
    STYLES,
    Concept,
    Scene,
    Sources,
    cutout,
    held_out,
    load_concepts,
)
from PIL import Image

SMALL = 32
BATCH = 20


def template(art: Image.Image) -> np.ndarray:
    """A centred large cutout as premultiplied RGBA, (SMALL, SMALL, 4) in [0, 1]."""
    scale = SIZES["large"] / max(art.size)
    art = art.resize(tuple(round(edge * scale) for edge in art.size), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 0))
    canvas.paste(art, tuple((SIZE - edge) // 2 for edge in art.size))
    rgba = np.asarray(canvas, dtype=np.float64) / 255
    rgba[..., :3] *= rgba[..., 3:]
    return rgba.reshape(SMALL, SIZE // SMALL, SMALL, SIZE // SMALL, 4).mean((1, 3))


def background(picture: np.ndarray) -> np.ndarray:
    """Median colour of the outer three pixels of (SIZE, SIZE, 3) in [0, 1]."""
    edge = np.ones(picture.shape[:2], dtype=bool)
    edge[3:-3, 3:-3] = False
    return np.median(picture[edge], axis=0)


def judge(
    picture: np.ndarray, scene: Scene, keys: Sequence[tuple[str, str]], templates: np.ndarray
) -> tuple[bool, bool, bool]:
    """(background, emoji, style) obeyed."""
    colour = background(picture)
    named = {name: np.square(np.array(rgb) / 255 - colour).sum() for name, rgb in COLOURS.items()}
    shrunk = picture.reshape(SMALL, SIZE // SMALL, SMALL, SIZE // SMALL, 3).mean((1, 3))
    candidates = templates[..., :3] + (1 - templates[..., 3:]) * colour
    hexcode, style = keys[int(np.square(candidates - shrunk).mean((1, 2, 3)).argmin())]
    return (
        min(named, key=named.__getitem__) == scene.colour,
        hexcode == scene.concept.hexcode,
        style == scene.style,
    )


def pictures(pipeline: Pipeline, prompts: Sequence[str], settings: Settings) -> np.ndarray:
    """One picture per prompt, seeds differing by batch, (N, SIZE, SIZE, 3) in [0, 1]."""
    parts = []
    for start in range(0, len(prompts), BATCH):
        batch = Settings(**{**settings.__dict__, "seed": settings.seed + start})
        parts.append(generate(pipeline, prompts[start : start + BATCH], "", batch))
        print(f"{start + len(parts[-1])}/{len(prompts)}", end="\r", flush=True)
    return torch.cat(parts).numpy().astype(np.float64)


def held_out_scenes(concepts: Sequence[Concept], count: int, seed: int) -> list[Scene]:
    by_code = {concept.hexcode: concept for concept in concepts}
    combinations = Random(seed).sample(sorted(held_out(concepts)), count)
    return [Scene(by_code[code], style, colour) for code, style, colour in combinations]


def contact_sheet(images: np.ndarray, columns: int, path: Path) -> None:
    rows = [
        np.concatenate(list(images[i : i + columns]), axis=1)
        for i in range(0, len(images), columns)
    ]
    sheet = (np.concatenate(rows) * 255).round().astype(np.uint8)
    Image.fromarray(sheet).save(path, quality=92)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--font", type=Path, required=True)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--models", type=Path, help="folder with other weights than the shipped")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of 40 pictures here")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--only", choices=("defaults", "cfg 1", "empty prompt"))
    args = parser.parse_args()

    sources = Sources.below(args.work, args.font)
    concepts = load_concepts(sources)
    keys = [(concept.hexcode, style) for concept in concepts for style in STYLES]
    templates = np.stack([template(cutout(sources, c, s)) for c in concepts for s in STYLES])
    names = ("transformer", "text_encoder", "tokenizer", "vae")
    files = ("transformer.safetensors", "text_encoder.safetensors", "tokenizer.json",
             "vae.safetensors")  # fmt: skip
    own = {n: args.models / f for n, f in zip(names, files, strict=True)} if args.models else {}
    pipeline = Pipeline.load(
        own.get("transformer"), own.get("text_encoder"), own.get("tokenizer"), own.get("vae")
    )
    scenes = held_out_scenes(concepts, args.count, seed=7)
    captions = [scene.caption() for scene in scenes]
    base = Settings(width=SIZE, height=SIZE, seed=1)
    runs = {
        "defaults": (captions, base),
        "cfg 1": (captions, Settings(**{**base.__dict__, "cfg": 1.0})),
        "empty prompt": ([""] * len(captions), base),
    }
    results = {}
    for name, (prompts, settings) in runs.items():
        if args.only not in (None, name):
            continue
        images = pictures(pipeline, prompts, settings)
        verdicts = np.array(
            [judge(im, sc, keys, templates) for im, sc in zip(images, scenes, strict=True)]
        )
        shares = [float(share) for share in verdicts.mean(0)]
        results[name] = dict(zip(("background", "emoji", "style"), shares, strict=True))
        print(f"{name}: " + ", ".join(f"{k} {v:.1%}" for k, v in results[name].items()))
        if name == "defaults" and args.sheet:
            contact_sheet(images[:40], 8, args.sheet)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
