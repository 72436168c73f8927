"""Hook specs, NeuroScope's shape, and circuits whose scores are recomputed here by hand."""

import numpy as np
import orjson
import pytest

from mlx_hooks.hook_points import COMPONENTS
from neuroscope_bridge.errors import PayloadError
from neuroscope_bridge.hook_specs import LAYER_COMPONENTS, NeuroScopeActivationBridge
from neuroscope_bridge.payload import dumps, encode_activation

bridge = NeuroScopeActivationBridge()

POINTS = {
    "residual": "blocks.{}.hook_resid_post",
    "attention": "blocks.{}.hook_attn_out",
    "mlp": "blocks.{}.hook_mlp_out",
    "attention_pattern": "blocks.{}.attn.hook_pattern",
}


def record(array, layer, component, start=0, phase="prefill", is_input=False, encoding="base64", hook_id=None):
    array = np.asarray(array, np.float32)
    is_pattern = component == "attention_pattern"
    rows = array.shape[2] if is_pattern else array.shape[1]
    return encode_activation(
        array,
        hook_id=hook_id or f"layer_{layer}_{component}",
        layer_name=f"transformer.h.{layer}",
        component=component,
        hook_point=POINTS[component].format(layer),
        layer_index=layer,
        axes=("batch", "head", "query", "key") if is_pattern else ("batch", "pos", "d_model"),
        phase=phase,
        step=0 if phase == "prefill" else 1,
        positions=(start, start + rows),
        is_input=is_input,
        encoding=encoding,
    )


def pattern(*heads):
    """[1, head, query, key] from one rule per head: query -> {key: weight}."""
    n = 5
    array = np.zeros((1, len(heads), n, n), np.float32)
    for head, rule in enumerate(heads):
        for query in range(n):
            for key, weight in rule(query).items():
                array[0, head, query, key] = weight
    return array


def previous(query):
    return {max(query - 1, 0): 0.75, query: 0.25} if query else {0: 1.0}


def first(query):
    return {0: 0.5, query: 0.5} if query else {0: 1.0}


def itself(query):
    return {query: 1.0}


def scores(activations):
    return {circuit["name"]: circuit["confidence"] for circuit in bridge.find_circuits(activations)}


def test_circuit_hooks_are_ordered_by_layer_then_component():
    specs = bridge.create_hook_specs_for_circuit_analysis(model_layers=2)
    assert [spec["hook_id"] for spec in specs] == [
        "layer_0_residual",
        "layer_0_attention",
        "layer_0_mlp",
        "layer_1_residual",
        "layer_1_attention",
        "layer_1_mlp",
    ]
    assert specs[4] == {
        "layer_name": "transformer.h.1",
        "component": "attention",
        "hook_id": "layer_1_attention",
        "capture_input": False,
        "capture_output": True,
    }


def test_circuit_hooks_take_components_and_layers():
    specs = bridge.create_hook_specs_for_circuit_analysis(24, components=["mlp", "residual"], target_layers=[7, 3])
    ids = [spec["hook_id"] for spec in specs]
    assert ids == ["layer_3_mlp", "layer_3_residual", "layer_7_mlp", "layer_7_residual"]
    everything = bridge.create_hook_specs_for_circuit_analysis(1, components=LAYER_COMPONENTS)
    assert len({spec["hook_id"] for spec in everything}) == 9


def test_attention_hooks_cover_the_target_layers():
    specs = bridge.create_attention_analysis_hooks(model_layers=24, target_layers=[5, 10])
    assert [(spec["layer_name"], spec["component"], spec["hook_id"]) for spec in specs] == [
        ("transformer.h.5", "attention_pattern", "layer_5_attention_pattern"),
        ("transformer.h.5", "query", "layer_5_query"),
        ("transformer.h.5", "key", "layer_5_key"),
        ("transformer.h.5", "value", "layer_5_value"),
        ("transformer.h.10", "attention_pattern", "layer_10_attention_pattern"),
        ("transformer.h.10", "query", "layer_10_query"),
        ("transformer.h.10", "key", "layer_10_key"),
        ("transformer.h.10", "value", "layer_10_value"),
    ]
    assert len(bridge.create_attention_analysis_hooks(6)) == 24


def test_hooks_take_what_limits_them():
    (spec,) = bridge.create_hook_specs_for_circuit_analysis(1, ["mlp"], positions="last", heads=None, reduce="norm")
    assert (spec["positions"], spec["reduce"], "heads" in spec) == ("last", "norm", False)
    specs = bridge.create_attention_analysis_hooks(2, target_layers=[1], heads=[0, 2])
    assert [spec["heads"] for spec in specs] == [[0, 2]] * 4
    for create in (bridge.create_hook_specs_for_circuit_analysis, bridge.create_attention_analysis_hooks):
        with pytest.raises(TypeError, match="no selection 'position': there are positions, heads, reduce"):
            create(2, position=3)


def test_circuits_of_selected_heads_and_positions_are_those_of_the_whole():
    whole = record(pattern(first, itself, previous), 1, "attention_pattern")
    array = pattern(first, itself, previous)[:, [0, 2]]
    chosen = record(array, 1, "attention_pattern") | {"heads": [0, 2]}
    assert scores({"p": [chosen]}) == scores({"p": [whole]}) == scores({"p": [whole], "q": [chosen]})
    assert {"previous_token_head L1H2", "first_token_head L1H0"} <= set(scores({"p": [chosen]}))

    rows = record(array[:, :, 1:5:3], 1, "attention_pattern") | {"positions": [1, 5], "position_ids": [1, 4]}
    assert scores({"p": [rows]}) == {}, "two tokens are too few to tell"
    rows = record(array[:, :, [1, 2, 4]], 1, "attention_pattern")
    rows |= {"heads": [0, 2], "positions": [1, 5], "position_ids": [1, 2, 4]}
    assert scores({"p": [rows]})["previous_token_head L1H2"] == pytest.approx(0.75)
    assert scores({"p": [rows]})["first_token_head L1H0"] == pytest.approx(0.5)


def test_reduced_tensors_make_no_circuits():
    norms = encode_activation(
        np.ones((1, 3), np.float32),
        hook_id="m", layer_name="transformer.h.0", component="mlp", hook_point="blocks.0.hook_mlp_out", layer_index=0,
        axes=("batch", "pos"), phase="prefill", step=0, positions=(0, 3), is_input=False, reduce="norm",
    )  # fmt: skip
    assert bridge.find_circuits({"m": [norms]}) == []
    (tensor,) = bridge.convert_activations_for_neuroscope({"m": [norms]})["m"]
    assert tensor["reduce"] == "norm"


def test_components_are_those_of_the_engine():
    assert {*LAYER_COMPONENTS, "embedding"} == set(COMPONENTS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"components": ["residual", "resid"]},
            "Unknown component 'resid'. Components of a layer: residual, attention,",
        ),
        ({"components": ["embedding"]}, "Unknown component 'embedding'"),
        ({"components": "residual"}, "must be a list, got the string 'residual'"),
        ({"components": []}, "each component once"),
        ({"components": ["mlp", "mlp"]}, "each component once"),
        ({"target_layers": [4]}, r"There is no layer 4. Layers: 0 to 3\."),
        ({"target_layers": [-1]}, "There is no layer -1"),
        ({"target_layers": ["2"]}, "There is no layer '2'"),
        ({"target_layers": [True]}, "There is no layer True"),
        ({"target_layers": [1.0]}, "There is no layer 1.0"),
        ({"target_layers": []}, "each layer once"),
        ({"target_layers": [1, 1]}, "each layer once"),
        ({"model_layers": 0}, "from 1, got 0"),
        ({"model_layers": "4"}, "from 1, got '4'"),
        ({"model_layers": True}, "from 1, got True"),
    ],
)
def test_what_the_model_lacks_is_refused_with_what_there_is(arguments, message):
    with pytest.raises(ValueError, match=message):
        bridge.create_hook_specs_for_circuit_analysis(**{"model_layers": 4} | arguments)


def test_layers_may_be_numpy_integers():
    assert (
        bridge.create_attention_analysis_hooks(4, target_layers=np.arange(1, 3))[0]["layer_name"] == "transformer.h.1"
    )


@pytest.mark.parametrize("encoding", ["json", "base64"])
def test_conversion_keeps_every_number_and_renames_the_fields(encoding):
    array = np.random.default_rng(0).standard_normal((1, 3, 4)).astype(np.float32)
    wire = orjson.loads(dumps({"layer_2_mlp": [record(array, 2, "mlp", encoding=encoding)]}))
    (tensor,) = bridge.convert_activations_for_neuroscope(wire)["layer_2_mlp"]
    np.testing.assert_array_equal(tensor.pop("data"), array)
    assert tensor == {
        "hookId": "layer_2_mlp",
        "layerName": "transformer.h.2",
        "component": "mlp",
        "hookPoint": "blocks.2.hook_mlp_out",
        "layerIndex": 2,
        "shape": [1, 3, 4],
        "dtype": "float32",
        "axes": ["batch", "pos", "d_model"],
        "positions": [0, 3],
        "positionIds": None,
        "heads": None,
        "reduce": None,
        "isInput": False,
        "phase": "prefill",
        "step": 0,
    }


def test_conversion_without_data_and_of_the_plain_seven_fields():
    bare = record(np.zeros((1, 3, 4)), 2, "mlp", encoding="none")
    assert bridge.convert_activations_for_neuroscope({"h": [bare]})["h"][0]["data"] is None
    plain = {"hook_id": "h", "layer_name": "transformer.h.2", "component": "mlp", "shape": [1, 2]}
    plain |= {"dtype": "float32", "is_input": False, "data": [[1.0, 2.0]]}
    tensor = bridge.convert_activations_for_neuroscope({"h": [plain]})["h"][0]
    assert tensor["data"].tolist() == [[1.0, 2.0]]
    assert tensor["phase"] is None
    with pytest.raises(PayloadError, match="lacks layer_name, component, shape, dtype, is_input; it has hook_id"):
        bridge.convert_activations_for_neuroscope({"h": [{"hook_id": "h"}]})


def test_heads_that_look_at_a_fixed_place_are_found():
    circuits = bridge.find_circuits({"p": [record(pattern(previous, itself, first), 2, "attention_pattern")]})
    assert [circuit["name"] for circuit in circuits] == ["previous_token_head L2H0", "first_token_head L2H2"]
    head = circuits[0]
    assert head["confidence"] == pytest.approx(0.75, abs=1e-6)
    assert head["components"] == [{"layer": 2, "componentType": "attention_head", "index": 0}]
    assert head["pathway"] == [{"source": "position q-1", "target": "position q", "strength": head["confidence"]}]
    assert "Correlational" in head["description"]
    assert circuits[1]["confidence"] == pytest.approx(0.5, abs=1e-6)
    assert circuits[1]["pathway"] == []


def test_head_scores_leave_out_the_first_two_queries():
    def late(query):  # previous token from position 2 on, itself before
        return {query - 1: 1.0} if query >= 2 else {query: 1.0}

    assert scores({"p": [record(pattern(late), 0, "attention_pattern")]}) == {"previous_token_head L0H0": 1.0}

    def early(query):
        return {query - 1: 1.0} if query == 1 else {query: 1.0}

    assert scores({"p": [record(pattern(early), 0, "attention_pattern")]}) == {}


def test_head_threshold_is_inclusive():
    def weak(weight):
        return lambda query: {query - 1: weight, query: 1 - weight} if query >= 2 else {0: 1.0}

    found = scores({"p": [record(pattern(weak(0.3125), weak(0.25)), 0, "attention_pattern")]})
    assert found == {"previous_token_head L0H0": 0.3125}
    tensors = bridge.convert_activations_for_neuroscope(
        {"p": [record(pattern(weak(1.0))[:, :, :3, :3], 0, "attention_pattern")]}
    )
    tensors["p"][0]["data"] = tensors["p"][0]["data"].astype(np.float64) * 0.3
    assert scores(tensors) == {"previous_token_head L0H0": 0.3}


def test_equal_confidence_is_ordered_by_name():
    def strong(query):
        return {query - 1: 1.0} if query >= 2 else {query: 1.0}

    activations = {
        "p": [record(pattern(strong), 0, "attention_pattern")],
        "m": [record([[[4.0, 0.0]]], 0, "mlp")],
        "a": [record([[[4.0, 0.0]]], 1, "attention")],
    }
    assert list(scores(activations).items()) == [
        ("attention_write L1", 1.0),
        ("mlp_write L0", 1.0),
        ("previous_token_head L0H0", 1.0),
    ]


def test_short_prompts_decode_records_and_further_batch_rows_have_no_head_score():
    two_tokens = record(pattern(previous)[:, :, :2, :2], 0, "attention_pattern")
    assert scores({"p": [two_tokens]}) == {}
    decode = record(pattern(previous), 0, "attention_pattern", phase="decode")
    assert scores({"p": [decode]}) == {}
    batch = np.concatenate([pattern(itself), pattern(previous)])
    assert scores({"p": [record(batch, 0, "attention_pattern")]}) == {}


def test_a_prompt_read_in_chunks_scores_as_one():
    whole = pattern(previous, first)
    whole[0, 0, 3] = [0.1, 0.2, 0.4, 0.3, 0.0]
    chunks = [
        record(whole[:, :, :3, :3], 1, "attention_pattern"),
        record(whole[:, :, 3:, :], 1, "attention_pattern", start=3),
    ]
    assert scores({"p": chunks}) == scores({"p": [record(whole, 1, "attention_pattern")]})
    assert scores({"p": chunks})["previous_token_head L1H0"] == pytest.approx((0.75 + 0.4 + 0.75) / 3, abs=1e-6)


def test_a_later_chunk_alone_uses_absolute_positions():
    chunk = record(pattern(previous)[:, :, 1:, :], 1, "attention_pattern", start=1)
    assert scores({"p": [chunk]})["previous_token_head L1H0"] == pytest.approx(0.75, abs=1e-6)


def test_patterns_that_lack_early_keys_are_left_out():
    # with the first key gone, attention to itself stands in the column of the token before
    windowed = record(pattern(itself)[:, :, :, 1:], 0, "attention_pattern")
    assert scores({"p": [windowed]}) == {}


def test_writes_are_measured_against_the_residual_stream():
    activations = {
        "r": [record([[[3.0, 4.0], [0.0, 15.0]]], 1, "residual")],  # norms 5 and 15: mean 10
        "a": [record([[[0.0, 1.0], [3.0, 0.0]]], 1, "attention")],  # norms 1 and 3: mean 2
        "m": [record([[[60.0, 0.0], [0.0, 60.0]]], 1, "mlp")],  # mean 60: clipped
    }
    circuits = bridge.find_circuits(activations)
    assert [(c["name"], c["confidence"]) for c in circuits] == [("mlp_write L1", 1.0), ("attention_write L1", 0.2)]
    assert circuits[1]["components"] == [{"layer": 1, "componentType": "attention", "index": None}]
    assert circuits[1]["pathway"] == []
    assert "relative to the residual stream after the layer" in circuits[1]["description"]


def test_writes_without_their_residual_are_measured_against_the_largest_write():
    activations = {
        "a0": [record([[[2.0, 0.0]]], 0, "attention")],
        "m0": [record([[[8.0, 0.0]]], 0, "mlp")],
        "m1": [record([[[4.0, 0.0]]], 1, "mlp")],
        "r1": [record([[[16.0, 0.0]]], 1, "residual")],
    }
    assert scores(activations) == {"mlp_write L0": 1.0, "attention_write L0": 0.25, "mlp_write L1": 0.25}
    names = [circuit["name"] for circuit in bridge.find_circuits(activations)]
    assert names == ["mlp_write L0", "attention_write L0", "mlp_write L1"]  # equal confidence: by name


def test_only_prefill_outputs_count_as_writes():
    activations = {
        "m": [
            record([[[400.0, 0.0]]], 0, "mlp", is_input=True),
            record([[[4.0, 0.0]]], 0, "mlp"),
            record([[[400.0, 0.0]]], 0, "mlp", start=1, phase="decode"),
        ],
        "r": [
            record([[[1.0, 0.0]]], 0, "residual", is_input=True),
            record([[[8.0, 0.0]]], 0, "residual"),
        ],
    }
    assert scores(activations) == {"mlp_write L0": 0.5}


def test_one_layer_captured_by_two_hooks_is_one_circuit():
    twice = {name: [record([[[4.0, 0.0]]], 0, "mlp", hook_id=name)] for name in ("a", "b")}
    assert scores(twice) == {"mlp_write L0": 1.0}
    assert len(bridge.find_circuits(twice)) == 1
    two_rows = pattern(previous)[:, :, 3:, :]
    twice = {name: [record(two_rows, 0, "attention_pattern", start=3, hook_id=name)] for name in ("a", "b")}
    assert scores(twice) == {}  # two captures of two rows are no four rows


def test_nothing_written_is_no_division_by_zero():
    assert scores({"m": [record([[[0.0, 0.0]]], 0, "mlp")]}) == {"mlp_write L0": 0.0}


def test_circuits_are_the_same_from_the_wire_and_after_conversion():
    activations = {
        "p": [record(pattern(previous, first), 0, "attention_pattern", encoding="json")],
        "m": [record([[[4.0, 0.0]]], 0, "mlp")],
    }
    wire = orjson.loads(dumps(activations))
    found = bridge.find_circuits(wire)
    assert len(found) == 3
    assert bridge.find_circuits(bridge.convert_activations_for_neuroscope(wire)) == found
    assert bridge.find_circuits(activations) == found


def test_no_score_is_made_from_what_is_missing():
    with pytest.raises(PayloadError, match="'layer_0_mlp' was captured without data"):
        bridge.find_circuits({"m": [record([[[4.0, 0.0]]], 0, "mlp", encoding="none")]})
    with pytest.raises(PayloadError, match="holds nan or inf"):
        bridge.find_circuits({"m": [record([[[np.nan, 0.0]]], 0, "mlp")]})
    without = record([[[4.0, 0.0]]], 0, "mlp")
    del without["phase"]
    with pytest.raises(PayloadError, match="lacks layer_index, phase or positions"):
        bridge.find_circuits({"m": [without]})
    gap = record([[[4.0, 0.0]]], 0, "mlp") | {"positions": [0, 7]}
    with pytest.raises(PayloadError, match=r"1 rows for positions \[0, 7\]"):
        bridge.find_circuits({"m": [gap]})
    assert bridge.find_circuits({}) == []
