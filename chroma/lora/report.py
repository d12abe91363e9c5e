"""What a LoRA file is, in words: for the nodes, the command line and the log."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .file import LoraFile

_SHOWN = 5
_TAGS = 5


@dataclass(frozen=True)
class Report:
    """What was found in a file; transformer and text_encoder are the numbers of modules changed.

    kinds: {"lora": how many}, the commonest first. ranks: all that occur, ascending. skipped:
    {reason: tensors}. unknown: names of tensors, sorted.
    """

    name: str
    transformer: int
    text_encoder: int
    kinds: Mapping[str, int]
    ranks: tuple[int, ...]
    trainer: str | None
    base_model: str | None
    trigger_words: tuple[str, ...]
    skipped: Mapping[str, int]
    unknown: tuple[str, ...]

    def line(self) -> str:
        """One line for the log and for the node."""
        parts = [f"{self.transformer} modules of the transformer"]
        if self.text_encoder:
            parts.append(f"{self.text_encoder} of the text encoder")
        parts.append(" + ".join(self.kinds))
        if self.ranks:
            low, high = self.ranks[0], self.ranks[-1]
            parts.append(f"rank {low}" if low == high else f"ranks {low} to {high}")
        if self.trainer:
            parts.append(self.trainer)
        line = f"{self.name}: {', '.join(parts)}"
        if self.skipped:
            counts = (f"{reason} ({count} tensors)" for reason, count in self.skipped.items())
            line += f"; left out, as Chroma does not have it: {', '.join(counts)}"
        if self.unknown:
            more = ", ..." if len(self.unknown) > _SHOWN else ""
            names = ", ".join(self.unknown[:_SHOWN])
            line += f"; {len(self.unknown)} tensors not understood: {names}{more}"
        return line

    def lines(self) -> list[str]:
        """All that matters to a user, what is to be typed into the prompt first."""
        lines = [f"trigger words: {', '.join(self.trigger_words)}"] if self.trigger_words else []
        lines.append(self.line())
        return [*lines, f"made for: {self.base_model}"] if self.base_model else lines


def report(lora: LoraFile) -> Report:
    """Describe a file that was read."""
    adapters = list(lora.adapters())
    kinds = Counter(adapter.kind for adapter in adapters)
    ranks = {adapter.rank for adapter in adapters}
    metadata = lora.metadata
    return Report(
        name=lora.path.name,
        transformer=_modules(lora.transformer),
        text_encoder=_modules(lora.text_encoder),
        kinds=dict(kinds.most_common()),
        ranks=tuple(sorted(rank for rank in ranks if rank is not None)),
        trainer=trainer_of(metadata, lora.prefix),
        base_model=metadata.get("ss_base_model_version") or metadata.get("modelspec.architecture"),
        trigger_words=trigger_words(metadata),
        skipped=dict(lora.skipped),
        unknown=tuple(lora.unknown),
    )


def _modules(keys: Iterable[str]) -> int:
    return len({key.rpartition(".")[0] for key in keys})


def trainer_of(metadata: Mapping[str, str], prefix: str) -> str | None:
    """The program that wrote a file, by its metadata, else by names that only it writes.

    "software" is ai-toolkit's field, and that of this package's own tools.
    """
    software = _object(metadata.get("software", "")).get("name")
    if isinstance(software, str):
        return software
    if "ot_branch" in metadata or "ot_revision" in metadata:
        return "OneTrainer"
    if any(key.startswith("simpletuner") for key in metadata):
        return "SimpleTuner"
    if "ss_network_module" in metadata:
        module = metadata["ss_network_module"]
        return "sd-scripts with LyCORIS" if "lycoris" in module else "sd-scripts"
    if "lora_adapter_metadata" in metadata:
        return "diffusers"
    by_prefix = {"lora_transformer_": "OneTrainer", "lycoris_": "LyCORIS"}
    return by_prefix.get(prefix)


def trigger_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """What to write into the prompt: the author's phrase, else the commonest tags of training."""
    for key in ("modelspec.trigger_phrase", "trigger_word", "trigger_words"):
        if phrase := metadata.get(key, "").strip():
            return (phrase,)
    counts: Counter[str] = Counter()
    for tags in _object(metadata.get("ss_tag_frequency", "")).values():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            if type(count) is int:
                counts[tag.strip()] += count
    return tuple(tag for tag, _ in counts.most_common(_TAGS) if tag)


def _object(text: str) -> dict:
    """A JSON object, or an empty one for any other text: metadata is a stranger's."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
