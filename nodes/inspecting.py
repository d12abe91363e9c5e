"""The node that tells what a model file is."""

import folder_paths
from comfy_api.latest import io

from ..chroma.checkpoint.inspect import describe, inspect_file
from ..chroma.tiny import files as small
from . import categories
from .host import choices, locate
from .host_report import Notes

# {category: the small model's file in it}; all are offered in one menu, as <category>/<file>.
SMALL_FILES = {
    "diffusion_models": small.TRANSFORMER,
    "text_encoders": small.TEXT_ENCODER,
    "vae": small.VAE,
}
LORAS = "loras"


def inspectable() -> list[str]:
    """What the menu offers: every file of the folders that the loaders list."""
    files = [f"{category}/{name}" for category in SMALL_FILES for name in choices(category)]
    loras = sorted(folder_paths.get_filename_list(LORAS), key=str.lower)
    return [*files, *(f"{LORAS}/{name}" for name in loras)]


class ChromaInspect(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        names = inspectable()
        return io.Schema(
            node_id="ChromaInspect",
            display_name="Inspect Model File",
            category=categories.TOOLS,
            description="Tell what a model file is, of Chroma or of another model, which formats "
            "are in it, what loads it and what it needs. Only the header is read.",
            inputs=[
                io.Combo.Input(
                    "file_name",
                    options=names,
                    default=names[0],
                    tooltip="A file from models/diffusion_models, text_encoders, vae or loras.",
                )
            ],
            outputs=[io.String.Output(display_name="report", tooltip="What is shown in the node.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, file_name: str) -> io.NodeOutput:
        category, _, name = file_name.partition("/")
        path = locate(category, name, SMALL_FILES.get(category, small.TRANSFORMER))
        notes = Notes(describe(inspect_file(path)))
        shown = notes.tell(cls.hidden and cls.hidden.unique_id)
        return io.NodeOutput("\n".join(notes.lines), ui=shown)
