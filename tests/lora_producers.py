"""LoRA files for a small model, in the exact spelling of each producer.

The names are literal, as the producers write them, so that they do not come out of the tables
they are to test.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from chroma_nodes.chroma.config import ChromaConfig
from chroma_nodes.chroma.text.t5 import T5Config
from torch import Tensor

CONFIG = ChromaConfig(
    in_channels=16, context_dim=24, hidden=32, heads=2, mlp_hidden=64, double_depth=2,
    single_depth=3, approximator_in=16, approximator_hidden=40, approximator_depth=2,
)  # fmt: skip
TEXT_CONFIG = T5Config(vocab_size=50, d_model=24, heads=3, d_kv=4, d_ff=40, layers=2)
RANK = 4

State = dict[str, Tensor]
Shape = tuple[int, int]
# (N, K) by the modules' own names.
QKV, PROJ, MLP0, MLP2 = (96, 32), (32, 32), (64, 32), (32, 64)
LINEAR1, LINEAR2 = (160, 32), (32, 96)
T5_Q, T5_WI, T5_WO = (12, 24), (40, 24), (24, 40)
IMG, TXT, ONE = "double_blocks.1.img_", "double_blocks.1.txt_", "single_blocks.2."
FUSED: dict[str, Shape] = {
    f"{IMG}attn.qkv": QKV, f"{IMG}attn.proj": PROJ, f"{TXT}attn.qkv": QKV,
    f"{TXT}attn.proj": PROJ, f"{IMG}mlp.0": MLP0, f"{IMG}mlp.2": MLP2, f"{TXT}mlp.0": MLP0,
    f"{TXT}mlp.2": MLP2, f"{ONE}linear1": LINEAR1, f"{ONE}linear2": LINEAR2,
}  # fmt: skip
ENDS: dict[str, Shape] = {"img_in": (32, 16), "txt_in": (32, 24), "final_layer.linear": (16, 32)}
GUIDE: dict[str, Shape] = {
    "distilled_guidance_layer.in_proj": (40, 16),
    "distilled_guidance_layer.layers.1.in_layer": (40, 40),
    "distilled_guidance_layer.out_proj": (32, 40),
}
T5: dict[str, Shape] = {
    "encoder.block.1.layer.0.SelfAttention.q": T5_Q,
    "encoder.block.1.layer.1.DenseReluDense.wi_0": T5_WI,
    "encoder.block.1.layer.1.DenseReluDense.wo": T5_WO,
}
# Diffusers' names: shape, and the module and the rows that they are in the original layout.
SPLIT: dict[str, tuple[Shape, str, tuple[int, int] | None]] = {
    "transformer_blocks.1.attn.to_q": (PROJ, f"{IMG}attn.qkv", (0, 32)),
    "transformer_blocks.1.attn.to_k": (PROJ, f"{IMG}attn.qkv", (32, 64)),
    "transformer_blocks.1.attn.to_v": (PROJ, f"{IMG}attn.qkv", (64, 96)),
    "transformer_blocks.1.attn.add_q_proj": (PROJ, f"{TXT}attn.qkv", (0, 32)),
    "transformer_blocks.1.attn.add_k_proj": (PROJ, f"{TXT}attn.qkv", (32, 64)),
    "transformer_blocks.1.attn.add_v_proj": (PROJ, f"{TXT}attn.qkv", (64, 96)),
    "transformer_blocks.1.attn.to_out.0": (PROJ, f"{IMG}attn.proj", None),
    "transformer_blocks.1.attn.to_add_out": (PROJ, f"{TXT}attn.proj", None),
    "transformer_blocks.1.ff.net.0.proj": (MLP0, f"{IMG}mlp.0", None),
    "transformer_blocks.1.ff.net.2": (MLP2, f"{IMG}mlp.2", None),
    "transformer_blocks.1.ff_context.net.0.proj": (MLP0, f"{TXT}mlp.0", None),
    "transformer_blocks.1.ff_context.net.2": (MLP2, f"{TXT}mlp.2", None),
    "single_transformer_blocks.2.attn.to_q": (PROJ, f"{ONE}linear1", (0, 32)),
    "single_transformer_blocks.2.attn.to_k": (PROJ, f"{ONE}linear1", (32, 64)),
    "single_transformer_blocks.2.attn.to_v": (PROJ, f"{ONE}linear1", (64, 96)),
    "single_transformer_blocks.2.proj_mlp": (MLP0, f"{ONE}linear1", (96, 160)),
    "single_transformer_blocks.2.proj_out": (LINEAR2, f"{ONE}linear2", None),
}
_SPLIT_SHAPES = {name: shape for name, (shape, _, _) in SPLIT.items()}

# (parameter key, rows, kind, alpha; None where the file states none)
Expected = tuple[str, tuple[int, int] | None, str, float | None]
Make = Callable[[str, Shape], State]


@dataclass(frozen=True)
class Producer:
    """What one program writes, and what it means."""

    state: State
    expected: list[Expected]
    metadata: dict[str, str] = field(default_factory=dict)


def numbers(*shape: int) -> Tensor:
    seed = sum((i + 1) * n for i, n in enumerate(shape))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def pair(down: str, up: str) -> Make:
    """down (r, K) and up (N, r) under these endings."""
    return lambda module, shape: {
        f"{module}.{down}": numbers(RANK, shape[1]), f"{module}.{up}": numbers(shape[0], RANK)
    }  # fmt: skip


peft = pair("lora_A.weight", "lora_B.weight")
plain = pair("lora_down.weight", "lora_up.weight")


def with_alpha(alpha: float, make: Make = plain) -> Make:
    return lambda module, shape: {
        **make(module, shape), f"{module}.alpha": torch.tensor(alpha)
    }  # fmt: skip


def with_bias(make: Make) -> Make:
    return lambda module, shape: {**make(module, shape), f"{module}.diff_b": numbers(shape[0])}


def loha(module: str, shape: Shape) -> State:
    n, k = shape
    return {
        f"{module}.hada_w1_a": numbers(n, RANK), f"{module}.hada_w1_b": numbers(RANK, k),
        f"{module}.hada_w2_a": numbers(n, RANK), f"{module}.hada_w2_b": numbers(RANK, k),
    }  # fmt: skip


def lokr(module: str, shape: Shape) -> State:
    """Both factors whole: w1 (N / 4, K / 8) and w2 (4, 8)."""
    n, k = shape
    return {f"{module}.lokr_w1": numbers(n // 4, k // 8), f"{module}.lokr_w2": numbers(4, 8)}


def _dora(make: Make, ending: str, per_row: bool) -> Make:
    def magnitude(shape: Shape) -> Tensor:
        return (numbers(shape[0]) if per_row else numbers(1, shape[1])).abs() + 1

    return lambda module, shape: {
        **make(module, shape), f"{module}.{ending}": magnitude(shape)
    }  # fmt: skip


def _write(names: Mapping[str, Shape], make: Make, prefix: str, dotted: bool = True) -> State:
    state: State = {}
    for name, shape in names.items():
        state |= make(prefix + (name if dotted else name.replace(".", "_")), shape)
    return state


def _fused(names: Mapping[str, Shape], alpha: float | None, kind: str = "lora") -> list[Expected]:
    return [(f"{name}.weight", None, kind, alpha) for name in names]


def _split(alpha: float | None, kind: str = "lora") -> list[Expected]:
    return [(f"{module}.weight", rows, kind, alpha) for _, module, rows in SPLIT.values()]


def _biases(names: Mapping[str, Shape]) -> list[Expected]:
    return [(f"{name}.bias", None, "diff", None) for name in names]


_ALL = {**FUSED, **ENDS, **GUIDE}
_COMFY = "diffusion_model."
_XLABS = {
    "double_blocks.1.processor.qkv_lora1": (QKV, f"{IMG}attn.qkv", None),
    "double_blocks.1.processor.qkv_lora2": (QKV, f"{TXT}attn.qkv", None),
    "double_blocks.1.processor.proj_lora1": (PROJ, f"{IMG}attn.proj", None),
    "double_blocks.1.processor.proj_lora2": (PROJ, f"{TXT}attn.proj", None),
    "single_blocks.2.processor.qkv_lora": (QKV, f"{ONE}linear1", (0, 96)),
    "single_blocks.2.processor.proj_lora": (LINEAR2, f"{ONE}linear2", None),
}
_SIMPLETUNER_FUSED = {
    "transformer_blocks.1.attn.to_qkv": (QKV, f"{IMG}attn.qkv", None),
    "transformer_blocks.1.attn.add_qkv_proj": (QKV, f"{TXT}attn.qkv", None),
    "transformer_blocks.0.attn.to_added_qkv": (QKV, "double_blocks.0.txt_attn.qkv", None),
    "single_transformer_blocks.2.attn.to_qkv": (QKV, f"{ONE}linear1", (0, 96)),
}
# SimpleTuner and diffusers: alpha 2, and 6 for the modules called proj_out.
_HEADER = {
    "lora_adapter_metadata": '{"transformer.r": 4, "transformer.lora_alpha": 2, '
    '"transformer.use_dora": false, "transformer.use_rslora": false, '
    '"transformer.rank_pattern": {}, "transformer.alpha_pattern": {"proj_out": 6}}',
    "format": "pt",
}


def _renamed(
    names: Mapping[str, tuple[Shape, str, tuple[int, int] | None]], make: Make, prefix: str = ""
) -> Producer:
    return Producer(
        _write({name: shape for name, (shape, _, _) in names.items()}, make, prefix),
        [(f"{module}.weight", rows, "lora", None) for _, module, rows in names.values()],
    )


PRODUCERS: dict[str, Producer] = {
    "sd-scripts": Producer(
        _write(FUSED, with_alpha(1.0), "lora_unet_", False), _fused(FUSED, 1.0),
        {"ss_network_module": "networks.lora_flux", "ss_network_alpha": "1"},
    ),
    "sd-scripts in_dims": Producer(
        _write({n: ENDS[n] for n in ("img_in", "txt_in")}, with_alpha(2.0), "lora_unet_", False),
        _fused({n: ENDS[n] for n in ("img_in", "txt_in")}, 2.0),
    ),
    "sd-scripts T5": Producer(_write(T5, with_alpha(1.0), "lora_te3_", False), _fused(T5, 1.0)),
    "diffusion-pipe": Producer(_write(FUSED, peft, _COMFY), _fused(FUSED, None)),
    "ai-toolkit lora": Producer(
        {name: tensor.half() for name, tensor in _write(FUSED, peft, _COMFY).items()},
        _fused(FUSED, None), {"software": '{"name": "ai-toolkit", "version": "0.1"}'},
    ),
    "ai-toolkit lokr": Producer(
        _write(FUSED, with_alpha(1e10, lokr), _COMFY), _fused(FUSED, 1e10, "lokr")
    ),
    "ai-toolkit lokr, old format": Producer(
        _write(FUSED, with_alpha(1.0, lokr), "lycoris_", False), _fused(FUSED, 1.0, "lokr")
    ),
    "ai-toolkit dora": Producer(
        _write(FUSED, _dora(peft, "magnitude", True), _COMFY), _fused(FUSED, None, "dora rows")
    ),
    "ai-toolkit full": Producer(
        _write(FUSED, with_bias(lambda m, shape: {f"{m}.diff": numbers(*shape)}), _COMFY),
        _fused(FUSED, None, "diff") + _biases(FUSED),
    ),
    "flow": Producer(
        _write(FUSED, pair("lora.lora_A", "lora.lora_B"), ""), _fused(FUSED, None)
    ),
    "flow, converted": Producer(_write(FUSED, peft, _COMFY), _fused(FUSED, None)),
    "diffusers": Producer(
        _write(_SPLIT_SHAPES, peft, "transformer."),
        [(key, rows, kind, 6.0 if key.endswith("linear2.weight") else 2.0)
         for key, rows, kind, _ in _split(None)],
        _HEADER,
    ),
    "diffusers without metadata": Producer(
        _write(_SPLIT_SHAPES, peft, "transformer."), _split(None)
    ),
    "SimpleTuner fused qkv": _renamed(_SIMPLETUNER_FUSED, peft, "transformer."),
    "SimpleTuner comfyui": Producer(
        _write(_SPLIT_SHAPES, with_alpha(8.0, peft), _COMFY), _split(8.0)
    ),
    "SimpleTuner LyCORIS": Producer(
        _write(_SPLIT_SHAPES, with_alpha(1.0, lokr), "lycoris_", False), _split(1.0, "lokr")
    ),
    "OneTrainer legacy": Producer(
        _write(_SPLIT_SHAPES, with_alpha(1.0), "lora_transformer_", False), _split(1.0)
    ),
    "OneTrainer legacy DoRA": Producer(
        _write(_SPLIT_SHAPES, _dora(with_alpha(1.0), "dora_scale", False), "lora_transformer_",
               False),
        _split(1.0, "dora columns"),
    ),
    "OneTrainer legacy T5": Producer(
        _write(T5, with_alpha(1.0), "lora_te_", False), _fused(T5, 1.0)
    ),
    "OneTrainer legacy T5, older": Producer(
        _write(T5, with_alpha(1.0), "lora_te1_", False), _fused(T5, 1.0)
    ),
    "OneTrainer diffusers": Producer(
        _write(_SPLIT_SHAPES, peft, "transformer.") | _write(T5, peft, "text_encoder."),
        _split(None) + _fused(T5, None),
    ),
    "OneTrainer diffusers DoRA": Producer(
        _write(_SPLIT_SHAPES, _dora(peft, "lora_magnitude_vector.weight", True), "transformer."),
        _split(None, "dora rows"),
    ),
    "OneTrainer kohya": Producer(
        _write(FUSED, with_alpha(16.0), "lora_unet_", False)
        | _write(T5, with_alpha(16.0), "lora_te1_", False),
        _fused({**FUSED, **T5}, 16.0),
    ),
    "OneTrainer original": Producer(
        _write(FUSED, with_alpha(16.0, peft), ""), _fused(FUSED, 16.0)
    ),
    "OneTrainer comfy": Producer(
        _write(FUSED, with_alpha(16.0, peft), _COMFY)
        | _write(T5, with_alpha(16.0, peft), "text_encoders.t5xxl.transformer."),
        _fused({**FUSED, **T5}, 16.0),
    ),
    "OneTrainer LoHa": Producer(
        _write(_SPLIT_SHAPES, with_alpha(1.0, loha), "lora_transformer_", False),
        _split(1.0, "loha"),
    ),
    "OneTrainer LoKr": Producer(
        _write(_SPLIT_SHAPES, with_alpha(1.0, lokr), "lora_transformer_", False),
        _split(1.0, "lokr"),
    ),
    "OneTrainer OFT": Producer(
        _write(
            _SPLIT_SHAPES,
            lambda m, shape: {f"{m}.oft_R.weight": numbers(shape[1] // 8, 28),
                              f"{m}.oft_R.scaled_oft": torch.tensor(True)},
            "transformer.",
        ),
        _split(None, "oftv2"),
    ),
    "ComfyUI TrainLoraNode": Producer(
        _write(_ALL, with_bias(with_alpha(1.0)), _COMFY), _fused(_ALL, 1.0) + _biases(_ALL)
    ),
    "ComfyUI LoraSave": Producer(
        {n: t.half() for n, t in _write(_ALL, with_bias(plain), _COMFY).items()},
        _fused(_ALL, None) + _biases(_ALL),
    ),
    "flash-heun": Producer(
        _write({**FUSED, **ENDS}, with_alpha(4.0), "lora_unet_", False),
        _fused({**FUSED, **ENDS}, 4.0), {"ss_network_module": "networks.lora_flux"},
    ),
    "XLabs and USO": _renamed(_XLABS, pair("down.weight", "up.weight")),
}  # fmt: skip
