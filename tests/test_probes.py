"""Linear probes: a label that was planted is found where it was planted and not before, and never by leaking."""

import json
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from planted_trait import PlantedTrait
from sklearn.linear_model import LogisticRegression, Ridge

from mlx_hooks import HookError
from mlx_hooks.analysis.pictures import png
from mlx_hooks.analysis.probes import _Data, analyse_probe, draw_probe
from mlx_hooks.analysis.traits.methods import usual_distance
from mlx_hooks.storage.rows import LABELS as LABELS_OF_ROWS
from mlx_hooks.storage.rows import ArrayRows, RowPart

PLANTED = PlantedTrait(layer=2, n_layers=4)
WIDTH = 12


def rows_of(values: np.ndarray, sequence: Any = None, **labels: Any) -> ArrayRows:
    """Rows of one step; without sequences, as an upload has them."""
    if sequence is not None:
        nothing = np.zeros(len(values))
        labels |= {"sequence": sequence, "step": nothing, "rank": nothing, "session": nothing}
    return ArrayRows(values, "blocks.0.hook_resid_post", ["d_model"], **labels)


def separable(n: int = 400, strength: float = 2.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows [n, WIDTH], labels that a direction tells, and the direction."""
    random = np.random.default_rng(seed)
    direction = random.normal(size=WIDTH)
    direction /= np.linalg.norm(direction)
    labels = np.arange(n) % 2
    return random.normal(size=(n, WIDTH)) + 2 * strength * (labels[:, None] - 0.5) * direction, labels, direction


@pytest.fixture(scope="module")
def planted() -> tuple[list[np.ndarray], np.ndarray]:
    """The stream after each layer at prompts' last tokens, [prompt, d_model], and which prompts were marked."""
    model = PLANTED.hooked()
    prompts = [(p, marked) for marked in (True, False) for p in PLANTED.prompts(300, marked=marked, seed=4)]
    by_length: dict[int, list[tuple[list[int], bool]]] = {}
    for prompt, marked in prompts:
        ids = model.to_tokens(prompt)[0].tolist()
        by_length.setdefault(len(ids), []).append((ids, marked))
    streams: list[list[np.ndarray]] = [[] for _ in range(4)]
    for batch in by_length.values():
        _, cache = model.run_with_cache([ids for ids, _ in batch], "blocks.*.hook_resid_post", positions="last")
        for layer, held in enumerate(streams):
            held.append(cache.numpy(("resid_post", layer))[:, -1])
    marks = np.array([marked for batch in by_length.values() for _, marked in batch])
    return [np.concatenate(held) for held in streams], marks


def test_a_planted_label_is_read_from_its_layer_on_and_not_before(planted: tuple[list[np.ndarray], np.ndarray]) -> None:
    streams, marks = planted
    for layer, values in enumerate(streams):
        found = analyse_probe(rows_of(values, np.arange(len(values))), marks)
        accuracy = found["accuracy"]
        if layer < PLANTED.layer:
            assert accuracy["low"] < 0.5 < accuracy["high"]
            assert abs(found["selectivity"]) < 0.15
        else:
            assert accuracy["mean"] > 0.95
            direction = np.array(found["direction"])
            assert direction @ PLANTED.direction > 0.9 * np.linalg.norm(direction) * np.linalg.norm(PLANTED.direction)
        assert found["control"]["accuracy"] == pytest.approx(0.5, abs=0.12)
        assert found["majority_baseline"] == 0.5


def test_a_probe_is_scikit_learns_on_rows_of_the_right_size() -> None:
    values, labels, direction = separable(strength=0.8)
    found = analyse_probe(rows_of(1000 * values + 7, np.arange(400)), labels, {"strengths": [0.3], "controls": 0})
    assert (found["train_rows"], found["test_rows"], found["strength"]) == (280, 120, 0.3)
    assert found["control"] is None
    # The split is told by nothing but the judgement: the same one from the same seed.
    again = analyse_probe(rows_of(1000 * values + 7, np.arange(400)), labels, {"strengths": [0.3], "controls": 0})
    assert again == found
    own = np.array(found["direction"])
    assert own @ direction > 0.9 * np.linalg.norm(own)
    # All rows at hand, the probe of them is the same function within what a third of the rows can move it.
    centred = 1000 * (values - values.mean(axis=0))
    unit = usual_distance(centred)
    model = LogisticRegression(C=0.3).fit(centred / unit, labels)
    np.testing.assert_allclose(own, model.coef_[0] / unit, atol=0.3 * np.abs(own).max())
    odds = (1000 * values + 7) @ own + found["bias"]
    assert np.mean((odds > 0) == labels) == pytest.approx(found["accuracy"]["mean"], abs=0.06)
    json.dumps(found, allow_nan=False)


def test_what_belongs_to_a_sequence_does_not_leak() -> None:
    # Each sequence has a place of its own, and its label is drawn: only who saw the sequence knows.
    random = np.random.default_rng(0)
    sequence = np.repeat(np.arange(60), 10)
    values = (5 * random.normal(size=(60, 40)))[sequence] + random.normal(size=(600, 40))
    labels = random.integers(0, 2, size=60)[sequence]
    by_sequence = analyse_probe(rows_of(values, sequence), labels)
    by_row = analyse_probe(rows_of(values), labels)
    assert by_sequence["split_by"] == "sequence"
    assert by_sequence["train_groups"] + by_sequence["test_groups"] == 60
    assert by_sequence["accuracy"]["mean"] < 0.7
    assert by_row["accuracy"]["mean"] > 0.9
    assert by_row["split_by"] == "row"
    assert "flatters" in by_row["notes"][0]
    # Rows of a sequence count together: eighteen sequences, not 180 rows.
    assert by_sequence["accuracy"]["n"] == by_sequence["test_groups"]
    assert by_sequence["accuracy"]["high"] - by_sequence["accuracy"]["low"] > 0.15
    assert by_sequence["control"]["accuracy"] == pytest.approx(0.5, abs=0.2)


def again_and_again(values: np.ndarray, tokens: np.ndarray, steps: int = 5) -> ArrayRows:
    """Rows [text, position, width] as they are captured at several steps, with weights that hardly change."""
    random = np.random.default_rng(9)
    n, length, width = values.shape
    captured = np.concatenate([values + 0.1 * random.normal(size=values.shape) for _ in range(steps)])
    nothing = np.zeros(steps * n * length)
    return ArrayRows(
        captured.reshape(-1, width),
        "x",
        ["d_model"],
        tokens=np.tile(tokens.ravel(), steps),
        # Another epoch has another order of texts.
        sequence=np.concatenate([np.repeat(np.roll(np.arange(n), at), length) for at in range(steps)]),
        position=np.tile(np.arange(length), steps * n),
        step=np.repeat(np.arange(steps), n * length),
        rank=nothing,
        session=nothing,
    )


def test_a_text_that_is_captured_again_does_not_leak() -> None:
    # Labels are drawn: whoever reads them has seen the text at another step.
    random = np.random.default_rng(0)
    rows = again_and_again(random.normal(size=(40, 8, 300)), random.integers(0, 500, size=(40, 8)))
    of_texts = random.permutation(np.arange(40) % 2)
    labels = np.tile(np.repeat(of_texts, 8), 5)
    found = analyse_probe(rows, labels)
    assert (found["split_by"], found["train_groups"], found["test_groups"]) == ("text", 28, 12)
    assert found["accuracy"]["n"] == 12
    assert found["accuracy"]["mean"] < 0.75
    assert found["accuracy"]["high"] - found["accuracy"]["low"] > 0.1
    assert found["notes"] == ["Confidence intervals of fewer than 20 held-out texts, here 12, are too narrow."]
    # Of few rows with labels too: which text they are of all its tokens say.
    part = np.where(random.random(len(labels)) < 0.5, labels, np.nan)
    assert analyse_probe(rows, part)["train_groups"] == 28
    unknown = ArrayRows(rows.take(np.arange(len(rows))).values, "x", **known_of(rows, "tokens"))
    assert analyse_probe(unknown, labels)["split_by"] == "sequence"
    assert "more than once may be on both sides" in analyse_probe(unknown, labels)["notes"][0]


def known_of(rows: ArrayRows, *left_out: str) -> dict[str, Any]:
    """What is known of rows besides their values."""
    part = rows.take(np.arange(len(rows)))
    return {name: getattr(part, name) for name in LABELS_OF_ROWS if name not in left_out}


def test_shuffled_labels_are_the_same_wherever_a_place_of_a_text_is_captured() -> None:
    # Labels of single rows, which nothing tells: a shuffle that broke copies apart would be easier to learn by heart.
    random = np.random.default_rng(3)
    own = random.integers(0, 2, size=(12, 6))
    labels = np.tile(own.ravel(), 4)
    places = np.tile(np.arange(72), 4)
    data = _Data(np.zeros((288, 2)), labels, places // 6, places, "text", [0, 1])
    mixed = data.shuffled(random).labels
    assert (mixed != labels).any()
    assert all(len(set(mixed[places == place])) == 1 for place in range(72))
    assert mixed[:72].sum() == own.sum()


def test_several_classes_and_a_baseline_that_is_not_even() -> None:
    random = np.random.default_rng(1)
    names = np.array(["blue", "green", "red"])[np.repeat([0, 1, 2], [300, 60, 40])]
    centres = {name: 4 * random.normal(size=WIDTH) for name in ("blue", "green", "red")}
    values = np.stack([centres[name] + random.normal(size=WIDTH) for name in names])
    found = analyse_probe(rows_of(values, np.arange(400)), names.tolist())
    assert [one["label"] for one in found["classes"]] == ["blue", "green", "red"]
    assert [one["train"] + one["test"] for one in found["classes"]] == [300, 60, 40]
    assert [one["test"] for one in found["classes"]] == [90, 18, 12]
    assert found["majority_baseline"] == pytest.approx(0.75)
    assert found["accuracy"]["mean"] > 0.98
    assert found["control"]["balanced_accuracy"] < 0.5 < found["control"]["accuracy"]
    assert np.array(found["direction"]).shape == (3, WIDTH)
    outputs = values @ np.array(found["direction"]).T + np.array(found["bias"])
    assert np.mean(np.array(["blue", "green", "red"])[outputs.argmax(axis=1)] == names) > 0.98


def test_numbers_are_read_by_ridge_regression() -> None:
    values, _, direction = separable(strength=0)
    numbers = values @ direction * 3 + 10 + 0.5 * np.random.default_rng(5).normal(size=400)
    found = analyse_probe(rows_of(values, np.arange(400)), numbers)
    assert found["task"] == "numbers"
    assert found["r2"]["low"] < found["r2"]["mean"] < found["r2"]["high"]
    assert found["r2"]["mean"] == pytest.approx(1 - 0.25 / 9.25, abs=0.02)
    np.testing.assert_allclose(found["direction"], 3 * direction, atol=0.1)
    assert found["bias"] == pytest.approx(10, abs=0.15)
    assert found["control"]["r2"] < 0.1
    assert found["mean_absolute_error"] < found["mean_absolute_error_of_the_mean"] / 3
    strong = analyse_probe(rows_of(values, np.arange(400)), numbers, {"strengths": [0.001]})
    centred = values - values.mean(axis=0)
    unit = usual_distance(centred)
    expected = Ridge(alpha=1000).fit(centred / unit, numbers).coef_ / unit
    np.testing.assert_allclose(strong["direction"], expected, atol=0.5 * np.abs(expected).max())
    assert np.linalg.norm(strong["direction"]) < 0.5 * np.linalg.norm(found["direction"])
    # Whole numbers are classes unless told otherwise.
    whole = np.round(numbers)
    assert analyse_probe(rows_of(values, np.arange(400)), whole, {"task": "numbers"})["r2"]["mean"] > 0.9


def test_the_penalty_is_chosen_within_the_training_rows() -> None:
    # Few rows, many dimensions and noise: with a weak penalty they would be learned by heart.
    random = np.random.default_rng(2)
    few = random.normal(size=(60, 100))
    noisy = few[:, 0] + 2 * random.normal(size=60)
    seen: list[tuple[int, int]] = []
    found = analyse_probe(rows_of(few, np.arange(60)), noisy, {"folds": 4}, lambda *done: seen.append(done))
    assert found["strength"] <= 1
    assert seen[-1] == (4 * 5 + 1 + 3, 24)
    many = random.normal(size=(400, 10))
    assert analyse_probe(rows_of(many, np.arange(400)), many @ np.arange(10))["strength"] == 100


TOKENS = np.arange(400) % 8


@pytest.mark.parametrize(
    "labels",
    [
        {0: "a", 1: "b", 2: "a", 3: "b"},
        {"<0>": "a", "1": "b", "<2>": "a", "<3>": "b"},
        lambda part: [{0: "a", 1: "b", 2: "a", 3: "b"}.get(int(token)) for token in part.tokens],
    ],
)
def test_labels_by_token_leave_other_tokens_out(labels: Any) -> None:
    def spell(token: int) -> str:
        return " 1" if token == 1 else f"<{token}>"

    values, _, _ = separable()
    # Each text begins with a word of its own.
    tokens = np.where(TOKENS == 7, 8 + np.arange(400) // 8, TOKENS)
    rows = rows_of(values, np.arange(400) // 8, tokens=tokens, position=(TOKENS + 1) % 8)
    found = analyse_probe(rows, labels, spell=spell)
    assert (found["rows"], found["rows_labelled"]) == (400, 200)
    assert [one["label"] for one in found["classes"]] == ["a", "b"]
    assert found["accuracy"]["mean"] > 0.9
    listed = [{0: "a", 1: "b", 2: "a", 3: "b"}.get(int(token)) for token in TOKENS]
    assert analyse_probe(rows, listed) == found
    assert found["split_by"] == "text"


def test_labels_may_be_an_array_of_mlx() -> None:
    values, labels, _ = separable()
    rows = rows_of(values, np.arange(400))
    assert analyse_probe(rows, mx.array(labels)) == analyse_probe(rows, labels)
    assert analyse_probe(rows, lambda part: mx.array(labels)) == analyse_probe(rows, labels)


def test_many_rows_are_sampled() -> None:
    values, labels, _ = separable()
    found = analyse_probe(rows_of(values, np.arange(400)), labels, {"max_rows": 100})
    assert found["train_rows"] + found["test_rows"] == 100
    assert "Of 400 labelled rows 100 were drawn" in found["notes"][0]


def answering(count: int) -> Callable[[RowPart], list[int]]:
    return lambda part: [1] * count


VALUES, LABELS, _ = separable(40)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (LABELS[:-1], {}, "labels has one per row: 40, got 39"),
        ([1] * 40, {}, "2 to 50 classes apart, got one, 1;"),
        (["a"] * 3 + [None] * 37, {}, "at least 4 labelled rows, got 3"),
        (["a"] * 39 + ["b"], {}, "'b' is not"),
        ("aaaa", {}, "labels are one per row, .*got str"),
        ([[1]] * 40, {}, r"A label is a text, a truth value or a finite number, got \[1\]"),
        ([float("inf"), 1.5] * 20, {}, "a finite number, got inf"),
        (np.ones((40, 2)), {}, r"labels has one per row, \[40\], got shape \[40, 2\]"),
        ({"a": 1}, {}, "came without tokens"),
        (answering(3), {}, "A function of labels answered 3 for 40 rows"),
        ([f"x{i}" for i in range(40)], {"task": "numbers"}, "Labels of the task 'numbers' are finite numbers"),
        ([2.5] * 40, {}, "All labels are 2.5"),
        (LABELS, {"test_share": 1.0}, "test_share must be less than 1"),
        (LABELS, {"strengths": []}, "strengths names at least one"),
        (LABELS, {"strengths": [0.0]}, r"strengths\[0\] must be greater than 0"),
    ],
)
def test_what_cannot_be_probed_is_refused(labels: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(HookError, match=message):
        analyse_probe(rows_of(VALUES), labels, options)


def test_one_sequence_and_equal_rows_are_refused() -> None:
    with pytest.raises(HookError, match="at least two sequences, got one"):
        analyse_probe(rows_of(VALUES, np.zeros(40)), LABELS + 0.5)
    with pytest.raises(HookError, match="in at least two sequences"):
        analyse_probe(rows_of(VALUES, np.zeros(40)), LABELS)
    with pytest.raises(HookError, match="the same activations"):
        analyse_probe(rows_of(np.ones((40, 3))), LABELS)


def test_a_class_may_be_many_texts_but_not_hundreds() -> None:
    values = np.random.default_rng(0).normal(size=(240, 3))
    with pytest.raises(HookError, match="got 60"):
        analyse_probe(rows_of(values), [f"c{i % 60}" for i in range(240)])


def test_the_picture_is_drawn() -> None:
    values, labels, _ = separable()
    rows = rows_of(values, np.arange(400))
    found = analyse_probe(rows, labels)
    for result in (found, {"a": found, "b": found}, analyse_probe(rows, labels + 0.5)):
        ((title, figure),) = draw_probe(result)
        assert title == "How well the label is read"
        assert png(figure).startswith(b"\x89PNG")


def test_rows_that_begin_alike_are_not_judged_as_unseen() -> None:
    # A causal model computes the same at equal beginnings, whatever follows: here 6 of 8 tokens.
    generator = np.random.default_rng(3)
    texts = np.concatenate([np.tile(np.arange(10, 16), (60, 1)), generator.integers(20, 40, (60, 2))], axis=1)
    first = np.unique(texts[:, :7], axis=0, return_inverse=True)[1].reshape(-1)
    last = np.unique(texts, axis=0, return_inverse=True)[1].reshape(-1)
    names = np.concatenate([np.tile(np.arange(6), (60, 1)), 10 + first[:, None], 100 + last[:, None]], axis=1)
    values = generator.normal(size=(names.max() + 1, 32))[names].reshape(-1, 32)
    of_names = generator.integers(0, 2, size=names.max() + 1)
    of_names[:6] = [0, 1, 0, 1, 0, 1]
    labels = of_names[names].ravel().tolist()
    columns = {"tokens": texts.ravel(), "position": np.tile(np.arange(8), 60)}
    found = analyse_probe(rows_of(values, np.arange(480) // 8, **columns), labels)
    assert found["split_by"] == "text"
    assert any("begins as theirs do" in note for note in found["notes"])
    assert found["test_rows"] < 2 * found["test_groups"] + 1
    assert 0.2 < found["accuracy"]["mean"] < 0.8
    # Where nothing but the beginning has labels, it is what is split.
    some = [label if i % 8 < 6 else None for i, label in enumerate(labels)]
    alike = analyse_probe(rows_of(values, np.arange(480) // 8, **columns), some)
    assert alike["split_by"] == "beginning"
    assert any("split by the tokens up to them" in note for note in alike["notes"])
