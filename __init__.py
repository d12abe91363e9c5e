"""Chroma for ComfyUI. Importing this must never need ComfyUI: pytest and pip import it too."""

WEB_DIRECTORY = "./nodes/web"


async def comfy_entrypoint():
    """ComfyUI calls this once at start-up to learn the pack's nodes."""
    from .nodes import ChromaExtension

    return ChromaExtension()
