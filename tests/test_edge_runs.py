"""Runs with edges replaced are what an independent forward pass over the graph gives, on every architecture."""

import warnings
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from every_architecture import on_every_architecture
from graph_reference import GraphReference
from mlx_lm.models import llama as llama_of_mlx_lm
from tiny_models import make_model

from mlx_hooks import HookedModel, HookError
from mlx_hooks.analysis.attention_analysis import analyse_attention
from mlx_hooks.analysis.circuit_search import analyse_circuit
from mlx_hooks.analysis.circuits import model_graph
from mlx_hooks.analysis.circuits.ablation_study import ablation_study
from mlx_hooks.analysis.circuits.attribution_patching import attribution_patching
from mlx_hooks.analysis.circuits.circuit import Circuit
from mlx_hooks.analysis.circuits.edge_attribution import attribute_edges
from mlx_hooks.analysis.circuits.edge_runs import EdgeRuns, IndexedSets
from mlx_hooks.analysis.circuits.gradients import gradients
from mlx_hooks.analysis.circuits.graph import graph_of
from mlx_hooks.analysis.circuits.groups import replace_groups
from mlx_hooks.analysis.circuits.neuronpedia import to_neuronpedia
from mlx_hooks.analysis.circuits.patching import activation_patching
from mlx_hooks.analysis.circuits.path_patching import path_patching
from mlx_hooks.analysis.components import logits_of
from mlx_hooks.analysis.composition import composition_scores, copying_scores
from mlx_hooks.analysis.eval_data import TOKENS_AT_ONCE
from mlx_hooks.analysis.head_detection import detect_heads
from mlx_hooks.analysis.head_weights import head_weights
from mlx_hooks.analysis.known_models import KnownFraction
from mlx_hooks.coverage.models import tiny_model

PAIRS = [
    {"clean": [5, 9, 2, 31, 7], "corrupted": [5, 9, 3, 30, 7], "answer": 11, "wrong": 12},
    {"clean": [1, 8, 22, 3, 40], "corrupted": [2, 8, 21, 3, 41], "answer": 10, "wrong": 9},
]
LONGER = {"clean": [4, 3, 2, 1, 50, 51], "corrupted": [4, 3, 2, 7, 50, 52], "answer": 3, "wrong": 13}
ALSO_LONGER = {"clean": [9, 30, 2, 17, 8, 44], "corrupted": [9, 31, 2, 17, 8, 45], "answer": 21, "wrong": 4}
CLOSE = {"rtol": 2e-4, "atol": 2e-4}


def difference(logits: np.ndarray, pairs: list[dict]) -> np.ndarray:
    return np.array([row[-1, pair["answer"]] - row[-1, pair["wrong"]] for row, pair in zip(logits, pairs, strict=True)])


def rows(pairs: list[dict], which: str) -> list[list[int]]:
    return [pair[which] for pair in pairs]


# The graph.


def test_the_graph_of_grouped_queries(llama: HookedModel) -> None:
    graph = graph_of(llama)
    assert [node.name for node in graph.nodes[:7]] == ["embed", "L0H0", "L0H1", "L0H2", "L0H3", "L0 mlp", "L1H0"]
    first = [each.name for each in graph.inputs[:9]]
    assert first == [f"L0H{h}<q>" for h in range(4)] + [f"L0KV{h}<{k}>" for k in "kv" for h in range(2)] + ["L0 mlp"]
    assert graph.inputs[-1].name == "logits"
    # 8 inputs of attention, one of the MLP: each sees all before it.
    assert len(graph.edges) == sum(8 * (1 + 5 * layer) + 5 + 5 * layer for layer in range(3)) + 16
    assert graph.input("L1KV1<k>").feeds == ("L1H2", "L1H3")
    assert [each.name for each in graph.inputs_of("L1H3")] == ["L1H3<q>", "L1KV1<k>", "L1KV1<v>"]


def test_attention_that_writes_nothing_has_its_edges() -> None:
    silent = make_model("llama")
    for layer in silent.layers:
        layer.self_attn.o_proj.weight = mx.zeros_like(layer.self_attn.o_proj.weight)
    names = {edge.name for edge in graph_of(HookedModel(silent)).edges}
    assert names == {edge.name for edge in graph_of(HookedModel(make_model("llama"))).edges}
    assert "L0H1->L0 mlp" in names


def test_a_sublayer_that_reads_another_position_beside_the_stream_is_refused() -> None:
    read: list[mx.array] = []

    class Told(llama_of_mlx_lm.MLP):
        def __call__(self, x: mx.array) -> mx.array:
            read[:] = [x]
            return super().__call__(x)

    class Shifted(llama_of_mlx_lm.MLP):
        def __call__(self, x: mx.array) -> mx.array:
            before = mx.concatenate([mx.zeros_like(x[:, :1]), read[0][:, :-1]], axis=1)
            return super().__call__(x + before)

    shifted = make_model("llama")
    shifted.layers[0].mlp.__class__, shifted.layers[2].mlp.__class__ = Told, Shifted
    with pytest.raises(HookError, match="mlp of layer 2 depends on more than the stream"):
        graph_of(HookedModel(shifted))


def test_heads_that_write_nothing_where_one_token_is_read() -> None:
    """Of one token a head of fractions writes nothing, and its norms have no weights."""
    known = KnownFraction(2, 1, 0)
    runs = EdgeRuns(known.hooked(), known.pairs(4))
    assert [reading.place.name for reading in runs.graph.readings[:2]] == [
        f"model.layers.0.{norm}.input" for norm in ("input_layernorm", "post_attention_layernorm")
    ]
    assert {edge.source for edge in runs.graph.edges} >= {"L0H0", "L1H0", "L0 mlp", "L1 mlp"}
    np.testing.assert_allclose(runs.ablated, runs.corrupted, atol=1e-4)
    scores = attribute_edges(runs, options={"method": "exact"})
    assert {name for name, score in scores.ranked if abs(score) > 1e-4} == set(known.edges())


def test_names_of_edges(llama: HookedModel) -> None:
    graph = graph_of(llama)
    assert graph.edge("L0H1->L1H2<q>").name == "L0H1->L1H2<q>"
    # The EAP library's names, and a query head's key-value head.
    assert graph.edge("a0.h1->a1.h2<q>").name == "L0H1->L1H2<q>"
    assert graph.edge("m0->a1.h3<v>").name == "L0 mlp->L1KV1<v>"
    assert graph.edge("input->logits").name == "embed->logits"
    for wrong, said in [
        ("L0H1", "'L0H1->L1H0<k>', got 'L0H1'"),
        ("L0H9->logits", "no node 'L0H9'"),
        ("L0H1->L9 mlp", "no input 'L9 mlp'"),
        ("L1H0->L0H0<q>", "L1H0 is not before L0H0<q>"),
        ("L1 mlp->L1H0<q>", "L1 mlp is not before L1H0<q>"),
        (3, "got 3"),
    ]:
        with pytest.raises(HookError, match=said.replace("(", r"\(")):
            graph.edge(wrong)
    with pytest.raises(HookError, match="a list of names"):
        graph.edges_of("L0H1->L1H2<q>")


def test_edges_are_told_by_theirown_names_at_once(llama: HookedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graph_of(llama)
    names = [edge.name for edge in graph.edges]
    for i, edge in enumerate(graph.edges):
        assert graph.inputs[graph.edge_rows[i]].name == edge.input
        assert graph.nodes[graph.edge_columns[i]].name == edge.source
    # Taking names apart is slow where there are tens of thousands.
    monkeypatch.setattr(model_graph, "own_name", lambda name: pytest.fail(f"{name} was taken apart"))
    assert graph.indices_of([names[7], names[3], graph.edges[7]]).tolist() == [3, 7]
    assert graph.edges_of(names[::-1]) == graph.edges
    with pytest.raises(HookError, match="a list of names, got int"):
        graph.indices_of(3)


# Edges, against the independent forward pass.


@pytest.mark.parametrize("ablation", ["corrupted", "zero", "mean"])
def test_every_single_edge(model: HookedModel, ablation: str) -> None:
    runs, oracle = EdgeRuns(model, PAIRS, ablation=ablation), GraphReference(model.model)
    own, plain = oracle.run_with(rows(PAIRS, "clean"))
    other, _ = oracle.run_with(rows(PAIRS, "corrupted"))
    instead = {
        "corrupted": other,
        "zero": {name: np.zeros_like(value) for name, value in own.items()},
        "mean": {name: np.broadcast_to(value.mean(0), value.shape) for name, value in own.items()},
    }[ablation]
    np.testing.assert_allclose(runs.plain, difference(plain, PAIRS), **CLOSE)
    some = runs.graph.edges[:: max(1, len(runs.graph.edges) // 25)]
    found = runs.without([[edge] for edge in some])
    for edge, values in zip(some, found, strict=True):
        _, logits = oracle.run_with(rows(PAIRS, "clean"), {edge.name: instead[edge.source]})
        np.testing.assert_allclose(values, difference(logits, PAIRS), err_msg=edge.name, **CLOSE)


def test_sets_of_edges(model: HookedModel) -> None:
    runs, oracle = EdgeRuns(model, PAIRS), GraphReference(model.model)
    other, _ = oracle.run_with(rows(PAIRS, "corrupted"))
    draw = np.random.default_rng(0)
    sets = [[edge for edge in runs.graph.edges if draw.random() < share] for share in (0.1, 0.5, 0.9)]
    for edges, values in zip(sets, runs.without(sets), strict=True):
        _, logits = oracle.run_with(rows(PAIRS, "clean"), {edge.name: other[edge.source] for edge in edges})
        np.testing.assert_allclose(values, difference(logits, PAIRS), **CLOSE)


def test_sets_run_together_are_what_they_are_alone(llama: HookedModel) -> None:
    data = [*PAIRS, LONGER]
    runs = EdgeRuns(llama, data)
    sets = [[], runs.graph.edges, ["L0H1->L1H2<q>", "embed->L0 mlp"], ["L2 mlp->logits"]]
    together = runs.without(sets)
    for edges, values in zip(sets, together, strict=True):
        np.testing.assert_allclose(runs.without([edges])[0], values, atol=1e-5)
    tight = EdgeRuns(llama, data, max_bytes=1, batch_size=1)
    told: list[tuple[int, int]] = []
    np.testing.assert_allclose(tight.without(sets, lambda done, of: told.append((done, of))), together, atol=1e-5)
    # What is put in is a pass of each batch.
    assert told == [(i + 1, 12 + 3) for i in range(12 + 3)]
    # Bit for bit where nothing is replaced, and where another set's edges lie elsewhere.
    alone = logits_of(llama, np.array(rows(PAIRS, "clean")))
    batch = runs.batches[0]
    some = runs.logits(batch, runs.replacements(batch), np.stack([runs.mask([])]))
    np.testing.assert_array_equal(np.array(some), np.array(alone))


def test_masks_are_made_for_a_pass_alone(llama: HookedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = EdgeRuns(llama, PAIRS, max_bytes=300_000)
    at_once = runs.sets_at_once(runs.batches[0])
    assert 1 < at_once < 20
    edges = np.arange(40)[:, None]
    dense = np.stack([runs.mask([edge]) for edge in runs.graph.edges[:40]])
    wanted = runs.masked(dense)
    np.testing.assert_array_equal(runs.masked(mask for mask in dense), wanted)
    made: list[int] = []
    slices = IndexedSets.__getitem__
    monkeypatch.setattr(
        IndexedSets, "__getitem__", lambda sets, at: made.append(at.stop - at.start) or slices(sets, at)
    )
    np.testing.assert_array_equal(runs.masked(IndexedSets(runs.graph, edges)), wanted)
    attribute_edges(runs, options={"method": "exact"})
    assert max(made) <= at_once
    for wrong in (np.zeros((1, 2, 3), dtype=bool), dense.astype(float), [dense[0].T]):
        with pytest.raises(HookError, match=r"Masks are bool of \[set, 28 inputs, 16 nodes\], got"):
            runs.masked(wrong)
    assert runs.masked([]).shape == runs.without([]).shape == (0, 2)


def test_all_edges_out_of_a_head_are_its_patch(tiny: HookedModel) -> None:
    pair = {
        "clean": "When Mary and John went to the store , John gave a drink to",
        "corrupted": "When Mary and John went to the store , Mary gave a drink to",
        "answer": " Mary",
        "wrong": " John",
    }
    runs = EdgeRuns(tiny, [pair])
    batch = runs.batches[0]
    _, cache = tiny.run_with_cache(mx.array(batch.corrupted), "blocks.2.attn.hook_z")
    heads = runs.without([[edge for edge in runs.graph.edges if edge.source == f"L2H{head}"] for head in range(4)])
    for head in range(4):
        patch = {"type": "patch", "hook_point": "blocks.2.attn.hook_z", "heads": [head], "source": cache}
        with tiny.intervening([patch]):
            patched = runs.metric.numbers(tiny.model(mx.array(batch.tokens)), batch)
        np.testing.assert_allclose(heads[head], patched, atol=1e-5)
    np.testing.assert_allclose(runs.ablated, runs.corrupted, atol=1e-4)
    assert abs(runs.plain - runs.ablated)[0] > 5


def test_other_examples_stand_in_when_resampling(llama: HookedModel) -> None:
    runs = EdgeRuns(llama, [{"clean": p["clean"], "answer": p["answer"]} for p in PAIRS], ablation="resample")
    # Each is the other's partner: with all edges replaced the prompts have changed places.
    swapped = [PAIRS[1] | {"answer": PAIRS[0]["answer"]}, PAIRS[0] | {"answer": PAIRS[1]["answer"]}]
    wanted = EdgeRuns(llama, [{"clean": p["clean"], "answer": p["answer"]} for p in swapped], ablation="zero").plain
    np.testing.assert_allclose(runs.ablated, wanted, atol=1e-5)
    with pytest.raises(HookError, match="another example that is as long"):
        EdgeRuns(llama, [PAIRS[0], LONGER], ablation="resample")


def test_means_by_position_and_over_all(llama: HookedModel) -> None:
    oracle = GraphReference(llama.model)
    own, _ = oracle.run_with(rows(PAIRS, "clean"))
    edge = "L0H2->L1 mlp"
    for mean_over, axes in (("position", 0), ("all", (0, 1))):
        runs = EdgeRuns(llama, PAIRS, ablation="mean", mean_over=mean_over)
        mean = np.broadcast_to(own["L0H2"].mean(axes), own["L0H2"].shape)
        _, logits = oracle.run_with(rows(PAIRS, "clean"), {edge: mean})
        np.testing.assert_allclose(runs.without([[edge]])[0], difference(logits, PAIRS), **CLOSE)


def test_a_mean_that_is_an_examples_own_is_refused(llama: HookedModel) -> None:
    """Where the metric is read nothing would be ablated."""
    shorter, whole = ({"clean": PAIRS[0]["clean"][:n], "answer": 4, "wrong": 5} for n in (3, 5))
    for data, example in ((PAIRS[:1], 0), ([*PAIRS, LONGER], 2), ([shorter, whole], 0)):
        with pytest.raises(HookError, match=f"The mean by position of example {example} is its own") as refused:
            EdgeRuns(llama, data, ablation="mean")
        assert refused.value.field == "eval_data"
        EdgeRuns(llama, data, ablation="mean", mean_over="all")


@pytest.mark.parametrize("mean_over", ["position", "all"])
def test_means_of_prompts_of_several_lengths(llama: HookedModel, mean_over: str) -> None:
    oracle, data, edge = GraphReference(llama.model), [*PAIRS, LONGER, ALSO_LONGER], "L0H2->L1 mlp"
    own = [oracle.run_with([pair["clean"]])[0]["L0H2"][0] for pair in data]
    runs = EdgeRuns(llama, data, ablation="mean", mean_over=mean_over, batch_size=1)
    for pair, found in zip(data, runs.without([[edge]])[0], strict=True):
        length = len(pair["clean"])
        # At a position, of the examples that have it; over all, of all positions that there are.
        means = [np.mean([each[p] for each in own if len(each) > p], axis=0) for p in range(length)]
        mean = np.array(means) if mean_over == "position" else np.tile(np.concatenate(own).mean(0), (length, 1))
        _, logits = oracle.run_with([pair["clean"]], {edge: mean[None]})
        np.testing.assert_allclose(found, difference(logits, [pair])[0], **CLOSE)


def test_a_set_that_replaces_nothing_keeps_its_numbers_beside_one_that_does(tiny: HookedModel) -> None:
    """Bit for bit, where a projection to one head alone rounds otherwise than that to all."""
    runs = EdgeRuns(tiny, PAIRS)
    (batch,) = runs.batches
    masks = np.stack([runs.mask([]), runs.mask([edge for edge in runs.graph.edges if edge.input != "logits"])])
    made = np.array(runs.logits(batch, runs.replacements(batch), masks))
    alone = np.array(logits_of(tiny, np.concatenate([batch.tokens] * 2)))
    np.testing.assert_array_equal(made[:2], alone[:2])
    assert np.abs(made[2:] - alone[2:]).max() > 0.01


@pytest.mark.parametrize("name", ["gpt_neox", "internlm2", "phi3", "granite"])
def test_heads_are_found_where_they_lie(name: str) -> None:
    """Projections of several kinds, with heads apart from one another, and what their heads write, scaled."""
    model = HookedModel(tiny_model(name))
    graph = graph_of(model)
    stream = mx.array(np.random.default_rng(0).standard_normal((2, 5, model.cfg.d_model)).astype(np.float32))
    for reading in graph.readings[:-1]:
        for entry in reading.entries:
            if entry.project is None:
                continue
            normed = entry.normed(stream)
            whole = np.array(entry.projected(normed))
            for head in range(len(entry.inputs)):
                np.testing.assert_allclose(np.array(entry.head_of(normed, head)), whole[..., head, :], atol=1e-5)
    writers = [writer for writer in graph.writers if writer.path is not None]
    assert len(writers) == model.cfg.n_layers
    for layer, writer in enumerate(writers):
        added = f"blocks.{layer}.hook_attn_out"
        _, cache = model.run_with_cache(mx.array(rows(PAIRS, "clean")), [writer.point.name, added])
        value = cache[writer.point.name]
        made = writer.split(value).sum(axis=0) + writer.path.parts(value).constant
        np.testing.assert_allclose(np.array(made), np.array(cache[added]), atol=1e-4)


@pytest.mark.parametrize("name", ["cohere", "phi", "gpt_neox"])
def test_blocks_side_by_side_are_replaced_apart(name: str) -> None:
    """All that the first MLP reads, replaced, is what it writes on the other prompt: its neighbour notices nothing."""
    model = HookedModel(tiny_model(name))
    runs = EdgeRuns(model, PAIRS)
    (batch,) = runs.batches
    into = {each: [edge for edge in runs.graph.edges if edge.input == each] for each in ("L0 mlp", "L1 mlp")}
    assert len(into["L0 mlp"]) == 1
    _, cache = model.run_with_cache(mx.array(batch.corrupted), "blocks.0.hook_mlp_out")
    with model.intervening([{"type": "patch", "hook_point": "blocks.0.hook_mlp_out", "source": cache}]):
        patched = runs.metric.numbers(model.model(mx.array(batch.tokens)), batch)
    np.testing.assert_allclose(runs.without([into["L0 mlp"]])[0], patched, atol=1e-5)
    assert np.abs(patched - runs.plain).max() > 1e-4


def test_heads_before_a_norm_are_one_node_where_their_projection_adds_a_constant() -> None:
    """The norm scales the constant by what the heads hold: it is nobody's alone."""
    biased = tiny_model("gemma2")
    assert "L0H0" in {node.name for node in graph_of(HookedModel(tiny_model("gemma2"))).nodes}
    for layer in biased.layers:
        projection = layer.self_attn.o_proj
        projection.bias = mx.arange(projection.weight.shape[0]) / projection.weight.shape[0]
    runs = EdgeRuns(HookedModel(biased), PAIRS)
    assert [node.name for node in runs.graph.nodes[:3]] == ["embed", "L0 attn", "L0 mlp"]
    np.testing.assert_allclose(runs.ablated, runs.corrupted, atol=1e-4)
    assert np.abs(runs.ablated - runs.plain).max() > 1e-3


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"mean_over": "postion"}, "mean_over must be 'all' or 'position', got 'postion'"),
        ({"batch_size": 0}, "batch_size must be greater than or equal to 1, got 0"),
        ({"batch_size": "x"}, "batch_size must be a valid integer, got 'x'"),
        ({"max_bytes": None}, "max_bytes must be a valid integer, got None"),
        ({"seed": -1}, "seed must be greater than or equal to 0, got -1"),
        ({"ablation": "none"}, "ablation is one of corrupted, resample, mean, zero, got 'none'"),
        ({"ablation": ["zero"]}, r"ablation is one of corrupted, resample, mean, zero, got \['zero'\]"),
    ],
)
def test_what_runs_are_given_is_checked(llama: HookedModel, given: dict, said: str) -> None:
    with pytest.raises(HookError, match=said):
        EdgeRuns(llama, PAIRS, **given)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda runs: runs.without(5), "sets is a list of lists of edges, got 5"),
        (lambda runs: runs.without("embed->logits"), "sets is a list of lists of edges, got 'embed->logits'"),
        (lambda runs: runs.masked(5), "Masks are an array .* got int"),
        (lambda runs: runs.masked(np.zeros(())), "Masks are an array .* got ndarray"),
        (lambda runs: runs.masked([[True], [True, False]]), "Masks are an array .* got list"),
        (lambda runs: runs.masked(np.zeros((1, 2, 3), dtype=bool)), "Masks are bool of"),
    ],
)
def test_sets_and_masks_are_checked(llama: HookedModel, call: Callable[[Any], object], message: str) -> None:
    with pytest.raises(HookError, match=message):
        call(EdgeRuns(llama, PAIRS))


def test_a_pass_of_several_sets_has_no_more_tokens_than_another(llama: HookedModel) -> None:
    runs = EdgeRuns(llama, [*PAIRS, LONGER], max_bytes=2**40)
    for batch in runs.batches:
        at_once = runs.sets_at_once(batch)
        assert at_once == TOKENS_AT_ONCE // batch.tokens.size


def test_each_batch_runs_as_many_sets_as_it_has_room_for(llama: HookedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = EdgeRuns(llama, [*PAIRS, LONGER])
    room = {batch.tokens.size: n for batch, n in zip(runs.batches, (5, 2), strict=True)}
    ran: list[tuple[int, int]] = []
    logits = runs.logits

    def noted(batch: Any, others: Any, masks: np.ndarray) -> Any:
        ran.append((batch.tokens.size, len(masks)))
        return logits(batch, others, masks)

    monkeypatch.setattr(runs, "sets_at_once", lambda batch: room[batch.tokens.size])
    monkeypatch.setattr(runs, "logits", noted)
    runs.without([[edge] for edge in runs.graph.edges[:6]])
    first, second = room
    assert ran == [(first, 5), (first, 1), (second, 2), (second, 2), (second, 2)]


TAKE_A_MODEL: dict[str, Callable[[Any], object]] = {
    "EdgeRuns": lambda m: EdgeRuns(m, PAIRS),
    "attribute_edges": lambda m: attribute_edges(m, PAIRS),
    "activation_patching": lambda m: activation_patching(m, PAIRS),
    "attribution_patching": lambda m: attribution_patching(m, PAIRS),
    "path_patching": lambda m: path_patching(m, PAIRS, "logits"),
    "ablation_study": lambda m: ablation_study(m, PAIRS),
    "replace_groups": lambda m: replace_groups(m, PAIRS, [["L0"]]),
    "analyse_circuit": lambda m: analyse_circuit(m, PAIRS),
    "analyse_attention": lambda m: analyse_attention(m, [1, 2]),
    "detect_heads": lambda m: detect_heads(m),
    "composition_scores": lambda m: composition_scores(m),
    "copying_scores": lambda m: copying_scores(m),
    "head_weights": lambda m: head_weights(m),
    "graph_of": lambda m: graph_of(m),
    "gradients": lambda m: gradients(
        m, np.array([[1, 2]]), ["blocks.0.hook_resid_pre"], lambda logits: logits[:, -1, 0]
    ),
    "to_neuronpedia": lambda m: to_neuronpedia(
        Circuit.of_edges(graph_of(HookedModel(m)), ["embed->logits"]), m, PAIRS[0]
    ),
}


@pytest.mark.parametrize("call", TAKE_A_MODEL.values(), ids=TAKE_A_MODEL)
def test_a_model_that_is_not_hooked_is_refused(llama: HookedModel, call: Callable[[Any], object]) -> None:
    with pytest.raises(
        HookError, match=r"model is a HookedModel, as HookedModel\(model\) or .*, got Model\."
    ) as caught:
        call(llama.model)
    assert caught.value.field == "model"


def test_of_the_clean_run_no_more_is_kept_than_is_compared(llama: HookedModel) -> None:
    runs = EdgeRuns(llama, [*PAIRS, LONGER], metric="kl")
    np.testing.assert_allclose(runs.plain, 0, atol=1e-6)
    kept = [runs.plain_run(i) for i in range(len(runs.batches))]
    assert [each and each.log_probabilities.shape for each in kept] == [(2, 1, 60), (1, 1, 60)]
    assert EdgeRuns(llama, PAIRS).plain_run(0) is None


@pytest.mark.parametrize("metric", ["probability", "log_probability", "loss", "kl"])
def test_metrics(llama: HookedModel, metric: str) -> None:
    runs = EdgeRuns(llama, [*PAIRS, LONGER], metric=metric)
    batch = runs.batches[0]
    assert batch.corrupted is not None
    plain, corrupted = (
        np.array(logits_of(llama, each))[:, -1].astype(np.float64) for each in (batch.tokens, batch.corrupted)
    )
    logs = [x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (plain, corrupted)]
    answers = [pair["answer"] for pair in PAIRS]
    picked = [log[[0, 1], answers] for log in logs]
    wanted = {
        "probability": [np.exp(each) for each in picked],
        "log_probability": picked,
        "loss": [-each for each in picked],
        "kl": [np.zeros(2), (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1)],
    }[metric]
    assert runs.corrupted is not None
    np.testing.assert_allclose(runs.plain[:2], wanted[0], atol=1e-5)
    np.testing.assert_allclose(runs.corrupted[:2], wanted[1], atol=1e-5)
    np.testing.assert_allclose(runs.ablated, runs.corrupted, atol=1e-4)


def test_quantised_and_half_precision() -> None:
    quantised = make_model("llama")
    nn.quantize(
        quantised, group_size=32, bits=8, class_predicate=lambda path, module: path.endswith(("q_proj", "o_proj"))
    )
    for model, tolerance in ((quantised, 1e-4), (make_model("llama", dtype=mx.bfloat16), 0.15)):
        runs = EdgeRuns(HookedModel(model), PAIRS)
        assert runs.corrupted is not None
        np.testing.assert_allclose(runs.ablated, runs.corrupted, atol=tolerance)


# Every architecture.

REFUSED = {
    "afm7": "depends on more than the stream",
    "deepseek_v41": "weights that mix its streams",
    "gemma3n": "several residual streams",
    "gemma4": "depends on more than the stream",
    "gemma4/per_layer_inputs": "a branch beside",
    "gemma4_text": "a branch beside",
    "hunyuan": "depends on more than the stream",
    "iquestloopcoder": "run several times",
    "kimi_k3": "mixture of it",
    "longcat_flash": "a branch beside",
    "longcat_flash_ngram": "a branch beside",
    "nanbeige": "run several times",
    "nanochat": "is not the stream",
    "rwkv7": "depends on more than the stream",
    "talkie": "a branch beside",
}
"""Architectures that are no such graph, and what is said."""


def reads_several(model: HookedModel, tokens: list[int]) -> bool:
    """Some of mlx-lm's models read one token at a time."""
    try:
        logits_of(model, np.array([tokens]))
    except HookError:
        return False
    return True


@on_every_architecture
def test_with_all_edges_replaced_a_model_does_what_it_does_on_the_other_prompt(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = HookedModel(tiny_model(name))
    if name in REFUSED:
        with pytest.raises(HookError, match=REFUSED[name]):
            graph_of(model)
        return
    drawn = np.random.default_rng(0).integers(0, model.cfg.d_vocab, (2, 6)).tolist()
    length = 6 if reads_several(model, drawn[0]) else 1
    runs = EdgeRuns(model, [{"clean": drawn[0][:length], "corrupted": drawn[1][:length], "answer": 1, "wrong": 2}])
    batch = runs.batches[0]
    others = runs.replacements(batch)
    assert batch.corrupted is not None
    both = np.stack([runs.mask([]), runs.mask(runs.graph.edges)])
    made = (runs.logits(batch, others, both), logits_of(model, batch.tokens), logits_of(model, batch.corrupted))
    # Some rule tokens out.
    logits, plain, corrupted = (np.nan_to_num(np.array(each), neginf=0.0) for each in made)
    assert np.abs(plain - corrupted).max() > 1e-3
    for found, wanted in ((logits[:1], plain), (logits[1:], corrupted)):
        np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())
