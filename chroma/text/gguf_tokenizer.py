"""The tokenizer that a T5 GGUF file carries: a SentencePiece Unigram model in tokenizer.ggml.*.

SentencePiece: Kudo and Richardson 2018, arXiv:1808.06226.
"""

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from ..checkpoint.gguf import GGUFHeader, read_array
from ..errors import CheckpointError
from .tokenizer import Tokenizer

# Beyond any vocabulary; SentencePiece's own normalisation tables take a quarter of a megabyte.
MAX_TOKENS = 1_000_000
MAX_CHARSMAP = 16 * 1024 * 1024
_KEY = "tokenizer.ggml."
_NORMAL, _UNKNOWN = 1, 2
_ADVICE = "give a tokenizer.json of T5 v1.1, or choose another T5 file"


def tokenizer_from_gguf(header: GGUFHeader) -> Tokenizer:
    """Build T5's tokenizer from the file's metadata.

    Raises CheckpointError if the file has no tokenizer, another kind of tokenizer, or a damaged
    one.
    """
    kind = header.metadata.get(_KEY + "model")
    if kind != "t5":
        found = "no tokenizer" if kind is None else f"a tokenizer of the kind {str(kind)[:40]!a}"
        raise _unusable(header, f"{found} ({_KEY}model), expected 't5'")
    tokens, scores, types = _vocabulary(header)
    typeable = types == _NORMAL
    # A token that cannot be typed takes no part in the choice of the best pieces.
    scores = np.where(typeable, scores, 0)
    backend = tokenizers.Tokenizer(
        models.Unigram(list(zip(tokens, scores.tolist(), strict=True)), _unknown_id(header, types))
    )
    backend.normalizer = _normaliser(header)
    prefix = "always" if header.metadata.get(_KEY + "add_space_prefix", True) else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix)
    backend.decoder = decoders.Metaspace(prepend_scheme=prefix)
    special = [AddedToken(tokens[i], normalized=False) for i in np.flatnonzero(~typeable)]
    backend.add_special_tokens(special)
    return Tokenizer(backend, header.path.name)


def _vocabulary(header: GGUFHeader) -> tuple[list[str], NDArray, NDArray]:
    """Pieces, their log probabilities and their types, all of one length."""
    keys = [_KEY + name for name in ("tokens", "scores", "token_type")]
    missing = [key for key in keys if key not in header.arrays]
    if missing:
        raise _unusable(header, f"no {', '.join(missing)}")
    counts = [header.arrays[key].count for key in keys]
    if len(set(counts)) > 1 or not 0 < counts[0] <= MAX_TOKENS:
        raise _unusable(header, f"a tokenizer of {counts} tokens, scores and types")
    tokens, scores, types = (read_array(header, key) for key in keys)
    if not isinstance(tokens, list) or isinstance(scores, list) or isinstance(types, list):
        raise _unusable(header, "a tokenizer whose tokens, scores or types are of another kind")
    if scores.dtype.kind != "f" or types.dtype.kind not in "iu":
        raise _unusable(header, f"scores in {scores.dtype} and token types in {types.dtype}")
    if not np.isfinite(scores).all():
        raise _unusable(header, f"scores that are not finite in {_KEY}scores")
    if "" in tokens:
        raise _unusable(header, f"an empty token in {_KEY}tokens")
    return tokens, scores.astype(np.float64), types


def _unknown_id(header: GGUFHeader, types: NDArray) -> int:
    """The id that stands for characters without a token."""
    marked = np.flatnonzero(types == _UNKNOWN)
    value = int(marked[0]) if len(marked) else header.metadata.get(_KEY + "unknown_token_id")
    if type(value) is not int or not 0 <= value < len(types):
        raise _unusable(header, f"no usable {_KEY}unknown_token_id")
    return value


def _normaliser(header: GGUFHeader) -> normalizers.Normalizer:
    """SentencePiece's normalisation: the file's own character map, then its rule for spaces."""
    steps: list[normalizers.Normalizer] = []
    key = _KEY + "precompiled_charsmap"
    if key in header.arrays and header.arrays[key].count:
        charsmap = _charsmap(header, key)
        try:
            steps.append(normalizers.Precompiled(charsmap))
        except Exception as error:  # tokenizers raises bare Exception
            raise _unusable(header, f"an unusable {key} ({error})") from None
    if header.metadata.get(_KEY + "remove_extra_whitespaces", True):
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    return normalizers.Sequence(steps)


def _charsmap(header: GGUFHeader, key: str) -> bytes:
    """The map as bytes, checked: the tokenizers library aborts on one that points outside itself.

    Layout: size of the trie in bytes (uint32); the trie, a double array of uint32 (Yata et al.
    2007) whose keys' values are places in what follows; replacements, each ended by a zero byte.
    """
    if header.arrays[key].count > MAX_CHARSMAP:
        raise _unusable(header, f"an unusable {key} of {header.arrays[key].count} bytes")
    values = read_array(header, key)
    if isinstance(values, list) or values.dtype.itemsize != 1:
        raise _unusable(header, f"a {key} that is not bytes")
    data = values.tobytes()
    size = int.from_bytes(data[:4], "little")
    texts = np.frombuffer(data, np.uint8)[4 + size :]
    if size == 0 or size % 4 or len(texts) == 0 or 4 + size > len(data):
        raise _unusable(header, f"a {key} whose sizes disagree")
    trie = np.frombuffer(data, "<u4", size // 4, offset=4).astype(np.int64)
    inner = np.flatnonzero(trie < 1 << 31)
    units = trie[inner]
    child = inner ^ ((units >> 10) << ((units & 512) >> 6))
    # A child's place differs from its family's in the last 8 bits, by the key's next byte.
    inside = bool(((child | 255) < len(trie)).all())
    if inside:
        place = trie[child[units & 256 > 0]] & ((1 << 31) - 1)
        inside = bool((place < len(texts)).all()) and bool((texts[place] & 0xC0 != 0x80).all())
    if not inside:
        raise _unusable(header, f"a {key} that points outside itself")
    return data


def _unusable(header: GGUFHeader, found: str) -> CheckpointError:
    return CheckpointError(f"{header.path.name} has {found}; {_ADVICE}")
