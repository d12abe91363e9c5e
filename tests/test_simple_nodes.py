"""The two nodes that make a picture of a prompt, against the same made of single nodes."""

import numpy as np
import pytest
from chroma_nodes.chroma.config import ChromaConfig
from chroma_nodes.chroma.devices import best_device
from chroma_nodes.chroma.errors import ChromaError
from chroma_nodes.chroma.pipeline import Settings
from chroma_nodes.chroma.presets import PRESETS, own_size
from chroma_nodes.chroma.tiny import files as small
from chroma_nodes.chroma.workflow import REGISTRY, Context, execute, to_interface
from chroma_nodes.chroma.workflow.single import text_to_image
from PIL import Image

PROMPT, NEGATIVE = "a flat emoji of a cat on a blue background", "blurry"


def two_nodes(**inputs):
    chosen = {
        "prompt": PROMPT, "negative_prompt": NEGATIVE, "seed": 4, "width": 0, "height": 0,
        "batch_size": 1, "preset": "Base / HD", "steps": 2, "cfg": 0.0, **inputs,
    }  # fmt: skip
    names = ("model_name", "text_encoder_name", "vae_name")
    load = {**dict.fromkeys(names, small.LABEL), "weight_dtype": "fp32"}
    links = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2]}
    return {
        "1": {"class_type": "ChromaLoad", "inputs": load},
        "2": {"class_type": "ChromaTextToImage", "inputs": {**links, **chosen}},
        "3": {
            "class_type": "SaveImage",
            "inputs": {"images": ["2", 0], "filename_prefix": "two"},
        },
    }


def pictures(prompt, folder):
    context = Context(
        best_device(),
        folder,
        folder,
        folder,
        prompt,
        to_interface(prompt, REGISTRY),
        progress=False,
    )
    execute(context)
    return [np.asarray(Image.open(path)).astype(float) for path in context.saved]


def test_the_picture_of_the_single_nodes(tmp_path):
    settings = Settings(small.SIZE, small.SIZE, steps=2, seed=4)
    single = pictures(text_to_image([PROMPT], NEGATIVE, settings, weight_dtype="fp32"), tmp_path)
    # One encoder computes in fp32 and the other in what suits the device.
    assert np.abs(pictures(two_nodes(), tmp_path)[0] - single[0]).mean() < 2


def test_sizes_batches_and_presets(tmp_path):
    wide, second = pictures(two_nodes(width=64, height=96, batch_size=2), tmp_path)
    assert wide.shape == (96, 64, 3)
    (alone,) = pictures(two_nodes(width=64, height=96, seed=5), tmp_path)
    assert np.abs(second - alone).max() <= 2
    flash = two_nodes(width=64, height=64, preset="Flash")
    same = two_nodes(width=64, height=64, preset="Flash", cfg=PRESETS["Flash"].cfg)
    assert np.array_equal(*(pictures(prompt, tmp_path)[0] for prompt in (flash, same)))


def test_a_size_that_is_no_multiple_of_16_is_named(tmp_path):
    with pytest.raises(ChromaError, match="width 100 is not usable"):
        pictures(two_nodes(width=100), tmp_path)


def test_the_size_a_model_was_trained_for():
    assert own_size(ChromaConfig()) == 1024
