"""ACDC: what one edge after the other gives, at once."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from circuit_graphs import Graph, Runs

from mlx_hooks.analysis.circuits.circuit import Circuit
from mlx_hooks.analysis.circuits.pruning import acdc, acdc_sweep
from mlx_hooks.errors import HookError

Metric = Callable[[frozenset[str]], list[float]]
TRUE = {"embed->L0H1<v>": 1.0, "L0H1->L1H0<k>": 2.0, "embed->L1H0<v>": 0.5, "L1H0->logits": 3.0}


def losing(graph: Graph, costs: dict[str, float]) -> Runs:
    """Each replaced edge costs the metric something, of one example more than of the other."""
    return Runs(graph, lambda gone: [10 - each * sum(costs.get(name, 0) for name in gone) for each in (1, 2)])


def knotted(graph: Graph, seed: int) -> Runs:
    """Any edge's cost depends on which others are replaced; nodes that lead nowhere cost nothing."""
    generator = np.random.default_rng(seed)
    names = [edge.name for edge in graph.edges]
    alone = generator.exponential(0.3, (len(names), 3)) * (generator.random((len(names), 3)) < 0.4)
    both = generator.normal(size=(len(names), len(names), 3)) * (generator.random((len(names), len(names), 1)) < 0.05)
    served = {read.name: read.feeds or ("logits",) for read in graph.inputs}

    def metric(gone: frozenset[str]) -> np.ndarray:
        live = {"logits"}
        for edge in reversed(graph.edges):
            if edge.name not in gone and live & set(served[edge.input]):
                live.add(edge.source)
        counts = np.array([e.name in gone and bool(live & set(served[e.input])) for e in graph.edges], float)
        return counts @ alone + np.einsum("i,j,ije->e", counts, counts, both)

    return Runs(graph, metric)


def one_at_a_time(runs: Runs, threshold: float, order: str = "latest") -> tuple[list[str], dict[str, float]]:
    """ACDC as the paper has it, in as few words."""
    graph = runs.graph
    gone: set[str] = set()
    values: dict[str, float] = {}
    distance = np.abs(runs.without([gone])[0] - runs.plain).mean()
    for read in reversed(graph.inputs):
        edges = [edge for edge in graph.edges if edge.input == read.name]
        for edge in edges[::-1] if order == "latest" else edges:
            leads = [e for e in graph.edges if e.source in read.feeds and e.name not in gone]
            if read.name != "logits" and not leads:
                gone.add(edge.name)
                continue
            without = np.abs(runs.without([gone | {edge.name}])[0] - runs.plain).mean()
            values[edge.name] = max(without - distance, 0.0)
            if without - distance < threshold:
                gone.add(edge.name)
                distance = without
    return [edge.name for edge in graph.edges if edge.name not in gone], values


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("order", ["latest", "earliest"])
@pytest.mark.parametrize("at_once", [1, 3, 32])
def test_many_at_once_give_what_one_at_a_time_gives(seed: int, order: str, at_once: int) -> None:
    graph = Graph(2, 2) if seed % 2 else Graph(2, 4, kv_heads=2, mlp=False)
    runs = knotted(graph, seed)
    kept, values = one_at_a_time(runs, 0.2, order)
    assert 3 < len(kept) < len(graph.edges) - 3
    runs.calls.clear()
    found = acdc(runs, 0.2, {"order": order, "at_once": at_once})
    assert list(found.kept) == kept
    np.testing.assert_allclose(found.values, [values.get(name, 0) for name in found.edges], atol=1e-12)
    gone = [name for name in found.edges if name not in kept]
    assert found.growth == pytest.approx(np.abs(runs.without([gone])[0] - runs.plain).mean(), abs=1e-12)
    assert max(runs.calls) <= at_once
    assert not found.undecided


def test_the_true_edges_stay_and_fewer_passes_are_made_than_edges() -> None:
    runs = losing(Graph(2, 2), TRUE)
    found = acdc(runs, 0.1)
    assert set(found.kept) == set(TRUE)
    assert dict(zip(found.edges, found.values, strict=True)) == pytest.approx(
        {name: 1.5 * TRUE.get(name, 0) for name in found.edges}
    )
    assert len(runs.calls) < 10
    circuit = found.circuit({"task": "induction"})
    assert circuit.edges == {name: 1.5 * cost for name, cost in sorted(TRUE.items(), key=lambda e: circuit_place(e[0]))}
    assert circuit.metadata["threshold"] == 0.1
    assert circuit.metadata["task"] == "induction"
    assert circuit.metadata["method"] == "acdc"
    assert circuit.metadata["settings"] == {"distance": "examples", "order": "latest"}
    with pytest.raises(HookError, match="metadata cannot say threshold anew: it is 0.1"):
        found.circuit({"threshold": 3})


def circuit_place(name: str) -> int:
    return [edge.name for edge in Graph(2, 2).edges].index(name)


def test_scores_spare_runs_and_change_nothing() -> None:
    graph = Graph(3, 2)
    for seed in range(4):
        runs = knotted(graph, seed)
        runs.calls.clear()
        plain = acdc(runs, 0.2)
        passes = len(runs.calls)
        told = acdc(runs, 0.2, scores=plain)
        assert len(runs.calls) - passes < passes
        assert told.kept == plain.kept
        np.testing.assert_array_equal(told.values, plain.values)
        assert told.n_runs <= plain.n_runs
    assert told.n_runs < plain.n_runs


def test_an_order_by_scores_tries_the_weakest_first() -> None:
    graph = Graph(1, 2, mlp=False)

    # One of the two is enough: the one that is tried first goes.
    def either(gone: frozenset[str]) -> list[float]:
        return [-float({"L0H0->logits", "L0H1->logits"} <= gone)]

    for weak, strong in (("L0H0->logits", "L0H1->logits"), ("L0H1->logits", "L0H0->logits")):
        values = [float(edge.name == strong) for edge in graph.edges]
        scores = SimpleNamespace(edges=[edge.name for edge in graph.edges], values=values)
        kept = acdc(Runs(graph, either), 0.5, {"order": "weakest"}, scores=scores).kept
        assert strong in kept
        assert weak not in kept
    with pytest.raises(HookError, match="order 'weakest' is by scores: give scores"):
        acdc(Runs(graph, either), 0.5, {"order": "weakest"})


def test_opposite_changes_of_two_examples_are_seen_unless_means_are_compared() -> None:
    graph = Graph(1, 1, mlp=False)
    runs = Runs(graph, lambda gone: [float("L0H0->logits" in gone), -float("L0H0->logits" in gone)])
    assert "L0H0->logits" in acdc(runs, 0.5).kept
    assert "L0H0->logits" not in acdc(runs, 0.5, {"distance": "mean"}).kept


def test_it_begins_with_the_edges_that_are_given() -> None:
    graph = Graph(2, 2)
    runs = losing(graph, TRUE)
    start = Circuit.of_edges(graph, [*TRUE, "embed->L1H0<q>"])
    runs.calls.clear()
    found = acdc(runs, 0.1, start=start)
    assert set(found.kept) == set(TRUE)
    # One for the start, one for each edge, and one for what was guessed behind the edge that goes.
    assert found.n_runs <= 1 + 5 + 1
    found = acdc(runs, 0.1, start=["embed->L0H1<v>", "L1H0->logits"])
    assert set(found.kept) == {"L1H0->logits"}
    # With all others replaced it is 0.75 off before the edge that goes.
    found = acdc(runs, 2, start=["embed->L0H1<v>", "L0H1->L1H0<k>", "L1H0->logits"])
    assert set(found.kept) == {"L0H1->L1H0<k>", "L1H0->logits"}
    assert found.growth == pytest.approx(1.5 * TRUE["embed->L0H1<v>"])
    with pytest.raises(HookError, match="start names at least one edge to begin with; None begins with all"):
        acdc(runs, 0.1, start=[])


def test_an_edge_that_moves_the_metric_by_just_the_threshold_stays() -> None:
    runs = losing(Graph(2, 2), TRUE)
    assert set(acdc(runs, 1.5 * 0.5).kept) == set(TRUE)
    assert set(acdc(runs, np.nextafter(1.5 * 0.5, 1)).kept) == set(TRUE) - {"embed->L1H0<v>"}


def test_a_start_that_costs_nothing_has_no_smaller_threshold() -> None:
    found = acdc(losing(Graph(2, 2), TRUE), 0.1, start=["embed->logits"])
    with pytest.raises(
        HookError, match="keeps no edge at threshold 0.1: none of those that were tried changes the metric"
    ):
        found.circuit()


def test_what_is_not_tried_stays_and_is_named() -> None:
    runs = losing(Graph(2, 2), TRUE)
    found = acdc(runs, 0.1, {"max_runs": 10, "at_once": 4})
    assert sum(runs.calls) <= 10
    assert found.undecided
    assert set(found.undecided) <= set(found.kept)
    assert set(TRUE) <= set(found.kept)
    # The run of the start is none of an edge.
    start = list(TRUE)
    one = acdc(runs, 0.1, {"max_runs": 1}, start=start)
    assert one.n_runs == 2
    assert set(one.undecided) == set(start) - {"L1H0->logits"}
    assert len(acdc(runs, 0.1, {"max_runs": 1}).undecided) == len(runs.graph.edges) - 1


def test_a_sweep_ranks_edges_by_the_greatest_threshold_at_which_they_stay() -> None:
    runs = losing(Graph(2, 2), TRUE)
    told: list[tuple[int, int]] = []
    thresholds = [0.5, 1.0, 2.0, 4.0]
    runs.calls.clear()
    found = acdc_sweep(runs, thresholds, progress=lambda *at: told.append(at))
    assert found.n_runs == sum(runs.calls)
    # One edge costs 1.5 times what is said; embed->L0H1<v> leads nowhere when L0H1->L1H0<k> is gone.
    expected = {"embed->L0H1<v>": 1.0, "L0H1->L1H0<k>": 2.0, "embed->L1H0<v>": 0.5, "L1H0->logits": 4.0}
    assert {n: v for n, v in zip(found.edges, found.values, strict=True) if v} == expected
    # What moves the metric by just the threshold stays.
    assert "embed->L1H0<v>" in acdc(runs, 0.75).kept
    for threshold in thresholds:
        assert {n for n, v in expected.items() if v >= threshold} == set(acdc(runs, threshold).kept)
    assert told[-1] == (4 * len(found.edges), 4 * len(found.edges))
    assert told == sorted(told)
    assert found.to_dict()["edges"][0] == {"edge": "embed->L0H0<q>", "value": 0}


def test_a_circuit_of_nothing_is_told_with_the_strongest() -> None:
    found = acdc(losing(Graph(2, 2), TRUE), 100)
    assert found.kept == ()
    with pytest.raises(
        HookError, match=r"ACDC keeps no edge at threshold 100: the strongest changes the metric by 4\.5"
    ):
        found.circuit()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"threshold": 0}, "threshold is a finite number above 0, got 0."),
        ({"threshold": float("nan")}, "threshold is a finite number above 0, got nan."),
        ({"threshold": True}, "threshold is a finite number above 0, got True."),
        ({"options": {"at_once": 0}}, "at_once must be greater than or equal to 1, got 0."),
        ({"options": {"order": "best"}}, "order must be 'latest', 'earliest' or 'weakest', got 'best'."),
        ({"scores": SimpleNamespace(edges=["L7H0->logits"], values=[1.0])}, "this one has no edge L7H0->logits."),
        ({"threshold": 10**400}, "threshold is a finite number above 0, got 1000"),
        ({"scores": {}}, "scores are edge scores, an ACDC result or a circuit, got dict."),
        ({"start": ["x->logits"]}, "There is no edge 'x->logits'."),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
def test_bad_input_is_one_sentence(given: dict[str, Any], message: str) -> None:
    with pytest.raises(HookError, match=message):
        acdc(losing(Graph(1, 1), {}), **({"threshold": 0.1} | given))
    with pytest.raises(HookError, match="thresholds is a list of at least one number above 0"):
        acdc_sweep(losing(Graph(1, 1), {}), [])
