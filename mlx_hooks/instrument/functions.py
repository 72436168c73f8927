"""Functions of MLX and mlx-lm that are observed while a plan that needs them is attached."""

import threading
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.models import base

from .taps import current


class Function(NamedTuple):
    """A function by its module and name, and who is shown its calls: ``current``'s ``viewer``, by its ``method``."""

    holder: Any
    name: str
    viewer: str
    method: str


ATTENDING = (
    Function(mx.fast, "scaled_dot_product_attention", "attention", "on_kernel"),
    Function(base, "quantized_scaled_dot_product_attention", "attention", "on_quantized_kernel"),
    Function(mx, "softmax", "attention", "on_softmax"),
)


class _Observed:
    """Which functions are replaced now; plans of several models may need the same one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users: dict[tuple[int, str], int] = {}
        self._originals: dict[tuple[int, str], Callable] = {}

    def observe(self, functions: Iterable[Function]) -> None:
        with self._lock:
            for function in functions:
                key = (id(function.holder), function.name)
                if not self._users.get(key):
                    original = self._originals[key] = getattr(function.holder, function.name)
                    setattr(function.holder, function.name, _shown(function, original))
                self._users[key] = self._users.get(key, 0) + 1

    def release(self, functions: Iterable[Function]) -> None:
        with self._lock:
            for function in functions:
                key = (id(function.holder), function.name)
                self._users[key] -= 1
                if not self._users[key]:
                    setattr(function.holder, function.name, self._originals.pop(key))


def _shown(function: Function, original: Callable) -> Callable:
    """The function as whoever is concerned in this thread sees it; for all others it is the original."""

    @wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        viewer = getattr(current, function.viewer, None)
        if viewer is None:
            return original(*args, **kwargs)
        return getattr(viewer, function.method)(original, *args, **kwargs)

    return call


observed = _Observed()
