"""What PEFT stores beside an adapter's tensors: alpha, and how it scales with the rank.

Diffusers packs PEFT's settings into one JSON text of the safetensors header, under
"lora_adapter_metadata", each name after the model's ("transformer.lora_alpha"); PEFT itself writes
them into adapter_config.json beside adapter_model.safetensors.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import LoraError

_KEY = "lora_adapter_metadata"
_FILE, _SIDECAR = "adapter_model.safetensors", "adapter_config.json"
_MAX_SIDECAR = 1024 * 1024


@dataclass(frozen=True)
class Settings:
    """Alpha of all modules (None: not stated) and of single ones, and how the rest is computed.

    rank_stabilised: alpha is divided by sqrt(r). neumann: PEFT's OFT turns by a truncated series.
    """

    alpha: float | None = None
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_stabilised: bool = False
    neumann: bool = True

    def alpha_of(self, module: str) -> float | None:
        """Alpha by the module's name in the file; PEFT matches the ends of names."""
        for pattern, alpha in self.alpha_pattern.items():
            if module == pattern or module.endswith(f".{pattern}"):
                return alpha
        return self.alpha


def read_settings(path: Path, metadata: Mapping[str, str]) -> tuple[Settings, Settings]:
    """Those of the transformer and of the text encoder. Raises LoraError if they make no sense."""
    text, source = metadata.get(_KEY), _KEY
    if text is None and path.name == _FILE:
        text, source = _sidecar(path.with_name(_SIDECAR)), _SIDECAR
    if text is None:
        return Settings(), Settings()
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError):
        entries = None
    if not isinstance(entries, dict):
        raise LoraError(f"{path.name}: {source} is not a JSON object; train or convert it again")
    packed = any("." in key for key in entries)
    try:
        if not packed:
            return _settings(entries), _settings(entries)
        texts = {**_under(entries, "text_encoder"), **_under(entries, "text_encoder_2")}
        return _settings(_under(entries, "transformer")), _settings(texts)
    except LoraError as error:
        raise LoraError(f"{path.name}: {source}: {error}") from None


def _sidecar(path: Path) -> str | None:
    try:
        if path.stat().st_size > _MAX_SIDECAR:
            return None
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _under(entries: Mapping[str, Any], start: str) -> dict[str, Any]:
    return {k[len(start) + 1 :]: v for k, v in entries.items() if k.startswith(f"{start}.")}


def _settings(entries: Mapping[str, Any]) -> Settings:
    # LoHa and LoKr have the second one.
    alpha = entries.get("lora_alpha", entries.get("alpha"))
    pattern = entries.get("alpha_pattern") or {}
    if not isinstance(pattern, dict):
        raise LoraError("alpha_pattern is not a table of modules")
    return Settings(
        alpha=None if alpha is None else _number("lora_alpha", alpha),
        alpha_pattern={_literal(k): _number("alpha_pattern", v) for k, v in pattern.items()},
        rank_stabilised=entries.get("use_rslora") is True,
        neumann=entries.get("use_cayley_neumann") is not False,
    )


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value):
        raise LoraError(f"{name} holds {str(value)[:40]!r}, expected a number")
    return float(value)


def _finite(value: float) -> bool:
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _literal(pattern: str) -> str:
    """The module name in a pattern that is only anchored and escaped.

    Raises LoraError for true regular expressions: run on names of a stranger's choice they can
    take for ever.
    """
    plain = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
    if not re.fullmatch(r"[\w.-]+", plain):
        raise LoraError(f"alpha_pattern names modules by {pattern[:60]!a}, expected plain names")
    return plain
