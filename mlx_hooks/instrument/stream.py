"""The residual stream inside a block: what is added to it, and what it is between the additions."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from .sites import Part, Site, with_argument
from .taps import Tap, current, snapshot


class _Stream(mx.array):
    """The residual stream inside a block: what is added to it is shown to hooks."""

    __slots__ = ()

    def __add__(self, other: Any) -> mx.array:
        additions = getattr(current, "additions", None)
        return mx.array.__add__(self, other) if additions is None else additions.add(self, other)

    __radd__ = __add__
    __iadd__ = __add__


class Additions(Part):
    """What a block adds to the stream: which sublayer an addend belongs to is known from which of them ran."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.taps: dict[str, Tap] = {}
        self.argument = 0
        self.mixing_left = 0
        self._pending: list[tuple[str, Any]] = []
        self._counts: dict[str, int] = {}

    def ran(self, kind: str, output: Any) -> None:
        """A sublayer ran; what it gave, or something made of it, will be added."""
        self._pending.append((kind, output[0] if isinstance(output, tuple | list) else output))

    def enter(self, original: Callable, args: tuple, kwargs: dict, nth: int) -> tuple[tuple, dict]:
        self.nth = nth
        self._pending, self._counts = [], {}
        self._outer = getattr(current, "additions", None)
        current.additions = self
        return with_argument(args, kwargs, self.argument, as_stream)

    def leave(self) -> None:
        current.additions = self._outer
        self._pending = []

    def finish(self, output: Any) -> Any:
        # A stream must not outlive its block: later additions are none of this block's.
        if isinstance(output, tuple | list):
            return type(output)(_plain(item) for item in output)
        return _plain(output)

    def on_adding(self, plus: Callable, stream: mx.array, other: mx.array) -> mx.array:
        """The block's own function that adds to the stream."""
        return self.add(stream, other, plus)

    def add(self, stream: mx.array, other: Any, plus: Callable = mx.array.__add__) -> mx.array:
        """Add to the stream, and show what is added and what it gives."""
        kind = self._kind_of(other)
        if kind in self.taps:
            other = self._show(kind, other)
        total = plus(stream, other)
        mixed = kind in ("attn", "mixer") and all(pending == "side" for pending, _ in self._pending)
        if mixed and "mid" in self.taps:
            total = self._show("mid", total)
        return as_stream(total)

    def _kind_of(self, other: Any) -> str:
        for i, (kind, output) in enumerate(self._pending):
            if output is other:
                del self._pending[i]
                return kind
        kinds = {kind for kind, _ in self._pending}
        self._pending = []
        return kinds.pop() if len(kinds) == 1 else "side" if not kinds else "several"

    def _show(self, kind: str, value: mx.array) -> mx.array:
        nth = self._counts[kind] = self._counts.get(kind, -1) + 1
        value, _ = self.taps[kind].show_value(value, self.nth + nth)
        return value


def as_stream(array: mx.array) -> mx.array:
    handle = array.astype(array.dtype)
    handle.__class__ = _Stream
    return handle


def _plain(item: Any) -> Any:
    return snapshot(item) if isinstance(item, _Stream) else item
