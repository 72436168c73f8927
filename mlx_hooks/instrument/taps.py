"""The hooks of one point at one place: what they are shown, and how what they answer is put back."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import mlx.core as mx

from ..architectures import Location
from ..errors import HookError
from ..hook_points import HookPoint
from ..hooks import HeadSelection, Hook, HookFunction, Run

current = threading.local()
"""What runs in this thread: the attention module, block, experts or router that what happens belongs to."""


@contextmanager
def looking_away() -> Iterator[None]:
    """For a block inside a pass, what this thread computes belongs to nothing that is observed."""
    held = dict(current.__dict__)
    current.__dict__.clear()
    try:
        yield
    finally:
        current.__dict__.clear()
        current.__dict__.update(held)


@dataclass
class Tap:
    """The hooks of one point, at one place where its value is met."""

    point: HookPoint
    location: Location
    run: Run
    edits: list[HookFunction] = field(default_factory=list)
    reads: list[Hook] = field(default_factory=list)
    fired: bool = False

    def show(self, array: mx.array, call: int = 0, reading: bool = True) -> mx.array:
        """Run all hooks on the value inside ``array``; answer ``array`` with the value that they leave.

        ``call`` counts the calls of the module in this forward pass; without ``reading`` only edits are made.
        """
        if call % self.location.every != self.location.nth:
            return array
        self.at_call(call)
        if self.edits:
            value, edited = self.edit_value(self._value(array))
            if edited:
                array = self.location.view.write(array, value.reshape(self.location.view.read(array).shape))
        if reading:
            self.read_value(self._value(array))
        return array

    def at_call(self, call: int) -> None:
        """Say which pass through the layer this is."""
        self.run.pass_index = self.location.turn + call // self.location.every

    def _value(self, array: mx.array) -> mx.array:
        value = self.location.view.read(array)
        axes = self.point.axes
        if axes[:2] == ("batch", "pos") and value.ndim == len(axes) - 1:
            # Some experts work on a list of tokens: [batch * pos, ...].
            value = value.reshape(self.run.batch, self.run.length, *value.shape[1:])
        return value

    def edit_value(self, value: mx.array) -> tuple[mx.array, bool]:
        """Pass a value through the editing hooks: the value that they leave, and whether any replaced it.

        Raises:
            HookError: when a replacement is no MLX array, has another shape, or cannot be put in place here.
        """
        self.fired = True
        edited = False
        for fn in self.edits:
            new = fn(snapshot(value), self.point)
            if new is None:
                continue
            name, axes = self.point.name, ", ".join(self.point.axes)
            if self.location.why_not:
                raise HookError(f"{name} can be read but not replaced: {self.location.why_not}.")
            if not isinstance(new, mx.array):
                raise HookError(f"A hook on {name} returned {type(new).__name__}: return an mlx array or None.")
            if new.shape != value.shape:
                named = f" ({axes})" if axes else ""
                raise HookError(f"A hook on {name} returned shape {new.shape}: expected {value.shape}{named}.")
            value, edited = new.astype(value.dtype), True
        return value, edited

    def read_value(self, value: mx.array) -> None:
        self.fired = True
        for hook in self.reads:
            hook.fn(snapshot(value), self.point)

    def show_value(self, value: mx.array, call: int = 0) -> tuple[mx.array, bool]:
        """Edit and read a value that is no module's whole output."""
        self.at_call(call)
        value, edited = self.edit_value(value)
        self.read_value(value)
        return value, edited

    def rows_wanted(self) -> set[int] | None:
        """The query rows that the readers want, or None for all of them."""
        wanted: set[int] = set()
        for hook in self.reads:
            if hook.rows is None:
                return None
            wanted.update(hook.rows(self.run))
        return wanted

    def heads_wanted(self) -> HeadSelection | None:
        """The query heads that all readers want, or None for all of them."""
        wanted = {hook.heads for hook in self.reads}
        return wanted.pop() if len(wanted) == 1 else None

    def read_rows(self, value: mx.array, computed: list[int] | None) -> None:
        """Show each reader its own query rows (axis 2), of which ``computed`` are there (None: all)."""
        self.fired = True
        for hook in self.reads:
            rows = None if hook.rows is None else hook.rows(self.run)
            if rows is None or rows == computed:
                hook.fn(snapshot(value), self.point)
            else:
                at = rows if computed is None else [computed.index(row) for row in rows]
                hook.fn(value[:, :, mx.array(at)], self.point)


def snapshot(array: mx.array) -> mx.array:
    # Models use in-place operators (h += ...), which change the Python object; a second handle keeps the value.
    handle = array.astype(array.dtype)
    if type(handle) is not mx.array:
        handle.__class__ = mx.array
    return handle
