"""How scores move: values worked out by hand, and scores of a model recomputed from what its stream holds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_hooks import HookedModel, HookError, TraitVector, monitor_dynamics, trait_dynamics
from mlx_hooks.analysis.identity import ModelIdentity
from mlx_hooks.analysis.spelling import course, in_columns, one_line
from mlx_hooks.analysis.traits.dynamics import Peak
from mlx_hooks.analysis.traits.prompts import Chat, render
from mlx_hooks.cli import main

WORKED = [0, 1, 4, 4, 4, 1.5, 3]
"""Velocity 1, 3, 0, 0, -2.5, 1.5; acceleration 2, -3, 0, -2.5, 4."""
CAPITAL, STORY = "What is the capital of France ?", "Write a story"


def test_a_row_of_scores_worked_out_by_hand() -> None:
    found = trait_dynamics(WORKED)
    assert found.velocity == [1, 3, 0, 0, -2.5, 1.5]
    assert found.acceleration == [2, -3, 0, -2.5, 4]
    assert found.commitment_point == 2
    assert found.peak == Peak(2, 4.0)
    assert found.peak_velocity == 3
    assert found.avg_velocity == pytest.approx(8 / 6)
    assert (found.persistence, found.persistence_total) == (2, 3)
    assert (found.n, found.threshold, found.relative, found.stays_below) == (7, 0.1, False, False)
    assert json.loads(json.dumps(found.to_dict()))["peak"] == {"index": 2, "score": 4.0}


@pytest.mark.parametrize(
    ("scores", "options", "expected"),
    [
        # |acceleration| is 2, 3, 0, 2.5, 4.
        (WORKED, {"threshold": 2.0}, 2),
        (WORKED, {"threshold": 2.125}, 0),
        (WORKED, {"threshold": 0.5, "relative": True}, 2),
        (WORKED, {"threshold": 0.625, "relative": True}, 0),
        (WORKED, {"stays_below": True}, None),
        (WORKED, {"threshold": 5, "stays_below": True}, 0),
        # 8, 0, 4, 0, 0.
        ([0, 8, 24, 40, 60, 80, 100], {}, 1),
        ([0, 8, 24, 40, 60, 80, 100], {"stays_below": True}, 3),
        ([0, 8, 24, 40, 60, 80, 100], {"threshold": 0.5625, "relative": True, "stays_below": True}, 1),
        # Below, not at, the threshold.
        ([0, 0, 0.5, 0], {"threshold": 0.5}, None),
        ([1, 2, 3, 4], {}, 0),
        ([1, 2, 3, 4], {"relative": True}, 0),
        ([1, 2, 3, 4], {"relative": True, "stays_below": True}, 0),
        # 0.125, -0.0625, 0. In hundredths the guide's threshold says nothing, a share does.
        ([0, 0.0625, 0.25, 0.375, 0.5], {}, 1),
        ([0, 0.01, 0.05, 0.06, 0.07], {}, 0),
        ([0, 0.01, 0.05, 0.06, 0.07], {"relative": True}, 2),
        ([], {}, None),
        ([3], {}, None),
        ([3, 4], {"relative": True}, None),
        ([3, 4, 5], {}, 0),
        # One acceleration: a share of it is not a number of the guide's.
        ([0, 0, 0.0625], {}, 0),
        ([0, 0, 0.0625], {"relative": True}, None),
        ([0, 0, 0.0625], {"relative": True, "threshold": 1}, None),
        ([0, 0, 0], {"relative": True}, 0),
    ],
)
def test_where_a_trait_commits(scores: list[float], options: dict[str, Any], expected: int | None) -> None:
    assert trait_dynamics(scores, **options).commitment_point == expected


@pytest.mark.parametrize(
    ("scores", "peak", "persistence", "total"),
    [
        # Of the peak's sign: -3 is as far from 0, and does not count.
        ([1, 4, 3, -3, 3], Peak(1, 4.0), 1, 2),
        ([1, -4, -3, -2.5, 3, -3], Peak(1, -4.0), 2, 3),
        # Above half of it, not at half.
        ([4, 2, 3], Peak(0, 4.0), 0, 1),
        # Of equals the first.
        ([-2, 2, 2], Peak(0, -2.0), 0, 0),
        ([0, 0, 0], Peak(0, 0.0), 0, 0),
        ([1, 2, 5], Peak(2, 5.0), 0, 0),
        ([7], Peak(0, 7.0), 0, 0),
        ([], None, 0, 0),
    ],
)
def test_how_long_a_peak_lasts(scores: list[float], peak: Peak | None, persistence: int, total: int) -> None:
    found = trait_dynamics(scores)
    assert (found.peak, found.persistence, found.persistence_total) == (peak, persistence, total)


@pytest.mark.parametrize("scores", [[], [2.0], [2.0, 5.0]])
def test_few_scores_have_few_differences(scores: list[float]) -> None:
    found = trait_dynamics(scores)
    assert len(found.velocity) == max(0, len(scores) - 1)
    assert found.acceleration == []
    assert found.peak_velocity == found.avg_velocity == (3.0 if len(scores) == 2 else None)


def test_any_row_against_the_definitions() -> None:
    numbers = np.random.default_rng(5)
    for n in range(3, 40):
        scores = numbers.normal(size=n).astype(np.float32)
        found = trait_dynamics(scores, threshold=0.4)
        s = [float(score) for score in scores]
        acceleration = [s[i + 2] - 2 * s[i + 1] + s[i] for i in range(n - 2)]
        np.testing.assert_allclose(found.acceleration, acceleration, atol=1e-12)
        below = [i for i, a in enumerate(acceleration) if abs(a) < 0.4]
        assert found.commitment_point == (below[0] if below else None)
        lasting = trait_dynamics(scores, threshold=0.4, stays_below=True).commitment_point
        above = [i for i, a in enumerate(acceleration) if abs(a) >= 0.4]
        after = above[-1] + 1 if above else 0
        assert lasting == (after if after < n - 2 else None)


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        ([0, float("nan")], {}, "Scores are finite numbers, got nan at index 1"),
        ([float("inf")], {}, "got inf at index 0"),
        ([[1, 2]], {}, "one per token; got [1, 2]"),
        (["a"], {}, "Scores are numbers [n]"),
        ([1e308, -1e308], {}, "Scores lie too far apart"),
        ([1], {"threshold": 0}, "threshold is a finite number above 0; got 0"),
        ([1], {"threshold": float("nan")}, "threshold is a finite number above 0"),
        ([1], {"threshold": True}, "threshold is a finite number above 0"),
        ([1], {"threshold": 1.5, "relative": True}, "a share of at most 1 where it is relative; got 1.5"),
    ],
)
def test_what_has_no_dynamics_is_an_error(scores: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(HookError) as raised:
        trait_dynamics(scores, **options)
    assert message in str(raised.value)


# On a model


def vector(trait: str, layer: int, method: str = "given", **more: Any) -> TraitVector:
    numbers = np.random.default_rng([ord(letter) for letter in trait + method])
    return TraitVector(trait, layer, method, numbers.normal(size=128) / 5, **more)


def recomputed(model: HookedModel, ids: list[int], along: TraitVector) -> np.ndarray:
    _, cache = model.run_with_cache(ids, f"blocks.{along.layer}.hook_resid_post")
    v = along.vector.astype(np.float64)
    return cache.numpy(f"blocks.{along.layer}.hook_resid_post")[0].astype(np.float64) @ v / np.sqrt((v * v).sum())


def test_each_trait_is_followed_at_its_own_layer_and_method_in_one_generation(
    tiny: HookedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    generated = []
    real = HookedModel.generate_steps
    monkeypatch.setattr(HookedModel, "generate_steps", lambda *a, **k: generated.append(1) or real(*a, **k))
    vectors = [vector("a", 3, "probe", threshold=0.5), vector("b", 0), vector("a", 1, "ica")]
    found = monitor_dynamics(tiny, [CAPITAL, STORY], vectors, max_tokens=12, temperature=1.0, seed=4)
    assert len(generated) == 2
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert [entry["prompt_index"] for entry in found["results"]] == [0, 1]
    for entry, text in zip(found["results"], (CAPITAL, STORY), strict=True):
        prompt, response = entry["prompt"], entry["response"]
        assert prompt["text"] == text
        assert prompt["token_ids"] == render(tiny, text)
        said = tiny.generate(render(tiny, text), max_tokens=12, temperature=1.0, top_p=0.9, seed=4)
        assert response["token_ids"] == said.tokens
        assert response["text"] == said.text
        assert (response["finish_reason"], response["n_tokens"]) == (said.finish_reason, len(said.tokens))
        assert {(t, m) for t, by_method in entry["traits"].items() for m in by_method} == {
            ("a", "probe"), ("a", "ica"), ("b", "given"),
        }  # fmt: skip
        for one in vectors:
            of_trait = entry["traits"][one.trait][one.method]
            assert (of_trait["layer"], of_trait["norm"], of_trait["threshold"]) == (one.layer, one.norm, one.threshold)
            expected = recomputed(tiny, [*prompt["token_ids"], *response["token_ids"]], one)
            scores = of_trait["scores"]
            np.testing.assert_allclose([*scores["prompt"], *scores["response"]], expected, atol=2e-4)
            assert of_trait["dynamics"] == {"tokens": "response", **trait_dynamics(scores["response"]).to_dict()}


def test_dynamics_of_prompt_and_response_together(tiny: HookedModel) -> None:
    found = monitor_dynamics(
        tiny, [CAPITAL], [vector("a", 2)], max_tokens=4, tokens="all", threshold=0.3, relative=True, stays_below=True
    )
    of_trait = found["results"][0]["traits"]["a"]["given"]
    both = [*of_trait["scores"]["prompt"], *of_trait["scores"]["response"]]
    expected = trait_dynamics(both, threshold=0.3, relative=True, stays_below=True).to_dict()
    assert of_trait["dynamics"] == {"tokens": "all", **expected}
    settings = {"tokens": "all", "threshold": 0.3, "relative": True, "stays_below": True, "max_tokens": 4, "seed": 0}
    assert settings.items() <= found["metadata"].items()


def test_traits_that_put_a_prompt_differently_have_results_of_their_own(tiny: HookedModel) -> None:
    plain, chatting = vector("plain", 1, chat=Chat(use=False)), vector("chatting", 1)
    other = vector("same", 2, chat=Chat(use=True))
    found = monitor_dynamics(tiny, [CAPITAL], [plain, chatting, other], max_tokens=3)
    assert [(sorted(entry["traits"]), entry["prompt"]["n_tokens"]) for entry in found["results"]] == [
        (["plain"], len(render(tiny, CAPITAL, Chat(use=False)))),
        (["chatting", "same"], len(render(tiny, CAPITAL))),
    ]


def test_interventions_are_in_force_and_told(tiny: HookedModel) -> None:
    along = vector("a", 2)
    plain, steered = (
        monitor_dynamics(tiny, [CAPITAL], [along], max_tokens=0, interventions=edits)
        for edits in ([], [along.intervention(2.0)])
    )
    moved = [found["results"][0]["traits"]["a"]["given"]["scores"]["prompt"] for found in (plain, steered)]
    np.testing.assert_allclose(np.subtract(*reversed(moved)), 2 * along.norm, rtol=1e-4)
    assert steered["metadata"]["interventions"][0]["hook_point"] == "blocks.2.hook_resid_post"
    assert steered["results"][0]["interventions"][0]["fired"] > 0
    assert plain["results"][0]["response"]["tokens"] == []
    assert plain["results"][0]["traits"]["a"]["given"]["dynamics"]["peak"] is None


def test_what_fails_is_told_and_the_rest_is_done(tiny: HookedModel) -> None:
    foreign = ModelIdentity("llama", 4, 128, 522, "0" * 64)
    broken = Chat(template="{{ no() }}")
    vectors = [vector("good", 1), vector("foreign", 1, identity=foreign), vector("system", 1, chat=broken)]
    prompts = [CAPITAL, " ", "word " * 200]
    found = monitor_dynamics(tiny, prompts, vectors, max_tokens=2, errors="collect")
    assert [(entry["prompt_index"], list(entry["traits"])) for entry in found["results"]] == [(0, ["good"])]
    told = [(one["trait"], one["prompt_index"], one["error"]) for one in found["failed"]]
    assert told[0][:2] == ("foreign", None)
    assert "is of another model: its weights differ" in told[0][2]
    assert ("good", 1) in [one[:2] for one in told]
    assert any(one[:2] == ("good", 2) and "tokens; the model reads at most 128" in one[2] for one in told)
    assert any(one[:2] == ("system", 0) and "The chat template refuses the prompt" in one[2] for one in told)


@pytest.mark.parametrize(
    ("prompts", "vectors", "options", "message"),
    [
        ([], [vector("a", 1)], {}, "prompts is a list of at least one text"),
        (CAPITAL, [vector("a", 1)], {}, "prompts is a list of at least one text"),
        (None, [vector("a", 1)], {}, "prompts is a list of at least one text"),
        ([3], [vector("a", 1)], {}, "A prompt is a text that is not empty"),
        ([CAPITAL], [], {}, "vectors is a list of at least one TraitVector"),
        ([CAPITAL], ["a"], {}, "vectors is a list of at least one TraitVector"),
        ([CAPITAL], [vector("a", 1), np.ones(128)], {}, "vectors is a list of at least one TraitVector"),
        ([CAPITAL], vector("a", 1), {}, "vectors is a list of at least one TraitVector"),
        ([CAPITAL], [vector("a", 1), vector("a", 2)], {}, "There are two vectors of a by given"),
        ([CAPITAL], [TraitVector("a", 1, "given", np.ones(5))], {}, "is 5 wide; the stream of neuroscope-tiny is 128"),
        ([CAPITAL, ""], [vector("a", 1)], {}, "A prompt is a text that is not empty"),
        ([CAPITAL], [vector("a", 1)], {"tokens": "some"}, "tokens is one of response, all, got 'some'"),
        ([CAPITAL], [vector("a", 1)], {"threshold": -1}, "threshold is a finite number above 0"),
        ([CAPITAL], [vector("a", 1)], {"max_tokens": -1}, "max_tokens is a whole number from 0 up"),
        ([CAPITAL], [vector("a", 1)], {"temperature": -1}, "temperature is a number from 0 up"),
        ([CAPITAL], [vector("a", 1)], {"errors": "drop"}, "errors is 'raise' or 'collect'"),
    ],
)
def test_what_cannot_be_monitored_is_an_error(
    tiny: HookedModel, prompts: Any, vectors: list[TraitVector], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(HookError) as raised:
        monitor_dynamics(tiny, prompts, vectors, **{"max_tokens": 1} | options)
    assert message in str(raised.value)


# The command


@pytest.fixture
def root(tiny: HookedModel, tmp_path: Path) -> Path:
    """Experiments: "demo" has traits with vectors, one without and prompts of its own."""
    identity = ModelIdentity.of(tiny)
    demo = tmp_path / "experiments" / "demo"
    for trait, layer in (("retrieval", 2), ("serial", 1)):
        for method in ("probe", "ica"):
            about = {"metadata": {"model": "neuroscope-tiny"}, "identity": identity}
            vector(trait, layer, method, **about).save(demo / trait / "extraction" / "vectors")
    (demo / "bare" / "extraction").mkdir(parents=True)
    (demo / "inference_prompts.txt").write_text(f"{CAPITAL}\n{STORY}\n")
    return demo.parent


def told(root: Path, *arguments: str) -> list[str]:
    return ["traits", "dynamics", "--root", str(root), "--experiment", "demo", "--max-tokens", "6", *arguments]


def test_the_command_of_the_guide(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One prompt, all traits; what lacks vectors is named, the rest is done."""
    assert main(told(root, "--prompts", CAPITAL)) == 1
    said = capsys.readouterr()
    assert said.err == (
        f"neuroscope: bare: The trait bare has no vectors in {root}/demo/bare/extraction/vectors: extract them first.\n"
    )
    (written,) = (root / "demo" / "inference" / "dynamics").iterdir()
    found = json.loads(written.read_text())
    assert found["metadata"]["experiment"] == "demo"
    assert found["failed"] == [{"what": "bare", "error": said.err.removeprefix("neuroscope: bare: ").rstrip()}]
    assert {name: list(by_method) for name, by_method in found["results"][0]["traits"].items()} == {
        "retrieval": ["probe"], "serial": ["probe"],
    }  # fmt: skip
    lines = said.out.splitlines()
    assert lines[0] == f"> {CAPITAL}"
    assert lines[1] == "  Paris is the capital of France"
    assert lines[2].split()[:6] == ["trait", "vector", "committed", "at", "peak", "persistence"]
    assert "probe, layer 2" in lines[3]
    assert len(lines[4].strip()) == 6
    summary = ["Done: 1 of 1 prompts, traits retrieval, serial", "2 done, 1 failed"]
    assert lines[-3:] == [f"Written: {written}", *summary]


def test_the_command_of_the_guide_with_filters(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, target = tmp_path / "prompts.txt", tmp_path / "out.json"
    prompts.write_text(f"{STORY}\n\n{CAPITAL}\n")
    chosen = ["--traits", "retrieval,serial", "--methods", "probe,ica", "--prompts_file", str(prompts)]
    assert (
        main(told(root, *chosen, "--output", str(target), "--relative", "--threshold", "0.5", "--tokens", "all")) == 0
    )
    found = json.loads(target.read_text())
    assert [entry["prompt"]["text"] for entry in found["results"]] == [STORY, CAPITAL]
    assert list(found["results"][0]["traits"]["serial"]) == ["probe", "ica"]
    assert (found["metadata"]["relative"], found["metadata"]["threshold"], found["failed"]) == (True, 0.5, [])
    assert not (root / "demo" / "inference").exists()
    assert "Done: 2 of 2 prompts" in capsys.readouterr().out


def test_prompts_are_counted_once_however_many_ways_of_putting_them_there_are(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "demo" / "serial" / "trait.json").write_text('{"chat": false}')
    plain = vector("serial", 1, "probe", chat=Chat(use=False), metadata={"model": "neuroscope-tiny"})
    plain.save(root / "demo" / "serial" / "extraction" / "vectors")
    asked = ["--traits", "retrieval,serial", "--max-tokens", "1", "--prompts"]
    assert main(told(root, *asked, CAPITAL, STORY)) == 0
    said = capsys.readouterr().out
    assert (said.count("\n> "), said.splitlines()[-2]) == (3, "Done: 2 of 2 prompts, traits retrieval, serial")
    assert main(told(root, *asked, "", STORY)) == 1
    last = ["Done: 1 of 2 prompts, traits retrieval, serial", "2 done, 2 failed"]
    assert capsys.readouterr().out.splitlines()[-2:] == last


def test_vectors_of_several_models_need_one_that_is_named(
    root: Path, capsys: pytest.CaptureFixture[str], tiny: HookedModel
) -> None:
    foreign = {"metadata": {"model": "/nowhere/other"}, "identity": ModelIdentity("llama", 4, 128, 522, "0" * 64)}
    vectors = root / "demo" / "aaa" / "extraction" / "vectors"
    vector("aaa", 1, "probe", **foreign).save(vectors)
    asked = ["--traits", "aaa,retrieval,serial", "--max-tokens", "1"]
    assert main(told(root, *asked)) == 1
    assert capsys.readouterr().err == (
        "neuroscope: The vectors name /nowhere/other (1) and neuroscope-tiny (2): say which model to take (--model).\n"
    )
    assert not list(root.rglob("*.json"))
    # With the model named, only the foreign one fails; one that names no model stops nothing.
    assert main(told(root, *asked, "--model", "neuroscope-tiny")) == 1
    said = capsys.readouterr()
    assert said.err == "neuroscope: aaa (probe): The vector aaa/probe_layer1 is of another model: its weights differ.\n"
    assert said.out.splitlines()[-2] == "Done: 2 of 2 prompts, traits retrieval, serial"
    vector("aaa", 1, "probe").save(vectors)
    assert main(told(root, *asked)) == 0
    assert capsys.readouterr().out.splitlines()[-2] == "Done: 2 of 2 prompts, traits aaa, retrieval, serial"


def test_a_model_that_vectors_name_and_is_not_there_can_be_named(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = vector("gone", 1, "probe", metadata={"model": "/nowhere/other"})
    gone.save(root / "demo" / "gone" / "extraction" / "vectors")
    assert main(told(root, "--traits", "gone")) == 1
    said = capsys.readouterr().err
    assert said.startswith("neuroscope: The vectors name /nowhere/other, and --model may name another: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--output", "d.json", "--html", "d.json"],
            "--output and --html are both d.json: give each a file of its own",
        ),
        (["--output", "d.json", "--html", "./x/../d.json"], "--output and --html are both x/../d.json"),
        (["--png", "d.png", "--html", "link.png"], "--html and --png are both d.png"),
        (["--prompts-file", "p.txt", "--output", "p.txt"], "--output is p.txt, which is read here: name another file"),
        (["--prompts-file", "p.txt", "--html", "x/../p.txt"], "--html is x/../p.txt, which is read here"),
        (["--html", "{demo}/inference_prompts.txt"], "inference_prompts.txt, which is read here"),
        (["--html", "{demo}/serial/extraction/vectors/ica_layer1.safetensors"], "which is read here"),
        (["--output", "{demo}/serial/trait.json"], "which is read here"),
        (["--model", "x", "--output", "x/config.json"], "--output is x/config.json, which is read here"),
        (["--output", "{captures}/prompt_0.safetensors"], "prompt_0.safetensors, which is a capture's: name another"),
        (["--html", "{captures}/prompt_0.json"], "prompt_0.json, which is a capture's: name another"),
        (["--output", "{captures}/left.json"], "left.json, which is a capture's: name another"),
        (["--png", "{captures}/../layer_internal_states/x.safetensors"], "x.safetensors, which is a capture's"),
        (["--png", "d.png", "--html", "d-1.png"], "--png d.png may come to d-1.png, which is another file of this"),
    ],
)
def test_no_output_takes_the_place_of_another_or_of_what_is_read(
    root: Path,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(HookedModel, "from_pretrained", lambda *_: pytest.fail("it was loaded"))
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.json").write_text("{}")
    (tmp_path / "link.png").symlink_to("d.png")
    (tmp_path / "p.txt").write_text(CAPITAL)
    (root / "demo" / "serial" / "trait.json").write_text("{}")
    captures = root / "demo" / "serial" / "inference" / "residual_stream_activations"
    single = captures.with_name("layer_internal_states") / "x.safetensors"
    for path in (captures / "prompt_0.safetensors", captures / "left.json", single):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("numbers")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main(told(root, *(part.format(demo=root / "demo", captures=captures) for part in arguments))) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_files_of_earlier_runs_stay_and_a_run_can_be_repeated(root: Path) -> None:
    for _ in range(2):
        assert main(told(root, "--traits", "serial")) == 0
    first, second = (json.loads(path.read_text()) for path in (root / "demo" / "inference" / "dynamics").iterdir())
    assert first["results"] == second["results"]
    assert len(first["results"]) == 2


def test_pictures_of_several_prompts(root: Path, tmp_path: Path) -> None:
    page, picture = tmp_path / "all.html", tmp_path / "one.png"
    assert main(told(root, "--traits", "serial", "--html", str(page), "--png", str(picture))) == 0
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["one-0.png", "one-1.png"]
    assert page.read_text().count("<section>") == 2


def test_a_picture_that_cannot_be_drawn_takes_nothing_else_with_it(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_hooks.analysis.traits.plots.scores.MAX_PICTURE", 15)
    targets = ["--png", str(tmp_path / "p.png"), "--html", str(tmp_path / "p.html")]
    assert main(told(root, "--traits", "serial", *targets)) == 1
    said = capsys.readouterr().err
    assert said == "neuroscope: drawing: A picture shows at most 15 positions, got 16: write HTML.\n"
    assert [path.name for path in sorted(tmp_path.glob("p*"))] == ["p-1.png", "p.html"]
    assert len(list(root.rglob("*.json"))) == 1


def test_where_nothing_can_be_written_nothing_is_run(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HookedModel, "from_pretrained", lambda *_: pytest.fail("it was loaded"))
    (root / "demo" / "inference").write_text("a file")
    assert main(told(root, "--traits", "serial")) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"neuroscope: cannot write {root}/demo/inference/dynamics/20")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--experiment", "other"], "There is no experiment 'other' in"),
        (["--prompts", CAPITAL, "--traits", "nobody"], "The experiment demo has no trait 'nobody'. There are: bare, "),
        (["--prompts", CAPITAL, "--traits", "serial", "--layer", "3"], "There are: probe_layer1, ica_layer1"),
        (["--prompts", CAPITAL, "--traits", "serial", "--methods", "pca"], "Unknown method 'pca'"),
        (["--prompts", CAPITAL, "--traits", ","], "There are no traits"),
        (["--prompts-file", "no.txt"], "There is no file no.txt"),
        (["--threshold", "0"], "threshold is a finite number above 0"),
        (["--top-p", "2"], "top_p is a number from 0 to 1"),
        (["--output", "no/such/out.json"], "cannot write no/such/out.json: there is no folder"),
        (["--png", "no/such/out.png"], "cannot write no/such/out.png: there is no folder"),
        (["--prompts", "word " * 300, "--traits", "serial"], "prompt 0: The prompt has "),
        (["--prompts", CAPITAL, "--traits", "serial", "--model", "no/such"], "no/such"),
    ],
)
def test_what_the_command_cannot_do_is_one_line(
    root: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(told(root, *arguments)) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not list(root.rglob("*.json"))


def test_an_interrupted_run_writes_nothing(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_hooks.analysis.traits.monitoring.watch_traits", interrupt)
    assert main(told(root, "--traits", "serial")) == 130
    assert capsys.readouterr().err == "neuroscope: interrupted; nothing was written\n"
    assert not list(root.rglob("*.json"))


def test_lines_of_the_terminal() -> None:
    assert course([0, 1, 7, 3.5]) == "▁▂█▅"
    assert course([2, 2]) == "▁▁"
    assert course([]) == ""
    assert one_line("Paris is\nthe\x1b capital of France .", 20) == "Paris is the\\x1b ca…"
    assert in_columns([["a", "b"], ["long", "語"]]) == ["a     b", "long  語"]
