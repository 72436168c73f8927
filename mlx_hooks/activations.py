"""What a run captured: single records, and the cache that joins them into whole sequences."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
import numpy as np

from .errors import HookError, UnknownHookError
from .hook_points import (
    CacheKey,
    HookPoint,
    NamesFilter,
    cache_key,
    check_head,
    expand_key,
    select,
    short_name,
    unknown_point,
)

if TYPE_CHECKING:
    from .interventions import EditingFunction, Intervention, InterventionReceipt


@dataclass(frozen=True)
class CapturedActivation:
    """One activation of one forward pass.

    Args:
        hook_point: where it was captured; ``hook_point.axes`` names the axes of ``value``.
        value: the array, exactly as the model computed it.
        position_ids: absolute position of each entry along the position axis.
        phase: "prefill" (the prompt) or "decode" (a generated token).
        step: 0 for the prompt, k for the forward pass of the k-th generated token.
        hook_id, layer_name, component: as the hook spec asked; empty for captures by name.
        is_input: captured at a module's input.
        pass_index: which pass, for a layer that runs several times in one forward pass.
        heads: the heads that ``value`` holds along its head axis (key-value heads for k and v); None for all.
        reduce: "mean", "max" or "last" over ``position_ids``, "norm" over the last axis, "head_mean" over heads: what
            ``value`` is of the activation, in float32; the axis is gone from ``hook_point.axes``. Of a "projection" the
            last axis is that of its vectors. None for the activation itself.
    """

    hook_point: HookPoint
    value: mx.array
    position_ids: Sequence[int]
    phase: str
    step: int
    hook_id: str = ""
    layer_name: str = ""
    component: str = ""
    is_input: bool = False
    pass_index: int = 0
    heads: tuple[int, ...] | None = None
    reduce: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the value."""
        return self.value.nbytes

    @property
    def positions(self) -> tuple[int, int]:
        """Lowest absolute position, and one past the highest."""
        return (min(self.position_ids), max(self.position_ids) + 1)

    @property
    def query_heads(self) -> Sequence[int]:
        """The query heads of which the value holds a part; of keys and values, those that its heads serve."""
        group = self.hook_point.group
        held = self.heads
        if held is None:
            # A value may lie in a file: its size is known without it.
            size = self.hook_point.size("head") or (
                self.value.shape[self.hook_point.axes.index("head")] if self._has_heads else 0
            )
            return range(size * group)
        return [head * group + i for head in held for i in range(group)]

    @property
    def _has_heads(self) -> bool:
        return "head" in self.hook_point.axes

    @property
    def listed_positions(self) -> list[int] | None:
        """The absolute positions one by one where they are not all of ``positions``; None where they are."""
        ids = list(self.position_ids)
        return None if ids == list(range(*self.positions)) else ids

    def numpy(self, dtype: str = "float32") -> np.ndarray:
        """The value as a NumPy array; numbers of any float type become ``dtype``, integers stay int32."""
        return to_numpy(self.value, dtype)


def to_numpy(value: mx.array, dtype: str = "float32") -> np.ndarray:
    """A NumPy copy of an MLX array. bfloat16, which NumPy lacks, goes through float32 without loss."""
    if not mx.issubdtype(value.dtype, mx.floating):
        return np.array(value.astype(mx.int32))
    if value.dtype == mx.bfloat16:
        value = value.astype(mx.float32)
    return np.array(value).astype(dtype, copy=False)


def scalar(array: mx.array) -> float:
    """The number in an array of one element."""
    return cast(float, array.item())


def id_list(array: mx.array) -> list[int]:
    """Token ids [pos] as Python numbers."""
    return cast(list[int], array.tolist())


def join(records: Sequence[CapturedActivation], n_keys: int = 0) -> CapturedActivation:
    """Records of consecutive calls at one hook point as one record, along the position axis.

    Rows of attention scores and patterns are padded with -inf and 0 for keys that did not exist yet, which is what
    one full forward pass shows there: up to the longest row, and at least to ``n_keys``.

    Raises:
        HookError: for records that overlap, hold different heads or were reduced in different ways, or that no axis
            joins.
    """
    first = records[0]
    axis = first.hook_point.position_axis
    if any(record.pass_index != first.pass_index for record in records):
        passes = sorted({record.pass_index for record in records})
        raise HookError(
            f"{first.hook_point.name} ran {len(passes)} times in one forward pass: read cache.of_pass(0) to "
            f"cache.of_pass({passes[-1]})."
        )
    has_keys = first.hook_point.axes[-1:] == ("key",)
    if len(records) == 1 and not (n_keys and has_keys and first.value.shape[-1] < n_keys):
        return first
    if any(record.reduce != first.reduce for record in records):
        raise HookError(f"Records of {first.hook_point.name} differ in reduce: read cache.records[name].")
    if axis is None and first.reduce is not None:
        raise HookError(
            f"{first.hook_point.name} has {len(records)} records, each reduced to its {first.reduce}: no axis joins "
            "them; read cache.records[name]."
        )
    if axis is None:
        raise HookError(
            f"{first.hook_point.name} has {len(records)} records and no axis that joins them: read cache.records[name]."
        )
    if any(record.heads != first.heads for record in records):
        raise HookError(f"Records of {first.hook_point.name} hold different heads: read cache.records[name].")
    values = [record.value for record in records]
    if has_keys:
        n_keys = max(n_keys, *(value.shape[-1] for value in values))
        fill = -mx.inf if first.hook_point.component == "attn_scores" else 0.0
        values = [
            mx.pad(
                value,
                [(0, 0)] * (value.ndim - 1) + [(0, n_keys - value.shape[-1])],
                constant_values=mx.array(fill, value.dtype),
            )
            for value in values
        ]
    ids = [record.position_ids for record in records]
    for a, b in pairwise(ids):
        if max(a) >= min(b):
            spans = " and ".join(f"{min(span)}-{max(span)}" for span in (a, b))
            raise HookError(f"Records of {first.hook_point.name} overlap: positions {spans}.")
    whole = all(isinstance(i, range) for i in ids) and all(a[-1] + 1 == b[0] for a, b in pairwise(ids))
    joined = range(ids[0][0], ids[-1][-1] + 1) if whole else tuple(p for part in ids for p in part)
    changed = {"value": mx.concatenate(values, axis=axis), "position_ids": joined}
    return CapturedActivation(**labels(first) | changed)


def labels(record: CapturedActivation) -> dict[str, Any]:
    """All fields of a record but its value."""
    return {f.name: getattr(record, f.name) for f in fields(CapturedActivation) if f.name != "value"}


class ActivationCache(Mapping[str, mx.array]):
    """Captured activations by canonical name, in forward order.

    Records of prefill and decode, or of several calls with one KV cache, read as one sequence:

        logits, cache = model.run_with_cache("The capital of France is")
        cache["blocks.3.hook_resid_post"].shape      # (1, 6, d_model)
        cache["pattern", 3]                          # the same as cache["blocks.3.attn.hook_pattern"]
        cache.records["hook_embed"][0].positions     # (0, 6)
        cache["resid_out_3"], cache["pattern_L3H2"]  # easyroutine's keys; the second is [batch, query, key] of head 2

    Values are MLX arrays. What was captured stays in memory for as long as the activation cache does: give
    ``names_filter``, ``positions`` or ``heads`` to keep less. What was spilled to files is read at each access, the
    whole hook point; ``cache.records[name]`` reads it pass by pass.
    """

    def __init__(self, records: dict[str, list[CapturedActivation]] | None = None) -> None:
        self.records: dict[str, list[CapturedActivation]] = records if records is not None else {}
        self.interventions: tuple[InterventionReceipt, ...] = ()
        """What each intervention of the run did."""
        self.edited_by: Sequence[Intervention | EditingFunction] | None = None
        """What was in force when the model made it: interventions and functions, in order, those of blocks around the
        run (``intervening``, ``hooks``) before its own. None where nobody knows."""
        self.metadata: dict[str, Any] = {}
        """How it was made, where ``HookedModel.forward`` or ``extract_cache`` made it: model_name,
        target_token_positions, pivot_positions, interventions (``edited_by``), extraction_config, model (its sizes)."""
        self.mapping_index: dict[Any, list[int]] = {}
        """Where along the position axis each of ``target_token_positions`` lies."""
        self.token_positions: list[list[int]] = []
        """The absolute positions of the entries, row by row of the batch: rows may differ in length."""
        self.row_lengths: list[int] = []
        """The number of tokens of each row, without padding."""

    def __getitem__(self, key: str | tuple[str, int]) -> mx.array:
        meant = _meaning(key)
        record = join(self._records(key))
        value = record.value
        if meant.head is not None:
            check_head(meant, record.query_heads, str(key))
            at = list(record.query_heads).index(meant.head) // record.hook_point.group
            value = mx.take(value, at, axis=record.hook_point.axes.index("head"))
        if meant.derived == "mean":
            return value.astype(mx.float32).mean(axis=0, keepdims=True)
        if meant.derived == "flat":
            return value.reshape(*value.shape[:-2], -1)
        return value

    def _records(self, key: str | tuple[str, int]) -> list[CapturedActivation]:
        name = _meaning(key).name
        if name not in self.records:
            raise unknown_point(key if isinstance(key, str) else name, self._points)
        return self.records[name]

    @property
    def _points(self) -> dict[str, HookPoint]:
        return {name: records[0].hook_point for name, records in self.records.items()}

    def __contains__(self, key: object) -> bool:
        try:
            meant = _meaning(key if isinstance(key, tuple) else str(key))
        except UnknownHookError:
            return False
        return meant.name in self.records and (
            meant.head is None or meant.head in self.records[meant.name][0].query_heads
        )

    def expand(self, pattern: str) -> list[tuple[str, CacheKey]]:
        """The keys of this cache that a pattern means, by layer and head: ``"resid_out_{i}"``, ``"pattern_L{i}H{j}"``.

        Raises:
            UnknownHookError: for a pattern that means nothing here; lists what there is.
        """
        heads = {name: records[0].query_heads for name, records in self.records.items()}
        return expand_key(pattern, self._points, heads)

    @property
    def logits(self) -> mx.array:
        """``cache["logits"]``: [batch, pos, d_vocab] at the positions that were kept."""
        return self["logits"]

    @property
    def input_ids(self) -> mx.array:
        """``cache["input_ids"]``: [batch, pos] at the positions that were kept."""
        return self["input_ids"]

    def __iter__(self) -> Iterator[str]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def __repr__(self) -> str:
        return f"ActivationCache({len(self)} hook points, {self.nbytes / 1e6:.1f} MB)"

    @property
    def nbytes(self) -> int:
        """Bytes of all captured values, in memory or in files."""
        return sum(record.nbytes for records in self.records.values() for record in records)

    def positions(self, key: str | tuple[str, int]) -> Sequence[int]:
        """Absolute positions of the entries along the position axis of ``cache[key]``."""
        return join(self._records(key)).position_ids

    def heads(self, key: str | tuple[str, int]) -> tuple[int, ...] | None:
        """The heads that ``cache[key]`` holds along its head axis; None for all, or where it has no such axis."""
        return None if _meaning(key).head is not None else self._records(key)[0].heads

    def numpy(self, key: str | tuple[str, int], dtype: str = "float32") -> np.ndarray:
        """``cache[key]`` as a NumPy array."""
        return to_numpy(self[key], dtype)

    def select(self, names_filter: NamesFilter) -> "ActivationCache":
        """The part of the cache that a filter names, without copying."""
        return self._part({p.name: self.records[p.name] for p in select(self._points, names_filter)})

    def of_pass(self, index: int) -> "ActivationCache":
        """The part of the cache that belongs to one pass, for models whose layers run several times.

        Raises:
            HookError: says how many passes there are.
        """
        passes = {record.pass_index for records in self.records.values() for record in records}
        if index not in passes:
            raise HookError(f"There is no pass {index!r}: passes are {', '.join(map(str, sorted(passes)))}.")
        kept = {name: [r for r in records if r.pass_index == index] for name, records in self.records.items()}
        return self._part({name: records for name, records in kept.items() if records})

    def _part(self, records: dict[str, list[CapturedActivation]]) -> "ActivationCache":
        part = ActivationCache(records)
        part.interventions, part.edited_by = self.interventions, self.edited_by
        part.metadata, part.mapping_index = self.metadata, self.mapping_index
        part.token_positions, part.row_lengths = self.token_positions, self.row_lengths
        return part

    def add(self, record: CapturedActivation) -> None:
        """Append one forward pass's record."""
        self.records.setdefault(record.hook_point.name, []).append(record)


def _meaning(key: str | tuple[str, int]) -> CacheKey:
    if key in ("mapping_index", "metadata"):
        raise UnknownHookError(f"{key!r} is no key of an activation cache: read cache.{key}.")
    return CacheKey(short_name(*key)) if isinstance(key, tuple) else cache_key(key)
