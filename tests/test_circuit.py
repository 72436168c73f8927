"""The circuit object: which edges it keeps, and what its files refuse."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from circuit_graphs import Graph

from mlx_hooks import HookedModel
from mlx_hooks.analysis.circuits.circuit import Circuit, grown, on_paths
from mlx_hooks.errors import HookError

GRAPH = Graph(2, 2)
INDUCTION = ["embed->L0H1<v>", "L0H1->L1H0<k>", "embed->L1H0<q>", "embed->L1H0<v>", "L1H0->logits"]


def scored(strong: dict[str, float], graph: Graph = GRAPH, rest: float = 0.001) -> SimpleNamespace:
    edges = [edge.name for edge in graph.edges]
    values = np.array([strong.get(name, rest) for name in edges])
    return SimpleNamespace(
        edges=edges, values=values, graph=graph, method="eap", metric="logit_difference", ablation="corrupted"
    )


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        (None, "Edges are a list of names, got NoneType"),
        ("embed->logits", "the text"),
        ([["x"]], "An edge is written as"),
    ],
)
def test_edges_are_a_list_of_names(llama: HookedModel, edges: Any, message: str) -> None:
    with pytest.raises(HookError, match=message):
        Circuit.of_edges(llama, edges)


def test_scores_are_numbers() -> None:
    for wrong in ("x", None):
        with pytest.raises(HookError, match="scores have a number for each edge"):
            Circuit.of_scores(SimpleNamespace(edges=["embed->logits"], values=[wrong]), GRAPH)


def test_a_circuit_of_edges_has_its_nodes_in_forward_order() -> None:
    circuit = Circuit.of_edges(GRAPH, reversed(INDUCTION))
    assert list(circuit.edges) == sorted(INDUCTION, key=[e.name for e in GRAPH.edges].index)
    assert circuit.nodes == ("embed", "L0H1", "L1H0")
    assert len(circuit) == 5
    assert "L1H0->logits" in circuit
    assert circuit.metadata["edges_of_model"] == len(GRAPH.edges)
    assert ("L0H1", "L1H0", "L0H1->L1H0<k>") in circuit.steps
    assert ("L1H0", "logits", "L1H0->logits") in circuit.steps


def test_nodes_of_one_layer_stand_as_the_forward_pass_has_them() -> None:
    names = ["L1 side", "L1 mlp", "L1 attn", "L1H10", "L1H2", "L1 mixer", "L0 mlp", "embed"]
    circuit = Circuit({f"{name}->logits": None for name in names}, {})
    assert list(circuit.nodes) == names[::-1]


def test_what_lies_on_no_path_is_dropped_and_named() -> None:
    loose = ["L0H0->L1H1<q>", "embed->L0 mlp", "L1 mlp->logits"]
    circuit = Circuit.of_edges(GRAPH, INDUCTION + loose)
    assert set(circuit.edges) == set(INDUCTION)
    assert set(circuit.dropped) == set(loose)
    assert circuit.connected() == circuit
    assert set(Circuit.of_edges(GRAPH, INDUCTION + loose, connected=False).edges) == set(INDUCTION + loose)
    with pytest.raises(HookError, match="None of the 3 edges lies on a path from embed to logits"):
        Circuit.of_edges(GRAPH, loose)


def test_paths_agree_with_walking_all_of_them() -> None:
    inputs = {read.name: read.feeds for read in Graph(3, 2, kv_heads=1).inputs}
    names = [edge.name for edge in Graph(3, 2, kv_heads=1).edges]
    generator = np.random.default_rng(0)
    for _ in range(20):
        chosen = generator.choice(names, 18, replace=False).tolist()
        found: set[str] = set()

        def walk(node: str, path: list[str], chosen: list[str] = chosen, found: set[str] = found) -> None:
            if node == "logits":
                found.update(path)
            for name in chosen:
                source, read = name.split("->")
                if source == node:
                    for to in inputs[read] or ("logits",):
                        walk(to, [*path, name])

        walk("embed", [])
        assert on_paths(chosen, inputs) == found


def test_the_strongest_edges_are_kept_whatever_their_sign() -> None:
    scores = scored(dict(zip(INDUCTION, [-5.0, 4.0, -3.0, 2.0, 1.0], strict=True)))
    circuit = Circuit.of_scores(scores, n=5)
    assert set(circuit.edges) == set(INDUCTION)
    assert circuit.edges["embed->L0H1<v>"] == -5
    assert circuit.metadata["method"] == "eap"
    assert set(Circuit.of_scores(scores, threshold=1).edges) == set(INDUCTION)
    whole = Circuit.of_scores(scores)
    assert set(whole.top(5).edges) == set(whole.above(0.5).edges) == set(INDUCTION)
    # Without the last edge nothing leads to logits.
    with pytest.raises(HookError, match="the circuit would be empty"):
        whole.top(4)
    assert set(whole.top(4, connected=False).edges) == set(INDUCTION[:4])
    with pytest.raises(HookError, match=r"No edge has a score of 6 or more: the strongest has 5\."):
        whole.above(6)


def test_growing_from_logits_takes_only_what_leads_there() -> None:
    scores = scored(dict(zip(INDUCTION, [-5.0, 4.0, -3.0, 2.0, 1.0], strict=True)), rest=0)
    inputs = {read.name: read.feeds for read in GRAPH.inputs}
    order = grown(dict(zip(scores.edges, scores.values, strict=True)), inputs)
    assert order[:3] == ["L1H0->logits", "L0H1->L1H0<k>", "embed->L0H1<v>"]
    assert sorted(order) == sorted(scores.edges)
    grew = Circuit.of_scores(scores, n=3, grow=True)
    assert set(grew.edges) == set(order[:3])
    assert not grew.dropped


def test_a_shared_input_serves_all_heads_of_its_group() -> None:
    graph = Graph(2, 4, kv_heads=2)
    circuit = Circuit.of_edges(graph, ["embed->L0KV1<v>", "L0H3->logits"])
    assert circuit.nodes == ("embed", "L0H3")
    assert circuit.inputs == {"L0KV1<v>": ("L0H2", "L0H3"), "logits": ()}
    assert [step[1] for step in circuit.steps] == ["L0H3", "logits"]
    with pytest.raises(HookError, match="would be empty"):
        Circuit.of_edges(graph, ["embed->L0KV1<v>", "L0H1->logits"])


def test_nodes_alone_have_all_edges_among_them() -> None:
    circuit = Circuit.of_nodes(GRAPH, ["L0H1", "L1H0"])
    assert circuit.nodes == ("embed", "L0H1", "L1H0")
    ends = {"L0H1", "L1H0", "embed"}
    expected = {
        e.name for e in GRAPH.edges if e.source in ends and (e.input == "logits" or e.input.partition("<")[0] in ends)
    }
    assert set(circuit.edges) == expected
    assert Circuit.of_nodes(GRAPH, ["L1 attn"]).nodes == ("embed", "L1H0", "L1H1")
    assert Circuit.of_nodes(GRAPH, ["L1"]).nodes == ("embed", "L1H0", "L1H1", "L1 mlp")
    found = {"circuit": ["L0H1", "L1H0"], "metric": "m", "ablation": "zeros", "faithfulness": {"mean": 0.9}}
    components = Circuit.of_components(GRAPH, found)
    assert components.edges == circuit.edges
    assert components.metadata["replaced_by"] == "zeros"
    for name in ("L2H0", "L0 mixer", "x", "L1 mlps"):
        with pytest.raises(HookError, match=f"There is no node '{name}'. There are: embed, L0H0"):
            Circuit.of_nodes(GRAPH, [name])


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ({}, "A circuit has at least one edge; this one is empty."),
        ({"L0H1": None}, "An edge is called source->input, as L0H1->L1H0<k>, got 'L0H1'."),
        ({"head->logits": None}, "'head' is no node: they are called as embed, L0H1, L0 mlp."),
        ({"embed->L0H1": None}, "'embed->L0H1'|'L0H1' is no input: they are called as L1H0<k>"),
        ({"embed->logits": float("nan")}, "The score of embed->logits is a finite number or none, got nan."),
        ({"embed->L0H1<k>": 1}, "The input L0H1<k> serves no node: say in inputs which it does."),
        ({"embed->logits": 10**400}, "The score of embed->logits is a finite number or none, got 1000"),
        ({"embed->logits": True}, "The score of embed->logits is a finite number or none, got True."),
        ({3: 1.0}, "An edge is called source->input, as L0H1->L1H0<k>, got 3."),
        (["embed->logits"], "edges of a circuit is a mapping, got list."),
        ({"L5 mlp->L0H0<q>": 1}, "The edge L5 mlp->L0H0<q> leads backwards: L5 mlp is not before L0H0<q>."),
        ({"L1 mlp->L1H0<q>": 1}, "The edge L1 mlp->L1H0<q> leads backwards"),
        ({"L1H0->L1H1<q>": 1}, "The edge L1H0->L1H1<q> leads backwards"),
        ({"L1 mlp->L1 mlp": 1}, "The edge L1 mlp->L1 mlp leads backwards"),
    ],
)  # fmt: skip
def test_what_is_no_circuit_is_refused(edges: dict[str, Any], message: str) -> None:
    with pytest.raises(HookError, match=message):
        Circuit(edges, {})


@pytest.mark.parametrize(
    "served",
    ["L1H0", ("nonsense",), ("L1H0", "L1H0"), ("L0H0",), ("embed",), (3,), {"L1H0": 1}],
)
def test_an_input_serves_nodes_of_its_layer_each_once(served: Any) -> None:
    with pytest.raises(HookError, match="The input L1H0<k> serves nodes of its layer, each once; got "):
        Circuit({"embed->L1H0<k>": 1.0}, {"L1H0<k>": served})
    with pytest.raises(HookError, match="The input logits serves no nodes; got "):
        Circuit({"embed->logits": 1.0}, {"logits": ["L1H0"]})
    with pytest.raises(HookError, match="inputs of a circuit is a mapping, got list"):
        Circuit({"embed->logits": 1.0}, [])  # type: ignore[arg-type]


def test_edges_that_lead_forward_within_a_layer_are_taken() -> None:
    names = [
        "L1H0->L1 mlp",
        "L1 attn->L1 mlp",
        "L1 mixer->L1H0<q>",
        "L1H0->L1 mixer",
        "L0 mlp->L1H0<q>",
        "embed->L0 mlp",
    ]
    inputs = {read: [read.partition("<")[0]] for name in names for read in [name.split("->")[1]]}
    assert len(Circuit(dict.fromkeys(names), inputs)) == 6


def test_scores_are_held_as_floats() -> None:
    circuit = Circuit({"embed->logits": np.float32(0.5), "L0 mlp->logits": 2}, {})
    assert [type(score) for score in circuit.edges.values()] == [float, float]


def test_an_edge_is_in_it_by_any_name_that_the_graph_reads() -> None:
    circuit = Circuit.of_edges(GRAPH, INDUCTION)
    for name in ("L0H1->L1H0<k>", "a0.h1->a1.h0<k>", "input->a0.h1<v>", "L1H0 -> logits"):
        assert name in circuit
    shared = Circuit.of_edges(Graph(2, 4, kv_heads=2), ["embed->L0KV1<v>", "L0H3->logits"])
    for name, is_in in {"embed->L0H2<v>": True, "input->a0.h3<v>": True, "embed->L0H1<v>": False,
                        "embed->L0H2<k>": False, "nonsense": False}.items():  # fmt: skip
        assert (name in shared) == is_in
    assert 3 not in shared


def test_numbers_of_numpy_are_limits_too() -> None:
    circuit = Circuit.of_scores(scored(dict(zip(INDUCTION, [-5.0, 4.0, -3.0, 2.0, 1.0], strict=True))))
    assert circuit.top(np.int64(5)) == circuit.top(5)  # type: ignore[arg-type]
    assert circuit.above(np.float32(0.5)) == circuit.above(0.5)  # type: ignore[arg-type]


def test_metadata_say_how_scores_were_made_and_nothing_else_of_it() -> None:
    scores = scored({"embed->logits": 1.0})
    scores.settings = {"mean_over": "all"}
    circuit = Circuit.of_scores(scores, n=1, metadata={"task": "copying", "metric": "logit_difference"})
    assert circuit.metadata["settings"] == {"mean_over": "all"}
    assert circuit.metadata["task"] == "copying"
    assert Circuit.of_scores(circuit, GRAPH).metadata["settings"] == {"mean_over": "all"}
    for more, message in [
        ({"metric": "zzz"}, "metadata cannot say metric anew: it is 'logit_difference'."),
        ({"edges_of_model": 3}, "metadata cannot say edges_of_model anew: it is "),
        ([1], "metadata of a circuit is a mapping, got list."),
    ]:
        with pytest.raises(HookError, match=message):
            Circuit.of_scores(scores, n=1, metadata=more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({}, "scores are edge scores, an ACDC result or a circuit, got dict."),
        (None, "scores are edge scores, an ACDC result or a circuit, got NoneType."),
        (SimpleNamespace(edges=["embed->logits"], values=[]), "scores have a value for each edge, got 0 for 1."),
    ],
)
def test_what_has_no_scores_is_refused(scores: Any, message: str) -> None:
    with pytest.raises(HookError, match=message):
        Circuit.of_scores(scores, GRAPH)


@pytest.mark.parametrize("limits", [{"n": 0}, {"n": True}, {"n": 1.5}, {"threshold": -1}, {"threshold": float("nan")}])
def test_limits_out_of_range_are_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(HookError, match=f"^{next(iter(limits))} is a "):
        Circuit.of_scores(scored({}), **limits)


def test_edges_without_scores_are_not_ranked() -> None:
    with pytest.raises(HookError, match=r"Edges are chosen by their scores, and embed->\S+ has none\."):
        Circuit.of_edges(GRAPH, INDUCTION).top(2)


def test_an_edge_or_a_model_that_does_not_match_is_refused() -> None:
    with pytest.raises(HookError, match="There is no edge 'L5H0->logits'"):
        Circuit.of_edges(GRAPH, ["L5H0->logits"])
    circuit = Circuit.of_edges(GRAPH, INDUCTION)
    circuit.check(GRAPH)
    with pytest.raises(HookError, match="does not match the circuit: it has no edge embed->L1H0<q>"):
        circuit.check(Graph(1, 2))
    shared = Circuit.of_edges(Graph(1, 4, kv_heads=2), ["embed->L0KV0<v>", "L0H0->logits"])
    with pytest.raises(HookError, match="there L0KV0<v> serves L0H0, L0H1, L0H2"):
        shared.check(Graph(1, 6, kv_heads=2))


def test_a_circuit_comes_back_from_its_file(tmp_path: Path) -> None:
    scores = scored(dict(zip(INDUCTION, [-5.0, 4.0, -3.0, 2.0, 1 / 3], strict=True)) | {"embed->L0 mlp": 9.0})
    circuit = Circuit.of_scores(scores, n=6, metadata={"task": "induction", "sizes": np.arange(2)})
    path = circuit.save(tmp_path / "circuit.json")
    assert Circuit.load(path) == circuit
    assert circuit.dropped == ("embed->L0 mlp",)
    plain = json.loads(path.read_text())
    assert plain == circuit.to_dict()
    assert plain["edges"][-1] == {"edge": "L1H0->logits", "score": 1 / 3}
    assert Circuit.load(Circuit.of_edges(GRAPH, INDUCTION).save(path)).edges["L1H0->logits"] is None
    assert [file.name for file in tmp_path.iterdir()] == ["circuit.json"]
    with pytest.raises(HookError, match=f"cannot write {tmp_path}: it is a folder"):
        circuit.save(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "neuroscope.circuit/2"}, "it is of the format 'neuroscope.circuit/2'"),
        ({"more": 1}, "A circuit has no 'more': its keys are format, nodes"),
        ({"edges": {}}, "edges of a circuit is a list, got dict"),
        ({"edges": []}, "this one is empty"),
        ({"edges": [{"edge": "embed->logits"}]}, "edges[0] of a circuit is a mapping of edge, a name, and score"),
        ({"edges": [{"edge": "embed->logits", "score": True}]}, "The score of embed->logits is a finite number"),
        ({"edges": [{"edge": "embed->logits", "score": "1"}]}, "The score of embed->logits is a finite number or none"),
        ({"edges": [{"edge": "embed->logits", "score": None}] * 2}, "edges of a circuit name embed->logits twice"),
        ({"nodes": ["embed"]}, "nodes of a circuit are those of its edges: embed, L0H1, L1H0"),
        ({"dropped": [1]}, "dropped of a circuit is a list of names"),
        ({"inputs": {"L0H1<v>": "L0H1"}}, "L0H1<v> of a circuit is a list of names"),
        ({"dropped": ["rubbish"]}, "An edge is called source->input, as L0H1->L1H0<k>, got 'rubbish'."),
        ({"edges": [{"edge": "embed->logits", "score": 10**400}]}, "The score of embed->logits is a finite number"),
        ({"metadata": {"loss": float("nan")}}, "metadata of a circuit has finite numbers only."),
        ({"inputs": {}}, "The input L0H1<v> serves no node"),
        ({"inputs": {"L0H1<v>": ["L0H1"], "L1H0<q>": ["L1H0"], "L1H0<k>": ["L1H0"], "L1H0<v>": ["L1H0"],
                     "L9H0<v>": ["L9H0"]}}, "inputs of a circuit are those of its edges; no edge leads to L9H0<v>"),
        ({"metadata": None}, "metadata of a circuit is a mapping, got NoneType"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_circuit_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    plain = Circuit.of_edges(GRAPH, INDUCTION).to_dict() | change
    path = tmp_path / "circuit.json"
    path.write_text(json.dumps(plain))
    with pytest.raises(HookError) as caught:
        Circuit.load(path)
    assert str(caught.value).startswith(f"{path} is no circuit that can be read: ")
    assert message in str(caught.value)


def test_a_file_that_lacks_a_key_or_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "circuit.json"
    with pytest.raises(HookError, match=f"^There is no file {path}.$"):
        Circuit.load(path)
    plain = Circuit.of_edges(GRAPH, INDUCTION).to_dict()
    del plain["dropped"]
    for text, message in [
        (json.dumps(plain), "has 'dropped' too"),
        ("[]", "got list"),
        ("{}", "it says no format"),
        ("{", "Expecting property name"),
        ("[" * 100_000, "no circuit that can be read: "),
    ]:
        path.write_text(text)
        with pytest.raises(HookError, match=message):
            Circuit.load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(HookError, match="no circuit that can be read"):
        Circuit.load(path)
    with pytest.raises(HookError, match="cannot be read"):
        Circuit.load(tmp_path)
