"""What the heads of a model attend to in one prompt: which rule each follows, and what flows from token to token.

    1. Patterns, masks, sinks and values are what the kernel got and made (``patterns.py``).
    2. Each head has its score by every rule of ``heads.py``, of the queries that see some key which counts; a rule that
       no query can follow here has none, with the reason.
    3. A head's class is chosen by the steps of ``CLASSES``, the first that holds, with the number that chose it.
    4. Flow: what each token gives and receives layer by layer; the edges of each head by attention times the norm of
       what the key's value adds to the stream; attention rollout over the layers.
    5. Which layers may read which, by composition of weights (``composition.py``).

All of it is about one prompt, and correlational: a head that looks back need not use what it sees.
Sources: Olsson et al. (2022), the rules; Kobayashi et al., "Attention is Not Only a Weight" (2020), the norms; Abnar
and Zuidema, "Quantifying Attention Flow in Transformers" (2020), rollout.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import mlx.core as mx
import numpy as np
from pydantic import Field

from ..activations import id_list, to_numpy
from ..errors import HookError
from ..model import HookedModel, Tokens
from ..options import options, options_of
from ..token_text import TokenText
from .composition import BETWEEN_TWO, composition_scores, strongest_by_layers
from .head_detection import HOW, chance_of, rule_scores
from .head_weights import HeadWeights, chosen_layers, head_weights
from .heads import DETECTORS, mean_attention
from .patterns import LayerPattern, has_pattern, layer_patterns
from .progress import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SINK, BROAD, LOCAL, MIXED = "sink", "broad", "local", "mixed"
CLASSES = {
    SINK: "the sink takes a share of at least `threshold`",
    BROAD: "the entropy is at least `broad` of the largest possible: all keys alike",
    **{
        rule: f"at least `threshold` of the attention goes to {one.looks_at}, more than to all keys alike; of several "
        "such rules the highest score counts"
        for rule, one in DETECTORS.items()
    },
    LOCAL: "at least `threshold` goes to the query's own position and the `local` before it, more than to all keys "
    "alike",
    MIXED: "none of these",
}
"""The classes in the order in which they are tried, with what each takes."""
_KEYS_OF_A_HEAD = 3


@options
class AttentionOptions:
    """Options of :func:`analyse_attention`.

    Args:
        threshold: the share of attention that makes a class.
        broad: the entropy, as a share of the largest possible, from which on a head attends broadly.
        local: so many positions before the query count as near.
        top_k: edges that are told of each head.
        dependencies: pairs of layers that are told, by composition of weights; 0 for none. On large models it is the
            dearest part, whatever the prompt: layers can be chosen.
        max_tokens: longer prompts are refused: patterns grow with the square.
    """

    threshold: Annotated[float, Field(gt=0, le=1)] = 0.5
    broad: Annotated[float, Field(gt=0, le=1)] = 0.9
    local: Annotated[int, Field(ge=1)] = 4
    top_k: Annotated[int, Field(ge=0, le=100)] = 5
    dependencies: Annotated[int, Field(ge=0, le=200)] = 20
    max_tokens: Annotated[int, Field(ge=2)] = 512


@dataclass(frozen=True)
class FlowEdge:
    """What flows from one token to another in a head.

    Args:
        query, key: positions; what flows goes from the key to the query.
        attention: the pattern's entry.
        share: of all that the query gets in this head, by attention times the norm of what each value adds to the
            stream; None where these norms are not known.
    """

    query: int
    key: int
    attention: float
    share: float | None


@dataclass(frozen=True)
class HeadAttention:
    """One head on one prompt.

    Args:
        layer, head: which.
        pattern_type: its class, a key of ``CLASSES``.
        confidence: the number that chose the class: a score, an entropy or a share, and no probability; None for
            "mixed".
        also: further rules whose condition holds, by score.
        scores: by rule; None where no query can follow it.
        entropy: mean over queries, as a share of the largest possible; None for one position.
        local: attention to the query's own position and those just before; None in short prompts.
        sink: the share that the sink takes; None without sinks.
        edges: the strongest, the first position's own left out.
        received: attention that each position gets from a later one, the mean over those that see it [pos]; nan where
            none does.
    """

    layer: int
    head: int
    pattern_type: str
    confidence: float | None
    also: tuple[str, ...]
    scores: Mapping[str, float | None]
    entropy: float | None
    local: float | None
    sink: float | None
    edges: tuple[FlowEdge, ...]
    received: np.ndarray

    @property
    def name(self) -> str:
        """ "L2H1" """
        return f"L{self.layer}H{self.head}"


@dataclass(frozen=True, eq=False)
class LayerFlow:
    """What tokens give and receive in a layer, mean over its heads.

    Args:
        given: attention of each position to others [pos].
        own: attention of each position to itself [pos]; with ``given``, and what a sink takes, it is 1.
        received: attention that each position gets from a later one, mean over those that see it [pos]; nan where none
            does.
    """

    given: np.ndarray
    own: np.ndarray
    received: np.ndarray


@dataclass(frozen=True, eq=False)
class AttentionAnalysis:
    """What the heads of a model attend to in one prompt.

    Args:
        model: what the model is called.
        token_ids, tokens: of the prompt [pos].
        layers: those that were asked for.
        heads: layer by layer.
        patterns: by layer [head, query, key].
        flow: by layer.
        rollout: how much of each position's stream stems from each position's embedding [query, key], as attention
            alone would have it: of each layer half the mean pattern and half the identity, multiplied.
        dependencies: of pairs of layers the strongest compositions, plain JSON values.
        options: what was asked for.
        left_out: why a layer has no heads here, by layer.
        not_told: why a number is None: a rule, "induction of layer 3", "local", "sink", "share of layer 3",
            "dependencies".
        notes: what else is to be known of the numbers.
    """

    model: str
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    layers: tuple[int, ...]
    heads: tuple[HeadAttention, ...]
    patterns: Mapping[int, np.ndarray]
    flow: Mapping[int, LayerFlow]
    rollout: np.ndarray
    dependencies: Sequence[dict[str, Any]]
    options: AttentionOptions
    left_out: Mapping[int, str]
    not_told: Mapping[str, str]
    notes: Sequence[str] = ()

    def __getitem__(self, name: str) -> HeadAttention:
        """A head by its name, "L2H1".

        Raises:
            HookError: for one that there is not.
        """
        for head in self.heads:
            if head.name == name:
                return head
        raise HookError(f"There is no head {name!r} here: the layers are {', '.join(map(str, self.patterns))}.")

    def of_type(self, pattern_type: str) -> list[HeadAttention]:
        """The heads of a class, the surest first.

        Raises:
            HookError: for a class that there is not.
        """
        if pattern_type not in CLASSES:
            raise HookError(f"There is no class {pattern_type!r}: there are {', '.join(CLASSES)}.")
        found = [head for head in self.heads if head.pattern_type == pattern_type]
        return sorted(found, key=lambda head: (-(head.confidence or 0), head.layer, head.head))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        last = len(self.tokens) - 1
        types = {name: self.of_type(name) for name in CLASSES}
        return {
            "model": self.model,
            "tokens": list(self.tokens),
            "token_ids": list(self.token_ids),
            "analyzed_layers": list(self.layers),
            "attention_heads": [self._head(head) for head in self.heads],
            "attention_patterns": [
                {
                    "pattern_type": name,
                    "description": CLASSES[name],
                    "head_count": len(found),
                    "heads": [head.name for head in found],
                    "strength": _mean([head.confidence for head in found]),
                }
                for name, found in types.items()
                if found
            ],
            "cross_layer_dependencies": [dict(one) for one in self.dependencies],
            "token_flow": [
                {"layer": layer, "given": _plain(one.given), "own": _plain(one.own), "received": _plain(one.received)}
                for layer, one in self.flow.items()
            ],
            "rollout": {"position": last, "sources": _plain(self.rollout[last])},
            "pattern_statistics": {name: len(found) for name, found in types.items()},
            "how_computed": how_computed(self.options),
            "left_out": [{"layer": layer, "reason": why} for layer, why in self.left_out.items()],
            "not_told": dict(self.not_told),
            "notes": list(self.notes),
        }

    def _head(self, head: HeadAttention) -> dict[str, Any]:
        seen = [i for i in np.argsort(-np.nan_to_num(head.received), kind="stable") if np.isfinite(head.received[i])]
        return {
            "name": head.name,
            "layer": head.layer,
            "head": head.head,
            "pattern_type": head.pattern_type,
            "confidence": head.confidence,
            "also": list(head.also),
            "scores": dict(head.scores),
            "entropy": head.entropy,
            "local": head.local,
            "sink": head.sink,
            "key_tokens": [
                {"position": int(i), "token": self.tokens[i], "attention": float(head.received[i])}
                for i in seen[:_KEYS_OF_A_HEAD]
            ],
            "edges": [
                {
                    "query": edge.query,
                    "key": edge.key,
                    "query_token": self.tokens[edge.query],
                    "key_token": self.tokens[edge.key],
                    "attention": edge.attention,
                    "share": edge.share,
                }
                for edge in head.edges
            ],
        }


def how_computed(chosen: AttentionOptions) -> dict[str, Any]:
    """What each number is, in words, with the limits that were used."""
    return {
        "classes": dict(CLASSES),
        "limits": {"threshold": chosen.threshold, "broad": chosen.broad, "local": chosen.local},
        "scores": {rule: HOW[rule] for rule in DETECTORS},
        "confidence": "the number that chose the class: its score, entropy or share; not a probability",
        "entropy": "of each query's attention, as a share of that of all keys that it sees alike; mean over queries",
        "token_flow": "mean over heads; received: from each later position that sees the token, the mean over these",
        "edges": "by attention times the norm of what the key's value adds to the stream; share: of the query's sum",
        "rollout": "product over layers of half the heads' mean pattern and half the identity",
        "cross_layer_dependencies": "composition scores of weights less their baseline, 1 / sqrt(d_model)",
    }


def analyse_attention(
    model: HookedModel,
    prompt: Tokens,
    layers: Sequence[int] | None = None,
    options: AttentionOptions | dict | None = None,
    progress: Progress = None,
) -> AttentionAnalysis:
    """What each head attends to in a prompt, by which rule, and what flows from token to token.

        found = analyse_attention(model, "When Mary and John went to the store , John gave a drink to")
        found["L1H1"].pattern_type                      # "previous_token"
        [head.name for head in found.of_type("induction")]

    Args:
        prompt: a text, or the ids of one.
        layers: None for all; negative numbers count from the last.
        progress: called with the layers, and then the pairs of layers, that are done, and that there are.

    Raises:
        HookError: for several prompts or one that is too long, layers that there are not, and when none of them has an
            attention pattern.
    """
    chosen = options_of(AttentionOptions, options)
    asked = chosen_layers(model, layers)
    ids = model.to_tokens(prompt)
    if ids.shape[0] != 1:
        raise HookError(f"Attention is analysed for one prompt, got {ids.shape[0]}.", field="prompt")
    most = min(chosen.max_tokens, model.cfg.max_positions or chosen.max_tokens)
    if ids.shape[1] > most:
        raise HookError(f"The prompt has {ids.shape[1]} tokens; at most {most} are analysed.", field="prompt")
    left_out = {layer: why for layer in asked if (why := has_pattern(model, layer))}
    shown = [layer for layer in asked if layer not in left_out]
    if not shown:
        raise HookError(f"{model.cfg.model_type} has no attention to analyse there: {left_out[asked[0]]}.")
    tokens = np.array(id_list(ids[0]))
    spelling = TokenText(model.tokenizer)
    not_told = {rule: one.needs for rule, one in DETECTORS.items() if not one.keys(tokens).any()}
    if len(tokens) <= chosen.local + 1:
        not_told[LOCAL] = f"local attention needs more than {chosen.local + 1} positions"
    weights = head_weights(model, shown, ["output"])
    heads: list[HeadAttention] = []
    patterns: dict[int, np.ndarray] = {}
    flow: dict[int, LayerFlow] = {}
    rollout = np.eye(len(tokens))
    look_ahead: list[int] = []
    told = _Told(progress, len(shown), chosen.dependencies > 0)
    for one in layer_patterns(model, tokens[None], shown, values=True):
        norms = _norms(model, one, weights[one.layer])
        if isinstance(norms, str):
            not_told[f"share of layer {one.layer}"] = norms
        found = _Layer(one, tokens, None if isinstance(norms, str) else norms, chosen)
        hidden = [rule for rule in DETECTORS if rule not in found.rules and rule not in not_told]
        not_told |= {f"{rule} of layer {one.layer}": "its window hides every key that counts" for rule in hidden}
        heads += found.heads()
        patterns[one.layer], flow[one.layer] = found.pattern, found.flow()
        rollout = found.mixing() @ rollout
        if np.triu(one.visible[0], k=1).any():
            look_ahead.append(one.layer)
        told.layers(len(flow))
    if without := sorted({head.layer for head in heads if head.sink is None}):
        not_told[SINK] = f"without sinks: layers {', '.join(map(str, without))}"
    dependencies, why = _dependencies(model, shown, chosen.dependencies, told.pairs)
    if why:
        not_told["dependencies"] = why
    return AttentionAnalysis(
        model.model_name,
        tuple(tokens.tolist()),
        tuple(spelling.text(token) for token in tokens.tolist()),
        tuple(asked),
        tuple(heads),
        patterns,
        flow,
        rollout,
        dependencies,
        chosen,
        left_out,
        not_told,
        _notes(look_ahead),
    )


class _Told:
    """Progress of an analysis: its layers, then the pairs of layers that compose."""

    def __init__(self, progress: Progress, n_layers: int, has_pairs: bool) -> None:
        self._progress, self._n_layers = progress, n_layers
        self._total = n_layers + (n_layers * (n_layers - 1) // 2 if has_pairs else 0)

    def layers(self, done: int) -> None:
        if self._progress is not None:
            self._progress(done, self._total)

    def pairs(self, done: int, total: int) -> None:
        self.layers(self._n_layers + done)


def _notes(look_ahead: Sequence[int]) -> tuple[str, ...]:
    if not look_ahead:
        return ()
    return (
        f"Queries see later keys too in layers {', '.join(map(str, look_ahead))}: classes, entropies, edges and "
        "rollout count them, and received is from later positions alone.",
    )


class _Layer:
    """The numbers of one layer on one prompt."""

    def __init__(
        self, one: LayerPattern, tokens: np.ndarray, norms: np.ndarray | None, chosen: AttentionOptions
    ) -> None:
        self.layer, self.chosen, self.norms = one.layer, chosen, norms
        self.pattern = one.pattern[0].astype(np.float64)
        self.visible = one.visible[0]
        self.sinks = None if one.sink is None else one.sink[0].mean(axis=1)
        self.rules = rule_scores(self.pattern, self.visible, tokens)

    def heads(self) -> list[HeadAttention]:
        n_heads = len(self.pattern)
        entropy = self._entropies()
        near, near_by_chance = self._local()
        received = self._received(self.pattern)
        made = []
        for head in range(n_heads):
            scores = {r: float(self.rules[r][0][head]) if r in self.rules else None for r in DETECTORS}
            sink = None if self.sinks is None else float(self.sinks[head])
            entropies_own = None if entropy is None else float(entropy[head])
            local = None if near is None else float(near[head])
            rules = [r for r, s in scores.items() if s is not None and self._holds(s, self.rules[r][1])]
            rules.sort(key=lambda rule: -(scores[rule] or 0))
            kind: str
            sure: float | None
            if sink is not None and sink >= self.chosen.threshold:
                kind, sure = SINK, sink
            elif entropies_own is not None and entropies_own >= self.chosen.broad:
                kind, sure = BROAD, entropies_own
            elif rules:
                kind, sure = rules[0], scores[rules[0]]
            elif local is not None and self._holds(local, near_by_chance):
                kind, sure = LOCAL, local
            else:
                kind, sure = MIXED, None
            also = tuple(rule for rule in rules if rule != kind)
            edges = self._edges(head)
            one = (scores, entropies_own, local, sink, edges, received[head])
            made.append(HeadAttention(self.layer, head, kind, sure, also, *one))
        return made

    def _holds(self, score: float, by_chance: float) -> bool:
        return score >= self.chosen.threshold and score > by_chance + 1e-6

    def _entropies(self) -> np.ndarray | None:
        """[head], of what goes to keys, as a share of the entropy of all visible keys alike."""
        n_seen = self.visible.sum(axis=1)
        queries = n_seen > 1
        if not queries.any():
            return None
        whole = self.pattern.sum(axis=2, keepdims=True)
        weights = np.divide(self.pattern, whole, out=np.zeros_like(self.pattern), where=whole > 0)
        logs = np.log(weights, out=np.zeros_like(weights), where=weights > 0)
        entropy = -(weights * logs).sum(axis=2)[:, queries] / np.log(n_seen[queries])
        return np.clip(entropy, 0, 1).mean(axis=1)

    def _local(self) -> tuple[np.ndarray | None, float]:
        """[head] the attention to near keys of the queries that see others, and that of all keys alike."""
        n = len(self.visible)
        distance = np.arange(n)[:, None] - np.arange(n)[None]
        near = (distance >= 0) & (distance <= self.chosen.local) & self.visible
        near &= (self.visible & ~near).any(axis=1)[:, None]
        if not near.any():
            return None, 0.0
        return mean_attention(self.pattern, near), chance_of(near, self.visible)

    def _received(self, pattern: np.ndarray) -> np.ndarray:
        """Attention from later positions, mean over those that see it, [..., key]."""
        later = np.tril(self.visible, k=-1)
        seers = later.sum(axis=0)
        got = (pattern * later).sum(axis=-2)
        return np.divide(got, seers, out=np.full(got.shape, np.nan), where=seers > 0)

    def _edges(self, head: int) -> tuple[FlowEdge, ...]:
        pattern = self.pattern[head]
        if self.norms is None:
            size, shares = pattern, None
        else:
            size = pattern * self.norms[head][None]
            total = size.sum(axis=1, keepdims=True)
            shares = np.divide(size, total, out=np.zeros_like(size), where=total > 0)
        # The first position has no choice.
        asked = size[1:].reshape(-1)
        top: np.ndarray = np.arange(len(asked))
        if len(asked) > self.chosen.top_k:
            top = np.argpartition(-asked, self.chosen.top_k)[: self.chosen.top_k]
        order = sorted((int(i) for i in top if asked[i] > 0), key=lambda i: (-asked[i], i))
        found = []
        for query, key in (divmod(i + pattern.shape[1], pattern.shape[1]) for i in order):
            share = None if shares is None else float(shares[query, key])
            found.append(FlowEdge(query, key, float(pattern[query, key]), share))
        return tuple(found)

    def flow(self) -> LayerFlow:
        mean = self.pattern.mean(axis=0)
        own = np.diagonal(mean)
        return LayerFlow(mean.sum(axis=1) - own, own.copy(), self._received(mean))

    def mixing(self) -> np.ndarray:
        """How a layer mixes the streams of positions, [query, key], rows of sum 1."""
        mean = self.pattern.mean(axis=0)
        mixed = (mean + np.eye(len(mean))) / 2
        return mixed / mixed.sum(axis=1, keepdims=True)


def _norms(model: HookedModel, one: LayerPattern, weights: HeadWeights) -> np.ndarray | str:
    """The norm of what each key's value adds to the stream in each head [head, key], up to a scale, or why not.

    A norm behind the output projection divides all that a query gets by one number, so shares and their order within a
    query are as without.
    """
    if weights.output is None:
        return weights.why_not("output")
    if one.values is None:
        return "the values of its heads are not shown"
    values = one.values.astype(mx.float32)[0].transpose(1, 0, 2)
    n_heads, d_head = weights.output.shape[:2]
    if values.shape[0] != n_heads:
        served = model.architecture.values_per_query(one.layer, values[None], n_heads)[0]
        values = served if served.shape[0] == n_heads else mx.repeat(values, n_heads // values.shape[0], axis=0)
    if values.shape[-1] != d_head:
        return "its values are not as wide as what its output projection reads"
    gram = weights.output @ weights.output.swapaxes(-1, -2)
    return to_numpy(mx.sqrt(mx.maximum(((values @ gram) * values).sum(axis=-1), 0)), "float64")


def _dependencies(
    model: HookedModel, layers: Sequence[int], count: int, progress: Progress = None
) -> tuple[list[dict[str, Any]], str]:
    """The strongest compositions by pairs of layers, and why there are none."""
    if not count or len(layers) < 2:
        return [], "they were not asked for" if not count else BETWEEN_TWO
    try:
        found = composition_scores(model, layers, progress)
    except HookError as error:
        return [], str(error).rstrip(".")
    return [
        {
            "source_layer": source,
            "target_layer": target,
            "dependency_type": f"{scores[0].kind}_composition",
            "strength": scores[0].above,
            "score": scores[0].score,
            "baseline": scores[0].baseline,
            "edge": scores[0].edge,
            "affected_heads": [f"L{layer}H{head}" for layer, head in (scores[0].source, scores[0].target)],
        }
        for (source, target), scores in strongest_by_layers(found, count)
    ], ""


def _plain(numbers: np.ndarray) -> list[float | None]:
    return [float(number) if np.isfinite(number) else None for number in numbers]


def _mean(numbers: Sequence[float | None]) -> float | None:
    known = [number for number in numbers if number is not None]
    return float(np.mean(known)) if known else None


def draw_attention(found: AttentionAnalysis) -> list[tuple[str, "Figure"]]:
    """The classes of all heads, and what each token gives and receives in each layer."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    from .charts import COLOURS, figure, heat_map
    from .pictures import PLAIN

    layers, most = list(found.patterns), max(len(pattern) for pattern in found.patterns.values())
    palette = dict(zip(CLASSES, (*COLOURS, "#d4a72c"), strict=False)) | {MIXED: "#d0d7de"}
    kinds = list(CLASSES)
    cells = np.full((len(layers), most), np.nan)
    for head in found.heads:
        cells[layers.index(head.layer), head.head] = kinds.index(head.pattern_type)
    width, height = min(14.0, 4.5 + 0.45 * most), min(14.0, 1.8 + 0.4 * len(layers))
    made, (axes,) = figure(f"What the heads of {found.model} attend to", width=width, height=height)
    colours = ListedColormap([palette[kind] for kind in kinds])
    axes.imshow(np.ma.masked_invalid(cells), cmap=colours, vmin=-0.5, vmax=len(kinds) - 0.5, aspect="auto")
    axes.set_yticks(range(len(layers)), [f"layer {layer}" for layer in layers], fontsize=8, **PLAIN)
    axes.set_xticks(range(most), [f"H{head}" for head in range(most)], fontsize=8, **PLAIN)
    if cells.size <= 200:
        for head in found.heads:
            if head.confidence is not None:
                place = (head.head, layers.index(head.layer))
                axes.text(*place, f"{head.confidence:.2f}", ha="center", va="center", fontsize=7, color="white")
    there = [kind for kind in kinds if any(head.pattern_type == kind for head in found.heads)]
    patches = [Patch(color=palette[kind], label=kind.replace("_", " ")) for kind in there]
    axes.legend(handles=patches, fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    drawn = [("Classes of the heads", made)]
    labels = [f"{i} {token}" for i, token in enumerate(found.tokens)]
    wide = min(14.0, 3.0 + 0.35 * len(labels))
    for title, name in (("What each token receives", "received"), ("What each token gives", "given")):
        made, (axes,) = figure(f"{title}, mean over heads", width=wide, height=height + 0.8)
        values = np.array([getattr(found.flow[layer], name) for layer in layers])
        heat_map(axes, values, [f"layer {layer}" for layer in layers], labels, "attention", limits=(0.0, 1.0))
        axes.tick_params(axis="x", labelrotation=90)
        drawn.append((title, made))
    return drawn


def draw_patterns(found: AttentionAnalysis, names: Sequence[str]) -> list[tuple[str, "Figure"]]:
    """The patterns of some heads, "L1H1": queries from top to bottom, keys from left to right.

    Raises:
        HookError: for heads that are not there.
    """
    from .charts import figure, heat_map

    labels = [f"{i} {token}" for i, token in enumerate(found.tokens)]
    size = min(14.0, 2.5 + 0.3 * len(labels))
    drawn = []
    for name in names:
        head = found[name]
        title = f"{name}: {head.pattern_type.replace('_', ' ')}"
        made, (axes,) = figure(title, width=size + 1.0, height=size)
        heat_map(axes, found.patterns[head.layer][head.head], labels, labels, "attention", limits=(0.0, 1.0))
        axes.tick_params(axis="x", labelrotation=90)
        drawn.append((title, made))
    return drawn
