"""Where the constructions of known models say that the answer is, and how much of it: what patching has to find.

A place is ("stream", layer, position), before that layer; ("head", layer, head, position); ("mlp", layer, position).
Everything here is arithmetic on a pair of prompts: no model runs.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mlx_hooks.analysis.known_models import (
    KnownFraction,
    KnownHistogram,
    KnownIndirectObject,
    KnownInduction,
    KnownLinear,
    KnownModel,
    KnownModularAddition,
    KnownReverse,
    KnownRouter,
)
from mlx_hooks.analysis.known_models.indirect_object import GIVER
from mlx_hooks.analysis.known_models.planted_router import SHIFTS

Place = tuple[str | int, ...]
Pair = Mapping[str, Any]


def known_places(known: KnownModel, kind: str, pair: Pair, direction: str) -> dict[Place, float]:
    """What each place recovers (denoising) or damages (noising), by the construction; all that are not here nothing.

    NaN stands for what the construction does not tell.
    """
    last = len(pair["clean"]) - 1
    if isinstance(known, KnownLinear):
        return _linear(known, pair)
    if isinstance(known, KnownRouter):
        return _router(known, pair)
    if isinstance(known, KnownFraction):
        return _fraction(known, pair)
    found: set[Place]
    if isinstance(known, KnownInduction):
        at = changed(pair)
        found = {("stream", 0, at), ("head", 1, known.induction_head, last), ("stream", 2, last)}
        if kind == "match":
            found |= {("head", 0, known.previous_head, at + 1), ("stream", 1, at + 1)}
        else:
            found |= {("stream", 1, at)}
    elif isinstance(known, KnownIndirectObject):
        found = _indirect_object(known, kind, pair, direction)
    elif isinstance(known, KnownReverse) and kind == "letters":
        at = changed(pair)
        found = {("stream", 0, at), ("stream", 1, at), ("head", 1, known.looking_head, last), ("stream", 2, last)}
    elif isinstance(known, KnownReverse):
        return _reverse_length(known, pair, direction)
    elif isinstance(known, KnownHistogram):
        found = {("stream", 0, changed(pair)), ("head", 0, known.same_head, last), ("mlp", 0, last)}
        found |= {("stream", 1, last), ("stream", 2, last)}
    elif isinstance(known, KnownModularAddition):
        found = {("stream", 0, changed(pair)), ("head", 0, known.kinds.index(kind), last), ("mlp", 0, last)}
        found |= {("stream", 1, last)}
    else:
        raise AssertionError(f"{known.name} has no places here.")
    return dict.fromkeys(found, 1.0)


def changed(pair: Pair) -> int:
    """The one position at which the prompts differ."""
    (position,) = np.flatnonzero(np.array(pair["clean"]) != np.array(pair["corrupted"]))
    return int(position)


def _indirect_object(known: KnownIndirectObject, kind: str, pair: Pair, direction: str) -> set[Place]:
    at, last = changed(pair), len(pair["clean"]) - 1
    duplicate, inhibition, mover = (("head", *head) for head in known.circuit_heads)
    found: set[Place] = {("stream", 0, at), (*mover, last), ("stream", 3, last)}
    way: set[Place] = {(*duplicate, GIVER), ("stream", 1, GIVER), (*inhibition, last), ("stream", 2, last)}
    if kind == "giver":
        return found | way
    if kind == "object":
        return found | {("stream", 1, at), ("stream", 2, at)}
    # The subject is said no more if it is read and inhibited: both are needed, and neither is enough.
    return found if direction == "denoising" else found | way | {("stream", 1, at), ("stream", 2, at)}


def _fraction(known: KnownFraction, pair: Pair) -> dict[Place, float]:
    """The share is a mean: each letter that is x in one prompt alone is a part."""
    last = len(pair["clean"]) - 1
    is_x = [np.array(pair[which]) == 0 for which in ("clean", "corrupted")]
    parts = is_x[0].astype(float) - is_x[1]
    parts /= parts.sum()
    by_position = {
        place: part for p, part in enumerate(parts) for place in (("stream", 0, p), ("stream", 1, p), ("mlp", 0, p))
    }
    return by_position | {("head", 1, known.mean_head, last): 1.0, ("stream", 2, last): 1.0}


def _reverse_length(known: KnownReverse, pair: Pair, direction: str) -> dict[Place, float]:
    """From the finding head on, where SEP stands in the other prompt is where to look in this one.

    Before that the tokens that differ, SEP among them, work together: of these the construction says nothing alone.
    """
    last = len(pair["clean"]) - 1
    own, other = ("corrupted", "clean") if direction == "denoising" else ("clean", "corrupted")
    wanted = pair["answer" if other == "clean" else "wrong"]
    looks_at = {which: 2 * pair[which].index(known.SEP) - last - 1 for which in (own, other)}
    # With a letter that is neither the answer nor the wrong one the logit difference is half way.
    part = 1.0 if pair[own][looks_at[other]] == wanted else 0.5
    found: dict[Place, float] = dict.fromkeys(
        [("head", 0, known.finding_head, last), ("mlp", 0, last), ("stream", 1, last)], part
    )
    if pair[own][looks_at[own]] != pair[other][looks_at[own]]:
        found[("stream", 1, looks_at[own])] = 0.5
    differ = np.flatnonzero(np.array(pair[own]) != np.array(pair[other]))
    found |= {("stream", 0, int(position)): np.nan for position in differ}
    return found | {("head", 1, known.looking_head, last): 1.0, ("stream", 2, last): 1.0}


def _linear(known: KnownLinear, pair: Pair) -> dict[Place, float]:
    """What is written otherwise, times the gradient of all that reads it later."""
    clean, corrupted = (known.written(pair[which]) for which in ("clean", "corrupted"))
    slopes = known.gradients(len(pair["clean"]), pair["answer"], pair["wrong"])
    nodes = known.nodes
    levels = [one["logits"][-1] for one in (clean, corrupted)]
    whole = float(np.subtract(*(level[pair["answer"]] - level[pair["wrong"]] for level in levels)))

    def parts(written: list[str], read: list[str]) -> np.ndarray:
        change = sum(clean[node] - corrupted[node] for node in written)
        return np.asarray((change * sum(slopes[node] for node in read)).sum(axis=-1) / whole)

    found: dict[Place, float] = {}
    for layer in range(known.n_layers + 1):
        before = [node for node in nodes[:-1] if node == "embed" or int(node[1]) < layer]
        found |= {("stream", layer, p): x for p, x in enumerate(parts(before, nodes[len(before) :]))}
    for i, node in enumerate(nodes[1:-1], start=1):
        own: Place = ("mlp", int(node[1])) if node.endswith("mlp") else ("head", int(node[1]), int(node[3:]))
        found |= {(*own, p): x for p, x in enumerate(parts([node], nodes[i + 1 :]))}
    return found


def _router(known: KnownRouter, pair: Pair) -> dict[Place, float]:
    """Both layers' experts write to the logits, each its part."""
    last = len(pair["clean"]) - 1

    def difference(layer: int, which: str) -> float:
        token = pair[which][last]
        chosen = zip(known.experts(layer, token), known.weights_of(token), strict=True)
        said = {(token + SHIFTS[expert]) % known.vocabulary: weight for expert, weight in chosen}
        return said.get(pair["answer"], 0.0) - said.get(pair["wrong"], 0.0)

    changes = [difference(layer, "clean") - difference(layer, "corrupted") for layer in range(known.n_layers)]
    shares = [change / sum(changes) for change in changes]
    streams: list[Place] = [("stream", layer, last) for layer in range(known.n_layers + 1)]
    return dict.fromkeys(streams, 1.0) | {("mlp", i, last): share for i, share in enumerate(shares)}
