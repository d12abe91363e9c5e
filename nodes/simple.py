"""Text to image in two nodes: one that loads everything, and one that makes the picture of it."""

from typing import Any

from comfy.cli_args import args
from comfy_api.latest import io
from comfy_execution.graph_utils import GraphBuilder

from ..chroma.noise import MAX_SEED
from ..chroma.pipeline import latent_size
from ..chroma.presets import PRESETS, own_size
from ..chroma.text.encoder import PadRule
from ..chroma.tiny import files as small
from . import categories
from .host import AUTO, MODEL_DTYPE_CHOICES, choices, locate
from .host_lora import config_of
from .host_model import load_model
from .host_report import Notes
from .host_sampling import BatchNoise, apply_preset
from .host_text import load_clip
from .host_vae import load_vae
from .loading import MODEL_DTYPE_TIP

# A link in place of the value, so that ComfyUI knows the encoded prompts again under another seed.
# Where it keeps nothing it would load the file once more for that.
AS_LINK = {"rawLink": not getattr(args, "cache_none", False)}
FOLDERS = {
    "model_name": "diffusion_models",
    "text_encoder_name": "text_encoders",
    "vae_name": "vae",
}
TIPS = {
    "model_name": "A Chroma file from models/diffusion_models, or the small Chroma, which draws "
    "emoji only.",
    "text_encoder_name": "A T5-XXL file from models/text_encoders; the small one for the small "
    "Chroma.",
    "vae_name": "ae.safetensors of Flux from models/vae; the small one for the small Chroma.",
}


class ChromaLoad(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ChromaLoad",
            display_name="Load Chroma",
            category=categories.MAIN,
            description="Load the three files that Chroma needs: transformer, text encoder and "
            "autoencoder. The small Chroma that comes with these nodes needs no download.",
            inputs=[
                *(
                    io.Combo.Input(
                        name, options=choices(folder), default=small.LABEL, tooltip=TIPS[name]
                    )
                    for name, folder in FOLDERS.items()
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=MODEL_DTYPE_CHOICES,
                    default=AUTO,
                    tooltip=MODEL_DTYPE_TIP,
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The transformer."),
                io.Clip.Output(display_name="CLIP", tooltip="The text encoder, in auto precision."),
                io.Vae.Output(display_name="VAE", tooltip="The autoencoder."),
            ],
        )

    @classmethod
    def execute(
        cls, model_name: str, text_encoder_name: str, vae_name: str, weight_dtype: str
    ) -> io.NodeOutput:
        return io.NodeOutput(
            load_model(locate("diffusion_models", model_name, small.TRANSFORMER), weight_dtype),
            load_clip(locate("text_encoders", text_encoder_name, small.TEXT_ENCODER), AUTO),
            load_vae(locate("vae", vae_name, small.VAE)),
        )


class ChromaTextToImage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ChromaTextToImage",
            display_name="Chroma Text to Image",
            category=categories.MAIN,
            description="From prompts to pictures with the settings that Chroma's author "
            "recommends. For everything else there are the single nodes, which this one runs.",
            inputs=[
                io.Model.Input("model", tooltip="From Load Chroma, or with LoRAs on it."),
                io.Clip.Input("clip", tooltip="From Load Chroma.", extra_dict=AS_LINK),
                io.Vae.Input("vae", tooltip="From Load Chroma."),
                io.String.Input(
                    "prompt", multiline=True, dynamic_prompts=True, tooltip="What to paint."
                ),
                io.String.Input(
                    "negative_prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="What to avoid: none, or much of it; a few words do little.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="Seed of the first picture; the next one's is one more.",
                ),
                _side("width"),
                _side("height"),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Pictures at a time."),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default=next(iter(PRESETS)),
                    tooltip="Sampler, sigmas, shift, and steps and cfg where these are 0.",
                ),
                io.Int.Input(
                    "steps", default=0, min=0, max=10_000, tooltip="0: as many as the preset has."
                ),
                io.Float.Input(
                    "cfg",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Guidance scale; 0: the preset's.",
                ),
            ],
            outputs=[io.Image.Output(display_name="IMAGE", tooltip="For Save Image.")],
            hidden=[io.Hidden.unique_id],
            enable_expand=True,
        )

    @classmethod
    def execute(
        cls, model, clip, vae, prompt, negative_prompt, seed, width, height, batch_size, preset,
        steps, cfg,
    ) -> io.NodeOutput:  # fmt: skip
        p, side = PRESETS[preset].changed(steps, cfg), own_size(config_of(model))
        width, height = width or side, height or side
        latent_size(width, height)
        notes = Notes([f"{width} x {height}, {p}"])
        if side == small.SIZE:
            notes.add(small.DRAWS)
        notes.tell(cls.hidden and cls.hidden.unique_id)
        graph = GraphBuilder()

        def add(kind: str, **inputs: Any) -> Any:
            return graph.node(kind, **inputs).out(0)

        model, sampler, sigmas = apply_preset(model, p)
        rule = {"pad_rule": PadRule.REFERENCE.value, "prompt_per_line": False}
        guider = add(
            "CFGGuider",
            model=model,
            positive=add("ChromaTextEncode", clip=clip, text=prompt, **rule),
            negative=add("ChromaTextEncode", clip=clip, text=negative_prompt, **rule),
            cfg=p.cfg,
        )
        sampled = add(
            "SamplerCustomAdvanced",
            noise=BatchNoise(seed),
            guider=guider,
            sampler=sampler,
            sigmas=sigmas,
            latent_image=add(
                "EmptySD3LatentImage", width=width, height=height, batch_size=batch_size
            ),
        )
        picture = add("VAEDecode", samples=sampled, vae=vae)
        return io.NodeOutput(picture, expand=graph.finalize())


def _side(name: str) -> io.Int.Input:
    return io.Int.Input(
        name,
        default=0,
        min=0,
        max=16384,
        step=16,
        tooltip="Pixels, in 16s; 0: what the model was trained for, 1024 or the small one's 128.",
    )
