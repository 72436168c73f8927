"""Ranges of a capture: which of its numbers a request asks for, read from the file as they are wanted.

    tensors = select(store.get(capture_id), positions="-3:", heads="0,2", reduce="norm")
    tensors[0].name, tensors[0].shape          # 'r1/blocks.1.attn.hook_z', (1, 3, 2)
    tensors[0].array()

The records of one hook point are one sequence, prompt and generated tokens: what is selected is what slicing that whole
sequence would give, keys of attention padded to the longest as ``stack_records`` does, and it is reduced last.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from mlx_hooks.hook_points import POSITION_AXES, canonical_name
from mlx_hooks.hooks import HeadSelection
from mlx_hooks.reductions import why_irreducible
from neuroscope_bridge import payload
from neuroscope_bridge.payload import NumberTooLargeError

from .captures import Capture, StoredRecord
from .errors import ApiError
from .scratch import room

BLOCK_BYTES = 2**20
"""Numbers that do not lie in the file as they travel are put together in blocks of about this size."""

_Sequence = tuple[str, list[StoredRecord]]
"""The name of an array and the records that make it."""


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

    def wire_bytes(self, dtype: str = "float32") -> "TensorBytes":
        """Its numbers as they travel, to be read in stretches."""
        return TensorBytes(self, dtype)

    def array(self, dtype: str = "float32") -> np.ndarray:
        """The tensor as one array: a view of the file where it can be.

        Raises:
            ApiError: a number is too large for ``dtype``, or the disk has no room for an array too large for memory.
        """
        wanted = self.wire_dtype(dtype)
        if self.reduce is not None:
            return _converted(self._reduced(), wanted, self.about["hook_id"])
        return _joined(self.wire_bytes(dtype), wanted).reshape(self.shape)

    @property
    def _reduced_axis(self) -> int | None:
        if self.reduce is None:
            return None
        return len(self.part.shape) - 1 if self.reduce == "norm" else self.part.along

    def _reduced(self) -> np.ndarray:
        """float64 inside, rounded once."""
        whole, axis = _joined(_PartBytes(self.part), self.part.dtype).reshape(self.part.shape), self._reduced_axis
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


class _PartBytes:
    """The bytes of what is taken of a sequence, as they lie in the file."""

    def __init__(self, part: "_Part") -> None:
        self._part = part
        self._row_bytes = part.row_size * part.dtype.itemsize
        self.nbytes = part.n_leads * part.n_rows * self._row_bytes

    def at(self, offset: int) -> tuple[int, np.ndarray]:
        """A stretch with the byte at ``offset``: where it starts, and its numbers."""
        n_rows = self._part.n_rows
        lead, row = divmod(offset // self._row_bytes, n_rows)
        if self.nbytes <= BLOCK_BYTES:
            leads = [self._part.rows_at(number, 0, n_rows) for number in range(self._part.n_leads)]
            return 0, leads[0] if len(leads) == 1 else np.concatenate([rows.reshape(-1) for rows in leads])
        wanted = min(n_rows, row + max(1, BLOCK_BYTES // self._row_bytes))
        return (lead * n_rows + row) * self._row_bytes, self._part.rows_at(lead, row, wanted)


class TensorBytes:
    """The bytes of a tensor as they travel, read and converted a stretch at a time: nothing else is held."""

    def __init__(self, tensor: Tensor, dtype: str) -> None:
        assert tensor.reduce is None
        self._hook_id = tensor.about["hook_id"]
        self._stored = _PartBytes(tensor.part)
        self._dtype = tensor.wire_dtype(dtype)
        self._from = tensor.dtype.itemsize
        self.nbytes = tensor.nbytes(dtype)

    def at(self, offset: int) -> tuple[int, memoryview]:
        """A stretch with the byte at ``offset``: where it starts, and its bytes.

        Raises:
            ApiError: a number is too large.
        """
        to = self._dtype.itemsize
        start, rows = self._stored.at(offset // to * self._from)
        if rows.dtype != self._dtype and rows.nbytes > BLOCK_BYTES:
            # A view may be as long as a record.
            flat, skipped = rows.reshape(-1), (offset // to * self._from - start) // self._from
            rows = flat[skipped : skipped + max(1, BLOCK_BYTES // self._from)]
            start += skipped * self._from
        return start // self._from * to, payload.array_bytes(_converted(rows, self._dtype, self._hook_id))

    def ready(self) -> None:
        """Raises ApiError for a number that is too large for the type that was asked for."""
        if self._dtype.itemsize < self._from:
            at = 0
            while at < self.nbytes:
                start, stretch = self.at(at)
                at = start + len(stretch)


class ReducedBytes:
    """The bytes of reduced tensors, one after the other. They are few beside what they are made of."""

    def __init__(self, tensors: Sequence[Tensor], dtype: str) -> None:
        self._tensors = tensors
        self._dtype = dtype
        self._made: memoryview | None = None
        self.nbytes = sum(tensor.nbytes(dtype) for tensor in tensors)

    def ready(self) -> None:
        """Reduce them.

        Raises:
            ApiError: a number is too large for the type that was asked for, or the disk has no room.
        """
        made, at = room((self.nbytes,), np.dtype(np.uint8)), 0
        for tensor in self._tensors:
            raw = payload.array_bytes(tensor.array(self._dtype))
            made[at : at + len(raw)] = np.frombuffer(raw, np.uint8)
            at += len(raw)
        self._made = made.data

    def at(self, offset: int) -> tuple[int, memoryview]:
        """All of them."""
        assert self._made is not None, "ready() comes first"
        return 0, self._made


def sources(tensors: Sequence[Tensor], dtype: str) -> list[TensorBytes | ReducedBytes]:
    """The bytes of tensors of one selection, in order, for ``downloads.download``."""
    if any(tensor.reduce is not None for tensor in tensors):
        return [ReducedBytes(tensors, dtype)]
    return [tensor.wire_bytes(dtype) for tensor in tensors]


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

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Of what is taken; asked for when nothing more is left out."""
        shape = list(self.first.shape)
        if self.along is not None:
            shape[self.along] = sum(len(rows) for rows in self.rows)
        if self.head_axis is not None and self.heads is not None:
            shape[self.head_axis] = len(self.heads)
        if self.key_axis is not None:
            shape[self.key_axis] = max(record.shape[self.key_axis] for record in self.records)
        return tuple(shape)

    @cached_property
    def _ends(self) -> list[int]:
        """The row after each record's last."""
        return list(accumulate(map(len, self.rows))) if self.along is not None else [1]

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

    # What is taken is read in rows: one position, or all of a record that has no position axis, at one place of the
    # axes before it. Rows of one such place (a "lead") lie one after the other.

    @property
    def n_rows(self) -> int:
        return 1 if self.along is None else self.shape[self.along]

    @property
    def n_leads(self) -> int:
        return math.prod(self.shape[: self.along or 0])

    @property
    def row_size(self) -> int:
        """Numbers in a row."""
        return math.prod(self._row_shape)

    def rows_at(self, lead: int, start: int, stop: int) -> np.ndarray:
        """Rows from ``start`` on: up to ``stop`` put together, or as many as lie one after the other in the file."""
        ends = self._ends
        first = bisect_right(ends, start)
        rows = self.rows[first][start - ends[first] :] if self.along is not None else [0]
        view = self._view(self.records[first], lead, rows)
        if view is not None and len(view) >= stop - start:
            return view
        made, at = np.empty((stop - start, *self._row_shape), self.dtype), start
        for record, end, held in zip(self.records[first:], ends[first:], self.rows[first:], strict=True):
            if at == stop:
                break
            upto = min(stop, end)
            taken = held[at - end + len(held) :][: upto - at] if self.along is not None else [0]
            self._copy(record, lead, taken, made[at - start : upto - start])
            at = upto
        return made

    @property
    def _row_shape(self) -> tuple[int, ...]:
        return self.shape[0 if self.along is None else self.along + 1 :]

    def _at_lead(self, record: StoredRecord, lead: int) -> np.ndarray:
        """A record's rows at a place of the axes before them."""
        array = self.capture.array(record)
        if self.along is None:
            return array[np.newaxis]
        place = [int(i) for i in np.unravel_index(lead, self.shape[: self.along])]
        if self.heads is not None and self.head_axis is not None and self.head_axis < self.along:
            place[self.head_axis] = self.heads[place[self.head_axis]]
        return array[tuple(place)]

    def _in_row(self, axis: int | None) -> int | None:
        """Where an axis is found in rows; None if it comes before them."""
        if axis is None:
            return None
        if self.along is None:
            return axis + 1
        return axis - self.along if axis > self.along else None

    def _view(self, record: StoredRecord, lead: int, rows: Sequence[int]) -> np.ndarray | None:
        """The first of the rows as a view of the file, if their bytes lie there one after the other."""
        if self.key_axis is not None and record.shape[self.key_axis] != self.shape[self.key_axis]:
            return None
        _, held = next(_runs(rows))
        view = self._at_lead(record, lead)[held]
        axis = self._in_row(self.head_axis)
        if axis is not None and self.heads is not None:
            runs = list(_runs(self.heads))
            if len(runs) > 1:
                return None
            view = view[(slice(None),) * axis + (runs[0][1],)]
        return view if view.flags.c_contiguous else None

    def _copy(self, record: StoredRecord, lead: int, rows: Sequence[int], target: np.ndarray) -> None:
        source, whole = self._at_lead(record, lead), slice(None)
        heads_at, key_at = self._in_row(self.head_axis), self._in_row(self.key_axis)
        head_runs = list(_runs(self.heads)) if heads_at is not None and self.heads is not None else [(whole, whole)]
        keys = whole if key_at is None else slice(0, source.shape[key_at])
        for to_rows, of_rows in _runs(rows):
            for to_heads, of_heads in head_runs:
                to, of = [whole] * target.ndim, [whole] * target.ndim
                if key_at is not None:
                    to[key_at] = keys
                if heads_at is not None:
                    to[heads_at], of[heads_at] = to_heads, of_heads
                to[0], of[0] = to_rows, of_rows
                target[tuple(to)] = source[tuple(of)]
        if key_at is not None:
            beyond = (whole,) * key_at + (slice(source.shape[key_at], None),)
            target[beyond] = payload.key_padding(record.hook_point, record.component)


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
    why = why_irreducible(reduce, part.first.hook_point, part.axes, part.along is not None)
    if why is not None:
        raise _unfit(part.first, "reduce", why)


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
    try:
        return payload.as_wire_dtype(array, dtype.name, hook_id)
    except NumberTooLargeError as error:
        raise ApiError(400, str(error), code="invalid_value", param="dtype") from error


def _joined(source: _PartBytes | TensorBytes, dtype: np.dtype[Any]) -> np.ndarray:
    """All numbers of a source: a view where it is one."""
    made, at = None, 0
    while at < source.nbytes or made is None:
        start, stretch = source.at(at) if source.nbytes else (0, np.empty(0, dtype))
        numbers = np.frombuffer(stretch, dtype) if isinstance(stretch, memoryview) else stretch.reshape(-1)
        if numbers.nbytes == source.nbytes:
            return numbers
        if made is None:
            made = room((source.nbytes // dtype.itemsize,), dtype)
        made[start // dtype.itemsize :][: numbers.size] = numbers
        at = start + numbers.nbytes
    return made
