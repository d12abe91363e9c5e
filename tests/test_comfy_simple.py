"""The two nodes of a whole picture on a real ComfyUI server. Set COMFYUI_PATH to a checkout."""

import os
from pathlib import Path

import numpy as np
import pytest
from chroma_nodes.chroma.tiny import files as small
from comfy_queue import Server
from PIL import Image
from test_simple_nodes import pictures, two_nodes

CHECKOUT = os.environ.get("COMFYUI_PATH")
pytestmark = pytest.mark.skipif(
    not CHECKOUT, reason="COMFYUI_PATH is not set: no real ComfyUI to test against"
)


def test_the_picture_is_that_without_comfyui(server, tmp_path):
    prompt = two_nodes(batch_size=2)
    run = server.run(prompt)
    assert run.ending == "execution_success", run.data
    # Steps and previews are those of the sampler that runs inside.
    assert run.previews and max(value for _, value, _ in run.progress) == 2
    found = [np.asarray(Image.open(path)).astype(float) for path in server.pictures(run)]
    assert [picture.shape for picture in found] == [(small.SIZE, small.SIZE, 3)] * 2
    for ours, theirs in zip(pictures(prompt, tmp_path), found, strict=True):
        assert np.abs(ours - theirs).mean() < 2


def test_it_tells_what_the_preset_and_the_zeros_stand_for(server):
    assert server.run(two_nodes(steps=3, cfg=0)).ending == "execution_success"
    assert f"{small.SIZE} x {small.SIZE}, flow_pec, 3 steps, beta (" in server.log()
    assert "cfg 4" in server.log()


def test_an_interrupt_ends_it(server):
    run = server.run(two_nodes(steps=500), interrupt_at=2)
    assert run.ending == "execution_interrupted"


def test_an_unusable_size_is_one_line(server):
    run = server.run(two_nodes(width=100))
    assert run.ending == "execution_error"
    assert run.data["exception_message"].startswith("width 100 is not usable")


def test_another_seed_does_not_encode_the_prompts_again(server):
    def encoded(**changes) -> int:
        before = server.log().count(" of 512 tokens")
        assert server.run(two_nodes(**changes)).ending == "execution_success"
        return server.log().count(" of 512 tokens") - before

    assert encoded(seed=5, prompt="a 3d emoji of a fox") > 0
    assert encoded(seed=6, prompt="a 3d emoji of a fox") == 0
    assert encoded(seed=6, prompt="a 3d emoji of a cow") == 1


def test_no_link_is_followed_again_where_nothing_is_kept(tmp_path):
    """ComfyUI would load the files once more behind each link of the graph inside."""
    checkout = Path(CHECKOUT or "")
    with Server(checkout, tmp_path / "base", "--cache-none") as bare:
        info = bare.get("/object_info/ChromaTextToImage")["ChromaTextToImage"]["input"]["required"]
        assert not any(options[-1].get("rawLink") for options in info.values() if options[1:])


def test_a_clip_that_is_none_is_one_line(server):
    prompt = two_nodes()
    node = next(n for n in prompt.values() if n["class_type"] == "ChromaTextToImage")
    node["inputs"]["clip"] = "abc"
    run = server.run(prompt)
    assert run.ending == "execution_error"
    assert "this CLIP holds" in run.data["exception_message"]
    assert run.data["exception_type"] == "chroma_nodes.chroma.errors.CheckpointError"
