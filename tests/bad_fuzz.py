"""Headers, graphs and texts of hypothesis' making: each is taken, or refused in one line."""

import copy
import json
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bad_files import gguf, key, safetensors, tensor, text
from bad_workflows import small_graph
from chroma_nodes.chroma.checkpoint.gguf import read_gguf_header
from chroma_nodes.chroma.checkpoint.inspect import inspect_file
from chroma_nodes.chroma.errors import ChromaError
from chroma_nodes.chroma.text.weighting import parse_weights
from chroma_nodes.chroma.workflow import REGISTRY, apply_overrides, check
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

Attempt = Callable[[Any, Path], object]
TAKEN = "taken"
_EDGES = (0, 1, 2, 31, 32, 255, 2**31, 2**32 - 1, 10**12, 2**63 - 1, 2**63, 2**64 - 1)
NUMBERS = st.sampled_from(_EDGES) | st.integers(-(2**70), 2**70)
U64 = st.sampled_from(_EDGES) | st.integers(0, 2**64 - 1)
LETTERS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.floats() | LETTERS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(LETTERS, inner, max_size=4),
    max_leaves=20,
)
_NAMES = st.sampled_from((
    "double_blocks.0.img_attn.qkv.weight", "distilled_guidance_layer.norms.0.scale",
    "img_in.weight",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "x.lora_A.weight",
    "decoder.conv_in.weight", "scaled_fp8", "a.comfy_quant", "__metadata__",
)) | LETTERS  # fmt: skip
_ENTRIES = JSON | st.fixed_dictionaries({
    "dtype": st.sampled_from(("F32", "BF16", "F8_E4M3", "F4", "U8")) | JSON,
    "shape": st.lists(st.integers(0, 4) | NUMBERS, max_size=4) | JSON,
    "data_offsets": st.lists(st.sampled_from((0, 4, 16, 64)) | NUMBERS, max_size=3) | JSON,
})  # fmt: skip
SAFETENSORS = st.builds(
    safetensors,
    st.dictionaries(_NAMES, _ENTRIES, max_size=5) | JSON | st.binary(max_size=50),
    st.binary(max_size=64), st.none() | U64,
)  # fmt: skip
_KEYS = st.builds(
    key, st.binary(min_size=1, max_size=8) | st.just(b"general.alignment"),
    st.integers(0, 13) | st.integers(0, 2**32 - 1),
    st.binary(max_size=24) | st.builds(text, st.binary(max_size=9))
    | st.builds(lambda kind, count: struct.pack("<IQ", kind, count), st.integers(0, 13), U64),
)  # fmt: skip
_TENSORS = st.builds(
    tensor, st.binary(max_size=8) | st.sampled_from((b"enc.blk.0.attn_q.weight", b"img_in.weight")),
    st.lists(st.sampled_from((1, 32, 256)) | U64, max_size=5),
    st.integers(0, 40) | st.integers(0, 2**32 - 1), st.sampled_from((0, 32, 1024)) | U64,
    st.none() | st.integers(0, 2**32 - 1),
)  # fmt: skip
GGUF = st.builds(
    gguf, st.lists(_TENSORS, max_size=4), st.lists(_KEYS, max_size=4),
    st.sampled_from((b"", bytes(4096))), st.none() | st.tuples(U64, U64),
    st.just(b"GGUF"), st.sampled_from((2, 3, 3, 3)) | st.integers(0, 2**32 - 1),
)  # fmt: skip


@st.composite
def graphs(draw: st.DrawFn) -> Any:
    """The small workflow with something of it replaced, or any JSON at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(JSON)
    prompt = copy.deepcopy(small_graph())
    prompt["8"]["inputs"]["noise_seed"] = draw(U64)
    for _ in range(draw(st.integers(0, 3))):
        node_id = draw(st.sampled_from(sorted(prompt)))
        node = prompt[node_id]
        names = sorted(node["inputs"]) if isinstance(node, dict) and node.get("inputs") else []
        match draw(st.integers(0, 4)):
            case 0:
                prompt[draw(LETTERS)] = draw(JSON)
            case 1 if isinstance(node, dict):
                node["class_type"] = draw(st.sampled_from(sorted(REGISTRY)) | LETTERS)
            case 2 if names:
                node["inputs"][draw(st.sampled_from(names))] = draw(JSON)
            case 3 if names:
                link = [draw(st.sampled_from(sorted(prompt)) | LETTERS), draw(NUMBERS)]
                node["inputs"][draw(st.sampled_from(names))] = link
            case _:
                prompt[node_id] = draw(JSON)
                if not isinstance(prompt[node_id], dict) or "inputs" not in prompt[node_id]:
                    break
    return prompt


def _safetensors(content: bytes, folder: Path) -> object:
    (folder / "x.safetensors").write_bytes(content)
    return inspect_file(folder / "x.safetensors")


def _gguf(content: bytes, folder: Path) -> object:
    (folder / "x.gguf").write_bytes(content)
    read_gguf_header(folder / "x.gguf")
    return inspect_file(folder / "x.gguf")


_TARGETS = ("5.text", "7.width", "14.filename_prefix", "SaveImage.images", "1.x", "9", "")
FUZZED: dict[str, tuple[st.SearchStrategy, Attempt]] = {
    "safetensors headers": (SAFETENSORS, _safetensors),
    "GGUF headers": (GGUF, _gguf),
    "workflows": (graphs(), lambda prompt, _: check(prompt, REGISTRY)),
    "overrides": (
        st.builds(lambda target, value: f"{target}={value}", st.sampled_from(_TARGETS) | LETTERS,
                  LETTERS | JSON.map(json.dumps)),
        lambda said, _: check(apply_overrides(small_graph(), [said]), REGISTRY),
    ),
    "prompt weights": (
        st.text(st.sampled_from("(): \\a1.-\n,é😀"), max_size=60),
        lambda said, _: parse_weights(said),
    ),
}  # fmt: skip


def fuzz(kind: str, count: int, folder: Path) -> Counter[str]:
    """Try `count` inputs of a kind; {class of error, or TAKEN: how many}.

    Raises AssertionError for an error of another class, and for one that is not one short line.
    """
    strategy, attempt = FUZZED[kind]
    found: Counter[str] = Counter()

    @settings(
        max_examples=count, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink),
    )  # fmt: skip
    @given(strategy)
    def try_one(value: Any) -> None:
        try:
            attempt(value, folder)
        except ChromaError as error:
            told = str(error)
            assert told and "\n" not in told and len(told) < 2000, told
            found[type(error).__name__] += 1
        else:
            found[TAKEN] += 1

    try_one()
    return found
