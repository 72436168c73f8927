"""What follows from the names: sublayers, heads, projections, neurons, experts."""

from collections.abc import Iterator
from typing import Any

import mlx.nn as nn

from .config import n_rows
from .exceptions import (
    BLOCKS_NOT_CALLED,
    GATE_SECOND,
    GROUPED_PROJECTIONS,
    HAND_WRITTEN,
    INTERLEAVED_GATE,
    PLAIN_SUMS,
    READS_OTHER_KEYS,
    ROUTING_INSIDE,
    SCORES_ONLY,
    TILED_VALUES,
    WEIGHTED_INPUT,
)
from .names import (
    EXPERTS,
    EXPERTS_INSIDE,
    FUSED,
    KEYS,
    MARKS_OF_A_MIXER,
    MIXING,
    MLPS,
    MLPS_OF_BLOCK,
    N_HEADS,
    N_KEY_VALUE_HEADS,
    NORM_OF_TWO_MEANINGS,
    NORMS_AFTER_MIXING,
    NORMS_AFTER_MLP,
    NORMS_BEFORE_MIXING,
    NORMS_BEFORE_MLP,
    NORMS_INSIDE_MLP,
    OUTPUTS,
    QUERIES,
    ROUTER_PROJECTIONS,
    ROUTERS,
    SHARED_KEYS,
    VALUES,
)
from .places import Location, Sublayer
from .views import Columns, Grouped, Heads, Tiled, Transposed


def child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    """The first submodule of these names, which may be paths ("attn.attention")."""
    for name in names:
        found: Any = module
        for part in name.split("."):
            found = found.get(part) if isinstance(found, nn.Module) else None
        if isinstance(found, nn.Module):
            return found
    return None


def first_of(*modules: Any) -> Any:
    """The first that is there. (A module without weights or children is an empty dict: ``or`` would pass it by.)"""
    return next((module for module in modules if module is not None), None)


def source(module: nn.Module) -> str:
    """The mlx-lm module that defines a class: ``"gemma2"``."""
    return type(module).__module__.rpartition(".")[2]


def form(block: nn.Module) -> str:
    """The name of a block in the tables of unusual sums; empty where its configuration leaves them out."""
    origin = source(block)
    return "" if PLAIN_SUMS.get(origin, lambda block: False)(block) else origin


def sublayers_of(block: nn.Module) -> list[Sublayer]:
    """What a block adds to the stream, in the order of its call."""
    before_mlp, after_mlp = child(block, NORMS_BEFORE_MLP), child(block, NORMS_AFTER_MLP)
    after_mixing = child(block, NORMS_AFTER_MIXING)
    unclear = block.get(NORM_OF_TWO_MEANINGS)
    norms_before_mlp: list[Any] = unclear if isinstance(unclear, list) else [first_of(before_mlp, unclear)]
    if isinstance(unclear, nn.Module) and after_mixing is None and first_of(before_mlp, after_mlp) is not None:
        after_mixing, norms_before_mlp = unclear, [before_mlp]
    first = block.get("input_layernorm")
    norms_before_mixing = first if isinstance(first, list) else [child(block, NORMS_BEFORE_MIXING)]

    mixing: list[tuple[str, nn.Module]] = []
    mlps: list[tuple[str, nn.Module]] = []
    for module in _several(block, MIXING):
        kind = _kind(module)
        (mlps if kind == "mlp" else mixing).append((kind, module))
    shortcut = block["mlp"] if isinstance(block.get("mlps"), list) else None
    mlps += [
        ("mlp", m)
        for m in _several(block, MLPS_OF_BLOCK)
        if all(m is not old for _, old in [*mixing, *mlps, ("", shortcut)])
    ]
    if len(norms_before_mlp) < 2 and not mixing:
        norms_before_mlp = [first_of(before_mlp, unclear, norms_before_mixing[0])]
    layers = []
    for i in range(max(len(mixing), len(mlps))):
        if i < len(mixing):
            kind, module = mixing[i]
            norm = norms_before_mixing[min(i, len(norms_before_mixing) - 1)]
            layers.append(Sublayer(kind, module, before=norm, after=after_mixing, ends=ends_of_open(module)))
        if i < len(mlps):
            norm = norms_before_mlp[min(i, len(norms_before_mlp) - 1)]
            layers.append(Sublayer(*mlps[i], before=norm, after=after_mlp))
    if shortcut is not None:
        layers.append(Sublayer("side", shortcut))
    if not layers and "attn_out" in block:  # attention and MLP are written out in the block itself
        return [
            Sublayer("attn", block, norms_before_mixing[0], ends=(block.att_proj, block.attn_out)),
            Sublayer("mlp", block, before_mlp, ends=(block.ff_proj, block.ff_out)),
        ]
    return layers


def ends_of_open(attn: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    first, last = child(attn, QUERIES), child(attn, OUTPUTS)
    return (first, last) if source(attn) in BLOCKS_NOT_CALLED and first and last else None


def _several(block: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    """The submodules of these names in order; a list of modules counts as several."""
    found: list[nn.Module] = []
    for name in names:
        entry = block.get(name) if "." not in name else child(block, (name,))
        for module in entry if isinstance(entry, list) else [entry]:
            # A module that only holds a known one ("attn" of "attn.attention") is not called itself.
            holds = isinstance(module, nn.Module) and any(
                other is not module and other in list(module.children().values()) for other in found
            )
            if isinstance(module, nn.Module) and not holds and all(module is not other for other in found):
                found.append(module)
    return found


def _kind(module: nn.Module) -> str:
    if child(module, MARKS_OF_A_MIXER) is not None:
        return "mixer"
    is_attention = child(module, QUERIES + FUSED) is not None and child(module, (*OUTPUTS, "o_b_proj")) is not None
    return (
        "attn" if is_attention else "mlp" if mlp_roles(module) or any(name in module for name in EXPERTS) else "mixer"
    )


def sublayer_locations(sublayer: Sublayer) -> Iterator[tuple[str, Location]]:
    kind, module = sublayer.kind, sublayer.module
    if kind == "side":
        yield from _mlp_locations(module)
        return
    norm = "ln2" if kind == "mlp" else "ln1"
    yield f"{kind}_in", Location(sublayer.first, "input")
    if sublayer.before is not None:
        yield f"{norm}_in", Location(sublayer.before, "input")
        yield norm, Location(sublayer.before, "output")
    if sublayer.after is not None:
        yield f"{norm}_post", Location(sublayer.after, "output")
    if kind == "attn":
        yield from _attention_locations(module)
    elif kind == "mlp":
        yield from _mlp_locations(module)
    elif set(module.children()) != {"linear"}:
        yield "mixer_state", Location(module, "state")


def head_sizes(attn: nn.Module) -> tuple[int, int, int]:
    """Query heads, key-value heads and width of a head."""
    n_heads = _attribute(attn, N_HEADS)
    n_kv = _attribute(attn, N_KEY_VALUE_HEADS) or n_heads
    queries, fused = child(attn, QUERIES), child(attn, FUSED)
    d_head = getattr(attn, "head_dim", None) or getattr(attn, "q_head_dim", None) or getattr(attn, "qk_head_dim", None)
    if not isinstance(d_head, int):
        if queries is not None:
            d_head = n_rows(queries) // n_heads
        else:
            assert fused is not None
            d_head = n_rows(fused) // (n_heads + 2 * n_kv)
    keys = child(attn, KEYS)
    if keys is not None:
        n_kv = n_rows(keys) // d_head
    return n_heads, n_kv, d_head


def _attention_locations(attn: nn.Module) -> Iterator[tuple[str, Location]]:
    hand_written = HAND_WRITTEN.get(source(attn), lambda attn: False)(attn)
    n_heads, n_kv, d_head = head_sizes(attn)
    yield from _projection_locations(attn, n_heads, n_kv, d_head)
    yield "attn_scores", Location(attn, "scores")
    yield "pattern", Location(attn, "pattern")
    if any(name in attn for name in ("sinks", "attention_sink_bias")):
        yield "sink", Location(attn, "sink", why_not="it is what the pattern's rows lack of 1: edit the pattern")
    if hand_written or source(attn) in BLOCKS_NOT_CALLED:
        rope, out = child(attn, ("rope",)), child(attn, OUTPUTS)
        assert rope is not None
        assert out is not None
        yield "rot_q", Location(rope, "output", Transposed(), every=2, nth=0)
        yield "rot_k", Location(rope, "output", Transposed(), every=2, nth=1)
        values = value_location(attn)
        assert values is not None
        yield "v", values
        yield "z", Location(out, "input", Heads(n_heads, d_head))
        return
    latent = "embed_q" in attn
    why_not = "keys and values are kept as one latent: edit hook_q, the pattern or hook_z" if latent else ""
    yield "rot_q", Location(attn, "q", Transposed(), why_not=why_not)
    has_keys = child(attn, KEYS + FUSED) is not None
    if getattr(attn, SHARED_KEYS, False) or (source(attn) in READS_OTHER_KEYS and not has_keys):
        why_not = "these are the keys and values of an earlier layer: edit them there"
    for component, place in [("rot_k", "k"), ("v", "v")]:
        view = Tiled(n_kv) if source(attn) in TILED_VALUES else Transposed()
        yield component, Location(attn, place, view, why_not=why_not)
    yield "z", Location(attn, "z", Transposed())


def _projection_locations(attn: nn.Module, n_heads: int, n_kv: int, d_head: int) -> Iterator[tuple[str, Location]]:
    queries, keys, fused = child(attn, QUERIES), child(attn, KEYS), child(attn, FUSED)
    if queries is not None:
        # Twice as wide: each head's query is followed by its gate.
        gated = n_rows(queries) == 2 * n_heads * d_head
        yield "q", Location(queries, "output", Heads(n_heads, d_head, stride=2 * d_head if gated else 0))
        if keys is not None and not getattr(attn, SHARED_KEYS, False):
            yield "k", Location(keys, "output", Heads(n_kv, d_head))
        return
    assert fused is not None
    if source(attn) in GROUPED_PROJECTIONS:
        group = n_heads // n_kv + 2
        yield "q", Location(fused, "output", Grouped(n_kv, n_heads // n_kv, d_head))
        yield "k", Location(fused, "output", Heads(n_kv, d_head, (group - 2) * d_head, group * d_head))
    elif isinstance(getattr(fused, "output_dims", None), list):
        yield "q", Location(fused, "output", Heads(n_heads, d_head))
        yield "k", Location(fused, "output", Heads(n_kv, d_head), index=1)
    else:
        yield "q", Location(fused, "output", Heads(n_heads, d_head))
        yield "k", Location(fused, "output", Heads(n_kv, d_head, start=n_heads * d_head))


def value_location(attn: nn.Module) -> Location | None:
    """The projection whose output holds the values; None where names show none."""
    n_heads, n_kv, d_head = head_sizes(attn)
    values, fused = child(attn, VALUES), child(attn, FUSED)
    if values is not None:
        return Location(values, "output", Heads(n_kv, d_head))
    if fused is None:
        return None
    if source(attn) in GROUPED_PROJECTIONS:
        group = n_heads // n_kv + 2
        return Location(fused, "output", Heads(n_kv, d_head, (group - 1) * d_head, group * d_head))
    if isinstance(getattr(fused, "output_dims", None), list):
        return Location(fused, "output", Heads(n_kv, d_head), index=2)
    return Location(fused, "output", Heads(n_kv, d_head, start=(n_heads + n_kv) * d_head))


def mlp_roles(mlp: nn.Module) -> dict[str, nn.Module]:
    for names in MLPS:
        found = {role: mlp.get(name) for role, name in names.items()}
        if all(isinstance(module, nn.Module) for module in found.values()) and not child(mlp, EXPERTS):
            return {role: module for role, module in found.items() if module is not None}
    return {}


def _mlp_locations(mlp: nn.Module) -> Iterator[tuple[str, Location]]:
    if any(name in mlp for name in EXPERTS):
        yield from expert_locations(mlp)
        return
    roles = mlp_roles(mlp)
    if not roles:
        return
    if "gate_up" in roles:
        width = n_rows(roles["gate_up"]) // 2
        first, second = Columns(0, width), Columns(width, 2 * width)
        gate, up = (second, first) if source(mlp) in GATE_SECOND else (first, second)
        yield "mlp_pre", Location(roles["gate_up"], "output", gate)
        yield "mlp_pre_linear", Location(roles["gate_up"], "output", up)
    elif "gate" in roles:
        yield "mlp_pre", Location(roles["gate"], "output")
        yield "mlp_pre_linear", Location(roles["up"], "output")
    elif source(mlp) in INTERLEAVED_GATE:
        width = n_rows(roles["up"])
        yield "mlp_pre", Location(roles["up"], "output", Columns(0, width, 2))
        yield "mlp_pre_linear", Location(roles["up"], "output", Columns(1, width, 2))
    else:
        yield "mlp_pre", Location(roles["up"], "output")
    yield "mlp_post", Location(first_of(child(mlp, NORMS_INSIDE_MLP), roles["down"]), "input")


def expert_locations(moe: nn.Module) -> Iterator[tuple[str, Location]]:
    experts, router = moe.get("switch_mlp", moe.get("experts")), child(moe, ROUTERS)
    if router is None:
        return
    # Adapters keep the projection that they wrap.
    projection_itself = router.get("linear", router)
    plain = isinstance(projection_itself, nn.Linear | nn.QuantizedLinear) or source(router) in SCORES_ONLY
    inside_layer = source(moe) in ROUTING_INSIDE
    projection = router if plain else child(router, ROUTER_PROJECTIONS)
    if projection is not None:
        yield "router_scores", Location(projection, "output")
    else:
        yield "router_scores", Location(moe if inside_layer else router, "logits")
    if not isinstance(experts, nn.Module):
        # A list of experts: UNSUPPORTED says why.
        for component in ("expert_indices", "expert_out", "expert_weights"):
            yield component, Location(moe, "output")
        return
    inside = first_of(child(experts, EXPERTS_INSIDE), experts)
    if plain or inside_layer:
        yield "expert_indices", Location(experts, "input", index=1)
        weighted_input = source(moe) in WEIGHTED_INPUT
        yield "expert_weights", Location(moe, "input weights") if weighted_input else Location(inside, "weights")
    else:
        yield "expert_indices", Location(router, "output")
        yield "expert_weights", Location(router, "output", index=1)
    yield "expert_out", Location(inside, "output")


def _attribute(module: nn.Module, names: tuple[str, ...]) -> int:
    return next((int(getattr(module, name)) for name in names if isinstance(getattr(module, name, None), int)), 0)
