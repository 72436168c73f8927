"""Training sparse autoencoders: dictionaries that are known are found, and noise is not taken for one."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from superposition import angles_between_neighbours, features, train_toys

from mlx_hooks import HookedModel, HookError
from mlx_hooks.analysis.sae import training
from mlx_hooks.analysis.sae.autoencoder import SparseAutoencoder, keep_largest
from mlx_hooks.analysis.sae.measures import measure_sae
from mlx_hooks.analysis.sae.objective import Objective, pre_activations
from mlx_hooks.analysis.sae.training import ChosenRows, TrainedSAE, train_sae
from mlx_hooks.storage.rows import LABELS, ArrayRows
from mlx_hooks.storage.shards import ShardReader, ShardWriter

WIDTH, N_FEATURES, ACTIVE, LATENTS = 24, 40, 2, 56
ARCHITECTURES = ("relu", "topk", "batchtopk", "jumprelu")
FAST: dict[str, Any] = {"d_sae": LATENTS, "k": ACTIVE, "max_steps": 600, "learning_rate": 1e-2}


def dictionary(seed: int, n_rows: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Known directions [feature, width] of length 1, and rows that are sums of two of them, each 0.5 to 1.5 times."""
    random = np.random.default_rng(seed)
    directions = random.standard_normal((N_FEATURES, WIDTH))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    active = np.argsort(random.random((n_rows, N_FEATURES)), axis=1) < ACTIVE
    return directions, ((active * random.uniform(0.5, 1.5, active.shape)) @ directions).astype(np.float32)


# Training begins with random directions of its own: those of another seed.
DIRECTIONS, ROWS = dictionary(seed=777)


def mmcs(sae: SparseAutoencoder, directions: np.ndarray) -> float:
    """The mean over known directions of the largest cosine with a learned one."""
    learned = np.array(sae.W_dec, np.float64)
    learned /= np.linalg.norm(learned, axis=1, keepdims=True)
    known = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    return float((known @ learned.T).max(axis=1).mean())


def fvu_of(trained: TrainedSAE, rows: np.ndarray) -> float:
    """The fraction of variance unexplained on the rows that were held out, from the definition."""
    unseen = rows[trained.held_out].astype(np.float64)
    read = np.array(trained.sae(mx.array(rows[trained.held_out])), np.float64)
    return float(((unseen - read) ** 2).sum() / ((unseen - unseen.mean(axis=0)) ** 2).sum())


@pytest.fixture(scope="module")
def trained() -> dict[str, TrainedSAE]:
    return {architecture: train_sae(ROWS, {"architecture": architecture, **FAST}) for architecture in ARCHITECTURES}


# What is known is found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_known_dictionary_is_found(architecture: str, trained: dict[str, TrainedSAE]) -> None:
    found = trained[architecture]
    assert mmcs(found.sae, DIRECTIONS) > 0.9
    assert fvu_of(found, ROWS) < 0.1
    few = measure_sae(found.sae, ChosenRows(ArrayRows(ROWS), found.held_out))
    assert few.l0 < (12 if architecture == "relu" else 2 * ACTIVE)


def test_another_dictionary_is_not_found(trained: dict[str, TrainedSAE]) -> None:
    shuffled = np.random.default_rng(0).permuted(DIRECTIONS, axis=1)
    for found in trained.values():
        assert mmcs(found.sae, shuffled) < 0.75


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_noise_has_no_dictionary(architecture: str) -> None:
    noise = np.random.default_rng(778).standard_normal(ROWS.shape).astype(np.float32)
    found = train_sae(noise, {"architecture": architecture, **FAST, "max_steps": 300})
    assert mmcs(found.sae, DIRECTIONS) < 0.75
    # With an l1 penalty, noise is read back by many latents at once.
    unseen = measure_sae(found.sae, ChosenRows(ArrayRows(noise), found.held_out))
    assert unseen.fvu is not None
    assert unseen.fvu > 0.1 or unseen.l0 > 12


def test_features_in_superposition_form_a_pentagon_and_are_found() -> None:
    toy = train_toys(sparsity=0.95, importance=[1.0] * 5)
    assert np.all(np.abs(angles_between_neighbours(toy) - 72) < 5)
    x = features(np.random.default_rng(1), (8000, 5), 0.95)
    hidden = (x @ toy.T)[(x > 0).any(axis=1)]
    asked = {"architecture": "topk", "k": 1, "d_sae": 5, "epochs": 200, "max_steps": 400, "learning_rate": 1e-2}
    found = [train_sae(hidden, {**asked, "seed": seed}) for seed in range(4)]
    # In two dimensions some seeds share a direction between two features; their own loss tells.
    best = min(found, key=lambda one: one.stats["loss"][-1])
    assert mmcs(best.sae, toy.T) > 0.95
    assert mmcs(best.sae, -toy.T) < 0.95


def test_dense_features_are_not_in_superposition() -> None:
    toy = train_toys(sparsity=0.0, importance=[0.7**i for i in range(5)], n_seeds=3, steps=800)
    lengths = np.linalg.norm(toy, axis=0)
    assert np.all(lengths[:2] > 0.9)
    assert np.all(lengths[2:] < 0.1)
    assert abs(toy[:, 0] @ toy[:, 1]) < 0.05


# How it is trained


def test_decoder_rows_have_length_1(trained: dict[str, TrainedSAE]) -> None:
    for found in trained.values():
        np.testing.assert_allclose(np.linalg.norm(np.array(found.sae.W_dec), axis=1), 1.0, rtol=1e-5)


def test_the_same_seed_gives_the_same_autoencoder() -> None:
    short = {**FAST, "max_steps": 30}
    for architecture in ARCHITECTURES:
        mx.random.seed(1)
        one = train_sae(ROWS, {"architecture": architecture, **short})
        mx.random.seed(2)
        same = train_sae(ROWS, {"architecture": architecture, **short})
        other = train_sae(ROWS, {"architecture": architecture, **short, "seed": 1})
        assert mx.array_equal(one.sae.W_enc, same.sae.W_enc)
        assert one.stats == same.stats
        assert not mx.array_equal(one.sae.W_enc, other.sae.W_enc)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_steps_are_those_of_adam_without_what_lies_along_the_directions(architecture: str) -> None:
    options = training.SAETraining(architecture=architecture, d_sae=9, k=2, dead_features="leave", learning_rate=0.03)
    run = training._Training(ArrayRows(ROWS[:200]), options, {})
    rate = 0.03
    weights = {name: np.array(value, np.float64) for name, value in run.weights.items()}
    moments = {name: [np.zeros_like(value), np.zeros_like(value)] for name, value in weights.items()}
    for step in (1, 2, 3):
        # Of different sizes, so that some gradients are longer than 1.
        x = (0, 5, 1, 8)[step] * run._scaled(ROWS[:100])
        own = {name: mx.array(value.astype(np.float32)) for name, value in weights.items()}
        alive = mx.zeros(9, mx.bool_)
        found = mx.grad(lambda w, x=x, alive=alive: run.objective(w, x, alive, mx.array(1.0))[0])(own)
        gradients = {name: np.array(value, np.float64) for name, value in found.items()}
        directions = weights["W_dec"]
        gradients["W_dec"] -= (gradients["W_dec"] * directions).sum(axis=1, keepdims=True) * directions
        length = np.sqrt(sum((value**2).sum() for value in gradients.values()))
        for name, value in gradients.items():
            clipped = value * min(1.0, 1 / (length + 1e-6))
            first, second = moments[name]
            first[:] = 0.9 * first + 0.1 * clipped
            second[:] = 0.999 * second + 0.001 * clipped**2
            moved = rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
            weights[name] = weights[name] - moved
        weights["W_dec"] /= np.linalg.norm(weights["W_dec"], axis=1, keepdims=True)
        if "threshold" in weights:
            weights["threshold"] = np.maximum(weights["threshold"], 0)
        run.weights, run.idle, _ = run._step(run.weights, x, run.idle, mx.array(1.0))
    for name, value in weights.items():
        np.testing.assert_allclose(np.array(run.weights[name]), value, atol=2e-3)


def test_a_compiled_step_is_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    short = {"architecture": "topk", **FAST, "max_steps": 25, "dead_features": "resample"}
    plain = train_sae(ROWS, short)
    monkeypatch.setattr(training, "compiles", lambda: True)
    compiled = train_sae(ROWS, short)
    np.testing.assert_allclose(compiled.stats["loss"], plain.stats["loss"], rtol=1e-3)
    assert plain.n_resampled == compiled.n_resampled


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_size_and_place_of_the_rows_change_nothing_else(architecture: str) -> None:
    short = {"architecture": architecture, **FAST, "max_steps": 60}
    one, moved = train_sae(ROWS, short), train_sae(64 * ROWS + 256, short)
    np.testing.assert_allclose(moved.stats["loss"], one.stats["loss"], rtol=2e-3)
    features = np.array(one.sae.encode(mx.array(ROWS[:50])))
    as_large = np.array(moved.sae.encode(mx.array(64 * ROWS[:50] + 256)))
    np.testing.assert_allclose(as_large, 64 * features, atol=64 * 0.02)


def test_the_numbers_of_training(trained: dict[str, TrainedSAE]) -> None:
    for architecture, found in trained.items():
        n_train = len(ROWS) - len(found.held_out)
        assert (found.n_train, len(found.held_out), found.held_out_by) == (n_train, 400, "row")
        passes = -(-found.n_steps // -(-n_train // 256))
        stats = {name: np.array(values) for name, values in found.stats.items()}
        assert {len(values) for values in stats.values()} == {passes}
        np.testing.assert_allclose(stats["loss"], stats["recon_loss"] + stats["sparsity_loss"], rtol=1e-4)
        assert stats["loss"][-1] < stats["loss"][0]
        if architecture == "topk":
            assert np.all(stats["l0_sparsity"] <= ACTIVE / LATENTS + 1e-6)
        # The loss of the last pass is about that of the rows that were held out.
        assert abs(stats["recon_loss"][-1] - fvu_of(found, ROWS)) < 0.02


def test_training_takes_the_steps_that_were_asked_for() -> None:
    seen: list[tuple[int, int]] = []
    found = train_sae(ROWS[:300], {"epochs": 3, "batch_size": 100}, progress=lambda *at: seen.append(at))
    assert found.n_steps == 9
    assert seen == [(i + 1, 9) for i in range(9)]
    assert train_sae(ROWS[:300], {"epochs": 3, "batch_size": 100, "max_steps": 4}).n_steps == 4


def test_held_out_rows_are_whole_sequences() -> None:
    sequence = np.repeat(np.arange(40), 25)
    labels = {"step": np.repeat([0, 200], 500), "rank": np.zeros(1000), "session": np.zeros(1000)}
    rows = ArrayRows(ROWS[:1000], sequence=sequence % 20, **labels)
    found = train_sae(rows, {"max_steps": 2})
    assert found.held_out_by == "sequence"
    assert len(found.held_out) == 100
    for held in np.unique(sequence[found.held_out]):
        assert set(np.flatnonzero(sequence == held)) <= set(found.held_out)
    assert found.steps == (0, 200)
    # Of few sequences too much would be missing.
    few = ArrayRows(ROWS[:1000], sequence=sequence // 20, **labels)
    assert train_sae(few, {"max_steps": 2}).held_out_by == "row"


def test_rows_that_are_held_out_are_not_read_while_training() -> None:
    poisoned = ROWS[:1000].copy()
    held = train_sae(poisoned, {"max_steps": 1}).held_out
    read: list[np.ndarray] = []

    class Watched(ArrayRows):
        def take(self, indices: Any) -> Any:
            read.append(np.asarray(indices))
            return super().take(indices)

    train_sae(Watched(poisoned), {"epochs": 2, "architecture": "batchtopk"})
    parts = [at for at in read if not np.array_equal(at, np.arange(len(poisoned)))]
    assert len(parts) > 1
    assert not set(np.concatenate(parts)) & set(held)


def test_rows_are_streamed_from_shards(tmp_path: Path) -> None:
    layer = {"axes": ["feature"], "shape": [WIDTH], "dtype": "float32"}
    writer = ShardWriter(tmp_path, layers={"blocks.0.hook_resid_post": layer}, description={}, max_rows=300)
    for step in range(4):
        some = ROWS[250 * step : 250 * (step + 1)]
        at = np.arange(len(some), dtype=np.int32)
        writer.write(
            {"blocks.0.hook_resid_post": mx.array(some)}, tokens=at, sequence=at // 10, position=at % 10, step=step
        )
    writer.close()
    rows = ShardReader(tmp_path).rows("blocks.0.hook_resid_post")
    found = train_sae(rows, {"max_steps": 20, "d_sae": 8})
    assert found.sae.hook_name == "blocks.0.hook_resid_post"
    assert (found.held_out_by, found.steps) == ("text", (0, 1, 2, 3))
    whole = rows.take(np.arange(1000))
    labels = {name: getattr(whole, name) for name in LABELS}
    same = train_sae(ArrayRows(ROWS[:1000], **labels), {"max_steps": 20, "d_sae": 8})
    assert mx.array_equal(found.sae.W_enc, same.sae.W_enc)


@pytest.mark.parametrize("n_texts", [40, 4])
def test_a_text_is_held_out_at_all_steps(n_texts: int) -> None:
    length, n_steps = 1000 // (n_texts * 5), 5
    text = np.tile(np.repeat(np.arange(n_texts), length), n_steps)
    position = np.tile(np.arange(length), n_texts * n_steps)
    labels = {"tokens": 100 * text + position, "position": position, "sequence": text, "rank": 0 * text}
    step = np.repeat(np.arange(n_steps), n_texts * length)
    found = train_sae(ArrayRows(ROWS[:1000], step=step, session=0 * text, **labels), {"max_steps": 2})
    held = np.zeros(1000, bool)
    held[found.held_out] = True
    assert (found.held_out_by, held.sum()) == ("text" if n_texts == 40 else "row", 100)
    # Of few texts single tokens are held out, and these are the same at all steps.
    at_steps = held.reshape(n_steps, n_texts, length)
    assert np.array_equal(at_steps, np.broadcast_to(at_steps[:1], at_steps.shape))
    assert n_texts == 4 or set(at_steps[0].sum(axis=1)) == {0, length}
    # One token that was captured again and again cannot be held out whole.
    again = {name: np.zeros(50) for name in ("tokens", "position", "sequence", "rank", "session")}
    assert len(train_sae(ArrayRows(ROWS[:50], step=np.arange(50), **again), {"max_steps": 2}).held_out) == 5


def test_noise_that_is_captured_again_is_still_noise() -> None:
    random = np.random.default_rng(0)
    once = np.repeat(random.standard_normal((1, 200, 16)), 6, axis=0)
    rows = (once + 0.02 * random.standard_normal(once.shape)).reshape(-1, 16)
    text = np.tile(np.repeat(np.arange(40), 5), 6)
    labels = {"tokens": text, "position": np.tile(np.arange(5), 240), "sequence": text, "rank": 0 * text}
    labels |= {"step": np.repeat(np.arange(6), 200), "session": 0 * text}
    asked = {"architecture": "topk", "k": 2, "d_sae": 100, "epochs": 400, "max_steps": 400}
    found = train_sae(ArrayRows(rows, **labels), asked)
    assert found.stats["recon_loss"][-1] < 0.35
    assert fvu_of(found, rows.astype(np.float32)) > 0.5


def test_rows_by_head_are_read_as_they_are_at_their_hook_point(llama: HookedModel, tmp_path: Path) -> None:
    for point, reshape in (("blocks.1.attn.hook_z", "hook_z"), ("blocks.1.attn.hook_q", "none")):
        _, cache = llama.run_with_cache([[5, 17, 3, 40], [22, 9, 1, 2]], point)
        values = np.array(cache[point])
        by_head = ArrayRows(values.reshape(8, *values.shape[2:]), point, axes=["head", "d_head"])
        sae = train_sae(by_head, {"max_steps": 2, "d_sae": 16}).sae
        assert sae.reshape_activations == reshape
        again = SparseAutoencoder.load(sae.save(tmp_path / reshape))
        flat = mx.array(values.reshape(2, 4, -1))
        assert mx.array_equal(again.encode(cache[point]), sae.encode(flat))
        assert mx.array_equal(again(cache[point]).reshape(2, 4, -1), sae(flat))


def test_what_would_not_fit_is_refused_before_it_is_made() -> None:
    rows = np.random.default_rng(0).standard_normal((40, 200)).astype(np.float32)
    for options, field in (({"expansion": 50}, "expansion"), ({"d_sae": 10_000}, "d_sae")):
        with pytest.raises(HookError) as error:
            train_sae(rows, {**options, "max_steps": 1, "max_bytes": 2**27})
        assert error.value.field == field
        assert str(error.value) == (
            "10,000 latents for rows of 200 numbers take about 0.2 GiB to train, and max_bytes allows 0.1: ask for "
            "fewer latents or smaller batches."
        )
    # Many latents of narrow rows are dear too: their activations on a batch are.
    with pytest.raises(HookError, match=r"100,000 latents for rows of 3 numbers take about 10.2 GiB"):
        train_sae(np.zeros((5000, 3)), {"d_sae": 100_000})
    assert train_sae(rows, {"d_sae": 8, "max_steps": 1, "max_bytes": 2**18}).n_steps == 1
    with pytest.raises(HookError, match="max_bytes allows 0.0"):
        train_sae(rows, {"d_sae": 8, "max_steps": 1, "max_bytes": 2**17})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_memory_is_what_was_reckoned_with(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for width, d_sae, batch in ((16, 4000, 256), (256, 1024, 32)):
        rows = np.random.default_rng(0).standard_normal((2000, width)).astype(np.float32)
        reckoned = 4 * d_sae * (18 * width + 20 * max(batch, 1365))
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        train_sae(rows, {"architecture": architecture, "d_sae": d_sae, "batch_size": batch, "max_steps": 4})
        assert mx.get_peak_memory() - before < 1.1 * reckoned


def test_what_lies_along_a_direction_is_taken_off_its_gradient() -> None:
    class Still:
        """An optimizer that stays where it is and keeps what it was given."""

        def apply_gradients(self, gradients: Any, weights: Any) -> Any:
            self.gradients = gradients
            return dict(weights)

    run = training._Training(ArrayRows(ROWS[:200]), training.SAETraining(d_sae=9, dead_features="leave"), {})
    x, alive = run._scaled(ROWS[:100]), mx.zeros(9, mx.bool_)
    directions = np.array(run.weights["W_dec"], np.float64)
    found = mx.grad(lambda w: run.objective(w, x, alive, mx.array(1.0))[0])(run.weights)
    full = {name: np.array(value, np.float64) for name, value in found.items()}
    along = (full["W_dec"] * directions).sum(axis=1, keepdims=True)
    assert np.abs(along).max() > 0.01
    full["W_dec"] = full["W_dec"] - along * directions
    length = np.sqrt(sum((value**2).sum() for value in full.values()))
    run.optimizer = still = Still()
    run._step(run.weights, x, run.idle, mx.array(1.0))
    for name, value in full.items():
        np.testing.assert_allclose(np.array(still.gradients[name]), value * min(1.0, 1 / length), atol=1e-5)
    np.testing.assert_allclose((np.array(still.gradients["W_dec"]) * directions).sum(axis=1), 0.0, atol=1e-6)


# Dead latents


@pytest.mark.parametrize(
    ("architecture", "how"),
    [
        ("relu", "resample"),
        ("jumprelu", "resample"),
        ("topk", "resample"),
        ("topk", "auxiliary"),
        ("batchtopk", "auxiliary"),
    ],
)
def test_dead_latents_come_back_to_life(architecture: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, ill = training._Training._begin, mx.arange(N_FEATURES) < 12

    def with_dead_ones(self: Any) -> Any:
        weights = begin(self)
        weights["W_enc"] = mx.where(ill, 0.02 * weights["W_enc"], weights["W_enc"])
        weights["b_enc"] = mx.where(ill, -0.5 if how == "resample" else 0.0, weights["b_enc"])
        return weights

    monkeypatch.setattr(training._Training, "_begin", with_dead_ones)
    asked = {"architecture": architecture, **FAST, "d_sae": N_FEATURES, "max_steps": 240}

    def firing(found: TrainedSAE) -> int:
        rate = measure_sae(found.sae, ChosenRows(ArrayRows(ROWS), found.held_out)).firing_rate
        return int((rate[:12] > 0).sum())

    assert firing(train_sae(ROWS, {**asked, "dead_features": "leave"})) == 0
    revived = train_sae(ROWS, {**asked, "dead_features": how})
    assert firing(revived) >= 5
    assert (revived.n_resampled >= 12) == (how == "resample")


# The objective


def weights_of(seed: int = 0, width: int = 5, latents: int = 8) -> dict[str, mx.array]:
    random = np.random.default_rng(seed)
    return {
        "W_enc": mx.array(random.standard_normal((width, latents)).astype(np.float32)),
        "b_enc": mx.array(random.standard_normal(latents).astype(np.float32)),
        "W_dec": mx.array(random.standard_normal((latents, width)).astype(np.float32)),
        "b_dec": mx.array(random.standard_normal(width).astype(np.float32)),
    }


def test_the_losses_are_those_of_the_table() -> None:
    x = np.random.default_rng(5).standard_normal((7, 5)).astype(np.float32)
    weights, threshold = weights_of(), np.full(8, 0.4)
    w = {name: np.array(array, np.float64) for name, array in weights.items()}
    pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    positive = np.maximum(pre, 0)
    kept = {
        "relu": positive,
        "topk": np.where(pre >= np.sort(pre, axis=1)[:, [-2]], positive, 0),
        "batchtopk": np.where(pre >= np.sort(pre, axis=None)[-14], positive, 0),
        "jumprelu": np.where(pre > threshold, positive, 0),
    }
    for architecture, active in kept.items():
        own = weights | ({"threshold": mx.array(threshold.astype(np.float32))} if architecture == "jumprelu" else {})
        objective = Objective(architecture, k=2, penalty=0.3, target_l0=3.0)
        loss, error, sparsity, fired = objective(own, mx.array(x), mx.zeros(8, mx.bool_), mx.array(0.5))
        expected = ((x - active @ w["W_dec"] - w["b_dec"]) ** 2).sum(axis=1).mean()
        l1, l0 = active.sum(axis=1).mean(), (active > 0).sum(axis=1).mean()
        penalty = {"relu": 0.15 * l1, "jumprelu": 0.15 * (l0 / 3 - 1) ** 2}.get(architecture, 0.0)
        np.testing.assert_allclose([error.item(), sparsity.item()], [expected, penalty], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(loss.item(), expected + penalty, rtol=1e-4)
        assert np.array_equal(np.array(fired), active > 0)
        whole = {"relu": 0.3 * l1, "jumprelu": 0.3 * (l0 / 3 - 1) ** 2}.get(architecture, 0.0)
        np.testing.assert_allclose(objective.value(expected, l1, l0), expected + whole)


def test_thresholds_learn_by_straight_through_estimators() -> None:
    """Rajamanoharan et al. 2024, equations 11 and 12, with the kernel of a rectangle."""
    width, bandwidth = 0.2, 0.2
    random = np.random.default_rng(2)
    pre = random.uniform(-0.2, 1.0, (50, 4)).astype(np.float32)
    threshold = np.array([0.1, 0.3, 0.5, 0.7], np.float32)
    upstream = random.standard_normal((50, 4)).astype(np.float32)
    inside = np.abs(pre - threshold) < width / 2
    objective = Objective("jumprelu", bandwidth=bandwidth)

    def activated(threshold: mx.array, pre: mx.array) -> mx.array:
        return (objective.activations({"threshold": threshold}, pre) * mx.array(upstream)).sum()

    found = mx.grad(activated, argnums=(0, 1))(mx.array(threshold), mx.array(pre))
    expected = -(threshold / bandwidth * inside * upstream).sum(axis=0)
    np.testing.assert_allclose(np.array(found[0]), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.array(found[1]), (pre > threshold) * upstream, rtol=1e-6)
    assert inside.any(axis=0).all()

    # The penalty's gradient: of L0, - (rows inside) / bandwidth / rows; of the encoder, nothing.
    weights = {
        "W_enc": mx.eye(4), "b_enc": mx.zeros(4), "W_dec": mx.zeros((4, 4)), "b_dec": mx.zeros(4),
        "threshold": mx.array(threshold),
    }  # fmt: skip
    sparse = Objective("jumprelu", penalty=1.0, target_l0=1.0, bandwidth=bandwidth)
    gradients = mx.grad(lambda w: sparse(w, mx.array(pre), mx.zeros(4, mx.bool_), mx.array(1.0))[2])(weights)
    l0 = (pre > threshold).sum(axis=1).mean()
    np.testing.assert_allclose(
        np.array(gradients["threshold"]), 2 * (l0 - 1) * -inside.mean(axis=0) / bandwidth, rtol=1e-4
    )
    assert not np.array(gradients["W_enc"]).any()


@pytest.mark.parametrize("architecture", ["relu", "jumprelu"])
def test_what_the_optimizer_remembers_of_a_dead_latent_is_forgotten(architecture: str) -> None:
    asked = training.SAETraining(architecture=architecture, d_sae=9, max_steps=40, dead_features="resample")
    run = training._Training(ArrayRows(ROWS[:200]), asked, {})
    dead = np.isin(np.arange(9), [2, 5, 8])
    run.idle = mx.array(np.where(dead, run.patience, run.patience - 1))
    moments = {
        (name, moment): np.random.default_rng(i).uniform(1, 2, value.shape).astype(np.float32)
        for i, (name, value) in enumerate(run.weights.items())
        for moment in "mv"
    }
    for (name, moment), known in moments.items():
        run.optimizer.state[name][moment] = mx.array(known)
    run._resample(1)
    assert run.n_resampled == 3
    assert (len(moments), "threshold" in run.weights) == ((10, True) if architecture == "jumprelu" else (8, False))
    for (name, moment), known in moments.items():
        now = np.array(run.optimizer.state[name][moment])
        if name == "b_dec":
            expected = known
        elif name == "W_dec":
            expected = np.where(dead[:, None], 0, known)
        else:
            expected = np.where(dead, 0, known)
        np.testing.assert_array_equal(now, expected, err_msg=f"{name} {moment}")


def test_dead_latents_learn_what_the_others_leave_over() -> None:
    x = np.random.default_rng(5).standard_normal((7, 6)).astype(np.float32)
    weights = weights_of(width=6)
    dead = np.arange(8) < 4
    objective = Objective("topk", k=2, auxiliary=0.5)
    _, _, sparsity, _ = objective(weights, mx.array(x), mx.array(dead), mx.array(1.0))
    pre = np.array(pre_activations(weights, mx.array(x)), np.float64)
    w_dec = np.array(weights["W_dec"], np.float64)
    kept = np.where(pre >= np.sort(pre, axis=1)[:, [-2]], np.maximum(pre, 0), 0)
    left = x - kept @ w_dec - np.array(weights["b_dec"])
    # The three largest, half the width, of the dead ones.
    among = np.where(dead, pre, -np.inf)
    helping = np.where(among >= np.sort(among, axis=1)[:, [-3]], pre, 0)
    np.testing.assert_allclose(sparsity.item(), 0.5 * ((left - helping @ w_dec) ** 2).sum(axis=1).mean(), rtol=1e-4)
    none = objective(weights, mx.array(x), mx.zeros(8, mx.bool_), mx.array(1.0))[2]
    assert none.item() == 0.0
    # One dead latent is asked for a third.
    one = objective(weights, mx.array(x), mx.array(np.arange(8) < 1), mx.array(1.0))[2]
    alone = ((left - pre[:, [0]] * w_dec[0]) ** 2).sum(axis=1).mean()
    np.testing.assert_allclose(one.item(), 0.5 * alone / 3, rtol=1e-4)


def test_the_largest_of_each_row_are_kept_however_many_are_equal() -> None:
    kept = np.array(keep_largest(mx.ones((3, 7)), 2))
    assert np.array_equal(kept.sum(axis=1), [2, 2, 2])
    assert np.array_equal(np.array(keep_largest(mx.array([[3.0, 1, 2]]), 5)), [[3, 1, 2]])


# What there is to learn from


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (np.ones((1, 4)), {}, "needs at least 2 rows, got 1."),
        (np.full((50, 4), 3.7), {}, "The rows are all equal"),
        (np.zeros((50, 4)), {}, "The rows are all equal"),
        (np.array([[1.0, np.nan], [0, 1]]), {}, "not finite"),
        (np.array([[1.0, np.inf], [0, 1]]), {}, "not finite"),
        (ROWS, {"architecture": "gated"}, "architecture must be 'relu', 'topk', 'batchtopk' or 'jumprelu'"),
        (ROWS, {"architecture": "topk", "k": 30, "d_sae": 20}, "k is at most the number of latents, 20; got 30."),
        (ROWS, {"target_l0": 21.0, "d_sae": 20}, "target_l0 is at most the number of latents, 20; got 21."),
        (ROWS, {"d_sae": 0}, "d_sae must be greater than or equal to 1"),
        (ROWS, {"bach_size": 5}, "has no field 'bach_size'"),
        (ROWS, {"learning_rate": float("nan")}, "learning_rate must be"),
    ],
)
def test_what_cannot_be_learned_from_is_one_sentence(rows: np.ndarray, options: dict[str, Any], message: str) -> None:
    with pytest.raises(HookError) as error:
        train_sae(rows, options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("shape", "options"), [((2, 3), {}), ((30, 1), {}), ((30, 4), {"d_sae": 1}), ((7, 3), {"batch_size": 256})]
)
def test_little_is_enough(architecture: str, shape: tuple[int, int], options: dict[str, Any]) -> None:
    rows = np.random.default_rng(0).standard_normal(shape)
    found = train_sae(rows, {"architecture": architecture, "max_steps": 20, **options})
    assert len(found.held_out) >= 1
    assert found.n_train + len(found.held_out) == len(rows)
    assert np.isfinite(np.array(found.sae(mx.array(rows.astype(np.float32))))).all()
    assert np.isfinite(found.stats["loss"]).all()


def test_large_and_small_numbers_are_scaled_away() -> None:
    for size in (1e-12, 1e12):
        found = train_sae((ROWS[:500] * np.float32(size)), {"max_steps": 60, "d_sae": 40})
        assert fvu_of(found, ROWS[:500] * np.float32(size)) < 1
