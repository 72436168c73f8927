"""Models whose circuit is known by construction: what finds circuits is held against them.

known = KNOWN_MODELS["ioi"]()
model = known.hooked()
pairs = known.pairs(12)                 # prompts with an answer, as ``eval_data_of`` takes them
known.edges()                           # {"L0H1->L1H0<v>", ...}: the truth under ``known.ablation``
"""

from collections.abc import Callable

from .indirect_object import KnownIndirectObject
from .induction import KnownInduction
from .known import KnownModel
from .linear import KnownLinear
from .modular_addition import KnownModularAddition, fourier_energy
from .planted_router import KnownRouter
from .programs import KnownFraction, KnownHistogram, KnownReverse

_ALL: tuple[Callable[[], KnownModel], ...] = (
    KnownInduction,
    KnownIndirectObject,
    KnownFraction,
    KnownReverse,
    KnownHistogram,
    KnownLinear,
    KnownModularAddition,
    KnownRouter,
)
KNOWN_MODELS: dict[str, Callable[[], KnownModel]] = {made().name: made for made in _ALL}
"""Every known model by its name; called without arguments they have their usual sizes."""

__all__ = [
    "KNOWN_MODELS",
    "KnownFraction",
    "KnownHistogram",
    "KnownIndirectObject",
    "KnownInduction",
    "KnownLinear",
    "KnownModel",
    "KnownModularAddition",
    "KnownReverse",
    "KnownRouter",
    "fourier_energy",
]
