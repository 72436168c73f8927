"""What happens around one module's call while hooks are attached, and where in the sequence the call stands."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import HookError
from ..hooks import Run
from .taps import Tap, current

_forward_numbers = itertools.count()
# State-space caches do not say how many positions they cover: it is noted on them, where a copy keeps it.
_OFFSET = "_neuroscope_offset"


def kv_offset(cache: Any) -> int:
    """Number of positions that a KV cache (mlx-lm's list, or None) already covers.

    Raises:
        HookError: for a batched cache, whose rows stand at different positions, and for a state-space cache that was
            filled where it could not be seen how far.
    """
    entries = single_caches(cache)
    for entry in entries:
        offset = getattr(entry, "offset", None)
        if isinstance(offset, int):
            return offset
        if offset is not None:
            raise HookError(f"{type(entry).__name__} keeps an offset per row: hooks need one KV cache per sequence.")
    if not entries or entries[0].empty():
        return 0
    if not hasattr(entries[0], _OFFSET):
        raise HookError(
            "How many positions this state-space cache covers is not known: fill it through HookedModel from the start."
        )
    return int(getattr(entries[0], _OFFSET))


def remember_offset(cache: Any, offset: int) -> None:
    entries = single_caches(cache)
    if entries and not any(hasattr(entry, "offset") for entry in entries):
        setattr(entries[0], _OFFSET, offset)


def single_caches(cache: Any) -> list[Any]:
    """The single caches of mlx-lm's list, which may hold lists of caches."""
    found = []
    for entry in cache or []:
        found += list(entry.caches) if hasattr(entry, "caches") else [entry] if entry is not None else []
    return found


class Part:
    """Something besides input and output that is met during a module's call."""

    def __init__(self, site: "Site") -> None:
        self.site = site
        self.run = site.run
        self.nth = 0

    def enter(self, original: Callable, args: tuple, kwargs: dict, nth: int) -> tuple[tuple, dict]:
        self.nth = nth
        return args, kwargs

    def leave(self) -> None:
        """Undo what ``enter`` did, whatever was raised."""

    def finish(self, output: Any) -> Any:
        return output


class Site:
    """What happens around one module's call while hooks are attached."""

    def __init__(self, path: str, run: Run) -> None:
        self.path = path
        self.run = run
        self.inputs: list[Tap] = []
        self.outputs: list[Tap] = []
        self.parts: dict[type, Part] = {}
        # Followers of the calls: told of each first argument, given each output to change, told of each output.
        self.before: list[Callable[[Any], None]] = []
        self.through: list[Callable[[Any], Any]] = []
        self.after: list[Callable[[Any], None]] = []
        self._calls = 0
        self._forward = -1

    def call(self, original: Callable, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        nth = self.count()
        args, kwargs = self.show_input(args, kwargs, nth)
        for part in self.parts.values():
            args, kwargs = part.enter(original, args, kwargs, nth)
        for tell in self.before:
            tell(args[0])
        try:
            output = original(module, *args, **kwargs)
        finally:
            for part in self.parts.values():
                part.leave()
        for part in self.parts.values():
            output = part.finish(output)
        output = self.show_output(output, nth)
        for change in self.through:
            output = change(output)
        for tell in self.after:
            tell(output)
        return output

    def count(self) -> int:
        """How often the module was called before in this forward pass."""
        if self._forward != self.run.forward:
            self._forward, self._calls = self.run.forward, 0
        self._calls += 1
        return self._calls - 1

    def show_input(self, args: tuple, kwargs: dict, nth: int) -> tuple[tuple, dict]:
        for tap in self.inputs:

            def shown(value: Any, tap: Tap = tap) -> mx.array:
                return tap.show(self._array(value, "input"), nth)

            args, kwargs = with_argument(args, kwargs, tap.location.index, shown)
        return args, kwargs

    def show_output(self, output: Any, nth: int) -> Any:
        for tap in self.outputs:
            if isinstance(output, tuple | list):
                index = tap.location.index
                item = tap.show(self._array(output[index], "output"), nth)
                output = type(output)([*output[:index], item, *output[index + 1 :]])
            else:
                output = tap.show(self._array(output, "output"), nth)
        return output

    def _array(self, value: Any, place: str) -> mx.array:
        if not isinstance(value, mx.array):
            raise HookError(
                f"The {place} of {self.path!r} is {type(value).__name__}, not an array: hook a module inside it."
            )
        return value


def with_argument(args: tuple, kwargs: dict, index: int, change: Callable[[Any], Any]) -> tuple[tuple, dict]:
    """The arguments of a call with the one at ``index`` (keywords count after the others) changed."""
    if index < len(args):
        return (*args[:index], change(args[index]), *args[index + 1 :]), kwargs
    name = list(kwargs)[index - len(args)]
    return args, kwargs | {name: change(kwargs[name])}


class ModelSite(Site):
    """The whole model: sets the positions of the call before anything fires."""

    called = False

    def call(self, original: Callable, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        tokens = args[0] if args else kwargs["inputs"]
        cache = kwargs.get("cache") if "cache" in kwargs else next((a for a in args[1:] if isinstance(a, list)), None)
        outer, attention = replace(self.run), getattr(current, "attention", None)
        # A pass that a hook runs in between begins elsewhere.
        begins, self.run.begins = self.run.begins, None
        self.run.start = kv_offset(cache) if begins is None else begins
        self.run.batch, self.run.length = tokens.shape[:2]
        self.run.forward = next(_forward_numbers)
        self.run.caches = single_caches(cache)
        self.called = True
        try:
            output = super().call(original, module, args, kwargs)
            remember_offset(cache, self.run.start + tokens.shape[1])
        finally:
            # What broke off inside attention that is no call of its own would look on at every later one.
            current.attention = attention
            # A hook may run the model itself: the pass that it interrupted goes on where it stood.
            for name in ("start", "length", "batch", "forward", "caches"):
                setattr(self.run, name, getattr(outer, name))
        return output
