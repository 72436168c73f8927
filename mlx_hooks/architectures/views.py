"""How a hook point's value lies in the array that is met; reading and writing are inverse."""

from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx


class View(Protocol):
    """How a hook point's value lies in what a module takes or gives; ``read`` and ``write`` are inverse."""

    def read(self, array: mx.array) -> mx.array: ...
    def write(self, array: mx.array, value: mx.array) -> mx.array: ...


@dataclass(frozen=True)
class Whole:
    """The array itself."""

    def read(self, array: mx.array) -> mx.array:
        return array

    def write(self, array: mx.array, value: mx.array) -> mx.array:
        return value


@dataclass(frozen=True)
class Heads:
    """Columns of [batch, pos, features], seen as [batch, pos, head, d_head].

    Head h of ``n_heads`` lies at ``start + h * stride`` (``stride`` 0: heads lie side by side).
    """

    n_heads: int
    d_head: int
    start: int = 0
    stride: int = 0

    def read(self, array: mx.array) -> mx.array:
        if self.stride:
            return mx.take(array, self._columns(), axis=-1).reshape(*array.shape[:-1], self.n_heads, self.d_head)
        stop = self.start + self.n_heads * self.d_head
        return array[..., self.start : stop].reshape(*array.shape[:-1], self.n_heads, self.d_head)

    def write(self, array: mx.array, value: mx.array) -> mx.array:
        flat = value.reshape(*array.shape[:-1], -1)
        if self.stride:
            copy = array + 0
            copy[..., self._columns()] = flat
            return copy
        stop = self.start + self.n_heads * self.d_head
        return mx.concatenate([array[..., : self.start], flat, array[..., stop:]], axis=-1)

    def _columns(self) -> mx.array:
        heads = mx.arange(self.n_heads)[:, None] * self.stride + self.start
        return (heads + mx.arange(self.d_head)[None]).reshape(-1)


@dataclass(frozen=True)
class Grouped:
    """The queries of a projection laid out as [..., kv_head, queries + 2, d_head], seen as [..., head, d_head]."""

    n_key_value_heads: int
    n_queries: int
    d_head: int

    def read(self, array: mx.array) -> mx.array:
        groups = self._groups(array)[..., : self.n_queries, :]
        return groups.reshape(*array.shape[:-1], self.n_key_value_heads * self.n_queries, self.d_head)

    def write(self, array: mx.array, value: mx.array) -> mx.array:
        groups = self._groups(array)
        queries = value.reshape(*groups.shape[:-2], self.n_queries, self.d_head)
        return mx.concatenate([queries, groups[..., self.n_queries :, :]], axis=-2).reshape(array.shape)

    def _groups(self, array: mx.array) -> mx.array:
        return array.reshape(*array.shape[:-1], self.n_key_value_heads, self.n_queries + 2, self.d_head)


@dataclass(frozen=True)
class Columns:
    """Every ``step``-th column from ``start`` to ``stop``."""

    start: int
    stop: int
    step: int = 1

    def read(self, array: mx.array) -> mx.array:
        return array[..., self.start : self.stop : self.step]

    def write(self, array: mx.array, value: mx.array) -> mx.array:
        copy = array + 0
        copy[..., self.start : self.stop : self.step] = value
        return copy


@dataclass(frozen=True)
class Transposed:
    """The kernel's [batch, head, pos, d_head], seen as [batch, pos, head, d_head]."""

    def read(self, array: mx.array) -> mx.array:
        return array.transpose(0, 2, 1, 3)

    def write(self, array: mx.array, value: mx.array) -> mx.array:
        return value.transpose(0, 2, 1, 3)


@dataclass(frozen=True)
class Tiled:
    """The kernel's [batch, head, pos, d_head], seen as [batch, pos, kv_head, d_head].

    There the key-value heads may have been repeated one after the other, 0 1 0 1, or not yet.
    """

    n_key_value_heads: int

    def read(self, array: mx.array) -> mx.array:
        return array[:, : self.n_key_value_heads].transpose(0, 2, 1, 3)

    def write(self, array: mx.array, value: mx.array) -> mx.array:
        return mx.tile(value.transpose(0, 2, 1, 3), (1, array.shape[1] // self.n_key_value_heads, 1, 1))
