"""Which part of the model a trainer's name of a module means, by tables made from the model.

Names with underscores cannot be split again with certainty ("to_q" or "to.q"?), so every name the
model has is written down in each spelling, and looked up.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType

import torch

from ..config import ChromaConfig
from ..text.t5 import T5Config
from ..transformer import ChromaTransformer
from .spelling import bodies

T5_XXL = T5Config(vocab_size=32128, d_model=4096, heads=64, d_kv=64, d_ff=10240, layers=24)
CLIP = "CLIP"


@dataclass(frozen=True)
class Target:
    """A module of the model, which of its parameters is meant, and which rows (first, end)."""

    module: str
    rows: tuple[int, int] | None = None
    parameter: str = "weight"
    text_encoder: bool = False

    @property
    def key(self) -> str:
        return f"{self.module}.{self.parameter}"


@dataclass(frozen=True)
class Table:
    """Every spelling of the names in one model.

    targets: {name: what it means}. foreign: {name in Flux: why Chroma has none}. shapes:
    {parameter key: shape}, the text encoder's only as far as its sizes are known.
    """

    targets: Mapping[str, Target]
    foreign: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]

    def shape(self, target: Target) -> tuple[int, ...] | None:
        """The shape of the rows a target means, or None if the model's sizes are not known."""
        shape = self.shapes.get(target.key)
        if shape is None or target.rows is None:
            return shape
        return (target.rows[1] - target.rows[0], *shape[1:])


@lru_cache(maxsize=4)
def name_table(config: ChromaConfig, text_config: T5Config | None = None) -> Table:
    """The table of a transformer and of the T5 encoder it reads (by default T5-XXL).

    The last few are kept, and shared: they cannot be written to.
    """
    if text_config is None and config.context_dim == T5_XXL.d_model:
        text_config = T5_XXL
    with torch.device("meta"):
        state = ChromaTransformer(config).state_dict()
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    text_names = _text_names((text_config or T5_XXL).layers)
    targets = dict(_own_names(shapes))
    targets |= dict(_diffusers_names(config))
    targets |= dict(_xlabs_names(config))
    targets |= text_names
    if text_config is not None:
        shapes |= _text_shapes(text_config, text_names)
    foreign = dict(_flux_names(config))
    return Table(
        targets=MappingProxyType(_underscored(targets)),
        foreign=MappingProxyType(_underscored(foreign)),
        shapes=MappingProxyType(shapes),
    )


def resolve(name: str, table: Table) -> Target | None:
    """What a module's name means, whichever prefixes stand before it; None if it is not known."""
    return next((table.targets[body] for body in bodies(name) if body in table.targets), None)


def why_foreign(name: str, table: Table) -> str | None:
    """Why Chroma has no such module, where it is known to belong to Flux; else None."""
    for body in bodies(name):
        if body in table.foreign:
            return table.foreign[body]
        if body.startswith(("text_model.", "text_model_", "text_projection")):
            return CLIP
        if body.startswith("bundle_emb."):
            return "embeddings of new words"
    return None


def _underscored(names: dict) -> dict:
    return {name.replace(".", "_"): value for name, value in names.items()} | names


def _own_names(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Target]]:
    """Modules, meaning their weight, and single parameters."""
    for key in shapes:
        module, _, parameter = key.rpartition(".")
        target = Target(module, parameter=parameter)
        yield key, target
        if parameter != "bias":
            yield module, target


def _diffusers_names(config: ChromaConfig) -> Iterator[tuple[str, Target]]:
    """Diffusers' modules; q, k, v and a single block's MLP are rows of fused matrices."""
    for i in range(config.double_depth):
        theirs, ours = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for start in (f"{theirs}.attn.", f"{theirs}.attn.processor."):
            yield from _split(f"{start}to_{{}}", f"{ours}.img_attn.qkv", config.hidden)
            yield from _split(f"{start}add_{{}}_proj", f"{ours}.txt_attn.qkv", config.hidden)
            yield f"{start}to_out.0", Target(f"{ours}.img_attn.proj")
            yield f"{start}to_out", Target(f"{ours}.img_attn.proj")
            yield f"{start}to_add_out", Target(f"{ours}.txt_attn.proj")
            yield f"{start}to_qkv", Target(f"{ours}.img_attn.qkv")
            for fused in ("add_qkv_proj", "to_added_qkv"):
                yield f"{start}{fused}", Target(f"{ours}.txt_attn.qkv")
        for stream, added, mlp in (("img", "", "ff"), ("txt", "added_", "ff_context")):
            yield from _norms(f"{theirs}.attn.norm_{added}", f"{ours}.{stream}_attn.norm")
            yield f"{theirs}.{mlp}.net.0.proj", Target(f"{ours}.{stream}_mlp.0")
            yield f"{theirs}.{mlp}.net.2", Target(f"{ours}.{stream}_mlp.2")
    for i in range(config.single_depth):
        theirs, ours = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        fused = Target(f"{ours}.linear1", (0, 3 * config.hidden))
        mlp = (3 * config.hidden, 3 * config.hidden + config.mlp_hidden)
        for start in (f"{theirs}.attn.", f"{theirs}.attn.processor."):
            yield from _split(f"{start}to_{{}}", f"{ours}.linear1", config.hidden)
            yield f"{start}to_qkv", fused
        yield from _norms(f"{theirs}.attn.norm_", f"{ours}.norm")
        yield f"{theirs}.proj_mlp", Target(f"{ours}.linear1", mlp)
        yield f"{theirs}.proj_out", Target(f"{ours}.linear2")
    guide = "distilled_guidance_layer"
    for i in range(config.approximator_depth):
        yield f"{guide}.layers.{i}.linear_1", Target(f"{guide}.layers.{i}.in_layer")
        yield f"{guide}.layers.{i}.linear_2", Target(f"{guide}.layers.{i}.out_layer")
    yield "x_embedder", Target("img_in")
    yield "context_embedder", Target("txt_in")
    yield "proj_out", Target("final_layer.linear")


def _split(pattern: str, module: str, width: int) -> Iterator[tuple[str, Target]]:
    for i, letter in enumerate("qkv"):
        yield pattern.format(letter), Target(module, (i * width, (i + 1) * width))


def _norms(theirs: str, ours: str) -> Iterator[tuple[str, Target]]:
    for letter, word in (("q", "query"), ("k", "key")):
        yield f"{theirs}{letter}", Target(f"{ours}.{word}_norm", parameter="scale")


def _xlabs_names(config: ChromaConfig) -> Iterator[tuple[str, Target]]:
    """XLabs-AI/x-flux and bytedance/USO: 1 is the picture's stream, 2 the text's."""
    for i in range(config.double_depth):
        for number, stream in (("1", "img"), ("2", "txt")):
            for part in ("qkv", "proj"):
                name = f"double_blocks.{i}.processor.{part}_lora{number}"
                yield name, Target(f"double_blocks.{i}.{stream}_attn.{part}")
    for i in range(config.single_depth):
        start, rows = f"single_blocks.{i}", (0, 3 * config.hidden)
        yield f"{start}.processor.qkv", Target(f"{start}.linear1", rows)
        yield f"{start}.processor.proj", Target(f"{start}.linear2")


def _text_names(layers: int) -> dict[str, Target]:
    names = ["shared", "encoder.final_layer_norm"]
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    for i in range(layers):
        start = f"encoder.block.{i}.layer"
        names += [f"{start}.0.SelfAttention.{letter}" for letter in "qkvo"]
        names += [f"{start}.1.DenseReluDense.{part}" for part in ("wi_0", "wi_1", "wo")]
        names += [f"{start}.{number}.layer_norm" for number in (0, 1)]
    targets = {name: Target(name, text_encoder=True) for name in [*names, bias]}
    return {**targets, "encoder.embed_tokens": targets["shared"]}


def _text_shapes(config: T5Config, names: Mapping[str, Target]) -> dict[str, tuple[int, ...]]:
    inner, width = config.heads * config.d_kv, config.d_model
    by_ending = {
        "q": (inner, width), "k": (inner, width), "v": (inner, width), "o": (width, inner),
        "wi_0": (config.d_ff, width), "wi_1": (config.d_ff, width), "wo": (width, config.d_ff),
        "shared": (config.vocab_size, width),
        "relative_attention_bias": (config.buckets, config.heads),
        "layer_norm": (width,), "final_layer_norm": (width,),
    }  # fmt: skip
    return {t.key: by_ending[t.module.rpartition(".")[2]] for t in names.values()}


def _flux_names(config: ChromaConfig) -> Iterator[tuple[str, str]]:
    """Modules of Flux.1 in both layouts that Chroma does without."""
    modulation = "Flux modulation"
    for i in range(config.double_depth):
        for stream, norm in (("img", "norm1"), ("txt", "norm1_context")):
            yield f"double_blocks.{i}.{stream}_mod.lin", modulation
            yield f"transformer_blocks.{i}.{norm}.linear", modulation
    for i in range(config.single_depth):
        yield f"single_blocks.{i}.modulation.lin", modulation
        yield f"single_transformer_blocks.{i}.norm.linear", modulation
    yield "final_layer.adaLN_modulation.1", modulation
    yield "norm_out.linear", modulation
    for ours, theirs in (
        ("time_in", "timestep_embedder"),
        ("vector_in", "text_embedder"),
        ("guidance_in", "guidance_embedder"),
    ):
        for a, b in (("in_layer", "linear_1"), ("out_layer", "linear_2")):
            yield f"{ours}.{a}", ours
            yield f"time_text_embed.{theirs}.{b}", ours


def bias_of(target: Target) -> Target:
    """The bias beside a weight."""
    return replace(target, parameter="bias")
