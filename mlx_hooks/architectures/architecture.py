"""``Architecture``: the hook points of one loaded model and where each of them lives."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, make_prompt_cache

from .. import hook_points
from ..errors import HookError, UnknownHookError, UnsupportedModelError
from ..hook_points import HookPoint
from .config import ModelConfig, n_rows, number, quantization_of
from .exceptions import (
    ADDING_FUNCTIONS,
    BLOCKS_NOT_CALLED,
    GATHERED,
    HAND_WRITTEN,
    MORE_THAN_THE_LAST_STREAM,
    NORM_OF_THE_STREAM,
    NORMED_BETWEEN_PASSES,
    OTHER_SUMS,
    READERS_OF_MID,
    STREAM_ARGUMENT,
    STREAM_AXES,
    TILED_VALUES,
    UNSUPPORTED,
    UNSUPPORTED_LATER,
)
from .finding import (
    child,
    ends_of_open,
    expert_locations,
    first_of,
    form,
    head_sizes,
    mlp_roles,
    source,
    sublayer_locations,
    sublayers_of,
    value_location,
)
from .names import (
    D_MODEL,
    D_VOCAB,
    EMBEDDINGS,
    FINAL_NORMS,
    LOGIT_CAPS,
    MAX_POSITIONS,
    OUTPUTS,
    POSITION_EMBEDDINGS,
    QUERIES,
    SIDE_BRANCHES,
)
from .places import Location


class Architecture:
    """The hook points of one loaded model and where each of them lives.

    Args:
        model: a model made by mlx-lm: it has ``layers`` and maps token ids to logits.

    Raises:
        UnsupportedModelError: when there are no blocks, or a block has no part that is known.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise UnsupportedModelError(f"A model loaded by mlx_lm is expected, got {type(model).__name__}.")
        self.model = model
        self.modules: dict[str, nn.Module] = dict(model.named_modules())
        self._paths = {id(module): path for path, module in self.modules.items()}
        self.args: Any = getattr(model, "args", None) or getattr(model, "config", None)
        self.blocks = self._find_blocks()
        self.trunk = self._find_trunk()
        self.sublayers = [sublayers_of(block) for block in self.blocks]
        self.locations: dict[HookPoint, list[Location]] = {}
        self.unsupported: dict[str, str] = {}
        for layer, block in enumerate(self.blocks):
            reasons = UNSUPPORTED.get(form(block), {}) | (UNSUPPORTED_LATER.get(form(block), {}) if layer else {})
            for component, location in self._block_locations(layer):
                point = hook_points.block_point(component, layer)
                if component in reasons:
                    self.unsupported[point.name] = reasons[component]
                    continue
                point = replace(point, axes=STREAM_AXES.get((source(block), component), point.axes))
                places = self.locations.setdefault(point, [])
                if not any(location.module is old.module and location.place == old.place for old in places):
                    places.append(location)
        for component, location in self._outer_locations():
            self.locations[hook_points.outer_point(component)] = [location]
        self.points = hook_points.in_forward_order(self.locations)
        self.cfg = self._config()

    def _find_blocks(self) -> list[nn.Module]:
        blocks = getattr(self.model, "layers", None)
        if not isinstance(blocks, list) or not all(isinstance(b, nn.Module) for b in blocks) or not blocks:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} has no list of blocks called 'layers': load it with mlx_lm."
            )
        if self.args is None:
            raise UnsupportedModelError(f"{type(self.model).__name__} has no 'args', as mlx-lm's models have.")
        if any(id(block) not in self._paths for block in blocks):
            raise UnsupportedModelError(f"The blocks of {type(self.model).__name__} are not in its module tree.")
        if len({id(block) for block in blocks}) < len(blocks):
            raise UnsupportedModelError(f"{type(self.model).__name__} lists a block twice: it cannot be hooked.")
        return blocks

    def _find_trunk(self) -> nn.Module:
        """The module next to or above the blocks that embeds tokens."""
        path = self._paths[id(self.blocks[0])].rpartition(".")[0]
        while path:
            path = path.rpartition(".")[0]
            if child(self.modules[path], EMBEDDINGS) is not None:
                return self.modules[path]
        raise UnsupportedModelError(
            f"{type(self.model).__name__} has no token embedding next to its blocks: known are {', '.join(EMBEDDINGS)}."
        )

    def _outer_locations(self) -> Iterator[tuple[str, Location]]:
        embed, positions = child(self.trunk, EMBEDDINGS), child(self.trunk, POSITION_EMBEDDINGS)
        assert embed is not None
        yield "embed_in", Location(embed, "input")
        yield "embed", Location(embed, "output")
        if positions is not None:
            yield "pos_embed", Location(positions, "output")
        ln_final = self.ln_final
        if ln_final is not None:
            yield "ln_final_in", Location(ln_final, "input")
            yield "ln_final", Location(ln_final, "output")
        yield "logits", Location(self.model, "output")

    @property
    def ln_final(self) -> nn.Module | None:
        """The norm before the unembedding, or None where it is a function without weights."""
        return first_of(child(self.trunk, FINAL_NORMS), child(self.model, ("lm_head.ln",)))

    def _block_locations(self, layer: int) -> Iterator[tuple[str, Location]]:
        block, sublayers = self.blocks[layer], self.sublayers[layer]
        kinds = [sublayer.kind for sublayer in sublayers if sublayer.kind != "side"]
        observed = not self.is_parallel(layer) and form(block) not in OTHER_SUMS
        yield from self._ends(layer)
        if not self.is_parallel(layer) and "mlp" in kinds and len(set(kinds)) > 1:
            yield from self._mid(block)
        if observed:
            for kind in dict.fromkeys(kinds):
                yield f"{kind}_out", Location(block, kind)
            if any(block.get(name) is not None for name in SIDE_BRANCHES):
                yield "side_out", Location(block, "side")
        elif "laurel" in block:
            yield "side_out", Location(block["laurel"], "output")
        turns: dict[str, int] = {}
        for sublayer in sublayers:
            turn = turns[sublayer.kind] = turns.get(sublayer.kind, -1) + 1
            for component, location in sublayer_locations(sublayer):
                yield component, replace(location, turn=location.turn + turn)
            if not observed and sublayer.kind != "side":
                yield f"{sublayer.kind}_out", Location(first_of(sublayer.after, sublayer.last), "output")
        if "router" in block and "experts" in block:
            yield from expert_locations(block)

    def _ends(self, layer: int) -> Iterator[tuple[str, Location]]:
        """Where the stream enters and leaves a block."""
        block = self.blocks[layer]
        if source(block) in BLOCKS_NOT_CALLED:
            # The stream that leaves a block is met where the next one reads it: the next layer, the first layer of the
            # next pass, at last the final norm.
            yield "resid_pre", Location(block["input_layernorm"], "input")
            if layer + 1 < len(self.blocks):
                yield "resid_post", Location(self.blocks[layer + 1]["input_layernorm"], "input")
                return
            ln_final = self.ln_final
            assert ln_final is not None
            yield "resid_post", Location(self.blocks[0]["input_layernorm"], "input", every=2, nth=1)
            yield "resid_post", Location(ln_final, "input", turn=1)
            return
        norm = block.get(NORM_OF_THE_STREAM)
        if norm is not None:
            yield "resid_pre", Location(norm, "output")
        else:
            yield "resid_pre", Location(block, "input", index=self.stream_argument(layer))
        yield "resid_post", Location(block, "output")

    def _mid(self, block: nn.Module) -> Iterator[tuple[str, Location]]:
        origin = form(block)
        if origin not in OTHER_SUMS or "resid_mid" in UNSUPPORTED.get(origin, {}):
            yield "resid_mid", Location(block, "mid")
        elif origin in READERS_OF_MID:
            why = "it is not formed where it could be replaced: edit hook_attn_out or hook_resid_post"
            yield "resid_mid", Location(block[READERS_OF_MID[origin]], "input", why_not=why)

    def stream_norm(self, layer: int) -> nn.Module | None:
        """The norm that makes the stream anew inside a block, or None."""
        return self.blocks[layer].get(NORM_OF_THE_STREAM)

    def adding_function(self, layer: int) -> tuple[Any, str] | None:
        """The function that adds to the stream of a block, as its module and name; None where an operator does."""
        block = type(self.blocks[layer])
        name = ADDING_FUNCTIONS.get(source(self.blocks[layer]))
        return (sys.modules[block.__module__], name) if name is not None else None

    def other_sum(self, layer: int) -> str:
        """Why ``resid_post`` of a layer is not the sum of what is added to ``resid_pre``; empty where it is."""
        return OTHER_SUMS.get(form(self.blocks[layer]), "")

    @property
    def more_than_last_stream(self) -> str:
        """What makes the logits besides the stream that leaves the last block; empty where nothing does."""
        return MORE_THAN_THE_LAST_STREAM.get(form(self.blocks[-1]), "")

    @property
    def normed_between_passes(self) -> bool:
        """Whether the stream is normed, and so made anew, between the passes through layers that run several times."""
        unless = NORMED_BETWEEN_PASSES.get(source(self.blocks[0]))
        return unless is not None and not getattr(self.trunk, unless, False)

    @property
    def logit_cap(self) -> float | None:
        """c of logits that are capped softly, ``c * tanh(logits / c)``, as the configuration has it; None without."""
        return number(self.args, LOGIT_CAPS, needed=False) or None

    def stream_scale(self, layer: int) -> mx.array | None:
        """What the whole stream is multiplied with at the end of a block, or None."""
        return self.blocks[layer].get("layer_scalar")

    def learn_sizes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Note the sizes of the hook points' axes, from the shapes of their values in some run."""
        for name, point in self.points.items():
            if name in shapes and len(point.axes) == len(shapes[name]):
                named = zip(point.axes, shapes[name], strict=True)
                sizes = tuple(None if axis in hook_points.AXES_OF_THE_RUN else size for axis, size in named)
                self.points[name] = replace(point, sizes=sizes)
        for name, point in self.points.items():
            if n_heads := point.size("head"):
                self.points[name] = replace(point, group=max(1, self.n_query_heads(point.layer) // n_heads))

    def norm_called(self, layer: int, name: str) -> str | None:
        """The component of the norm that a block has as a child of this name: "post_attention_layernorm" -> "ln2"."""
        norm = self.blocks[layer].get(name)
        for component in ("ln1", "ln1_post", "ln2", "ln2_post"):
            places = self.locations.get(hook_points.block_point(component, layer), [])
            if any(place.module is norm for place in places):
                return component
        return None

    def n_query_heads(self, layer: int | None) -> int:
        """Query heads of a layer's attention; layers may differ."""
        point = self.points.get(hook_points.block_point("z", layer).name) if layer is not None else None
        return (point.size("head") if point is not None else None) or self.cfg.n_heads

    def output_projection(self, layer: int) -> nn.Module | str:
        """The projection from a layer's heads to the stream, or why there is none."""
        attending = [sublayer.module for sublayer in self.sublayers[layer] if sublayer.kind == "attn"]
        if len(attending) != 1:
            return "the block attends several times" if attending else "it has no attention"
        found = child(attending[0], OUTPUTS)
        return "its heads have no output projection of their own" if found is None else found

    def output_bias(self, layer: int) -> nn.Module | None:
        """The last projection of a layer's MLP where it has a bias that goes straight to the stream; else None."""
        mlps = [sublayer for sublayer in self.sublayers[layer] if sublayer.kind == "mlp"]
        if len(mlps) != 1 or mlps[0].after is not None:
            return None
        down = mlp_roles(mlps[0].module).get("down")
        return down if down is not None and "bias" in down else None

    def is_parallel(self, layer: int) -> bool:
        """Whether attention and MLP of a block read the same stream, so that there is no stream between them."""
        block, sublayers = self.blocks[layer], self.sublayers[layer]
        if hasattr(block, "use_parallel_residual"):
            return bool(block.use_parallel_residual)
        mlps = [s for s in sublayers if s.kind == "mlp"]
        mixing = [s for s in sublayers if s.kind != "mlp"]
        normed = any(norm is not None for mlp in mlps for norm in (mlp.before, mlp.after))
        return bool(mlps and mixing) and mixing[0].before is not None and not normed

    @property
    def state_size(self) -> int:
        """Number of entries in the cache of a state-space layer."""
        sizes = [len(cache.cache) for cache in make_prompt_cache(self.model) if isinstance(cache, ArraysCache)]
        return max(sizes, default=2)

    def stream_argument(self, layer: int) -> int:
        """Which argument of a block the residual stream is."""
        return STREAM_ARGUMENT.get(source(self.blocks[layer]), 0)

    def open_ends(self, attn: nn.Module) -> tuple[nn.Module, nn.Module] | None:
        """The submodules between which attention happens, where the attention module itself is never called."""
        return ends_of_open(attn)

    def attends_openly(self, layer: int) -> bool:
        """Whether the layer's attention module is never called: its parts are, in what order the model alone knows."""
        return any(self.open_ends(s.module) is not None for s in self.sublayers[layer] if s.kind == "attn")

    @property
    def streams(self) -> dict[int, str]:
        """What kind of stream a layer's attention works on, by layer, where the model declares it: ``stream_type``.

        It is an attribute of the attention module or of its block; no architecture of mlx-lm has it.
        """
        declared = {}
        for layer, (block, sublayers) in enumerate(zip(self.blocks, self.sublayers, strict=True)):
            modules = [*(s.module for s in sublayers if s.kind == "attn"), block]
            kind = first_of(*(getattr(module, "stream_type", None) for module in modules))
            if kind is not None:
                declared[layer] = str(kind)
        return declared

    def values_per_query(self, layer: int, v: mx.array, n_heads: int) -> mx.array:
        """Values [batch, kv_head, ...] as each query head reads them, where they are not simply repeated in groups."""
        block = self.blocks[layer]
        return mx.tile(v, (1, n_heads // v.shape[1], 1, 1)) if source(block) in TILED_VALUES else v

    def key_value_head(self, layer: int, head: int, n_heads: int) -> int:
        """Which of a layer's ``n_heads`` key-value heads serves a query head."""
        if source(self.blocks[layer]) in TILED_VALUES:
            return head % n_heads
        return head * n_heads // self.n_query_heads(layer)

    def projection_of(self, layer: int, kind: str) -> Location | None:
        """The module whose output holds a layer's queries, keys or values ("q", "k", "v") as they are projected."""
        attending = [sublayer.module for sublayer in self.sublayers[layer] if sublayer.kind == "attn"]
        if len(attending) != 1:
            return None
        if kind == "v":
            return value_location(attending[0])
        point = self.points.get(hook_points.block_point(kind, layer).name)
        places = [] if point is None else self.locations[point]
        return places[0] if len(places) == 1 and places[0].place == "output" else None

    def is_hand_written(self, attn: nn.Module) -> bool:
        """Whether an attention module writes out its softmax instead of calling the fused kernel."""
        return bool(HAND_WRITTEN.get(source(attn), lambda attn: False)(attn))

    def reshapes_scores(self, layer: int) -> bool:
        """Whether scores are more than products of queries and keys: capped, or of keys picked for each query."""
        attending = [sublayer.module for sublayer in self.sublayers[layer] if sublayer.kind == "attn"]
        return any(self.is_hand_written(module) or self.is_gathered(module) for module in attending)

    def is_gathered(self, attn: nn.Module) -> bool:
        """Whether an attention module gathers the keys of each query, which becomes an entry of the batch."""
        return source(attn) in GATHERED

    def latent_parts(self, attn: nn.Module) -> dict[str, nn.Module]:
        """The submodules to follow in latent attention that is computed in the latent space; none in any other."""
        if "embed_q" not in attn:
            return {}
        names = {"q": QUERIES, "kv": ("kv_a_proj_with_mqa",), "rope": ("rope",), "chosen": ("indexer",)}
        names |= {"embed_q": ("embed_q",), "unembed_out": ("unembed_out",)}
        found = {part: child(attn, candidates) for part, candidates in names.items()}
        return {part: module for part, module in found.items() if module is not None}

    def is_current(self, path: str, module: nn.Module) -> bool:
        """Whether the module at a path is still the one that it was when the model was wrapped."""
        found: Any = self.model
        for part in path.split(".") if path else []:
            try:
                found = found[int(part)] if isinstance(found, list) else found[part]
            except (KeyError, IndexError):
                return False
        return found is module

    def check_supported(self, name: str) -> None:
        """Raise UnsupportedModelError, with the reason, for a hook point that is there but cannot be shown."""
        if name in self.unsupported:
            raise UnsupportedModelError(f"{self.cfg.model_type} has no {name}: {self.unsupported[name]}.")

    def check_editable(self, point: HookPoint) -> None:
        """Raise HookError, with the reason, for a hook point that can be read but not replaced."""
        for place in self.locations_of(point):
            if place.why_not:
                raise HookError(f"{point.name} can be read but not replaced: {place.why_not}.")

    def path(self, module: nn.Module) -> str:
        """Where a module stands in the tree; empty for the model itself."""
        return self._paths.get(id(module), "")

    def locate(self, name: str) -> HookPoint | None:
        """The hook point of a raw module path (``model.layers.5.self_attn.q_proj``, ``....input``), or None.

        A path alone means the module's output.
        """
        path, _, place = name.rpartition(".")
        if place not in ("input", "output"):
            path, place = name, "output"
        if not path or path not in self.modules:
            return None
        layer = next((i for i, b in enumerate(self.blocks) if f"{path}.".startswith(f"{self.path(b)}.")), None)
        point = hook_points.module_point(path, place, layer)
        self.locations.setdefault(point, [Location(self.modules[path], place)])
        return point

    def locations_of(self, point: HookPoint) -> list[Location]:
        """Where a hook point lives; several places where a block has several sublayers of a kind.

        Raises:
            UnknownHookError: a raw module that the model no longer has.
        """
        # Streams of some architectures have axes of their own: the name counts.
        point = self.points.get(point.name, point)
        if point not in self.locations:
            self.locate(point.name)
        if point not in self.locations:
            raise UnknownHookError(f"The model has no module for {point.name} any more: make a new HookedModel.")
        return self.locations[point]

    def _config(self) -> ModelConfig:
        attentions = (s.module for layer in self.sublayers for s in layer if s.kind == "attn")
        first = next(attentions, None)
        n_heads, n_kv, d_head = head_sizes(first) if first is not None else (0, 0, 0)
        mlps = (mlp_roles(s.module) for layer in self.sublayers for s in layer if s.kind == "mlp")
        mlp = next((roles for roles in mlps if roles), {})
        width = n_rows(mlp["up"]) if "up" in mlp else n_rows(mlp["gate_up"]) // 2 if mlp else 0
        return ModelConfig(
            model_type=getattr(self.model, "model_type", None) or self.args.model_type,
            n_layers=len(self.blocks),
            d_model=number(self.args, D_MODEL),
            n_heads=n_heads,
            n_key_value_heads=n_kv,
            d_head=d_head,
            d_mlp=width,
            d_vocab=number(self.args, D_VOCAB),
            max_positions=number(self.args, MAX_POSITIONS, needed=False),
            quantization=quantization_of(self.modules),
        )
