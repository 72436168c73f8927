"""Attention as a graph of a generation: which weights are kept, what is said of them, and the files of it."""

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import networkx
import numpy as np
import pytest
import reference
from observing import LONG, PROMPT, STORY, Everything, in_chunks
from tiny_models import make_model

from mlx_hooks import (
    AttentionExtractionHook,
    HookedModel,
    HookError,
    LayerAttention,
    ObserverError,
    create_attention_extraction_hook,
)
from mlx_hooks.attention import KeyPositions, _numpy_softmax
from mlx_hooks.coverage.models import tiny_model
from mlx_hooks.instrument import attending

# Attention as edges


def independent_edges(model: HookedModel, fed: list[int], threshold: float) -> dict[tuple[int, int], set]:
    """(layer, head) -> {(source, target)} from one NumPy forward pass."""
    values = reference.forward(model.model, [fed])
    found = {}
    for layer in range(model.cfg.n_layers):
        for head, pattern in enumerate(values[f"blocks.{layer}.attn.hook_pattern"][0]):
            found[layer, head] = {(int(key), int(query)) for query, key in np.argwhere(pattern > threshold)}
    return found


@pytest.mark.parametrize("rows_of_a_part", [256, 3])
@pytest.mark.parametrize("chunk", [2048, 4])
def test_edges_are_the_weights_above_the_threshold_each_once(
    model: HookedModel, chunk: int, rows_of_a_part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attending, "ROWS_OF_A_PART", rows_of_a_part)
    hook = create_attention_extraction_hook(threshold=0.15)
    tokens = in_chunks(model, LONG, [hook], chunk, max_tokens=5)
    fed = LONG + tokens[:-1]
    expected = independent_edges(model, fed, 0.15)
    values = reference.forward(model.model, [fed])
    got: dict[tuple[int, int], list] = {}
    for record in hook.attention_data:
        edges = got.setdefault((record["layer"], record["head"]), [])
        for edge in record["edges"]:
            edges.append((edge["source_pos"], edge["target_pos"]))
            pattern = values[f"blocks.{record['layer']}.attn.hook_pattern"][0, record["head"]]
            assert edge["weight"] == pytest.approx(pattern[edge["target_pos"], edge["source_pos"]], abs=2e-5)
            assert edge["source_token"] == str(fed[edge["source_pos"]])
            assert edge["target_token"] == str(fed[edge["target_pos"]])
    assert {place: set(edges) for place, edges in got.items()} == expected
    assert all(len(edges) == len(set(edges)) for edges in got.values())


def test_records_are_the_seed_s(llama: HookedModel) -> None:
    hook = AttentionExtractionHook(threshold=0.2)
    llama.generate(PROMPT, max_tokens=3, hooks=[hook])
    data = hook.attention_data
    # Two passes of the prompt, one of each generated token that was fed; in each all layers and heads.
    places = [(record["position"], record["layer"], record["head"]) for record in data]
    assert places == [(at, layer, head) for at in (0, 4, 5, 6) for layer in range(3) for head in range(4)]
    assert len(data) == 48
    assert data[-1] == data[47] == data[40:][-1]
    with pytest.raises(IndexError):
        data[48]
    record = data[0]
    assert set(record) == {"layer", "head", "position", "tokens", "edges", "generation_context"}
    assert record["tokens"] == [str(token) for token in PROMPT[:4]]
    assert record["generation_context"] == {"prompt_length": 5, "total_length": 4}
    assert set(record["edges"][0]) == {"source_pos", "target_pos", "weight", "source_token", "target_token"}
    assert json.dumps(record)
    assert data[-1]["generation_context"] == {"prompt_length": 5, "total_length": 7}
    assert hook.n_edges == sum(len(record["edges"]) for record in data)


def test_records_are_compared_and_added_as_a_list_is(llama: HookedModel) -> None:
    hook, other = AttentionExtractionHook(store_values=True), AttentionExtractionHook(0.3, store_values=True)
    llama.generate(PROMPT, max_tokens=3, hooks=[hook, other])
    data = hook.attention_data
    assert data == hook.attention_data == list(data)
    assert list(data) == data
    assert data != other.attention_data
    assert data != list(data)[1:]
    assert data != "records"
    none: list[dict] = []
    assert data == data + none
    assert data == none + data
    assert (data + other.attention_data)[len(data)]["edges"][0]["weight"] > 0.3


def test_a_hook_holds_the_latest_generation(llama: HookedModel) -> None:
    hook = AttentionExtractionHook()
    llama.generate(LONG, max_tokens=3, hooks=[hook])
    llama.generate(PROMPT, max_tokens=1, hooks=[hook])
    fresh = AttentionExtractionHook()
    llama.generate(PROMPT, max_tokens=1, hooks=[fresh])
    assert list(hook.attention_data) == list(fresh.attention_data)
    hook.clear()
    assert (list(hook.attention_data), hook.tokens, hook.n_edges) == ([], [], 0)


def test_hooks_of_different_thresholds_layers_and_heads_do_not_meet(llama: HookedModel) -> None:
    hooks = [
        AttentionExtractionHook(0.05),
        AttentionExtractionHook(0.3, layers=[1], heads=[2, 0]),
        AttentionExtractionHook(0.2, top_k=1, heads=[3]),
    ]
    llama.generate(LONG, max_tokens=4, hooks=hooks)
    whole = hooks[0].edge_arrays()

    def edges(arrays: dict[str, np.ndarray], chosen: Any = slice(None)) -> list[tuple]:
        names = ("layer", "head", "source", "target", "weight")
        return sorted(zip(*(arrays[name][chosen].tolist() for name in names), strict=True))

    chosen = (whole["weight"] > 0.3) & (whole["layer"] == 1) & np.isin(whole["head"], [0, 2])
    assert edges(hooks[1].edge_arrays()) == edges(whole, chosen)
    best: dict[tuple, tuple] = {}
    for layer, head, source, target, weight in edges(whole):
        if head == 3 and weight > 0.2 and weight > best.get((layer, target), (0, 0))[1]:
            best[layer, target] = (source, weight)
    expected = sorted((layer, 3, source, target, weight) for (layer, target), (source, weight) in best.items())
    assert edges(hooks[2].edge_arrays()) == expected
    assert [record["head"] for record in hooks[1].attention_data[:2]] == [0, 2]


@pytest.mark.parametrize("threshold", [0.0, 0.02])
@pytest.mark.parametrize("top_k", [1, 2, 3, 50])
def test_top_k_keeps_the_strongest_of_each_row_and_of_equal_ones_the_earlier(threshold: float, top_k: int) -> None:
    from mlx_hooks.observers.edges import strongest

    rng = np.random.default_rng(0)
    # Few different weights, so that many are equal.
    weights = (rng.integers(0, 5, (3, 8, 40)) / 100).astype(np.float32)
    found = strongest(weights, threshold, top_k)
    got = list(zip(found.heads.tolist(), found.rows.tolist(), found.keys.tolist(), strict=True))
    expected = []
    for head in range(3):
        for row in range(8):
            ranked = sorted(range(40), key=lambda key: (-weights[head, row, key], key))[:top_k]
            expected += [(head, row, key) for key in sorted(ranked) if weights[head, row, key] > threshold]
    assert got == expected
    assert found.weights.tolist() == [weights[place] for place in expected]


@pytest.mark.parametrize("rows_of_a_part", [256, 3])
def test_values_are_those_of_the_source_that_the_head_reads(
    model: HookedModel, rows_of_a_part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attending, "ROWS_OF_A_PART", rows_of_a_part)
    hook = AttentionExtractionHook(threshold=0.1, store_values=True)
    tokens = model.generate(LONG, max_tokens=4, hooks=[hook]).tokens
    values = reference.forward(model.model, [LONG + tokens[:-1]])
    group = model.cfg.n_heads // model.cfg.n_key_value_heads
    compared = 0
    for record in hook.attention_data:
        v = values[f"blocks.{record['layer']}.attn.hook_v"][0]
        for edge in record["edges"]:
            np.testing.assert_allclose(edge["value"], v[edge["source_pos"], record["head"] // group], atol=5e-5)
            compared += 1
    assert compared == hook.n_edges > 0
    edge = hook.get_edges_for_layer_head(2, 3)[0]
    np.testing.assert_allclose(
        edge["value"], values["blocks.2.attn.hook_v"][0, edge["source_pos"], 3 // group], atol=5e-5
    )


def test_matrices_are_kept_when_asked_for(llama: HookedModel) -> None:
    hook, seen = AttentionExtractionHook(store_matrices=True, heads=[1, 3]), Everything()
    llama.generate(LONG, max_tokens=3, hooks=[hook, seen])
    passes: dict[tuple[int, int], list] = {}
    for record in hook.attention_data:
        passes.setdefault((record["layer"], record["head"]), []).append(record["attention_matrix"])
    assert len(passes) == 6
    for place, matrices in passes.items():
        for matrix, (weights, *_) in zip(matrices, seen.attention[place], strict=True):
            assert np.array_equal(matrix, weights[0])


def test_a_layer_that_runs_twice_says_which_time() -> None:
    model = HookedModel(tiny_model("nanbeige"))
    hook = AttentionExtractionHook(0.05, store_values=True)
    result = model.generate(PROMPT, max_tokens=2, hooks=[hook], capture=["blocks.*.attn.hook_v"])
    assert {record["pass_index"] for record in hook.attention_data} == {0, 1}
    for record in hook.attention_data:
        v = result.cache.of_pass(record["pass_index"]).numpy(("v", record["layer"]))[0]
        for edge in record["edges"]:
            np.testing.assert_allclose(
                edge["value"], v[edge["source_pos"], record["head"] * v.shape[1] // model.cfg.n_heads], atol=1e-5
            )


def test_edges_of_a_head_come_strongest_first(llama: HookedModel) -> None:
    hook = AttentionExtractionHook(0.1)
    llama.generate(LONG, max_tokens=4, hooks=[hook])
    edges = hook.get_edges_for_layer_head(layer=1, head=2)
    every = [e for r in hook.attention_data if (r["layer"], r["head"]) == (1, 2) for e in r["edges"]]
    assert edges == sorted(every, key=lambda edge: -edge["weight"])
    assert edges[0]["weight"] > edges[-1]["weight"]
    with pytest.raises(HookError, match=r"No attention of layer 7 was seen. There are: 0, 1, 2."):
        hook.get_edges_for_layer_head(7, 0)
    with pytest.raises(HookError, match=r"No attention of head 9 of layer 0 was seen. There are: 0, 1, 2, 3."):
        hook.get_edges_for_layer_head(0, 9)
    with pytest.raises(HookError, match=r"No attention of layer '0' was seen. There are: 0, 1, 2."):
        hook.get_edges_for_layer_head("0", 0)


def test_a_summary_tells_what_was_received_as_key_and_given_as_query(tiny: HookedModel) -> None:
    hook = AttentionExtractionHook(0.1)
    result = tiny.generate(STORY, max_tokens=3, hooks=[hook])
    fed = result.prompt_tokens + result.tokens[:-1]
    _, cache = tiny.run_with_cache([fed], "blocks.*.attn.hook_pattern")
    patterns = np.stack([cache.numpy(("pattern", layer))[0] for layer in range(4)])
    patterns = np.where(patterns > 0.1, patterns, 0)
    where = [i for i, token in enumerate(fed) if tiny.tokenizer.decode([token]) == "John"]
    assert len(where) == 2
    summary = hook.get_token_attention_summary("John")
    assert summary["positions"] == where
    assert summary["total_received"] == pytest.approx(patterns[..., where].sum(), abs=1e-3)
    assert summary["total_given"] == pytest.approx(patterns[:, :, where].sum(), abs=1e-3)
    assert summary["total_received"] != pytest.approx(summary["total_given"], abs=0.1)
    one = hook.get_token_attention_summary(position=where[1])
    assert (one["token"], one["positions"]) == ("John", [where[1]])
    assert one["total_received"] == pytest.approx(patterns[..., where[1]].sum(), abs=1e-3)
    strongest = one["given_attention"][0]
    layer, head, key = np.unravel_index(patterns[:, :, where[1]].argmax(), patterns[:, :, where[1]].shape)
    assert (strongest["layer"], strongest["head"], strongest["to_position"]) == (layer, head, key)
    assert strongest["to"] == tiny.tokenizer.decode([fed[key]])
    assert {"from", "from_position", "weight", "layer", "head"} == set(one["received_attention"][0])
    # As key and as query, by position and by text.
    received, given = hook.attention_received_as_key(), hook.attention_given_as_query()
    assert list(received) == sorted(received, key=lambda position: -received[position])
    for position in range(len(fed)):
        assert received.get(position, 0) == pytest.approx(patterns[..., position].sum(), abs=1e-3)
        assert given.get(position, 0) == pytest.approx(patterns[:, :, position].sum(), abs=1e-3)
    assert hook.attention_received_as_key("token")["John"] == pytest.approx(summary["total_received"])
    assert hook.attention_given_as_query("token")["John"] == pytest.approx(summary["total_given"])
    with pytest.raises(HookError, match="by is 'position' or 'token', got 'head'"):
        hook.attention_received_as_key("head")


def test_a_summary_of_what_is_not_there(tiny: HookedModel) -> None:
    hook = AttentionExtractionHook(0.1)
    tiny.generate(STORY, max_tokens=1, hooks=[hook])
    empty = hook.get_token_attention_summary("elephant")
    assert (empty["positions"], empty["total_received"], empty["total_given"]) == ([], 0.0, 0.0)
    for position in (15, -1, True, 1.0):
        with pytest.raises(HookError, match="Positions 0 to 14 were read, got"):
            hook.get_token_attention_summary(position=position)
    with pytest.raises(HookError, match=r"token is the text of a token, got 5: give a position as position="):
        hook.get_token_attention_summary(5)
    assert hook.get_token_attention_summary(position=np.int64(2))["token"] == "Mary"
    with pytest.raises(HookError, match="No position was read, got 0"):
        AttentionExtractionHook().get_token_attention_summary(position=0)
    for arguments in ({}, {"token": "a", "position": 1}):
        with pytest.raises(HookError, match="give one of them"):
            hook.get_token_attention_summary(**arguments)


def test_blanks_around_a_token_count_only_if_they_are_given() -> None:
    hook = AttentionExtractionHook(0.1)
    hook.on_generation_begin([" the", "the", "the "], {})
    weights = mx.array([[[[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]]]])
    attention = LayerAttention(weights, range(3), (0,), 1)
    hook.on_layer_attention(0, attention, [" the", "the", "the "], 0, {})
    assert hook.get_token_attention_summary("the")["positions"] == [0, 1, 2]
    assert hook.get_token_attention_summary(" the")["positions"] == [0]


def test_memory_grows_with_the_edges_that_are_kept(tiny: HookedModel) -> None:
    prompt = tiny.to_tokens([5 + i % 500 for i in range(600)])
    few, many = AttentionExtractionHook(0.5), AttentionExtractionHook(0.02)
    tiny.generate(prompt, max_tokens=2, hooks=[few, many])
    assert few.n_edges < many.n_edges
    for hook in (few, many):
        assert hook.nbytes <= 14 * hook.n_edges + 30 * 3 * 4
    # All weights would take 600 * 600 * 4 * 16 bytes.
    assert few.nbytes < 600 * 600 * 4 * 16 / 50


def test_no_python_object_is_made_per_weight(tiny: HookedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt's weights, millions of them, are selected as arrays, some rows of all heads at a time."""
    from mlx_hooks.observers import extraction

    shapes: list[tuple[int, ...]] = []
    select = extraction.strongest
    monkeypatch.setattr(extraction, "strongest", lambda w, *rest: shapes.append(w.shape) or select(w, *rest))
    monkeypatch.setattr(AttentionExtractionHook, "_shown", None)
    tiny.generate(tiny.to_tokens([5 + i % 500 for i in range(600)]), max_tokens=2, hooks=[AttentionExtractionHook()])
    # 599 rows in parts with the keys that they can see, the prompt's last row, a generated token; in each of 4 layers.
    assert shapes == [(4, 256, 256), (4, 256, 512), (4, 87, 599)] * 4 + [(4, 1, 600)] * 4 + [(4, 1, 601)] * 4


@pytest.mark.parametrize(("n_prompt", "n_tokens"), [(2048, 1), (16, 256)])
def test_watching_attention_takes_at_most_twice_the_time(tiny: HookedModel, n_prompt: int, n_tokens: int) -> None:
    """Coarsely: processor time, the best of some pairs; benchmarks/observers.py measures it."""
    prompt = tiny.to_tokens(np.random.default_rng(0).integers(5, tiny.cfg.d_vocab, n_prompt).tolist())

    def seconds(hooks: list) -> float:
        begin = time.process_time()
        tiny.generate(prompt, max_tokens=n_tokens, hooks=hooks, logit_bias={3: -1e9})
        return time.process_time() - begin

    ratios: list[float] = []
    while len(ratios) < 5 and min(ratios, default=9.0) > 2:
        plain = seconds([])
        ratios.append(seconds([AttentionExtractionHook(0.1)]) / plain)
    assert min(ratios) <= 2


def test_parts_on_a_cpu_are_the_captured_pattern(tiny: HookedModel) -> None:
    """A long prompt, whose softmax is not MLX's; at positions after others, and of no more than a part."""
    prompt = [5 + i * i % 500 for i in range(600)]
    hook = AttentionExtractionHook(0.01)
    fed = prompt + in_chunks(tiny, prompt, [hook], 350, max_tokens=2)[:-1]
    _, cache = tiny.run_with_cache([fed], "blocks.*.attn.hook_pattern")
    edges = hook.edge_arrays()
    for layer in range(tiny.cfg.n_layers):
        pattern, own = cache.numpy(("pattern", layer))[0], edges["layer"] == layer
        got = np.zeros_like(pattern)
        got[edges["head"][own], edges["target"][own], edges["source"][own]] = edges["weight"][own]
        clear = np.abs(pattern - 0.01) > 1e-5
        np.testing.assert_allclose(got[clear], np.where(pattern > 0.01, pattern, 0)[clear], atol=1e-5)


def test_whoever_takes_no_parts_is_shown_the_whole(llama: HookedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attending, "ROWS_OF_A_PART", 3)
    hook, seen, alone = AttentionExtractionHook(), Everything(), AttentionExtractionHook()
    llama.generate(LONG, max_tokens=2, hooks=[hook, seen])
    assert [weights.shape for weights, *_ in seen.attention[1, 2]] == [(1, 10, 10), (1, 1, 11), (1, 1, 12)]
    llama.generate(LONG, max_tokens=2, hooks=[alone])
    places = [
        [[(edge["source_pos"], edge["target_pos"]) for edge in record["edges"]] for record in each.attention_data]
        for each in (hook, alone)
    ]
    assert places[0] == places[1]


def test_parts_are_the_whole_with_sinks_and_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gpt_oss", "gemma3_text", "deepseek_v2", "gemma2", "mistral3"):
        model = HookedModel(tiny_model(name))
        whole, parts = AttentionExtractionHook(0.01, store_matrices=True), AttentionExtractionHook(0.01)
        model.generate(LONG, max_tokens=3, hooks=[whole])
        monkeypatch.setattr(attending, "ROWS_OF_A_PART", 4)
        model.generate(LONG, max_tokens=3, hooks=[parts])
        monkeypatch.undo()
        one, other = whole.edge_arrays(), parts.edge_arrays()
        order = [np.lexsort([edges[key] for key in ("source", "target", "head", "layer")]) for edges in (one, other)]
        assert whole.n_edges > 20
        for key in ("layer", "head", "source", "target"):
            assert np.array_equal(one[key][order[0]], other[key][order[1]]), name
        np.testing.assert_allclose(one["weight"][order[0]], other["weight"][order[1]], atol=1e-6)
        assert len(whole.attention_data) == len(parts.attention_data)


def test_the_softmax_of_parts_is_stable_and_exact() -> None:
    scores = mx.array([[1000.0, 999.0, -mx.inf], [-1000.0, -mx.inf, -mx.inf], [0.5, -0.25, 3.0]])
    exact = np.exp(np.array(scores, np.float64) - np.array([[1000.0], [-1000.0], [3.0]]))
    np.testing.assert_allclose(_numpy_softmax(scores), exact / exact.sum(-1, keepdims=True), atol=1e-7)


def test_keys_out_of_order_under_a_causal_mask_do_not_come_in_parts() -> None:
    tap = SimpleNamespace(edits=[], reads=[SimpleNamespace(in_parts=True)])
    attention: Any = SimpleNamespace(taps={"pattern": tap})
    q, array = mx.zeros((1, 1, attending.ROWS_OF_A_PART + 1, 2)), mx.zeros((1, 1))
    in_order, placed = KeyPositions(None, 300), KeyPositions(mx.arange(300), 300)
    for where, mask, expected in ((in_order, "causal", True), (placed, "causal", False), (placed, array, True)):
        assert attending.Attention._may_come_in_parts(attention, q, mask, where) is expected


@pytest.mark.filterwarnings("ignore::mlx_hooks.errors.UntrustedHookWarning")
@pytest.mark.parametrize("length", [5, 300])
def test_attention_that_overflows_is_said(length: int) -> None:
    inner = make_model("llama")
    for projection in (inner.model.layers[1].self_attn.q_proj, inner.model.layers[1].self_attn.k_proj):
        projection.weight = projection.weight * 1e30
    hook = AttentionExtractionHook(0.1)
    with pytest.raises(ObserverError, match="The attention of layer 1 is not a number: its scores overflowed"):
        HookedModel(inner).generate([3, 1, 4, 1, 5] * (length // 5), max_tokens=3, hooks=[hook])


# The graph


def test_json_is_the_seed_s_strict_and_whole(tiny: HookedModel, tmp_path: Path) -> None:
    hook = AttentionExtractionHook(0.2, store_values=True)
    tiny.generate(STORY, max_tokens=3, hooks=[hook])
    target = tmp_path / "attention.json"
    hook.save_json(target)
    assert list(tmp_path.iterdir()) == [target]

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    read = json.loads(target.read_text(), parse_constant=refuse)
    assert read == hook.to_dict()
    records = list(hook.attention_data)
    assert read["attention_records"] == len(records) == len(read["full_data"]) == 64
    for shown, record in zip(read["full_data"], records, strict=True):
        total = shown["generation_context"]["total_length"]
        assert read["tokens"][:total] == record["tokens"]
        assert [edge["weight"] for edge in shown["edges"]] == [edge["weight"] for edge in record["edges"]]
        for a, b in zip(shown["edges"], record["edges"], strict=True):
            assert a["value"] == b["value"].tolist()
    for name, stats in read["layer_head_stats"].items():
        layer, head = (int(part[1:]) for part in name.split("_"))
        weights = [e["weight"] for r in records if (r["layer"], r["head"]) == (layer, head) for e in r["edges"]]
        assert stats["edge_count"] == len(weights)
        assert stats["avg_weight"] == pytest.approx(np.mean(weights))
        assert stats["max_weight"] == max(weights)
    assert len(read["layer_head_stats"]) == 16
    totals: dict[str, float] = {}
    for edge in (edge for record in records for edge in record["edges"]):
        totals[edge["source_token"]] = totals.get(edge["source_token"], 0) + edge["weight"]
    assert dict(read["top_attended_tokens"]) == pytest.approx(totals)
    weights = [total for _, total in read["top_attended_tokens"]]
    assert weights == sorted(weights, reverse=True)
    assert set(read["unique_tokens"]) <= set(read["tokens"])


def test_the_graph_runs_from_key_to_query(tiny: HookedModel, tmp_path: Path) -> None:
    hook = AttentionExtractionHook(0.2)
    tiny.generate(STORY, max_tokens=3, hooks=[hook])
    made = hook.to_networkx()
    assert isinstance(made, networkx.MultiDiGraph)
    assert made.nodes[2] == {"token": "Mary", "position": 2, "prompt": True}
    assert not made.nodes[16]["prompt"]
    assert made.number_of_edges() == hook.n_edges
    # Attention is causal: information flows forward.
    assert all(source <= target for source, target in made.edges())
    received = {node: sum(data["weight"] for *_, data in made.out_edges(node, data=True)) for node in made}
    assert {node: total for node, total in received.items() if total} == pytest.approx(hook.attention_received_as_key())
    by_text = hook.to_networkx(by="token")
    assert by_text.nodes["John"]["count"] == 2
    assert sum(data["count"] for *_, data in by_text.edges(data=True)) == hook.n_edges
    total = sum(data["weight"] for *_, data in by_text.out_edges("John", data=True))
    assert total == pytest.approx(hook.attention_received_as_key("token")["John"])
    target = tmp_path / "attention.graphml"
    hook.save_graphml(target)
    read = networkx.read_graphml(target, node_type=int, force_multigraph=True)
    assert list(tmp_path.iterdir()) == [target]
    assert dict(read.nodes(data=True)) == dict(made.nodes(data=True))

    def plain(graph: networkx.MultiDiGraph) -> list:
        return sorted((a, b, d["layer"], d["head"], d["weight"]) for a, b, d in graph.edges(data=True))

    assert plain(read) == plain(made)
    hook.save_graphml(target, by="token")
    read = networkx.read_graphml(target, force_multigraph=True)
    assert plain(read) == plain(by_text)
    with pytest.raises(HookError, match="by is 'position' or 'token', got 'layer'"):
        hook.to_networkx(by="layer")


def test_what_xml_has_no_character_for_is_written_out(tmp_path: Path) -> None:
    tokens = ["a\x00b", "\ud800", "<&>\"'", "\U0001f600", "\ufffe", "\n"]
    hook = AttentionExtractionHook(0.1)
    hook.on_generation_begin(tokens, {})
    hook.on_layer_attention(0, LayerAttention(mx.eye(6)[None, None], range(6), (0,), 1), tokens, 0, {})
    for by in ("position", "token"):
        hook.save_graphml(tmp_path / "a.graphml", by=by)
        read = networkx.read_graphml(tmp_path / "a.graphml", force_multigraph=True)
        texts = {data["token"] for _, data in read.nodes(data=True)}
        assert texts == {"a\\x00b", "\\ud800", "<&>\"'", "\U0001f600", "\\ufffe", "\n"}
    hook.save_json(tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["tokens"] == tokens


@pytest.mark.parametrize("save", [AttentionExtractionHook.save_json, AttentionExtractionHook.save_graphml])
def test_a_file_that_cannot_be_written_loses_nothing(save: Any, tmp_path: Path, monkeypatch: Any) -> None:
    hook = AttentionExtractionHook(0.1)
    with pytest.raises(HookError, match="cannot write .*no/such/a.json"):
        save(hook, tmp_path / "no" / "such" / "a.json")
    with pytest.raises(HookError, match="it is a folder; name a file in it"):
        save(hook, tmp_path)
    with pytest.raises(HookError, match="path is the path of a file, got None"):
        save(hook, None)
    # The message has the file that was asked for, not what it is called while it is written.
    name = 300 * "a"
    with pytest.raises(HookError, match=f"^cannot write {tmp_path}/{name}: File name too long$"):
        save(hook, tmp_path / name)
    target = tmp_path / "a.json"
    target.write_text("older")

    def full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("json.dump", full)
    monkeypatch.setattr("networkx.write_graphml", full)
    with pytest.raises(HookError, match="No space left on device"):
        save(hook, target)
    assert target.read_text() == "older"
    assert list(tmp_path.iterdir()) == [target]
