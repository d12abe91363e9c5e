"""From scenes to the captions and tokens that training sees."""

import re
from collections import Counter
from collections.abc import Sequence
from math import log
from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from .dataset import COLOURS, POSITIONS, SIZES, STYLES, Concept, Scene, with_article

VOCABULARY = 1024
SPECIAL = ("<pad>", "</s>", "<unk>")
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789.,:;!?'\"()-"
# Score of a single letter: below any word's, so that words win.
RARE = -20.0
# Chance that a caption is empty, so that the model knows the unconditional flow (CFG).
DROPOUT = 0.1


def vary(scene: Scene, random: Random) -> str:
    """The caption of one training example: mostly complete, sometimes with a part left out."""
    what, place = with_article(scene.concept.name), with_article(scene.colour)
    roll = random.random()
    if roll < DROPOUT:
        return ""
    if roll < DROPOUT + 0.06:
        return f"an emoji of {what} on {place} background"
    if roll < DROPOUT + 0.12:
        return f"a {scene.style} emoji of {what}"
    if roll < DROPOUT + 0.15:
        return what
    caption = scene.caption()
    if roll < DROPOUT + 0.30 and scene.concept.tags:
        tags = random.sample(scene.concept.tags, min(2, len(scene.concept.tags)))
        caption += ", " + ", ".join(tags)
    return caption


def build_tokenizer(concepts: Sequence[Concept]) -> Tokenizer:
    """A Unigram tokenizer (Kudo 2018) in T5's form: <pad> 0, </s> 1, <unk> 2, words begin with ▁.

    Every word of the names is one piece, then the commonest keywords up to VOCABULARY, then single
    characters, so that any text in this alphabet can be written. Scores are log frequencies.
    """
    names, tags = Counter[str](), Counter[str]()
    for concept in concepts:
        for style in STYLES:
            for colour in COLOURS:
                names.update(_words(Scene(concept, style, colour).caption()))
        for tag in concept.tags:
            tags.update(_words(tag))
    for size in SIZES:
        for position in POSITIONS:
            names.update(_words(f"{size}, {position}"))
    pieces = dict(names)
    room = VOCABULARY - len(SPECIAL) - 2 * len(ALPHABET) - 1 - len(pieces)
    fresh = {word: count for word, count in tags.items() if word not in pieces}
    pieces.update(sorted(fresh.items(), key=lambda item: (-item[1], item[0]))[:room])
    total = sum(pieces.values())
    scores = {f"▁{word}": log(count / total) for word, count in pieces.items()}
    for letter in ("▁", *ALPHABET, *(f"▁{letter}" for letter in ALPHABET)):
        scores.setdefault(letter, RARE)
    vocabulary = [(piece, 0.0) for piece in SPECIAL]
    vocabulary += sorted(scores.items(), key=lambda item: (-item[1], item[0]))
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=SPECIAL.index("<unk>")))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def _words(text: str) -> list[str]:
    return re.findall(r"[^\s,]+", text.lower())
