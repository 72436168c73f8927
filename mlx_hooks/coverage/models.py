"""Tiny random models of every mlx-lm architecture, made in place."""

import copy
import importlib
import pkgutil
import sys
import types
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models

from ..errors import ModelLoadError
from .configurations import CONFIGURATIONS, VARIANTS

NOISE = 0.1
"""Standard deviation of what is added to every weight, so that no norm is 1 and no bias 0."""


def architectures() -> list[str]:
    """The modules of mlx-lm that hold an architecture: those with a ``Model`` and ``ModelArgs``."""
    found = []
    for module in pkgutil.iter_modules(mlx_lm.models.__path__):
        names = vars(_module(module.name))
        if "Model" in names and "ModelArgs" in names:
            found.append(module.name)
    return sorted(found)


def tiny_model(name: str, *, seed: int = 0, dtype: mx.Dtype = mx.float32, **changes: Any) -> nn.Module:
    """A tiny random model of an architecture (``"gemma2"``) or of one of its variants (``"gear/no_softcap"``).

    Args:
        name: a key of ``CONFIGURATIONS`` or ``VARIANTS``.
        seed: of the weights; the same seed gives the same weights.
        dtype: of all weights that are numbers with a fraction.
        changes: fields of the configuration to replace.

    Raises:
        ModelLoadError: lists the architectures there are.
    """
    if name not in CONFIGURATIONS and name not in VARIANTS:
        raise ModelLoadError(f"No tiny configuration of {name!r}: there are {', '.join([*CONFIGURATIONS, *VARIANTS])}.")
    configuration = copy.deepcopy(CONFIGURATIONS.get(name) or VARIANTS[name]) | changes
    module = _module(name.partition("/")[0])
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(configuration))
    model.apply(lambda weight: _random(weight, dtype))
    mx.eval(model.parameters())
    return model


def _random(weight: mx.array, dtype: mx.Dtype) -> mx.array:
    if mx.issubdtype(weight.dtype, mx.floating):
        return (weight + NOISE * mx.random.normal(weight.shape)).astype(dtype)
    if weight.dtype == mx.uint8:
        # Ternary weights, four to a byte.
        digits = mx.random.randint(0, 3, (4, *weight.shape))
        return (digits * mx.array([1, 4, 16, 64]).reshape(4, *[1] * weight.ndim)).sum(axis=0).astype(mx.uint8)
    if weight.dtype == mx.uint32:
        return mx.random.randint(0, 2**31 - 1, weight.shape).astype(mx.uint32)
    return weight


def _module(name: str) -> types.ModuleType:
    if name == "olmo":
        # It asks whether this package is there, and does not use it.
        sys.modules.setdefault("hf_olmo", types.ModuleType("hf_olmo"))
    try:
        return importlib.import_module(f"mlx_lm.models.{name}")
    except ModuleNotFoundError as error:
        raise ModelLoadError(f"The installed mlx-lm has no architecture {name!r}: a newer one may.") from error
