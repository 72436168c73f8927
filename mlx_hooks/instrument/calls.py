"""Follows the calls that others make of a model, such as a training loop's, and attaches hooks for each of them alone.

Between two calls no hook is attached and no lock is held. What a ``HookedModel`` runs itself is not followed. Who is
forgotten follows no more.
"""

import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.nn as nn

from .plan import Instrument

Call = Callable[[], Any]
Around = Callable[[Call, Sequence[Any], dict[str, Any]], Any]
"""What follows a call: it makes the call once, and answers what it gave. It is told the arguments."""

_FOLLOWED = "_neuroscope_followed"


class _Followed:
    """Who follows the calls of one model."""

    def __init__(self, instrument: Instrument) -> None:
        self.instrument = instrument
        self.arounds: list[weakref.ReferenceType[Around]] = []
        self._inside = threading.local()

    @property
    def is_inside(self) -> bool:
        """Whether this thread is in a call that is followed, or in one that HookedModel makes."""
        return getattr(self._inside, "call", False) or self.instrument.is_attached

    def living(self) -> list[Around]:
        """Who still follows, in the order in which they began."""
        return [around for reference in self.arounds if (around := reference()) is not None]

    def end_of(self, reference: "weakref.ReferenceType[Around] | None" = None) -> None:
        """Drop one, and whoever is forgotten; with the last one the model is as it was."""
        gone = [one for one in self.arounds if one is reference or one() is None]
        self.arounds = [one for one in self.arounds if one not in gone]
        model = self.instrument.architecture.model
        if gone and not self.arounds:
            with self.instrument.set_apart():
                model.__class__ = type(model).__mro__[1]
                object.__delattr__(model, _FOLLOWED)

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of the model is followed by nobody."""

    def call(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        def make() -> Any:
            # By the model's class as it is now: hooks that were attached meanwhile meet the call.
            return model(*args, **kwargs)

        for around in reversed(self.living()):
            make = partial(around, make, args, kwargs)
        self._inside.call = True
        try:
            return make()
        finally:
            self._inside.call = False


def follow_calls(instrument: Instrument, around: Around) -> Callable[[], None]:
    """Follow each call of the instrument's model from now on; answers what ends that, which may be called twice.

    Args:
        around: a method. Its object is not kept alive: when nobody else holds it, the next call ends the following.
    """
    reference = weakref.WeakMethod(around)
    model = instrument.architecture.model
    with instrument.set_apart():
        followed = model.__dict__.get(_FOLLOWED)
        if followed is None:
            followed = _Followed(instrument)
            object.__setattr__(model, _FOLLOWED, followed)
            model.__class__ = _following(type(model))
        followed.arounds.append(reference)
    return partial(followed.end_of, reference)


_following_classes: dict[type, type] = {}


def _following(cls: type) -> type:
    """The subclass of a model's class whose call goes through the model's followers."""
    if cls not in _following_classes:

        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
            followed = self.__dict__.get(_FOLLOWED)
            if followed is None or followed.is_inside:
                return cls.__call__(self, *args, **kwargs)
            if len(followed.living()) < len(followed.arounds):
                followed.end_of()
                return self(*args, **kwargs)
            return followed.call(self, args, kwargs)

        body = {"__call__": __call__, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
        _following_classes[cls] = type(cls.__name__, (cls,), body)
    return _following_classes[cls]
