"""Everything inside one layer, of a prompt and of what the model goes on with, and what of it lies along a trait.

A record has, for the prompt and for the response (n is the number of tokens):

    internals/attention  q_proj [n, n_heads * d_head], k_proj and v_proj [n, n_key_value_heads * d_head]: what the
                         projections give, before rotary embedding; attn_weights [head, n, n], of a response a list of
                         [head, n_context]
    internals/mlp        gate_proj, up_proj, activated [n, d_mlp], down_proj [n, d_model]
    internals/residual   input, after_attn, output [n, d_model]
    projections          residual [n, 3], attn_out and mlp_out [n], heads [n, n_heads], heads_bias [n]; once for both,
                         neurons: alignment [d_mlp], bias []

A layer that is made otherwise has what it has: router_scores, expert_indices and expert_weights under ``mlp``, what its
mixer reads and gives under ``mixer``, the keys and values of latent or borrowed attention as the kernel got them.
``metadata["absent"]`` says why something is not there, ``metadata["hook_points"]`` where each array was met.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...activations import to_numpy
from ...architectures.config import n_rows
from ...architectures.finding import child, mlp_roles
from ...architectures.names import EXPERTS, FUSED, NORMS_INSIDE_MLP, VALUES
from ...contributions import HeadPath
from ...errors import HookError
from ...hook_points import block_point
from ...model import HookedModel
from ..identity import ModelIdentity
from .capture import (
    AtLayers,
    Settings,
    TraitRun,
    about_stream,
    attention_point,
    check_model,
    listed,
    looks_ahead,
    repeated_attention,
    shared_prompts,
    stream_points,
)
from .records import SUBLAYERS, Record, with_old_names
from .vectors import TraitVector

RESIDUAL = dict(zip(("input", "after_attn", "output"), SUBLAYERS, strict=True))
_ROUTING = ("router_scores", "expert_indices", "expert_weights")
_ADDED = ("attn_out", "mixer_out", "mlp_out")


def capture_single_layer(
    model: HookedModel,
    prompt: str | Sequence[int],
    vectors: Sequence[TraitVector],
    *,
    layer: int,
    max_tokens: int = 50,
    temperature: float = 0.7,
    top_p: float = 0.9,
    seed: int = 0,
    alignment: str = "at",
    normalize: bool = True,
    identity: ModelIdentity | None = None,
) -> list[Record]:
    """Everything inside a layer, token by token, and how much of it lies along each of several trait vectors.

        [record] = capture_single_layer(model, "The capital of France is", [vector], layer=2, max_tokens=5)
        record["internals"]["prompt"]["mlp"]["activated"]           # [n_prompt, d_mlp]
        record["projections"]["response"]["heads"]                  # [5, n_heads]: what each head adds along the trait

    Where nothing lies between the down projection and the stream, ``activated @ neurons.alignment + neurons.bias`` is
    the MLP's projection, neuron by neuron; ``metadata["neurons"]`` says whether it is so.

    Args:
        layer: the block to capture, from 0; the vectors may be of any.
        prompt, vectors, the others: as in ``capture_all_layers``; a vector is one, not a list.

    Returns:
        a record for each vector, in their order; the ``internals`` of traits that share a run are the same arrays.

    Raises:
        HookError: as ``capture_all_layers``, and for a layer that the model does not have.
    """
    check_layer(model, layer)
    settings = Settings(max_tokens, temperature, top_p, seed, alignment, normalize)
    traits = [AtLayers((vector,), each_layer=False) for vector in listed(vectors) if isinstance(vector, TraitVector)]
    if len(traits) < len(vectors):
        raise HookError("vectors is a list of TraitVectors, one for each trait.", field="vectors")
    identity = check_model(model, vectors, identity)
    inside = Inside.of(model, layer)
    records: dict[int, Record] = {}
    for tokens, group in shared_prompts(model, prompt, vectors).items():
        run = TraitRun(model, tokens, inside.names, settings)
        parts = ("prompt", "response")
        internals = {part: _internals(run, inside, part) for part in parts}
        rows = np.stack([vectors[i].unit if normalize else vectors[i].vector for i in group])
        projected = {part: _projections(run, inside, part, rows) for part in parts}
        pattern = internals["prompt"].get("attention", {}).get("attn_weights")
        ahead = pattern is not None and looks_ahead(pattern)
        neurons, about_neurons = _neurons(model, run, inside, rows)
        for column, i in enumerate(group):
            along = {part: {name: values[..., column] for name, values in projected[part].items()} for part in parts}
            metadata = traits[i].metadata(model, prompt, settings) | run.metadata(identity)
            metadata |= {"layer": layer, "neurons": about_neurons, "looks_ahead": [layer] if ahead else []}
            records[i] = with_old_names(
                {
                    **run.texts(prompt),
                    "layer": layer,
                    "internals": internals,
                    "projections": {
                        **along,
                        "neurons": {name: values[..., column] for name, values in neurons.items()},
                    },
                    "metadata": metadata | inside.metadata(),
                }
            )
    return [records[i] for i in range(len(traits))]


def check_layer(model: HookedModel, layer: int) -> None:
    """Raises HookError for a layer that the model does not have."""
    n_layers = model.cfg.n_layers
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < n_layers:
        raise HookError(f"Layers are 0 to {n_layers - 1}, got {layer!r}.", field="layer")


@dataclass
class Inside:
    """Where the internals of one layer are met.

    Args:
        places: by place in a record (``attention/q_proj``) the hook points of which it is the sum.
        widths: by place how wide it is, as the model has it.
        absent: by place why it is not there.
        added: what the layer's sublayers add to the stream, by short name: ``attn_out``.
        heads: the way from heads to the stream, where it can be told.
        down: the MLP's last projection, where it has one of its own.
        inner_norm: whether a norm lies before that.
    """

    model: HookedModel
    layer: int
    places: dict[str, tuple[str, ...]] = field(default_factory=dict)
    widths: dict[str, int | None] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    added: dict[str, str] = field(default_factory=dict)
    heads: HeadPath | None = None
    down: nn.Module | None = None
    inner_norm: bool = False

    @classmethod
    def of(cls, model: HookedModel, layer: int) -> "Inside":
        """Raises HookError where the block has several streams or none after attention."""
        inside = cls(model, layer)
        inside._find_attention()
        inside._find_mlp()
        for name, points in zip(RESIDUAL, stream_points(model, layer), strict=True):
            inside.places[f"residual/{name}"], inside.widths[f"residual/{name}"] = points, model.cfg.d_model
        for name, component in (("input", "mixer_in"), ("output", "mixer_out")):
            inside._put(f"mixer/{name}", component)
        inside._find_added()
        return inside

    @property
    def names(self) -> list[str]:
        """Every hook point that is met, once."""
        found = [name for points in self.places.values() for name in points] + list(self.added.values())
        return list(dict.fromkeys(found + ([self.heads.point.name] if self.heads is not None else [])))

    def metadata(self) -> dict[str, Any]:
        """What a record says of where it was made."""
        keys = self.model.hook_points.get(block_point("k", self.layer).name)
        return {
            **about_stream([stream_points(self.model, self.layer)]),
            "attends_repeatedly": repeated_attention(self.model, [self.layer]),
            "hook_points": {place: " + ".join(points) for place, points in self.places.items()},
            "widths": self.widths,
            "absent": self.absent,
            "n_heads": self.model.architecture.n_query_heads(self.layer),
            "n_key_value_heads": keys.size("head") if keys is not None else None,
        }

    def _put(self, place: str, component: str) -> bool:
        """Meet a component of the layer in a place; False where the layer has none."""
        name = block_point(component, self.layer).name
        point = self.model.hook_points.get(name)
        if point is None:
            return False
        sizes = [point.size(axis) for axis in point.axes[2:]]
        self.places[place] = (name,)
        if component != "pattern":
            self.widths[place] = None if None in sizes else int(np.prod([size or 0 for size in sizes]))
        return True

    def _put_module(self, place: str, module: nn.Module) -> None:
        self.places[place] = (f"{self.model.architecture.path(module)}.output",)
        self.widths[place] = n_rows(module)

    def _only(self, kind: str, places: Sequence[str]) -> nn.Module | None:
        """The layer's sublayer of a kind; where there is none, or several, the places are absent."""
        found = [sublayer.module for sublayer in self.model.architecture.sublayers[self.layer] if sublayer.kind == kind]
        if len(found) == 1:
            return found[0]
        name = {"attn": "attention", "mlp": "MLP"}[kind]
        why = f"the layer has {len(found)} sublayers of this kind" if found else f"the layer has no {name}"
        self.absent |= dict.fromkeys(places, why)
        return None

    def _find_attention(self) -> None:
        group = "attention"
        attn = self._only("attn", [f"{group}/{name}" for name in ("q_proj", "k_proj", "v_proj", "attn_weights")])
        if attn is None:
            return
        if not self._put(f"{group}/q_proj", "q"):
            self.absent[f"{group}/q_proj"] = "its queries are not what one projection gives"
        if not self._put(f"{group}/k_proj", "k"):
            # Latent attention, or attention to what an earlier layer made.
            why = "its keys and values are made from a latent, or are those of an earlier layer: see k and v"
            self.absent |= dict.fromkeys((f"{group}/k_proj", f"{group}/v_proj"), why)
            self._put(f"{group}/k", "rot_k")
            self._put(f"{group}/v", "v")
        elif (values := child(attn, VALUES)) is not None:
            self._put_module(f"{group}/v_proj", values)
        elif child(attn, FUSED) is None or not self._put(f"{group}/v_proj", "v"):
            self.absent[f"{group}/v_proj"] = "it has no projection of its own for values: see v"
            self._put(f"{group}/v", "v")
        pattern, why_not = attention_point(self.model, self.layer)
        if pattern:
            self.places[f"{group}/attn_weights"] = (pattern,)
        else:
            self.absent[f"{group}/attn_weights"] = why_not

    def _find_mlp(self) -> None:
        names = [f"mlp/{name}" for name in ("gate_proj", "up_proj", "activated", "down_proj")]
        mlp = self._only("mlp", names)
        roles = mlp_roles(mlp) if mlp is not None else {}
        if roles:
            gated = self._put("mlp/up_proj", "mlp_pre_linear")
            if not self._put("mlp/gate_proj" if gated else "mlp/up_proj", "mlp_pre") or not gated:
                self.absent["mlp/gate_proj"] = "the MLP has no gate"
            self._put("mlp/activated", "mlp_post")
            self._put_module("mlp/down_proj", roles["down"])
            self.down, self.inner_norm = roles["down"], child(mlp, NORMS_INSIDE_MLP) is not None
        elif mlp is not None:
            expert = any(name in mlp for name in EXPERTS)
            why = "experts: each token has hidden neurons of its own" if expert else "its parts are not known by name"
            self.absent |= dict.fromkeys(names, why)
        for component in _ROUTING:
            if not self._put(f"mlp/{component}", component):
                why_not = self.model.architecture.unsupported.get(block_point(component, self.layer).name)
                self.absent |= {f"mlp/{component}": why_not} if why_not else {}

    def _find_added(self) -> None:
        kinds = [sublayer.kind for sublayer in self.model.architecture.sublayers[self.layer]]
        for component in _ADDED:
            name, several = block_point(component, self.layer).name, kinds.count(component.removesuffix("_out"))
            if several > 1:
                self.absent[f"projections/{component}"] = f"the layer has {several} sublayers of this kind"
            elif name in self.model.hook_points:
                self.added[component] = name
            elif component != "mixer_out":
                why = self.model.architecture.unsupported.get(name) or f"the layer has no {name}"
                self.absent[f"projections/{component}"] = why
        try:
            self.heads = self.model.head_path(self.layer)
        except HookError as error:
            self.absent["projections/heads"] = str(error).rstrip(".")


def _internals(run: TraitRun, inside: Inside, part: str) -> dict[str, Any]:
    """What was met inside the layer, by group and name."""
    found: dict[str, Any] = {}
    for place, points in sorted(inside.places.items(), key=_order):
        group, name = place.split("/")
        if name == "attn_weights":
            value: Any = run.prompt(points[0]) if part == "prompt" else run.last_rows(points[0])
        else:
            value = sum(run.rows(point, part) for point in points)
            value = value.reshape(value.shape[0], int(np.prod(value.shape[1:])))
        found.setdefault(group, {})[name] = value
    return found


def _order(item: tuple[str, Any]) -> int:
    """Groups in the order of the guide, what is in them as it was found."""
    return ("attention", "mixer", "mlp", "residual").index(item[0].split("/")[0])


def _projections(run: TraitRun, inside: Inside, part: str, rows: np.ndarray) -> dict[str, np.ndarray]:
    """What lies along each of several vectors [vector, d_model]: by name [token, ..., vector]."""
    points = stream_points(inside.model, inside.layer)
    stream = [sum(run.rows(name, part) for name in names) @ rows.T for names in points]
    found = {"residual": np.stack(stream, axis=1)}
    found |= {component: run.rows(name, part) @ rows.T for component, name in inside.added.items()}
    if inside.heads is not None:
        found["heads"], found["heads_bias"] = _heads(run, inside.heads, part, rows)
    return found


def _heads(run: TraitRun, path: HeadPath, part: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What each head adds along the vectors [token, head, vector], and what is added whatever they hold [token,
    vector]. Both together are what lies along them of ``attn_out``."""
    value = run.rows(path.point.name, part)
    if not len(value):
        return np.empty((0, path.n_heads, len(rows)), np.float32), np.empty((0, len(rows)), np.float32)
    parts, across = path.parts(mx.array(value)[None]), mx.array(rows).T
    # A head at a time: all heads' parts are n_heads times what the layer adds.
    heads = [to_numpy(parts.of(head) @ across)[0] for head in range(path.n_heads)]
    return np.stack(heads, axis=1), to_numpy(parts.constant @ across)[0]


def _neurons(model: HookedModel, run: TraitRun, inside: Inside, rows: np.ndarray) -> tuple[dict[str, np.ndarray], str]:
    """How far each hidden neuron's output weights lie along the vectors, [d_mlp, vector], what the projection's bias
    does, [vector], and what they add up to."""
    if inside.down is None or "mlp/activated" not in inside.places:
        inside.absent["projections/neurons"] = inside.absent.get("mlp/activated", "the layer has no such MLP")
        return {}, inside.absent["projections/neurons"]
    width = run.prompt(inside.places["mlp/activated"][0]).shape[-1]
    zero = mx.zeros((1, 1, width))
    down, across = inside.down, mx.array(rows)
    bias = down(zero).astype(mx.float32)
    try:
        aligned = [to_numpy(mx.vjp(down, [zero], [row[None, None].astype(bias.dtype)])[1][0])[0, 0] for row in across]
    except (RuntimeError, ValueError) as error:
        # A kernel of one's own may have no derivative.
        inside.absent["projections/neurons"] = f"the down projection cannot be followed back: {error}"
        return {}, inside.absent["projections/neurons"]
    given, added = run.prompt(inside.places["mlp/down_proj"][0]), inside.added.get("mlp_out")
    if inside.inner_norm:
        about = "activated passes a norm before the down projection: alignment is that of what the norm gives"
    elif added is not None and np.array_equal(given, run.prompt(added)):
        about = "activated @ alignment + bias is mlp_out"
    else:
        about = "activated @ alignment + bias is down_proj, which is normed or scaled before it is added to the stream"
    return {"alignment": np.stack(aligned, axis=-1), "bias": to_numpy(bias)[0, 0] @ rows.T}, about
