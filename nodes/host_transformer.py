"""Our transformer inside a ComfyUI MODEL: the model's own layers, our forward.

Everything that other node packs hook into stays where they look for it: BFL's module names,
`forward_orig`, `get_modulations`, wrappers, block replacements, attention patches, control.
Shapes: B batch, L image tokens, T text tokens, C width, D head dimension.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.patcher_extension
import torch
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor, nn
from torch.nn import functional as F

from ..chroma.approximator import ModulationTable
from ..chroma.blocks import DoubleBlock, SingleBlock, layer_norm, run_double, run_single
from ..chroma.caching import Batch
from ..chroma.config import PATCH, THETA, ChromaConfig
from ..chroma.errors import CheckpointError
from ..chroma.latents import pack, pad_to_patch, position_ids, text_mask, unpack
from ..chroma.ops import Attention, modulate, rope_table
from ..chroma.transformer import ChromaTransformer
from .host_caching import ROWS, with_cached_rows
from .host_nag import OVERRIDE, join_negative

# Key in transformer_options of the run's ModulationMemo.
MEMO = "chroma_modulation"
Hook = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]


class ModulationMemo:
    """The last modulation table of one sampling run, for cond, uncond and the whole batch."""

    def __init__(self) -> None:
        self._entry: tuple[Any, ModulationTable] | None = None

    def get(self, key: Any, make: Callable[[], ModulationTable]) -> ModulationTable:
        """The table under `key`, made anew if the last one was another."""
        entry = self._entry
        if entry is None or entry[0] != key:
            entry = self._entry = (key, make())
        return entry[1]


class HostTransformer(ChromaTransformer):
    """Our forward over the layers of `source`, which are shared, not copied.

    `source` is ComfyUI's own Chroma or a ChromaTransformer. Its layers are only ever called:
    their weights may be quantised, on another device or not loaded yet.
    """

    def __init__(
        self, source: nn.Module, config: ChromaConfig, params: Any, dtype: torch.dtype
    ) -> None:
        nn.Module.__init__(self)
        for name, child in source.named_children():
            self.add_module(name, child)
        self.config, self.params, self.dtype, self.patch_size = config, params, dtype, PATCH
        self.in_channels = self.out_channels = config.in_channels
        self.hidden_size, self.num_heads = config.hidden, config.heads

    def forward(
        self, x, timestep, context, guidance=None, control=None, transformer_options=None, **kwargs
    ) -> Tensor:
        """Velocity at the latent x (B, 16, h, w), as ComfyUI calls it."""
        options = transformer_options or {}
        wrappers = comfy.patcher_extension.get_all_wrappers(
            comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, options
        )
        return comfy.patcher_extension.WrapperExecutor.new_class_executor(
            self._forward, self, wrappers
        ).execute(x, timestep, context, guidance, control, options, **kwargs)

    def _forward(
        self, x, timestep, context, guidance=None, control=None, transformer_options=None,
        attention_mask=None, chroma_lengths=None, **_,
    ) -> Tensor:  # fmt: skip
        h, w = x.shape[-2:]
        latent = pad_to_patch(x)
        tokens, text_tokens = pack(latent), context.shape[1]
        if chroma_lengths is not None:
            hidden = text_mask(chroma_lengths, text_tokens, tokens.shape[1], x.dtype)
            attention_mask = hidden if attention_mask is None else hidden + attention_mask
        options = with_cached_rows(timestep, control, transformer_options or {})
        context, options = join_negative(context, timestep, tokens.shape[1], options)
        text_tokens = context.shape[1]
        ids = position_ids(text_tokens, *latent.shape[-2:], x.device).expand(len(x), -1, -1)
        velocity = self.forward_orig(
            tokens, ids[:, text_tokens:], context, ids[:, :text_tokens], timestep, guidance,
            control, options, attn_mask=attention_mask,
        )  # fmt: skip
        return unpack(velocity, *latent.shape[-2:])[..., :h, :w]

    def forward_orig(
        self, img, img_ids, txt, txt_ids, timesteps, guidance=None, control=None,
        transformer_options=None, attn_mask=None,
    ) -> Tensor:  # fmt: skip
        """Velocity of packed tokens (B, L, 64), by the signature that other packs replace.

        `guidance` is not used: Chroma was trained at 0.
        """
        options = dict(transformer_options or {})
        table = self._table(timesteps, img.dtype, options)
        img, txt = self.img_in(img), self.txt_in(txt)
        ids = torch.cat([txt_ids[0], img_ids[0]])
        pe = rope_table(ids, self.config.rope_axes, THETA)[None, None]  # (1, 1, T+L, D/2, 2, 2)
        batch, cached = Batch(img, txt, table, attn_mask), options.get(ROWS)
        kw = {"pe": pe, "control": control or {}, "options": options}
        if cached is None:
            img = self._run_from(0, batch, **kw)
        else:
            first, later = partial(self._run_double, 0, **kw), partial(self._run_from, 1, **kw)
            # What takes the attention's place may rely on all rows being there.
            img = cached.run(batch, first, later, together=OVERRIDE in options)
        return self.final_layer.linear(modulate(layer_norm(img), *table.final()))

    def _run_double(self, i: int, batch: Batch, pe: Tensor, control: dict, options: dict) -> Batch:
        count = len(self.double_blocks)
        options |= {"total_blocks": count, "block_type": "double", "block_index": i}
        vec = tuple(batch.table.double(i))
        block, img, txt = self.double_blocks[i], batch.img, batch.txt
        img, txt = self._double(block, i, img, txt, vec, pe, batch.mask, options)
        if (add := _residual(control, "input", i)) is not None:
            img = img + add
        return Batch(img, txt, batch.table, batch.mask)

    def _run_from(
        self, start: int, batch: Batch, pe: Tensor, control: dict, options: dict
    ) -> Tensor:
        for i in range(start, len(self.double_blocks)):
            batch = self._run_double(i, batch, pe, control, options)
        x = torch.cat([batch.txt, batch.img], dim=1)
        text_tokens = batch.txt.shape[1]
        options |= {
            "total_blocks": len(self.single_blocks), "block_type": "single",
            "img_slice": [text_tokens, x.shape[1]],
        }  # fmt: skip
        for i, block in enumerate(self.single_blocks):
            options["block_index"] = i
            x = self._single(block, i, x, batch.table.single(i), pe, batch.mask, options)
            if (add := _residual(control, "output", i)) is not None:
                x = x + F.pad(add, (0, 0, text_tokens, 0))
        return x[:, text_tokens:]

    def get_modulations(self, tensor: Tensor, block_type: str, *, idx: int = 0) -> Any:
        """One block's share of the approximator's output (B, M, C), as other packs ask for it."""
        table = ModulationTable(tensor, self.config.double_depth, self.config.single_depth)
        if block_type == "final":
            return table.final()
        if block_type == "single":
            return table.single(idx)
        image, text = table.double(idx)
        return {"double_img": image, "double_txt": text}[block_type]

    def _table(self, sigma: Tensor, dtype: torch.dtype, options: dict) -> ModulationTable:
        if torch.compiler.is_compiling():
            return self.modulation_table(sigma, None, dtype)
        values = sigma.tolist()
        if values.count(values[0]) != len(values):
            return self.modulation_table(sigma, None, dtype)
        make = partial(self.modulation_table, sigma[:1], None, dtype)
        memo = options.get(MEMO)
        return make() if memo is None else memo.get((values[0], dtype, sigma.device), make)

    def _double(self, block, i, img, txt, vec, pe, mask, options) -> tuple[Tensor, Tensor]:
        def original(args: dict[str, Any]) -> dict[str, Any]:
            opts = args.get("transformer_options") or options
            args = {**args, "attn_mask": args.get("attn_mask"), "transformer_options": opts}
            if _wants_native(block, opts):
                img, txt = block(**args)
            else:
                count = args["txt"].shape[1] + args["img"].shape[1]
                attention = _attention(opts, [args["txt"].shape[1], count])
                img, txt = run_double(
                    block, args["img"], args["txt"], args["vec"], args["pe"], args["attn_mask"],
                    heads=self.num_heads, attention=attention,
                )  # fmt: skip
            return {"img": img, "txt": txt}

        args = {"img": img, "txt": txt, "vec": vec, "pe": pe}
        out = _replaceable(("double_block", i), args, mask, options, original)
        return out["img"], out["txt"]

    def _single(self, block, i, x, vec, pe, mask, options) -> Tensor:
        def original(args: dict[str, Any]) -> dict[str, Any]:
            opts = args.get("transformer_options") or options
            rest = {"vec": args["vec"], "pe": args["pe"], "attn_mask": args.get("attn_mask")}
            if _wants_native(block, opts):
                return {"img": block(args["img"], **rest, transformer_options=opts)}
            out = run_single(
                block, args["img"], rest["vec"], rest["pe"], rest["attn_mask"],
                heads=self.num_heads, attention=_attention(opts, opts["img_slice"]),
            )  # fmt: skip
            return {"img": out}

        args = {"img": x, "vec": vec, "pe": pe}
        return _replaceable(("single_block", i), args, mask, options, original)["img"]


def _replaceable(
    site: tuple[str, int],
    args: dict[str, Any],
    mask: Tensor | None,
    options: dict[str, Any],
    original: Callable[[dict[str, Any]], dict[str, Any]],
) -> dict[str, Any]:
    """Run a block, or what some node has put in its place."""
    if not torch.compiler.is_compiling():
        comfy.model_management.throw_exception_if_processing_interrupted()
    args = {**args, "attn_mask": mask, "transformer_options": options}
    hook: Hook | None = options.get("patches_replace", {}).get("dit", {}).get(site)
    return original(args) if hook is None else hook(args, {"original_block": original})


def _attention(options: dict[str, Any], img_slice: list[int]) -> Attention:
    """ComfyUI's attention with the overrides and output patches of this run."""
    patches = options.get("patches", {}).get("attn1_output_patch", ())

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out = optimized_attention(
            q, k, v, q.shape[1], mask=mask, skip_reshape=True, transformer_options=options
        )
        for patch in patches:
            out = patch(out, {**options, "img_slice": img_slice})
        return out

    return attend


def _wants_native(block: nn.Module, options: dict[str, Any]) -> bool:
    """Whether a patch needs queries from before the rotation, which ComfyUI's own block offers."""
    ours = isinstance(block, (DoubleBlock, SingleBlock))
    return not ours and "attn1_patch" in options.get("patches", {})


def _residual(control: dict[str, Any], side: str, i: int) -> Tensor | None:
    residuals = control.get(side) or ()
    return residuals[i] if i < len(residuals) else None


def adopt(native: nn.Module) -> HostTransformer:
    """Our forward over the layers of ComfyUI's Chroma. Raises CheckpointError for other models."""
    wanted = ("img_in", "txt_in", "distilled_guidance_layer", "double_blocks", "single_blocks")
    missing = [name for name in (*wanted, "final_layer", "params") if not hasattr(native, name)]
    if missing:
        raise CheckpointError(
            f"this MODEL is {type(native).__name__}, which has no {missing[0]}; "
            "expected Chroma, so connect a loader of a Chroma file"
        )
    return HostTransformer(native, _config(native.params), native.params, native.dtype)


def _config(p: Any) -> ChromaConfig:
    """Our configuration from ComfyUI's names for the same numbers."""
    return ChromaConfig(
        in_channels=p.in_channels,
        context_dim=p.context_in_dim,
        hidden=p.hidden_size,
        heads=p.num_heads,
        mlp_hidden=round(p.hidden_size * p.mlp_ratio),
        double_depth=p.depth,
        single_depth=p.depth_single_blocks,
        approximator_in=p.in_dim,
        approximator_hidden=p.hidden_dim,
        approximator_depth=p.n_layers,
    )


def core_settings(config: ChromaConfig) -> dict[str, Any]:
    """The same widths under the names of ComfyUI's `unet_config`."""
    return {
        "image_model": "chroma",
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "context_in_dim": config.context_dim,
        "hidden_size": config.hidden,
        "mlp_ratio": config.mlp_hidden / config.hidden,
        "num_heads": config.heads,
        "depth": config.double_depth,
        "depth_single_blocks": config.single_depth,
        "axes_dim": list(config.rope_axes),
        "theta": THETA,
        "patch_size": PATCH,
        "qkv_bias": True,
        "in_dim": config.approximator_in,
        "out_dim": config.hidden,
        "hidden_dim": config.approximator_hidden,
        "n_layers": config.approximator_depth,
    }


def build(*, operations: Any, device: Any = None, dtype: Any = None, **settings: Any) -> nn.Module:
    """A transformer of any width from ComfyUI's `unet_config` and `operations`."""
    params = SimpleNamespace(**settings)
    config = _config(params)
    model = ChromaTransformer(config, operations, device=device, dtype=dtype)
    return HostTransformer(model, config, params, dtype)
