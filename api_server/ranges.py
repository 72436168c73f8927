"""Ranges of a capture: which of its numbers a request asks for, read from the file as they are wanted.

    tensors = select(store.get(capture_id), positions="-3:", heads="0,2", reduce="norm")
    tensors[0].name, tensors[0].shape          # 'r1/blocks.1.attn.hook_z', (1, 3, 2)
    tensors[0].array()

The records of one hook point are one sequence, prompt and generated tokens: what is selected is what slicing that whole
sequence would give, keys of attention padded to the longest as ``stack_records`` does, and it is reduced last.
"""

import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

import numpy as np

from mlx_hooks.hook_points import POSITION_AXES, canonical_name
from mlx_hooks.hooks import HeadSelection
from neuroscope_bridge import payload
from neuroscope_bridge.payload import NumberTooLargeError

from .captures import Capture, StoredRecord
from .errors import ApiError, CapturesUnwritable

IN_MEMORY_BYTES = 64 * 2**20
"""Numbers that must be put together lie in memory up to this size, else in a temporary file."""

_Sequence = tuple[str, list[StoredRecord]]
"""The name of an array and the records that make it."""

FEATURELESS = ("batch", "head", *POSITION_AXES)


@dataclass(frozen=True)
class Tensor:
    """One array to be read: ``about`` has the fields of its wire record, ``shape`` and ``dtype`` aside."""

    name: str
    about: dict[str, Any]
    part: "_Part"
    reduce: str | None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(size for i, size in enumerate(self.part.shape) if i != self._reduced_axis)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.part.dtype if self.reduce is None else np.dtype(np.float32)

    def wire_dtype(self, dtype: str) -> np.dtype[Any]:
        """What its numbers travel as where floats travel as ``dtype``."""
        return np.dtype(dtype) if self.dtype.kind == "f" else self.dtype

    def nbytes(self, dtype: str) -> int:
        """Its size where floats travel as ``dtype``."""
        return math.prod(self.shape) * self.wire_dtype(dtype).itemsize

    def pieces(self, dtype: str = "float32") -> list[np.ndarray]:
        """Arrays whose bytes, one after the other, are the tensor's; views of the file where they can be.

        Raises:
            ApiError: a number is too large for ``dtype``.
        """
        pieces = self.part.pieces() if self.reduce is None else [self._reduced()]
        return [_converted(piece, self.wire_dtype(dtype), self.about["hook_id"]) for piece in pieces]

    def array(self, dtype: str = "float32") -> np.ndarray:
        """The tensor as one array."""
        pieces = [piece.reshape(-1) for piece in self.pieces(dtype)]
        return (pieces[0] if len(pieces) == 1 else np.concatenate(pieces)).reshape(self.shape)

    @property
    def _reduced_axis(self) -> int | None:
        if self.reduce is None:
            return None
        return len(self.part.shape) - 1 if self.reduce == "norm" else self.part.along

    def _reduced(self) -> np.ndarray:
        """float64 inside, rounded once."""
        whole, axis = self.part.whole(), self._reduced_axis
        assert axis is not None
        with np.errstate(invalid="ignore", over="ignore"):
            if self.reduce == "mean":
                reduced = np.mean(whole, axis=axis, dtype=np.float64)
            elif self.reduce == "max":
                reduced = np.max(whole, axis=axis)
            elif self.reduce == "last":
                reduced = np.take(whole, -1, axis=axis)
            else:
                reduced = np.sqrt(np.einsum("...i,...i->...", whole, whole, dtype=np.float64))
            return np.asarray(reduced, dtype=np.float32)


def select(
    capture: Capture,
    hook_id: str | None = None,
    positions: str | None = None,
    heads: str | None = None,
    layers: str | None = None,
    reduce: str | None = None,
    hook_point: str | None = None,
) -> list[Tensor]:
    """The arrays of a capture, in forward order; nothing is read yet.

    Args:
        hook_id: those of one hook; None for all.
        positions: absolute positions: ``0,2,5``, ``2:10``, ``-3:`` or ``last``, which is the prompt's last and each
            generated one. Negative ones count from the end of the capture.
        heads: query heads, spelled alike; at k and v, the key-value heads that serve them.
        layers: spelled alike; what belongs to no layer is left out.
        reduce: ``mean``, ``max`` or ``last`` over positions, ``norm`` (L2) over the last axis.
        hook_point: a name of a hook point, a glob, or what stands in an array's name behind the hook id.

    Raises:
        ApiError: an unknown hook, nothing selected, or a hook point that cannot be selected or reduced so.
    """
    hook_ids = list(capture.about.hooks)
    if hook_id is not None and hook_id not in hook_ids:
        known = f"Its hooks: {', '.join(hook_ids)}." if hook_ids else "It has no hooks."
        raise ApiError(
            404, f"This capture has no hook {hook_id[:100]!r}. {known}", code="hook_not_found", param="hook_id"
        )
    records = [record for record in capture.records if hook_id is None or record.hook_id == hook_id]
    if layers is not None:
        records = _of_layers(capture, records, layers)
    sequences = list(_sequences(records))
    if hook_point is not None:
        sequences = _at(sequences, hook_point)
    n_positions = max((record.positions[1] for record in capture.records), default=0)
    tensors = []
    for stem, members in sequences:
        part = _Part(capture, members)
        if positions is not None:
            part.take_positions(positions, n_positions)
        if heads is not None:
            part.take_heads(heads)
        _check_reducible(part, reduce)
        tensors.append(Tensor(stem, _about(part, reduce), part, reduce))
    return tensors


class _Part:
    """Records that continue one sequence, or a single one that has no position axis, and what is taken of them."""

    def __init__(self, capture: Capture, records: list[StoredRecord]) -> None:
        self.capture = capture
        self.records = records
        self.first = records[0]
        self.axes = self.first.axes
        self.along = _position_axis(self.first)
        self.head_axis = self.axes.index("head") if "head" in self.axes else None
        self.key_axis = self.axes.index("key") if "key" in self.axes else None
        self.rows: list[Sequence[int]] = [range(len(_ids(record))) for record in records]
        self.heads: list[int] | None = None
        """Indices along the head axis; None for all."""

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.first.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape_of(sum(len(rows) for rows in self.rows))

    @property
    def position_ids(self) -> list[int]:
        ids = []
        for record, rows in zip(self.records, self.rows, strict=True):
            held = _ids(record)
            ids += [held[row] for row in rows]
        return ids

    def held_heads(self) -> list[int] | None:
        """The model's heads along the head axis as it is taken; None for all."""
        if self.head_axis is None:
            return None
        held = self.first.heads
        if self.heads is None:
            return held
        return [held[i] if held is not None else i for i in self.heads]

    def take_positions(self, wanted: str, n_positions: int) -> None:
        if self.along is None:
            raise _unfit(self.first, "positions", "has no position axis")
        held = self.position_ids
        if wanted == "last":
            chosen = {p for p in held if p >= self.capture.about.prompt_length - 1}
            if not chosen:
                raise _unfit(self.first, "positions", f"holds the positions {_spelled(held)}, none of the last ones")
        else:
            chosen = _chosen(wanted, n_positions, held, self.first, "positions")
        self.rows = [[i for i, p in enumerate(_ids(record)) if p in chosen] for record in self.records]

    def take_heads(self, wanted: str) -> None:
        if self.head_axis is None:
            raise _unfit(self.first, "heads", "has no head axis")
        about, size = self.capture.about, self.first.shape[self.head_axis]
        held = self.first.heads if self.first.heads is not None else list(range(size))
        count = about.head_counts.get(self.first.hook_point, size)
        if count == about.n_heads:
            chosen = _chosen(wanted, about.n_heads, held, self.first, "heads")
        else:
            # Of key-value heads, those that serve the query heads asked for.
            served = [h for h in range(about.n_heads) if HeadSelection((h,), about.n_heads).at(count)[0] in held]
            asked = _chosen(wanted, about.n_heads, served, self.first, "heads")
            chosen = set(HeadSelection(tuple(asked), about.n_heads).at(count))
        self.heads = [i for i, head in enumerate(held) if head in chosen]

    def pieces(self) -> list[np.ndarray]:
        """Arrays that joined along the positions are the part, in an order that joins their bytes too."""
        present = [(record, rows) for record, rows in zip(self.records, self.rows, strict=True) if len(rows)]
        if self.along is None:
            return [self._piece(self.first, [])]
        if math.prod(self.shape[: self.along]) == 1:
            return [self._piece(record, rows) for record, rows in present]
        if len(present) == 1:
            return [self._piece(*present[0])]
        joined, at = _room(self.shape, self.dtype), 0
        for record, rows in present:
            self._copy(record, rows, joined[(slice(None),) * self.along + (slice(at, at + len(rows)),)])
            at += len(rows)
        return [joined]

    def whole(self) -> np.ndarray:
        pieces = self.pieces()
        if len(pieces) == 1:
            return pieces[0]
        joined, at = _room(self.shape, self.dtype), 0
        flat = joined.reshape(-1)
        for piece in pieces:
            flat[at : at + piece.size] = piece.reshape(-1)
            at += piece.size
        return joined

    def _shape_of(self, n_rows: int) -> tuple[int, ...]:
        shape = list(self.first.shape)
        if self.along is not None:
            shape[self.along] = n_rows
        if self.head_axis is not None and self.heads is not None:
            shape[self.head_axis] = len(self.heads)
        if self.key_axis is not None:
            shape[self.key_axis] = max(record.shape[self.key_axis] for record in self.records)
        return tuple(shape)

    def _piece(self, record: StoredRecord, rows: Sequence[int]) -> np.ndarray:
        """What is taken of one record: a view of the file if its bytes lie there one after the other."""
        shape = self._shape_of(len(rows))
        cuts = list(self._cuts(record, rows))
        if len(cuts) == 1 and (self.key_axis is None or record.shape[self.key_axis] == shape[self.key_axis]):
            view = self.capture.array(record)[cuts[0][1]]
            if view.flags.c_contiguous:
                return view
        piece = _room(shape, self.dtype)
        self._copy(record, rows, piece)
        return piece

    def _copy(self, record: StoredRecord, rows: Sequence[int], target: np.ndarray) -> None:
        source = self.capture.array(record)
        for to, of in self._cuts(record, rows):
            target[to] = source[of]
        if self.key_axis is not None:
            beyond = (slice(None),) * self.key_axis + (slice(record.shape[self.key_axis], None),)
            target[beyond] = payload.key_padding(record.hook_point, record.component)

    def _cuts(self, record: StoredRecord, rows: Sequence[int]) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
        """Pairs of slices: where a stretch of rows and heads goes, and where it lies in the record."""
        whole = slice(None)
        row_runs = [(whole, whole)] if self.along is None else list(_runs(rows))
        head_runs = [(whole, whole)] if self.heads is None else list(_runs(self.heads))
        for to_rows, of_rows in row_runs:
            for to_heads, of_heads in head_runs:
                to, of = [whole] * len(record.shape), [whole] * len(record.shape)
                if self.key_axis is not None:
                    to[self.key_axis] = slice(0, record.shape[self.key_axis])
                if self.head_axis is not None:
                    to[self.head_axis], of[self.head_axis] = to_heads, of_heads
                if self.along is not None:
                    to[self.along], of[self.along] = to_rows, of_rows
                yield tuple(to), tuple(of)


def _sequences(records: list[StoredRecord]) -> Iterator[_Sequence]:
    """The records that make one array each, under the array's name."""
    groups: dict[tuple[Any, ...], list[StoredRecord]] = {}
    for record in records:
        key = (record.hook_id, record.hook_point, record.is_input, record.pass_index, record.reduce)
        groups.setdefault(key, []).append(record)
    several = {key[:2] for key in groups if key[3] > 0}
    sides = {key[:2] for key in groups if key[2]} & {key[:2] for key in groups if not key[2]}
    for key, members in groups.items():
        stem = f"{members[0].hook_id}/{members[0].hook_point}"
        stem += "#input" if key[2] and key[:2] in sides else ""
        stem += f"#pass{members[0].pass_index}" if key[:2] in several else ""
        members = sorted(members, key=lambda record: record.positions)
        if _continue_each_other(members):
            yield stem, members
        else:
            yield from ((f"{stem}#step{record.step}", [record]) for record in members)


def _continue_each_other(records: list[StoredRecord]) -> bool:
    """Whether the records, in order, are one sequence along their position axis."""
    first = records[0]
    along = _position_axis(first)
    if along is None:
        return False
    for record in records:
        if record.axes != first.axes or record.heads != first.heads or record.dtype != first.dtype:
            return False
        if _other_sizes(record) != _other_sizes(first) or _position_axis(record) is None:
            return False
        # A sliding window has dropped the first keys: rows of several steps would not line up.
        if "key" in first.axes and len(records) > 1 and record.shape[first.axes.index("key")] < record.positions[1]:
            return False
    return all(_ids(before)[-1] < _ids(after)[0] for before, after in pairwise(records))


def _other_sizes(record: StoredRecord) -> list[int]:
    """The sizes that stay the same from one forward pass to the next."""
    sizes = zip(record.axes, record.shape, strict=True)
    return [size for axis, size in sizes if axis not in (*POSITION_AXES, "key")]


def _position_axis(record: StoredRecord) -> int | None:
    """The axis that runs over the record's positions, if it has one."""
    along = next((i for i, axis in enumerate(record.axes) if axis in POSITION_AXES), None)
    return along if along is not None and 0 < record.shape[along] == len(_ids(record)) else None


def _ids(record: StoredRecord) -> Sequence[int]:
    return record.position_ids if record.position_ids is not None else range(*record.positions)


def _of_layers(capture: Capture, records: list[StoredRecord], layers: str) -> list[StoredRecord]:
    n_layers = capture.about.n_layers
    held = sorted({record.layer_index for record in records if record.layer_index is not None})
    asked = {i + n_layers if i < 0 else i for i in _indices(layers, n_layers)}
    lacking = sorted(asked - set(held)) if ":" not in layers else []
    chosen = asked & set(held)
    if lacking or not chosen:
        there = f"It has {_spelled(held)}" if held else "It has none"
        raise ApiError(400, f"The capture lacks layers {layers!r}. {there}.", code="invalid_value", param="layers")
    return [record for record in records if record.layer_index in chosen]


def _at(sequences: list[_Sequence], hook_point: str) -> list[_Sequence]:
    """Those of a hook point, or of the points that a glob means."""
    wanted = canonical_name(hook_point)
    is_glob = any(c in wanted for c in "*?")
    there: list[str] = []
    found = []
    for stem, members in sequences:
        names = (members[0].hook_point, stem.removeprefix(f"{members[0].hook_id}/"))
        there += [name for name in names if name not in there]
        if wanted in names or (is_glob and fnmatchcase(names[0], wanted)):
            found.append((stem, members))
    if not found:
        some = ", ".join(there[:20]) + (" and more" if len(there) > 20 else "") or "none"
        message = f"The capture lacks the hook point {hook_point!r}. Of what is asked for it has: {some}."
        raise ApiError(400, message, code="invalid_value", param="hook_point")
    return found


def _indices(text: str, count: int) -> Iterable[int]:
    """``"0,-1"`` and ``"2:"`` among ``count``; an index that is named may lie outside."""
    if ":" in text:
        start, stop = (int(end) if end else None for end in text.split(":"))
        return range(count)[start:stop]
    return [int(index) for index in text.split(",")]


def _chosen(text: str, count: int, held: Sequence[int], record: StoredRecord, what: str) -> set[int]:
    asked = {i + count if i < 0 else i for i in _indices(text, count)}
    chosen = asked & set(held)
    # A range may reach beyond what there is; what is named must be there.
    if not chosen or (":" not in text and chosen != asked):
        shown = text if len(text) <= 40 else f"{text[:40]}..."
        raise _unfit(record, what, f"holds the {what} {_spelled(held)}, but {shown!r} was asked for")
    return chosen


def _unfit(record: StoredRecord, what: str, why: str) -> ApiError:
    point = f"{record.hook_point!r} of hook {record.hook_id!r}"
    return ApiError(400, f"{point} {why}. Ask for one hook, or leave out {what!r}.", code="invalid_value", param=what)


def _check_reducible(part: _Part, reduce: str | None) -> None:
    if reduce is None:
        return
    if part.first.reduce is not None:
        raise _unfit(part.first, "reduce", f"was reduced by {part.first.reduce!r} when it was captured")
    if reduce != "norm" and part.along is None:
        raise _unfit(part.first, "reduce", f"has no position axis to take the {reduce} over")
    if reduce == "norm" and (not part.axes or part.axes[-1] in FEATURELESS):
        raise _unfit(part.first, "reduce", "has no axis of features to take the norm over")
    if reduce == "norm" and payload.key_padding(part.first.hook_point, part.first.component) != 0:
        raise _unfit(part.first, "reduce", "has -inf at masked keys, and so no norm")


def _about(part: _Part, reduce: str | None) -> dict[str, Any]:
    """The fields of the wire record that the part would be."""
    first = part.first
    ids = part.position_ids if part.along is not None else list(_ids(first))
    span = [ids[0], ids[-1] + 1] if part.along is not None else list(first.positions)
    has_gaps = len(ids) != span[1] - span[0]
    axes = [axis for i, axis in enumerate(part.axes) if reduce is None or i != _axis_of(part, reduce)]
    same = len(part.records) == 1
    return {
        "hook_id": first.hook_id,
        "layer_name": first.layer_name,
        "component": first.component,
        "is_input": first.is_input,
        "hook_point": first.hook_point,
        "layer_index": first.layer_index,
        "axes": axes,
        "phase": first.phase if same else None,
        "step": first.step if same else None,
        "pass_index": first.pass_index,
        "positions": span,
        "position_ids": ids if has_gaps else None,
        "heads": part.held_heads(),
        "reduce": reduce or first.reduce,
    }


def _axis_of(part: _Part, reduce: str) -> int | None:
    return len(part.axes) - 1 if reduce == "norm" else part.along


def _runs(indices: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Stretches of neighbours: ``[0, 1, 5]`` -> ``(0:2, 0:2)`` and ``(2:3, 5:6)``."""
    at = 0
    while at < len(indices):
        stop = at + 1
        while stop < len(indices) and indices[stop] == indices[stop - 1] + 1:
            stop += 1
        yield slice(at, stop), slice(indices[at], indices[stop - 1] + 1)
        at = stop


def _spelled(indices: Sequence[int]) -> str:
    """``0-3, 7``"""
    spans = [f"{of.start}-{of.stop - 1}" if of.stop - of.start > 1 else str(of.start) for _, of in _runs(indices)]
    return ", ".join(spans[:20]) + (" and more" if len(spans) > 20 else "")


def _converted(array: np.ndarray, dtype: np.dtype[Any], hook_id: str) -> np.ndarray:
    if array.dtype == dtype:
        return array
    converted, flat, step = _room(array.shape, dtype), array.reshape(-1), 2**20
    target = converted.reshape(-1)
    for start in range(0, flat.size, step):
        try:
            target[start : start + step] = payload.as_wire_dtype(flat[start : start + step], dtype.name, hook_id)
        except NumberTooLargeError as error:
            raise ApiError(400, str(error), code="invalid_value", param="dtype") from error
    return converted


def _room(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """An array to fill; one too large for memory lies in a file that goes with it."""
    if math.prod(shape) * dtype.itemsize <= IN_MEMORY_BYTES:
        return np.empty(shape, dtype)
    left = math.prod(shape) * dtype.itemsize
    try:
        with tempfile.TemporaryFile() as file:
            # A mapped file that finds the disk full when it is filled would end the process.
            while left:
                left -= file.write(bytes(min(left, 2**20)))
            file.flush()
            return np.memmap(file, dtype, "r+", shape=shape)
    except OSError as error:
        raise CapturesUnwritable(error.strerror or "the disk refuses") from error
