"""The autoencoder against diffusers' AutoencoderKL, and tiled decoding."""

import re

import pytest
import torch
from chroma_nodes.chroma.autoencoder import (
    LATENT_SCALE,
    LATENT_SHIFT,
    Autoencoder,
    AutoencoderConfig,
)
from chroma_nodes.chroma.checkpoint import load_autoencoder
from chroma_nodes.chroma.errors import CheckpointError, ImageError
from chroma_nodes.chroma.tiled import decode_tiled
from chroma_nodes.chroma.tiny.files import VAE

CONFIGS = [
    AutoencoderConfig(channels=32, multipliers=(1, 2, 2, 2), res_blocks=1),
    AutoencoderConfig(channels=64, multipliers=(1, 2, 1), res_blocks=2),
]


def random_autoencoder(config: AutoencoderConfig) -> Autoencoder:
    torch.manual_seed(0)
    model = Autoencoder(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=1 / p[0].numel() ** 0.5) if p.ndim > 1 else p.uniform_(0.5, 1.5)
    return model.eval()


def diffusers_name(name: str, levels: int) -> str:
    """Flux' tensor name -> diffusers' name."""
    for old, new in (
        (r"encoder\.down\.(\d)\.block\.(\d)", r"encoder.down_blocks.\1.resnets.\2"),
        (r"encoder\.down\.(\d)\.downsample", r"encoder.down_blocks.\1.downsamplers.0"),
        (r"mid\.block_1", "mid_block.resnets.0"),
        (r"mid\.block_2", "mid_block.resnets.1"),
        (r"mid\.attn_1\.norm", "mid_block.attentions.0.group_norm"),
        (r"mid\.attn_1\.([qkv])\.", r"mid_block.attentions.0.to_\1."),
        (r"mid\.attn_1\.proj_out", "mid_block.attentions.0.to_out.0"),
        (r"nin_shortcut", "conv_shortcut"),
        (r"norm_out", "conv_norm_out"),
    ):
        name = re.sub(old, new, name)
    if m := re.match(r"decoder\.up\.(\d)\.(block\.(\d)|upsample)(.*)", name):
        part = "upsamplers.0" if m[3] is None else f"resnets.{m[3]}"
        name = f"decoder.up_blocks.{levels - 1 - int(m[1])}.{part}{m[4]}"
    return name


def diffusers_autoencoder(model: Autoencoder):
    from diffusers import AutoencoderKL

    c = model.config
    levels = len(c.multipliers)
    theirs = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=[c.channels * m for m in c.multipliers],
        layers_per_block=c.res_blocks,
        latent_channels=c.latent_channels,
        norm_num_groups=c.groups,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    state = {}
    for name, value in model.state_dict().items():
        linear = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name)
        state[diffusers_name(name, levels)] = value[..., 0, 0] if linear else value
    theirs.load_state_dict(state, strict=True)
    return theirs.eval()


@pytest.mark.parametrize("config", CONFIGS)
@torch.no_grad()
def test_equals_diffusers(config):
    ours = random_autoencoder(config)
    theirs = diffusers_autoencoder(ours)
    pixels = torch.rand(2, 3, 48, 32) * 2 - 1
    expected = theirs.encode(pixels).latent_dist
    assert expected.mean.std() > 0.1
    mean, logvar = ours.moments(pixels)
    assert (mean - expected.mean).abs().max() <= 1e-4
    assert (logvar - expected.logvar).abs().max() <= 1e-4
    latent = ours.encode(pixels)
    assert (latent - (expected.mean - 0.1159) * 0.3611).abs().max() <= 1e-4
    picture = theirs.decode(latent / 0.3611 + 0.1159).sample
    assert picture.std() > 0.1
    assert (ours.decode(latent) - picture).abs().max() <= 1e-4


def test_flux_widths_and_constants():
    with torch.device("meta"):
        model = Autoencoder(AutoencoderConfig())
    assert sum(p.numel() for p in model.parameters()) == 83_819_683
    assert AutoencoderConfig.from_state_dict(model.state_dict()) == AutoencoderConfig()
    assert (LATENT_SCALE, LATENT_SHIFT, AutoencoderConfig().groups) == (0.3611, 0.1159, 32)


@pytest.mark.parametrize("config", CONFIGS)
def test_config_is_read_from_shapes(config):
    state = random_autoencoder(config).state_dict()
    assert AutoencoderConfig.from_state_dict(state) == config
    del state["decoder.conv_in.weight"]
    with pytest.raises(CheckpointError, match=r"decoder\.conv_in\.weight"):
        AutoencoderConfig.from_state_dict(state)


@torch.no_grad()
def test_one_tile_is_exact():
    model = random_autoencoder(CONFIGS[0])
    latent = torch.randn(2, 16, 8, 7)
    assert torch.equal(decode_tiled(model, latent, tile=8, overlap=2), model.decode(latent))


@pytest.mark.parametrize(("h", "w"), [(21, 13), (13, 33)])
@torch.no_grad()
def test_tiles_of_a_smooth_latent_are_close_to_one_decode(h, w):
    """The latent repeats, so that each tile's statistics are about those of the whole."""
    model = load_autoencoder(VAE, dtype=torch.float32)
    rows, columns = (torch.arange(n) * 2 * torch.pi / 6 for n in (h, w))
    waves = [torch.sin(rows + k)[:, None] * torch.cos(columns - k) for k in range(16)]
    latent = torch.stack(waves)[None]
    whole, tiled = model.decode(latent), decode_tiled(model, latent, tile=12, overlap=6)
    assert tiled.shape == (1, 3, 8 * h, 8 * w)
    assert torch.corrcoef(torch.stack([whole.flatten(), tiled.flatten()]))[0, 1] > 0.99
    abutting = decode_tiled(model, latent, tile=12, overlap=0)
    assert (whole - tiled).abs().max() < 0.5 * (whole - abutting).abs().max()


@pytest.mark.parametrize(("h", "w"), [(33, 20), (16, 40), (17, 17)])
@torch.no_grad()
def test_tiles_cover_everything_once_and_blend_without_seams(h, w):
    """With a decoder that is local (nearest enlargement) tiling must change nothing at all."""

    class Local:
        def decode(self, z):
            return torch.nn.functional.interpolate(z[:, :3], scale_factor=8.0)

    latent = torch.randn(1, 16, h, w)
    out = decode_tiled(Local(), latent, tile=16, overlap=4)  # type: ignore[arg-type]
    torch.testing.assert_close(out, Local().decode(latent))


@pytest.mark.parametrize(("tile", "overlap"), [(4, 0), (16, 9), (16, -1)])
def test_unusable_tiles(tile, overlap):
    with pytest.raises(ImageError, match="not usable"):
        decode_tiled(random_autoencoder(CONFIGS[0]), torch.zeros(1, 16, 8, 8), tile, overlap)
