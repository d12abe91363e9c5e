"""LoRA nodes on a real ComfyUI server: run after run with other LoRAs. Set COMFYUI_PATH."""

import os
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import pytest
from chroma_nodes.chroma.checkpoint.quantise import quantise_file
from chroma_nodes.chroma.tiny import files as small
from comfy_queue import Server
from lora_files import write_lora
from PIL import Image
from safetensors.torch import load_file
from workflow_files import API, load, on_small_model

CHECKOUT = os.environ.get("COMFYUI_PATH")
pytestmark = pytest.mark.skipif(
    not CHECKOUT, reason="COMFYUI_PATH is not set: no real ComfyUI to test against"
)
Q8_0 = "small.gguf"
FILES, WAYS = 4, ("auto", "patch", "bypass")
CYCLE = FILES * len(WAYS)  # runs after which the same file comes with the same way again
WARM_UP, RUNS = 2 * CYCLE, 5 * CYCLE


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    running = Server(Path(CHECKOUT or ""), tmp_path_factory.mktemp("comfy") / "base")
    models = running.base / "models"
    for folder in ("loras", "diffusion_models"):
        (models / folder).mkdir()
    quantise_file(small.TRANSFORMER, "q8_0", models / "diffusion_models" / Q8_0)
    weights = {
        key: value
        for key, value in load_file(small.TRANSFORMER).items()
        if value.ndim == 2 and "_blocks." in key
    }
    for seed in range(FILES):
        write_lora(models / "loras" / f"{seed}.safetensors", weights, rank=8, seed=seed)
    with running:
        yield running


def graph(i, model_name):
    """The small workflow of one step with one LoRA, which is another for every `i`."""
    prompt = on_small_model(load(next(p for p in API if p.stem == "chroma-small")))
    loader = next(k for k, n in prompt.items() if n["class_type"] == "ChromaLoadModel")
    for node in prompt.values():
        for name, value in node["inputs"].items():
            if value == [loader, 0]:
                node["inputs"][name] = ["lora", 0]
            elif name == "steps":
                node["inputs"][name] = 1
    prompt[loader]["inputs"] |= {"model_name": model_name, "weight_dtype": "auto"}
    prompt["lora"] = {
        "class_type": "ChromaLoadLora",
        "inputs": {
            "model": [loader, 0], "lora_name": f"{i % FILES}.safetensors", "strength": i / 100,
            "text_encoder_strength": 1.0, "how": WAYS[i % len(WAYS)], "blocks": "",
        },
    }  # fmt: skip
    return prompt


def picture(server, prompt):
    run = server.run(prompt)
    assert run.ending == "execution_success", run.data
    with Image.open(server.pictures(run)[0]) as image:
        return np.asarray(image).astype(int)


@pytest.mark.parametrize("model_name", [small.LABEL, Q8_0])
def test_memory_does_not_grow_with_the_loras_that_were_used(server, model_name):
    process, used = psutil.Process(server.process.pid), []
    for i in range(WARM_UP + RUNS):
        picture(server, graph(i, model_name))
        used.append(process.memory_info().rss)
    # What it falls back to within a cycle: some runs end with a copy of the merged weights. From
    # cycle to cycle, since the memory that is kept for later may grow once, in a step.
    least = [min(used[i : i + CYCLE]) for i in range(WARM_UP, len(used) - CYCLE + 1, CYCLE)]
    assert median(b - a for a, b in pairwise(least)) <= 0.003 * least[0], least


@pytest.mark.parametrize("model_name", [small.LABEL, Q8_0])
def test_the_model_without_loras_paints_as_before(server, model_name):
    none = graph(0, model_name)  # at strength 0
    before = picture(server, none)
    for i in (40, 41, 42):
        assert (picture(server, graph(i, model_name)) != before).any()
        again = graph(0, model_name)
        again["lora"]["inputs"]["lora_name"] = f"{i % FILES}.safetensors"
        assert (picture(server, again) == before).all()


def test_the_node_shows_its_report(server):
    run = server.run(graph(50, Q8_0))
    output = server.outputs(run)["lora"]
    assert "strength 0.5" in output["text"][0]
    assert output["text"][0] in server.log()
