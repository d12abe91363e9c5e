"""The free-form metadata of LoRA files: kept, and brought up to date, as others write it.

kohya-ss/sd-scripts' `ss_*`, Stability-AI/ModelSpec's `modelspec.*` (version 1.0.1 as sd-scripts
writes it for Chroma), and the `lora_adapter_metadata` of diffusers and PEFT.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

from ..report import trainer_of
from .save import HASHES

PEFT = "lora_adapter_metadata"
_SPEC = {
    "modelspec.sai_model_spec": "1.0.1",
    "modelspec.architecture": "chroma/lora",
    "modelspec.implementation": "https://huggingface.co/lodestones/Chroma",
    "modelspec.resolution": "1024x1024",
}
_TRIGGER, _TITLE = "modelspec.trigger_phrase", "modelspec.title"
_MERGED = "modelspec.merged_from"
_DYNAMIC = "Dynamic"
# ai-toolkit's field for the program that made the tensors.
_SOFTWARE = {"software": json.dumps({"name": "chroma-nodes"})}


def network(
    ranks: Iterable[int], alphas: Iterable[float], *, only_low_rank: bool
) -> dict[str, str]:
    """sd-scripts' description of a network; its word for modules that differ is "Dynamic"."""
    return {
        "ss_network_module": "networks.lora_flux" if only_low_rank else "lycoris.kohya",
        "ss_network_dim": _one(f"{rank}" for rank in ranks),
        "ss_network_alpha": _one(f"{float(alpha)}" for alpha in alphas),
    }


def carried(metadata: Mapping[str, str]) -> dict[str, str]:
    """A file's metadata without what a new file's tensors would make untrue."""
    return {key: text for key, text in metadata.items() if key not in (PEFT, *HASHES)}


def shared(sources: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """What several files' metadata agree in; of trigger words, all."""
    first, *others = (carried(one) for one in sources)
    kept = {k: v for k, v in first.items() if all(o.get(k) == v for o in others)}
    words = [one[_TRIGGER] for one in sources if one.get(_TRIGGER)]
    if words:
        kept[_TRIGGER] = ", ".join(dict.fromkeys(words))
    return kept


def specified(metadata: Mapping[str, str], out: Path, merged: Sequence[str] = ()) -> dict[str, str]:
    """The metadata with the fields that ModelSpec wants; what is stated already stays.

    merged: titles of the files that `out` is made of, where they are several. Those, and tensors
    that no other program claims, are this package's own work.
    """
    made = {_TITLE: out.stem, "ss_base_model_version": "chroma", **_SPEC, **metadata}
    made["modelspec.date"] = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")
    if merged:
        made |= {_TITLE: out.stem, _MERGED: ", ".join(merged)}
    if merged or trainer_of(metadata, prefix="") is None:
        made |= _SOFTWARE
    return made


def title(metadata: Mapping[str, str], path: Path) -> str:
    """What a file calls itself, else its name."""
    return metadata.get(_TITLE) or path.stem


# PEFT's flag for OFT whose rotations are exact instead of a truncated series.
EXACT_ROTATION = {"transformer.use_cayley_neumann": False}


def peft_settings(ranks: Mapping[str, int], *, dora: bool) -> dict[str, object]:
    """The settings that diffusers reads: alpha is the rank in every module.

    ranks: {"transformer.<module>" or "text_encoder.<module>": rank}.
    """
    entries: dict[str, object] = {}
    for model in ("transformer", "text_encoder"):
        own = {k[len(model) + 1 :]: r for k, r in ranks.items() if k.startswith(f"{model}.")}
        if not own:
            continue
        usual = Counter(own.values()).most_common(1)[0][0]
        other = {f"^{name}": rank for name, rank in own.items() if rank != usual}
        settings = {
            "r": usual, "lora_alpha": usual, "rank_pattern": other, "alpha_pattern": other,
            "target_modules": sorted(own), "use_dora": dora, "use_rslora": False,
        }  # fmt: skip
        entries |= {f"{model}.{key}": value for key, value in settings.items()}
    return entries


def peft_text(entries: Mapping[str, object]) -> dict[str, str]:
    """The metadata that holds PEFT's settings, if there are any."""
    return {PEFT: json.dumps(entries, indent=2, sort_keys=True)} if entries else {}


def _one(texts: Iterable[str]) -> str:
    found = set(texts)
    return found.pop() if len(found) == 1 else _DYNAMIC
