"""Steering moves a trait's score by what the coefficient says: along the vector, and on the very same words."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted_trait import PlantedTrait, marked

from mlx_hooks import HookedModel, HookError, TraitVector, steer
from mlx_hooks.analysis.identity import ModelIdentity
from mlx_hooks.analysis.traits.prompts import Chat, render
from mlx_hooks.cli import main
from mlx_hooks.coverage.models import tiny_model
from mlx_hooks.token_text import TokenText

STORY = "Write a story"
EXACT = PlantedTrait(noise=0)


class Words:
    """A tokenizer for models that have none: each letter is a token."""

    eos_token_ids: tuple[int, ...] = ()
    has_chat_template = False
    detokenizer: Any = None

    def encode(self, text: str, **_: Any) -> list[int]:
        return [ord(letter) % 50 for letter in text]

    def decode(self, tokens: list[int]) -> str:
        return "".join(chr(97 + token % 26) for token in tokens)


def vector(layer: int, d_model: int = 128, seed: int = 0, **more: Any) -> TraitVector:
    return TraitVector(f"t{seed}", layer, "given", np.random.default_rng(seed).normal(size=d_model) / 5, **more)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mamba2", "cohere", "qwen3_moe"])
def test_the_vector_moves_its_own_score_by_its_length_on_every_token(name: str) -> None:
    model = HookedModel(tiny_model(name), Words())
    along = vector(model.cfg.n_layers - 2, model.cfg.d_model, seed=3)
    found = steer(model, "some words", along, [-3, 0.5], max_tokens=5)
    for run in found:
        measured = run.measured[0]
        for part in ("prompt", "response"):
            moved = np.subtract(measured.forced_scores[part], found.baseline.measured[0].forced_scores[part])
            np.testing.assert_allclose(moved, run.coefficient * along.norm, atol=2e-3)
        # The dot product moves by a * |v|^2.
        assert measured.forced_shift * along.norm == pytest.approx(run.coefficient * along.norm**2, abs=2e-3)


def test_on_numbers_that_floats_hold_the_shift_is_exact() -> None:
    model = EXACT.hooked()
    along = TraitVector("marked", 2, "given", EXACT.direction)
    later, earlier = (TraitVector(str(layer), layer, "given", EXACT.direction) for layer in (3, 1))
    found = steer(
        model, marked("w7 w21 w3 w40", 1), along, [0, 0.5, -2], measured=[along, later, earlier], max_tokens=3
    )
    for run in found:
        expected = run.coefficient * along.norm
        assert [one.forced_shift for one in run.measured] == pytest.approx([expected, expected, 0], abs=1e-5)
        scores = run.measured[0].forced_scores["prompt"]
        np.testing.assert_allclose(scores, EXACT.scores(marked("w7 w21 w3 w40", 1), 2) + expected, atol=1e-5)


def test_runs_are_those_of_generate_and_scores_those_of_its_stream(tiny: HookedModel) -> None:
    along, other = vector(1), vector(3, seed=1)
    tokens = render(tiny, STORY)
    found = steer(tiny, STORY, along, [4, 0, -4], measured=[other, along], max_tokens=20, seed=7)
    assert [run.coefficient for run in found] == [4, 0, -4]
    assert len(found) == 3
    assert len({run.text for run in found}) == 3
    assert (found.prompt["text"], found.prompt["token_ids"]) == (STORY, tokens)
    still = found.baseline
    for run in found:
        edits = [along.intervention(run.coefficient)] if run.coefficient else []
        said = tiny.generate(tokens, max_tokens=20, temperature=0.7, top_p=0.9, seed=7, interventions=edits)
        assert (run.token_ids, run.text, run.finish_reason) == (said.tokens, said.text, said.finish_reason)
        assert run.tokens == [TokenText(tiny.tokenizer).text(token) for token in said.tokens]
        assert [receipt.positions[:3] for receipt in run.receipts] == ([(0, 1, 2)] if run.coefficient else [])
        for ids, name in ((run.token_ids, "scores"), (still.token_ids, "forced_scores")):
            points = [other.hook_point, along.hook_point]
            _, cache = tiny.run_with_cache([*tokens, *ids], points, interventions=edits)
            for one, measuring in zip(run.measured, (other, along), strict=True):
                stream = cache.numpy(measuring.hook_point)[0].astype(np.float64)
                expected = stream @ measuring.vector.astype(np.float64) / measuring.norm
                scores = getattr(one, name)
                np.testing.assert_allclose([*scores["prompt"], *scores["response"]], expected, atol=5e-4)
    for run in found:
        for one, base in zip(run.measured, still.measured, strict=True):
            assert one.mean_score == pytest.approx(np.mean(one.scores["response"]))
            assert one.shift == pytest.approx(one.mean_score - base.mean_score, abs=1e-9)
            moved = np.subtract(one.forced_scores["response"], base.forced_scores["response"])
            assert one.forced_shift == pytest.approx(moved.mean(), abs=1e-9)
    assert still.measured[0].shift == still.measured[0].forced_shift == 0


@pytest.mark.parametrize(
    ("place", "moved"),
    [
        ({}, range(60)),
        ({"phase": "prefill"}, range(6)),
        ({"phase": "decode"}, range(6, 60)),
        ({"positions": "last"}, range(5, 60)),
        ({"positions": {"start": 3, "stop": 8}, "phase": "decode"}, range(6, 8)),
        ({"positions": [1, 9]}, [1, 9]),
    ],
)
def test_the_same_words_are_steered_where_generation_was(tiny: HookedModel, place: dict[str, Any], moved: Any) -> None:
    along = vector(2)
    found = steer(tiny, STORY, along, [3], max_tokens=8, **place)
    (still, run) = (np.concatenate(list(one.measured[0].forced_scores.values())) for one in found)
    assert len(still) == 14
    expected = [3 * along.norm if i in moved else 0 for i in range(14)]
    np.testing.assert_allclose(run - still, expected, atol=1e-4)


@pytest.mark.parametrize("place", [{"phase": "decode"}, {"positions": [2, 25]}, {"positions": {"start": 4}}])
def test_a_text_that_ended_early_is_steered_as_far_as_it_goes(tiny: HookedModel, place: dict[str, Any]) -> None:
    along = vector(3)
    found = steer(tiny, "What is the capital of France ?", along, [1], max_tokens=40, temperature=0, **place)
    still, run = (one.measured[0].forced_scores for one in found)
    assert len(still["response"]) == 8
    moved = [np.subtract(run[part], still[part]) / along.norm for part in ("prompt", "response")]
    whole = np.concatenate(moved)
    due = {"phase": range(10, 18), "positions": range(4, 18) if "start" in str(place) else [2]}[next(iter(place))]
    np.testing.assert_allclose(whole, [i in due for i in range(18)], atol=1e-4)


def test_a_vector_can_be_added_at_another_layer(tiny: HookedModel) -> None:
    along, at_0 = vector(3), vector(0)
    found = steer(tiny, STORY, along, [2], layer=0, measured=[along, at_0], max_tokens=4)
    run = found[1]
    assert run.receipts[0].hook_points == ("blocks.0.hook_resid_post",)
    # At layer 0 it is the same direction that is measured.
    assert run.measured[1].forced_shift == pytest.approx(2 * along.norm, abs=1e-4)
    assert run.measured[0].forced_shift != pytest.approx(2 * along.norm, abs=1e-2)
    assert (found.metadata["layer"], found.metadata["vector_layer"]) == (0, 3)


def test_a_prompt_alone_can_be_measured(tiny: HookedModel) -> None:
    along = vector(2, chat=Chat(use=False))
    found = steer(tiny, STORY, along, [2], max_tokens=0)
    assert found.prompt["n_tokens"] == len(render(tiny, STORY, along.chat))
    assert found[1].tokens == []
    assert found[1].measured[0].shift == pytest.approx(2 * along.norm, abs=1e-4)


def test_what_was_steered_is_plain_json(tiny: HookedModel) -> None:
    plain = steer(tiny, STORY, vector(2), [-0.0, 2], max_tokens=2).to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert [run["coefficient"] for run in plain["runs"]] == [0, 2]
    assert plain["runs"][1]["receipts"][0]["type"] == "add"
    assert plain["metadata"]["intervention"]["hook_point"] == "blocks.2.hook_resid_post"
    assert {"temperature": 0.7, "top_p": 0.9, "seed": 0, "max_tokens": 2}.items() <= plain["metadata"].items()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((STORY, vector(2), []), {}, "coefficients is a list of different finite numbers"),
        ((STORY, vector(2), 4), {}, "coefficients is a list of different finite numbers"),
        ((STORY, vector(2), [1, 1.0]), {}, "coefficients is a list of different finite numbers"),
        ((STORY, vector(2), [float("nan")]), {}, "coefficients is a list of different finite numbers"),
        ((STORY, vector(2), [True]), {}, "coefficients is a list of different finite numbers"),
        ((STORY, vector(2), np.array(1.0)), {}, "coefficients is a list of different finite numbers"),
        ((STORY, vector(2), np.ones((1, 1))), {}, "coefficients is a list of different finite numbers"),
        ((STORY, vector(2), [10**400]), {}, "coefficients is a list of different finite numbers"),
        ((STORY, "v", [1]), {}, "vector is a TraitVector, got str"),
        ((STORY, vector(2), [1]), {"measured": ["v"]}, "measured is a list of at least one TraitVector"),
        ((STORY, vector(2), [1]), {"measured": vector(2)}, "measured is a list of at least one TraitVector"),
        ((STORY, vector(2), [1]), {"layer": 4}, "layer is 0 to 3 on neuroscope-tiny, got 4"),
        ((STORY, vector(2), [1]), {"layer": -1}, "layer is 0 to 3 on neuroscope-tiny, got -1"),
        ((STORY, vector(9), [1]), {}, "is of layer 9; neuroscope-tiny has layers 0 to 3"),
        ((STORY, vector(2, 7), [1]), {}, "is 7 wide; the stream of neuroscope-tiny is 128"),
        ((STORY, vector(2), [1]), {"measured": [vector(2, 7)]}, "is 7 wide; the stream"),
        ((STORY, vector(2), [1]), {"measured": []}, "measured is a list of at least one TraitVector"),
        (("", vector(2), [1]), {}, "A prompt is a text that is not empty"),
        (("word " * 200, vector(2), [1]), {}, "tokens; the model reads at most 128"),
        ((STORY, vector(2), [1]), {"positions": [99]}, "position 99 is out of reach"),
        ((STORY, vector(2), [1]), {"phase": "later"}, "phase is 'prefill', 'decode' or null"),
        ((STORY, vector(2), [1]), {"max_tokens": 0, "phase": "decode"}, "phase 'decode' never comes in this run"),
        ((STORY, vector(2), [1]), {"top_p": 3}, "top_p is a number from 0 to 1"),
        (
            (STORY, vector(2, identity=ModelIdentity("llama", 4, 128, 522, "0" * 64)), [1]), {},
            "is of another model: its weights differ",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_steered_is_an_error(
    tiny: HookedModel, arguments: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(HookError) as raised:
        steer(tiny, *arguments, **{"max_tokens": 2} | options)
    assert message in str(raised.value)


# The command


@pytest.fixture
def root(tiny: HookedModel, tmp_path: Path) -> Path:
    about = {"metadata": {"model": "neuroscope-tiny"}, "identity": ModelIdentity.of(tiny)}
    for seed, layer in ((0, 2), (1, 3)):
        made = vector(layer, seed=seed, **about)
        made.save(tmp_path / "experiments" / "demo" / made.trait / "extraction" / "vectors")
    return tmp_path / "experiments"


def asked(root: Path, *arguments: str) -> list[str]:
    place = ["--root", str(root), "--experiment", "demo", "--trait", "t0", "--prompt", STORY, "--max-tokens", "9"]
    return ["traits", "steer", *place, *arguments]


def test_the_command_shows_scores_and_texts(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, page, picture = (tmp_path / name for name in ("s.json", "s.html", "s.png"))
    files = ["--json", str(target), "--html", str(page), "--png", str(picture)]
    assert main(asked(root, "--coefficients=-4,4", "--measure", "t0,t1", *files)) == 0
    plain = json.loads(target.read_text())
    assert [run["coefficient"] for run in plain["runs"]] == [0, -4, 4]
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"> {STORY}", f"  adding t0 (given, layer 2), |v| {plain['metadata']['norm']:.4g} at layer 2"]
    assert lines[3] == "  t0 (given, layer 2)"
    figures = plain["runs"][2]["measured"][0]
    shown = [4.0, *(figures[name] for name in ("mean_score", "shift", "forced_shift"))]
    assert lines[7].split() == [f"{figure:.4g}" for figure in shown]
    assert f"  -4: {plain['runs'][1]['text']}" in lines
    assert page.read_text().count("<section>") == 2
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["s-0.png", "s-1.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--coefficients=a"], "--coefficients are numbers with commas between them, got 'a'"),
        (["--coefficients=,"], "coefficients is a list of different finite numbers"),
        (["--coefficients=1", "--trait", "t1"], "One trait's vector is added: give --trait once"),
        (["--coefficients=1", "--layer", "0"], "The trait t0 has no vector of layer 0"),
        (["--coefficients=1", "--at-layer", "8"], "layer is 0 to 3 on neuroscope-tiny, got 8"),
        (["--coefficients=1", "--experiment", "other"], "There is no experiment 'other' in"),
        (["--coefficients=1", "--measure", "t7"], "The experiment demo has no trait 't7'"),
        (["--coefficients=1", "--json", "no/such.json"], "cannot write no/such.json"),
        (["--coefficients=1", "--json", "s.json", "--html", "s.json"], "--json and --html are both s.json"),
        (["--coefficients=1", "--json", "{vectors}/given_layer2.safetensors"], "which is read here"),
        (["--coefficients=1", "--json", "{captures}/prompt_0.safetensors"], "which is a capture's: name another file"),
        (["--coefficients=1", "--html", "{captures}/prompt_0.json"], "which is a capture's: name another file"),
        (["--coefficients=1", "--prompt", " "], "A prompt is a text that is not empty"),
    ],
)
def test_what_the_command_cannot_do_is_one_line(
    root: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    vectors = root / "demo" / "t0" / "extraction" / "vectors"
    captures = root / "demo" / "t1" / "inference" / "residual_stream_activations"
    captures.mkdir(parents=True)
    (captures / "prompt_0.safetensors").write_text("numbers")
    assert main(asked(root, *(part.format(vectors=vectors, captures=captures) for part in arguments))) == 1
    assert [path.read_text() for path in captures.iterdir()] == ["numbers"]
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""
