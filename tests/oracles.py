"""Independent implementations that ours is compared with, and random weights for both."""

import torch
from chroma_nodes.chroma.config import ChromaConfig
from chroma_nodes.chroma.transformer import ChromaTransformer
from torch import Tensor

SMALL = ChromaConfig(
    context_dim=48,
    hidden=128,
    heads=2,
    mlp_hidden=512,
    double_depth=2,
    single_depth=3,
    approximator_hidden=96,
    approximator_depth=2,
)


def random_transformer(config: ChromaConfig = SMALL, seed: int = 0, **kw) -> ChromaTransformer:
    """A transformer whose random weights give outputs of deviation 1 or more."""
    torch.manual_seed(seed)
    model = ChromaTransformer(config, **kw)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.6 / parameter.shape[1] ** 0.5)
            elif "scale" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.3)
    return model.eval()


def diffusers_state(state: dict[str, Tensor], hidden: int) -> dict[str, Tensor]:
    """BFL names to diffusers names, for any width (diffusers' own converter knows 3072 only)."""
    out: dict[str, Tensor] = {}

    def put(name: str, source: str, rows: slice = slice(None)) -> None:
        for leaf in ("weight", "bias"):
            out[f"{name}.{leaf}"] = state[f"{source}.{leaf}"][rows]

    q, k, v = (slice(i * hidden, (i + 1) * hidden) for i in range(3))
    put("x_embedder", "img_in")
    put("context_embedder", "txt_in")
    put("proj_out", "final_layer.linear")
    guide = "distilled_guidance_layer"
    put(f"{guide}.in_proj", f"{guide}.in_proj")
    put(f"{guide}.out_proj", f"{guide}.out_proj")
    for key, value in state.items():
        part = key.split(".")
        if key.startswith(f"{guide}.norms."):
            out[f"{guide}.norms.{part[2]}.weight"] = value
        elif key.startswith(f"{guide}.layers.") and key.endswith("in_layer.weight"):
            put(f"{guide}.layers.{part[2]}.linear_1", f"{guide}.layers.{part[2]}.in_layer")
            put(f"{guide}.layers.{part[2]}.linear_2", f"{guide}.layers.{part[2]}.out_layer")
        elif key.startswith("double_blocks.") and key.endswith("img_attn.qkv.weight"):
            ours, theirs = f"double_blocks.{part[1]}", f"transformer_blocks.{part[1]}"
            for side, names, proj, norm, ff in (
                ("img", ("to_q", "to_k", "to_v"), "to_out.0", "norm_{}", "ff"),
                ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out",
                 "norm_added_{}", "ff_context"),
            ):  # fmt: skip
                for name, rows in zip(names, (q, k, v), strict=True):
                    put(f"{theirs}.attn.{name}", f"{ours}.{side}_attn.qkv", rows)
                put(f"{theirs}.attn.{proj}", f"{ours}.{side}_attn.proj")
                put(f"{theirs}.{ff}.net.0.proj", f"{ours}.{side}_mlp.0")
                put(f"{theirs}.{ff}.net.2", f"{ours}.{side}_mlp.2")
                for short, long in (("q", "query"), ("k", "key")):
                    source = f"{ours}.{side}_attn.norm.{long}_norm.scale"
                    out[f"{theirs}.attn.{norm.format(short)}.weight"] = state[source]
        elif key.startswith("single_blocks.") and key.endswith("linear1.weight"):
            ours, theirs = f"single_blocks.{part[1]}", f"single_transformer_blocks.{part[1]}"
            for name, rows in (
                ("attn.to_q", q), ("attn.to_k", k), ("attn.to_v", v),
                ("proj_mlp", slice(3 * hidden, None)),
            ):  # fmt: skip
                put(f"{theirs}.{name}", f"{ours}.linear1", rows)
            put(f"{theirs}.proj_out", f"{ours}.linear2")
            for short, long in (("q", "query"), ("k", "key")):
                out[f"{theirs}.attn.norm_{short}.weight"] = state[f"{ours}.norm.{long}_norm.scale"]
    return out


def diffusers_transformer(model: ChromaTransformer):
    """diffusers' ChromaTransformer2DModel with the same weights, strictly loaded."""
    from diffusers import ChromaTransformer2DModel

    c = model.config
    other = ChromaTransformer2DModel(
        patch_size=1,
        in_channels=c.in_channels,
        num_layers=c.double_depth,
        num_single_layers=c.single_depth,
        attention_head_dim=c.head_dim,
        num_attention_heads=c.heads,
        joint_attention_dim=c.context_dim,
        axes_dims_rope=c.rope_axes,
        approximator_num_channels=c.approximator_in,
        approximator_hidden_dim=c.approximator_hidden,
        approximator_layers=c.approximator_depth,
    )
    other.load_state_dict(diffusers_state(model.state_dict(), c.hidden), strict=True)
    return other.eval()


def diffusers_velocity(
    other, latent: Tensor, sigma: Tensor, context: Tensor, lengths: Tensor
) -> Tensor:
    """Their velocity for an even latent, with a bool key mask (their float mask is a known bug)."""
    from einops import rearrange

    b, _, h, w = latent.shape
    tokens = rearrange(latent, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
    ids = torch.zeros(h // 2, w // 2, 3)
    ids[..., 1] += torch.arange(h // 2)[:, None]
    ids[..., 2] += torch.arange(w // 2)[None]
    total = context.shape[1] + tokens.shape[1]
    keep = torch.ones(b, total, dtype=torch.bool)
    keep[:, : context.shape[1]] = torch.arange(context.shape[1]) < lengths[:, None]
    out = other(
        hidden_states=tokens,
        encoder_hidden_states=context,
        timestep=sigma,
        img_ids=ids.reshape(-1, 3),
        txt_ids=torch.zeros(context.shape[1], 3),
        attention_mask=keep,
        return_dict=False,
    )[0]
    return rearrange(out, "b (h w) (c p q) -> b c (h p) (w q)", h=h // 2, w=w // 2, p=2, q=2)
