"""Memory that runs out in our nodes inside ComfyUI. Needs COMFYUI_PATH."""

# ruff: noqa: E402  (ComfyUI can be imported only after import_comfyui)

import pytest
import torch
from chroma_nodes.chroma.errors import OutOfMemoryError
from chroma_nodes.chroma.out_of_memory import REMEDY
from comfy_inprocess import import_comfyui

import_comfyui()

from chroma_nodes.nodes.host_memory import tells_out_of_memory
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


def test_a_node_that_goes_well_is_as_before():
    fake = node(None)
    assert fake.execute(value=3).result == (3,)
    assert fake.GET_NODE_INFO_V1()["name"] == "ChromaFake"
