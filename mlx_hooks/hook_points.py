"""The vocabulary: every hook-point name, its axes, and every other spelling that is accepted.

Names are TransformerLens's. Nothing else in the engine spells a name: other modules ask this one.
``blocks.{i}.attn.hook_in`` and its like (a module's input) are TransformerLens-bridge names and are
emitted because no legacy name exists for them.
"""

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from .errors import UnknownHookError

RESID = ("batch", "pos", "d_model")
HEADS = ("batch", "pos", "head", "d_head")
ATTENTION = ("batch", "head", "query", "key")
PER_HEAD = ("batch", "pos", "head", "d_model")
MLP = ("batch", "pos", "d_mlp")
CHOICE = ("batch", "pos", "choice")

POSITION_AXES = ("pos", "query")
"""The axes along which records of several calls continue one sequence."""
AXES_OF_THE_RUN = ("batch", "pos", "query", "key")
"""The axes whose sizes depend on what is run."""


@dataclass(frozen=True)
class HookPoint:
    """One place in a model where an activation can be read or replaced.

    >>> block_point("resid_post", 3)
    HookPoint(name='blocks.3.hook_resid_post', layer=3, component='resid_post', axes=('batch', 'pos', 'd_model'))

    Args:
        name: the canonical name, or ``path.input`` / ``path.output`` for a raw module.
        layer: the block's index from 0, or None outside the blocks.
        component: the short name, unique within a layer (``cache["resid_post", 3]``).
        axes: one name per axis of the value; empty for a raw module.
        sizes: one size per axis, as they were met when the model was wrapped; None where it depends on the run.
        group: query heads that share one entry of the head axis: more than 1 at the keys and values of grouped queries.
    """

    name: str
    layer: int | None
    component: str
    axes: tuple[str, ...]
    sizes: tuple[int | None, ...] = field(default=(), compare=False, repr=False)
    group: int = field(default=1, compare=False, repr=False)

    def size(self, axis: str) -> int | None:
        """The size of an axis, or None where there is none or it depends on the run."""
        return dict(zip(self.axes, self.sizes, strict=False)).get(axis)

    @property
    def position_axis(self) -> int | None:
        """Index of the axis that runs over positions, or None where there is none."""
        return next((i for i, axis in enumerate(self.axes) if axis in POSITION_AXES), None)


# (name, component, axes), in the order of a forward pass.
_BEFORE: list[tuple[str, str, tuple[str, ...]]] = [
    ("embed.hook_in", "embed_in", ("batch", "pos")),
    ("hook_embed", "embed", RESID),
    ("hook_pos_embed", "pos_embed", ("pos", "d_model")),
]
_BLOCK: list[tuple[str, str, tuple[str, ...]]] = [
    ("hook_resid_pre", "resid_pre", RESID),
    ("ln1.hook_in", "ln1_in", RESID),
    ("ln1.hook_normalized", "ln1", RESID),
    ("attn.hook_in", "attn_in", RESID),
    ("attn.hook_q", "q", HEADS),
    ("attn.hook_k", "k", HEADS),
    ("attn.hook_v", "v", HEADS),
    ("attn.hook_v_projected", "v_projected", PER_HEAD),
    ("attn.hook_rot_q", "rot_q", HEADS),
    ("attn.hook_rot_k", "rot_k", HEADS),
    ("attn.hook_attn_scores", "attn_scores", ATTENTION),
    ("attn.hook_pattern", "pattern", ATTENTION),
    ("attn.hook_sink", "sink", ("batch", "head", "query")),
    ("attn.hook_z", "z", HEADS),
    ("attn.hook_result", "result", PER_HEAD),
    ("mixer.hook_in", "mixer_in", RESID),
    ("mixer.hook_state", "mixer_state", ()),
    ("ln1_post.hook_normalized", "ln1_post", RESID),
    ("mixer.hook_out", "mixer_out", RESID),
    ("hook_attn_out", "attn_out", RESID),
    ("hook_resid_mid", "resid_mid", RESID),
    ("ln2.hook_in", "ln2_in", RESID),
    ("ln2.hook_normalized", "ln2", RESID),
    ("mlp.hook_in", "mlp_in", RESID),
    ("mlp.hook_router_scores", "router_scores", ("batch", "pos", "expert")),
    ("mlp.hook_expert_indices", "expert_indices", CHOICE),
    ("mlp.hook_expert_out", "expert_out", (*CHOICE, "d_model")),
    ("mlp.hook_expert_weights", "expert_weights", CHOICE),
    ("mlp.hook_pre", "mlp_pre", MLP),
    ("mlp.hook_pre_linear", "mlp_pre_linear", MLP),
    ("mlp.hook_post", "mlp_post", MLP),
    ("ln2_post.hook_normalized", "ln2_post", RESID),
    ("hook_mlp_out", "mlp_out", RESID),
    ("hook_side_out", "side_out", RESID),
    ("hook_resid_post", "resid_post", RESID),
]
_AFTER: list[tuple[str, str, tuple[str, ...]]] = [
    ("ln_final.hook_in", "ln_final_in", RESID),
    ("ln_final.hook_normalized", "ln_final", RESID),
    ("hook_logits", "logits", ("batch", "pos", "d_vocab")),
]
DERIVED = {"result": "z", "v_projected": "v"}
"""Components that no module emits, and of which one they are made: ``result`` is what each head adds to the stream,
``v_projected`` what it would add if it attended one position alone."""

_BLOCK_ROWS = {component: (name, axes) for name, component, axes in _BLOCK}
_OUTER_ROWS = {component: (name, axes) for name, component, axes in _BEFORE + _AFTER}

_SHORTHANDS = {"pre": "mlp_pre", "pre_linear": "mlp_pre_linear", "post": "mlp_post", "scores": "attn_scores"}

# Other libraries' names, as patterns of the whole name -> component. {i} stands for the layer.
_ALIASES = {
    # nnterp
    "token_embeddings": "embed",
    "layers_input[{i}]": "resid_pre",
    "layers_output[{i}]": "resid_post",
    "attentions_input[{i}]": "attn_in",
    "attentions_output[{i}]": "attn_out",
    "mlps_input[{i}]": "mlp_in",
    "mlps_output[{i}]": "mlp_out",
    "attention_probabilities[{i}]": "pattern",
    "logits": "logits",
    # TransformerLens bridge. Its attn.hook_out is the branch, never the stream after it.
    "embed.hook_out": "embed",
    "pos_embed.hook_out": "pos_embed",
    "blocks.{i}.hook_in": "resid_pre",
    "blocks.{i}.hook_out": "resid_post",
    "blocks.{i}.ln1.hook_out": "ln1",
    "blocks.{i}.ln2.hook_out": "ln2",
    "blocks.{i}.attn.q.hook_out": "q",
    "blocks.{i}.attn.k.hook_out": "k",
    "blocks.{i}.attn.v.hook_out": "v",
    "blocks.{i}.attn.hook_out": "attn_out",
    "blocks.{i}.mlp.hook_out": "mlp_out",
    "ln_final.hook_out": "ln_final",
    "unembed.hook_out": "logits",
    # easyroutine, where the name is of a whole value
    "resid_in_{i}": "resid_pre",
    "resid_mid_{i}": "resid_mid",
    "resid_out_{i}": "resid_post",
    "attn_in_{i}": "attn_in",
    "attn_out_{i}": "attn_out",
    "mlp_in_{i}": "mlp_in",
    "mlp_out_{i}": "mlp_out",
    "values_L{i}": "v",
    "keys_L{i}": "k",
    "queries_L{i}": "q",
    "last_layernorm": "ln_final_in",
    "input_ids": "embed_in",
    "input_embeddings": "embed",
    "resid_in_post_layernorm_{i}": "ln1",
}
_LAYER_IN_ALIAS = re.compile(r"(?:^blocks\.|\[|_L?)(\d+)(?=\.|\]|$)")

# easyroutine's names of one head's part: prefix -> component and what is made of it. {j} stands for a query head.
_HEAD_KEYS: dict[str, tuple[str, str | None]] = {
    "head_queries": ("q", None),
    "head_keys": ("k", None),
    "head_values": ("v", None),
    "pattern": ("pattern", None),
    "avg_attn_pattern": ("pattern", "mean"),
    "head_out": ("result", None),
    "projected_value": ("v_projected", None),
}
_HEAD_KEY = re.compile(rf"({'|'.join(_HEAD_KEYS)})_L(\d+)H(\d+)")
_FLAT_KEY = re.compile(r"(?:values|keys|queries)_L\d+")


def block_point(component: str, layer: int) -> HookPoint:
    """The hook point of a component in a block: ``block_point("pattern", 2).name == "blocks.2.attn.hook_pattern"``."""
    name, axes = _BLOCK_ROWS[component]
    return HookPoint(f"blocks.{layer}.{name}", layer, component, axes)


def components() -> list[str]:
    """The components that a block may have, in the order of a forward pass."""
    return list(_BLOCK_ROWS)


def component_name(name: str) -> str:
    """The component of a block that easyroutine's name without a number means; any other is returned as it is.

    >>> component_name("resid_out"), component_name("head_out"), component_name("attn_out")
    ('resid_post', 'result', 'attn_out')
    """
    return _HEAD_KEYS[name][0] if name in _HEAD_KEYS else _ALIASES.get(f"{name}_{{i}}", name)


def outer_point(component: str) -> HookPoint:
    """The hook point of a component outside the blocks: ``outer_point("embed").name == "hook_embed"``."""
    name, axes = _OUTER_ROWS[component]
    return HookPoint(name, None, component, axes)


def module_point(path: str, place: str, layer: int | None) -> HookPoint:
    """The raw escape hatch: ``place`` ("input" or "output") of the module at ``path``."""
    return HookPoint(f"{path}.{place}", layer, "module", ())


def in_forward_order(points: Iterable[HookPoint]) -> dict[str, HookPoint]:
    """The hook points by canonical name, in the order of a forward pass; raw modules last in their layer."""
    before, block, after = ([component for _, component, _ in rows] for rows in (_BEFORE, _BLOCK, _AFTER))

    def place(point: HookPoint) -> tuple[int, int, int]:
        if point.layer is not None:
            return 1, point.layer, block.index(point.component) if point.component in block else len(block)
        if point.component in before:
            return 0, 0, before.index(point.component)
        return 2, 0, after.index(point.component) if point.component in after else len(after)

    return {point.name: point for point in sorted(points, key=place)}


def canonical_name(name: str) -> str:
    """Translate another library's name or a short one ("embed"); any other is returned as it is.

    >>> canonical_name("layers_output[3]")
    'blocks.3.hook_resid_post'
    """
    outer = _ALIASES.get(name, name)
    if outer in _OUTER_ROWS:
        return outer_point(outer).name
    layer = _LAYER_IN_ALIAS.search(name)
    if layer is not None:
        component = _ALIASES.get(name[: layer.start(1)] + "{i}" + name[layer.end(1) :])
        if component is not None:
            return block_point(component, int(layer[1])).name
    return name


def axes_of(name: str) -> tuple[str, ...] | None:
    """The axes of what stands at a hook point, by any of its names; None for a name that is none.

    >>> axes_of("blocks.3.attn.hook_z")
    ('batch', 'pos', 'head', 'd_head')
    """
    name = canonical_name(name)
    inside = re.fullmatch(r"blocks\.\d+\.(.+)", name)
    rows = _OUTER_ROWS if inside is None else _BLOCK_ROWS
    return next((axes for spelled, axes in rows.values() if spelled == (inside[1] if inside else name)), None)


def short_name(component: str, layer: int | None = None) -> str:
    """The canonical name behind ``cache["pattern", 3]``.

    Raises:
        UnknownHookError: lists the components there are.
    """
    component = _SHORTHANDS.get(component, component)
    if layer is None and component in _OUTER_ROWS:
        return outer_point(component).name
    if layer is not None and component in _BLOCK_ROWS:
        return block_point(component, layer).name
    known = ", ".join(_BLOCK_ROWS if layer is not None else _OUTER_ROWS)
    where = "in a block" if layer is not None else "outside the blocks"
    raise UnknownHookError(f"Unknown component {component!r} {where}. There are: {known}.")


@dataclass(frozen=True)
class CacheKey:
    """What a key of an activation cache means.

    Args:
        name: the hook point's canonical name.
        head: the query head whose part is meant; of keys and values, the part that serves it. None for all.
        derived: what is made of the value: "mean" over the batch, "flat" with the heads of each position side by side,
            None for the value itself.
    """

    name: str
    head: int | None = None
    derived: str | None = None


def cache_key(key: str) -> CacheKey:
    """Read a key of an activation cache: a canonical name, an alias, or a key of easyroutine's.

    >>> cache_key("pattern_L3H2")
    CacheKey(name='blocks.3.attn.hook_pattern', head=2, derived=None)
    >>> cache_key("values_L3")
    CacheKey(name='blocks.3.attn.hook_v', head=None, derived='flat')

    What is none of these is returned as a name, as it is.
    """
    if match := _HEAD_KEY.fullmatch(key):
        component, derived = _HEAD_KEYS[match[1]]
        return CacheKey(block_point(component, int(match[2])).name, int(match[3]), derived)
    return CacheKey(canonical_name(key), None, "flat" if _FLAT_KEY.fullmatch(key) else None)


def expand_key(
    pattern: str, points: Mapping[str, HookPoint], heads: Mapping[str, Sequence[int]] | None = None
) -> list[tuple[str, CacheKey]]:
    """The keys that a pattern means among ``points``, spelled with numbers, by layer and then by head.

        expand_key("resid_out_{i}", model.hook_points)      # [("resid_out_0", CacheKey(...)), ("resid_out_1", ...
        expand_key("pattern_L{i}H{j}", model.hook_points)   # all heads of layer 0, then of layer 1, ...

    Args:
        pattern: a key; ``{i}`` in it, whatever the braces hold, stands for a number; ``*`` and ``?`` as in globs.
        points: what there is, by canonical name. What is made of a point (``head_out_L3H2`` of ``z``) counts as there.
        heads: the query heads there are of a name, where these are not all.

    Raises:
        UnknownHookError: for a pattern that means nothing here; lists what there is.
    """
    if not isinstance(pattern, str):
        raise UnknownHookError(f"A key is a string, not {type(pattern).__name__}.")
    ordered = in_forward_order(points.values())
    placeholders, globs = "{" in pattern, any(c in pattern for c in "*?")
    if not placeholders and not globs:
        key = cache_key(pattern)
        source = points.get(key.name) or points.get(_source(key.name))
        if source is None:
            raise unknown_point(pattern, dict(points))
        check_head(key, heads_of(source, heads), pattern)
        return [(pattern, key)]
    matcher = re.compile(_expression(pattern) if placeholders else fnmatch.translate(pattern))
    # A glob that reads as canonical names is not read as other libraries' names as well.
    for family in (_canonical_keys, _alias_keys, _head_keys):
        found = [
            (spelled, cache_key(spelled))
            for point in ordered.values()
            for spelled in family(point, heads_of(point, heads))
            if matcher.fullmatch(spelled)
        ]
        if found:
            return found
    raise unknown_point(pattern, dict(points))


def heads_of(point: HookPoint, heads: Mapping[str, Sequence[int]] | None = None) -> Sequence[int]:
    """The query heads of which a hook point has a part: those that were given, or all; none without a head axis."""
    if heads is not None and point.name in heads:
        return heads[point.name]
    return range((point.size("head") or 0) * point.group)


def check_head(key: CacheKey, heads: Sequence[int], spelled: str) -> None:
    """Refuse a head that is not among ``heads``.

    Raises:
        UnknownHookError: lists the heads there are.
    """
    if key.head is not None and key.head not in heads:
        listed = f"{heads[0]}-{heads[-1]}" if isinstance(heads, range) and heads else ", ".join(map(str, heads))
        raise UnknownHookError(f"Unknown head {key.head} in {spelled!r}: {key.name} has the heads {listed or 'none'}.")


def _expression(pattern: str) -> str:
    """A regular expression of a pattern with braces: a name in braces that comes twice is the same number twice."""
    seen: set[str] = set()
    parts = []
    for text in re.split(r"(\{\w*\})", pattern):
        name = text[1:-1]
        if not (text.startswith("{") and text.endswith("}")):
            parts.append(re.escape(text))
        elif not name.isidentifier():
            parts.append(r"\d+")
        else:
            parts.append(rf"(?P={name})" if name in seen else rf"(?P<{name}>\d+)")
            seen.add(name)
    return "".join(parts)


def _canonical_keys(point: HookPoint, heads: Sequence[int]) -> Iterable[str]:
    return chain([point.name], (derived.name for derived in _derived(point)))


def _alias_keys(point: HookPoint, heads: Sequence[int]) -> Iterable[str]:
    return (alias.replace("{i}", str(point.layer)) for alias, c in _ALIASES.items() if c == point.component)


def _head_keys(point: HookPoint, heads: Sequence[int]) -> Iterable[str]:
    components = {point.component, *(derived.component for derived in _derived(point))}
    for prefix, (component, _) in _HEAD_KEYS.items():
        if component in components:
            yield from (f"{prefix}_L{point.layer}H{head}" for head in heads)


def _derived(point: HookPoint) -> list[HookPoint]:
    """The points that are made of this one."""
    layer = point.layer
    return (
        [] if layer is None else [block_point(c, layer) for c, source in DERIVED.items() if source == point.component]
    )


def _source(name: str) -> str:
    """The canonical name of what a derived point is made of; of any other, its own."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    component = next((c for c in DERIVED if match and match[2] == _BLOCK_ROWS[c][0]), None)
    return name if match is None or component is None else block_point(DERIVED[component], int(match[1])).name


NamesFilter = str | Sequence[str] | Callable[[str], bool] | None


def select(points: dict[str, HookPoint], names_filter: NamesFilter) -> list[HookPoint]:
    """The points that a filter means, in forward order.

    Args:
        points: what the model has, by canonical name.
        names_filter: None (all), a name or alias, a glob (``"blocks.*.hook_resid_post"``), a list of these, or a
            predicate on the canonical name.

    Raises:
        UnknownHookError: for a name that the model lacks and for a glob or predicate that selects nothing.
    """
    if names_filter is None:
        return list(points.values())
    if callable(names_filter):
        chosen = {name for name in points if names_filter(name)}
        if not chosen:
            raise UnknownHookError(f"The predicate selects none of the {len(points)} hook points. {_overview(points)}")
        return [points[name] for name in points if name in chosen]
    chosen = set()
    for name in [names_filter] if isinstance(names_filter, str) else names_filter:
        if not isinstance(name, str):
            raise UnknownHookError(f"A hook-point name is a string, not {type(name).__name__}.")
        canonical = canonical_name(name)
        if canonical in points:
            chosen.add(canonical)
            continue
        matching = fnmatch.filter(points, canonical) if any(c in canonical for c in "*?") else []
        if not matching:
            raise unknown_point(name, points)
        chosen.update(matching)
    return [points[name] for name in points if name in chosen]


def unknown_point(name: str, points: dict[str, HookPoint]) -> UnknownHookError:
    """The error for a name that ``points`` lacks: nearest name, and what there is; of a derived one, how it is got."""
    key = cache_key(name)
    if (source := _source(key.name)) != key.name:
        return UnknownHookError(
            f"{name!r} is made of {source}, no module emits it: HookedModel.forward with extract_head_out or "
            f"extract_head_values_projected keeps it. {_overview(points)}",
            field="hook_point",
        )
    near = difflib.get_close_matches(name, points, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]}?" if near else ""
    return UnknownHookError(f"Unknown hook point {name!r}.{hint} {_overview(points)}", field="hook_point")


def _overview(points: Iterable[str]) -> str:
    """What there is, with each block's names written once: ``blocks.{0-3}.hook_resid_pre, ...``."""
    names = list(points)
    if not names:
        return "There are none."
    layers = sorted({int(n.split(".")[1]) for n in names if n.startswith("blocks.")})
    rows = dict.fromkeys(re.sub(r"^blocks\.\d+", "blocks.{i}", n) for n in names)
    span = f" Layers (i): {layers[0]}-{layers[-1]}." if layers else ""
    return f"There are: {', '.join(rows)}.{span}"


# ---------------------------------------------------------------------------------------------------------------------
# The REST vocabulary: layer_name + component.


@dataclass(frozen=True)
class Component:
    """What a REST component means: components of a block at its output and at its input (None: it has no input)."""

    output: tuple[str, ...]
    input: tuple[str, ...] | None


COMPONENTS = {
    "residual": Component(("resid_post",), ("resid_pre",)),
    "attention": Component(("attn_out",), ("attn_in",)),
    "mlp": Component(("mlp_out",), ("mlp_in",)),
    "embedding": Component(("embed",), ("embed_in",)),
    "layernorm": Component(("ln1", "ln1_post", "ln2", "ln2_post"), ("ln1_in", "ln2_in")),
    "query": Component(("rot_q",), None),
    "key": Component(("rot_k",), None),
    "value": Component(("v",), None),
    "attention_scores": Component(("attn_scores",), None),
    "attention_pattern": Component(("pattern",), None),
}

EMBEDDING_NAMES = (
    "transformer.wte",
    "model.embed_tokens",
    "model.wte",
    "wte",
    "embed_tokens",
    "embed",
    "hook_embed",
)
FINAL_NORM_NAMES = ("transformer.ln_f", "model.norm", "model.ln_f", "ln_f", "norm", "ln_final")
NORM_NAMES = {
    "ln1": "ln1",
    "ln_1": "ln1",
    "input_layernorm": "ln1",
    "ln2": "ln2",
    "ln_2": "ln2",
    "post_attention_layernorm": "ln2",
    "ln1_post": "ln1_post",
    "pre_feedforward_layernorm": "ln2",
    "ln2_post": "ln2_post",
    "post_feedforward_layernorm": "ln2_post",
}
"""What a norm is called where the architecture itself calls none by that name."""

_EVERY_BLOCK = re.compile(r"(?:(?:transformer\.h|model\.layers|model\.h|layers|blocks|h)\.)?\*(?:\.\w+)?")
_BLOCK_NAME = re.compile(r"(?:(?:transformer\.h|model\.layers|model\.h|layers|blocks|h)\.)?(0|[1-9][0-9]*)(?:\.(\w+))?")


@dataclass(frozen=True)
class LayerName:
    """A parsed ``layer_name``: ``place`` is "block", "embedding" or "final_norm"; ``norm`` is set when it names one."""

    place: str
    layer: int | None = None
    norm: str | None = None


def is_layer_glob(name: str) -> bool:
    """Whether a layer name means every block: ``*``, ``transformer.h.*``, ``blocks.*``, ``transformer.h.*.ln_1``."""
    return _EVERY_BLOCK.fullmatch(name) is not None


def parse_layer_name(name: str, n_layers: int) -> LayerName:
    """Read a layer name in any of its accepted spellings.

    >>> parse_layer_name("transformer.h.5", n_layers=12)
    LayerName(place='block', layer=5, norm=None)

    Raises:
        UnknownHookError: lists the spellings and the layers there are.
    """
    if name in EMBEDDING_NAMES:
        return LayerName("embedding")
    if name in FINAL_NORM_NAMES:
        return LayerName("final_norm")
    match = _BLOCK_NAME.fullmatch(name)
    if match and int(match[1]) < n_layers:
        norm = NORM_NAMES.get(match[2] or "")
        if match[2] is None or norm is not None:
            return LayerName("block", int(match[1]), norm)
    last = n_layers - 1
    raise UnknownHookError(
        f"Unknown layer {name!r}. Blocks: transformer.h.0 to transformer.h.{last} (also model.layers.{last}, "
        f"layers.{last}, blocks.{last}, {last}), all of them: * or transformer.h.*; "
        "embedding: transformer.wte or model.embed_tokens; last norm: "
        f"transformer.ln_f or model.norm; one norm of a block: transformer.h.{last}.ln_1, transformer.h.{last}.ln_2.",
        field="layer_name",
    )


def component_points(
    layer_name: str,
    component: str,
    *,
    is_input: bool,
    n_layers: int,
    own_norm: Callable[[int, str], str | None] | None = None,
) -> list[HookPoint]:
    """The hook points that ``layer_name`` + ``component`` mean at a module's output or input.

    Args:
        own_norm: says which norm the architecture itself calls so: (layer, name of a block's child) -> "ln1_post".

    Raises:
        UnknownHookError: for an unknown layer or component, or a component that this layer does not have.
    """
    if component not in COMPONENTS:
        raise UnknownHookError(
            f"Unknown component {component!r}. There are: {', '.join(COMPONENTS)}.", field="component"
        )
    layer = parse_layer_name(layer_name, n_layers)
    side = COMPONENTS[component].input if is_input else COMPONENTS[component].output
    if side is None:
        raise UnknownHookError(
            f"Component {component!r} has no input to capture: set capture_input to false. "
            f"With input: {', '.join(c for c, row in COMPONENTS.items() if row.input)}.",
            field="capture_input",
        )
    home = {"embedding": "embedding", "layernorm": "final_norm"}.get(component)
    if layer.place == "embedding" and component == "embedding":
        return [outer_point(name) for name in side]
    if layer.place == "final_norm" and component == "layernorm":
        return [outer_point("ln_final_in" if is_input else "ln_final")]
    if layer.place == "block" and component == "layernorm":
        norm = layer.norm if own_norm is None else own_norm(_index(layer), layer_name.rpartition(".")[2]) or layer.norm
        chosen = [name for name in side if layer.norm is None or norm == name.removesuffix("_in")]
        return [block_point(name, _index(layer)) for name in chosen]
    if layer.place == "block" and layer.norm is None and component != "embedding":
        return [block_point(name, _index(layer)) for name in side]
    allowed = "transformer.wte" if home == "embedding" else f"a block, transformer.h.0 to transformer.h.{n_layers - 1}"
    raise UnknownHookError(f"{layer_name!r} has no component {component!r}: ask it of {allowed}.", field="component")


def rest_name(point: HookPoint) -> tuple[str, str, bool]:
    """What the REST vocabulary calls a hook point: layer_name, component, and whether it is a module's input.

    >>> rest_name(block_point("pattern", 2))
    ('blocks.2', 'attention_pattern', False)

    A point for which it has no word keeps its own: the component is the short name.
    """
    layer_name = point.name if point.layer is None else f"blocks.{point.layer}"
    for place, names in (("embed", ("embed", "embed_in")), ("ln_final", ("ln_final", "ln_final_in"))):
        if point.component in names and point.layer is None:
            word = "embedding" if place == "embed" else "layernorm"
            return place, word, point.component.endswith("_in")
    for word, row in COMPONENTS.items():
        if point.component in (*row.output, *(row.input or ())):
            return layer_name, word, point.component not in row.output
    return layer_name, point.component, point.component == "module" and point.name.endswith(".input")


def _index(layer: LayerName) -> int:
    assert layer.layer is not None
    return layer.layer
