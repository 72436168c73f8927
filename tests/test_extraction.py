"""What ``forward`` and ``extract_cache`` keep: easyroutine's flags, keys and positions, held against plain captures."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny_models import N_LAYERS, make_model

from mlx_hooks import ExtractionConfig, HookedModel, HookError, UnknownHookError
from mlx_hooks.activations import to_numpy
from mlx_hooks.coverage.models import tiny_model
from mlx_hooks.extraction import resolve_positions

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]
EVERYTHING = ExtractionConfig(
    extract_embed=True,
    extract_resid_in=True,
    extract_resid_mid=True,
    extract_resid_out=True,
    extract_resid_in_post_layernorm=True,
    extract_attn_pattern=True,
    extract_head_values_projected=True,
    extract_head_keys=True,
    extract_head_values=True,
    extract_head_queries=True,
    extract_values=True,
    extract_keys=True,
    extract_queries=True,
    extract_head_out=True,
    extract_attn_out=True,
    extract_attn_in=True,
    extract_mlp_in=True,
    extract_mlp_out=True,
    extract_last_layernorm=True,
    save_input_ids=True,
)


@pytest.fixture(scope="module")
def llama() -> HookedModel:
    """Four query heads, two key-value heads."""
    return HookedModel(make_model("llama"), name="tests/llama")


def equal(a: mx.array, b: mx.array) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(mx.all(a == b))


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("resid_in_2", "blocks.2.hook_resid_pre"),
        ("resid_mid_2", "blocks.2.hook_resid_mid"),
        ("resid_out_2", "blocks.2.hook_resid_post"),
        ("resid_in_post_layernorm_2", "blocks.2.ln1.hook_normalized"),
        ("attn_in_2", "blocks.2.attn.hook_in"),
        ("attn_out_2", "blocks.2.hook_attn_out"),
        ("mlp_in_2", "blocks.2.mlp.hook_in"),
        ("mlp_out_2", "blocks.2.hook_mlp_out"),
        ("last_layernorm", "ln_final.hook_in"),
        ("input_ids", "embed.hook_in"),
        ("input_embeddings", "hook_embed"),
        ("logits", "hook_logits"),
    ],
)
def test_a_flag_keeps_the_slice_of_the_whole_capture(llama: HookedModel, key: str, name: str) -> None:
    cache = llama.forward(TOKENS, ["last", 2], EVERYTHING)
    _, whole = llama.run_with_cache(TOKENS)
    assert equal(cache[key], whole[name][:, [7, 2]])
    assert equal(cache[key], cache[name])
    assert key in cache
    assert cache.positions(key) == [7, 2]


def test_heads_are_query_heads_and_read_their_part(llama: HookedModel) -> None:
    cache = llama.forward(TOKENS, "all", EVERYTHING)
    _, whole = llama.run_with_cache(TOKENS)
    q, k, v, pattern = (whole[component, 1] for component in ("q", "k", "v", "pattern"))
    for head in range(4):
        assert equal(cache[f"head_queries_L1H{head}"], q[:, :, head])
        assert equal(cache[f"head_keys_L1H{head}"], k[:, :, head // 2])
        assert equal(cache[f"head_values_L1H{head}"], v[:, :, head // 2])
        assert equal(cache[f"pattern_L1H{head}"], pattern[:, head])
    assert equal(cache["values_L1"], v.reshape(1, 8, -1))
    assert equal(cache["keys_L1"], k.reshape(1, 8, -1))
    assert equal(cache["queries_L1"], q.reshape(1, 8, -1))
    assert cache.numpy("pattern_L1H3").shape == (1, 8, 8)
    with pytest.raises(UnknownHookError, match="Unknown head 4 in 'head_values_L1H4': .*hook_v has the heads 0-3"):
        cache["head_values_L1H4"]
    with pytest.raises(UnknownHookError, match="Unknown hook point 'pattern_L9H0'"):
        cache["pattern_L9H0"]
    assert "head_values_L1H4" not in cache


def test_what_heads_add_is_the_output_projection_of_their_part(llama: HookedModel) -> None:
    cache = llama.forward(TOKENS, ["all"], EVERYTHING)
    _, whole = llama.run_with_cache(TOKENS)
    weight = to_numpy(llama.model.layers[1].self_attn.o_proj.weight).astype(np.float64)
    z, v = (to_numpy(whole[component, 1]).astype(np.float64) for component in ("z", "v"))
    for head in range(4):
        part = weight[:, head * z.shape[-1] : (head + 1) * z.shape[-1]].T
        np.testing.assert_allclose(cache.numpy(f"head_out_L1H{head}"), z[:, :, head] @ part, atol=1e-5)
        np.testing.assert_allclose(cache.numpy(f"projected_value_L1H{head}"), v[:, :, head // 2] @ part, atol=1e-5)
    total = sum(cache.numpy(f"head_out_L1H{head}") for head in range(4))
    np.testing.assert_allclose(total, cache.numpy("attn_out_1"), atol=1e-5)
    assert "blocks.1.attn.hook_z" not in cache
    assert [key for key, _ in cache.expand("head_out_L1H{j}")] == [f"head_out_L1H{head}" for head in range(4)]


def test_chosen_heads_are_kept_alone(llama: HookedModel) -> None:
    config = ExtractionConfig(
        extract_attn_pattern=True,
        extract_head_out=True,
        extract_head_values=True,
        extract_resid_out=True,
        attn_heads=[{"layer": 2, "head": 3}, {"layer": 0, "head": 1}, {"layer": 2, "head": 1}],
    )
    cache = llama.forward(TOKENS, ["last"], config)
    whole = llama.forward(TOKENS, ["last"], EVERYTHING)
    assert [key for key, _ in cache.expand("pattern_L{i}H{j}")] == ["pattern_L0H1", "pattern_L2H1", "pattern_L2H3"]
    for prefix in ("pattern", "head_out", "head_values"):
        for place in ("L2H3", "L0H1", "L2H1"):
            assert equal(cache[f"{prefix}_{place}"], whole[f"{prefix}_{place}"])
    assert ("pattern", 1) not in cache
    assert ("resid_post", 1) in cache
    assert cache["pattern", 2].shape == (1, 2, 1, 8)
    assert cache.heads(("pattern", 2)) == (1, 3)
    assert cache.heads("pattern_L2H3") is None
    with pytest.raises(UnknownHookError, match="Unknown head 0 in 'pattern_L2H0': .* has the heads 1, 3"):
        cache["pattern_L2H0"]


def test_the_average_pattern_is_over_the_batch(llama: HookedModel) -> None:
    cache = llama.forward([TOKENS, TOKENS[::-1]], ["all"], ExtractionConfig(extract_attn_pattern=True))
    expected = cache.numpy(("pattern", 1))[:, 2].astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(cache.numpy("avg_attn_pattern_L1H2"), expected[None], atol=1e-6)


@pytest.mark.parametrize(
    ("wanted", "positions", "mapping"),
    [
        ("last", [9], {"last": [0]}),
        (["last", -1, 9], [9], {"last": [0], -1: [0], 9: [0]}),
        (["last-2", "last-4", "first"], [8, 6, 0], {"last-2": [0], "last-4": [1], "first": [2]}),
        ([5, 2, -3], [5, 2, 7], {5: [0], 2: [1], -3: [2]}),
        ([(2, 5), "last"], [2, 3, 4, 9], {(2, 5): [0, 1, 2], "last": [3]}),
        ((7, 10), [7, 8, 9], {(7, 10): [0, 1, 2]}),
        ([(-3, 10)], [7, 8, 9], {(-3, 10): [0, 1, 2]}),
        ([slice(-2, None)], [8, 9], {"-2:": [0, 1]}),
        (slice(8, 0, -3), [8, 5, 2], {"8:0:-3": [0, 1, 2]}),
        (["inputs-partition-1"], [4, 5, 6], {"inputs-partition-1": [0, 1, 2]}),
        (["inputs-partition-2", "inputs-partition-0"], [7, 8, 9, 0, 1, 2, 3], None),
        (["all"], list(range(10)), {"all": list(range(10))}),
        (["all-text"], list(range(10)), {"all-text": list(range(10))}),
        ([3, "all"], [3, 0, 1, 2, 4, 5, 6, 7, 8, 9], {3: [0], "all": [1, 2, 3, 0, *range(4, 10)]}),
        (np.array([1, 2]), [1, 2], {1: [0], 2: [1]}),
    ],
)
def test_positions_are_resolved_in_the_order_asked(wanted: Any, positions: list[int], mapping: Any) -> None:
    found, where = resolve_positions(wanted, 10, pivot_positions=[7, 4])
    assert found == positions
    assert mapping is None or where == mapping
    if mapping is None:
        assert where == {"inputs-partition-2": [0, 1, 2], "inputs-partition-0": [3, 4, 5, 6]}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ([10], "Position 10 is outside the 10 tokens, 0 to 9"),
        ([-11], "Position -11 is outside"),
        ([(2, 11)], "Position 11 is outside"),
        ([(5, 5)], "selects none of the 10 tokens"),
        ([slice(20, 30)], "selects none of the 10 tokens"),
        ([], "got none"),
        ([True], "whole numbers, .* got True"),
        ([1.5], "whole numbers, .* got 1.5"),
        ([(1, 2, 3)], r"got \(1, 2, 3\)"),
        (["lats"], "'last', 'last-N', .* got 'lats'"),
        (["last-0"], "got 'last-0'"),
        (["last-11"], "Position -11 is outside"),
        (["inputs-partition-3"], "no 'inputs-partition-3': 2 pivot_positions make the partitions 0 to 2"),
        (["random-text"], "'random-text' could not be told again"),
        (["random-inputs-partition-0"], "could not be told again"),
        (["all-image"], "'all-image' is of models that see images"),
        (["special"], "see images"),
    ],
)
def test_positions_that_cannot_be_resolved_are_refused(wanted: Any, message: str) -> None:
    with pytest.raises(HookError, match=message):
        resolve_positions(wanted, 10, pivot_positions=[4, 7])


@pytest.mark.parametrize("pivots", [[0], [10], [4, 4], [-1], ["a"], [1.5]])
def test_pivots_outside_the_text_are_refused(pivots: Any) -> None:
    with pytest.raises(HookError, match="pivot_positions are"):
        resolve_positions(["inputs-partition-0"], 10, pivot_positions=pivots)


def test_a_batch_with_padding_equals_each_row_alone(llama: HookedModel) -> None:
    rows = [TOKENS, TOKENS[:5], TOKENS[2:6]]
    left = {"input_ids": np.array([TOKENS, [0] * 3 + rows[1], [0] * 4 + rows[2]]),
            "attention_mask": np.array([[1] * 8, [0] * 3 + [1] * 5, [0] * 4 + [1] * 4])}  # fmt: skip
    right = {"input_ids": mx.array([TOKENS, rows[1] + [0] * 3, rows[2] + [0] * 4]),
             "attention_mask": mx.array([[1] * 8, [1] * 5 + [0] * 3, [1] * 4 + [0] * 4])}  # fmt: skip
    alone = [llama.forward(row, ["last", 0, -2], EVERYTHING) for row in rows]
    for inputs in (left, right, rows):
        cache = llama.forward(inputs, ["last", 0, -2], EVERYTHING)
        assert list(cache) == list(alone[0])
        for name in cache:
            for i, one in enumerate(alone):
                if name.endswith("hook_pattern"):
                    assert equal(cache[name][i : i + 1, ..., : len(rows[i])], one[name])
                    assert not mx.any(cache[name][i, ..., len(rows[i]) :])
                else:
                    assert equal(cache[name][i : i + 1], one[name])
        assert cache.token_positions == [[7, 0, 6], [4, 0, 3], [3, 0, 2]]
        assert cache.row_lengths == [8, 5, 4]
        assert cache.positions("resid_out_0") == [-1, 0, -2]
        assert cache.mapping_index == {"last": [0], 0: [1], -2: [2]}


def test_rows_of_one_length_run_together_as_each_alone(llama: HookedModel) -> None:
    rows = [TOKENS, TOKENS[::-1]]
    for inputs in (rows, {"input_ids": rows}, np.array(rows)):
        cache = llama.forward(inputs, ["last"], EVERYTHING)
        for i, row in enumerate(rows):
            one = llama.forward(row, ["last"], EVERYTHING)
            for name in cache:
                np.testing.assert_allclose(cache.numpy(name)[i], one.numpy(name)[0], atol=1e-5)
        assert cache.positions("resid_out_0") == [7]


def test_a_position_that_means_differently_many_tokens_is_refused(llama: HookedModel) -> None:
    with pytest.raises(HookError, match="'all' selects 8 positions of one row and 5 of another"):
        llama.forward([TOKENS, TOKENS[:5]], ["all"])


def test_a_tokenizers_output_and_texts_are_inputs(tiny: HookedModel) -> None:
    text = "The capital of France is"
    tokenizer = tiny.get_tokenizer()
    expected = tiny.forward(text, ["last"]).logits
    for kind in (None, "np", "mlx"):
        assert equal(tiny.forward(tokenizer(text, return_tensors=kind), ["last"]).logits, expected)
    both = tokenizer([text, "Hello"], padding=True, return_tensors="np")
    assert equal(tiny.forward(both, ["last"]).logits[:1], expected)
    assert equal(tiny.forward([text, "Hello"], ["last"]).logits, tiny.forward(both, ["last"]).logits)
    assert tiny.hf_tokenizer.encode(" yes") == tiny.tokenizer.encode(" yes")
    assert tiny.model_name == "neuroscope-tiny"
    assert tiny.model_config.num_hidden_layers == 4
    with pytest.raises(HookError, match="no tokenizer"):
        _ = HookedModel(make_model("llama")).hf_tokenizer


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "have input_ids, got nothing"),
        ({"ids": [1]}, "have input_ids, got ids"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, "attention_mask has the shape of input_ids"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1, 2]]}, "holds 1 for a token and 0 for padding"),
        ({"input_ids": [[1, 2]], "attention_mask": [[0, 0]]}, "Row 0 of the inputs has no tokens"),
        ({"input_ids": [[1, 2]], "pixel_values": [1]}, "pixel_values is not read"),
        ([[1, 2], []], "Row 1 of the inputs has no tokens"),
        ([[1, 2], [1.5]], "Tokens are a text or whole numbers"),
        ([1, 10**6], "Token ids are 0 to"),
        ([], "Tokens are a text"),
        (None, "Tokens are a text"),
        ("text", "no tokenizer"),
    ],
)
def test_inputs_that_are_none_are_refused(llama: HookedModel, inputs: Any, message: str) -> None:
    with pytest.raises(HookError, match=message):
        llama.forward(inputs, ["last"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"extract_resid_out": 1}, "extract_resid_out is true or false, got 1"),
        ({"avg": True}, "avg is not offered: an average over target positions"),
        ({"avg_over_example": True}, "avg_over_example is not offered: .*avg_attn_pattern_L3H2"),
        ({"attn_pattern_avg": "mean"}, "attn_pattern_avg is not offered"),
        ({"attn_pattern_row_positions": [1]}, "attn_pattern_row_positions is not offered"),
        ({"keep_gradient": True}, "keep_gradient is not offered: .*mx.grad"),
        ({"extract_head_keys_projected": True}, "never keys; take extract_head_keys"),
        ({"attn_heads": "some"}, "attn_heads is 'all' or a list of"),
        ({"attn_heads": []}, "attn_heads is 'all' or a list of"),
        ({"attn_heads": [{"layer": 1}]}, "attn_heads is 'all' or a list of"),
        ({"attn_heads": [{"layer": 1, "head": -1}]}, "attn_heads is 'all' or a list of"),
        ({"extract_resid": True}, "Unknown flag 'extract_resid' in an extraction_config. There are: extract_embed"),
    ],
)
def test_what_a_configuration_cannot_say_is_refused_with_the_reason(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(HookError, match=message):
        ExtractionConfig.of(flags)


def test_a_configuration_is_held_against_the_model(llama: HookedModel) -> None:
    for head, message in [({"layer": N_LAYERS, "head": 0}, "layer 3; layers are 0 to 2"),
                          ({"layer": 0, "head": 4}, "head 4 of layer 0; heads are 0 to 3")]:  # fmt: skip
        with pytest.raises(HookError, match=message):
            llama.forward(TOKENS, ["last"], ExtractionConfig(extract_attn_pattern=True, attn_heads=[head]))
    with pytest.raises(HookError, match="keeps nothing"):
        llama.forward(TOKENS, ["last"], ExtractionConfig(save_logits=False))
    with pytest.raises(HookError, match="An extraction_config is"):
        llama.forward(TOKENS, ["last"], 3)  # type: ignore[arg-type]
    assert not ExtractionConfig().is_not_empty()
    assert EVERYTHING.is_not_empty()
    assert ExtractionConfig.of(EVERYTHING.to_dict()) == EVERYTHING


def test_interventions_are_in_force_and_leave_receipts(llama: HookedModel) -> None:
    edit = {"hook_point": "blocks.0.attn.hook_z", "type": "zero", "heads": 1}
    config = ExtractionConfig(extract_resid_out=True, extract_head_out=True)
    cache = llama.forward(TOKENS, ["last"], config, interventions=[edit])
    logits, whole = llama.run_with_cache(TOKENS, interventions=[edit])
    assert equal(cache.logits, logits[:, -1:])
    assert equal(cache["resid_out_2"], whole["resid_post", 2][:, -1:])
    assert not mx.any(cache["head_out_L0H1"])
    assert [receipt.fired for receipt in cache.interventions] == [1]
    rows = llama.forward([TOKENS, TOKENS[:5]], ["last"], config, interventions=iter([edit]))
    assert [receipt.fired for receipt in rows.interventions] == [1, 1]


def test_a_dataset_lies_in_one_cache(llama: HookedModel, capsys: pytest.CaptureFixture[str]) -> None:
    data = [TOKENS, {"input_ids": [TOKENS[:5], TOKENS[1:6]]}, np.array(TOKENS[:3])]
    config = ExtractionConfig(extract_resid_out=True, extract_attn_pattern=True)
    cache = llama.extract_cache((element for element in data), ["last", 0], config)
    assert "Extracting" in capsys.readouterr().err
    rows = [TOKENS, TOKENS[:5], TOKENS[1:6], TOKENS[:3]]
    for i, row in enumerate(rows):
        one = llama.forward(row, ["last", 0], config)
        np.testing.assert_allclose(cache.numpy("resid_out_2")[i], one.numpy("resid_out_2")[0], atol=1e-5)
        np.testing.assert_allclose(
            cache.numpy("pattern_L1H2")[i, :, : len(row)], one.numpy("pattern_L1H2")[0], atol=1e-5
        )
    assert cache.row_lengths == [8, 5, 5, 3]
    assert cache.metadata["model_name"] == "tests/llama"
    assert cache.metadata["target_token_positions"] == ["last", 0]
    assert cache.metadata["extraction_config"] == config
    llama.extract_cache(data[:1], ["last"], progress=False)
    assert capsys.readouterr().err == ""


def test_pivots_may_come_with_each_element(llama: HookedModel) -> None:
    data = [{"input_ids": TOKENS, "pivot_positions": [p]} for p in (3, 6)]
    cache = llama.extract_cache(data, [(0, 1), "last"], ExtractionConfig(save_input_ids=True), progress=False)
    assert cache.input_ids.tolist() == [[3, 6], [3, 6]]
    with pytest.raises(HookError, match="'inputs-partition-0' selects 3 positions of one row and 6 of another"):
        llama.extract_cache(data, ["inputs-partition-0"], progress=False)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "has no elements"),
        ("a text", "A dataloader is an iterable of inputs"),
        (5, "A dataloader is an iterable of inputs"),
        ([TOKENS, [10**6]], "Element 1 of the dataloader: Token ids are"),
    ],
)
def test_a_dataset_that_cannot_be_run_says_where(llama: HookedModel, data: Any, message: str) -> None:
    with pytest.raises(HookError, match=message):
        llama.extract_cache(data, ["last"], progress=False)


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_other_architectures_have_the_same_keys(name: str) -> None:
    model = HookedModel(make_model(name))
    config = ExtractionConfig(extract_resid_out=True, extract_head_out=True, extract_last_layernorm=True)
    cache = model.forward(TOKENS, ["last"], config)
    _, whole = model.run_with_cache(TOKENS)
    assert equal(cache["resid_out_1"], whole["resid_post", 1][:, -1:])
    assert equal(cache["last_layernorm"], whole["ln_final.hook_in"][:, -1:])
    assert cache["head_out_L1H0"].shape == (1, 1, model.cfg.d_model)


def test_values_behind_a_norm_have_no_projection_of_their_own() -> None:
    model = HookedModel(tiny_model("gemma2"))
    assert model.forward([1, 2, 3], ["last"], ExtractionConfig(extract_head_out=True))["head_out_L0H1"].ndim == 3
    with pytest.raises(HookError, match="not offered for layer 0 of this model: .* lies a norm"):
        model.forward([1, 2, 3], ["last"], ExtractionConfig(extract_head_values_projected=True))


def test_behind_a_gate_heads_are_read_where_the_projection_reads() -> None:
    model = HookedModel(tiny_model("qwen3_next"))
    config = ExtractionConfig(extract_head_out=True, extract_attn_out=True)
    cache = model.forward([1, 2, 3, 4, 5], ["last", 1], config)
    layers = {key.name.split(".")[1] for _, key in cache.expand("head_out_L{i}H{j}")}
    assert {name.split(".")[1] for name in model.hook_points if name.endswith("hook_z")} == layers
    for layer in layers:
        total = sum(cache.numpy(key) for key, _ in cache.expand(f"head_out_L{layer}H{{j}}"))
        np.testing.assert_allclose(total, cache.numpy(f"attn_out_{layer}"), atol=1e-5)
        assert cache.positions(f"head_out_L{layer}H0") == [4, 1]
    with pytest.raises(HookError, match="lies a gate"):
        model.forward([1, 2, 3], ["last"], ExtractionConfig(extract_head_values_projected=True))


class Foreign:
    """An array of a library that is not known here."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = rows

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.array(self.rows, dtype)


def test_arrays_of_other_libraries_are_inputs(llama: HookedModel) -> None:
    inputs = {"input_ids": Foreign([TOKENS, TOKENS]), "attention_mask": Foreign([[1] * 8, [0] * 3 + [1] * 5])}
    expected = llama.forward([TOKENS, TOKENS[3:]], ["last"])
    assert equal(llama.forward(inputs, ["last"]).logits, expected.logits)
    with pytest.raises(HookError, match="attention_mask has the shape of input_ids"):
        llama.forward({"input_ids": TOKENS, "attention_mask": []}, ["last"])


# What is refused, and where


@pytest.mark.parametrize("kind", [list, np.array, mx.array])
def test_pivots_of_the_inputs_are_read_wherever_they_run(llama: HookedModel, kind: Any) -> None:
    inputs = {"input_ids": [TOKENS], "pivot_positions": kind([3])}
    config = ExtractionConfig(save_input_ids=True)
    for given in (None, [3]):
        cache = llama.forward(inputs, ["inputs-partition-0"], config, pivot_positions=given)
        assert cache.input_ids.tolist() == [TOKENS[:3]]
        assert cache.metadata["pivot_positions"] == [3]
        again = llama.extract_cache([inputs], ["inputs-partition-0"], config, given, progress=False)
        assert again.mapping_index == cache.mapping_index
    with pytest.raises(HookError, match=r"pivot_positions are \[3\] in the inputs and \[4\] as an argument"):
        llama.forward(inputs, ["last"], config, pivot_positions=[4])
    with pytest.raises(HookError, match=r"Element 0 of the dataloader: pivot_positions are \[3\] in the inputs"):
        llama.extract_cache([inputs], ["last"], config, [4], progress=False)
    with pytest.raises(HookError, match="pivot_positions are whole numbers, got 3"):
        llama.forward({"input_ids": [TOKENS], "pivot_positions": 3}, ["last"])


def test_a_dataset_keeps_the_pivots_of_its_elements(llama: HookedModel) -> None:
    def pivots(*of_elements: int) -> Any:
        data = [{"input_ids": TOKENS, "pivot_positions": [p]} for p in of_elements]
        return llama.extract_cache(data, ["last"], progress=False).metadata["pivot_positions"]

    assert pivots(3, 3) == [3]
    assert pivots(3, 6) == [[3], [6]]
    assert llama.extract_cache([TOKENS], ["last"], pivot_positions=[2], progress=False).metadata["pivot_positions"] == [
        2
    ]


def test_a_row_that_does_not_fit_is_told_before_the_others_run(llama: HookedModel) -> None:
    asked: list[int] = []
    data = (asked.append(i) or tokens for i, tokens in enumerate([TOKENS, TOKENS, TOKENS[:5], TOKENS, TOKENS]))
    with pytest.raises(HookError, match="Element 2 of the dataloader: 'all' selects 8 positions of one row and 5 of"):
        llama.extract_cache(data, ["all"], progress=False)
    assert asked == [0, 1, 2]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([], "has the shape of input_ids"),
        ([[]], "has the shape of input_ids"),
        (5, "has the shape of input_ids"),
        ("11", "has the shape of input_ids"),
        (np.array(1), "has the shape of input_ids"),
        ([[1, 1], 1], "has the shape of input_ids"),
        ([[[1], [1]]], "attention_mask holds 1 for a token and 0 for padding"),
        ([[0.5, 1]], "attention_mask holds 1 for a token and 0 for padding"),
        ([["1", "1"]], "attention_mask holds 1 for a token and 0 for padding"),
    ],
)
def test_a_mask_in_another_form_is_refused(llama: HookedModel, mask: Any, message: str) -> None:
    with pytest.raises(HookError, match=message):
        llama.forward({"input_ids": [[1, 2]], "attention_mask": mask}, ["last"])


@pytest.mark.parametrize("mask", [[0, 1, 1], [[False, True, True]], np.array([[0.0, 1.0, 1.0]]), [mx.array([0, 1, 1])]])
def test_a_mask_may_have_any_type_of_numbers(llama: HookedModel, mask: Any) -> None:
    cache = llama.forward({"input_ids": [[9, 1, 2]], "attention_mask": mask}, ["last"])
    assert equal(cache.logits, llama.forward([1, 2], ["last"]).logits)


def test_what_is_no_activation_is_an_attribute(llama: HookedModel) -> None:
    cache = llama.forward(TOKENS, ["last"])
    for key in ("mapping_index", "metadata"):
        with pytest.raises(UnknownHookError, match=rf"'{key}' is no key of an activation cache: read cache\.{key}"):
            cache[key]
        assert key not in cache
