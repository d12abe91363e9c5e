"""This pack's nodes without ComfyUI: the same ids, inputs, defaults and results."""

import logging

import torch
from torch import Tensor

from ...schedulers import SCHEDULERS, get_sigmas
from ...schedulers.curve import draw_sigmas
from ...schedulers.options import OPTIONS
from ..checkpoint import load_autoencoder, load_text_encoder, load_transformer
from ..checkpoint.container import is_gguf
from ..devices import best_dtype
from ..errors import WorkflowError
from ..prompt.tokens import describe, measure
from ..quant.products import EIGHT_BIT, EXACT
from ..text.encoder import PadRule, TextEncoder
from ..text.find_tokenizer import find_tokenizer
from ..tiny import files as small
from .schema import Input, NodeType
from .values import Context, Model

log = logging.getLogger("chroma")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DTYPE = Input("weight_dtype", "COMBO", "auto", choices=("auto", *DTYPES))
MODEL_DTYPE = Input("weight_dtype", "COMBO", "auto", choices=("auto", *DTYPES, *EIGHT_BIT))
MODEL = Input("model", "MODEL")
STEPS = Input("steps", "INT", 26, 1, 10_000)
DENOISE = Input("denoise", "FLOAT", 1.0, 0.0, 1.0)
COMPAT = Input("compat", "BOOLEAN", False)
# The node of each schedule that has options.
SCHEDULER_NODES = {
    "beta": "ChromaBetaScheduler",
    "sigmoid_offset": "ChromaSigmoidOffsetScheduler",
    "power_odds": "ChromaPowerOddsScheduler",
    "bong_tangent": "ChromaBongTangentScheduler",
    "linear_quadratic": "ChromaLinearQuadraticScheduler",
}


def _dtype(context: Context, choice: str) -> torch.dtype:
    return DTYPES.get(choice) or best_dtype(context.device)


def load_model(context: Context, model_name: str, weight_dtype: str):
    path = context.locate("diffusion_models", model_name)
    model = load_transformer(
        path,
        dtype=_dtype(context, weight_dtype),
        device=context.device,
        expand=weight_dtype in DTYPES,
        products=weight_dtype if weight_dtype in EIGHT_BIT else EXACT,
    )
    return (Model(model),)


def load_clip(context: Context, text_encoder_name: str, weight_dtype: str):
    path = context.locate("text_encoders", text_encoder_name)
    beside = path.with_name("tokenizer.json")
    is_small = path == small.TEXT_ENCODER
    tokenizer = context.files.get(
        ("text_encoders", "tokenizer.json"), small.TOKENIZER if is_small else beside
    )
    if not tokenizer.is_file() and not is_gguf(path):
        raise WorkflowError(
            f"{path.name} needs its tokenizer and {tokenizer} does not exist; "
            "put T5's tokenizer.json there"
        )
    dtype = _dtype(context, weight_dtype)
    expand = weight_dtype in DTYPES
    model = load_text_encoder(path, dtype=dtype, device=context.device, expand=expand)
    return (TextEncoder(find_tokenizer(tokenizer, path), model),)


def load_vae(context: Context, vae_name: str):
    path = context.locate("vae", vae_name)
    return (load_autoencoder(path, dtype=torch.float32, device=context.device),)


def encode_text(_: Context, clip: TextEncoder, text: str, pad_rule: str, prompt_per_line: bool):
    lines = [line for line in text.splitlines() if line.strip()] or [""]
    prompts = lines if prompt_per_line else [text]
    for line in describe([measure(clip.tokenizer, prompt) for prompt in prompts]):
        log.info("%s", line)
    return (clip.encode(prompts, PadRule(pad_rule)),)


def schedule(model: Model, name: str, steps: int, denoise: float, compat: bool, **options: float):
    form = {"compat_table": model.table} if compat else {"shift": model.shift}
    return (get_sigmas(name, steps, denoise=denoise, **form, **options),)  # pyright: ignore


def any_scheduler(_: Context, model: Model, steps, scheduler_name, denoise, compat):
    return schedule(model, scheduler_name, steps, denoise, compat)


def _scheduler(name: str) -> NodeType:
    """The node of one schedule with its options."""

    def run(_: Context, model: Model, steps, denoise, compat, **options):
        return schedule(model, name, steps, denoise, compat, **options)

    own = (Input(o.name, "FLOAT", o.default, o.low, o.high) for o in OPTIONS[name])
    inputs = (MODEL, STEPS, *own, DENOISE, COMPAT)
    return NodeType(SCHEDULER_NODES[name], inputs, (("SIGMAS", "SIGMAS"),), run)


def sigma_curve(_: Context, sigmas: Tensor, label: str):
    return (draw_sigmas(sigmas, label)[None],)


def model_shift(_: Context, model: Model, mode, shift, base_shift, max_shift, width, height):
    if mode == "constant":
        return (model.with_constant_shift(shift),)
    return (model.with_flux_shift(width, height, base_shift, max_shift),)


def _side(name: str) -> Input:
    return Input(name, "INT", 1024, 16, 16384)


NODES = (
    NodeType(
        "ChromaLoadModel",
        (Input("model_name", "COMBO", small.LABEL, folder="diffusion_models"), MODEL_DTYPE),
        (("MODEL", "MODEL"),),
        load_model,
    ),
    NodeType(
        "ChromaApplyTransformer", (MODEL,), (("MODEL", "MODEL"),), lambda _, model: (model,)
    ),
    NodeType(
        "ChromaLoadTextEncoder",
        (Input("text_encoder_name", "COMBO", small.LABEL, folder="text_encoders"), DTYPE),
        (("CLIP", "CLIP"),),
        load_clip,
    ),
    NodeType(
        "ChromaLoadVAE",
        (Input("vae_name", "COMBO", small.LABEL, folder="vae"),),
        (("VAE", "VAE"),),
        load_vae,
    ),
    NodeType(
        "ChromaTextEncode",
        (
            Input("clip", "CLIP"),
            Input("text", "STRING"),
            Input("pad_rule", "COMBO", "reference", choices=tuple(r.value for r in PadRule)),
            Input("prompt_per_line", "BOOLEAN", False),
        ),
        (("CONDITIONING", "CONDITIONING"),),
        encode_text,
    ),
    NodeType(
        "ChromaScheduler",
        (
            MODEL, STEPS, Input("scheduler_name", "COMBO", "beta", choices=tuple(SCHEDULERS)),
            DENOISE, COMPAT,
        ),
        (("SIGMAS", "SIGMAS"),),
        any_scheduler,
    ),
    *map(_scheduler, SCHEDULER_NODES),
    NodeType(
        "ChromaSigmaCurve",
        (Input("sigmas", "SIGMAS"), Input("label", "STRING", "")),
        (("IMAGE", "IMAGE"),),
        sigma_curve,
    ),
    NodeType(
        "ChromaModelShift",
        (
            MODEL, Input("mode", "COMBO", "constant", choices=("constant", "resolution")),
            Input("shift", "FLOAT", 1.0, 0.01, 100.0),
            Input("base_shift", "FLOAT", 0.5, 0.0, 4.0),
            Input("max_shift", "FLOAT", 1.15, 0.0, 4.0), _side("width"), _side("height"),
        ),
        (("MODEL", "MODEL"),),
        model_shift,
    ),
)  # fmt: skip
