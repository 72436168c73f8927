"""Which heads read what earlier heads write, and which copy tokens: from the weights alone.

Source: Elhage et al., "A Mathematical Framework for Transformer Circuits" (2021).

    Composition     ||A B|| / (||A|| ||B||), Frobenius norms, of what an earlier head writes, A = value @ output, with
                    what a later one reads: B = query @ key.T for its queries, key @ query.T for its keys, and
                    value @ output for its values. Each product is made in d_head x d_head numbers.
    Baseline        1 / sqrt(d_model): the root mean square of that score over all rotations of the stream between the
                    two heads, exact for any two of them. Scores at the baseline say nothing.
    Copying         sum(l) / sum(|l|) over the eigenvalues l of embedding @ value @ output @ unembedding: 1 where a head
                    that attends to a token raises just that token, -1 where it lowers it, about 0 for a random head.

Maps are those of ``head_weights.py``: norms are linear up to a scale, which cancels; biases, rotary positions and the
layers in between are left out. A score says what a head could read, not what it does: patch the edge to know.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from ..activations import scalar
from ..contributions import LinearNorm
from ..errors import HookError
from ..hook_points import block_point, outer_point
from ..model import HookedModel
from .components import captured
from .head_weights import HeadWeights, check_one_stream, chosen_layers, head_weights
from .progress import Progress

Kind = Literal["q", "k", "v"]
_READS: dict[Kind, tuple[str, str]] = {"q": ("query", "key"), "k": ("key", "query"), "v": ("value", "output")}
_TOKENS_AT_ONCE = 4096
_ROWS_AT_ONCE = 64
BETWEEN_TWO = "they are between two layers"
"""Why one layer has no scores."""
_NOTHING = 1e-6
"""Of a product's largest possible size, what float32 makes of 0."""


@dataclass(frozen=True)
class CompositionScore:
    """How much of what one head writes another may read.

    Args:
        source, target: (layer, head).
        kind: whether the target reads it with its queries, keys or values.
        score: between 0 and 1.
        baseline: of random heads.
    """

    source: tuple[int, int]
    target: tuple[int, int]
    kind: Kind
    score: float
    baseline: float

    @property
    def edge(self) -> str:
        """The edge's name: "L0H1->L1H0<k>"."""
        return f"L{self.source[0]}H{self.source[1]}->L{self.target[0]}H{self.target[1]}<{self.kind}>"

    @property
    def above(self) -> float:
        """The score less the baseline."""
        return self.score - self.baseline

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "edge": self.edge,
            "source": list(self.source),
            "target": list(self.target),
            "kind": self.kind,
            "score": self.score,
            "baseline": self.baseline,
            "above_baseline": self.above,
        }


@dataclass(frozen=True, eq=False)
class Composition:
    """Composition scores of the heads of a model.

    Args:
        model: what the model is called.
        heads: (layer, head) along both axes of the scores.
        scores: by kind [source, target]; nan where the target is in no later layer, the map of one of the two is not
            known, or one of them writes or reads nothing.
        baseline: the scores' root mean square where two heads have nothing to do with each other.
        reasons: why maps are not known, "L3 query" -> why; of one layer alone why there are no "scores".
    """

    model: str
    heads: tuple[tuple[int, int], ...]
    scores: Mapping[Kind, np.ndarray]
    baseline: float
    reasons: Mapping[str, str]

    def of(self, source: tuple[int, int], target: tuple[int, int], kind: Kind) -> float:
        """One score; nan where there is none.

        Raises:
            HookError: for heads and kinds that there are not.
        """
        for head in (source, target):
            if not isinstance(head, tuple | list) or tuple(head) not in self.heads:
                raise HookError(f"There is no head {head!r}: there are {len(self.heads)}, as (layer, head).")
        if kind not in self.scores:
            raise HookError(f"Heads compose by q, k or v, got {kind!r}.", field="kind")
        return float(self.scores[kind][self.heads.index(tuple(source)), self.heads.index(tuple(target))])

    def strongest(self, count: int | None = 20, kind: Kind | None = None) -> list[CompositionScore]:
        """The scores, the highest first; None for all of them.

        Raises:
            HookError: for a count below 0, and a kind that there is not.
        """
        if kind not in (None, "q", "k", "v"):
            raise HookError(f"Heads compose by q, k or v, got {kind!r}.", field="kind")
        if count is not None and (type(count) is not int or count < 0):
            raise HookError(f"count is a whole number from 0 on, or None, got {count!r}.", field="count")
        found = [
            CompositionScore(self.heads[a], self.heads[b], each, float(values[a, b]), self.baseline)
            for each, values in self.scores.items()
            if kind in (None, each)
            for a, b in np.argwhere(np.isfinite(values)).tolist()
        ]
        return sorted(found, key=lambda one: (-one.score, one.source, one.target, one.kind))[:count]

    def to_dict(self, count: int = 50) -> dict[str, Any]:
        """Plain JSON values: the ``count`` highest scores."""
        return {
            "model": self.model,
            "how_computed": "||A B|| / (||A|| ||B||) of what the source writes and the target reads; from weights",
            "baseline": self.baseline,
            "scored": int(sum(np.isfinite(values).sum() for values in self.scores.values())),
            "strongest": [one.to_dict() for one in self.strongest(count)],
            "not_told": dict(self.reasons),
        }


def composition_scores(
    model: HookedModel, layers: Iterable[int] | None = None, progress: Progress = None
) -> Composition:
    """How much of what each head writes each head of a later layer may read.

        found = composition_scores(model)
        for one in found.strongest(5):
            print(one.edge, one.score, one.above)

    Args:
        layers: whose heads; None for all.
        progress: called with the pairs of layers that are done, and that there are.

    Raises:
        HookError: for layers that there are not, where layers do not read a plain sum of what earlier ones write, and
            when of no pair of layers the maps are known, with the reason.
    """
    chosen = chosen_layers(model, layers)
    check_one_stream(model)
    weights = head_weights(model, chosen)
    heads = [
        (layer, h) for layer in chosen if _attends(model, layer) for h in range(model.architecture.n_query_heads(layer))
    ]
    places = {layer: [i for i, head in enumerate(heads) if head[0] == layer] for layer in chosen}
    scores: dict[Kind, np.ndarray] = {kind: np.full((len(heads), len(heads)), np.nan) for kind in _READS}
    pairs = [(a, b) for a in chosen for b in chosen if a < b]
    for done, (a, b) in enumerate(pairs, 1):
        for kind, (near, far) in _READS.items():
            if not (weights[a].why_not("value", "output") or weights[b].why_not(near, far)):
                scores[kind][np.ix_(places[a], places[b])] = _composed(weights[a], weights[b], near, far)
        if progress is not None:
            progress(done, len(pairs))
    reasons = {f"L{layer} {kind}": why for layer, one in weights.items() for kind, why in one.reasons.items()}
    if not pairs:
        reasons["scores"] = BETWEEN_TWO
    elif why := _why_none(model, weights, scores):
        raise HookError(f"Composition cannot be told on {model.cfg.model_type}: {why}.")
    return Composition(model.model_name, tuple(heads), scores, float(model.cfg.d_model) ** -0.5, reasons)


def _why_none(model: HookedModel, weights: Mapping[int, HeadWeights], scores: Mapping[Kind, np.ndarray]) -> str:
    """Why no score can be told; empty where some can, or heads are known and write nothing."""
    attending = [layer for layer in weights if _attends(model, layer)]
    if len(attending) < 2:
        return f"of these layers {len(attending)} attends, and composition is between two"
    reasons = [f"L{layer} {kind}: {why}" for layer in attending for kind, why in weights[layer].reasons.items()]
    told = any(np.isfinite(values).any() for values in scores.values())
    return reasons[0] if reasons and not told else ""


def _attends(model: HookedModel, layer: int) -> bool:
    return block_point("attn_in", layer).name in model.hook_points


def _composed(source: HeadWeights, target: HeadWeights, near: str, far: str) -> np.ndarray:
    """The scores of one kind of two layers' heads, [source, target]."""
    assert source.value is not None
    assert source.output is not None
    value, output = _unit(source.value), _unit(source.output.swapaxes(-1, -2))
    reads, rest = _unit(getattr(target, near)), getattr(target, far)
    rest = _unit(rest.swapaxes(-1, -2) if far == "output" else rest)
    # ||V O R S|| for V, S with Gram matrices G, H and M = O R: the trace of G M H M^T.
    grams = [_gram(each) for each in (value, output, reads, rest)]
    written = (grams[0] * grams[1]).sum(axis=(-1, -2))
    read = (grams[2] * grams[3]).sum(axis=(-1, -2))
    left, right = output.swapaxes(1, 2).reshape(-1, output.shape[1]), reads.swapaxes(0, 1).reshape(reads.shape[1], -1)
    middle = (left @ right).reshape(len(output), -1, len(reads), reads.shape[2]).swapaxes(1, 2)
    squares = ((grams[0][:, None] @ middle) * (middle @ grams[3][None])).sum(axis=(-1, -2))
    above, below = (np.array(each, np.float64) for each in (squares, written[:, None] * read[None]))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(below > 0, np.sqrt(np.maximum(above, 0) / below), np.nan)


def _unit(maps: mx.array) -> mx.array:
    """Each head's matrix at norm 1, so that no square overflows; zeros stay."""
    sizes = mx.abs(maps).max(axis=(-1, -2), keepdims=True)
    maps = maps / mx.where(sizes > 0, sizes, 1)
    norms = mx.sqrt((maps * maps).sum(axis=(-1, -2), keepdims=True))
    return maps / mx.where(norms > 0, norms, 1)


def _gram(maps: mx.array) -> mx.array:
    """[head, d_head, d_head] of [head, d_model, d_head]"""
    return maps.swapaxes(-1, -2) @ maps


@dataclass(frozen=True, eq=False)
class Copying:
    """How far each head's OV circuit copies tokens.

    Args:
        scores: by layer [head], from -1 to 1; nan for a head that moves no token to any logit.
        reasons: why a layer has none, by layer.
    """

    scores: Mapping[int, np.ndarray]
    reasons: Mapping[int, str]


def copying_scores(model: HookedModel, layers: Iterable[int] | None = None) -> Copying:
    """How far each head, where it attends to a token, raises that very token: sum(l) / sum(|l|), [head] by layer.

    The eigenvalues l are those of embedding @ value @ output @ unembedding [d_vocab, d_vocab], whose nonzero ones are
    those of a d_head x d_head matrix. The embedding is what enters block 0 without positions; the last norm is linear
    up to a scale; a soft cap is taken back.

    Raises:
        HookError: for layers that there are not, and where layers do not read a plain sum of what earlier ones write.
    """
    chosen = chosen_layers(model, layers)
    check_one_stream(model)
    found = head_weights(model, chosen, ["value", "output"])
    reasons = {layer: why for layer in chosen if (why := found[layer].why_not("value", "output"))}
    told = [layer for layer in chosen if layer not in reasons]
    if not told:
        return Copying({}, reasons)
    try:
        back = _from_output_to_embedding(model)
    except HookError as error:
        return Copying({}, reasons | dict.fromkeys(told, str(error).rstrip(".")))
    scores, scale = {}, scalar(mx.sqrt((back * back).sum()))
    for layer in told:
        value, output = found[layer].value, found[layer].output
        assert value is not None
        assert output is not None
        scores[layer] = _copying(np.array(_unit(output) @ back @ _unit(value), np.float64), scale)
    return Copying(scores, reasons)


def _copying(circuits: np.ndarray, scale: float) -> np.ndarray:
    """sum(l) / sum(|l|) of [head, d_head, d_head]; nan for what is only the rounding of factors of norm 1 and scale."""
    values = np.linalg.eigvals(circuits)
    size = np.abs(values).sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(size > _NOTHING * scale, values.sum(axis=-1).real / size, np.nan)


def _from_output_to_embedding(model: HookedModel) -> mx.array:
    """Last norm @ unembedding @ embedding, [d_model, d_model]: one for the whole model, at largest entry 1."""
    norm_module = model.architecture.ln_final
    if norm_module is None:
        raise HookError("the last norm is a function, not a module, whose weight is not known")
    width, cap = model.cfg.d_model, model.architecture.logit_cap
    norm = LinearNorm(norm_module, width)
    embedding = _embedding(model)

    def logits(rows: mx.array) -> mx.array:
        # A row each: some of mlx-lm's own models read no more than one token at a time.
        given = model.unembed(rows[:, None], apply_norm=False)[:, 0].astype(mx.float32)
        return given if cap is None else cap * mx.arctanh(given / cap)

    zero = logits(mx.zeros((1, width)))
    # Tokens that are never said have a logit of -inf.
    embedding = mx.where(mx.isfinite(zero[0, : len(embedding)])[:, None], embedding, 0)
    zero = mx.where(mx.isfinite(zero), zero, 0)
    parts = []
    for start in range(0, width, _ROWS_AT_ONCE):
        rows = mx.arange(start, min(start + _ROWS_AT_ONCE, width))
        one_hot = (rows[:, None] == mx.arange(width)[None]).astype(mx.float32)
        raised = mx.where(mx.isfinite(given := logits(one_hot)), given - zero, 0)
        parts.append(raised[:, : len(embedding)] @ embedding)
        mx.eval(parts[-1])
    found = norm.weight[:, None] * mx.concatenate(parts)
    found = found - found.mean(axis=0, keepdims=True) if norm.centred else found
    return found / mx.maximum(mx.abs(found).max(), 1e-30)


def _embedding(model: HookedModel) -> mx.array:
    """What enters block 0 for each token, without positions, [d_vocab, d_model]."""
    names = [block_point("resid_pre", 0).name]
    positions = outer_point("pos_embed").name
    if positions in model.hook_points:
        names.append(positions)
    parts = []
    for start in range(0, model.cfg.d_vocab, _TOKENS_AT_ONCE):
        tokens = np.arange(start, min(start + _TOKENS_AT_ONCE, model.cfg.d_vocab))[:, None]
        values = captured(model, tokens, names)
        rows = values[names[0]][0][:, 0].astype(mx.float32)
        parts.append(rows - values[positions][0][:1].astype(mx.float32) if positions in values else rows)
        mx.eval(parts[-1])
    return mx.concatenate(parts)


def strongest_by_layers(found: Composition, count: int) -> list[tuple[tuple[int, int], list[CompositionScore]]]:
    """The scores above the baseline by (source layer, target layer), those of the highest first; ``count`` pairs."""
    pairs: dict[tuple[int, int], list[CompositionScore]] = {}
    for one in found.strongest(None):
        if one.above > 0:
            pairs.setdefault((one.source[0], one.target[0]), []).append(one)
    return list(pairs.items())[:count]
