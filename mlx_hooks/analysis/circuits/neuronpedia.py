"""A circuit on one prompt as Neuronpedia's attribution-graph JSON, which its viewer and circuit-tracer's draw.

The viewer's axes are tokens and layers. A circuit of components is not by position: each component is one node, at the
prompt's last token unless told otherwise. What enters block 0 is a node per token. An edge from there is shared out
equally among the tokens at which the corrupted prompt differs, for at no other is anything put in its place; among all
tokens where there is no corrupted prompt, or where the circuit was found by another ablation. The weights of these
links add up to the edge's.

Source: Neuronpedia's graph-schema.json, version 1.0.0; circuit-tracer's graph_models.py.
"""

import json
import re
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ...errors import HookError
from ...model import HookedModel
from ...storage.files import write_whole, writing
from ...token_text import TokenText
from ..components import logits_of
from ..eval_data import EvalData, EvalExample, eval_data_of
from .circuit import is_finite
from .places import EMBED, LOGITS, Place, places_of, steps_of

if TYPE_CHECKING:
    from .circuit import Circuit

SCHEMA_VERSION = 1
_SLUG = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_ALWAYS = {"token_prob": 0.0, "is_target_logit": False, "run_idx": 0, "reverse_ctx_idx": 0}
"""What circuit-tracer's nodes have besides what the schema asks for."""
_WHITESPACE = {"\n": "⏎", "\t": "→", "\r": "↵"}
"""As circuit-tracer marks them."""
_TYPES = {"head": "attention head", "attn": "attention", "mlp": "mlp", "mixer": "mixer", "side": "side branch"}


def to_neuronpedia(
    circuit: "Circuit",
    model: HookedModel,
    example: Any,
    *,
    slug: str = "circuit",
    positions: Mapping[str, int] | None = None,
    supernodes: Mapping[str, Sequence[str]] | None = None,
    created: float | None = None,
) -> dict[str, Any]:
    """A circuit on one prompt, as plain JSON values.

        graph = to_neuronpedia(circuit, model, {"clean": ..., "corrupted": ..., "answer": " Mary", "wrong": " John"})

    Args:
        example: one prompt with its answer, as :func:`eval_data_of` takes a list of, or an ``EvalExample``.
        slug: the graph's name in addresses and of files; of letters, digits, "-", "_" and ".". See :func:`slug_of`.
        positions: where nodes stand, by name ("L0H1"), from 0; negative ones count from the end. Default: the last.
        supernodes: groups of nodes by what they are called, {"name movers": ["L3H0"]}; those of "embed" are one anyway.
        created: seconds since 1970; default: now.

    Returns:
        ``metadata``, ``qParams``, ``nodes`` and ``links`` of the schema. A link's weight is what its edges add to the
        metric, by their scores, or the sizes of scores that have no sign (ACDC's); of edges without one it is 1. A
        node's ``influence`` is circuit-tracer's cumulative one, by which the viewer prunes: nodes by their share of
        what reaches the answer, the largest first, summed up to this one.

    Raises:
        HookError: for an example without an answer, for positions and supernodes of nodes that the circuit has not, a
            slug with other characters, and a time that is none.
    """
    if not isinstance(slug, str) or not _SLUG.fullmatch(slug):
        raise HookError(f"slug is letters, digits, '-', '_' and '.', got {slug!r:.100}.", field="slug")
    if created is not None and not is_finite(created):
        raise HookError(f"created is in seconds since 1970, got {created!r:.100}.", field="created")
    chosen = _example(model, example)
    places = places_of(circuit)
    at = _positions(places, {} if positions is None else positions, len(chosen.tokens))
    spelled = TokenText(model.tokenizer)
    tokens = [visible_token(spelled.text(token)) for token in chosen.tokens]
    embedded = _embed_nodes(chosen, tokens)
    answer = _answer_node(model, chosen, spelled)
    own = {name: _node(place, at[name]) for name, place in places.items() if name not in (EMBED, LOGITS)}
    ids = {name: [node["node_id"]] for name, node in own.items()} | {LOGITS: [answer["node_id"]]}
    ids[EMBED] = [embedded[i]["node_id"] for i in _sharing(circuit, chosen)]
    nodes = [_ALWAYS | node for node in (*embedded, *own.values(), answer)]
    links = _links(circuit, ids)
    for node, influence in zip(nodes, _cumulative(nodes, links), strict=True):
        node["influence"] = influence
    linked = {end for link in links for end in (link["source"], link["target"])}
    return {
        "metadata": _metadata(circuit, model, chosen, tokens, spelled, slug, created),
        "qParams": {
            "pinnedIds": [node["node_id"] for node in nodes if node["node_id"] in linked],
            "supernodes": _supernodes(ids, {} if supernodes is None else supernodes),
            "linkType": "both",
            "clickedId": answer["node_id"],
            "sg_pos": "",
        },
        "nodes": nodes,
        "links": links,
    }


def slug_of(name: str) -> str:
    """What a graph of any name may be called in addresses: "Who gives, to whom?" is "Who-gives-to-whom"."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "circuit"


def save_neuronpedia(graph: Mapping[str, Any], path: str | Path) -> None:
    """Write what ``to_neuronpedia`` made; the file is there whole or not at all.

    Raises:
        HookError: the file cannot be written.
    """
    path = Path(path).expanduser()
    with writing(path):
        write_whole(path, json.dumps(graph, ensure_ascii=False, allow_nan=False, indent=1))


def visible_token(text: str) -> str:
    """A token with its whitespace marked as the viewers mark it; single spaces between words stay.

    >>> visible_token("\\n\\n"), visible_token(" cat")
    ('⏎⏎', ' cat')
    """
    marked = "".join(_WHITESPACE.get(character, character) for character in text)
    return "␣" * len(marked) if marked and not marked.strip(" ") else marked


def _example(model: HookedModel, given: Any) -> EvalExample:
    own = EvalData((given,), "answers") if isinstance(given, EvalExample) else [given]
    example = eval_data_of(model, own).examples[0]
    asked = [token for token in example.targets if token >= 0]
    if len(asked) != 1:
        raise HookError("A graph is of one prompt with its answer: give clean and answer.", field="example")
    return example


def _positions(places: Mapping[str, Place], given: Mapping[str, int], n_tokens: int) -> dict[str, int]:
    if not isinstance(given, Mapping):
        raise HookError(f"positions are whole numbers by node, got {given!r:.100}.", field="positions")
    _known(places, given, "positions")
    for name, position in given.items():
        if type(position) is not int or not -n_tokens <= position < n_tokens:
            raise HookError(
                f"The position of {name} is a whole number from {-n_tokens} to {n_tokens - 1}, got {position!r}.",
                field="positions",
            )
    return {name: given.get(name, -1) % n_tokens for name in places}


def _known(places: Mapping[str, Any], names: Any, field: str) -> None:
    unknown = [name for name in names if not isinstance(name, str) or name not in places or name in (EMBED, LOGITS)]
    if unknown:
        there = [name for name in places if name not in (EMBED, LOGITS)]
        raise HookError(f"The circuit has no node {unknown[0]!r} to place. It has {', '.join(there)}.", field=field)


def _sharing(circuit: "Circuit", example: EvalExample) -> list[int]:
    """The positions whose tokens bring in what "embed" brings."""
    said = circuit.metadata
    ablation = said.get("ablation") or said.get("replaced_by") or "corrupted"
    if example.corrupted is None or ablation != "corrupted":
        return list(range(len(example.tokens)))
    pairs = zip(example.tokens, example.corrupted, strict=True)
    return [i for i, (clean, corrupted) in enumerate(pairs) if clean != corrupted]


def _embed_nodes(example: EvalExample, tokens: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {
            "node_id": f"E_{token}_{position}",
            "feature": position,
            "layer": "E",
            "ctx_idx": position,
            "feature_type": "embedding",
            "jsNodeId": f"E_{token}-{position}",
            "clerp": f'Embedding "{text}"',
        }
        for position, (token, text) in enumerate(zip(example.tokens, tokens, strict=True))
    ]


def _node(place: Place, position: int) -> dict[str, Any]:
    # Where a feature's id has a number, these have the part's name: nothing else can have their ids.
    part = place.part if place.head is None else f"{place.part}{place.head}"
    words = _TYPES[place.part] if place.head is None else f"head {place.head}"
    return {
        "node_id": f"{place.layer}_{part}_{position}",
        "feature": None,
        "layer": str(place.layer),
        "ctx_idx": position,
        "feature_type": _TYPES[place.part],
        "jsNodeId": f"{place.layer}_{part}-0",
        "clerp": f"{place.name}: layer {place.layer}, {words}",
    }


def _answer_node(model: HookedModel, example: EvalExample, spelled: TokenText) -> dict[str, Any]:
    position = max(i for i, token in enumerate(example.targets) if token >= 0)
    token = example.targets[position]
    logits = logits_of(model, np.array([example.tokens]))[0, position]
    probability = float(np.array(mx.softmax(logits.astype(mx.float32))[token]))
    text = visible_token(spelled.text(token))
    layer = model.cfg.n_layers + 1
    return {
        "node_id": f"{layer}_{token}_{position}",
        "feature": token,
        "layer": str(layer),
        "ctx_idx": position,
        "feature_type": "logit",
        "jsNodeId": f"L_{token}-{position}",
        "clerp": f'Output "{text}" (p={probability:.3f})',
        "token_prob": probability,
        "is_target_logit": True,
    }


def _links(circuit: "Circuit", ids: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """Weights by ends: edges from one node to q, k and v of one head are one link."""
    weights: dict[tuple[str, str], float] = {}
    for step in steps_of(circuit):
        sources, (target,) = ids[step.source], ids[step.target]
        for source in sources:
            share = (1.0 if step.strength is None else step.strength) * step.share / len(sources)
            weights[source, target] = weights.get((source, target), 0.0) + share
    return [{"source": source, "target": target, "weight": weight} for (source, target), weight in weights.items()]


def _cumulative(nodes: Sequence[Mapping[str, Any]], links: Sequence[Mapping[str, Any]]) -> list[float]:
    """Of each node the influence on the answer of all that have as much or more, as a share of the whole, [node].

    What reaches a node is shared out among its sources by the absolute weights of their links.
    """
    index = {node["node_id"]: i for i, node in enumerate(nodes)}
    weights = np.zeros((len(nodes), len(nodes)))
    for link in links:
        weights[index[link["target"]], index[link["source"]]] += abs(link["weight"])
    sums = weights.sum(axis=1, keepdims=True)
    shares = np.divide(weights, sums, out=np.zeros_like(weights), where=sums > 0)
    influence = np.zeros(len(nodes))
    # The answer is the last node, and no path through a circuit is longer than it has nodes.
    reached = np.eye(len(nodes))[-1]
    for _ in nodes:
        influence += reached
        reached = reached @ shares
    order = np.argsort(-influence, kind="stable")
    cumulative = np.empty(len(nodes))
    cumulative[order] = np.cumsum(influence[order]) / influence.sum()
    return np.minimum(cumulative, 1.0).tolist()


def _supernodes(ids: Mapping[str, Sequence[str]], given: Mapping[str, Sequence[str]]) -> list[list[str]]:
    if not isinstance(given, Mapping) or not all(isinstance(names, list | tuple) for names in given.values()):
        raise HookError(
            f"supernodes are lists of nodes by what they are called, got {given!r:.100}.", field="supernodes"
        )
    for names in given.values():
        _known(ids, names, "supernodes")
    embedded = [["embed", *ids[EMBED]]] if len(ids[EMBED]) > 1 else []
    return [*embedded, *([label, *(ids[name][0] for name in names)] for label, names in given.items())]


def _metadata(
    circuit: "Circuit",
    model: HookedModel,
    example: EvalExample,
    tokens: Sequence[str],
    spelled: TokenText,
    slug: str,
    created: float | None,
) -> dict[str, Any]:
    scores = [abs(score) for score in circuit.edges.values() if score is not None]
    compared = "" if example.wrong is None else f', compared with "{visible_token(spelled.text(example.wrong))}"'
    how = ", ".join(
        f"{name} {circuit.metadata[name]}" for name in ("method", "metric", "ablation") if name in circuit.metadata
    )
    return {
        "slug": slug,
        "scan": model.model_name,
        "transcoder_list": [],
        "prompt_tokens": list(tokens),
        "prompt": _prompt(model, example, spelled),
        "schema_version": SCHEMA_VERSION,
        "info": {
            "description": f"A circuit of {len(circuit.edges)} edges{how and f' ({how})'}{compared}. Nodes are model "
            "components; they stand at the prompt's last token unless placed elsewhere.",
            "generator": {"name": "NeuroScope for MLX", "version": version("neuroscope-mlx")},
            "create_time_ms": int(1000 * (time.time() if created is None else created)),
        },
        "pruning_settings": {"n_edges": len(circuit.edges), "least_score": min(scores, default=None)},
    }


def _prompt(model: HookedModel, example: EvalExample, spelled: TokenText) -> str:
    """The text, without the special tokens that stand in ``prompt_tokens``."""
    if model.tokenizer is None:
        return " ".join(spelled.text(token) for token in example.tokens)
    special = set(getattr(model.tokenizer, "all_special_ids", ()))
    return str(model.tokenizer.decode([token for token in example.tokens if token not in special]))
