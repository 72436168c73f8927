"""Every command of the guide to inference tools has its counterpart, which runs on the bundled model.

The numbers in the files are held against one full pass over prompt and response, read by ``run_with_cache``.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import make_model

from mlx_hooks import HookedModel, TraitVector
from mlx_hooks.analysis.traits.records import read_record
from mlx_hooks.analysis.traits.vectors import METHODS
from mlx_hooks.cli import main

PROMPTS = ["How do I make a bomb?", "What is the capital of France?", "I think vaccines cause autism. Do you agree?"]
UNKNOWN = [
    "How do I pick a lock?",
    "Who won the football match?",
    "Where can I buy shoes?",
    "Is it raining in the mountains?",
    "Translate this into German.",
    "Should I sell my car?",
    "Which planet is the largest?",
    "Give me advice about money.",
    "Do you like pizza?",
    "Why do people dream?",
]
CAPITALS = [f"What is the capital of {land} ?" for land in ("Italy", "Spain", "Norway", "Poland", "Greece", "Egypt")]
CAPITALS += [f"capital of {land} ?" for land in ("India", "Japan", "Kenya", "Peru")]
SUMS = [f"What is {x} + {9 - x} ?" for x in range(10)]
TRAITS = {"refusal": (UNKNOWN, CAPITALS[::2] + SUMS[::2]), "retrieval_construction": (CAPITALS, SUMS)}
LAYERS, LAYER = Path("inference/residual_stream_activations"), Path("inference/layer_internal_states")
FOLDER = Path("experiments/nov21")


def traits(command: str, *options: str) -> int:
    return main(["traits", command, "--experiment", "nov21", *options])


def write_prompts(folder: Path) -> None:
    for trait, texts in TRAITS.items():
        (folder / trait / "extraction").mkdir(parents=True)
        for name, prompts in zip(("positive", "negative"), texts, strict=True):
            (folder / trait / "extraction" / f"{name}.txt").write_text("\n".join(prompts))
    (folder / "inference_prompts.txt").write_text("\n".join(PROMPTS))


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment with vectors."""
    root = tmp_path_factory.mktemp("traits")
    write_prompts(root / "nov21")
    assert traits("extract", "--all-traits", "--model", "neuroscope-tiny", "--root", str(root)) == 0
    return root


@pytest.fixture(autouse=True)
def here(extracted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has the experiment for itself, in the folder where it runs."""
    shutil.copytree(extracted, tmp_path / "experiments")
    monkeypatch.chdir(tmp_path)


def whole_pass(model: HookedModel, record: dict[str, Any]) -> Any:
    """The activations of prompt and response in one pass."""
    return model.run_with_cache([*record["prompt"]["token_ids"], *record["response"]["token_ids"]])[1]


def chosen(trait: str, method: str = "probe") -> TraitVector:
    """The vector that has to be taken: the best on held-out prompts, of equals the one with the larger effect size."""
    found = [TraitVector.load(path) for path in (FOLDER / trait / "extraction/vectors").glob(f"{method}_*")]
    return max(found, key=lambda v: (v.metadata["held_out_accuracy"], v.metadata["effect_size"], -v.layer))


def check_layers(model: HookedModel, trait: str, index: int, prompt: str) -> dict[str, Any]:
    """A file of all layers has what one full pass has; answers its record."""
    path = FOLDER / trait / LAYERS / f"prompt_{index}.safetensors"
    record, vector = read_record(path), chosen(trait)
    assert record["prompt"]["text"] == prompt
    n_prompt, n_response = (record[part]["n_tokens"] for part in ("prompt", "response"))
    assert record["prompt"]["tokens"][0].strip() == "<bos>"
    assert record["prompt"]["tokens"][-1].strip() == "<|assistant|>"
    cache = whole_pass(model, record)
    unit = vector.vector.astype(np.float64) / vector.norm
    points = ("resid_pre", "resid_mid", "resid_post")
    streams = [[cache.numpy((point, layer))[0].astype(np.float64) @ unit for point in points] for layer in range(4)]
    whole = np.transpose(streams, (2, 0, 1))
    for part, rows in (("prompt", slice(n_prompt)), ("response", slice(n_prompt, None))):
        projections = record["projections"][part]
        assert projections.shape == (record[part]["n_tokens"], 4, 3)
        np.testing.assert_allclose(projections, whole[rows], atol=1e-4)
    for layer in range(4):
        pattern = cache.numpy(("pattern", layer))[0].mean(0)
        attended = record["attention_weights"]
        np.testing.assert_allclose(attended["prompt"][f"layer_{layer}"], pattern[:n_prompt, :n_prompt], atol=1e-5)
        for k in range(n_response):
            row = attended["response"][k][f"layer_{layer}"]
            np.testing.assert_allclose(row, pattern[n_prompt + k, : n_prompt + k + 1], atol=1e-5)
    about = record["metadata"]
    expected = {"trait": trait, "layer": vector.layer, "method": "probe", "temperature": 0.7, "alignment": "at"}
    assert {key: about[key] for key in expected} == expected
    assert about["vector_path"] == f"../{trait}/extraction/vectors/{vector.name}.safetensors"
    return record


def same_as_json(record: dict[str, Any], path: Path) -> None:
    """The JSON beside a file has the same keys and numbers."""

    def compare(value: Any, plain: Any, place: str) -> None:
        if isinstance(value, dict):
            assert list(value) == list(plain), place
            for key in value:
                compare(value[key], plain[key], f"{place}/{key}")
        elif isinstance(value, list):
            assert len(value) == len(plain), place
            for i, (one, other) in enumerate(zip(value, plain, strict=True)):
                compare(one, other, f"{place}/{i}")
        elif isinstance(value, np.ndarray):
            np.testing.assert_array_equal(value, np.array(plain, value.dtype), err_msg=place)
        else:
            assert value == plain, place

    compare(record, json.loads(path.read_text()), path.stem)


# Vectors.


def test_extract_and_list(capsys: pytest.CaptureFixture) -> None:
    for trait in TRAITS:
        names = {path.name for path in (FOLDER / trait / "extraction/vectors").iterdir()}
        assert names == {f"{method}_layer{layer}.safetensors" for method in METHODS for layer in range(4)}
    assert traits("list") == 0
    shown = capsys.readouterr().out
    for trait in TRAITS:
        assert f"{chosen(trait).name} is taken" in shown.split(f"\n{trait} ")[1]
    assert traits("extract", "--all-traits", "--model", "neuroscope-tiny", "--skip-existing") == 0
    assert "2 skipped" in capsys.readouterr().out


# capture_all_layers.py


def test_all_traits_on_the_shared_prompts(tiny: HookedModel, capsys: pytest.CaptureFixture) -> None:
    command = ("capture-layers", "--all-traits", "--save-json", "--skip-existing")
    assert traits(*command) == 0
    assert "6 done, 0 skipped, 0 failed" in capsys.readouterr().out
    for index, prompt in enumerate(PROMPTS):
        records = [check_layers(tiny, trait, index, prompt) for trait in TRAITS]
        # One run serves both traits.
        assert records[0]["response"] == records[1]["response"]
        for trait, record in zip(TRAITS, records, strict=True):
            same_as_json(record, FOLDER / trait / LAYERS / f"prompt_{index}.json")
    keys = {"prompt", "response", "projections", "attention_weights", "metadata"}
    assert keys <= set(records[0])
    assert set(records[0]["prompt"]) == set(records[0]["response"]) == {"text", "tokens", "token_ids", "n_tokens"}

    files = sorted(FOLDER.rglob("prompt_*"))
    before = [(path, path.read_bytes()) for path in files]
    assert len(files) == 12
    (FOLDER / "refusal" / LAYERS / "prompt_1.json").unlink()
    assert traits(*command) == 0
    assert "0 done, 6 skipped, 0 failed" in capsys.readouterr().out
    # What was skipped is as it was; JSON that was missing is made of what there is.
    assert [(path, path.read_bytes()) for path in sorted(FOLDER.rglob("prompt_*"))] == before


def test_one_trait_on_prompts_of_its_own(tiny: HookedModel, capsys: pytest.CaptureFixture) -> None:
    Path("custom_prompts.txt").write_text("Who wrote this book?\n\nWhat is the capital of Cuba ?\n")
    for spelled in ("--prompts-file", "--prompts_file"):
        assert traits("capture-layers", "--trait", "refusal", spelled, "custom_prompts.txt", "--save-json") == 0
        assert "2 done, 0 skipped, 0 failed" in capsys.readouterr().out
    check_layers(tiny, "refusal", 0, "Who wrote this book?")
    record = check_layers(tiny, "refusal", 1, "What is the capital of Cuba ?")
    same_as_json(record, FOLDER / "refusal" / LAYERS / "prompt_1.json")
    assert not (FOLDER / "retrieval_construction" / LAYERS).exists()
    # The model refuses the one and answers the other.
    scores = [
        read_record(FOLDER / "refusal" / LAYERS / f"prompt_{i}.safetensors")["projections"]["prompt"][-1, 3, 2]
        for i in (0, 1)
    ]
    assert scores[0] > scores[1] + 0.5


def test_other_prompts_do_not_replace_a_capture_by_accident(capsys: pytest.CaptureFixture) -> None:
    command = ("capture-layers", "--trait", "refusal", "--max-tokens", "2", "--prompts")
    assert traits(*command, PROMPTS[0]) == 0
    path = FOLDER / "refusal" / LAYERS / "prompt_0.safetensors"
    before = path.read_bytes()
    assert traits(*command, PROMPTS[1]) == 1
    assert "1 failed" in capsys.readouterr().out
    assert path.read_bytes() == before
    assert traits(*command, PROMPTS[1], "--overwrite") == 0
    assert read_record(path)["prompt"]["text"] == PROMPTS[1]


def test_rows_that_predict_are_those_of_the_token_before(tiny: HookedModel) -> None:
    command = ("capture-layers", "--trait", "refusal", "--prompts", PROMPTS[1], "--overwrite")
    path = FOLDER / "refusal" / LAYERS / "prompt_0.safetensors"
    found = {}
    for alignment in ("at", "predicts"):
        assert traits(*command, "--alignment", alignment) == 0
        found[alignment] = read_record(path)
        assert found[alignment]["metadata"]["alignment"] == alignment
        assert main(["traits", "verify-format", str(path)]) == 0
    at, predicts = (found[alignment]["projections"]["response"] for alignment in ("at", "predicts"))
    np.testing.assert_allclose(predicts[1:], at[:-1], atol=1e-5)
    np.testing.assert_allclose(predicts[0], found["at"]["projections"]["prompt"][-1], atol=1e-5)
    assert np.abs(predicts - at).max() > 0.1


# verify_all_layers_format.py


def test_verify_format_passes_what_is_right_and_names_what_is_wrong(capsys: pytest.CaptureFixture) -> None:
    assert traits("capture-layers", "--trait", "refusal", "--prompts", PROMPTS[0], "--save-json") == 0
    path = FOLDER / "refusal" / LAYERS / "prompt_0.safetensors"
    assert main(["traits", "verify-format", str(path)]) == 0
    assert str(path) in capsys.readouterr().out
    beside = path.with_suffix(".json")
    plain = json.loads(beside.read_text())
    plain["projections"]["prompt"][0][0][0] += 1
    beside.write_text(json.dumps(plain))
    assert main(["traits", "verify-format", str(path)]) == 1
    assert "projections" in capsys.readouterr().out
    cut = Path("cut.safetensors")
    cut.write_bytes(path.read_bytes()[:-100])
    assert main(["traits", "verify-format", str(cut), "missing.safetensors"]) == 1
    shown = capsys.readouterr().out
    assert "cut.safetensors" in shown
    assert "missing.safetensors" in shown


# capture_single_layer.py


def test_one_layer_of_one_trait_and_then_of_all(tiny: HookedModel, capsys: pytest.CaptureFixture) -> None:
    prompts = ("--layer", "2", "--prompts", PROMPTS[0], "--save-json")
    assert traits("capture-layer", "--trait", "refusal", *prompts) == 0
    assert "1 done, 0 skipped, 0 failed" in capsys.readouterr().out
    assert traits("capture-layer", "--all-traits", *prompts, "--skip-existing") == 0
    assert "1 done, 1 skipped, 0 failed" in capsys.readouterr().out
    for trait in TRAITS:
        path = FOLDER / trait / LAYER / "prompt_0_layer2.safetensors"
        assert main(["traits", "verify-format", str(path)]) == 0
        record = read_record(path)
        same_as_json(record, path.with_suffix(".json"))
        assert record["layer"] == record["metadata"]["layer"] == 2
        cache = whole_pass(tiny, record)
        n_prompt = record["prompt"]["n_tokens"]
        points = {
            ("attention", "q_proj"): "attn.hook_q",
            ("attention", "k_proj"): "attn.hook_k",
            ("attention", "v_proj"): "attn.hook_v",
            ("mlp", "gate_proj"): "mlp.hook_pre",
            ("mlp", "up_proj"): "mlp.hook_pre_linear",
            ("mlp", "activated"): "mlp.hook_post",
            ("mlp", "gelu"): "mlp.hook_post",
            ("mlp", "down_proj"): "hook_mlp_out",
            ("residual", "input"): "hook_resid_pre",
            ("residual", "after_attn"): "hook_resid_mid",
            ("residual", "output"): "hook_resid_post",
        }
        for (part, name), point in points.items():
            whole = cache.numpy(f"blocks.2.{point}")[0]
            whole = whole.reshape(len(whole), -1)  # heads side by side
            for said, rows in (("prompt", slice(n_prompt)), ("response", slice(n_prompt, None))):
                found = record["internals"][said][part][name]
                np.testing.assert_allclose(found, whole[rows], atol=1e-4, err_msg=f"{said} {name}")
        pattern = cache.numpy("blocks.2.attn.hook_pattern")[0]
        attends = record["internals"]["prompt"]["attention"]["attn_weights"]
        np.testing.assert_allclose(attends, pattern[:, :n_prompt, :n_prompt], atol=1e-5)
        for k, row in enumerate(record["internals"]["response"]["attention"]["attn_weights"]):
            np.testing.assert_allclose(row, pattern[:, n_prompt + k, : n_prompt + k + 1], atol=1e-5)


# monitor_dynamics.py


def dynamics_files() -> list[Path]:
    return sorted((FOLDER / "inference/dynamics").glob("*.json"))


def test_dynamics_of_a_single_prompt(tiny: HookedModel, capsys: pytest.CaptureFixture) -> None:
    for count in (1, 2):  # never over an earlier one
        assert traits("dynamics", "--prompts", PROMPTS[1]) == 0
        assert len(dynamics_files()) == count
    shown = capsys.readouterr().out
    (result,) = json.loads(dynamics_files()[0].read_text())["results"]
    cache = whole_pass(tiny, result)
    for trait in TRAITS:
        assert trait in shown
        vector, (found,) = chosen(trait), result["traits"][trait].values()
        assert found["layer"] == vector.layer
        whole = vector.score(cache.numpy(vector.hook_point)[0])
        scores = np.array(found["scores"]["response"])
        np.testing.assert_allclose(scores, whole[result["prompt"]["n_tokens"] :], atol=1e-4)
        np.testing.assert_allclose(found["scores"]["prompt"], whole[: result["prompt"]["n_tokens"]], atol=1e-4)
        dynamics = found["dynamics"]
        np.testing.assert_allclose(dynamics["velocity"], np.diff(scores), atol=1e-9)
        np.testing.assert_allclose(dynamics["acceleration"], np.diff(scores, 2), atol=1e-9)
        below = np.flatnonzero(np.abs(np.diff(scores, 2)) < 0.1)
        assert dynamics["commitment_point"] == (int(below[0]) if below.size else None)
        assert dynamics["peak"]["index"] == np.abs(scores).argmax()


def test_dynamics_of_chosen_traits_and_methods_on_prompts_of_a_file() -> None:
    Path("prompts.txt").write_text("\n".join(PROMPTS[:2]))
    chosen_ones = ("--traits", "retrieval_construction,refusal", "--methods", "probe,ica")
    written = ("--output", "dynamics.json", "--html", "dynamics.html")
    assert traits("dynamics", *chosen_ones, "--prompts_file", "prompts.txt", *written) == 0
    assert not dynamics_files()
    results = json.loads(Path("dynamics.json").read_text())["results"]
    assert [result["prompt"]["text"] for result in results] == PROMPTS[:2]
    for result in results:
        for trait in TRAITS:
            assert list(result["traits"][trait]) == ["probe", "ica"]
            assert result["traits"][trait]["ica"]["layer"] == chosen(trait, "ica").layer
    page = Path("dynamics.html").read_text()
    assert all(prompt in page for prompt in PROMPTS[:2])
    assert "<script" not in page


# Steering and plots.


def test_steering_shows_the_shift_that_it_has_to_be(capsys: pytest.CaptureFixture) -> None:
    vector = chosen("refusal", "mean_diff")
    command = ("steer", "--trait", "refusal", "--prompt", PROMPTS[1], "--coefficients=-1,0,0.5")
    assert traits(*command, "--method", "mean_diff", "--max-tokens", "5", "--json", "steered.json") == 0
    assert "Paris" in capsys.readouterr().out
    plain = json.loads(Path("steered.json").read_text())
    assert [run["coefficient"] for run in plain["runs"]] == [-1, 0, 0.5]
    for run in plain["runs"]:
        (measured,) = run["measured"]
        assert measured["forced_shift"] == pytest.approx(run["coefficient"] * vector.norm, abs=1e-4)


def test_plots_are_made_of_what_the_other_commands_wrote() -> None:
    pytest.importorskip("matplotlib")
    assert traits("capture-layers", "--trait", "refusal", "--prompts", PROMPTS[1], "--max-tokens", "4") == 0
    captured = FOLDER / "refusal" / LAYERS / "prompt_0.safetensors"
    assert traits("dynamics", "--prompts", PROMPTS[1], "--output", "dynamics.json") == 0
    for source in (str(captured), "dynamics.json"):
        assert main(["traits", "plot", source, "--png", "chart.png", "--html", "chart.html"]) == 0
        assert Path("chart.png").read_bytes().startswith(b"\x89PNG")
        page = Path("chart.html").read_text()
        assert "France" in page
        assert not any(outside in page for outside in ("<script", "<link", "src="))


# Every option reaches what is written: each is set away from its default.

SAMPLING = ("--max-tokens", "4", "--temperature", "0.3", "--top-p", "0.8", "--seed", "7")
SAMPLED = {"max_tokens": 4, "temperature": 0.3, "top_p": 0.8, "seed": 7}


def metadata_has(about: dict[str, Any], **expected: Any) -> None:
    assert {key: about[key] for key in expected} == expected


def test_options_of_extract_reach_the_vectors() -> None:
    trait = "retrieval_construction"
    shutil.rmtree(FOLDER / trait / "extraction/vectors")
    options = ("--layers", "1,3", "--methods", "mean_diff", "--span", "response", "--held-out", "0.4")
    drawn = ("--no-chat", "--max-tokens", "2", "--seed", "7")
    command = ("extract", "--model", "neuroscope-tiny", "--trait", trait)
    digests = set()
    for changed in ((), ("--seed", "8"), ("--max-tokens", "3"), ("--chat",)):
        assert traits(*command, *options, *drawn, *changed, "--overwrite") == 0
        paths = sorted((FOLDER / trait / "extraction/vectors").iterdir())
        assert [path.stem for path in paths] == ["mean_diff_layer1", "mean_diff_layer3"]
        vector = TraitVector.load(paths[0])
        assert vector.chat is not None
        assert vector.chat.use is (changed == ("--chat",))
        metadata_has(vector.metadata, span="response", n_held_out_positive=4, n_positive=6)
        digests.add(vector.metadata["prompts"])
    assert len(digests) == 4


def test_each_layer_is_measured_along_its_own_vector(tiny: HookedModel) -> None:
    options = ("--method", "mean_diff", "--each-layer", "--no-attention", "--prefix", "own", *SAMPLING)
    assert traits("capture-layers", "--trait", "refusal", "--prompts", PROMPTS[1], *options) == 0
    record = read_record(FOLDER / "refusal" / LAYERS / "own_0.safetensors")
    about, cache = record["metadata"], whole_pass(tiny, record)
    metadata_has(about, each_layer=True, method="mean_diff", layer=None, attention="not captured", **SAMPLED)
    vectors = [
        TraitVector.load(FOLDER / f"refusal/extraction/vectors/mean_diff_layer{n}.safetensors") for n in range(4)
    ]
    for layer, vector in enumerate(vectors):
        along = cache.numpy(("resid_post", layer))[0].astype(np.float64) @ (vector.vector / vector.norm)
        found = np.concatenate([record["projections"][part][:, layer, 2] for part in ("prompt", "response")])
        np.testing.assert_allclose(found, along, atol=1e-4)


@pytest.mark.parametrize("command", ["capture-layers", "capture-layer"])
def test_the_vector_s_layer_and_method_are_those_that_were_asked_for(tiny: HookedModel, command: str) -> None:
    single = command == "capture-layer"
    option = ("--layer", "0", "--vector-layer", "3") if single else ("--layer", "3")
    asked = (*option, "--method", "ica", "--alignment", "predicts", "--prefix", "own", *SAMPLING)
    assert chosen("refusal").layer != 3
    assert traits(command, "--trait", "refusal", "--prompts", PROMPTS[1], *asked) == 0
    name = "own_0_layer0" if single else "own_0"
    record = read_record(FOLDER / "refusal" / (LAYER if single else LAYERS) / f"{name}.safetensors")
    metadata_has(record["metadata"], vector_layer=3, method="ica", alignment="predicts", **SAMPLED)
    vector = TraitVector.load(FOLDER / "refusal/extraction/vectors/ica_layer3.safetensors")
    assert record["metadata"]["vector_norm"] == pytest.approx(vector.norm)
    found = record["projections"]["prompt"]
    found = found["residual"][:, 2] if single else found[:, 0, 2]
    stream = whole_pass(tiny, record).numpy(("resid_post", 0))[0].astype(np.float64)
    np.testing.assert_allclose(found, (stream @ (vector.vector / vector.norm))[: len(found)], atol=1e-4)


def test_options_of_dynamics_reach_the_file() -> None:
    target = Path("dynamics.json")
    options = ("--layer", "2", "--threshold", "0.4", "--relative", "--stays-below", "--tokens", "all", *SAMPLING)
    assert traits("dynamics", "--all-traits", "--prompts", PROMPTS[1], *options, "--output", str(target)) == 0
    found = json.loads(target.read_text())
    metadata_has(found["metadata"], threshold=0.4, relative=True, stays_below=True, tokens="all", **SAMPLED)
    for trait in TRAITS:
        one = found["results"][0]["traits"][trait]["probe"]
        metadata_has(one["dynamics"], stays_below=True, relative=True, tokens="all")
        assert one["layer"] == 2
        scores = np.array([*one["scores"]["prompt"], *one["scores"]["response"]])
        sizes = np.abs(np.diff(scores, 2))
        below = sizes < 0.4 * sizes.max()
        last = np.flatnonzero(~below)[-1] + 1
        assert one["dynamics"]["commitment_point"] == (int(last) if last < len(below) else None)


def test_options_of_steer_reach_the_run() -> None:
    options = ("--method", "mean_diff", "--layer", "1", "--at-layer", "2", "--measure", "retrieval_construction")
    command = ("steer", "--trait", "refusal", "--prompt", PROMPTS[1], "--coefficients", "1", *options, *SAMPLING)
    found = {}
    for phase in ("prefill", "decode"):
        assert traits(*command, "--phase", phase, "--json", "steered.json") == 0
        found[phase] = json.loads(Path("steered.json").read_text())
        about = found[phase]["metadata"]
        metadata_has(about, layer=2, vector_layer=1, method="mean_diff", **SAMPLED)
        metadata_has(about["intervention"], hook_point="blocks.2.hook_resid_post", phase=phase)
        assert [one["trait"] for one in found[phase]["runs"][0]["measured"]] == ["retrieval_construction"]


@pytest.mark.parametrize("terminal", [False, True])
def test_bars_are_for_terminals(terminal: bool, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    one = ("--prompts", PROMPTS[1], "--max-tokens", "1")
    made = ("--model", "neuroscope-tiny", "--layers", "0", "--methods", "mean_diff")
    for command in (("extract", "--trait", "refusal", *made), ("capture-layers", "--trait", "refusal", *one)):
        assert traits(*command) == 0
        assert bool(capsys.readouterr().err) is terminal
    assert traits("dynamics", *one) == 0
    assert bool(capsys.readouterr().err) is terminal


# Bad input: a clear error, the rest of the batch done, nothing half-written.


def left_behind() -> set[str]:
    return {str(path) for path in Path().rglob("*") if path.is_file()}


def test_a_trait_without_vectors_does_not_stop_the_others(capsys: pytest.CaptureFixture) -> None:
    shutil.rmtree(FOLDER / "refusal/extraction/vectors")
    assert traits("capture-layers", "--all-traits", "--prompts", PROMPTS[0], "--max-tokens", "2") == 1
    shown = capsys.readouterr().out
    assert "1 done, 0 skipped, 1 failed" in shown
    assert "The trait refusal has no vectors" in shown
    assert (FOLDER / "retrieval_construction" / LAYERS / "prompt_0.safetensors").exists()
    assert not (FOLDER / "refusal/inference").exists()


@pytest.mark.parametrize("width", [128, 32])
def test_a_vector_of_another_model_or_width_fails_alone(width: int, capsys: pytest.CaptureFixture) -> None:
    shutil.rmtree(FOLDER / "refusal/extraction/vectors")
    sizes = {"hidden_size": width, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = {"model_type": "llama", "intermediate_size": 48, "rms_norm_eps": 1e-5, "vocab_size": 60, **sizes}
    other = HookedModel(make_model(config))
    from mlx_hooks.analysis.identity import ModelIdentity

    numbers = np.random.default_rng(0).normal(size=width)
    vector = TraitVector("refusal", 2, "probe", numbers, identity=ModelIdentity.of(other))
    vector.save(FOLDER / "refusal/extraction/vectors")
    command = ("--all-traits", "--model", "neuroscope-tiny", "--prompts", PROMPTS[0], "--max-tokens", "2")
    assert traits("capture-layers", *command) == 1
    shown = capsys.readouterr().out
    assert "1 done, 0 skipped, 1 failed" in shown
    assert ("another model" if width == 128 else "32 wide") in shown


def test_a_prompt_longer_than_the_context_fails_alone(tiny: HookedModel, capsys: pytest.CaptureFixture) -> None:
    long = "the " * (tiny.cfg.max_positions + 1)
    assert traits("capture-layers", "--trait", "refusal", "--prompts", long, PROMPTS[0], "--max-tokens", "2") == 1
    shown = capsys.readouterr().out
    assert "1 done, 0 skipped, 1 failed" in shown
    assert f"the model reads at most {tiny.cfg.max_positions}" in shown
    assert (FOLDER / "refusal" / LAYERS / "prompt_1.safetensors").exists()
    assert not (FOLDER / "refusal" / LAYERS / "prompt_0.safetensors").exists()


@pytest.mark.parametrize("command", [("capture-layers", "--all-traits"), ("dynamics",)])
def test_no_prompts_at_all_says_how_to_give_some(command: tuple[str, ...], capsys: pytest.CaptureFixture) -> None:
    (FOLDER / "inference_prompts.txt").unlink()
    assert traits(*command) == 1
    said = "There is no file experiments/nov21/inference_prompts.txt, which is read where neither --prompts nor"
    assert capsys.readouterr().err == f"neuroscope: {said} --prompts-file is given.\n"


def test_dynamics_tells_how_many_scores_there_are_and_what_failed(capsys: pytest.CaptureFixture) -> None:
    shutil.rmtree(FOLDER / "refusal/extraction/vectors")
    assert traits("dynamics", "--all-traits", "--max-tokens", "1") == 1
    assert capsys.readouterr().out.splitlines()[-1] == "3 done, 1 failed"
    assert traits("dynamics", "--traits", "refusal", "--max-tokens", "1") == 1
    assert capsys.readouterr().out == "0 done, 1 failed\n"


@pytest.mark.parametrize("command", ["capture-layers", "dynamics"])
def test_an_empty_prompt_file_is_an_error(command: str, capsys: pytest.CaptureFixture) -> None:
    Path("empty.txt").write_text("\n \n")
    before = left_behind()
    which = ("--trait", "refusal") if command == "capture-layers" else ()
    assert traits(command, *which, "--prompts-file", "empty.txt") == 1
    assert "empty.txt has no prompts" in capsys.readouterr().err
    assert left_behind() == before


def test_output_that_cannot_be_written_is_told(capsys: pytest.CaptureFixture) -> None:
    (FOLDER / "refusal/inference").write_text("a file where a folder has to be")
    before = left_behind()
    assert traits("capture-layers", "--all-traits", "--prompts", PROMPTS[0], "--max-tokens", "2") == 1
    shown = capsys.readouterr().out
    assert "1 done, 0 skipped, 1 failed" in shown
    assert "refusal" in shown.split("failed:")[1]
    assert {path for path in left_behind() - before if "/refusal/" in path} == set()
    assert traits("dynamics", "--prompts", PROMPTS[0], "--output", "no/such/folder/x.json") == 1
    assert "no/such/folder/x.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "rubbish.safetensors"), (b"\x80\x02}q\x00.", "pickle"), (b"not a capture at all", "rubbish.safetensors")],
)
def test_a_broken_file_is_no_capture(content: bytes, message: str, capsys: pytest.CaptureFixture) -> None:
    Path("rubbish.safetensors").write_bytes(content)
    assert main(["traits", "verify-format", "rubbish.safetensors"]) == 1
    assert message in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["capture-layers", "--experiment", "none", "--all-traits"], "There is no experiment 'none' in experiments"),
        (["capture-layers", "--experiment", "nov21", "--trait", "humour"], "has no trait 'humour'. There are: refusal"),
        (["capture-layer", "--experiment", "nov21", "--trait", "refusal", "--layer", "9"], "0 to 3"),
        (["dynamics", "--experiment", "nov21", "--traits", "humour"], "humour"),
        (["dynamics", "--experiment", "nov21", "--traits", "refusal", "--methods", "magic"], "magic"),
        (["steer", "--experiment", "nov21", "--trait", "refusal", "--prompt", "x", "--coefficients", "much"], "much"),
        (["plot", "nothing.json", "--html", "x.html"], "nothing.json"),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    before = left_behind()
    assert main(["traits", *arguments]) == 1
    shown = capsys.readouterr().err.strip().splitlines()
    assert message in shown[-1]
    assert [line for line in shown if line.startswith("neuroscope:")] == shown[-1:]
    assert left_behind() == before
