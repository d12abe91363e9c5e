"""Memory that runs out in our nodes inside ComfyUI. Needs COMFYUI_PATH."""

# ruff: noqa: E402  (ComfyUI can be imported only after import_comfyui)

import pytest
import torch
from chroma_nodes.chroma.errors import OutOfMemoryError
from chroma_nodes.chroma.out_of_memory import REMEDY
from chroma_nodes.chroma.tiny import files as small
from comfy_inprocess import import_comfyui

import_comfyui()

import comfy.sample
from chroma_nodes.nodes.host_lora import config_of
from chroma_nodes.nodes.host_memory import handled_by_comfyui, tells_out_of_memory
from chroma_nodes.nodes.host_model import load_model
from comfy_api.latest import io


def node(error):
    class ChromaFake(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            return io.Schema(node_id="ChromaFake", display_name="Fake", category="Chroma",
                             inputs=[], outputs=[io.Int.Output()])  # fmt: skip

        @classmethod
        def execute(cls, value=1):
            if error is not None:
                raise error
            return io.NodeOutput(value)

    return tells_out_of_memory(ChromaFake)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate")],
)
def test_what_comfyui_does_not_know_is_told_in_one_line(error):
    with pytest.raises(OutOfMemoryError, match="out of memory") as told:
        node(error).execute()
    assert REMEDY in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize(
    "error", [torch.cuda.OutOfMemoryError("CUDA out of memory"), RuntimeError("shapes"), KeyError()]
)
def test_what_comfyui_handles_and_all_else_passes(error):
    with pytest.raises(type(error)) as told:
        node(error).execute()
    assert told.value is error
    assert (REMEDY in str(error)) == handled_by_comfyui(error)


def sample(model):
    cond = [[torch.zeros(1, 3, config_of(model).context_dim), {}]]
    latent = torch.zeros(1, 16, 4, 4)
    return comfy.sample.sample(
        model, latent, 2, 1.0, "euler", "simple", cond, cond, latent, disable_pbar=True, seed=0
    )


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("DefaultCPUAllocator: not enough memory"), OutOfMemoryError),
        (MemoryError(), OutOfMemoryError),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), torch.cuda.OutOfMemoryError),
        (RuntimeError("shapes"), RuntimeError),
    ],
)
def test_a_core_sampler_tells_what_to_try(error, told, monkeypatch):
    model = load_model(small.TRANSFORMER, "bf16")
    assert torch.isfinite(sample(model)).all()

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(model.model.diffusion_model, "forward", fail)
    with pytest.raises(told) as raised:
        sample(model)
    assert (REMEDY in str(raised.value)) == ("memory" in str(raised.value))


def test_a_node_that_goes_well_is_as_before():
    fake = node(None)
    assert fake.execute(value=3).result == (3,)
    assert fake.GET_NODE_INFO_V1()["name"] == "ChromaFake"
