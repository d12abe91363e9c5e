"""The kinds of adapters, each a dataclass of stored tensors that changes one weight."""

from .base import Adapter, Additive, Placement, Weight, changed
from .dora import DoRA
from .full import IA3, Diff, SetWeight
from .glora import GLoRA
from .loha import LoHa
from .lokr import LoKr
from .lora import LowRank
from .oft import BOFT, OFT, OFTv2

__all__ = [
    "BOFT",
    "IA3",
    "OFT",
    "Adapter",
    "Additive",
    "Diff",
    "DoRA",
    "GLoRA",
    "LoHa",
    "LoKr",
    "LowRank",
    "OFTv2",
    "Placement",
    "SetWeight",
    "Weight",
    "changed",
]
