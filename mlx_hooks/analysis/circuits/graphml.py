"""A circuit as a networkx graph and as GraphML."""

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...storage.files import write_whole, writing
from .places import places_of, steps_of

if TYPE_CHECKING:
    import networkx

    from .circuit import Circuit

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 does not have."""
_OF_NETWORKX = ("id", "node_default", "edge_default")
"""What networkx takes for its own among a graph's data when it writes GraphML."""


def as_graph(circuit: "Circuit") -> "networkx.MultiDiGraph":
    """A circuit as a directed graph; edges between two nodes are keyed by their names, since heads have three inputs.

        as_graph(circuit).edges["L0H1", "L1H0", "L0H1->L1H0<k>"]    # {"edge": ..., "input": "k", "score": 0.98}

    Returns:
        nodes by name, with their ``part`` ("embed", "head", "attn", "mlp", "mixer", "side", "logits"); those in a block
        have a ``layer``, heads the index ``head``. An edge has the name ``edge``, the ``input`` that it leads to ("q",
        "k", "v"; "in" where there is one) and, if it was given one, a ``score``; where heads share keys and values it
        leads to each of them. The graph has the circuit's metadata; what is neither text nor number there is JSON.
    """
    import networkx

    made = networkx.MultiDiGraph()
    made.graph.update(_plain(circuit.metadata))
    for place in places_of(circuit).values():
        where = {"layer": place.layer, "head": place.head}
        made.add_node(place.name, part=place.part, **{name: at for name, at in where.items() if at is not None})
    for step in steps_of(circuit):
        scored = {} if step.score is None else {"score": step.score}
        made.add_edge(step.source, step.target, key=step.edge, edge=step.edge, input=step.kind or "in", **scored)
    return made


def graphml(circuit: "Circuit") -> str:
    """``as_graph`` as a GraphML file's text, which ``networkx.read_graphml(file, force_multigraph=True)`` reads.

    In metadata U+FFFD stands for each character that XML does not have; ``id``, ``node_default`` and ``edge_default``,
    which networkx takes for its own, are called ``metadata_id`` and so on.
    """
    import networkx

    made = as_graph(circuit)
    # Keys are ids in GraphML, which have to differ in the whole file.
    numbered = networkx.MultiDiGraph()
    numbered.graph.update(_for_xml(made.graph))
    numbered.add_nodes_from(made.nodes(data=True))
    for number, (source, target, data) in enumerate(made.edges(data=True)):
        numbered.add_edge(source, target, key=number, **data)
    buffer = io.BytesIO()
    networkx.write_graphml(numbered, buffer)
    return buffer.getvalue().decode()


def save_graphml(circuit: "Circuit", path: str | Path) -> None:
    """Write ``graphml``; the file is there whole or not at all.

    Raises:
        HookError: the file cannot be written.
    """
    path = Path(path).expanduser()
    with writing(path):
        write_whole(path, graphml(circuit))


def _plain(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata as GraphML has attributes: texts, numbers and truths."""
    kept = {name: value for name, value in metadata.items() if value is not None}
    return {
        name: value if isinstance(value, str | int | float) else json.dumps(value, ensure_ascii=False)
        for name, value in kept.items()
    }


def _for_xml(plain: Mapping[str, Any]) -> dict[str, Any]:
    named = {f"metadata_{name}" if name in _OF_NETWORKX else name: value for name, value in plain.items()}
    return {
        _NOT_XML.sub("\ufffd", name): _NOT_XML.sub("\ufffd", value) if isinstance(value, str) else value
        for name, value in named.items()
    }
