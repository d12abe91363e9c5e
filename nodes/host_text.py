"""Our text encoding behind ComfyUI's CLIP object.

A CLIP that ComfyUI loaded keeps its weights and its memory management; our T5 runs over its layers
in fp32, as ComfyUI's own does. Shapes: B batch, L tokens, C width.
"""

from pathlib import Path
from typing import Any

import comfy.hooks
import comfy.model_management as management
import comfy.ops
import comfy.sd
import comfy.text_encoders.t5
import folder_paths
import torch
from torch import Tensor, nn

from ..chroma.checkpoint import check_state, read_header, read_text_encoder
from ..chroma.checkpoint.container import is_gguf
from ..chroma.checkpoint.gguf import read_gguf_header
from ..chroma.checkpoint.read import expanded, is_plain
from ..chroma.checkpoint.stored import State
from ..chroma.errors import CheckpointError
from ..chroma.quant.layers import place
from ..chroma.text.encoder import PadRule, TextEncoder
from ..chroma.text.gguf_tokenizer import tokenizer_from_gguf
from ..chroma.text.t5 import T5Config, T5Encoder
from ..chroma.text.tokenizer import Tokenizer
from ..chroma.tiny import files as small
from .host import DTYPES
from .host_quant import HostEmbedding, HostLinear, QuantPatcher

ROWS, PAD_RULE, LENGTHS = "t5xxl", "chroma_pad_rule", "chroma_lengths"
XXL_WIDTH = 4096


class _Embedding(nn.Module):
    """The token embedding in fp32, whatever precision it is stored in."""

    def __init__(self, stored: nn.Module) -> None:
        super().__init__()
        self.stored = stored

    def forward(self, tokens: Tensor) -> Tensor:
        return self.stored(tokens, out_dtype=torch.float32).float()


class HostTokenizer:
    """Prompts to weighted tokens, in the form of ComfyUI's own tokenizers."""

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder

    def tokenize_with_weights(
        self, text: str | list[str], return_word_ids: bool = False, **options: Any
    ) -> dict[str, Any]:
        """{"t5xxl": rows of (id, weight[, position])}; a list of prompts gives a row each."""
        rows = []
        for prompt in [text] if isinstance(text, str) else text:
            pairs = zip(*self._encoder.tokenize(prompt), strict=True)
            ids = [(*pair, i) if return_word_ids else pair for i, pair in enumerate(pairs)]
            rows.append(ids)
        rule = options.get(PAD_RULE)
        return {ROWS: rows} if rule is None else {ROWS: rows, PAD_RULE: rule}

    def untokenize(self, pairs: list[tuple]) -> list[tuple]:
        """Each token with the piece of text it stands for."""
        return [(pair, self.decode([pair[0]])) for pair in pairs]

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        return self._encoder.tokenizer.decode(token_ids, skip_special=skip_special_tokens)

    def state_dict(self) -> dict:
        return {}


class HostTextModel(nn.Module):
    """The model behind a CLIP: T5's layers under ComfyUI's names, our encoding of tokens."""

    def __init__(self, t5xxl: nn.Module, tokenizer: Tokenizer, device: torch.device) -> None:
        super().__init__()
        self.t5xxl = t5xxl
        # In a tuple, so that the shared layers are not registered a second time.
        self._view = (view_of(t5xxl.transformer),)
        self.tokenizer, self.load_device = tokenizer, device
        self.reset_clip_options()

    @property
    def encoder(self) -> TextEncoder:
        return TextEncoder(self.tokenizer, self._view[0])

    def reset_clip_options(self) -> None:
        self.device = self.load_device

    def set_clip_options(self, options: dict[str, Any]) -> None:
        """Of ComfyUI's options only the device concerns T5."""
        self.device = options.get("execution_device", self.device)

    @torch.no_grad()
    def encode_token_weights(self, tokens: dict[str, Any]) -> tuple[Tensor, None, dict]:
        """Hidden states (B, L, C) of the tokens that the transformer is to see, fp32.

        Where the rows differ in length the extra values hold their lengths (B,), int64.
        """
        rows = [
            ([token[0] for token in row], [float(token[1]) for token in row])
            for row in tokens[ROWS]
        ]
        rule = PadRule(tokens.get(PAD_RULE, PadRule.REFERENCE))
        embedding = self.encoder.encode_tokens(rows, rule, device=self.device)
        lengths = embedding.lengths.cpu()
        differ = bool((lengths != lengths[0]).any())
        hidden = embedding.hidden.to(management.intermediate_device())
        return hidden, None, {LENGTHS: lengths} if differ else {}


def view_of(transformer: nn.Module) -> T5Encoder:
    """Our T5 over the layers of another one with Hugging Face's names, which are shared.

    Raises CheckpointError if they are not those of T5 v1.1.
    """
    try:
        first = transformer.get_submodule("encoder.block.0.layer.0.SelfAttention")
        bias, shared = first.relative_attention_bias, transformer.shared
        heads = bias.embedding_dim
        config = T5Config(
            shared.num_embeddings, shared.embedding_dim, heads, first.q.out_features // heads,
            transformer.get_submodule("encoder.block.0.layer.1.DenseReluDense.wi_0").out_features,
            len(transformer.encoder.block), bias.num_embeddings,
        )  # fmt: skip
        with torch.device("meta"):
            view = T5Encoder(config)
        for name, module in list(view.named_modules()):
            if not list(module.children()):
                parent, _, leaf = name.rpartition(".")
                setattr(view.get_submodule(parent), leaf, transformer.get_submodule(name))
    except AttributeError:
        raise _foreign(type(transformer).__name__) from None
    view.shared = _Embedding(transformer.shared)
    return view


def _foreign(what: str) -> CheckpointError:
    return CheckpointError(
        f"this CLIP holds {what}, expected a T5 v1.1 encoder; "
        "use ChromaLoadTextEncoder, or CLIPLoader with type chroma"
    )


def t5_tokenizer() -> Tokenizer:
    """T5's tokenizer, which comes with ComfyUI. Raises CheckpointError if it does not."""
    folder = Path(comfy.text_encoders.t5.__file__).parent / "t5_tokenizer"
    return Tokenizer.from_file(folder / "tokenizer.json")


def adopt_clip(clip: comfy.sd.CLIP) -> comfy.sd.CLIP:
    """A clone of a CLIP from any loader that encodes as Chroma was trained; or itself, if it does.

    Raises CheckpointError if there is no T5 in it.
    """
    model = getattr(clip, "cond_stage_model", None)
    if isinstance(model, HostTextModel):
        return clip
    t5xxl = getattr(model, "t5xxl", None)
    if not hasattr(t5xxl, "transformer"):
        raise _foreign(type(model).__name__)
    return _as_clip(HostTextModel(t5xxl, t5_tokenizer(), clip.patcher.load_device), clip.clone())


def _as_clip(model: HostTextModel, clip: comfy.sd.CLIP) -> comfy.sd.CLIP:
    clip.cond_stage_model = model
    clip.tokenizer = HostTokenizer(model.encoder)
    return clip


def load_clip(path: Path, dtype_choice: str) -> comfy.sd.CLIP:
    """A CLIP from a T5 file: ComfyUI loads plain T5-XXL, we the others. Raises CheckpointError."""
    config, state = read_text_encoder(path)
    with torch.device("meta"):
        check_state(T5Encoder(config), state, path)
    dtype = DTYPES.get(dtype_choice)
    if config.d_model != XXL_WIDTH or not is_plain(state) or not _is_single(path, state):
        return build_clip(path, dtype)
    clip = comfy.sd.load_clip(
        [str(path)],
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        clip_type=comfy.sd.CLIPType.CHROMA,
        model_options={} if dtype is None else {"dtype": dtype},
    )
    return adopt_clip(clip)


def _is_single(path: Path, state: State) -> bool:
    """Whether one safetensors file holds these tensors under these names."""
    return not is_gguf(path) and state.keys() <= read_header(path).tensors.keys()


def build_clip(path: Path, dtype: torch.dtype | None) -> comfy.sd.CLIP:
    """A CLIP of any width and format. Raises CheckpointError.

    Its tokenizer is a tokenizer.json beside the file, else T5's own or the one in a GGUF file.
    """
    config, state = read_text_encoder(path)
    device, offload = management.text_encoder_device(), management.text_encoder_offload_device()
    if dtype is not None:
        state = expanded(state, dtype, management.get_free_memory(offload), path)
    dtype = dtype or torch.float32
    holder = nn.Module()
    meta = torch.device("meta")
    holder.transformer = T5Encoder(config, comfy.ops.manual_cast, device=meta, dtype=dtype)
    place(holder.transformer, state, dtype, HostLinear, HostEmbedding)
    model = HostTextModel(holder.eval().requires_grad_(False), _tokenizer(path, config), device)
    clip = comfy.sd.CLIP(no_init=True)
    clip.patcher = QuantPatcher(model.to(offload), device, offload)
    clip.patcher.hook_mode = comfy.hooks.EnumHookMode.MinVram
    clip.patcher.is_clip = True
    clip.layer_idx, clip.apply_hooks_to_conds = None, None
    clip.tokenizer_options, clip.use_clip_schedule = {}, False
    return _as_clip(model, clip)


def _tokenizer(path: Path, config: T5Config) -> Tokenizer:
    beside = path.with_name("tokenizer.json")
    if beside.exists():
        return Tokenizer.from_file(beside)
    if config.d_model == XXL_WIDTH:
        return t5_tokenizer()
    if is_gguf(path):
        return tokenizer_from_gguf(read_gguf_header(path))
    return Tokenizer.from_file(small.TOKENIZER)
