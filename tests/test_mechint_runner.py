"""The runner of analyses: what it answers, what it does with failures, checkpoints and steps, and what it exports."""

import json
import random
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import TrainingArgs
from mlx_lm.tuner.utils import linear_to_lora_layers
from tiny_models import make_model

from mlx_hooks import (
    EvalMechIntRunner,
    HookedModel,
    HookError,
    MechIntCallback,
    MechIntConfig,
    MechIntHooks,
    ShardReader,
    SparseAutoencoder,
)
from mlx_hooks.analysis.sae.training import train_sae
from mlx_hooks.errors import FailedAnalysisWarning, ModelLoadError
from mlx_hooks.storage.rows import ArrayRows
from mlx_hooks.storage.shard_writer import ShardWriter
from mlx_hooks.training import registry
from mlx_hooks.training.analyses import EvalContext, layers_for, run_analysis
from mlx_hooks.training.config import ANALYSES
from mlx_hooks.training.findings import findings

STEPS = (0, 10, 20)
RESID, MLP, PATTERN = "blocks.1.hook_resid_post", "blocks.1.mlp.hook_post", "blocks.2.attn.hook_pattern"
QUIET: dict[str, Any] = {
    "verbose": False,
    "analysis_options": {"sae": {"d_sae": 16, "epochs": 2, "max_steps": 20}, "causal": {"ablations": ["zero"]}},
}
TEXTS = [[1, 5, 9, 2, 7, 3], [4, 8, 1, 6, 2, 9], [3, 3, 7, 1, 5, 8]]


def sequences(step: int) -> list[list[int]]:
    """Random tokens, twice, of lengths that differ."""
    generator = random.Random(step)
    words = [generator.sample(range(60), generator.randint(6, 9)) for _ in range(6)]
    return [stretch + stretch for stretch in words]


def weights_at(step: int) -> Any:
    return make_model("llama", seed=step)


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A folder of captured rows of three steps, the arrays that were written, and weights of each step."""
    folder = tmp_path_factory.mktemp("captured")
    layers = {
        RESID: {"axes": ["d_model"], "shape": [32], "dtype": "float32", "asked": "model.layers.1"},
        MLP: {"axes": ["d_mlp"], "shape": [48], "dtype": "float32"},
        PATTERN: {"axes": ["head", "key"], "shape": [4, None], "dtype": "float32"},
    }
    arrays: dict[int, dict[str, np.ndarray]] = {}
    checkpoints = {}
    description = {"config": {}, "model": {"name": "little", "model_type": "llama"}}
    with ShardWriter(folder / "shards", layers=layers, description=description, max_rows=50) as writer:
        for step in STEPS:
            model = HookedModel(weights_at(step))
            checkpoints[step] = folder / f"{step:07d}_adapters.safetensors"
            mx.save_safetensors(str(checkpoints[step]), dict(tree_flatten(model.model.parameters())))
            rows: dict[str, list[np.ndarray]] = {RESID: [], MLP: [], PATTERN: []}
            longest = max(map(len, sequences(step)))
            for tokens in sequences(step):
                _, cache = model.run_with_cache([tokens], [RESID, MLP, PATTERN])
                rows[RESID].append(np.array(cache[RESID])[0])
                rows[MLP].append(np.array(cache[MLP])[0])
                pattern = np.array(cache[PATTERN])[0].transpose(1, 0, 2)
                rows[PATTERN].append(np.pad(pattern, [(0, 0), (0, 0), (0, longest - len(tokens))]))
            arrays[step] = {name: np.concatenate(parts) for name, parts in rows.items()}
            lengths = [len(tokens) for tokens in sequences(step)]
            writer.write(
                {name: mx.array(value) for name, value in arrays[step].items()},
                tokens=np.concatenate(sequences(step)),
                sequence=np.repeat(np.arange(len(lengths)), lengths),
                position=np.concatenate([np.arange(length) for length in lengths]),
                step=step,
            )
    return SimpleNamespace(folder=folder / "shards", arrays=arrays, checkpoints=checkpoints)


def runner_of(captured: SimpleNamespace, *analyses: str, model: Any = None, **config: Any) -> EvalMechIntRunner:
    settings = QUIET | {"analyses_to_run": analyses, "storage_path": str(captured.folder)} | config
    return EvalMechIntRunner(model, MechIntConfig(**settings))


class Letters:
    """A tokenizer whose tokens are hard to put into Markdown."""

    def decode(self, ids: list[int]) -> str:
        return "".join(f"|{chr(97 + token % 26)}*\n" for token in ids)

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 60 for letter in text]


# What is answered


def test_every_name_of_the_configuration_is_an_analysis() -> None:
    assert set(registry.ANALYSES_BY_NAME) == set(ANALYSES)
    for name, analysis in registry.ANALYSES_BY_NAME.items():
        assert analysis.name == name
        assert analysis.options() == analysis.options_class()


def test_results_have_the_configuration_and_the_analyses_by_layer(captured: SimpleNamespace) -> None:
    runner = runner_of(captured, "sae", "neuron", "feature", "heads")
    results = runner.run_mechint_eval()
    assert list(results) == ["config", "analyses"]
    assert results["config"] == runner.config.to_dict()
    assert list(results["analyses"]) == ["sae", "neuron", "feature", "heads"]
    for name, layers in [
        ("sae", [RESID, MLP]),
        ("neuron", [RESID, MLP]),
        ("feature", [RESID, MLP]),
        ("heads", [PATTERN]),
    ]:
        assert sorted(results["analyses"][name]) == sorted(layers)
    neuron = results["analyses"]["neuron"][MLP]
    together = np.concatenate([captured.arrays[step][MLP] for step in STEPS]).astype(np.float64)
    np.testing.assert_allclose(neuron["mean_activation"], together.mean(0), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(neuron["max_activation"], together.max(0), rtol=1e-6)
    np.testing.assert_array_equal(neuron["firing_rate"], (together > 0).mean(0))
    sae = results["analyses"]["sae"][RESID]
    assert 1 <= len(sae["training_stats"][f"{RESID}/loss"]) <= 2
    assert 0 <= sae["final_l0"] <= 1
    assert "neuroscope-" not in json.dumps(sae)
    variance = results["analyses"]["feature"][RESID]["explained_variance"]
    assert 0 < sum(variance) <= 1 + 1e-9
    # Plain JSON, as it is.
    assert json.loads(json.dumps(results, allow_nan=False)) == results


def test_only_the_layers_of_the_configuration_are_analysed(captured: SimpleNamespace) -> None:
    for asked, found in [
        (["model.layers.1"], [RESID]),
        ([1], [RESID]),
        (["blocks.*.mlp.*"], [MLP]),
        (["blocks.1.*"], [RESID, MLP]),
        (["*"], [RESID, MLP]),
    ]:
        results = runner_of(captured, "neuron", sample_layers=asked).run_mechint_eval()
        assert sorted(results["analyses"]["neuron"]) == sorted(found)
    for asked, message in [
        (["blocks.2.hook_resid_post"], "'blocks.2.hook_resid_post' was not captured"),
        (["decoder.*"], "matches nothing that was captured. There are: "),
        ([PATTERN], "needs activations of tokens; none are among sample_layers"),
    ]:
        with pytest.warns(FailedAnalysisWarning, match=re.escape(message)):
            results = runner_of(captured, "neuron", sample_layers=asked).run_mechint_eval()
        assert message in results["analyses"]["neuron"]["error"]


def test_rows_in_memory_and_tokens_as_text(captured: SimpleNamespace) -> None:
    rows = {"mine": ArrayRows(np.eye(5) + 1, "mine", tokens=np.arange(5))}
    runner = EvalMechIntRunner(config={"analyses_to_run": ["neuron"], **QUIET}, tokenizer=Letters())
    found = runner.run_mechint_eval(hidden_shards_path=rows)["analyses"]["neuron"]["mine"]
    assert [entry["tokens"][0]["token"] for entry in found["top_tokens"]] == [f"|{letter}*\n" for letter in "abcde"]
    assert runner.run_analysis("neuron", rows, layer="mine") == found
    with pytest.raises(HookError, match="came without steps") as caught:
        EvalContext(rows=rows).at([0]).rows_of("mine")
    assert caught.value.field == "steps"


def test_one_analysis_by_itself_raises_what_goes_wrong(captured: SimpleNamespace) -> None:
    runner = runner_of(captured, "neuron")
    activations = runner.load_activations()
    assert {name: len(rows) for name, rows in activations.items()} == dict.fromkeys(
        activations, sum(len(captured.arrays[step][RESID]) for step in STEPS)
    )
    by_layer = runner.run_analysis("neuron", activations)
    assert by_layer == runner.run_analysis("neuron", captured.folder) == runner.run_analysis("neuron")
    assert runner.run_analysis("neuron", layer="model.layers.1") == by_layer[RESID]
    assert runner.run_analysis("neuron", layer=1, options={"threshold": 1e9})["n_dead"] == 32
    for name, layer, message in [
        ("guess", None, "There is no analysis 'guess'. There are: sae, neuron"),
        ("neuron", "blocks.9", "was not captured"),
        ("neuron", PATTERN, f"cannot be made of {PATTERN}, whose rows are head, key: it can be made of"),
        ("heads", RESID, f"it can be made of {PATTERN}"),
        ("causal", None, "'causal' runs the model: give one"),
        ("causal", RESID, "is of the whole model: name no layer"),
    ]:
        with pytest.raises(HookError, match=re.escape(message)):
            runner.run_analysis(name, layer=layer)
    with pytest.raises(HookError, match="no field 'thresold'") as caught:
        runner.run_analysis("neuron", options={"thresold": 1})
    assert caught.value.field == "thresold"


def test_a_seed_is_that_of_options_which_name_none(captured: SimpleNamespace) -> None:
    context = EvalContext(reader=ShardReader(captured.folder), seed=7)
    options = {"d_sae": 8, "epochs": 1, "max_steps": 3}
    found = run_analysis("sae", context, RESID, options)
    assert found["options"]["seed"] == 7
    assert found == run_analysis("sae", EvalContext(reader=context.reader), RESID, options | {"seed": 7})
    assert found != run_analysis("sae", context, RESID, options | {"seed": 8})
    # It has none: nothing is drawn.
    run_analysis("neuron", context, RESID)


# What goes wrong


def start(capture: MechIntHooks | MechIntCallback) -> None:
    model = make_model("llama")
    if isinstance(capture, MechIntHooks):
        capture.register_hooks(model)
    else:
        capture.train(model, optim.SGD(0.1), [([1, 2, 3, 4], 0)] * 4, args=TrainingArgs(batch_size=2, iters=1))


def test_what_fails_is_told_and_the_others_go_on(captured: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def divide(rows: Any, *_: Any) -> dict[str, Any]:
        if rows.name == RESID:
            raise ZeroDivisionError("by zero")
        return {"share": float("nan")}

    monkeypatch.setattr(registry, "analyse_features", divide)
    runner = runner_of(captured, "feature", "causal", "probe", "neuron")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        analyses = runner.run_mechint_eval()["analyses"]
    assert analyses["feature"][RESID] == {"error": "ZeroDivisionError: by zero"}
    assert "not JSON compliant" in analyses["feature"][MLP]["error"]
    assert analyses["causal"] == {"error": "The analysis 'causal' runs the model: give one."}
    assert analyses["probe"][MLP] == {"error": "A probe needs labels: one per row in stored order, or labels by token."}
    assert set(analyses["neuron"]) == {RESID, MLP}
    assert {warning.category for warning in caught} == {FailedAnalysisWarning}
    told = [str(warning.message) for warning in caught]
    assert f"The analysis feature of {RESID} failed: ZeroDivisionError: by zero" in told
    report = runner.export_results(captured.folder.parent / "failed").read_text()
    assert f"- `feature` of `{RESID}`: ZeroDivisionError: by zero" in report


def test_a_wrong_configuration_is_refused_before_anything_runs(captured: SimpleNamespace) -> None:
    for config, message in [
        ({"analyses_to_run": ["guess"]}, "analyses_to_run"),
        ({"analysis_options": {"sae": {"k": 0}}}, "analysis_options of sae: k must be"),
        (
            {"analysis_options": {"neuron": {"depth": 1}}},
            "analysis_options of neuron: NeuronOptions has no field 'depth'",
        ),
        ({"epochs": 3}, "no field 'epochs'"),
    ]:
        with pytest.raises(HookError, match=message):
            EvalMechIntRunner(config=config)
    # Those who capture are told before they train, not when the training is over.
    config = {"sample_layers": [1], "storage_path": captured.folder.parent / "none"}
    for capture in (MechIntHooks, MechIntCallback):
        with pytest.raises(HookError, match="analysis_options of sae: max_steps must be") as caught:
            start(capture(config | {"analysis_options": {"sae": {"max_steps": 0}}}))
        assert caught.value.field == "analysis_options"
    assert not (captured.folder.parent / "none").exists()
    for device, message in [("tpu", "device is None"), ("cuda", "cannot compute on 'cuda'"), ("mps", "on 'mps'")]:
        if device == "tpu" or not mx.is_available(mx.gpu):
            with pytest.raises(HookError, match=message):
                EvalMechIntRunner(device=device)
    assert EvalMechIntRunner(device="cpu").device == "cpu"


def test_a_folder_that_was_named_must_be_there(captured: SimpleNamespace, tmp_path: Path) -> None:
    runner = EvalMechIntRunner(config={"analyses_to_run": ["neuron"], "storage_path": tmp_path / "none", **QUIET})
    with pytest.raises(HookError, match="no captured activations in .*elsewhere"):
        runner.run_mechint_eval(hidden_shards_path=tmp_path / "elsewhere")
    with pytest.raises(HookError, match="no captured activations in .*none"):
        runner.load_activations()
    # That of the configuration may still have to be made: the model's analyses do without.
    with pytest.warns(FailedAnalysisWarning, match="needs captured activations"):
        assert "error" in runner.run_mechint_eval()["analyses"]["neuron"]
    with pytest.raises(HookError, match="There are no results yet"):
        EvalMechIntRunner().export_results(tmp_path)


# The model


def test_a_checkpoint_is_put_into_the_model_which_keeps_it(captured: SimpleNamespace) -> None:
    module = make_model("llama", seed=99)
    runner = runner_of(captured, "causal", model=module)
    assert isinstance(runner.model, HookedModel)
    found = runner.run_mechint_eval(captured.checkpoints[10], eval_data=TEXTS)["analyses"]["causal"]
    logits = np.array(weights_at(10)(mx.array(TEXTS)), np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    targets = np.array(TEXTS)[:, 1:]
    expected = -np.take_along_axis(log_probabilities[:, :-1], targets[..., None], -1).mean()
    assert abs(found["plain"]["loss"]["mean"] - expected) < 1e-5
    assert mx.array_equal(module(mx.array(TEXTS)), weights_at(10)(mx.array(TEXTS))).item()
    with pytest.raises(ModelLoadError, match="no checkpoint at"):
        runner.run_mechint_eval("nowhere", eval_data=TEXTS)


def test_a_model_that_got_adapters_since_it_was_wrapped_is_wrapped_anew(captured: SimpleNamespace) -> None:
    hooked = HookedModel(make_model("llama"))
    runner = runner_of(captured, "causal", model=hooked)
    runner.run_mechint_eval(eval_data=TEXTS)
    assert runner.model is hooked
    linear_to_lora_layers(hooked.model, 3, {"rank": 2, "scale": 3.0, "dropout": 0.0})
    assert "error" not in runner.run_mechint_eval(eval_data=TEXTS)["analyses"]["causal"]
    assert runner.model is not hooked


def test_without_a_model_the_checkpoint_is_one(captured: SimpleNamespace) -> None:
    from mlx_hooks.loading import fetch

    config = {"analyses_to_run": ["causal"], **QUIET}
    runner = EvalMechIntRunner(config=config)
    found = runner.run_mechint_eval(fetch("neuroscope-tiny"), eval_data=["The capital of France is Paris ."])
    assert runner.model is not None
    assert len(found["analyses"]["causal"]["components"]) == 8
    assert runner.tokenizer is runner.model.tokenizer


def test_dropout_is_off_and_training_goes_on_as_it_was(captured: SimpleNamespace) -> None:
    module = make_model("llama")
    module.train()
    module.layers[1].eval()
    flags = [part.training for part in module.modules()]
    seen = []
    runner = runner_of(captured, "causal", model=module)
    inner = runner.model.model  # type: ignore[union-attr]

    def texts() -> Iterator[list[int]]:
        seen.append([part.training for part in inner.modules()])
        yield from TEXTS

    context_texts = texts()
    runner.run_mechint_eval(eval_data=context_texts)
    assert [part.training for part in module.modules()] == flags
    with runner._computing():
        assert not any(part.training for part in module.modules())


def test_data_that_can_be_read_once_serves_several_analyses(captured: SimpleNamespace) -> None:
    runner = runner_of(captured, "causal", "circuit", "sae", model=make_model("llama"))
    analyses = runner.run_mechint_eval(eval_data=iter(TEXTS))["analyses"]
    assert analyses["causal"]["eval_data"]["examples"] == analyses["circuit"]["eval_data"]["examples"] == 3
    assert analyses["sae"][RESID]["loss_recovered"]["n_targets"] == 15


def test_of_data_without_end_a_few_are_run_and_of_a_list_all(captured: SimpleNamespace) -> None:
    quick = {"components": ["blocks"], "ablations": ["zero"], "batch_size": 100}
    for options, given, n in (
        (quick, cycle(TEXTS), 64),
        (quick | {"max_examples": 80}, cycle(TEXTS), 80),
        (quick, TEXTS * 30, 90),
    ):
        runner = runner_of(captured, "causal", model=make_model("llama"), analysis_options={"causal": options})
        assert runner.run_mechint_eval(eval_data=given)["analyses"]["causal"]["eval_data"]["examples"] == n


def test_features_steer_if_asked(captured: SimpleNamespace) -> None:
    runner = runner_of(captured, "sae", model=make_model("llama"), enable_feature_steering=True, sample_layers=[1])
    found = runner.run_mechint_eval(eval_data=TEXTS)["analyses"]["sae"][RESID]
    assert found["steering"]
    runner.export_results(captured.folder.parent / "steered")
    assert "Steering by" in (captured.folder.parent / "steered" / "mechint_report.md").read_text()


def test_steering_that_was_asked_for_and_cannot_be_done_is_told(captured: SimpleNamespace, tmp_path: Path) -> None:
    runner = runner_of(captured, "sae", model=make_model("llama"), enable_feature_steering=True, sample_layers=[1])
    found = runner.run_mechint_eval()["analyses"]["sae"][RESID]
    assert "steering" not in found
    assert "Nothing was steered: steering runs the model on data" in found["notes"][-1]
    assert "Nothing was steered" in runner.export_results(tmp_path).read_text()


def test_arrays_by_layer_are_rows(captured: SimpleNamespace) -> None:
    runner, values = runner_of(captured, "neuron"), captured.arrays[0][RESID]
    plain = runner.run_mechint_eval(hidden_shards_path={RESID: ArrayRows(values, RESID)})["analyses"]
    assert set(plain["neuron"]) == {RESID}
    assert "error" not in plain["neuron"][RESID]
    for given in (values, mx.array(values)):
        assert runner.run_mechint_eval(hidden_shards_path={RESID: given})["analyses"] == plain
    narrow = runner.run_mechint_eval(hidden_shards_path={"x": mx.ones((4, 3), mx.bfloat16)})["analyses"]["neuron"]
    assert narrow["x"]["mean_activation"] == [1.0] * 3


@pytest.mark.parametrize("steps", [0, [], "0", "", [True], [0.0], ["0"], [None], {}])
def test_steps_are_whole_numbers(steps: Any, captured: SimpleNamespace) -> None:
    with pytest.raises(HookError, match="steps is a list of at least one training step, whole numbers; got ") as caught:
        runner_of(captured, "neuron").run_mechint_eval(steps=steps)
    assert caught.value.field == "steps"


def test_steps_may_be_numpys(captured: SimpleNamespace) -> None:
    runner = runner_of(captured, "neuron")
    assert runner.run_mechint_eval(steps=np.array([10])) == runner.run_mechint_eval(steps=[10])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hidden_shards_path": 5}, "a ShardReader, or rows or arrays by layer; got int"),
        ({"hidden_shards_path": []}, "a ShardReader, or rows or arrays by layer; got list"),
        ({"hidden_shards_path": np.zeros((3, 4))}, "a ShardReader, or rows or arrays by layer; got ndarray"),
        ({"hidden_shards_path": {RESID: [[1.0]]}}, f"for '{RESID}' it has list"),
        ({"checkpoint_path": 5}, "checkpoint_path is a file or a folder, got 5"),
    ],
)
def test_what_is_no_place_is_refused_in_a_sentence(
    given: dict[str, Any], message: str, captured: SimpleNamespace
) -> None:
    for model in (None, make_model("llama")):
        with pytest.raises(HookError, match=re.escape(message)) as caught:
            runner_of(captured, "neuron", model=model).run_mechint_eval(**given)
        assert caught.value.field == next(iter(given))


def test_one_analysis_over_steps_is_named_as_such(captured: SimpleNamespace) -> None:
    runner = runner_of(captured, "feature")
    assert runner.run_over_steps(analyses="neuron") == runner.run_over_steps(analyses=["neuron"])


def test_the_manifest_notes_what_was_analysed(captured: SimpleNamespace) -> None:
    before = len(ShardReader(captured.folder).description["analysis_history"])
    runner_of(captured, "neuron").run_mechint_eval()
    (note,) = ShardReader(captured.folder).description["analysis_history"][before:]
    assert note["analyses"] == ["neuron"]
    assert note["failed"] == []


def test_progress_is_shown_unless_it_is_not_wanted(
    captured: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    runner_of(captured, "neuron").run_mechint_eval()
    assert capsys.readouterr() == ("", "")
    runner_of(captured, "neuron", verbose=True).run_mechint_eval()
    out, err = capsys.readouterr()
    assert out == ""
    assert f"neuron {RESID}: 100%" in err


def test_only_the_rows_of_some_steps_are_analysed_if_asked(captured: SimpleNamespace, tmp_path: Path) -> None:
    runner = runner_of(captured, "neuron", sample_layers=[1])
    found = runner.run_mechint_eval(steps=[0, 20])["analyses"]["neuron"][RESID]
    together = np.concatenate([captured.arrays[step][RESID] for step in (0, 20)]).astype(np.float64)
    np.testing.assert_allclose(found["mean_activation"], together.mean(0), rtol=1e-6, atol=1e-8)
    runner.run_over_steps()
    text = runner.export_results(tmp_path).read_text()
    assert "Steps 0, 10, 20: 3 of them" in text
    assert "of the rows of steps 0, 20 together" in text
    with pytest.warns(FailedAnalysisWarning, match="Step 7 was not captured. Steps: 0, 10, 20"):
        runner.run_mechint_eval(steps=[7])
    with pytest.raises(HookError, match="Step 7 was not captured") as caught:
        EvalContext(reader=ShardReader(captured.folder), steps=(7,)).rows_of(1)
    assert caught.value.field == "steps"


def test_sentences_say_what_the_numbers_are_of(captured: SimpleNamespace) -> None:
    runner = runner_of(captured, "sae", "causal", model=weights_at(20), sample_layers=[1])
    analyses = runner.run_mechint_eval(eval_data=TEXTS, steps=[20])["analyses"]
    assert "per predicted token (15 of them)" in findings("sae", analyses["sae"][RESID])[1]
    assert "per predicted token, on 3 examples" in findings("causal", analyses["causal"])[0]
    told = findings("sae", analyses["sae"][RESID] | {"fvu": None, "notes": ["few rows"]})
    assert re.fullmatch(
        r"the \d+ held-out rows do not vary, so how much is read back cannot be told; .* per token\.", told[0]
    )
    assert told[-1] == "few rows"


# Over steps


def test_at_every_step_the_numbers_are_those_of_its_rows(captured: SimpleNamespace) -> None:
    runner = runner_of(captured, "neuron", "feature", "heads", "causal")
    curves = runner.run_over_steps()
    assert curves["steps"] == list(STEPS)
    # There is no model: its analyses are left out.
    assert list(curves["analyses"]) == ["neuron", "feature", "heads"]
    found = curves["analyses"]["neuron"][MLP]
    for i, step in enumerate(STEPS):
        own = captured.arrays[step][MLP].astype(np.float64)
        assert abs(found["mean_activation"][i] - own.mean()) < 1e-7
        assert abs(found["firing_rate"][i] - (own > 0).mean()) < 1e-12
    assert len(set(found["mean_activation"])) == 3
    assert list(curves["analyses"]["heads"]) == [PATTERN]
    assert runner_of(captured).run_over_steps(analyses=["neuron"])["analyses"]["neuron"] == curves["analyses"]["neuron"]


def test_the_model_runs_with_the_weights_of_each_checkpoint_and_keeps_its_own(captured: SimpleNamespace) -> None:
    module = make_model("llama", seed=99)
    plain = module(mx.array(TEXTS))
    runner = runner_of(captured, "causal", "neuron", model=module)
    folder = captured.checkpoints[0].parent
    curves = runner.run_over_steps(checkpoints=folder, eval_data=TEXTS)
    assert curves == runner.run_over_steps(checkpoints=captured.checkpoints, eval_data=iter(TEXTS))
    losses = curves["analyses"]["causal"]["model"]["loss"]
    for step, loss in zip(STEPS, losses, strict=True):
        single = runner_of(captured, "causal", model=weights_at(step)).run_mechint_eval(eval_data=TEXTS)
        assert abs(loss - single["analyses"]["causal"]["plain"]["loss"]["mean"]) < 1e-6
    assert mx.array_equal(module(mx.array(TEXTS)), plain).item()
    # Checkpoints of other steps than were captured: each has its numbers where they are.
    between = {5: captured.checkpoints[10]}
    other = runner.run_over_steps(analyses=["neuron", "causal"], checkpoints=between, eval_data=TEXTS)
    assert other["steps"] == [0, 5, 10, 20]
    assert [loss is None for loss in other["analyses"]["causal"]["model"]["loss"]] == [True, False, True, True]
    assert other["analyses"]["neuron"][MLP]["mean_activation"][1] is None


def test_autoencoders_of_steps_are_not_put_into_the_model_of_now(
    captured: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def seen(rows: Any, options: Any, progress: Any, model: Any, spell: Any, eval_data: Any) -> dict[str, Any]:
        given.append((model is not None, eval_data is not None))
        return plain(rows, options, progress, model, spell, eval_data)

    plain = registry.analyse_sae
    monkeypatch.setattr(registry, "analyse_sae", seen)
    runner = runner_of(captured, "sae", "causal", model=weights_at(20), sample_layers=[1])
    assert "loss_recovered" in runner.run_mechint_eval(eval_data=TEXTS)["analyses"]["sae"][RESID]
    curves = runner.run_over_steps(analyses=["sae"], eval_data=TEXTS)
    assert "fvu" in curves["analyses"]["sae"][RESID]
    assert "loss_recovered" not in curves["analyses"]["sae"][RESID]
    assert given == [(True, True), *[(False, False)] * len(STEPS)]


def test_a_broken_checkpoint_leaves_a_gap(captured: SimpleNamespace, tmp_path: Path) -> None:
    module = make_model("llama", seed=99)
    plain = module(mx.array(TEXTS))
    runner = runner_of(captured, "causal", "neuron", model=module)
    whole = runner.run_over_steps(checkpoints=captured.checkpoints, eval_data=TEXTS)
    cut_off = tmp_path / "0000010_adapters.safetensors"
    cut_off.write_bytes(captured.checkpoints[10].read_bytes()[:1000])
    with pytest.warns(FailedAnalysisWarning, match="checkpoint of step 10 is left out: cannot read .*0000010_adapters"):
        found = runner.run_over_steps(checkpoints=captured.checkpoints | {10: cut_off}, eval_data=TEXTS)
    losses = whole["analyses"]["causal"]["model"]["loss"]
    assert found["analyses"]["causal"]["model"]["loss"] == [losses[0], None, losses[2]]
    assert found["analyses"]["neuron"] == whole["analyses"]["neuron"]
    assert mx.array_equal(module(mx.array(TEXTS)), plain).item()
    with pytest.warns(FailedAnalysisWarning, match="step 10 is left out"):
        found = runner.run_over_steps(analyses=["causal"], checkpoints={10: cut_off}, eval_data=TEXTS)
    assert "cannot read" in found["analyses"]["causal"]["model"]["error"]


def test_labels_of_all_rows_are_those_of_each_step(captured: SimpleNamespace) -> None:
    lengths = [len(captured.arrays[step][RESID]) for step in STEPS]
    labels = np.concatenate([captured.arrays[step][RESID][:, 0] > 0 for step in STEPS]).tolist()
    options = {"probe": {"controls": 1, "resamples": 100}}
    runner = runner_of(captured, "probe", sample_layers=[1], analysis_options=options)
    with pytest.raises(HookError, match="'probe' over training steps needs labels"):
        runner.run_over_steps(analyses=["probe"])
    with pytest.raises(HookError, match="None of probe can be made"):
        runner.run_over_steps()
    runner.labels = labels
    accuracies = runner.run_over_steps()["analyses"]["probe"][RESID]["accuracy"]
    for step, start, length, accuracy in zip(STEPS, np.cumsum([0, *lengths]), lengths, accuracies, strict=False):
        runner.labels = labels[start : start + length]
        single = runner.run_mechint_eval(steps=[step])["analyses"]["probe"][RESID]
        assert single["accuracy"]["mean"] == accuracy
    assert min(accuracies) > 0.7
    # Those of one step are not labels of every step: this is told before anything runs.
    with pytest.raises(HookError, match=f"one per captured row: {sum(lengths)}, got {lengths[-1]}") as caught:
        runner.run_over_steps()
    assert caught.value.field == "labels"


def test_what_fails_at_a_step_leaves_a_gap(captured: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = registry.analyse_neurons

    def fails_at_10(rows: Any, *more: Any) -> dict[str, Any]:
        if rows.name == MLP or rows.take(np.array([0])).step == [10]:
            raise HookError("no")
        return plain(rows, *more)

    monkeypatch.setattr(registry, "analyse_neurons", fails_at_10)
    runner = runner_of(captured, "neuron")
    with pytest.warns(FailedAnalysisWarning, match="failed: no"):
        found = runner.run_over_steps()["analyses"]["neuron"]
    assert [value is None for value in found[RESID]["mean_activation"]] == [False, True, False]
    assert found[MLP] == {"error": "no"}
    assert (
        f"- `neuron` of `{MLP}`, over the steps: no"
        in runner.export_results(captured.folder.parent / "gap").read_text()
    )


def test_curves_that_cannot_be_made_are_refused(captured: SimpleNamespace, tmp_path: Path) -> None:
    model = make_model("llama")
    runner = runner_of(captured, "causal", model=model)
    with pytest.raises(HookError, match="None of causal can be made at each step"):
        runner.run_over_steps()
    with pytest.raises(HookError, match="with the weights of each step: give checkpoints"):
        runner.run_over_steps(analyses=["causal"])
    with pytest.raises(HookError, match="runs the model on data: give eval_data"):
        runner.run_over_steps(analyses=["causal"], checkpoints=captured.checkpoints)
    rows = {"mine": ArrayRows(np.eye(5), "mine")}
    with pytest.raises(HookError, match="needs shards of at least one step"):
        runner.run_over_steps(rows, analyses=["neuron"])
    with pytest.raises(HookError, match="no numbered checkpoint"):
        runner.run_over_steps(analyses=["causal"], checkpoints=tmp_path, eval_data=TEXTS)


# Export


@pytest.fixture(scope="module")
def evaluated(captured: SimpleNamespace) -> EvalMechIntRunner:
    """A runner with results of all kinds."""
    config = MechIntConfig(
        **QUIET
        | {
            "analyses_to_run": ["sae", "neuron", "feature", "heads", "causal", "circuit"],
            "storage_path": captured.folder,
        }
    )
    runner = EvalMechIntRunner(make_model("llama"), config, tokenizer=Letters())
    runner.run_mechint_eval(eval_data=TEXTS)
    runner.run_over_steps(analyses=["neuron", "heads"])
    return runner


def test_the_export_is_what_was_found(evaluated: EvalMechIntRunner, tmp_path: Path) -> None:
    report = evaluated.export_results(tmp_path / "new" / "results")
    assert report == tmp_path / "new" / "results" / "mechint_report.md"
    document = json.loads((report.parent / "mechint_results.json").read_text(), parse_constant=pytest.fail)
    assert evaluated.results is not None
    assert {key: document[key] for key in ("config", "analyses")} == evaluated.results
    assert document["curves"] == evaluated.curves
    assert document["captured"]["layers"][RESID]["rows"] == len(evaluated.load_activations()[RESID])
    text = report.read_text()
    drawn = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert (
        sorted(drawn)
        == sorted(document["pictures"])
        == sorted(f"pictures/{path.name}" for path in (report.parent / "pictures").iterdir())
    )
    assert len(drawn) > 10
    for path in drawn:
        picture = (report.parent / path).read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) > 3_000
    for heading in ("In short", "What was captured", "Sparse autoencoders", "Neurons", "While it was trained", "Files"):
        assert f"\n## {heading}\n" in text
    assert "What failed" not in text
    scores = document["curves"]["analyses"]["heads"][PATTERN]["induction"]
    course = f"best induction score (share) from {scores[0]:.4g} to {scores[-1]:.4g}."
    assert f"- **Attention heads** at `{PATTERN}`, while training: {course}" in text
    assert f"{document['analyses']['sae'][RESID]['fvu']:.4g}" in text
    # Every row of a table has as many cells as its head, whatever the tokens are.
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1
    assert r"'\|a\*\\n'" in text


def test_exported_autoencoders_are_those_that_were_trained(
    evaluated: EvalMechIntRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pictures take their time.
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report = evaluated.export_results(tmp_path)
    assert {path.name for path in (tmp_path / "sae").iterdir()} == {RESID, MLP}
    sae = SparseAutoencoder.load(tmp_path / "sae" / RESID)
    rows = evaluated.load_activations()[RESID]
    assert sae.d_in == rows.width
    assert sae.hook_name == RESID
    # The same training holds out the same rows, of which the result tells.
    values = rows.take(train_sae(rows, QUIET["analysis_options"]["sae"]).held_out).values
    read_back = np.array(sae.decode(sae.encode(mx.array(values))))
    fvu = np.square(values - read_back).sum() / np.square(values - values.mean(0)).sum()
    assert evaluated.results is not None
    assert abs(fvu - evaluated.results["analyses"]["sae"][RESID]["fvu"]) < 1e-3
    made = evaluated._made / "sae" / RESID / "sae_weights.safetensors"
    assert (tmp_path / "sae" / RESID / made.name).read_bytes() == made.read_bytes()
    assert f"`sae/{RESID}/`" in report.read_text()


def test_curves_leave_the_autoencoders_of_the_results(captured: SimpleNamespace) -> None:
    runner = runner_of(captured, "sae", sample_layers=[1])
    runner.run_mechint_eval()
    weights = runner._made / "sae" / RESID / "sae_weights.safetensors"
    before = weights.read_bytes()
    curves = runner.run_over_steps()
    assert all(0 <= rate <= 1 for rate in curves["analyses"]["sae"][RESID]["final_l0"])
    assert weights.read_bytes() == before


def test_autoencoders_of_an_earlier_run_are_not_exported(captured: SimpleNamespace, tmp_path: Path) -> None:
    runner = runner_of(captured, "sae")
    runner.run_mechint_eval()
    assert {path.name for path in (runner._made / "sae").iterdir()} == {RESID, MLP}
    runner.config = MechIntConfig.of(runner.config.to_dict() | {"sample_layers": [1]})
    runner.run_mechint_eval()
    runner.export_results(tmp_path)
    assert {path.name for path in (tmp_path / "sae").iterdir()} == {RESID}


def test_an_export_replaces_an_earlier_one_and_nothing_else(evaluated: EvalMechIntRunner, tmp_path: Path) -> None:
    light = EvalMechIntRunner(config=QUIET)
    light.context, light.curves = evaluated.context, evaluated.curves
    light.export_results(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "pictures" / "mine.png").write_bytes(b"mine")
    results = tmp_path / "mechint_results.json"
    document = json.loads(results.read_text())
    stale = tmp_path / "pictures" / "gone.png"
    stale.write_bytes(b"old")
    document["pictures"] += ["pictures/gone.png", "pictures/../notes.txt", "../notes.txt"]
    results.write_text(json.dumps(document))
    light.export_results(tmp_path)
    assert not stale.exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "pictures" / "mine.png").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("mechint_results.json", "{}", "holds no results of ours"),
        ("mechint_results.json", "[1", "holds no results of ours"),
        ("mechint_results.json", '{"format": "other"}', "is of another format"),
        ("mechint_report.md", "# My report", "is no report of ours"),
    ],
)
def test_files_of_another_kind_are_left_alone(
    evaluated: EvalMechIntRunner, tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(HookError, match=message):
        evaluated.export_results(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == content


def test_a_folder_that_cannot_be_written_is_told(evaluated: EvalMechIntRunner, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HookError, match="Not a directory"):
        evaluated.export_results(tmp_path / "file" / "results")


def test_without_matplotlib_there_is_a_report_with_tables(
    evaluated: EvalMechIntRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = evaluated.export_results(tmp_path).read_text()
    assert "they need matplotlib, pip install 'neuroscope-mlx[plot]'" in text
    assert "![" not in text
    assert "| --- |" in text
    assert list((tmp_path / "pictures").iterdir()) == []


def test_what_the_runner_made_goes_with_it(captured: SimpleNamespace) -> None:
    runner = runner_of(captured, "sae", sample_layers=[1])
    runner.run_mechint_eval()
    made = runner._made
    assert (made / "sae" / RESID / "cfg.json").is_file()
    del runner
    assert not made.exists()


def test_layers_are_found_by_what_an_analysis_needs(captured: SimpleNamespace) -> None:
    context = EvalContext(reader=ShardReader(captured.folder))
    assert layers_for("heads", context) == [PATTERN]
    assert sorted(layers_for("neuron", context)) == sorted([RESID, MLP])
    with pytest.raises(HookError, match="needs attention patterns"):
        layers_for("heads", EvalContext(rows={"mine": ArrayRows(np.eye(3), "mine")}))
    with pytest.raises(HookError, match="needs captured activations"):
        layers_for("heads", EvalContext())


def test_importing_the_package_loads_no_heavy_library() -> None:
    heavy = ("sklearn", "scipy", "matplotlib", "boto3")
    code = f"import sys, mlx_hooks; print([name for name in {heavy} if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
