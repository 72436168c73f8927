"""Where each hook point lives in an mlx-lm module tree: tables of shapes, matched whole or refused.

A *shape* is the exact set of submodules that a kind of module has, with the role of each. A module that matches no
shape is an error that lists its children: nothing is guessed from one attribute name. What a shape cannot show
(a multiplier between a module and the stream, say) is checked by running the model: see ``HookedModel``.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from . import hook_points
from .errors import UnknownHookError, UnsupportedModelError
from .hook_points import HookPoint


@dataclass(frozen=True)
class Shape:
    """The submodules that a kind of module has: child name -> role. Children in ``unhooked`` must or may be there."""

    roles: dict[str, str]
    unhooked: frozenset[str] = field(default=frozenset())


# The module that holds the blocks, next to the list of blocks itself.
TRUNKS = [
    Shape({"embed_tokens": "embed", "norm": "ln_final"}),
    Shape({"wte": "embed", "wpe": "pos_embed", "ln_f": "ln_final"}),
]
BLOCKS = [
    Shape({"input_layernorm": "ln1", "self_attn": "attn", "post_attention_layernorm": "ln2", "mlp": "mlp"}),
    Shape({"ln_1": "ln1", "attn": "attn", "ln_2": "ln2", "mlp": "mlp"}),
]
ATTENTIONS = [
    Shape({"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o"}, frozenset({"rope", "q_norm", "k_norm"})),
    Shape({"c_attn": "qkv", "c_proj": "o"}),
]
MLPS = [
    Shape({"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}),
    Shape({"c_fc": "up", "c_proj": "down"}),
]

# What mlx-lm's ModelArgs call a number; the first that is there counts.
CONFIG_NAMES = {
    "d_model": ("hidden_size", "n_embd"),
    "n_heads": ("num_attention_heads", "n_head"),
    "d_vocab": ("vocab_size",),
}
MAX_POSITIONS = ("max_position_embeddings", "n_positions")


@dataclass(frozen=True)
class ModelConfig:
    """A model's sizes, by the field's names. ``quantization`` is None or mlx-lm's ``{"group_size", "bits", ...}``."""

    model_type: str
    n_layers: int
    d_model: int
    n_heads: int
    n_key_value_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    max_positions: int | None
    quantization: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values."""
        return asdict(self)


class View(Protocol):
    """How a hook point's value lies in what a module takes or gives; ``read`` and ``write`` are inverse."""

    def read(self, array: mx.array) -> mx.array: ...
    def write(self, array: mx.array, value: mx.array) -> mx.array: ...


@dataclass(frozen=True)
class Whole:
    """The array itself."""

    def read(self, array: mx.array) -> mx.array:
        return array

    def write(self, array: mx.array, value: mx.array) -> mx.array:
        return value


@dataclass(frozen=True)
class Heads:
    """Columns ``start:start + n_heads * d_head`` of [batch, pos, features], seen as [batch, pos, head, d_head]."""

    n_heads: int
    d_head: int
    start: int = 0

    def read(self, array: mx.array) -> mx.array:
        stop = self.start + self.n_heads * self.d_head
        return array[..., self.start : stop].reshape(*array.shape[:-1], self.n_heads, self.d_head)

    def write(self, array: mx.array, value: mx.array) -> mx.array:
        stop = self.start + self.n_heads * self.d_head
        flat = value.reshape(*array.shape[:-1], stop - self.start)
        return mx.concatenate([array[..., : self.start], flat, array[..., stop:]], axis=-1)


@dataclass(frozen=True)
class Transposed:
    """The kernel's [batch, head, pos, d_head], seen as [batch, pos, head, d_head]."""

    def read(self, array: mx.array) -> mx.array:
        return array.transpose(0, 2, 1, 3)

    def write(self, array: mx.array, value: mx.array) -> mx.array:
        return value.transpose(0, 2, 1, 3)


@dataclass(frozen=True)
class Location:
    """Where a hook point is met: a module, the place in its call, and how its value lies there.

    ``place`` is "input" or "output" of the module's call, or, for attention modules, what the kernel gets or makes:
    "q", "k", "v", "scores", "pattern", "z". "mid" is the residual stream formed by adding the module's output: it is
    edited there, and read at the input of ``reader``.
    """

    module: nn.Module
    place: str
    view: View = field(default_factory=Whole)
    reader: nn.Module | None = None


class Architecture:
    """The hook points of one loaded model and where each of them lives.

    Args:
        model: a model made by mlx-lm: it has ``layers`` and maps token ids to logits.

    Raises:
        UnsupportedModelError: when a module matches none of the shapes; its children are listed.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise UnsupportedModelError(f"A model loaded by mlx_lm is expected, got {type(model).__name__}.")
        self.model = model
        self.modules: dict[str, nn.Module] = dict(model.named_modules())
        blocks = getattr(model, "layers", None)
        if not isinstance(blocks, list) or not blocks:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no list of blocks called 'layers': load it with mlx_lm."
            )
        if not hasattr(model, "args") or len({id(block) for block in blocks}) < len(blocks):
            what = "runs a block more than once" if hasattr(model, "args") else "has no 'args', as mlx-lm's models have"
            raise UnsupportedModelError(f"{type(model).__name__} {what}: it cannot be hooked.")
        self.blocks = blocks
        first = next((path for path, module in self.modules.items() if module is blocks[0]), None)
        if first is None:
            raise UnsupportedModelError(f"The blocks of {type(model).__name__} are not in its module tree.")
        self.blocks_path = first.rsplit(".", 1)[0]
        trunk_path = self.blocks_path.rpartition(".")[0]
        self.trunk = self.modules[trunk_path] if trunk_path else model
        self.roles = _match(self.trunk, TRUNKS, "trunk", ignore=frozenset({self.blocks_path.rpartition(".")[2]}))
        self.locations: dict[HookPoint, Location] = {}
        for layer, block in enumerate(blocks):
            self.locations.update(_block_locations(layer, block, model.args))
        self.locations.update(self._outer_locations())
        self.points = hook_points.in_forward_order(self.locations.__contains__, len(blocks))
        self.cfg = self._config()

    def _outer_locations(self) -> Iterator[tuple[HookPoint, Location]]:
        embed, ln_final = self.roles["embed"], self.roles["ln_final"]
        yield hook_points.outer_point("embed_in"), Location(embed, "input")
        yield hook_points.outer_point("embed"), Location(embed, "output")
        if "pos_embed" in self.roles:
            yield hook_points.outer_point("pos_embed"), Location(self.roles["pos_embed"], "output")
        yield hook_points.outer_point("ln_final_in"), Location(ln_final, "input")
        yield hook_points.outer_point("ln_final"), Location(ln_final, "output")
        yield hook_points.outer_point("logits"), Location(self.model, "output")

    def is_current(self, path: str, module: nn.Module) -> bool:
        """Whether the module at a path is still the one that it was when the model was wrapped."""
        found: Any = self.model
        for part in path.split(".") if path else []:
            try:
                found = found[int(part)] if isinstance(found, list) else found[part]
            except (KeyError, IndexError):
                return False
        return found is module

    def locate(self, name: str) -> HookPoint | None:
        """The hook point of a raw module path (``model.layers.5.self_attn.q_proj``, ``....input``), or None.

        A path alone means the module's output.
        """
        path, _, place = name.rpartition(".")
        if place not in ("input", "output"):
            path, place = name, "output"
        if not path or path not in self.modules:
            return None
        layer = path.removeprefix(self.blocks_path + ".").split(".")[0] if path.startswith(self.blocks_path) else ""
        point = hook_points.module_point(path, place, int(layer) if layer.isdigit() else None)
        self.locations.setdefault(point, Location(self.modules[path], place))
        return point

    def location(self, point: HookPoint) -> Location:
        """Where a hook point lives.

        Raises:
            UnknownHookError: a raw module that the model no longer has.
        """
        if point not in self.locations:
            self.locate(point.name)
        if point not in self.locations:
            raise UnknownHookError(f"The model has no module for {point.name} any more: make a new HookedModel.")
        return self.locations[point]

    def unembed(self, residual: mx.array) -> mx.array:
        """Logits [..., d_vocab] of residual-stream values [..., d_model]: the model's own last norm and unembedding."""
        normalized = self.roles["ln_final"](residual)
        if "lm_head" in self.model:
            return self.model.lm_head(normalized)
        return self.roles["embed"].as_linear(normalized)

    def _config(self) -> ModelConfig:
        args = self.model.args
        mlp = _match(_match(self.blocks[0], BLOCKS, "block")["mlp"], MLPS, "MLP")
        return ModelConfig(
            model_type=args.model_type,
            n_layers=len(self.blocks),
            d_model=_number(args, "d_model"),
            n_heads=_n_heads(args)[0],
            n_key_value_heads=_n_heads(args)[1],
            d_head=_d_head(args),
            d_mlp=_n_rows(mlp["up"]),
            d_vocab=_number(args, "d_vocab"),
            max_positions=next((n for a in MAX_POSITIONS if (n := getattr(args, a, None)) is not None), None),
            quantization=_quantization(self.modules),
        )


def _block_locations(layer: int, block: nn.Module, args: Any) -> Iterator[tuple[HookPoint, Location]]:
    def at(component: str, module: nn.Module, place: str, view: View | None = None) -> tuple[HookPoint, Location]:
        return hook_points.block_point(component, layer), Location(module, place, view or Whole())

    roles = _match(block, BLOCKS, "block")
    attn, mlp = roles["attn"], roles["mlp"]
    yield at("resid_pre", block, "input")
    yield at("resid_post", block, "output")
    yield hook_points.block_point("resid_mid", layer), Location(attn, "mid", reader=roles["ln2"])
    for norm in ("ln1", "ln2"):
        yield at(f"{norm}_in", roles[norm], "input")
        yield at(norm, roles[norm], "output")
    for sublayer in ("attn", "mlp"):
        yield at(f"{sublayer}_in", roles[sublayer], "input")
        yield at(f"{sublayer}_out", roles[sublayer], "output")

    projections = _match(attn, ATTENTIONS, "attention")
    d_head = _d_head(args)
    n_heads, n_kv = _n_heads(args)
    if "qkv" in projections:
        yield at("q", projections["qkv"], "output", Heads(n_heads, d_head))
        yield at("k", projections["qkv"], "output", Heads(n_kv, d_head, start=n_heads * d_head))
    else:
        yield at("q", projections["q"], "output", Heads(n_heads, d_head))
        yield at("k", projections["k"], "output", Heads(n_kv, d_head))
    for component, place in [("rot_q", "q"), ("rot_k", "k"), ("v", "v"), ("z", "z")]:
        yield at(component, attn, place, Transposed())
    yield at("attn_scores", attn, "scores")
    yield at("pattern", attn, "pattern")

    linears = _match(mlp, MLPS, "MLP")
    if "gate" in linears:
        yield at("mlp_pre", linears["gate"], "output")
        yield at("mlp_pre_linear", linears["up"], "output")
    else:
        yield at("mlp_pre", linears["up"], "output")
    yield at("mlp_post", linears["down"], "input")


def _match(
    module: nn.Module, shapes: list[Shape], kind: str, ignore: frozenset[str] = frozenset()
) -> dict[str, nn.Module]:
    """Role -> submodule, for the one shape whose children are exactly the module's."""
    # children() also lists plain lists and dicts that hold no module.
    children = {name for name, child in module.children().items() if _holds_module(child)} - ignore
    for shape in shapes:
        if set(shape.roles) == children - shape.unhooked:
            return {role: module[name] for name, role in shape.roles.items()}
    known = " or ".join("{" + ", ".join(shape.roles) + "}" for shape in shapes)
    raise UnsupportedModelError(
        f"{type(module).__module__}.{type(module).__name__} is not a known kind of {kind}: it has "
        f"{{{', '.join(sorted(children))}}}, known are {known}."
    )


def _holds_module(child: Any) -> bool:
    if isinstance(child, nn.Module):
        return True
    inner = child.values() if isinstance(child, dict) else child if isinstance(child, list) else []
    return any(_holds_module(entry) for entry in inner)


def _number(args: Any, ours: str) -> Any:
    """A number of the configuration under whichever name the architecture has for it."""
    for name in CONFIG_NAMES[ours]:
        if getattr(args, name, None) is not None:
            return getattr(args, name)
    raise UnsupportedModelError(
        f"{type(args).__module__} says none of {', '.join(CONFIG_NAMES[ours])}: {ours} is unknown."
    )


def _n_heads(args: Any) -> tuple[int, int]:
    n_heads = _number(args, "n_heads")
    return n_heads, getattr(args, "num_key_value_heads", None) or n_heads


def _d_head(args: Any) -> int:
    return getattr(args, "head_dim", None) or _number(args, "d_model") // _n_heads(args)[0]


def _n_rows(linear: nn.Module) -> int:
    """Width of a projection's output. Quantisation packs columns of a weight, not rows; LoRA wraps the projection."""
    return linear["weight"].shape[0] if "weight" in linear else _n_rows(linear["linear"])


def _quantization(modules: dict[str, nn.Module]) -> dict[str, Any] | None:
    """Bits and group size of the first quantised module, with the count of modules per setting when they differ."""
    kinds: dict[tuple[int, int], int] = {}
    for module in modules.values():
        if hasattr(module, "bits") and hasattr(module, "group_size"):
            key = (module.bits, module.group_size)
            kinds[key] = kinds.get(key, 0) + 1
    if not kinds:
        return None
    (bits, group_size), _ = max(kinds.items(), key=lambda item: item[1])
    mixed = {f"{b} bits, groups of {g}": count for (b, g), count in kinds.items()}
    return {"bits": bits, "group_size": group_size} | ({"mixed": mixed} if len(kinds) > 1 else {})
