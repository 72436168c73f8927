"""Tells observers of a generation what its passes compute: which hooks that needs, and the events in their order.

The prompt's passes are told while they run, layer by layer, so that no more than one layer's attention is held; the
model is set aside meanwhile. A generated token's pass is told when it is due, since it was started before the token
that it reads was known: its arrays join the evaluation of the pass and are handed out afterwards.
"""

import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx

from ..architectures import Architecture
from ..errors import HookError, ObserverError, ObserverWarning
from ..hook_points import HookPoint, block_point
from ..hooks import HeadSelection, Hook
from ..instrument import Instrument
from ..token_text import TokenText
from .base import ARRAYS, InferenceHook, LayerAttention, State, Wanted

COMPONENTS = {"weights": "pattern", "query": "rot_q", "key": "rot_k", "value": "v"}
"""The components behind what an attention event shows."""
ATTENTION_EVENT, FFN_EVENT = "on_layer_attention", "on_ffn_computed"


class Watched:
    """Observers checked against a model: which of them want what of which layer.

    Args:
        observers: instances of :class:`InferenceHook`; those that are off are left out.
        errors: "raise" or "collect".

    Raises:
        HookError: for what is no observer, a layer or head that the model does not have, and for an observer of
            attention or MLPs on a model that shows none.
    """

    def __init__(self, observers: Iterable[InferenceHook], architecture: Architecture, errors: str = "raise") -> None:
        if errors not in ("raise", "collect"):
            raise HookError(f"hook_errors is 'raise' or 'collect', got {errors!r}.")
        self.architecture = architecture
        self.collecting = errors == "collect"
        self.observers = [observer for observer in _checked(observers) if observer.enabled]
        self.streams = architecture.streams if self.observers else {}
        self.attention: dict[int, list[tuple[InferenceHook, Wanted]]] = {}
        self.ffn: dict[int, list[tuple[InferenceHook, Wanted]]] = {}
        for observer in self.observers:
            wanted = observer.attention_wanted(self.streams)
            if wanted is not None:
                parts = [COMPONENTS[part] for part in ("weights", *wanted.arrays)]
                self._want(self.attention, observer, wanted, parts, "attention pattern")
                self._check_heads(observer, wanted)
            wanted = observer.ffn_wanted()
            if wanted is not None:
                self._want(self.ffn, observer, wanted, ["mlp_in", "mlp_out"], "MLP")

    def _want(
        self,
        by_layer: dict[int, list[tuple[InferenceHook, Wanted]]],
        observer: InferenceHook,
        wanted: Wanted,
        components: list[str],
        what: str,
    ) -> None:
        n_layers, points = len(self.architecture.blocks), self.architecture.points
        outside = [layer for layer in wanted.layers or () if layer >= n_layers]
        if outside:
            raise HookError(
                f"{observer!r} asks for layer {outside[0]}: layers are 0 to {n_layers - 1}.", field="layers"
            )
        asked = range(n_layers) if wanted.layers is None else wanted.layers
        names = {layer: [block_point(component, layer).name for component in components] for layer in asked}
        self._check_arrays(observer, wanted, asked)
        for layer in asked:
            for name in names[layer]:
                # What is there and cannot be shown is said, rather than left out.
                self.architecture.check_supported(name)
        shown = [layer for layer in asked if all(name in points for name in names[layer])]
        missing = [layer for layer in wanted.layers or () if layer not in shown]
        if missing or not shown:
            where = f"layer {missing[0]} of " if missing else ""
            raise HookError(
                f"{observer!r} would see nothing: {where}{self.architecture.cfg.model_type} has no {what} to show."
            )
        for layer in shown:
            by_layer.setdefault(layer, []).append((observer, wanted))

    def _check_arrays(self, observer: InferenceHook, wanted: Wanted, layers: Iterable[int]) -> None:
        """Refuse queries, keys and values where it is not known which of them an attention reads."""
        if wanted.arrays and any(self.architecture.attends_openly(layer) for layer in layers):
            raise HookError(
                f"{observer!r} asks for {', '.join(wanted.arrays)}: {self.architecture.cfg.model_type} attends several "
                "times with the same ones, so it has attention weights to show and no arrays beside them."
            )

    def _check_heads(self, observer: InferenceHook, wanted: Wanted) -> None:
        for layer, told in self.attention.items():
            n_heads = self.architecture.n_query_heads(layer)
            outside = [head for head in wanted.heads or () if head >= n_heads]
            if outside and any(other is observer for other, _ in told):
                raise HookError(
                    f"{observer!r} asks for head {outside[0]}: layer {layer} has heads 0 to {n_heads - 1}.",
                    field="heads",
                )

    def __bool__(self) -> bool:
        return bool(self.observers)

    def overridden(self, event: str) -> list[InferenceHook]:
        """The observers to which an event means something."""
        return [observer for observer in self.observers if observer.overrides(event)]


def _checked(observers: Iterable[InferenceHook]) -> list[InferenceHook]:
    if isinstance(observers, InferenceHook) or not isinstance(observers, Iterable):
        raise HookError(f"hooks is a list of InferenceHook objects, got {observers!r}.")
    found = list(observers)
    for i, observer in enumerate(found):
        if not isinstance(observer, InferenceHook):
            what = f"the class {observer.__name__}" if isinstance(observer, type) else repr(observer)
            raise HookError(f"hooks is a list of InferenceHook objects, got {what} in it.")
        if not hasattr(observer, "errors"):
            raise HookError(f"{type(observer).__name__}.__init__ has to call super().__init__(name) first.")
        _check_that_heads_are_told(observer)
        if any(observer is other for other in found[:i]):
            raise HookError(f"{observer!r} is listed twice.")
    return found


def _check_that_heads_are_told(observer: InferenceHook) -> None:
    """Refuse ``on_attention_computed`` below a class whose ``on_layer_attention`` does not call it."""
    owners = [
        next((i for i, cls in enumerate(type(observer).__mro__) if event in vars(cls)), None)
        for event in ("on_attention_computed", "on_layer_attention")
    ]
    by_head, by_layer = owners
    if by_head is not None and by_layer is not None and by_head < by_layer:
        above = type(observer).__mro__[by_layer]
        if above is not InferenceHook:
            raise HookError(
                f"{type(observer).__name__} overrides on_attention_computed, but {above.__name__} takes all heads at "
                "once: override on_layer_attention, or inherit from InferenceHook."
            )


class Watch:
    """One generation as its observers are told of it.

    Args:
        watched: the observers and what they want.
        instrument: of the model.
        tokenizer: makes texts of tokens; without it, ids are their text.
        prompt: the prompt's ids.
        state: what ``state`` holds of the generation: temperature, top_k, max_new_tokens.
    """

    def __init__(
        self, watched: Watched, instrument: Instrument, tokenizer: Any, prompt: Sequence[int], state: State
    ) -> None:
        self.watched = watched
        self.instrument = instrument
        self.run = instrument.run
        self.ids = list(prompt)
        self._spelling = TokenText(tokenizer)
        self.texts = self._texts(self.ids)
        self.prompt_length = len(self.ids)
        self.state: State = state | {"prompt_length": self.prompt_length, "streams": dict(watched.streams)}
        self.hooks = [hook for layer in watched.attention for hook in self._attention_hooks(layer)]
        self.hooks += [hook for layer in watched.ffn for hook in self._ffn_hooks(layer)]
        self._keeps_logits = bool(watched.overridden("on_forward_end"))
        self._pass: SeenPass | None = None
        self._latest: SeenPass | None = None
        self._told_now = False
        # What is not complete yet, by layer and pass through it; keys and values of all positions so far.
        self._partial: dict[tuple[str, int, int], dict[str, mx.array]] = {}
        self._so_far: dict[tuple[str, int, int], mx.array] = {}
        self._warned: set[int] = set()
        self._ended = False
        # Who was told last of a generation is told of no older one: events of two would mix.
        self._generation = object()

    def _texts(self, ids: Sequence[int]) -> list[str]:
        return [self._spelling.text(i) for i in ids]

    # What is captured

    def _attention_hooks(self, layer: int) -> list[Hook]:
        wanted = [one for _, one in self.watched.attention[layer]]
        n_heads = self.watched.architecture.n_query_heads(layer)
        heads = {head for one in wanted for head in one.heads or range(n_heads)}
        selection = None if len(heads) == n_heads else HeadSelection(tuple(sorted(heads)), n_heads)
        in_parts = all(one.in_parts for one in wanted)
        needed = {"weights", *(array for one in wanted for array in one.arrays)}
        hooks = []
        for part in ("weights", *ARRAYS):
            if part in needed:
                point = block_point(COMPONENTS[part], layer)
                see = partial(self._see_attention, part, layer, needed, selection)
                own = {"heads": selection, "in_parts": in_parts} if part == "weights" else {}
                hooks.append(Hook(point, see, reads=True, **own))  # type: ignore[arg-type]
        return hooks

    def _ffn_hooks(self, layer: int) -> list[Hook]:
        return [
            Hook(block_point(component, layer), partial(self._see_ffn, component, layer), reads=True)
            for component in ("mlp_in", "mlp_out")
        ]

    def _see_attention(
        self,
        part: str,
        layer: int,
        needed: set[str],
        selection: HeadSelection | None,
        value: mx.array,
        point: HookPoint,
    ) -> None:
        if self._pass is None:
            return
        nth = self.run.pass_index
        if part in ("key", "value"):
            old = self._so_far.get((part, layer, nth))
            value = value if old is None else mx.concatenate([old, value], axis=1)
            self._so_far[part, layer, nth] = value
        parts = self._partial.setdefault(("attention", layer, nth), {})
        parts[part] = value
        if parts.keys() < needed:
            return
        rows = self.run.rows or range(self.run.length)
        if rows.stop == self.run.length:
            del self._partial["attention", layer, nth]
        weights = parts["weights"]
        n_heads = self.watched.architecture.n_query_heads(layer)
        heads = tuple(range(n_heads)) if selection is None or weights.shape[1] == n_heads else selection.heads
        positions = range(self.run.start + rows.start, self.run.start + rows.stop)
        shared = {name: self._per_query(layer, parts.get(name), n_heads) for name in ("key", "value")}
        attention = LayerAttention(
            weights, positions, heads, n_heads, query=parts.get("query"), pass_index=nth, **shared
        )
        views = [value for value in shared.values() if value is not None]
        self._happened(ATTENTION_EVENT, layer, [attention], [*parts.values(), *views])

    def _per_query(self, layer: int, value: mx.array | None, n_heads: int) -> mx.array | None:
        if value is None:
            return None
        return self.watched.architecture.values_per_query(layer, value.swapaxes(1, 2), n_heads).swapaxes(1, 2)

    def _see_ffn(self, component: str, layer: int, value: mx.array, point: HookPoint) -> None:
        if self._pass is None:
            return
        parts = self._partial.setdefault(("ffn", layer, self.run.pass_index), {})
        parts[component] = value
        if len(parts) == 2:
            del self._partial["ffn", layer, self.run.pass_index]
            self._happened(FFN_EVENT, layer, [parts["mlp_in"], parts["mlp_out"]], list(parts.values()))

    def _happened(self, event: str, layer: int, shown: list[Any], arrays: list[mx.array]) -> None:
        assert self._pass is not None
        if not self._told_now:
            self._pass.events.append((event, layer, shown))
            self._pass.arrays += arrays
            return
        mx.eval(arrays)
        going, self._pass = self._pass, None
        try:
            self._tell_layer(going, event, layer, shown)
        finally:
            self._pass = going

    # The passes

    def begin(self) -> None:
        """The generation begins."""
        self.state |= {"token_ids": list(self.ids), "tokens": list(self.texts)}
        for observer in self.watched.observers:
            observer.errors = []
            observer._generation = self._generation
        self._call("on_generation_begin", list(self.texts), self.state)

    @contextmanager
    def following(self, tokens: mx.array, position: int, phase: str, step: int) -> Iterator[None]:
        """Hooks see the pass that runs in the block. One of the prompt is told while it runs."""
        self._told_now = phase == "prefill"
        going = self._latest = SeenPass(tokens, position, phase, step)
        if self._told_now:
            self._tell_begin(going)
        self._pass = going
        try:
            yield
            self._check_complete()
        finally:
            self._pass = None

    def _check_complete(self) -> None:
        """Raise HookError if a pass showed a part of what an event shows: silence would pass for a result."""
        for (what, layer, nth), parts in self._partial.items():
            shown = " and ".join(parts)
            raise HookError(
                f"The {what} of layer {layer} cannot be told: pass {nth} through it showed {shown} and nothing else."
            )

    def release(self) -> None:
        """Let go of what the generation computed; nothing is told any more."""
        # Hooks, and the plan that attached them, hold this object: only the cycle collector finds it.
        self.hooks, self._pass, self._latest = [], None, None
        self._partial.clear()
        self._so_far.clear()

    def passed(self, logits: mx.array) -> "SeenPass | None":
        """The pass gave these logits [batch, pos, d_vocab]; answers what ``tell`` is given later, if anything."""
        going, self._latest = self._latest, None
        assert going is not None
        going.logits = logits if self._keeps_logits else None
        if not self._told_now:
            return going
        self._tell_end(going)
        return None

    def chosen(self, token: int) -> None:
        """A token was chosen."""
        self.ids.append(token)
        self.texts += self._texts([token])

    def tell(self, going: "SeenPass") -> None:
        """The events of a generated token's pass."""
        self._tell_begin(going)
        for event, layer, shown in going.events:
            self._tell_layer(going, event, layer, shown)
        self._tell_end(going)

    def end(self, reason: str) -> None:
        """The generation ended; the first reason counts."""
        if self._ended:
            return
        self._ended = True
        self.state |= {"finish_reason": reason, "token_ids": list(self.ids), "tokens": list(self.texts)}
        self._call("on_generation_end", self.texts[self.prompt_length :], self.state)

    # The events

    def _tell_begin(self, going: "SeenPass") -> None:
        stop = going.position + going.tokens.size
        going.texts = self.texts[:stop]
        self.state |= {
            "phase": going.phase,
            "step": going.step,
            "positions": range(going.position, stop),
            "tokens": list(going.texts),
            "token_ids": self.ids[:stop],
        }
        self._call("on_forward_begin", going.tokens[None], going.position, self.state)

    def _tell_layer(self, going: "SeenPass", event: str, layer: int, shown: list[Any]) -> None:
        attending = event == ATTENTION_EVENT
        told = (self.watched.attention if attending else self.watched.ffn)[layer]
        if attending and layer in self.watched.streams:
            self.state["stream_type"] = self.watched.streams[layer]
        for observer, wanted in told:
            own = [shown[0].of_heads(wanted.heads)] if attending else shown
            self._call_one(observer, event, layer, *own, going.texts, going.position, self.state)
        self.state.pop("stream_type", None)

    def _tell_end(self, going: "SeenPass") -> None:
        if self._keeps_logits:
            self._call("on_forward_end", going.logits, going.position, self.state)

    def _call(self, event: str, *arguments: Any) -> None:
        for observer in self.watched.overridden(event):
            self._call_one(observer, event, *arguments)

    def _call_one(self, observer: InferenceHook, event: str, *arguments: Any) -> None:
        if not observer.enabled:
            return
        if observer._generation is not self._generation:
            if event == "on_generation_end":
                return
            raise HookError(f"{observer!r} observes a later generation by now: give each one that runs its own hook.")
        try:
            with self.instrument.set_aside():
                getattr(observer, event)(*map(_own, arguments))
        except Exception as error:
            if event == ATTENTION_EVENT and not observer.overrides(event):
                event = "on_attention_computed"
            problem = ObserverError(
                f"The hook {observer.name!r} failed in {event}: {type(error).__name__}: {error}",
                name=observer.name,
                event=event,
            )
            if not self.watched.collecting:
                raise problem from error
            problem.__cause__ = error
            # The frames of a traceback would hold the arrays of every pass.
            traceback.clear_frames(error.__traceback__)
            observer.errors.append(problem)
            if id(observer) not in self._warned:
                self._warned.add(id(observer))
                warnings.warn(f"{problem} Further errors are in its `errors`.", ObserverWarning, stacklevel=2)


def _own(argument: Any) -> Any:
    """What one observer is given of what all are shown: a list or array that it changes is its own."""
    if isinstance(argument, list):
        return list(argument)
    if isinstance(argument, mx.array):
        # Of the same type it is the same memory, behind a handle of its own.
        return argument.astype(argument.dtype)
    if isinstance(argument, LayerAttention):
        arrays = ("weights", *ARRAYS)
        return replace(argument, **{name: _own(getattr(argument, name)) for name in arrays})
    return argument


class SeenPass:
    """One forward pass and what is to be told of it; ``arrays`` are to be evaluated with it."""

    def __init__(self, tokens: mx.array, position: int, phase: str, step: int) -> None:
        self.tokens = tokens
        self.position = position
        self.phase = phase
        self.step = step
        self.logits: mx.array | None = None
        self.texts: list[str] = []
        self.events: list[tuple[str, int, list[Any]]] = []
        self.arrays: list[mx.array] = []
