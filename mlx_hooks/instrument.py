"""Attach and detach: the only place that touches a model's classes or MLX functions.

For the duration of a run the class of each module that is looked at is swapped for a subclass whose ``__call__``
shows input and output to hooks, and the attention kernel is observed while one of the model's attention modules runs.
Afterwards, whatever was raised, every class and function is the original again.

A hook is called as ``fn(value, hook_point)``: what it returns replaces the value, None leaves it alone.
"""

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .architectures import Architecture, Location
from .attention import attention_pattern, attention_scores, weighted_values
from .errors import HookError
from .hook_points import HookPoint
from .hooks import Hook, HookFunction, Run

_SITE = "_neuroscope_site"


@dataclass
class _Tap:
    """The hooks of one point, at the place where its value is met."""

    point: HookPoint
    location: Location
    edits: list[HookFunction] = field(default_factory=list)
    reads: list[Hook] = field(default_factory=list)
    fired: bool = False

    def show(self, array: mx.array) -> mx.array:
        """Run all hooks on the value inside ``array``; answer ``array`` with the value that they leave."""
        array = self.edit(array)
        self.read(array)
        return array

    def edit(self, array: mx.array) -> mx.array:
        if not self.edits:
            return array
        value, edited = self.edit_value(self.location.view.read(array))
        return self.location.view.write(array, value) if edited else array

    def edit_value(self, value: mx.array) -> tuple[mx.array, bool]:
        """Pass a value through the editing hooks: the value that they leave, and whether any replaced it.

        Raises:
            HookError: when a replacement is no MLX array or has another shape.
        """
        self.fired = True
        edited = False
        for fn in self.edits:
            new = fn(_snapshot(value), self.point)
            if new is None:
                continue
            name, axes = self.point.name, ", ".join(self.point.axes)
            if not isinstance(new, mx.array):
                raise HookError(f"A hook on {name} returned {type(new).__name__}: return an mlx array or None.")
            if new.shape != value.shape:
                named = f" ({axes})" if axes else ""
                raise HookError(f"A hook on {name} returned shape {new.shape}: expected {value.shape}{named}.")
            value, edited = new.astype(value.dtype), True
        return value, edited

    def read(self, array: mx.array) -> None:
        self.fired = True
        for hook in self.reads:
            hook.fn(_snapshot(self.location.view.read(array)), self.point)

    def rows(self, run: Run) -> set[int] | None:
        """The query rows that the readers want, or None for all of them."""
        wanted: set[int] = set()
        for hook in self.reads:
            if hook.rows is None:
                return None
            wanted.update(hook.rows(run))
        return wanted

    def read_rows(self, value: mx.array, computed: list[int] | None, run: Run) -> None:
        """Show each reader its own rows of scores or pattern, of which ``computed`` are there (None: all)."""
        self.fired = True
        for hook in self.reads:
            rows = None if hook.rows is None else hook.rows(run)
            if rows is None or rows == computed:
                hook.fn(_snapshot(value), self.point)
            else:
                at = rows if computed is None else [computed.index(row) for row in rows]
                hook.fn(value[:, :, mx.array(at)], self.point)


def _snapshot(array: mx.array) -> mx.array:
    # Models use in-place operators (h += ...), which change the Python object; a second handle keeps the value.
    return array.astype(array.dtype)


class _Site:
    """What happens around one module's call while hooks are attached."""

    def __init__(self, path: str, run: Run) -> None:
        self.path = path
        self.run = run
        self.inputs: list[_Tap] = []
        self.outputs: list[_Tap] = []

    def call(self, original: Callable, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        args, kwargs = self.show_input(args, kwargs)
        return self.show_output(original(module, *args, **kwargs))

    def show_input(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        for tap in self.inputs:
            if args:
                args = (tap.show(self._array(args[0], "input")), *args[1:])
            else:
                name, value = next(iter(kwargs.items()))
                kwargs = kwargs | {name: tap.show(self._array(value, "input"))}
        return args, kwargs

    def show_output(self, output: Any) -> Any:
        for tap in self.outputs:
            output = tap.show(self._array(output, "output"))
        return output

    def _array(self, value: Any, place: str) -> mx.array:
        if not isinstance(value, mx.array):
            raise HookError(
                f"The {place} of {self.path!r} is {type(value).__name__}, not an array: hook a module inside it."
            )
        return value


class _ModelSite(_Site):
    """The whole model: sets the positions of the call before anything fires."""

    called = False

    def call(self, original: Callable, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        tokens = args[0] if args else kwargs["inputs"]
        cache = args[1] if len(args) > 1 else kwargs.get("cache")
        outer = replace(self.run)
        self.run.start, (self.run.batch, self.run.length) = kv_offset(cache), tokens.shape[:2]
        self.called = True
        try:
            return super().call(original, module, args, kwargs)
        finally:
            # A hook may run the model itself: the pass that it interrupted goes on where it stood.
            self.run.start, self.run.length, self.run.batch = outer.start, outer.length, outer.batch


class _BlockSite(_Site):
    """A block: keeps its input, from which an edit of resid_mid is made."""

    residual: mx.array

    def show_input(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        args, kwargs = super().show_input(args, kwargs)
        self.residual = args[0] if args else next(iter(kwargs.values()))
        return args, kwargs


class _AttentionSite(_Site):
    """An attention module: its kernel and its KV cache are observed while it runs."""

    def __init__(self, path: str, run: Run) -> None:
        super().__init__(path, run)
        self.kernel: dict[str, _Tap] = {}
        self.mid: _Tap | None = None
        self.block: _BlockSite | None = None
        self.kernel_calls = 0
        self.new_keys_seen = False

    def call(self, original: Callable, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        if not self.kernel:
            return super().call(original, module, args, kwargs)
        args, kwargs = self.show_input(args, kwargs)
        self.kernel_calls, self.new_keys_seen = 0, False
        cache = next((a for a in (*args, *kwargs.values()) if hasattr(a, "update_and_fetch")), None)
        if hasattr(cache, "bits"):
            raise HookError(
                f"{type(cache).__name__} (a quantised KV cache) is not supported at {', '.join(self._kernel_names())}: "
                "use an unquantised KV cache, or hook the residual stream."
            )
        with _current_attention(self), _observed_cache(cache, self):
            output = original(module, *args, **kwargs)
        if self.kernel_calls != 1:
            raise HookError(
                f"{self.path!r} called the attention kernel {self.kernel_calls} times, expected once: "
                f"{', '.join(self._kernel_names())} cannot be captured in this architecture."
            )
        return self.show_output(output)

    def show_output(self, output: Any) -> Any:
        if self.mid is None or self.block is None:
            return super().show_output(output)
        for tap in self.outputs:
            output = tap.edit(self._array(output, "output"))
        # resid_mid is no module's output: it is set through what the attention adds to the stream.
        mid, edited = self.mid.edit_value(self.block.residual + output)
        if edited:
            output = mid - self.block.residual
        for tap in self.outputs:
            tap.read(output)
        return output

    def _kernel_names(self) -> list[str]:
        return [tap.point.name for tap in self.kernel.values()]

    def show(self, place: str, array: mx.array) -> mx.array:
        return self.kernel[place].show(array) if place in self.kernel else array

    def show_new_keys(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Show keys and values of the call's own positions, before they are joined to older ones."""
        self.new_keys_seen = True
        return self.show("k", keys), self.show("v", values)

    def observe_kernel(self, kernel: Callable, q: mx.array, k: mx.array, v: mx.array, **options: Any) -> mx.array:
        """Call the kernel and show what it got and made."""
        self.kernel_calls += 1
        q = self.show("q", q)
        if not self.new_keys_seen:
            k, v = self.show_new_keys(k, v)
        output = kernel(q, k, v, **options)
        if "scores" in self.kernel or "pattern" in self.kernel:
            output = self._show_pattern(output, q, k, v, **options)
        return self.show("z", output)

    def _show_pattern(
        self,
        output: mx.array,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        *,
        scale: float,
        mask: mx.array | str | None = None,
        sinks: mx.array | None = None,
        **options: Any,
    ) -> mx.array:
        if sinks is not None:
            raise HookError(f"Attention sinks are not supported at {', '.join(self._kernel_names())}.")
        if k.shape[-2] != self.run.start + q.shape[-2]:
            raise HookError(
                f"The KV cache holds {k.shape[-2]} keys for {self.run.start + q.shape[-2]} positions, so keys are "
                f"not in order of position: {', '.join(self._kernel_names())} cannot be captured. Use a plain KVCache."
            )
        rows = self._rows_to_compute()
        edited = False
        array = attention_scores(q, k, scale=scale, mask=mask, rows=rows)
        for place in ("scores", "pattern"):
            if place == "pattern":
                array = attention_pattern(array)
            if place in self.kernel:
                tap = self.kernel[place]
                array, replaced = tap.edit_value(array)
                tap.read_rows(array, rows, self.run)
                edited = edited or replaced
        return weighted_values(array, v).astype(output.dtype) if edited else output

    def _rows_to_compute(self) -> list[int] | None:
        """Only the rows that are kept, unless an edit needs them all (None)."""
        rows: set[int] = set()
        for place in ("scores", "pattern"):
            if place in self.kernel:
                tap = self.kernel[place]
                wanted = tap.rows(self.run)
                if tap.edits or wanted is None:
                    return None
                rows |= wanted
        return sorted(rows)


def kv_offset(cache: Any) -> int:
    """Number of positions that a KV cache (mlx-lm's list, or None) already covers.

    Raises:
        HookError: for a batched cache, whose rows stand at different positions.
    """
    for entry in cache or []:
        offset = getattr(entry, "offset", None)
        if isinstance(offset, int):
            return offset
        if offset is not None:
            raise HookError(f"{type(entry).__name__} keeps an offset per row: hooks need one KV cache per sequence.")
    return 0


class Plan:
    """Which modules a set of hooks touches, worked out once and attached as often as needed.

    Args:
        architecture: where the model's hook points live.
        hooks: what to call, in this order at each point.
        run: shared with readers, which ask it for positions.
    """

    def __init__(self, architecture: Architecture, hooks: Sequence[Hook], run: Run) -> None:
        self.architecture = architecture
        self.hooks = list(hooks)
        self.run = run
        self.sites: dict[int, tuple[nn.Module, _Site]] = {}
        self._paths = {id(module): path for path, module in architecture.modules.items()}
        self._block_of = {id(block): i for i, block in enumerate(architecture.blocks)}
        taps: dict[HookPoint, _Tap] = {}
        for hook in self.hooks:
            if hook.point not in taps:
                taps[hook.point] = _Tap(hook.point, architecture.location(hook.point))
            if hook.reads:
                taps[hook.point].reads.append(hook)
            else:
                taps[hook.point].edits.append(hook.fn)
        self._model_site: _ModelSite | None = self._site(architecture.model) if taps else None
        self._placed: list[tuple[_Tap, nn.Module]] = []
        for tap in taps.values():
            self._place(tap)
        self._observes_kernel = False
        self._needs_kernel = any(isinstance(site, _AttentionSite) and site.kernel for _, site in self.sites.values())

    def _place(self, tap: _Tap) -> None:
        module, place = tap.location.module, tap.location.place
        path = self._paths.get(id(module), "")
        if not self.architecture.is_current(path, module):
            raise HookError(
                f"{tap.point.name} lives in {path!r}, which was replaced since HookedModel was made "
                "(quantised or adapted, perhaps): make a new HookedModel."
            )
        self._placed.append((tap, module))
        site = self._site(module, attention=place not in ("input", "output"))
        if place == "input":
            site.inputs.append(tap)
        elif place == "output":
            site.outputs.append(tap)
        elif place == "mid":
            self._place_mid(tap, site)
        else:
            site.kernel[place] = tap

    def _place_mid(self, tap: _Tap, site: Any) -> None:
        assert tap.point.layer is not None
        if tap.reads:
            # Read where the model itself forms the sum: at the input of what follows.
            source = tap.location.reader
            assert source is not None
            reader = _Tap(tap.point, Location(source, "input"), reads=tap.reads)
            self._site(source).inputs.insert(0, reader)
            self._placed[-1] = (reader, source)
        if tap.edits:
            site.mid = tap
            site.block = self._site(self.architecture.blocks[tap.point.layer])

    def _site(self, module: nn.Module, attention: bool = False) -> Any:
        key = id(module)
        old = self.sites[key][1] if key in self.sites else None
        if old is not None and (not attention or isinstance(old, _AttentionSite)):
            return old
        path = self._paths.get(key, "")
        if attention:
            site: _Site = _AttentionSite(path, self.run)
            if old is not None:
                site.inputs, site.outputs = old.inputs, old.outputs
        elif module is self.architecture.model:
            site = _ModelSite(path, self.run)
        elif key in self._block_of:
            site = _BlockSite(path, self.run)
        else:
            site = _Site(path, self.run)
        self.sites[key] = (module, site)
        return site

    def check_fired(self) -> None:
        """Raise HookError if the model ran and some hook did not: silence would pass for a result."""
        silent = [(tap, module) for tap, module in self._placed if not tap.fired]
        if self._model_site is None or not self._model_site.called or not silent:
            return
        names = ", ".join(tap.point.name for tap, _ in silent[:3]) + (", ..." if len(silent) > 3 else "")
        paths = ", ".join(dict.fromkeys(repr(self._paths.get(id(module), "?")) for _, module in silent[:3]))
        raise HookError(f"Hooks on {names} did not fire: the model ran without calling {paths}.")

    def attach(self) -> None:
        for module, site in self.sites.values():
            object.__setattr__(module, _SITE, site)
            module.__class__ = _observing(type(module))
        if self._needs_kernel:
            _kernel.observe()
            self._observes_kernel = True

    def detach(self) -> None:
        for module, _ in self.sites.values():
            if _SITE in module.__dict__:
                module.__class__ = type(module).__mro__[1]
                object.__delattr__(module, _SITE)
        if self._observes_kernel:
            _kernel.release()
            self._observes_kernel = False


class Instrument:
    """Attaches plans to one model, one thread at a time; plans attached inside one another add up.

    There is one instrument per model, however often the model is wrapped: ``Instrument.of``.
    """

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        self.run = Run()
        self._lock = threading.RLock()
        self._attached: Plan | None = None

    @classmethod
    def of(cls, model: nn.Module) -> "Instrument":
        """The model's instrument, with its modules as they are now.

        Raises:
            UnsupportedModelError: the module tree is not known.
        """
        architecture = Architecture(model)
        with _instruments_lock:
            found = _instruments.get(id(model))
            if found is None:
                found = _instruments[id(model)] = cls(architecture)
            found.architecture = architecture
            return found

    def plan(self, hooks: Sequence[Hook]) -> Plan:
        """Work out what a set of hooks touches.

        Raises:
            HookError: when a module that they need was replaced since the model was wrapped.
        """
        return Plan(self.architecture, hooks, self.run)

    @contextmanager
    def attached(self, plan: Plan, *, phase: str | None = None, step: int = 0, alone: bool = False) -> Iterator[None]:
        """Attach a plan for the duration of a block. Another thread that asks for the same model waits.

        Args:
            phase, step: what the records of this block say; None leaves what an outer block said.
            alone: leave the hooks of outer blocks out.
        """
        with self._lock:
            outer, run = self._attached, replace(self.run)
            self.run.thread = threading.get_ident()
            if outer is not None and not alone:
                # May raise: nothing has changed yet.
                plan = self.plan(outer.hooks + plan.hooks)
            if outer is not None:
                outer.detach()
            if phase is not None:
                self.run.phase, self.run.step = phase, step
            self._attached = plan
            try:
                plan.attach()
                yield
                plan.check_fired()
            finally:
                plan.detach()
                self._attached = outer
                self.run.phase, self.run.step = run.phase, run.step
                if outer is not None:
                    outer.attach()


# An instrument holds its model, so an id cannot be taken by another model while its entry is there.
_instruments: "weakref.WeakValueDictionary[int, Instrument]" = weakref.WeakValueDictionary()
_instruments_lock = threading.Lock()

_observing_classes: dict[type, type] = {}


def _observing(cls: type) -> type:
    """The subclass of a module's class whose call goes through the instance's site."""
    if cls not in _observing_classes:
        original = cls.__call__

        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
            site = self.__dict__.get(_SITE)
            if site is None or site.run.thread != threading.get_ident():
                return original(self, *args, **kwargs)
            return site.call(original, self, args, kwargs)

        body = {"__call__": __call__, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
        _observing_classes[cls] = type(cls.__name__, (cls,), body)
    return _observing_classes[cls]


class _Kernel:
    """MLX's fused attention, observed while any plan that needs it is attached (plans of several models may be)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._original: Callable = mx.fast.scaled_dot_product_attention

    def observe(self) -> None:
        with self._lock:
            if self._users == 0:
                self._original = mx.fast.scaled_dot_product_attention
                mx.fast.scaled_dot_product_attention = self._call
            self._users += 1

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                mx.fast.scaled_dot_product_attention = self._original

    def _call(self, q: mx.array, k: mx.array, v: mx.array, **options: Any) -> mx.array:
        site = getattr(_thread, "attention", None)
        if site is None:
            return self._original(q, k, v, **options)
        return site.observe_kernel(self._original, q, k, v, **options)


_kernel = _Kernel()
_thread = threading.local()


@contextmanager
def _current_attention(site: _AttentionSite) -> Iterator[None]:
    """Say which attention module the kernel is working for, in this thread."""
    outer = getattr(_thread, "attention", None)
    _thread.attention = site
    try:
        yield
    finally:
        _thread.attention = outer


@contextmanager
def _observed_cache(cache: Any, site: _AttentionSite) -> Iterator[None]:
    """Show new keys and values on their way into the KV cache, so that an edit of them lasts for later steps."""
    if cache is None:
        yield
        return
    cls = type(cache)

    def update_and_fetch(self: Any, keys: mx.array, values: mx.array) -> Any:
        return cls.update_and_fetch(self, *site.show_new_keys(keys, values))

    cache.__class__ = type(cls.__name__, (cls,), {"update_and_fetch": update_and_fetch})
    try:
        yield
    finally:
        cache.__class__ = cls
