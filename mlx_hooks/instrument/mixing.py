"""The state of mixers, the scores of routers and the weights of experts: values that are no module's output."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache

from .attending import parameters
from .sites import Part, Site, with_argument
from .taps import Tap, current, snapshot


class State(Part):
    """The state that a mixer leaves: the last entry of its cache that the call replaces."""

    tap: Tap
    size: int
    _cache: Any

    def enter(self, original: Callable, args: tuple, kwargs: dict, nth: int) -> tuple[tuple, dict]:
        self.nth = nth
        names = parameters(original)[1:]
        values = dict(zip(names, args, strict=False)) | kwargs
        self._cache = values.get("cache")
        if self._cache is None and "cache" in names:
            # The mixer drops its state where there is no cache; an empty one changes nothing else.
            self._cache = ArraysCache(self.size)
            at = names.index("cache")
            if at < len(args):
                args = (*args[:at], self._cache, *args[at + 1 :])
            else:
                kwargs = kwargs | {"cache": self._cache}
        self._before = list(self._cache.cache)
        return args, kwargs

    def finish(self, output: Any) -> Any:
        changed = [i for i, old in enumerate(self._before) if self._cache[i] is not old]
        if changed:
            value, edited = self.tap.show_value(self._cache[changed[-1]], self.nth)
            if edited:
                self._cache[changed[-1]] = value
        self._cache, self._before = None, []
        return output


class _Weighed(mx.array):
    """What the experts give: what it is multiplied with are the experts' weights."""

    __slots__ = ()

    def __mul__(self, other: Any) -> mx.array:
        weights = getattr(current, "weights", None)
        if weights is not None and isinstance(other, mx.array):
            other = weights.multiplied(other)
        return mx.array.__mul__(self, other)

    __rmul__ = __mul__


class Weights(Part):
    """The weights with which a layer of experts sums what they give."""

    tap: Tap

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        site.through.append(self.weigh)

    def weigh(self, output: mx.array) -> mx.array:
        output = snapshot(output)
        output.__class__ = _Weighed
        current.weights = self
        return output

    def multiplied(self, weights: mx.array) -> mx.array:
        current.weights = None
        value, edited = self.tap.show_value(self.tap._value(weights[..., 0]), self.nth)
        return value.reshape(weights.shape) if edited else weights


class InputWeights(Weights):
    """The weights with which the input of the experts is multiplied, [batch, pos, choice]."""

    def __init__(self, site: Site) -> None:
        Part.__init__(self, site)

    def enter(self, original: Callable, args: tuple, kwargs: dict, nth: int) -> tuple[tuple, dict]:
        self.nth = nth
        return with_argument(args, kwargs, 0, self.weigh)

    def leave(self) -> None:
        current.weights = None

    def multiplied(self, weights: mx.array) -> mx.array:
        current.weights = None
        return self.tap.show_value(weights, self.nth)[0]


class _Routed(mx.array):
    """What a router gets: its product with the router's weight are the scores."""

    __slots__ = ()

    def __matmul__(self, other: Any) -> mx.array:
        logits = getattr(current, "logits", None)
        product = mx.array.__matmul__(self, other)
        return product if logits is None else logits.multiplied(product)

    def astype(self, dtype: mx.Dtype, stream: Any = None) -> mx.array:
        cast = mx.array.astype(self, dtype, stream=stream)
        cast.__class__ = _Routed
        return cast


class Logits(Part):
    """The scores of a router that gives only what it chose."""

    tap: Tap

    def enter(self, original: Callable, args: tuple, kwargs: dict, nth: int) -> tuple[tuple, dict]:
        self.nth = nth
        current.logits = self
        return with_argument(args, kwargs, 0, self._routed)

    @staticmethod
    def _routed(array: mx.array) -> mx.array:
        handle = snapshot(array)
        handle.__class__ = _Routed
        return handle

    def leave(self) -> None:
        current.logits = None

    def multiplied(self, scores: mx.array) -> mx.array:
        current.logits = None
        value, edited = self.tap.show_value(self.tap._value(scores), self.nth)
        return value.reshape(scores.shape) if edited else scores
