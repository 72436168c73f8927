"""The components of a model that are ablated and patched, and what is put in their place.

A component is what one part of a layer adds to the stream: attention, an MLP, a mixer, a side branch, one head's z, or
all that a block adds.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from ..capture import CaptureRun
from ..errors import HookError
from ..hook_points import block_point
from ..hooks import Hook
from ..model import HookedModel

Part = Literal["attn_out", "mlp_out", "mixer_out", "side_out", "heads", "blocks"]
ADDED = ("mixer_out", "attn_out", "mlp_out", "side_out")
"""Everything that a block may add to the stream, in the order of a forward pass."""
USUAL: tuple[Part, ...] = ("mixer_out", "attn_out", "mlp_out")
"""What is looked at where nobody says."""
_WORDS = {"mixer_out": "mixer", "attn_out": "attn", "mlp_out": "mlp", "side_out": "side"}


@dataclass(frozen=True)
class Component:
    """One part of one layer.

    Args:
        name: unique: "L2H1" (a head), "L2 attn", "L2 mlp", "L2 mixer", "L2 side", "L2" (all that the block adds).
        layer: the block's index.
        part: which kind of part it is.
        points: the canonical names of the hook points at which it is replaced.
        head: the query head; None for what is no head.
    """

    name: str
    layer: int
    part: Part
    points: tuple[str, ...]
    head: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"component": self.name, "layer": self.layer, "part": self.part, "head": self.head}


def components_of(
    model: HookedModel, parts: Sequence[Part] | None = None, usual: Sequence[Part] = USUAL
) -> list[Component]:
    """The components of these kinds, layer by layer.

    Args:
        parts: kinds that the model has to have; None for those of ``usual`` that it has.

    Raises:
        HookError: for a kind of which the model has none that can be replaced, with the reason.
    """
    asked = usual if parts is None else parts
    found = {part: [c for layer in range(model.cfg.n_layers) for c in _in_layer(model, layer, part)] for part in asked}
    missing = [part for part in asked if not found[part]]
    if missing and (parts is not None or len(missing) == len(asked)):
        raise HookError(f"{model.cfg.model_type} {_why(model, missing[0])}.", field="components")
    order = {part: i for i, part in enumerate((*ADDED[:1], "heads", *ADDED[1:], "blocks"))}
    listed = [component for own in found.values() for component in own]
    return sorted(listed, key=lambda c: (c.layer, order[c.part], -1 if c.head is None else c.head))


def _why(model: HookedModel, part: Part) -> str:
    component = "z" if part == "heads" else "resid_post" if part == "blocks" else part
    try:
        name = block_point(component, 0).name
        model.architecture.check_supported(name)
        if name in model.hook_points:
            model.architecture.check_editable(model.hook_points[name])
    except HookError as error:
        return f"has no {part} to ablate: {str(error).rstrip('.')}"
    return f"has no {part} to ablate"


def _in_layer(model: HookedModel, layer: int, part: Part) -> Iterator[Component]:
    if part == "blocks":
        points = tuple(name for added in ADDED if (name := _point(model, layer, added)) is not None)
        if points:
            yield Component(f"L{layer}", layer, part, points)
        return
    if part == "heads":
        name = _point(model, layer, "z")
        n_heads = None if name is None else model.hook_points[name].size("head")
        for head in range(n_heads or 0):
            yield Component(f"L{layer}H{head}", layer, part, (str(name),), head)
        return
    name = _point(model, layer, part)
    if name is not None:
        yield Component(f"L{layer} {_WORDS[part]}", layer, part, (name,))


def _point(model: HookedModel, layer: int, component: str) -> str | None:
    """The name of a hook point that is there and can be edited."""
    name = block_point(component, layer).name
    if name not in model.hook_points:
        return None
    try:
        model.architecture.check_editable(model.hook_points[name])
    except HookError:
        return None
    return name


@dataclass(frozen=True, eq=False)
class Replacement:
    """Numbers to put in.

    Args:
        array: of the hook point's axes: all of them, or those after ``batch``, or those after ``pos``.
        by_position: row i stands for position i; False where the array serves every position.
    """

    array: mx.array | np.ndarray
    by_position: bool


Numbers = Mapping[str, Mapping[int, Replacement]]
"""What is put in, by hook point and by pass through the layer (0 alone for nearly all)."""


def edits(components: Sequence[Component], numbers: Numbers | None) -> list[dict[str, Any]]:
    """Interventions that put numbers in the place of components; None puts zeros there.

    Heads of one layer are one intervention.
    """
    heads: dict[str, list[int]] = {}
    whole: dict[str, None] = {}
    for component in components:
        if component.head is not None:
            heads.setdefault(component.points[0], []).append(component.head)
        else:
            whole.update(dict.fromkeys(component.points))
    made: list[dict[str, Any]] = []
    for name, chosen in [*((name, None) for name in whole), *heads.items()]:
        limits: dict[str, Any] = {"hook_point": name} | ({} if chosen is None else {"heads": sorted(chosen)})
        if numbers is None:
            made.append(limits | {"type": "zero"})
            continue
        passes = numbers[name]
        for index, given in passes.items():
            if len(passes) > 1:
                limits["passes"] = [index]
            made.append(limits | _put(given, chosen))
    return made


def _put(given: Replacement, heads: Sequence[int] | None) -> dict[str, Any]:
    if given.by_position:
        return {"type": "patch", "source": given.array}
    # Values have the sizes of the selection.
    return {"type": "set", "values": given.array if heads is None else np.array(given.array)[sorted(heads)]}


@contextmanager
def edited(model: HookedModel, interventions: Sequence[dict[str, Any]]) -> Iterator[None]:
    """The model with interventions in force, or as it is where there are none."""
    if not interventions:
        yield
        return
    with model.intervening(interventions):
        yield


def logits_of(
    model: HookedModel,
    tokens: np.ndarray,
    interventions: Sequence[dict[str, Any]] = (),
    hooks: Sequence[Hook] = (),
    kv_cache: list | None = None,
) -> mx.array:
    """Logits [batch, pos, d_vocab] of tokens [batch, pos]; registered hooks do not record this run.

    Args:
        hooks: what else edits this run, after the interventions.
        kv_cache: what the tokens continue.

    Raises:
        HookError: the model cannot read them.
    """
    inner = model.instrument.attached(model.instrument.plan(hooks)) if hooks else nullcontext()
    with edited(model, interventions), inner:
        try:
            found = model.model(mx.array(tokens), **({} if kv_cache is None else {"cache": kv_cache}))
        except ValueError as error:
            # Some models of mlx-lm cannot read several tokens at once.
            message = f"{model.cfg.model_type} cannot read tokens of shape {list(tokens.shape)}"
            raise HookError(f"{message}: {str(error).rstrip('.')}.") from error
    return found[0] if isinstance(found, tuple) else found


def captured(model: HookedModel, tokens: np.ndarray, points: Sequence[str]) -> dict[str, dict[int, mx.array]]:
    """The values at hook points for tokens [batch, pos], by pass through the layer; as ``logits_of`` runs."""
    run = CaptureRun(model.instrument, mx.array(tokens), [model.hook_points[name] for name in points])
    _, cache = run.run(logits="none")
    return {name: {record.pass_index: record.value for record in cache.records[name]} for name in points}
