"""Edge scores by gradients are what finite differences of an independent forward pass give, and add up."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from graph_reference import GraphReference
from test_edge_runs import ALSO_LONGER, LONGER, PAIRS, difference, rows
from tiny_models import make_model

from mlx_hooks import HookedModel, HookError
from mlx_hooks.analysis import eval_data
from mlx_hooks.analysis.ablation import MeanOver
from mlx_hooks.analysis.circuits import edge_attribution
from mlx_hooks.analysis.circuits.ablation_study import ablate_edges
from mlx_hooks.analysis.circuits.circuit import Circuit
from mlx_hooks.analysis.circuits.edge_attribution import EdgeOptions, attribute_edges, way
from mlx_hooks.analysis.circuits.edge_runs import EdgeRuns
from mlx_hooks.analysis.circuits.gradients import Gradients, gradients
from mlx_hooks.analysis.circuits.validation import validate_circuit
from mlx_hooks.analysis.eval_data import EvalBatch

SMALL = 1e-5


def slopes(model: nn.Module, edges: list[str], ablation: str) -> np.ndarray:
    """The change of the metric per share of each edge that is ablated, at none, by differences: [example, edge]."""
    oracle = GraphReference(model)
    own, _ = oracle.run_with(rows(PAIRS, "clean"))
    other, _ = oracle.run_with(rows(PAIRS, "corrupted"))
    found = []
    for edge in edges:
        source = edge.split("->")[0]
        change = (other[source] if ablation == "corrupted" else 0) - own[source]
        ends = [
            difference(oracle.run_with(rows(PAIRS, "clean"), {edge: own[source] + share * change})[1], PAIRS)
            for share in (SMALL, -SMALL)
        ]
        found.append((ends[0] - ends[1]) / (2 * SMALL))
    return np.array(found).T


@pytest.mark.parametrize("ablation", ["corrupted", "zero"])
def test_eap_is_the_slope_of_the_metric(model: HookedModel, ablation: str) -> None:
    scores = attribute_edges(model, PAIRS, {"method": "eap", "ablation": ablation})
    some = list(range(0, len(scores.edges), max(1, len(scores.edges) // 25)))
    wanted = slopes(model.model, [scores.edges[i] for i in some], ablation)
    assert scores.by_example is not None
    np.testing.assert_allclose(scores.by_example[:, some], wanted, atol=2e-4, rtol=2e-4)
    np.testing.assert_allclose(scores.values, scores.by_example.mean(0))


def test_eap_ig_is_the_mean_slope_on_the_way(llama: HookedModel) -> None:
    """Two points, by differences of an independent forward pass at a mixture of both embeddings."""
    oracle = GraphReference(llama.model)
    own, _ = oracle.run_with(rows(PAIRS, "clean"))
    other, _ = oracle.run_with(rows(PAIRS, "corrupted"))
    scores = attribute_edges(llama, PAIRS, {"steps": 2, "rule": "right"})
    assert scores.by_example is not None
    readers = [each.name for each in EdgeRuns(llama, PAIRS).graph.inputs]
    for edge in ("L0H1->L1H2<q>", "embed->L1KV0<v>", "L0 mlp->L2 mlp", "L1H3->logits", "L0H0->L2KV1<k>"):
        source = edge.split("->")[0]
        change, total = other[source] - own[source], np.zeros(2)
        for share in (0.5, 1.0):
            mixed = other["embed"] + share * (own["embed"] - other["embed"])
            start = {f"embed->{reader}": mixed for reader in readers}
            there, _ = oracle.run_with(rows(PAIRS, "clean"), start)
            at = mixed if source == "embed" else there[source]
            ends = [
                difference(oracle.run_with(rows(PAIRS, "clean"), start | {edge: at + s * change})[1], PAIRS)
                for s in (SMALL, -SMALL)
            ]
            total += (ends[0] - ends[1]) / (2 * SMALL) / 2
        np.testing.assert_allclose(scores.by_example[:, scores.edges.index(edge)], total, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("ablation", ["corrupted", "mean"])
def test_the_embeddings_scores_add_up_to_the_whole_change(llama: HookedModel, ablation: str) -> None:
    """A random model's metric is rough on the way: it takes many points."""
    runs = EdgeRuns(llama, [*PAIRS, LONGER, ALSO_LONGER], ablation=ablation)
    # With only the embedding's edges replaced, and all else following from them.
    whole = runs.without([[edge for edge in runs.graph.edges if edge.source == "embed"]])[0] - runs.plain
    scores = attribute_edges(runs, options={"steps": 320})
    assert scores.by_example is not None
    of_embed = [i for i, edge in enumerate(scores.edges) if edge.startswith("embed->")]
    np.testing.assert_allclose(scores.by_example[:, of_embed].sum(1), whole, atol=1e-3)
    few = EdgeRuns(llama, [*PAIRS, LONGER, ALSO_LONGER], ablation=ablation, max_bytes=2_000_000)
    apart = attribute_edges(few, options={"steps": 320})
    np.testing.assert_allclose(apart.values, scores.values, atol=1e-4)
    one = attribute_edges(runs, options={"method": "eap"})
    assert one.by_example is not None
    assert np.abs(one.by_example[:, of_embed].sum(1) - whole).max() > 0.01


def test_exact_scores_are_runs(llama: HookedModel) -> None:
    runs = EdgeRuns(llama, PAIRS)
    scores = attribute_edges(runs, options={"method": "exact"})
    edge = "L0H1->L1H2<q>"
    np.testing.assert_allclose(scores[edge], (runs.without([[edge]])[0] - runs.plain).mean(), atol=1e-5)


def test_estimates_come_near_what_is_exact(tiny: HookedModel) -> None:
    text = "When {} and {} went to the store , {} gave a drink to"
    pairs = [
        {"clean": text.format(a, b, b), "corrupted": text.format(a, b, a), "answer": f" {a}", "wrong": f" {b}"}
        for a, b in (("Mary", "John"), ("John", "Mary"))
    ]
    runs = EdgeRuns(tiny, pairs)
    exact, one, mean = (attribute_edges(runs, options={"method": method}) for method in ("exact", "eap", "eap-ig"))
    near = [np.corrcoef(exact.values, each.values)[0, 1] for each in (one, mean)]
    assert near[0] > 0.7
    assert near[1] > max(0.9, near[0])
    assert mean.ranked[0][0] == exact.ranked[0][0]


def test_random_scores_are_a_control(llama: HookedModel) -> None:
    first, again, other = (attribute_edges(llama, PAIRS, {"method": "random", "seed": seed}) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.values, again.values)
    assert np.abs(np.corrcoef(first.values, other.values)[0, 1]) < 0.4
    assert first.by_example is None


def test_quantised_weights_are_no_different() -> None:
    plain, quantised = make_model("llama"), make_model("llama")
    chosen = lambda path, module: path.endswith(("q_proj", "o_proj"))  # noqa: E731
    nn.quantize(quantised, group_size=32, bits=8, class_predicate=chosen)
    for path, module in quantised.named_modules():
        if isinstance(module, nn.QuantizedLinear):
            parent = dict(plain.named_modules())[path]
            parent.weight = mx.dequantize(module.weight, module.scales, module.biases, module.group_size, module.bits)
    wanted, found = (attribute_edges(HookedModel(each), PAIRS) for each in (plain, quantised))
    np.testing.assert_allclose(found.values, wanted.values, atol=1e-4)


def test_batches_and_lengths_do_not_matter(llama: HookedModel) -> None:
    together = attribute_edges(llama, [*PAIRS, LONGER])
    told: list[tuple[int, int]] = []
    apart = attribute_edges(
        llama, [*PAIRS, LONGER], {"batch_size": 1}, progress=lambda done, of: told.append((done, of))
    )
    np.testing.assert_allclose(together.values, apart.values, atol=1e-5)
    # Of each batch: what it writes, what is put in, a gradient, the embedding ablated, and as it is.
    assert told == [(i + 1, 15) for i in range(15)]


def test_what_is_told_of_scores(tiny: HookedModel) -> None:
    pair = {
        "clean": "The capital of France is",
        "corrupted": "The capital of Italy is",
        "answer": "Paris",
        "wrong": "Rome",
    }
    scores = attribute_edges(tiny, [pair])
    told = scores.to_dict()
    assert (told["method"], told["metric"], told["ablation"]) == ("eap-ig", "logit_difference", "corrupted")
    settings = told["settings"]
    assert (settings["steps"], settings["rule"], len(settings)) == (5, "gauss", 4)
    assert "graph" not in told
    assert list(told["edges"]) == scores.edges
    sizes = [abs(score) for _, score in scores.ranked]
    assert sizes == sorted(sizes, reverse=True)
    with pytest.raises(HookError, match="no node 'L9H0'"):
        scores["L9H0->logits"]


def test_scores_are_read_by_all_names_of_an_edge(llama: HookedModel) -> None:
    scores = attribute_edges(llama, PAIRS, {"method": "eap"})
    by_name = dict(zip(scores.edges, scores.values, strict=True))
    assert scores["a0.h1->a1.h2<q>"] == scores["L0H1->L1H2<q>"] == by_name["L0H1->L1H2<q>"]
    # The key-value head that serves it.
    assert scores["L0H1->L1H2<k>"] == by_name["L0H1->L1KV1<k>"]
    assert Circuit.of_scores(scores, n=40).metadata["method"] == "eap"


@pytest.mark.parametrize("ablation", ["corrupted", "zero", "mean"])
def test_it_is_told_how_far_the_embeddings_scores_add_up(llama: HookedModel, ablation: str) -> None:
    runs = EdgeRuns(llama, [*PAIRS, LONGER, ALSO_LONGER], ablation=ablation)
    scores = attribute_edges(runs, options={"steps": 3})
    of_embed = [edge for edge in scores.edges if edge.startswith("embed->")]
    assert scores.settings["integral"] == pytest.approx(sum(scores[edge] for edge in of_embed))
    whole = (runs.without([of_embed])[0] - runs.plain).mean()
    assert scores.settings["whole_change"] == pytest.approx(whole, abs=1e-5)
    assert "integral" not in attribute_edges(runs, options={"method": "eap"}).settings


def test_a_metric_without_a_gradient_is_refused(llama: HookedModel) -> None:
    def through_numpy(logits: mx.array, batch: EvalBatch) -> mx.array:
        return mx.array(np.array(logits[:, -1, 7]))

    def rank(logits: mx.array, batch: EvalBatch) -> mx.array:
        return (logits[:, -1] > logits[:, -1, 7:8]).sum(axis=-1)

    for method in ("eap", "eap-ig"):
        for metric in (through_numpy, rank):
            with pytest.raises(HookError, match='is 0 everywhere, .* take the method "exact", or acdc'):
                attribute_edges(llama, PAIRS, {"method": method}, metric=metric)
    assert attribute_edges(llama, PAIRS, {"method": "exact"}, metric=rank).values.any()


def test_options_that_are_not_those_of_the_runs_are_refused(llama: HookedModel) -> None:
    runs = EdgeRuns(llama, PAIRS, ablation="mean", mean_over="all", batch_size=2)
    same = {"ablation": "mean", "mean_over": "all", "batch_size": 2, "steps": 1}
    wanted = attribute_edges(runs, options={"steps": 1}).values
    for given in (same, EdgeOptions(**same), EdgeOptions(steps=1)):
        np.testing.assert_array_equal(attribute_edges(runs, options=given).values, wanted)
    attribute_edges(runs, options={"method": "eap"}, metric="logit_difference")
    for name, value in (("ablation", "zero"), ("mean_over", "position"), ("batch_size", 3)):
        with pytest.raises(HookError, match=f"has its own {name}, .* got {value!r}: give it there"):
            attribute_edges(runs, options={name: value})
        if name != "mean_over":
            with pytest.raises(HookError, match=f"has its own {name}"):
                attribute_edges(runs, options=EdgeOptions(**{name: value}))
    with pytest.raises(HookError, match="has its own metric, 'logit_difference', got 'loss'"):
        attribute_edges(runs, metric="loss")
    resampled = EdgeRuns(llama, PAIRS, ablation="resample", seed=4)
    assert attribute_edges(resampled, options={"method": "eap"}).settings == {"seed": 4}
    with pytest.raises(HookError, match="has its own seed, 4, got 5"):
        attribute_edges(resampled, options={"seed": 5})
    assert attribute_edges(resampled, options={"method": "random", "seed": 5}).settings == {"seed": 5}


def test_points_run_apart_where_a_backward_pass_would_hold_too_much(
    llama: HookedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = [{"clean": [7] * 300, "corrupted": [8] * 300, "answer": 1, "wrong": 2}]
    rows_of: list[int] = []

    def counted(model: HookedModel, tokens: np.ndarray, *rest: object) -> Gradients:
        rows_of.append(len(tokens))
        return gradients(model, tokens, *rest)

    monkeypatch.setattr(edge_attribution, "gradients", counted)
    runs = EdgeRuns(llama, long, max_bytes=2**25)
    # Forward passes of all points would fit: it is the patterns that do not.
    assert runs.sets_at_once(runs.batches[0]) > 5
    attribute_edges(runs)
    assert len(rows_of) > 1
    assert sum(rows_of) == 5


def test_progress_is_told_between_points_of_the_way(llama: HookedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others take their turn there, and a job is cancelled there."""
    whole = attribute_edges(llama, [*PAIRS, LONGER])
    monkeypatch.setattr(eval_data, "TOKENS_AT_ONCE", 2 * eval_data.BACKWARD * len(PAIRS) * len(PAIRS[0]["clean"]))
    told: list[tuple[int, int]] = []
    apart = attribute_edges(llama, [*PAIRS, LONGER], progress=lambda done, of: told.append((done, of)))
    np.testing.assert_allclose(apart.values, whole.values, atol=1e-5)
    assert len(told) > 2 * 5
    assert told == [(i + 1, len(told)) for i in range(len(told))]

    class Cancelled(Exception):
        pass

    def cancel(done: int, of: int) -> None:
        if done == 3:
            raise Cancelled

    runs: list[int] = []

    def counted(model: HookedModel, tokens: np.ndarray, *rest: object) -> Gradients:
        runs.append(len(tokens))
        return gradients(model, tokens, *rest)

    monkeypatch.setattr(edge_attribution, "gradients", counted)
    with pytest.raises(Cancelled):
        attribute_edges(llama, [*PAIRS, LONGER], progress=cancel)
    assert len(runs) == 1


def test_no_pass_keeps_others_waiting_for_long(llama: HookedModel) -> None:
    told: list[int] = []
    long = [{"clean": [7] * 300, "corrupted": [8] * 300, "answer": 1, "wrong": 2}]
    attribute_edges(llama, long, {"steps": 13}, progress=lambda done, of: told.append(of))
    # Seven passes with gradients, of 2 points each; and what it writes, what is put in, ablated, and as it is.
    assert told == [7 + 4] * (7 + 4)


@pytest.mark.parametrize(
    ("mean_over", "words"),
    [("position", "over all examples, position by position"), ("all", "over all examples and positions")],
)
def test_what_a_mean_is_over_is_told(llama: HookedModel, mean_over: MeanOver, words: str) -> None:
    runs = EdgeRuns(llama, PAIRS, ablation="mean", mean_over=mean_over)
    scores = attribute_edges(runs, options={"method": "eap"})
    circuit = Circuit.of_edges(runs, ["embed->logits"])
    for told in (scores, validate_circuit(runs, circuit), ablate_edges(runs, {"one": ["embed->logits"]})):
        assert told.to_dict()["replaced_by"] == f"the mean of what the source writes {words}"


def test_what_is_refused(llama: HookedModel) -> None:
    runs = EdgeRuns(llama, PAIRS)
    for given, said in [
        ({"method": "eapig"}, "method"),
        ({"steps": 0}, "steps"),
        ({"rule": "trapezoid"}, "rule"),
        ({"ablation": "none"}, "ablation"),
        ({"step": 3}, "step"),
    ]:
        with pytest.raises(HookError, match=said):
            attribute_edges(llama, PAIRS, given)
    with pytest.raises(HookError, match="has its own ablation"):
        attribute_edges(runs, options={"ablation": "zero"})
    with pytest.raises(HookError, match="has its own eval_data"):
        attribute_edges(runs, PAIRS)
    with pytest.raises(HookError, match="gradient of kl at the plain run is 0"):
        attribute_edges(llama, PAIRS, {"method": "eap"}, metric="kl")
    with pytest.raises(HookError, match="no corrupted prompts"):
        attribute_edges(llama, [[1, 2, 3]], {"ablation": "corrupted"})
    with pytest.raises(HookError, match="Unknown hook point"):
        gradients(llama, mx.array([[1, 2]]), ["blocks.0.attn.attn_probs"], lambda logits: logits[:, -1, 0])
    for tokens, points, message in (
        (np.array([[1, 2]]), 5, "points is a list of hook points or their names, got 5"),
        (np.array([[1, 2]]), "blocks.0.hook_resid_pre", "points is a list of hook points or their names, got 'blocks"),
        (None, ["blocks.0.hook_resid_pre"], "Tokens are a text or whole numbers"),
        (np.array([[1, 60]]), ["blocks.0.hook_resid_pre"], "Token ids are 0 to 59"),
    ):
        with pytest.raises(HookError, match=message):
            gradients(llama, tokens, points, lambda logits: logits[:, -1, 0])  # type: ignore[arg-type]
    assert EdgeOptions().steps == 5


def test_points_on_the_way() -> None:
    for rule in ("gauss", "right"):
        points, weights = way(6, rule)
        assert weights.sum() == pytest.approx(1)
        assert ((points > 0) & (points <= 1)).all()
    # Exact for polynomials up to twice as many as there are points, less one.
    points, weights = way(3, "gauss")
    assert weights @ points**5 == pytest.approx(1 / 6)
    np.testing.assert_allclose(way(4, "right")[0], [0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(way(4, "left")[0], [0, 0.25, 0.5, 0.75])


def test_gradients_of_activations(llama: HookedModel) -> None:
    """By differences of runs in which a value is moved a little."""
    tokens = np.array(rows(PAIRS, "clean"))
    found = gradients(llama, tokens, ["blocks.1.attn.hook_z", "blocks.0.hook_mlp_out"], lambda logits: logits[:, -1, 7])
    draw = np.random.default_rng(0)
    for name, gradient in found.gradients.items():
        way_of = draw.standard_normal(gradient.shape).astype(np.float32)
        ends = []
        for step in (1e-2, -1e-2):
            move = lambda value, point, step=step: value + step * mx.array(way_of)  # noqa: B023, E731
            ends.append(np.array(llama.run_with_hooks(tokens, [(name, move)]))[:, -1, 7])
        along = (np.array(gradient) * way_of).sum(axis=tuple(range(1, gradient.ndim)))
        np.testing.assert_allclose(along, (ends[0] - ends[1]) / 2e-2, rtol=2e-2, atol=2e-3)
    twice = gradients(llama, tokens, ["blocks.1.attn.hook_z", "blocks.*.attn.hook_z"], lambda logits: logits[:, -1, 7])
    assert list(twice.gradients) == [f"blocks.{layer}.attn.hook_z" for layer in (1, 0, 2)]
    np.testing.assert_allclose(
        *(np.array(each.gradients["blocks.1.attn.hook_z"]) for each in (twice, found)), atol=1e-6
    )
    with pytest.raises(HookError, match="at least one hook point"):
        gradients(llama, tokens, [], lambda logits: logits[:, -1, 7])
    with pytest.raises(HookError, match="Unknown hook point"):
        gradients(llama, tokens, ["blocks.9.attn.hook_z"], lambda logits: logits[:, -1, 7])
