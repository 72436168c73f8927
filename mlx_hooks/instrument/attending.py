"""What the attention function gets and makes, in the forms that mlx-lm's architectures attend in."""

import inspect
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..attention import (
    KeyPositions,
    attention_pattern,
    attention_scores,
    pattern_in_parts,
    pick_heads,
    show_masked,
    weighted_values,
)
from ..errors import HookError
from .sites import Part, Site
from .taps import Tap, current, snapshot

ROWS_OF_A_PART = 256
"""Query rows that are shown at a time to readers of a pattern that take it in parts."""


class Attention(Part):
    """What the attention function gets and makes while an attention module runs, and the new keys and values."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.taps: dict[str, Tap] = {}
        self.hand_written = False
        self._cache: Any = None
        self._new_keys_seen = False
        self._kernel_calls = 0
        self._in_softmax = False

    def names(self) -> str:
        return ", ".join(tap.point.name for tap in self.taps.values())

    def enter(self, original: Callable, args: tuple, kwargs: dict, nth: int) -> tuple[tuple, dict]:
        self.nth = nth
        self._kernel_calls, self._new_keys_seen = 0, False
        self._outer = getattr(current, "attention", None)
        current.attention = self
        self._cache = next(
            (c for a in (*args, *kwargs.values()) for c in _members(a) if hasattr(c, "update_and_fetch")), None
        )
        if self._cache is not None:
            self._cache_class = type(self._cache)
            self._cache.__class__ = _observing_cache(self._cache_class)
        return args, kwargs

    def leave(self) -> None:
        current.attention = self._outer
        if self._cache is not None:
            self._cache.__class__ = self._cache_class
            # A plan outlives its runs: it must not keep what they computed alive.
            self._cache = None

    def finish(self, output: Any) -> Any:
        if self._kernel_calls != 1:
            raise HookError(
                f"{self.site.path!r} attended {self._kernel_calls} times in one call, expected once: "
                f"{self.names()} cannot be captured in this architecture."
            )
        return output

    def show(self, place: str, array: mx.array, reading: bool = True) -> mx.array:
        return self.taps[place].show(array, self.nth, reading) if place in self.taps else array

    def show_new_keys(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Show keys and values of the call's own positions, before they are joined to older ones."""
        self._new_keys_seen = True
        # What a quantised cache holds of them is read when it gives them back.
        reading = not hasattr(self._cache, "bits")
        return self.show("k", keys, reading), self.show("v", values, reading)

    def key_positions(self, keys: Any) -> KeyPositions:
        """Where the kernel's keys [..., key, d_head] stand; a layer without a KV cache may read another layer's."""
        cache = self._cache or next((c for c in self.run.caches if getattr(c, "keys", None) is keys), None)
        return KeyPositions.of(cache, keys.shape[-2], self.run.start + self.run.length)

    def on_kernel(self, kernel: Callable, q: mx.array, k: mx.array, v: mx.array, **options: Any) -> mx.array:
        """The fused attention: show what it gets and makes."""
        if not isinstance(k, mx.array):
            # A quantised KV cache where the model does not take one: MLX says so.
            return kernel(q, k, v, **options)
        self._kernel_calls += 1
        q = self.show("q", q)
        if not self._new_keys_seen:
            k, v = self._show_own_keys(k, v)
        output = kernel(q, k, v, **options)
        if self.taps.keys() & {"scores", "pattern", "sink"}:
            output = self._show_pattern(output, q, k, v, **options)
        return self.show("z", output)

    def _show_own_keys(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """Without a KV cache, or with another layer's, the kernel's keys end with the call's own."""
        if not self.taps.keys() & {"k", "v"}:
            return k, v
        where = self.key_positions(k)
        length = self.run.length
        own_k, own_v = where.own(k, length), where.own(v, length)
        shown_k, shown_v = self.show("k", own_k), self.show("v", own_v)
        if k.shape[-2] == length:
            return shown_k, shown_v
        for place, edited in (("k", shown_k is not own_k), ("v", shown_v is not own_v)):
            if edited:
                raise self._of_another_layer(place)
        return k, v

    def _of_another_layer(self, place: str) -> HookError:
        name = self.taps[place].point.name
        return HookError(f"{name} belongs to another layer, whose keys and values this one reads: edit them there.")

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
        rows, heads = self._rows_to_compute(), self._heads_to_compute()
        where = self.key_positions(k)
        if heads is not None:
            q, k, mask, sinks = pick_heads(heads, q, k, mask, sinks)
        if self._may_come_in_parts(q, mask, where):
            self._read_parts(where, q, k, scale=scale, mask=mask, sinks=sinks)
            return output
        scores = attention_scores(q, k, scale=scale, mask=mask, rows=rows)
        scores, scores_edited = self._show_keys("scores", scores, rows, where, fill=-mx.inf)
        pattern, sink = attention_pattern(scores, sinks, mask=mask)
        pattern, pattern_edited = self._show_pattern_keys(pattern, scores, rows, where)
        if "sink" in self.taps and sink is not None:
            self._show_rows("sink", sink, rows)
        edited = scores_edited or pattern_edited
        return weighted_values(pattern, v).astype(output.dtype) if edited else output

    def _may_come_in_parts(self, q: mx.array, mask: mx.array | str | None, where: KeyPositions) -> bool:
        """Whether a pattern is long, and all who want it are readers that take it in parts."""
        if not self.taps.keys() & {"scores", "sink"} and q.shape[-2] > ROWS_OF_A_PART:
            tap = self.taps["pattern"]
            known = where.positions is None or not isinstance(mask, str)
            return known and not tap.edits and all(hook.in_parts for hook in tap.reads)
        return False

    def _read_parts(self, where: KeyPositions, q: mx.array, k: mx.array, **options: Any) -> None:
        tap = self.taps["pattern"]
        tap.at_call(self.nth)
        try:
            for self.run.rows, part in pattern_in_parts(q, k, size=ROWS_OF_A_PART, **options):
                tap.read_value(where.spread(part, 0.0))
        finally:
            self.run.rows = None

    def _show_keys(
        self, place: str, array: mx.array, rows: list[int] | None, where: KeyPositions, fill: float
    ) -> tuple[mx.array, bool]:
        """Show an array of [batch, head, query, key] with its keys at their absolute positions."""
        if place not in self.taps:
            return array, False
        tap = self.taps[place]
        tap.at_call(self.nth)
        spread = where.spread(array, fill)
        new, edited = tap.edit_value(spread)
        if edited:
            # What was put at a key that attention no longer has is not attended, and not shown.
            array = where.gather(new)
            spread = where.spread(array, fill)
        tap.read_rows(spread, rows)
        return array, edited

    def _show_pattern_keys(
        self, pattern: mx.array, scores: mx.array, rows: list[int] | None, where: KeyPositions
    ) -> tuple[mx.array, bool]:
        """Show a pattern; edits may ask the run which keys its scores hide."""
        if "pattern" in self.taps and self.taps["pattern"].edits:
            self.run.hidden = where.spread(scores, -mx.inf) == -mx.inf
        try:
            return self._show_keys("pattern", pattern, rows, where, fill=0.0)
        finally:
            self.run.hidden = None

    def _show_rows(self, place: str, array: mx.array, rows: list[int] | None) -> tuple[mx.array, bool]:
        tap = self.taps[place]
        tap.at_call(self.nth)
        array, edited = tap.edit_value(array)
        tap.read_rows(array, rows)
        return array, edited

    def _heads_to_compute(self) -> list[int] | None:
        """Only the query heads that are kept; None for all: an edit needs them, or readers keep different ones."""
        taps = [self.taps[place] for place in ("scores", "pattern", "sink") if place in self.taps]
        wanted = {tap.heads_wanted() for tap in taps}
        if len(wanted) != 1 or any(tap.edits for tap in taps):
            return None
        selection = wanted.pop()
        return None if selection is None else list(selection.heads)

    def _rows_to_compute(self) -> list[int] | None:
        """Only the rows that are kept, unless an edit needs them all (None)."""
        rows: set[int] = set()
        for place in ("scores", "pattern", "sink"):
            if place in self.taps:
                wanted = self.taps[place].rows_wanted()
                if self.taps[place].edits or wanted is None:
                    return None
                rows |= wanted
        return sorted(rows)

    def on_quantized_kernel(self, kernel: Callable, q: mx.array, k: tuple, v: tuple, **options: Any) -> mx.array:
        """mlx-lm's attention over a quantised KV cache: its own softmax makes the pattern."""
        self._kernel_calls += 1
        q = self.show("q", q)
        sizes = {name: options[name] for name in ("group_size", "bits") if name in options}
        for place, packed in (("k", k), ("v", v)):
            if place in self.taps:
                # Edits were made on the way into the cache; what is read is what the cache gave back.
                own = mx.dequantize(*(part[..., -self.run.length :, :] for part in packed), **sizes)
                if not self._new_keys_seen and self.show(place, own) is not own:
                    raise self._of_another_layer(place)
                if self._new_keys_seen:
                    self.taps[place].at_call(self.nth)
                    self.taps[place].read_value(self.taps[place].location.view.read(own))
        self._in_softmax = True
        try:
            # The kernel scales its queries in place.
            output = kernel(snapshot(q), k, v, **options)
        finally:
            self._in_softmax = False
        return self.show("z", output)

    def on_softmax(self, softmax: Callable, scores: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        """Attention that is written out: what its softmax gets and makes."""
        if not (self._in_softmax or self.hand_written) or scores.ndim < 4:
            return softmax(scores, *args, **kwargs)
        if not self._in_softmax:
            self._kernel_calls += 1
        shape, n_keys = scores.shape, scores.shape[-1]
        heads = (shape[0], -1, shape[-2], n_keys)
        rows = self._rows_to_compute()
        where = KeyPositions.of(self._cache, n_keys, self.run.start + self.run.length)
        if "scores" in self.taps:
            shown = _pick_rows(show_masked(scores).reshape(heads), rows)
            shown, edited = self._show_keys("scores", shown, rows, where, fill=-mx.inf)
            if edited:
                # The lowest number, as models write "masked": a row of -inf has no softmax.
                shown = mx.maximum(shown, mx.finfo(scores.dtype).min)
                scores = shown.reshape(shape).astype(scores.dtype)
        pattern = softmax(scores, *args, **kwargs)
        if "pattern" in self.taps:
            # In float32, as beside the fused kernel; the model rounds it to its own type.
            exact = pattern if pattern.dtype == mx.float32 else softmax(scores.astype(mx.float32), axis=-1)
            shown = _pick_rows(exact.reshape(heads), rows)
            seen = _pick_rows(show_masked(scores).reshape(heads), rows)
            shown, edited = self._show_pattern_keys(shown, seen, rows, where)
            if edited:
                pattern = shown.reshape(shape).astype(pattern.dtype)
        return pattern


def _pick_rows(array: mx.array, rows: list[int] | None) -> mx.array:
    return array if rows is None else array[:, :, mx.array(rows)]


class LatentAttention(Attention):
    """Multi-head latent attention: keys and values are kept as one latent per position.

    Several tokens at once are attended with keys and values made from the latent; a single token is attended in the
    latent space, with its query mapped into it and the output mapped back. Values are shown as they are per head in
    both cases: the query and key with their rotary part, [nope + rope].
    """

    def __init__(self, site: Site, module: nn.Module) -> None:
        super().__init__(site)
        self.module = module
        self._parts: dict[str, mx.array] = {}
        self._latent: mx.array | None = None
        self._scale: mx.array | None = None
        self._busy = False

    def leave(self) -> None:
        super().leave()
        self._parts, self._latent, self._scale = {}, None, None

    def observe(self, name: str, site: Site) -> None:
        """Follow a submodule's calls."""
        if name == "embed_q":
            site.before.append(lambda array: self._remember("q_nope", array))
        elif name == "unembed_out":
            site.through.append(self._on_unembed)
        else:
            site.after.append(lambda output: self._remember(name, output))

    def _remember(self, name: str, value: mx.array) -> None:
        if self._busy:
            return
        if name == "rope":
            name = "k_pe" if "q_pe" in self._parts else "q_pe"
        self._parts[name] = value

    def enter(self, original: Callable, args: tuple, kwargs: dict, nth: int) -> tuple[tuple, dict]:
        self._parts, self._latent = {}, None
        self._scale = next(
            (a for a in args[1:2] if isinstance(a, mx.array) and "attn_scale" in parameters(original)), None
        )
        return super().enter(original, args, kwargs, nth)

    def show_new_keys(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self._latent = keys
        return keys, values

    def on_kernel(self, kernel: Callable, q: mx.array, k: mx.array, v: mx.array, **options: Any) -> mx.array:
        self._kernel_calls += 1
        absorbed = self.run.length == 1
        if self.taps.keys() & {"q", "k", "v"}:
            self._show_heads(q, k, v, absorbed)
        output = kernel(q, k, v, **options)
        if self.taps.keys() & {"scores", "pattern"}:
            output = self._show_pattern(output, q, k, v, **options)
        return output if absorbed else self.show("z", output)

    def _on_unembed(self, output: mx.array) -> mx.array:
        """The output of ``unembed_out``: after the kernel it is z, before it the values."""
        return self.show("z", output) if self._kernel_calls and not self._busy else output

    def key_positions(self, keys: Any) -> KeyPositions:
        chosen = self._parts.get("chosen")
        if chosen is not None and keys.shape[-2] != self.run.start + self.run.length:
            return KeyPositions(chosen, self.run.start + self.run.length)
        return super().key_positions(keys)

    def _show_heads(self, q: mx.array, k: mx.array, v: mx.array, absorbed: bool) -> None:
        length, nope = self.run.length, self.module.qk_nope_head_dim
        queries = self._parts["q"].reshape(*self._parts["q"].shape[:2], q.shape[1], -1).transpose(0, 2, 1, 3)
        rotary = self._parts["kv"][..., self.module.kv_lora_rank :][:, None]
        q_pe, k_pe = self._parts.get("q_pe", queries[..., nope:]), self._parts.get("k_pe", rotary)
        if self._scale is not None:
            q_pe = q_pe * self._scale
        latent = self._latent
        if absorbed:
            latent = k if latent is None else latent
            q = self._parts["q_nope"]
            self._busy = True
            k, v = self.module.embed_q(latent, transpose=False), self.module.unembed_out(latent)
            self._busy = False
        k, v = k[..., -length:, :], v[..., -length:, :]
        if q.shape[-1] == nope:
            q = mx.concatenate([q, q_pe], axis=-1)
            k = mx.concatenate([k, mx.broadcast_to(k_pe, (*k.shape[:-1], k_pe.shape[-1]))], axis=-1)
        for place, value in (("q", q), ("k", k), ("v", v)):
            self.show(place, value)


class GatheredAttention(Attention):
    """Attention with keys gathered for each query, which is an entry of the batch: [batch * pos, head, 1, d_head]."""

    def on_kernel(self, kernel: Callable, q: mx.array, k: mx.array, v: mx.array, **options: Any) -> mx.array:
        self._kernel_calls += 1

        def by_position(array: mx.array) -> mx.array:
            return array.reshape(self.run.batch, self.run.length, *array.shape[1:2], -1).transpose(0, 2, 1, 3)

        def by_query(array: mx.array) -> mx.array:
            return array.transpose(0, 2, 1, 3).reshape(-1, array.shape[1], 1, array.shape[-1])

        q = by_query(self.show("q", by_position(q)))
        output = kernel(q, k, v, **options)
        if "sink" in self.taps:
            sinks, options = options["sinks"], {name: options[name] for name in ("scale", "mask")}
            _, sink = attention_pattern(attention_scores(q, k, **options), sinks)
            assert sink is not None
            whole = by_position(sink)[..., 0]
            rows = self._rows_to_compute()
            self._show_rows("sink", _pick_rows(whole, rows), rows)
        return by_query(self.show("z", by_position(output)))


class OpenAttention(Attention):
    """Attention of a module that the model never calls: it happens between the calls of two of its submodules.

    Each call of the kernel is a pass of its own.
    """

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self._forward = -1

    def open(self, array: mx.array) -> None:
        if self._forward != self.run.forward:
            self._forward, self.nth = self.run.forward, -1
        current.attention = self

    def close(self, array: mx.array) -> None:
        current.attention = None

    def on_kernel(self, kernel: Callable, q: mx.array, k: mx.array, v: mx.array, **options: Any) -> mx.array:
        self.nth += 1
        return super().on_kernel(kernel, q, k, v, **options)


def parameters(function: Callable) -> list[str]:
    return list(inspect.signature(function).parameters)


def _members(cache: Any) -> list[Any]:
    """A cache, or the caches in a list of them."""
    if hasattr(cache, "caches"):
        return list(cache.caches)
    return list(cache) if isinstance(cache, tuple | list) else [cache]


_observing_caches: dict[type, type] = {}


def _observing_cache(cls: type) -> type:
    """The subclass of a KV cache's class that shows new keys and values on their way in.

    An edit of them lasts for later steps.
    """
    if cls not in _observing_caches:

        def update_and_fetch(self: Any, keys: mx.array, values: mx.array) -> Any:
            attention = getattr(current, "attention", None)
            if attention is not None:
                keys, values = attention.show_new_keys(keys, values)
            return cls.update_and_fetch(self, keys, values)  # type: ignore[attr-defined]

        _observing_caches[cls] = type(cls.__name__, (cls,), {"update_and_fetch": update_and_fetch})
    return _observing_caches[cls]
