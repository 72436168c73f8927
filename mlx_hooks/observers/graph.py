"""The attention graph of a generation as JSON, as a networkx graph and as GraphML."""

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import HookError
from ..storage.files import whole_file, writing

if TYPE_CHECKING:
    import networkx

    from .extraction import AttentionExtractionHook


def as_dict(hook: "AttentionExtractionHook") -> dict[str, Any]:
    """Everything that a hook kept, as plain JSON values.

    Returns:
        ``attention_records``: how many; ``unique_tokens``: texts of the tokens with an edge; ``layer_head_stats``:
        ``{"L0_H1": {edge_count, avg_weight, max_weight}}``; ``top_attended_tokens``: ``[[text, weight], ...]``, the
        attention received as key, the most attended first; ``full_data``: all records of ``attention_data``, without
        their ``tokens``: these are the first ``generation_context.total_length`` of ``tokens``. Beside these
        ``threshold``, ``top_k`` and ``edge_direction``.
    """
    edges = hook.edge_arrays()
    ends = np.union1d(edges["source"], edges["target"]).tolist()
    return {
        "attention_records": len(hook.attention_data),
        "unique_tokens": list(dict.fromkeys(hook.tokens[i] for i in ends)),
        "layer_head_stats": hook.layer_head_stats(),
        "top_attended_tokens": [[text, total] for text, total in hook.attention_received_as_key("token").items()],
        "threshold": hook.threshold,
        "top_k": hook.top_k,
        "edge_direction": "source is the key that is attended to, target the query that attends to it",
        "tokens": list(hook.tokens),
        "full_data": [_plain(record) for record in hook.attention_data],
    }


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    plain = {name: value for name, value in record.items() if name != "tokens"}
    for edge in plain["edges"]:
        if "value" in edge:
            edge["value"] = edge["value"].tolist()
    if "attention_matrix" in plain:
        plain["attention_matrix"] = plain["attention_matrix"].tolist()
    return plain


def as_graph(hook: "AttentionExtractionHook", by: str = "position") -> "networkx.MultiDiGraph":
    """What a hook kept as a directed graph with an edge from key to query per layer and head.

    Args:
        by: "position": a node per token of the text, with ``token``, ``position`` and ``prompt`` (whether it is the
            prompt's); edges have ``layer``, ``head`` and ``weight``. "token": a node per text, with ``count``; edges
            between two texts are taken together per layer and head: ``weight`` is their sum, ``count`` their number.
    """
    import networkx

    if by not in ("position", "token"):
        raise HookError(f"by is 'position' or 'token', got {by!r}.")
    edges = hook.edge_arrays()
    made = networkx.MultiDiGraph()
    names = ("source", "target", "layer", "head", "weight")
    columns = zip(*(edges[name].tolist() for name in names), strict=True)
    if by == "position":
        for position, token in enumerate(hook.tokens):
            made.add_node(position, token=token, position=position, prompt=position < hook.prompt_length)
        for source, target, layer, head, weight in columns:
            made.add_edge(source, target, layer=layer, head=head, weight=weight)
        return made
    for token in hook.tokens:
        count = made.nodes[token]["count"] if token in made else 0
        made.add_node(token, token=token, count=count + 1)
    for source, target, layer, head, weight in columns:
        ends, key = (hook.tokens[source], hook.tokens[target]), (layer, head)
        if not made.has_edge(*ends, key=key):
            made.add_edge(*ends, key=key, layer=layer, head=head, weight=0.0, count=0)
        edge = made.get_edge_data(*ends, key=key)
        edge["weight"] += weight
        edge["count"] += 1
    return made


def save_json(hook: "AttentionExtractionHook", path: str | Path) -> None:
    """Write ``as_dict``."""
    made = as_dict(hook)

    def write(draft: Path) -> None:
        with draft.open("w", encoding="utf-8") as file:
            json.dump(made, file, allow_nan=False)

    _write(path, write)


def save_graphml(hook: "AttentionExtractionHook", path: str | Path, by: str = "position") -> None:
    """Write ``as_graph``. What XML has no character for is written as ``\\x00``."""
    import networkx

    made = as_graph(hook, by)
    made = networkx.relabel_nodes(made, lambda node: _in_xml(node) if isinstance(node, str) else node)
    for _, data in made.nodes(data=True):
        data["token"] = _in_xml(data["token"])
    # Keys of parallel edges are ids in GraphML, which have to differ in the whole file.
    numbered = networkx.MultiDiGraph()
    numbered.add_nodes_from(made.nodes(data=True))
    for number, (source, target, data) in enumerate(made.edges(data=True)):
        numbered.add_edge(source, target, key=number, **data)
    _write(path, lambda draft: networkx.write_graphml(numbered, draft))


def _write(path: str | Path, write: Any) -> None:
    if not isinstance(path, str | os.PathLike):
        raise HookError(f"path is the path of a file, got {path!r}.", field="path")
    path = Path(path).expanduser()
    with writing(path), whole_file(path) as draft:
        write(draft)


def _in_xml(text: str) -> str:
    """A text with what XML 1.0 cannot hold written out: "a\\x00b" has eight characters."""
    return re.sub(
        "[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]",
        lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(),
        text,
    )
