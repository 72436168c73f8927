"""Circuits for others: attribution-graph JSON, GraphML, pictures, graphviz, Pharo."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import networkx
import numpy as np
import pytest
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from mlx_hooks import EdgeRuns, EdgeScores, HookedModel, HookError, acdc, attribute_edges
from mlx_hooks.analysis.charts import FAINT
from mlx_hooks.analysis.circuits.circuit import Circuit
from mlx_hooks.analysis.circuits.drawing import dot, draw_graph, save_picture
from mlx_hooks.analysis.circuits.graphml import as_graph, graphml, save_graphml
from mlx_hooks.analysis.circuits.neuronpedia import save_neuronpedia, slug_of, to_neuronpedia, visible_token
from mlx_hooks.analysis.circuits.pharo import to_neuroscope
from mlx_hooks.analysis.circuits.places import place_of, steps_of
from mlx_hooks.analysis.known_models import KNOWN_MODELS, KnownLinear

PROMPT = {
    "clean": "When Mary and John went to the store , John gave a drink to",
    "corrupted": "When Mary and John went to the store , Mary gave a drink to",
    "answer": "Mary",
    "wrong": "John",
}
ABOUT = {"method": "eap-ig", "metric": "logit_difference", "ablation": "corrupted", "edges_of_model": 479}

FOUND = (
    """
embed->L0H0<q>, embed->L0H2<q>, embed->L0H2<k>, embed->L0H0<v>, embed->L0H2<v>, embed->L0 mlp, L0H0->L0 mlp,
L0H2->L0 mlp, L0H2->L1H1<q>, L0 mlp->L1H1<q>, embed->L1H2<v>, L0H0->L1H2<v>, embed->L1 mlp, L0H0->L1 mlp,
L0H2->L1 mlp, L0 mlp->L1 mlp, L0 mlp->L2H0<q>, L0H0->L2H1<q>, L0H2->L2H1<q>, L0 mlp->L2H1<q>, L1 mlp->L2H1<q>,
embed->L2 mlp, L0H0->L2 mlp, L0H2->L2 mlp, L0 mlp->L2 mlp, L1H2->L2 mlp, L1 mlp->L2 mlp, embed->L3H0<v>,
L0H0->L3H0<v>, L0 mlp->L3H0<v>, L1 mlp->L3H0<v>, L2 mlp->L3H0<v>, embed->L3H1<v>, L0H0->L3H1<v>, L0H2->L3H1<v>,
L0 mlp->L3H1<v>, L1 mlp->L3H1<v>, L2H1->L3H1<v>, L2 mlp->L3H1<v>, L0H2->L3 mlp, L3H0->L3 mlp, L3H1->L3 mlp,
L0H2->logits, L0 mlp->logits, L1H1->logits, L1 mlp->logits, L2H0->logits, L2H1->logits, L2 mlp->logits,
L3H0->logits, L3H1->logits, L3 mlp->logits
""".replace("\n", " ")
    .strip()
    .split(", ")
)
"""The indirect-object circuit of the bundled model."""


@pytest.fixture
def circuit() -> Circuit:
    """Two heads, an MLP, and one edge that hinders; a score is the change without the edge."""
    edges = {
        "embed->L0H1<v>": -0.5,
        "embed->L1H0<q>": -0.25,
        "L0H1->L1H0<q>": -0.5,
        "L0H1->L1H0<k>": 1.0,
        "L1H0->L1 mlp": -0.125,
        "L1 mlp->logits": -0.25,
        "L1H0->logits": -2.0,
    }
    reads = {"L0H1<v>": "L0H1", "L1H0<q>": "L1H0", "L1H0<k>": "L1H0", "L1 mlp": "L1 mlp"}
    return Circuit(edges, {read: (node,) for read, node in reads.items()}, ABOUT)


@pytest.fixture
def grouped() -> Circuit:
    """Two heads that share keys."""
    edges = {"embed->L0KV0<k>": 0.5, "L0H0->logits": 1.0, "L0H1->logits": 1.0}
    return Circuit(edges, {"L0KV0<k>": ("L0H0", "L0H1")})


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return HookedModel.from_pretrained("neuroscope-tiny")


def against_the_schema(graph: dict[str, Any]) -> None:
    """The rules of Neuronpedia's graph-schema.json 1.0.0, and that ids are unique and links lead to nodes."""
    assert set(graph) == {"metadata", "qParams", "nodes", "links"}
    meta = graph["metadata"]
    assert all(type(meta[name]) is str for name in ("slug", "scan", "prompt"))
    assert all(type(token) is str for token in meta["prompt_tokens"])
    assert all(type(meta["info"]["generator"][name]) is str for name in ("name", "version"))
    assert type(meta["info"]["create_time_ms"]) is int
    assert type(meta["info"]["description"]) is str
    assert meta["schema_version"] == 1
    for node in graph["nodes"]:
        assert all(type(node[name]) is str for name in ("node_id", "feature_type", "jsNodeId", "clerp", "layer"))
        assert node["feature"] is None or type(node["feature"]) is int
        assert type(node["ctx_idx"]) is int
        assert 0 <= node["ctx_idx"] < len(meta["prompt_tokens"])
        assert node["layer"] == "E" or node["layer"].isdecimal()
        assert type(node["influence"]) is float
        assert 0 < node["influence"] <= 1
    ids = [node["node_id"] for node in graph["nodes"]]
    assert len(set(ids)) == len(ids)
    for link in graph["links"]:
        assert {link["source"], link["target"]} <= set(ids)
        assert type(link["weight"]) is float
    asked = graph["qParams"]
    assert asked["linkType"] == "both"
    assert type(asked["sg_pos"]) is str
    assert {asked["clickedId"], *asked["pinnedIds"]} <= set(ids)
    for label, *members in asked["supernodes"]:
        assert type(label) is str
        assert set(members) <= set(ids)
    json.dumps(graph, allow_nan=False)


# ---- Attribution-graph JSON --------------------------------------------------------------------


def test_a_graph_satisfies_the_schema(circuit: Circuit, model: HookedModel) -> None:
    graph = to_neuronpedia(circuit, model, PROMPT, slug="ioi", created=12.5, supernodes={"movers": ["L1H0"]})
    against_the_schema(graph)
    nodes = {node["node_id"]: node for node in graph["nodes"]}
    words = [PROMPT["clean"].split()[i] for i in (0, 1, -1)]
    tokens = [model.to_tokens(PROMPT["clean"]).tolist()[0][i] for i in (1, 2, -1)]
    assert [nodes[f"E_{token}_{i}"]["clerp"] for token, i in zip(tokens, (1, 2, 14), strict=True)] == [
        f'Embedding "{word}"' for word in words
    ]
    assert len(nodes) == 15 + 3 + 1
    assert nodes["1_head0_14"]["clerp"] == "L1H0: layer 1, head 0"
    assert nodes["1_head0_14"]["feature"] is None
    assert nodes["1_head0_14"]["layer"] == "1"
    assert nodes["1_mlp_14"]["feature_type"] == "mlp"
    assert graph["metadata"]["info"]["create_time_ms"] == 12500
    # Untokenized: what the tokenizer put before it is among the tokens alone.
    assert graph["metadata"]["prompt"] == PROMPT["clean"]
    assert graph["metadata"]["prompt_tokens"][0] == "<bos>"
    assert graph["metadata"]["pruning_settings"] == {"n_edges": 7, "least_score": 0.125}
    assert graph["qParams"]["supernodes"] == [["movers", "1_head0_14"]]


def test_the_answer_is_a_logit_node_with_its_probability(circuit: Circuit, model: HookedModel) -> None:
    graph = to_neuronpedia(circuit, model, PROMPT)
    (answer,) = [node for node in graph["nodes"] if node["feature_type"] == "logit"]
    token = model.tokenizer.encode("Mary", add_special_tokens=False)[0]
    logits = np.array(model(PROMPT["clean"]))[0, -1].astype(np.float64)
    expected = np.exp(logits[token] - logits.max()) / np.exp(logits - logits.max()).sum()
    assert answer["token_prob"] == pytest.approx(expected, abs=1e-5)
    assert answer["clerp"] == f'Output "Mary" (p={expected:.3f})'
    assert (answer["node_id"], answer["jsNodeId"]) == (f"5_{token}_14", f"L_{token}-14")
    assert (answer["layer"], answer["feature"]) == ("5", token)
    assert graph["qParams"]["clickedId"] == answer["node_id"]


def test_links_weigh_what_their_edges_score_and_embedding_stands_at_the_tokens_that_differ(
    circuit: Circuit, model: HookedModel
) -> None:
    graph = to_neuronpedia(circuit, model, PROMPT)
    weights = {(link["source"], link["target"]): link["weight"] for link in graph["links"]}
    (john,) = [i for i, token in enumerate(model.to_str_tokens(PROMPT["clean"])) if token == "John" and i > 8]
    embed = f"E_{model.tokenizer.encode('John', add_special_tokens=False)[0]}_{john}"
    assert weights[embed, "0_head1_14"] == 0.5
    # Those into q and k are one link.
    assert weights["0_head1_14", "1_head0_14"] == -0.5
    assert {source for source, _ in weights if source.startswith("E")} == {embed}
    assert sum(weights.values()) == pytest.approx(-sum(circuit.edges.values()))


def test_without_a_corrupted_prompt_all_tokens_share_the_embedding(circuit: Circuit, model: HookedModel) -> None:
    graph = to_neuronpedia(circuit, model, {"clean": PROMPT["clean"], "answer": "Mary"})
    against_the_schema(graph)
    shares = [link["weight"] for link in graph["links"] if link["target"] == "0_head1_14"]
    assert shares == pytest.approx([0.5 / 15] * 15)
    assert graph["qParams"]["supernodes"][0][0] == "embed"
    assert len(graph["qParams"]["supernodes"][0]) == 16


@pytest.mark.parametrize("told", [{"ablation": "zero"}, {"ablation": "mean"}, {"replaced_by": "the mean"}])
def test_what_is_ablated_at_all_tokens_is_shared_by_all(
    told: dict[str, str], circuit: Circuit, model: HookedModel
) -> None:
    graph = to_neuronpedia(replace(circuit, metadata={"method": "eap-ig"} | told), model, PROMPT)
    against_the_schema(graph)
    shares = [link["weight"] for link in graph["links"] if link["target"] == "0_head1_14"]
    assert shares == pytest.approx([0.5 / 15] * 15)


def test_an_edge_into_shared_keys_counts_once(grouped: Circuit, model: HookedModel) -> None:
    graph = to_neuronpedia(replace(grouped, metadata={"method": "exact"}), model, PROMPT)
    assert sum(link["weight"] for link in graph["links"]) == pytest.approx(-sum(grouped.edges.values()))


def test_influence_adds_up_the_shares_of_what_reaches_the_answer(circuit: Circuit, model: HookedModel) -> None:
    nodes = {node["node_id"]: node["influence"] for node in to_neuronpedia(circuit, model, PROMPT)["nodes"]}
    # Of the answer 1 reaches itself; head 0 of layer 1 has 8/9 of it, and 1/9 through the MLP; and so on.
    head, mlp = 1.0, 1 / 9
    lower = head * 0.5 / 0.75
    own = {"answer": 1.0, "1_head0_14": head, "0_head1_14": lower, "embed": lower + head / 3, "1_mlp_14": mlp}
    total = sum(own.values())
    assert nodes["0_head1_14"] == pytest.approx((1 + head + own["embed"] + lower) / total)
    assert nodes["1_mlp_14"] == pytest.approx(1)


def test_nodes_stand_where_they_are_placed(circuit: Circuit, model: HookedModel) -> None:
    graph = to_neuronpedia(circuit, model, PROMPT, positions={"L0H1": 10, "L1H0": -2})
    against_the_schema(graph)
    assert {"0_head1_10", "1_head0_13"} <= {node["node_id"] for node in graph["nodes"]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": {"L3H3": 1}}, "The circuit has no node 'L3H3' to place. It has L0H1, L1H0, L1 mlp."),
        ({"positions": {"logits": 1}}, "no node 'logits' to place"),
        ({"positions": {"L0H1": 15}}, "The position of L0H1 is a whole number from -15 to 14, got 15."),
        ({"supernodes": {"movers": ["L2H0"]}}, "The circuit has no node 'L2H0'"),
        ({"supernodes": ["L1H0"]}, "supernodes are lists of nodes by what they are called, got ['L1H0']."),
        ({"supernodes": {"movers": "L1H0"}}, "supernodes are lists of nodes"),
        ({"supernodes": {"movers": [["L1H0"]]}}, "The circuit has no node ['L1H0']"),
        ({"supernodes": np.ones(2)}, "supernodes are lists of nodes"),
        ({"positions": np.ones(2)}, "positions are whole numbers by node, got array([1., 1.])."),
        ({"positions": 5}, "positions are whole numbers by node, got 5."),
        ({"slug": None}, "slug is letters, digits, '-', '_' and '.', got None."),
        ({"slug": "a b"}, "slug is letters, digits, '-', '_' and '.', got 'a b'."),
        ({"slug": "a/b"}, "slug is letters"),
        ({"slug": ".."}, "slug is letters"),
        ({"slug": ""}, "slug is letters"),
        ({"slug": "ioi\n"}, "slug is letters"),
        ({"created": float("nan")}, "created is in seconds since 1970, got nan."),
        ({"created": "x" * 1000}, "created is in seconds since 1970, got 'xxx"),
    ],
)
def test_nodes_that_are_not_there_are_refused(
    options: dict, message: str, circuit: Circuit, model: HookedModel
) -> None:
    with pytest.raises(HookError, match=re.escape(message)):
        to_neuronpedia(circuit, model, PROMPT, **options)


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("Who gives, to whom?", "Who-gives-to-whom"),
        ("ioi_2.1", "ioi_2.1"),
        ("../etc", "etc"),
        ("a/b", "a-b"),
        ("…", "circuit"),
        ("", "circuit"),
    ],
)
def test_any_name_has_a_slug(name: str, slug: str, circuit: Circuit, model: HookedModel) -> None:
    assert slug_of(name) == slug
    assert to_neuronpedia(circuit, model, PROMPT, slug=slug)["metadata"]["slug"] == slug


def test_a_text_without_an_answer_is_refused(circuit: Circuit, model: HookedModel) -> None:
    with pytest.raises(HookError, match="A graph is of one prompt with its answer: give clean and answer."):
        to_neuronpedia(circuit, model, PROMPT["clean"])


@pytest.mark.parametrize(
    ("text", "shown"),
    [("\n", "⏎"), ("\n\n", "⏎⏎"), ("\t", "→"), ("\r", "↵"), (" cat", " cat"), (" ", "␣"), ("a\n", "a⏎"), ("", "")],
)
def test_whitespace_tokens_are_marked(text: str, shown: str) -> None:
    assert visible_token(text) == shown


def test_the_json_is_written_whole(circuit: Circuit, model: HookedModel, tmp_path: Path) -> None:
    graph = to_neuronpedia(circuit, model, PROMPT)
    save_neuronpedia(graph, tmp_path / "graph.json")
    assert json.loads((tmp_path / "graph.json").read_text()) == graph
    with pytest.raises(HookError, match="cannot write"):
        save_neuronpedia(graph, tmp_path / "no" / "graph.json")


# ---- GraphML -----------------------------------------------------------------------------------


def test_graphml_loads_back_with_its_types(circuit: Circuit, tmp_path: Path) -> None:
    save_graphml(circuit, tmp_path / "circuit.graphml")
    read = networkx.read_graphml(tmp_path / "circuit.graphml", force_multigraph=True)
    assert dict(read.nodes(data=True)) == dict(as_graph(circuit).nodes(data=True))
    assert read.nodes["L0H1"] == {"part": "head", "layer": 0, "head": 1}
    assert read.nodes["embed"] == {"part": "embed"}
    edges = {data["edge"]: (source, target, data) for source, target, data in read.edges(data=True)}
    assert {name: found[2]["score"] for name, found in edges.items()} == circuit.edges
    assert edges["L0H1->L1H0<k>"][:2] == ("L0H1", "L1H0")
    assert edges["L0H1->L1H0<k>"][2]["input"] == "k"
    assert edges["L1H0->L1 mlp"][2]["input"] == "in"
    assert read.graph["edges_of_model"] == 479
    assert read.graph["method"] == "eap-ig"


def test_shared_keys_lead_to_each_head(grouped: Circuit) -> None:
    read = networkx.read_graphml(io.StringIO(graphml(grouped)), force_multigraph=True)
    assert sorted(read.successors("embed")) == ["L0H0", "L0H1"]
    assert [step.share for step in steps_of(grouped)] == [0.5, 0.5, 1, 1]


def test_edges_without_scores_and_odd_metadata_are_written() -> None:
    circuit = Circuit({"embed->logits": None}, {}, {"model": {"layers": 4}, "note": None, "share": 0.5})
    read = networkx.read_graphml(io.StringIO(graphml(circuit)), force_multigraph=True)
    assert next(iter(read.edges(data=True)))[2] == {"edge": "embed->logits", "input": "in"}
    assert json.loads(read.graph["model"]) == {"layers": 4}
    assert read.graph["share"] == 0.5
    assert "note" not in read.graph


@pytest.mark.parametrize(
    ("given", "read"),
    [("a\x00b", "a\ufffdb"), ("a\x1bb", "a\ufffdb"), ("\ud800", "\ufffd"), ("\uffff", "\ufffd"), ("é\t😀", "é\t😀")],
)
def test_characters_that_xml_does_not_have_are_replaced(
    given: str, read: str, circuit: Circuit, tmp_path: Path
) -> None:
    about = {"task": given, f"by {given}": "name", "list": [given]}
    save_graphml(replace(circuit, metadata=about), tmp_path / "circuit.graphml")
    loaded = networkx.read_graphml(tmp_path / "circuit.graphml", force_multigraph=True).graph
    assert loaded["task"] == read
    assert loaded[f"by {read}"] == "name"


def test_metadata_may_be_called_as_networkx_calls_its_own(circuit: Circuit) -> None:
    about = {"node_default": {"a": 1}, "edge_default": 2, "id": 3, "incoming_graph_data": "x"}
    named = replace(circuit, metadata=about)
    assert as_graph(named).graph["incoming_graph_data"] == "x"
    read = networkx.read_graphml(io.StringIO(graphml(named)), force_multigraph=True)
    assert json.loads(read.graph["metadata_node_default"]) == {"a": 1}
    assert read.graph.items() >= {"metadata_edge_default": 2, "metadata_id": 3, "incoming_graph_data": "x"}.items()
    assert read.number_of_edges() == len(circuit)


# ---- Pictures ----------------------------------------------------------------------------------


def test_the_picture_has_every_node_edge_and_input(circuit: Circuit, tmp_path: Path) -> None:
    from matplotlib.colors import to_hex

    (axes,) = draw_graph(circuit).axes
    shown = [text.get_text() for text in axes.texts]
    assert {"embed", "L0H1", "L1H0", "L1 mlp", "logits"} <= set(shown)
    assert sorted(text for text in shown if len(text) == 1) == ["k", "q", "v"]
    arrows = [patch for patch in axes.patches if isinstance(patch, FancyArrowPatch)]
    assert len(arrows) == len(circuit)
    assert len([patch for patch in axes.patches if isinstance(patch, FancyBboxPatch)]) == 5
    widest = max(arrows, key=lambda arrow: arrow.get_linewidth())
    assert widest.get_linewidth() == 4
    assert sum(to_hex(arrow.get_edgecolor()) == "#b35900" for arrow in arrows) == 1
    heights = {text.get_text(): text.get_position()[1] for text in axes.texts}
    assert sorted(("L1 mlp", "logits", "embed", "L1H0", "L0H1"), key=heights.__getitem__) == [
        "embed", "L0H1", "L1H0", "L1 mlp", "logits",
    ]  # fmt: skip
    save_picture(circuit, tmp_path / "circuit.png")
    assert (tmp_path / "circuit.png").read_bytes().startswith(b"\x89PNG")


def drawn(circuit: Circuit) -> tuple[dict[str, Any], dict[str, Any], dict[str, list[np.ndarray]]]:
    """Boxes by node, and arrows and the points along them by edge, in pixels."""
    figure = draw_graph(circuit)
    figure.savefig(io.BytesIO(), format="png")
    (axes,) = figure.axes
    boxes = {patch.get_gid(): patch for patch in axes.patches if isinstance(patch, FancyBboxPatch)}
    arrows: dict[str, Any] = {}
    ways: dict[str, list[np.ndarray]] = {}
    for patch in axes.patches:
        if isinstance(patch, FancyArrowPatch):
            edge = patch.get_gid()
            arrows[edge] = patch
            ways.setdefault(edge, []).append(axes.transData.transform(patch._path_original.vertices))
    return boxes, arrows, ways


def along(corners: np.ndarray) -> np.ndarray:
    """Points of a cubic Bezier curve [101, 2]."""
    t = np.linspace(0, 1, 101)[:, None]
    a, b, c, d = corners
    return (1 - t) ** 3 * a + 3 * t * (1 - t) ** 2 * b + 3 * t**2 * (1 - t) * c + t**3 * d


def of_known(name: str) -> Circuit:
    known = KNOWN_MODELS[name]()
    return Circuit.of_edges(known.hooked(), dict.fromkeys(known.edges(), -1.0), connected=False)


@pytest.mark.parametrize("name", ["planted_router", "ioi", "induction", "linear", "reverse", "found"])
def test_no_edge_runs_behind_a_box(name: str, model: HookedModel) -> None:
    circuit = Circuit.of_edges(model, FOUND) if name == "found" else of_known(name)
    boxes, _, ways = drawn(circuit)
    frame = boxes["logits"].get_window_extent()
    for step in steps_of(circuit):
        for corners in ways[step.edge]:
            points = along(corners)
            assert points[:, 0].min() > frame.x0 - 1
            assert points[:, 0].max() < frame.x1 + 1
            for node, patch in boxes.items():
                box = patch.get_window_extent()
                inside = ((points > box.min + 2) & (points < box.max - 2)).all(axis=1)
                assert not inside.any(), (step.edge, node)


def test_edges_through_one_column_can_be_told_apart() -> None:
    _, _, ways = drawn(of_known("planted_router"))
    tips = {edge: corners[-1] for edge, (corners,) in ways.items()}
    assert abs(tips["L0 mlp->logits"][0] - tips["L1 mlp->logits"][0]) > 20
    both = along(ways["embed->L1 mlp"][0]), along(ways["embed->L0 mlp"][0])
    assert np.linalg.norm(both[0] - both[1], axis=1).min() > 10


def test_every_edge_ends_at_its_port(circuit: Circuit) -> None:
    boxes, _, ways = drawn(circuit)
    ports = {"q": 0.14 / 0.78, "k": 0.5, "v": 0.64 / 0.78}
    for step in steps_of(circuit):
        (corners,) = ways[step.edge]
        source, target = (boxes[name].get_window_extent() for name in (step.source, step.target))
        assert corners[0][1] == pytest.approx(source.y1, abs=1)
        assert corners[-1][1] == pytest.approx(target.y0, abs=1)
        assert source.x0 <= corners[0][0] <= source.x1
        if step.kind is None:
            assert target.x0 < corners[-1][0] < target.x1
        else:
            assert (corners[-1][0] - target.x0) / target.width == pytest.approx(ports[step.kind], abs=0.01), step.edge


def test_edges_to_one_input_end_side_by_side() -> None:
    edges = ["L0H0->L0 mlp", "L0H1->L0 mlp", "embed->L0 mlp", "L0 mlp->logits", "embed->L0H0<v>", "embed->L0H1<v>"]
    reads = {"L0 mlp": ("L0 mlp",), "L0H0<v>": ("L0H0",), "L0H1<v>": ("L0H1",)}
    _, _, ways = drawn(Circuit(dict.fromkeys(edges, 1.0), reads))
    tips = [ways[edge][0][-1][0] for edge in edges[:3]]
    assert len({round(tip) for tip in tips}) == 3
    assert tips[0] < tips[1]


def test_a_circuit_without_the_embedding_is_drawn() -> None:
    boxes, _, ways = drawn(Circuit({"L0H0->logits": 1.0}, {}))
    assert set(boxes) == {"L0H0", "logits"}
    assert set(ways) == {"L0H0->logits"}


def test_lines_are_as_wide_as_scores_are_large(circuit: Circuit) -> None:
    _, arrows, _ = drawn(circuit)
    for edge, score in circuit.edges.items():
        width = 0.5 + 3.5 * abs(score) / 2
        assert arrows[edge].get_linewidth() == pytest.approx(width)
        (line,) = [line for line in dot(circuit).splitlines() if f'tooltip="{edge}:' in line]
        assert f'penwidth="{width:.2f}"' in line


def test_graphviz_text_has_every_edge_with_its_input(circuit: Circuit, grouped: Circuit, tmp_path: Path) -> None:
    lines = dot(circuit).splitlines()
    assert lines[0] == "digraph circuit {"
    assert lines[-1] == "}"
    assert '  graph [rankdir=BT, label="7 of 479 edges", labelloc=t, fontname=sans]' in lines
    assert sum(" -> " in line for line in lines) == 7
    (keys,) = [line for line in lines if "L0H1->L1H0<k>" in line]
    assert keys.startswith('  "L0H1" -> "L1H0" [color="#b35900"')
    assert 'headlabel="k", tooltip="L0H1->L1H0<k>: 1"' in keys
    assert dot(grouped).count('"embed" -> ') == 2
    save_picture(circuit, tmp_path / "circuit.dot", "Titled")
    assert 'label="Titled"' in (tmp_path / "circuit.dot").read_text()
    named = replace(circuit, metadata=ABOUT | {"model": "neuroscope-tiny", "task": "Indirect objects"})
    assert 'label="Indirect objects, neuroscope-tiny, 7 of 479 edges"' in dot(named)


def test_a_circuit_of_one_edge_is_drawn_and_other_files_are_refused(tmp_path: Path) -> None:
    alone = Circuit({"embed->logits": None}, {})
    save_picture(alone, tmp_path / "alone.png")
    with pytest.raises(HookError, match=re.escape("A circuit is drawn to .png or .dot, by the file's name; got")):
        save_picture(alone, tmp_path / "alone.svg")


# ---- Pharo -------------------------------------------------------------------------------------


def test_the_circuit_for_pharo_has_components_and_a_pathway(circuit: Circuit) -> None:
    made = to_neuroscope(circuit, "indirect object", faithfulness=0.93)
    assert made["name"] == "indirect object"
    assert made["confidence"] == 0.93
    assert made["components"] == [
        {"layer": 0, "componentType": "attention_head", "index": 1},
        {"layer": 1, "componentType": "attention_head", "index": 0},
        {"layer": 1, "componentType": "mlp", "index": None},
    ]
    assert made["pathway"][0] == {"source": "L1H0", "target": "logits", "strength": 2.0}
    assert made["pathway"][1] == {"source": "L0H1", "target": "L1H0<k>", "strength": -1.0}
    assert len(made["pathway"]) == 7
    assert made["description"] == (
        "Causal: 7 edges found by eap-ig. Strengths are estimates of what each edge adds to the logit difference. With "
        "all other edges ablated (corrupted) it keeps 93.0% of what the model does."
    )
    json.dumps(made, allow_nan=False)


@pytest.mark.parametrize("faithfulness", [float("nan"), float("inf"), "x"])
def test_a_faithfulness_that_is_no_number_is_refused(faithfulness: Any, circuit: Circuit) -> None:
    with pytest.raises(HookError, match="faithfulness is a finite number or None, got "):
        to_neuroscope(circuit, "x", faithfulness)


@pytest.mark.parametrize(
    ("method", "standing", "strengths"),
    [
        ("eap", "Estimated", "estimates of what each edge adds to the logit difference."),
        ("eap-ig", "Estimated", "estimates of what each edge adds to the logit difference."),
        ("exact", "Causal", "what each edge adds to the logit difference."),
        ("acdc", "Causal", "how far the logit difference moves without each edge, up or down."),
        ("random", "Untested", "sizes of scores, which say nothing of the metric."),
        (None, "Untested", "sizes of scores, which say nothing of the metric."),
    ],
)
def test_what_was_not_measured_is_not_said(
    method: str | None, standing: str, strengths: str, circuit: Circuit, model: HookedModel
) -> None:
    found = replace(circuit, metadata=ABOUT | {"method": method})
    is_signed = method in ("eap", "eap-ig", "exact")
    for step in steps_of(found):
        assert step.effect == (-step.score if is_signed else None)
        assert step.strength == (-step.score if is_signed else abs(step.score))
    made = to_neuroscope(found)
    assert made["description"].startswith(f"{standing}: 7 edges")
    assert f" Strengths are {strengths} It was not validated." in made["description"]
    assert to_neuroscope(found, faithfulness=0.5)["description"].startswith("Causal: ")
    steps = {(step["source"], step["target"]): step["strength"] for step in made["pathway"]}
    assert steps["L0H1", "L1H0<k>"] == (-1.0 if is_signed else 1.0)
    links = to_neuronpedia(found, model, PROMPT)["links"]
    weights = {(link["source"], link["target"]): link["weight"] for link in links}
    assert weights["0_head1_14", "1_head0_14"] == (-0.5 if is_signed else 1.5)
    assert {"eap": "#b35900", "eap-ig": "#b35900", "exact": "#b35900"}.get(str(method), FAINT) in dot(found)
    assert ("#b35900" in dot(found)) == is_signed


@pytest.mark.parametrize(
    ("method", "legend"),
    [
        ("exact", ["raises the logit difference", "lowers the logit difference"]),
        ("acdc", ["moves the logit difference, up or down"]),
        ("random", ["the wider, the larger the score"]),
    ],
)
def test_the_legend_says_what_colours_and_widths_are(method: str, legend: list[str], circuit: Circuit) -> None:
    (found,) = draw_graph(replace(circuit, metadata=ABOUT | {"method": method})).legends
    assert [text.get_text() for text in found.get_texts()] == legend


def test_an_edge_that_hinders_is_not_shown_by_acdc_as_one_that_helps() -> None:
    known = KnownLinear()
    runs = EdgeRuns(known.hooked(), known.pairs(4))
    effects = {name: -values.mean() for name, values in known.edge_effects(known.pairs(4)).items()}
    found = acdc(runs, 0.01).circuit()
    hindering = [edge for edge in found.edges if effects[edge] < -0.01]
    assert hindering
    assert all(step.effect is None for step in steps_of(found))
    assert "raises" not in str([text.get_text() for text in draw_graph(found).legends[0].get_texts()])
    exact = {step.edge: step.effect for step in steps_of(Circuit.of_scores(_exact(runs), runs))}
    assert all(exact[edge] == pytest.approx(effects[edge], abs=1e-4) for edge in hindering)


def _exact(runs: EdgeRuns) -> EdgeScores:
    return attribute_edges(runs, options={"method": "exact"})


@pytest.mark.parametrize(("faithfulness", "confidence"), [(None, 0.0), (1.2, 1.0), (-0.5, 0.0)])
def test_confidence_is_from_0_to_1(faithfulness: float | None, confidence: float, circuit: Circuit) -> None:
    made = to_neuroscope(circuit, faithfulness=faithfulness)
    assert made["confidence"] == confidence
    assert ("It was not validated." in made["description"]) == (faithfulness is None)


def test_a_name_that_is_no_nodes_is_refused() -> None:
    with pytest.raises(HookError, match="'L0H1<q>' is no node of a circuit"):
        place_of("L0H1<q>")
