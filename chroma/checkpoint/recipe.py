"""Which tensor of a model gets which format when a quantised file is made."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..errors import CheckpointError
from ..quant.ggml_types import GGML_TYPES
from .identify import Kind
from .reader import TensorInfo

# {target: GGML type of the matrices}
GGUF_TARGETS = {
    "q8_0": "Q8_0", "q6_k": "Q6_K", "q5_k": "Q5_K", "q4_k": "Q4_K", "q5_1": "Q5_1",
    "q5_0": "Q5_0", "q4_1": "Q4_1", "q4_0": "Q4_0", "bf16": "BF16", "f16": "F16",
}  # fmt: skip
# {target: name of the matrices' format}; `FP8_LEARNED` is stored as fp8.
FP8, FP8_LEARNED, INT8 = "fp8", "fp8-learned", "int8"
SAFETENSORS_TARGETS = {FP8: FP8, FP8_LEARNED: FP8_LEARNED, "fp8mixed": FP8, INT8: INT8}
TARGETS = (*GGUF_TARGETS, *SAFETENSORS_TARGETS)
FLOATS = ("F32", "F16", "BF16")

# Small beside the blocks, and what their errors reach is everything: never below 16 bits.
SENSITIVE = ("distilled_guidance_layer.", "img_in.", "txt_in.", "final_layer.")
# As llama.cpp and the tools derived from it have it: tensors this small gain nothing.
_SMALL = 1024
# The embedding and the position bias are looked up, not multiplied: fp8 and int8 spare them.
_T5_LINEARS = (".SelfAttention.q.", ".SelfAttention.k.", ".SelfAttention.v.", ".SelfAttention.o.",
               ".DenseReluDense.")  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """A target format, and what shall keep its precision besides the sensitive layers.

    keep: parts of tensor names; `*` stands for any text, `?` for one character. Raises
    CheckpointError for a target that there is not.
    """

    target: str
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise CheckpointError(
                f"unknown format '{self.target}'; expected one of {', '.join(TARGETS)}"
            )

    @property
    def is_gguf(self) -> bool:
        return self.target in GGUF_TARGETS

    def keeps(self, name: str) -> bool:
        """Whether the user wants this tensor as it is."""
        return any(fnmatchcase(name, f"*{pattern}*") for pattern in self.keep)


def plan(tensors: Mapping[str, TensorInfo], kind: Kind, recipe: Recipe) -> dict[str, str]:
    """{name: format} of a transformer's (CHROMA) or a text encoder's (T5) canonical tensors.

    A format is a GGML type, a dtype of safetensors, or FP8, FP8_LEARNED or INT8. Raises
    CheckpointError for a pattern to keep that fits no tensor.
    """
    for pattern in recipe.keep:
        if not any(Recipe(recipe.target, (pattern,)).keeps(name) for name in tensors):
            raise CheckpointError(
                f"no tensor of {kind.value} is called '{pattern}'; check the patterns to keep, "
                f"for instance {next(iter(tensors))}"
            )
    choose = _gguf_type if recipe.is_gguf else _safetensors_format
    return {name: choose(name, info, kind, recipe) for name, info in tensors.items()}


def _gguf_type(name: str, info: TensorInfo, kind: Kind, recipe: Recipe) -> str:
    is_matrix = len(info.shape) == 2 and math.prod(info.shape) > _SMALL
    if not is_matrix or "relative_attention_bias" in name:
        return "F32"
    wanted = GGUF_TARGETS[recipe.target]
    if recipe.keeps(name) or (wanted not in FLOATS and _is_sensitive(name, kind)):
        return "F16" if info.dtype == "F16" else "BF16"
    # The tools in use fall back to F16 where a row does not fill whole blocks.
    return "F16" if info.shape[1] % GGML_TYPES[wanted].block else wanted


def _safetensors_format(name: str, info: TensorInfo, kind: Kind, recipe: Recipe) -> str:
    is_linear = len(info.shape) == 2 and name.endswith(".weight")
    if kind is Kind.T5:
        is_linear = is_linear and any(part in name for part in _T5_LINEARS)
    if not is_linear or _is_sensitive(name, kind) or recipe.keeps(name):
        return info.dtype
    return SAFETENSORS_TARGETS[recipe.target]


def _is_sensitive(name: str, kind: Kind) -> bool:
    return kind is not Kind.T5 and name.startswith(SENSITIVE)
