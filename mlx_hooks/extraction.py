"""Which activations a forward pass keeps, in easyroutine's words: flags, target positions, pivots, padded batches.

1. A configuration's flags name hook points; what no module emits (``head_out``) is made of what one does.
2. Target positions are resolved row by row, without padding.
3. Rows of one length run together; others run alone and are put together, so that padding changes nothing.
"""

from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass, fields, replace
from operator import index
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from .activations import ActivationCache, CapturedActivation, id_list, labels
from .errors import HookError
from .hook_points import block_point, components, in_forward_order, outer_point

if TYPE_CHECKING:
    from .model import HookedModel

_WHOLE = {
    "extract_embed": "embed",
    "extract_resid_in": "resid_pre",
    "extract_resid_mid": "resid_mid",
    "extract_resid_out": "resid_post",
    "extract_resid_in_post_layernorm": "ln1",
    "extract_attn_in": "attn_in",
    "extract_attn_out": "attn_out",
    "extract_mlp_in": "mlp_in",
    "extract_mlp_out": "mlp_out",
    "extract_values": "v",
    "extract_keys": "k",
    "extract_queries": "q",
    "extract_last_layernorm": "ln_final_in",
    "save_input_ids": "embed_in",
    "save_logits": "logits",
}
_OF_HEADS = {
    "extract_attn_pattern": "pattern",
    "extract_head_values": "v",
    "extract_head_keys": "k",
    "extract_head_queries": "q",
    "extract_head_out": "result",
    "extract_head_values_projected": "v_projected",
}
_REFUSED = {
    "extract_head_keys_projected": "an output projection multiplies values, never keys; take extract_head_keys",
    "extract_head_queries_projected": "an output projection multiplies values, never queries; "
    "take extract_head_queries",
    "avg": "an average over target positions has no position; average cache[key] over the axis of positions, "
    "where mapping_index says what lies where",
    "avg_over_example": "examples are kept; cache['avg_attn_pattern_L3H2'] is the average over all of them",
    "attn_pattern_avg": "patterns are kept whole; average cache['pattern_L3H2'] over the rows and keys that you mean",
    "attn_pattern_row_positions": "the rows are those of target_token_positions, and all keys are kept",
    "keep_gradient": "MLX computes gradients of functions, not of arrays that exist; use mx.grad",
}
_CHANGE_THE_RUN = ("pixel_values", "position_ids", "inputs_embeds", "past_key_values")
_POSITIONS = (
    "'last', 'last-N', 'first', 'all', 'all-text', 'inputs-partition-N', whole numbers, (start, stop) pairs and slices"
)


@dataclass(frozen=True)
class ExtractionConfig:
    """Which activations to keep. The flags are easyroutine's; the names are those of the hook points.

        config = ExtractionConfig(extract_resid_out=True, extract_attn_pattern=True)
        cache = model.forward("The capital of France is", ["last"], config)
        cache["resid_out_3"], cache["pattern_L3H2"]

    | flag | key | hook point |
    | --- | --- | --- |
    | extract_embed | input_embeddings | hook_embed |
    | extract_resid_in, _mid, _out | resid_in_3, resid_mid_3, resid_out_3 | hook_resid_pre, _mid, _post |
    | extract_resid_in_post_layernorm | resid_in_post_layernorm_3 | ln1.hook_normalized |
    | extract_attn_in, extract_attn_out | attn_in_3, attn_out_3 | attn.hook_in, hook_attn_out |
    | extract_mlp_in, extract_mlp_out | mlp_in_3, mlp_out_3 | mlp.hook_in, hook_mlp_out |
    | extract_values, _keys, _queries | values_L3, ...: [batch, pos, heads side by side] | attn.hook_v, hook_k, hook_q |
    | extract_head_values, _keys, _queries | head_values_L3H2, ...: [batch, pos, d_head] | the same |
    | extract_attn_pattern | pattern_L3H2: [batch, query, key] | attn.hook_pattern |
    | extract_head_out | head_out_L3H2: what the head adds to the stream | attn.hook_result |
    | extract_head_values_projected | projected_value_L3H2: its part for one attended position | attn.hook_v_projected |
    | extract_last_layernorm | last_layernorm: what the last norm gets | ln_final.hook_in |
    | save_input_ids, save_logits | input_ids, logits | embed.hook_in, hook_logits |

    Args:
        attn_heads: "all", or a list of ``{"layer": 3, "head": 2}``: the heads that flags with ``head`` or ``pattern``
            in their name keep.
        the others: flags, true or false. Those that easyroutine has and the table lacks are refused with the reason.

    Raises:
        HookError: for a flag that is not true or false, heads in another form, and what cannot be done.
    """

    extract_embed: bool = False
    extract_resid_in: bool = False
    extract_resid_mid: bool = False
    extract_resid_out: bool = False
    extract_resid_in_post_layernorm: bool = False
    extract_attn_pattern: bool = False
    extract_head_values_projected: bool = False
    extract_head_keys_projected: bool = False
    extract_head_queries_projected: bool = False
    extract_head_keys: bool = False
    extract_head_values: bool = False
    extract_head_queries: bool = False
    extract_values: bool = False
    extract_keys: bool = False
    extract_queries: bool = False
    extract_head_out: bool = False
    extract_attn_out: bool = False
    extract_attn_in: bool = False
    extract_mlp_in: bool = False
    extract_mlp_out: bool = False
    extract_last_layernorm: bool = False
    save_input_ids: bool = False
    avg: bool = False
    avg_over_example: bool = False
    attn_heads: Sequence[Mapping[str, int]] | str = "all"
    attn_pattern_avg: str = "none"
    attn_pattern_row_positions: Sequence[Any] | None = None
    save_logits: bool = True
    keep_gradient: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            given = getattr(self, field.name)
            if isinstance(field.default, bool) and not isinstance(given, bool):
                raise HookError(f"{field.name} is true or false, got {given!r}.", field=field.name)
            if field.name in _REFUSED and given != field.default:
                raise HookError(f"{field.name} is not offered: {_REFUSED[field.name]}.", field=field.name)
        heads: Any = self.attn_heads
        if heads == "all":
            return
        if isinstance(heads, str) or not isinstance(heads, Sequence) or not heads or not all(map(_is_head, heads)):
            raise HookError(
                f"attn_heads is 'all' or a list of {{'layer': 3, 'head': 2}}, got {heads!r}.", field="attn_heads"
            )
        object.__setattr__(self, "attn_heads", [{"layer": h["layer"], "head": h["head"]} for h in heads])

    @classmethod
    def of(cls, config: "ExtractionConfig | Mapping[str, Any]") -> "ExtractionConfig":
        """A configuration from a mapping with the same keys.

        Raises:
            HookError: for an unknown key; lists the known ones.
        """
        if isinstance(config, ExtractionConfig):
            return config
        if not isinstance(config, Mapping):
            raise HookError(f"An extraction_config is an ExtractionConfig or a mapping, got {type(config).__name__}.")
        known = [f.name for f in fields(cls)]
        if unknown := [str(key) for key in config if key not in known]:
            raise HookError(f"Unknown flag {unknown[0]!r} in an extraction_config. There are: {', '.join(known)}.")
        return cls(**config)

    def is_not_empty(self) -> bool:
        """Whether anything is kept besides the logits."""
        return bool(self.components - {"logits"})

    @property
    def components(self) -> set[str]:
        """The components of the hook points that are kept."""
        return {component for flag, component in (_WHOLE | _OF_HEADS).items() if getattr(self, flag)}

    def heads_of(self, component: str) -> dict[int, list[int]] | None:
        """By layer, the heads to keep of a component, ascending; None for all heads of all layers."""
        whole = any(getattr(self, flag) for flag, other in _WHOLE.items() if other == component)
        if whole or isinstance(self.attn_heads, str) or component not in _OF_HEADS.values():
            return None
        chosen: dict[int, set[int]] = {}
        for head in self.attn_heads:
            chosen.setdefault(head["layer"], set()).add(head["head"])
        return {layer: sorted(heads) for layer, heads in sorted(chosen.items())}

    def to_dict(self) -> dict[str, Any]:
        """The flags as plain JSON values."""
        return asdict(self)


def _is_head(given: Any) -> bool:
    return (
        isinstance(given, Mapping)
        and set(given) == {"layer", "head"}
        and all(type(n) is int and n >= 0 for n in given.values())
    )


def extract(
    model: "HookedModel",
    inputs: Any,
    target_token_positions: Any,
    config: ExtractionConfig | Mapping[str, Any],
    pivot_positions: Sequence[int] | None,
    interventions: Any,
) -> ActivationCache:
    """The activations that ``HookedModel.forward`` answers."""
    config = ExtractionConfig.of(config)
    if not config.components:
        raise HookError("The extraction_config keeps nothing: set a flag, or leave save_logits at true.")
    pivot_positions = _pivots(inputs, pivot_positions)
    rows = _rows(model, inputs)
    if len({len(row) for row in rows}) == 1:
        parts = [_run(model, rows, target_token_positions, config, pivot_positions, interventions)]
    else:
        parts = [_run(model, [row], target_token_positions, config, pivot_positions, interventions) for row in rows]
    cache = put_together(parts)
    cache.metadata = describe(model, target_token_positions, config, pivot_positions, cache.edited_by)
    return cache


def extract_all(
    model: "HookedModel",
    dataloader: Iterable[Any],
    target_token_positions: Any,
    config: ExtractionConfig | Mapping[str, Any],
    pivot_positions: Sequence[int] | None,
    interventions: Any,
    progress: bool,
) -> ActivationCache:
    """The activations that ``HookedModel.extract_cache`` answers."""
    config = ExtractionConfig.of(config)
    if isinstance(dataloader, str | Mapping) or not isinstance(dataloader, Iterable):
        raise HookError(
            "A dataloader is an iterable of inputs, each a text, token ids or what a tokenizer returns; got "
            f"{type(dataloader).__name__}."
        )
    total = len(dataloader) if isinstance(dataloader, Sized) else None
    parts: list[ActivationCache] = []
    for i, inputs in enumerate(tqdm(dataloader, desc="Extracting", total=total, disable=not progress)):
        try:
            part = extract(model, inputs, target_token_positions, config, pivot_positions, interventions)
            _check_fit(parts[0] if parts else part, part)
        except HookError as error:
            raise type(error)(f"Element {i} of the dataloader: {error}") from error
        parts.append(part)
    if not parts:
        raise HookError("The dataloader has no elements.")
    pivots = [part.metadata["pivot_positions"] for part in parts]
    cache = put_together(parts)
    cache.metadata = describe(model, target_token_positions, config, None, cache.edited_by)
    cache.metadata["pivot_positions"] = pivots[0] if all(p == pivots[0] for p in pivots) else pivots
    return cache


def _pivots(inputs: Any, given: Any) -> Sequence[int] | None:
    """The pivots that come with the inputs, or as an argument."""
    given = given.tolist() if hasattr(given, "tolist") else given
    own = inputs.get("pivot_positions") if isinstance(inputs, Mapping) else None
    if own is None:
        return given
    own = own.tolist() if hasattr(own, "tolist") else own
    if not isinstance(own, Sequence) or (given is not None and list(own) != list(given)):
        instead = (
            f"whole numbers, got {own!r}" if given is None else f"{own!r} in the inputs and {given!r} as an argument"
        )
        raise HookError(f"pivot_positions are {instead}.")
    return own


def describe(
    model: "HookedModel",
    target_token_positions: Any,
    config: ExtractionConfig,
    pivots: Any,
    edits: Sequence[Any] | None,
) -> dict[str, Any]:
    """What a cache says of how it was made."""
    return {
        "model_name": model.model_name,
        "target_token_positions": listed(target_token_positions),
        "pivot_positions": None if pivots is None else [int(p) for p in pivots],
        "interventions": list(edits or ()),
        "extraction_config": config,
        "model": model.cfg.to_dict(),
    }


def listed(wanted: Any) -> list[Any]:
    """Target positions as a list: a tuple is one span."""
    return list(wanted) if isinstance(wanted, list | range | np.ndarray) else [wanted]


def resolve_positions(
    wanted: Any, length: int, pivot_positions: Sequence[int] | None = None
) -> tuple[list[int], dict[Any, list[int]]]:
    """The absolute positions that are meant of ``length`` tokens, each once, and where among them each wish lies.

    >>> resolve_positions(["last", "inputs-partition-0", -1], 5, pivot_positions=[2])
    ([4, 0, 1], {'last': [0], 'inputs-partition-0': [1, 2], -1: [0]})

    Args:
        wanted: one or a list of: "last", "last-2" (the second from the end), "first", "all", "all-text" (the same),
            "inputs-partition-1" (the tokens from the first pivot to the second), a whole number, a (start, stop) pair,
            a slice.
        pivot_positions: where partitions begin, save the first, which begins at 0.

    Raises:
        HookError: for positions that do not exist, and for words that nobody can resolve.
    """
    wishes = listed(wanted)
    if not wishes:
        raise HookError(f"target_token_positions are {_POSITIONS}; got none.")
    order: dict[int, int] = {}
    mapping: dict[Any, list[int]] = {}
    for wish in wishes:
        label, positions = _resolve(wish, length, pivot_positions)
        if not positions:
            raise HookError(f"The position {wish!r} selects none of the {length} tokens.")
        mapping[label] = [order.setdefault(p, len(order)) for p in positions]
    return list(order), mapping


def _resolve(wish: Any, length: int, pivots: Sequence[int] | None) -> tuple[Any, Sequence[int]]:
    """What a wish is called in ``mapping_index``, and its absolute positions."""
    if isinstance(wish, str):
        return wish, _resolve_word(wish, length, pivots)
    if isinstance(wish, slice):
        ends = ":".join("" if end is None else str(end) for end in (wish.start, wish.stop))
        return ends if wish.step is None else f"{ends}:{wish.step}", range(*wish.indices(length))
    try:
        if isinstance(wish, bool | np.bool_):
            raise TypeError
        if isinstance(wish, tuple):
            start, stop = map(index, wish)
            return (start, stop), range(_inside(start, length), _inside(stop, length, end=True))
        at = index(wish)
    except (TypeError, ValueError):
        raise HookError(f"target_token_positions are {_POSITIONS}; got {wish!r}.") from None
    return at, [_inside(at, length)]


def _inside(position: int, length: int, end: bool = False) -> int:
    absolute = position + length if position < 0 else position
    if not 0 <= absolute < length + end:
        raise HookError(f"Position {position} is outside the {length} tokens, 0 to {length - 1}.")
    return absolute


def _resolve_word(word: str, length: int, pivots: Sequence[int] | None) -> Sequence[int]:
    name, _, number = word.rpartition("-")
    if word in ("all", "all-text"):
        return range(length)
    if word in ("first", "last"):
        return [0 if word == "first" else length - 1]
    if name == "last" and number.isdecimal() and int(number) > 0:
        return [_inside(-int(number), length)]
    if name == "inputs-partition" and number.isdecimal():
        ends = [0, *_checked_pivots(pivots, length), length]
        if int(number) >= len(ends) - 1:
            raise HookError(
                f"There is no {word!r}: {len(ends) - 2} pivot_positions make the partitions 0 to {len(ends) - 2}."
            )
        return range(ends[int(number)], ends[int(number) + 1])
    if word.startswith("random"):
        raise HookError(f"{word!r} could not be told again: choose positions and give their numbers.")
    if "image" in word or word.startswith("special"):
        raise HookError(f"{word!r} is of models that see images; mlx-lm's read text.")
    raise HookError(f"target_token_positions are {_POSITIONS}; got {word!r}.")


def _checked_pivots(pivots: Sequence[int] | None, length: int) -> list[int]:
    try:
        ends = sorted(index(p) for p in pivots or [])
    except TypeError:
        raise HookError(f"pivot_positions are whole numbers, got {pivots!r}.") from None
    if len(set(ends)) < len(ends) or (ends and not 0 < ends[0] <= ends[-1] < length):
        raise HookError(f"pivot_positions are different whole numbers from 1 to {length - 1}, got {pivots!r}.")
    return ends


def _rows(model: "HookedModel", inputs: Any) -> list[list[int]]:
    """The token ids of each row, without padding."""
    mask = None
    if isinstance(inputs, Mapping):
        if "input_ids" not in inputs:
            raise HookError(f"Inputs as a mapping have input_ids, got {', '.join(map(str, inputs)) or 'nothing'}.")
        if foreign := [key for key in _CHANGE_THE_RUN if inputs.get(key) is not None]:
            raise HookError(f"{foreign[0]} is not read: give input_ids and attention_mask.")
        mask, inputs = (_known_array(inputs.get(key)) for key in ("attention_mask", "input_ids"))
    if isinstance(inputs, str):
        rows = [id_list(model.to_tokens(inputs)[0])]
    elif isinstance(inputs, list | tuple) and inputs and all(isinstance(row, str) for row in inputs):
        rows = [id_list(model.to_tokens(row)[0]) for row in inputs]
    elif isinstance(inputs, list | tuple) and inputs and all(_is_row(row) for row in inputs):
        rows = [_numbers(row) for row in inputs]
    else:
        rows = model.to_tokens(inputs).tolist()  # type: ignore[assignment]
    if mask is not None:
        kept = _mask_rows(mask)
        if [len(row) for row in kept] != [len(row) for row in rows]:
            raise HookError("attention_mask has the shape of input_ids.")
        if any(entry not in (0, 1) for row in kept for entry in row):
            raise HookError("attention_mask holds 1 for a token and 0 for padding.")
        rows = [[t for t, is_token in zip(*pair, strict=True) if is_token] for pair in zip(rows, kept, strict=True)]
    for i, row in enumerate(rows):
        if not row:
            raise HookError(f"Row {i} of the inputs has no tokens.")
        model.to_tokens(row)
    return rows


def _mask_rows(mask: Any) -> list[Any]:
    """A mask [pos] or [batch, pos] as lists."""
    rows = mask.tolist() if hasattr(mask, "tolist") else mask
    if isinstance(rows, list | tuple):
        rows = [row.tolist() if hasattr(row, "tolist") else row for row in rows]
        are_rows = [isinstance(row, list | tuple) for row in rows]
        if all(are_rows) or not any(are_rows):
            return rows if any(are_rows) else [rows]
    raise HookError("attention_mask has the shape of input_ids.")


def _known_array(given: Any) -> Any:
    """Another library's array (PyTorch's) as NumPy's; anything else as it is."""
    return np.asarray(given) if hasattr(given, "__array__") and not isinstance(given, mx.array) else given


def _is_row(row: Any) -> bool:
    return isinstance(row, list | tuple) or (isinstance(row, np.ndarray | mx.array) and row.ndim == 1)


def _numbers(row: Any) -> list[int]:
    try:
        return [index(t) for t in (row.tolist() if hasattr(row, "tolist") else row)]
    except TypeError:
        raise HookError(f"Tokens are a text or whole numbers [pos] or [batch, pos], got {row!r}.") from None


def _run(
    model: "HookedModel",
    rows: list[list[int]],
    target_token_positions: Any,
    config: ExtractionConfig,
    pivot_positions: Sequence[int] | None,
    interventions: Any,
) -> ActivationCache:
    """Rows of one length in one forward pass."""
    length = len(rows[0])
    positions, mapping = resolve_positions(target_token_positions, length, pivot_positions)
    plan = _Plan(model, config)
    selected = None if positions == list(range(length)) else positions
    _, cache = model.run_with_cache(rows, plan.names, selected, interventions=interventions, logits="none")
    if plan.unselectable:
        # A raw module's value has no named position axis: it is captured whole in a run of its own.
        _, whole = model.run_with_cache(rows, plan.unselectable, interventions=interventions, logits="none")
        for name, records in whole.records.items():
            cache.records[name] = [_at(record, positions) for record in records]
    receipts, edits = cache.interventions, cache.edited_by
    cache = plan.finish(cache)
    cache.interventions, cache.edited_by, cache.mapping_index = receipts, edits, mapping
    cache.token_positions, cache.row_lengths = [list(positions) for _ in rows], [length] * len(rows)
    return cache


def _at(record: CapturedActivation, positions: list[int]) -> CapturedActivation:
    value = mx.take(record.value, mx.array(positions), axis=1)
    return CapturedActivation(**labels(record) | {"value": value, "position_ids": positions})


class _Plan:
    """What is captured for a configuration, and what is made of it.

    Raises:
        HookError: for layers, heads and parts of heads that the model does not have.
    """

    def __init__(self, model: "HookedModel", config: ExtractionConfig) -> None:
        self.model = model
        self.config = config
        self.kept: list[str] = []
        self.sources: dict[str, tuple[str, int]] = {}
        """By derived name, the name of what it is made of and the layer."""
        blocks = set(components())
        for component in sorted(config.components):
            if component not in blocks:
                self.kept.append(outer_point(component).name)
                continue
            for layer in self._layers(component):
                self._add(component, layer)
        captured = list(dict.fromkeys([*self.kept, *(source for source, _ in self.sources.values())]))
        self.unselectable = [name for name in captured if name not in model.hook_points and name not in self.kept]
        self.names = [name for name in captured if name not in self.unselectable]

    def _layers(self, component: str) -> list[int]:
        chosen = self.config.heads_of(component)
        n_layers = self.model.cfg.n_layers
        if chosen is not None:
            for layer, heads in chosen.items():
                if layer >= n_layers:
                    raise HookError(f"attn_heads has layer {layer}; layers are 0 to {n_layers - 1}.")
                n_heads = self.model.architecture.n_query_heads(layer)
                if heads[-1] >= n_heads:
                    raise HookError(f"attn_heads has head {heads[-1]} of layer {layer}; heads are 0 to {n_heads - 1}.")
            return list(chosen)
        source = {"result": "z", "v_projected": "v"}.get(component, component)
        having = [layer for layer in range(n_layers) if block_point(source, layer).name in self.model.hook_points]
        # Without any layer, the run itself says why.
        return having or [0]

    def _add(self, component: str, layer: int) -> None:
        name = block_point(component, layer).name
        if component == "result":
            self.sources[name] = (self.model.head_input(layer), layer)
        elif component == "v_projected":
            path = self.model.head_path(layer)
            if path.point.component != "z" or path.after is not None:
                raise HookError(
                    f"extract_head_values_projected is not offered for layer {layer} of this model: between its values "
                    f"and the stream lies a {'gate' if path.after is None else 'norm'}, which they alone do not tell."
                )
            self.sources[name] = (block_point("v", layer).name, layer)
        else:
            self.kept.append(name)

    def finish(self, cache: ActivationCache) -> ActivationCache:
        """The cache with what is made of records, without those that only served it, with the heads asked for."""
        records = {name: cache.records[name] for name in self.kept}
        for name, (source, layer) in self.sources.items():
            records[name] = [self._derive(record, name, layer) for record in cache.records[source]]
        for component in self.config.components:
            for layer, heads in (self.config.heads_of(component) or {}).items():
                name = block_point(component, layer).name
                records[name] = [_with_heads(record, heads) for record in records[name]]
        mx.eval([record.value for of_point in records.values() for record in of_point])
        order = in_forward_order(of_point[0].hook_point for of_point in records.values())
        return ActivationCache({name: records[name] for name in order})

    def _derive(self, record: CapturedActivation, name: str, layer: int) -> CapturedActivation:
        value = record.value
        component = name.rpartition("hook_")[2]
        if component == "v_projected":
            value = mx.repeat(value, record.hook_point.group, axis=2)
        value = self.model.head_results(value, layer)
        point = replace(block_point(component, layer), sizes=(None, None, *value.shape[2:]))
        return CapturedActivation(**labels(record) | {"value": value, "hook_point": point})


def _with_heads(record: CapturedActivation, heads: list[int]) -> CapturedActivation:
    """A record with those of its heads that serve some query heads."""
    held = sorted({head // record.hook_point.group for head in heads})
    axis = record.hook_point.axes.index("head")
    if held == list(range(record.value.shape[axis])):
        return record
    value = mx.take(record.value, mx.array(held), axis=axis)
    return CapturedActivation(**labels(record) | {"value": value, "heads": tuple(held)})


def put_together(parts: list[ActivationCache]) -> ActivationCache:
    """Caches of several runs as one: their rows one below the other. ``parts`` is emptied on the way.

    Where rows differ in length, ``cache.positions`` tells those that all count alike from the end as negative numbers;
    keys that a row does not have are 0 in its pattern.

    Raises:
        HookError: when the same wish selects differently many positions.
    """
    if len(parts) == 1:
        return parts.pop()
    first = parts[0]
    for part in parts:
        _check_fit(first, part)
    cache = ActivationCache()
    cache.edited_by, cache.mapping_index = first.edited_by, first.mapping_index
    cache.token_positions = [row for part in parts for row in part.token_positions]
    cache.interventions = tuple(receipt for part in parts for receipt in part.interventions)
    cache.row_lengths = [length for part in parts for length in part.row_lengths]
    ids = _common_ids(cache.token_positions, cache.row_lengths)
    for name in list(first.records):
        taken = [part.records.pop(name) for part in parts]
        cache.records[name] = [_joined(records, ids) for records in zip(*taken, strict=True)]
        mx.eval([record.value for record in cache.records[name]])
    parts.clear()
    return cache


def _check_fit(first: ActivationCache, part: ActivationCache) -> None:
    for label, entries in first.mapping_index.items():
        if part.mapping_index[label] != entries:
            raise HookError(
                f"{label!r} selects {len(entries)} positions of one row and {len(part.mapping_index[label])} of "
                "another, or they overlap otherwise: such rows do not fit into one array; run them one by one."
            )


def _common_ids(rows: list[list[int]], lengths: list[int]) -> list[int]:
    """The positions of all rows: from the start where they agree, else from the end, else simply counted."""
    from_end = [[p - length for p in row] for row, length in zip(rows, lengths, strict=True)]
    ids: list[int] = []
    for absolute, negative in zip(zip(*rows, strict=True), zip(*from_end, strict=True), strict=True):
        if len(set(absolute)) == 1:
            ids.append(absolute[0])
        elif len(set(negative)) == 1:
            ids.append(negative[0])
        else:
            return list(range(len(rows[0])))
    return ids


def _joined(records: Sequence[CapturedActivation], ids: Sequence[int]) -> CapturedActivation:
    """Records of different rows as one, along the batch axis."""
    first = records[0]
    values = [record.value for record in records]
    if first.hook_point.axes[-1:] == ("key",):
        n_keys = max(value.shape[-1] for value in values)
        values = [mx.pad(value, [(0, 0)] * 3 + [(0, n_keys - value.shape[-1])]) for value in values]
    axis = first.hook_point.axes.index("batch")
    return CapturedActivation(**labels(first) | {"value": mx.concatenate(values, axis=axis), "position_ids": ids})
