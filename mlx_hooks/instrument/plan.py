"""Which modules a set of hooks touches, and attaching it to a model."""

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.nn as nn

from ..architectures import Architecture
from ..errors import HookError
from ..hook_points import HookPoint
from ..hooks import Hook, Run
from .attending import Attention, GatheredAttention, LatentAttention, OpenAttention
from .functions import ATTENDING, Function, observed
from .mixing import InputWeights, Logits, State, Weights
from .sites import ModelSite, Site
from .stream import Additions, as_stream
from .taps import Tap, looking_away

_SITE = "_neuroscope_site"

_ADDITIONS = ("attn", "mixer", "mlp", "side", "mid")
_PARTS: dict[str, Any] = {
    "state": State,
    "weights": Weights,
    "input weights": InputWeights,
    "logits": Logits,
}


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
        self.sites: dict[int, tuple[nn.Module, Site]] = {}
        self._taps: list[Tap] = []
        self._functions: set[Function] = set()
        self._observed: set[Function] = set()
        grouped: dict[HookPoint, list[Hook]] = {}
        for hook in self.hooks:
            grouped.setdefault(hook.point, []).append(hook)
        self._model_site: ModelSite | None = self._site(architecture.model) if grouped else None
        for point, hooks_here in grouped.items():
            for location in architecture.locations_of(point):
                edits = [hook.fn for hook in hooks_here if not hook.reads]
                self._place(Tap(point, location, run, edits, [hook for hook in hooks_here if hook.reads]))

    def _place(self, tap: Tap) -> None:
        module, place = tap.location.module, tap.location.place
        path = self.architecture.path(module)
        if not self.architecture.is_current(path, module):
            raise HookError(
                f"{tap.point.name} lives in {path!r}, which was replaced since HookedModel was made "
                "(quantised or adapted, perhaps): make a new HookedModel."
            )
        self._taps.append(tap)
        site = self._site(module)
        if place == "input":
            site.inputs.append(tap)
        elif place == "output":
            site.outputs.append(tap)
        elif place in _PARTS:
            part = _PARTS[place](site)
            part.tap = tap
            if isinstance(part, State):
                part.size = self.architecture.state_size
            site.parts[type(part)] = part
        elif place in _ADDITIONS:
            assert tap.point.layer is not None
            self._additions(tap.point.layer).taps[place] = tap
        else:
            self._functions.update(ATTENDING)
            self._attention(module, site).taps[place] = tap

    def _additions(self, layer: int) -> Additions:
        site: Any = self._site(self.architecture.blocks[layer])
        if Additions not in site.parts:
            part = site.parts[Additions] = Additions(site)
            part.argument = self.architecture.stream_argument(layer)
            adding = self.architecture.adding_function(layer)
            if adding is not None:
                self._functions.add(Function(*adding, "additions", "on_adding"))
            norm = self.architecture.stream_norm(layer)
            if norm is not None:
                self._site(norm).through.append(as_stream)
            for sublayer in self.architecture.sublayers[layer]:
                self._site(sublayer.last).after.append(partial(part.ran, sublayer.kind))
        return site.parts[Additions]

    def _attention(self, module: nn.Module, site: Site) -> Attention:
        ends = self.architecture.open_ends(module)
        if Attention not in site.parts and ends is not None:
            opened = site.parts[Attention] = OpenAttention(site)
            self._site(ends[0]).before.append(opened.open)
            self._site(ends[1]).before.append(opened.close)
        if Attention not in site.parts:
            latent = self.architecture.latent_parts(module)
            gathered = self.architecture.is_gathered(module)
            kind = GatheredAttention if gathered else Attention
            part = LatentAttention(site, module) if latent else kind(site)
            part.hand_written = self.architecture.is_hand_written(module)
            site.parts[Attention] = part
            for name, submodule in latent.items():
                part.observe(name, self._site(submodule))  # type: ignore[attr-defined]
        return site.parts[Attention]  # type: ignore[return-value]

    def _site(self, module: nn.Module) -> Any:
        key = id(module)
        if key not in self.sites:
            kind = ModelSite if module is self.architecture.model else Site
            self.sites[key] = (module, kind(self.architecture.path(module), self.run))
        return self.sites[key][1]

    @property
    def is_current(self) -> bool:
        """Whether the modules that it touches are still the model's."""
        return all(self.architecture.is_current(site.path, module) for module, site in self.sites.values())

    def check_fired(self) -> None:
        """Raise HookError if the model ran and some hook did not: silence would pass for a result."""
        silent = [tap for tap in self._taps if not tap.fired]
        if self._model_site is None or not self._model_site.called or not silent:
            return
        names = ", ".join(tap.point.name for tap in silent[:3]) + (", ..." if len(silent) > 3 else "")
        paths = ", ".join(dict.fromkeys(repr(self.architecture.path(tap.location.module)) for tap in silent[:3]))
        raise HookError(f"Hooks on {names} did not fire: the model ran without calling {paths}.")

    def attach(self) -> None:
        for module, site in self.sites.values():
            object.__setattr__(module, _SITE, site)
            module.__class__ = _observing(type(module))
        observed.observe(self._functions)
        self._observed = self._functions

    def detach(self) -> None:
        for module, _ in self.sites.values():
            if _SITE in module.__dict__:
                module.__class__ = type(module).__mro__[1]
                object.__delattr__(module, _SITE)
        observed.release(self._observed)
        self._observed = set()


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

    @property
    def editing(self) -> list[Hook]:
        """The editing hooks that this thread's blocks keep attached, in order."""
        if self._attached is None or not self.is_attached:
            return []
        return [hook for hook in self._attached.hooks if not hook.reads]

    @property
    def is_attached(self) -> bool:
        """Whether this thread is in a block that attached a plan."""
        return self._attached is not None and self.run.thread == threading.get_ident()

    @property
    def holder(self) -> int | None:
        """The id of the thread that is in such a block, for which others that attach would wait; None if none is."""
        return self.run.thread if self._attached is not None else None

    @contextmanager
    def attached(
        self,
        plan: Plan,
        *,
        phase: str | None = None,
        step: int = 0,
        alone: bool = False,
        begins: int | None = None,
    ) -> Iterator[None]:
        """Attach a plan for the duration of a block. Another thread that asks for the same model waits.

        Args:
            phase, step: what the records of this block say; None leaves what an outer block said.
            alone: leave the hooks of outer blocks out.
            begins: the absolute position at which the block's forward pass begins; None leaves it to the KV cache,
                which cannot tell where the passes before were not attached or did not reach its layers.
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
            self._attached, self.run.begins = plan, begins
            try:
                plan.attach()
                yield
                plan.check_fired()
            finally:
                plan.detach()
                self._attached, self.run.begins = outer, run.begins
                self.run.phase, self.run.step = run.phase, run.step
                if outer is not None:
                    outer.attach()

    @contextmanager
    def set_apart(self) -> Iterator[None]:
        """A block in which the model's classes are its own, and no thread attaches anything."""
        with self._lock:
            outer = self._attached
            if outer is not None:
                outer.detach()
            try:
                yield
            finally:
                if outer is not None:
                    outer.attach()

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """A block in which the model and MLX's functions are plain, inside a pass too: for whoever is told of it.

        A thread that attached nothing meets no hooks anyway: it goes on without waiting for the one that did.
        """
        # In this order: who attaches writes its thread first, so that another's hooks are never taken for one's own.
        attached = self._attached
        if attached is None or not attached.hooks or self.run.thread != threading.get_ident():
            yield
            return
        rows, self.run.rows = self.run.rows, None
        try:
            with looking_away(), self.attached(self.plan([]), alone=True):
                yield
        finally:
            self.run.rows = rows


# An instrument holds its model, so an id cannot be taken by another model while its entry is there.
_instruments: "weakref.WeakValueDictionary[int, Instrument]" = weakref.WeakValueDictionary()
_instruments_lock = threading.Lock()


_observing_classes: dict[type, type] = {}


def plainly(module: nn.Module, *args: Any) -> Any:
    """Call a module as it is without hooks: in the middle of a pass, in a hook of its own too."""
    cls = type(module)
    return (cls.__mro__[1] if _SITE in module.__dict__ else cls).__call__(module, *args)


def without_checkpoint(call: Callable) -> Callable:
    """A block's own call where mlx-lm's ``grad_checkpoint`` wrapped it; any other is returned as it is.

    A checkpoint hands arrays on as new ones: the stream inside the block would not be the one that was shown to it.
    What the block computes is the same.
    """
    if getattr(call, "__qualname__", "") != "grad_checkpoint.<locals>.checkpointed_fn":
        return call
    return without_checkpoint(inspect.getclosurevars(call).nonlocals["fn"])


def _observing(cls: type) -> type:
    """The subclass of a module's class whose call goes through the instance's site."""
    if cls not in _observing_classes:

        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
            # Training may give the class another call meanwhile.
            original = cls.__call__
            site = self.__dict__.get(_SITE)
            if site is None or site.run.thread != threading.get_ident():
                return original(self, *args, **kwargs)
            if Additions in site.parts:
                original = without_checkpoint(original)
            return site.call(original, self, args, kwargs)

        body = {"__call__": __call__, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
        _observing_classes[cls] = type(cls.__name__, (cls,), body)
    return _observing_classes[cls]
