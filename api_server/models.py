"""The models that are loaded, under the ids that requests use, and which of them make room for another."""

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

from mlx_hooks import HookedModel, HookSpec
from mlx_hooks.analysis.identity import ModelIdentity

from .errors import NoModelLoaded, NoRoomForModel, UnknownHook, UnknownModel


@dataclass
class LoadedModel:
    """A model under the id that requests use, with the hooks that were registered for it.

    Only code that runs on the worker thread may compute with ``model``; its configuration, its hook points and the
    check of hook specs against them are plain data that any thread may use.
    """

    model_id: str
    path: str
    model: HookedModel
    created: int
    nbytes: int = 0
    """Bytes of its weights."""
    hooks: dict[str, HookSpec] = field(default_factory=dict)
    used: float = field(default_factory=time.monotonic)

    @cached_property
    def identity(self) -> ModelIdentity:
        """Tells its weights from others; to make it reads all of them, so it is asked for on the worker thread only."""
        return ModelIdentity.of(self.model)


class LoadedModels:
    """All loaded models, in the order in which they were loaded. Any thread may ask.

    Args:
        max_bytes: how many bytes of weights may be loaded at a time; None for no limit.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        self.max_bytes = max_bytes
        self._models: dict[str, LoadedModel] = {}
        self._promised = 0
        """Bytes of models that are being loaded."""
        self._lock = threading.Lock()

    def all(self) -> list[LoadedModel]:
        """All loaded models, the one loaded last at the end."""
        with self._lock:
            return list(self._models.values())

    def get(self, model_id: str | None = None) -> LoadedModel:
        """A loaded model, which now counts as used; the one loaded last if no id is given.

        Raises:
            UnknownModel: lists the loaded ones.
            NoModelLoaded: there is none at all.
        """
        with self._lock:
            if model_id is None and not self._models:
                raise NoModelLoaded
            found = next(reversed(self._models.values())) if model_id is None else self._models.get(model_id)
            if found is None:
                raise UnknownModel(str(model_id), list(self._models))
            found.used = time.monotonic()
            return found

    def put(self, loaded: LoadedModel) -> None:
        """Make a model the default; one of the same id is replaced, with its hooks."""
        with self._lock:
            self._models.pop(loaded.model_id, None)
            self._models[loaded.model_id] = loaded

    def remove(self, model_id: str) -> None:
        """Forget a model; a job that already has it runs to its end.

        Raises:
            UnknownModel: lists the loaded ones.
        """
        with self._lock:
            if self._models.pop(model_id, None) is None:
                raise UnknownModel(model_id, list(self._models))

    @contextmanager
    def room(self, nbytes: int, in_use: Iterable[LoadedModel]) -> Iterator[list[str]]:
        """Keep room for ``nbytes`` more: the models that were not used for longest are forgotten, until they fit.

        Args:
            in_use: models that jobs hold. They stay.

        Returns:
            the ids of those forgotten.

        Raises:
            NoRoomForModel: they would not fit anyway; nothing was forgotten.
        """
        gone = self._make_room(nbytes, list(in_use))
        try:
            yield gone
        finally:
            with self._lock:
                self._promised -= nbytes

    def _make_room(self, nbytes: int, in_use: list[LoadedModel]) -> list[str]:
        with self._lock:
            gone: list[str] = []
            if self.max_bytes is not None:
                busy = {id(loaded) for loaded in in_use}
                # One that was removed while a job holds it takes memory all the same.
                held = {id(loaded): loaded for loaded in (*self._models.values(), *in_use)}
                excess = self._promised + sum(one.nbytes for one in held.values()) + nbytes - self.max_bytes
                idle = sorted((one for one in self._models.values() if id(one) not in busy), key=lambda one: one.used)
                if excess > sum(loaded.nbytes for loaded in idle):
                    needed = self._promised + sum(loaded.nbytes for key, loaded in held.items() if key in busy)
                    raise NoRoomForModel(nbytes, self.max_bytes, needed if nbytes <= self.max_bytes else 0)
                for loaded in idle:
                    if excess <= 0:
                        break
                    del self._models[loaded.model_id]
                    gone.append(loaded.model_id)
                    excess -= loaded.nbytes
            self._promised += nbytes
            return gone

    # -- registered hooks ---------------------------------------------------------------------------------------------

    def register_hooks(self, specs: list[HookSpec], model_id: str | None = None) -> list[str]:
        """Keep hooks for a model, after a check against it; one with a known id takes that one's place.

        Raises:
            HookError: an unknown layer or component, or two specs of one id; nothing was registered.
        """
        loaded = self.get(model_id)
        ids = loaded.model.resolve_hooks(specs).hook_ids
        with self._lock:
            # A new dict: a request that is reading the old one must not see half of this.
            loaded.hooks = loaded.hooks | {spec.hook_id: spec for spec in specs}
        return ids

    def clear_hooks(self, model_id: str | None = None) -> None:
        """Forget the hooks of one model, or of all."""
        for loaded in self.all() if model_id is None else [self.get(model_id)]:
            loaded.hooks = {}

    def remove_hook(self, hook_id: str, model_id: str | None = None) -> None:
        """Forget one hook, in one model or wherever it is registered.

        Raises:
            UnknownHook: lists those that are registered.
        """
        models = self.all() if model_id is None else [self.get(model_id)]
        with self._lock:
            having = [loaded for loaded in models if hook_id in loaded.hooks]
            if not having:
                raise UnknownHook(hook_id, sorted({known for loaded in models for known in loaded.hooks}))
            for loaded in having:
                loaded.hooks = {known: spec for known, spec in loaded.hooks.items() if known != hook_id}
