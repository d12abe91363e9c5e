"""A ComfyUI custom node that adds no node, but GET /soak/collect: collect garbage, then count."""

import gc

import torch
from aiohttp import web
from server import PromptServer

NODE_CLASS_MAPPINGS: dict[str, type] = {}


@PromptServer.instance.routes.get("/soak/collect")
async def collect(_: web.Request) -> web.Response:
    """{"objects", "tensors", "tensor_bytes"} that are alive in the server after a collection."""
    gc.collect()
    objects = gc.get_objects()
    # By type: asking an object for its class may run code of its own.
    tensors = [one for one in objects if issubclass(type(one), torch.Tensor)]
    sizes = {s.data_ptr(): s.nbytes() for s in map(torch.Tensor.untyped_storage, tensors)}
    counts = {
        "objects": len(objects), "tensors": len(tensors), "tensor_bytes": sum(sizes.values()),
    }  # fmt: skip
    return web.json_response(counts)
