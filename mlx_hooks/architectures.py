"""Where each hook point lives in an mlx-lm module tree: tables of names, then what follows from them.

mlx-lm has well over a hundred architectures and few names. A block's children are sublayers (attention, mixer, MLP)
and norms; which is which, and where their values lie, follows from the tables at the top. What no name can show (is a
branch multiplied before it is added, is it normed) is not guessed: it is observed where the model adds to the stream.
``selftest`` proves on the loaded model that the places found here hold what they are said to hold.
"""

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, make_prompt_cache

from . import hook_points
from .errors import UnknownHookError, UnsupportedModelError
from .hook_points import HookPoint

# ---------------------------------------------------------------------------------------------------------------------
# Names. The first name that a module has counts.

EMBEDDINGS = (
    "embed_tokens",
    "wte",
    "word_embeddings",
    "embedding",
    "embeddings",
    "tok_embeddings",
    "token_embeddings",
    "ngram_embeddings",
    "embed_in",
    "embed",
    "embd.wte",
)
POSITION_EMBEDDINGS = ("wpe",)
FINAL_NORMS = (
    "ln_f",
    "final_layernorm",
    "final_layer_norm",
    "final_norm",
    "norm_f",
    "output_norm",
    "embedding_norm",
    "norm",
)
UNEMBEDDINGS = ("lm_head", "output", "ff_out", "embed_out")

# Children of a block that move information between positions, and those that do not.
MIXING = (
    "self_attn",
    "attn.attention",
    "attn",
    "attention",
    "norm_attn_norm.attn",
    "mamba",
    "linear_attn",
    "conv",
    "local_mixer",
    "temporal_block",
    "mixer",
)
MLPS_OF_BLOCK = (
    "mlps",
    "mlp",
    "feed_forward",
    "ffn",
    "block_sparse_moe",
    "mlp_block",
    "moe",
    "mixer",
)

NORMS_BEFORE_MIXING = (
    "input_layernorm",
    "attention_layernorm",
    "attention_norm",
    "attn_norm",
    "att_norm",
    "operator_norm",
    "pre_mixer_norm",
    "temporal_pre_norm",
    "norm_attn_norm.norm_1",
    "ln_1",
    "ln",
    "norm",
)
NORMS_AFTER_MIXING = ("post_self_attn_layernorm", "post_mixer_norm")
NORMS_BEFORE_MLP = (
    "pre_feedforward_layernorm",
    "pre_mlp_layernorm",
    "pre_ff_layernorm",
    "pre_mlp_norm",
    "feedforward_layernorm",
    "ffn_norm",
    "ff_norm",
    "channel_pre_norm",
    "norm_attn_norm.norm_2",
    "ln_2",
)
NORMS_AFTER_MLP = ("post_feedforward_layernorm", "post_mlp_layernorm", "post_mlp_norm")
# Before the MLP in most architectures; after attention where another norm stands before the MLP or after it.
NORM_OF_TWO_MEANINGS = "post_attention_layernorm"

QUERIES = ("q_b_proj", "q_proj", "attn_query", "c_q")
KEYS = ("k_proj", "attn_key", "c_k")
VALUES = ("v_proj", "attn_value", "c_v")
FUSED = (
    "qkv_proj",
    "q_k_v_proj",
    "qkvg_proj",
    "query_key_value",
    "c_attn",
    "W_pack",
    "Wqkv",
    "wqkv",
    "att_proj",
)
OUTPUTS = ("o_proj", "out_proj", "dense", "wo", "attn_resid", "attn_out", "c_proj")
# Submodules that only state-space, convolution and linear-attention layers have.
MARKS_OF_A_MIXER = (
    "conv1d",
    "conv_1d",
    "conv",
    "q_conv",
    "q_conv1d",
    "qkv_conv",
    "key_conv",
    "token_shift",
    "g_norm",
    "linear",
)
N_HEADS = ("n_heads", "num_heads", "num_attention_heads", "n_head", "q_num_heads", "num_q_heads")
N_KEY_VALUE_HEADS = ("n_kv_heads", "num_key_value_heads", "num_kv_heads", "k_num_heads", "n_kv_head")

# Set on attention modules that read the keys and values of an earlier layer.
SHARED_KEYS = "is_kv_shared_layer"

# Projections to the hidden layer of an MLP: role -> name. The first row whose names are all there counts.
MLPS = (
    {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
    {"gate": "w1", "up": "w3", "down": "w2"},
    {"gate": "c_fc_0", "up": "c_fc_1", "down": "c_proj"},
    {"gate": "mlp_gate", "up": "mlp_linear", "down": "mlp_resid"},
    {"gate": "w2", "up": "w1", "down": "c_proj"},
    {"gate_up": "gate_up_proj", "down": "down_proj"},
    {"gate_up": "proj_1", "down": "proj_2"},
    {"gate_up": "ff_proj", "down": "ff_out"},
    {"up": "up_proj", "down": "down_proj"},
    {"up": "c_fc", "down": "c_proj"},
    {"up": "fc1", "down": "fc2"},
    {"up": "fc_in", "down": "fc_out"},
    {"up": "dense_h_to_4h", "down": "dense_4h_to_h"},
    {"up": "key", "down": "value"},
)
NORMS_INSIDE_MLP = ("ffn_sub_norm",)
EXPERTS = ("switch_mlp", "experts")
ROUTERS = ("gate", "router")

# The module inside a wrapper around the experts that gives each chosen expert's output.
EXPERTS_INSIDE = ("switch_glu", "switch_mlp", "experts")
# Inside a router: the projection to one score per expert.
ROUTER_PROJECTIONS = ("gate_proj", "gate", "wg", "layer", "proj", "classifier")
# Routers that are a module around the projection and give its scores alone; the choice is made outside.
SCORES_ONLY = ("afmoe", "dbrx", "hunyuan")
# Layers of experts that multiply with the router's weight themselves.
ROUTING_INSIDE = ("muse_spark",)
# Experts whose input is weighted, not what they give.
WEIGHTED_INPUT = ("llama4",)

# What mlx-lm's ModelArgs call a number.
D_MODEL = ("hidden_size", "n_embd", "d_model", "hidden_dim", "dim", "model_dim")
D_VOCAB = ("vocab_size", "padded_vocab_size", "embedding_size", "num_vocab")
MAX_POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len")

# ---------------------------------------------------------------------------------------------------------------------
# What blocks add to the stream besides their sublayers: a skip from the embedding, per-layer inputs, a shortcut.
SIDE_BRANCHES = ("embed_skip", "per_layer_input_gate", "mlps")

# Exceptions: what names do not show, by the mlx-lm module that defines the class.

# The stream is not the block's first argument.
STREAM_ARGUMENT = {"talkie": 1}
# Fused projections that group each key-value head with its query heads: [kv_head, queries + 2, d_head].
GROUPED_PROJECTIONS = ("gpt_neox", "phi3small", "internlm2")
# Fused gate and up projections: where the gate begins and the step between its columns, as parts of the width.
GATE_SECOND = ("olmo",)
INTERLEAVED_GATE = ("phi3small",)
# The first norm of all makes the stream anew, inside the first block.
NORM_OF_THE_STREAM = "pre_norm"
# Blocks whose stream is not the sum of what is added to it in sight, with the reason. What their sublayers give, after
# the norms that follow them, is shown as what they add.
OTHER_SUMS = {
    "gemma3n": "the block mixes several streams: LAuReL and AltUp weigh what attention and MLP add",
    "deepseek_v41": "the block mixes several streams: hyper-connections weigh what attention and MLP add",
    "kimi_k3": "attention and MLP read a learned mixture of the sums of earlier blocks",
    "muse_spark": "branches are normed and weighed as they are added, in a fused kernel",
    "iquestloopcoder": "",  # plain sums, made outside of any module
}
# Where a configuration makes their blocks add up in sight all the same.
PLAIN_SUMS = {"kimi_k3": lambda block: not block.use_attn_res}
# Models whose logits are made of more than the stream that leaves the last block.
MORE_THAN_THE_LAST_STREAM = {
    "deepseek_v41": "the last block also gives the weights that mix its streams",
    "kimi_k3": "the last norm reads a mixture of it and of the sums of earlier blocks",
}
# The submodule that reads the stream between attention and MLP, where no sum shows it.
READERS_OF_MID = {
    "gemma3n": "pre_feedforward_layernorm",
    "deepseek_v41": "ffn_hc",
    "iquestloopcoder": "post_attention_layernorm",
}
# Blocks of several streams: where the axis of the streams lies.
STREAM_AXES = {
    ("gemma3n", "resid_pre"): ("stream", "batch", "pos", "d_model"),
    ("gemma3n", "resid_post"): ("stream", "batch", "pos", "d_model"),
    ("deepseek_v41", "resid_pre"): ("batch", "pos", "stream", "d_model"),
    ("deepseek_v41", "resid_mid"): ("batch", "pos", "stream", "d_model"),
    ("deepseek_v41", "resid_post"): ("batch", "pos", "stream", "d_model"),
}
# Query head h reads key-value head h % n_key_value_heads.
TILED_VALUES = ("plamo",)
# Attention that gathers keys for each query, which becomes an entry of the batch.
GATHERED = ("deepseek_v41",)
# Functions that add to the stream in the place of an operator.
ADDING_FUNCTIONS = {"gemma3_text": "clip_residual"}
# The model calls the parts of a block itself, never the block.
BLOCKS_NOT_CALLED = ("iquestloopcoder",)
# Hook points that an architecture has but that cannot be shown, with the reason.
UNSUPPORTED = {
    "deepseek_v41": dict.fromkeys(
        ("rot_k", "v", "attn_scores", "pattern"),
        "each query attends to rows gathered for it, from a window and from groups of compressed positions",
    ),
    "dbrx": dict.fromkeys(
        ("expert_indices", "expert_out", "expert_weights"), "experts are called one by one for each token"
    ),
    "muse_spark": dict.fromkeys(
        ("attn_out", "resid_mid", "ln2_in", "ln2", "ln2_post", "mlp_out"), OTHER_SUMS["muse_spark"]
    )
    | {"expert_weights": "experts are weighed and summed in a fused kernel"},
}
# The same in all layers but the first.
UNSUPPORTED_LATER = {
    "muse_spark": dict.fromkeys(("ln1_in", "ln1"), "the layer before applies this norm, in a fused kernel"),
}
# Attention written out with a softmax, and when.
HAND_WRITTEN = {
    "gemma2": lambda attn: True,
    "olmo": lambda attn: True,
    "gear": lambda attn: attn.attn_logit_softcapping,
    "phi3small": lambda attn: attn.block_sparse,
}


@dataclass(frozen=True)
class ModelConfig:
    """A model's sizes, by the field's names. ``quantization`` is None or mlx-lm's ``{"group_size", "bits", ...}``.

    Sizes of heads and MLP are those of the first layer that has them; other layers may differ.
    """

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
    """Columns of [batch, pos, features], seen as [batch, pos, head, d_head].

    Head h of ``n_heads`` lies at ``start + h * stride`` (``stride`` 0: heads lie side by side).
    """

    n_heads: int
    d_head: int
    start: int = 0
    stride: int = 0

    def read(self, array: mx.array) -> mx.array:
        if self.stride:
            return mx.take(array, self._columns(), axis=-1).reshape(*array.shape[:-1], self.n_heads, self.d_head)
        stop = self.start + self.n_heads * self.d_head
        return array[..., self.start : stop].reshape(*array.shape[:-1], self.n_heads, self.d_head)

    def write(self, array: mx.array, value: mx.array) -> mx.array:
        flat = value.reshape(*array.shape[:-1], -1)
        if self.stride:
            copy = array + 0
            copy[..., self._columns()] = flat
            return copy
        stop = self.start + self.n_heads * self.d_head
        return mx.concatenate([array[..., : self.start], flat, array[..., stop:]], axis=-1)

    def _columns(self) -> mx.array:
        heads = mx.arange(self.n_heads)[:, None] * self.stride + self.start
        return (heads + mx.arange(self.d_head)[None]).reshape(-1)


@dataclass(frozen=True)
class Grouped:
    """The queries of a projection laid out as [..., kv_head, queries + 2, d_head], seen as [..., head, d_head]."""

    n_key_value_heads: int
    n_queries: int
    d_head: int

    def read(self, array: mx.array) -> mx.array:
        groups = self._groups(array)[..., : self.n_queries, :]
        return groups.reshape(*array.shape[:-1], self.n_key_value_heads * self.n_queries, self.d_head)

    def write(self, array: mx.array, value: mx.array) -> mx.array:
        groups = self._groups(array)
        queries = value.reshape(*groups.shape[:-2], self.n_queries, self.d_head)
        return mx.concatenate([queries, groups[..., self.n_queries :, :]], axis=-2).reshape(array.shape)

    def _groups(self, array: mx.array) -> mx.array:
        return array.reshape(*array.shape[:-1], self.n_key_value_heads, self.n_queries + 2, self.d_head)


@dataclass(frozen=True)
class Columns:
    """Every ``step``-th column from ``start`` to ``stop``."""

    start: int
    stop: int
    step: int = 1

    def read(self, array: mx.array) -> mx.array:
        return array[..., self.start : self.stop : self.step]

    def write(self, array: mx.array, value: mx.array) -> mx.array:
        copy = array + 0
        copy[..., self.start : self.stop : self.step] = value
        return copy


@dataclass(frozen=True)
class Transposed:
    """The kernel's [batch, head, pos, d_head], seen as [batch, pos, head, d_head]."""

    def read(self, array: mx.array) -> mx.array:
        return array.transpose(0, 2, 1, 3)

    def write(self, array: mx.array, value: mx.array) -> mx.array:
        return value.transpose(0, 2, 1, 3)


@dataclass(frozen=True)
class Tiled:
    """The kernel's [batch, head, pos, d_head], seen as [batch, pos, kv_head, d_head].

    There the key-value heads may have been repeated one after the other, 0 1 0 1, or not yet.
    """

    n_key_value_heads: int

    def read(self, array: mx.array) -> mx.array:
        return array[:, : self.n_key_value_heads].transpose(0, 2, 1, 3)

    def write(self, array: mx.array, value: mx.array) -> mx.array:
        return mx.tile(value.transpose(0, 2, 1, 3), (1, array.shape[1] // self.n_key_value_heads, 1, 1))


@dataclass(frozen=True)
class Location:
    """Where a hook point is met: a module, the place in its call, and how its value lies there.

    Args:
        module: whose call is observed.
        place: "input" or "output" of the call; at an attention module what the kernel gets or makes ("q", "k", "v",
            "scores", "pattern", "sink", "z"); at a block what is added to the stream ("attn", "mixer", "mlp", "side")
            or the stream between the additions ("mid"); "state" of a mixer; "weights" of the experts; "logits" of a
            router that keeps them to itself.
        view: how the value lies in the array that is met there.
        index: which argument, or which item where a tuple is returned.
        turn: the number of the pass, where a block has several sublayers of a kind.
        every, nth: a module that is called several times in a pass is met at the nth of every so many calls.
        why_not: why the value can be read but not replaced; empty where it can.
    """

    module: nn.Module
    place: str
    view: View = field(default_factory=Whole)
    index: int = 0
    turn: int = 0
    every: int = 1
    nth: int = 0
    why_not: str = ""


@dataclass(frozen=True)
class Sublayer:
    """What a block adds to the stream: its kind ("attn", "mixer", "mlp", "side"), module, and the norms around it."""

    kind: str
    module: nn.Module
    before: nn.Module | None = None
    after: nn.Module | None = None
    ends: tuple[nn.Module, nn.Module] | None = None
    """First and last module of a sublayer that is written out in the block, not a module of its own."""

    @property
    def first(self) -> nn.Module:
        return self.ends[0] if self.ends else self.module

    @property
    def last(self) -> nn.Module:
        return self.ends[1] if self.ends else self.module


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
        self.sublayers = [_sublayers(block) for block in self.blocks]
        self.locations: dict[HookPoint, list[Location]] = {}
        self.unsupported: dict[str, str] = {}
        for layer, block in enumerate(self.blocks):
            reasons = UNSUPPORTED.get(_form(block), {}) | (UNSUPPORTED_LATER.get(_form(block), {}) if layer else {})
            for component, location in self._block_locations(layer):
                point = hook_points.block_point(component, layer)
                if component in reasons:
                    self.unsupported[point.name] = reasons[component]
                    continue
                point = replace(point, axes=STREAM_AXES.get((_source(block), component), point.axes))
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
            if _child(self.modules[path], EMBEDDINGS) is not None:
                return self.modules[path]
        raise UnsupportedModelError(
            f"{type(self.model).__name__} has no token embedding next to its blocks: known are {', '.join(EMBEDDINGS)}."
        )

    def _outer_locations(self) -> Iterator[tuple[str, Location]]:
        embed, positions = _child(self.trunk, EMBEDDINGS), _child(self.trunk, POSITION_EMBEDDINGS)
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
        return _first(_child(self.trunk, FINAL_NORMS), _child(self.model, ("lm_head.ln",)))

    def _block_locations(self, layer: int) -> Iterator[tuple[str, Location]]:
        block, sublayers = self.blocks[layer], self.sublayers[layer]
        kinds = [sublayer.kind for sublayer in sublayers if sublayer.kind != "side"]
        observed = not self.is_parallel(layer) and _form(block) not in OTHER_SUMS
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
            for component, location in _sublayer_locations(sublayer):
                yield component, replace(location, turn=location.turn + turn)
            if not observed and sublayer.kind != "side":
                yield f"{sublayer.kind}_out", Location(_first(sublayer.after, sublayer.last), "output")
        if "router" in block and "experts" in block:
            yield from _expert_locations(block)

    def _ends(self, layer: int) -> Iterator[tuple[str, Location]]:
        """Where the stream enters and leaves a block."""
        block = self.blocks[layer]
        if _source(block) in BLOCKS_NOT_CALLED:
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
        source = _form(block)
        if source not in OTHER_SUMS or "resid_mid" in UNSUPPORTED.get(source, {}):
            yield "resid_mid", Location(block, "mid")
        elif source in READERS_OF_MID:
            why = "it is not formed where it could be replaced: edit hook_attn_out or hook_resid_post"
            yield "resid_mid", Location(block[READERS_OF_MID[source]], "input", why_not=why)

    def stream_norm(self, layer: int) -> nn.Module | None:
        """The norm that makes the stream anew inside a block, or None."""
        return self.blocks[layer].get(NORM_OF_THE_STREAM)

    def adding_function(self, layer: int) -> tuple[Any, str] | None:
        """The function that adds to the stream of a block, as its module and name; None where an operator does."""
        block = type(self.blocks[layer])
        name = ADDING_FUNCTIONS.get(_source(self.blocks[layer]))
        return (sys.modules[block.__module__], name) if name is not None else None

    def other_sum(self, layer: int) -> str:
        """Why ``resid_post`` of a layer is not the sum of what is added to ``resid_pre``; empty where it is."""
        return OTHER_SUMS.get(_form(self.blocks[layer]), "")

    @property
    def more_than_last_stream(self) -> str:
        """What makes the logits besides the stream that leaves the last block; empty where nothing does."""
        return MORE_THAN_THE_LAST_STREAM.get(_form(self.blocks[-1]), "")

    def stream_scale(self, layer: int) -> mx.array | None:
        """What the whole stream is multiplied with at the end of a block, or None."""
        return self.blocks[layer].get("layer_scalar")

    def learn_sizes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Note the sizes of the hook points' axes, from the shapes of their values in some run."""
        for name, point in self.points.items():
            if len(point.axes) == len(shapes.get(name, ())):
                named = zip(point.axes, shapes[name], strict=True)
                sizes = tuple(None if axis in hook_points.AXES_OF_THE_RUN else size for axis, size in named)
                self.points[name] = replace(point, sizes=sizes)

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
        return STREAM_ARGUMENT.get(_source(self.blocks[layer]), 0)

    def open_ends(self, attn: nn.Module) -> tuple[nn.Module, nn.Module] | None:
        """The submodules between which attention happens, where the attention module itself is never called."""
        return _open_ends(attn)

    def values_per_query(self, layer: int, v: mx.array, n_heads: int) -> mx.array:
        """Values [batch, kv_head, ...] as each query head reads them, where they are not simply repeated in groups."""
        block = self.blocks[layer]
        return mx.tile(v, (1, n_heads // v.shape[1], 1, 1)) if _source(block) in TILED_VALUES else v

    def is_hand_written(self, attn: nn.Module) -> bool:
        """Whether an attention module writes out its softmax instead of calling the fused kernel."""
        return bool(HAND_WRITTEN.get(_source(attn), lambda attn: False)(attn))

    def is_gathered(self, attn: nn.Module) -> bool:
        """Whether an attention module gathers the keys of each query, which becomes an entry of the batch."""
        return _source(attn) in GATHERED

    def latent_parts(self, attn: nn.Module) -> dict[str, nn.Module]:
        """The submodules to follow in latent attention that is computed in the latent space; none in any other."""
        if "embed_q" not in attn:
            return {}
        names = {"q": QUERIES, "kv": ("kv_a_proj_with_mqa",), "rope": ("rope",), "chosen": ("indexer",)}
        names |= {"embed_q": ("embed_q",), "unembed_out": ("unembed_out",)}
        found = {part: _child(attn, candidates) for part, candidates in names.items()}
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
        n_heads, n_kv, d_head = _head_sizes(first) if first is not None else (0, 0, 0)
        mlps = (_mlp_roles(s.module) for layer in self.sublayers for s in layer if s.kind == "mlp")
        mlp = next((roles for roles in mlps if roles), {})
        width = _n_rows(mlp["up"]) if "up" in mlp else _n_rows(mlp["gate_up"]) // 2 if mlp else 0
        return ModelConfig(
            model_type=getattr(self.model, "model_type", None) or self.args.model_type,
            n_layers=len(self.blocks),
            d_model=_number(self.args, D_MODEL),
            n_heads=n_heads,
            n_key_value_heads=n_kv,
            d_head=d_head,
            d_mlp=width,
            d_vocab=_number(self.args, D_VOCAB),
            max_positions=_number(self.args, MAX_POSITIONS, needed=False),
            quantization=_quantization(self.modules),
        )


# ---------------------------------------------------------------------------------------------------------------------
# What follows from the names


def _child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    """The first submodule of these names, which may be paths ("attn.attention")."""
    for name in names:
        found: Any = module
        for part in name.split("."):
            found = found.get(part) if isinstance(found, nn.Module) else None
        if isinstance(found, nn.Module):
            return found
    return None


def _first(*modules: Any) -> Any:
    """The first that is there. (A module without weights or children is an empty dict: ``or`` would pass it by.)"""
    return next((module for module in modules if module is not None), None)


def _source(module: nn.Module) -> str:
    """The mlx-lm module that defines a class: ``"gemma2"``."""
    return type(module).__module__.rpartition(".")[2]


def _form(block: nn.Module) -> str:
    """The name of a block in the tables of unusual sums; empty where its configuration leaves them out."""
    source = _source(block)
    return "" if PLAIN_SUMS.get(source, lambda block: False)(block) else source


def _sublayers(block: nn.Module) -> list[Sublayer]:
    """What a block adds to the stream, in the order of its call."""
    before_mlp, after_mlp = _child(block, NORMS_BEFORE_MLP), _child(block, NORMS_AFTER_MLP)
    after_mixing = _child(block, NORMS_AFTER_MIXING)
    unclear = block.get(NORM_OF_TWO_MEANINGS)
    norms_before_mlp: list[Any] = unclear if isinstance(unclear, list) else [_first(before_mlp, unclear)]
    if isinstance(unclear, nn.Module) and after_mixing is None and _first(before_mlp, after_mlp) is not None:
        after_mixing, norms_before_mlp = unclear, [before_mlp]
    first = block.get("input_layernorm")
    norms_before_mixing = first if isinstance(first, list) else [_child(block, NORMS_BEFORE_MIXING)]

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
        norms_before_mlp = [_first(before_mlp, unclear, norms_before_mixing[0])]
    layers = []
    for i in range(max(len(mixing), len(mlps))):
        if i < len(mixing):
            kind, module = mixing[i]
            norm = norms_before_mixing[min(i, len(norms_before_mixing) - 1)]
            layers.append(Sublayer(kind, module, before=norm, after=after_mixing, ends=_open_ends(module)))
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


def _open_ends(attn: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    first, last = _child(attn, QUERIES), _child(attn, OUTPUTS)
    return (first, last) if _source(attn) in BLOCKS_NOT_CALLED and first and last else None


def _several(block: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    """The submodules of these names in order; a list of modules counts as several."""
    found: list[nn.Module] = []
    for name in names:
        child = block.get(name) if "." not in name else _child(block, (name,))
        for module in child if isinstance(child, list) else [child]:
            # A module that only holds a known one ("attn" of "attn.attention") is not called itself.
            holds = isinstance(module, nn.Module) and any(
                other is not module and other in list(module.children().values()) for other in found
            )
            if isinstance(module, nn.Module) and not holds and all(module is not other for other in found):
                found.append(module)
    return found


def _kind(module: nn.Module) -> str:
    if _child(module, MARKS_OF_A_MIXER) is not None:
        return "mixer"
    is_attention = _child(module, QUERIES + FUSED) is not None and _child(module, (*OUTPUTS, "o_b_proj")) is not None
    return (
        "attn" if is_attention else "mlp" if _mlp_roles(module) or any(name in module for name in EXPERTS) else "mixer"
    )


def _sublayer_locations(sublayer: Sublayer) -> Iterator[tuple[str, Location]]:
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


def _head_sizes(attn: nn.Module) -> tuple[int, int, int]:
    """Query heads, key-value heads and width of a head."""
    n_heads = _attribute(attn, N_HEADS)
    n_kv = _attribute(attn, N_KEY_VALUE_HEADS) or n_heads
    queries, fused = _child(attn, QUERIES), _child(attn, FUSED)
    d_head = getattr(attn, "head_dim", None) or getattr(attn, "q_head_dim", None) or getattr(attn, "qk_head_dim", None)
    if not isinstance(d_head, int):
        if queries is not None:
            d_head = _n_rows(queries) // n_heads
        else:
            assert fused is not None
            d_head = _n_rows(fused) // (n_heads + 2 * n_kv)
    keys = _child(attn, KEYS)
    if keys is not None:
        n_kv = _n_rows(keys) // d_head
    return n_heads, n_kv, d_head


def _attention_locations(attn: nn.Module) -> Iterator[tuple[str, Location]]:
    hand_written = HAND_WRITTEN.get(_source(attn), lambda attn: False)(attn)
    n_heads, n_kv, d_head = _head_sizes(attn)
    yield from _projection_locations(attn, n_heads, n_kv, d_head)
    yield "attn_scores", Location(attn, "scores")
    yield "pattern", Location(attn, "pattern")
    if any(name in attn for name in ("sinks", "attention_sink_bias")):
        yield "sink", Location(attn, "sink", why_not="it is what the pattern's rows lack of 1: edit the pattern")
    if hand_written or _source(attn) in BLOCKS_NOT_CALLED:
        rope, out = _child(attn, ("rope",)), _child(attn, OUTPUTS)
        assert rope is not None
        assert out is not None
        yield "rot_q", Location(rope, "output", Transposed(), every=2, nth=0)
        yield "rot_k", Location(rope, "output", Transposed(), every=2, nth=1)
        yield "v", _value_location(attn, n_heads, n_kv, d_head)
        yield "z", Location(out, "input", Heads(n_heads, d_head))
        return
    latent = "embed_q" in attn
    for component, place in [("rot_q", "q"), ("rot_k", "k"), ("v", "v"), ("z", "z")]:
        why = (
            "keys and values are kept as one latent: edit hook_q, the pattern or hook_z"
            if latent and place != "z"
            else ""
        )
        tiled = _source(attn) in TILED_VALUES and place in ("k", "v")
        yield component, Location(attn, place, Tiled(n_kv) if tiled else Transposed(), why_not=why)


def _projection_locations(attn: nn.Module, n_heads: int, n_kv: int, d_head: int) -> Iterator[tuple[str, Location]]:
    queries, keys, fused = _child(attn, QUERIES), _child(attn, KEYS), _child(attn, FUSED)
    if queries is not None:
        # Twice as wide: each head's query is followed by its gate.
        gated = _n_rows(queries) == 2 * n_heads * d_head
        yield "q", Location(queries, "output", Heads(n_heads, d_head, stride=2 * d_head if gated else 0))
        if keys is not None and not getattr(attn, SHARED_KEYS, False):
            yield "k", Location(keys, "output", Heads(n_kv, d_head))
        return
    assert fused is not None
    if _source(attn) in GROUPED_PROJECTIONS:
        group = n_heads // n_kv + 2
        yield "q", Location(fused, "output", Grouped(n_kv, n_heads // n_kv, d_head))
        yield "k", Location(fused, "output", Heads(n_kv, d_head, (group - 2) * d_head, group * d_head))
    elif isinstance(getattr(fused, "output_dims", None), list):
        yield "q", Location(fused, "output", Heads(n_heads, d_head))
        yield "k", Location(fused, "output", Heads(n_kv, d_head), index=1)
    else:
        yield "q", Location(fused, "output", Heads(n_heads, d_head))
        yield "k", Location(fused, "output", Heads(n_kv, d_head, start=n_heads * d_head))


def _value_location(attn: nn.Module, n_heads: int, n_kv: int, d_head: int) -> Location:
    values, fused = _child(attn, VALUES), _child(attn, FUSED)
    if values is not None:
        return Location(values, "output", Heads(n_kv, d_head))
    assert fused is not None
    if _source(attn) in GROUPED_PROJECTIONS:
        group = n_heads // n_kv + 2
        return Location(fused, "output", Heads(n_kv, d_head, (group - 1) * d_head, group * d_head))
    return Location(fused, "output", Heads(n_kv, d_head, start=(n_heads + n_kv) * d_head))


def _mlp_roles(mlp: nn.Module) -> dict[str, nn.Module]:
    for names in MLPS:
        found = {role: mlp.get(name) for role, name in names.items()}
        if all(isinstance(module, nn.Module) for module in found.values()) and not _child(mlp, EXPERTS):
            return {role: module for role, module in found.items() if module is not None}
    return {}


def _mlp_locations(mlp: nn.Module) -> Iterator[tuple[str, Location]]:
    if any(name in mlp for name in EXPERTS):
        yield from _expert_locations(mlp)
        return
    roles = _mlp_roles(mlp)
    if not roles:
        return
    if "gate_up" in roles:
        width = _n_rows(roles["gate_up"]) // 2
        first, second = Columns(0, width), Columns(width, 2 * width)
        gate, up = (second, first) if _source(mlp) in GATE_SECOND else (first, second)
        yield "mlp_pre", Location(roles["gate_up"], "output", gate)
        yield "mlp_pre_linear", Location(roles["gate_up"], "output", up)
    elif "gate" in roles:
        yield "mlp_pre", Location(roles["gate"], "output")
        yield "mlp_pre_linear", Location(roles["up"], "output")
    elif _source(mlp) in INTERLEAVED_GATE:
        width = _n_rows(roles["up"])
        yield "mlp_pre", Location(roles["up"], "output", Columns(0, width, 2))
        yield "mlp_pre_linear", Location(roles["up"], "output", Columns(1, width, 2))
    else:
        yield "mlp_pre", Location(roles["up"], "output")
    yield "mlp_post", Location(_first(_child(mlp, NORMS_INSIDE_MLP), roles["down"]), "input")


def _expert_locations(moe: nn.Module) -> Iterator[tuple[str, Location]]:
    experts, router = moe.get("switch_mlp", moe.get("experts")), _child(moe, ROUTERS)
    if router is None:
        return
    plain = isinstance(router, nn.Linear | nn.QuantizedLinear) or _source(router) in SCORES_ONLY
    inside_layer = _source(moe) in ROUTING_INSIDE
    projection = router if plain else _child(router, ROUTER_PROJECTIONS)
    if projection is not None:
        yield "router_scores", Location(projection, "output")
    else:
        yield "router_scores", Location(moe if inside_layer else router, "logits")
    if not isinstance(experts, nn.Module):
        # A list of experts: UNSUPPORTED says why.
        for component in ("expert_indices", "expert_out", "expert_weights"):
            yield component, Location(moe, "output")
        return
    inside = _first(_child(experts, EXPERTS_INSIDE), experts)
    if plain or inside_layer:
        yield "expert_indices", Location(experts, "input", index=1)
        weighted_input = _source(moe) in WEIGHTED_INPUT
        yield "expert_weights", Location(moe, "input weights") if weighted_input else Location(inside, "weights")
    else:
        yield "expert_indices", Location(router, "output")
        yield "expert_weights", Location(router, "output", index=1)
    yield "expert_out", Location(inside, "output")


def _attribute(module: nn.Module, names: tuple[str, ...]) -> int:
    return next((int(getattr(module, name)) for name in names if isinstance(getattr(module, name, None), int)), 0)


def _number(args: Any, names: tuple[str, ...], needed: bool = True) -> Any:
    """A number of the configuration, or of its text part, under whichever name the architecture has for it."""
    for holder in (args, getattr(args, "text_config", None), getattr(args, "text", None)):
        for name in names:
            found = holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)
            if found is not None:
                return found
    if needed:
        raise UnsupportedModelError(f"The configuration of {args.model_type} has none of {', '.join(names)}.")
    return None


def _n_rows(linear: nn.Module) -> int:
    """Width of a projection's output. Quantisation packs columns of a weight; ternary ones pack rows and say how many
    there are; LoRA wraps the projection."""
    if hasattr(linear, "out_features"):
        return linear.out_features
    if "weight" in linear:
        return linear["weight"].shape[0]
    return _n_rows(linear["linear"])


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
