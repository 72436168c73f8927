"""Direct logit attribution: what each part of the model adds to a logit on the straight way to the output.

Source: Elhage et al., "A Mathematical Framework for Transformer Circuits" (2021); nostalgebraist's logit lens, frozen.

    1. The stream that leaves the last block is the sum of what was added to it: the embedding, what each head adds, the
       bias of each output projection, each MLP and its bias, mixers and side branches.
    2. The last norm keeps the statistics that it had in the run. So frozen it is linear, but for its bias.
    3. A token's logit, before a soft cap, is the product of what the norm gives with the token's direction, and a bias.
       Both come from the model's own end: the direction is the logit's gradient there.
    4. So each part adds its own share to the logit, and shares and biases add up to it. That is checked.

What a part does by way of later parts is not in its share: for that, edit it and run the model (``interventions``).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from operator import index
from typing import Any

import mlx.core as mx
import numpy as np

from .. import hook_points
from ..activations import ActivationCache, to_numpy
from ..contributions import FrozenNorm, LinearNorm, rounding
from ..errors import HookError
from ..hook_points import block_point, outer_point
from ..model import HookedModel
from .directions import directions_of_rows
from .held import Activations, Held

_EMBED, _POSITIONS = "embed", "pos_embed"
_NORM_INPUT = outer_point("ln_final_in").name


@dataclass(frozen=True)
class Contribution:
    """What one part adds to the logit.

    Args:
        name: unique: "embed", "L2H1" (a head), "L2 attn" (of a layer whose heads cannot be told apart), "L2 attn bias",
            "L2 mlp", "L2 mlp bias", "L2 mixer", "L2 side", "final norm bias", "unembedding bias"; of a layer that runs
            several times the later ones end in "pass 1".
        values: [batch, pos], float64.
        layer: the block's index; None outside the blocks.
        head: the query head; None for what is no head.
    """

    name: str
    values: np.ndarray
    layer: int | None = None
    head: int | None = None


@dataclass(frozen=True)
class Attribution:
    """Contributions that add up to a logit, or to the difference of two.

        print(lens.direct_logit_attribution(cache, (" Mary", " John")))
        found["L2H1"]                                           # (batch, pos)
        found.top(5)                                            # the largest, at the last position of the first row

    Args:
        tokens: the token, or the pair, of each batch row.
        positions: absolute positions along the second axis of the values; None where they are not known.
        contributions: in the order of a forward pass, biases of the end last.
        logits: [batch, pos] what they add up to: the model's own logit, or difference, before its soft cap.
        deviation: how far their sum is off at most.
        cap: the soft cap that the model then applies to its logits; None for most models.
        notes: why what a layer adds is not told apart further, by layer.
    """

    tokens: list[tuple[int, ...]]
    positions: Sequence[int] | None
    contributions: list[Contribution]
    logits: np.ndarray
    deviation: float
    cap: float | None = None
    notes: dict[int, str] = field(default_factory=dict)

    @property
    def total(self) -> np.ndarray:
        """The sum of all contributions, [batch, pos]."""
        return np.sum([c.values for c in self.contributions], axis=0)

    def __getitem__(self, name: str) -> np.ndarray:
        """The values of a contribution by name, [batch, pos].

        Raises:
            HookError: lists the names there are.
        """
        for contribution in self.contributions:
            if contribution.name == name:
                return contribution.values
        raise HookError(f"There is no contribution {name!r}. There are: {', '.join(self.names())}.")

    def names(self) -> list[str]:
        """The names of all contributions, in the order of a forward pass."""
        return [contribution.name for contribution in self.contributions]

    def top(self, count: int = 10, *, row: int = 0, position: int = -1) -> list[tuple[str, float]]:
        """The largest contributions in absolute value, with their signs, at one place; ``position`` is an index.

        Raises:
            HookError: says how many rows and positions there are.
        """
        batch, length = self.logits.shape
        if not (_is_index(row, batch) and _is_index(position, length)):
            raise HookError(
                f"The attribution has {batch} rows of {length} positions, counted from 0: there is no row {row!r} with "
                f"a position {position!r}."
            )
        rows = [(c.name, float(c.values[row, position])) for c in self.contributions]
        return sorted(rows, key=lambda pair: -abs(pair[1]))[:count]

    def to_dict(self) -> dict[str, Any]:
        """The attribution as plain JSON values."""
        return {
            "tokens": [list(pair) for pair in self.tokens],
            "positions": None if self.positions is None else list(self.positions),
            "contributions": [
                {"name": c.name, "layer": c.layer, "head": c.head, "values": c.values.tolist()}
                for c in self.contributions
            ],
            "logits": self.logits.tolist(),
            "deviation": self.deviation,
            "cap": self.cap,
            "notes": {str(layer): note for layer, note in self.notes.items()},
        }

    def __str__(self) -> str:
        batch, length = self.logits.shape
        where = f"row 0 of {batch}, " if batch > 1 else ""
        unnamed = f"the last of {length} positions" if length > 1 else "its one position"
        where += unnamed if self.positions is None else f"position {self.positions[-1]}"
        rows = [f"{c.name:24} {c.values[0, -1]:+9.3f}" for c in self.contributions]
        before = "" if self.cap is None else f" before the soft cap of {self.cap:g}"
        what = "logit difference" if len(self.tokens[0]) == 2 else "logit"
        return "\n".join([f"{what} at {where}", *rows, f"{'sum' + before:24} {self.logits[0, -1]:+9.3f}"])


def _is_index(number: Any, size: int) -> bool:
    listed = [] if isinstance(number, Iterable) else _whole_numbers(number)
    return len(listed) == 1 and -size <= listed[0] < size


def attribution_points(model: HookedModel) -> list[str]:
    """The hook points that a cache must hold for ``direct_logit_attribution``.

        _, cache = model.run_with_cache(prompts, attribution_points(model))

    Where a gate lies between the heads and their output projection, the list has a raw module, whose positions cannot
    be selected while capturing: capture all, and give the positions to ``direct_logit_attribution``.

    Raises:
        HookError: for an architecture whose logits are no sum of parts, with the reason.
    """
    _check(model)
    names = [block_point("resid_pre", 0).name, outer_point("pos_embed").name]
    for layer in range(model.cfg.n_layers):
        names += [block_point(component, layer).name for component in ("mixer_out", "mlp_out", "side_out")]
        if _has(model, layer, "attn_out"):
            path, _ = _head_input(model, layer)
            names.append(path if path is not None else block_point("attn_out", layer).name)
    names.append(_NORM_INPUT)
    return [name for name in names if name in model.hook_points or model.architecture.locate(name) is not None]


def direct_logit_attribution(
    cache: Activations, tokens: Any, *, model: HookedModel, positions: int | Sequence[int] | None = -1
) -> Attribution:
    """What embedding, heads, MLPs and biases add to the logit of a token, or to the difference of two.

        _, cache = model.run_with_cache("The capital of France is", attribution_points(model))
        print(direct_logit_attribution(cache, ("Paris", "Rome"), model=model))

    Args:
        cache: holds what :func:`attribution_points` lists, of one run. In the place of what the heads hold it may have
            what each adds, ``hook_result``, with ``hook_attn_out`` where their projection has a bias; in the place of
            ``hook_pos_embed``, ``hook_embed``. So what ``HookedModel.forward`` keeps is attributed too, with
            extract_embed, extract_resid_in, extract_head_out, extract_attn_out, extract_mlp_out and
            extract_last_layernorm. No flag keeps what mixers and side branches add (hybrid models), nor gated heads:
            there it is ``run_with_cache(prompt, attribution_points(model))``.
        tokens: for each batch row, or once for all, a token or a pair (the first's logit less the second's). Tokens are
            ids or texts.
        model: the model of the run.
        positions: absolute positions, one or a list; negative ones count from the last that was captured; None for all.
            Of a mapping, which does not say which positions it holds, places along the axis, from 0.

    Returns:
        the contributions; their sum is the run's logit within 1e-4 of the largest of them (more in half precision).

    Raises:
        HookError: for an architecture whose logits are no such sum, with the reason; for a hook point that is missing;
            and when the sum is not the logit, by how much.
    """
    _check(model)
    held = Held(model, cache)
    last = _last_pass(held)
    chosen = _positions(last, positions)
    stream = last.rows(_NORM_INPUT, chosen)
    directions = directions_of_rows(model, tokens, stream.shape[0])
    ln_final = model.architecture.ln_final
    assert ln_final is not None
    frozen = LinearNorm(ln_final, model.cfg.d_model).freeze(stream)
    end = _End(model, directions)
    # One part at a time: what all heads add takes heads times the stream's memory.
    contributions = [part.contribution(frozen, end.direction) for part in _parts(model, held, chosen)]
    notes = _notes(model)
    constant = np.ones(stream.shape[:2])
    norm_bias = to_numpy(end.direction @ frozen.bias, "float64")
    if mx.any(frozen.bias != 0).item():
        contributions.append(Contribution("final norm bias", norm_bias[:, None] * constant))
    if mx.any(end.bias != 0).item():
        contributions.append(Contribution("unembedding bias", to_numpy(end.bias, "float64")[:, None] * constant))
    logits = end.logits(stream, frozen)
    known = None if last.positions(_NORM_INPUT) is None else chosen
    found = Attribution(directions, known, contributions, logits, 0.0, end.cap, notes)
    off = float(np.abs(found.total - logits).max())
    scale = max(1.0, *(float(np.abs(c.values).max()) for c in contributions))
    if not off <= rounding(stream.dtype) * scale:
        raise HookError(
            f"The contributions do not add up to the logit: they are off by {off:.3g}; allowed is "
            f"{rounding(stream.dtype):.1g} of the largest, {scale:.3g}. Was the cache captured in one run of this "
            "model, without edits?"
        )
    return replace(found, deviation=off)


@dataclass(frozen=True)
class _Part:
    """Something that is added to the stream, [batch, pos, d_model]."""

    name: str
    value: mx.array
    layer: int | None
    head: int | None = None

    def contribution(self, frozen: FrozenNorm, direction: mx.array) -> Contribution:
        share = (frozen.linear(self.value) * direction[:, None]).sum(axis=-1)
        return Contribution(self.name, to_numpy(share, "float64"), self.layer, self.head)


class _End:
    """The model's end behind the last norm, for one direction per batch row: ``direction @ normalized + bias``."""

    def __init__(self, model: HookedModel, directions: list[tuple[int, ...]]) -> None:
        self._model = model
        self._directions = directions
        self.cap = model.architecture.logit_cap
        self._rows, self._biases = self._of_tokens()
        self.direction = self._rows[0] - self._rows[1] if len(self._rows) == 2 else self._rows[0]
        self.bias = self._biases[0] - self._biases[1] if len(self._biases) == 2 else self._biases[0]

    def _of_tokens(self) -> tuple[list[mx.array], list[mx.array]]:
        """Direction [batch, d_model] and bias [batch] of the first tokens, and of the second ones."""
        batch = len(self._directions)
        zeros = mx.zeros((batch, 1, self._model.cfg.d_model))
        rows, biases = [], []
        for i in range(len(self._directions[0])):
            ids = mx.array([d[i] for d in self._directions])

            def of_tokens(value: mx.array, ids: mx.array = ids) -> mx.array:
                logits = self._uncapped(self._model.unembed(value, apply_norm=False).astype(mx.float32))
                return mx.take_along_axis(logits, ids[:, None, None], axis=-1)

            given, gradients = mx.vjp(of_tokens, [zeros], [mx.ones((batch, 1, 1))])
            rows.append(gradients[0][:, 0].astype(mx.float32))
            biases.append(given[0][:, 0, 0])
        return rows, biases

    def _uncapped(self, logits: mx.array) -> mx.array:
        return logits if self.cap is None else self.cap * mx.arctanh(logits / self.cap)

    def logits(self, stream: mx.array, frozen: FrozenNorm) -> np.ndarray:
        """The logits of the run, before the cap, in the given directions, [batch, pos].

        Raises:
            HookError: when the end is not what its gradient says.
        """
        normalized = frozen(stream)
        shown = self._model.unembed(stream).astype(mx.float32)
        found = []
        for row, bias, i in zip(self._rows, self._biases, range(2), strict=False):
            ids = mx.array([d[i] for d in self._directions])[:, None, None]
            own = mx.take_along_axis(shown, mx.broadcast_to(ids, (*shown.shape[:2], 1)), axis=-1)[..., 0]
            linear = (normalized * row[:, None]).sum(axis=-1) + bias[:, None]
            capped = linear if self.cap is None else self.cap * mx.tanh(linear / self.cap)
            size = max(1.0, float(np.abs(to_numpy(own)).max()))
            off = float(np.abs(to_numpy(capped - own)).max())
            if not off <= rounding(stream.dtype) * size:
                raise HookError(
                    f"The end of {self._model.cfg.model_type} is no linear map of what the last norm gives: a logit of "
                    f"{size:.3g} is off by {off:.3g}."
                )
            # What the cap has rounded away cannot be had back from the capped logit.
            found.append(to_numpy(own if self.cap is None else linear, "float64"))
        return found[0] - found[1] if len(found) == 2 else found[0]


def _check(model: HookedModel) -> None:
    """Refuse a model whose logits are no sum of what its parts add to one stream."""
    architecture, kind = model.architecture, model.cfg.model_type
    sums = (f"layer {i}: {why}" for i in range(model.cfg.n_layers) if (why := architecture.other_sum(i)))
    reason = architecture.more_than_last_stream or next(sums, "")
    if not reason and model.last_stream.axes != hook_points.RESID:
        reason = "it has several streams"
    if not reason and architecture.normed_between_passes:
        reason = "its last norm makes the stream anew after each pass through the layers"
    if not reason and architecture.ln_final is None:
        reason = "its last norm is a function, not a module, whose statistics cannot be kept"
    lacks = [f"{kind}_out" for layer in range(model.cfg.n_layers) for kind in _missing(model, layer)]
    if not reason and lacks:
        reason = f"{lacks[0]} of some layer cannot be shown"
    if reason:
        raise HookError(f"The logits of {kind} are no sum of its parts: {reason}.")


def _missing(model: HookedModel, layer: int) -> list[str]:
    kinds = {sublayer.kind for sublayer in model.architecture.sublayers[layer]}
    return [kind for kind in sorted(kinds) if not _has(model, layer, f"{kind}_out")]


def _has(model: HookedModel, layer: int, component: str) -> bool:
    return block_point(component, layer).name in model.hook_points


def _head_input(model: HookedModel, layer: int) -> tuple[str | None, str]:
    """The hook point from which what the heads add is told, or why it cannot be."""
    try:
        return model.head_input(layer), ""
    except HookError as error:
        return None, str(error)


def _positions(held: Held, asked: int | Sequence[int] | None) -> list[int]:
    """Absolute positions of those that there are; places along the axis, where positions are not known."""
    there = held.listed_positions(_NORM_INPUT)
    if asked is None:
        return list(there)
    listed = _whole_numbers(asked)
    if not listed or any(p < -len(there) for p in listed):
        raise HookError(f"positions is None, a whole number or a list of them, got {asked!r}.", field="positions")
    return [there[p] if p < 0 else p for p in listed]


def _whole_numbers(asked: Any) -> list[int]:
    """A number, or several, as a list; nothing for what is neither."""
    try:
        listed = [asked] if not isinstance(asked, Iterable) else list(asked)
        return [] if any(isinstance(p, bool) for p in listed) else [index(p) for p in listed]
    except TypeError:
        return []


def _passes(held: Held) -> list[Held]:
    """The activations pass by pass, for models whose layers run several times."""
    if not isinstance(held.activations, ActivationCache):
        return [held]
    found = sorted({r.pass_index for records in held.activations.records.values() for r in records})
    return [Held(held.model, held.activations.of_pass(index)) for index in found] if len(found) > 1 else [held]


def _last_pass(held: Held) -> Held:
    return next((part for part in reversed(_passes(held)) if _NORM_INPUT in part), held)


def _parts(model: HookedModel, held: Held, positions: Sequence[int]) -> Iterator[_Part]:
    """All that is added to the stream, in the order of a forward pass."""
    passes, tails = _passes(held), _tails(model)
    yield from _embedding(model, passes[0], positions, tails[0])
    for number, part in enumerate(passes):
        for layer in range(model.cfg.n_layers):
            scaled = _scaling(tails[layer])
            for component in ("mixer_out", "attn_out", "mlp_out", "side_out"):
                if not _has(model, layer, component) or (number and not _ran_again(model, part, layer, component)):
                    continue
                for one in _added(model, part, layer, component, positions):
                    suffix = f" pass {number}" if number else ""
                    yield replace(one, name=one.name + suffix, value=scaled(one.value))


def _added(model: HookedModel, held: Held, layer: int, component: str, positions: Sequence[int]) -> Iterator[_Part]:
    """What a component of a layer adds, told apart as far as can be."""
    if component == "attn_out" and _head_input(model, layer)[0] is not None:
        yield from _heads(model, held, layer, positions)
        return
    label = f"L{layer} {component.removesuffix('_out')}"
    value = _rows(held, block_point(component, layer).name, positions)
    own = model.mlp_bias(layer) if component == "mlp_out" else None
    if own is None or not mx.any(own != 0).item():
        yield _Part(label, value, layer)
        return
    yield _Part(label, value - own, layer)
    yield _Part(f"{label} bias", value * 0 + own, layer)


def _heads(model: HookedModel, held: Held, layer: int, positions: Sequence[int]) -> Iterator[_Part]:
    """What each head adds: of what the heads hold, or as the activations have it; and the projection's bias."""
    path, result = model.head_path(layer), block_point("result", layer).name
    if path.point.name in held or result not in held:
        parts = path.parts(_rows(held, path.point.name, positions))
        yield from (_Part(f"L{layer}H{head}", parts.of(head), layer, head) for head in range(path.n_heads))
        constant = parts.constant if path.adds_constant else None
    else:
        added = _all_heads(held, result, path.n_heads, positions)
        yield from (_Part(f"L{layer}H{head}", added[..., head, :], layer, head) for head in range(path.n_heads))
        constant = None
        if path.adds_constant:
            whole = _rows(held, block_point("attn_out", layer).name, positions)
            constant = path.constant_in(whole - added.sum(axis=-2))
    if constant is not None:
        yield _Part(f"L{layer} attn bias", constant, layer)


def _rows(held: Held, name: str, positions: Sequence[int]) -> mx.array:
    """What a hook point holds at some positions, in float32.

    Raises:
        HookError: for arrays that cannot be of one run with the last norm's input.
    """
    if name not in held:
        raise HookError(
            f"The activations lack {name}: run_with_cache(prompt, attribution_points(model)) captures all that is "
            f"needed. They hold {', '.join(held.points)}."
        )
    held.check_one_run(name, _NORM_INPUT)
    return held.rows(name, positions).astype(mx.float32)


def _all_heads(held: Held, name: str, n_heads: int, positions: Sequence[int]) -> mx.array:
    heads = held.heads(name)
    if heads is not None and list(heads) != list(range(n_heads)):
        raise HookError(f"{name} holds the heads {', '.join(map(str, heads))}: attribution needs all {n_heads}.")
    return _rows(held, name, positions)


def _notes(model: HookedModel) -> dict[int, str]:
    """Why the heads of a layer are not told apart, by layer."""
    attending = [layer for layer in range(model.cfg.n_layers) if _has(model, layer, "attn_out")]
    found = {layer: _head_input(model, layer)[1] for layer in attending}
    return {layer: why for layer, why in found.items() if why}


def _ran_again(model: HookedModel, part: Held, layer: int, component: str) -> bool:
    """Whether a component of a layer has a record of a later pass."""
    names = [block_point(component, layer).name]
    if component == "attn_out" and (source := _head_input(model, layer)[0]) is not None:
        names = [source, block_point("result", layer).name]
    return any(name in part for name in names)


def _embedding(model: HookedModel, held: Held, positions: Sequence[int], tail: mx.array | None) -> Iterator[_Part]:
    scaled = _scaling(tail)
    stream = _rows(held, block_point("resid_pre", 0).name, positions)
    name, tokens = outer_point("pos_embed").name, outer_point("embed").name
    if name not in model.hook_points:
        yield _Part(_EMBED, scaled(stream), None)
        return
    if name in held or tokens not in held:
        added = mx.broadcast_to(_rows(held, name, positions), stream.shape)
    else:
        added = stream - _rows(held, tokens, positions)
    yield _Part(_EMBED, scaled(stream - added), None)
    yield _Part(_POSITIONS, scaled(added), None)


def _tails(model: HookedModel) -> list[mx.array | None]:
    """What is multiplied, from each block's end on, with what the block adds; None for nothing."""
    tails: list[mx.array | None] = []
    tail: mx.array | None = None
    for layer in reversed(range(model.cfg.n_layers)):
        scale = model.architecture.stream_scale(layer)
        if scale is not None:
            tail = scale.astype(mx.float32) if tail is None else tail * scale.astype(mx.float32)
        tails.append(tail)
    return tails[::-1]


def _scaling(tail: mx.array | None) -> Callable[[mx.array], mx.array]:
    return lambda value: value if tail is None else value * tail
