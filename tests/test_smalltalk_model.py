"""TransformerModel, hooks and interventions under Amber, against a live server: what Python says, bit for bit."""

import base64
import json
from contextlib import contextmanager
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from smalltalk_image import SmalltalkError

from mlx_hooks.activations import to_numpy
from mlx_hooks.analysis.logit_lens import LogitLens
from neuroscope_bridge import LMStudioNeuroScopeClient, NeuroScopeAPIError
from neuroscope_bridge.payload import decode_activation

FRANCE = "The capital of France is"
JAPAN = "The capital of Japan is"
LAST = 5
"""The position of the last token of both."""
MODEL = "model := TransformerModel onClient: LMStudioRESTClient default model: 'neuroscope-tiny'. "
RUN = f"run := model runWithCaching: '{JAPAN}' layers: #( 1 2 ) components: #( #residual #mlp ). "
VECTOR = "vector := ((run at: 2 -> #residual) - (run at: 1 -> #residual)) slice: 6 axis: 2. "


@pytest.fixture(scope="module")
def python(live_server):
    return LMStudioNeuroScopeClient(live_server.base_url)


@pytest.fixture
def evaluate(live_image):
    """The value of a script that may name `model`."""
    return lambda script: live_image.evaluate(MODEL + script)


def captured(model, prompt, *names, interventions=()):
    """What the model computes in Python: the result, and arrays by hook point, as they would travel."""
    result = model.generate(prompt, max_tokens=0, capture=[*names, "hook_logits"], interventions=interventions)
    return result, {name: to_numpy(result.cache[name]).astype(np.float32) for name in [*names, "hook_logits"]}


def same_bits(smalltalk, array):
    np.testing.assert_array_equal(np.array(smalltalk, np.float32).view(np.int32), array.ravel().view(np.int32))


# -- configuration and tokens --------------------------------------------------------------------


def test_configuration_and_tokens_are_the_servers(evaluate, python):
    found = evaluate(
        f"""config := model config. tokenizer := model tokenizer. tokens := tokenizer encode: '{FRANCE}'.
        {{ config at: #numLayers. config hiddenSize. config vocabSize. config numAttentionHeads. config modelType.
        tokens. tokenizer decode: tokens. tokenizer tokenStrings: tokens. tokenizer tokenStrings: '{FRANCE}' }}"""
    )
    info, tokens = python.model_info(), python.tokenize(FRANCE)
    assert found[:5] == [info[name] for name in ("n_layers", "d_model", "d_vocab", "n_heads", "model_type")]
    assert found[5] == tokens["tokens"]
    assert found[6] == python.detokenize(tokens["tokens"])
    assert found[7] == found[8] == tokens["token_strings"]


# -- running -------------------------------------------------------------------------------------


def test_logits_are_pythons(evaluate, tiny):
    shape, data, strings = evaluate(
        f"output := model forward: '{FRANCE}'. {{ output shape. output logits data. output tokenStrings }}"
    )
    _, arrays = captured(tiny, FRANCE)
    assert shape == list(arrays["hook_logits"].shape)
    same_bits(data, arrays["hook_logits"])
    assert strings[-1] == "is"


def test_likeliest_tokens_have_the_softmax_of_the_logits(evaluate, tiny, python):
    found = evaluate(
        f"(model topTokensAfter: '{FRANCE}' count: 8) collect: [ :each | {{ each key. each value }} ]",
    )
    logits = captured(tiny, FRANCE)[1]["hook_logits"][0, -1].astype(np.float64)
    probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    likeliest = np.argsort(-probabilities, kind="stable")[:8]
    np.testing.assert_allclose([probability for _, probability in found], probabilities[likeliest], rtol=1e-12)
    assert [text for text, _ in found] == [python.detokenize([token]) for token in likeliest.tolist()]
    assert found[0][0] == "Paris"


def test_cached_activations_are_pythons(evaluate, tiny):
    points = {
        "0 -> #residual": "blocks.0.hook_resid_post",
        "3 -> 'residual'": "blocks.3.hook_resid_post",
        "3 -> #attention": "blocks.3.hook_attn_out",
        "0 -> #mlp": "blocks.0.hook_mlp_out",
        "3 -> #attentionWeights": "blocks.3.attn.hook_pattern",
        "0 -> #z": "blocks.0.attn.hook_z",
        "'blocks.3.ln1.hook_normalized'": "blocks.3.ln1.hook_normalized",
        "'blocks.3.ln2.hook_normalized'": "blocks.3.ln2.hook_normalized",
        "nil -> #embedding": "hook_embed",
        "nil -> #finalNorm": "ln_final.hook_normalized",
        "nil -> #logits": "hook_logits",
    }
    asked = ". ".join(f"(run at: {key}) shape. (run at: {key}) data" for key in points)
    *found, statistics, tokens = evaluate(
        f"""run := model runWithCaching: '{FRANCE}' layers: #( 0 3 ) components:
        #( #residual #attention #mlp #layerNorm #attentionWeights #z #embedding #finalNorm #logits ).
        {{ {asked}. run statistics. run tokenStrings }}"""
    )
    _, arrays = captured(tiny, FRANCE, *(point for point in points.values() if point != "hook_logits"))
    for shape, data, point in zip(found[::2], found[1::2], points.values(), strict=True):
        assert shape == list(arrays[point].shape)
        same_bits(data, arrays[point])
    assert tokens[-1] == "is"
    assert len(statistics) == 17
    rows = {row["hookPoint"]: row for row in statistics}
    for point, array in arrays.items():
        expected = [getattr(array.astype(np.float64), name)() for name in ("mean", "std", "min", "max")]
        found = [rows[point][name] for name in ("mean", "std", "min", "max")]
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
        assert rows[point]["norm"] == pytest.approx(np.linalg.norm(array.astype(np.float64)), rel=1e-12)


def test_hooks_see_the_prompt_and_every_token_that_was_read_again(evaluate, python):
    text, seen, count = evaluate(
        f"""hook := ActivationHook layer: #all component: #residual.
        hook action: [ :tensor :layer | layer ].
        model addHook: hook. text := model generate: '{FRANCE}' maxTokens: 3 temperature: 0.
        seen := hook extractedData collect: [ :each |
            {{ each hookPoint. each phase. each step. each positions. each data }} ].
        {{ text. seen. hook executionCount }}"""
    )
    spec = {"layer_name": "*", "component": "residual", "hook_id": "h"}
    reply = python.complete_with_activations(FRANCE, [spec], max_tokens=3, temperature=0)
    assert text == reply["choices"][0]["text"]
    assert count == len(seen) == len(reply["activations"]["h"]) == 12
    for found, record in zip(seen, reply["activations"]["h"], strict=True):
        assert found[:4] == [record[name] for name in ("hook_point", "phase", "step", "positions")]
        same_bits(found[4], record["data"])


def test_suspended_and_removed_hooks_are_not_sent(evaluate):
    sent = "(model runWithCaching: 'The cat' layers: #( 0 ) components: #( #mlp )) hookReceipts keys size"
    assert evaluate(
        f"""model addHook: ((ActivationHook layer: 0 component: #residual) name: 'a'; yourself).
        model addHook: ((ActivationHook layer: 1 component: #residual) name: 'b'; yourself).
        all := {sent}.
        suspended := model hookManager withHooksSuspended: #( 'a' ) do: [ {sent} ].
        after := {sent}.
        model removeHook: 'a'. removed := {sent}.
        model clearHooks.
        {{ all. suspended. after. removed. {sent} }}"""
    ) == [4, 3, 4, 3, 2]


# -- interventions -------------------------------------------------------------------------------


def of_japan(model):
    """What the scripts have as `run` and `vector`."""
    result, arrays = captured(model, JAPAN, "blocks.2.hook_resid_post", "blocks.1.hook_resid_post")
    difference = arrays["blocks.2.hook_resid_post"] - arrays["blocks.1.hook_resid_post"]
    return result.cache, arrays, difference[0, LAST]


INTERVENTIONS = {
    "scaling": (
        "InterventionHook scaling: 0.5 layer: 1 component: #residual",
        lambda model: {"hook_point": "blocks.1.hook_resid_post", "type": "scale", "factor": 0.5},
    ),
    "zeroing a head": (
        "InterventionHook zeroingHead: 1 layer: 2",
        lambda model: {"hook_point": "blocks.2.attn.hook_z", "type": "zero", "heads": [1]},
    ),
    "zeroing everywhere": (
        "(InterventionHook zeroing: #mlp layer: #all) positions: #last; yourself",
        lambda model: {"hook_point": "blocks.*.hook_mlp_out", "type": "zero", "positions": "last"},
    ),
    "patching": (
        "(InterventionHook patchingFrom: (run at: 2 -> #residual)) positions: #( 5 ); yourself",
        lambda model: {
            "hook_point": "blocks.2.hook_resid_post",
            "type": "patch",
            "source": of_japan(model)[0],
            "positions": [LAST],
        },
    ),
    "steering": (
        "(InterventionHook steering: vector coefficient: 1.5 layer: 1 component: #residual) matchingNorm; yourself",
        lambda model: {
            "hook_point": "blocks.1.hook_resid_post",
            "type": "add",
            "vector": of_japan(model)[2],
            "coefficient": 1.5,
            "norm_match": True,
        },
    ),
    "setting": (
        "(InterventionHook layer: 1 component: #residual) settingTo: vector; positions: #( 5 ); neurons:"
        " (0 to: 127); yourself",
        lambda model: {
            "hook_point": "blocks.1.hook_resid_post",
            "type": "set",
            "values": of_japan(model)[2],
            "positions": [LAST],
        },
    ),
    "masking a key": (
        "(InterventionHook layer: 1 component: #attentionScores) settingTo: (ActivationTensor data: { Float"
        " negativeInfinity } shape: #( 1 )); keys: #( 4 ); positions: #( 5 ); yourself",
        lambda model: {
            "hook_point": "blocks.1.attn.hook_attn_scores",
            "type": "set",
            "values": -np.inf,
            "keys": [4],
            "positions": [LAST],
        },
    ),
    "the mean": (
        f"InterventionHook meanAblating: #mlp layer: 1 over: #( '{JAPAN}' 'The cat' )",
        lambda model: {"hook_point": "blocks.1.hook_mlp_out", "type": "mean", "over": [JAPAN, "The cat"]},
    ),
    "clamping": (
        "(InterventionHook layer: 0 component: #mlp) clampingFrom: -0.25 to: 0.25; neurons: #( 3 5 ); yourself",
        lambda model: {
            "hook_point": "blocks.0.hook_mlp_out",
            "type": "clamp",
            "min": -0.25,
            "max": 0.25,
            "neurons": [3, 5],
        },
    ),
    "noise": (
        "(InterventionHook new layer: #embedding; yourself) addingNoise: 0.5 seed: 7; yourself",
        lambda model: {"hook_point": "hook_embed", "type": "noise", "std": 0.5, "seed": 7},
    ),
}


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_interventions_do_what_pythons_do(evaluate, tiny, name):
    smalltalk, python = INTERVENTIONS[name]
    data, before, after, fired, clean = evaluate(
        f"""{RUN}{VECTOR}hook := {smalltalk}.
        logits := (model withHooks: {{ hook }} do: [ model forward: '{FRANCE}' ]) data.
        {{ logits. hook normBefore. hook normAfter. hook fired. (model forward: '{FRANCE}') data }}"""
    )
    result, arrays = captured(tiny, FRANCE, interventions=[python(tiny)])
    same_bits(data, arrays["hook_logits"])
    receipt = result.interventions[0]
    assert (before, after, fired) == (receipt.norm_before, receipt.norm_after, receipt.fired)
    same_bits(clean, captured(tiny, FRANCE)[1]["hook_logits"])
    assert data != clean


def test_interventions_come_in_order_before_what_hooks_see(evaluate, tiny):
    data, norms = evaluate(
        f"""watch := ActivationHook layer: 2 component: #residual.
        model addHook: watch.
        model addHook: (InterventionHook scaling: 0.5 layer: 2 component: #residual).
        model addHook: (InterventionHook zeroingHead: 1 layer: 2).
        model addHook: ((InterventionHook layer: #( 1 3 ) component: #mlp) scaling: 2; yourself).
        model forward: '{FRANCE}'.
        {{ watch lastActivation data. (model hookManager hookNamed: 'layer1,3-mlp-scale') receipts collect: [ :each |
            each at: 'norm_after' ] }}"""
    )
    edits = [
        {"hook_point": "blocks.2.hook_resid_post", "type": "scale", "factor": 0.5},
        {"hook_point": "blocks.2.attn.hook_z", "type": "zero", "heads": [1]},
        {"hook_point": "blocks.1.hook_mlp_out", "type": "scale", "factor": 2},
        {"hook_point": "blocks.3.hook_mlp_out", "type": "scale", "factor": 2},
    ]
    result, arrays = captured(tiny, FRANCE, "blocks.2.hook_resid_post", interventions=edits)
    same_bits(data, arrays["blocks.2.hook_resid_post"])
    assert norms == [receipt.norm_after for receipt in result.interventions[2:]]


def test_interventions_take_part_in_generation(evaluate, tiny):
    edit = {"hook_point": "blocks.2.attn.hook_z", "type": "zero", "heads": [0, 1, 2, 3]}
    assert (
        evaluate(
            f"""model addHook: (InterventionHook zeroingHeads: #( 0 1 2 3 ) layer: 2).
        model generate: '{FRANCE}' maxTokens: 4 temperature: 0"""
        )
        == tiny.generate(FRANCE, max_tokens=4, temperature=0, interventions=[edit]).text
    )


# -- interventions by blocks ---------------------------------------------------------------------


def residual(layer):
    return f"blocks.{layer}.hook_resid_post"


def half(value, *_):
    return value * 0.5


def square(value, *_):
    return value * value


def zero(value, *_):
    return mx.zeros_like(value)


def minus_infinity(value, *_):
    return mx.full(value.shape, -mx.inf)


def head_2(value, *_):
    """Half of what head 2 has, of a pattern of any number of keys."""
    return value * mx.array([1, 1, 0.5, 1]).reshape(1, 4, 1, 1)


def times_layer(value, point, _):
    return value * (point.layer + 1)


def only(fn, positions, *index):
    """A hook function that is shown, and changes, a part only: of axis 1, or of the queries, these positions."""

    def edit(value, point, start):
        array = np.array(value)
        length = array.shape[point.position_axis]
        rows = [position - start for position in positions if start <= position < start + length]
        if not rows:
            return None
        part = [[0], *index]
        part.insert(point.position_axis, rows)
        part = np.ix_(*part)
        array[part] = np.array(fn(mx.array(array[part]), point, start))
        return mx.array(array)

    return edit


def japans(tiny):
    """A hook function that puts in what another run has at the same positions of layer 2."""
    other = of_japan(tiny)[0][residual(2)]
    return lambda value, _point, start: other[:, start : start + value.shape[1]]


def with_functions(model, prompt, hooks, *names):
    """Logits, and what is at some hook points, of a run with functions inside the model.

    In two calls, as the server reads a prompt: of all but its last token, and of that one. In one call the numbers
    would be the same only but for rounding.
    """
    tokens, kv_cache = model.to_tokens(prompt), make_prompt_cache(model.model)
    found = {name: [] for name in names}
    logits = []
    for start, part in ((0, tokens[:, :-1]), (tokens.shape[1] - 1, tokens[:, -1:])):
        functions = [(point, partial(_at, fn, start)) for point, fn in hooks]
        readers = [(name, partial(_read, found[name])) for name in names]
        logits.append(model.run_with_hooks(part, functions + readers, kv_cache))
    return [to_numpy(mx.concatenate(parts, axis=1)) for parts in (logits, *found.values())]


def _at(fn, start, value, point):
    return fn(value, point, start)


def _read(found, value, _):
    found.append(value)


def block(place, action, more=""):
    return f"(InterventionHook {place}) action: [ {action} ]; {more} yourself"


RESIDUAL = "layer: {} component: #residual".format
HALF, SQUARE = ":a | a * 0.5", ":a | a * a"
BLOCKS = {
    "scaling": ([block(RESIDUAL(1), HALF)], [(residual(1), half)]),
    "zeroing": ([block("layer: 1 component: #mlp", ":a | a * 0")], [("blocks.1.hook_mlp_out", zero)]),
    "another run": ([block(RESIDUAL(2), ":a | other copy")], [(residual(2), japans)]),
    "another run, made by the block": (
        [
            block(
                RESIDUAL(2),
                f":a | model hookManager withHooksSuspended: #( 'mine' ) do: [ (model runWithCaching: '{JAPAN}'"
                " layers: #( 2 ) components: #( #residual )) at: 2 -> #residual ]",
                "name: 'mine';",
            )
        ],
        [(residual(2), japans)],
    ),
    "two layers": (
        [block(RESIDUAL(0), HALF), block(RESIDUAL(2), SQUARE)],
        [(residual(0), half), (residual(2), square)],
    ),
    "two layers, the later one first": (
        [block(RESIDUAL(2), SQUARE), block(RESIDUAL(0), HALF)],
        [(residual(0), half), (residual(2), square)],
    ),
    "three places of a layer": (
        [
            block(RESIDUAL(1), SQUARE),
            block("layer: 1 component: #attention", HALF),
            block("layer: 1 component: #mlp", SQUARE),
        ],
        [("blocks.1.hook_attn_out", half), ("blocks.1.hook_mlp_out", square), (residual(1), square)],
    ),
    "two blocks at one place": (
        [block(RESIDUAL(1), HALF, "name: 'a';"), block(RESIDUAL(1), SQUARE, "name: 'b';")],
        [(residual(1), half), (residual(1), square)],
    ),
    "a block, then words": (
        [block(RESIDUAL(1), SQUARE), "InterventionHook scaling: 0.5 layer: 1 component: #residual"],
        [(residual(1), square), (residual(1), half)],
    ),
    "words, then a block": (
        ["InterventionHook scaling: 0.5 layer: 1 component: #residual", block(RESIDUAL(1), SQUARE)],
        [(residual(1), half), (residual(1), square)],
    ),
    "words in all layers after a block in one": (
        [block(RESIDUAL(1), SQUARE), "InterventionHook scaling: 0.5 layer: #all component: #residual"],
        [(residual(1), square), *((residual(layer), half) for layer in range(4))],
    ),
    "words before and after a block in another layer": (
        [
            "InterventionHook scaling: 0.5 layer: 3 component: #residual",
            block(RESIDUAL(1), SQUARE),
            "InterventionHook scaling: 0.5 layer: 0 component: #residual",
        ],
        [(residual(0), half), (residual(1), square), (residual(3), half)],
    ),
    "positions": (
        [block(RESIDUAL(1), SQUARE, "positions: #( 4 2 );")],
        [(residual(1), only(square, [2, 4], range(128)))],
    ),
    "the last position": (
        [block(RESIDUAL(1), SQUARE, "positions: #last;")],
        [(residual(1), only(square, [LAST], range(128)))],
    ),
    "an interval": (
        [block(RESIDUAL(1), SQUARE, "positions: (Dictionary new at: 'start' put: 4; yourself);")],
        [(residual(1), only(square, [4, 5], range(128)))],
    ),
    "heads, positions and neurons": (
        [
            block(
                "new hookPoint: 'blocks.2.attn.hook_z'; yourself",
                ":a | a * a - 1",
                "heads: #( 3 1 ); positions: 5; neurons: #( 0 7 );",
            )
        ],
        [("blocks.2.attn.hook_z", only(lambda value, *_: value * value - 1, [5], [1, 3], [0, 7]))],
    ),
    "a pattern": (
        [block("layer: 1 component: #attentionWeights", HALF)],
        [("blocks.1.attn.hook_pattern", half)],
    ),
    "heads of a pattern": (
        [block("layer: 1 component: #attentionWeights", HALF, "heads: 2;")],
        [("blocks.1.attn.hook_pattern", head_2)],
    ),
    "scores, written into": (
        [
            block(
                "layer: 1 component: #attentionScores",
                ":a | a at: #( 1 1 6 5 ) put: Float negativeInfinity. a",
            )
        ],
        [("blocks.1.attn.hook_attn_scores", only(minus_infinity, [5], [0], [4]))],
    ),
    "scores": (
        [block("layer: 1 component: #attentionScores", HALF)],
        [("blocks.1.attn.hook_attn_scores", half)],
    ),
    "keys of scores": (
        [block("layer: 1 component: #attentionScores", HALF, "keys: #( 0 3 ); positions: #( 4 5 );")],
        [("blocks.1.attn.hook_attn_scores", only(half, [4, 5], range(4), [0, 3]))],
    ),
    "every layer": (
        [block(RESIDUAL("#all"), ":a :layer | a * (layer + 1)")],
        [(residual(layer), times_layer) for layer in range(4)],
    ),
    "some layers": (
        [block("layer: #( 3 1 ) component: #mlp", SQUARE)],
        [(f"blocks.{layer}.hook_mlp_out", square) for layer in (1, 3)],
    ),
    "both norms of a layer": (
        [block("layer: 2 component: #layerNorm", SQUARE)],
        [(f"blocks.2.{norm}.hook_normalized", square) for norm in ("ln1", "ln2")],
    ),
    "a glob": (
        [block("new hookPoint: 'blocks.*.hook_resid_mid'; yourself", HALF)],
        [(f"blocks.{layer}.hook_resid_mid", half) for layer in range(4)],
    ),
    "tokens": (
        [block("new hookPoint: 'embed.hook_in'; yourself", ":a | a + 1")],
        [("embed.hook_in", lambda value, *_: value + 1)],
    ),
    "the embedding and the logits": (
        [block("new layer: #logits; yourself", SQUARE), block("new layer: #embedding; yourself", HALF)],
        [("hook_embed", half), ("hook_logits", square)],
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_do_what_functions_inside_the_model_do(evaluate, tiny, name):
    smalltalk, python = BLOCKS[name]
    data, read, clean = evaluate(
        f"""other := (model runWithCaching: '{JAPAN}' layers: #( 2 ) components: #( #residual )) at: 2 -> #residual.
        clean := (model forward: '{FRANCE}') data.
        model hookManager addHooks: {{ {". ".join(smalltalk)} }}.
        read := model runWithCaching: '{FRANCE}' layers: #( 3 ) components: #( #residual ).
        {{ (model forward: '{FRANCE}') data. (read at: 3 -> #residual) data. clean }}"""
    )
    hooks = [(point, fn(tiny) if fn is japans else fn) for point, fn in python]
    logits, residuals = with_functions(tiny, FRANCE, hooks, residual(3))
    same_bits(data, logits)
    same_bits(read, residuals)
    assert data != clean
    same_bits(clean, with_functions(tiny, FRANCE, [])[0])


def test_blocks_see_the_whole_text(evaluate, tiny):
    data = evaluate(
        f"""model addHook: ({block(RESIDUAL(1), ":a | a slice: #( 6 2 3 4 5 1 ) axis: 2")}).
        (model forward: '{FRANCE}') data"""
    )
    order = mx.array([5, 1, 2, 3, 4, 0])
    logits = tiny.run_with_hooks(FRANCE, [(residual(1), lambda value, _: value[:, order])])
    np.testing.assert_allclose(np.array(data), to_numpy(logits).ravel(), rtol=0, atol=2e-4)
    assert not np.allclose(np.array(data), captured(tiny, FRANCE)[1]["hook_logits"].ravel(), rtol=0, atol=1)


def test_blocks_of_neuroscopes_documentation(evaluate, tiny):
    """With a condition on what stands outside, as NeuroScope's examples have it; and the likeliest tokens."""
    before, after, top, receipt, norms, count = evaluate(
        f"""active := false.
        hook := InterventionHook new name: 'activation_scaling'; layer: 2;
            condition: [ :activation | active ]; action: [ :activation | activation * 0.5 ]; yourself.
        model hookManager addHook: hook.
        before := (model forward: '{FRANCE}') logits last data.
        active := true.
        after := (model forward: '{FRANCE}') logits last data.
        top := model topTokensAfter: '{FRANCE}' count: 1.
        {{ before. after. top first value. hook receipt. {{ hook normBefore. hook normAfter. hook fired }}.
        hook executionCount }}"""
    )
    half_of_it = {"hook_point": residual(2), "type": "scale", "factor": 0.5}
    result, arrays = captured(tiny, FRANCE, interventions=[half_of_it])
    same_bits(before, captured(tiny, FRANCE)[1]["hook_logits"][0, -1])
    same_bits(after, arrays["hook_logits"][0, -1])
    logits = arrays["hook_logits"][0, -1].astype(np.float64)
    assert top == pytest.approx(1 / np.exp(logits - logits.max()).sum(), rel=1e-12)
    expected = result.interventions[0]
    assert norms == [expected.norm_before, expected.norm_after, expected.fired]
    assert receipt == expected.to_dict() | {"type": "patch"}
    assert count == 2


def test_a_condition_sees_what_stands_there(evaluate, tiny):
    asked, data = evaluate(
        f"""asked := OrderedCollection new.
        model hookManager addHooks: {{
            InterventionHook scaling: 2 layer: 0 component: #residual.
            (InterventionHook layer: #( 2 0 ) component: #residual) name: 'mine';
                condition: [ :a | asked add: a layerIndex -> a norm. a layerIndex = 2 ];
                action: [ :a | a * 0.5 ]; yourself }}.
        data := (model forward: '{FRANCE}') data.
        {{ asked collect: [ :each | {{ each key. each value }} ]. data }}"""
    )
    twice = {"hook_point": residual(0), "type": "scale", "factor": 2}
    _, arrays = captured(tiny, FRANCE, residual(0), residual(2), interventions=[twice])
    norms = [(layer, np.linalg.norm(arrays[residual(layer)].astype(np.float64))) for layer in (0, 2)]
    np.testing.assert_allclose(asked, norms, rtol=1e-12)
    half_of_it = {"hook_point": residual(2), "type": "scale", "factor": 0.5}
    same_bits(data, captured(tiny, FRANCE, interventions=[twice, half_of_it])[1]["hook_logits"])


@pytest.mark.parametrize(
    ("hook", "sentence"),
    [
        (block(RESIDUAL(1), ":a | a slice: 1 axis: 1"), r"ShapeMismatchError.*\[1, 6, 128\].*got \[6, 128\]"),
        (block(RESIDUAL(1), ":a | 3"), "is to answer a tensor, or nil to leave things alone, got 3"),
        (block(RESIDUAL(1), ":a | self error: 'too hot'"), "HookExecutionError.*too hot"),
        (block(RESIDUAL(1), ":a | a * 0.5", "heads: 1;"), "these need an axis head, and there are batch, pos, d_model"),
        (block(RESIDUAL(1), ":a | a * 0.5", "positions: 9;"), "Expected different positions from 0 to 5"),
        (block(RESIDUAL(1), ":a | a * 0.5", "positions: #( 2 2 );"), "Expected different positions from 0 to 5"),
        (block(RESIDUAL(1), ":a | a * 0.5", "phase: #decode;"), "its phase is decode, expected prefill or none"),
        (
            block(RESIDUAL(1), ":a | model forward: 'Hello'. a"),
            "would take part in that itself: .* withHooksSuspended:",
        ),
        (block(RESIDUAL(9), ":a | a * 0.5"), "LMStudioRESTError.*9"),
        (block("layer: 1 component: #attentionScores", ":a | a * 0"), "LMStudioRESTError.*must be finite"),
        (block("new hookPoint: 'embed.hook_in'; yourself", ":a | a * 0.5"), "Expected whole numbers"),
    ],
)
def test_blocks_that_are_refused(evaluate, hook, sentence):
    with pytest.raises(SmalltalkError, match=sentence):
        evaluate(f"model addHook: ({hook}). model forward: '{FRANCE}'")


def test_blocks_take_no_part_in_generation(evaluate):
    with pytest.raises(SmalltalkError, match="can edit only runs that read the text"):
        evaluate(f"model addHook: ({block(RESIDUAL(1), HALF)}). model generate: '{FRANCE}' maxTokens: 2")


@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_records_of_tensors_are_read_exactly_by_python(live_image, dtype):
    numbers = {
        "float32": [0.0, -0.0, 1.5, np.inf, -np.inf, np.nan, 1e-40, -3.4e38, np.float32(0.1)],
        "int32": [0, -1, 2**31 - 1, -(2**31), 65537],
    }[dtype]
    array = np.array(numbers, dtype)
    taken = {"hook_point": "embed.hook_in", "axes": ["pos"], "positions": [0, len(array)], "shape": [len(array)]}
    data = {"dtype": dtype, "encoding": "base64", "data": base64.b64encode(array.tobytes()).decode()}
    tensor = f"(ActivationTensor fromRecord: (STONJSON fromString: '{json.dumps(taken | data)}'))"
    record = live_image.evaluate(f"ActivationEncoder recordFor: {tensor}")
    np.testing.assert_array_equal(decode_activation(record).view(np.int32), array.view(np.int32))


# -- refusals ------------------------------------------------------------------------------------


@contextmanager
def the_same_sentence(python, **request):
    """Smalltalk's error has the words with which the server refuses Python's request."""
    with pytest.raises(SmalltalkError) as ours:
        yield
    with pytest.raises(NeuroScopeAPIError) as theirs:
        python.complete_with_activations("The cat", max_tokens=0, **request)
    assert ours.value.details["class"] == "LMStudioRESTError"
    assert ours.value.details["message"] == str(theirs.value.message)


HOOK = {"layer_name": "transformer.h.1", "component": "residual", "hook_id": "layer1-residual"}


@pytest.mark.parametrize(
    ("hook", "spec"),
    [
        ("ActivationHook layer: 9 component: #residual", HOOK | {"layer_name": "transformer.h.9"}),
        ("ActivationHook layer: 1 component: #soul", HOOK | {"component": "soul"}),
        ("Hook new hookPoint: 'blocks.1.nowhere'; yourself", {"hook_point": "blocks.1.nowhere", "hook_id": "x"}),
        ("(ActivationHook layer: 1 component: #residual) heads: 0; yourself", HOOK | {"heads": 0}),
        ("(ActivationHook layer: 1 component: #residual) positions: #( 99 ); yourself", HOOK | {"positions": [99]}),
        ("(ActivationHook layer: 1 component: #residual) reduce: #median; yourself", HOOK | {"reduce": "median"}),
    ],
)
def test_hooks_that_the_server_refuses(evaluate, python, hook, spec):
    output = {"hook_point": "hook_logits", "hook_id": "neuroscope/output"}
    with the_same_sentence(python, activation_hooks=[output, spec]):
        evaluate(f"model addHook: ({hook}). model forward: 'The cat'")


@pytest.mark.parametrize(
    ("hook", "spec"),
    [
        ("InterventionHook zeroingHead: 7 layer: 1", {"type": "zero", "heads": [7]}),
        ("InterventionHook zeroingHead: 1 layer: 9",
         {"hook_point": "blocks.9.attn.hook_z", "type": "zero", "heads": [1]}),
        ("InterventionHook new hookPoint: 'blocks.1.attn.hook_z'; adding: #( 1 2 ); yourself",
         {"type": "add", "vector": [1, 2]}),
    ],
)  # fmt: skip
def test_interventions_that_the_server_refuses(evaluate, python, hook, spec):
    output = {"hook_point": "hook_logits", "hook_id": "neuroscope/output"}
    edit = {"hook_point": "blocks.1.attn.hook_z"} | spec
    with the_same_sentence(python, activation_hooks=[output], interventions=[edit]):
        evaluate(f"model addHook: ({hook}). model forward: 'The cat'")


def test_a_model_that_is_not_loaded_is_refused_with_the_servers_sentence(live_image):
    with pytest.raises(SmalltalkError, match="Unknown model 'nobody'. Loaded: neuroscope-tiny"):
        live_image.evaluate("(TransformerModel onClient: LMStudioRESTClient default model: 'nobody') numLayers")


# -- the logit lens ------------------------------------------------------------------------------


def test_the_lens_is_the_models_own_end_applied_to_each_layer(evaluate, tiny):
    """A layer's residual in the place of the last one: the softmax of the logits, in Smalltalk, is the logit lens."""
    found = evaluate(
        f"""run := model runWithCaching: '{FRANCE}' layers: nil components: #( #residual ).
        lens := (LMStudioRESTClient default logitLens: '{FRANCE}' topK: 3) at: 'layers'.
        lens collect: [ :row |
            hook := (InterventionHook layer: 3 component: #residual)
                patchingFrom: (run at: (row at: 'layer') -> #residual).
            logits := model withHooks: {{ hook }} do: [ model forward: '{FRANCE}' ].
            {{ row. (logits last slice: 1 axis: 1) softmax data }} ]"""
    )
    expected = LogitLens(tiny).predictions(FRANCE, top_k=3)
    assert len(found) == len(expected) == 4
    for (served, probabilities), layer in zip(found, expected, strict=True):
        ids = [each.token_id for each in layer.predictions]
        assert [each["token_id"] for each in served["predictions"]] == ids
        python = [each.probability for each in layer.predictions]
        np.testing.assert_allclose([each["probability"] for each in served["predictions"]], python, rtol=1e-5)
        np.testing.assert_allclose(np.array(probabilities)[ids], python, rtol=1e-5)
        assert sum(probabilities) == pytest.approx(1, abs=1e-6)
