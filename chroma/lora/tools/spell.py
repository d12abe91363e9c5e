"""What modules are called in LoRA files for kohya-ss/sd-scripts, diffusers and ComfyUI.

sd-scripts and ComfyUI name the original modules, diffusers its own, where q, k, v and a single
block's MLP are modules of their own.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from ...config import ChromaConfig
from ...errors import LoraError
from ..file import LoraFile
from ..names import Table, name_table

KOHYA, DIFFUSERS, COMFYUI = STYLES = ("kohya", "diffusers", "comfyui")
Rows = tuple[int, int]

_DIFFUSERS_NAMES = (
    "transformer_blocks.", "single_transformer_blocks.", "distilled_guidance_layer.",
    "x_embedder", "context_embedder", "proj_out",
)  # fmt: skip
# sd-scripts counts Flux's text encoders: T5 is the third, also for Chroma.
_TEXT_PREFIX = {
    KOHYA: "lora_te3_", DIFFUSERS: "text_encoder.", COMFYUI: "text_encoders.t5xxl.transformer.",
}  # fmt: skip
_PREFIX = {KOHYA: "lora_unet_", DIFFUSERS: "transformer.", COMFYUI: "diffusion_model."}
# ComfyUI knows diffusers' modules under these names.
_SPLIT_PREFIX = {KOHYA: "lycoris_", DIFFUSERS: "transformer.", COMFYUI: "transformer."}


@dataclass(frozen=True)
class Names:
    """The names of one model's modules in each style. Keys are the model's parameter keys."""

    table: Table
    parts: dict[str, list[tuple[Rows | None, str]]] = field(default_factory=dict)
    fused: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, config: ChromaConfig | None) -> "Names":
        """Those of a model of these sizes; None: of Chroma1."""
        names = cls(name_table(config or ChromaConfig()))
        found: dict[str, dict[Rows | None, str]] = {}
        for name, target in names.table.targets.items():
            if name.startswith(_DIFFUSERS_NAMES) and not target.text_encoder:
                places = found.setdefault(target.key, {})
                own = places.get(target.rows) == target.module
                if own or target.rows not in places:
                    places[target.rows] = name
        for key, places in found.items():
            smallest = [rows for rows in places if rows and not _holds_another(rows, places)]
            if smallest:
                names.parts[key] = [(rows, places[rows]) for rows in sorted(smallest)]
            elif None in places:
                names.parts[key] = [(None, places[None])]
            if smallest and None in places:
                names.fused[key] = places[None]
        return names

    def shape(self, key: str) -> tuple[int, ...]:
        """Raises LoraError for a parameter that the model has not."""
        shape = self.table.shapes.get(key)
        if shape is None:
            raise LoraError(f"the sizes of {key} are not known; name the model that it belongs to")
        return shape

    def whole(self, key: str, style: str, *, text_encoder: bool) -> str:
        """The name of a module in one piece."""
        module = key.rpartition(".")[0]
        if text_encoder:
            prefix = _TEXT_PREFIX[style]
        else:
            prefix = _PREFIX[style]
            if style == DIFFUSERS:
                module = self._in_diffusers(key, module)
        return _joined(prefix, module)

    def _in_diffusers(self, key: str, module: str) -> str:
        # A bias and a norm's scale have no name of their own there, but their module's.
        places = self.parts.get(key) or self.parts.get(f"{module}.weight") or [(None, module)]
        if len(places) == 1:
            return places[0][1]
        return self.fused.get(key) or module

    def split(self, key: str, style: str) -> list[tuple[Rows | None, str]]:
        """The rows and names of what diffusers has in the module's place."""
        module = key.rpartition(".")[0]
        places = self.parts.get(key) or self.parts.get(f"{module}.weight") or [(None, module)]
        return [(rows, _joined(_SPLIT_PREFIX[style], name)) for rows, name in places]


def style_of(file: LoraFile) -> str:
    """The style a file is in, or the nearest to it."""
    placed = (one for part in file.transformer.values() for one in part)
    if any(one.rows is not None for one in placed) or file.prefix == _PREFIX[DIFFUSERS]:
        return DIFFUSERS
    return KOHYA if file.prefix.endswith("_") else COMFYUI


def _joined(prefix: str, module: str) -> str:
    return prefix + (module.replace(".", "_") if prefix.endswith("_") else module)


def _holds_another(rows: Rows, places: Iterable[Rows | None]) -> bool:
    """Whether other, smaller parts lie within these rows."""
    return any(
        other is not None and other != rows and rows[0] <= other[0] and other[1] <= rows[1]
        for other in places
    )
