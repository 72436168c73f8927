"""The scripts of NeuroScope-Examples run against the live server, and what they answer is what Python computes."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from smalltalk_image import Image
from smalltalk_packages import EXAMPLES, example_scripts, write_chunks, write_client
from smalltalk_sources.syntax import parse_method
from smalltalk_sources.tonel import read_package

from mlx_hooks.activations import to_numpy
from mlx_hooks.analysis import heads
from neuroscope_bridge import LMStudioNeuroScopeClient, NeuroScopeActivationBridge

STORE = "When Mary and John went to the store , John gave a drink to"
WORDS = "store France Mary drink mat Tom gave capital book dog school Berlin"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the image stands."""
    return tmp_path_factory.mktemp("examples")


@pytest.fixture(scope="module")
def evaluate(live_server, folder):
    core = write_client(folder, live_server.base_url)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with Image(core, write_chunks(folder / "examples.st", EXAMPLES)) as image:
            yield lambda script: image.evaluate(f"e := NeuroScopeExamples. {script}")


def arrays_of(model, text, interventions=()):
    """What the model computes at every hook point, as float64."""
    cache = model.generate(text, max_tokens=0, capture=["*"], interventions=interventions).cache
    return {name: to_numpy(array).astype(np.float64) for name, array in cache.items()}


def logit_difference(model, text, one, other, interventions=()):
    logits = arrays_of(model, text, interventions)["hook_logits"][0, -1]
    (one_id,), (other_id,) = (model.tokenizer.encode(each, add_special_tokens=False) for each in (one, other))
    return logits[one_id] - logits[other_id]


def test_scripts_and_their_tests_are_the_same(request):
    tested = {item.name.removeprefix("test_example_") for item in request.session.items if "test_example_" in item.name}
    names = {re.sub(r"(?<!^)(?=[A-Z])", "_", each.split()[1]).lower() for each in example_scripts(EXAMPLES)}
    assert names == tested or len(request.session.items) < 5  # one test alone was asked for
    assert len(names) >= 11


def test_every_script_inspects_what_its_own_method_answers():
    scripts = {
        (method.source.splitlines()[0], *each.arguments)
        for definition in read_package(EXAMPLES)
        for method in definition.methods
        for each in parse_method(method.source).pragmas
        if each.selector == "script:"
    }
    assert len(scripts) >= 11
    assert scripts == {(selector, f"'self {selector} inspect'") for selector, _ in scripts}


def test_example_seed_snippet(evaluate, live_server):
    found = evaluate("e seedSnippet collect: [ :each | { each name. each confidence } ]")
    bridge = NeuroScopeActivationBridge()
    with LMStudioNeuroScopeClient(live_server.base_url) as client:
        messages = [{"role": "user", "content": "What is the capital of France ?"}]
        hooks = bridge.create_hook_specs_for_circuit_analysis(4)
        reply = client.generate_with_activations(messages, hooks, max_tokens=10, temperature=0)
    expected = bridge.find_circuits(reply["activations"])
    assert [name for name, _ in found] == [each["name"] for each in expected]
    np.testing.assert_allclose([each for _, each in found], [each["confidence"] for each in expected], rtol=1e-5)


def test_example_model_and_configuration(evaluate, tiny):
    found = evaluate("m := e modelAndConfiguration. { m numLayers. m config at: #hiddenSize. m config vocabSize }")
    assert found == [tiny.cfg.n_layers, tiny.cfg.d_model, tiny.cfg.d_vocab]


def test_example_next_tokens(evaluate, tiny):
    found = evaluate("e nextTokens collect: [ :each | { each key. each value } ]")
    logits = arrays_of(tiny, STORE)["hook_logits"][0, -1]
    weights = np.exp(logits - logits.max())
    best = np.argsort(-logits, kind="stable")[:10]
    assert [name for name, _ in found] == [tiny.tokenizer.decode([each]) for each in best]
    np.testing.assert_allclose([each for _, each in found], (weights / weights.sum())[best], rtol=1e-9)


def test_example_caching_statistics(evaluate, tiny):
    found = evaluate("e cachingStatistics statistics")
    arrays = arrays_of(tiny, STORE)
    assert len(found) == 3 * 4
    for row in found:
        array = arrays[row["hookPoint"]]
        expected = [array.mean(), array.std(), array.min(), array.max(), np.linalg.norm(array)]
        np.testing.assert_allclose(
            [row[key] for key in ("mean", "std", "min", "max", "norm")], expected, rtol=1e-5, atol=1e-8
        )


def test_example_monitor_hook(evaluate, tiny):
    count, name, norm = evaluate("h := e monitorHook. { h executionCount. h name. h lastActivation norm }")
    assert (count, name) == (2, "monitor")
    expected = np.linalg.norm(arrays_of(tiny, "The cat sat on the mat")["blocks.2.hook_resid_post"])
    np.testing.assert_allclose(norm, expected, rtol=1e-6)


def test_example_scaling_intervention(evaluate, tiny):
    moved, fired, before, after = evaluate(
        "c := e scalingIntervention. h := c key. { c value. h fired. h normBefore. h normAfter }"
    )
    edit = {"layer_name": "transformer.h.2", "component": "attention", "type": "scale", "factor": 0.5}
    plain, scaled = arrays_of(tiny, STORE), arrays_of(tiny, STORE, [edit])
    np.testing.assert_allclose(moved, np.abs(scaled["hook_logits"] - plain["hook_logits"]).mean(), rtol=1e-5)
    assert fired >= 1  # the prompt is read in pieces
    np.testing.assert_allclose(
        [before, after], np.linalg.norm(plain["blocks.2.hook_attn_out"]) * np.array([1, 0.5]), rtol=1e-5
    )


def test_example_causal_patching(evaluate, tiny):
    cells = [
        ("residual", "hook_resid_post", 0, 10),
        ("attention", "hook_attn_out", 3, 14),
        ("mlp", "hook_mlp_out", 1, 3),
    ]
    asked = ". ".join(f"t at: '{name}' layer: {layer} position: {position}" for name, _, layer, position in cells)
    found = evaluate(f"t := e causalPatching. {{ {asked} }}")
    changed = STORE.replace(", John", ", Mary")
    _, cache = tiny.run_with_cache(STORE)
    clean, corrupted = (logit_difference(tiny, text, "Mary", "John") for text in (STORE, changed))
    for share, (_, point, layer, position) in zip(found, cells, strict=True):
        edit = {"hook_point": f"blocks.{layer}.{point}", "type": "patch", "source": cache, "positions": [position]}
        patched = logit_difference(tiny, changed, "Mary", "John", [edit])
        np.testing.assert_allclose(share, (patched - corrupted) / (clean - corrupted), rtol=1e-5, atol=1e-6)


def test_example_attention_patterns(evaluate, folder, tiny):
    tokens = evaluate("e attentionPatterns tokens")
    assert tokens[1:] == STORE.split()
    svg = ElementTree.parse(folder / "attention_layer_2.svg").getroot()
    pattern = arrays_of(tiny, STORE)["blocks.2.attn.hook_pattern"]
    titles = [each.text for each in svg.iter("{http://www.w3.org/2000/svg}title")]
    assert len([each for each in titles if re.search(r"\d\.\d+$", each)]) == (pattern >= 0.0005).sum()


def test_example_induction_heads(evaluate, tiny):
    found = evaluate("e inductionHeads collect: [ :each | { each layer. each index. each score } ]")
    text = f"{WORDS} {WORDS}"
    arrays, tokens = arrays_of(tiny, text), tiny.to_tokens(text)[0].tolist()
    scores = {
        (layer, head): score
        for layer in range(4)
        for head, score in enumerate(heads.induction_scores(arrays[f"blocks.{layer}.attn.hook_pattern"][0], tokens))
    }
    assert {(layer, head) for layer, head, _ in found[:3]} == {(2, 0), (2, 1), (2, 2)}
    for layer, head, score in found:
        np.testing.assert_allclose(score, scores[layer, head], rtol=1e-5)


def test_example_probe(evaluate):
    scores = evaluate("e probe value")
    assert scores["accuracy"] == 1
    assert scores["confusion"] == {"country": {"country": 2}, "other": {"other": 21}}


def test_example_watched_trait(evaluate, tiny):
    found = evaluate("e watchedTrait collect: [ :each | { each key. each value } ]")

    def end(*texts):
        return np.mean([arrays_of(tiny, text)["blocks.2.hook_resid_post"][0, -1] for text in texts], axis=0)

    direction = end("The capital of Italy is Rome", "The capital of Spain is Madrid")
    direction -= end("The cat sat on the mat", "John gave Mary the book")
    text = "The capital of France is Paris . <eos>"
    assert [token for token, _ in found] == ["<bos>", *text.split()]
    stream = arrays_of(tiny, text)["blocks.2.hook_resid_post"][0]
    expected = stream @ direction / np.linalg.norm(direction)
    np.testing.assert_allclose([score for _, score in found], expected, rtol=1e-4, atol=1e-4)
    # It speaks of the capital where it names it.
    assert found[6][1] == max(score for _, score in found)


def test_example_circuit_discovery(evaluate, tiny):
    found = evaluate(
        "c := e circuitDiscovery."
        " { c key collect: [ :each | { each name. each effects first effect } ]. c value effect }"
    )
    circuits, validated = found
    zero = {"hook_point": "blocks.2.attn.hook_z", "type": "zero", "heads": [0]}
    plain = logit_difference(tiny, STORE, "Mary", "John")
    (effect,) = [effect for name, effect in circuits if "L2H0" in name]
    np.testing.assert_allclose(effect, logit_difference(tiny, STORE, "Mary", "John", [zero]) - plain, rtol=1e-5)
    layer, head = map(int, re.search(r"L(\d)H(\d)", circuits[0][0]).groups())
    text = "When Kate and Paul went to the store , Paul gave a drink to"
    edit = {"hook_point": f"blocks.{layer}.attn.hook_z", "type": "zero", "heads": [head]}
    expected = logit_difference(tiny, text, "Kate", "Paul", [edit]) - logit_difference(tiny, text, "Kate", "Paul")
    np.testing.assert_allclose(validated, expected, rtol=1e-5)
