"""A circuit: edges of a model's graph with their scores, and how it is pruned, saved and read.

    scores = attribute_edges(model, prompts)
    circuit = Circuit.of_scores(scores, n=40)           # the 40 strongest edges that lie on a path
    circuit.nodes                                       # ("embed", "L0H1", "L1H0")
    circuit.save("circuit.json")

Nodes write to the stream ("embed", "L0H1", "L0 mlp"), inputs read it ("L1H0<k>", "L1 mlp", "logits"), and an edge leads
from one to the other: "L0H1->L1H0<k>". A circuit keeps which nodes each of its inputs serves, so that it can be read,
pruned and drawn without the model that it was found in.
"""

import heapq
import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import isfinite
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ...errors import HookError
from ...model import HookedModel
from ...options import plain_json
from ...storage.files import reading, write_whole, writing
from ..identity import ModelIdentity
from ..progress import Progress
from .graph import graph_of
from .model_graph import EMBED, LOGITS, ModelGraph, own_name

if TYPE_CHECKING:
    from .edge_runs import EdgeRuns
    from .validation import CircuitValidation

    Graphed = HookedModel | EdgeRuns | ModelGraph

FORMAT = "neuroscope.circuit/1"
ARROW = "->"
_PARTS = ("mixer", "H", "attn", "mlp", "side")
"""What stands in a layer, in forward order."""
_MIXING = ("mixer", "H", "attn")
"""Those that stand before the others; of two of them in a layer either may be the first."""
_NODE = re.compile(r"L(\d+)(?:(H)(\d+)| (mixer|attn|mlp|side))")
_QUERY_HEAD = re.compile(r"(L\d+H\d+)(<[kv]>)")
_INPUT = re.compile(r"L\d+(?:(?:H|KV)\d+<[qkv]>| (?:mixer|attn|mlp|side))")
_KEYS = ("format", "nodes", "edges", "inputs", "dropped", "metadata")
_TOLD = ("method", "metric", "ablation", "settings")
"""What scores say of how they were made."""
_FIELD = "circuit"


@dataclass(frozen=True)
class Circuit:
    """Some edges of a model's graph, at least one.

    Args:
        edges: their scores by name, in forward order; None for an edge that has none.
        inputs: the nodes that each input of these edges serves: {"L1KV0<k>": ("L1H0", "L1H1")}; none for "logits".
        metadata: plain JSON values that say where it comes from: ``model`` (its name), ``identity`` (of its weights),
            ``edges_of_model``, ``method``, ``metric``, ``ablation`` and ``settings`` (as edge scores have them), and
            what else is to be said, as ``task``.
        dropped: edges that were chosen, and left out since they lie on no path from embed to logits.

    Raises:
        HookError: for no edges, names that are none, an edge that leads backwards, an input that serves no nodes of
            its layer, and scores and metadata that are not finite.
    """

    edges: Mapping[str, float | None]
    inputs: Mapping[str, tuple[str, ...]]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key in ("edges", "inputs", "metadata"):
            if not isinstance(getattr(self, key), Mapping):
                raise HookError(f"{key} of a circuit is a mapping, got {_kind(getattr(self, key))}.", field=_FIELD)
        if not self.edges:
            raise HookError("A circuit has at least one edge; this one is empty.", field=_FIELD)
        for name in (*self.edges, *self.dropped):
            _check_edge(name)
        for name, score in self.edges.items():
            if score is not None and not is_finite(score):
                raise HookError(f"The score of {name} is a finite number or none, got {score!r:.50}.", field=_FIELD)
        reads = {ends_of(name)[1] for name in self.edges}
        listed = dict.fromkeys([*self.inputs, *sorted(reads - {LOGITS})])
        inputs = {read: self.inputs.get(read, ()) for read in listed if read in reads}
        for read, served in inputs.items():
            _check_served(read, served)
        edges = {name: None if score is None else float(score) for name, score in self.edges.items()}
        object.__setattr__(self, "edges", edges)
        object.__setattr__(self, "inputs", {read: tuple(served) for read, served in inputs.items()})
        object.__setattr__(self, "metadata", _finite_json(self.metadata))
        object.__setattr__(self, "dropped", tuple(self.dropped))

    # Made from what an analysis found.

    @classmethod
    def of_scores(
        cls,
        scores: Any,
        graph: "Graphed | None" = None,
        *,
        n: int | None = None,
        threshold: float | None = None,
        grow: bool = False,
        connected: bool = True,
        metadata: Mapping[str, Any] | None = None,
    ) -> "Circuit":
        """The strongest edges of a model, by the sizes of their scores.

        Args:
            scores: has ``edges`` (names) and ``values`` [edge], and may say ``method``, ``metric``, ``ablation`` and
                ``settings``; as ``attribute_edges`` and ``acdc`` give them.
            graph: see :meth:`of_edges`; by default ``scores.graph``.
            n, threshold, grow, connected: see :meth:`pruned`. Without a limit all edges are taken.
            metadata: more of it, other than what scores and graph say.

        Raises:
            HookError: for what has no scores, and as :meth:`of_edges` and :meth:`pruned`.
        """
        values = scores_in(scores)
        known = graph_in(getattr(scores, "graph", None) if graph is None else graph)
        whole = cls.of_edges(known, values, connected=False, metadata=with_more(_told_by(scores), metadata))
        return whole.pruned(n=n, threshold=threshold, grow=grow, connected=connected)

    @classmethod
    def of_edges(
        cls,
        graph: "Graphed",
        edges: Iterable[str],
        *,
        connected: bool = True,
        metadata: Mapping[str, Any] | None = None,
    ) -> "Circuit":
        """These edges of a model's graph.

        Args:
            graph: a model, its edge runs, or its graph.
            edges: names, as here or as the EAP library has them; a mapping gives scores too.
            connected: leave out what lies on no path from embed to logits.
            metadata: more of it, other than what the graph says.

        Raises:
            HookError: for an edge that the model does not have, and where none is left.
        """
        known = graph_in(graph)
        scores = edges if isinstance(edges, Mapping) else dict.fromkeys(edge.name for edge in known.edges_of(edges))
        given = {known.edge(name).name: score for name, score in scores.items()}
        ordered = {edge.name: given[edge.name] for edge in known.edges if edge.name in given}
        found = with_more(_about(known), metadata)
        made = cls(ordered, {read.name: tuple(read.feeds) for read in known.inputs}, found)
        return made.connected() if connected else made

    @classmethod
    def of_nodes(
        cls,
        graph: "Graphed",
        nodes: Iterable[str],
        *,
        connected: bool = True,
        metadata: Mapping[str, Any] | None = None,
    ) -> "Circuit":
        """All edges among these nodes; embed and logits are always there.

        Args:
            graph, connected: see :meth:`of_edges`.
            nodes: their names. A component that the graph has in parts ("L1 attn" in heads, or "L1", a whole layer)
                stands for all of them.

        Raises:
            HookError: for a node that the model does not have.
        """
        known = graph_in(graph)
        wanted = {EMBED} | {node for name in nodes for node in nodes_of(known, name)}
        feeds = {read.name: set(read.feeds) for read in known.inputs}
        chosen = []
        for edge in known.edges:
            source, read = ends_of(edge.name)
            if source in wanted and (read == LOGITS or feeds[read] & wanted):
                chosen.append(edge.name)
        return cls.of_edges(known, chosen, connected=connected, metadata=metadata)

    @classmethod
    def of_components(cls, graph: "Graphed", found: Mapping[str, Any]) -> "Circuit":
        """All edges among the components of what ``analyse_circuit`` found."""
        about = {"method": "components", "metric": found["metric"], "faithfulness": found["faithfulness"]}
        return cls.of_nodes(graph, found["circuit"], metadata={**about, "replaced_by": found["ablation"]})

    # What it is.

    @property
    def nodes(self) -> tuple[str, ...]:
        """What writes in it, in forward order: sources, and what is read for but leads nowhere."""
        sources = {ends_of(name)[0] for name in self.edges}
        ends = (served for served in self.inputs.values() if not sources & set(served))
        return tuple(sorted(sources.union(*ends), key=_place))

    @property
    def steps(self) -> list[tuple[str, str, str]]:
        """Each edge as from where to where: source, node or "logits", and the edge's name.

        An input that serves several nodes leads to each of them that is in the circuit.
        """
        nodes = set(self.nodes)
        found = []
        for name in self.edges:
            source, read = ends_of(name)
            found += [(source, to, name) for to in (self.inputs.get(read) or (LOGITS,)) if to == LOGITS or to in nodes]
        return found

    def __len__(self) -> int:
        return len(self.edges)

    def __contains__(self, name: object) -> bool:
        """Whether an edge is in it, by any name that its model's graph reads."""
        if not isinstance(name, str):
            return False
        source, _, read = (end.strip() for end in name.partition(ARROW))
        return f"{own_name(source)}{ARROW}{self._input_of(own_name(read))}" in self.edges

    def _input_of(self, read: str) -> str:
        """The key-value head's input for k or v of a query head that it serves."""
        asked = _QUERY_HEAD.fullmatch(read)
        if asked is None or read in self.inputs:
            return read
        node, kind = asked.groups()
        return next((name for name, served in self.inputs.items() if name.endswith(kind) and node in served), read)

    # Pruning.

    def top(self, n: int, *, grow: bool = False, connected: bool = True) -> "Circuit":
        """The ``n`` edges with the greatest scores, whatever their signs; see :meth:`pruned`."""
        return self.pruned(n=n, grow=grow, connected=connected)

    def above(self, threshold: float, *, connected: bool = True) -> "Circuit":
        """The edges whose score, whatever its sign, is at least ``threshold``; see :meth:`pruned`."""
        return self.pruned(threshold=threshold, connected=connected)

    def pruned(
        self,
        *,
        n: int | None = None,
        threshold: float | None = None,
        grow: bool = False,
        connected: bool = True,
    ) -> "Circuit":
        """Fewer of its edges.

        Args:
            n: so many at most, those with the greatest scores, whatever their signs; of equal ones the earlier.
            threshold: those only whose score is at least so great, whatever its sign.
            grow: take the strongest edge that leads to what is there already, again and again from logits on, so that
                every edge leads to logits.
            connected: leave out what then lies on no path from embed to logits, so there may be fewer than ``n``; they
                are its ``dropped``.

        Raises:
            HookError: for limits out of range, edges without scores, and where nothing is left.
        """
        if n is not None and not (is_whole(n) and n >= 1):
            raise HookError(f"n is a whole number of at least 1, got {n!r}.", field="n")
        if threshold is not None and not (is_finite(threshold) and threshold >= 0):
            raise HookError(f"threshold is a finite number of at least 0, got {threshold!r}.", field="threshold")
        chosen: Collection[str] = self.edges
        if n is not None or threshold is not None:
            ranked = [name for name in self.ranked(grow=grow) if threshold is None or self._size(name) >= threshold]
            if not ranked:
                strongest = max(map(self._size, self.edges))
                message = f"No edge has a score of {threshold:g} or more: the strongest has {strongest:.4g}."
                raise HookError(message, field="threshold")
            chosen = set(ranked[:n])
        kept = replace(self, edges={name: score for name, score in self.edges.items() if name in chosen}, dropped=())
        return kept.connected() if connected else kept

    def ranked(self, *, grow: bool = False) -> list[str]:
        """Its edges from the greatest score to the least, whatever their signs; see :meth:`pruned`.

        Raises:
            HookError: for edges without scores.
        """
        without = [name for name, score in self.edges.items() if score is None]
        if without:
            raise HookError(f"Edges are chosen by their scores, and {without[0]} has none.", field=_FIELD)
        return grown(self.edges, self.inputs) if grow else sorted(self.edges, key=lambda name: -self._size(name))

    def connected(self) -> "Circuit":
        """Without the edges that lie on no path from embed to logits; they are its ``dropped``.

        Raises:
            HookError: where none is left.
        """
        kept = on_paths(self.edges, self.inputs)
        if not kept:
            n = len(self.edges)
            which = "The one edge lies" if n == 1 else f"None of the {n} edges lies"
            on = "no path" if n == 1 else "a path"
            raise HookError(f"{which} on {on} from {EMBED} to {LOGITS}: the circuit would be empty.", field=_FIELD)
        lost = tuple(name for name in self.edges if name not in kept)
        edges = {name: score for name, score in self.edges.items() if name in kept}
        return replace(self, edges=edges, dropped=self.dropped + lost)

    def _size(self, name: str) -> float:
        return abs(self.edges[name] or 0.0)

    # The model that it is run in.

    def validate(
        self, model: "HookedModel | EdgeRuns", eval_data: Any = None, options: Any = None, progress: Progress = None
    ) -> "CircuitValidation":
        """How far it is the model; see :func:`validate_circuit`."""
        from .validation import validate_circuit

        return validate_circuit(model, self, eval_data, options, progress)

    def check(self, graph: "Graphed") -> None:
        """Raises HookError unless a model has all its edges, between the same nodes.

        Args:
            graph: see :meth:`of_edges`.
        """
        known = graph_in(graph)
        edges = {edge.name for edge in known.edges}
        feeds = {read.name: tuple(read.feeds) for read in known.inputs}
        unknown = [name for name in self.edges if name not in edges]
        other = [read for read, served in self.inputs.items() if feeds.get(read, ()) != served]
        if unknown:
            more = f" ({len(unknown)} of {len(self)} edges)" if len(unknown) > 1 else ""
            raise HookError(f"The model does not match the circuit: it has no edge {unknown[0]}{more}.", field=_FIELD)
        if other:
            served = ", ".join(feeds[other[0]])
            raise HookError(f"The model does not match the circuit: there {other[0]} serves {served}.", field=_FIELD)

    # Files.

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: what :meth:`save` writes."""
        return {
            "format": FORMAT,
            "nodes": list(self.nodes),
            "edges": [{"edge": name, "score": score} for name, score in self.edges.items()],
            "inputs": {read: list(served) for read, served in self.inputs.items()},
            "dropped": list(self.dropped),
            "metadata": dict(self.metadata),
        }

    @classmethod
    def from_dict(cls, plain: Any) -> "Circuit":
        """What :meth:`to_dict` made.

        Raises:
            HookError: for anything else; one sentence says what is wrong.
        """
        if not isinstance(plain, Mapping):
            raise HookError(f"A circuit is a mapping with {', '.join(_KEYS)}, got {_kind(plain)}.", field=_FIELD)
        if plain.get("format") != FORMAT:
            told = f"it is of the format {plain['format']!r}" if "format" in plain else "it says no format"
            raise HookError(f"A circuit has the format {FORMAT!r}; {told}.", field=_FIELD)
        unknown, lacking = [str(k) for k in plain if k not in _KEYS], [k for k in _KEYS if k not in plain]
        if unknown or lacking:
            what = f"has no {unknown[0]!r}" if unknown else f"has {lacking[0]!r} too"
            raise HookError(f"A circuit {what}: its keys are {', '.join(_KEYS)}.", field=_FIELD)
        for key, kind in (("nodes", list), ("edges", list), ("inputs", dict), ("dropped", list), ("metadata", dict)):
            if not isinstance(plain[key], kind):
                wanted = "a list" if kind is list else "a mapping"
                raise HookError(f"{key} of a circuit is {wanted}, got {_kind(plain[key])}.", field=_FIELD)
        edges: dict[str, float | None] = {}
        for i, item in enumerate(plain["edges"]):
            if not isinstance(item, Mapping) or set(item) != {"edge", "score"} or not isinstance(item["edge"], str):
                raise HookError(f"edges[{i}] of a circuit is a mapping of edge, a name, and score.", field=_FIELD)
            if item["edge"] in edges:
                raise HookError(f"edges of a circuit name {item['edge']} twice.", field=_FIELD)
            edges[item["edge"]] = item["score"]
        for key, names in (("dropped", plain["dropped"]), *plain["inputs"].items()):
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise HookError(f"{key} of a circuit is a list of names.", field=_FIELD)
        made = cls(edges, {read: tuple(served) for read, served in plain["inputs"].items()}, plain["metadata"],
                   tuple(plain["dropped"]))  # fmt: skip
        if list(made.nodes) != plain["nodes"]:
            raise HookError(f"nodes of a circuit are those of its edges: {', '.join(made.nodes)}.", field=_FIELD)
        if set(made.inputs) != set(plain["inputs"]):
            more = next(iter(set(plain["inputs"]) - set(made.inputs)))
            raise HookError(f"inputs of a circuit are those of its edges; no edge leads to {more}.", field=_FIELD)
        return made

    def save(self, path: str | Path) -> Path:
        """Write it to a JSON file, which is there whole or not at all; answers the path.

        Raises:
            HookError: it cannot be written.
        """
        path = Path(path)
        with writing(path):
            write_whole(path, json.dumps(self.to_dict(), indent=2, allow_nan=False, ensure_ascii=False) + "\n")
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Circuit":
        """Read a circuit that :meth:`save` wrote.

        Raises:
            HookError: for a file that cannot be read or is no circuit, with the reason.
        """
        path = Path(path)
        with reading(path, "circuit"):
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))


def ends_of(name: str) -> tuple[str, str]:
    """The node that an edge comes from and the input that it leads to: "a->b" -> ("a", "b").

    Raises:
        HookError: for a name that is no edge's.
    """
    source, arrow, read = name.partition(ARROW) if isinstance(name, str) else ("", "", "")
    if not (source and arrow and read):
        raise HookError(f"An edge is called source{ARROW}input, as L0H1->L1H0<k>, got {name!r}.", field=_FIELD)
    return source, read


def on_paths(edges: Iterable[str], inputs: Mapping[str, Collection[str]]) -> set[str]:
    """The edges that lie on a path from embed to logits through others of them.

    Args:
        inputs: the nodes that each input serves.
    """
    ends = {name: ends_of(name) for name in edges}
    leads: dict[str, set[str]] = {}
    comes: dict[str, set[str]] = {}
    for source, read in ends.values():
        for to in inputs.get(read) or (LOGITS,):
            leads.setdefault(source, set()).add(to)
            comes.setdefault(to, set()).add(source)
    reached, useful = _spread(EMBED, leads), _spread(LOGITS, comes)
    return {
        name
        for name, (source, read) in ends.items()
        if source in reached and any(to in useful for to in (inputs.get(read) or (LOGITS,)))
    }


def _spread(start: str, neighbours: Mapping[str, Collection[str]]) -> set[str]:
    found, left = {start}, [start]
    while left:
        new = set(neighbours.get(left.pop(), ())) - found
        found |= new
        left += new
    return found


def grown(scores: Mapping[str, float | None], inputs: Mapping[str, Collection[str]]) -> list[str]:
    """Edges from logits on: each is the one with the greatest score, whatever its sign, that leads to what is there.

    Edges that lead nowhere come last, by their scores.
    """
    into: dict[str, list[str]] = {}
    order = {name: i for i, name in enumerate(scores)}
    for name in scores:
        for to in inputs.get(ends_of(name)[1]) or (LOGITS,):
            into.setdefault(to, []).append(name)

    def key(name: str) -> tuple[float, int, str]:
        return -abs(scores[name] or 0.0), order[name], name

    open_to: list[tuple[float, int, str]] = []
    taken: dict[str, None] = {}
    there: set[str] = set()

    def add(node: str) -> None:
        if node not in there:
            there.add(node)
            for name in into.get(node, ()):
                heapq.heappush(open_to, key(name))

    add(LOGITS)
    while open_to:
        name = heapq.heappop(open_to)[2]
        if name not in taken:
            taken[name] = None
            add(ends_of(name)[0])
    return [*taken, *sorted(set(scores) - set(taken), key=key)]


def graph_in(given: "Graphed | None") -> ModelGraph:
    """The graph of a model, of edge runs, or what is given.

    Raises:
        HookError: for what is none of these.
    """
    if hasattr(given, "edges") and hasattr(given, "inputs"):
        return cast(ModelGraph, given)
    if given is not None and hasattr(given, "graph"):
        return cast(ModelGraph, given.graph)
    if isinstance(given, HookedModel):
        return graph_of(given)
    raise HookError(f"A graph is a model, its edge runs or graph_of(model), got {_kind(given)}.", field="graph")


def _about(graph: ModelGraph) -> dict[str, Any]:
    """What metadata say of a graph."""
    model = getattr(graph, "model", None)
    told: dict[str, Any] = {"edges_of_model": len(graph.edges)}
    if isinstance(model, HookedModel):
        told = {"model": model.model_name, "identity": ModelIdentity.of(model).to_dict()} | told
    return told


def nodes_of(graph: ModelGraph, name: str, field: str = _FIELD) -> list[str]:
    """The nodes that a component's name stands for: "L1H0", all heads of "L1 attn", all of the layer "L1".

    Raises:
        HookError: for a component that the model does not have; ``field`` is where it was named.
    """
    names = [node.name for node in graph.nodes]
    if own_name(name) in names:
        return [own_name(name)]
    layer, _, part = str(name).partition(" ")
    inside = [own for own in names if (found := _NODE.fullmatch(own)) and f"L{found[1]}" == layer]
    chosen = inside if not part else [own for own in inside if part == "attn" and _NODE.fullmatch(own)[2]]  # type: ignore[index]
    if not chosen:
        raise HookError(f"There is no node {name!r}. There are: {', '.join(names)}.", field=field)
    return chosen


def scores_in(given: Any) -> dict[str, float | None]:
    """Edges and their scores, of edge scores, an ACDC result or a circuit.

    Raises:
        HookError: for what has none.
    """
    if isinstance(given, Circuit):
        return dict(given.edges)
    edges, values = (getattr(given, name, None) for name in ("edges", "values"))
    if edges is None or values is None or callable(values):
        raise HookError(f"scores are edge scores, an ACDC result or a circuit, got {_kind(given)}.", field="scores")
    if len(edges) != len(values):
        raise HookError(f"scores have a value for each edge, got {len(values)} for {len(edges)}.", field="scores")
    try:
        return dict(zip(edges, map(float, values), strict=True))
    except (TypeError, ValueError):
        raise HookError("scores have a number for each edge; one of these has another value.", field="scores") from None


def _told_by(scores: Any) -> dict[str, Any]:
    """What scores say of how they were made."""
    about = scores.metadata if isinstance(scores, Circuit) else {name: getattr(scores, name, None) for name in _TOLD}
    return {name: about[name] for name in _TOLD if about.get(name)}


def with_more(told: Mapping[str, Any], more: Mapping[str, Any] | None) -> dict[str, Any]:
    """Metadata and what a user adds to it.

    Raises:
        HookError: for more that is no mapping, or that says something else of what is told.
    """
    if not isinstance(more, Mapping | None):
        raise HookError(f"metadata of a circuit is a mapping, got {_kind(more)}.", field="metadata")
    for key, value in (more or {}).items():
        if key in told and plain_json(value, key) != plain_json(told[key], key):
            raise HookError(f"metadata cannot say {key} anew: it is {told[key]!r:.100}.", field="metadata")
    return {**told, **(more or {})}


def is_whole(value: Any) -> bool:
    """Whether it is a whole number, Python's or NumPy's, and no truth value."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Whether it is a finite number, Python's or NumPy's, that a float holds, and no truth value."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)
    except OverflowError:
        # A whole number that no float holds.
        return False


def _finite_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata as plain JSON values, whose numbers are finite."""
    made: dict[str, Any] = plain_json(dict(metadata), "metadata")
    try:
        json.dumps(metadata, allow_nan=False, default=lambda value: plain_json(value, "metadata"))
    except ValueError:
        raise HookError("metadata of a circuit has finite numbers only.", field="metadata") from None
    return made


def _is_node(name: object) -> bool:
    return isinstance(name, str) and (name == EMBED or _NODE.fullmatch(name) is not None)


def _check_edge(name: str) -> None:
    """Raises HookError unless it is the name of an edge that leads forward."""
    source, read = ends_of(name)
    for end, is_one, kind, known in (
        (source, _is_node(source), "node", f"{EMBED}, L0H1, L0 mlp"),
        (read, read == LOGITS or _INPUT.fullmatch(read) is not None, "input", f"L1H0<k>, L1KV0<v>, L1 mlp, {LOGITS}"),
    ):
        if not is_one:
            raise HookError(f"{end!r} is no {kind}: they are called as {known}.", field=_FIELD)
    if source == EMBED or read == LOGITS:
        return
    (layer, part), (own_layer, own_part) = _sublayer(source), _sublayer(read)
    mixing = part in _MIXING and own_part in _MIXING
    is_before = part != own_part if mixing else _PARTS.index(part) < _PARTS.index(own_part)
    if layer > own_layer or (layer == own_layer and not is_before):
        raise HookError(f"The edge {name} leads backwards: {source} is not before {read}.", field=_FIELD)


def _check_served(read: str, served: Any) -> None:
    """Raises HookError unless an input serves nodes of its layer."""
    if read == LOGITS:
        if served:
            raise HookError(f"The input {read} serves no nodes; got {str(served)[:100]}.", field=_FIELD)
        return
    if not served:
        raise HookError(f"The input {read} serves no node: say in inputs which it does.", field=_FIELD)
    fit = (
        isinstance(served, list | tuple)
        and all(_is_node(node) and node != EMBED and _sublayer(node)[0] == _sublayer(read)[0] for node in served)
        and len(set(served)) == len(served)
    )
    if not fit:
        raise HookError(
            f"The input {read} serves nodes of its layer, each once; got {str(served)[:100]}.", field=_FIELD
        )


def _sublayer(name: str) -> tuple[int, str]:
    """The layer of a node or an input, and what of it: one of _PARTS, of heads "attn"."""
    layer, _, part = name.partition(" ")
    found = re.match(r"L(\d+)", layer)
    assert found is not None
    return int(found[1]), part or "attn"


def _place(node: str) -> tuple[int, int, int]:
    """Where a node stands in a forward pass."""
    found = _NODE.fullmatch(node)
    if found is None:
        return -1, 0, 0
    layer, is_head, head, part = found.groups()
    return int(layer), _PARTS.index(is_head or part), int(head or 0)


def _kind(value: Any) -> str:
    return type(value).__name__
