"""Numbers in place of activations: the mean, largest or last value over a record's positions, lengths of vectors, their
dot products with given ones, the mean over heads.

A record may be made by several forward passes (a long prompt runs in chunks). So a reduction has two halves: ``begin``
makes of each pass's value what must be kept of it, ``finish`` makes the result of all that was kept. Both are lazy and
are evaluated with their pass.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from .activations import CapturedActivation, join, labels
from .errors import HookError
from .hook_points import POSITION_AXES, HookPoint

REDUCTIONS = ("mean", "max", "last", "norm")
"""The first three over the positions of a record, whose axis goes; the length (L2) over the last axis, which goes."""

HEAD_MEAN = "head_mean"
"""The mean over heads, whose axis goes: of attention patterns, which are then never kept head by head."""

_OVER_POSITIONS = ("mean", "max", "last")
_IDS = ("embed.hook_in", "hook_expert_indices")
_MASKED = "hook_attn_scores"


@dataclass(frozen=True, eq=False)
class Projection:
    """Dot products of the last axis with each of several vectors, [..., vector] in float32, made in the pass itself:

        HookSpec(hook_point="blocks.*.hook_resid_post", reduce=Projection(mx.array([refusal, truth])))

    Args:
        vectors: [vector, feature], of floats; kept as float32.

    Raises:
        HookError: for what is no array of floats with these axes, and for numbers that are not finite.
    """

    vectors: mx.array

    def __post_init__(self) -> None:
        try:
            vectors = mx.array(self.vectors)
        except (TypeError, ValueError) as error:
            raise HookError(f"A projection has an array of vectors, got {self.vectors!r:.60}.") from error
        if not mx.issubdtype(vectors.dtype, mx.floating):
            raise HookError(f"A projection has vectors of floats, got {vectors.dtype}.")
        if vectors.ndim != 2 or not vectors.size:
            raise HookError(f"A projection has vectors [vector, feature], got an array of shape {vectors.shape}.")
        vectors = vectors.astype(mx.float32)
        if not mx.isfinite(vectors).all().item():
            raise HookError("A projection has vectors of finite numbers.")
        object.__setattr__(self, "vectors", vectors)

    def __repr__(self) -> str:
        count, width = self.vectors.shape
        return f"projection on {count} vector{'s' if count > 1 else ''} of {width}"

    def of(self, value: mx.array) -> mx.array:
        """The dot products of a value in float32."""
        return value @ self.vectors.T


Reduction = str | Projection


def name_of(reduce: Reduction | None) -> str | None:
    """What a record says that it was reduced by."""
    return "projection" if isinstance(reduce, Projection) else reduce


def check_reduction(reduce: object) -> None:
    """Raises HookError for what is no reduction."""
    if reduce is not None and not isinstance(reduce, Projection) and reduce not in (*REDUCTIONS, HEAD_MEAN):
        named = ", ".join((*REDUCTIONS, HEAD_MEAN))
        raise HookError(f"reduce is null, one of {named} or a Projection, got {reduce!r}.")


def check_reducible(reduce: Reduction, point: HookPoint) -> None:
    """Raises HookError for a hook point that lacks the axis, or whose numbers have no such meaning."""
    if isinstance(reduce, Projection):
        why = why_irreducible("norm", point.name, point.axes, point.position_axis is not None)
        size, width = (point.sizes[-1] if point.sizes else None), reduce.vectors.shape[1]
        if why is None and size not in (None, width):
            raise HookError(f"{point.name} is {size} wide, and the projection's vectors {width}.", field="reduce")
        if why is None and point.axes[-1:] == ("key",):
            why = f"has no last axis of features to reduce by a projection; its axes are {', '.join(point.axes)}"
        why = why and why.replace("'norm'", "a projection")
    elif reduce == HEAD_MEAN:
        why = None if "head" in point.axes else f"has no axis over heads; its axes are {', '.join(point.axes)}"
    else:
        why = why_irreducible(reduce, point.name, point.axes, point.position_axis is not None)
    if why is not None:
        raise HookError(f"{point.name} {why}: leave reduce out.", field="reduce")


def why_irreducible(reduce: str, name: str, axes: Sequence[str], has_positions: bool) -> str | None:
    """Why values cannot be reduced so, as the end of a sentence about them; None where they can.

    Args:
        reduce: one of ``REDUCTIONS``.
        name: the hook point's.
        axes: of the values; empty where they are not known.
        has_positions: whether one of the axes runs over positions.
    """
    named = ", ".join(axes) or "unnamed"
    if name.endswith(_IDS):
        return "holds ids, which cannot be reduced"
    if reduce != "norm" and not has_positions:
        return f"has no axis over positions to reduce by {reduce!r}; its axes are {named}"
    if reduce == "norm" and axes and axes[-1] in ("batch", "head", *POSITION_AXES):
        return f"has no last axis of features to reduce by 'norm'; its axes are {named}"
    if reduce == "norm" and name.endswith(_MASKED):
        return "holds -inf at masked keys, which has no norm"
    return None


def begin(reduce: Reduction, value: mx.array, point: HookPoint) -> tuple[mx.array, HookPoint]:
    """What one pass keeps of a value, in float32, and the point with the axes that it has.

    The position axis stays, with one row: rows of several passes are joined before ``finish``.
    """
    value = value.astype(mx.float32)
    if isinstance(reduce, Projection):
        axes, sizes = (*point.axes[:-1], "vector"), (*point.sizes[:-1], reduce.vectors.shape[0])
        return reduce.of(value), replace(point, axes=axes, sizes=sizes) if point.axes else point
    if reduce == "norm":
        return mx.sqrt(mx.square(value).sum(axis=-1)), _without(point, len(point.axes) - 1)
    if reduce == HEAD_MEAN:
        over = point.axes.index("head")
        return value.mean(axis=over), _without(point, over)
    axis = point.position_axis
    assert axis is not None
    if reduce == "mean":
        return value.sum(axis=axis, keepdims=True), point
    if reduce == "max":
        return value.max(axis=axis, keepdims=True), point
    return mx.take(value, mx.array([value.shape[axis] - 1]), axis=axis), point


def is_begun(record: CapturedActivation) -> bool:
    """Whether ``finish`` is still to be called, once for all calls whose records are to be one."""
    return record.reduce in _OVER_POSITIONS and record.hook_point.position_axis is not None


def finish(record: CapturedActivation) -> CapturedActivation:
    """A record of what was kept, made the result; one that is not reduced over positions passes through."""
    axis = record.hook_point.position_axis
    if not is_begun(record) or axis is None:
        return record
    kept = record.value
    if record.reduce == "mean":
        value = kept.sum(axis=axis) / len(record.position_ids)
    else:
        value = kept.max(axis=axis) if record.reduce == "max" else mx.take(kept, kept.shape[axis] - 1, axis=axis)
    changed = {"value": value, "hook_point": _without(record.hook_point, axis)}
    return CapturedActivation(**labels(record) | changed)


def finished(records: Iterable[CapturedActivation]) -> list[CapturedActivation]:
    """The results of several hooks, from what they kept of consecutive calls."""
    groups: dict[tuple[str, str, int], list[CapturedActivation]] = {}
    for record in records:
        groups.setdefault((record.hook_id, record.hook_point.name, record.pass_index), []).append(record)
    return [finish(join(group)) for group in groups.values()]


def _without(point: HookPoint, axis: int) -> HookPoint:
    """The point of a value that has lost an axis."""
    if not point.axes:
        return point
    axes = point.axes[:axis] + point.axes[axis + 1 :]
    return replace(point, axes=axes, sizes=point.sizes[:axis] + point.sizes[axis + 1 :])
