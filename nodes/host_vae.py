"""A ComfyUI VAE around our autoencoder, for widths that ComfyUI's own does not know."""

from pathlib import Path

import comfy.model_management as management
import comfy.ops
import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ..chroma.autoencoder import SPATIAL_FACTOR, Autoencoder, AutoencoderConfig
from ..chroma.checkpoint import Kind, check_state, identify, read_autoencoder, read_header
from ..chroma.checkpoint.container import is_gguf

# Bytes of activations per value of a 128-channel autoencoder's picture: what ComfyUI assumes.
ENCODE_BYTES, DECODE_BYTES = 1767, 2178


class HostAutoencoder(nn.Module):
    """Pictures in [-1, 1] <-> raw latents: ComfyUI scales and shifts latents itself."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.encoder, self.decoder = autoencoder.encoder, autoencoder.decoder

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> the posterior's mean (B, 16, H/8, W/8)."""
        return self.encoder(pixels).chunk(2, dim=1)[0]

    def decode(self, latent: Tensor, **_: object) -> Tensor:
        """(B, 16, h, w) -> (B, 3, 8h, 8w)."""
        return self.decoder(latent)


class HostVAE(comfy.sd.VAE):
    """ComfyUI's VAE with its tiling and memory management, holding our autoencoder."""

    def __init__(self, model: HostAutoencoder, config: AutoencoderConfig, dtype: torch.dtype):
        # The marker of the one kind of VAE without weights: it sets every attribute this version
        # of ComfyUI has, of which those that describe the model are replaced below.
        super().__init__(sd={"pixel_space_vae": torch.tensor(1.0)}, dtype=dtype)
        share = config.channels / AutoencoderConfig().channels
        self.memory_used_encode = lambda shape, dtype: (
            ENCODE_BYTES * share * shape[2] * shape[3] * management.dtype_size(dtype)
        )
        self.memory_used_decode = lambda shape, dtype: (
            DECODE_BYTES * share * shape[2] * shape[3] * SPATIAL_FACTOR**2
            * management.dtype_size(dtype)
        )  # fmt: skip
        self.downscale_ratio = self.upscale_ratio = SPATIAL_FACTOR
        self.latent_channels = config.latent_channels
        self.disable_offload = False
        self.first_stage_model = model
        self.patcher = ModelPatcher(model, self.device, management.vae_offload_device())
        self.size = management.module_size(model)


def load_vae(path: Path) -> comfy.sd.VAE:
    """A VAE from a Flux autoencoder of any width. Raises CheckpointError."""
    config, state = read_autoencoder(path)
    with torch.device("meta"):
        check_state(Autoencoder(config), state, path)
    if config == AutoencoderConfig() and not is_gguf(path):
        header = read_header(path)
        if identify(header.tensors) in (Kind.AUTOENCODER, Kind.AUTOENCODER_DIFFUSERS):
            return _core_vae(path)
    return build_vae(path)


def _core_vae(path: Path) -> comfy.sd.VAE:
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(path)))
    vae.throw_exception_if_invalid()
    return vae


def build_vae(path: Path) -> HostVAE:
    """A VAE of any width. Raises CheckpointError."""
    config, state = read_autoencoder(path)
    with torch.device("meta"):
        check_state(Autoencoder(config), state, path)
    dtype = management.vae_dtype(management.vae_device(), [torch.bfloat16, torch.float32])
    offload = management.vae_offload_device()
    model = Autoencoder(config, comfy.ops.disable_weight_init, device=offload, dtype=dtype)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()})
    host = HostAutoencoder(model.eval().requires_grad_(False))
    return HostVAE(host, config, dtype)
