"""Which model something was made for: lenses and vectors belong to one model's weights."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..model import HookedModel

_SAMPLES = 1024
"""Numbers of each weight that a fingerprint holds one by one, about."""
_BITS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}
"""The whole numbers of so many bytes."""


@dataclass(frozen=True)
class ModelIdentity:
    """A model's kind, its sizes and its fingerprint, which together tell it from others.

    Args:
        model: see :func:`fingerprint`.
    """

    model_type: str
    n_layers: int
    d_model: int
    d_vocab: int
    model: str

    @classmethod
    def of(cls, model: HookedModel) -> "ModelIdentity":
        """The identity of a model with the weights that it has now."""
        cfg = model.cfg
        return cls(cfg.model_type, cfg.n_layers, cfg.d_model, cfg.d_vocab, fingerprint(model))

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "ModelIdentity":
        """What :meth:`to_dict` made; other keys are passed over.

        Raises:
            KeyError, ValueError, TypeError: for a mapping that lacks a key, and for values of another type.
        """
        n_layers, d_model, d_vocab = (int(plain[name]) for name in ("n_layers", "d_model", "d_vocab"))
        return cls(str(plain["model_type"]), n_layers, d_model, d_vocab, str(plain["model"]))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @property
    def sizes(self) -> str:
        """All but the fingerprint, in words."""
        return f"model_type={self.model_type}, n_layers={self.n_layers}, d_model={self.d_model}, d_vocab={self.d_vocab}"

    def difference(self, other: "ModelIdentity") -> str | None:
        """How another model differs from this one, in words; None for the same."""
        if self.sizes != other.sizes:
            return f"{self.sizes}; this is {other.sizes}"
        return "its weights differ" if self.model != other.model else None


def fingerprint(model: HookedModel) -> str:
    """A hash of the names, shapes and types of all weights, of the sum of all their bits and of numbers here and there:
    it tells models and fine-tunings apart, and is the same on every machine."""
    found = hashlib.sha256()
    for name, weight in sorted(tree_flatten(model.model.parameters())):
        # Of whole numbers, whose sum does not depend on its order.
        bits = weight.reshape(-1).view(_BITS[weight.dtype.size])
        chosen = bits[:: max(1, bits.size // _SAMPLES)]
        found.update(f"{name} {weight.shape} {weight.dtype} {bits.sum().item()}".encode())
        found.update(np.array(chosen).tobytes())
    return found.hexdigest()
