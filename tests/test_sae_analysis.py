"""The ``sae`` analysis: what it tells is recomputed here from the autoencoder that it saved."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_hooks import HookedModel, HookError, SparseAutoencoder
from mlx_hooks.analysis.eval_data import eval_data_of
from mlx_hooks.analysis.sae import analysis
from mlx_hooks.analysis.sae.analysis import analyse_sae
from mlx_hooks.analysis.sae.effects import loss_recovered, steering_effects
from mlx_hooks.analysis.sae.measures import measure_sae
from mlx_hooks.analysis.sae.pictures import draw_sae
from mlx_hooks.analysis.sae.training import train_sae
from mlx_hooks.storage.rows import ArrayRows

POINT = "blocks.1.hook_resid_post"
TEXTS = np.random.default_rng(0).integers(0, 60, (30, 12)).tolist()
OPTIONS = {"max_steps": 60, "d_sae": 40, "batch_size": 64, "top_features": 6, "top_tokens": 3}


def rows_of(model: HookedModel) -> ArrayRows:
    _, cache = model.run_with_cache(TEXTS, POINT)
    values = np.array(cache[POINT])
    batch, length, width = values.shape
    place = np.indices((batch, length)).reshape(2, -1)
    zeros = np.zeros(batch * length)
    return ArrayRows(
        values.reshape(-1, width), POINT, tokens=np.ravel(TEXTS), sequence=place[0], position=place[1],
        step=200 + zeros, rank=zeros, session=zeros,
    )  # fmt: skip


@pytest.fixture(scope="module")
def rows(llama: HookedModel) -> ArrayRows:
    return rows_of(llama)


@pytest.fixture(scope="module", params=["relu", "jumprelu"])
def told(request: pytest.FixtureRequest, rows: ArrayRows, llama: HookedModel, tmp_path_factory: Any) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sae") / "layer"
    asked = {"architecture": request.param, **OPTIONS, "save_to": folder, "steering": True}
    return analyse_sae(rows, asked, model=llama, spell=lambda token: f"<{token}>", eval_data=TEXTS[:5])


def test_it_tells_what_the_guide_shows(told: dict[str, Any]) -> None:
    stats = told["training_stats"]
    assert set(stats) == {f"{POINT}/{name}" for name in ("loss", "recon_loss", "sparsity_loss", "l0_sparsity")}
    assert len({len(values) for values in stats.values()}) == 1
    assert 0 <= told["final_l0"] == told["l0_fraction"] == told["l0"] / told["d_sae"] <= 1
    assert f"{told['final_l0']:.3f} {told['final_loss']:.6f}"
    # Strict JSON, and small enough to be read.
    assert json.loads(json.dumps(told, allow_nan=False)) == told


def test_its_numbers_are_of_the_rows_that_were_held_out(told: dict[str, Any], rows: ArrayRows) -> None:
    sae = SparseAutoencoder.load(told["saved_to"])
    trained = train_sae(
        rows, {name: told["options"][name] for name in ("architecture", "max_steps", "d_sae", "batch_size")}
    )
    held, parts = trained.held_out, rows.take(np.arange(len(rows)))
    x = parts.values[held].astype(np.float64)
    assert (told["n_held_out"], told["n_train"], told["held_out_by"]) == (len(held), trained.n_train, "text")
    # By hand: no text's beginning that was held out is among those of the other texts.
    begins = [tuple(TEXTS[row // len(TEXTS[0])][: row % len(TEXTS[0]) + 1]) for row in range(len(rows))]
    of_held = {row // len(TEXTS[0]) for row in held}
    others = {begin for row, begin in enumerate(begins) if row // len(TEXTS[0]) not in of_held}
    unseen = [row for row, begin in enumerate(begins) if row // len(TEXTS[0]) in of_held and begin not in others]
    assert held.tolist() == unseen
    features = np.array(sae.encode(mx.array(x.astype(np.float32))), np.float64)
    read = features @ np.array(sae.W_dec, np.float64) + np.array(sae.b_dec, np.float64)
    np.testing.assert_allclose(told["fvu"], ((x - read) ** 2).sum() / ((x - x.mean(0)) ** 2).sum(), rtol=1e-4)
    rates = (features > 0).mean(axis=0)
    np.testing.assert_allclose(told["firing_rates"], rates)
    np.testing.assert_allclose(told["l0"], (features > 0).sum(axis=1).mean())
    assert (told["n_dead"], told["dead_fraction"]) == ((rates == 0).sum(), (rates == 0).mean())
    scaled = ((x - read) ** 2).sum(axis=1).mean() * trained.scale**2
    target = max(1, min(rows.width // 4, 32))
    penalty = (
        0.1 * features.sum(axis=1).mean() * trained.scale
        if told["architecture"] == "relu"
        else 0.1 * (told["l0"] / target - 1) ** 2
    )
    np.testing.assert_allclose(told["final_loss"], scaled + penalty, rtol=1e-4)
    # The strongest latents, and where they fire most.
    strongest = np.argsort(-features.mean(axis=0))[:6]
    assert [entry["feature"] for entry in told["features"]] == strongest.tolist()
    for entry in told["features"]:
        own = features[:, entry["feature"]]
        np.testing.assert_allclose(
            [entry["firing_rate"], entry["mean_activation"], entry["max_activation"]],
            [(own > 0).mean(), own.mean(), own.max()],
            rtol=1e-5,
        )
        best = np.argsort(-own, kind="stable")[:3]
        for row, top in zip(best, entry["top_tokens"], strict=False):
            at = held[row]
            assert top["row"] == at
            assert top["token_id"] == parts.tokens[at] == np.ravel(TEXTS)[at]
            assert (top["sequence"], top["position"]) == divmod(int(at), 12)
            assert (top["step"], top["token"]) == (200, f"<{top['token_id']}>")
            np.testing.assert_allclose(top["activation"], own[row], rtol=1e-5)
    np.testing.assert_allclose(np.array(sae.log_sparsity), np.log10(rates + 1e-10), rtol=1e-5)
    assert (sae.hook_name, sae.metadata["training_architecture_details"]["max_steps"]) == (POINT, 60)


def log_probabilities(logits: mx.array) -> np.ndarray:
    wide = np.array(logits, np.float64)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def test_the_loss_that_survives_is_recomputed(told: dict[str, Any], llama: HookedModel) -> None:
    sae = SparseAutoencoder.load(told["saved_to"])
    edits = {"loss": None, "loss_with_sae": lambda x, _: sae(x), "loss_zero_ablated": lambda x, _: 0 * x}
    losses = {}
    for name, edit in edits.items():
        logits = llama.run_with_hooks(TEXTS[:5], [] if edit is None else [(POINT, edit)])
        following = np.array(TEXTS[:5])[:, 1:, None]
        losses[name] = -np.take_along_axis(log_probabilities(logits)[:, :-1], following, -1).mean()
    found = told["loss_recovered"]
    for name, loss in losses.items():
        np.testing.assert_allclose(found[name], loss, rtol=1e-5)
    assert found["n_targets"] == 5 * 11
    harm = losses["loss_zero_ablated"] - losses["loss"]
    if harm > 0:
        expected = (losses["loss_zero_ablated"] - losses["loss_with_sae"]) / harm
        np.testing.assert_allclose(found["loss_recovered"], expected, rtol=1e-4)
    else:
        assert found["loss_recovered"] is None


def test_a_perfect_autoencoder_loses_nothing_and_an_empty_one_all(tiny: HookedModel) -> None:
    width, texts = tiny.cfg.d_model, ["The capital of France is Paris .", "The capital of Italy is Rome ."]
    both = mx.concatenate([mx.eye(width), -mx.eye(width)])

    def recovered(bias: float, size: float) -> dict[str, Any]:
        weights = (both.T, mx.full((2 * width,), bias), size * both, mx.zeros(width))
        return loss_recovered(tiny, SparseAutoencoder("relu", *weights), texts, POINT)

    perfect, empty, faint = recovered(0.0, 1.0), recovered(-1e9, 1.0), recovered(0.0, 0.05)
    np.testing.assert_allclose([perfect["loss_with_sae"], perfect["loss_recovered"]], [perfect["loss"], 1], rtol=1e-5)
    assert empty["loss_with_sae"] == empty["loss_zero_ablated"] > empty["loss"] + 0.5
    assert empty["loss_recovered"] == 0
    share = (faint["loss_zero_ablated"] - faint["loss_with_sae"]) / (faint["loss_zero_ablated"] - faint["loss"])
    assert 0 != faint["loss_recovered"] == pytest.approx(share)
    assert faint["loss_recovered"] != pytest.approx(1)


def test_what_steering_does_is_recomputed(told: dict[str, Any], llama: HookedModel) -> None:
    sae = SparseAutoencoder.load(told["saved_to"])
    assert [entry["feature"] for entry in told["steering"]] == [entry["feature"] for entry in told["features"][:3]]
    plain = log_probabilities(llama(TEXTS[:5])).reshape(-1, 60)
    for entry, feature in zip(told["steering"], told["features"], strict=False):
        np.testing.assert_allclose(entry["coefficient"], 2 * feature["max_activation"])
        push = entry["coefficient"] * sae.W_dec[entry["feature"]]
        steered = log_probabilities(llama.run_with_hooks(TEXTS[:5], [(POINT, lambda x, _, push=push: x + push)]))
        steered = steered.reshape(-1, 60)
        np.testing.assert_allclose(entry["kl"], (np.exp(plain) * (plain - steered)).sum(axis=1).mean(), rtol=1e-3)
        change = (steered - plain).mean(axis=0)
        assert [one["token_id"] for one in entry["promoted"]] == np.argsort(-change)[:5].tolist()
        assert [one["token_id"] for one in entry["suppressed"]] == np.argsort(change)[:5].tolist()
        np.testing.assert_allclose([one["change"] for one in entry["promoted"]], -np.sort(-change)[:5], atol=1e-4)
        assert entry["promoted"][0]["token"] == f"<{entry['promoted'][0]['token_id']}>"
        ablated = llama.run_with_hooks(
            TEXTS[:5],
            [(POINT, lambda x, _, i=entry["feature"]: x - sae.encode(x)[..., i : i + 1] * sae.W_dec[i])],
        )
        ablated_kl = (np.exp(plain) * (plain - log_probabilities(ablated).reshape(-1, 60))).sum(axis=1).mean()
        np.testing.assert_allclose(entry["kl_ablated"], ablated_kl, rtol=1e-2, atol=1e-6)
        assert entry["kl_random"] > 0


def test_a_direction_that_the_model_reads_out_promotes_its_token(tiny: HookedModel) -> None:
    """The last layer's stream, pushed along what makes one token likely, makes that token likely."""
    point = f"blocks.{tiny.cfg.n_layers - 1}.hook_resid_post"
    unit = mx.eye(tiny.cfg.d_model)
    read_out = tiny.unembed(unit, apply_norm=False)
    directions = (read_out - read_out.mean(axis=1, keepdims=True)).T[100:103].astype(mx.float32)
    sae = SparseAutoencoder(
        "relu", directions.T, mx.zeros(3), directions, mx.zeros(tiny.cfg.d_model), metadata={"hook_name": point}
    )
    data = eval_data_of(tiny, [[5, 9, 30, 12, 40], [7, 8, 9]])
    found = steering_effects(tiny, sae, data, {0: 50.0, 2: 50.0}, top=1)
    assert [entry["promoted"][0]["token_id"] for entry in found] == [100, 102]
    assert all(entry["kl"] > entry["kl_random"] > 0 for entry in found)


def test_measuring_in_parts_changes_nothing(rows: ArrayRows, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_hooks.analysis.sae import measures

    sae = train_sae(rows, {"max_steps": 20, "d_sae": 16}).sae
    whole = measure_sae(sae, rows, top=4)
    monkeypatch.setattr(measures, "_PART", 7)
    parts = measure_sae(sae, rows, top=4)
    for name in ("fvu", "l0", "l1", "squared_error", "firing_rate", "mean_activation"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-5)
    np.testing.assert_array_equal(parts.top.rows, whole.top.rows)


def test_rows_without_tokens_have_no_tokens_to_tell(rows: ArrayRows) -> None:
    values = rows.take(np.arange(100)).values
    told = analyse_sae(values, OPTIONS)
    assert told["layer"] == "rows"
    assert "rows/loss" in told["training_stats"]
    assert "saved_to" not in told
    assert "loss_recovered" not in told
    top = told["features"][0]["top_tokens"][0]
    assert set(top) == {"activation", "row"}
    # A single row that was held out does not vary.
    assert analyse_sae(values[:2], OPTIONS)["fvu"] is None


def test_notes_say_what_the_numbers_do_not(rows: ArrayRows, llama: HookedModel) -> None:
    part = rows.take(np.arange(len(rows)))
    labels = {name: getattr(part, name) for name in ("tokens", "sequence", "position", "rank", "session")}
    asked = {**OPTIONS, "max_steps": 2}

    def notes(values: Any = part.values, eval_data: Any = None, **changed: Any) -> str:
        given = ArrayRows(values, POINT, **{**labels, "step": part.step, **changed})
        return " ".join(analyse_sae(given, asked, model=llama, eval_data=eval_data)["notes"])

    assert notes() == (
        "Only 34 rows were held out: what is measured on so few, such as which features never fire, says little."
    )
    steps = np.repeat([0, 100, 250], 120)
    assert "weights" not in notes(step=steps)
    assert "The rows are of 3 steps, 0 to 250, and what is told of the model" in notes(step=steps, eval_data=TEXTS[:2])
    assert "steps" not in notes(eval_data=TEXTS[:2])
    assert "the rows have no tokens" in notes(step=steps, tokens=None)
    assert "no tokens" not in notes(tokens=None)
    many = analyse_sae(np.random.default_rng(0).standard_normal((1000, 4)), asked)["notes"]
    assert [note[:30] for note in many] == ["Single rows were held out, sin"]


@pytest.mark.parametrize("given", ["nothing", "a model", "data"])
def test_steering_that_cannot_be_done_is_told(given: str, rows: ArrayRows, llama: HookedModel) -> None:
    model, data = llama if given == "a model" else None, TEXTS[:2] if given == "data" else None
    asked = {**OPTIONS, "max_steps": 2}
    told = analyse_sae(rows, {**asked, "steering": True}, model=model, eval_data=data)
    assert "steering" not in told
    assert told["notes"][-1] == "Nothing was steered: steering runs the model on data, so give a model and eval_data."
    assert not any("steer" in note for note in analyse_sae(rows, asked, model=model, eval_data=data)["notes"])


def test_a_note_says_what_a_loss_in_the_model_is_worth(
    rows: ArrayRows, llama: HookedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {**OPTIONS, "max_steps": 2}
    few = "The loss in the model was measured on {} alone, which says little: give more or longer eval_data"
    better = "The share of the loss that is recovered is 1.085: above 1, the model predicts these tokens better"

    def notes(eval_data: Any, share: float | None = None) -> str:
        with monkeypatch.context() as patch:
            plain = analysis.loss_recovered
            patch.setattr(analysis, "loss_recovered", lambda *a: plain(*a) | {"loss_recovered": share})
            return " ".join(analyse_sae(rows, asked, model=llama, eval_data=eval_data)["notes"])

    # Each text of 12 has 11 tokens to predict.
    assert few.format("99 predicted tokens") in notes(TEXTS[:9])
    assert few.format("1 predicted token") in notes([[1, 2]])
    assert "loss" not in notes([*TEXTS[:8], TEXTS[8] + [1]])
    assert "share of the loss" not in notes(TEXTS[:2], share=1.0)
    assert better in notes(TEXTS[:2], share=1.085)


def test_rows_that_are_none_of_the_models_are_not_trained_on(rows: ArrayRows, llama: HookedModel) -> None:
    values = rows.take(np.arange(100)).values

    def never(*at: int) -> None:
        raise AssertionError("training has begun")

    for name, wide, message in (
        ("layer1", values, "The autoencoder has no place in the model: Unknown hook point 'layer1'"),
        (POINT, values[:, :7], "has rows of 32 numbers in the model, and those to learn from have 7."),
        ("", values, "The rows do not say where in the model they belong"),
    ):
        with pytest.raises(HookError) as error:
            analyse_sae(ArrayRows(wide, name), OPTIONS, never, llama, eval_data=TEXTS[:2])
        assert message in str(error.value)
        assert error.value.field == "layer_name"


def test_options_are_checked(rows: ArrayRows) -> None:
    with pytest.raises(HookError, match="SAEOptions has no field 'archi'. There are: architecture, d_sae"):
        analyse_sae(rows, {"archi": "relu"})
    with pytest.raises(HookError, match="top_features must be greater than or equal to 1, got 0"):
        analyse_sae(rows, {"top_features": 0})


def test_it_is_drawn(told: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figures = draw_sae(told)
    assert [title for title, _ in figures] == ["Training", "Firing rates"]
    losses, sparsity = figures[0][1].axes
    np.testing.assert_allclose(losses.lines[0].get_ydata(), told["training_stats"][f"{POINT}/loss"])
    drawn = np.array(told["training_stats"][f"{POINT}/l0_sparsity"]) * told["d_sae"]
    np.testing.assert_allclose(sparsity.lines[0].get_ydata(), drawn)
    assert [line.get_label() for line in losses.lines][2:] == ["sparsity penalty"]
    # Of topk it is another loss, which is 0 while no latent is dead.
    stats = told["training_stats"] | {f"{POINT}/sparsity_loss": [0.0, 0.5, *[0.0] * (len(drawn) - 2)]}
    auxiliary = draw_sae(told | {"architecture": "batchtopk", "training_stats": stats})[0][1].axes[0].lines[2]
    assert auxiliary.get_label() == "auxiliary loss of dead latents"
    np.testing.assert_array_equal(auxiliary.get_ydata(), [np.nan, 0.5, *[np.nan] * (len(drawn) - 2)])
    bars = sum(bar.get_height() for bar in figures[1][1].axes[0].patches)
    assert bars == told["d_sae"] - told["n_dead"]
    for title, figure in figures:
        figure.savefig(tmp_path / f"{title}.png")
