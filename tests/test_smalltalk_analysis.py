"""Analysis in Smalltalk, run by Amber: its numbers are NumPy's from the same capture, and Python's."""

import json
import re
import urllib.request
from xml.etree import ElementTree

import numpy as np
import pytest
from server_tools import running_server
from smalltalk_image import (
    AS_DICTIONARIES,
    Image,
    SmalltalkError,
    client,
    literal,
    record,
    same_circuits,
    serve_records,
    tensors,
)
from smalltalk_packages import write_client

from api_server import ModelWorker, ServerConfig
from mlx_hooks.analysis import heads
from mlx_hooks.analysis.circuits.circuit import Circuit
from mlx_hooks.analysis.circuits.edge_attribution import attribute_edges
from mlx_hooks.analysis.circuits.validation import validate_circuit
from neuroscope_bridge.hook_specs import NeuroScopeActivationBridge
from neuroscope_bridge.payload import PayloadError

bridge = NeuroScopeActivationBridge()
TOKENS = [7, 3, 5, 7, 3, 9, 9, 7, 3, 5]
RULES = ["previousToken", "induction", "duplicateToken", "firstToken"]


def causal_pattern(rng, n_heads, n):
    weights = np.tril(rng.random((1, n_heads, n, n)) ** 3)
    weights[:, 0, 1:, :] = 0.05
    weights[:, 0, np.arange(1, n), np.arange(n - 1)] = 0.9
    weights[:, -1, :, 0] = 5
    weights = np.tril(weights)
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def followed(rule, query, tokens):
    """The keys of a rule, written for one query at a time."""
    earlier = [key for key in range(query) if tokens[key] == tokens[query]]
    return {
        "previousToken": [query - 1] if query >= 2 else [],
        "firstToken": [0] if query >= 2 else [],
        "duplicateToken": earlier,
        "induction": [key + 1 for key in earlier if key + 1 < query],
    }[rule]


def scored(pattern, rule, tokens, queries=None):
    """Mean weight, share of hits and instances of one head's pattern [query, key]."""
    weights, hits, instances = [], [], []
    for query in range(len(tokens)) if queries is None else queries:
        keys = followed(rule, query, tokens)
        if keys:
            weights.append(pattern[query, keys].sum())
            hits.append(pattern[query, keys].max() > np.delete(pattern[query], keys).max(initial=0))
            instances += [(query, key, pattern[query, key]) for key in keys]
    return np.mean(weights), np.mean(hits), sorted(instances, key=lambda each: -each[2])


def analyze(image, server, tokens, expression="AttentionAnalyzer new analyzeLayer: 2 weights: t tokens: r"):
    server.replies["GET /health"]["tokens"] = tokens
    return image.evaluate(
        f"a := {client(server)} health. r := a at: 'tokens'."
        f" t := ({client(server)} convertActivationsForNeuroScope: (a at: 'activations')) at: 'pattern'. {expression}"
    )


def serve_pattern(server, *patterns, **fields):
    serve_records(server, *(record(each, "attention_pattern", 2, hook_id="pattern", **fields) for each in patterns))


# -- attention ---------------------------------------------------------------------------------------


def test_every_score_of_a_layer_is_numpys(image, server):
    pattern = causal_pattern(np.random.default_rng(0), 3, len(TOKENS))
    serve_pattern(server, pattern)
    found = analyze(image, server, TOKENS)
    exact = pattern[0].astype(np.float64)
    assert set(found) == {*RULES, "entropy"}
    for rule in RULES:
        expected = [scored(head, rule, TOKENS) for head in exact]
        means = np.array([each[0] for each in expected])
        best = int(means.argmax())
        np.testing.assert_allclose(found[rule]["scores"], means, rtol=1e-6, err_msg=rule)
        assert found[rule]["head"] == best
        assert found[rule]["strength"] == pytest.approx(means[best], rel=1e-6)
        assert found[rule]["confidence"] == pytest.approx(expected[best][1])
        instances = [(each["from"], each["to"], each["weight"]) for each in found[rule]["instances"]]
        np.testing.assert_allclose(instances, expected[best][2], rtol=1e-6)
    logs = np.log(exact, where=exact > 0, out=np.zeros_like(exact))
    entropies = -(exact * logs).sum(-1)[:, 1:].mean(-1)
    np.testing.assert_allclose(found["entropy"]["scores"], entropies, rtol=1e-6)
    assert found["entropy"]["strength"] == pytest.approx(entropies.mean())
    np.testing.assert_allclose(found["previousToken"]["scores"], heads.previous_token_scores(exact), rtol=1e-6)
    np.testing.assert_allclose(found["induction"]["scores"], heads.induction_scores(exact, TOKENS), rtol=1e-6)


def test_a_token_that_repeats_at_once_does_not_count_the_attention_to_itself(image):
    keys = "(AttentionRule named: {}) keysFor: {} in: #(4 4 8 4)"
    assert image.evaluate(keys.format("'induction'", 1)) == []
    assert image.evaluate(keys.format("'induction'", 3)) == [1, 2]
    assert image.evaluate(keys.format("'duplicateToken'", 3)) == [0, 1]
    assert image.evaluate(keys.format("'previousToken'", 1)) == []


def test_a_rule_of_which_no_query_speaks_is_left_out(image, server):
    serve_pattern(server, causal_pattern(np.random.default_rng(1), 2, 4))
    assert set(analyze(image, server, [1, 2, 3, 4])) == {"previousToken", "firstToken", "entropy"}
    serve_pattern(server, np.ones((1, 2, 1, 1), np.float32))
    found = analyze(image, server, [1])
    assert found == {
        "entropy": {"strength": None, "head": None, "confidence": None, "instances": [], "scores": [None] * 2}
    }


def test_chunks_of_a_prompt_are_scored_at_their_positions_and_twice_captured_rows_once(image, server):
    n = len(TOKENS)
    pattern = causal_pattern(np.random.default_rng(2), 3, n)
    serve_pattern(server, pattern)
    whole = analyze(image, server, TOKENS)
    serve_records(
        server,
        record(pattern[:, :, 6:], "attention_pattern", 2, hook_id="pattern", positions=(6, n)),
        record(pattern[:, :, :6, :6], "attention_pattern", 2, hook_id="pattern", positions=(0, 6)),
        record(pattern[:, :, :6, :6], "attention_pattern", 2, hook_id="pattern", positions=(0, 6)),
    )
    chunks = analyze(image, server, TOKENS)
    for rule in RULES:
        np.testing.assert_allclose(chunks[rule]["scores"], whole[rule]["scores"], rtol=1e-6)
        assert chunks[rule]["confidence"] == pytest.approx(whole[rule]["confidence"])
    np.testing.assert_allclose(chunks["entropy"]["scores"], whole["entropy"]["scores"], rtol=1e-6)


def test_selected_queries_and_heads_keep_their_numbers(image, server):
    pattern = causal_pattern(np.random.default_rng(3), 4, len(TOKENS))
    selected = pattern[:, [1, 3]][:, :, [4, 7, 9]]
    serve_pattern(server, selected, positions=(4, 10), position_ids=[4, 7, 9], heads=[1, 3])
    found = analyze(image, server, TOKENS)
    for rule in RULES:
        expected = [scored(pattern[0, head], rule, TOKENS, [4, 7, 9])[0] for head in (1, 3)]
        np.testing.assert_allclose(found[rule]["scores"], expected, rtol=1e-6)
        assert found[rule]["head"] == [1, 3][int(np.argmax(expected))]


@pytest.mark.parametrize(
    ("shape", "fields", "tokens", "complaint"),
    [
        ((1, 2, 3, 3), {}, 4, "Expected 3 tokens, one for each position, got 4"),
        ((1, 2, 3, 3), {"positions": (4, 7)}, 3, "A sliding window has cut this pattern: its 3 columns"),
        ((1, 2, 3, 3), {"positions": (0, 2)}, 3, "Expected one position for each of 3 queries, got 2"),
        ((1, 2, 3, 3), {"reduce": "mean"}, 3, "A pattern that was reduced to its mean"),
        ((1, 2, 2, 3), {"positions": None}, 3, "Expected as many queries as keys in a pattern that does not know"),
        ((3, 3), {"positions": None}, 3, "Expected the axes head, query and key, got"),
    ],
)
def test_patterns_that_cannot_be_scored_are_refused(image, server, shape, fields, tokens, complaint):
    serve_records(server)
    made = record(np.full((1, 2, shape[-2], shape[-1]), 0.5, np.float32), "attention_pattern", 2, hook_id="pattern")
    made |= {"shape": list(shape), "data": np.full(shape, 0.5).tolist(), "encoding": "json"} | fields
    server.replies["GET /health"] = {"activations": {"pattern": [made]}}
    with pytest.raises(SmalltalkError, match=complaint):
        analyze(image, server, list(range(tokens)))


def test_patterns_of_different_heads_and_patterns_that_are_not_finite_are_refused(image, server):
    pattern = causal_pattern(np.random.default_rng(4), 2, 4)
    serve_records(
        server,
        record(pattern, "attention_pattern", 2, hook_id="pattern"),
        record(pattern[:, :1], "attention_pattern", 2, hook_id="pattern", heads=[1]),
    )
    with pytest.raises(SmalltalkError, match="must have the same heads"):
        analyze(image, server, [1, 2, 3, 4])
    pattern[0, 0, 1, 0] = np.nan
    serve_pattern(server, pattern)
    with pytest.raises(SmalltalkError, match="pattern holds nan or inf"):
        analyze(image, server, [1, 2, 3, 4])


def test_induction_heads_are_ranked_and_those_under_the_threshold_left_out(image, server):
    pattern = causal_pattern(np.random.default_rng(5), 4, len(TOKENS))
    for query in (4, 7, 8, 9):
        pattern[0, 2, query] = 0
        keys = followed("induction", query, TOKENS)
        pattern[0, 2, query, keys] = 1 / len(keys)
    serve_pattern(server, pattern)
    ranked = heads.ranked({0: heads.induction_scores(pattern[0], TOKENS)})
    said = "(AttentionAnalyzer new threshold: {}; detectInductionHeads: t first tokens: r)"
    said += " collect: [ :each | {{ each layer. each index. each score }} ]"
    found = analyze(image, server, TOKENS, said.format(0))
    assert [each[:2] for each in found] == [[each.layer, each.head] for each in ranked]
    np.testing.assert_allclose([each[2] for each in found], [each.score for each in ranked], rtol=1e-6)
    assert [each[1] for each in analyze(image, server, TOKENS, said.format(ranked[0].score - 0.01))] == [2]
    with pytest.raises(SmalltalkError, match="No token occurs twice with something between"):
        analyze(image, server, list(range(10)), said.format(0))


def test_head_similarity_is_the_cosine_of_two_patterns(image, server):
    rng = np.random.default_rng(6)
    one, other = causal_pattern(rng, 2, 5), causal_pattern(rng, 2, 5)
    serve_records(
        server,
        record(one, "attention_pattern", 0, hook_id="one"),
        record(other, "attention_pattern", 1, hook_id="other"),
    )

    def cosine(a, b):
        a, b = (each.astype(np.float64).ravel() for each in (a, b))
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    found = image.evaluate(
        f"t := {tensors(server)}. ids := #(1 2 3 4 5)."
        "make := [ :a :b | AttentionAnalysis tensors: (Dictionary new at: 0 put: (t at: a); at: 1 put: (t at: b);"
        " yourself) tokens: ids tokenStrings: ids ]."
        "x := make value: 'one' value: 'other'. y := make value: 'other' value: 'one'."
        "c := AttentionAnalyzer new compareAttentionPatterns: x with: y."
        "{ x similarityOf: 0 head: 1 with: x layer: 1 head: 0. c overallSimilarity. c similarityAt: 1 head: 0."
        " c heads collect: [ :each | each score ]. (x attentionAt: 1 head: 1) data. (x similarityOf: 0 head: 1 with: x"
        " layer: 0 head: 1) }"
    )
    assert found[0] == pytest.approx(cosine(one[0, 1], other[0, 0]), rel=1e-6)
    swapped = [cosine(one[0, head], other[0, head]) for head in (0, 1)]
    assert found[1] == pytest.approx(np.mean(swapped), rel=1e-6)
    assert found[2] == pytest.approx(swapped[0], rel=1e-6)
    np.testing.assert_allclose(found[3], sorted(swapped * 2, reverse=True), rtol=1e-6)
    np.testing.assert_allclose(found[4], other[0, 1].ravel(), rtol=1e-7)
    assert 1 - 1e-9 < found[5] <= 1


# -- heatmaps ----------------------------------------------------------------------------------------

SVG = "{http://www.w3.org/2000/svg}"
ODD = ["<s>", '&lt;"x"', " Mary", "it's", "averylongtokenword", "\n", "\x01", "é✓", "a", "b", "c"]


def cells(svg):
    """Of each panel, (x, y, fill, tooltip) of every cell."""
    return [
        [
            (int(rect.get("x")), int(rect.get("y")), rect.get("fill"), rect.find(f"{SVG}title").text)
            for rect in group.findall(f"{SVG}rect")
            if rect.find(f"{SVG}title") is not None
        ]
        for group in svg.findall(f"{SVG}g")[:-1]
    ]


def test_a_heatmap_has_a_cell_for_each_weight_that_shows(image, server):
    n = len(ODD)
    pattern = causal_pattern(np.random.default_rng(7), 3, n)
    serve_pattern(server, pattern)
    text = analyze(image, server, ODD, "(AttentionVisualizer new createHeatmap: t tokens: r layer: 2) asSVG")
    svg = ElementTree.fromstring(text)
    panels = cells(svg)
    assert [len(each) for each in panels] == [int((head >= 0.0005).sum()) for head in pattern[0]]
    size = 28
    for panel, head in zip(panels, pattern[0], strict=True):
        for x, y, fill, tooltip in panel:
            weight = head[y // size, x // size]
            shown = float(tooltip.rpartition(": ")[2])
            assert shown == pytest.approx(weight, abs=0.0005)
            assert tooltip.startswith(f"{y // size} ")
            assert f"looks at {x // size} " in tooltip
            assert re.fullmatch(r"rgb\(\d+,\d+,\d+\)", fill)
    assert svg.get("width") == svg.get("viewBox").split()[2]
    labels = [each.text for each in svg.iter(f"{SVG}text")]
    for label in ["<s>", '&lt;"x"', "·Mary", "it's", "averylongto…", "\\n", "\ufffd", "é✓", "head 2", "0"]:
        assert label in labels
    assert "averylongtokenword" in panels[0][-1][3] or any("averylongtokenword" in cell[3] for cell in panels[0])


def test_colours_get_darker_evenly_and_the_maximum_scales_them(image):
    found = image.evaluate(
        "h := AttentionHeatmap pattern: (ActivationTensor data: #(1) shape: #(1 1 1)) tokens: #('a') layer: 0."
        "c := (0 to: 20) asArray collect: [ :each | h colorFor: each / 20 ]. h maximum: 0.5."
        "{ c. h colorFor: 0.5. h colorFor: 2 }"
    )
    rgb = np.array([[int(part) for part in re.findall(r"\d+", colour)] for colour in found[0]]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    lightness = 116 * np.cbrt(linear @ [0.2126, 0.7152, 0.0722]) - 16
    np.testing.assert_allclose(np.diff(lightness), -77 / 20, atol=1)
    assert found[1] == found[2] == found[0][-1]


def test_a_heatmap_shows_the_heads_asked_for_and_no_others(image, server):
    serve_pattern(server, causal_pattern(np.random.default_rng(8), 3, 4)[:, :2], heads=[1, 5])
    shown = "(AttentionVisualizer new createHeatmap: t tokens: r layer: 2) heads: #({}); asSVG"
    svg = ElementTree.fromstring(analyze(image, server, list("abcd"), shown.format(5)))
    assert next(each.text for each in svg.iter(f"{SVG}text")) == "Attention of layer 2, head 5"
    with pytest.raises(SmalltalkError, match="There is no head 2 in layer 2. Heads: 1, 5"):
        analyze(image, server, list("abcd"), shown.format(2))


def test_a_heatmap_is_saved_whole_or_not_at_all(image, tmp_path):
    make = (
        "h := AttentionHeatmap pattern: (ActivationTensor data: #(1) shape: #(1 1 1)) tokens: #('a') layer: 0."
        " h saveAs: {}. h asSVG"
    )
    file = tmp_path / "a.svg"
    file.write_text("x" * 100_000)
    for _ in range(2):
        assert image.evaluate(make.format(literal(str(file)))) == file.read_text()
    assert ElementTree.parse(file).getroot().tag == f"{SVG}svg"
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(SmalltalkError, match="the name must end in .svg, got '.*a.png'"):
        image.evaluate(make.format(literal(str(tmp_path / "a.png"))))
    with pytest.raises(SmalltalkError, match="There is no folder .*missing to write a.svg to"):
        image.evaluate(make.format(literal(str(tmp_path / "missing" / "a.svg"))))
    file.write_text("old")
    (tmp_path / "a.svg.part" / "in the way").mkdir(parents=True)
    with pytest.raises(SmalltalkError, match="a.svg.part"):
        image.evaluate(make.format(literal(str(file))))
    assert file.read_text() == "old"


# -- probes ------------------------------------------------------------------------------------------


def newton(features, targets, penalty, curve):
    """Weights and bias at the minimum of LinearFit's sum, in float64."""
    columns = np.c_[features, np.ones(len(features))].astype(np.float64)
    ridge = np.diag([penalty] * features.shape[1] + [0])
    solution = np.zeros(columns.shape[1])
    for _ in range(60):
        z = columns @ solution
        value, slope = curve(z)
        gradient = columns.T @ (value - targets) + ridge @ solution
        solution -= np.linalg.solve(columns.T @ (columns * slope[:, None]) + ridge, gradient)
    return solution[:-1], solution[-1]


def logistic(z):
    p = 1 / (1 + np.exp(-z))
    return p, p * (1 - p)


def identity(z):
    return z, np.ones_like(z)


def serve_examples(server, features, labels):
    serve_records(server, record(features[None], hook_id="x"))
    server.replies["GET /health"]["labels"] = labels


def probe(server, script, setup="p := LinearProbe new."):
    return (
        f"a := {client(server)} health. y := a at: 'labels'."
        f" x := (({client(server)} convertActivationsForNeuroScope: (a at: 'activations')) at: 'x') first."
        f" {setup} {script}"
    )


@pytest.mark.parametrize(
    ("examples", "width", "penalty"), [(40, 5, 1.0), (30, 64, 0.1), (60, 60, 1.0), (150, 12, 0.01), (12, 300, 10.0)]
)
def test_a_logistic_probe_finds_the_minimum(image, server, examples, width, penalty):
    rng = np.random.default_rng(examples)
    features = (rng.normal(size=(examples, width)) * 3 + 1).astype(np.float32)
    positive = features[:, 0] + rng.normal(size=examples) * 3 > 1
    positive[:2] = [False, True]
    serve_examples(server, features, np.where(positive, "yes", "no").tolist())
    found = image.evaluate(
        probe(
            server,
            f"p input: x labels: y regularization: {penalty}; train."
            "{ p weights data. p bias. p weights shape. p classes. p predict: x. p trainingAccuracy."
            " (p predictProbabilities: x) collect: [ :each | each at: 'yes' ]. p finalLoss }",
        )
    )
    weights, bias = newton(features, positive, penalty, logistic)
    np.testing.assert_allclose(found[0], weights, atol=1e-6)
    assert found[1] == pytest.approx(bias, abs=1e-6)
    assert found[2:4] == [[width], ["no", "yes"]]
    z = features @ weights + bias
    assert found[4] == np.where(z > 0, "yes", "no").tolist()
    assert found[5] == pytest.approx(np.mean((z > 0) == positive))
    np.testing.assert_allclose(found[6], logistic(z)[0], atol=1e-6)
    loss = np.logaddexp(0, z) - positive * z
    assert found[7] == pytest.approx(loss.sum() + penalty / 2 * (weights**2).sum(), rel=1e-9)


def test_more_than_two_labels_are_each_against_the_rest(image, server):
    rng = np.random.default_rng(9)
    labels = np.array(["a", "b", "c"])[rng.integers(0, 3, 60)]
    labels[:3] = ["c", "a", "b"]
    features = (rng.normal(size=(60, 6)) + (labels == "a")[:, None] - 2 * (labels == "b")[:, None]).astype(np.float32)
    serve_examples(server, features, labels.tolist())
    found = image.evaluate(
        probe(
            server,
            "p input: x labels: y regularization: 0.5; train. e := p evaluateOn: x withLabels: y."
            "{ p weights data. p weights shape. p bias. p classes. (p predictProbabilities: x) collect: [ :each |"
            " (p classes collect: [ :label | each at: label ]) ]. e. p predict: x }",
        )
    )
    order = ["c", "a", "b"]
    each = [newton(features, labels == label, 0.5, logistic) for label in order]
    assert found[1] == [3, 6]
    assert found[3] == order
    np.testing.assert_allclose(np.reshape(found[0], (3, 6)), [weights for weights, _ in each], atol=1e-6)
    np.testing.assert_allclose(found[2], [bias for _, bias in each], atol=1e-6)
    shares = np.stack([logistic(features @ weights + bias)[0] for weights, bias in each], axis=1)
    np.testing.assert_allclose(found[4], shares / shares.sum(1, keepdims=True), atol=1e-6)
    predicted = np.array(order)[shares.argmax(1)]
    assert found[6] == predicted.tolist()
    assert found[5]["accuracy"] == pytest.approx(np.mean(predicted == labels))
    for label, row in found[5]["confusion"].items():
        for guess, count in row.items():
            assert count == ((labels == label) & (predicted == guess)).sum()
    assert sum(sum(row.values()) for row in found[5]["confusion"].values()) == 60


@pytest.mark.parametrize("width", [4, 50])
def test_a_regression_is_ridge_regression(image, server, width):
    rng = np.random.default_rng(10)
    features = rng.normal(size=(30, width)).astype(np.float32)
    targets = (features[:, 0] * 2 + rng.normal(size=30) + 5).tolist()
    serve_examples(server, features, targets)
    found = image.evaluate(
        probe(
            server,
            "p probeType: 'regression'; input: x labels: y regularization: 2; train."
            " e := p evaluateOn: x withLabels: y. { p weights data. p bias. e. p predict: (x slice: #(3) axis: 2) }",
        )
    )
    weights, bias = newton(features, np.array(targets), 2, identity)
    np.testing.assert_allclose(found[0], weights, atol=1e-6)
    assert found[1] == pytest.approx(bias, abs=1e-6)
    predicted = features @ weights + bias
    assert found[2]["meanSquaredError"] == pytest.approx(np.mean((predicted - targets) ** 2), rel=1e-6)
    assert found[2]["r2"] == pytest.approx(1 - np.var(predicted - targets) / np.var(targets), rel=1e-6)
    np.testing.assert_allclose(found[3], predicted[2], rtol=1e-6)


def test_the_last_examples_are_kept_back(image, server):
    rng = np.random.default_rng(11)
    features = rng.normal(size=(20, 3)).astype(np.float32)
    labels = (features[:, 0] > 0).astype(int)
    labels[16:] = 1 - labels[16:]
    serve_examples(server, features, labels.tolist())
    found = image.evaluate(
        probe(
            server,
            "p trainingData: x labels: y validationSplit: 0.2; train. { p weights data. p trainingAccuracy."
            " p validationAccuracy }",
        )
    )
    first = labels[0]
    weights, bias = newton(features[:16], labels[:16] != first, 1.0, logistic)
    np.testing.assert_allclose(found[0], weights, atol=1e-6)
    predicted = np.where(features @ weights + bias > 0, 1 - first, first)
    assert found[1:] == [np.mean(predicted[:16] == labels[:16]), np.mean(predicted[16:] == labels[16:])]


def test_examples_may_be_vectors_of_any_kind_and_one_vector_has_one_answer(image):
    found = image.evaluate(
        "rows := #(#(0 1) #(1 1) #(2 0) #(3 0)). y := #(#low #low #high #high)."
        "one := LinearProbe input: rows labels: y regularization: 1. one train."
        "two := LinearProbe input: (rows collect: [ :each | ActivationTensor data: each shape: #(2) ]) labels: y"
        " regularization: 1. two train."
        "{ one weights data. two weights data. one predict: #(3 0). one predict: (ActivationTensor data: #(0 1)"
        " shape: #(2))."
        " one predict: #(#(3 0)). (one predictProbabilities: #(3 0)) at: #high. one evaluate:"
        " { #(3 0) -> #high. #(3 0) -> #low } }"
    )
    assert found[0] == found[1]
    assert found[2:5] == ["high", "low", ["high"]]
    assert 0.5 < found[5] < 1
    assert found[6] == {"count": 2, "accuracy": 0.5, "confusion": {"high": {"high": 1}, "low": {"high": 1}}}


@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        ("p input: #(#(1) #(2)) labels: #(1 1) regularization: 1; train", "2 different labels or more, got only 1"),
        ("p input: #(#(1)) labels: #(1) regularization: 1; train", "2 examples or more, got 1"),
        ("p input: #() labels: #() regularization: 1", "needs examples, got none"),
        ("p input: #(#(1) #(2)) labels: #(1) regularization: 1", "a label for each of 2 examples, got 1 labels"),
        ("p input: #(#(1) #(2 3)) labels: #(1 2) regularization: 1", "1 features in each example, got 2"),
        ("p input: {{Float nan}. {1.0}} labels: #(1 2) regularization: 1", "needs finite numbers, got"),
        ("p input: {{Float infinity}. {1.0}} labels: #(1 2) regularization: 1", "needs finite numbers, got"),
        ("p input: #(#(a) #(b)) labels: #(1 2) regularization: 1", "needs finite numbers, got 'a'"),
        ("p input: #(#(1) #(2)) labels: #(1 2) regularization: 0; train", "must be more than 0, got 0"),
        ("p train", "I have no examples"),
        ("p predict: #(1)", "I have learned nothing yet"),
        ("p probeType: 'clustering'", "classification or regression, got 'clustering'"),
        ("p probeType: 'regression'; input: #(#(1) #(2)) labels: #(a b) regularization: 1; train", "finite numbers"),
        ("p input: #(#(1) #(2)) labels: #(1 2) regularization: 1; train; predict: #(1 2)", "1 features in each"),
        ("p trainingData: #(#(1) #(2)) labels: #(1 2) validationSplit: 1", "from 0 to less than 1, got 1"),
        ("p input: #(#(1) #(2)) labels: #(1 2) regularization: 1; train; validationAccuracy", "No examples were kept"),
    ],
)
def test_what_a_probe_cannot_learn_from_is_refused(image, script, complaint):
    with pytest.raises(SmalltalkError, match=re.escape(complaint)):
        image.evaluate(f"p := LinearProbe new. {script}")


# -- circuits of one capture -------------------------------------------------------------------------


def find_circuits(image, server):
    return image.evaluate(f"circuits := CircuitFinder findCircuits: {tensors(server)}. {AS_DICTIONARIES}")


def test_circuits_are_those_of_the_python_bridge(image, server):
    rng = np.random.default_rng(3)
    pattern = causal_pattern(rng, 4, 9)
    activations = serve_records(
        server,
        record(pattern[:, :, :5, :5], "attention_pattern", 2),
        record(pattern[:, :, 5:], "attention_pattern", 2, positions=(5, 9)),
        record(pattern[:, :, 8:], "attention_pattern", 2, positions=(9, 10), phase="decode", step=1),
        record(causal_pattern(rng, 2, 2), "attention_pattern", 1),
        record(pattern[:, :, :, 4:], "attention_pattern", 3),
        *(
            record(rng.normal(size=(2, 9, 8)).astype(np.float32) * scale, component, layer)
            for layer in (0, 1, 2)
            for component, scale in [("residual", 2), ("attention", 1), ("mlp", 5)]
            if (layer, component) != (1, "residual")
        ),
        record(rng.normal(size=(1, 9, 8)) * 9, "attention", 2, is_input=True, hook_id="ignored"),
        record(rng.normal(size=(1, 1, 8)) * 9, "attention", 2, phase="decode", positions=(9, 10), hook_id="ignored"),
    )
    found = find_circuits(image, server)
    same_circuits(found, bridge.find_circuits(activations))
    names = [each["name"] for each in found]
    assert {"previous_token_head L2H0", "first_token_head L2H3", "mlp_write L0", "attention_write L1"} <= set(names)
    assert not [name for name in names if re.search("head L[13]", name)]


def test_a_previous_token_head_is_scored_by_hand(image, server):
    pattern = np.zeros((1, 1, 4, 4), np.float32)
    pattern[0, 0] = [[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25, 0.5, 0.25, 0], [0.125, 0, 0.75, 0.125]]
    serve_records(server, record(pattern, "attention_pattern", 5))
    (circuit,) = find_circuits(image, server)
    assert circuit["name"] == "previous_token_head L5H0"
    assert circuit["confidence"] == (0.5 + 0.75) / 2
    assert circuit["components"] == [{"layer": 5, "componentType": "attention_head", "index": 0}]
    assert circuit["pathway"] == [{"source": "position q-1", "target": "position q", "strength": 0.625}]


def test_writes_without_a_residual_are_relative_to_the_largest(image, server):
    serve_records(server, record(np.full((1, 2, 4), 1.0), "mlp", 0), record(np.full((1, 2, 4), 0.25), "attention", 1))
    found = {each["name"]: each["confidence"] for each in find_circuits(image, server)}
    assert found == {"mlp_write L0": 1.0, "attention_write L1": 0.25}


def test_nothing_captured_is_no_circuit(image):
    assert image.evaluate("(CircuitFinder findCircuits: Dictionary new) size") == 0


def test_captures_that_are_parts_are_read_as_the_bridge_reads_them(image, server):
    rng = np.random.default_rng(12)
    pattern, residual = causal_pattern(rng, 4, 9), rng.normal(size=(1, 9, 8)).astype(np.float32)
    activations = serve_records(
        server,
        record(pattern[:, [3, 0]], "attention_pattern", 1, hook_id="some heads", heads=[3, 0]),
        record(pattern, "attention_pattern", 1, hook_id="all heads, of which two are known"),
        record(pattern[:, :, [2, 5, 8]], "attention_pattern", 4, positions=(2, 9), position_ids=[2, 5, 8]),
        record(pattern[:, :, [2, 5]], "attention_pattern", 5, positions=(2, 9), position_ids=[2, 5]),
        record(pattern[:, :, 8:], "attention_pattern", 6, reduce="last", positions=(0, 9)),
        record(residual, "residual", 1, hook_id="twice"),
        record(residual[:, 4:], "residual", 1, positions=(4, 9), hook_id="twice"),
        record(residual[:, [1, 7]], "mlp", 1, positions=(1, 8), position_ids=[1, 7]),
        record(residual[:, :1], "attention", 1, reduce="mean"),
    )
    found = find_circuits(image, server)
    same_circuits(found, bridge.find_circuits(activations))
    names = {each["name"] for each in found}
    assert {"previous_token_head L1H0", "first_token_head L1H3", "previous_token_head L4H0", "mlp_write L1"} <= names
    assert not [name for name in names if re.search("L[56]|attention_write", name)]


@pytest.mark.parametrize("component", ["attention_pattern", "mlp", "residual"])
def test_what_is_not_finite_has_no_score_in_either_language(image, server, component):
    values = causal_pattern(np.random.default_rng(13), 2, 4)
    values[0, 1, 2, 1] = np.inf
    made = record(values if component == "attention_pattern" else values[:, 1], component, 1)
    activations = serve_records(server, made)
    with pytest.raises(PayloadError, match="holds nan or inf"):
        bridge.find_circuits(activations)
    with pytest.raises(SmalltalkError, match=f"layer_1_{component} holds nan or inf: no score can be computed"):
        find_circuits(image, server)


@pytest.mark.parametrize(
    ("send", "complaint"),
    [
        ("discoverCircuitsUsingGradients: 'x' inputExamples: #() gradientThreshold: 0.1", "I have no model"),
        ("trackCircuitEvolution: #x acrossCheckpoints: #() usingMetric: #y", "no checkpoints of its training"),
        ("loadCircuitTemplates: 'standard'", "no templates of circuits to load"),
        ("findCircuitsMatchingTemplates: #() similarityThreshold: 0.7", "I hold no templates"),
        ("discoverCircuitsFor: #x usingDataset: 'y' withThreshold: 0.5", "I hold no data sets of behaviours"),
        ("discoverCircuits: #()", "I have no model"),
        ("measure", "Tell me what to measure"),
    ],
)
def test_what_cannot_be_had_is_said(image, send, complaint):
    with pytest.raises(SmalltalkError, match=complaint):
        image.evaluate(f"CircuitFinder new {send}")


# -- a live server -----------------------------------------------------------------------------------

MODEL = "model := TransformerModel onClient: LMStudioRESTClient default model: 'neuroscope-tiny'."
CLEAN = "When Mary and John went to the store , John gave a drink to"
CORRUPTED = "When Mary and John went to the store , Mary gave a drink to"
TEXTS = [CLEAN, "When Mary and John went to the school , John gave a book to"]
REPEATED = "France dog book Tom school Mary drink capital mat store Berlin gave"


@pytest.fixture(scope="module")
def live(live_image):
    """Evaluates scripts that know `model`, on the live server; one image for all of them."""
    return lambda script: live_image.evaluate(f"{MODEL} {script}")


def logits_after(model, text, interventions=()):
    """The last position's, with Python's own interventions."""
    logits, _ = model.run_with_cache(text, [], interventions=interventions)
    return np.array(logits)[0, -1].astype(np.float64)


def token_id(model, word):
    return int(np.array(model.to_tokens(word))[0, -1])


def difference(model, logits):
    return logits[token_id(model, "Mary")] - logits[token_id(model, "John")]


def texts_in_smalltalk(texts):
    return "{ " + ". ".join(literal(text) for text in texts) + " }"


def test_scores_of_a_text_are_pythons(live, tiny):
    found = live(
        f"a := (AttentionAnalyzer for: model) analyzeText: {literal(CLEAN)}."
        "{ (a scoresFor: 'previousToken') collect: [ :each | { each layer. each index. each score } ]."
        " (a scoresFor: 'induction') collect: [ :each | { each layer. each index. each score } ]."
        " a tokens. a tokenStrings. (a attentionAt: 2 head: 1) data }"
    )
    _, cache = tiny.run_with_cache(CLEAN, "blocks.*.attn.hook_pattern")
    ids = np.array(tiny.to_tokens(CLEAN))[0].tolist()
    patterns = {layer: np.array(cache["pattern", layer])[0] for layer in range(4)}
    expected = [
        heads.ranked({layer: heads.previous_token_scores(each) for layer, each in patterns.items()}),
        heads.ranked({layer: heads.induction_scores(each, ids) for layer, each in patterns.items()}),
    ]
    for ours, theirs in zip(found[:2], expected, strict=True):
        assert [each[:2] for each in ours] == [[each.layer, each.head] for each in theirs]
        np.testing.assert_allclose([each[2] for each in ours], [each.score for each in theirs], atol=1e-5)
    assert found[2] == ids
    assert found[3] == tiny.to_str_tokens(CLEAN)
    np.testing.assert_allclose(found[4], patterns[2][1].ravel(), atol=1e-6)


def test_the_heads_that_the_model_card_names_are_found(live):
    found = live(
        f"z := AttentionAnalyzer for: model. i := z detectInductionHeadsIn: {literal(REPEATED)}."
        "{ i first name. i first score. i first confidence. (z analysis scoresFor: 'previousToken') first name."
        " z computeHeadSimilarity: 2 head: 1 with: 2 head: 0. z computeHeadSimilarity: 2 head: 1 with: 1 head: 1."
        " (z detectInductionHeads: z analysis) first name }"
    )
    assert (found[0], found[3], found[6]) == ("L2H1", "L1H1", "L2H1")
    assert found[1] > 0.9
    assert found[2] > 0.9
    assert found[4] > 0.7 > found[5]


def test_a_models_interventions_take_part_in_the_analysis(live, tiny):
    found = live(
        "model addHook: (InterventionHook zeroing: #mlp layer: 0)."
        f"a := (AttentionAnalyzer for: model) analyzeText: {literal(CLEAN)}. (a attentionAt: 2 head: 1) data"
    )
    edit = {"hook_point": "blocks.0.hook_mlp_out", "type": "zero"}
    _, edited = tiny.run_with_cache(CLEAN, "blocks.2.attn.hook_pattern", interventions=[edit])
    np.testing.assert_allclose(found, np.array(edited["pattern", 2])[0, 1].ravel(), atol=1e-6)
    _, plain = tiny.run_with_cache(CLEAN, "blocks.2.attn.hook_pattern")
    assert np.abs(np.array(plain["pattern", 2])[0, 1].ravel() - found).max() > 0.01


def test_neurons_are_read_as_python_reads_them(live, tiny):
    found = live(
        f"n := NeuronAnalyzer for: model. texts := {texts_in_smalltalk(TEXTS)}."
        "{ n topTokensFor: 17 layer: 2 in: texts count: 4. n compareNeurons: 2 -> 17 with: 3 -> 8 in: texts."
        " n texts: texts; compareNeurons: 2 -> 17 with: 2 -> 17."
        " n findTopActivatingTokens: 2 -> 17 fromDataset: texts count: 1 }"
    )
    captured = [tiny.run_with_cache(text, "blocks.*.mlp.hook_post")[1] for text in TEXTS]
    firings = [
        (float(value), position, place + 1, tiny.to_str_tokens(text)[position])
        for place, (text, cache) in enumerate(zip(TEXTS, captured, strict=True))
        for position, value in enumerate(np.array(cache["post", 2])[0, :, 17])
    ]
    for ours, theirs in zip(found[0], sorted(firings, reverse=True)[:4], strict=True):
        assert ours["activation"] == pytest.approx(theirs[0], rel=1e-6)
        assert (ours["position"], ours["text"], ours["token"]) == theirs[1:]
    one = np.concatenate([np.array(cache["post", 2])[0, :, 17] for cache in captured]).astype(np.float64)
    other = np.concatenate([np.array(cache["post", 3])[0, :, 8] for cache in captured]).astype(np.float64)
    assert found[1]["count"] == len(one)
    assert found[1]["cosine"] == pytest.approx(one @ other / np.linalg.norm(one) / np.linalg.norm(other), abs=1e-6)
    assert found[1]["correlation"] == pytest.approx(np.corrcoef(one, other)[0, 1], abs=1e-6)
    assert found[2]["cosine"] == pytest.approx(1)
    assert found[3] == found[0][:1]


def test_zeroing_a_neuron_is_pythons_zeroing(live, tiny):
    found = live(
        f"n := NeuronAnalyzer for: model. text := {literal(CLEAN)}. plain := model forward: text."
        "changed := n testNeuronImportance: 3 -> 8 on: text using: 'zeroing'."
        "{ changed data. n computeImpact: plain vs: changed. n computeImpact: plain vs: plain }"
    )
    edit = {"hook_point": "blocks.3.mlp.hook_post", "type": "zero", "neurons": 8}
    changed = logits_after(tiny, CLEAN, [edit])
    np.testing.assert_allclose(found[0], changed, atol=1e-5)

    def softmax(logits):
        shifted = np.exp(logits - logits.max())
        return shifted / shifted.sum()

    distance = np.abs(softmax(logits_after(tiny, CLEAN)) - softmax(changed)).sum() / 2
    assert distance > 1e-6
    assert found[1] == pytest.approx(distance, abs=1e-6)
    assert found[2] == 0


@pytest.mark.parametrize(("strategy", "kind"), [("zeroAblation", "zero"), ("meanAblation", "mean")])
def test_what_ablation_does_is_pythons(live, tiny, strategy, kind):
    found = live(
        "done := OrderedCollection new."
        "f := CircuitFinder for: model. f threshold: 0; onProgress: [ :n :all | done add: n; add: all ]."
        f"c := f discoverCircuitsThroughIntervention: 'Mary' -> 'John' interventionStrategy: '{strategy}'"
        f" validationDataset: {texts_in_smalltalk(TEXTS)}."
        "{ c collect: [ :each | { each components first asDictionary."
        " each effects first baseline. each effects first changed. each confidence. each isCausal."
        " each description } ]. done last. done allSatisfy: [ :n | n between: 0 and: 40 ]. c first printString }"
    )
    circuits = found[0]
    baseline = np.mean([difference(tiny, logits_after(tiny, text)) for text in TEXTS])
    assert len(circuits) == 4 * 4 + 4
    assert found[1:3] == [20 * 2, True]
    for component, ours, changed, confidence, is_causal, description in circuits:
        edit = {"hook_point": f"blocks.{component['layer']}.hook_mlp_out", "type": kind}
        if component["componentType"] == "attention_head":
            edit["hook_point"] = f"blocks.{component['layer']}.attn.hook_z"
            edit["heads"] = component["index"]
        if kind == "mean":
            edit["over"] = TEXTS
        expected = np.mean([difference(tiny, logits_after(tiny, text, [edit])) for text in TEXTS])
        assert ours == pytest.approx(baseline, abs=1e-5)
        assert changed == pytest.approx(expected, abs=1e-5)
        assert confidence == pytest.approx(min(1, abs(expected - baseline) / abs(baseline)), abs=1e-5)
        assert is_causal is True
        assert description.startswith(f"Causal: {kind} ablation of {component['componentType']} L{component['layer']}")
        assert "logits (mean over 2 texts)" in description
    assert [each[3] for each in circuits] == sorted((each[3] for each in circuits), reverse=True)


def test_circuits_of_cases_are_validated_by_ablation_together_and_alone(live, tiny):
    found = live(
        f"cases := {{ Dictionary new at: 'input' put: {literal(CLEAN)}; at: 'expected' put: 'Mary'; yourself }}."
        "f := CircuitFinder for: model. found := f threshold: 0.05; discoverCircuits: cases."
        "c := Circuit named: 'two' confidence: 1 description: 'by hand'."
        "c addComponent: 'attention_head' layer: 2 index: 1; addComponent: 'mlp' layer: 3 index: nil."
        f"e := f validateCircuitByAblation: c onDataset: {{ {literal(CLEAN)} -> 'Mary' }} measureUsing: nil."
        "{ found collect: [ :each | each confidence ]. e baseline. e changed. e effect. e importanceScore. e unit."
        " e parts collect: [ :each | each changed ]. e restored. e description. e printString }"
    )
    mary = token_id(tiny, "Mary")
    head = {"hook_point": "blocks.2.attn.hook_z", "type": "zero", "heads": 1}
    mlp = {"hook_point": "blocks.3.hook_mlp_out", "type": "zero"}
    expected = [logits_after(tiny, CLEAN, edits)[mary] for edits in ([], [head, mlp], [head], [mlp])]
    assert all(each >= 0.05 for each in found[0])
    np.testing.assert_allclose([found[1], found[2], *found[6]], expected, atol=1e-5)
    assert found[3] == pytest.approx(found[2] - found[1])
    assert found[4] == pytest.approx(abs(found[3] / found[1]))
    assert found[5] == "logits"
    assert found[7] is None
    assert "zero ablation of attention_head L2H1, mlp L3 changes the logit of Mary" in found[8]


def test_patching_a_circuit_is_pythons_patching(live, tiny):
    found = live(
        "c := Circuit named: 'two' confidence: 1 description: 'by hand'."
        "c addComponent: 'attention_head' layer: 2 index: 1; addComponent: 'attention' layer: 3 index: nil."
        "f := CircuitFinder for: model. f measure: 'Mary' -> 'John'."
        f"e := f validateCircuitByPatching: c sourceInput: {literal(CLEAN)} corruptedInput: {literal(CORRUPTED)}"
        " patchingStrategy: 'componentWise'."
        "{ e baseline. e changed. e reference. e restored. e parts collect: [ :each | each changed ]. e description }"
    )
    points = ["blocks.2.attn.hook_z", "blocks.3.hook_attn_out"]
    _, clean = tiny.run_with_cache(CLEAN, points)
    edits = [
        {"hook_point": points[0], "type": "patch", "source": np.array(clean[points[0]]), "heads": 1},
        {"hook_point": points[1], "type": "patch", "source": np.array(clean[points[1]])},
    ]
    runs = [(CORRUPTED, []), (CORRUPTED, edits), (CLEAN, []), (CORRUPTED, edits[:1]), (CORRUPTED, edits[1:])]
    expected = [difference(tiny, logits_after(tiny, text, edit)) for text, edit in runs]
    np.testing.assert_allclose([*found[:3], *found[4]], expected, atol=1e-5)
    assert found[3] == pytest.approx((expected[1] - expected[0]) / (expected[2] - expected[0]), abs=1e-5)
    assert "in the clean run it is" in found[5]


def test_the_patching_table_is_pythons(live, tiny):
    found = live(
        "counts := OrderedCollection new. f := CircuitFinder for: model."
        "f onProgress: [ :n :all | counts add: n ]."
        f"t := f causalPatchingTableFrom: {literal(CLEAN)} to: {literal(CORRUPTED)} measureUsing: 'Mary' -> 'John'."
        "{ t components. t components collect: [ :each | (t sharesOf: each) data ]. (t sharesOf: 'mlp') shape."
        " counts last."
        " t cleanValue. t corruptedValue. t strongest: 3. t patchedAt: 'residual' layer: 3 position: t"
        " tokenStrings size - 1. t tokenStrings."
        " t printString. t layersOf: 'mlp' }"
    )
    names = {"attention": "hook_attn_out", "mlp": "hook_mlp_out", "residual": "hook_resid_post"}
    n = len(tiny.to_str_tokens(CLEAN))
    points = [f"blocks.{layer}.{name}" for name in names.values() for layer in range(4)]
    _, cache = tiny.run_with_cache(CLEAN, points)
    clean, corrupted = (difference(tiny, logits_after(tiny, text)) for text in (CLEAN, CORRUPTED))
    assert found[0] == list(names)
    assert found[2:4] == [[4, n], 3 * 4 * n]
    for component, shares in zip(found[0], found[1], strict=True):
        expected = np.empty((4, n))
        for layer in range(4):
            point = f"blocks.{layer}.{names[component]}"
            source = np.array(cache[point])
            for position in range(n):
                edit = {"hook_point": point, "type": "patch", "source": source, "positions": position}
                patched = difference(tiny, logits_after(tiny, CORRUPTED, [edit]))
                expected[layer, position] = (patched - corrupted) / (clean - corrupted)
        np.testing.assert_allclose(np.reshape(shares, (4, n)), expected, atol=1e-5)
    np.testing.assert_allclose(found[4:6], [clean, corrupted], atol=1e-5)
    assert found[6][0]["share"] == pytest.approx(1, abs=1e-4)
    assert found[7] == pytest.approx(clean, abs=1e-4)
    assert found[8] == tiny.to_str_tokens(CORRUPTED)


def test_the_patching_table_of_heads_is_pythons(live, tiny):
    found = live(
        f"t := (CircuitFinder for: model) causalPatchingTableFrom: {literal(CLEAN)} to: {literal(CORRUPTED)}"
        " measureUsing: 'Mary' -> 'John' components: #('attention_head') layers: #(2)."
        "{ t components. t components collect: [ :each | (t sharesOf: each) data ] }"
    )
    point = "blocks.2.attn.hook_z"
    _, cache = tiny.run_with_cache(CLEAN, point)
    clean, corrupted = (difference(tiny, logits_after(tiny, text)) for text in (CLEAN, CORRUPTED))
    edit = {"hook_point": point, "type": "patch", "source": np.array(cache[point])}
    patched = [
        [
            difference(tiny, logits_after(tiny, CORRUPTED, [edit | {"heads": head, "positions": position}]))
            for position in range(len(tiny.to_str_tokens(CLEAN)))
        ]
        for head in range(4)
    ]
    assert found[0] == [f"attention_head H{head}" for head in range(4)]
    np.testing.assert_allclose(found[1], (np.array(patched) - corrupted) / (clean - corrupted), atol=1e-5)
    assert np.ptp(found[1], axis=0).max() > 0.01


def test_a_circuit_of_edges_is_pythons(live, tiny):
    found = live(
        f"c := (CircuitFinder for: model) findCircuitFor: 'Mary' -> 'John' examples: {{ {literal(CLEAN)} ->"
        f" {literal(CORRUPTED)} }} method: 'eap-ig' threshold: 0.5. e := c effects first."
        "{ c pathway collect: [ :each | { each source. each target. each strength } ]. c components collect:"
        " [ :each | each name ]. c confidence. e baseline. e changed. c isCausal. e description }"
    )
    pair = {"clean": CLEAN, "corrupted": CORRUPTED, "answer": token_id(tiny, "Mary"), "wrong": token_id(tiny, "John")}
    scores = attribute_edges(tiny, [pair])
    circuit = Circuit.of_scores(scores, tiny, threshold=0.5)
    judged = validate_circuit(tiny, circuit, [pair])
    assert {f"{source}->{target}" for source, target, _ in found[0]} == set(circuit.edges)
    strengths = {f"{source}->{target}": strength for source, target, strength in found[0]}
    # A score is what ablation changes, a strength what the edge adds.
    np.testing.assert_allclose([-strengths[edge] for edge in circuit.edges], list(circuit.edges.values()), rtol=1e-3)
    assert len(found[1]) == len([node for node in circuit.nodes if node != "embed"])
    assert found[2] == pytest.approx(min(1, max(0, judged.faithfulness.mean)), abs=1e-4)
    assert found[3:6] == [pytest.approx(judged.plain.mean, abs=1e-4), pytest.approx(judged.kept.mean(), abs=1e-4), True]
    assert "ablation of all other edges than those of" in found[6]


def test_a_sweep_is_one_request(live, live_server):
    """However many components there are."""

    def jobs():
        with urllib.request.urlopen(f"{live_server.base_url}/v1/jobs") as reply:
            return {job["id"]: job["kind"] for job in json.load(reply)["data"]}

    before = jobs()
    live(
        "f := CircuitFinder for: model. f discoverCircuitsThroughIntervention: 'Mary' interventionStrategy:"
        f" 'zeroAblation' validationDataset: {{ {literal(CLEAN)} }}."
        f"f causalPatchingTableFrom: {literal(CLEAN)} to: {literal(CORRUPTED)} measureUsing: 'Mary'. nil"
    )
    # The server forgets old ones.
    made = [kind for job, kind in jobs().items() if job not in before]
    assert [kind for kind in made if kind in ("ablation", "patching")] == ["patching", "ablation"]
    assert len(made) < 12


LARGE = [
    f"((CircuitFinder for: model) causalPatchingTableFrom: {literal(CLEAN)} to: {literal(CORRUPTED)} measureUsing:"
    " 'Mary' -> 'John' components: #('residual' 'mlp' 'attention_head') layers: #(1)) strongest: 99",
    "c := Circuit named: 'c' confidence: 1 description: ''. c addComponent: 'residual' layer: 0 index: nil;"
    " addComponent: 'attention_head' layer: 1 index: 2; addComponent: 'mlp' layer: 2 index: nil."
    f"((CircuitFinder for: model) validateCircuitByPatching: c sourceInput: {literal(CLEAN)}"
    f" corruptedInput: {literal(CORRUPTED)} measureUsing: 'Mary') parts collect: [ :each | each changed ]",
    f"(NeuronAnalyzer for: model) topTokensFor: 17 layer: 2 in: {texts_in_smalltalk(TEXTS)} count: 3",
    f"(NeuronAnalyzer for: model) compareNeurons: 2 -> 17 with: 3 -> 8 in: {texts_in_smalltalk(TEXTS)}",
]


def test_runs_that_are_too_large_for_a_reply_are_analyzed_all_the_same(live, tmp_path):
    with ModelWorker() as worker:
        worker.load("neuroscope-tiny")
        with (
            running_server(worker, ServerConfig(port=0, max_reply_bytes=22_000)) as url,
            Image(write_client(tmp_path, url)) as image,
        ):
            small = [image.evaluate(f"{MODEL} {script}") for script in LARGE]
    assert small == [live(script) for script in LARGE]


def test_the_source_of_a_patch_is_the_patched_row(live):
    found = live(
        "e := CausalExperiment on: model. r := Array with: (e component: 'residual' layer: 2 index: nil)."
        f"reply := e forward: {literal(CLEAN)} hooks: (e hooksAt: (e hookPointsOf: r)) interventions: #()."
        "one := e patching: r from: reply positions: 3. all := e patching: r from: reply positions: nil."
        "{ (one first at: 'source') first at: 'shape'. (all first at: 'source') first at: 'shape'."
        " (STONJSON toString: one) size. (STONJSON toString: all) size }"
    )
    assert found[0] == [1, 1, found[1][2]]
    assert found[1][1] > 10
    assert found[2] * 5 < found[3]


def test_a_mean_over_measures_of_their_own_says_so(live):
    found = live(
        f"cases := {{ {literal(CLEAN)} -> 'Mary'. {literal(CORRUPTED)} -> 'John' }}. f := CircuitFinder for: model."
        "c := (Circuit named: 'c' confidence: 1 description: '') addComponent: 'mlp' layer: 0 index: nil; yourself."
        "(f validateCircuitByAblation: c onDataset: cases measureUsing: nil) description"
    )
    assert "changes each text's own measure (the logit of Mary, the logit of John) from" in found


def test_a_block_may_be_the_measure(live, tiny):
    found = live(
        "c := Circuit named: 'one' confidence: 1 description: 'by hand'. c addComponent: 'mlp' layer: 0 index: nil."
        f"e := (CircuitFinder for: model) validateCircuitByAblation: c onDataset: {{ {literal(CLEAN)} }}"
        " measureUsing: [ :logits | logits max ]. { e baseline. e changed. e unit }"
    )
    edit = {"hook_point": "blocks.0.hook_mlp_out", "type": "zero"}
    expected = [logits_after(tiny, CLEAN).max(), logits_after(tiny, CLEAN, [edit]).max()]
    np.testing.assert_allclose(found[:2], expected, atol=1e-5)
    assert found[2] == "units of the block"


@pytest.mark.parametrize(
    ("send", "complaint"),
    [
        (
            "causalPatchingTableFrom: 'Mary gave' to: 'Mary' measureUsing: 'Mary' -> 'John'",
            "as many tokens in the",
        ),
        (
            "causalPatchingTableFrom: 'Mary' to: 'Mary' measureUsing: 'Mary'",
            "Clean and corrupted text give the same",
        ),
        ("causalPatchingTableFrom: 'Mary' to: 'John' measureUsing: 'Zyzzyva'", "'Zyzzyva' is no single token"),
        ("causalPatchingTableFrom: 'Mary' to: 'John' measureUsing: 'Mary gave'", "'Mary gave' is no single token"),
        ("causalPatchingTableFrom: 'Mary' to: 'John' measureUsing: 522", "Token ids are 0 to 521, got 522"),
        ("causalPatchingTableFrom: 'Mary' to: 'John' measureUsing: #(1)", "A measure is a token, token -> other token"),
        ("causalPatchingTableFrom: 'Mary' to: 'John' measureUsing: [ :x | x ]", "A measure must be a finite number"),
        (
            "validateCircuitByAblation: c onDataset: 'pile' measureUsing: 'Mary'",
            "I hold no data sets: give a collection",
        ),
        ("validateCircuitByAblation: c onDataset: #() measureUsing: 'Mary'", "A data set needs one text or more"),
        ("validateCircuitByAblation: c onDataset: #('Mary') measureUsing: nil", "Nothing says what to measure"),
        (
            "discoverCircuitsThroughIntervention: 'Mary' interventionStrategy: #swapping validationDataset: #('Mary')",
            "Strategies: zeroAblation, meanAblation",
        ),
        (
            "validateCircuitByPatching: c sourceInput: 'Mary' corruptedInput: 'John' patchingStrategy: #minimal",
            "Strategies: componentWise",
        ),
        ("validateCircuitByAblation: none onDataset: #('Mary') measureUsing: 'Mary'", "needs one component or more"),
        (
            "validateCircuitByPatching: none sourceInput: 'Mary' corruptedInput: 'John' measureUsing: 'Mary'",
            "needs one component or more",
        ),
        (
            "validateCircuitByAblation: all onDataset: #('Mary') measureUsing: 'Mary'",
            "An attention_head needs its index; attention is all of them",
        ),
        (
            "causalPatchingTableFrom: 'Mary' to: 'John' measureUsing: 'Mary' components: #('mlp') layers: #(9)",
            "There is no layer 9 with these components. Layers: 0, 1, 2, 3",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(live, send, complaint):
    with pytest.raises(SmalltalkError, match=re.escape(complaint)):
        live(
            "none := Circuit named: 'none' confidence: 1 description: ''."
            "c := (Circuit named: 'c' confidence: 1 description: '') addComponent: 'mlp' layer: 0 index: nil; yourself."
            "all := (Circuit named: 'all' confidence: 1 description: '')"
            " addComponent: 'attention_head' layer: 0 index: nil; yourself."
            f"(CircuitFinder for: model) {send}"
        )


@pytest.mark.parametrize(
    ("send", "complaint"),
    [
        ("topTokensFor: 352 layer: 0 in: #('Mary') count: 1", "Neurons of layer 0 are 0 to 351, got 352"),
        ("findTopActivatingTokens: 0 -> 1 fromDataset: 'pile' count: 1", "I hold no data sets"),
        ("compareNeurons: 0 -> 1 with: 0 -> 2", "I have no texts"),
        ("compareNeurons: 0 -> 1 with: 0 -> 2 in: #()", "A data set needs one text or more"),
        (
            "computeImpact: (model forward: 'Mary') vs: (ActivationTensor ones: #(1 1 4))",
            "Expected logits of 522 tokens, got 4",
        ),
        ("testNeuronImportance: 0 -> 1 on: 'Mary' using: #noise", "Interventions: zeroing"),
        ("topTokensFor: 0 layer: 9 in: #('Mary') count: 1", "blocks.9"),
    ],
)
def test_what_a_neuron_analyzer_cannot_do_is_said(live, send, complaint):
    with pytest.raises(SmalltalkError, match=complaint):
        live(f"(NeuronAnalyzer for: model) {send}")


DRAW = f"((AttentionVisualizer for: model) heatmapOf: {literal(CLEAN)} layer: 1 head: 1) asSVG"


def test_a_heatmap_of_a_text_is_drawn(live, tiny):
    svg = ElementTree.fromstring(live(DRAW))
    _, cache = tiny.run_with_cache(CLEAN, "blocks.1.attn.hook_pattern")
    assert [len(each) for each in cells(svg)] == [int((np.array(cache["pattern", 1])[0, 1] >= 0.0005).sum())]
