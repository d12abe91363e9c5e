"""A ComfyUI custom node that adds no node, but GET /soak/collect: collect garbage, then count."""

import ctypes
import gc
import threading
from typing import Any

import torch
from aiohttp import web
from server import PromptServer

NODE_CLASS_MAPPINGS: dict[str, type] = {}


@PromptServer.instance.routes.get("/soak/collect")
async def collect(_: web.Request) -> web.Response:
    """{"objects", "tensors", "tensor_bytes", ...} that are alive in the idle server.

    "core_keys" of ComfyUI's own cache are dropped before. "pool_threads" are asyncio's, of which it
    starts a few more whenever as many are busy at a time. Where the C library can, memory that the
    process keeps for later but does not use goes back to the system.
    """
    core_keys = sum(forget_stale_keys(one) for one in gc.get_objects())
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    objects = gc.get_objects()
    # By type: asking an object for its class may run code of its own.
    tensors = [one for one in objects if issubclass(type(one), torch.Tensor)]
    sizes = {s.data_ptr(): s.nbytes() for s in map(torch.Tensor.untyped_storage, tensors)}
    counts = {
        "objects": len(objects), "tensors": len(tensors), "tensor_bytes": sum(sizes.values()),
        "core_keys": core_keys,
        "pool_threads": sum(one.name.startswith("asyncio_") for one in threading.enumerate()),
    }  # fmt: skip
    return web.json_response(counts)


def forget_stale_keys(cache: Any) -> int:
    """How many keys were dropped that ComfyUI's RAMPressureCache keeps for ever.

    It marks every node of a prompt as used, and forgets only those that got a result: each run that
    is interrupted or fails leaves the keys of the nodes that did not run, some 100 kB.
    """
    if type(cache).__name__ != "RAMPressureCache":
        return 0
    stale = cache.used_generation.keys() - cache.cache.keys()
    for key in stale:
        del cache.used_generation[key]
        cache.timestamps.pop(key, None)
    return len(stale)
