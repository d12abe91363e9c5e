"""The prompt nodes on a real ComfyUI server, and the same workflow without it.

Needs COMFYUI_PATH, the folder of a ComfyUI checkout, and runs in that ComfyUI's environment.
"""

import os
from pathlib import Path

import numpy as np
import pytest
from chroma_nodes.chroma.tiny import files as small
from chroma_nodes.chroma.workflow import run_workflow
from comfy_queue import Server
from PIL import Image

if "COMFYUI_PATH" not in os.environ:
    pytest.skip("COMFYUI_PATH is not set", allow_module_level=True)


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def graph(wildcards):
    """Every prompt node on the way to one picture of the small model."""
    clip = ["clip", 0]
    return {
        "model": node("ChromaLoadModel", model_name=small.LABEL, weight_dtype="fp32"),
        "clip": node("ChromaLoadTextEncoder", text_encoder_name=small.LABEL, weight_dtype="fp32"),
        "vae": node("ChromaLoadVAE", vae_name=small.LABEL),
        "choose": node("ChromaWildcards", text=wildcards, seed=3, count=1),
        "tag": node(
            "ChromaPromptTags", text=["choose", 0], quality="best quality", aesthetic=8,
            tags="sharp", separator="period", phrase="The photograph is a .", repeats=1,
        ),
        "check": node(
            "ChromaPromptCheck", clip=clip, positive=["tag", 0], negative="blurry", flash=False
        ),
        "short": node(
            "ChromaTextEncode", clip=clip, text=["tag", 0], pad_rule="reference",
            prompt_per_line=False,
        ),
        "long": node(
            "ChromaLongTextEncode", clip=clip, text="a red fox on a mat. " * 100,
            pad_rule="reference",
        ),
        "join": node("ChromaTextConcat", first=["short", 0], second=["long", 0]),
        "empty": node("EmptySD3LatentImage", width=small.SIZE, height=small.SIZE, batch_size=1),
        "sample": node(
            "KSampler", model=["model", 0], seed=1, steps=2, cfg=3.0, sampler_name="euler",
            scheduler="simple", positive=["join", 0], negative=["short", 0],
            latent_image=["empty", 0], denoise=1.0,
        ),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["vae", 0]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="prompts"),
    }  # fmt: skip


def pixels(path):
    with Image.open(path) as file:
        return np.asarray(file.convert("RGB")).astype(int)


def test_a_prompt_from_wildcards_to_the_picture(tmp_path):
    with Server(Path(os.environ["COMFYUI_PATH"]), tmp_path / "base") as server:
        folder = server.base / "models" / "wildcards"
        folder.mkdir()
        (folder / "animal.txt").write_text("# one\nfox\n")
        prompt = graph("a {red|0::blue} __animal__")
        run = server.run(prompt)
        assert run.ending == "execution_success", run.data
        (picture,) = server.pictures(run)
        outputs = server.outputs(run)
        shown = {name: output["text"][0] for name, output in outputs.items() if "text" in output}
        assert shown["choose"] == "a red fox"
        assert shown["short"].endswith(" of 512 tokens") and shown["short"] in shown["check"]
        assert "The negative prompt has" in shown["check"]
        assert shown["long"].startswith("parts of ")

        outside = server.run(graph("__../secret__"))
        assert outside.ending == "execution_error"
        assert "leads out of the wildcards folder" in outside.data["exception_message"]

        (folder / "animal.txt").write_text("cat\n")
        again = server.run(prompt)
        assert again.ending == "execution_success", again.data
        outputs = server.outputs(again)
        assert outputs["choose"]["text"] == ["a red cat"]

    (folder / "animal.txt").write_text("fox\n")
    (ours,) = run_workflow(prompt, models_dir=server.base / "models", output_dir=tmp_path / "out")
    assert np.abs(pixels(ours) - pixels(picture)).max() <= 2
